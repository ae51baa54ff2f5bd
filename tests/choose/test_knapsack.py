"""The choice of one item per class: as good as an integer programme's, within the capacity, in bounded time."""

import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from convsplit.choose import knapsack
from convsplit.choose.knapsack import GAP, best_choice

Classes = list[np.ndarray]


def drawn(classes: int, items: int, seed: int) -> tuple[Classes, Classes, float]:
    """Costs that rise, losses that fall to zero, over eight decades as fourth powers of errors do."""
    rng = np.random.default_rng(seed)
    costs = [np.sort(rng.choice(10**6, items, replace=False)).astype(float) + 1 for _ in range(classes)]
    losses = [np.append(np.sort(rng.random(items - 1))[::-1], 0.0) ** 4 for _ in range(classes)]
    return costs, losses, rng.uniform(0.1, 0.9) * sum(cost[-1] for cost in costs)


def spent(amounts: Classes, items: list[int]) -> float:
    return sum(float(each[item]) for each, item in zip(amounts, items, strict=True))


def programme(costs: Classes, losses: Classes, capacity: float) -> float | None:
    """The least loss as scipy's mixed-integer programme finds it."""
    cost, loss = np.concatenate(costs), np.concatenate(losses)
    owner = np.repeat(np.arange(len(costs)), [len(each) for each in costs])
    one_each = csr_array((np.ones(len(cost)), (owner, np.arange(len(cost)))))
    scale = cost.max()
    solution = milp(
        loss,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost[None] / scale, -np.inf, capacity / scale),
        ],
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-7},
    )
    return None if solution.x is None else float(loss @ (solution.x > 0.5))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("classes", "items"), [(1, 5), (2, 20), (6, 12), (20, 24), (60, 24)])
def test_equals_an_integer_programme(classes: int, items: int, seed: int) -> None:
    costs, losses, capacity = drawn(classes, items, seed)
    wanted = programme(costs, losses, capacity)
    if wanted is None:
        with pytest.raises(ValueError, match="exceed the capacity"):
            best_choice(costs, losses, capacity)
        return
    chosen, gap = best_choice(costs, losses, capacity)
    assert spent(costs, chosen) <= capacity
    assert spent(losses, chosen) == pytest.approx(wanted, rel=1e-5)
    assert gap <= GAP


def test_what_few_states_find_is_within_the_gap_they_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too few states for a proof the choice is worse, and the gap says by how much at most."""
    monkeypatch.setattr(knapsack, "MOST_STATES", 4)
    gaps = []
    for seed in range(4):
        costs, losses, capacity = drawn(20, 24, seed)
        chosen, gap = best_choice(costs, losses, capacity)
        gaps.append(gap)
        assert spent(costs, chosen) <= capacity
        assert spent(losses, chosen) * (1 - gap) <= (programme(costs, losses, capacity) or 0) * (1 + 1e-6)
    assert max(gaps) > GAP


@pytest.mark.parametrize("step", [1, 24])
def test_equal_classes_are_solved_to_the_end(step: int) -> None:
    """Hundreds of layers that are all alike have countless equivalent choices; whole numbers leave no gap."""
    costs = [np.arange(1.0, 25.0) * step] * 300
    losses = [np.exp(-np.arange(24) / 4.0)] * 300
    chosen, gap = best_choice(costs, losses, 300 * 7.3 * step)
    assert spent(costs, chosen) == 300 * 7.3 * step
    assert spent(losses, chosen) == pytest.approx(300 * (0.7 * losses[0][6] + 0.3 * losses[0][7]))
    assert gap <= 1e-9


@pytest.mark.parametrize("classes", [2, 9, 40])
def test_equal_classes_of_odd_costs_equal_an_integer_programme(classes: int) -> None:
    rng = np.random.default_rng(classes)
    costs = [np.cumsum(rng.integers(100, 1000, 12)).astype(float)] * classes
    losses = [np.exp(-np.arange(12) / 2.0)] * classes
    capacity = 0.37 * spent(costs, [11] * classes)
    chosen, gap = best_choice(costs, losses, capacity)
    assert spent(losses, chosen) == pytest.approx(programme(costs, losses, capacity), rel=1e-5)
    assert gap <= GAP


@pytest.mark.parametrize("alike", [False, True])
def test_time_grows_little_more_than_the_number_of_classes(alike: bool) -> None:
    """Ten times as many classes: sorting and listing states take a little more than ten times as long."""

    def seconds(classes: int) -> float:
        costs, losses, capacity = drawn(classes, 24, 0)
        if alike:
            costs, losses = [costs[0]] * classes, [losses[0]] * classes
            capacity = 0.3 * spent(costs, [23] * classes)
        start = time.process_time()
        assert best_choice(costs, losses, capacity).gap < 1e-3
        return time.process_time() - start

    seconds(10)
    assert seconds(1000) < 60 * max(seconds(100), 0.02)


def test_the_same_call_gives_the_same_choice() -> None:
    assert best_choice(*drawn(50, 24, 0)) == best_choice(*drawn(50, 24, 0))


def test_the_whole_capacity_buys_everything() -> None:
    costs, losses, _ = drawn(30, 10, 0)
    assert best_choice(costs, losses, spent(costs, [9] * 30)) == ([9] * 30, 0)
    assert best_choice(costs, losses, spent(costs, [0] * 30)).items == [0] * 30
    assert best_choice([], [], 1.0) == ([], 0)


def test_items_without_loss_are_enough() -> None:
    """Where all errors underflow to nothing, capacity has no price."""
    assert best_choice([[1, 2, 3]] * 3, [[0.0, 0.0, 0.0]] * 3, 4.0).gap == 0
    chosen, gap = best_choice([[1, 2, 3]] * 3, [[1.0, 0.0, 0.0]] * 3, 6.0)
    assert spent([np.array([1.0, 0.0, 0.0])] * 3, chosen) == 0
    assert gap == 0
