"""Rewriting: a plan applied to a copy of the model, and split layers merged back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from convsplit.layers import SeparableConv2d
from convsplit.plan import Plan, PlannedLayer
from convsplit.progress import track
from convsplit.spec import ConvSpec
from convsplit.trace import deep_copy

M = TypeVar("M", bound=nn.Module)


def apply_plan(model: M, plan: Plan, *, initialise: bool = True, progress: bool | None = None) -> M:
    """A deep copy of the model with the layers of the plan split; the model itself is not touched.

    Args:
        model: the model the plan was made for, or another instance of the same architecture.
        plan: from `make_plan`, perhaps edited, or read from JSON.
        initialise: False leaves zeros in the split layers, to be filled with `load_state_dict`; nothing is
            factorised and the model may be on the meta device.
        progress: show a progress bar; by default only on a terminal.

    Returns:
        a module of the model's own class, with `SeparableConv2d` under the names of the layers they replace.

    Raises:
        ValueError: a layer of the plan is missing in the model, or has other numbers there.

    >>> import convsplit, torch
    >>> model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    >>> plan = convsplit.make_plan(model, budget=convsplit.Budget(params=0.5))
    >>> type(apply_plan(model, plan)[0]).__name__
    'SeparableConv2d'
    """
    _check_fits(model, plan)
    replacements: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for layer in track(plan.split, "Factorising", progress=progress):
        replacements[layer.name] = _split(modules[layer.name], layer, initialise, plan.seed)
    return _copy_with(model, replacements)


def merge(model: M) -> M:
    """A deep copy of a converted model with every split layer merged back into one `Conv2d`; exact to rounding.

    >>> layer = SeparableConv2d(4, 8, 3)
    >>> type(merge(nn.Sequential(layer))[0]).__name__
    'Conv2d'
    """
    split = {name: m for name, m in model.named_modules() if isinstance(m, SeparableConv2d)}
    return _copy_with(model, {name: layer.merged() for name, layer in split.items()})


def _check_fits(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    for layer in plan.split:
        module = modules.get(layer.name)
        if not isinstance(module, nn.Conv2d):
            found = "no such module" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"the plan splits {layer.name!r}, a Conv2d; the model has {found} there")
        if ConvSpec.of(module) != layer.spec:
            raise ValueError(
                f"the plan was made for another {layer.name!r}: it has {layer.spec}, the model {ConvSpec.of(module)}"
            )


def _split(conv: nn.Module, layer: PlannedLayer, initialise: bool, seed: int) -> SeparableConv2d:
    option = layer.option
    assert option is not None
    assert isinstance(conv, nn.Conv2d)
    empty = SeparableConv2d.empty_like(conv, form=option.form, components=option.components, even=option.even)
    return empty.initialise_from(conv, seed=seed) if initialise else empty


def _copy_with(model: M, replacements: dict[str, nn.Module]) -> M:
    """A deep copy with some modules replaced, under every name they have."""
    modules = dict(model.named_modules())
    if "" in replacements:  # the model is itself one of the layers
        return replacements[""]  # type: ignore[return-value]
    # deepcopy looks a module's replacement up where it would have copied it: every alias, attribute and list that
    # held the old module holds the new one in the copy.
    return deep_copy(model, {id(modules[name]): new for name, new in replacements.items()})  # type: ignore[return-value]
