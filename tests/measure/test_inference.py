"""for_inference: the same outputs with batch norm gone, whatever stands between; and the result exports."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convsplit
from convsplit import SeparableConv2d
from convsplit.measure import deployment


def trained(net: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Batch norm with statistics as a training leaves them."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return net.to(dtype).eval()


class Block(nn.Module):
    """A residual block, whose first convolution another branch reads too when `forked`."""

    def __init__(self, forked: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8, affine=False)
        self.forked = forked

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.bn2(self.conv2(self.bn1(y).relu()))
        return (z + y if self.forked else z + x).relu()


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


def outputs_equal(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(second(x), first(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
@pytest.mark.parametrize("how", ["even", "uneven", "dense"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folds_into_every_kind_of_layer(form: str, how: str, groups: int, bias: bool) -> None:
    conv: nn.Module = nn.Conv2d(8, 12, 3, padding=1, groups=groups, bias=bias, dtype=torch.float64)
    if how == "even":
        conv = SeparableConv2d.from_conv(conv, form=form, rank=2)
    elif how == "uneven":
        conv = SeparableConv2d.from_conv(conv, form=form, components=18)
    net = trained(nn.Sequential(conv, nn.BatchNorm2d(12), nn.ReLU()))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    deployed = convsplit.for_inference(net)
    assert norms(deployed) == 0
    outputs_equal(net, deployed, torch.randn(2, 8, 7, 7, dtype=torch.float64))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not deployed.training


def test_blocks_fold_where_nothing_else_reads_the_value() -> None:
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    for forked, left in ((False, 0), (True, 1)):
        net = trained(nn.Sequential(Block(forked), Block(forked)))
        converted = convsplit.convert(net, forms="dw-pw", rank=2)
        deployed = convsplit.for_inference(converted)
        assert norms(deployed) == 2 * left
        outputs_equal(converted, deployed, x)


def test_what_may_not_be_folded_is_left() -> None:
    shared = nn.BatchNorm2d(8)
    twice = nn.Sequential(nn.Conv2d(8, 8, 3), shared, nn.Conv2d(8, 8, 3), shared)
    conv = nn.Conv2d(8, 8, 3)
    repeated = nn.Sequential(conv, nn.BatchNorm2d(8), conv, nn.ReLU())
    tied = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    tied[2].weight = tied[0].weight
    momentary = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    hooked = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    hooked[0].register_forward_hook(lambda module, args, output: output * 2)
    for net in (twice, repeated, tied, momentary, hooked):
        deployed = convsplit.for_inference(trained(net))
        assert norms(deployed) == norms(net)
        outputs_equal(net, deployed, torch.randn(2, 8, 9, 9, dtype=torch.float64))


class Choosy(nn.Module):
    """Cannot be traced; its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
        self.other = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Any:
        return self.body(x) if x.sum() > 0 else self.body(-x)


class Tapping(Choosy):
    """Looks at what passes between the convolution and the batch norm of one part."""

    def forward(self, x: Tensor) -> Any:
        y = self.body[0](x if x.sum() > 0 else -x)
        return y, self.body[1](y), self.other(x)


@pytest.mark.parametrize(("kind", "left"), [(Choosy, 0), (Tapping, 1)])
@pytest.mark.parametrize("split", [False, True])
def test_parts_fold_where_outputs_are_seen_to_stay(
    kind: type[nn.Module], left: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment, "SECONDS", 0.05)
    net = trained(kind())
    net = convsplit.convert(net, exact=True, forms="dw-pw") if split else net
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    for inputs, remaining in ((None, 2), (x, left)):
        deployed = convsplit.for_inference(net, inputs)
        assert type(deployed) is kind
        assert norms(deployed) == remaining
        with torch.no_grad():
            for one, other in zip(net(x), deployed(x), strict=True):
                torch.testing.assert_close(one, other)


def test_with_inputs_layout_and_arrangement_are_measured() -> None:
    net = trained(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)), torch.float32)
    converted = convsplit.convert(net, rank=2, forms="dw-pw")
    deployed = convsplit.for_inference(converted, torch.randn(1, 16, 12, 12))
    assert deployed[0].arrangement in ("stages", "repeated", "by image")
    with torch.no_grad():
        x = torch.randn(3, 16, 10, 10)
        torch.testing.assert_close(deployed(x), converted(x), rtol=1e-4, atol=1e-4)


