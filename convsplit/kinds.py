"""Kinds of convolution modules: which are known, and the plain convolution each of them equals.

Linear layers are kinds of their own, and equal a plain linear layer.

A subclass of `Conv2d` may pad its input or compute its weight in `forward`, so only exact types are trusted: those of
torch and the types in a registry, each with a handler that turns a module into the plain convolution it equals.
A weight that is computed at every call (parametrizations, weight_norm, spectral_norm, pruning masks, standardised
weights) is never mistaken for the stored one: the plain convolution holds the weight that runs in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from convsplit.layers.stages import PaddedConv2d, SamePad2d
from convsplit.spec import CONVOLUTIONS, LAYERS, Axes, Convolution, ConvSpec, is_plain, padding_around


@dataclass(frozen=True)
class Equivalent:
    """The plain convolution that a module equals.

    `conv` shares the module's parameters unless they are computed. `pad`, where there is one, is a module that pads
    the input before `conv` (the padding of `conv` itself comes on top). `computed` says how the module computes its
    weight at every call; it is empty for a weight that is stored.
    """

    conv: Convolution
    pad: nn.Module | None = None
    computed: str = ""


Handler = Callable[[Any], Equivalent | Convolution | str]

_AXES = ("1d", "2d", "3d")  # what names of classes end in

_handlers: dict[type[nn.Module] | str, Handler] = {}


def register(kind: type[nn.Module] | str, handler: Handler) -> None:
    """Teach convsplit a kind of convolution module.

    Args:
        kind: the exact type (subclasses of it are not meant), or its full name, `"package.module.Class"`, where the
            package may not be installed.
        handler: takes a module of that type and returns what it equals: a `Conv2d`, or another of torch's convolutions,
            with its weight, bias and numbers (the module itself where the subclass changes no computation), an
            `Equivalent` where the input is padded first or the weight is computed at every call, or a string that says
            why this module is to be left alone.

    A later registration of the same type replaces the earlier one.

    >>> class NamedConv(nn.Conv2d):
    ...     '''A Conv2d with a constructor of its own.'''
    >>> register(NamedConv, lambda conv: conv)
    """
    _handlers[kind] = handler


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is some kind of convolution, known or not."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") in {kind.__name__ for kind in CONVOLUTIONS.values()}
    known = _handler_of(module) is not None and not isinstance(module, nn.Linear)
    return isinstance(module, Convolution) or known or _is_quantised(module)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is some kind of linear layer, known or not."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") == nn.Linear.__name__
    return isinstance(module, nn.Linear)


def equivalent(module: nn.Module) -> Equivalent | str:
    """What a module equals, or the reason why that is not known. The module is not changed.

    >>> equivalent(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3))).computed
    'its weight is computed at every call by _WeightNorm'
    >>> equivalent(nn.LazyConv2d(8, 3))
    'LazyConv2d has no weight yet: run the model once first'
    """
    handler = _handler_of(module)
    if handler is None or isinstance(module, LazyModuleMixin):
        return _unknown(module)
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    computed = _computed(module)
    found = handler(_settled(module) if computed else module)
    if isinstance(found, str):
        return found
    found = found if isinstance(found, Equivalent) else Equivalent(found)
    return replace(found, computed=found.computed or computed)


def plain_conv(module: Any, *, weight: Tensor | None = None, padding: Axes | str | None = None) -> Convolution:
    """A plain convolution with the numbers, the parameters and the train flag of a module with the attributes of one.

    Parameters are shared, not copied. `weight` and `padding` may be given instead of the module's own.
    """
    weight = module.weight if weight is None else weight
    spec, bias = ConvSpec.of(module), module.bias
    conv = replace(spec, padding=spec.padding if padding is None else padding).conv()
    own = [parameter for name, parameter in module.named_parameters() if name != "bias"]
    conv.weight = _as_parameter(weight, any(parameter.requires_grad for parameter in own))
    conv.register_parameter("bias", None if bias is None else _as_parameter(bias, bias.requires_grad))
    return conv.train(module.training)


def is_weight_hook(hook: Any) -> bool:
    """Whether a hook is part of how torch computes a weight (weight_norm, spectral_norm, pruning)."""
    hook = getattr(hook, "hook", hook)  # torch wraps the pre-hooks of load_state_dict
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return isinstance(hook, BasePruningMethod) or home.startswith("torch.nn.utils.")


def _handler_of(module: nn.Module) -> Handler | None:
    kind = parametrize.type_before_parametrizations(module)
    return _handlers.get(kind) or _handlers.get(f"{kind.__module__}.{kind.__qualname__}")


def _unknown(module: nn.Module) -> str:
    kind = parametrize.type_before_parametrizations(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "ScriptModule: its code is compiled; convert before scripting"
    if isinstance(module, LazyModuleMixin):
        return f"{kind.__name__} has no weight yet: run the model once first"
    if _is_quantised(module):
        return f"{kind.__name__} is quantised: convert before quantising"
    if is_plain(module):
        plain = next(each.__name__ for each in LAYERS.values() if isinstance(module, each))
        return (
            f"{kind.__module__}.{kind.__qualname__} may compute more than {plain} does (see convsplit.kinds.register)"
        )
    return f"a {kind.__name__} is no convolution and no linear layer"


def _is_quantised(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torch.ao.nn.") and "Conv" in kind.__name__ and kind.__name__[-2:] in _AXES


def _computed(module: nn.Module) -> str:
    """How torch computes the weight or bias of a module at every call; empty for stored ones."""
    names = [type(step).__name__ for step in _parametrizations(module)]
    names += [type(hook).__name__ for hook in module._forward_pre_hooks.values() if is_weight_hook(hook)]
    return f"its weight is computed at every call by {', '.join(names)}" if names else ""


def _parametrizations(module: nn.Module) -> Iterator[nn.Module]:
    if parametrize.is_parametrized(module):
        for steps in module.parametrizations.values():  # type: ignore[operator]
            yield from steps


@torch.no_grad()
def _settled(module: nn.Module) -> nn.Module:
    """A copy in eval mode, whose `weight` and `bias` are those that run there."""
    # What hooks computed for the last call hangs on to its graph, which deepcopy refuses to copy.
    stale = {id(value): value.detach() for value in vars(module).values() if isinstance(value, Tensor)}
    copied = copy.deepcopy(module, stale)
    training = module.training
    copied.eval()
    for hook in copied._forward_pre_hooks.values():
        if is_weight_hook(hook):
            hook(copied, ())
    copied.training = training
    return copied


def _as_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad)


def _plain(conv: Convolution) -> Convolution | str:
    if _computed(conv):
        return plain_conv(conv)
    if not isinstance(conv._parameters.get("weight"), nn.Parameter):
        return "its weight is not a parameter"
    extra = [name for name in conv._parameters if name not in ("weight", "bias")]
    extra += [*conv._buffers, *conv._modules]
    return f"holds more than a weight and a bias: {', '.join(extra)}" if extra else _with_numbers_that_run(conv)


def _with_numbers_that_run(conv: Convolution) -> Convolution | str:
    """The same convolution, rebuilt where attributes were left behind when its weight or its padding was exchanged."""
    plain = plain_conv(conv)
    names = ConvSpec.of(conv).arguments().keys() - {"bias"}
    if padding_around(plain) != padding_around(conv):
        return "its padding was changed after construction, and is not what runs: build it with the padding you want"
    return conv if all(getattr(conv, name) == getattr(plain, name) for name in names) else plain


def _padded(conv: PaddedConv2d) -> Equivalent:
    return Equivalent(plain_conv(conv), conv.pad)


def _same(conv: Any) -> Equivalent:
    """Conv2dSame of timm pads as TensorFlow does: by amounts that depend on the input's size where it has strides."""
    if ConvSpec.of(conv).stride == (1, 1):
        return Equivalent(plain_conv(conv, padding="same"))
    return Equivalent(plain_conv(conv), SamePad2d(conv.kernel_size, conv.stride, conv.dilation))


def _standardised(conv: Any) -> Equivalent:
    """StdConv2d and ScaledStdConv2d of timm: the weight of each output channel has mean 0 and a fixed variance."""
    gain = (conv.gain * conv.scale).view(-1) if hasattr(conv, "gain") else None
    rows = conv.weight.reshape(1, conv.out_channels, -1)
    with torch.no_grad():
        rows = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps)
    plain = plain_conv(conv, weight=rows.reshape_as(conv.weight))
    pad = SamePad2d(conv.kernel_size, conv.stride, conv.dilation) if getattr(conv, "same_pad", False) else None
    return Equivalent(plain, pad, f"{type(conv).__name__} standardises its weight at every call")


for _class in LAYERS.values():
    register(_class, _plain)
register(
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    lambda layer: "nn.MultiheadAttention uses its weight without calling it",
)
register(PaddedConv2d, _padded)
register("timm.layers.conv2d_same.Conv2dSame", _same)
for _kind in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"):
    register(f"timm.layers.std_conv.{_kind}", _standardised)
