"""convsplit beside what one would use instead: same weights, inputs, budgets and threads, in one run.

    python -m benchmarks peers [NETWORKS.py ...] [--depths 20] [--budgets macs=0.5 macs=0.25 params=0.25] [--ways ...]

Budgets are of the convolutions larger than 1x1. Factorisations get the same part in every layer, which is what these
methods do unless somebody searches with labels; pruning, and what takes a part to remove, removes the least with which
the whole model has no more MACs (parameters) than it would have then. "recalibrated" is the accuracy lost after batch
norm was recalibrated with the images that convsplit repairs with, the repair without labels that suits every method.
Baselines are in benchmarks/baselines/, packages are called as their documentation says and left out where they are not
installed. Times are medians of the processor's own, all models in turns, dense first.
"""

from __future__ import annotations

import copy
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import convsplit
from benchmarks.baselines import packages
from benchmarks.baselines.sequences import BASELINES, Baseline, Chain, convolutions, cost, split_equally
from benchmarks.clock import timed
from benchmarks.figures import QUALITY, compared
from benchmarks.results import COUNT, FASTER, POINTS, Sheet
from benchmarks.subjects import Subject, add_options, answers, subjects
from convsplit import Budget
from convsplit.cli.arguments import budget as budget_of
from convsplit.measure.timing import milliseconds_in_turns
from convsplit.runtimes import runtime_of
from convsplit.runtimes.base import Run
from convsplit.tables import Table, milliseconds, ratio, times_faster

EAGER, ONNX = "torch", "onnxruntime"
KEYS = ["budget", "way"]
KINDS = {
    "parameters kept": COUNT, "MACs kept": COUNT, "bytes kept": COUNT, **QUALITY, "recalibrated: points lost": POINTS,
    "eager, faster": FASTER, "ONNX Runtime, faster": FASTER,
}  # fmt: skip
HEADINGS = [
    *KEYS, "parameters kept", "MACs kept", "bytes kept", *QUALITY, "recalibrated: points lost", "eager ms",
    "eager, faster", "ONNX Runtime ms", "ONNX Runtime, faster", "CPU s",
]  # fmt: skip


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
    """Those whose packages are installed; convsplit's first."""
    found: dict[str, Way] = {"convsplit": converted, "convsplit, repaired": repaired}
    found |= {baseline.name: partial(factorised, baseline) for baseline in BASELINES}
    if packages.installed("tltorch"):
        found |= {baseline.name: partial(factorised, baseline) for baseline in packages.tensorly_torch()}
    if packages.installed("torch_pruning"):
        found["torch-pruning, channels"] = pruned
    if packages.installed("fasterai"):
        found |= {f"fasterai, {method}": partial(decomposed, method) for method in ("tucker", "svd", "spatial", "cp")}
    return found


INT8 = "torchao, int8, compiled"


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--budgets", type=budget_of, nargs="+", default=[Budget(macs=0.5), Budget(macs=0.25)])
    parser.add_argument("--ways", nargs="+", default=[*ways(), INT8], help="parts of their names")
    parser.add_argument("--calibration", type=int, default=512, help="unlabelled images")
    parser.add_argument("--batch", type=int, default=64, help="of what is timed")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the times of each budget and runtime")
    parser.add_argument("--runtimes", nargs="*", default=[EAGER, ONNX], choices=[EAGER, ONNX])


QUICK = {
    "budgets": [Budget(macs=0.25)], "calibration": 256, "seconds": 6.0, "runtimes": [EAGER],
    "ways": ["convsplit", "slice-wise", "spatial SVD", "Tucker", "torch-pruning"],
}  # fmt: skip


def measure(arguments: Namespace) -> Iterator[Sheet]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for subject in subjects(arguments):
        rows = []
        for budget in arguments.budgets:
            rows += of_budget(subject, budget, arguments)
        sources = "; ".join(f"{baseline.name}: {baseline.source}" for baseline in BASELINES)
        notes = (
            f"{len(subject.images)} test images, 95 % intervals; {arguments.calibration} images without labels; times "
            f"at batch {min(arguments.batch, len(subject.images))}, one thread. {sources}."
        )
        yield Sheet(subject.name, Table(HEADINGS, rows, frozenset(KEYS)), KEYS, KINDS, notes)


@dataclass
class Candidate:
    """A model, and the cells of its row that are known."""

    way: str
    model: nn.Module
    quality: list[str]
    recalibrated: str = "-"
    seconds: str = ""


