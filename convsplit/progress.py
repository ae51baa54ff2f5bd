"""One progress bar for everything that takes long: quiet by default where nobody looks at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, progress: bool | None = None) -> Iterator[T]:
    """Iterate and show how far along it is, on stderr; `progress=None` shows it only on a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    if not shown:
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    yield from rich_track(items, description, total=total, console=Console(stderr=True), transient=True)
