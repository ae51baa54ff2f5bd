"""Awkward models, each with what must become of its convolutions. The list only grows: a bug found adds a model."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import convsplit


@dataclass(frozen=True)
class Awkward:
    """`split` names the layers that must be split, `left` the others, each with a part of its reason.

    `warns` is a part of the warning that converting gives. `pickles` and `jits` are false where the model itself
    does not allow pickling or `torch.jit.trace`, `repairs` where a copy of it cannot have its weights. `tolerance` is
    relative, at full rank.
    """

    build: Callable[[], tuple[nn.Module, Any]]
    split: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    bake: bool = False
    warns: str = ""
    pickles: bool = True
    jits: bool = True
    repairs: bool = True
    tolerance: float = 1e-9


AWKWARD: dict[str, Awkward] = {}


def awkward(*split: str, left: Mapping[str, str] | None = None, **details: Any) -> Callable[..., Any]:
    """Enter a function that builds a model and its inputs into the list."""

    def enter(build: Callable[[], Any]) -> Callable[[], Any]:
        assert build.__name__ not in AWKWARD
        AWKWARD[build.__name__] = Awkward(build, split, left or {}, **details)
        return build

    return enter


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def settled(model: nn.Module) -> nn.Module:
    return model.double().eval()


class Calls(nn.Module):
    """Runs a function of its convolutions; the base of most models here."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


# Names and sharing


