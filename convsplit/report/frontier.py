"""One point of a frontier, measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from convsplit.choose.plan import Plan
from convsplit.model.running import Forward
from convsplit.report.comparison import compare
from convsplit.report.curves import FrontierPoint


def planned_point(plan: Plan) -> FrontierPoint:
    """A plan with its predicted error alone."""
    return FrontierPoint(plan, float(plan.totals()["largest_error"] or 0.0))


def measured_point(
    plan: Plan, converted: nn.Module, original: nn.Module, batches: Any, forward: Forward | None
) -> FrontierPoint:
    """A plan with the drift of its conversion."""
    report = compare(converted, original, batches, forward=forward, progress=False)
    drift = report.drift.relative if report.drift else None
    return replace(planned_point(plan), drift=drift, agreement=report.agreement)
