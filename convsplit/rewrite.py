"""Rewriting: a plan applied to a copy of the model, and split layers merged back."""

from __future__ import annotations

import copy
import importlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from convsplit.choose.plan import Plan, PlannedLayer
from convsplit.data.moments import Assumed, Marginals
from convsplit.forms import CP, form_named
from convsplit.initialise import initialise_each
from convsplit.kinds import Equivalent, equivalent, is_convolution, is_linear, is_weight_hook
from convsplit.layers.separable import SeparableConv, SeparableConv2d
from convsplit.model.copies import deep_copy
from convsplit.model.guards import plain_arithmetic, same_globals
from convsplit.parallel import in_batches
from convsplit.precision import full_products
from convsplit.progress import warn
from convsplit.spec import ConvSpec, noun

M = TypeVar("M", bound=nn.Module)

# What convolutions and split layers keep in their __dict__ themselves; anything else there is the user's.
_OWN = {"weight", "bias", *vars(nn.Conv2d(1, 1, 1, device="meta")), *vars(SeparableConv2d(1, 1, 1, device="meta"))}

_CARRIED = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_REBUILDING = ("reparameterize", "switch_to_deploy", "fuse_convs")  # of timm, of RepVGG's own code, of ultralytics
_LEFT_BEHIND = {
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
    "_state_dict_pre_hooks": "state_dict pre-hook",
    "_state_dict_hooks": "state_dict hook",
    "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "load_state_dict hook",
}

# Files of `convsplit.integrations`, by the package that a model's class comes from: their `settle` sees to it that a
# converted model lives on there. By name, so that nothing is imported but beside a library that is.
SETTLED_BY = ("ultralytics", "transformers", "diffusers", "segmentation_models_pytorch", "lightning")


@same_globals()
@plain_arithmetic()
@full_products()
def apply_plan(
    model: M,
    plan: Plan,
    *,
    initialise: bool = True,
    progress: bool | None = None,
    fits: Mapping[str, Sequence[CP]] | None = None,
    marginals: Mapping[str, Marginals | Assumed] | None = None,
) -> M:
    """A deep copy of the model with the layers of the plan split; the model itself is not touched.

    Args:
        model: the model the plan was made for, or another instance of the same architecture.
        plan: from `make_plan`, perhaps edited, or read from JSON. Where it splits a layer whose weight is computed at
            every call, the weight that runs in eval mode is split for good.
        initialise: False leaves zeros in the split layers, to be filled with `load_state_dict`; nothing is
            factorised and the model may be on the meta device.
        progress: show a progress bar; by default only on a terminal.
        fits: of each layer's kernel, from its menu, to start from.
        marginals: of each layer's inputs, the metric in which it is factorised; by default what is assumed of inputs
            that nobody has shown.

    Returns:
        a module of the model's own class, with `SeparableConv` layers under the names of those they replace. Forward
        hooks and attributes of those layers go along.

    Warns:
        ConversionWarning: a replaced layer has hooks that cannot be carried over (backward and state_dict hooks), or is
            part of a block that a method of its own would rebuild as one dense convolution (RepVGG's `reparameterize`).

    Raises:
        ValueError: a layer of the plan is missing in the model, has other numbers there, or cannot be split.
        TypeError: the model cannot be deep-copied.

    >>> import convsplit, torch
    >>> model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    >>> plan = convsplit.make_plan(model, budget=convsplit.Budget(params=0.5))
    >>> type(apply_plan(model, plan)[0]).__name__
    'SeparableConv2d'
    """
    originals = _originals(model, plan)
    replacements = {layer.name: _empty(originals[layer.name], layer) for layer in plan.split}

    known, metrics = fits or {}, _assumed(plan, originals) if marginals is None else marginals

    def factorise(names: list[str]) -> list[None]:
        initialise_each(
            [replacements[name] for name in names], [originals[name].conv for name in names], seed=plan.seed,
            fits=[known.get(name, ()) for name in names], marginals=[metrics.get(name) for name in names],
        )  # fmt: skip
        return [None] * len(names)

    if initialise:
        in_batches(
            factorise, list(replacements), "Factorising", alike=lambda name: _kind(replacements[name]),
            size=lambda name: originals[name].conv.weight.numel(), progress=progress,
            cost=lambda name: form_named(replacements[name].form).fit_work(
                replacements[name].spec, replacements[name].components
            ),
        )  # fmt: skip
    _warn_of_rebuilding(model, set(replacements))
    return copy_with(model, replacements)


