"""Repair without labels: factors fitted to data in closed form, layer by layer, on what the converted model feels.

walk.py    the two models side by side, stopping at each split layer
solve.py   least squares for the stages of a layer, from the moments of its inputs and targets
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convsplit.forms import Factors, form_named, grouped
from convsplit.kinds import Equivalent, equivalent
from convsplit.layers import SeparableConv2d
from convsplit.moments import Moments, checked_batches, measure_moments
from convsplit.progress import track
from convsplit.refit.solve import best_bias, fit_factors, quadratics, relative_loss
from convsplit.refit.walk import walk
from convsplit.trace import Forward, quiet_run, run_or_explain

MEMORY_LIMIT = 2 << 30  # bytes of features kept between layers before the walk falls back to recomputing them
STAGES = ("all", "last", "bias")


@dataclass(frozen=True)
class Repaired:
    """What the repair did to one layer: the relative squared error of its output on the data, before and after."""

    name: str
    before: float
    after: float


@torch.no_grad()
def refit(
    converted: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    stages: str = "all",
    ridge: float = 1e-3,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Repaired, ...]:
    """Fit the split layers of `converted`, in place, to what `original` makes of some unlabelled inputs.

    Layers are taken in the order of execution. Each one's factors and bias are fitted by least squares so that, on
    the features that reach it in the already repaired converted model, it answers what the original layer answers in
    the original model; this also repairs what layers before it did. No gradient step is taken and nothing else in
    the model changes.

    Args:
        converted: from `convert` or `apply_plan`; changed in place. A layer without bias gets one.
        original: the model it was converted from; not changed.
        batches: some hundred unlabelled inputs: an iterable (read once) of tensors, tuples of positional arguments or
            dicts of keyword arguments, or one of those.
        forward: how to run a model on what `batches` yields, such as `lambda model, batch: model(batch[0])`.
        stages: "all" fits every stage, "last" only the last one and the bias, "bias" the bias alone.
        ridge: pull towards the original weights, relative to the mean variance of a layer's inputs.
        seed: fixes the start of CP.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        for each repaired layer, the relative squared error of its output on the calibration data before and after.

    Raises:
        ValueError: no batches, NaN or infinite values in a batch or inside the model, an unknown `stages`.

    Source: sequential least squares as in Zhang et al., "Accelerating very deep convolutional networks", 2016
    (1505.06798, section 3.3); the metric of the inputs' second moments as in Denton et al., 2014 (1404.0736).

    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    >>> smaller, images = convsplit.convert(model), torch.randn(64, 8, 9, 9)
    >>> repaired = refit(smaller, model, images)
    >>> all(layer.after <= layer.before for layer in repaired)
    True
    """
    if stages not in STAGES:
        raise ValueError(f"stages={stages!r}; want one of {', '.join(map(repr, STAGES))}")
    data = checked_batches(batches)
    layers = {name: m for name, m in converted.named_modules() if isinstance(m, SeparableConv2d)}
    modules = dict(original.named_modules())
    for name in layers:
        if name not in modules:
            raise ValueError(f"converted has a split layer {name!r}, original has no such module: not its conversion")
    repaired: list[Repaired] = []
    with quiet_run(converted, original):
        run_or_explain(original, data[0], forward)
        stops = walk(original, converted, layers, data, forward, MEMORY_LIMIT)
        for stop in track(stops, "Refitting", progress=progress):
            layer = layers[stop.name]
            moments = measure_moments(layer, stop.pairs(), stop.calls * len(data))
            before = _loss(layer, moments)
            _fit_layer(layer, _original_kernel(modules[stop.name]), moments, stages, ridge, seed)
            repaired.append(Repaired(stop.name, before, _loss(layer, moments)))
    return tuple(repaired)


def _fit_layer(
    layer: SeparableConv2d, kernel: Tensor, moments: Moments, stages: str, ridge: float, seed: int
) -> None:
    """Fit the stages asked for and the bias; factors that came out worse on the data are not kept."""
    if stages != "bias":
        form, current = form_named(layer.form), layer.factors().to(torch.float64)
        problems = quadratics(kernel, moments, ridge)
        fits = [
            fit_factors(problem, form, group, even=layer.even, seed=seed, last_stage_only=stages == "last")
            for problem, group in zip(problems, current.by_group(), strict=True)
        ]
        layer.load_factors(Factors.joined(fits).balanced())
    layer.add_bias().copy_(best_bias(grouped(layer.weight, layer.groups), moments))


def _loss(layer: SeparableConv2d, moments: Moments) -> float:
    bias = layer.bias if layer.bias is not None else torch.zeros_like(moments.target_mean).flatten()
    return relative_loss(grouped(layer.weight, layer.groups), bias, moments)


def _original_kernel(module: nn.Module) -> Tensor:
    """The kernel [G, O, I, K] that runs in the original module."""
    found = equivalent(module)
    assert isinstance(found, Equivalent)
    return grouped(found.conv.weight.detach(), found.conv.groups)
