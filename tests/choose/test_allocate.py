"""The choice of options: equal to brute force, within budget, clear when it cannot be."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import convsplit
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
    chosen = allocate(menus, Budget(**{kind: fraction})).options
    assert sum(getattr(o, kind) for o in chosen) <= allowed
    assert objective(chosen) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_many_layers_are_solved_within_budget(seed):
    menus = random_menus(150, 24, seed)
    chosen = allocate(menus, Budget(params=0.3)).options
    assert sum(o.params for o in chosen) <= 0.3 * sum(menu.dense.params for menu in menus)


def test_a_smaller_budget_is_never_better():
    menus = random_menus(10, 8, 1)
    objectives = [objective(allocate(menus, Budget(params=p)).options) for p in (1.0, 0.8, 0.6, 0.4)]
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
    chosen = allocate(menus, Budget(params=0.8, of="model"), model_params=model).options
    assert sum(o.params for o in chosen) + 1000 <= 0.8 * model
    with pytest.raises(ValueError, match="smallest that can is params=") as caught:
        allocate(menus, Budget(params=0.01, of="model"), model_params=model)
    smallest = float(str(caught.value).rsplit("=", 1)[1])
    allocate(menus, Budget(params=smallest, of="model"), model_params=model)


def test_an_error_budget_takes_the_cheapest_within_it():
    menus = random_menus(6, 8, 3)
    chosen = allocate(menus, Budget(error=0.4)).options
    for menu, taken in zip(menus, chosen, strict=True):
        assert taken.error <= 0.4
        assert taken.params == min(o.params for o in menu.options if o.error <= 0.4)


def test_macs_need_shapes():
    menu = Menu(Site("a", None), (Option(None, 10, None, 0.0),))
    with pytest.raises(ValueError, match="pass example_inputs"):
        allocate([menu], Budget(macs=0.5))


def test_no_layers():
    assert allocate([], Budget(params=0.5)).options == []


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


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
@pytest.mark.parametrize("known", [False, True])
def test_no_option_has_more_macs_whatever_the_stride(stride: int, form: str, known: bool) -> None:
    """A first pointwise stage runs at the input's size: where no inputs are given, that is counted all the same."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(16, 32, 5, stride=stride, padding=2)), torch.zeros(1, 16, 24, 24)
    for kept in (0.25, 0.9):
        plan = convsplit.make_plan(model, x if known else None, budget=Budget(error=kept), forms=form)
        measured = convsplit.make_plan(model, x, budget=Budget(params=1.0), forms=form)
        (layer,) = plan.layers
        if layer.split:
            structure, (before, _) = layer.option.structure, measured.layers[0].macs
            assert structure.macs(layer.spec, (24, 24), (-(-24 // stride),) * 2) < before


def test_patch_embeddings_are_left_alone_unless_time_is_measured() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 8, stride=8), nn.ReLU(), nn.Conv2d(32, 32, 3))
    plan = convsplit.make_plan(model, torch.zeros(1, 3, 32, 32))
    assert not plan.layer("0").split
    assert "patch embedding" in plan.layer("0").reason
    assert plan.layer("2").split
    assert convsplit.make_plan(model, exact=True).layer("0").split


def test_a_plan_says_how_far_from_the_best_it_may_be() -> None:
    plan = convsplit.make_plan(nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3)), forms="dw-pw")
    assert 0 <= plan.gap <= 1e-6
    assert "another choice" not in plan.summary()
    assert "smaller by 1.0 % at most" in replace(plan, gap=0.01).summary()
    assert convsplit.Plan.from_json(replace(plan, gap=0.01).to_json()).gap == 0.01
