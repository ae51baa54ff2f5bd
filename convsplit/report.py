"""Reports: what a conversion saved, and how far it moved the weights, every layer's output and the model's output.

Drift is measured on real inputs, over all batches together, in four ways (Y original, Y' converted):

    relative L2   || Y' - Y || / || Y ||
    cosine        <Y', Y> / (|| Y' || || Y ||)
    max abs       max | Y' - Y |
    SNR           10 log10 (|| Y ||^2 / || Y' - Y ||^2), in dB

and for each split layer twice: local, both layers on the original model's features, so its own fault; and
accumulated, each layer within its own model, so with everything upstream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convsplit.forms import form_named
from convsplit.layers import SeparableConv2d
from convsplit.progress import track
from convsplit.spec import ConvSpec, parameter_count
from convsplit.tables import Table, count, ratio, share
from convsplit.trace import (
    Call,
    Forward,
    batches_in,
    observe_calls,
    quiet_run,
    run_or_explain,
    scratch_copy,
    tensors_in,
)

FORMAT = 1


@dataclass(frozen=True)
class Drift:
    """How far outputs moved; see the head of the module."""

    relative: float
    cosine: float
    max_abs: float

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB, infinite for equal outputs."""
        return math.inf if self.relative == 0 else -20 * math.log10(self.relative)


@dataclass(frozen=True)
class LayerReport:
    """One split layer: parameters and MACs before and after, relative weight error, local and accumulated drift."""

    name: str
    form: str
    components: int
    params: tuple[int, int]
    macs: tuple[int, int] | None
    weight_error: float
    local: Drift | None
    accumulated: Drift | None