class TwoNames(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@awkward("a")
def one_module_under_two_names() -> Any:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return settled(TwoNames(a=conv, b=conv)), images(2, 4, 6, 6)


@awkward("a.a")
def one_module_in_two_parents() -> Any:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return settled(TwoNames(a=TwoNames(a=conv, b=nn.ReLU()), b=nn.Sequential(conv))), images(2, 4, 6, 6)


class CalledTwice(Calls):
    def forward(self, x: Tensor) -> Tensor:
        small = F.avg_pool2d(x, 2)
        return self.conv(x).mean((2, 3)) + self.conv(small).mean((2, 3))


@awkward("conv")
def called_twice_with_different_shapes() -> Any:
    return settled(CalledTwice(conv=nn.Conv2d(4, 6, 3))), images(2, 4, 12, 12)


class HeldInLists(nn.Module):
    """Aliases outside `_modules`: in a list, a tuple, a dict, a partial and an attribute set by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.listed, self.mapped = [self.conv, (self.conv,)], {"conv": self.conv}
        self.partial = functools.partial(HeldInLists.call, self.conv)

    @staticmethod
    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.listed[1][0](self.listed[0](x))
        return self.partial(self.mapped["conv"](x))


@awkward("conv")
def aliases_in_python_containers() -> Any:
    return settled(HeldInLists()), images(2, 4, 6, 6)


@awkward("2", left={"0": "shares a parameter", "1": "shares a parameter"})
def tied_weights() -> Any:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    model[1].weight = model[0].weight
    return settled(model), images(2, 4, 6, 6)


@awkward(left={"0": "shares a parameter", "1": "shares a parameter"})
def tied_biases() -> Any:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2)))
    model[1].bias = model[0].bias
    return settled(model), images(2, 4, 6, 6)


@awkward("")
def the_model_is_a_conv() -> Any:
    return settled(nn.Conv2d(4, 6, 3)), images(2, 4, 6, 6)


@awkward("")
def the_model_is_a_conv_with_an_unbatched_input() -> Any:
    return settled(nn.Conv2d(4, 6, 3)), images(4, 6, 6)


@awkward("1")
def converted_before() -> Any:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))
    return settled(convsplit.convert(model, exact=True, skip="1")), images(2, 4, 8, 8)


@awkward(left={"1": "1x1"})
def nothing_left_to_split() -> Any:
    return settled(nn.Sequential(convsplit.SeparableConv2d(4, 6, 3), nn.Conv2d(6, 4, 1))), images(2, 4, 8, 8)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.ModuleDict({"3x3 [conv]*": nn.Conv2d(4, 4, 3, padding=1), "è": nn.Conv2d(4, 4, 1)})]
        self.blocks = nn.ModuleList([nn.ModuleList(blocks), nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3)))])

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.blocks[0][0].values():
            x = conv(x).relu()
        return self.blocks[1](x)


@awkward("blocks.0.0.3x3 [conv]*", "blocks.1.0.0", left={"blocks.0.0.è": "1x1"})
def nested_containers_with_odd_names() -> Any:
    return settled(Nested()), images(2, 4, 6, 6)


class Parted(Calls):
    def forward(self, x: Tensor, *, both: bool = False) -> Tensor:
        return self.b(self.a(x)) if both else self.a(x)


@awkward("a", "b", "c")
def modules_never_called_or_called_under_a_flag() -> Any:
    convs = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "abc"}
    return settled(Parted(**convs)), images(2, 4, 6, 6)


@awkward("a", "b", jits=False)
def keyword_arguments() -> Any:
    convs = {name: nn.Conv2d(4, 4, 3, padding=1) for name in "ab"}
    return settled(Parted(**convs)), {"x": images(2, 4, 6, 6), "both": True}


class Cyclic(Calls):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.children_know_their_parent = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.children_know_their_parent[0].conv(x)


@awkward("conv")
def reference_cycle() -> Any:
    return settled(Cyclic(conv=nn.Conv2d(4, 6, 3))), images(2, 4, 6, 6)


@awkward("module.0")
def wrapped_in_data_parallel() -> Any:
    return settled(nn.DataParallel(nn.Sequential(nn.Conv2d(4, 6, 3)))), images(2, 4, 6, 6)


# Code that reads what a convolution has


class ReadsAttributes(Calls):
    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        x = x[:, : conv.in_channels].to(conv.weight.dtype).to(conv.weight.device)
        scale = conv.kernel_size[0] * conv.stride[1] * conv.groups * conv.dilation[0] / conv.out_channels
        return conv(x) * scale + (0 if conv.bias is None else conv.bias.sum())


@awkward("conv")
def code_that_reads_numbers_and_dtype() -> Any:
    return settled(ReadsAttributes(conv=nn.Conv2d(4, 6, 3, stride=2, groups=2))), images(2, 5, 7, 7)


class ReadsWeight(Calls):
    def forward(self, x):  # types that are strings, as here, keep a traced module of torch 2.10 from being pickled
        return self.conv(x), self.conv.weight.square().mean()


@awkward("conv")
def code_that_penalises_the_weight() -> Any:
    return settled(ReadsWeight(conv=nn.Conv2d(4, 6, 3))), images(2, 4, 7, 7)


class UsesWeightElsewhere(Calls):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.kernel = nn.Parameter(torch.randn(4, 6, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=[1])
        x = F.conv2d(x, self.kernel, stride=(1, 2))
        return F.conv2d(x, self.conv.weight * 2)


@awkward(
    left={"conv": "F.conv2d uses its weight", "conv2d_1": "the parameter kernel", "conv2d_2": "computed in forward"}
)
def functional_convolutions() -> Any:
    return settled(UsesWeightElsewhere(conv=nn.Conv2d(4, 6, 3))), images(2, 4, 9, 9)


class UntracedFunctional(UsesWeightElsewhere):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 1e9 else F.conv2d(x, self.conv.weight, padding=1) + self.conv(x).mean()


@awkward("conv")
def functional_convolution_that_fx_cannot_see() -> Any:
    return settled(UntracedFunctional(conv=nn.Conv2d(4, 6, 3))), images(2, 4, 9, 9)


class GradientOfWeight(Calls):
    """Transposed convolution with the same weight, as tied autoencoders have it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(self.conv(x).relu(), self.conv.weight)


@awkward("conv")
def weight_shared_with_a_functional_transpose() -> Any:
    return settled(GradientOfWeight(conv=nn.Conv2d(4, 6, 3))), images(2, 4, 9, 9)


@awkward("0")
def graph_module() -> Any:
    return fx.symbolic_trace(settled(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()))), images(2, 4, 9, 9)


@awkward(left={"conv": "reads its weight"})
def graph_module_that_reads_a_weight() -> Any:
    return fx.symbolic_trace(settled(ReadsWeight(conv=nn.Conv2d(4, 6, 3)))), images(2, 4, 9, 9)


