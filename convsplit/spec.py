"""The numbers of a convolution, and what it costs.

Shape letters, used in names, comments and docstrings throughout convsplit:

    N  batch                        K  positions of the kernel, of all its axes together
    O  output channels              R  components: the width of the depthwise stage
    I  input channels               G  groups
    H, W  height and width of a feature map

A tensor with a leading G counts O, I and R per group; a tensor or number without it counts the whole layer.

Convolutions have one, two or three axes, and what is said of each axis is a tuple as long. A transposed convolution has
the same kernel, with the roles of the maps exchanged: it slides over the map that comes in. A linear layer is a
convolution without axes, whose kernel has one position.

Costs are parameters (numbers stored) and MACs (multiply-accumulate operations; the "FLOPs" of some papers,
half the FLOPs of `torch.utils.flop_counter`). A bias costs O parameters and no MACs, as is usual.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

Convolution = nn.modules.conv._ConvNd  # the class that all convolutions of torch come from
Pair = tuple[int, int]
Axes = tuple[int, ...]  # one number for each axis
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

CONVOLUTIONS: dict[tuple[int, bool], type[Convolution]] = {  # by the number of axes, and whether it is transposed
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip
LAYERS: dict[tuple[int, bool], type[nn.Module]] = {(0, False): nn.Linear, **CONVOLUTIONS}


def is_plain(module: Any) -> TypeGuard[Convolution]:
    """Whether a module is a convolution of torch or a linear layer, which to type checkers is one more convolution."""
    return isinstance(module, Convolution | nn.Linear)


def per_axis(value: int | tuple[int, ...], axes: int) -> Axes:
    """Write one number for all axes, also one in a tuple, as a tuple: of two axes, 3 and (3,) become (3, 3)."""
    values = (value,) if isinstance(value, int) else tuple(value)
    values = values * axes if len(values) == 1 else values
    if len(values) != axes:
        raise ValueError(f"{value} for {axes} axes: want one number, or one for each of them")
    return tuple(int(each) for each in values)


def pair(value: int | tuple[int, ...]) -> Pair:
    """`per_axis` of two axes."""
    first, second = per_axis(value, 2)
    return (first, second)


def noun(specs: Iterable[ConvSpec | None]) -> str:
    """What one of some layers is called: a convolution, unless linear ones are among them.

    >>> noun([ConvSpec.of(nn.Conv2d(1, 1, 1))]), noun([ConvSpec.of(nn.Conv2d(1, 1, 1)), ConvSpec.of(nn.Linear(1, 1))])
    ('convolution', 'layer')
    """
    return "layer" if any(spec is not None and spec.axes == 0 for spec in specs) else "convolution"


def axes_of(conv: Any) -> int:
    """How many axes the kernel of a module has that is some kind of convolution."""
    for (axes, _), kind in LAYERS.items():
        if isinstance(conv, kind):
            return axes
    weight = getattr(conv, "weight", None)
    return weight.dim() - 2 if isinstance(weight, Tensor) else 2


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, shared ones counted once; lazy ones without a shape count nothing."""
    return sum(p.numel() for p in module.parameters() if not isinstance(p, UninitializedParameter))


