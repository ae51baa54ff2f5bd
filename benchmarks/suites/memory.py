"""The peak of memory of whole conversions and of one layer, each in a process of its own.

    python -m benchmarks memory [--cases resnet50 "calibrated resnet18" ...]

"before" is what the process holds with the model and its inputs made, "peak" the most it held until the conversion was
done; both are of the whole process, so what the conversion took is their difference.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.results import Sheet

Work = Callable[[], object]
ROOT = Path(__file__).resolve().parents[2]


def torchvision_model(name: str, calibrated: bool = False) -> Work:
    import torch
    import torchvision

    import convsplit

    model = torchvision.models.get_model(name, weights=None).eval()
    images = [torch.randn(4, 3, 224, 224) for _ in range(4)] if calibrated else None
    return lambda: convsplit.convert(model, calibration=images, budget=convsplit.Budget(params=0.5))


def the_digits() -> Work:
    import convsplit
    from benchmarks.subjects import digits

    subject = digits()
    return lambda: convsplit.convert(subject.model, calibration=subject.calibration(512, 0))


def widest() -> Work:
    import torch

    import convsplit

    conv = torch.nn.Conv2d(2048, 2048, 3, bias=False)
    return lambda: convsplit.SeparableConv2d.from_conv(conv, form="pw-dw-pw", rank=1024)


CASES: dict[str, Callable[[], Work]] = {
    "digits, calibrated with 512 images": the_digits,
    "resnet18": lambda: torchvision_model("resnet18"),
    "resnet50": lambda: torchvision_model("resnet50"),
    "resnet18, calibrated with 16 images": lambda: torchvision_model("resnet18", calibrated=True),
    "one layer 2048x2048x3x3, R = 1024": widest,
}


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="parts of their names")


QUICK = {"cases": ["digits"]}


def measure(arguments: Namespace) -> Iterator[Sheet]:
    from benchmarks.results import Kind, Sheet
    from convsplit.tables import Table

    rows = []
    for name in (name for name in CASES if any(part in name for part in arguments.cases)):
        command = [sys.executable, "-m", "benchmarks.suites.memory", name]
        told = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        before, peak = json.loads(told)
        rows.append([name, f"{before:.0f}", f"{peak:.0f}", f"{peak - before:.0f}"])
        print(rows[-1], file=sys.stderr, flush=True)
    table = Table(["case", "before (MB)", "peak (MB)", "conversion (MB)"], rows, frozenset({"case"}))
    yield Sheet("memory", table, ["case"], {"peak (MB)": Kind("lower", relative=0.25)})


def in_this_process(name: str) -> tuple[float, float]:
    """Megabytes before, and the peak."""
    work = CASES[name]()
    before = _peak()
    work()
    return before, _peak()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in kilobytes


if __name__ == "__main__":
    print(json.dumps(in_this_process(sys.argv[1])))
