"""The figures of a conversion, before and after, as values that print, compare, and go to JSON and back.

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
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from convsplit.choose.plan import Conditions
from convsplit.report.verdict import Evidence, Verdict, judge
from convsplit.tables import (
    Table,
    Tabular,
    changed,
    count,
    milliseconds,
    percent,
    ratio,
    share,
    times_faster,
)

if TYPE_CHECKING:
    from typing_extensions import Self

LAYER_WORDS = (
    "MACs: multiply-accumulates per input. Errors are relative, 0.1 being a tenth of the size: weight error, of the "
    "kernel; local, of the layer's output when both models' layers get what the original passes on, so its own fault; "
    "accumulated, of its output within its own model, so with all that comes before it."
)
TIME_WORDS = " ms: of the first batch, within each model."
FORMAT = 1  # raised when the JSON of reports changes so that older versions cannot read it


@dataclass(frozen=True)
class Drift:
    """How far outputs moved; see the head of the module.

    Infinite where outputs became NaN or infinite, NaN where those of the original are that throughout.
    """

    relative: float
    cosine: float
    max_abs: float

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB, infinite for equal outputs."""
        return math.inf if self.relative == 0 else -20 * math.log10(self.relative)


@dataclass(frozen=True)
class LayerReport:
    """One split layer: parameters and MACs before and after, relative weight error, local and accumulated drift.

    `largest_component` is the norm of the largest of the R components relative to that of the kernel they add up to:
    far above 1 they cancel each other, which half precision and quantisation pay for. MACs are per input;
    `milliseconds` before and after are those within the two models, None where no time was measured.
    """

    name: str
    form: str
    components: int
    params: tuple[int, int]
    macs: tuple[int, int] | None
    weight_error: float
    local: Drift | None
    accumulated: Drift | None
    largest_component: float
    milliseconds: tuple[float, float] | None = None

    @property
    def unused(self) -> bool:
        """Whether the original calls what this layer replaces, and the converted model never calls it."""
        return self.local is not None and self.accumulated is None


@dataclass(frozen=True)
class KeptLayer:
    """A convolution that was left as it is, its parameters, and why."""

    name: str
    params: int
    reason: str