def test_what_is_deployed_exports(tmp_path) -> None:
    net = trained(nn.Sequential(Block(), Block()), torch.float32)
    deployed = convsplit.for_inference(convsplit.convert(net, forms=["dw-pw", "pw-dw"], rank=2))
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        wanted = deployed(x)
        torch.testing.assert_close(torch.export.export(deployed, (x,)).module()(x), wanted)
        torch.testing.assert_close(torch.jit.trace(deployed, x)(x), wanted)
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        torch.onnx.export(deployed, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1  # see export_paths.py
        session = runtime.InferenceSession(tmp_path / "net.onnx", options)
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_folds_too() -> None:
    net = trained(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), torch.bfloat16)
    deployed = convsplit.for_inference(net)
    x = torch.randn(2, 8, 9, 9, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), net(x), rtol=0.05, atol=0.1)


# Norms of libraries


def with_activation() -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    return layers.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout, eps=1e-3)


def without_activation() -> nn.Module:
    return pytest.importorskip("timm.layers").BatchNormAct2d(8, apply_act=False)


def frozen_with_activation() -> nn.Module:
    return pytest.importorskip("timm.layers").FrozenBatchNormAct2d(8, act_layer=nn.Hardswish, eps=1e-2)


def frozen() -> nn.Module:
    return pytest.importorskip("torchvision.ops").FrozenBatchNorm2d(8, eps=1e-3)


def of_transformers() -> nn.Module:
    return pytest.importorskip("transformers.models.detr.modeling_detr").DetrFrozenBatchNorm2d(8)


NORMS = [with_activation, without_activation, frozen_with_activation, frozen, of_transformers]


def lived_in(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if getattr(module, "running_var", None) is not None:
            for name in ("running_mean", "running_var", "weight", "bias"):
                getattr(module, name).data.uniform_(0.5, 2)
    return net.double().eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("split", [False, True])
def test_norms_of_libraries_fold_and_keep_their_activation(norm: Any, split: bool) -> None:
    net = lived_in(nn.Sequential(nn.Conv2d(8, 8, 3), norm(), nn.Conv2d(8, 8, 1, bias=False), norm()))
    net = convsplit.convert(net, forms="pw-dw", rank=2) if split else net
    deployed = convsplit.for_inference(net)
    assert not any("BatchNorm" in type(module).__name__ for module in deployed.modules())
    expected = {"with_activation": nn.SiLU, "frozen_with_activation": nn.Hardswish}.get(norm.__name__, nn.Identity)
    assert any(isinstance(module, expected) for module in deployed[1].modules())
    outputs_equal(net, deployed, torch.randn(2, 8, 7, 7, dtype=torch.float64))


class Odd(nn.Module):
    """Holds what a frozen norm holds, and does something else."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, 1, 1) + x.abs() ** self.power


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_what_only_looks_like_a_norm_is_not_believed(power: float) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), Odd(power)).double().eval()
    deployed = convsplit.for_inference(net)
    assert isinstance(deployed[1], Odd) == (power > 0)
    outputs_equal(net, deployed, torch.randn(2, 8, 7, 7, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_b0", "repvgg_a0"])
def test_networks_of_timm_fold(name: str) -> None:
    timm = pytest.importorskip("timm")
    net = lived_in(timm.create_model(name))
    deployed = convsplit.for_inference(net)
    left = [each for each, module in deployed.named_modules() if "BatchNorm" in type(module).__name__]
    assert all(each.endswith("identity") for each in left)  # branches without a convolution before them
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        torch.testing.assert_close(deployed(x), net(x), rtol=1e-6, atol=1e-9)


def test_a_library_may_fold_what_is_folded() -> None:
    yolo = pytest.importorskip("ultralytics").YOLO("yolov8n.yaml").model
    net = lived_in(yolo).float()
    deployed = convsplit.for_inference(convsplit.convert(net, forms="dw-pw", rank=2))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = deployed(x)[0]
        torch.testing.assert_close(deployed.fuse(verbose=False)(x)[0], wanted, rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, SeparableConv2d) for module in deployed.modules())


def test_layouts_of_other_ranks_are_left_alone() -> None:
    net = nn.Sequential(nn.Conv3d(3, 16, 3), nn.BatchNorm3d(16), nn.Flatten(1, 2), nn.Conv2d(64, 16, 3)).eval()
    x = torch.randn(1, 3, 6, 8, 8)
    for each in (net, convsplit.convert(net, x)):
        deployed = convsplit.for_inference(each, x)
        with torch.no_grad():
            torch.testing.assert_close(deployed(x), each(x), rtol=1e-4, atol=1e-5)