def of_budget(subject: Subject, budget: Budget, arguments: Namespace) -> list[list[str]]:
    """The rows of a budget, the dense network first."""
    task = Task(subject, subject.calibration(arguments.calibration, seed=0), budget)
    dense = answers(subject.model, subject.images)

    def quality(model: nn.Module) -> list[str]:
        return compared(dense, answers(model, subject.images), subject.labels).cells()

    found = [Candidate("dense", subject.model, quality(subject.model))]
    for name, way in ways().items():
        if any(part in name for part in arguments.ways):
            torch.manual_seed(0)
            numpy.random.seed(0)
            work = timed(lambda: way(task))  # noqa: B023
            own = Candidate(name, work.result, quality(work.result), seconds=f"{work.cpu:.1f}")
            if name != "convsplit, repaired":
                own.recalibrated = _recalibrated(work.result, task, quality)
            found.append(own)
            print(subject.name, budget, name, own.quality, own.recalibrated, own.seconds, file=sys.stderr, flush=True)
    if any(part in INT8 for part in arguments.ways) and packages.installed("torchao"):
        found.append(_eight_bits(task, quality))
    images = subject.images[: arguments.batch]
    times = {runtime: times_of(found, images, runtime, arguments.seconds) for runtime in arguments.runtimes}
    shown = f"{budget.kind}={budget.fraction:g}"
    return [_row(shown, each, task, [(t[0], t[index]) for t in _both(times, len(found))])
            for index, each in enumerate(found)]  # fmt: skip


def _both(times: dict[str, list[float | None]], count: int) -> list[list[float | None]]:
    return [times.get(runtime, [None] * count) for runtime in (EAGER, ONNX)]


def _recalibrated(model: nn.Module, task: Task, quality: Callable[[nn.Module], list[str]]) -> str:
    """Points lost after batch norm was recalibrated with the unlabelled images."""
    model = copy.deepcopy(model)
    convsplit.repair.recalibrate(model, task.data, progress=False)
    return quality(model)[list(QUALITY).index("points lost")]


def _eight_bits(task: Task, quality: Callable[[nn.Module], list[str]]) -> Candidate:
    work = timed(lambda: packages.torchao_int8(task.subject.model, task.data))
    return Candidate(INT8, work.result, quality(work.result), seconds=f"{work.cpu:.1f}")


def times_of(found: list[Candidate], images: Tensor, runtime: str, seconds: float) -> list[float | None]:
    """Milliseconds of each, in turns; None where a model does not run there."""
    prepared = {index: _prepared(each, images, runtime) for index, each in enumerate(found)}
    runs = {index: run for index, run in prepared.items() if run is not None}
    clock = runtime_of(runtime).clock(torch.device("cpu"))
    measured = milliseconds_in_turns(list(runs.values()), seconds, clock=clock)
    by_index = dict(zip(runs, measured, strict=True))
    return [by_index.get(index) for index in range(len(found))]


def _prepared(candidate: Candidate, images: Tensor, runtime: str) -> Run | None:
    try:
        if candidate.way != INT8:
            return runtime_of(runtime).prepare(candidate.model, images)
        return _compiled(candidate.model, images) if runtime == EAGER else None
    except Exception as error:  # whatever an exporter or compiler raises, the model does not run there
        print(
            f"{candidate.way} in {runtime}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True
        )
        return None


def _compiled(model: nn.Module, images: Tensor) -> Run:
    import torch._inductor.config as inductor

    inductor.freezing = True  # or weights are quantised at every call
    compiled = torch.compile(model)

    def run() -> None:
        with torch.no_grad():
            compiled(images)

    run()
    return run


def _row(budget: str, own: Candidate, task: Task, times: list[tuple[float | None, float | None]]) -> list[str]:
    dense = task.subject.model
    kept = ["100.0 %", "100.0 %"]
    if own.way != INT8:
        kept = [
            ratio(packages.parameters(own.model), packages.parameters(dense)),
            ratio(packages.multiply_adds(own.model, task.image), packages.multiply_adds(dense, task.image)),
        ]
    shown = [cell for before, now in times for cell in (milliseconds(now), times_faster(before, now))]
    return [
        budget, own.way, *kept, ratio(_bytes(own.model), _bytes(dense)), *own.quality, own.recalibrated, *shown,
        own.seconds,
    ]  # fmt: skip


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
