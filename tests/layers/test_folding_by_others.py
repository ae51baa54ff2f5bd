"""Batch norm folded into split layers by the code of libraries, each by its own call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import convsplit
from convsplit.forms import FORMS
from convsplit.layers import SeparableConv, SeparableConv2d

Fold = Callable[[nn.Module, nn.Module], nn.Module]


def by_ultralytics(conv: nn.Module, norm: nn.Module) -> nn.Module:
    utils = pytest.importorskip("ultralytics.utils.torch_utils")
    return utils.fuse_conv_and_bn(conv, norm)


def by_quantisation(conv: nn.Module, norm: nn.Module) -> nn.Module:
    return torch.ao.quantization.fuse_modules(nn.Sequential(conv, norm).eval(), [["0", "1"]])


def with_an_activation(conv: nn.Module, norm: nn.Module) -> nn.Module:
    fused = torch.ao.quantization.fuse_modules(nn.Sequential(conv, norm, nn.ReLU()).eval(), [["0", "1", "2"]])
    assert type(fused[0][1]) is nn.ReLU
    return fused[0][0]


FOLDS: list[Fold] = [fuse_conv_bn_eval, by_ultralytics, by_quantisation, with_an_activation]


def trained_norm(axes: int = 2, channels: int = 12) -> nn.Module:
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](channels)
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.5, 2)
    return norm.eval()


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("form", FORMS)
def test_it_stays_split_and_exact(fold: Fold, form: str) -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        for how in ({"rank": 2}, {"components": 17}):
            conv = nn.Conv2d(6, 12, 3, padding=1, bias=bias)
            layer, norm = SeparableConv2d.from_conv(conv, form=form, **how).eval(), trained_norm()
            x = torch.randn(2, 6, 9, 9)
            with torch.no_grad():
                expected = norm(layer(x))
                fused = fold(copy.deepcopy(layer), norm)
                torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
            assert any(isinstance(m, SeparableConv) for m in fused.modules())


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_quantisation_knows_other_axes(kind: type[nn.Module]) -> None:
    layer = SeparableConv.from_conv(kind(6, 12, 3), form="pw-dw", rank=1).eval()
    norm, x = trained_norm(layer.axes), torch.randn(2, 6, *[5] * layer.axes)
    with torch.no_grad():
        torch.testing.assert_close(by_quantisation(layer, norm)(x), norm(layer(x)), rtol=1e-4, atol=1e-5)


def test_quantisation_aware_training_is_refused_in_words() -> None:
    model = nn.Sequential(SeparableConv2d(6, 12, 3), nn.BatchNorm2d(12)).train()
    with pytest.raises(NotImplementedError, match=r"can be fused in eval mode alone: call model\.eval\(\)"):
        torch.ao.quantization.fuse_modules_qat(model, [["0", "1"]])


def test_a_convolution_built_from_the_numbers_is_the_merged_one() -> None:
    """As ultralytics did up to 8.3: nothing that is read tells what it is read for, so this is dense, and right."""
    layer, norm = SeparableConv2d(6, 12, 3, stride=2, padding=1, groups=3).eval(), trained_norm()
    fused = nn.Conv2d(
        layer.in_channels, layer.out_channels, kernel_size=layer.kernel_size, stride=layer.stride,
        padding=layer.padding, dilation=layer.dilation, groups=layer.groups, bias=True,
    )  # fmt: skip
    x = torch.randn(1, 6, 9, 9)
    with torch.no_grad():
        scale = torch.diag(norm.weight / torch.sqrt(norm.eps + norm.running_var))
        fused.weight.copy_(
            torch.mm(scale, layer.weight.clone().view(layer.out_channels, -1)).view(fused.weight.shape)
        )
        fused.bias.copy_(scale @ (layer.bias - norm.running_mean) + norm.bias)
        torch.testing.assert_close(fused(x), norm(layer(x)), rtol=1e-4, atol=1e-5)


# Methods that rebuild a block


def repvgg() -> nn.Module:
    timm = pytest.importorskip("timm")
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    torch.manual_seed(0)
    blocks = tuple(ByoBlockCfg(type="rep", d=1, c=16, s=2, gs=0) for _ in range(2))
    model = ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=16), num_classes=4).eval()
    assert timm
    return model


def test_a_model_that_has_become_dense_is_not_saved_without_a_word(tmp_path: Path) -> None:
    dense = nn.Sequential(SeparableConv2d(6, 12, 3).merged())
    with pytest.warns(convsplit.ConversionWarning, match="no layer of Sequential is split.*built dense layers"):
        convsplit.save(dense, tmp_path / "dense.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convsplit.save(nn.Sequential(SeparableConv2d(6, 12, 3)), tmp_path / "split.safetensors")


def test_what_would_be_built_anew_is_said_before_it_is() -> None:
    from timm.utils import reparameterize_model

    model, x = repvgg(), torch.randn(1, 3, 32, 32)
    with pytest.warns(convsplit.ConversionWarning, match=r"RepVggBlock\.reparameterize \(\S+, for one\)") as warned:
        converted = convsplit.convert(model, forms="dw-pw", rank=2)
    assert len(warned) == 1
    assert not any(isinstance(m, SeparableConv) for m in reparameterize_model(converted).modules())
    plain = reparameterize_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convsplit.convert(plain, forms="dw-pw", exact=True)
    assert any(isinstance(m, SeparableConv) for m in converted.modules())
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), rtol=1e-3, atol=1e-4)
