"""The choice of options: equal to brute force, within budget, clear when it cannot be."""

import itertools
import random

import pytest

from convsplit import Budget
from convsplit.choose.allocation import POWER, allocate
from convsplit.choose.options import Menu, Option
from convsplit.model.sites import Site
from convsplit.structure import Structure


def option(params: int, error: float, macs: int | None = None) -> Option:
    return Option(Structure("dw-pw", 1, False) if error else None, params, params if macs is None else macs, error)


def random_menus(layers: int, options: int, seed: int) -> list[Menu]:
    rng = random.Random(seed)
    menus = []
    for index in range(layers):
        dense = rng.randint(100, 5000)
        smaller = [
            option(rng.randint(1, dense - 1), rng.uniform(0.01, 1), rng.randint(1, dense)) for _ in range(options)
        ]
        menus.append(Menu(Site(str(index), None), (option(dense, 0.0), *smaller)))
    return menus


def objective(chosen) -> float:
    return sum(o.error**POWER for o in chosen)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_equals_brute_force(seed, kind):
    menus = random_menus(4, 4, seed)
    fraction = 0.3 + 0.6 * random.Random(seed).random()
    allowed = fraction * sum(getattr(menu.dense, kind) for menu in menus)
    feasible = [
        chosen
        for chosen in itertools.product(*(menu.options for menu in menus))
        if sum(getattr(o, kind) for o in chosen) <= allowed
    ]
    if not feasible:
        with pytest.raises(ValueError, match="cannot be met"):
            allocate(menus, Budget(**{kind: fraction}))
        return
    best = min(map(objective, feasible))
    chosen = allocate(menus, Budget(**{kind: fraction}))
    assert sum(getattr(o, kind) for o in chosen) <= allowed
    assert objective(chosen) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_many_layers_are_solved_within_budget(seed):
    menus = random_menus(150, 24, seed)
    chosen = allocate(menus, Budget(params=0.3))
    assert sum(o.params for o in chosen) <= 0.3 * sum(menu.dense.params for menu in menus)


def test_a_smaller_budget_is_never_better():
    menus = random_menus(10, 8, 1)
    objectives = [objective(allocate(menus, Budget(params=p))) for p in (1.0, 0.8, 0.6, 0.4)]
    assert objectives[0] == 0
    assert objectives == sorted(objectives)


def test_the_smallest_budget_is_named_and_met():
    menus = random_menus(3, 2, 0)
    with pytest.raises(ValueError, match=r"the smallest that can is params=0\.\d+") as caught:
        allocate(menus, Budget(params=1e-6))
    smallest = float(str(caught.value).rsplit("=", 1)[1])
    allocate(menus, Budget(params=smallest))


def test_budget_of_the_whole_model():
    menus = random_menus(5, 8, 2)
    splittable = sum(menu.dense.params for menu in menus)
    model = splittable + 1000
    chosen = allocate(menus, Budget(params=0.8, of="model"), model_params=model)
    assert sum(o.params for o in chosen) + 1000 <= 0.8 * model
    with pytest.raises(ValueError, match="smallest that can is params=") as caught:
        allocate(menus, Budget(params=0.01, of="model"), model_params=model)
    smallest = float(str(caught.value).rsplit("=", 1)[1])
    allocate(menus, Budget(params=smallest, of="model"), model_params=model)


def test_an_error_budget_takes_the_cheapest_within_it():
    menus = random_menus(6, 8, 3)
    chosen = allocate(menus, Budget(error=0.4))
    for menu, taken in zip(menus, chosen, strict=True):
        assert taken.error <= 0.4
        assert taken.params == min(o.params for o in menu.options if o.error <= 0.4)


def test_macs_need_shapes():
    menu = Menu(Site("a", None), (Option(None, 10, None, 0.0),))
    with pytest.raises(ValueError, match="pass example_inputs"):
        allocate([menu], Budget(macs=0.5))


def test_no_layers():
    assert allocate([], Budget(params=0.5)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "got none"),
        ({"params": 0.5, "macs": 0.5}, "got params=0.5, macs=0.5"),
        ({"params": 0}, r"fraction in \(0, 1\]"),
        ({"params": 50}, r"for a half, say params=0.5"),
        ({"params": float("nan")}, r"fraction in \(0, 1\]"),
        ({"macs": True}, "fraction"),
        ({"params": 0.5, "of": "everything"}, '"splittable" or "model"'),
    ],
)
def test_bad_budgets(arguments, message):
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)
