"""Recognition: which layers a state_dict holds split, and how, read off the names and shapes in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from convsplit.checkpoints.names import STAGES, may_be_split
from convsplit.forms import KNOWN, Form
from convsplit.kinds import equivalent, is_convolution
from convsplit.layers.separable import SeparableConv
from convsplit.spec import ConvSpec
from convsplit.storage import StoredLayer, layer_problems, printed

_FORMS = {
    tuple(name for name, there in zip(STAGES, (f.filters, f.expands, f.projects), strict=True) if there): f
    for f in KNOWN.values()
}


def recognise(model: nn.Module, state: Mapping[str, Any]) -> tuple[StoredLayer, ...]:
    """The layers of a model that a state_dict under the model's names holds split.

    Each is a value of names and numbers that goes to JSON (`dataclasses.asdict`); `skeleton` builds them.

    Raises:
        ValueError: under the name of a convolution are tensors that are no stages of one; names each.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1))
    >>> layer, = recognise(model, convsplit.convert(model, forms="pw-dw-pw", rank=4).state_dict())
    >>> layer.name, layer.form, layer.components
    ('0', 'pw-dw-pw', 4)
    """
    layers: list[StoredLayer] = []
    problems: list[str] = []
    for name, module in _layers(model):
        own = _inside(name, state)
        stages = tuple(stage for stage in STAGES if stage in own)
        if stages:
            found = _read(name, module, stages, own)
            if isinstance(found, str):
                problems.append(found)
            else:
                layers.append(found)
        elif foreign := _foreign(name, module, own):
            problems.append(foreign)
    problems += layer_problems(
        model, layers, {key: value for key, value in state.items() if isinstance(value, Tensor)}
    )
    if problems:
        raise ValueError("\n  ".join(["the state_dict holds layers that cannot be rebuilt:", *problems]))
    return tuple(layers)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that may be split somewhere, none of what is inside another one."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module not in inside and may_be_split(module):
            inside.update(module.modules())
            yield name, module


def _inside(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the state_dict has below a name, with the rest of each name."""
    prefix = f"{name}." if name else ""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _read(name: str, module: nn.Module, stages: tuple[str, ...], own: Mapping[str, Any]) -> StoredLayer | str:
    form, original = _FORMS.get(stages), None if isinstance(module, SeparableConv) else equivalent(module)
    if form is None:
        return f"{name!r} has {', '.join(sorted(own))}, which are the stages of no form"
    if isinstance(original, str):
        return f"{name!r} is split in the state_dict; in the model, {original}"
    if isinstance(module, SeparableConv):
        spec, pad = module.spec, module.stages.get("pad")
    else:
        assert original is not None
        spec, pad = ConvSpec.of(original.conv), original.pad
    components = _components(form, spec, own)
    if not components:
        return f"the shapes of {', '.join(stages)} of {name!r} are not those of {spec} as {form.name}"
    last = "pointwise_out" if form.projects else "depthwise"
    bias = spec.bias or f"{last}.bias" in own or "sum.bias" in own  # a repair adds one, nothing takes one away
    even = not {"gather.channels", "sum.channels"} & set(own)
    numbers = {**spec.to_json(), "bias": bias}
    return StoredLayer(name, numbers, printed(pad), form.name, components, even)


def _components(form: Form, spec: ConvSpec, own: Mapping[str, Any]) -> int:
    """R from the number of weights in the first stage that has R filters; 0 where they do not come out even."""
    key, each = (
        ("depthwise.weight", spec.positions)
        if form.filters
        else ("pointwise_in.weight", spec.in_channels // spec.groups)
    )
    count = own[key].numel() if isinstance(own[key], Tensor) else 0
    return 0 if count % each else count // each


def _foreign(name: str, module: nn.Module, own: Mapping[str, Any]) -> str:
    """Where a convolution has none of its tensors in the state_dict, but others: somebody else's stages."""
    known = set(module.state_dict())
    if isinstance(module, SeparableConv) or not is_convolution(module) or not own or known & set(own):
        return ""
    return (
        f"{name!r} has {', '.join(sorted(own)[:6])}: no weight, and no stages of a split layer "
        f"({', '.join(STAGES)}); a layer split by other code has to be renamed"
    )
