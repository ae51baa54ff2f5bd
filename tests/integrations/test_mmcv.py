"""mmcv's blocks and its folding of batch norm."""

import copy

import pytest
import torch
from torch import nn

import convsplit
from convsplit.layers.separable import SeparableConv

mmcv = pytest.importorskip("mmcv.cnn", exc_type=ImportError)

X = torch.rand(4, 8, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def split() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*(mmcv.ConvModule(i, 16, 3, padding=1, norm_cfg={"type": "BN"}) for i in (8, 16))).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return convsplit.convert(net, X, calibration=X, forms="dw-pw")


def layers(model: nn.Module, kind: type) -> int:
    return sum(isinstance(layer, kind) for layer in model.modules())


def test_fuse_conv_bn_leaves_split_layers_and_their_norms_and_for_inference_folds_them(split: nn.Module):
    with torch.no_grad():
        wanted = split(X)
        fused = mmcv.fuse_conv_bn(copy.deepcopy(split))  # it looks for nn.Conv2d beside a norm
        assert layers(fused, SeparableConv) == layers(fused, nn.BatchNorm2d) == 2
        assert torch.equal(fused(X), wanted)
        folded = convsplit.for_inference(split, X)
        assert layers(folded, SeparableConv) == 2
        assert not layers(folded, nn.BatchNorm2d)
        assert torch.allclose(folded(X), wanted, atol=1e-5)


def test_its_training_with_folded_norms_stops_at_a_split_layer(split: nn.Module):
    block = split[0]
    block.turn_on_efficient_conv_bn_eval(mmcv.bricks.conv_module.efficient_conv_bn_eval_forward)
    with pytest.raises(AttributeError, match="_conv_forward"):
        block(X)
