"""Curves: error against parameters of every layer, and budget against drift of the whole model.

`Frontier` is a value, made by `convsplit.frontier`. Its knee is the budget whose point lies furthest below the
straight line from the smallest budget to the model as it is, both axes scaled to 0 .. 1 (Satopaa et al., 2011, for
convex falling curves): what is kept beyond it buys less and less.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from convsplit.choose.budget import Budget
from convsplit.choose.options import Menu
from convsplit.choose.plan import Plan
from convsplit.tables import Table, Tabular, count, percent, share


@dataclass(frozen=True)
class CurvePoint:
    """One option of a layer: form, number of components, parameters, predicted relative weight error."""

    form: str
    components: int
    params: int
    error: float


@dataclass(frozen=True)
class Curve:
    """All options of a layer, and the parameters of its dense weight."""

    layer: str
    params: int
    points: tuple[CurvePoint, ...]

    def forms(self) -> dict[str, list[CurvePoint]]:
        """The points of each form in rising parameters."""
        found: dict[str, list[CurvePoint]] = {}
        for point in sorted(self.points, key=lambda point: point.params):
            found.setdefault(point.form, []).append(point)
        return found


@dataclass(frozen=True)
class FrontierPoint:
    """One budget: what its plan keeps, the largest predicted weight error, and the drift where it was measured.

    `drift` and `agreement` are those of what one gets; where that is repaired, `unrepaired` is the drift before.
    """

    plan: Plan
    largest_error: float
    drift: float | None = None
    agreement: float | None = None
    unrepaired: float | None = None

    @property
    def budget(self) -> Budget:
        assert self.plan.budget is not None
        return self.plan.budget

    @property
    def kept(self) -> float:
        """Of the weights of the splittable convolutions."""
        return _fraction(self.plan, "params") or 0.0

    @property
    def macs_kept(self) -> float | None:
        """Of the MACs of the splittable convolutions; None where shapes are not known."""
        return _fraction(self.plan, "macs")

    @property
    def moved(self) -> float:
        """The measured relative drift or, without one, the largest predicted error."""
        return self.largest_error if self.drift is None else self.drift


@dataclass(frozen=True)
class Frontier(Tabular):
    """The whole curve of budget against drift, largest budget first; prints as a table.

    `curves` hold the options of every layer, which all budgets share; `notes` name the budgets that cannot be met;
    `chosen` is the point that was taken, if one was: see `choosing`.
    """

    points: tuple[FrontierPoint, ...]
    curves: tuple[Curve, ...] = ()
    notes: tuple[str, ...] = ()
    chosen: FrontierPoint | None = None

    def choosing(self, budget: Budget) -> Frontier:
        """The same with the point of a budget marked as the chosen one.

        Raises:
            ValueError: there is no such point; says which there are.
        """
        for point in self.points:
            if point.budget == budget:
                return replace(self, chosen=point)
        raise ValueError(f"{budget!r} is none of the budgets here: {', '.join(repr(p.budget) for p in self.points)}")

    def kept_by(self, split: tuple[int, int]) -> float | None:
        """The fraction of the splittable parameters kept by a conversion whose split layers had and have so many."""
        splittable = self.points[0].plan.totals()["params_before"] if self.points else None
        return 1 - (split[0] - split[1]) / splittable if splittable else None

    @property
    def measured(self) -> bool:
        """Whether drift was measured, at every budget."""
        return bool(self.points) and all(point.drift is not None for point in self.points)

    @property
    def repaired(self) -> bool:
        """Whether drift was measured before and after repair."""
        return bool(self.points) and all(point.unrepaired is not None for point in self.points)

    @property
    def knee(self) -> FrontierPoint | None:
        """The budget to try first; None with fewer than three of them, or where nothing bends."""
        return _knee(self.points)

    def table(self) -> Table:
        """One row per budget; a star marks the knee and the chosen one."""
        drifts = ["before repair", "drift"] if self.repaired else ["drift"]
        headings = ["budget", "params kept", "MACs kept", "largest error", *drifts, "agreement", "split", ""]
        return Table(headings, [self._row(point) for point in self.points], frozenset({"budget", ""}))

    def summary(self) -> str:
        """The knee and the notes in words."""
        lines = list(self.notes)
        what = "measured drift" if self.measured else "largest predicted error"
        if self.knee is not None:
            lines.insert(0, f"the knee is at {self.knee.budget!r}: {what} {share(self.knee.moved)}")
        if self.chosen is not None:
            lines.insert(0, f"chosen: {self.chosen.budget!r}, {what} {share(self.chosen.moved)}")
        return "\n".join(lines)

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per budget."""
        return [_record(point, point is self.knee, point is self.chosen) for point in self.points]

    def to_json(self) -> str:
        """Budgets and the curves of all layers."""
        curves = [asdict(curve) for curve in self.curves]
        return json.dumps({"points": self.records(), "curves": curves, "notes": list(self.notes)}, indent=1)

    def _row(self, point: FrontierPoint) -> list[str]:
        before = [share(point.unrepaired)] if self.repaired else []
        marks = [name for name, marked in (("chosen", self.chosen), ("knee", self.knee)) if point is marked]
        return [
            f"{point.budget.kind}={point.budget.fraction:g}", percent(point.kept), percent(point.macs_kept),
            share(point.largest_error), *before, share(point.drift), percent(point.agreement),
            count(len(point.plan.split)), f"* {', '.join(marks)}" if marks else "",
        ]  # fmt: skip


def curve_of(menu: Menu) -> Curve:
    """The options of a layer as points."""
    points = [
        CurvePoint(option.structure.form, option.structure.components, option.params, option.error)
        for option in menu.options
        if option.structure is not None and option.error is not None
    ]
    return Curve(menu.site.name, menu.dense.params, tuple(points))


def _knee(points: Sequence[FrontierPoint]) -> FrontierPoint | None:
    if len(points) < 3:
        return None
    least, worst = min(point.kept for point in points), max(point.moved for point in points)
    if least >= 1 or worst <= 0:
        return None

    def below_the_line(point: FrontierPoint) -> float:
        return 1 - (point.kept - least) / (1 - least) - point.moved / worst

    best = max(points, key=below_the_line)
    return best if below_the_line(best) > 0 else None


def _fraction(plan: Plan, what: str) -> float | None:
    """What is kept as budgets count it: of the weights of the splittable convolutions, biases left out."""
    pairs = [(layer.dense, layer.option) for layer in plan.layers if layer.dense and layer.option]
    before = [getattr(dense, what) for dense, _ in pairs]
    after = [getattr(option, what) for _, option in pairs]
    return None if not pairs or None in before or None in after else sum(after) / max(1, sum(before))


def _record(point: FrontierPoint, knee: bool, chosen: bool) -> dict[str, Any]:
    return {
        "budget": point.budget.kind,
        "fraction": point.budget.fraction,
        "params_kept": point.kept,
        "macs_kept": point.macs_kept,
        "largest_error": point.largest_error,
        "unrepaired_drift": point.unrepaired,
        "drift": point.drift,
        "agreement": point.agreement,
        "split": len(point.plan.split),
        "knee": knee,
        "chosen": chosen,
    }
