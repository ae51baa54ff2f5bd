"""What the library says while it works: a warning, and a progress bar that is quiet where nobody looks at it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

T = TypeVar("T")

_NOT_THE_USERS = (str(Path(__file__).parent), contextlib.__file__)  # decorators that guard run inside of contextlib


class ConversionWarning(UserWarning):
    """The conversion did less than was probably meant."""


def warn(text: str) -> None:
    """Give a `ConversionWarning` that points at the user's line: the innermost that is not convsplit's own."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, ConversionWarning, stacklevel=level)


def track(
    items: Iterable[T],
    description: str,
    *,
    total: float | None = None,
    cost: Callable[[T], float] | None = None,
    progress: bool | None = None,
) -> Iterator[T]:
    """Iterate and show how far along it is, on stderr; `progress=None` shows it only on a terminal.

    `cost` of an item, in the unit of `total`: how much of the way it is, and so of the time left; by default all are
    equal.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    if not shown:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items) if cost is None else sum(map(cost, items))
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        for item in items:
            yield item
            bar.advance(task, 1.0 if cost is None else cost(item))