# Kinds of convolutions


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class OwnConstructor(nn.Conv2d):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 3, padding=1)


class Registered(nn.Conv2d):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside, 3, padding=1)


convsplit.kinds.register(Registered, lambda conv: conv)


@awkward("2", left={"0": "may compute more", "1": "may compute more", "3": "1x1"})
def subclasses() -> Any:
    model = nn.Sequential(OwnForward(4, 4, 3), OwnConstructor(4, 4), Registered(4, 4), OwnForward(4, 4, 1))
    return settled(model), images(2, 4, 9, 9)


class Foreign(nn.Module):
    """A convolution that is no Conv2d, with the axes of its weight in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.permute(3, 2, 0, 1))


def foreign_as_conv(module: Foreign) -> nn.Conv2d:
    conv = nn.Conv2d(4, 6, 3, bias=False, dtype=module.kernel.dtype)
    conv.weight = nn.Parameter(module.kernel.detach().permute(3, 2, 0, 1))
    return conv


convsplit.kinds.register(Foreign, foreign_as_conv)


@awkward("0", "1")
def registered_module_that_is_no_conv() -> Any:
    return settled(nn.Sequential(Foreign(), nn.Conv2d(6, 4, 3))), images(2, 4, 9, 9)


@awkward(left={"0": "forward was replaced"}, pickles=False)
def forward_replaced_on_the_instance() -> Any:
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3)))
    model[0].forward = functools.partial(F.avg_pool2d, kernel_size=2)
    return model, images(2, 4, 6, 6)


@awkward(left={"0": "more than a weight and a bias: average", "1": "not a parameter"})
def extra_state_on_the_instance() -> Any:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].register_buffer("average", torch.zeros(4))
    weight = model[1].weight.data
    del model[1].weight
    model[1].register_buffer("weight", weight)
    return settled(model), images(2, 4, 6, 6)


class Exponential(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw.exp()


def parametrized_models() -> nn.Module:
    model = nn.Sequential(
        weight_norm(nn.Conv2d(4, 4, 3, padding=1)), spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
        parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
        parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
        prune.random_unstructured(nn.Conv2d(4, 4, 3, padding=1), "weight", 0.3),
        parametrize.register_parametrization(nn.Conv2d(4, 4, 3, padding=1), "bias", Exponential()),
        prune.random_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.3),
    )  # fmt: skip
    return settled(model)


@awkward(
    left={
        "0": "WeightNorm; bake=True", "1": "SpectralNorm", "2": "_WeightNorm", "3": "_SpectralNorm",
        "4": "RandomUnstructured", "5": "Exponential", "6": "1x1",
    },
    pickles=False,
)  # fmt: skip
def computed_weights() -> Any:
    return parametrized_models(), images(2, 4, 6, 6)


@awkward(*"012345", left={"6": "1x1"}, bake=True)
def computed_weights_baked() -> Any:
    model = parametrized_models()
    assert model[6].weight.grad_fn is not None  # what its hook computed last must not stop deepcopy
    return model, images(2, 4, 6, 6)


@awkward("0", bake=True)
def weights_stale_since_a_load() -> Any:
    """weight_norm's `weight` is as old as the last forward: what is baked is what the next one will use."""
    model = nn.Sequential(weight_norm(nn.Conv2d(4, 4, 3)))
    with torch.no_grad():
        model[0].weight_g.mul_(3)
    return settled(model), images(2, 4, 6, 6)


@awkward("0")
def pruning_made_permanent() -> Any:
    model = nn.Sequential(prune.random_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.3))
    prune.remove(model[0], "weight")
    return settled(model), images(2, 4, 6, 6)


@awkward("0", left={"1": "Conv2d is quantised"}, pickles=False)
def fake_quantised() -> Any:
    qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    model = nn.Sequential(nn.Conv2d(4, 4, 3), torch.ao.nn.qat.Conv2d(4, 4, 3, qconfig=qconfig)).eval()
    model.apply(torch.ao.quantization.disable_observer).apply(torch.ao.quantization.disable_fake_quant)
    return model.double(), images(2, 4, 9, 9)


