"""What a search for the cheapest conversion of a certain quality has found, and all that was tried on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from convsplit.choose.budget import Budget
from convsplit.choose.plan import Plan
from convsplit.report.curves import Frontier, FrontierPoint
from convsplit.report.quality import Quality, inputs_to_narrow, inputs_to_tell
from convsplit.tables import Table, Tabular, changed, count, milliseconds, percent, ratio, share, times_faster

WORDS = (
    "Each row is a conversion, repaired. Parameters are those of the whole model, MACs its multiply-accumulates per "
    "input; drift, of the output, is relative, 0.1 being a tenth of its size, and predicted before repair."
)


@dataclass(frozen=True)
class Trial:
    """One conversion: its plan, the drift predicted before repair, what was measured after it, and the seconds."""

    plan: Plan
    predicted: float
    quality: Quality
    seconds: float
    after: str = ""  # what else was done to it, such as "distill"

    @property
    def budget(self) -> Budget:
        assert self.plan.budget is not None
        return self.plan.budget


@dataclass(frozen=True)
class Found(Tabular):
    """The cheapest conversion that was found, `model`, with its `plan`; prints as a table of all `trials`.

    `limit` is the loss that was allowed, `inputs` how many were held out to measure it; `costliest` names the layers
    whose errors move the output most.
    """

    budget: Budget
    trials: tuple[Trial, ...]
    chosen: Trial
    model: nn.Module = field(repr=False)
    limit: float
    inputs: int
    costliest: tuple[str, ...] = ()

    def checked(self) -> Found:
        """Itself, where the target was met.

        Raises:
            ValueError: it was not; says how near it came, and what would help.
        """
        if self.met:
            return self
        raise ValueError(
            f"{self.budget!r} cannot be met by converting and repairing{'' if self.chosen.after else ' alone'}. The "
            f"nearest of {len(self.trials)} conversions: {self._verdict()}. {self._what_would_help()}"
        )

    @property
    def plan(self) -> Plan:
        return self.chosen.plan

    @property
    def frontier(self) -> Frontier:
        """What was tried as a curve, the chosen one marked: for `plots.plot_frontier` and a report's page."""
        kept = sorted(self.trials, key=lambda trial: -trial.budget.fraction)
        points = {
            id(trial): FrontierPoint(
                trial.plan, float(trial.plan.totals()["largest_error"] or 0.0), trial.quality.drift,
                1 - trial.quality.loss if self.budget.kind == "agreement" else None,
            )
            for trial in kept
        }  # fmt: skip
        return Frontier(tuple(points.values()), chosen=points[id(self.chosen)])

    @property
    def met(self) -> bool:
        """Whether the loss that was measured is within the limit."""
        return self.chosen.quality.loss <= self.limit

    @property
    def certain(self) -> bool:
        """Whether all of its 95 % interval is on one side of the limit."""
        quality = self.chosen.quality
        if quality.low is None or quality.high is None:
            return False
        return quality.high <= self.limit if self.met else quality.low > self.limit

    def table(self) -> Table:
        """One row per conversion, in the order of the search; a star marks the chosen one."""
        headings = [
            "budget", "params", "MACs", *(["ms"] if self._timed else []), "predicted drift", "drift", self._loss_name,
            "95 % interval", "s", "",
        ]  # fmt: skip
        return Table(headings, [self._row(trial) for trial in self.trials], frozenset({"budget", ""}), WORDS)

    def summary(self) -> str:
        """What was found, how sure that is, and what would help."""
        lines = [f"{self.budget!r}: {self._verdict()}", self._confidence()]
        return "\n".join(lines if self.met else [*lines, self._what_would_help()])

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per conversion."""
        return [
            {
                "budget": trial.budget.kind, "fraction": trial.budget.fraction, "after": trial.after,
                "params": trial.plan.totals()["model_params_after"], "macs": trial.plan.totals()["model_macs_after"],
                "predicted_drift": trial.predicted, "drift": trial.quality.drift, "loss": trial.quality.loss,
                "low": trial.quality.low, "high": trial.quality.high, "value": trial.quality.value,
                "milliseconds": _milliseconds(trial)[1], "seconds": trial.seconds,
                "met": trial.quality.loss <= self.limit, "chosen": trial is self.chosen,
            }
            for trial in self.trials
        ]  # fmt: skip

    def to_json(self) -> str:
        """All that was tried."""
        kind = {"budget": self.budget.kind, "limit": self.limit, "inputs": self.inputs, "met": self.met}
        return json.dumps({**kind, "certain": self.certain, "trials": self.records()}, indent=1)

    @property
    def _timed(self) -> bool:
        return any(_milliseconds(trial)[1] is not None for trial in self.trials)

    @property
    def _loss_name(self) -> str:
        return {"drift": "relative drift", "agreement": "changed class", "metric": "metric lost"}[self.budget.kind]

    def _loss(self, loss: float | None) -> str:
        return percent(loss) if self.budget.kind == "agreement" else share(loss)

    def _row(self, trial: Trial) -> list[str]:
        quality, totals = trial.quality, trial.plan.totals()
        interval = "-" if quality.low is None else f"{self._loss(quality.low)} to {self._loss(quality.high)}"
        star = "* chosen" if trial is self.chosen else ""
        return [
            f"{trial.budget.kind}={trial.budget.fraction:.3g}{f', {trial.after}' if trial.after else ''}",
            count(totals["model_params_after"]), count(totals["model_macs_after"]),
            *([milliseconds(_milliseconds(trial)[1])] if self._timed else []), share(trial.predicted),
            share(quality.drift), self._loss(quality.loss), interval, f"{trial.seconds:.1f}", star,
        ]  # fmt: skip

    def _verdict(self) -> str:
        totals, (slow, fast) = self.plan.totals(), _milliseconds(self.chosen)
        kept = ratio(totals["model_params_after"], totals["model_params_before"])
        saved = f"{kept} of the model's parameters are kept"
        if totals["model_macs_before"] and totals["model_macs_after"] is not None:
            saved += f", {ratio(totals['model_macs_after'], totals['model_macs_before'])} of its MACs"
        if fast is not None:
            saved += f", {milliseconds(slow)} -> {milliseconds(fast)} milliseconds ({times_faster(slow, fast)})"
        return f"{saved}; {self._what_was_lost()}"

    def _what_was_lost(self) -> str:
        quality, allowed = self.chosen.quality, f"allowed: {self._loss(self.limit)}"
        if self.budget.kind == "agreement":
            return f"measured on {self.inputs} held-out inputs, {changed(1 - quality.loss)} ({allowed})"
        if self.budget.kind == "drift":
            return (
                f"on {self.inputs} held-out inputs the output drifts by {share(quality.loss)} of its size ({allowed})"
            )
        assert quality.value is not None
        original = quality.value + (-quality.loss if self.budget.lower_is_better else quality.loss)
        much = f"{share(abs(quality.loss))} {'worse' if quality.loss > 0 else 'better'}"
        if self.budget.relative:
            allowed += f", {percent(self.budget.fraction)} of the original's"
        return f"the metric is {share(quality.value)} instead of {share(original)}, {much} ({allowed})"

    def _what_would_help(self) -> str:
        further = "for longer" if self.chosen.after else 'with then="reconstruct" or then="distill"'
        return (
            f"What would help: more calibration inputs; fine-tuning, {further}; leaving the costliest layers dense, "
            f"skip={list(self.costliest)!r}"
        )

    def _confidence(self) -> str:
        met = "met" if self.met else "missed"
        figure = "a metric of one's own" if self.budget.kind == "metric" else "this figure"
        if self.chosen.quality.low is None:
            return f"the target is {met}; nothing is known of the error bar of {figure}"
        if self.certain:
            return f"the target is {met}, beyond the error bar of {self.inputs} inputs"
        return f"the target is {met}, within the error bar of {self.inputs} inputs; about {self._enough:,} would tell"

    @property
    def _enough(self) -> int:
        """Inputs with which the error bar would end at the limit, were the loss the one that was measured."""
        quality = self.chosen.quality
        assert quality.low is not None
        assert quality.high is not None
        if self.budget.kind == "agreement":
            return inputs_to_tell(quality.loss, self.limit)
        return inputs_to_narrow(self.inputs, (quality.high - quality.low) / 2, abs(quality.loss - self.limit))


def _milliseconds(trial: Trial) -> tuple[float | None, float | None]:
    """Of the whole model before and after, where the plan was timed."""
    return trial.plan.model_milliseconds or (None, None)
