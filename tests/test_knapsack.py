"""The choice of one item per class: as good as an integer programme's, within the capacity, in bounded time."""

import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from convsplit.choose.knapsack import best_choice

Classes = list[np.ndarray]


def drawn(classes: int, items: int, seed: int) -> tuple[Classes, Classes, float]:
    """Costs that rise, losses that fall to zero, over eight decades as fourth powers of errors do."""
    rng = np.random.default_rng(seed)
    costs = [np.sort(rng.choice(10**6, items, replace=False)).astype(float) + 1 for _ in range(classes)]
    losses = [np.append(np.sort(rng.random(items - 1))[::-1], 0.0) ** 4 for _ in range(classes)]
    return costs, losses, rng.uniform(0.1, 0.9) * sum(cost[-1] for cost in costs)


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
    chosen = best_choice(costs, losses, capacity)
    assert sum(cost[item] for cost, item in zip(costs, chosen, strict=True)) <= capacity
    assert sum(loss[item] for loss, item in zip(losses, chosen, strict=True)) == pytest.approx(wanted, rel=1e-5)


def test_equal_classes_are_hard_and_still_bounded() -> None:
    """Hundreds of layers that are all alike: what can be said is a bound, the linear relaxation's."""
    costs = [np.arange(1.0, 25.0)] * 300
    losses = [np.exp(-np.arange(24) / 4.0)] * 300
    start = time.perf_counter()
    chosen = best_choice(costs, losses, 300 * 7.3)
    assert time.perf_counter() - start < 60
    assert sum(item + 1 for item in chosen) <= 300 * 7.3
    bound = 300 * (0.7 * losses[0][6] + 0.3 * losses[0][7])
    assert sum(losses[0][item] for item in chosen) <= 1.001 * bound


def test_the_whole_capacity_buys_everything() -> None:
    costs, losses, _ = drawn(30, 10, 0)
    assert best_choice(costs, losses, sum(cost[-1] for cost in costs)) == [9] * 30
    assert best_choice(costs, losses, sum(cost[0] for cost in costs)) == [0] * 30
    assert best_choice([], [], 1.0) == []