@awkward("1", left={"0": "ScriptModule"}, pickles=False)
def scripted_convolution() -> Any:
    scripted = torch.jit.script(settled(nn.Conv2d(4, 4, 3)))
    return settled(nn.Sequential(scripted, nn.Conv2d(4, 4, 3))), images(2, 4, 9, 9)


class OnlyFirst(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


@awkward("0", left={"1": "no weight yet"}, pickles=False, jits=False)
def lazy_part() -> Any:
    return OnlyFirst(settled(nn.Conv2d(4, 4, 3)), nn.LazyConv2d(4, 3)).eval(), images(2, 4, 9, 9)


@awkward("0", left={"1": "meta device"})
def meta_part() -> Any:
    return OnlyFirst(settled(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3, device="meta")).eval(), images(2, 4, 9, 9)


@awkward(left={"0": "complex"})
def complex_weights() -> Any:
    return nn.Sequential(nn.Conv2d(4, 4, 3, dtype=torch.complex128)).eval(), images(2, 4, 6, 6).to(torch.complex128)


# Blocks as libraries write them


class UltralyticsConv(nn.Module):
    """The Conv block of YOLO: automatic padding, no bias, batch norm, SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, d: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, (d * (k - 1) + 1) // 2, groups=g, dilation=d, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@awkward("0.conv", "1.conv", left={"2.conv": "1x1"})
def ultralytics_blocks() -> Any:
    model = nn.Sequential(UltralyticsConv(3, 8, 3, 2), UltralyticsConv(8, 8, 3, g=2), UltralyticsConv(8, 4))
    for index, block in enumerate(model):
        block.i, block.f, block.conv.stage = index, -1, f"P{index}"
    return settled(model), images(2, 3, 9, 9)


@awkward("0.0", left={"1.0": "depthwise"})
def torchvision_blocks() -> Any:
    from torchvision.ops import Conv2dNormActivation

    return settled(nn.Sequential(Conv2dNormActivation(3, 8), Conv2dNormActivation(8, 8, groups=8))), images(
        2, 3, 9, 9
    )


@awkward("0", "1", "2", "3")
def timm_same_padding() -> Any:
    from timm.layers.conv2d_same import Conv2dSame

    convs = (
        Conv2dSame(4, 4, 3, 2),
        Conv2dSame(4, 6, 4),
        Conv2dSame(6, 6, (3, 5), (1, 3)),
        Conv2dSame(6, 8, 5, 2, bias=False),
    )
    return settled(nn.Sequential(*convs)), images(2, 4, 23, 30)


def standardised_model() -> nn.Module:
    from timm.layers import std_conv

    kinds = std_conv.StdConv2d, std_conv.StdConv2dSame, std_conv.ScaledStdConv2d, std_conv.ScaledStdConv2dSame
    return settled(nn.Sequential(*(kind(4, 4, 3, 2) for kind in kinds)))


@awkward(left=dict.fromkeys("0123", "standardises its weight"))
def timm_standardised_weights() -> Any:
    return standardised_model(), images(2, 4, 23, 30)


@awkward(*"0123", bake=True)
def timm_standardised_weights_baked() -> Any:
    return standardised_model(), images(2, 4, 23, 30)


# Geometry


@awkward("0", "1", "2", "3", "4", "6", left={"5": "1x1"})
def groups_depthwise_and_pointwise() -> Any:
    return settled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 6, 3, groups=2),
            nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 1, 1),
            nn.Conv2d(1, 4, 3),
        )
    ), images(2, 3, 14, 14)  # fmt: skip


@awkward("0", "1", "2", "3", "4")
def odd_geometry() -> Any:
    return settled(
        nn.Sequential(
            nn.Conv2d(4, 4, 4, padding="same"), nn.Conv2d(4, 4, (2, 6), padding="same", dilation=(3, 1)),
            nn.Conv2d(4, 6, (9, 1), stride=(3, 1), padding=(4, 0)), nn.Conv2d(6, 4, (1, 5), padding="valid"),
            nn.Conv2d(4, 4, 3, stride=(2, 1), dilation=(2, 3), padding=(0, 5)),
        )
    ), images(2, 4, 17, 11)  # fmt: skip


@awkward("0", "1")
def kernel_larger_than_the_input() -> Any:
    return settled(nn.Sequential(nn.Conv2d(4, 6, 7, padding=3), nn.Conv2d(6, 4, 5, padding=2))), images(2, 4, 2, 2)


@awkward("0", "1", "2", "3")
def padding_modes() -> Any:
    modes = "reflect", "replicate", "circular", "circular"
    convs = [
        nn.Conv2d(4, 4, 3, padding="same" if i == 3 else (1, 2), padding_mode=mode) for i, mode in enumerate(modes)
    ]
    return settled(nn.Sequential(*convs)), images(2, 4, 7, 8)


@awkward("0")
def one_channel_out_of_one_pixel() -> Any:
    return settled(nn.Sequential(nn.Conv2d(4, 1, 3, padding=1))), images(2, 4, 1, 1)


# Numbers


@awkward("0", "1", left={"2": "NaN or infinite", "3": "NaN or infinite"})
def zeros_dead_filters_and_no_numbers() -> Any:
    model = FirstTwo(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight[1:3] = 0
        model[2].weight[0, 0, 0, 0] = float("nan")
        model[3].weight[0, 0, 0, 0] = float("inf")
    return settled(model), images(2, 4, 6, 6)


class FirstTwo(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))


@awkward("0", "1", tolerance=1e-4)
def huge_and_tiny_weights() -> Any:
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))).float()
    with torch.no_grad():
        model[0].weight.mul_(1e15)
        model[1].weight.mul_(1e-15)
    return model, images(2, 4, 6, 6).float()


def halves(dtype: torch.dtype) -> Any:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, dtype=dtype), nn.BatchNorm2d(6, dtype=dtype), nn.Conv2d(6, 4, 3, dtype=dtype)
    )
    return model.eval(), torch.randn(2, 4, 8, 8).to(dtype)


@awkward("0", "2", tolerance=5e-2)
def bfloat16() -> Any:
    return halves(torch.bfloat16)


@awkward("0", "2", tolerance=5e-3)
def float16() -> Any:
    return halves(torch.float16)


@awkward("0", "2", tolerance=1e-5)
def float32() -> Any:
    return halves(torch.float32)


# What modules carry


@awkward("0", "2")
def channels_last() -> Any:
    model = settled(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    return model.to(memory_format=torch.channels_last), images(2, 4, 8, 8).to(memory_format=torch.channels_last)


@awkward("0", "1", "2")
def frozen_and_training_parts() -> Any:
    model = settled(nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)), nn.Dropout(0.0)))
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].train()
    model[3].train()
    return model, images(2, 4, 6, 6)


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def shifted(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args[0] + 1, *args[1:]), kwargs


def plus_mean_weight(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output + module.weight.mean()


@awkward("0", "1", pickles=False)
def forward_hooks() -> Any:
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    model[0].register_forward_hook(doubled)
    model[0].register_forward_hook(plus_mean_weight, with_kwargs=True, prepend=True, always_call=True)
    model[0].register_forward_pre_hook(shifted, with_kwargs=True)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    model.register_forward_hook(doubled)
    return model, images(2, 4, 8, 8)


class HooksItself(Calls):
    """Its own method is the hook: the copy's hook must belong to the copy."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.seen = 0
        self.conv.register_forward_hook(self.count)

    def count(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@awkward("conv")
def hook_that_is_a_method_of_the_model() -> Any:
    return settled(HooksItself(conv=nn.Conv2d(4, 4, 3))), images(2, 4, 6, 6)


def ignored(*args: Any) -> None:
    return None


@awkward("0", warns="ignored (backward hook), ignored (state_dict hook)", jits=False)
def hooks_that_cannot_be_carried() -> Any:
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()))
    model[0].register_full_backward_hook(ignored)
    model[0].register_state_dict_post_hook(ignored)
    model[1].register_full_backward_hook(ignored)
    return model, images(2, 4, 6, 6)


