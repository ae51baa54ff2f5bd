"""convsplit beside what one would use instead: same weights, inputs, budgets and threads, in one run.

    python -m benchmarks peers [NETWORKS.py] [--depths 20] [--budgets macs=0.5 macs=0.25 params=0.25] [--ways ...]

Budgets are of the convolutions larger than 1x1. Factorisations get the same part in every layer, which is what these
methods do unless somebody searches with labels; pruning, and what takes a part to remove, removes the least with which
the whole model has no more MACs (parameters) than it would have then. "recalibrated" is the accuracy lost after batch
norm was recalibrated with the images that convsplit repairs with, the repair without labels that suits every method.
"drift of features" is that of what the first linear layer reads, a finer measure than a few logits. Where nobody has
labelled the images, there is no accuracy. Baselines are in benchmarks/baselines/, packages are called as their
documentation says. What a way cannot do is said in its row. Times are medians of the processor's own, all models in
turns, dense first.
"""

from __future__ import annotations

import copy
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import convsplit
from benchmarks.baselines import packages
from benchmarks.baselines.sequences import BASELINES, Baseline, Chain, convolutions, cost, split_equally
from benchmarks.clock import at_most, timed
from benchmarks.figures import QUALITY, compared
from benchmarks.results import COUNT, DRIFT, FASTER, Sheet
from benchmarks.subjects import Subject, add_options, answers, subjects
from convsplit import Budget
from convsplit.cli.arguments import budget as budget_of
from convsplit.measure.timing import milliseconds_in_turns
from convsplit.runtimes import runtime_of
from convsplit.runtimes.base import Run
from convsplit.tables import Table, milliseconds, ratio, times_faster

EAGER, ONNX = "torch", "onnxruntime"
INT8 = "torchao, int8, compiled"
KEYS = ["budget", "way"]
SIZES = ["parameters kept", "MACs kept", "bytes kept"]
ANSWERS = {**QUALITY, "drift of features": DRIFT}
AGAIN = {f"recalibrated: {name}": ANSWERS[name] for name in ("points lost", "drift", "drift of features")}
TIMES = ["eager ms", "eager, faster", "ONNX Runtime ms", "ONNX Runtime, faster"]
KINDS = {
    **dict.fromkeys(SIZES, COUNT), **ANSWERS, **AGAIN, "eager, faster": FASTER, "ONNX Runtime, faster": FASTER,
}  # fmt: skip
HEADINGS = [*KEYS, *SIZES, *ANSWERS, *AGAIN, *TIMES, "CPU s", "cannot"]


@dataclass(frozen=True)
class Task:
    """What a way is given."""

    subject: Subject
    data: list[Tensor]
    budget: Budget

    @property
    def image(self) -> Tensor:
        return self.subject.images[:1]

    def spent(self, model: nn.Module) -> int:
        """MACs or parameters of the whole model."""
        if self.budget.kind == "params":
            return packages.parameters(model)
        return packages.multiply_adds(model, self.image)

    def limit(self) -> float:
        """Of the whole model, when the convolutions keep what the budget says."""
        found = convolutions(self.subject.model, self.image).values()
        shrunk = sum(cost(Chain(conv), shape, self.budget.kind) for conv, shape in found)
        return self.spent(self.subject.model) - (1 - self.budget.fraction) * shrunk


Way = Callable[[Task], nn.Module]


def converted(task: Task) -> nn.Module:
    return convsplit.convert(task.subject.model, task.image, budget=task.budget, progress=False)


def repaired(task: Task) -> nn.Module:
    return convsplit.convert(
        task.subject.model, task.image, budget=task.budget, calibration=task.data, progress=False
    )


def factorised(baseline: Baseline, task: Task) -> nn.Module:
    return split_equally(task.subject.model, task.image, task.budget.kind, task.budget.fraction, baseline)


def pruned(task: Task) -> nn.Module:
    return packages.least_removed(packages.torch_pruning(task.subject.model, task.image), task.spent, task.limit())


def decomposed(method: str, task: Task) -> nn.Module:
    return packages.least_removed(packages.fasterai(task.subject.model, method), task.spent, task.limit())


