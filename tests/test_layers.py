"""SeparableConv2d by property, over products of everything a Conv2d can be."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from convsplit import SeparableConv2d
from convsplit.forms import FORMS
from convsplit.spec import ConvSpec

KERNELS = [(1, 3), (3, 3), (5, 5), (7, 1), (2, 2)]
GEOMETRY = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0)},
    {"padding": "same"},
    {"padding": "valid", "dilation": 2},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
    {"padding": 2, "padding_mode": "replicate"},
]
RANKS = [{"rank": 1}, {"rank": 2}, {"components": 18}]


def make_conv(kernel, geometry, *, groups=1, bias=True, dtype=torch.float64, channels=(6, 12)) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*channels, kernel, groups=groups, bias=bias, dtype=dtype, **geometry)


def image(conv: nn.Conv2d, size: int = 13) -> torch.Tensor:
    return torch.randn(2, conv.in_channels, size, size, dtype=conv.weight.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_exact_at_full_rank(form, kernel, geometry):
    for groups, bias in itertools.product((1, 2, 3), (True, False)):
        conv = make_conv(kernel, geometry, groups=groups, bias=bias)
        layer = SeparableConv2d.from_conv(conv, form=form, rank=10**6)
        x = image(conv)
        torch.testing.assert_close(layer.weight, conv.weight.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer(x), conv(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_merged_equals_separable(form, geometry, ranks):
    for kernel, groups, bias in itertools.product(KERNELS, (1, 2, 3), (True, False)):
        conv = make_conv(kernel, geometry, groups=groups, bias=bias)
        layer = SeparableConv2d.from_conv(conv, form=form, **ranks)
        merged, x = layer.merged(), image(conv)
        assert type(merged) is nn.Conv2d
        assert ConvSpec.of(merged) == ConvSpec.of(conv) == layer.spec
        torch.testing.assert_close(merged.weight.detach(), layer.weight)
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(form, dtype):
    conv = make_conv(3, {"padding": 1}, dtype=dtype)
    layer = SeparableConv2d.from_conv(conv, form=form, rank=10**6)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    tolerance = 32 * torch.finfo(dtype).eps
    error = (layer.weight.double() - conv.weight.double()).norm() / conv.weight.double().norm()
    assert error < tolerance
    assert layer.merged().weight.dtype == dtype


@pytest.mark.parametrize("form", FORMS)
def test_factors_are_balanced(form):
    conv = make_conv(3, {})
    conv.weight.data *= 1e4
    layer = SeparableConv2d.from_conv(conv, form=form, components=18)
    factors = layer.factors()
    norms = [factors.spatial.norm(dim=2)]
    norms += [] if factors.outputs is None else [factors.outputs.norm(dim=1)]
    norms += [] if factors.inputs is None else [factors.inputs.norm(dim=2)]
    for one, other in itertools.pairwise(norms):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_a_layer_of_its_own(form, ranks):
    layer = SeparableConv2d(6, 12, (3, 5), 2, (1, 2), groups=3, form=form, **ranks)
    x = torch.randn(2, 6, 9, 9)
    dense = nn.Conv2d(6, 12, (3, 5), 2, (1, 2), groups=3)
    assert layer(x).shape == dense(x).shape
    assert layer.weight.shape == dense.weight.shape
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
                 "padding_mode", "transposed", "output_padding"):  # fmt: skip
        assert getattr(layer, name) == getattr(dense, name)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    torch.testing.assert_close(layer(x[0]), layer(x[:1])[0])


def test_gradients_flow_through_the_merged_kernel():
    layer = SeparableConv2d(4, 8, 3, form="pw-dw-pw", rank=5)
    layer.weight.square().sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if "bias" not in name)


def test_copies_pickles_and_state_dicts():
    layer = SeparableConv2d.from_conv(make_conv(3, {}), form="pw-dw", components=20)
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), layer(x))
    other = SeparableConv2d(6, 12, 3, form="pw-dw", components=20, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x))


def test_from_conv_keeps_what_the_module_carries():
    conv = make_conv(3, {"padding": 1}).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    layer = SeparableConv2d.from_conv(conv, form="dw-pw", rank=2)
    assert not layer.training
    assert not layer.depthwise.weight.requires_grad
    assert layer.bias.requires_grad
    x = image(conv).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_from_conv_leaves_random_state_and_conv_alone():
    conv = make_conv(3, {})
    before, state = conv.weight.clone(), torch.get_rng_state()
    SeparableConv2d.from_conv(conv, form="pw-dw-pw", rank=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "pw-pw"}, "unknown form 'pw-pw'; the forms are 'dw-pw'"),
        ({"form": "dw-pw", "rank": 0}, "rank is at least 1"),
        ({"form": "pw-dw-pw"}, "wants rank="),
        ({"form": "dw-pw", "rank": 1, "components": 6}, "not both"),
        ({"form": "dw-pw", "components": 7, "groups": 2}, "positive multiple of groups=2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SeparableConv2d(6, 12, 3, **arguments)


def test_not_a_number_is_refused():
    conv = make_conv(3, {})
    conv.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        SeparableConv2d.from_conv(conv, form="dw-pw")