# Whole models


class Untraceable(Calls):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1e9:
            return x
        for _ in range(int(x.shape[0])):
            x = self.block(x)
        return x


@awkward("block.0")
def control_flow_on_values() -> Any:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    return settled(Untraceable(block=block)), images(2, 4, 6, 6)


class DrawsNumbers(Calls):
    """Draws random numbers in forward and counts its calls."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        draws = torch.rand(3), random.random(), np.random.rand()
        return self.conv(x) + 0 * draws[0].sum() * draws[1] * draws[2]


@awkward("conv")
def random_numbers_and_counters() -> Any:
    return settled(DrawsNumbers(conv=nn.Conv2d(4, 4, 3))), images(2, 4, 6, 6)


class Caches(Calls):
    """Keeps its last output, with its graph, as a plain attribute."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        self.pyramids = [{"levels": (self.last, self.last.mean())}]  # as RAFT keeps its correlations
        return self.last


@awkward("conv", pickles=False)
def cached_output_with_its_graph() -> Any:
    model = settled(Caches(conv=nn.Conv2d(4, 4, 3)))
    x = images(2, 4, 6, 6)
    model(x)
    return model, x


class PartOfAnotherKind(Calls):
    """What torch made of a part of the model (a script, an exported program, quantised layers) beside convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.conv(x))


def part() -> nn.Module:
    return settled(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


@awkward("conv", left={"part.0": "its code is compiled"}, pickles=False)
def scripted_part() -> Any:
    return settled(PartOfAnotherKind(conv=nn.Conv2d(4, 6, 3), part=torch.jit.script(part()))), images(2, 4, 9, 9)


@awkward("conv", left={"part.0": "its code is compiled"}, pickles=False)
def traced_part() -> Any:
    traced = torch.jit.trace(part(), images(2, 6, 7, 7))
    return settled(PartOfAnotherKind(conv=nn.Conv2d(4, 6, 3), part=traced)), images(2, 4, 9, 9)


@awkward("conv", left={"conv2d_default": "F.conv2d"}, pickles=False)
def exported_part() -> Any:
    exported = torch.export.export(part(), (images(2, 6, 7, 7),)).module()
    return PartOfAnotherKind(conv=nn.Conv2d(4, 6, 3).double().eval(), part=exported), images(2, 4, 9, 9)


@awkward("0", tolerance=1e-4)
def quantised_head() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return quantised, torch.randn(2, 3, 9, 9)


class CompiledMethod(Calls):
    """A block of the forward pass was compiled by itself: the compiled function holds on to the model."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(**children)
        self.compiled = torch.compile(self.block, backend="eager")

    def block(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.compiled(x))


