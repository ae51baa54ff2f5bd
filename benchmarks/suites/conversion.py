"""Seconds of whole conversions, with this code and, side by side, with earlier code.

    python -m benchmarks conversion [--networks NETWORKS.py] [--photos PHOTOS.py] [--before CHECKOUT]
                                   [--runs 3] [--threads 2] [--cases ...] [--busy]

CHECKOUT is a folder with another version of convsplit. Every run is a process of its own, so that it pays for what a
first conversion pays (but not for imports), and versions take turns, so that a busy machine is busy for both. Median
of the seconds, their least and most, and the seconds of the processors.

NETWORKS.py as in benchmarks/subjects.py; PHOTOS.py defines `inception_v3()`, a trained InceptionV3 in eval mode.
A case is a function in CASES that prepares what is needed and returns what is timed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.results import Sheet

Case = Callable[[Namespace], Callable[[], object]]

ROOT = Path(__file__).resolve().parents[2]


def resnet50(arguments: Namespace) -> Callable[[], object]:
    import torchvision

    import convsplit

    model = torchvision.models.resnet50(weights=None).eval()
    return lambda: convsplit.convert(model, budget=convsplit.Budget(params=0.5))


def quickstart(arguments: Namespace) -> Callable[[], object]:
    sys.path.append(str(ROOT / "examples"))
    from digits import small_resnet

    import convsplit

    model = small_resnet(seed=0).eval()
    return lambda: convsplit.convert(model, budget=convsplit.Budget(params=0.5))


def inception(arguments: Namespace) -> Callable[[], object]:
    import convsplit

    model = _module(arguments.photos).inception_v3()
    return lambda: convsplit.convert(model, budget=convsplit.Budget(params=0.5))


def cifar(depth: int, images: int = 0) -> Case:
    def case(arguments: Namespace) -> Callable[[], object]:
        import convsplit

        networks = _module(arguments.networks)
        model, budget = networks.resnet(depth), convsplit.Budget(params=0.5)
        batches = list(networks.cifar10()[0][:images].split(64)) if images else None
        return lambda: convsplit.convert(model, budget=budget, calibration=batches)

    return case


CASES: dict[str, Case] = {
    "ResNet-50, random weights, at a half, no data": resnet50,
    "quickstart's network, 244 k parameters, at a half, no data": quickstart,
    "InceptionV3, trained, at a half, no data": inception,
    "ResNet-20 of CIFAR-10, at a half, no data": cifar(20),
    "ResNet-56 of CIFAR-10, at a half, no data": cifar(56),
    "ResNet-20 of CIFAR-10, at a half, 512 images": cifar(20, 512),
    "ResNet-56 of CIFAR-10, at a half, 512 images": cifar(56, 512),
}
NEEDS = {inception: "photos"} | {case: "networks" for name, case in CASES.items() if "CIFAR" in name}


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--networks", help="a file with trained networks")
    parser.add_argument("--photos", help="a file with a trained InceptionV3")
    parser.add_argument("--before", help="a folder with earlier code")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="parts of their names")
    parser.add_argument("--busy", action="store_true", help="with another process that keeps one core busy")


QUICK = {"runs": 1, "threads": 1, "cases": ["quickstart"]}


def measure(arguments: Namespace) -> Iterator[Sheet]:
    from benchmarks.clock import another_process
    from benchmarks.results import Sheet
    from convsplit.tables import Table

    versions = {"now": str(ROOT)} | ({"before": arguments.before} if arguments.before else {})
    rows = []
    for name, case in CASES.items():
        if not any(part in name for part in arguments.cases) or not getattr(arguments, NEEDS.get(case, "cases")):
            continue
        runs: dict[str, list[tuple[float, float]]] = {version: [] for version in versions}
        with another_process() if arguments.busy else nullcontext():
            for _ in range(arguments.runs):
                for version, folder in versions.items():
                    runs[version].append(in_own_process(name, arguments, folder))
                    print(name, version, *runs[version][-1], file=sys.stderr, flush=True)
        rows.append([name, *_figures(runs["now"]), *(_figures(runs["before"]) if "before" in runs else [])])
    headings = ["case", "median s", "least", "most", "CPU s"]
    headings += [f"{heading} before" for heading in headings[1:]] if arguments.before else []
    yield Sheet("conversion", Table(headings, rows, frozenset({"case"})), ["case"])


def in_own_process(name: str, arguments: Namespace, folder: str) -> tuple[float, float]:
    """Seconds, and seconds of all processors, of a case with the code in the folder."""
    given = {"name": name, "threads": arguments.threads, "networks": arguments.networks, "photos": arguments.photos}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
    command = [sys.executable, __file__, json.dumps(given)]
    seconds, busy = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    return seconds, busy


def in_this_process(given: Namespace) -> tuple[float, float]:
    import torch

    from benchmarks.clock import timed

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    work = timed(CASES[given.name](given))
    return work.seconds, work.cpu


def _figures(runs: list[tuple[float, float]]) -> list[str]:
    seconds, busy = zip(*runs, strict=True)
    return [
        f"{each:.1f}" for each in (statistics.median(seconds), min(seconds), max(seconds), statistics.median(busy))
    ]


def _module(path: str) -> ModuleType:
    from benchmarks.subjects import load_networks

    return load_networks(path)


if __name__ == "__main__":  # a process of its own, which may have earlier code of convsplit
    print(json.dumps(in_this_process(Namespace(**json.loads(sys.argv[1])))))
