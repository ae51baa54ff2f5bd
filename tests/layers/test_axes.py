"""Split layers of one, two and three axes, transposed or not, over products of everything that they can be."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from convsplit.forms import FORMS, form_named
from convsplit.layers.separable import SEPARABLE, SeparableConv
from convsplit.layers.stages import ChannelGather
from convsplit.spec import CONVOLUTIONS, Convolution, ConvSpec

KINDS = list(CONVOLUTIONS)
FLAT = [kind for kind in KINDS if kind != (2, False)]  # all but Conv2d, which has tests of its own
VARIANTS = [{"groups": 1, "bias": True}, {"groups": 2, "bias": False}, {"groups": 2}, {"groups": 1, "bias": False}]
RANKS: list[dict[str, int]] = [{"rank": 1}, {"rank": 2}, {"components": 10}]


def name_of(kind: tuple[int, bool]) -> str:
    return CONVOLUTIONS[kind].__name__


def geometries(axes: int, transposed: bool) -> list[dict[str, Any]]:
    """Numbers that differ from axis to axis, so that a mixed up one shows."""
    different = {"stride": (2, 1, 3)[:axes], "padding": (1, 0, 2)[:axes], "dilation": (1, 2, 1)[:axes]}
    shared: list[dict[str, Any]] = [{}, {"stride": 2, "padding": 1}, different]
    if transposed:
        return [
            *shared,
            {"stride": 2, "output_padding": 1},
            {"stride": 4},
            {"stride": 3, "padding": 2, "dilation": 2},
        ]
    modes = [{"padding": 1, "padding_mode": mode} for mode in ("circular", "reflect", "replicate")]
    return [*shared, *modes, {"padding": "same", "dilation": 2}, {"padding": "valid", "stride": 4}]


def kernels(axes: int) -> list[tuple[int, ...]]:
    return [(3, 2, 4)[:axes], (1, 3, 3)[-axes:], (3, 1, 1)[:axes]]


def convs(axes: int, transposed: bool) -> list[Convolution]:
    torch.manual_seed(0)
    found = zip(
        itertools.product(kernels(axes), geometries(axes, transposed)), itertools.cycle(VARIANTS), strict=False
    )
    return [
        CONVOLUTIONS[axes, transposed](4, 6, kernel, **variant, dtype=torch.float64, **geometry)  # type: ignore[arg-type]
        for (kernel, geometry), variant in found
    ]


def maps(conv: Convolution, sizes: tuple[int, ...] = (9, 7, 8)) -> Tensor:
    return torch.randn(2, conv.in_channels, *sizes[: ConvSpec.of(conv).axes], dtype=conv.weight.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", FLAT, ids=name_of)
def test_exact_at_full_rank_and_the_same_merged(kind: tuple[int, bool], form: str) -> None:
    for conv in convs(*kind):
        layer, x = SeparableConv.from_conv(conv, form=form, rank=10**6), maps(conv)
        assert type(layer) is SEPARABLE[kind]
        torch.testing.assert_close(layer.weight, conv.weight.detach(), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(layer(x[0]), conv(x[0]), rtol=1e-9, atol=1e-9)
        merged = layer.merged()
        assert type(merged) is CONVOLUTIONS[kind]
        assert ConvSpec.of(merged) == ConvSpec.of(conv) == layer.spec == ConvSpec.from_json(layer.spec.to_json())
        torch.testing.assert_close(merged(x), conv(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", FLAT, ids=name_of)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_merged_equals_separable_and_costs_are_what_runs(
    kind: tuple[int, bool], form: str, ranks: dict[str, int]
) -> None:
    for conv in convs(*kind):
        layer, x = SeparableConv.from_conv(conv, form=form, **ranks), maps(conv)
        torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-9, atol=1e-9)
        if conv.bias is not None:
            continue
        for counted, module in ((layer.spec.macs, conv), (None, layer)):
            with FlopCounterMode(display=False) as counter:
                y = module(x[:1])
            sizes = tuple(x.shape[2:]), tuple(y.shape[2:])
            macs = form_named(form).macs(layer.spec, layer.components, *sizes)
            assert (
                2 * (macs if counted is None else counted(layer.spec.slides_over(*sizes)))
                == counter.get_total_flops()
            )
        assert form_named(form).params(layer.spec, layer.components) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", FLAT, ids=name_of)
def test_a_layer_of_its_own(kind: tuple[int, bool], form: str) -> None:
    arguments: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2, "dilation": 2}
    if kind[1]:
        arguments["output_padding"] = 1
    layer, dense = SEPARABLE[kind](4, 6, 3, **arguments, form=form, rank=2), CONVOLUTIONS[kind](4, 6, 3, **arguments)  # type: ignore[arg-type]
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                 "padding_mode", "transposed", "output_padding"):  # fmt: skip
        assert getattr(layer, name) == getattr(dense, name)
    x = maps(dense)
    assert layer(x).shape == dense(x).shape
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.stride = dense.stride = (1,) * kind[0]
    layer.output_padding = dense.output_padding = (0,) * kind[0]
    assert layer(x).shape == dense(x).shape
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_transposed_layers_may_be_told_the_size_of_their_output(axes: int, form: str) -> None:
    conv = CONVOLUTIONS[axes, True](4, 6, 3, stride=2, padding=1, dtype=torch.float64)  # type: ignore[arg-type]
    layer, x = SeparableConv.from_conv(conv, form=form, rank=10**6), maps(conv)
    for further in (0, 1):
        size = [2 * side - 1 + further for side in x.shape[2:]]
        for given in (size, torch.Size([2, 6, *size])):
            torch.testing.assert_close(layer(x, output_size=given), conv(x, output_size=given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("kind", FLAT, ids=name_of)
def test_scale_and_shift_are_absorbed_and_the_kernel_takes_factors(
    kind: tuple[int, bool], form: str, ranks: dict[str, int]
) -> None:
    for groups in (1, 2):
        conv = CONVOLUTIONS[kind](4, 6, 3, stride=2, groups=groups, dtype=torch.float64)  # type: ignore[arg-type]
        layer, x = SeparableConv.from_conv(conv, form=form, **ranks), maps(conv)
        scale, shift = torch.randn(2, 6, dtype=torch.float64)
        each = (-1, *[1] * kind[0])
        expected = layer(x) * scale.view(each) + shift.view(each)
        layer.absorb(scale, shift)
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
        rows = scale.reshape(groups, -1).repeat_interleave(4 // groups, 0) if kind[1] else scale.unsqueeze(1)
        wanted = layer.weight.detach() * rows.reshape(*rows.shape, *[1] * kind[0])
        layer.weight = wanted
        torch.testing.assert_close(layer.weight, wanted, rtol=1e-9, atol=1e-12)
        with pytest.raises(AttributeError, match=f"the weight of a {SEPARABLE[kind].__name__}"):
            layer.weight = torch.randn_like(wanted)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("form", ["dw-pw", "pw-dw"])
def test_repeated_is_another_way_to_run_the_same(axes: int, form: str) -> None:
    layer = SEPARABLE[axes, False](4, 6, 3, padding=1, groups=2, form=form, rank=2, dtype=torch.float64)
    x = maps(layer.merged())
    expected = layer(x)
    layer.arrangement = "repeated"
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="repeated"):
        SEPARABLE[axes, True](4, 6, 3, form=form, rank=2).arrangement = "repeated"


def test_one_number_stands_for_all_axes() -> None:
    assert ConvSpec(4, 6, (3, 3, 3), (2,)).stride == (2, 2, 2)
    assert SeparableConv.of(ConvSpec(4, 6, (5,), (2,)), form="dw-pw").stride == (2,)
    with pytest.raises(ValueError, match="for 3 axes: want one number, or one for each"):
        ConvSpec(4, 6, (3, 3, 3), (2, 2))


def test_channels_are_found_from_the_end() -> None:
    x = torch.arange(6.0).reshape(1, 3, 2)
    assert torch.equal(ChannelGather([2, 0], width=3, axes=1)(x), x[:, [2, 0]])