@awkward("conv", "last", pickles=False, jits=False)
def compiled_method() -> Any:
    return settled(CompiledMethod(conv=nn.Conv2d(4, 6, 3), last=nn.Conv2d(6, 4, 3))), images(2, 4, 9, 9)


class Structured(Calls):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        features = self.conv(batch["image"])
        return {"features": [features], "size": features.shape[-1]}


@awkward("conv", jits=False)
def dictionaries_in_and_out() -> Any:
    return settled(Structured(conv=nn.Conv2d(4, 4, 3))), ({"image": images(2, 4, 6, 6)},)


class CopiesItself(Calls):
    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        children = {name: copy.deepcopy(child, memo) for name, child in self.named_children()}
        return CopiesItself(**children).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@awkward("conv")
def deepcopy_of_its_own() -> Any:
    return settled(CopiesItself(conv=nn.Conv2d(4, 4, 3))), images(2, 4, 6, 6)


class CopiesItselfWithoutMemo(CopiesItself):
    """Loses what deepcopy was told to put in the place of layers."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItselfWithoutMemo:
        children = {name: copy.deepcopy(child) for name, child in self.named_children()}
        return CopiesItselfWithoutMemo(**children).train(self.training)


@awkward("conv", "again.0", repairs=False)
def deepcopy_of_its_own_without_memo() -> Any:
    model = CopiesItselfWithoutMemo(conv=nn.Conv2d(4, 4, 3), again=nn.Sequential(nn.Conv2d(4, 4, 3)))
    return settled(model), images(2, 4, 6, 6)


class CallsInOtherWays(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.direct.forward(self.named(input=x))


@awkward("named", left={"direct": "F.conv2d uses its weight"}, jits=False)
def called_by_keyword_and_by_forward() -> Any:
    return settled(CallsInOtherWays(named=nn.Conv2d(4, 4, 3), direct=nn.Conv2d(4, 4, 3))), images(2, 4, 6, 6)


@awkward("0", "1", "2", "3", left={"4": "padding was changed"})
def geometry_set_after_construction() -> Any:
    """In zeros mode the new padding runs, in other modes the one it was built with."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3, padding=2),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(4, 4, (3, 4), padding="same", padding_mode="circular"),
    )  # fmt: skip
    model[0].padding, model[0].dilation, model[0].stride = (2, 2), (2, 1), 1
    model[1].padding = (0, 3)
    model[2].padding_mode = "replicate"
    model[3].padding, model[4].dilation = (7, 7), (2, 2)
    return settled(model), images(2, 4, 9, 9)