def _assumed(plan: Plan, originals: Mapping[str, Equivalent]) -> dict[str, Assumed]:
    """Of the layers that are not split exactly: those are so in any metric, to the last digit in the plain one."""
    return {
        layer.name: Assumed.of(layer.spec, originals[layer.name].conv.weight.device)
        for layer in plan.split
        if layer.spec is not None
        and layer.spec.positions > 1
        and layer.option is not None
        and layer.option.error != 0
    }


def _kind(layer: SeparableConv) -> tuple[object, ...]:
    """What layers that are factorised together have in common; their ranks are close, as zeros fill them up."""
    spec, closeness = layer.spec, round(3 * math.log2(layer.components))
    channels = spec.in_channels, spec.out_channels, spec.groups, spec.positions
    return layer.form, closeness, *channels, layer.geometry.weight.dtype, layer.geometry.weight.device


@plain_arithmetic()
def merge(model: M) -> M:
    """A deep copy of a converted model with every split layer merged back into one convolution; exact to rounding.

    >>> layer = SeparableConv2d(4, 8, 3)
    >>> type(merge(nn.Sequential(layer))[0]).__name__
    'Conv2d'
    """
    split = {name: m for name, m in model.named_modules() if isinstance(m, SeparableConv)}
    return copy_with(model, {name: layer.merged() for name, layer in split.items()})


def _originals(model: nn.Module, plan: Plan) -> dict[str, Equivalent]:
    """The plain convolutions that the layers to split equal, if they are those the plan was made for."""
    modules = dict(model.named_modules())
    originals: dict[str, Equivalent] = {}
    for layer in plan.split:
        module = modules.get(layer.name)
        if module is None or not (is_convolution(module) or is_linear(module)):
            found = "no such module" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"the plan splits {layer.name!r}, a {noun([layer.spec])}; the model has {found} there")
        original = equivalent(module)
        if isinstance(original, str):
            raise ValueError(f"the plan splits {layer.name!r}, but in this model: {original}")
        spec = ConvSpec.of(original.conv)
        if spec != layer.spec:
            raise ValueError(f"the plan was made for another {layer.name!r}: it has {layer.spec}, the model {spec}")
        originals[layer.name] = original
    return originals


def _empty(original: Equivalent, layer: PlannedLayer) -> SeparableConv:
    option = layer.option
    assert option is not None
    assert option.structure is not None
    empty = SeparableConv.empty_like(original.conv, **vars(option.structure), pad=copy.deepcopy(original.pad))
    empty.arrangement = option.arrangement
    return empty


def copy_with(model: M, replacements: Mapping[str, nn.Module]) -> M:
    """A deep copy with some modules replaced, under every name they have."""
    modules = dict(model.named_modules())
    # deepcopy looks a module's replacement up where it would have copied it: every alias, attribute and list that
    # held the old module holds the new one in the copy.
    memo: dict[int, Any] = {id(modules[name]): new for name, new in replacements.items()}
    copied = deep_copy(model, memo)
    _put_in(model, copied, {id(modules[name]): new for name, new in replacements.items()})
    for name, new in replacements.items():
        _hand_over(name, modules[name], new, memo)
    _warn_of_closures(model, copied)
    _settle(copied)
    return copied  # type: ignore[return-value]


def _settle(copied: nn.Module) -> None:
    for package in {kind.__module__.split(".")[0] for kind in type(copied).__mro__}.intersection(SETTLED_BY):
        try:
            adapter = importlib.import_module(f"convsplit.integrations.{package}")
        except (ImportError, AttributeError) as error:  # a version that has not what the adapter builds on
            warn(
                f"convsplit.integrations.{package} does not fit this version of {package} ({error}): the model is "
                "converted as any other, but trained, saved and loaded by its library it may become dense or lose its "
                "weights. Use convsplit.save and load, or a newer version"
            )
            continue
        if isinstance(copied, adapter.ROOT):
            adapter.settle(copied)


