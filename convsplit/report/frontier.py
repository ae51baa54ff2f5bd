"""frontier: the whole curve of budget against predicted and measured drift, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from convsplit.choose.allocation import allocate
from convsplit.choose.budget import Budget
from convsplit.choose.options import Menu, find_options
from convsplit.choose.plan import Plan, planned_layers
from convsplit.forms import FORMS
from convsplit.model.graphs import Trace, trace
from convsplit.model.running import Batch, Forward, batches_in
from convsplit.model.sites import Site, Skip, find_sites
from convsplit.progress import track
from convsplit.report import Curve, CurvePoint, Frontier, FrontierPoint, compare
from convsplit.rewrite import apply_plan
from convsplit.spec import parameter_count

BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)


def frontier(
    model: nn.Module,
    example_inputs: Batch = None,
    *,
    inputs: Any = None,
    budgets: Sequence[Budget | float] = BUDGETS,
    kind: str = "params",
    forms: str | Sequence[str] = tuple(FORMS),
    skip: Skip = (),
    seed: int = 0,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Frontier:
    """Plan a model at many budgets, and measure the drift of each.

    The options of the layers are worked out once; each budget then costs one allocation and, where drift is measured,
    one conversion and one comparison.

    Args:
        model: the trained model; it is not changed.
        example_inputs: as for `convert`; needed for budgets of MACs.
        inputs: measure drift on these, as in `compare`; without them only predicted errors are given.
        budgets: `Budget` objects, or fractions of `kind`.
        kind: what plain fractions are fractions of: "params", "macs" or "error".
        forms: as for `convert`.
        skip: as for `convert`.
        seed: as for `convert`.
        forward: as for `compare`.
        progress: show a progress bar; by default only on a terminal.

    Budgets that cannot be met are left out and named in the notes.

    Raises:
        ValueError: no budgets, or none that can be met.

    >>> import convsplit, torch
    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> curve = frontier(model, inputs=torch.randn(2, 16, 8, 8), budgets=(0.75, 0.5, 0.25), forms="dw-pw")
    >>> [point.drift < 1 for point in curve.points]
    [True, True, True]
    """
    wanted = [each if isinstance(each, Budget) else budget_of(kind, each) for each in budgets]
    traced = trace(model, example_inputs)
    sites = find_sites(model, traced, skip=skip)
    forms = [forms] if isinstance(forms, str) else list(forms)
    menus = find_options(model, sites, forms=forms, seed=seed, progress=progress)
    plans, notes = _plans(model, traced, sites, menus, wanted, seed)
    if not plans:
        raise ValueError("; ".join(notes) or "budgets is empty: give at least one")
    # A generator of batches would be spent after the first budget.
    batches = None if inputs is None else list(batches_in(inputs))
    points = [_point(model, plan, batches, forward) for plan in track(plans, "Budgets", progress=progress)]
    return Frontier(tuple(points), tuple(curve_of(menu) for menu in menus), tuple(notes))


def budget_of(kind: str, fraction: float) -> Budget:
    """The budget that keeps a fraction of "params" or "macs", or allows an "error"."""
    return Budget(**{kind: fraction})  # type: ignore[arg-type]


def curve_of(menu: Menu) -> Curve:
    """The options of a layer as points."""
    points = [
        CurvePoint(option.form, option.components, option.params, option.error)
        for option in menu.options
        if not option.dense and option.error is not None
    ]
    return Curve(menu.site.name, menu.dense.params, tuple(points))


def _plans(
    model: nn.Module, traced: Trace, sites: list[Site], menus: list[Menu], budgets: list[Budget], seed: int
) -> tuple[list[Plan], list[str]]:
    """A plan for each budget that can be met, the largest first, and what is to be said about the others."""
    params, plans, notes = parameter_count(model), [], []
    for budget in sorted(budgets, key=lambda budget: -budget.fraction):
        try:
            chosen = allocate(menus, budget, model_params=params, model_macs=traced.macs)
        except ValueError as error:
            notes.append(str(error))
            continue
        layers = planned_layers(sites, menus, chosen, traced.calls is not None)
        plans.append(Plan(layers, params, traced.macs, budget, seed))
    return plans, notes


def _point(model: nn.Module, plan: Plan, batches: list[Batch] | None, forward: Forward | None) -> FrontierPoint:
    largest = float(plan.totals()["largest_error"] or 0.0)
    if batches is None:
        return FrontierPoint(plan, largest)
    report = compare(model, apply_plan(model, plan, progress=False), batches, forward=forward, progress=False)
    return FrontierPoint(plan, largest, report.drift.relative if report.drift else None, report.agreement)
