"""Two reports side by side: before and after fine-tuning, two budgets, two versions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from convsplit.report.values import LayerReport, Measured
from convsplit.tables import Table, Tabular, count, milliseconds, percent, share


@dataclass(frozen=True)
class ReportDiff(Tabular):
    """Two reports; print it, or use one of the `to_` methods. Made by `Report.diff`."""

    first: Measured
    second: Measured

    @property
    def title(self) -> str:
        """What it is."""
        return "Two reports"

    def tables(self) -> list[Table]:
        """That of the layers and that of the totals."""
        return [self.table(), self.totals_table()]

    def summary(self) -> str:
        """Both verdicts."""
        return f"first: {self.first.verdict}\nsecond: {self.second.verdict}"

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per split layer of either."""
        return [
            {"report": which, **record}
            for which, report in (("first", self.first), ("second", self.second))
            for record in report.records()
        ]

    def totals_table(self) -> Table:
        """Both reports' totals and what changed between them."""
        rows = []
        for what, key, show in _TOTALS:
            values = [_totals(report)[key] for report in (self.first, self.second)]
            rows.append([what, *map(show, values), _change(values[0], values[1], show)])
        return Table(["", "first", "second", "change"], rows, frozenset({""}))

    def table(self) -> Table:
        """Every layer that is split in either: how, what it keeps, and its local and accumulated drift."""
        headings = [
            "layer",
            *(side + what for what in ("form", "kept", "local", "accumulated") for side in ("", "-> ")),
        ]
        sides = [{layer.name: layer for layer in report.layers} for report in (self.first, self.second)]
        names = list(dict.fromkeys([*sides[0], *sides[1]]))
        rows = [[name, *_interleaved(_cells(sides[0].get(name)), _cells(sides[1].get(name)))] for name in names]
        return Table(headings, rows, frozenset({"layer", "form", "-> form"}))

    def to_json(self) -> str:
        """Totals of both and their difference, None where either is unknown."""
        first, second = _totals(self.first), _totals(self.second)
        change = {key: _minus(second[key], first[key]) for key in first}
        return json.dumps({"first": first, "second": second, "change": change}, indent=1)


_TOTALS: list[tuple[str, str, Any]] = [
    ("parameters", "params", count),
    ("MACs per input", "macs", count),
    ("milliseconds, first batch", "milliseconds", milliseconds),
    ("relative output drift", "drift", share),
    ("top-1 agreement", "agreement", percent),
]


def _totals(report: Measured) -> dict[str, Any]:
    return {
        "params": report.params[1],
        "macs": report.macs[1],
        "milliseconds": report.milliseconds[1] if report.milliseconds else None,
        "drift": report.drift.relative if report.drift else None,
        "agreement": report.agreement,
    }


def _minus(second: float | None, first: float | None) -> float | None:
    return None if second is None or first is None else second - first


def _change(first: float | None, second: float | None, show: Any) -> str:
    change = _minus(second, first)
    if not change:
        return "-" if change is None else "same"
    return ("+" if change > 0 else "-") + str(show(abs(change)))


def _cells(layer: LayerReport | None) -> list[str]:
    if layer is None:
        return ["dense", "100.0 %", "0", "-"]
    local, accumulated = (drift.relative if drift else None for drift in (layer.local, layer.accumulated))
    kept = percent(layer.params[1] / layer.params[0])
    return [f"{layer.form} {layer.components}", kept, share(local), share(accumulated)]


def _interleaved(first: list[str], second: list[str]) -> list[str]:
    return [cell for pair in zip(first, second, strict=True) for cell in pair]
