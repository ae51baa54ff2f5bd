"""Layers side by side, each on a thread of its own: a single layer would not keep all cores busy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from convsplit.progress import track

MOST_WORKERS = 8
MOST_WEIGHTS = 2**25  # of all layers under way; a fit's arrays take some thirty times as much memory

T = TypeVar("T")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[T], Result],
    items: Sequence[T],
    description: str,
    *,
    size: Callable[[T], float],
    progress: bool | None = None,
) -> list[Result]:
    """`[function(item) for item in items]` on as many threads as torch may use, the largest items first.

    Most of a factorisation runs outside Python's lock, and eigenvalue problems and small products gain little from a
    second thread. `size` is in weights: very large layers are worked on one after the other, which bounds the memory.
    The first error, or Ctrl-C, ends it as soon as the items under way are done.

    >>> in_parallel(lambda number: number**2, [1, 3, 2], "Squaring", size=float)
    [1, 9, 4]
    """
    threads = torch.get_num_threads()
    affordable = int(MOST_WEIGHTS / max(map(size, items), default=1.0))
    workers = min(threads, MOST_WORKERS, len(items), affordable)
    if workers < 2:
        return [function(item) for item in track(items, description, progress=progress)]
    grad = torch.is_grad_enabled()  # each thread has its own

    def run(item: T) -> Result:
        with torch.set_grad_enabled(grad):
            return function(item)

    order = sorted(range(len(items)), key=lambda index: -size(items[index]))
    with _threads_each(threads // workers), ThreadPoolExecutor(workers) as pool:
        futures = {index: pool.submit(run, items[index]) for index in order}
        try:
            found = {index: futures[index].result() for index in track(order, description, progress=progress)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[index] for index in range(len(items))]


@contextmanager
def _threads_each(count: int) -> Iterator[None]:
    """Threads that begin in here run torch's operations on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
