"""What the library says while it works: a warning, and a progress bar that is quiet where nobody looks at it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


class ConversionWarning(UserWarning):
    """The conversion did less than was probably meant."""


def track(
    items: Iterable[T], description: str, *, total: int | None = None, progress: bool | None = None
) -> Iterator[T]:
    """Iterate and show how far along it is, on stderr; `progress=None` shows it only on a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    if not shown:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    yield from rich_track(items, description, total=total, console=Console(stderr=True), transient=True)
