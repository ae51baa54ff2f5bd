"""Layers side by side, each on a thread of its own: a single layer would not keep all cores busy."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import torch

from convsplit.progress import track

MOST_WORKERS = 8
MOST_WEIGHTS = 2**25  # of all layers under way; a fit's arrays take some thirty times as much memory
BATCH_WEIGHTS = 2**16  # of alike layers that are worked on together: above, calls cost less than what they compute

T = TypeVar("T")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[T], Result],
    items: Sequence[T],
    description: str,
    *,
    size: Callable[[T], float],
    cost: Callable[[T], float] | None = None,
    progress: bool | None = None,
) -> list[Result]:
    """`[function(item) for item in items]` on as many threads as torch may use, the largest items first.

    Most of a factorisation runs outside Python's lock, and eigenvalue problems and small products gain little from a
    second thread. `size` is in weights: very large layers are worked on one after the other, which bounds the memory.
    `cost` is about how long an item takes, in any unit, for the progress bar; by default the size.
    The first error, or Ctrl-C, ends it as soon as the items under way are done.

    >>> in_parallel(lambda number: number**2, [1, 3, 2], "Squaring", size=float)
    [1, 9, 4]
    """
    cost = cost or size
    threads = torch.get_num_threads()
    affordable = int(MOST_WEIGHTS / max(map(size, items), default=1.0))
    workers = min(threads, MOST_WORKERS, len(items), affordable)
    if workers < 2:
        return [function(item) for item in track(items, description, cost=cost, progress=progress)]
    grad = torch.is_grad_enabled()  # each thread has its own

    def run(item: T) -> Result:
        with torch.set_grad_enabled(grad):
            return function(item)

    order = sorted(range(len(items)), key=lambda index: -size(items[index]))
    with _threads_each(threads // workers), ThreadPoolExecutor(workers) as pool:
        futures = {index: pool.submit(run, items[index]) for index in order}
        try:
            shown = track(order, description, cost=lambda index: cost(items[index]), progress=progress)
            found = {index: futures[index].result() for index in shown}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[index] for index in range(len(items))]


def in_batches(
    function: Callable[[list[T]], list[Result]],
    items: Sequence[T],
    description: str,
    *,
    alike: Callable[[T], Hashable],
    size: Callable[[T], float],
    cost: Callable[[T], float] | None = None,
    progress: bool | None = None,
) -> list[Result]:
    """`function(items)`, computed in batches of items of equal `alike`, as many at once as `in_parallel` allows.

    Which items go together does not depend on the number of threads.

    >>> in_batches(lambda all: [sum(all)] * len(all), [1, 2, 3], "Adding", alike=lambda n: n % 2, size=float)
    [4, 2, 4]
    """
    kinds: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        kinds.setdefault(alike(item), []).append(index)
    batches = [batch for kind in kinds.values() for batch in _cut(kind, [size(items[index]) for index in kind])]

    def run(batch: list[int]) -> list[Result]:
        return function([items[index] for index in batch])

    def total(of: Callable[[T], float]) -> Callable[[list[int]], float]:
        return lambda batch: sum(of(items[index]) for index in batch)

    results = in_parallel(run, batches, description, size=total(size), cost=total(cost or size), progress=progress)
    found = {
        index: each for batch, result in zip(batches, results, strict=True)
        for index, each in zip(batch, result, strict=True)
    }  # fmt: skip
    return [found[index] for index in range(len(items))]


def _cut(indices: list[int], sizes: list[float]) -> list[list[int]]:
    """Runs of indices with about equally many each, of at most BATCH_WEIGHTS in all unless a single one has more."""
    count = min(math.ceil(sum(sizes) / BATCH_WEIGHTS), len(indices)) or 1
    bounds = [round(k * len(indices) / count) for k in range(count + 1)]
    return [indices[first:last] for first, last in pairwise(bounds)]


@contextmanager
def _threads_each(count: int) -> Iterator[None]:
    """Threads that begin in here run torch's operations on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
