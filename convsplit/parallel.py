"""Layers, or batches, side by side, each on a thread of its own: a single one would not keep all cores busy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice, pairwise
from typing import TypeVar

import torch

from convsplit.progress import track

MOST_WORKERS = 8
MOST_WEIGHTS = 2**25  # of all layers under way; a fit's arrays take some thirty times as much memory
LEAST_NUMBERS = 2**20  # of all batches: below, starting threads takes as long as what they do
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
    workers = min(_workers(max(map(size, items), default=1.0)), len(items))
    if workers < 2:
        return [function(item) for item in track(items, description, cost=cost, progress=progress)]
    run = _as_here(function)
    order = sorted(range(len(items)), key=lambda index: -size(items[index]))
    with _pool(workers) as pool:
        futures = {index: pool.submit(run, items[index]) for index in order}
        try:
            shown = track(order, description, cost=lambda index: cost(items[index]), progress=progress)
            found = {index: futures[index].result() for index in shown}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[index] for index in range(len(items))]


def side_by_side(
    function: Callable[[T], Result],
    items: Iterable[T],
    *,
    read: float,
    made: float,
    device: torch.device | None = None,
) -> Iterator[Result]:
    """`map(function, items)` for what takes milliseconds, an item on each thread that torch may use.

    Operations on one batch leave threads waiting for one another between them; batches on threads of their own do not.
    `read` is how many numbers all items hold, `made` how many a result. At most as many results as threads wait to be
    taken. One after the other where little is read, and on a `device` that is not the CPU: its queue keeps that busy,
    and other threads would use another one.

    >>> list(side_by_side(lambda number: number**2, [1, 3, 2], read=1, made=1))
    [1, 9, 4]
    """
    rest = iter(items)
    worthwhile = read >= LEAST_NUMBERS and (device is None or device.type == "cpu")
    first = list(islice(rest, _workers(made) if worthwhile else 1))
    if len(first) < 2:
        yield from map(function, chain(first, rest))
        return
    run = _as_here(function)
    with _pool(len(first)) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(run, item) for item in first)
        try:
            while waiting:
                found = waiting.popleft().result()
                waiting.extend(pool.submit(run, item) for item in islice(rest, 1))
                yield found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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


def _workers(size: float) -> int:
    """Threads for items of so many weights each."""
    return min(torch.get_num_threads(), MOST_WORKERS, max(int(MOST_WEIGHTS / max(size, 1.0)), 1))


def _as_here(function: Callable[[T], Result]) -> Callable[[T], Result]:
    """The function with the gradient mode of this thread: each has its own."""
    grad = torch.is_grad_enabled()

    def run(item: T) -> Result:
        with torch.set_grad_enabled(grad):
            return function(item)

    return run


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that share those of torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(before // workers)  # threads that begin from here on take it over
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
