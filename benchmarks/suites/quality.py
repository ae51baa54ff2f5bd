"""As small as a quality allows: is the target held on inputs that nobody has seen, and how near is it to the best?

    python -m benchmarks quality [NETWORKS.py ...] [--depths 20 56] [--target agreement=0.98] [--inputs 768]
                                 [--seeds 0] [--sweep 0.03]

NETWORKS.py as in benchmarks/subjects.py. Two thirds of the inputs, from the training images and unlabelled, are for
choice and repair, a third is held out. One row per network and seed: what was found, its figure on the test images, the
conversions, and the seconds beside those of one calibrated conversion. Then every conversion's predicted drift beside
the measured one.

With --sweep, conversions around the found one, in steps of that size of its fraction: down until two in a row lose
more of the test images than is allowed, and up until two in a row do not. The smallest that keeps to the limit there is
what the found one is compared with. What they lose of the held-out inputs stands beside it, and is no judge: of several
conversions the smallest that passes a few inputs is the one that was lucky.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

import convsplit
from benchmarks.results import POINTS, Kind, Sheet
from benchmarks.subjects import Subject, add_options, subjects
from convsplit import Budget
from convsplit.choose.plan import Plan
from convsplit.data.batches import Checked, checked_batches, hold_out
from convsplit.report.found import Found
from convsplit.report.quality import HeldOut, Quality
from convsplit.tables import Table, percent, share

HELD_OUT = 1 / 3
MOST = 5  # conversions of a sweep in one direction


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--target", default="agreement=0.98")
    parser.add_argument("--inputs", type=int, default=768)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sweep", type=float)


QUICK = {"inputs": 384}
SMALLER = Kind("lower", absolute=5.0)  # per cent of the parameters: one held-out input more or less moves the search


def measure(args: Namespace) -> Iterator[Sheet]:
    kind, value = args.target.split("=")
    budget = Budget.of_kind(kind, float(value))
    rows, trials, swept = [], [], []
    for subject in subjects(args, photos=args.inputs):
        for seed in args.seeds:
            case = Case(subject, budget, subject.calibration(args.inputs, seed), seed)
            began = time.process_time()
            found = case.search()
            seconds = time.process_time() - began
            name = [subject.name, str(seed)]
            rows.append([*name, *case.told(found), f"{seconds:.0f}", f"{seconds / case.once(found):.1f}"])
            trials += [[*name, *tried] for tried in trials_of(found)]
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            if args.sweep:
                swept += [[*name, *each.cells(found, case)] for each in case.sweep(found, args.sweep)]
    keys, text = ["network", "seed"], frozenset({"network"})
    headings = [*keys, "parameters kept", "held out", "test images", "interval", "conversions", "CPU s",
                "times one conversion"]  # fmt: skip
    kinds = {"parameters kept": SMALLER, "test images": POINTS, "conversions": Kind("lower", absolute=1.0)}
    yield Sheet(
        "quality",
        Table(headings, rows, text),
        keys,
        kinds,
        f"{args.target}, {args.inputs} inputs or all there are, a third held out",
    )
    headings = [*keys, "fraction", "predicted drift", "measured, repaired", "their ratio", "lost"]
    yield Sheet("trials", Table(headings, trials, text), [*keys, "fraction"])
    if args.sweep:
        headings = [*keys, "fraction", "parameters kept", "of those found", "held out", "test images", "interval"]
        yield Sheet("sweep", Table(headings, swept, text), [*keys, "fraction"])


@dataclass(frozen=True)
class Swept:
    """One conversion of a sweep: its plan, and what it loses of the held-out inputs and of the test images."""

    plan: Plan
    held: Quality
    test: Quality

    def cells(self, found: Found, case: Case) -> list[str]:
        assert self.plan.budget
        kept = kept_of(self.plan)
        return [
            f"{self.plan.budget.fraction:.3f}", percent(kept), percent(kept / kept_of(found.plan)),
            case.shown(self.held.loss), case.shown(self.test.loss), case.interval(self.test),
        ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, a target for it, and the unlabelled inputs that a search may use."""

    subject: Subject
    budget: Budget
    data: list[Tensor]
    seed: int

    @cached_property
    def sides(self) -> tuple[Checked, Checked]:
        """What is for choice and repair, and what is held out."""
        return hold_out(checked_batches(self.data), HELD_OUT)

    @cached_property
    def known(self) -> convsplit.Study[nn.Module]:
        return convsplit.study(self.subject.model, calibration=self.sides[0], seed=self.seed)

    def search(self) -> Found:
        study = convsplit.study(self.subject.model, calibration=self.data, seed=self.seed)
        return study.search(self.budget, held_out=HELD_OUT)

    def once(self, found: Found) -> float:
        """Seconds of one calibrated conversion, at the fraction that was found."""
        began = time.process_time()
        convsplit.convert(self.subject.model, calibration=self.sides[0], budget=found.plan.budget, seed=self.seed)
        return time.process_time() - began

    def told(self, found: Found) -> list[str]:
        test = self.on_test_images(found.model)
        kept, held = percent(kept_of(found.plan)), self.shown(found.chosen.quality.loss)
        return [kept, held, self.shown(test.loss), self.interval(test), str(len(found.trials))]

    def on_test_images(self, converted: nn.Module) -> Quality:
        return self._meter(list(self.subject.images.split(100))).measure(converted)

    def sweep(self, found: Found, step: float) -> list[Swept]:
        """Conversions around the found one, in steps of that size of its fraction; the least first."""
        on_held = self._meter(self.sides[1])

        def at(fraction: float) -> Swept:
            plan = self.known.plan(Budget.of_kind(self.budget.minimise, fraction))
            converted = self.known.apply(plan)
            swept = Swept(plan, on_held.measure(converted), self.on_test_images(converted))
            print(" | ".join(swept.cells(found, self)), file=sys.stderr, flush=True)
            return swept

        def lost(swept: Swept) -> bool:
            return swept.test.loss > on_held.limit

        def kept(swept: Swept) -> bool:
            return swept.test.loss <= on_held.limit

        fraction = found.chosen.budget.fraction
        below = until_two(lost, at, [fraction * (1 - step) ** k for k in range(MOST)])
        above = until_two(kept, at, [fraction * (1 + step) ** k for k in range(1, MOST)])
        return [*reversed(below), *above]

    def shown(self, loss: float | None) -> str:
        return percent(loss) if self.budget.kind == "agreement" else share(loss)

    def interval(self, quality: Quality) -> str:
        return f"{self.shown(quality.low)} to {self.shown(quality.high)}"

    def _meter(self, batches: list[Tensor]) -> HeldOut:
        return HeldOut(self.subject.model, batches, None, self.budget)


def until_two(stop: Callable[[Swept], bool], at: Callable[[float], Swept], fractions: list[float]) -> list[Swept]:
    """What is measured at those fractions, up to the second in a row that says to stop."""
    swept: list[Swept] = []
    for fraction in fractions:
        swept.append(at(fraction))
        if len(swept) > 1 and all(map(stop, swept[-2:])):
            break
    return swept


def kept_of(plan: Plan) -> float:
    """The parameters of the convolutions that can be split, after and before."""
    totals = plan.totals()
    return (totals["params_after"] or 0) / (totals["params_before"] or 1)


def trials_of(found: Found) -> Iterator[list[str]]:
    """A row for each conversion of a search."""
    shown = percent if found.budget.kind == "agreement" else share
    for trial in found.trials:
        drift = trial.quality.drift
        yield [
            f"{trial.budget.fraction:.3f}", share(trial.predicted), share(drift), f"{drift / trial.predicted:.2f}",
            shown(trial.quality.loss),
        ]  # fmt: skip
