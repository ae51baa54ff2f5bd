"""Which layers are sites, how users name them, and that a failure in the middle leaves everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from awkward import doubled, images, settled
from portraits import globals_now, portrait
from torch import Tensor, fx, nn

import convsplit
from convsplit import kinds, rewrite
from convsplit.kinds import Equivalent, equivalent, plain_conv, register
from convsplit.layers.separable import SeparableConv, SeparableConv2d
from convsplit.layers.stages import PaddedConv2d, SamePad2d
from convsplit.model.graphs import trace
from convsplit.model.sites import find_sites


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(kinds._handlers)
    torch.manual_seed(0)
    yield
    kinds._handlers.clear()
    kinds._handlers.update(before)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return settled(nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))))


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    return {site.name: site.reason for site in find_sites(model, trace(model), **options)}


@pytest.mark.parametrize("skip", ["1", ["1"], "[1]", lambda name, module: name == "1"])
def test_skip_by_name_pattern_or_predicate(model: nn.Module, skip: Any) -> None:
    assert reasons(model, skip=skip) == {"0": "", "1": "skipped as asked", "2": ""}


def test_skip_that_matches_nothing_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"skip='layer\*' matches no convolution; their names are 0, 1, 2"):
        reasons(model, skip="layer*")


class Doubling(nn.Conv2d):
    """Halves at every call what it doubled before: needs a handler to be understood."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_registered_handler_is_used_for_the_exact_type() -> None:
    class Heir(Doubling):
        pass

    def twice(conv: Doubling) -> nn.Conv2d:
        bias = None if conv.bias is None else conv.bias
        plain = plain_conv(conv, weight=2 * conv.weight)
        plain.bias = None if bias is None else nn.Parameter(2 * bias.detach())
        return plain

    register(Doubling, twice)
    model = settled(nn.Sequential(Doubling(4, 4, 3), Heir(4, 4, 3)))
    assert list(map(bool, reasons(model).values())) == [False, True]
    x = images(2, 4, 8, 8)
    assert torch.allclose(convsplit.convert(model, exact=True)(x), model(x), rtol=1e-9)


def test_a_handler_may_give_a_reason() -> None:
    register(Doubling, lambda conv: "doubles its output")
    assert reasons(settled(nn.Sequential(Doubling(4, 4, 3)))) == {"0": "doubles its output"}


def test_a_later_registration_replaces_the_earlier() -> None:
    register(Doubling, lambda conv: "first")
    register(Doubling, lambda conv: "second")
    assert equivalent(Doubling(4, 4, 3)) == "second"


def test_padding_that_depends_on_the_input_stays_dynamic() -> None:
    from timm.layers.conv2d_same import Conv2dSame

    model = settled(nn.Sequential(Conv2dSame(4, 6, 3, stride=2)))
    converted = convsplit.convert(model, exact=True)
    assert isinstance(converted[0].stages["pad"], SamePad2d)
    merged = convsplit.merge(converted)
    assert type(merged[0]) is PaddedConv2d
    again = convsplit.convert(merged, exact=True)
    assert type(again[0]) is SeparableConv2d
    for size in ((8, 8), (9, 11), (1, 2), (15, 6)):
        x = images(2, 4, *size)
        for other in (converted, merged, again):
            assert torch.allclose(other(x), model(x), rtol=1e-9)


def test_a_plan_of_a_padded_layer_fits_a_fresh_instance_only_with_the_same_numbers() -> None:
    from timm.layers.conv2d_same import Conv2dSame

    plan = convsplit.make_plan(settled(nn.Sequential(Conv2dSame(4, 6, 3, stride=2))), exact=True)
    assert isinstance(convsplit.apply_plan(nn.Sequential(Conv2dSame(4, 6, 3, stride=2)), plan)[0], SeparableConv2d)
    with pytest.raises(ValueError, match="made for another '0'"):
        convsplit.apply_plan(nn.Sequential(Conv2dSame(4, 6, 3, stride=1)), plan)
    with pytest.raises(ValueError, match="may compute more"):
        convsplit.apply_plan(nn.Sequential(Doubling(4, 6, 3, stride=2)), plan)


def test_a_baked_layer_is_an_ordinary_one() -> None:
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)).double()
    conv.parametrizations.weight.requires_grad_(False)
    converted = convsplit.convert(nn.Sequential(conv), exact=True, bake=True)[0]
    assert not converted.weight.requires_grad
    assert converted.bias is not None
    assert converted.bias.requires_grad
    assert not any("hook" in key and value for key, value in vars(converted).items() if isinstance(value, dict))


def test_equivalents_share_parameters_and_leave_the_module_alone() -> None:
    from timm.layers.conv2d_same import Conv2dSame

    conv = Conv2dSame(4, 6, 3, stride=2)
    found = equivalent(conv)
    assert isinstance(found, Equivalent)
    assert found.conv.weight is conv.weight
    assert found.conv.bias is conv.bias