@dataclass(frozen=True)
class ConvSpec:
    """The numbers that define a convolution, without its tensors. One number stands for all axes.

    >>> spec = ConvSpec.of(nn.Conv2d(64, 128, 3, padding=1))
    >>> spec.params, spec.macs((56, 56))
    (73856, 231211008)
    """

    in_channels: int
    out_channels: int
    kernel_size: Axes
    stride: Axes = (1,)
    padding: Axes | str = (0,)
    dilation: Axes = (1,)
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    bias: bool = False
    transposed: bool = False
    output_padding: Axes = (0,)

    def __post_init__(self) -> None:
        for name in ("stride", "padding", "dilation", "output_padding"):
            value = getattr(self, name)
            if not isinstance(value, str):
                object.__setattr__(self, name, per_axis(value, self.axes))

    @classmethod
    def of(cls, conv: Any) -> ConvSpec:
        """Read the numbers that run of a module that has the attributes of a convolution of torch.

        Channels and kernel size are those of the weight: it may have been exchanged, and attributes then lie.
        """
        axes, transposed = axes_of(conv), bool(getattr(conv, "transposed", False))
        weight = conv._parameters.get("weight")
        if axes == 0:
            O, I = (conv.out_features, conv.in_features) if weight is None or is_lazy(weight) else weight.shape
            return cls(in_channels=I, out_channels=O, kernel_size=(), bias=conv.bias is not None)
        if weight is None or is_lazy(weight) or weight.dim() != axes + 2:
            O, I, kernel_size = conv.out_channels, conv.in_channels, per_axis(conv.kernel_size, axes)
        else:
            across, per_group, *kernel = weight.shape
            O, I, kernel_size = across, per_group * conv.groups, per_axis(tuple(kernel), axes)
            O, I = (I, O) if transposed else (O, I)
        return cls(
            in_channels=I,
            out_channels=O,
            kernel_size=kernel_size,
            stride=per_axis(conv.stride, axes),
            padding=_padding_that_runs(conv, kernel_size),
            dilation=per_axis(conv.dilation, axes),
            groups=conv.groups,
            padding_mode=conv.padding_mode,
            bias=conv.bias is not None,
            transposed=transposed,
            output_padding=per_axis(getattr(conv, "output_padding", 0), axes),
        )

    def conv(
        self,
        kind: type[Convolution] | None = None,
        *,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
    ) -> Convolution:
        """A layer with these numbers; by default on the meta device, where it takes no memory."""
        made: Any = LAYERS[self.axes, self.transposed] if kind is None else kind
        conv: Convolution = made(**self.arguments(), device=device, dtype=dtype)
        return conv

    def arguments(self) -> dict[str, Any]:
        """The numbers under the names that torch's classes give them."""
        own = dict(vars(self))
        if self.axes == 0:
            return {"in_features": self.in_channels, "out_features": self.out_channels, "bias": self.bias}
        if not own.pop("transposed"):
            del own["output_padding"]
        return own

    @property
    def axes(self) -> int:
        """How many axes the kernel has."""
        return len(self.kernel_size)

    @property
    def positions(self) -> int:
        """K, the number of positions of the kernel."""
        return math.prod(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight: (O, I per group, kh, kw) or, transposed, (I, O per group, kh, kw)."""
        across, within = self.out_channels, self.in_channels
        across, within = (within, across) if self.transposed else (across, within)
        return (across, within // self.groups, *self.kernel_size)

    @property
    def weight_params(self) -> int:
        """Parameters of the weight alone; every form keeps the bias, so this is what splitting can save."""
        return math.prod(self.weight_shape)

    @property
    def params(self) -> int:
        """Parameters, bias included."""
        return self.weight_params + self.out_channels * self.bias

    def slides_over(self, input_size: Axes, output_size: Axes) -> Axes:
        """The size of the map at each position of which the whole kernel is applied."""
        return input_size if self.transposed else output_size

    def macs(self, size: Axes) -> int:
        """MACs for one image where the map that the kernel slides over has this height and width: see `slides_over`."""
        return self.weight_params * math.prod(size)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; `from_json` reads them."""
        values = dict(vars(self))
        if not self.transposed:
            del values["transposed"], values["output_padding"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ConvSpec:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)


def padding_around(conv: Convolution) -> list[int]:
    """What `conv` pads its input with: columns before and after, rows before and after, as `F.pad` takes them.

    In other modes than "zeros" this was worked out when the module was made, and an edited `padding` does not count.
    """
    axes = axes_of(conv)
    if axes == 0:
        return []
    if conv.padding_mode != "zeros":
        return list(conv._reversed_padding_repeated_twice)
    kernel_size = tuple(conv.weight.shape[2:]) if conv.weight.dim() > 2 else conv.kernel_size
    return _around(conv.padding, per_axis(kernel_size, axes), per_axis(conv.dilation, axes))


def _padding_that_runs(conv: Convolution, kernel_size: Axes) -> Axes | str:
    axes = len(kernel_size)
    given = conv.padding if isinstance(conv.padding, str) else per_axis(conv.padding, axes)
    if conv.padding_mode == "zeros":
        return given
    around = list(conv._reversed_padding_repeated_twice)
    candidates: tuple[Axes | str, ...] = (given, tuple(around[-2::-2]), "same")
    fits = (each for each in candidates if _around(each, kernel_size, per_axis(conv.dilation, axes)) == around)
    return next(fits, given)


def _around(padding: tuple[int, ...] | str | int, kernel_size: Axes, dilation: Axes) -> list[int]:
    axes = len(kernel_size)
    if padding == "valid":
        return [0, 0] * axes
    if not isinstance(padding, str):
        return [side for each in reversed(per_axis(padding, axes)) for side in (each, each)]
    totals = [step * (size - 1) for size, step in zip(kernel_size, dilation, strict=True)]
    # "same": where a total is odd, torch puts the larger half at the end.
    return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
