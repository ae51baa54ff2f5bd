"""compare: measure on real inputs what a conversion saved and how far it moved things."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsplit.data.batches import batches_of
from convsplit.forms import form_named
from convsplit.kinds import equivalent
from convsplit.layers.separable import SeparableConv, SeparableLinear
from convsplit.measure.timing import Timing, conditions_of, time_models
from convsplit.model.copies import scratch_copy
from convsplit.model.graphs import Trace
from convsplit.model.guards import RandomState
from convsplit.model.hooks import Given, hooked
from convsplit.model.pairs import Pairs, check_order, layer_pairs
from convsplit.model.running import (
    Batch,
    Call,
    Forward,
    first_convolution,
    macs_per_input,
    observe_calls,
    quiet_run,
    run_or_explain,
)
from convsplit.model.sites import find_sites
from convsplit.model.values import class_scores, count_inputs, stored_bytes, tensors_in
from convsplit.progress import track
from convsplit.report.reports import Report
from convsplit.report.sizes import bytes_on_disk
from convsplit.report.values import Drift, KeptLayer, LayerReport
from convsplit.runtimes import Runtime
from convsplit.runtimes.base import Prepare
from convsplit.spec import ConvSpec, is_plain, parameter_count

CANCELLING = 10.0  # of the kernel's norm: components above lose a digit of it to each other
TIMED_SECONDS = 0.5  # of timing each of the two models, and once more for its layers


def compare(
    converted: nn.Module,
    original: nn.Module,
    batches: Any,
    *,
    forward: Forward | None = None,
    time: bool = False,
    runtime: str | Runtime | Prepare = "torch",
    progress: bool | None = None,
) -> Report:
    """Measure what the conversion of `original` to `converted` saved, and how far it moved the output.

    Args:
        converted: from `convert` or `apply_plan`, perhaps refitted or fine-tuned since.
        original: the model it was converted from.
        batches: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an iterable of those. Empty
            ones are left out; of an iterable that does not tell its length, 10,000 inputs are read and no more.
        forward: how to run a model on what `batches` yields; for a loader of images and labels
            `lambda model, batch: model(batch[0])`.
        time: also measure the median milliseconds of both models on the first batch, in turns, and of the split layers
            within them, for a few seconds.
        runtime: where to measure it, as for `Stopwatch`; layers are timed in eager PyTorch alone.
        progress: show a progress bar; by default only on a terminal.

    MACs are per input, measured on the first batch. Copies of both models are run, in eval mode and, where a model
    draws random numbers there, with the same ones; what the models remember and count stays as it is.

    Raises:
        ValueError: no inputs; a model that does not run on them; models in the wrong order, or that have nothing to do
            with each other.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    >>> report = compare(convsplit.convert(model, exact=True), model, torch.randn(64, 8, 3, 3))
    >>> report.agreement, report.drift.relative < 1e-5
    (1.0, True)
    """
    check_order(converted, original, "compare(converted, original, batches)")
    before, after = scratch_copy(original), scratch_copy(converted)
    seen = _Comparison(before, after, layer_pairs(after, before), forward)
    first: list[Batch] = []
    with quiet_run(before, after):
        for batch in track(batches_of(batches), "Comparing", progress=progress):
            if not first:
                first.append(batch)
                costs = _Costs.of(before, after, seen.pairs, batch, forward)
            seen.add(batch)
        if not first:
            raise ValueError("batches held no input: there is nothing to compare on")
        times = None
        if time:
            names = list(seen.pairs)
            times = time_models(
                [before, after], first[0], layers=[names, names], forward=forward, seconds=TIMED_SECONDS,
                runtime=runtime,
            )  # fmt: skip
        layers = tuple(seen.layer(name, costs, times) for name in seen.pairs)
    return Report(
        model=type(original).__name__,
        layers=layers,
        params=(parameter_count(original), parameter_count(converted)),
        macs=costs.macs,
        drift=seen.whole.drift(),
        agreement=seen.votes.agreement(),
        images=seen.inputs,
        stored_bytes=(_bytes(original), _bytes(converted)),
        bytes_on_disk=_bytes_on_disk(original, converted),
        milliseconds=None if times is None else (times[0].total, times[1].total),
        conditions=None if times is None else conditions_of(before, first[0], runtime=runtime),
        kept=tuple(_kept(before, seen.pairs)),
        notes=(*_notes(layers), *seen.notes(), *costs.notes),
    )


@dataclass
class _Meter:
    """Running sums for the drift of one tensor, or of several together, over batches, in float64.

    Where both models give the same infinity (masked scores, `infinite` of them), nothing has moved. Where the original
    gives NaN or another infinity nothing can be told (`unknown`); where the converted model alone does, the drift is
    infinite (`broken`).
    """

    seen: int = 0
    error: float = 0.0
    before: float = 0.0
    after: float = 0.0
    max_abs: float = 0.0
    infinite: int = 0
    unknown: int = 0
    broken: int = 0
    mismatched: list[str] = field(default_factory=list)

    def add(self, before: Tensor, after: Tensor) -> None:
        if before.shape != after.shape:
            self.mismatched.append(f"{tuple(before.shape)} and {tuple(after.shape)}")
            return
        if not (before.is_floating_point() or before.is_complex() or before.is_quantized) or not before.numel():
            return
        y, z = _real(before), _real(after)
        known = y.isfinite() & z.isfinite()
        if not bool(known.all()):
            equal = y == z
            self.broken += int((y.isfinite() & ~z.isfinite()).sum())
            self.unknown += int((~y.isfinite() & ~equal).sum())
            y, z = y[known], z[known]
            self.infinite += int((equal & ~known).sum())
        if y.numel():
            self.seen += y.numel()
            self.error += _squares(z - y)
            self.before += _squares(y)
            self.after += _squares(z)
            self.max_abs = max(self.max_abs, float((z - y).abs().max()))

    def add_all(self, before: Any, after: Any) -> None:
        first, second = list(tensors_in(before)), list(tensors_in(after))
        if len(first) != len(second):
            self.mismatched.append(f"{len(first)} and {len(second)} tensors")
        for y, z in zip(first, second, strict=False):
            self.add(y, z)

    def drift(self) -> Drift | None:
        """None where nothing was seen, NaN where nothing that was seen is known."""
        if self.broken:
            return Drift(math.inf, math.nan, math.inf)
        if not self.seen and not self.infinite:
            return Drift(math.nan, math.nan, math.nan) if self.unknown else None
        if not self.error:  # both are zero throughout, or equal
            return Drift(0.0, 1.0, 0.0)
        relative = math.sqrt(self.error / self.before) if self.before else math.inf
        norms = math.sqrt(self.before) * math.sqrt(self.after)
        inner = (self.before + self.after - self.error) / 2  # as |z - y|^2 = |z|^2 + |y|^2 - 2 <y, z>
        return Drift(relative, inner / norms if norms else 0.0, self.max_abs)


def _real(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in a row, in float32 at least; of complex ones both parts."""
    plain = tensor.detach()
    plain = plain.dequantize() if plain.is_quantized else plain.to_dense()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return plain.to(torch.promote_types(plain.dtype, torch.float32)).flatten()


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


