"""Every awkward model converts as its entry says, exactly, and is left as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from awkward import AWKWARD, Awkward
from portraits import globals_now, portrait
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import convsplit
from convsplit.layers.separable import SeparableConv
from convsplit.model.running import call


@pytest.fixture(params=AWKWARD.values(), ids=AWKWARD.keys())
def case(request: pytest.FixtureRequest) -> Awkward:
    torch.manual_seed(0)
    return request.param


def convert(case: Awkward, model: nn.Module, inputs: Any = None) -> nn.Module:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", convsplit.ConversionWarning)
        converted = convsplit.convert(model, inputs, exact=True, bake=case.bake)
    messages = [str(w.message) for w in caught if issubclass(w.category, convsplit.ConversionWarning)]
    nothing = [message for message in messages if message.startswith(("no convolution of", "no layer of"))]
    assert bool(nothing) == (not case.split)
    messages = [message for message in messages if message not in nothing]
    assert bool(messages) == bool(case.warns)
    assert all(case.warns in message for message in messages)
    return converted


def output(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [torch.as_tensor(leaf) for leaf in tree_leaves(call(model, inputs))]


def assert_equal_outputs(model: nn.Module, other: nn.Module, inputs: Any, tolerance: float) -> None:
    for expected, got in zip(output(model, inputs), output(other, inputs), strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_plan_says_what_becomes_of_each(case: Awkward) -> None:
    model, inputs = case.build()
    for examples in (None, inputs):
        plan = convsplit.make_plan(model, examples, exact=True, bake=case.bake)
        assert {layer.name for layer in plan.split} == set(case.split)
        left = {layer.name: layer.reason for layer in plan.layers if not layer.split}
        assert left.keys() == case.left.keys()
        assert all(part in left[name] for name, part in case.left.items()), left


@pytest.mark.parametrize("with_inputs", [False, True], ids=["names", "shapes"])
def test_exact_and_the_model_untouched(case: Awkward, with_inputs: bool) -> None:
    model, inputs = case.build()
    before, around = portrait(model), globals_now()
    converted = convert(case, model, inputs if with_inputs else None)
    assert portrait(model) == before
    assert globals_now() == around
    assert type(converted) is type(model) or case.split == ("",) or isinstance(model, torch.fx.GraphModule)
    modules = dict(converted.named_modules())
    assert all(isinstance(modules[name], SeparableConv) for name in case.split)
    assert_equal_outputs(model, converted, inputs, case.tolerance)


def test_original_and_copy_share_nothing(case: Awkward) -> None:
    model, _ = case.build()
    converted = convert(case, model)
    theirs = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    assert not any(id(tensor) in theirs for tensor in [*converted.parameters(), *converted.buffers()])


def test_merging_gives_the_original_back(case: Awkward) -> None:
    model, inputs = case.build()
    merged = convsplit.merge(convert(case, model))
    assert not any(isinstance(module, SeparableConv) for module in merged.modules())
    assert_equal_outputs(model, merged, inputs, case.tolerance)


def test_state_goes_along(case: Awkward) -> None:
    """deepcopy, pickle, and a plan applied to a fresh instance whose state is loaded."""
    model, inputs = case.build()
    converted = convert(case, model)
    assert_equal_outputs(converted, copy.deepcopy(converted), inputs, 0)
    if case.pickles:
        assert_equal_outputs(converted, pickle.loads(pickle.dumps(converted)), inputs, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = convsplit.make_plan(model, exact=True, bake=case.bake)
        empty = convsplit.apply_plan(case.build()[0], plan, initialise=False)
    empty.load_state_dict(converted.state_dict())
    assert_equal_outputs(converted, empty, inputs, 0)


@pytest.mark.filterwarnings("ignore::convsplit.ConversionWarning")
def test_repair_makes_no_layer_worse(case: Awkward) -> None:
    model, inputs = case.build()
    before = portrait(model)
    converted = convsplit.convert(model, inputs, rank=1, forms="dw-pw", bake=case.bake)
    if not case.repairs:
        with pytest.raises(TypeError, match="cannot be trained in place"):
            convsplit.refit(converted, model, [inputs])
        return
    repaired = convsplit.refit(converted, model, [inputs])
    assert all(layer.after <= layer.before for layer in repaired)
    for layer in converted.modules():
        if isinstance(layer, SeparableConv):
            assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert portrait(model) == before
    assert convsplit.compare(converted, model, [inputs]).verdict.level


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(case: Awkward) -> None:
    if not case.jits:
        pytest.skip("torch.jit.trace does not take this model")
    model, inputs = case.build()
    converted = convert(case, model)
    traced = torch.jit.trace(converted, inputs, check_trace=False)
    assert_equal_outputs(converted, traced, inputs, case.tolerance)
