"""Seconds of one call, an end to those that take too many, and other work for a core."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stops what takes longer, in seconds of the processors; on systems without such an alarm nothing is stopped.

    Raises:
        TimeoutError: in what runs, between two operations.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} s of the processor")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def another_process() -> Iterator[None]:
    """A process that multiplies matrices on one thread, while inside."""
    code = "import torch; torch.set_num_threads(1); a = torch.randn(1000, 1000)\nwhile True: a @ a"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()
