"""A converted model beside the one it came from: which layers were split, and whether the two are given in order."""

from __future__ import annotations

from torch import nn

from convsplit.layers.separable import SeparableConv

Pairs = dict[str, tuple[nn.Module, SeparableConv]]


def check_order(converted: nn.Module, original: nn.Module, call: str) -> None:
    """Refuse a converted model and its original that were given in the wrong order.

    Raises:
        ValueError: only the second holds split layers; says how `call` goes.
    """
    if not _split(converted) and _split(original):
        raise ValueError(f"converted holds no split layer, original does: the order is {call}")


def layer_pairs(converted: nn.Module, original: nn.Module) -> Pairs:
    """Each split layer with the module it replaced, by name.

    Raises:
        ValueError: the original has no module of that name.
    """
    originals = dict(original.named_modules())
    pairs: Pairs = {}
    for name, layer in _split(converted).items():
        replaced = originals.get(name)
        if replaced is None:
            raise ValueError(f"converted has a split layer {name!r}, original has no such module: not its conversion")
        if not isinstance(replaced, SeparableConv):
            pairs[name] = (replaced, layer)
    return pairs


def _split(model: nn.Module) -> dict[str, SeparableConv]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SeparableConv)}
