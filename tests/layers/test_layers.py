"""SeparableConv2d by property, over products of everything a Conv2d can be."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

from convsplit import SeparableConv2d
from convsplit.forms import FORMS
from convsplit.layers import SeparableConv
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


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
@pytest.mark.parametrize("channels", [1, 4])
def test_from_conv_takes_no_more_components_than_are_exact(form, channels):
    conv = nn.Conv2d(channels, 8, 3).double()
    layer = SeparableConv2d.from_conv(conv, form=form, components=1000)
    assert layer.components < 100
    assert torch.allclose(layer.weight, conv.weight)


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
        ({"form": "dw-dw"}, "unknown form 'dw-dw'; the forms are 'dw-pw'"),
        ({"form": "pw-pw", "rank": 2}, "for 1x1 kernels; this one has 9 positions"),
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


# Channel numbers


def uneven(form: str) -> SeparableConv2d:
    torch.manual_seed(0)
    return SeparableConv2d.from_conv(
        make_conv(3, {"padding": 1}, channels=(64, 64)), form=form, components=200
    ).eval()


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw"])
def test_averages_leave_channel_numbers_alone(form):
    """Averages run over parameters, buffers and state_dicts, and cut off what they write to integers."""
    from timm.utils import ModelEmaV2
    from torch.optim.swa_utils import AveragedModel

    layer, x = uneven(form), torch.randn(1, 64, 6, 6, dtype=torch.float64)
    ema = ModelEmaV2(layer, decay=0.9995)
    average = AveragedModel(layer, use_buffers=True, avg_fn=lambda mine, new, n: 0.9995 * mine + (1 - 0.9995) * new)
    for _ in range(5):
        ema.update(layer)
        average.update_parameters(layer)
    by_hand = copy.deepcopy(layer)
    by_hand.load_state_dict({key: 0.9995 * t + (1 - 0.9995) * t for key, t in layer.state_dict().items()})
    for each in (ema.module, average.module, by_hand):
        torch.testing.assert_close(each(x), layer(x))


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw"])
def test_channel_numbers_follow_the_device_and_nothing_else(form):
    layer = uneven(form)
    index = layer.stages.get("gather", layer.stages.get("sum"))
    numbers = index.numbers
    assert not dict(layer.named_buffers())
    assert layer.half().double().stages == layer.stages
    moved = copy.deepcopy(layer).to("meta")
    assert next(m for m in moved.modules() if hasattr(m, "channels")).channels.is_meta
    moved.to_empty(device="cpu").load_state_dict(layer.state_dict())
    x = torch.randn(1, 64, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(moved(x), layer(x))
    assert index.numbers == numbers == tuple(index.channels.tolist())


def test_channel_numbers_that_cannot_be_are_refused():
    layer = SeparableConv2d(6, 12, 3, groups=2, components=10)
    state = layer.state_dict()
    for wrong in ([0] * 9, [0] * 10, [6] * 10, [-1] * 10, [float("nan")] * 10):
        with pytest.raises(RuntimeError, match=r"gather.channels (names channels outside|\d+ channels for 10)"):
            layer.load_state_dict({**state, "gather.channels": torch.tensor(wrong)})
    del state["gather.channels"]
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d])
@pytest.mark.parametrize("how", ["unbatched", "fixed", "dynamic"])
def test_the_older_onnx_exporter(form, kind, how, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    for bias in (True, False):
        layer = SeparableConv.from_conv(kind(6, 12, 3, bias=bias), form=form, components=17).eval()
        x = torch.randn(*([] if how == "unbatched" else [2]), 6, *[7] * layer.axes)
        free = {"x": {0: "n", 2: "h"}} if how == "dynamic" else None
        file = tmp_path / "layer.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls it deprecated
            torch.onnx.export(layer, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=free)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for each in [x] if free is None else [x, torch.randn(3, 6, 9, *[7] * (layer.axes - 1))]:
            found = torch.tensor(session.run(None, {"x": each.numpy()})[0])
            torch.testing.assert_close(found, layer(each).detach())


# What is written to the kernel

FACTORS = torch.tensor([2.0, 0.5, 0.0, -1.0, 1e-3, 1.0, 3.0, 0.0, 7.0, -0.1, 1.5, 1.0], dtype=torch.float64)


def rows(layer):
    return FACTORS.to(layer.depthwise.weight.dtype).view(-1, 1, 1, 1)


def scale_each_row(layer):
    for row, factor in zip(layer.weight.data, FACTORS, strict=True):
        row.mul_(factor)


WRITES = {
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * rows(layer))),
    "registered": lambda layer: layer.register_parameter("weight", nn.Parameter(layer.weight * rows(layer))),
    "data assigned": lambda layer: setattr(layer.weight, "data", layer.weight.data * rows(layer)),
    "data in place": lambda layer: layer.weight.data.mul_(rows(layer)),
    "in place": torch.no_grad()(lambda layer: layer.weight.mul_(rows(layer))),
    "copied": torch.no_grad()(lambda layer: layer.weight.copy_(layer.weight * rows(layer))),
    "as an output": torch.no_grad()(lambda layer: torch.mul(layer.weight.clone(), rows(layer), out=layer.weight)),
    "in a list": torch.no_grad()(lambda layer: torch._foreach_mul_([layer.weight], [rows(layer)])),
    "through a view": lambda layer: layer.weight.detach().view(12, -1).mul_(rows(layer).view(12, 1)),
    "row by row": scale_each_row,
    "in inference mode": torch.inference_mode()(lambda layer: layer.weight.mul_(rows(layer))),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_factor_per_output_channel_is_absorbed(write, dtype):
    for form, ranks in itertools.product(FORMS, RANKS):
        layer = SeparableConv2d.from_conv(make_conv(3, {"padding": 1}, dtype=dtype), form=form, **ranks)
        wanted, bias = (layer.weight * rows(layer)).detach(), layer.bias.detach().clone()
        write(layer)
        tolerance = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(layer.weight.detach(), wanted, rtol=tolerance, atol=tolerance)
        assert torch.equal(layer.bias, bias)


OTHER_WRITES = {
    "added": lambda layer: layer.weight.data.add_(0.1),
    "initialised": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "masked": lambda layer: layer.weight.data.mul_(torch.ones(3, 3).tril()),
    "one value": lambda layer: layer.weight.data[0, 0].fill_(3.0),
    "not a number": lambda layer: layer.weight.data.mul_(float("nan")),
    "infinite": lambda layer: layer.weight.data.mul_(float("inf")),
    "of another shape": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(4))),
    "of another type": lambda layer: setattr(layer.weight, "data", layer.weight.data.half()),
    "none": lambda layer: setattr(layer, "weight", None),
}


@pytest.mark.parametrize("write", OTHER_WRITES.values(), ids=OTHER_WRITES.keys())
def test_anything_else_is_refused_and_changes_nothing(write):
    for form, ranks in itertools.product(FORMS, RANKS):
        layer = SeparableConv2d.from_conv(make_conv(3, {}), form=form, **ranks)
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises((AttributeError, RuntimeError), match=r"layer\.merged\(\) .* or change the stages \("):
            write(layer)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_writes_that_a_parameter_would_not_take_either():
    layer = SeparableConv2d(6, 12, 3)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        layer.weight.mul_(2)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.detach().numpy()[0] = 0


def test_a_kernel_is_a_plain_tensor_otherwise():
    layer = SeparableConv2d(6, 12, 3, form="pw-dw", components=20)
    kernel = layer.weight
    assert isinstance(kernel, torch.Tensor)
    assert not isinstance(kernel, nn.Parameter)
    assert type(kernel * 2) is type(kernel.clone()) is type(copy.deepcopy(kernel.detach())) is torch.Tensor
    assert type(pickle.loads(pickle.dumps(kernel))) is torch.Tensor
    own = nn.Parameter(kernel)
    assert type(own) is nn.Parameter
    before = layer.weight.clone()
    with torch.no_grad():
        own.add_(1)
        kernel.clone().add_(1)
    assert torch.equal(layer.weight, before)
    torch.optim.SGD([own], 0.1).step()


def test_two_writes_to_one_kernel():
    layer = SeparableConv2d(4, 4, 3)
    kernel, before = layer.weight.data, layer.weight.detach().clone()
    kernel.mul_(2)
    kernel.div_(4)
    torch.testing.assert_close(layer.weight.detach(), before / 2)


def folds():
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    def by_assignment(conv, norm):
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )

    def by_data(conv, norm):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - scale * norm.running_mean
        conv.weight.data = conv.weight.data * scale.view(-1, 1, 1, 1)
        if conv.bias is None:
            conv.register_parameter("bias", nn.Parameter(shift))
        else:
            conv.bias.data = conv.bias.data * scale + shift

    def by_a_factor(conv, norm):
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        bias = conv.bias if conv.bias is not None else torch.zeros_like(norm.running_mean)
        conv.weight = nn.Parameter(conv.weight * factor.reshape([conv.out_channels, 1, 1, 1]))
        conv.bias = nn.Parameter((bias - norm.running_mean) * factor + norm.bias)

    return by_assignment, by_data, by_a_factor


@pytest.mark.parametrize("fold", folds())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folded_by_others(fold, form, bias):
    for ranks in RANKS:
        layer = SeparableConv2d.from_conv(make_conv(3, {"padding": 1}, bias=bias), form=form, **ranks)
        norm = nn.BatchNorm2d(12).double().eval()
        for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            tensor.uniform_(0.5, 2)
        norm.weight.data[3] = 0
        x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
        expected = norm(layer(x))
        fold(layer, norm)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.merged()(x), expected)


def test_the_bias_may_be_assigned():
    for form in FORMS:
        layer = SeparableConv2d(4, 4, 3, form=form, components=6)
        own = nn.Parameter(torch.ones(4))
        layer.bias = own
        assert layer.bias is own
        assert own in set(layer.parameters())
        layer.bias = None
        assert layer.bias is layer.merged().bias is None
        assert not layer.spec.bias
        layer.bias = torch.ones(4)
        assert layer.bias.requires_grad
        with pytest.raises(AttributeError, match=r"want a tensor \(4,\)"):
            layer.bias = torch.ones(3)


# Edited stages


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "edit",
    [
        {"padding": (2, 1)}, {"padding": 2, "dilation": 2}, {"stride": 2}, {"padding_mode": "reflect"},
        {"padding_mode": "circular", "padding": "same", "dilation": (1, 2)},
    ],
    ids=str,
)  # fmt: skip
def test_edited_geometry_counts(form, edit):
    conv = make_conv(3, {"padding": 1})
    layer, x = SeparableConv2d.from_conv(conv, form=form, rank=10**6), image(conv)
    for name, value in edit.items():
        setattr(layer, name, value)
    wanted = nn.Conv2d(6, 12, 3, dtype=torch.float64, **{"padding": 1, **edit})
    wanted.load_state_dict(conv.state_dict())
    torch.testing.assert_close(layer(x), wanted(x))
    assert layer.spec == ConvSpec.of(wanted) == ConvSpec.of(layer.merged())
    torch.testing.assert_close(layer.merged()(x), wanted(x))


def test_stages_edited_by_themselves_are_read():
    layer = SeparableConv2d(4, 4, 3, padding=1)
    layer.depthwise.padding = layer.depthwise.dilation = (2, 2)
    x = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(layer.merged()(x), layer(x))
    layer.depthwise.bias = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="depthwise was given a bias"):
        layer.merged()
    other = SeparableConv2d(4, 4, 3)
    other.pointwise_out.stride = 2
    with pytest.raises(ValueError, match="pointwise_out was edited"):
        other.merged()


def hooked(stage):
    stage.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        lambda stage: torch.nn.utils.prune.l1_unstructured(stage, "weight", 0.3),
        torch.nn.utils.parametrizations.weight_norm,
    ],
)
@pytest.mark.parametrize("form", ["dw-pw", "pw-dw"])
@pytest.mark.parametrize("arrangement", ["repeated", "by image"])
def test_stages_that_do_more_are_called(change, form, arrangement):
    plain = SeparableConv2d(6, 12, 3, padding=1, form=form, rank=2)
    arranged = copy.deepcopy(plain)
    arranged.arrangement = arrangement
    x = torch.randn(2, 6, 7, 7)
    torch.testing.assert_close(arranged(x), plain(x))
    for layer in (plain, arranged):
        change(layer.depthwise)
    torch.testing.assert_close(arranged(x), plain(x), rtol=0, atol=0)


def test_one_channel_in_each_group_is_even_and_exact():
    for channels, groups in (((1, 12), 1), ((6, 24), 6)):
        conv = make_conv(3, {"padding": 1}, channels=channels, groups=groups)
        x = image(conv)
        for form, components in itertools.product(FORMS, range(groups, 5 * groups, groups)):
            layer = SeparableConv2d.from_conv(conv, form=form, components=components)
            torch.testing.assert_close(layer.merged()(x), layer(x))
            assert layer.even or form == "pw-dw"
        layer = SeparableConv2d.from_conv(conv, form="dw-pw", rank=9)
        torch.testing.assert_close(layer.weight.detach(), conv.weight.detach())
