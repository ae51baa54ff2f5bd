"""Allocation: one option per layer, so that the layers together stay within the budget.

The objective is the sum over layers of the 4th power of the relative error. A signal that one layer destroys no later
layer brings back, so the worst layers count most; on trained networks the 4th power keeps more accuracy than the
squares and than powers closer to the minimax (benchmarks/results/accuracy.md). The choice is the best to
a millionth of that sum, or as near to it as knapsack.py says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from convsplit.choose.budget import Budget
from convsplit.choose.knapsack import best_choice
from convsplit.choose.options import Menu, Option

POWER = 4

Cost = Callable[[Option], float]


@dataclass(frozen=True)
class Allocation:
    """One option per menu. No other choice has a loss smaller than theirs by more than the fraction `gap`."""

    options: list[Option]
    gap: float = 0.0


def allocate(
    menus: Sequence[Menu],
    budget: Budget,
    *,
    model_params: int = 0,
    model_macs: int | None = None,
    model_milliseconds: float | None = None,
) -> Allocation:
    """The best option of each menu under the budget.

    For budgets of params, macs and latency: minimises the sum of error ** 4 subject to the sum of costs being at most
    the fraction of today's. For `Budget(error=...)`: the option with the fewest parameters within that error, layer by
    layer. The `model_` figures are needed for budgets of the whole model.

    Raises:
        ValueError: the budget cannot be met (names the smallest that can), or needs MACs that are not known.
    """
    if not menus:
        return Allocation([])
    if budget.kind == "error":
        return Allocation([_cheapest_within(menu, budget.fraction) for menu in menus])
    cost = _cost_of(menus, budget)
    splittable = sum(cost(menu.dense) for menu in menus)
    whole = splittable
    if budget.of == "model":
        whole = float({"params": model_params, "macs": model_macs, "latency": model_milliseconds}[budget.kind] or 0)
    allowed = budget.fraction * whole - (whole - splittable)
    choices = [_undominated(menu, cost) for menu in menus]
    least = sum(min(map(cost, options)) for options in choices)
    if least > allowed:
        smallest = math.ceil((least + whole - splittable) / whole * 1e4) / 1e4
        raise ValueError(f"{budget!r} cannot be met: the smallest that can is {budget.kind}={smallest:.4f}")
    costs = [[cost(option) for option in options] for options in choices]
    losses = [[_error(option) ** POWER for option in options] for options in choices]
    taken, gap = best_choice(costs, losses, allowed)
    return Allocation([options[item] for options, item in zip(choices, taken, strict=True)], gap)


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


def _error(option: Option) -> float:
    assert option.error is not None, "options to choose from have a known error"
    return option.error