def ways() -> dict[str, Way]:
    """convsplit's first."""
    found: dict[str, Way] = {"convsplit": converted, "convsplit, repaired": repaired}
    found |= {each.name: partial(factorised, each) for each in (*BASELINES, *packages.tensorly_torch())}
    found["torch-pruning, channels"] = pruned
    found |= {f"fasterai, {method}": partial(decomposed, method) for method in ("tucker", "svd", "spatial", "cp")}
    found[INT8] = lambda task: packages.torchao_int8(task.subject.model, task.data)
    return found


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--budgets", type=budget_of, nargs="+", default=[Budget(macs=0.5), Budget(macs=0.25)])
    parser.add_argument("--ways", nargs="+", default=list(ways()), help="parts of their names")
    parser.add_argument("--calibration", type=int, default=512, help="unlabelled images")
    parser.add_argument("--images", type=int, help="of the test images only so many")
    parser.add_argument("--batch", type=int, default=64, help="of what is timed")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the times of each budget and runtime")
    parser.add_argument("--limit", type=float, default=900.0, help="CPU seconds that another method may take")
    parser.add_argument("--runtimes", nargs="*", default=[EAGER, ONNX], choices=[EAGER, ONNX])


QUICK = {
    "budgets": [Budget(macs=0.25)], "calibration": 256, "seconds": 6.0, "runtimes": [EAGER],
    "ways": ["convsplit", "slice-wise", "spatial SVD", "Tucker", "torch-pruning"],
}  # fmt: skip


def measure(arguments: Namespace) -> Iterator[Sheet]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for whole in subjects(arguments):
        subject = replace(whole, images=whole.images[: arguments.images], labels=whole.labels[: arguments.images])
        rows = []
        for budget in arguments.budgets:
            rows += of_budget(subject, budget, arguments)
        yield Sheet(
            subject.name, Table(HEADINGS, rows, frozenset({*KEYS, "cannot"})), KEYS, KINDS, notes(subject, arguments)
        )


def notes(subject: Subject, arguments: Namespace) -> str:
    shown = [each for each in BASELINES if any(part in each.name for part in arguments.ways)]
    sources = "; ".join(f"{each.name}: {each.source}" for each in shown)
    calibration = min(arguments.calibration, len(subject.unlabelled))
    times = f" times at batch {min(arguments.batch, len(subject.images))}, one thread;" if arguments.runtimes else ""
    return (
        f"{len(subject.images)} test images, 95 % intervals; {calibration} images without labels;{times} {sources}."
    )


@dataclass
class Candidate:
    """A model, or None, the cells of its row that are known, and what it cannot do."""

    way: str
    model: nn.Module | None
    quality: list[str] = field(default_factory=lambda: ["-"] * len(ANSWERS))
    again: list[str] = field(default_factory=lambda: ["-"] * len(AGAIN))
    seconds: str = ""
    cannot: list[str] = field(default_factory=list)


def of_budget(subject: Subject, budget: Budget, arguments: Namespace) -> list[list[str]]:
    """The rows of a budget, the dense network first."""
    task = Task(subject, subject.calibration(arguments.calibration, seed=0), budget)
    meter = Meter(subject)
    found = [Candidate("dense", subject.model, meter.cells(subject.model))]
    for name, way in ways().items():
        if any(part in name for part in arguments.ways):
            own = candidate(name, way, task, meter, arguments.limit)
            found.append(own)
            known = [*own.quality, *own.again, own.seconds, *own.cannot]
            print(subject.name, budget, name, known, file=sys.stderr, flush=True)
    images = subject.images[: arguments.batch]
    times = {runtime: times_of(found, images, runtime, arguments.seconds) for runtime in arguments.runtimes}
    shown = f"{budget.kind}={budget.fraction:g}"
    return [_row(shown, each, task, [(t[0], t[index]) for t in _both(times, len(found))])
            for index, each in enumerate(found)]  # fmt: skip


