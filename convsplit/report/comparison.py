"""compare: measure on real inputs what a conversion saved and how far it moved things."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convsplit.forms import form_named
from convsplit.kinds import equivalent
from convsplit.layers.separable import SeparableConv2d
from convsplit.measure.timing import Timing, time_models
from convsplit.model.copies import scratch_copy
from convsplit.model.graphs import Trace
from convsplit.model.running import Call, Forward, batches_in, observe_calls, quiet_run, run_or_explain, tensors_in
from convsplit.model.sites import find_sites
from convsplit.progress import track
from convsplit.report.reports import Report
from convsplit.report.values import Drift, KeptLayer, LayerReport
from convsplit.spec import ConvSpec, parameter_count

CANCELLING = 10.0  # of the kernel's norm: components above lose a digit of it to each other
TIMED_SECONDS = 0.5  # of timing each of the two models, and once more for its layers


def compare(
    model: nn.Module,
    converted: nn.Module,
    inputs: Any,
    *,
    forward: Forward | None = None,
    time: bool = False,
    progress: bool | None = None,
) -> Report:
    """Measure what the conversion of `model` to `converted` saved, and how far it moved the output.

    Args:
        model: the original.
        converted: from `convert` or `apply_plan`, perhaps refitted or fine-tuned since.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an iterable of those.
        forward: how to run a model on what `inputs` yields; for a loader of images and labels
            `lambda model, batch: model(batch[0])`.
        time: also measure the median milliseconds of both models on the first batch, in turns, and of the split layers
            within them, for some seconds.
        progress: show a progress bar; by default only on a terminal.

    MACs are those of the first batch. Both models are run in eval mode and left as they were.

    Raises:
        ValueError: no inputs; a model that does not run on them; models that have nothing to do with each other.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    >>> report = compare(model, convsplit.convert(model, exact=True), torch.randn(4, 8, 3, 3))
    >>> report.agreement, report.drift.relative < 1e-5
    (1.0, True)
    """
    pairs = _layer_pairs(model, converted)
    meters = {name: (_Meter(), _Meter()) for name in pairs}
    whole, images, agreed, classified = _Meter(), 0, 0, 0
    calls: tuple[dict[str, tuple[Call, ...]], int, int] | None = None
    times: list[Timing] | None = None
    with quiet_run(model, converted):
        for batch in track(batches_in(inputs), "Comparing", progress=progress):
            if calls is None:
                original_calls, original_macs = observe_calls(scratch_copy(model), batch, forward)
                calls = (original_calls, original_macs, observe_calls(scratch_copy(converted), batch, forward)[1])
                if time:
                    names = list(pairs)
                    times = time_models(
                        [model, converted], batch, layers=[names, names], forward=forward, seconds=TIMED_SECONDS
                    )
            with _watch_original(pairs, meters) as features:
                before = run_or_explain(model, batch, forward)
            with _watch_converted(pairs, meters, features):
                after = run_or_explain(converted, batch, forward)
            whole.add_all(before, after)
            images += next((t.shape[0] for t in tensors_in(before) if t.dim()), 1)
            same, seen = _same_class(before, after)
            agreed, classified = agreed + same, classified + seen
    if calls is None:
        raise ValueError("inputs yielded no batch: there is nothing to compare on")
    layers = tuple(_layer_report(name, *pairs[name], calls[0].get(name, ()), *meters[name], times) for name in pairs)
    return Report(
        model=type(model).__name__,
        layers=layers,
        params=(parameter_count(model), parameter_count(converted)),
        macs=(calls[1], calls[2]),
        drift=whole.drift(),
        agreement=agreed / classified if classified else None,
        images=images,
        stored_bytes=(_bytes(model), _bytes(converted)),
        milliseconds=None if times is None else (times[0].total, times[1].total),
        kept=tuple(_kept(model, set(pairs))),
        notes=tuple(_notes(layers, whole)),
    )


@dataclass
class _Meter:
    """Running sums for the drift of one tensor, or of several together, over batches."""

    error: float = 0.0
    before: float = 0.0
    after: float = 0.0
    inner: float = 0.0
    max_abs: float = 0.0
    mismatched: list[str] = field(default_factory=list)

    def add(self, before: Tensor, after: Tensor) -> None:
        if before.shape != after.shape:
            self.mismatched.append(f"{tuple(before.shape)} and {tuple(after.shape)}")
            return
        if not (before.is_floating_point() or before.is_complex()) or not before.numel():
            return
        wide = torch.promote_types(before.dtype, torch.float32)
        y, z = before.detach().to(wide).flatten(), after.detach().to(wide).flatten()
        self.error += float((z - y).norm().double().square())
        self.before += float(y.norm().double().square())
        self.after += float(z.norm().double().square())
        self.inner += float(torch.vdot(y, z).real)
        self.max_abs = max(self.max_abs, float((z - y).abs().max()))

    def add_all(self, before: Any, after: Any) -> None:
        first, second = list(tensors_in(before)), list(tensors_in(after))
        if len(first) != len(second):
            self.mismatched.append(f"{len(first)} and {len(second)} tensors")
        for y, z in zip(first, second, strict=False):
            self.add(y, z)

    def drift(self) -> Drift | None:
        if self.before == 0 and self.error == 0:
            return None
        relative = math.sqrt(self.error / self.before) if self.before else math.inf
        norms = math.sqrt(self.before * self.after)
        return Drift(relative, self.inner / norms if norms else 0.0, self.max_abs)


def _layer_pairs(model: nn.Module, converted: nn.Module) -> dict[str, tuple[nn.Module, SeparableConv2d]]:
    """Each split layer with the module it replaced."""
    originals = dict(model.named_modules())
    pairs: dict[str, tuple[nn.Module, SeparableConv2d]] = {}
    for name, layer in converted.named_modules():
        original = originals.get(name)
        if isinstance(layer, SeparableConv2d) and not isinstance(original, SeparableConv2d):
            if original is None:
                raise ValueError(
                    f"converted has a split layer {name!r}, model has no such module: not its conversion"
                )
            pairs[name] = (original, layer)
    return pairs


Pairs = dict[str, tuple[nn.Module, SeparableConv2d]]
Meters = dict[str, tuple[_Meter, _Meter]]


@contextmanager
def _watch_original(pairs: Pairs, meters: Meters) -> Iterator[dict[str, list[Tensor]]]:
    """While the original runs: compare each layer with its replacement on the same input, and keep its outputs."""
    features: dict[str, list[Tensor]] = {name: [] for name in pairs}

    def watch(name: str, layer: SeparableConv2d) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            features[name].append(output.detach())
            meters[name][0].add(output, layer(*args))

        return hook

    handles = [module.register_forward_hook(watch(name, layer)) for name, (module, layer) in pairs.items()]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_converted(pairs: Pairs, meters: Meters, features: dict[str, list[Tensor]]) -> Iterator[None]:
    """While the converted model runs: compare each split layer's output with what the original's was."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if features[name]:  # a model may take another path, and call a layer more often than the original did
                meters[name][1].add(features[name].pop(0), output)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, (_, layer) in pairs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_report(
    name: str,
    original: nn.Module,
    layer: SeparableConv2d,
    calls: tuple[Call, ...],
    local: _Meter,
    accumulated: _Meter,
    times: list[Timing] | None,
) -> LayerReport:
    spec, form = layer.spec, form_named(layer.form)
    dense = ConvSpec.of(original) if isinstance(original, nn.Conv2d) else spec
    macs = None
    if calls:
        before = sum(call.images * spec.macs(call.output_hw) for call in calls)
        after = sum(c.images * form.macs(spec, layer.components, c.input_hw, c.output_hw) for c in calls)
        macs = (before, after)
    return LayerReport(
        name, layer.form, layer.components, (dense.params, parameter_count(layer)), macs,
        _weight_error(original, layer), local.drift(), accumulated.drift(), _largest_component(layer),
        (times[0].layers[name], times[1].layers[name]) if times and name in times[0].layers else None,
    )  # fmt: skip


