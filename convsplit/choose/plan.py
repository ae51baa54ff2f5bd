"""Plans: what becomes of every convolution of a model, as a value that prints, compares, and goes to JSON and back.

A plan holds names and numbers, never tensors. Make one with `make_plan`, read it, change it with `keep_dense` and
`choose`, store it, and apply it to the model or to another instance of the same architecture.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from convsplit.choose.budget import Budget
from convsplit.choose.knapsack import GAP
from convsplit.choose.options import Menu, Option
from convsplit.model.sites import Site
from convsplit.spec import ConvSpec, noun
from convsplit.structure import Structure
from convsplit.tables import (
    Table,
    Tabular,
    count,
    milliseconds,
    percent,
    ratio,
    share,
    times_faster,
)

FORMAT = 1  # raised when the JSON of plans changes so that older versions cannot read it


@dataclass(frozen=True)
class Conditions:
    """What milliseconds were measured under; another runtime, device, layout or number of threads gives others.

    `dtype` is the precision of the arithmetic, `version` that of the runtime, empty where it is not known.
    """

    device: str
    dtype: str
    layout: str
    threads: int
    training: bool = False
    runtime: str = "torch"
    version: str = ""

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        what = "forward and backward" if self.training else "inference"
        where = f"{self.runtime} {self.version}".strip()
        return f"{what} in {where} on {self.device}, {self.dtype}, {self.layout}, {threads}"


@dataclass(frozen=True)
class PlannedLayer:
    """What becomes of one convolution. `option` is None where it cannot be split; `reason` says why it is dense."""

    name: str
    spec: ConvSpec | None
    dense: Option | None = None
    option: Option | None = None
    reason: str = ""

    @property
    def split(self) -> bool:
        return self.option is not None and not self.option.dense

    @property
    def params(self) -> tuple[int, int]:
        """Parameters before and after, bias included."""
        if self.spec is None:
            return (0, 0)
        bias = self.spec.params - self.spec.weight_params
        after = self.option.params if self.option is not None else self.spec.weight_params
        return (self.spec.params, after + bias)

    @property
    def macs(self) -> tuple[int | None, int | None]:
        """MACs per input before and after, None where unknown."""
        if self.dense is None or self.option is None:
            return (None, None)
        return (self.dense.macs, self.option.macs)

    @property
    def milliseconds(self) -> tuple[float | None, float | None]:
        """Milliseconds before and after, None where not measured."""
        if self.dense is None or self.option is None:
            return (None, None)
        return (self.dense.milliseconds, self.option.milliseconds)


@dataclass(frozen=True)
class Plan(Tabular):
    """What becomes of every convolution of a model; see `make_plan`.

    `model_params` and `model_macs` count the whole model; `budget` and `seed` say how the plan came about.
    `model_milliseconds` are those of the whole model before and after, measured under `conditions`; both are None
    where no time was measured. No other choice under the budget has a predicted loss smaller by more than the fraction
    `gap`.
    """

    layers: tuple[PlannedLayer, ...]
    model_params: int
    model_macs: int | None = None
    budget: Budget | None = None
    seed: int = 0
    model_milliseconds: tuple[float, float] | None = None
    conditions: Conditions | None = None
    gap: float = 0.0

    @property
    def split(self) -> tuple[PlannedLayer, ...]:
        """The layers that are split."""
        return tuple(layer for layer in self.layers if layer.split)

    def layer(self, name: str) -> PlannedLayer:
        """Look a layer up; raises KeyError with the names there are."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        kind = noun(layer.spec for layer in self.layers)
        raise KeyError(f"no {kind} {name!r} in the plan; it has {', '.join(each.name for each in self.layers)}")

    def keep_dense(self, which: str | Callable[[PlannedLayer], bool]) -> Plan:
        """The plan with some layers kept dense: by name or glob pattern, or by a predicate.

        Raises:
            ValueError: the pattern matches no split layer.
        """
        if callable(which):
            chosen = {layer.name for layer in self.split if which(layer)}
        else:
            chosen = {layer.name for layer in self.split if fnmatch.fnmatchcase(layer.name, which)}
            if not chosen:
                raise ValueError(
                    f"{which!r} matches no split layer; those are {', '.join(x.name for x in self.split)}"
                )
        layers = (
            replace(layer, option=layer.dense, reason="kept dense as asked") if layer.name in chosen else layer
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def choose(self, name: str, form: str, *, rank: int | None = None, components: int | None = None) -> Plan:
        """The plan with one layer split as said; `rank` and `components` as for `SeparableConv2d`.

        The predicted error of that layer is then unknown, as it was not measured.
        """
        layer = self.layer(name)
        if layer.spec is None or layer.dense is None:
            raise ValueError(f"{name} cannot be split: {layer.reason}")
        structure = Structure.of(layer.spec, form, rank=rank, components=components)
        option = Option(structure, structure.params(layer.spec), None, None)
        layers = (replace(x, option=option, reason="") if x.name == name else x for x in self.layers)
        return replace(self, layers=tuple(layers))

    def totals(self) -> dict[str, int | float | None]:
        """Parameters and MACs before and after, of the splittable layers and of the whole model."""
        splittable = [layer for layer in self.layers if layer.dense is not None]
        # Weights only, as budgets count: the bias is the same on both sides.
        before = sum(layer.dense.params for layer in splittable if layer.dense is not None)
        after = sum(layer.option.params for layer in splittable if layer.option is not None)
        macs: list[Any] = [_sum(layer.macs[side] for layer in splittable) for side in (0, 1)]
        times: list[Any] = [_sum(layer.milliseconds[side] for layer in splittable) for side in (0, 1)]
        errors = [layer.option.error for layer in self.split if layer.option is not None]
        return {
            "params_before": before,
            "params_after": after,
            "macs_before": macs[0],
            "macs_after": macs[1],
            "model_params_before": self.model_params,
            "model_params_after": self.model_params - before + after,
            "model_macs_before": self.model_macs,
            "model_macs_after": _sum([self.model_macs, macs[1], None if macs[0] is None else -macs[0]]),
            "milliseconds_before": times[0],
            "milliseconds_after": times[1],
            "largest_error": max((e for e in errors if e is not None), default=0.0),
        }

    def table(self) -> Table:
        """One row per convolution."""
        timed = self.conditions is not None
        headings = ["layer", "kernel", "form", "R", "params", "->", "kept", "MACs/input", " ->"]
        headings += [*(["ms", "  ->", "faster"] if timed else []), "error", "reason"]
        rows = [_row(layer, timed) for layer in self.layers]
        return Table(headings, rows, frozenset({"layer", "kernel", "form", "reason"}))

    def summary(self) -> str:
        """The totals in words."""
        t = self.totals()
        n_splittable = sum(layer.dense is not None for layer in self.layers)
        kinds = f"{noun(layer.spec for layer in self.layers)}s"
        slower = self.model_milliseconds is not None and self.model_milliseconds[1] > self.model_milliseconds[0]
        lines = [
            *([f"slower than before: {self._times()}"] if slower else []),
            f"{len(self.split)} of {n_splittable} splittable {kinds} are split"
            + (f" ({self.budget!r})" if self.budget else ""),
            f"parameters of the splittable {kinds} {count(t['params_before'])} -> {count(t['params_after'])}"
            f" ({ratio(t['params_after'], t['params_before'])}), of the model {count(t['model_params_before'])}"
            f" -> {count(t['model_params_after'])} ({ratio(t['model_params_after'], t['model_params_before'])})",
        ]
        if t["macs_before"] is not None:
            lines.append(
                f"MACs per input of the splittable {kinds} {count(t['macs_before'])} -> {count(t['macs_after'])}"
                f" ({ratio(t['macs_after'], t['macs_before'])})"
            )
        if self.conditions is not None:
            lines.append(f"milliseconds of the splittable {kinds} {self._times()}, {self.conditions}")
        if self.gap > GAP:
            lines.append(f"another choice may have a predicted loss smaller by {percent(self.gap)} at most")
        lines.append(f"largest predicted relative weight error of a layer: {share(t['largest_error'])}")
        return "\n".join(lines)

    def _times(self) -> str:
        t = self.totals()
        before, after = t["milliseconds_before"], t["milliseconds_after"]
        text = f"{milliseconds(before)} -> {milliseconds(after)} ({ratio(after, before)})"
        if self.model_milliseconds is None:
            return text
        slow, fast = self.model_milliseconds
        text += f", of the model {milliseconds(slow)} -> {milliseconds(fast)} ({times_faster(slow, fast)})"
        return text

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per convolution."""
        return [_record(layer) for layer in self.layers]

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back to an equal plan."""
        data = {
            "format": FORMAT,
            "model_params": self.model_params,
            "model_macs": self.model_macs,
            "budget": asdict(self.budget) if self.budget else None,
            "seed": self.seed,
            "model_milliseconds": self.model_milliseconds,
            "conditions": asdict(self.conditions) if self.conditions else None,
            "gap": self.gap,
            "layers": [
                {
                    "name": layer.name,
                    "spec": layer.spec.to_json() if layer.spec else None,
                    "dense": asdict(layer.dense) if layer.dense else None,
                    "option": asdict(layer.option) if layer.option else None,
                    "reason": layer.reason,
                }
                for layer in self.layers
            ],
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not a plan, or was written by a newer version; says what is wrong.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"it has format {data['format']}, this version reads {FORMAT}")
            layers = tuple(_layer_from_json(layer) for layer in data["layers"])
            budget = Budget(**data["budget"]) if data["budget"] else None
            times, found = data.get("model_milliseconds"), data.get("conditions")
            return cls(
                layers, int(data["model_params"]), data["model_macs"], budget, int(data["seed"]),
                None if times is None else (float(times[0]), float(times[1])),
                None if found is None else Conditions(**found),
                float(data.get("gap", 0.0)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a plan of convsplit: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file that `save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def planned_layers(
    sites: Sequence[Site], menus: Sequence[Menu], chosen: Sequence[Option], *, observed: bool
) -> tuple[PlannedLayer, ...]:
    """Every site with the option chosen for it, and the reason where it stays dense.

    `observed`: the model was run on example inputs.
    """
    choices = {menu.site.name: (menu, option) for menu, option in zip(menus, chosen, strict=True)}
    layers = []
    for site in sites:
        if site.name not in choices:
            layers.append(PlannedLayer(site.name, site.spec, reason=site.reason))
            continue
        menu, option = choices[site.name]
        reason = ""
        if option.dense:
            reason = menu.note or (
                "the budget is better spent here" if len(menu.options) > 1 else "no form costs less"
            )
        if observed and not site.calls:
            reason = "; ".join(filter(None, (reason, "not reached by the example inputs")))
        elif site.places == 0 and not site.calls:
            reason = "; ".join(filter(None, (reason, "not called in the traced code")))
        layers.append(PlannedLayer(site.name, site.spec, menu.dense, option, reason))
    return tuple(layers)


def _row(layer: PlannedLayer, timed: bool) -> list[str]:
    spec, option = layer.spec, layer.option
    kernel = (
        ""
        if spec is None
        else "x".join(map(str, (spec.out_channels, spec.in_channels // spec.groups, *spec.kernel_size)))
    )
    if option is None or option.structure is None or spec is None:
        before = "" if spec is None else count(layer.params[0])
        macs = "" if layer.dense is None else count(layer.macs[0])
        time = [milliseconds(layer.milliseconds[0]), "", ""] if timed else []
        return [layer.name, kernel, "dense", "", before, "", "", macs, "", *time, "", layer.reason]
    before_, after = layer.params
    structure = option.structure
    width = str(structure.components) + ("" if structure.even else " uneven")
    return [
        layer.name, kernel, structure.form, width, count(before_), count(after), ratio(after, before_),
        count(layer.macs[0]), count(layer.macs[1]), *(_times(layer) if timed else []),
        share(option.error), layer.reason,
    ]  # fmt: skip


def _times(layer: PlannedLayer) -> list[str]:
    slow, fast = layer.milliseconds
    return [milliseconds(slow), milliseconds(fast), times_faster(slow, fast)]


def _record(layer: PlannedLayer) -> dict[str, Any]:
    option = layer.option if layer.split else None
    structure = option.structure if option else None
    return {
        "layer": layer.name,
        "form": structure.form if structure else "dense",
        "components": structure.components if structure else None,
        "params_before": layer.params[0],
        "params_after": layer.params[1],
        "macs_before": layer.macs[0],
        "macs_after": layer.macs[1],
        "milliseconds_before": layer.milliseconds[0],
        "milliseconds_after": layer.milliseconds[1],
        "error": option.error if option else None,
        "reason": layer.reason,
    }


def _sum(numbers: Any) -> Any:
    """The sum, or None where any number is unknown."""
    values = list(numbers)
    return None if not values or any(value is None for value in values) else sum(values)


def _layer_from_json(data: dict[str, Any]) -> PlannedLayer:
    return PlannedLayer(
        name=str(data["name"]),
        spec=ConvSpec.from_json(data["spec"]) if data["spec"] else None,
        dense=_option_from_json(data["dense"]),
        option=_option_from_json(data["option"]),
        reason=str(data["reason"]),
    )


def _option_from_json(data: dict[str, Any] | None) -> Option | None:
    if not data:
        return None
    structure = data["structure"]
    return Option(**{**data, "structure": None if structure is None else Structure(**structure)})