def candidate(name: str, way: Way, task: Task, meter: Meter, limit: float) -> Candidate:
    """What a way makes of the network, or why it makes nothing; convsplit has no limit, and its errors are raised."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    own = name.startswith("convsplit")
    try:
        with nullcontext() if own else at_most(limit):
            work = timed(lambda: way(task))
        quality = meter.cells(work.result)
    except Exception as error:
        if own:
            raise
        return Candidate(name, None, cannot=[_told(error)])
    again = ["-"] * len(AGAIN)
    if name not in ("convsplit, repaired", INT8):
        cells = dict(zip(ANSWERS, meter.cells(_recalibrated(work.result, task.data)), strict=True))
        again = [cells[heading.removeprefix("recalibrated: ")] for heading in AGAIN]
    return Candidate(name, work.result, quality, again, f"{work.cpu:.1f}")


def _told(error: Exception) -> str:
    """The first line, short and fit for a cell."""
    first = next(iter(str(error).splitlines()), "").replace("|", "/").strip()
    return f"{type(error).__name__}: {first[:90]}"


class Meter:
    """Answers of a network against those of the dense one, on the test images."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.logits, self.features = read(subject.model, subject.images)

    def cells(self, model: nn.Module) -> list[str]:
        """In the order of `ANSWERS`."""
        logits, features = read(model, self.subject.images)
        known = dict(zip(QUALITY, compared(self.logits, logits, self.subject.labels).cells(), strict=True))
        if not self.subject.labelled:
            known |= {"accuracy": "-", "points lost": "-"}
        return [*known.values(), self._drift(features)]

    def _drift(self, features: Tensor | None) -> str:
        if self.features is None or features is None or features.shape != self.features.shape:
            return "-"  # fewer channels, or no such layer
        return f"{float((features - self.features).norm() / self.features.norm()):.3f}"


def read(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """The outputs, and what the first linear layer reads."""
    first = next((module for module in model.modules() if isinstance(module, nn.Linear)), None)
    if first is None:
        return answers(model, images), None
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        return answers(model, images), torch.cat(seen)
    finally:
        hook.remove()


def _both(times: dict[str, list[float | None]], count: int) -> list[list[float | None]]:
    return [times.get(runtime, [None] * count) for runtime in (EAGER, ONNX)]


def _recalibrated(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """A copy with batch norm recalibrated on the unlabelled images."""
    model = copy.deepcopy(model)
    convsplit.repair.recalibrate(model, data, progress=False)
    return model


def times_of(found: list[Candidate], images: Tensor, runtime: str, seconds: float) -> list[float | None]:
    """Milliseconds of each, in turns; None where a model does not run there."""
    prepared = {index: _prepared(each, images, runtime) for index, each in enumerate(found)}
    runs = {index: run for index, run in prepared.items() if run is not None}
    clock = runtime_of(runtime).clock(torch.device("cpu"))
    measured = milliseconds_in_turns(list(runs.values()), seconds, clock=clock)
    by_index = dict(zip(runs, measured, strict=True))
    return [by_index.get(index) for index in range(len(found))]


def _prepared(candidate: Candidate, images: Tensor, runtime: str) -> Run | None:
    if candidate.model is None or (candidate.way == INT8 and runtime != EAGER):
        return None
    try:
        if candidate.way == INT8:
            return _compiled(candidate.model, images)
        return runtime_of(runtime).prepare(candidate.model, images)
    except Exception as error:  # whatever an exporter or compiler raises, the model does not run there
        candidate.cannot.append(f"{runtime}: {_told(error)}")
        return None


def _compiled(model: nn.Module, images: Tensor) -> Run:
    answer = packages.compiled(model)

    def run() -> None:
        with torch.no_grad():
            answer(images)

    run()
    return run


def _row(budget: str, own: Candidate, task: Task, times: list[tuple[float | None, float | None]]) -> list[str]:
    shown = [cell for before, now in times for cell in (milliseconds(now), times_faster(before, now))]
    return [budget, own.way, *_kept(own, task), *own.quality, *own.again, *shown, own.seconds, "; ".join(own.cannot)]


def _kept(own: Candidate, task: Task) -> list[str]:
    """In the order of `SIZES`."""
    if own.model is None:
        return ["-"] * len(SIZES)
    dense = task.subject.model
    held = ratio(_bytes(own.model), _bytes(dense))
    if own.way == INT8:  # as many as before, of a quarter of the bits
        return ["100.0 %", "100.0 %", held]
    multiply_adds = (packages.multiply_adds(model, task.image) for model in (own.model, dense))
    return [ratio(packages.parameters(own.model), packages.parameters(dense)), ratio(*multiply_adds), held]


def _bytes(model: nn.Module) -> int:
    """Of what is stored, each tensor once; of a graph, what it reads: torchao leaves the float weights beside."""
    held = model.state_dict(keep_vars=True)
    if isinstance(model, GraphModule):
        held = {node.target: _attribute(model, node.target) for node in model.graph.nodes if node.op == "get_attr"}
    tensors = {t.untyped_storage().data_ptr(): t for t in held.values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _attribute(model: nn.Module, path: str) -> object:
    for name in path.split("."):
        model = getattr(model, name)
    return model