def _weight_error(original: nn.Module, layer: SeparableConv2d) -> float:
    plain = equivalent(original)  # a convolution may compute the weight it uses
    weight = original.weight if isinstance(plain, str) else plain.conv.weight
    assert isinstance(weight, Tensor)
    dense = weight.detach().double()
    merged = layer.weight.detach().double()
    return float((merged - dense).norm() / dense.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _largest_component(layer: SeparableConv2d) -> float:
    with torch.no_grad():
        whole = layer.weight.double().norm()
        return float(layer.factors().norms().double().max() / whole.clamp_min(torch.finfo(torch.float64).tiny))


def _same_class(before: Any, after: Any) -> tuple[int, int]:
    """How many inputs get the same top-1 class, of how many; (0, 0) where the first output is not logits [N, C]."""
    y, z = next(tensors_in(before), None), next(tensors_in(after), None)
    if y is None or z is None or y.shape != z.shape or y.dim() != 2 or y.shape[1] < 2 or not y.is_floating_point():
        return (0, 0)
    return (int((y.argmax(1) == z.argmax(1)).sum()), y.shape[0])


def _notes(layers: tuple[LayerReport, ...], whole: _Meter) -> Iterator[str]:
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
    if whole.mismatched:
        yield f"outputs that could not be compared, their shapes differ: {'; '.join(whole.mismatched[:3])}"


def _bytes(module: nn.Module) -> int:
    """Of all tensors of the state_dict, those that share their memory counted once."""
    found = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    tensors = {tensor.untyped_storage().data_ptr() or id(tensor): tensor for tensor in found}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _kept(model: nn.Module, split: set[str]) -> Iterator[KeptLayer]:
    """The convolutions that are not split, and why where the model tells; the plan knows of budgets."""
    for site in find_sites(model, Trace()):
        if site.name not in split:
            yield KeptLayer(site.name, site.spec.params if site.spec else 0, site.reason or "kept dense by the plan")
