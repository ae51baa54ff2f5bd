"""Predicted against measured drift: can a search trust what is predicted of a plan, before repair and after it?

    python -m benchmarks predictions [NETWORKS.py ...] [--depths 20 56] [--kept 0.7 0.5 0.35 0.25] [--images 512]

NETWORKS.py as in benchmarks/subjects.py. One row per network and fraction of the parameters: the drift that the errors
of the plan's layers come to, that measured on test images with factors fitted to the data but not repaired, and that of
the repaired conversion. Then the rank correlation (Spearman) of what is predicted with what is measured, of each
network and of all together, and the smallest and largest ratio of the two: one conversion tells a search its ratio.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence

import torch

import convsplit
from benchmarks.results import DRIFT, SCORE, Sheet
from benchmarks.subjects import add_options, subjects
from convsplit import Budget
from convsplit.report.quality import HeldOut
from convsplit.tables import Table, share

Drifts = tuple[float, float, float]  # predicted, before repair, after it


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument("--images", type=int, default=512, help="for choice and repair")


QUICK = {"kept": [0.6, 0.3], "images": 256}


def measure(args: Namespace) -> Iterator[Sheet]:
    rows: list[list[str]] = []
    found: dict[str, list[Drifts]] = {}
    for subject in subjects(args):
        known = convsplit.study(subject.model, calibration=subject.calibration(args.images, seed=0))
        meter = HeldOut(subject.model, subject.images[:500].split(50), None, Budget(drift=0.1))
        for kept in args.kept:
            drifts = measured(known, meter, kept)
            found.setdefault(subject.name, []).append(drifts)
            rows.append([subject.name, f"{kept:g}", *map(share, drifts)])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    headings = ["network", "kept", "predicted", "before repair", "repaired"]
    kinds = dict.fromkeys(headings[2:], DRIFT)
    yield Sheet("drift", Table(headings, rows, frozenset({"network"})), ["network", "kept"], kinds)
    everything = {**found, "all": [each for drifts in found.values() for each in drifts]}
    rows = [[name, *told(drifts, 1), *told(drifts, 2)] for name, drifts in everything.items()]
    headings = ["network", "rank correlation", "ratio", "rank correlation, repaired", "ratio, repaired"]
    kinds = {heading: SCORE for heading in headings if heading.startswith("rank")}
    yield Sheet("trust", Table(headings, rows, frozenset({"network"})), ["network"], kinds)


def measured(known: convsplit.Study, meter: HeldOut, kept: float) -> Drifts:
    """The drifts of a plan: predicted, before repair and after it."""
    plan = known.plan(Budget(params=kept))
    converted = known._rewritten(plan)
    before = meter.measure(converted).drift
    return known.predicted_drift(plan), before, meter.measure(known._repaired(converted, plan)).drift


def told(drifts: Sequence[Drifts], which: int) -> list[str]:
    """The rank correlation of predicted with measured drift, and the span of their ratio."""
    predicted, other = [each[0] for each in drifts], [each[which] for each in drifts]
    ratios = [after / before for before, after in zip(predicted, other, strict=True)]
    return [f"{spearman(predicted, other):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of ranks, of values no two of which are equal."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
