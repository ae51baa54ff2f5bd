"""Split layers go through torch.jit.script, one by one and inside of models."""

from __future__ import annotations

import io
import itertools
import warnings

import pytest
import torch
from models import awakened, small_net
from timm.layers import Conv2dSame
from torch import Tensor, nn

import convsplit
from convsplit.forms import FORMS
from convsplit.layers import SeparableConv

KINDS = [
    nn.Conv2d(6, 12, 3, padding=1, groups=3), nn.Conv1d(6, 12, 5, stride=2), nn.Conv3d(6, 4, 3),
    nn.Conv2d(6, 12, 3, padding="same", padding_mode="reflect"), nn.ConvTranspose2d(6, 12, 4, stride=2),
    nn.ConvTranspose1d(6, 12, 3), nn.Conv2d(12, 12, 1),
]  # fmt: skip


def scripted(model: nn.Module) -> nn.Module:
    """What a fresh process would load."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_every_form(conv: nn.Module) -> None:
    pointwise = conv.kernel_size == (1, 1)
    ranks = ({"rank": 2}, {"components": 6})
    for form, how, bias in itertools.product(("pw-pw",) if pointwise else FORMS, ranks, (True, False)):
        layer = SeparableConv.from_conv(conv, form=form, **how)
        layer.bias = torch.randn(layer.out_channels) if bias else None
        x = torch.randn(2, layer.in_channels, *[9] * layer.axes)
        compiled = scripted(layer)
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(compiled.double()(x.double()), layer.double()(x.double()))
        assert type(layer) in convsplit.layers.separable.SEPARABLE.values()  # scripting changes nothing


def test_padding_by_the_inputs_size() -> None:
    layer = convsplit.convert(Conv2dSame(6, 12, 3, stride=2), exact=True)
    compiled = scripted(layer)
    for size in (8, 9, 11):
        x = torch.randn(1, 6, size, size + 1)
        torch.testing.assert_close(compiled(x), layer(x))


class Upscaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)), output_size=[x.shape[2], x.shape[3]])


@pytest.mark.parametrize("build", [small_net, Upscaling])
@pytest.mark.parametrize("form", FORMS)
def test_whole_models(build: type[nn.Module], form: str) -> None:
    converted = convsplit.convert(awakened(build()), forms=form, rank=1).eval()
    compiled, images = scripted(converted), torch.randn(2, 3, 16, 16)
    assert any(isinstance(m, SeparableConv) for m in converted.modules())
    with torch.no_grad():
        for _ in range(3):  # the first calls of a scripted model are profiled, later ones compiled
            torch.testing.assert_close(compiled(images), converted(images))
