"""The numbers of a convolution, and what it costs.

Shape letters, used in names, comments and docstrings throughout convsplit:

    N  batch                        K  positions of the kernel, kh * kw
    O  output channels              R  components: the width of the depthwise stage
    I  input channels               G  groups
    H, W  height and width of a feature map

A tensor with a leading G counts O, I and R per group; a tensor or number without it counts the whole layer.

Costs are parameters (numbers stored) and MACs (multiply-accumulate operations; the "FLOPs" of some papers,
half the FLOPs of `torch.utils.flop_counter`). A bias costs O parameters and no MACs, as is usual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

Pair = tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def pair(value: int | tuple[int, ...]) -> Pair:
    """Write one number for both axes, also one in a tuple, as two: 3 and (3,) become (3, 3)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    first, second = values * 2 if len(values) == 1 else values
    return (int(first), int(second))


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, shared ones counted once; lazy ones without a shape count nothing."""
    return sum(p.numel() for p in module.parameters() if not isinstance(p, UninitializedParameter))


@dataclass(frozen=True)
class ConvSpec:
    """The numbers that define a `Conv2d`, without its tensors.

    >>> spec = ConvSpec.of(nn.Conv2d(64, 128, 3, padding=1))
    >>> spec.params, spec.macs((56, 56))
    (73856, 231211008)
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    bias: bool = False

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ConvSpec:
        """Read the numbers that run of a module that has the attributes of `Conv2d`.

        Channels and kernel size are those of the weight: it may have been exchanged, and attributes then lie.
        """
        weight = conv._parameters.get("weight")
        if weight is None or isinstance(weight, UninitializedParameter) or weight.dim() != 4:
            O, I, kernel_size = conv.out_channels, conv.in_channels, pair(conv.kernel_size)
        else:
            O, I, kernel_size = weight.shape[0], weight.shape[1] * conv.groups, pair(tuple(weight.shape[2:]))
        return cls(
            in_channels=I,
            out_channels=O,
            kernel_size=kernel_size,
            stride=pair(conv.stride),
            padding=_padding_that_runs(conv, kernel_size),
            dilation=pair(conv.dilation),
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            bias=conv.bias is not None,
        )

    def conv(
        self,
        kind: type[nn.Conv2d] = nn.Conv2d,
        *,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
    ) -> nn.Conv2d:
        """A convolution with these numbers; by default on the meta device, where it takes no memory."""
        return kind(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias, self.padding_mode, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def positions(self) -> int:
        """K, the number of positions of the kernel."""
        return math.prod(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight: (O, I per group, kh, kw)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight_params(self) -> int:
        """Parameters of the weight alone; every form keeps the bias, so this is what splitting can save."""
        return math.prod(self.weight_shape)

    @property
    def params(self) -> int:
        """Parameters, bias included."""
        return self.weight_params + self.out_channels * self.bias

    def macs(self, output_hw: Pair) -> int:
        """MACs for one image whose output has this height and width."""
        return self.weight_params * math.prod(output_hw)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; `from_json` reads them."""
        padding = self.padding if isinstance(self.padding, str) else list(self.padding)
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": padding,
            "dilation": list(self.dilation),
            "groups": self.groups,
            "padding_mode": self.padding_mode,
            "bias": self.bias,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConvSpec:
        """Read what `to_json` wrote."""
        pairs = {key: pair(tuple(data[key])) for key in ("kernel_size", "stride", "dilation")}
        padding = data["padding"] if isinstance(data["padding"], str) else pair(tuple(data["padding"]))
        return cls(**{**data, **pairs, "padding": padding})


def padding_around(conv: nn.Conv2d) -> list[int]:
    """What `conv` pads its input with: columns before and after, rows before and after, as `F.pad` takes them.

    In other modes than "zeros" this was worked out when the module was made, and an edited `padding` does not count.
    """
    if conv.padding_mode != "zeros":
        return list(conv._reversed_padding_repeated_twice)
    return _around(conv.padding, pair(tuple(conv.weight.shape[2:])), pair(conv.dilation))


def _padding_that_runs(conv: nn.Conv2d, kernel_size: Pair) -> Pair | str:
    given = conv.padding if isinstance(conv.padding, str) else pair(conv.padding)
    if conv.padding_mode == "zeros":
        return given
    left, _, top, _ = around = list(conv._reversed_padding_repeated_twice)
    candidates: tuple[Pair | str, ...] = (given, (top, left), "same")
    fits = (each for each in candidates if _around(each, kernel_size, pair(conv.dilation)) == around)
    return next(fits, given)


def _around(padding: tuple[int, ...] | str | int, kernel_size: Pair, dilation: Pair) -> list[int]:
    if padding == "valid":
        return [0, 0, 0, 0]
    if not isinstance(padding, str):
        rows, columns = pair(padding)
        return [columns, columns, rows, rows]
    totals = [step * (size - 1) for size, step in zip(kernel_size, dilation, strict=True)]
    # "same": where a total is odd, torch puts the larger half at the end.
    return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
