"""refit: the repair of a converted model, layer by layer in the order of execution."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convsplit.data.batches import Checked, checked_batches
from convsplit.data.moments import LEAST_POSITIONS, POSITIONS_PER_UNKNOWN, SAMPLE_BYTES
from convsplit.data.processes import is_over, reduced_numbers
from convsplit.data.sensitivity import measure_sensitivity
from convsplit.data.tail import Tail
from convsplit.data.walk import Stop, walk
from convsplit.forms import form_named, grouped
from convsplit.kinds import Equivalent, equivalent
from convsplit.layers.separable import SeparableConv
from convsplit.lowrank import CP
from convsplit.model.copies import scratch_copy, working_copy
from convsplit.model.guards import plain_arithmetic
from convsplit.model.pairs import check_order
from convsplit.model.running import Forward, is_random, quiet_run, warn_of_noise
from convsplit.model.sharing import holders
from convsplit.model.values import count_inputs
from convsplit.precision import full_products
from convsplit.progress import track, warn
from convsplit.repair.fits import MOST_UNKNOWNS, Fit, fit_of, unknowns
from convsplit.repair.samples import Moments, Samples
from convsplit.spec import CONVOLUTIONS, Convolution, ConvSpec

MEMORY_LIMIT = 1 << 30  # bytes of features that the passes under way hold, in all
STAGES = ("all", "last", "bias")
TARGETS = ("activation", "layer")
LAST_POSITIONS_PER_UNKNOWN = 400  # of a last stage: its targets move with what it answers
ROUNDS = 4  # of moving the target behind a ReLU, at most,
LEAST_GAIN = 0.01  # of the squared distance to it, in a round: then they end
PULL = 64.0  # inputs with which the ridge is as large as the mean variance; with more it falls in proportion
SAMPLE_COST = 16  # of samples, as a multiple of that of moments, where memory allows all that are wanted
MOST_SAMPLED = SAMPLE_BYTES / 4 / POSITIONS_PER_UNKNOWN  # squared unknowns up to which it does
LAYER_COST = 1e6  # of what any layer takes
FLOOR = 0.01  # of the mean sensitivity: what an error that no output seems to feel still costs


@dataclass(frozen=True)
class Repaired:
    """What the repair did to one layer: relative squared errors on the data, before and after.

    They are those of what the model passes on: the output behind batch norm, shortcut and ReLU.
    """

    name: str
    before: float
    after: float


@plain_arithmetic()
@full_products()
@torch.no_grad()
def refit(
    converted: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    stages: str = "all",
    target: str = "activation",
    dense: bool = True,
    ridge: float | None = None,
    seconds: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    starts: Mapping[str, Sequence[CP]] | None = None,
) -> tuple[Repaired, ...]:
    """Fit the split layers of `converted`, in place, to what `original` makes of some unlabelled inputs.

    Layers are taken in the order of execution. Each one's factors and bias are fitted by least squares so that, on
    the features that reach it in the already repaired converted model, the model goes on as the original does; this
    also repairs what layers before it did. No gradient step is taken; batch norm and everything else stay as they are.
    Every layer is changed at once or not at all: after Ctrl-C or an error, those reached so far are repaired.

    Beside the two models, the batches and what one forward pass takes, memory holds features of the passes under way
    (`MEMORY_LIMIT`, a gibibyte), patches of one layer (`moments.SAMPLE_BYTES`) and some matrices as large as the square
    of its unknowns.

    Args:
        converted: from `convert` or `apply_plan`; changed in place. A split layer without bias gets one.
        original: the model it was converted from; not changed.
        batches: a few hundred unlabelled inputs: an iterable (read once) of tensors, tuples of positional arguments or
            dicts of keyword arguments, or one of those.
        forward: how to run a model on what `batches` yields, such as `lambda model, batch: model(batch[0])`.
        stages: "all" fits every stage, "last" only the last one and the bias, "bias" the bias alone.
        target: "activation" fits what comes out behind the layer's batch norm, the sum with a shortcut and ReLU, in the
            metric of the outputs' sensitivity to it; "layer" the layer's own output.
        dense: also refit the convolutions left dense behind the first split one: they can make good what it lost.
        ridge: pull towards the original weights, relative to the mean variance of a layer's inputs; by default 64 over
            the number of calibration inputs, and at most 1: with fewer of them, less of what they say is believed.
        seconds: begin with no further layer after so long; a warning says how many layers were reached.
        seed: fixes the start of CP and the directions in which sensitivity is measured.
        progress: show a progress bar; by default only on a terminal.
        starts: CP fits of layers that are at hand, to begin with the best of them.

    Copies of the models are run: of `converted` only weights change. A model that draws random numbers in eval mode
    gives no outputs that could be compared; it is left as it is, with a warning.

    Returns:
        for each repaired layer, the relative squared error of what the model passes on, before and after.

    Warns:
        ConversionWarning: nothing is repaired, or not all of it: no split layers, random outputs, `seconds` are over.

    Raises:
        ValueError: no batches, NaN or infinite values in a batch or inside the model, an unknown `stages` or `target`,
            an original that `converted` cannot come from.

    Source: sequential least squares and the treatment of ReLU as in Zhang et al., "Accelerating very deep convolutional
    networks", 2016 (1505.06798, sections 3.2 and 3.3); the metric of the inputs' second moments as in Denton et al.,
    2014 (1404.0736).

    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    >>> smaller, images = convsplit.convert(model), torch.randn(64, 8, 9, 9)
    >>> repaired = refit(smaller, model, images)
    >>> all(layer.after <= layer.before for layer in repaired)
    True
    """
    if stages not in STAGES:
        raise ValueError(f"stages={stages!r}; want one of {', '.join(map(repr, STAGES))}")
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; want one of {', '.join(map(repr, TARGETS))}")
    began = time.monotonic()
    check_order(converted, original, "refit(converted, original, batches)")
    data = checked_batches(batches)
    layers = {name: m for name, m in converted.named_modules() if isinstance(m, SeparableConv)}
    if not layers:
        warn(f"refit repairs split layers, of which {type(converted).__name__} has none: it is left as it is")
        return ()
    ridge = _ridge(data) if ridge is None else ridge
    original = scratch_copy(original)
    modules = dict(original.named_modules())
    for name in layers:
        if name not in modules:
            raise ValueError(f"converted has a split layer {name!r}, original has no such module: not its conversion")
    kernels = {name: _kernel(name, modules[name]) for name in layers}  # now: later there are hooks on the modules
    others = _dense_layers(converted, modules) if dense else {}
    repaired: list[Repaired] = []
    with working_copy(converted) as converted, quiet_run(converted, original):
        if is_random(original, data[0], forward):
            warn_of_noise(original, "repaired")
            return ()
        metrics = {} if target == "layer" else measure_sensitivity(original, layers, data, forward, seed=seed)
        stops = walk(original, converted, layers, others, data, forward, MEMORY_LIMIT, tails=target == "activation")
        costs = {name: _cost(converted.get_submodule(name)) for name in (*layers, *others)}
        shown = track(
            stops, "Refitting", total=sum(costs.values()), cost=lambda stop: costs[stop.name], progress=progress
        )
        with closing(stops):
            for stop in shown:
                if is_over(began, seconds):
                    warn(f"refit ended after {seconds:g} s: {len(repaired)} layers are repaired, others as they were")
                    break
                layer = converted.get_submodule(stop.name)
                assert isinstance(layer, SeparableConv | Convolution)
                kernel = kernels[stop.name] if stop.name in kernels else others[stop.name]
                fit = fit_of(layer, kernel, stages, seed, (starts or {}).get(stop.name, ()))
                done = _repair_at(stop, fit, target, metrics.get(stop.name), ridge)
                repaired += [] if done is None else [done]
    return tuple(repaired)


def _ridge(data: Checked) -> float:
    """The pull that leaves least drift on other inputs (benchmarks/results/accuracy.md): few inputs are soon learnt.

    Positions of one image resemble each other, so that it is images that count.
    """
    images = reduced_numbers(sum(map(count_inputs, data)))[0]
    return min(1.0, PULL / max(images, 1.0))


def _repair_at(stop: Stop, fit: Fit, target: str, F: Tensor | None, ridge: float) -> Repaired | None:
    """Repair the layer at which the walk stands; None where the batches do not let it be compared."""
    samples = fit.take(stop)
    if not samples.batches:
        warn(f"{stop.name}: no batch leads to inputs of one shape in both models, so it is not repaired")
        return None
    metric = None if target == "layer" else _metric(fit.layer, F, samples.tail)
    return _repair(stop.name, fit, samples, metric, ridge)


def _cost(layer: nn.Module) -> float:
    """About how long a layer takes, for the bar: what its moments take, as many numbers as the square of its unknowns.

    Samples are read over and over; they are as many times that square, up to what memory allows. On ResNet-18 (64
    images) layers took 0.2 to 9 s, 0.4 to 46 microseconds a unit of that square, 0.2 to 0.3 of this.
    """
    assert isinstance(layer, SeparableConv | Convolution)
    square = float(min(unknowns(layer), MOST_UNKNOWNS)) ** 2
    return square + SAMPLE_COST * min(square, MOST_SAMPLED) + LAYER_COST


def _repair(name: str, fit: Fit, samples: Samples, F: Tensor | None, ridge: float) -> Repaired:
    """Fit a layer to its samples; what comes out worse on them is not kept."""
    bias = fit.layer.bias
    bias = torch.zeros(len(samples.batches[0].answers), device="cpu") if bias is None else bias.double()
    few = samples.thinned(max(LEAST_POSITIONS, LAST_POSITIONS_PER_UNKNOWN * fit.last_unknowns))
    all_are_few, few = few is samples, few.joined()
    samples = few if all_are_few else samples.joined()
    before = few.error(fit.kernel, bias)
    if not samples.vary:  # equal patches throughout tell nothing about the kernel
        return Repaired(name, before, before)
    moments = Moments.of(samples).towards(samples, samples.targets())
    metrics = fit.metrics(moments, ridge)
    bias = fit.fit_to(moments, metrics, F)
    if samples.tail.ceiling is not None:  # there is a ReLU, and now something to start from
        fit, filters = fit.narrowed()
        if filters is not None:
            samples = few = few.through(filters)
            moments = Moments.of(samples)
            metrics = fit.metrics(moments, ridge)
        missed = math.inf
        for _ in range(ROUNDS):
            before_round = missed
            moments, missed = moments.towards_nearest(samples, fit.kernel, bias)
            if missed > (1 - LEAST_GAIN) * before_round:
                break
            bias = fit.fit_to(moments, metrics, F)
    after = few.error(fit.kernel, bias)
    if after < before:
        with _whole(fit.layer):
            fit.store(bias)
    return Repaired(name, before, min(before, after))


@contextmanager
def _whole(layer: nn.Module) -> Iterator[None]:
    """What is written to a layer inside is written whole: an error or an interruption half-way takes it back."""
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    try:
        yield
    except BaseException:
        for name, value in layer.state_dict().items():
            value.copy_(before.get(name, torch.zeros_like(value)))  # a bias that was added is none yet
        raise


def _metric(layer: nn.Module, F: Tensor | None, tail: Tail) -> Tensor | None:
    """The metric of a layer's outputs; None for the plain one.

    A form whose last stage is depthwise fits each output for itself, whatever the others weigh.
    """
    if not isinstance(layer, SeparableConv) or not form_named(layer.form).projects:
        return None
    scale = torch.ones(layer.out_channels, device="cpu") if tail.scale is None else tail.scale
    floor = scale.double().square()
    floor = torch.diag(floor / floor.mean().clamp_min(1e-30)).to(layer.weight.device)
    return floor if F is None else F + FLOOR * floor


def _dense_layers(converted: nn.Module, originals: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Plain convolutions with a weight of their own and not too many unknowns for closed form; their kernels.

    Not linear layers: a classifier has as many equations as there are images, and on held-out ones it got worse.
    """
    shared = holders(converted)
    return {
        name: grouped(module.weight.detach(), module.groups, module.transposed)
        for name, module in converted.named_modules()
        if type(module) in CONVOLUTIONS.values()
        and type(originals.get(name)) is type(module)
        and isinstance(module, Convolution)
        and isinstance(equivalent(originals[name]), Equivalent)
        and type(module.weight) is nn.Parameter
        and shared[id(module.weight)] == 1
        and module.weight.numel()
        and unknowns(module) <= MOST_UNKNOWNS
    }


def _kernel(name: str, module: nn.Module) -> Tensor:
    """The kernel [G, O, I, K] that runs in the layer which was split; that may be a split one already."""
    if isinstance(module, SeparableConv):
        return grouped(module.weight.detach(), module.groups, module.transposed)
    found = equivalent(module)
    if isinstance(found, str):
        raise ValueError(f"{name} is split in converted, but in original {found}: not its conversion")
    spec = ConvSpec.of(found.conv)
    return grouped(found.conv.weight.detach(), spec.groups, spec.transposed)
