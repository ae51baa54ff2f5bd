"""What else decides how fast a split network is: widths, memory that is given back, and what a choice prefers.

    python -m benchmarks speed [NETWORKS.py] [--depths 20] [--parts widths memory preference] [--seconds 20]

"widths": the first layer of a ResNet as pw-dw-pw of some numbers of components, in the runtimes that store images in
blocks of channels. "memory": a torchvision network, dense and at a quarter of its MACs, where glibc gives the memory of
large feature maps back at every call, and where two of its environment variables tell it to keep it. "preference": a
trained network at a half of its parameters, chosen for accuracy, and for speed in eager PyTorch. One thread, so times
are the processor's own; what is compared is run in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import convsplit
from benchmarks.baselines.packages import parameters
from benchmarks.figures import QUALITY, compared
from benchmarks.results import FASTER, Result, Sheet
from benchmarks.subjects import ROOT, Subject, add_options, answers, subjects
from convsplit import Budget, Stopwatch
from convsplit.measure.timing import milliseconds_in_turns
from convsplit.runtimes import runtime_of
from convsplit.tables import Table, milliseconds, percent, times_faster

WIDTHS = (14, 15, 16)  # a block is 8 channels with AVX2, 16 with AVX-512
IN_BLOCKS = ("onnxruntime", "openvino")
MEMORY = {"given back": {}, "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}}


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=20.0, help="for the times of each comparison")
    parser.add_argument("--model", default="vgg16_bn", help="of torchvision, for memory")
    parser.add_argument("--batch", type=int, default=8, help="of images of 224 x 224, for memory")


QUICK = {"parts": ["widths"], "seconds": 2.0}


def measure(arguments: Namespace) -> Iterator[Sheet]:
    torch.set_num_threads(1)
    for part in arguments.parts:
        yield PARTS[part](arguments)


def widths(arguments: Namespace) -> Sheet:
    conv, image = nn.Conv2d(3, 64, 7, 2, 3).eval(), torch.randn(1, 3, 224, 224)
    layers = [convsplit.convert(conv, image, forms="pw-dw-pw", rank=rank, progress=False) for rank in WIDTHS]
    columns = []
    for name in IN_BLOCKS:
        runtime = runtime_of(name)
        runs = [runtime.prepare(layer, image) for layer in layers]
        times = milliseconds_in_turns(runs, arguments.seconds, clock=runtime.clock(torch.device("cpu")))
        columns.append([milliseconds(time) for time in times])
    rows = [[str(rank), *cells] for rank, *cells in zip(WIDTHS, *columns, strict=True)]
    table = Table(["components", *(f"{name} ms" for name in IN_BLOCKS)], rows)
    return Sheet("widths", table, ["components"], notes="3 -> 64 channels, 7 x 7, stride 2, one image of 224 x 224.")


def memory(arguments: Namespace) -> Sheet:
    rows = [[name, *_in_a_process(setting, arguments)] for name, setting in MEMORY.items()]
    table = Table(["memory", "ms", "->", "faster"], rows, frozenset({"memory"}))
    notes = f"{arguments.model} at batch {arguments.batch} and a quarter of its MACs, eager PyTorch, channels-last."
    return Sheet("memory", table, ["memory"], {"faster": FASTER}, notes)


def _in_a_process(setting: dict[str, str], arguments: Namespace) -> list[str]:
    """What the suite of latency finds in a process of its own, whose environment has these variables."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "latency.json")
        given = {
            "models": arguments.model, "batches": arguments.batch, "seconds": arguments.seconds, "threads": 1,
            "budgets": "macs=0.25", "layouts": "channels_last", "json": file,
        }  # fmt: skip
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "benchmarks", "latency", "--no-layers", *words]
        subprocess.run(command, cwd=ROOT, env=os.environ | setting, stdout=subprocess.DEVNULL, check=True)
        (sheet,) = Result.read(file).sheets
    (cells,) = (dict(zip(sheet.table.headings, row, strict=True)) for row in sheet.table.rows)
    return [cells[heading] for heading in ("ms", "->", "faster")]


def preference(arguments: Namespace) -> Sheet:
    rows = [row for subject in subjects(arguments) for row in _preferences(subject, arguments.seconds)]
    keys = ["network", "chosen for"]
    table = Table([*keys, "layers split", "parameters", "ms", "faster", *QUALITY], rows, frozenset(keys))
    notes = "A half of the parameters, no repair; eager PyTorch, batch 128."
    return Sheet("preference", table, keys, {"faster": FASTER, **QUALITY}, notes)


def _preferences(subject: Subject, seconds: float) -> Iterator[list[str]]:
    images, budget = subject.images[:128], Budget(params=0.5)
    watch = Stopwatch(seconds=seconds)
    models = {"dense": subject.model, "accuracy": convsplit.convert(subject.model, images, budget=budget)}
    models["speed"] = convsplit.convert(subject.model, images, budget=budget, prefer="speed", stopwatch=watch)
    eager = runtime_of("torch")
    runs = [eager.prepare(model, images) for model in models.values()]
    times = milliseconds_in_turns(runs, seconds, clock=eager.clock(torch.device("cpu")))
    dense, whole = answers(subject.model, subject.images), parameters(subject.model)
    for (name, model), time in zip(models.items(), times, strict=True):
        split = sum(isinstance(module, convsplit.layers.SeparableConv) for module in model.modules())
        quality = compared(dense, answers(model, subject.images), subject.labels)
        kept = percent(parameters(model) / whole)
        yield [
            subject.name, name, str(split), kept, milliseconds(time), times_faster(times[0], time), *quality.cells()
        ]  # fmt: skip


PARTS = {"widths": widths, "memory": memory, "preference": preference}