@dataclass
class _Votes:
    """Of the inputs with class scores `told`, those that get the same top-1 class in both models."""

    same: int = 0
    told: int = 0
    classes: set[int] = field(default_factory=set)

    def add(self, before: Any, after: Any, inputs: int) -> None:
        y, z = class_scores(before, inputs), class_scores(after, inputs)
        if y is None or z is None or y.shape != z.shape:
            return
        told = ~y.isnan().any(1)
        same = (y.argmax(1) == z.argmax(1)) & ~z.isnan().any(1) & told
        self.same, self.told = self.same + int(same.sum()), self.told + int(told.sum())
        self.classes.update(y[told].argmax(1).tolist())

    @property
    def unanimous(self) -> bool:
        """Whether all inputs have one class: of numbers that are no scores (a box) the same one is always largest."""
        return self.told > 1 and self.same == self.told and len(self.classes) == 1

    def agreement(self) -> float | None:
        """The share that agrees; None where no scores are known, or where they tell nothing."""
        return None if not self.told or self.unanimous else self.same / self.told


@dataclass
class _Comparison:
    """Two models run side by side, batch by batch, and what was seen."""

    original: nn.Module
    converted: nn.Module
    pairs: Pairs
    forward: Forward | None
    whole: _Meter = field(default_factory=_Meter)
    votes: _Votes = field(default_factory=lambda: _Votes())
    inputs: int = 0
    random: bool = False

    def __post_init__(self) -> None:
        self.local = {name: _Meter() for name in self.pairs}
        self.accumulated = {name: _Meter() for name in self.pairs}

    def add(self, batch: Batch) -> None:
        """Run both on a batch, from the same random state."""
        features: dict[str, list[Any]] = {name: [] for name in self.pairs}

        def on_original(name: str, given: Given, output: Any) -> None:
            features[name].append(output)
            self.local[name].add_all(output, self.pairs[name][1](*given.args, **given.kwargs))

        def on_converted(name: str, given: Given, output: Any) -> None:
            if features[name]:  # a model may take another path, and call a layer more often than the original did
                self.accumulated[name].add_all(features[name].pop(0), output)

        state = RandomState.now()
        replaced = {name: module for name, (module, _) in self.pairs.items()}
        with first_convolution(self.original) as seen, hooked(replaced, after=on_original):
            before = run_or_explain(self.original, batch, self.forward)
        self.random = self.random or RandomState.now() != state
        state.restore()
        with hooked({name: layer for name, (_, layer) in self.pairs.items()}, after=on_converted):
            after = run_or_explain(self.converted, batch, self.forward)
        inputs = count_inputs(batch, seen)
        self.inputs += inputs
        self.whole.add_all(before, after)
        self.votes.add(before, after, inputs)

    def layer(self, name: str, costs: _Costs, times: list[Timing] | None) -> LayerReport:
        """What is known of one split layer."""
        original, layer = self.pairs[name]
        dense = ConvSpec.of(original) if is_plain(original) else layer.spec
        timed = (times[0].layers[name], times[1].layers[name]) if times and name in times[0].layers else None
        return LayerReport(
            name, layer.form, layer.components, (dense.params, parameter_count(layer)), costs.layers.get(name),
            _weight_error(original, layer), self.local[name].drift(), self.accumulated[name].drift(),
            _largest_component(layer), timed,
        )  # fmt: skip

    def notes(self) -> Iterator[str]:
        """What the figures do not tell."""
        whole = self.whole
        if self.votes.unanimous:
            yield "all inputs have the same top-1 class, which tells nothing: the models are judged by their drift"
        if self.random:
            yield "the model draws random numbers in eval mode; both models were given the same"
        if whole.infinite:
            yield f"infinite in both models' outputs alike: {whole.infinite} numbers, left out of the drift"
        if whole.unknown:
            yield f"NaN or infinite in the original's own outputs: {whole.unknown} numbers, left out of the drift"
        if whole.broken:
            yield f"NaN or infinite in the converted model's outputs where the original's are finite: {whole.broken}"
        if whole.mismatched:
            yield f"outputs that could not be compared, their shapes differ: {'; '.join(whole.mismatched[:3])}"


