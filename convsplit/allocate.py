"""Allocation: one option per layer, so that the layers together stay within the budget.

The objective is the sum over layers of the 4th power of the relative error. A signal that one layer destroys no later
layer brings back, so the worst layers count most; on trained networks the 4th power keeps more accuracy than the
squares and than powers closer to the minimax (benchmarks/results/accuracy.md). The choice is solved exactly, as a
mixed-integer linear programme, by scipy's HiGHS.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from convsplit.options import Menu, Option
from convsplit.plan import Budget

POWER = 4

Cost = Callable[[Option], float]


def allocate(
    menus: Sequence[Menu],
    budget: Budget,
    *,
    model_params: int = 0,
    model_macs: int | None = None,
    model_milliseconds: float | None = None,
) -> list[Option]:
    """The best option of each menu under the budget.

    For budgets of params, macs and latency: minimises the sum of error ** 4 subject to the sum of costs being at most
    the fraction of today's. For `Budget(error=...)`: the option with the fewest parameters within that error, layer by
    layer. The `model_` figures are needed for budgets of the whole model.

    Raises:
        ValueError: the budget cannot be met (names the smallest that can), or needs MACs that are not known.
    """
    if budget.kind == "error":
        return [_cheapest_within(menu, budget.fraction) for menu in menus]
    cost = _cost_of(menus, budget)
    splittable = sum(cost(menu.dense) for menu in menus)
    whole = splittable
    if budget.of == "model":
        whole = float({"params": model_params, "macs": model_macs, "latency": model_milliseconds}[budget.kind] or 0)
    allowed = budget.fraction * whole - (whole - splittable)
    choices = [_undominated(menu, cost) for menu in menus]
    least = sum(min(map(cost, options)) for options in choices)
    if least > allowed:
        smallest = np.ceil((least + whole - splittable) / whole * 1e4) / 1e4
        raise ValueError(f"{budget!r} cannot be met: the smallest that can is {budget.kind}={smallest:.4f}")
    return _solve(choices, cost, allowed)


def _cheapest_within(menu: Menu, error: float) -> Option:
    within = (option for option in menu.options if option.error is not None and option.error <= error)
    return min(within, key=lambda option: (option.params, option.error))


def _cost_of(menus: Sequence[Menu], budget: Budget) -> Cost:
    if budget.kind == "params":
        return lambda option: float(option.params)
    if all(menu.dense.macs is None for menu in menus):
        raise ValueError(f"{budget!r} needs the shapes of the layers: pass example_inputs")
    if budget.kind == "latency":
        return lambda option: option.milliseconds or 0.0
    # A layer that the example inputs never reach costs no MACs, whatever is chosen.
    return lambda option: float(option.macs or 0)


def _undominated(menu: Menu, cost: Cost) -> list[Option]:
    """The options no other of which is both cheaper and closer, in rising cost: a best choice needs no others."""
    front: list[Option] = []
    for option in sorted(menu.options, key=lambda o: (cost(o), _error(o), o.params)):
        if not front or _error(option) < _error(front[-1]):
            front.append(option)
    return front


def _solve(choices: list[list[Option]], cost: Cost, allowed: float) -> list[Option]:
    """Minimise the sum of error ** 4 over one option per layer, the sum of costs being at most `allowed`."""
    if not choices:
        return []
    # With every layer at the best reachable largest error e, the objective is at most n e^4; a choice that holds an
    # error above n^(1/4) e is worse. What is left is of order one in units of e, as the solver's tolerances want.
    unit = max(_smallest_largest_error(choices, cost, allowed), 1e-12)
    bound = unit * len(choices) ** (1 / POWER) * (1 + 1e-9)
    choices = [[option for option in options if _error(option) <= bound] for options in choices]
    flat = [option for options in choices for option in options]
    layer = np.repeat(np.arange(len(choices)), [len(options) for options in choices])
    largest = max(cost(option) for option in flat) or 1.0  # rows of order one, as the tolerances of the solver want
    costs = np.array([cost(option) for option in flat]) / largest
    objective = (np.array([_error(option) for option in flat]) / unit) ** POWER
    one_each = csr_array((np.ones(len(flat)), (layer, np.arange(len(flat)))))
    # Without presolve, because HiGHS prints to stdout while it undoes it.
    solution = milp(
        objective,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None, :], -np.inf, allowed / largest)],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6, "time_limit": 30, "presolve": False},
    )
    if solution.x is None:
        raise RuntimeError(f"the allocation could not be solved: {solution.message}")
    return [option for option, taken in zip(flat, solution.x > 0.5, strict=True) if taken]


def _smallest_largest_error(choices: list[list[Option]], cost: Cost, allowed: float) -> float:
    """The smallest error that all layers can keep to at once within the allowance."""
    levels = sorted({_error(option) for options in choices for option in options})

    def affordable(level: float) -> bool:
        cheapest = (min((cost(o) for o in options if _error(o) <= level), default=np.inf) for options in choices)
        return sum(cheapest) <= allowed

    return levels[bisect.bisect_left(levels, True, key=affordable)]


def _error(option: Option) -> float:
    assert option.error is not None, "options to choose from have a known error"
    return option.error
