"""Two results of one suite: does the new one lose anything beyond noise?

    python -m benchmarks regress OLD.json NEW.json

Figures whose kind is known are compared (benchmarks/results.py has the kinds and what is noise for each): errors,
accuracy and counts, which are deterministic, and ratios of times that were measured side by side. Milliseconds and
seconds are not: they belong to a machine. A figure that vanished, or is no number any more, is a loss. Exit status 1
where there is one.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.results import Kind, Result, number


def main(words: list[str]) -> int:
    parser = ArgumentParser(
        "python -m benchmarks regress", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args(words)
    old, new = Result.read(given.old), Result.read(given.new)
    found = list(losses(old, new))
    compared = sum(kind is not None for _, kind in old.figures().values())
    print("\n".join([*found, f"{old.suite}: {compared} figures compared, {len(found)} lost"]))
    return 1 if found else 0


def losses(old: Result, new: Result) -> Iterator[str]:
    """What got worse, in words.

    Raises:
        ValueError: results of two suites, or of one that has no figures to compare.
    """
    if old.suite != new.suite:
        raise ValueError(f"{old.suite} and {new.suite} are different suites: nothing to compare")
    known = {name: (cell, kind) for name, (cell, kind) in old.figures().items() if kind is not None}
    if not known:
        raise ValueError(f"{old.suite}: no figure has a kind, so nothing can be compared")
    after = new.figures()
    for name, (cell, kind) in known.items():
        now = after[name][0] if name in after else "missing"
        if is_worse(cell, now, kind):
            yield f"{name}: {cell} -> {now} ({kind.better} is better)"


def is_worse(before: str, after: str, kind: Kind) -> bool:
    """Beyond what is noise for figures of this kind."""
    old, new = number(before), number(after)
    if old is None:
        return False
    if new is None or not math.isfinite(new):
        return True
    change = new - old if kind.better == "lower" else old - new
    return change > kind.absolute + kind.relative * abs(old)