@dataclass(frozen=True)
class _Costs:
    """MACs per input before and after: of the whole model, and of each split layer that was reached."""

    macs: tuple[int, int]
    layers: dict[str, tuple[int, int]]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, original: nn.Module, converted: nn.Module, pairs: Pairs, batch: Batch, forward: Forward | None
    ) -> _Costs:
        """Layers are counted on the inputs that they get in the original.

        A detector that makes other proposals runs its later layers on other inputs, which is nothing that was saved:
        the whole of the converted model is then what the original takes, less what its layers save.
        """
        calls, before = observe_calls(scratch_copy(original), batch, forward)
        own, after = observe_calls(scratch_copy(converted), batch, forward)
        layers = {name: _layer_macs(layer, calls[name]) for name, (_, layer) in pairs.items() if name in calls}
        if all(calls.get(name) == own.get(name) for name in pairs if name in own):
            return cls((before, after), layers)
        saved = sum(dense - split for dense, split in layers.values())
        note = "layers get inputs of other sizes in the converted model: MACs are those on the original's"
        return cls((before, before - saved), layers, (note,))


def _layer_macs(layer: SeparableConv, calls: tuple[Call, ...]) -> tuple[int, int]:
    spec, count = layer.spec, form_named(layer.form).macs
    return (
        macs_per_input(calls, spec.axes, lambda *sizes: spec.macs(spec.slides_over(*sizes))),
        macs_per_input(calls, spec.axes, lambda *sizes: count(spec, layer.components, *sizes)),
    )


def _weight_error(original: nn.Module, layer: SeparableConv) -> float:
    plain = equivalent(original)  # a convolution may compute the weight it uses
    weight = original.weight if isinstance(plain, str) else plain.conv.weight
    assert isinstance(weight, Tensor)
    dense = weight.detach().double()
    merged = layer.weight.detach().double()
    return float((merged - dense).norm() / dense.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _largest_component(layer: SeparableConv) -> float:
    with torch.no_grad():
        whole = layer.weight.double().norm()
        return float(layer.factors().norms().double().max() / whole.clamp_min(torch.finfo(torch.float64).tiny))


def _notes(layers: tuple[LayerReport, ...]) -> Iterator[str]:
    if not layers:
        yield "no layer is split"
    cancelling = [layer.name for layer in layers if layer.largest_component > CANCELLING]
    if cancelling:
        yield (
            f"components of {', '.join(cancelling)} cancel each other, with norms up to "
            f"{max(layer.largest_component for layer in layers):.0f} times the kernel's: half precision and "
            "quantisation will suffer; keep less or more there, or choose another form"
        )
    missed = [layer.name for layer in layers if layer.local is None]
    if missed:
        yield f"not reached by these inputs: {', '.join(missed)}"
    unused = [layer.name for layer in layers if layer.unused]
    if unused:
        yield (
            f"split layers that the converted model never calls, while the original calls what they replace: "
            f"{', '.join(unused)}; something in it, such as a wrapped forward, holds on to the original"
        )


def _bytes(model: nn.Module) -> int:
    """Of all tensors of the state_dict."""
    values = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    return stored_bytes([value for value in values if not is_lazy(value)])


def _bytes_on_disk(original: nn.Module, converted: nn.Module) -> dict[str, tuple[int, int]]:
    before, after = bytes_on_disk(original), bytes_on_disk(converted)
    return {precision: (before[precision], after[precision]) for precision in before}


def _kept(model: nn.Module, split: Pairs) -> Iterator[KeptLayer]:
    """The convolutions that are not split, with the reason where the model shows it; only the plan knows of budgets.

    Linear layers are told of where any was split.
    """
    linear = any(isinstance(layer, SeparableLinear) for _, layer in split.values())
    for site in find_sites(model, Trace(), linear=linear):
        if site.name not in split:
            yield KeptLayer(site.name, site.spec.params if site.spec else 0, site.reason or "kept dense by the plan")
