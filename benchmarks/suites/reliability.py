"""Under load: random networks, a soak, and faults injected at any call; what tests/reliability checks, many more times.

    python -m benchmarks reliability
    python -m benchmarks reliability --networks 50 --soak 20 --faults 10

Everything runs on one thread of torch, so that the same calls are counted every time.
"""

from __future__ import annotations

import sys
import time
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.results import Kind, Sheet
from benchmarks.subjects import ROOT
from convsplit.tables import Table

sys.path.insert(0, str(ROOT / "tests" / "reliability"))

import faults
import networks
import soak

RIGHT = Kind("higher")


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--networks", type=int, default=1000)
    parser.add_argument("--soak", type=int, default=200, help="conversions")
    parser.add_argument("--faults", type=int, default=200, help="places in each function, and in what it writes")


QUICK = {"networks": 25, "soak": 15, "faults": 3}


def measure(asked: Namespace) -> Iterator[Sheet]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    yield _networks(asked.networks)
    yield _soak(asked.soak)
    yield _faults(asked.faults)


class Tally:
    """How many cases went right, and what went wrong in the others."""

    def __init__(self) -> None:
        self.right, self.wrong, self.first = 0, Counter[str](), {}

    def of(self, what: str, work: Callable[[], Any]) -> Any:
        """Run one case; None where it failed."""
        try:
            result = work()
        except Exception as error:
            kind = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:120]}"
            self.wrong[kind] += 1
            if kind not in self.first:
                self.first[kind] = what
                traceback.print_exc()
            return None
        self.right += 1
        return result

    def __str__(self) -> str:
        wrong = [f"{count} wrong, first {self.first[kind]}: {kind}" for kind, count in self.wrong.items()]
        return "; ".join([f"{self.right} right", *wrong])


def _networks(count: int) -> Sheet:
    tally, dtypes, split, start = Tally(), Counter[str](), 0, time.perf_counter()
    for index, case in zip(range(count), soak.runnable(), strict=False):
        found = tally.of(f"network {index}", lambda: networks.check(case))  # noqa: B023 - called at once
        dtypes[str(case.dtype).removeprefix("torch.")] += 1
        split += found or 0
    seconds = time.perf_counter() - start
    notes = (
        f"{count} networks with {split} split layers, {seconds:.0f} s: **{tally}**. For each: an exact conversion "
        "answers as the original, the same after merging; what is saved and loaded has equal tensors and answers bit "
        "by bit; the plan goes to JSON and back; the original is untouched (tensors, gradients, attributes, modes, "
        "hooks), and so is the random state."
    )
    names = {str(dtype).removeprefix("torch."): allowed for dtype, allowed in networks.TOLERANCES.items()}
    rows = [[name, str(dtypes[name]), f"{allowed:g}", ""] for name, allowed in names.items()]
    rows.append(["all", str(count), "", str(tally.right)])
    table = Table(["coarsest dtype", "networks", "relative error allowed", "right"], rows)
    return Sheet("random networks", table, ["coarsest dtype"], {"right": RIGHT}, notes)


def _soak(count: int) -> Sheet:
    tally, start = Tally(), time.perf_counter()
    early, late = soak.soak(count)
    seconds = time.perf_counter() - start
    tally.of("all", lambda: soak.check(early, late))
    grown = "nothing grew" if tally.right else str(tally)
    notes = (
        f"{count} conversions of different networks in one process, every other one repaired, each saved, loaded and "
        f"merged, {seconds:.0f} s: **{grown}**. Allowed: {soak.MEGABYTES:g} MB and "
        f"{soak.OBJECTS:.0%} of the objects more than after the first {soak.WARM}, no thread and no file."
    )
    rows = [
        [when, f"{held.megabytes:.0f}", str(held.objects), str(held.threads), str(held.files), str(right)]
        for when, held, right in (("warm", early, ""), ("at the end", late, tally.right))
    ]
    table = Table(["conversions", "MB", "Python objects", "threads", "open files", "right"], rows)
    return Sheet("soak", table, ["conversions"], {"right": RIGHT}, notes)


def _faults(count: int) -> Sheet:
    bench, rows, tried = faults.Bench(), [], 0
    for step in faults.STEPS:
        tally, start, came = Tally(), time.perf_counter(), 0
        places = faults.positions(bench, step, count)
        for at in places:
            came += bool(tally.of(f"at call {at}", lambda: getattr(bench, step)(faults.Counter(at))))  # noqa: B023
        tried += len(places)
        seconds = time.perf_counter() - start
        figures = [str(places[-1]), str(len(places)), str(came), str(tally.right)]
        rows.append([step, *figures, str(tally), f"{seconds:.0f}"])
    notes = (
        f"{tried} faults, in turns an error of torch and an interruption, from calls of torch spread evenly over each "
        "function and over what it writes (for `save` calls of the operating system too). After each: the original and "
        "torch's settings as before, no thread left; every layer repaired whole or not at all; a distilled model with "
        "its flags and modes, no farther from its teacher than before; the old file or the new one, whole, and no "
        "other. Where a fault does not come out, the library went on another way, or only had to put things back."
    )
    headings = ["function", "calls of torch", "places tried", "came out", "right", "result", "s"]
    table = Table(headings, rows, frozenset({"function", "result"}))
    return Sheet("faults", table, ["function"], {"right": RIGHT}, notes)
