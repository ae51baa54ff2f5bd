"""As small as a quality allows: is the target held on inputs that nobody has seen, and how near is it to the best?

    python -m benchmarks quality NETWORKS.py [--depths 20 56] [--target agreement=0.98] [--inputs 768] [--sweep 0.02]

NETWORKS.py is as in benchmarks/subjects.py, without it the digits. Two thirds of the inputs, from the training images
and unlabelled, are for choice and repair, a third is held out. One row per network and seed: what was found, the
figure on the test images, the conversions and the seconds beside those of one calibrated conversion and, with
--sweep, the least fraction of parameters with which a sweep of conversions in steps of that size, measured on the
same held-out inputs, meets it too. Then every conversion's predicted drift beside the measured one.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import torch

import convsplit
from benchmarks.results import POINTS, Kind, Sheet
from benchmarks.subjects import add_options, digits, load_networks
from convsplit import Budget
from convsplit.report.quality import HeldOut, wilson
from convsplit.tables import Table, percent, share


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--target", default="agreement=0.98")
    parser.add_argument("--inputs", type=int, default=768)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sweep", type=float)


QUICK = {"inputs": 384}


def measure(args: Namespace) -> Iterator[Sheet]:
    kind, value = args.target.split("=")
    networks = load_networks(args.networks) if args.networks else the_digits()
    rows, trials = [], []
    for depth in args.depths if args.networks else [14]:
        for seed in args.seeds:
            row, tried = measured(networks, depth, Budget.of_kind(kind, float(value)), args.inputs, seed, args.sweep)
            name = f"ResNet-{depth}" if args.networks else "digits"
            rows.append([name, str(seed), *row])
            trials += [[name, str(seed), *each] for each in tried]
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    headings = [
        "network", "seed", "parameters kept", "held out", "on the test images", "their interval", "conversions",
        "seconds", "times one conversion", "best of a sweep",
    ]  # fmt: skip
    kinds = {"parameters kept": SMALLER, "on the test images": POINTS, "conversions": Kind("lower", absolute=1.0)}
    notes = f"{args.target}, {args.inputs} inputs, a third held out"
    yield Sheet("quality", Table(headings, rows, frozenset({"network"})), ["network", "seed"], kinds, notes)
    headings = ["network", "seed", "fraction", "predicted drift", "measured, repaired", "their ratio", "lost"]
    yield Sheet("trials", Table(headings, trials, frozenset({"network"})), ["network", "seed", "fraction"])


SMALLER = Kind("lower", absolute=5.0)  # per cent of the parameters: one held-out input more or less moves the search


def the_digits() -> SimpleNamespace:
    """The network of the digits, 14 convolutions deep, and its images, as a file of networks has them."""
    subject = digits()
    data = (subject.unlabelled, None, subject.images, subject.labels)
    return SimpleNamespace(resnet=lambda depth: subject.model, cifar10=lambda: data)


def measured(
    networks: ModuleType | SimpleNamespace, depth: int, budget: Budget, inputs: int, seed: int, sweep: float | None
) -> tuple[list[str], list[list[str]]]:
    """The row of one search, and one for each of its conversions."""
    model = networks.resnet(depth)
    train_x, _, test_x, _ = networks.cifar10()
    chosen = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))[:inputs]
    data = list(train_x[chosen].split(64))
    began = time.process_time()
    found = convsplit.study(model, calibration=data, seed=seed).search(budget)
    seconds = time.process_time() - began
    began = time.process_time()
    convsplit.convert(model, calibration=data[: len(data) * 2 // 3], budget=found.plan.budget, seed=seed)
    once = time.process_time() - began
    loss = HeldOut(model, list(test_x.split(200)), None, budget).measure(found.model).loss
    shown = percent if budget.kind == "agreement" else share
    low, high = wilson(round(loss * len(test_x)), len(test_x)) if budget.kind == "agreement" else (None, None)
    kept = found.plan.totals()
    row = [
        percent((kept["params_after"] or 0) / (kept["params_before"] or 1)), shown(found.chosen.quality.loss),
        shown(loss), f"{shown(low)} to {shown(high)}", str(len(found.trials)), f"{seconds:.0f}",
        f"{seconds / once:.1f}", "-" if sweep is None else percent(best_of_a_sweep(model, data, budget, seed, sweep)),
    ]  # fmt: skip
    tried = [
        [
            f"{trial.budget.fraction:.3f}", share(trial.predicted), share(trial.quality.drift),
            f"{trial.quality.drift / trial.predicted:.2f}", shown(trial.quality.loss),
        ]
        for trial in found.trials
    ]  # fmt: skip
    return row, tried


def best_of_a_sweep(
    model: torch.nn.Module, data: list[torch.Tensor], budget: Budget, seed: int, step: float
) -> float | None:
    """The least fraction of parameters that meets the target on the same held-out inputs, from the top down."""
    known, held = convsplit.study(model, calibration=data, seed=seed)._holding_out(budget, 1 / 3)
    meter, best, fraction = HeldOut(model, held, None, budget), None, 0.9
    misses = 0
    while misses < 3 and fraction > step:
        met = meter.measure(known.convert(Budget(params=fraction))).loss <= meter.limit
        best, misses = (fraction, 0) if met else (best, misses + 1)
        fraction -= step
    return best
