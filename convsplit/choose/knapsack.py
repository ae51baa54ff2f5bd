"""The multiple-choice knapsack problem: one item of every class, within a capacity, at the least total loss.

The linear relaxation comes first (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27,
1979): each class goes down its lower convex hull of loss over cost, the steepest step of all classes first, until the
capacity is used up. The slope at which that ends is a price for capacity, and with it every choice has

    loss = bound + sum of the regrets of its items + price * what it leaves of the capacity

where `bound` is the relaxation's loss, and an item's regret is its loss + price * cost, less the least of its class.
All the terms are at least 0, so a choice that is `limit` above the bound has no item with a larger regret, and there
are few such items: they are the core (Pisinger, "A minimal algorithm for the multiple-choice knapsack problem",
European Journal of Operational Research 83, 1995). All choices within the limit are listed by dynamic programming,
class by class; of those that agree so far in cost or loss only the better goes on, which makes classes that are all
alike no harder than others. The limit starts at what is asked for and grows until a choice is found within it: then
none is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

GAP = 1e-6  # of the loss, within which a choice counts as the best
MOST_STATES = 2**12  # side by side; counted, not timed: the same call gives the same result on every machine
ROUNDING = 1e-12  # of the capacity: what sums of costs may be off by
FIRST_LIMIT = 2.0**-20  # of what the greedy choice is above the bound, where that is more than was asked for

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
_Changes: TypeAlias = tuple[int, Indices, Array, Array]  # a class, other items of it, their costs and regrets


class Choice(NamedTuple):
    """The item taken of every class. No choice has a loss smaller than this one's by more than `gap` of it."""

    items: list[int]
    gap: float


def best_choice(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], capacity: float) -> Choice:
    """The item to take of every class; the items of a class in rising cost and falling loss.

    The best to a millionth of the loss, unless that takes more than 4,096 states side by side: then a good one.

    Raises:
        ValueError: the cheapest items exceed the capacity.

    >>> best_choice([[1, 4, 9], [1, 2]], [[5, 2, 0], [3, 0]], capacity=6).items
    [1, 1]
    """
    if not costs:
        return Choice([], 0.0)
    classes = [(np.array(c, float), np.array(v, float)) for c, v in zip(costs, losses, strict=True)]
    room = _room(classes, capacity)
    if room < 0:
        raise ValueError("the cheapest items exceed the capacity")
    relaxed = _relax(classes, room)
    if relaxed is None:
        return Choice([len(cost) - 1 for cost, _ in classes], 0.0)
    bound, core, best = relaxed
    asked, below = GAP * max(bound, 0.0), 0.0  # no choice is less than `below` above the bound
    limit = max(asked, FIRST_LIMIT * best.above)
    while best.above - below > asked:
        limit = min(limit, best.above)
        found, missed = core.search(limit, asked / 2)
        if found is not None and found.above < best.above:
            best = found
        below = max(below, min(limit, best.above - missed))
        if missed > asked or limit >= best.above:
            break
        limit *= 4
    loss = bound + best.above
    return Choice(best.items, (best.above - below) / loss if loss > 0 else 0.0)


class _Found(NamedTuple):
    """A choice, and how much its loss is above the relaxation's."""

    items: list[int]
    above: float


def _room(classes: list[tuple[Array, Array]], capacity: float) -> float:
    """What the cheapest items leave of the capacity, as far as sums of costs can use it up.

    Whole numbers with a common divisor add up to multiples of it. The tighter capacity makes a tighter relaxation:
    for classes that are all alike, the difference between a proof and none.
    """
    room = capacity * (1 + ROUNDING) - sum(float(cost[0]) for cost, _ in classes)
    steps = np.unique(np.concatenate([np.diff(cost) for cost, _ in classes]))
    if room < 0 or not len(steps) or not (steps == np.floor(steps)).all():
        return room
    divisor = float(np.gcd.reduce(steps.astype(np.int64)))
    return math.floor(room / divisor) * divisor if divisor else room


def _relax(classes: list[tuple[Array, Array]], room: float) -> tuple[float, _Core, _Found] | None:
    """The relaxation's loss, the core around it, and a greedy choice; None where the dearest items all fit."""
    steps = np.concatenate([_hull_steps(index, *each) for index, each in enumerate(classes)])
    steps = steps[np.argsort(-steps[:, 1] / steps[:, 0], kind="stable")]
    used = np.cumsum(steps[:, 0])
    fit = int(np.searchsorted(used, room, side="right"))
    if fit == len(steps):
        return None
    items = [0] * len(classes)
    for index, item in steps[:fit, 2:].astype(int).tolist():
        items[index] = item
    price = float(steps[fit, 1] / steps[fit, 0])
    left = room - (float(used[fit - 1]) if fit else 0.0)
    loss = sum(float(each[item]) for (_, each), item in zip(classes, items, strict=True))
    greedy = _filled(items, steps[fit:], left, price)
    return loss - price * left, _Core(classes, items, left, price), greedy


