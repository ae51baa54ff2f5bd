"""Seconds of one call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """What a call gave, the seconds on the wall and those of all processors, which other processes add less to."""

    result: T
    seconds: float
    cpu: float


def timed(run: Callable[[], T]) -> Timed[T]:
    start, busy = time.perf_counter(), time.process_time()
    result = run()
    return Timed(result, time.perf_counter() - start, time.process_time() - busy)