def _put_in(model: nn.Module, copied: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Replace by name what deepcopy has not: a model's own `__deepcopy__` may build itself anew.

    Raises:
        ValueError: the copy has no such module to replace.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        new = replacements.get(id(module))
        if new is None:
            continue
        try:
            if copied.get_submodule(name) is not new:
                copied.set_submodule(name, new)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"the __deepcopy__ of {type(model).__name__} or of a part of it gives a copy without {name!r}, so that "
                "the layer cannot be replaced there; convsplit works on copies: let it copy what the model has"
            ) from error


def _warn_of_closures(model: nn.Module, copied: nn.Module) -> None:
    """Deepcopy passes functions on as they are: a closure over part of the model keeps using the original's.

    It is the copy's functions that count: a `forward` of an instance may have been bound to the copy.
    """
    own = {id(part) for module in model.modules() for part in (module, *module.parameters(recurse=False))}
    found = [
        f"{function.__qualname__} of {name or type(model).__name__}"
        for name, module in copied.named_modules()
        for function in _functions(module)
        if any(id(part) in own for part in _closed_over(function))
    ]
    if found:
        text = f"functions that hold on to parts of the original model, and go on using those: {', '.join(found)}"
        warn(text)


def _warn_of_rebuilding(model: nn.Module, split: set[str]) -> None:
    """Name blocks that are still to be made one convolution: that is built anew from the kernels, and dense.

    Where batch norm is left in them it has not been done yet.
    """
    found: dict[str, str] = {}
    for name, block in model.named_modules():
        method = _rebuilding_method(block)
        inside = name and method and any(each.startswith(f"{name}.") for each in split)
        if inside and any(isinstance(each, _BatchNorm) for each in block.modules()):
            found.setdefault(f"{type(block).__name__}.{method}", name)
    if found:
        first = ", ".join(f"{method} ({name}, for one)" for method, name in found.items())
        warn(
            f"methods that build one dense convolution out of layers that are split now: {first}. If you want them, "
            "call them first (timm.utils.reparameterize_model, switch_to_deploy) and convert what they give"
        )


def _rebuilding_method(block: nn.Module) -> str:
    """The method of a block that adds its branches up to a new convolution; empty where there is none."""
    names = [*_REBUILDING, *(["fuse"] if type(block).__module__.startswith("timm.") else [])]
    return next((name for name in names if callable(getattr(type(block), name, None))), "")


def _functions(module: nn.Module) -> Iterator[FunctionType]:
    """Plain functions among a module's attributes and hooks."""
    values = list(vars(module).values())
    for value in (*values, *(each for held in values if isinstance(held, dict) for each in held.values())):
        if isinstance(value, FunctionType):
            yield value


def _closed_over(function: FunctionType) -> Iterator[Any]:
    """What a function's closure holds; cells may be empty."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            yield cell.cell_contents


def _hand_over(name: str, old: nn.Module, new: nn.Module, memo: dict[int, Any]) -> None:
    """Give the new module what users attached to the old one: attributes and forward hooks, as deepcopy does."""
    for key, value in vars(old).items():
        if key not in _OWN:
            new.__dict__.setdefault(key, copy.deepcopy(value, memo))
    for key in _CARRIED:
        hooks = OrderedDict((i, hook) for i, hook in vars(old)[key].items() if not is_weight_hook(hook))
        new.__dict__[key] = copy.deepcopy(hooks, memo)
    lost = [
        f"{getattr(hook, '__qualname__', type(hook).__qualname__)} ({kind})"
        for key, kind in _LEFT_BEHIND.items()
        for hook in map(_unwrapped, vars(old)[key].values())
        if not is_weight_hook(hook)
    ]
    if lost:
        text = f"hooks on {name!r} that the layer which replaces it does not have: {', '.join(lost)}"
        warn(text)


def _unwrapped(hook: Any) -> Any:
    return getattr(hook, "hook", hook)  # torch wraps the pre-hooks of load_state_dict
