"""Accuracy that trained networks keep after conversion, without data and with label-free repair; no training at all.

    python -m benchmarks accuracy [NETWORKS.py] [--depths 20 56] [--kept 0.5 0.25 0.125] [--images 512] [--ways ...]

NETWORKS.py as in benchmarks/subjects.py; without it the network of the digits. Test accuracy with its 95 % interval,
points lost against the dense network, top-1 agreement with it and relative drift of the logits, on the test images. A
seed chooses the calibration images.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from torch import Tensor, nn

import convsplit
from benchmarks.clock import timed
from benchmarks.figures import QUALITY, compared
from benchmarks.results import Sheet
from benchmarks.subjects import add_options, answers, subjects
from convsplit import Budget
from convsplit.tables import Table

if TYPE_CHECKING:  # it lies elsewhere in earlier versions, which this is run with to compare
    from convsplit.choose.plan import Plan

Way = Callable[[nn.Module, Tensor, list[Tensor], float, int], nn.Module]


def equal_fractions(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    """The same fraction of every layer, CP: what allocation has to beat."""
    plan: Plan = convsplit.make_plan(model, image, budget=Budget(params=1.0), seed=seed)
    for layer in plan.layers:
        if layer.spec is not None and layer.dense is not None:
            O, I, K = layer.spec.out_channels, layer.spec.in_channels, layer.spec.positions
            plan = plan.choose(layer.name, "pw-dw-pw", rank=max(1, int(kept * O * I * K / (O + I + K))))
    return convsplit.apply_plan(model, plan)


def allocated(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    return convsplit.convert(model, image, budget=Budget(params=kept), seed=seed)


def refitted(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    return convsplit.convert(model, image, budget=Budget(params=kept), calibration=data, seed=seed)


def distilled(
    model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int, seconds: float
) -> nn.Module:
    converted = refitted(model, image, data, kept, seed)
    convsplit.distill(converted, model, data, epochs=10_000, seconds=seconds, seed=seed)
    return converted


def equal_refitted(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    converted = equal_fractions(model, image, data, kept, seed)
    convsplit.refit(converted, model, data, seed=seed)
    return converted


def last_stage_only(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    converted = allocated(model, image, data, kept, seed)
    convsplit.refit(converted, model, data, stages="last", seed=seed)
    return converted


def bias_corrected(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    converted = allocated(model, image, data, kept, seed)
    convsplit.refit(converted, model, data, stages="bias", dense=False, seed=seed)
    return converted


def recalibrated(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    converted = allocated(model, image, data, kept, seed)
    convsplit.repair.recalibrate(converted, data)
    return converted


def layer_by_layer(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    plan = convsplit.make_plan(model, image, budget=Budget(params=kept), calibration=data, seed=seed)
    converted = convsplit.apply_plan(model, plan)
    convsplit.refit(converted, model, data, target="layer", seed=seed)
    return converted


WAYS: dict[str, Way] = {
    "no data, equal fractions": equal_fractions,
    "no data": allocated,
    "no data, batch norm recalibrated": recalibrated,
    "no data, biases corrected": bias_corrected,
    "no data, last stages refitted": last_stage_only,
    "equal fractions, refitted": equal_refitted,
    "calibrated and refitted, target the layer": layer_by_layer,
    "calibrated and refitted": refitted,
}


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--images", type=int, nargs="+", default=[512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=300, help="of distillation")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=[*WAYS, DISTILLED])


QUICK = {"kept": [0.5, 0.25], "images": [256], "ways": ["no data", "calibrated and refitted"]}
DISTILLED = "calibrated, refitted and distilled"


def measure(arguments: Namespace) -> Iterator[Sheet]:
    rows = []
    for subject in subjects(arguments):
        dense = answers(subject.model, subject.images)
        for kept, way, images, seed in product(arguments.kept, arguments.ways, arguments.images, arguments.seeds):
            data = subject.calibration(images, seed)
            convert = partial(distilled, seconds=arguments.seconds) if way == DISTILLED else WAYS[way]
            work = timed(lambda: convert(subject.model, subject.images[:1], data, kept, seed))  # noqa: B023
            figures = compared(dense, answers(work.result, subject.images), subject.labels)
            shown = figures.cells()
            rows.append([subject.name, f"{kept:g}", way, str(images), str(seed), *shown, f"{work.seconds:.0f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    keys = ["network", "kept", "way", "images", "seed"]
    headings = [*keys, *QUALITY, "seconds"]
    yield Sheet("accuracy", Table(headings, rows, frozenset({"network", "way"})), keys, QUALITY)
