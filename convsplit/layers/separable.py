"""SeparableConv2d: a convolution written as depthwise and pointwise stages.

    dw-pw      depthwise I -> R   pointwise R -> O
    pw-dw      pointwise I -> R   depthwise R -> O
    pw-dw-pw   pointwise I -> R   depthwise R -> R   pointwise R -> O

Every stage is a plain `nn.Conv2d` (so that quantisers, counters and fusers know what to do) that can be looked up
by name: `pointwise_in`, `depthwise`, `pointwise_out`. Stride, padding, dilation and padding mode belong to the
depthwise stage alone, and so does padding that depends on the input's size, which is a stage `pad` of its own. The
bias belongs to the last stage: a bias before the depthwise stage would meet its zero padding and be wrong along the
borders.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convsplit.forms import Factors, Form, form_named, grouped, ungrouped
from convsplit.layers.kernel import kernel_of
from convsplit.layers.stages import ChannelGather, ChannelIndex, ChannelSum, PaddedConv2d
from convsplit.precision import widened
from convsplit.spec import ConvSpec, PaddingMode, Pair, padding_around, pair
from convsplit.structure import Structure

# Ways to run the same stages; neither parameters nor their names depend on it (figures: benchmarks/results/latency.md).
#   stages    as they are
#   repeated  where channels have m > 1 components each: m true depthwise convolutions, one for the j-th component of
#             all channels, their results added up. Kernels for m > 1 leave the fast paths of CPU libraries.
#   by image  all stages of one image, then of the next: what passes between stages stays in the cache, and is too
#             small for memory to be fetched from the system again. Recorded graphs have the stages as they are.
ARRANGEMENTS = ("stages", "repeated", "by image")

_CONVOLUTIONS = ("pointwise_in", "depthwise", "pointwise_out")
_GEOMETRY = ("stride", "padding", "dilation", "padding_mode")  # what belongs to the depthwise stage alone
_STAGES = ("gather", "pointwise_in", "pad", "depthwise", "pointwise_out", "sum")


class SeparableConv2d(nn.Module):
    """A depthwise-separable convolution with the arguments and the metadata of `nn.Conv2d`.

    Args:
        form: `"dw-pw"`, `"pw-dw"` or `"pw-dw-pw"`.
        rank: the depth multiplier of dw-pw and pw-dw (1 is the classical depthwise-separable convolution), the
            number of components per group of pw-dw-pw (the CP rank). Default 1, except for pw-dw-pw.
        components: instead of `rank`, R: the width of the depthwise stage. dw-pw and pw-dw may then give channels
            unequal multiplicities, for any R that is a multiple of `groups`.
        device, dtype and all others: as for `nn.Conv2d`.

    Shape: input [N, in_channels, H, W], output [N, out_channels, H', W'] as for `nn.Conv2d`.

    Raises:
        ValueError: an unknown form, a rank below 1, components that do not fit the groups.

    It is no `nn.Conv2d`: code that asks for one goes on to initialise, prune or quantise a stored weight, and finds the
    stages, which are; `unused_layers` tells where a `forward` picks its layers that way.

    Source: Howard et al. 2017 (1704.04861); Chollet 2017 (1610.02357); Sandler et al. 2018 (1801.04381).

    >>> layer = SeparableConv2d(8, 16, 3, padding=1, form="pw-dw", rank=2)
    >>> layer(torch.zeros(1, 8, 5, 5)).shape
    torch.Size([1, 16, 5, 5])
    >>> layer.weight.shape                      # the dense kernel the stages add up to
    torch.Size([16, 8, 3, 3])
    """

    depthwise: nn.Conv2d
    transposed = False
    output_padding = (0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: str = "dw-pw",
        rank: int | None = None,
        components: int | None = None,
    ) -> None:
        super().__init__()
        self._spec = ConvSpec(
            in_channels, out_channels, pair(kernel_size), pair(stride),
            padding if isinstance(padding, str) else pair(padding),
            pair(dilation), groups, padding_mode, bias,
        )  # fmt: skip
        self.form = form
        self._arrangement = "stages"
        structure = Structure.of(self._spec, form, rank=rank, components=components)
        self.components, self.even = structure.components, structure.even
        for name, stage in self._make_stages(device, dtype).items():
            self.add_module(name, stage)

    def _make_stages(
        self, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> OrderedDict[str, nn.Module]:
        spec, form, R = self._spec, form_named(self.form), self.components
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        gathers = not self.even and not form.expands
        sums = not self.even and not form.projects
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        if gathers:
            numbers = _spread(R, spec.in_channels, spec.groups)
            stages["gather"] = ChannelGather(numbers, spec.in_channels, spec.groups, device)
        if form.expands:
            stages["pointwise_in"] = nn.Conv2d(spec.in_channels, R, 1, groups=spec.groups, bias=False, **factory)
        reads = R if form.expands or gathers else spec.in_channels
        writes = R if form.projects or sums else spec.out_channels
        stages["depthwise"] = nn.Conv2d(
            reads, writes, spec.kernel_size, spec.stride, spec.padding, spec.dilation,
            groups=min(reads, writes), padding_mode=spec.padding_mode,
            bias=spec.bias and writes == spec.out_channels and not (form.projects or sums), **factory,
        )  # fmt: skip
        if form.projects:
            stages["pointwise_out"] = nn.Conv2d(
                R, spec.out_channels, 1, groups=spec.groups, bias=spec.bias, **factory
            )
        if sums:
            bias = torch.zeros(spec.out_channels, **factory) if spec.bias else None
            numbers = _spread(R, spec.out_channels, spec.groups)
            stages["sum"] = ChannelSum(numbers, spec.out_channels, spec.groups, bias, device)
        return stages

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (some call conv(input=x))
        if self._arrangement == "stages" or not self._stages_are_plain():
            return self._in_order(input)
        if self._arrangement == "repeated":
            return self._repeated(input)
        if not _is_traced(input) and input.dim() == 4 and len(input) > 1:
            return torch.cat([self._in_order(image) for image in torch.split(input, 1)])
        return self._in_order(input)

    def _stages_are_plain(self) -> bool:
        """Whether the convolutions do no more than their weights say: other modules and hooks want to be called."""
        convolutions = [stage for name, stage in self.stages.items() if name in _CONVOLUTIONS]
        return all(type(stage) is nn.Conv2d for stage in convolutions) and not any(
            hooks
            for stage in convolutions
            for hooks in (
                stage._forward_pre_hooks, stage._forward_hooks, stage._backward_hooks, stage._backward_pre_hooks,
            )
        )  # fmt: skip

    def _in_order(self, x: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        return x

    def _repeated(self, x: Tensor) -> Tensor:
        """The sum over j of the j-th components of all channels: true depthwise convolutions, m of them."""
        stages, m, G = self.stages, cast(int, self.rank), self.groups
        pad = stages.get("pad", nn.Identity())
        filters = self.depthwise.weight
        total: Tensor | None = None
        for j in range(m):
            bias = self.bias if j == 0 else None
            if "pointwise_out" in stages:
                y = self.depthwise._conv_forward(pad(x), filters[j::m], None)
                y = F.conv2d(y, cast(nn.Conv2d, stages["pointwise_out"]).weight[:, j::m], bias, groups=G)
            else:
                y = F.conv2d(x, cast(nn.Conv2d, stages["pointwise_in"]).weight[j::m], groups=G)
                y = self.depthwise._conv_forward(pad(y), filters[:, j : j + 1], bias)
            total = y if total is None else total + y
        return cast(Tensor, total)

    @property
    def arrangement(self) -> str:
        """How the stages run, one of `ARRANGEMENTS`; may be set. Parameters, `state_dict` and `weight` stay."""
        return self._arrangement

    @arrangement.setter
    def arrangement(self, name: str) -> None:
        if name not in ARRANGEMENTS:
            raise ValueError(f"unknown arrangement {name!r}; there are {', '.join(map(repr, ARRANGEMENTS))}")
        if not self.can_run(name):
            raise ValueError(f'"{name}" is for equal multiplicities above 1; this is {self.extra_repr()}')
        self._arrangement = name

    def can_run(self, arrangement: str) -> bool:
        """Whether this layer has an arrangement: "repeated" is for equal multiplicities above 1."""
        form = form_named(self.form)
        two_stages = not (form.expands and form.projects)
        return arrangement != "repeated" or (two_stages and self.even and cast(int, self.rank) > 1)

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The stages by name, in the order in which they run."""
        return {name: cast(nn.Module, self._modules[name]) for name in _STAGES if name in self._modules}

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        form: str = "dw-pw",
        rank: int | None = None,
        components: int | None = None,
        seed: int = 0,
    ) -> SeparableConv2d:
        """The best approximation of `conv` in this form, on its device, in its dtype and memory format.

        `conv` is not changed. `rank` and `components` as for the class; `seed` fixes the start of CP.

        Raises:
            ValueError: as the class; also where the weight holds NaN or infinite values.

        >>> conv = nn.Conv2d(8, 16, 3).double()
        >>> exact = SeparableConv2d.from_conv(conv, form="dw-pw", rank=9)     # rank 9 = 3 x 3: no error
        >>> torch.allclose(exact.weight, conv.weight)
        True
        """
        structure = Structure.of(ConvSpec.of(conv), form, rank=rank, components=components)
        return cls.empty_like(conv, **vars(structure)).initialise_from(conv, seed=seed)

    @classmethod
    def empty_like(
        cls,
        conv: nn.Conv2d,
        *,
        form: str,
        components: int,
        even: bool = False,
        bias: bool | None = None,
        pad: nn.Module | None = None,
    ) -> SeparableConv2d:
        """An untrained layer of the shape of `conv`, zeros inside: to be filled from a checkpoint or from factors.

        Keeps what the module carries besides numbers: device, dtype, memory format, `requires_grad`, train or eval.
        `pad`: a module that pads the input further, by amounts known only when it runs, such as `SamePad2d`.
        """
        spec = ConvSpec.of(conv)
        layer = cls(
            spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, spec.padding, spec.dilation,
            spec.groups, spec.bias if bias is None else bias, spec.padding_mode,
            device="meta", dtype=conv.weight.dtype, form=form,
            **_rank_arguments(form_named(form), spec, components, even),
        )  # fmt: skip
        # Built on meta and only then given memory: the default initialisation would move the user's random state.
        if conv.weight.device.type != "meta":
            layer.to_empty(device=conv.weight.device)
        for parameter in layer.parameters():
            parameter.requires_grad_(conv.weight.requires_grad)
            if not parameter.is_meta:
                parameter.data.zero_()
        if layer.bias is not None and conv.bias is not None:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        if _is_channels_last(conv.weight):
            layer.to(memory_format=torch.channels_last)
        if pad is not None:  # it treats all channels alike, so it may follow a pointwise stage, which has no bias
            layer.add_module("pad", pad)
        return layer.train(conv.training)

    @torch.no_grad()
    def initialise_from(self, conv: nn.Conv2d, *, seed: int = 0) -> SeparableConv2d:
        """Fill the stages with the best factors of the weight of `conv`, and copy its bias. Returns the layer.

        Raises:
            ValueError: the weight holds NaN or infinite values.
        """
        if not conv.weight.isfinite().all():
            raise ValueError(f"the weight of {conv} holds NaN or infinite values and cannot be factorised")
        # float32 at least: half precision has no linear algebra, and its rounding would enter the factors twice.
        kernel = grouped(widened(conv.weight.detach()), self.groups).contiguous()
        self.load_factors(form_named(self.form).factorise(kernel, self.components, even=self.even, seed=seed))
        if conv.bias is not None:
            cast(Tensor, self.bias).copy_(conv.bias)
        return self

    @torch.no_grad()
    def load_factors(self, factors: Factors) -> None:
        """Copy factors of a kernel [G, O, I, K] into the stages; their dtype and device are kept."""
        stages = self.stages
        depthwise = self.depthwise.weight
        depthwise.copy_(factors.spatial.reshape(depthwise.shape))
        for name, factor in (("pointwise_in", factors.inputs), ("pointwise_out", factors.outputs)):
            if factor is not None:
                cast(nn.Conv2d, stages[name]).weight.copy_(factor.flatten(0, 1)[:, :, None, None])
        for name, width in (("gather", self.in_channels), ("sum", self.out_channels)):
            if name in stages and factors.channels is not None:
                cast(ChannelIndex, stages[name]).renumber(_offset(factors.channels, width).tolist())

    def factors(self) -> Factors:
        """The stages as factors of the kernel [G, O, I, K]; gradients flow through."""
        stages, G = self.stages, self.groups
        R = self.components // G
        spatial = self.depthwise.weight.reshape(G, R, -1)
        inputs = outputs = channels = None
        if "pointwise_in" in stages:
            inputs = cast(nn.Conv2d, stages["pointwise_in"]).weight.reshape(G, R, -1)
        if "pointwise_out" in stages:
            outputs = cast(nn.Conv2d, stages["pointwise_out"]).weight.reshape(G, -1, R)
        if inputs is None or outputs is None:
            width = self.in_channels if inputs is None else self.out_channels
            index = cast("ChannelIndex | None", stages.get("gather", stages.get("sum")))
            numbers = _spread(self.components, width, G) if index is None else index.numbers
            channels = torch.tensor(numbers, device=spatial.device).reshape(G, R) % (width // G)
        return Factors(spatial, outputs, inputs, channels)

    @property
    def weight(self) -> Tensor:
        """The dense kernel [O, I per group, kh, kw] the stages add up to: computed, differentiable.

        What is written to it, by assignment, through `.data` or in place, reaches the last stage where it is the old
        kernel times a factor per output channel, which is what folding batch norm writes; anything else raises.
        """
        return kernel_of(self._kernel(), self._write_in_place)

    def _kernel(self, factors: Factors | None = None) -> Tensor:
        G, factors = self.groups, factors or self.factors()
        kernel = factors.kernel(self.out_channels // G, self.in_channels // G)
        return ungrouped(kernel, self.kernel_size)

    def _write_in_place(self, new: Tensor) -> None:
        if problem := self._take_weight(new):
            raise RuntimeError(problem)

    @torch.no_grad()
    def _take_weight(self, new: Any) -> str:
        """Scale the last stage so that the kernel becomes `new`; or say why that cannot be, and change nothing."""
        found = self._factors_between(new)
        if isinstance(found, Tensor):
            self._scale_outputs(found)
            return ""
        return (
            f"the weight of a SeparableConv2d is computed from its stages, and takes only what is the old one times a "
            f"factor per output channel; {found}. Write to layer.merged() and put that in its place (or convert after "
            f"this step), or change the stages ({', '.join(self.stages)})"
        )

    def _factors_between(self, new: Any) -> Tensor | str:
        """The factors [O] that lead from the present kernel to `new`, if rounding is all that they leave."""
        old = self._kernel()
        if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
            given = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
            return f"it is {tuple(old.shape)} {old.dtype}, this is {given}"
        if "weight" not in self._last_convolution()._parameters:
            return "the weight of its last stage is computed, too"
        before, after = old.flatten(1).double(), new.to(old.device).flatten(1).double()
        peak, where = before.abs().max(1, keepdim=True)
        factors = torch.where(peak > 0, after.gather(1, where) / before.gather(1, where), 1.0)
        # Stages are rounded, too, and components may cancel: what counts is the size of what is added up.
        added_up = self._kernel(self.factors().absolute()).flatten(1).double()
        rounding = 8 * torch.finfo(old.dtype).eps * factors.abs() * added_up
        equal = (after - factors * before).abs() <= rounding  # false for NaN
        return factors.squeeze(1) if bool(equal.all()) else "this is not"

    def _last_convolution(self) -> nn.Module:
        return self.stages.get("pointwise_out", self.depthwise)

    def _scale_outputs(self, factors: Tensor) -> None:
        """Multiply output channels by factors [O], in the last stage that has weights."""
        if "sum" in self.stages:
            index = cast(ChannelSum, self.stages["sum"])
            factors = factors[torch.tensor(index.numbers, device=factors.device)]
        weight = cast(nn.Conv2d, self._last_convolution()).weight
        weight.mul_(factors.to(weight).view(-1, 1, 1, 1))

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the last stage; may be assigned, also None."""
        *_, last = self.stages.values()
        return cast("nn.Parameter | None", last.bias)

    def _take_bias(self, new: Any) -> None:
        shape = tuple(getattr(new, "shape", ()))
        if new is not None and (not isinstance(new, Tensor) or shape != (self.out_channels,)):
            raise AttributeError(
                f"bias of {shape or type(new).__name__}; want a tensor ({self.out_channels},) or None"
            )
        if new is not None and not isinstance(new, nn.Parameter):
            new = nn.Parameter(new.detach().clone(), self.depthwise.weight.requires_grad)
        *_, last = self.stages.values()
        last.register_parameter("bias", new)

    def add_bias(self) -> nn.Parameter:
        """The bias of the last stage, made of zeros where the layer has none yet."""
        if self.bias is None:
            like = self.depthwise.weight
            self._take_bias(torch.zeros(self.out_channels, dtype=like.dtype, device=like.device))
        return cast(nn.Parameter, self.bias)

    @torch.no_grad()
    def absorb(self, scale: Tensor, shift: Tensor) -> None:
        """Take scale [O] and shift [O] of the output channels into the last stage, in place: y becomes y·scale + shift.

        This is how batch norm in eval mode is folded.
        """
        bias = self.add_bias()
        bias.copy_(bias * scale + shift)
        self._scale_outputs(scale)

    def merged(self) -> nn.Conv2d:
        """The one `Conv2d` this layer equals, on the same device, in the same dtype, memory format and mode.

        Raises:
            ValueError: a pointwise stage was edited into something that one convolution cannot equal.
        """
        if problem := self.edited_stages():
            raise ValueError(f"cannot be merged: {problem}")
        spec, first, pad = self.spec, self.depthwise.weight, self.stages.get("pad")
        conv = spec.conv(nn.Conv2d if pad is None else PaddedConv2d, dtype=first.dtype)
        if not first.is_meta:
            conv.to_empty(device=first.device)
            with torch.no_grad():
                # Multiply in float32 at least, so that half precision rounds the product once.
                factors = self.factors().to(torch.promote_types(first.dtype, torch.float32))
                kernel = factors.kernel(spec.out_channels // spec.groups, spec.in_channels // spec.groups)
                conv.weight.copy_(ungrouped(kernel, spec.kernel_size))
                if conv.bias is not None:
                    conv.bias.copy_(cast(Tensor, self.bias))
        conv.weight.requires_grad_(first.requires_grad)
        if conv.bias is not None:
            conv.bias.requires_grad_(cast(Tensor, self.bias).requires_grad)
        if any(_is_channels_last(p) for p in self.parameters()):
            conv.to(memory_format=torch.channels_last)
        if isinstance(conv, PaddedConv2d):
            conv.pad = copy.deepcopy(cast(nn.Module, pad))
        return conv.train(self.training)

    def edited_stages(self) -> str:
        """What was done to the stages that no single convolution can do; empty where they add up to one."""
        *_, last = self.stages.values()
        for name, stage in self.stages.items():
            if name not in _CONVOLUTIONS or not isinstance(stage, nn.Conv2d):
                continue
            if stage.bias is not None and stage is not last:
                return f"{name} was given a bias, which meets the padding before the last stage does"
            spec = ConvSpec.of(stage)
            mixes = (spec.kernel_size, spec.stride) == ((1, 1), (1, 1)) and padding_around(stage) == [0, 0, 0, 0]
            if name != "depthwise" and not mixes:
                return f"{name} was edited and is no pointwise convolution: {stage}"
        return ""

    @property
    def spec(self) -> ConvSpec:
        """The numbers of the convolution that this layer is now: its stages may have been edited since it was made."""
        depthwise, built = self.depthwise, replace(self._spec, bias=self.bias is not None)
        if not isinstance(depthwise, nn.Conv2d):
            return built
        runs = ConvSpec.of(depthwise)
        return replace(
            built, stride=runs.stride, padding=runs.padding, dilation=runs.dilation, padding_mode=runs.padding_mode
        )

    @property
    def built_spec(self) -> ConvSpec:
        """The numbers with which it was made; a bias may have come or gone since."""
        return replace(self._spec, bias=self.bias is not None)

    @property
    def rank(self) -> int | None:
        """The rank as given: multiplier or CP rank; None where channels have unequal multiplicities."""
        return self.components // form_named(self.form).channels(self._spec) if self.even else None

    @property
    def in_channels(self) -> int:
        return self._spec.in_channels

    @property
    def out_channels(self) -> int:
        return self._spec.out_channels

    @property
    def kernel_size(self) -> Pair:
        return self._spec.kernel_size

    @property
    def stride(self) -> Pair:
        return self.spec.stride

    @property
    def padding(self) -> Pair | str:
        return self.spec.padding

    @property
    def dilation(self) -> Pair:
        return self.spec.dilation

    @property
    def groups(self) -> int:
        return self._spec.groups

    @property
    def padding_mode(self) -> str:
        return self.spec.padding_mode

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if problem := self._take_weight(value):
                raise AttributeError(problem)
        elif name == "bias":
            self._take_bias(value)
        elif name in _GEOMETRY:
            self._set_geometry(name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module; `weight` and `bias` go where assigning them goes."""
        if name in ("weight", "bias"):
            setattr(self, name, param)
        else:
            super().register_parameter(name, param)

    def _set_geometry(self, name: str, value: Any) -> None:
        """Build the depthwise stage anew with another stride, padding, dilation or padding mode, around its tensors."""
        value = value if isinstance(value, str) else pair(value)
        made = replace(ConvSpec.of(self.depthwise), **{name: value}).conv()
        for each in (*_GEOMETRY, "_reversed_padding_repeated_twice"):
            setattr(self.depthwise, each, getattr(made, each))

    def extra_repr(self) -> str:
        s = self.spec
        rank = f"rank={self.rank}" if self.even else f"components={self.components}"
        text = f"{s.in_channels}, {s.out_channels}, kernel_size={s.kernel_size}, stride={s.stride}"
        text += f", padding={s.padding!r}" if s.padding not in ((0, 0), "valid") else ""
        text += f", dilation={s.dilation}" if s.dilation != (1, 1) else ""
        text += f", groups={s.groups}" if s.groups != 1 else ""
        text += f", padding_mode={s.padding_mode!r}" if s.padding_mode != "zeros" else ""
        text += ", bias=False" if not s.bias else ""
        return f"{text}, form={self.form!r}, {rank}"


def _is_traced(x: Tensor | fx.Proxy) -> bool:
    """Whether a graph is being recorded, which should not depend on the number of images."""
    recording = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return recording or torch.onnx.is_in_onnx_export() or isinstance(x, fx.Proxy)


def _rank_arguments(form: Form, spec: ConvSpec, components: int, even: bool) -> dict[str, int]:
    return {"rank": components // form.channels(spec)} if even else {"components": components}


def _spread(components: int, channels: int, groups: int) -> list[int]:
    """Channels [R] of components given out as evenly as possible, the same number in every group."""
    step, width = components // groups, channels // groups
    return [group * width + i * width // step for group in range(groups) for i in range(step)]


def _offset(channels: Tensor, width: int) -> Tensor:
    """Flatten channels [G, R] that count from each group's first to channels [R] of the whole layer."""
    groups = channels.shape[0]
    first = torch.arange(groups, device=channels.device).unsqueeze(1) * (width // groups)
    return (channels + first).flatten()


def _is_channels_last(weight: Tensor) -> bool:
    """Whether a weight is stored channels_last; shapes for which both layouts coincide do not count."""
    return (
        weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    )