@dataclass(frozen=True)
class Measured(Tabular):
    """What a conversion saved and how far the output moved, measured.

    `params`, `macs` (per input), `conv_params` and `conv_macs` are before and after: of the whole model, and of the
    layers that were split; likewise `stored_bytes` of all tensors as they are, `bytes_on_disk` as they would be in
    "float32", "float16" and "int8" (see `convsplit.report.sizes`), and `milliseconds` of the first batch where they
    were measured, under `conditions`. `drift` is that of the model's output, `agreement` the share of inputs with the
    same top-1 class (None where no output is known to be class scores); `images` is the number of inputs it was
    measured on.
    """

    model: str
    layers: tuple[LayerReport, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    drift: Drift | None
    agreement: float | None
    images: int
    stored_bytes: tuple[int, int]
    milliseconds: tuple[float, float] | None = None
    conditions: Conditions | None = None
    kept: tuple[KeptLayer, ...] = ()
    notes: tuple[str, ...] = ()
    bytes_on_disk: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """What the figures mean; see `convsplit.report.verdict` for the thresholds."""
        return judge(
            Evidence(
                split_layers=len(self.layers),
                params_kept=self.params[1] / max(1, self.params[0]),
                macs_kept=self.macs[1] / self.macs[0] if self.macs[0] else None,
                speedup=self.milliseconds[0] / self.milliseconds[1] if self.milliseconds else None,
                relative_drift=self.drift.relative if self.drift else None,
                agreement=self.agreement,
                inputs=self.images,
                unused=sum(layer.unused for layer in self.layers),
            )
        )

    @property
    def conv_params(self) -> tuple[int, int]:
        """Parameters of the split layers before and after."""
        return (sum(layer.params[0] for layer in self.layers), sum(layer.params[1] for layer in self.layers))

    @property
    def conv_macs(self) -> tuple[int, int]:
        """MACs of the split layers per input, before and after."""
        macs = [layer.macs or (0, 0) for layer in self.layers]
        return (sum(each[0] for each in macs), sum(each[1] for each in macs))

    @property
    def title(self) -> str:
        """The model's class."""
        return self.model

    def tables(self) -> list[Table]:
        """That of the layers and that of the totals."""
        return [self.table(), self.totals_table()]

    def totals_table(self) -> Table:
        """Before, after and kept: parameters, MACs, bytes, and milliseconds where measured."""
        pairs = {
            "parameters, split layers": self.conv_params,
            "parameters, whole model": self.params,
            "MACs per input, split layers": self.conv_macs,
            "MACs per input, whole model": self.macs,
        }
        rows = [[what, count(before), count(after), ratio(after, before)] for what, (before, after) in pairs.items()]
        sizes = {"bytes as stored": self.stored_bytes}
        sizes |= {f"bytes on disk, {precision}": pair for precision, pair in self.bytes_on_disk.items()}
        rows += [[what, count(before), count(after), ratio(after, before)] for what, (before, after) in sizes.items()]
        if self.milliseconds:
            slow, fast = self.milliseconds
            rows.append(["milliseconds, first batch", milliseconds(slow), milliseconds(fast), ratio(fast, slow)])
        return Table(["", "before", "after", "kept"], rows, frozenset({""}))

    def table(self) -> Table:
        """One row per split layer."""
        timed = any(layer.milliseconds for layer in self.layers)
        headings = ["layer", "form", "R", "params", "->", "kept", "MACs/input", " ->"]
        headings += [*(["ms", "  ->", "faster"] if timed else []), "weight error", "local", "accumulated"]
        rows = [_row(layer, timed) for layer in self.layers]
        return Table(headings, rows, frozenset({"layer", "form"}), self.words(timed) if rows else "")

    @staticmethod
    def words(timed: bool) -> str:
        """What the columns of the layers mean, with their units."""
        return LAYER_WORDS + TIME_WORDS * timed

    def summary(self) -> str:
        """The verdict and the drift of the output in words."""
        lines = [str(self.verdict)]
        if self.drift is not None:
            lines.append(
                f"output drift on {self.images} inputs: relative L2 {share(self.drift.relative)}, "
                f"cosine {self.drift.cosine:.4f}, max abs {share(self.drift.max_abs)}, SNR {self.drift.snr_db:.1f} dB"
            )
        if self.agreement is not None:
            lines.append(f"top-1 agreement with the original: {percent(self.agreement)}; {changed(self.agreement)}")
        if self.conditions is not None:
            lines.append(f"milliseconds of {self.conditions}")
        return "\n".join([*lines, *self.notes])

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per split layer."""
        return [_record(layer) for layer in self.layers]

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back to an equal report. NaN and infinity are written as null."""
        return json.dumps(_without_nan({"format": FORMAT, **asdict(self)}), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
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
            times, size = data.pop("milliseconds"), _pair(data.pop("stored_bytes"))
            kept = tuple(KeptLayer(**layer) for layer in data.pop("kept"))
            found = data.pop("conditions", None)
            sizes = {name: _pair(pair) for name, pair in data.pop("bytes_on_disk", {}).items()}
            return cls(
                layers=layers, params=params, macs=macs, drift=drift, notes=notes, kept=kept, stored_bytes=size,
                milliseconds=_times(times), conditions=None if found is None else Conditions(**found),
                bytes_on_disk=sizes, **data,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a report of convsplit: {type(error).__name__}: {error}") from error


def _row(layer: LayerReport, timed: bool) -> list[str]:
    before, after = layer.params
    macs = layer.macs or (None, None)
    slow, fast = layer.milliseconds or (None, None)
    times = [milliseconds(slow), milliseconds(fast), times_faster(slow, fast)] if timed else []
    return [
        layer.name, layer.form, str(layer.components), count(before), count(after), ratio(after, before),
        count(macs[0]), count(macs[1]), *times, share(layer.weight_error),
        share(layer.local.relative if layer.local else None),
        share(layer.accumulated.relative if layer.accumulated else None),
    ]  # fmt: skip


def _record(layer: LayerReport) -> dict[str, Any]:
    macs = layer.macs or (None, None)
    times = layer.milliseconds or (None, None)
    return {
        "layer": layer.name,
        "form": layer.form,
        "components": layer.components,
        "params_before": layer.params[0],
        "params_after": layer.params[1],
        "macs_before": macs[0],
        "macs_after": macs[1],
        "milliseconds_before": times[0],
        "milliseconds_after": times[1],
        "weight_error": layer.weight_error,
        "local_drift": layer.local.relative if layer.local else None,
        "accumulated_drift": layer.accumulated.relative if layer.accumulated else None,
        "largest_component": layer.largest_component,
    }


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


def _times(values: list[float] | None) -> tuple[float, float] | None:
    return None if values is None else (float(values[0]), float(values[1]))


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
        largest_component=_number(data["largest_component"]),
        milliseconds=_times(data.get("milliseconds")),
    )
