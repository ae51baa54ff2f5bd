"""Stages of split layers that are no convolutions: padding by the input's size, picking and adding up channels."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convsplit.spec import Pair, pair


@fx.wrap
def pad_same(x: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """Zeros around [..., H, W] so that a convolution's output is H / stride by W / stride, rounded up.

    An odd number of rows or columns puts the extra one at the end, as TensorFlow does.
    """
    height, width = (
        max(0, (-(size // -s) - 1) * s + (k - 1) * d + 1 - size)
        for size, k, s, d in zip(x.shape[-2:], kernel_size, stride, dilation, strict=True)
    )
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class SamePad2d(nn.Module):
    """Zero padding by amounts that depend on the input's size: TensorFlow's "SAME" for strides above 1.

    >>> SamePad2d((3, 3), (2, 2))(torch.zeros(1, 1, 8, 9)).shape
    torch.Size([1, 1, 9, 11])
    """

    def __init__(self, kernel_size: int | Pair, stride: int | Pair = 1, dilation: int | Pair = 1) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = pair(kernel_size), pair(stride), pair(dilation)

    def forward(self, x: Tensor) -> Tensor:
        return pad_same(x, self.kernel_size, self.stride, self.dilation)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


class PaddedConv2d(nn.Conv2d):
    """A `Conv2d` whose input passes through a module `pad` first: what a split layer with that stage merges to."""

    pad: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class ChannelGather(nn.Module):
    """Pick input channels, so that one true depthwise stage can give channels unequal multiplicities."""

    channels: Tensor

    def __init__(self, channels: Tensor) -> None:
        super().__init__()
        self.register_buffer("channels", channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, -3, self.channels)


class ChannelSum(nn.Module):
    """Add each channel to the output channel it belongs to, and the bias: ChannelGather's transpose."""

    channels: Tensor

    def __init__(self, channels: Tensor, out_channels: int, bias: Tensor | None) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.register_buffer("channels", channels)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        bias = cast("Tensor | None", self.bias)
        start = x.new_zeros(self.out_channels) if bias is None else bias.to(x.dtype)
        # Broadcasting instead of reading x.shape: it works with and without a batch, and fx can trace it. A view, not
        # a sum with zeros: quantisers would take that for a layer's output and round the bias to eight bits.
        start, _ = torch.broadcast_tensors(start.view(-1, 1, 1), x.narrow(-3, 0, 1))  # type: ignore[no-untyped-call]
        return torch.index_add(start, -3, self.channels, x)