@dataclass(frozen=True)
class Report:
    """What a conversion saved and how far the output moved; print it, or use `to_json`, `to_csv`, `to_markdown`.

    `params`, `macs`, `conv_params` and `conv_macs` are before and after: of the whole model, and of the layers that
    were split. `drift` is that of the model's output, `agreement` the share of inputs with the same top-1 class
    (None where the output is not logits [N, C]); `images` is the number of inputs it was measured on.
    """

    model: str
    layers: tuple[LayerReport, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    drift: Drift | None
    agreement: float | None
    images: int
    notes: tuple[str, ...] = ()

    @property
    def conv_params(self) -> tuple[int, int]:
        """Parameters of the split layers before and after."""
        return (sum(layer.params[0] for layer in self.layers), sum(layer.params[1] for layer in self.layers))

    @property
    def conv_macs(self) -> tuple[int, int]:
        """MACs of the split layers before and after."""
        macs = [layer.macs or (0, 0) for layer in self.layers]
        return (sum(each[0] for each in macs), sum(each[1] for each in macs))

    def totals_table(self) -> Table:
        """Before, after and kept: parameters and MACs."""
        pairs = {
            "parameters, split layers": self.conv_params,
            "parameters, whole model": self.params,
            "MACs, split layers": self.conv_macs,
            "MACs, whole model": self.macs,
        }
        rows = [[what, count(before), count(after), ratio(after, before)] for what, (before, after) in pairs.items()]
        return Table(["", "before", "after", "kept"], rows, frozenset({""}))

    def table(self) -> Table:
        """One row per split layer."""
        headings = [
            "layer",
            "form",
            "R",
            "params",
            "->",
            "kept",
            "MACs",
            " ->",
            "weight error",
            "local",
            "accumulated",
        ]
        return Table(headings, [_row(layer) for layer in self.layers], frozenset({"layer", "form"}))

    def summary(self) -> str:
        """The drift of the output in words."""
        lines = []
        if self.drift is not None:
            lines.append(
                f"output drift on {self.images} inputs: relative L2 {share(self.drift.relative)}, "
                f"cosine {self.drift.cosine:.4f}, max abs {share(self.drift.max_abs)}, SNR {self.drift.snr_db:.1f} dB"
            )
        if self.agreement is not None:
            lines.append(f"top-1 agreement with the original: {100 * self.agreement:.1f} %")
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return f"{self.model}\n{self.table().text()}\n\n{self.totals_table().text()}\n\n{self.summary()}"

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown, for pull requests."""
        parts = [f"### {self.model}", self.totals_table().markdown(), self.summary(), self.table().markdown()]
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """One line per split layer, plain numbers."""
        headings = [
            "layer", "form", "components", "params_before", "params_after", "macs_before", "macs_after",
            "weight_error", "local_drift", "accumulated_drift",
        ]  # fmt: skip
        rows = [
            [
                x.name, x.form, x.components, *x.params, *(x.macs or ("", "")), x.weight_error,
                "" if x.local is None else x.local.relative,
                "" if x.accumulated is None else x.accumulated.relative,
            ]
            for x in self.layers
        ]  # fmt: skip
        return Table(headings, [[str(cell) for cell in row] for row in rows]).csv()

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back to an equal report. NaN and infinity are written as null."""
        return json.dumps(_without_nan({"format": FORMAT, **asdict(self)}), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not a report, or was written by a newer version.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("it was written by another version")
            layers = tuple(_layer_from_json(layer) for layer in data.pop("layers"))
            params, macs = _pair(data.pop("params")), _pair(data.pop("macs"))
            drift, notes = _drift(data.pop("drift")), tuple(data.pop("notes"))
            return cls(layers=layers, params=params, macs=macs, drift=drift, notes=notes, **data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a report of convsplit: {type(error).__name__}: {error}") from error


def compare(
    model: nn.Module,
    converted: nn.Module,
    inputs: Any,
    *,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Report:
    """Measure what the conversion of `model` to `converted` saved, and how far it moved the output.

    Args:
        model: the original.
        converted: from `convert` or `apply_plan`, perhaps refitted or fine-tuned since.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an iterable of those.
        forward: how to run a model on what `inputs` yields; for a loader of images and labels
            `lambda model, batch: model(batch[0])`.
        progress: show a progress bar; by default only on a terminal.

    MACs are those of the first batch. Both models are run in eval mode and left as they were.

    Raises:
        ValueError: no inputs; a model that does not run on them; models that have nothing to do with each other.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    >>> report = compare(model, convsplit.convert(model, rank="full"), torch.randn(4, 8, 3, 3))
    >>> report.agreement, report.drift.relative < 1e-5
    (1.0, True)
    """
    pairs = _layer_pairs(model, converted)
    meters = {name: (_Meter(), _Meter()) for name in pairs}
    whole, images, agreed, classified = _Meter(), 0, 0, 0
    calls: tuple[dict[str, tuple[Call, ...]], int, int] | None = None
    with quiet_run(model, converted):
        for batch in track(batches_in(inputs), "Comparing", progress=progress):
            if calls is None:
                original_calls, original_macs = observe_calls(scratch_copy(model), batch, forward)
                calls = (original_calls, original_macs, observe_calls(scratch_copy(converted), batch, forward)[1])
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
    layers = tuple(_layer_report(name, *pairs[name], calls[0].get(name, ()), *meters[name]) for name in pairs)
    return Report(
        model=type(model).__name__,
        layers=layers,
        params=(parameter_count(model), parameter_count(converted)),
        macs=(calls[1], calls[2]),
        drift=whole.drift(),
        agreement=agreed / classified if classified else None,
        images=images,
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
        _weight_error(original, layer), local.drift(), accumulated.drift(),
    )  # fmt: skip


def _weight_error(original: nn.Module, layer: SeparableConv2d) -> float:
    weight = original.weight
    assert isinstance(weight, Tensor)
    dense = weight.detach().double()
    merged = layer.weight.detach().double()
    return float((merged - dense).norm() / dense.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _same_class(before: Any, after: Any) -> tuple[int, int]:
    """How many inputs get the same top-1 class, of how many; (0, 0) where the first output is not logits [N, C]."""
    y, z = next(tensors_in(before), None), next(tensors_in(after), None)
    if y is None or z is None or y.shape != z.shape or y.dim() != 2 or y.shape[1] < 2 or not y.is_floating_point():
        return (0, 0)
    return (int((y.argmax(1) == z.argmax(1)).sum()), y.shape[0])


def _notes(layers: tuple[LayerReport, ...], whole: _Meter) -> Iterator[str]:
    if not layers:
        yield "no layer is split"
    missed = [layer.name for layer in layers if layer.local is None]
    if missed:
        yield f"not reached by these inputs: {', '.join(missed)}"
    if whole.mismatched:
        yield f"outputs that could not be compared, their shapes differ: {'; '.join(whole.mismatched[:3])}"


def _row(layer: LayerReport) -> list[str]:
    before, after = layer.params
    macs = layer.macs or (None, None)
    return [
        layer.name, layer.form, str(layer.components), count(before), count(after), ratio(after, before),
        count(macs[0]), count(macs[1]), share(layer.weight_error),
        share(layer.local.relative if layer.local else None),
        share(layer.accumulated.relative if layer.accumulated else None),
    ]  # fmt: skip


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _drift(data: dict[str, float | None] | None) -> Drift | None:
    return None if data is None else Drift(**{key: _number(value) for key, value in data.items()})


def _pair(values: list[int]) -> tuple[int, int]:
    before, after = values
    return (int(before), int(after))


def _layer_from_json(data: dict[str, Any]) -> LayerReport:
    return LayerReport(
        name=data["name"],
        form=data["form"],
        components=int(data["components"]),
        params=_pair(data["params"]),
        macs=None if data["macs"] is None else _pair(data["macs"]),
        weight_error=_number(data["weight_error"]),
        local=_drift(data["local"]),
        accumulated=_drift(data["accumulated"]),
    )