def test_hooks_of_the_copy_are_its_own(model: nn.Module) -> None:
    handle = model[0].register_forward_hook(doubled)
    converted = convsplit.convert(model, exact=True)
    x = images(1, 4, 6, 6)
    expected = converted(x)
    handle.remove()
    assert torch.equal(converted(x), expected)
    assert not model[0]._forward_hooks


def test_attributes_set_on_a_layer_go_along(model: nn.Module) -> None:
    model[1].stage, model[1].owner = "P3", [model]
    converted = convsplit.convert(model, exact=True)
    assert converted[1].stage == "P3"
    assert converted[1].owner[0] is converted


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
@pytest.mark.parametrize("even", [True, False])
def test_split_layers_trace_and_take_unbatched_inputs(form: str, even: bool) -> None:
    conv = settled(nn.Conv2d(4, 6, 3, stride=2))
    rank = {"rank": 2} if even and form != "pw-dw-pw" else {"components": 7}
    layer = SeparableConv2d.from_conv(conv, form=form, **rank)
    layer.add_module("pad", SamePad2d(3, 2))
    x = images(2, 4, 9, 8)
    assert torch.equal(fx.symbolic_trace(layer)(x), layer(x))
    assert torch.allclose(layer(x[0]), layer(x)[0], rtol=1e-12)


# A failure in the middle


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), torch.OutOfMemoryError("no memory"), ValueError("broken")])
@pytest.mark.parametrize("where", ["factorising", "hook", "copying", "allocation"])
def test_a_failure_in_the_middle_changes_nothing(
    model: nn.Module, failure: BaseException, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses = 0

    def fail_at_the_second(*args: Any, **kwargs: Any) -> Any:
        nonlocal uses
        uses += 1
        torch.rand(3)
        torch.set_default_dtype(torch.float16)
        if uses == 2:
            raise failure
        torch.set_default_dtype(torch.float32)

    if where == "hook":
        model[1].register_forward_hook(fail_at_the_second)
        model[2].register_forward_hook(fail_at_the_second)
    elif where == "copying":
        monkeypatch.setattr(rewrite, "_hand_over", fail_at_the_second)
    elif where == "factorising":
        original = SeparableConv2d.load_factors

        def load(layer: SeparableConv2d, *args: Any) -> None:
            fail_at_the_second()
            original(layer, *args)

        monkeypatch.setattr(SeparableConv2d, "load_factors", load)
    else:
        monkeypatch.setattr(SeparableConv, "empty_like", fail_at_the_second)
        uses = 1
    x = images(1, 4, 6, 6)
    before, around = portrait(model), globals_now()
    expected = (type(failure), ValueError) if isinstance(failure, Exception) else type(failure)
    with pytest.raises(expected):
        convsplit.convert(model, x, exact=True)
    assert portrait(model) == before
    assert globals_now() == around


def test_a_failing_deepcopy_says_what_is_wanted(model: nn.Module) -> None:
    def refuse(memo: Any) -> Any:
        raise RuntimeError("no copies of me")

    model[1].__deepcopy__ = refuse
    with pytest.raises(TypeError, match="Sequential cannot be deep-copied"):
        convsplit.convert(model)


def test_a_model_is_converted_the_same_way_twice(model: nn.Module) -> None:
    first, second = (convsplit.convert(model, rank=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
def test_another_default_device_does_not_matter(model: nn.Module, form: str) -> None:
    """All tensors that convsplit makes for itself are made where the model is."""
    expected = convsplit.convert(model, forms=form)
    with torch.device("meta"):
        converted = convsplit.convert(model, forms=form)
    for one, other in zip(converted.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Writes(nn.Module):
    def __init__(self, write: Any) -> None:
        super().__init__()
        self.conv, self.other, self.write = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.conv)
        return self.other(self.conv(x) + self.other.weight.mean())


def masked(conv: nn.Conv2d) -> None:
    conv.weight.data *= torch.ones(3, 3).tril()


def clipped(conv: nn.Conv2d) -> None:
    conv.weight.data.clamp_(-0.02, 0.02)


@torch.no_grad()
def normalised(conv: nn.Conv2d) -> None:
    conv.weight.copy_(conv.weight / conv.weight.norm())


@pytest.mark.parametrize("write", [masked, clipped, normalised])
def test_weights_that_forward_writes_to_stay_dense(write: Any) -> None:
    model = settled(Writes(write))
    weights = copy.deepcopy(model.state_dict())
    found = reasons(model)
    assert "may write to its weight in forward" in found["conv"]
    assert not found["other"]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_padded_convolution_is_found_in_a_model_that_is_not_traced():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = PaddedConv2d(8, 12, 3)
            self.conv.pad = nn.ZeroPad2d((1, 1, 0, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else x

    model = Branching()
    (site,) = find_sites(model, trace(model))
    assert not site.reason
