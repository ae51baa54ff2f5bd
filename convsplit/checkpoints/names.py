"""Names: what wrappers put before the names of a state_dict, or in the middle of them, found out and undone."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from convsplit.kinds import is_convolution, is_linear
from convsplit.layers.separable import SeparableConv
from convsplit.storage import state_of

STAGES = ("depthwise.weight", "pointwise_in.weight", "pointwise_out.weight")
_OTHERS = ("weight", "bias", "depthwise.bias", "pointwise_out.bias", "sum.bias", "sum.channels", "gather.channels")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # also in the middle of names


def aligned(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state_dict under the names of the model, whether either of them is wrapped in other modules.

    Raises:
        ValueError: it has no names in common with the model, or holds several models that it fits.
    """
    places = _places(model)
    wrappers = _WRAPPERS - {part for place in places for part in place.split(".")}
    state = _renamed(state, {k: ".".join(part for part in k.split(".") if part not in wrappers) for k in state})
    stripped, added = _prefixes(state, places), _prefixes(places, state)
    if not stripped and not added:
        raise ValueError(
            f"the state_dict has no names in common with this {type(model).__name__}: it has "
            f"{', '.join(list(state)[:4])}, the model {', '.join(sorted(places)[:4])}"
        )
    if _hits(added) > _hits(stripped):
        prefix = added.most_common(1)[0][0]
        return _under_all_names(_renamed(state, {key: prefix + key for key in state}), model)
    prefix = _one_of(stripped)
    own_last = sorted(state, key=lambda key: key.startswith(prefix))
    return _under_all_names(_renamed(state, {key: key.removeprefix(prefix) for key in own_last}), model)


def _under_all_names(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Tensors of one module that has several names, under each of them: some libraries store only one."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for own in names.values():
        if len(own) > 1:
            held = {
                k.removeprefix(f"{name}."): v for name in own for k, v in state.items() if k.startswith(f"{name}.")
            }
            state.update({f"{name}.{key}": value for name in own for key, value in held.items()})
    return state


def _one_of(prefixes: Counter[str]) -> str:
    """That under which most names are the model's; none that another comes close to, for there are two models then."""
    ranked = sorted(prefixes, key=lambda prefix: (-prefixes[prefix], len(prefix)))
    close = [prefix for prefix in ranked if 2 * prefixes[prefix] >= prefixes[ranked[0]]]
    if ranked[0] and len(close) > 1:
        raise ValueError(
            f"the state_dict has the model's names under {' and under '.join(map(repr, close[:4]))}: give the part "
            "that is meant, its names without that"
        )
    return ranked[0]


def may_be_split(module: nn.Module) -> bool:
    """Whether a layer is split, or is of a kind that checkpoints may hold split."""
    return isinstance(module, SeparableConv) or is_convolution(module) or is_linear(module)


def _places(model: nn.Module) -> set[str]:
    """All names that tensors of the model have or would have, if its layers were split or dense."""
    places = set(state_of(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if may_be_split(module):
            places.update(f"{name}.{each}".lstrip(".") for each in (*STAGES, *_OTHERS))
    return places


def _prefixes(longer: Iterable[str], shorter: Iterable[str]) -> Counter[str]:
    """What stands before names of the one so that the rest is a name of the other, with how often."""
    known = set(shorter)
    found: Counter[str] = Counter()
    for key in longer:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                found["".join(f"{part}." for part in parts[:start])] += 1
    return found


def _hits(prefixes: Counter[str]) -> int:
    return max(prefixes.values(), default=0)


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The state_dict under other names, later ones winning, with the version numbers that modules ask for."""
    renamed: dict[str, Any] = OrderedDict((names[key], state[key]) for key in names)
    metadata = getattr(state, "_metadata", None)
    if metadata:
        modules = {key.rpartition(".")[0]: new.rpartition(".")[0] for key, new in names.items()}
        renamed._metadata = {modules.get(key, key): value for key, value in metadata.items()}  # type: ignore[attr-defined]
    return renamed
