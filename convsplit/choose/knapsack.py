"""The multiple-choice knapsack problem: one item of every class, within a capacity, at the least total loss.

Branch and bound over the linear relaxation (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations
Research 27, 1979). In the relaxation each class goes down its lower convex hull of loss over cost, the steepest step of
all classes first, until the capacity is used up; at most one class ends between two items. Branching keeps that class
at or below the cheaper of them, or above it. The relaxation of many classes is tight, so few nodes are opened.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

GAP = 1e-6  # of the loss, within which a choice counts as the best
MOST_NODES = 5_000  # counted, not timed: the same call gives the same result on every machine
ROUNDING = 1e-12  # of the capacity: what sums of costs may be off by

Array: TypeAlias = NDArray[np.float64]


def best_choice(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], capacity: float) -> list[int]:
    """The index of the item to take of every class; the items of a class in rising cost and falling loss.

    Exact to a millionth of the loss, unless that takes more than 5,000 nodes: then the best that was found.

    Raises:
        ValueError: the cheapest items exceed the capacity.

    >>> best_choice([[1, 4, 9], [1, 2]], [[5, 2, 0], [3, 0]], capacity=6)
    [1, 1]
    """
    if not costs:
        return []
    problem = _Problem(
        [np.array(each, float) for each in costs], [np.array(each, float) for each in losses], capacity
    )
    root = problem.relaxed([0] * len(costs), [len(each) - 1 for each in costs])
    if root is None:
        raise ValueError("the cheapest items exceed the capacity")
    best, order = root, count()
    nodes = [(root.bound, next(order), root)]
    while nodes and next(order) < MOST_NODES:
        bound, _, node = heapq.heappop(nodes)
        if bound >= best.loss * (1 - GAP):
            break
        for low, high in node.branches():
            child = problem.relaxed(low, high)
            if child is None:
                continue
            best = min(best, child, key=lambda each: each.loss)
            if child.bound < best.loss * (1 - GAP):
                heapq.heappush(nodes, (child.bound, next(order), child))
    return best.choice


@dataclass(frozen=True)
class _Node:
    """The relaxation over the items low..high of every class, and a choice that fits."""

    low: list[int]
    high: list[int]
    bound: float
    choice: list[int]
    loss: float
    broken: tuple[int, int] | None  # the class that ends between two items, and the cheaper of them

    def branches(self) -> list[tuple[list[int], list[int]]]:
        """The items at or below the break, and those above it."""
        if self.broken is None:
            return []
        index, item = self.broken
        below, above = list(self.high), list(self.low)
        below[index], above[index] = item, item + 1
        return [(self.low, below), (above, self.high)]


@dataclass
class _Problem:
    costs: list[Array]
    losses: list[Array]
    capacity: float
    _steps: dict[tuple[int, int, int], Array] = field(default_factory=dict)

    def relaxed(self, low: list[int], high: list[int]) -> _Node | None:
        """Solve the relaxation; None where even the cheapest items do not fit."""
        left = self.capacity * (1 + ROUNDING) - sum(float(c[item]) for c, item in zip(self.costs, low, strict=True))
        if left < 0:
            return None
        loss = sum(float(each[item]) for each, item in zip(self.losses, low, strict=True))
        steps = np.concatenate([self.steps(*where) for where in zip(range(len(low)), low, high, strict=True)])
        steps = steps[np.argsort(-steps[:, 1] / steps[:, 0], kind="stable")]
        used = np.cumsum(steps[:, 0])
        fit = int(np.searchsorted(used, left, side="right"))
        choice = list(low)
        for index, item in steps[:fit, 2:].astype(int).tolist():
            choice[index] = item
        loss -= float(steps[:fit, 1].sum())
        if fit == len(steps):
            return _Node(low, high, loss, choice, loss, None)
        left -= float(used[fit - 1]) if fit else 0.0
        cost, gain, index, _ = steps[fit].tolist()
        broken, bound = (int(index), choice[int(index)]), loss - gain * left / cost
        blocked = set()
        for cost, gain, index, item in steps[fit:].tolist():  # what still fits betters the choice, not the bound
            if index in blocked or cost > left:
                blocked.add(index)
                continue
            choice[int(index)] = int(item)
            left, loss = left - cost, loss - gain
        return _Node(low, high, bound, choice, loss, broken)

    def steps(self, index: int, low: int, high: int) -> Array:
        """Along the lower convex hull of a class's items low..high: rows of cost, gain, class and the item reached."""
        key = (index, low, high)
        if key not in self._steps:
            cost, loss = self.costs[index], self.losses[index]
            hull = [low]
            for item in range(low + 1, high + 1):
                while len(hull) > 1 and _above(cost, loss, hull[-2], hull[-1], item):
                    hull.pop()
                hull.append(item)
            rows = [(cost[b] - cost[a], loss[a] - loss[b], index, b) for a, b in pairwise(hull)]
            self._steps[key] = np.array(rows, float).reshape(-1, 4)
        return self._steps[key]


def _above(cost: Array, loss: Array, a: int, b: int, c: int) -> bool:
    """Whether item b lies on or above the line from a to c."""
    return bool((loss[a] - loss[b]) * (cost[c] - cost[a]) <= (loss[a] - loss[c]) * (cost[b] - cost[a]))