@awkward("0", "1", "2")
def weights_exchanged() -> Any:
    """`in_channels`, `out_channels` and `kernel_size` stay behind: the weight is what runs."""
    model = settled(nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))))
    with torch.no_grad():
        model[0].weight = nn.Parameter(torch.randn(4, 1, 3, 3).double())
        model[1].weight.data, model[1].bias.data = model[1].weight.data[:3], model[1].bias.data[:3]
        model[2].weight.data = torch.randn(4, 3, 5, 5).double()
    return model, images(2, 1, 9, 9)


@awkward("0", "1", "2", "3")
def one_input_channel_in_each_group() -> Any:
    return settled(
        nn.Sequential(
            nn.Conv2d(1, 12, 5, padding=1), nn.Conv2d(12, 24, 3, groups=12, padding=1), nn.Conv2d(24, 1, 3),
            nn.Conv2d(1, 16, (9, 1), padding=(4, 0), stride=(2, 1), bias=False),
        )
    ), images(2, 1, 14, 14)  # fmt: skip


@awkward("0", "2", "3", "5")
def convolutions_of_other_kinds() -> Any:
    model = nn.Sequential(
        nn.Conv3d(2, 4, (3, 1, 1)), nn.Flatten(1, 2), nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(4, 4, 3),
        nn.Flatten(2), nn.Conv1d(4, 4, 3),
    )  # fmt: skip
    return settled(model), images(2, 2, 4, 6, 6)


# Other numbers of axes, and transposed


