"""A search: conversions of one study, tried until the cheapest is found that keeps the quality asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from convsplit.choose.budget import Budget
from convsplit.choose.plan import Plan
from convsplit.choose.search import Loss, Point, Predicted, cheapest
from convsplit.report.found import Found, Trial
from convsplit.report.quality import HeldOut

Finetune = Callable[[nn.Module, nn.Module, Any], Any]  # called with (converted, original, batches)

GRID = tuple(0.97 * 0.87**step for step in range(26))  # fractions at which drift is predicted, 0.97 to 0.03
TIMED_GRID = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3)  # where each plan is measured


class Converts(Protocol):
    """What a search asks of a study."""

    @property
    def model(self) -> nn.Module:
        """The original."""

    @property
    def batches(self) -> Any:
        """What conversions are repaired on."""

    @property
    def plan(self) -> Callable[..., Plan]:
        """Decide, for a budget."""

    @property
    def apply(self) -> Callable[[Plan], nn.Module]:
        """Convert and repair."""

    def predicted_drift(self, plan: Plan) -> float:
        """What a plan comes to."""


def find_cheapest(known: Converts, held: HeldOut, *, most: int, then: Finetune | None = None, **choice: Any) -> Found:
    """Convert at a handful of budgets, measure each, and keep the cheapest that loses no more than the limit.

    Where none does, the one that loses least is kept. All are held in memory until one is chosen.
    """
    plans = _plans(known, held.budget.minimise, choice)
    predicted = Predicted(list(plans), [known.predicted_drift(plan) for plan in plans.values()])
    trials: list[Trial] = []
    models: list[nn.Module] = []

    def measure(fraction: float) -> Point:
        began = time.monotonic()
        plan = known.plan(Budget.of_kind(held.budget.minimise, fraction), **choice)
        converted = known.apply(plan)
        quality = held.measure(converted)
        trials.append(Trial(plan, known.predicted_drift(plan), quality, time.monotonic() - began))
        models.append(converted)
        return Point(fraction, quality.drift, quality.loss)

    counted = held.count if held.budget.kind == "agreement" else 0
    loss = Loss(held.limit, held.expected, counted, held.expected_of_all)
    best = _best(cheapest(measure, predicted, loss, most=most), loss)
    chosen, model = trials[best], models[best]
    if then is not None:
        began = time.monotonic()
        then(model, known.model, known.batches)
        name = getattr(then, "__name__", "fine-tuning")
        seconds = time.monotonic() - began
        chosen = Trial(chosen.plan, chosen.predicted, held.measure(model), seconds, f"then {name}")
        trials.append(chosen)
    return Found(held.budget, tuple(trials), chosen, model, held.limit, held.count, _costliest(known, chosen.plan))


def _plans(known: Converts, kind: str, choice: dict[str, Any]) -> dict[float, Plan]:
    """Plans over the whole range of fractions, down to the smallest that can be met."""
    plans: dict[float, Plan] = {}
    for fraction in TIMED_GRID if kind == "latency" else GRID:
        try:
            plans[fraction] = known.plan(Budget.of_kind(kind, fraction), **choice)
        except ValueError:  # noqa: PERF203 - of a handful of budgets
            if not plans:
                raise
            break
    return plans


def _best(points: list[Point], loss: Loss) -> int:
    """The least that keeps to the limit and is believed; or else what is lost least."""
    believed = loss.believed(points)
    met = [index for index, lost in enumerate(believed) if lost <= loss.limit]
    if met:
        return min(met, key=lambda index: points[index].fraction)
    return min(range(len(points)), key=lambda index: (points[index].loss > loss.limit, believed[index]))


def _costliest(known: Converts, plan: Plan) -> tuple[str, ...]:
    """The three layers whose errors move the output most, by what is predicted."""

    def cost(name: str) -> float:
        return known.predicted_drift(plan.keep_dense(lambda layer: layer.name != name))

    return tuple(sorted((layer.name for layer in plan.split), key=cost, reverse=True)[:3])
