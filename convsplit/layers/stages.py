"""Stages of split layers that are no convolutions: padding by the input's size, picking and adding up channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convsplit.spec import Pair, pair


@fx.wrap
def pad_same(x: Tensor, kernel_size: Pair, stride: Pair, dilation: Pair) -> Tensor:
    """Zeros around [..., H, W] so that a convolution's output is H / stride by W / stride, rounded up.

    An odd number of rows or columns puts the extra one at the end, as TensorFlow does.
    """
    height = _missing(x.shape[-2], kernel_size[0], stride[0], dilation[0])
    width = _missing(x.shape[-1], kernel_size[1], stride[1], dilation[1])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def _missing(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Zeros along one axis, on both sides together."""
    # Rounded up without negative numbers: where sizes are symbols, ONNX divides towards zero and Python does not.
    return max(0, ((size + stride - 1) // stride - 1) * stride + (kernel_size - 1) * dilation + 1 - size)


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

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (some call conv(input=x))
        return super().forward(self.pad(input))


class ChannelIndex(nn.Module):
    """The channel [R] that each component belongs to, out of `width` channels in equal groups of a map with `axes`.

    These numbers are structure. Moving averages of weights run over parameters, buffers and the state_dict, in floating
    point, and cut off what they get; so the numbers are neither parameter nor buffer, and the state_dict holds a copy
    of them, which is rounded when it is loaded. No cast reaches them, nor `to_empty`: they only follow the device.

    >>> ChannelIndex([0, 0, 1, 3], width=4).numbers
    (0, 0, 1, 3)
    """

    axes = 2

    def __init__(
        self, numbers: Sequence[int], width: int, groups: int = 1, device: torch.device | str | None = None,
        *, axes: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.groups, self.axes = width, groups, axes
        self.channels = torch.empty(0, dtype=torch.long)
        self.renumber(numbers, torch.empty(0, device=device).device)

    def renumber(self, numbers: Sequence[int], device: torch.device | str | None = None) -> None:
        """Exchange the numbers; they stay on their device unless another is given."""
        device = self.channels.device if device is None else device
        self.numbers = tuple(numbers)
        vars(self)["channels"] = torch.tensor(self.numbers, dtype=torch.long, device=device)

    def __setattr__(self, name: str, value: Any) -> None:
        """Loaders of other libraries assign what a state_dict holds by name; that must not leave `numbers` behind."""
        if name == "channels" and "channels" in vars(self) and isinstance(value, Tensor) and not value.is_meta:
            numbers = value.detach().flatten().double().round().tolist()
            if problem := self.problem(numbers):
                raise ValueError(f"channels {problem}")
            self.renumber([int(number) for number in numbers], value.device)
        else:
            super().__setattr__(name, value)

    def problem(self, numbers: Sequence[float]) -> str:
        """Why these cannot be the channels; empty where they can."""
        if len(numbers) != len(self.numbers):
            return f"{len(numbers)} channels for {len(self.numbers)} components"
        step = len(numbers) // self.groups
        per_group = self.width // self.groups
        inside = (n == n and 0 <= n < self.width and n // per_group == i // step for i, n in enumerate(numbers))
        return "" if all(inside) else f"names channels outside of their group (it has {self.width} in all)"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChannelIndex:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.channels.device)).device
        if device != self.channels.device:
            self.renumber(self.numbers, device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}channels"] = self.channels if keep_vars else self.channels.clone()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = f"{prefix}channels"
        own = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        found = state_dict.get(key)
        if found is None:
            missing_keys.append(key)
        elif not isinstance(found, Tensor):
            error_msgs.append(f"{key} is a {type(found).__name__}, want a tensor of channel numbers")
        elif not found.is_meta:
            numbers = found.flatten().double().round().tolist()
            if problem := self.problem(numbers):
                error_msgs.append(f"{key} {problem}")
            else:
                self.renumber([int(number) for number in numbers])

    @property
    def dim(self) -> int:
        """Where the channels of a map are, counted from its end."""
        return -1 - self.axes

    def _on(self, x: Tensor) -> Tensor:
        """The numbers where the input is: replicas and shards are moved by their parameters and buffers alone."""
        elsewhere = isinstance(x, Tensor) and x.device != self.channels.device
        return self.channels.to(x.device) if elsewhere else self.channels


class ChannelGather(ChannelIndex):
    """Pick input channels, so that one true depthwise stage can give channels unequal multiplicities."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return torch.index_select(x, -1 - self.axes, self.channels.to(x.device))
        return torch.index_select(x, self.dim, self._on(x))


class ChannelSum(ChannelIndex):
    """Add each channel to the output channel it belongs to, and the bias: ChannelGather's transpose."""

    def __init__(
        self, numbers: Sequence[int], width: int, groups: int = 1, bias: Tensor | None = None,
        device: torch.device | str | None = None, *, axes: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(numbers, width, groups, device, axes=axes)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(x)
        bias = cast("Tensor | None", self.bias)
        start = x.new_zeros(self.width) if bias is None else bias.to(x.dtype)
        # Broadcasting instead of reading x.shape: it works with and without a batch, and fx can trace it. A view, not
        # a sum with zeros: quantisers would take that for a layer's output and round the bias to eight bits.
        start, _ = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
            start.view(-1, *[1] * self.axes), x.narrow(self.dim, 0, 1)
        )
        if torch.onnx.is_in_onnx_export() and torch._C._get_tracing_state() is not None:
            return self._by_gathers(start, x)
        return torch.index_add(start, self.dim, self._on(x), x)

    def _scripted(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[-1 - self.axes] = self.width
        start = torch.zeros(shape, dtype=x.dtype, device=x.device)
        if self.bias is not None:
            start = start + self.bias.to(x.dtype).view([-1] + [1] * self.axes)  # type: ignore[operator]
        return torch.index_add(start, -1 - self.axes, self.channels.to(x.device), x)

    def _by_gathers(self, start: Tensor, x: Tensor) -> Tensor:
        """The same without adding to one place twice, which ONNX's older exporter refuses: ever the j-th of all."""
        members: list[list[int]] = [[] for _ in range(self.width)]
        for place, channel in enumerate(self.numbers):
            members[channel].append(place)
        nothing = len(self.numbers)  # the number of the channel of zeros that is appended
        padded = torch.cat([x, torch.zeros_like(x.narrow(self.dim, 0, 1))], self.dim)
        for j in range(max(len(mine) for mine in members)):
            places = [mine[j] if j < len(mine) else nothing for mine in members]
            start = start + padded.index_select(self.dim, torch.as_tensor(places, device=x.device))
        return start