class Causal(nn.Conv1d):
    """Pads its past itself, as WaveNet-like code does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0)))


@awkward("1.1", "2.1", "3", left={"0": "Causal may compute more than Conv1d does", "4": "1x1 kernel"})
def sounds() -> Any:
    """Causal by a subclass and by padding apart, dilated more and more, strided by more than the kernel."""
    model = nn.Sequential(
        Causal(4, 8, 3, dilation=2),
        *(nn.Sequential(nn.ConstantPad1d((2 * d, 0), 0), nn.Conv1d(8, 8, 3, dilation=d)) for d in (4, 8)),
        nn.Conv1d(8, 8, 2, stride=3), nn.Conv1d(8, 4, 1),
    )  # fmt: skip
    return settled(model), images(2, 4, 40)


class Pads(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.sound(F.pad(x, (4, 0)))  # [N, C, T], from the past alone
        x = self.still(F.pad(x.unflatten(2, (4, 3, 2)), (1, 1, 1, 1, 0, 0), mode="replicate"))
        return self.film(self.past(F.pad(x, (0, 0, 0, 0, 2, 0))))


@awkward("sound", "still", "film.1", "past")
def padded_in_one_and_three_axes() -> Any:
    """Causal sounds and films: zeros by F.pad and by modules, of as many axes as the convolution has."""
    film = nn.Sequential(nn.ConstantPad3d((1, 1, 1, 1, 2, 0), 0.5), nn.Conv3d(4, 4, 3))
    parts = {
        "sound": nn.Conv1d(3, 4, 5),
        "still": nn.Conv3d(4, 4, (1, 3, 3)),
        "film": film,
        "past": nn.Conv3d(4, 4, (3, 1, 1)),
    }
    return settled(Pads(**parts)), images(2, 3, 24)


@awkward("0", "2", "4", "5", bake=True)
def vocoder() -> Any:
    """As HiFi-GAN: weight norm, also on transposed convolutions, whose norm is over another axis there."""
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(4, 8, 7, padding=3)), nn.LeakyReLU(0.1),
        weight_norm(nn.ConvTranspose1d(8, 6, 8, stride=4, padding=2)), nn.LeakyReLU(0.1),
        parametrizations.weight_norm(nn.ConvTranspose1d(6, 4, 3, 2, output_padding=1, groups=2)),
        nn.Conv1d(4, 1, 7, padding=3, padding_mode="reflect"),
    )  # fmt: skip
    return settled(model), images(2, 4, 6)


@awkward("0", "1", "2", "3", "4", "5", left={"6": "already depthwise"})
def upsamplers() -> Any:
    """Output padding, a stride above the kernel, dilated and grouped, one channel in and out, checkerboards."""
    model = nn.Sequential(
        nn.ConvTranspose2d(1, 6, 4, 2, 1), nn.ConvTranspose2d(6, 6, 3, 2, 1, output_padding=1, bias=False),
        nn.ConvTranspose2d(6, 4, 2, stride=3, output_padding=(0, 2)), nn.ConvTranspose2d(4, 6, 3, dilation=2, groups=2),
        nn.ConvTranspose2d(6, 6, (3, 1), (1, 2), (1, 0)), nn.ConvTranspose2d(6, 6, 3, groups=3),
        nn.ConvTranspose2d(6, 6, 3, groups=6),
    )  # fmt: skip
    return settled(model), images(2, 1, 3, 4)


class ToldItsSize(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)), output_size=x.shape[-2:]) + self.up(self.down(x), x.shape[-2:])


@awkward("down", "up")
def told_the_size_of_its_output() -> Any:
    """A stride leaves open how large the input was: the transposed layer is told, by keyword and by position."""
    model = ToldItsSize(down=nn.Conv2d(4, 6, 3, 2, 1), up=nn.ConvTranspose2d(6, 4, 3, 2, 1))
    return settled(model), images(2, 4, 8, 9)


@awkward("0", "1", "2", "3", left={"4": "1x1 kernel"})
def volumes() -> Any:
    """R(2+1)D's flat kernels, and back up."""
    model = nn.Sequential(
        nn.Conv3d(3, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate", groups=2),
        nn.ConvTranspose3d(4, 6, (1, 2, 2), (1, 2, 2)), nn.Conv3d(6, 2, 1),
    )  # fmt: skip
    return settled(model), images(2, 3, 4, 6, 6)


@awkward("0", left={"2": "its weight is computed", "3": "its weight is computed"}, pickles=False)
def critic() -> Any:
    """Spectral norm in a GAN, on plain and transposed layers."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(6, 8, 4, 2, 1)),
        parametrizations.spectral_norm(nn.ConvTranspose2d(8, 3, 4, 2, 1)),
    )  # fmt: skip
    return settled(model), images(2, 3, 8, 8)


class Functions(Calls):
    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(self.conv(x), self.used.weight, self.used.bias, padding=1)
        return F.conv_transpose1d(x, self.up.weight, self.up.bias, 2, 1) + self.up(x)


@awkward("conv", left={"used": "F.conv1d uses its weight", "up": "F.conv_transpose1d uses its weight"})
def functions_of_one_axis() -> Any:
    parts = {"conv": nn.Conv1d(4, 6, 3), "used": nn.Conv1d(6, 6, 3), "up": nn.ConvTranspose1d(6, 4, 3, 2, 1)}
    return settled(Functions(**parts)), images(2, 4, 12)


@awkward("0", "1")
def maps_on_their_own() -> Any:
    """Without a batch, three dimensions are an image, four a volume."""
    return settled(nn.Sequential(nn.Conv3d(2, 4, 3), nn.ConvTranspose3d(4, 2, 3, 2))), images(2, 5, 6, 7)


@awkward("0", left={"1": "without channels"})
def no_channels() -> Any:
    empty = nn.Conv2d(4, 4, 3)
    empty.weight, empty.bias = nn.Parameter(torch.zeros(0, 4, 3, 3)), nn.Parameter(torch.zeros(0))
    return OnlyFirst(settled(nn.Conv2d(4, 4, 3)), empty).double().eval(), images(2, 4, 6, 6)
