"""One point of a frontier, measured."""

from __future__ import annotations

from typing import Any

from torch import nn

from convsplit.choose.plan import Plan
from convsplit.model.running import Forward
from convsplit.report.comparison import compare
from convsplit.report.curves import FrontierPoint


def measured_point(
    plan: Plan, converted: nn.Module | None, original: nn.Module, batches: Any, forward: Forward | None
) -> FrontierPoint:
    """A plan with the drift of its conversion; with the predicted error alone where nothing was converted."""
    largest = float(plan.totals()["largest_error"] or 0.0)
    if converted is None:
        return FrontierPoint(plan, largest)
    report = compare(converted, original, batches, forward=forward, progress=False)
    return FrontierPoint(plan, largest, report.drift.relative if report.drift else None, report.agreement)
