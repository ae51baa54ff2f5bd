"""Separable convolutions: one written as depthwise and pointwise stages, of one, two or three axes, transposed or not.

    dw-pw      depthwise I -> R   pointwise R -> O
    pw-dw      pointwise I -> R   depthwise R -> O
    pw-dw-pw   pointwise I -> R   depthwise R -> R   pointwise R -> O
    pw-pw      pointwise I -> R   pointwise R -> O                      of 1x1 kernels and of linear layers

Every stage is a plain convolution of torch, or linear layer (so that quantisers, counters and fusers know what to do),
that can be looked up by name: `pointwise_in`, `depthwise`, `pointwise_out`. Stride, padding, dilation and padding mode
belong to the depthwise stage alone (where there is none, to the first), and so does padding that depends on the input's
size, a stage `pad` of its own. Of a transposed convolution that stage is the transposed one. The bias belongs to the
last stage: a bias before the depthwise stage would meet its zero padding and be wrong along the borders.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convsplit.forms import Factors, Form, form_named, grouped, ungrouped
from convsplit.layers.kernel import kernel_of
from convsplit.layers.stages import ChannelGather, ChannelIndex, ChannelSum, PaddedConv2d
from convsplit.precision import widened
from convsplit.spec import LAYERS, Axes, Convolution, ConvSpec, PaddingMode, is_plain, padding_around, per_axis
from convsplit.structure import Structure

# Ways to run the same stages; neither parameters nor their names depend on it (figures: benchmarks/results/latency.md).
#   stages    as they are
#   repeated  where channels have m > 1 components each: m true depthwise convolutions, one for the j-th component of
#             all channels, their results added up. Kernels for m > 1 leave the fast paths of CPU libraries.
#   by image  all stages of one image, then of the next: what passes between stages stays in the cache, and is too
#             small for memory to be fetched from the system again. Recorded graphs have the stages as they are.
ARRANGEMENTS = ("stages", "repeated", "by image")

_CONVOLUTIONS = ("pointwise_in", "depthwise", "pointwise_out")
_GEOMETRY = ("stride", "padding", "dilation", "padding_mode", "output_padding")  # of the depthwise stage alone
_DENSE_STATE = (
    "is split here, and dense in the state_dict, as in the original model's: load it into that and convert it (anew, or"
    " with apply_plan), or let convsplit.restore(converted, state_dict, factorise=True) split its kernels as these are"
)
_STAGES = ("gather", "pointwise_in", "pad", "depthwise", "pointwise_out", "sum")


class SeparableConv(nn.Module):
    """A depthwise-separable convolution: what the classes for each number of axes have in common.

    `isinstance(layer, SeparableConv)` finds the split layers of a model, and `SeparableConv.from_conv` splits any
    convolution of torch.
    """

    axes: int
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Axes,
        stride: int | Axes = 1,
        padding: int | Axes | str = 0,
        dilation: int | Axes = 1,
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
        numbers: Any = {"stride": stride, "padding": padding, "dilation": dilation}
        spec = ConvSpec(
            in_channels, out_channels, per_axis(kernel_size, self.axes), **numbers, groups=groups, bias=bias,
            padding_mode=padding_mode,
        )  # fmt: skip
        self._build(spec, device, dtype, form=form, rank=rank, components=components)

    def _build(
        self, spec: ConvSpec, device: torch.device | str | None, dtype: torch.dtype | None, *, form: str,
        rank: int | None, components: int | None,
    ) -> None:  # fmt: skip
        self._spec = spec
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
        mixing = partial(ConvSpec, kernel_size=(1,) * spec.axes, groups=spec.groups)
        gathers = not self.even and not form.expands
        sums = not self.even and not form.projects
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        if gathers:
            numbers = _spread(R, spec.in_channels, spec.groups)
            stages["gather"] = ChannelGather(numbers, spec.in_channels, spec.groups, device, axes=spec.axes)
        if not form.filters:
            stages["pointwise_in"] = replace(spec, out_channels=R, bias=False).conv(**factory)
            stages["pointwise_out"] = mixing(R, spec.out_channels, bias=spec.bias).conv(**factory)
            return stages
        if form.expands:
            stages["pointwise_in"] = mixing(spec.in_channels, R).conv(**factory)
        reads = R if form.expands or gathers else spec.in_channels
        writes = R if form.projects or sums else spec.out_channels
        last = not (form.projects or sums)
        depthwise = replace(
            spec, in_channels=reads, out_channels=writes, groups=min(reads, writes), bias=spec.bias and last
        )
        stages["depthwise"] = depthwise.conv(**factory)
        if form.projects:
            stages["pointwise_out"] = mixing(R, spec.out_channels, bias=spec.bias).conv(**factory)
        if sums:
            bias = torch.zeros(spec.out_channels, **factory) if spec.bias else None
            numbers = _spread(R, spec.out_channels, spec.groups)
            stages["sum"] = ChannelSum(numbers, spec.out_channels, spec.groups, bias, device, axes=spec.axes)
        return stages

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (some call conv(input=x))
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(input, None)
        return self._run(input)

    def _scripted(self, x: Tensor, output_size: list[int] | None) -> Tensor:
        """The stages in the words that `torch.jit.script` compiles, which drops those that are not there."""
        if hasattr(self, "gather"):
            x = self.gather(x)  # type: ignore[operator]
        if hasattr(self, "pointwise_in"):
            x = self.pointwise_in(x)  # type: ignore[operator]
        if hasattr(self, "pad"):
            x = self.pad(x)  # type: ignore[operator]
        if hasattr(self, "depthwise"):
            x = self.depthwise(x)  # type: ignore[operator]
        if hasattr(self, "pointwise_out"):
            x = self.pointwise_out(x)  # type: ignore[operator]
        if hasattr(self, "sum"):
            x = self.sum(x)  # type: ignore[operator]
        return x

    def _run(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if self._arrangement == "stages" or not self._stages_are_plain():
            return self.through(self.stages, x, output_size)
        if self._arrangement == "repeated":
            return self._repeated(x)
        if not _is_traced(x) and x.dim() == self.axes + 2 and len(x) > 1:
            return torch.cat([self.through(self.stages, image, output_size) for image in torch.split(x, 1)])
        return self.through(self.stages, x, output_size)

    def through(self, names: Iterable[str], x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Run the stages of these names; `output_size` is what transposed convolutions may be told when called."""
        for name in names:
            stage = self._modules[name]
            assert stage is not None
            x = stage(x) if output_size is None or stage is not self.geometry else stage(x, output_size)
        return x

    def _stages_are_plain(self) -> bool:
        """Whether the convolutions do no more than their weights say: other modules and hooks want to be called."""
        convolutions = [stage for name, stage in self.stages.items() if name in _CONVOLUTIONS]
        return all(type(stage) in LAYERS.values() for stage in convolutions) and not any(
            hooks
            for stage in convolutions
            for hooks in (
                stage._forward_pre_hooks, stage._forward_hooks, stage._backward_hooks, stage._backward_pre_hooks,
            )
        )  # fmt: skip

    def _repeated(self, x: Tensor) -> Tensor:
        """The sum over j of the j-th components of all channels: true depthwise convolutions, m of them."""
        stages, m, G, depthwise = self.stages, cast(int, self.rank), self.groups, cast(nn.Conv2d, self.geometry)
        mix = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        pad = stages.get("pad", nn.Identity())
        filters = depthwise.weight
        total: Tensor | None = None
        for j in range(m):
            bias = self.bias if j == 0 else None
            if "pointwise_out" in stages:
                y = depthwise._conv_forward(pad(x), filters[j::m], None)
                y = mix(y, cast(Convolution, stages["pointwise_out"]).weight[:, j::m], bias, groups=G)
            else:
                y = mix(x, cast(Convolution, stages["pointwise_in"]).weight[j::m], groups=G)
                y = depthwise._conv_forward(pad(y), filters[:, j : j + 1], bias)
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
            what = "maps" if self.axes == 0 else "equal multiplicities above 1"
            raise ValueError(f'"{name}" is for {what}; this is {self.extra_repr()}')
        self._arrangement = name

    def can_run(self, arrangement: str) -> bool:
        """Whether this layer has an arrangement.

        "repeated" is for equal multiplicities above 1, not transposed, "by image" for maps.
        """
        if self.axes == 0:
            return arrangement == "stages"
        form = form_named(self.form)
        two_stages = not (form.expands and form.projects) and not self.transposed
        return arrangement != "repeated" or (two_stages and self.even and cast(int, self.rank) > 1)

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The stages by name, in the order in which they run."""
        return {name: cast(nn.Module, self._modules[name]) for name in _STAGES if name in self._modules}

    @property
    def geometry(self) -> Convolution:
        """The stage that has the stride, the padding and the dilation."""
        return cast(Convolution, self._modules["depthwise" if "depthwise" in self._modules else "pointwise_in"])

    @classmethod
    def of(
        cls, spec: ConvSpec, *, form: str, rank: int | None = None, components: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> SeparableConv:  # fmt: skip
        """A layer with these numbers, of the class for them."""
        own = getattr(cls, "axes", None) == spec.axes and cls.transposed == spec.transposed
        kind: Any = cls if own else SEPARABLE[spec.axes, spec.transposed]
        made: SeparableConv = kind(
            **spec.arguments(), form=form, rank=rank, components=components, device=device, dtype=dtype
        )
        return made

    @classmethod
    def from_conv(
        cls,
        conv: Convolution,
        *,
        form: str = "dw-pw",
        rank: int | None = None,
        components: int | None = None,
        seed: int = 0,
    ) -> SeparableConv:
        """The best approximation of `conv` in this form, on its device, in its dtype and memory format.

        `conv` is not changed. `rank` and `components` as for the class, but never more than what is exact; `seed` fixes
        the start of CP.

        Raises:
            ValueError: as the class; also where the weight holds NaN or infinite values.

        >>> conv = nn.Conv2d(8, 16, 3).double()
        >>> exact = SeparableConv2d.from_conv(conv, form="dw-pw", rank=9)     # rank 9 = 3 x 3: no error
        >>> torch.allclose(exact.weight, conv.weight)
        True
        """
        spec = ConvSpec.of(conv)
        structure = Structure.of(spec, form, rank=rank, components=components)
        if structure.components > form_named(form).exact(spec):
            structure = Structure.exact(spec, form)
        return cls.empty_like(conv, **vars(structure)).initialise_from(conv, seed=seed)

    @classmethod
    def empty_like(
        cls,
        conv: Convolution,
        *,
        form: str,
        components: int,
        even: bool = False,
        bias: bool | None = None,
        pad: nn.Module | None = None,
    ) -> SeparableConv:
        """An untrained layer of the shape of `conv`, zeros inside: to be filled from a checkpoint or from factors.

        Keeps what the module carries besides numbers: device, dtype, memory format, `requires_grad`, train or eval.
        `pad`: a module that pads the input further, by amounts known only when it runs, such as `SamePad2d`.
        """
        spec = ConvSpec.of(conv)
        layer = cls.of(
            replace(spec, bias=spec.bias if bias is None else bias), device="meta", dtype=conv.weight.dtype, form=form,
            **_rank_arguments(form_named(form), spec, components, even),
        )  # fmt: skip
        # Built on meta and only then given memory: the default initialisation would move the user's random state.
        if conv.weight.device.type != "meta":
            _give_memory(layer, conv.weight.device)
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
    def initialise_from(self, conv: Convolution, *, seed: int = 0) -> SeparableConv:
        """Fill the stages with the best factors of the weight of `conv`, and copy its bias. Returns the layer.

        Raises:
            ValueError: the weight holds NaN or infinite values.
        """
        if not conv.weight.isfinite().all():
            raise ValueError(f"the weight of {conv} holds NaN or infinite values and cannot be factorised")
        # float32 at least: half precision has no linear algebra, and its rounding would enter the factors twice.
        kernel = grouped(widened(conv.weight.detach()), self.groups, self.transposed).contiguous()
        self.load_factors(form_named(self.form).factorise(kernel, self.components, even=self.even, seed=seed))
        if conv.bias is not None:
            cast(Tensor, self.bias).copy_(conv.bias)
        return self

    @torch.no_grad()
    def load_factors(self, factors: Factors) -> None:
        """Copy factors of a kernel [G, O, I, K] into the stages; their dtype and device are kept."""
        stages = self.stages
        if "depthwise" in stages:
            depthwise = self.geometry.weight
            depthwise.copy_(factors.spatial.reshape(depthwise.shape))
        else:
            factors = factors.balanced()  # the number that is a component's filter goes into the stages
        for name, factor in (("pointwise_in", factors.inputs), ("pointwise_out", factors.outputs)):
            if factor is not None:
                stage = cast(Convolution, stages[name])
                stage.weight.copy_(ungrouped(factor.unsqueeze(3), ConvSpec.of(stage)).reshape(stage.weight.shape))
        for name, width in (("gather", self.in_channels), ("sum", self.out_channels)):
            if name in stages and factors.channels is not None:
                cast(ChannelIndex, stages[name]).renumber(_offset(factors.channels, width).tolist())

    def factors(self) -> Factors:
        """The stages as factors of the kernel [G, O, I, K]; gradients flow through."""
        stages, G = self.stages, self.groups
        R = self.components // G
        first = self.geometry.weight
        spatial = first.reshape(G, R, -1) if "depthwise" in stages else first.new_ones(G, R, 1)
        inputs = outputs = channels = None
        if "pointwise_in" in stages:
            stage = cast(Convolution, stages["pointwise_in"])
            inputs = grouped(stage.weight, G, ConvSpec.of(stage).transposed).squeeze(3)
        if "pointwise_out" in stages:
            outputs = cast(Convolution, stages["pointwise_out"]).weight.reshape(G, -1, R)
        if inputs is None or outputs is None:
            width = self.in_channels if inputs is None else self.out_channels
            index = cast("ChannelIndex | None", stages.get("gather", stages.get("sum")))
            numbers = _spread(self.components, width, G) if index is None else index.numbers
            channels = torch.tensor(numbers, device=spatial.device).reshape(G, R) % (width // G)
        return Factors(spatial, outputs, inputs, channels)

    @property
    def weight(self) -> Tensor:
        """The dense kernel the stages add up to, in the shape of the convolution's weight: computed, differentiable.

        What is written to it, by assignment, through `.data` or in place, reaches the last stage where it is the old
        kernel times a factor per output channel, which is what folding batch norm writes; anything else raises.
        """
        return kernel_of(self._kernel(), self._write_in_place)

    def _kernel(self, factors: Factors | None = None) -> Tensor:
        G, factors = self.groups, factors or self.factors()
        kernel = factors.kernel(self.out_channels // G, self.in_channels // G)
        return ungrouped(kernel, self._spec)

    def _rows(self, weight: Tensor) -> Tensor:
        """A weight as one row for each output channel, in float64."""
        return grouped(weight, self.groups, self.transposed).flatten(0, 1).flatten(1).double()

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
            f"the weight of a {type(self).__name__} is computed from its stages, and takes only what is the old one "
            f"times a factor per output channel; {found}. Write to layer.merged() and put that in its place (or "
            f"convert after this step), or change the stages ({', '.join(self.stages)})"
        )

    def _factors_between(self, new: Any) -> Tensor | str:
        """The factors [O] that lead from the present kernel to `new`, if rounding is all that they leave."""
        old = self._kernel()
        if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
            given = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
            return f"it is {tuple(old.shape)} {old.dtype}, this is {given}"
        if "weight" not in self._last_convolution()._parameters:
            return "the weight of its last stage is computed, too"
        before, after = self._rows(old), self._rows(new.to(old.device))
        peak, where = before.abs().max(1, keepdim=True)
        factors = torch.where(peak > 0, after.gather(1, where) / before.gather(1, where), 1.0)
        # Stages are rounded, too, and components may cancel: what counts is the size of what is added up.
        added_up = self._rows(self._kernel(self.factors().absolute()))
        rounding = 8 * torch.finfo(old.dtype).eps * factors.abs() * added_up
        equal = (after - factors * before).abs() <= rounding  # false for NaN
        return factors.squeeze(1) if bool(equal.all()) else "this is not"

    def _last_convolution(self) -> nn.Module:
        return self.stages.get("pointwise_out", self.geometry)

    def _scale_outputs(self, factors: Tensor) -> None:
        """Multiply output channels by factors [O], in the last stage that has weights."""
        if "sum" in self.stages:
            index = cast(ChannelSum, self.stages["sum"])
            factors = factors[torch.tensor(index.numbers, device=factors.device)]
        weight = cast(Convolution, self._last_convolution()).weight
        # A transposed depthwise stage has its output channels' components in the first axis, where others have one.
        factors = factors.to(weight).repeat_interleave(len(weight) // len(factors))
        weight.mul_(factors.view(-1, *[1] * (self.axes + 1)))

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
            new = nn.Parameter(new.detach().clone(), self.geometry.weight.requires_grad)
        *_, last = self.stages.values()
        last.register_parameter("bias", new)

    def add_bias(self) -> nn.Parameter:
        """The bias of the last stage, made of zeros where the layer has none yet."""
        if self.bias is None:
            like = self.geometry.weight
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

    def merged(self) -> Convolution:
        """The one convolution this layer equals, on the same device, in the same dtype, memory format and mode.

        Raises:
            ValueError: a pointwise stage was edited into something that one convolution cannot equal.
        """
        if problem := self.edited_stages():
            raise ValueError(f"cannot be merged: {problem}")
        spec, first, pad = self.spec, self.geometry.weight, self.stages.get("pad")
        conv = spec.conv(None if pad is None else PaddedConv2d, dtype=first.dtype)
        if not first.is_meta:
            _give_memory(conv, first.device)
            with torch.no_grad():
                # Multiply in float32 at least, so that half precision rounds the product once.
                factors = self.factors().to(torch.promote_types(first.dtype, torch.float32))
                kernel = factors.kernel(spec.out_channels // spec.groups, spec.in_channels // spec.groups)
                conv.weight.copy_(ungrouped(kernel, spec))
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
            if name not in _CONVOLUTIONS or not is_plain(stage):
                continue
            if stage.bias is not None and stage is not last:
                return f"{name} was given a bias, which meets the padding before the last stage does"
            spec = ConvSpec.of(stage)
            mixes = {*spec.kernel_size, *spec.stride} <= {1} and not any(padding_around(stage))
            if stage is not self.geometry and not mixes:
                return f"{name} was edited and is no pointwise convolution: {stage}"
        return ""

    @property
    def spec(self) -> ConvSpec:
        """The numbers of the convolution that this layer is now: its stages may have been edited since it was made."""
        built = replace(self._spec, bias=self.bias is not None)
        if not is_plain(self.geometry):
            return built
        runs = ConvSpec.of(self.geometry)
        return replace(built, **{name: getattr(runs, name) for name in _GEOMETRY})

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
    def kernel_size(self) -> Axes:
        return self._spec.kernel_size

    @property
    def stride(self) -> Axes:
        return self.spec.stride

    @property
    def padding(self) -> Axes | str:
        return self.spec.padding

    @property
    def dilation(self) -> Axes:
        return self.spec.dilation

    @property
    def output_padding(self) -> Axes:
        return self.spec.output_padding

    @property
    def groups(self) -> int:
        return self._spec.groups

    @property
    def padding_mode(self) -> str:
        return self.spec.padding_mode

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """A dense kernel is refused in words: it has no place here, and `strict=False` would leave it out silently."""
        own = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if "weight" in own and own <= {"weight", "bias"}:
            told = any(_DENSE_STATE in text for text in error_msgs)
            error_msgs.append(f"{prefix[:-1] or 'the model'} {'is, too' if told else _DENSE_STATE}")
            for key in own:
                del state_dict[prefix + key]
            state_dict.update(self.state_dict(prefix=prefix))  # so that stages add no list of missing names
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if problem := self._take_weight(value):
                raise AttributeError(problem)
        elif name == "bias":
            self._take_bias(value)
        elif name in _GEOMETRY and self.axes:
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
        value = value if isinstance(value, str) else per_axis(value, self.axes)
        made = replace(ConvSpec.of(self.geometry), **{name: value}).conv()
        for each in (*_GEOMETRY, "_reversed_padding_repeated_twice"):
            setattr(self.geometry, each, getattr(made, each))

    def extra_repr(self) -> str:
        s = self.spec
        rank = f"rank={self.rank}" if self.even else f"components={self.components}"
        text = f"{s.in_channels}, {s.out_channels}, kernel_size={s.kernel_size}, stride={s.stride}"
        text += f", padding={s.padding!r}" if any(padding_around(self.geometry)) else ""
        text += f", output_padding={s.output_padding}" if any(s.output_padding) else ""
        text += f", dilation={s.dilation}" if set(s.dilation) != {1} else ""
        text += f", groups={s.groups}" if s.groups != 1 else ""
        text += f", padding_mode={s.padding_mode!r}" if s.padding_mode != "zeros" else ""
        text += ", bias=False" if not s.bias else ""
        return f"{text}, form={self.form!r}, {rank}"


# Computed from what torch.jit.script does not know, and not needed by what it compiles.
SeparableConv.__jit_unused_properties__ = [  # type: ignore[attr-defined]
    name for name, value in vars(SeparableConv).items() if isinstance(value, property)
]


class SeparableConv1d(SeparableConv):
    """A depthwise-separable convolution with the arguments and the metadata of `nn.Conv1d`: see `SeparableConv2d`."""

    axes = 1


class SeparableConv2d(SeparableConv):
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

    axes = 2


class SeparableConv3d(SeparableConv):
    """A depthwise-separable convolution with the arguments and the metadata of `nn.Conv3d`: see `SeparableConv2d`."""

    axes = 3


class SeparableLinear(SeparableConv):
    """A linear layer of lower rank, with the arguments and the metadata of `nn.Linear`: two linear layers.

    What of a 1x1 convolution is pw-pw, without axes: input [..., in_features], output [..., out_features].

    Args:
        form: "pw-pw", the only one.
        rank: the number of components, R: the width between the two.
        components: the same as `rank`.
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.

    >>> layer = SeparableConv.from_conv(nn.Linear(64, 32), form="pw-pw", rank=8)
    >>> layer(torch.zeros(2, 5, 64)).shape, layer.weight.shape
    (torch.Size([2, 5, 32]), torch.Size([32, 64]))
    """

    axes = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: str = "pw-pw",
        rank: int | None = None,
        components: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        spec = ConvSpec(in_features, out_features, (), bias=bias)
        self._build(spec, device, dtype, form=form, rank=rank, components=components)

    @property
    def in_features(self) -> int:
        return self.in_channels

    @property
    def out_features(self) -> int:
        return self.out_channels

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.spec.bias}, rank={self.rank}"


SeparableLinear.__jit_unused_properties__ = [  # type: ignore[attr-defined]
    *SeparableConv.__jit_unused_properties__,  # type: ignore[attr-defined]
    "in_features",
    "out_features",
]


class SeparableConvTranspose(SeparableConv):
    """What transposed ones have in common: their depthwise stage is a transposed convolution, the others are not."""

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Axes,
        stride: int | Axes = 1,
        padding: int | Axes = 0,
        output_padding: int | Axes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Axes = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        form: str = "dw-pw",
        rank: int | None = None,
        components: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        numbers: Any = {
            "stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding,
        }  # fmt: skip
        spec = ConvSpec(
            in_channels, out_channels, per_axis(kernel_size, self.axes), **numbers, groups=groups, bias=bias,
            padding_mode=padding_mode, transposed=True,
        )  # fmt: skip
        self._build(spec, device, dtype, form=form, rank=rank, components=components)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted(input, output_size)
        return self._run(input, output_size)

    def _scripted(self, x: Tensor, output_size: list[int] | None) -> Tensor:
        if hasattr(self, "gather"):
            x = self.gather(x)  # type: ignore[operator]
        if hasattr(self, "depthwise"):
            if hasattr(self, "pointwise_in"):
                x = self.pointwise_in(x)  # type: ignore[operator]
            x = self.depthwise(x, output_size)  # type: ignore[operator]
        else:
            x = self.pointwise_in(x, output_size)  # type: ignore[operator]
        if hasattr(self, "pointwise_out"):
            x = self.pointwise_out(x)  # type: ignore[operator]
        if hasattr(self, "sum"):
            x = self.sum(x)  # type: ignore[operator]
        return x


class SeparableConvTranspose1d(SeparableConvTranspose):
    """A separable convolution with the arguments and the metadata of `nn.ConvTranspose1d`: see `SeparableConv2d`."""

    axes = 1


class SeparableConvTranspose2d(SeparableConvTranspose):
    """A separable convolution with the arguments and the metadata of `nn.ConvTranspose2d`: see `SeparableConv2d`.

    >>> layer = SeparableConvTranspose2d(8, 16, 4, stride=2, padding=1, form="pw-dw-pw", rank=6)
    >>> layer(torch.zeros(1, 8, 5, 5)).shape, layer.weight.shape
    (torch.Size([1, 16, 10, 10]), torch.Size([8, 16, 4, 4]))
    """

    axes = 2


class SeparableConvTranspose3d(SeparableConvTranspose):
    """A separable convolution with the arguments and the metadata of `nn.ConvTranspose3d`: see `SeparableConv2d`."""

    axes = 3


SEPARABLE: dict[tuple[int, bool], type[SeparableConv]] = {
    (kind.axes, kind.transposed): kind
    for kind in (
        SeparableLinear, SeparableConv1d, SeparableConv2d, SeparableConv3d,
        SeparableConvTranspose1d, SeparableConvTranspose2d, SeparableConvTranspose3d,
    )
}  # fmt: skip


def _is_traced(x: Tensor | fx.Proxy) -> bool:
    """Whether a graph is being recorded, which should not depend on the number of images."""
    recording = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return recording or torch.onnx.is_in_onnx_export() or isinstance(x, fx.Proxy)


def _give_memory(module: nn.Module, device: torch.device) -> None:
    """`to_empty` of a module on the meta device, which for `empty_like` of its tensors would import sympy: a second."""
    module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))  # type: ignore[no-untyped-call]


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
