"""Sharing: which parameters belong to more than one module."""

from __future__ import annotations

from collections import Counter

from torch import nn


def holders(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id; one that a module holds under two names counts twice.

    >>> tied = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    >>> tied[1].weight = tied[0].weight
    >>> list(holders(tied).values())
    [2]
    """
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