def _hull_steps(index: int, costs: Array, losses: Array) -> Array:
    """Along the lower convex hull of a class: rows of cost, gain, class and the item reached."""
    cost, loss = costs.tolist(), losses.tolist()
    hull = [0]
    for c in range(1, len(cost)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (loss[a] - loss[b]) * (cost[c] - cost[a]) > (loss[a] - loss[c]) * (cost[b] - cost[a]):
                break
            hull.pop()  # b lies on or above the line from a to c
        hull.append(c)
    rows = [(cost[b] - cost[a], loss[a] - loss[b], index, b) for a, b in pairwise(hull)]
    return np.array(rows, float).reshape(-1, 4)


def _filled(items: list[int], steps: Array, left: float, price: float) -> _Found:
    """What still fits of the steps after the one that did not."""
    items, blocked, regret = list(items), set(), 0.0
    for cost, gain, index, item in steps.tolist():
        if index in blocked or cost > left:
            blocked.add(index)
            continue
        items[int(index)] = int(item)
        left, regret = left - cost, regret + price * cost - gain
    return _Found(items, regret + price * left)


@dataclass(frozen=True)
class _Front:
    """Choices among the classes seen so far, the others as in the relaxation: in rising cost and falling loss."""

    cost: Array  # more than the relaxation's choice
    regret: Array
    parent: Indices  # in the front before
    item: Indices

    def __getitem__(self, which: Indices) -> _Front:
        return _Front(self.cost[which], self.regret[which], self.parent[which], self.item[which])


@dataclass(frozen=True)
class _Core:
    classes: list[tuple[Array, Array]]
    items: list[int]  # of the relaxation, which fit
    left: float  # of the capacity, by them
    price: float

    def search(self, limit: float, coarseness: float) -> tuple[_Found | None, float]:
        """The choice nearest to the bound of those up to `limit` above it, and by how much a nearer one was missed.

        That is at most `coarseness`, unless there are too many states.
        """
        core = sorted(self.within(limit), key=lambda each: float(each[3].min()))
        down = _after([-min(float(cost.min()), 0.0) for _, _, cost, _ in core])
        up = _after([max(float(cost.max()), 0.0) for _, _, cost, _ in core])
        start = np.zeros(1, np.intp)
        front = _Front(np.zeros(1), np.zeros(1), start, start)
        fronts: list[_Front] = []
        best, nearest, missed = None, math.inf, 0.0
        for (_, item, cost, regret), least, most in zip(core, down, up, strict=True):
            # A state goes on if, with the cheapest change there is from here on, it may still end within the limit.
            spare = self.left - front.cost - most
            may = front.regret + regret.min() + self.price * np.maximum(spare, 0) <= limit + missed
            alive = np.flatnonzero(may & (front.cost - least <= self.left))
            if not len(alive):
                break
            grown = _grown(front, alive, item, cost, regret)
            front, grain = self.thinned(grown[np.flatnonzero(grown.regret <= limit + missed)], coarseness / len(core))
            missed += grain
            fronts.append(front)
            fitting = np.flatnonzero(front.cost <= self.left)
            if not len(fitting):
                continue
            above = front.regret[fitting] + self.price * (self.left - front.cost[fitting])
            if above.min() < nearest:
                nearest = float(above.min())
                best = (len(fronts) - 1, int(fitting[above.argmin()]))
                limit = min(limit, nearest)
        return (None if best is None else _Found(self.traced(core, fronts, *best), nearest)), missed

    def within(self, limit: float) -> Iterator[_Changes]:
        """The changes of every class with regrets up to the limit."""
        for index, ((cost, loss), taken) in enumerate(zip(self.classes, self.items, strict=True)):
            costs = cost - cost[taken]
            regrets = np.maximum(loss - loss[taken] + self.price * costs, 0)
            others = np.flatnonzero(regrets <= limit)
            others = others[others != taken]
            if len(others):
                yield index, others, costs[others], regrets[others]

    def thinned(self, front: _Front, grain: float) -> tuple[_Front, float]:
        """Without states that a cheaper one equals in loss, to within a grain: the one given, or a larger one."""
        front = front[np.argsort(front.cost, kind="stable")]  # made of parts in order: stable sorts are quick there
        loss = front.regret - self.price * front.cost
        while True:
            level = np.floor(loss / grain) if grain > 0 else loss
            before = np.concatenate([[np.inf], np.minimum.accumulate(level)[:-1]])
            kept = np.flatnonzero(level < before)
            if len(kept) <= MOST_STATES:
                return front[kept], grain
            grain = max(2 * grain, float(np.ptp(loss)) / MOST_STATES / 4)

    def traced(self, core: list[_Changes], fronts: list[_Front], last: int, at: int) -> list[int]:
        """The items that led to a state of a front."""
        items = list(self.items)
        for (index, *_), front in zip(core[last::-1], fronts[last::-1], strict=False):
            if front.item[at] >= 0:
                items[index] = int(front.item[at])
            at = int(front.parent[at])
        return items


def _after(amounts: list[float]) -> list[float]:
    """The sums of an amount and all that follow it."""
    return np.cumsum(amounts[::-1])[::-1].tolist()  # type: ignore[no-any-return]


def _grown(front: _Front, alive: Indices, item: Indices, cost: Array, regret: Array) -> _Front:
    """Every state that goes on, with every item of one more class; item -1 is the relaxation's."""
    costs, regrets = np.append(0.0, cost), np.append(0.0, regret)
    return _Front(
        (front.cost[alive] + costs[:, None]).ravel(),
        (front.regret[alive] + regrets[:, None]).ravel(),
        np.tile(alive, len(costs)),
        np.repeat(np.append(-1, item), len(alive)),
    )
