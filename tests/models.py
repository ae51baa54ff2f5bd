"""Small models of many kinds, shared by the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class UNet(nn.Module):
    """Two levels down and up again, with skip connections by concatenation and a transposed convolution."""

    def __init__(self, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.down1 = self._block(3, width)
        self.down2 = self._block(width, 2 * width)
        self.bottom = self._block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = self._block(4 * width, 2 * width)
        self.up1 = nn.Upsample(scale_factor=2, mode="nearest")
        self.join1 = self._block(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        bottom = self.bottom(nn.functional.max_pool2d(second, 2))
        second = self.join2(torch.cat([second, self.up2(bottom)], dim=1))
        return self.head(self.join1(torch.cat([first, self.up1(second)], dim=1)))

    @staticmethod
    def _block(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1), nn.ReLU(),
        )  # fmt: skip


class Aliased(nn.Module):
    """One convolution under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.first
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(self.first(x)).relu())


class Tied(nn.Module):
    """Two linear layers that share a weight, beside a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.encode = nn.Linear(8, 8)
        self.decode = nn.Linear(8, 8)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(self.conv(x).mean((2, 3))))


def small_net(*, bias: bool = True) -> nn.Sequential:
    """Convolutions of several kinds: strided, dilated, grouped, unusual paddings, and some that stay dense."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, (3, 5), padding="same", padding_mode="reflect", bias=bias), nn.SiLU(),
        nn.Conv2d(24, 24, 3, padding=2, dilation=2, groups=2, bias=bias), nn.BatchNorm2d(24),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=bias), nn.Conv2d(24, 16, 1, bias=bias),
    )  # fmt: skip


def awakened(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with batch-norm statistics and gains of a trained net, so that no layer is an identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def assert_same_model(one: nn.Module, other: nn.Module, images: Tensor = IMAGES) -> None:
    """The same state, and the same outputs to the last digit."""
    state, again = one.state_dict(), other.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(state[name], again[name]) for name in state)
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(images), other.eval()(images), rtol=0, atol=0)
