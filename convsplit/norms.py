"""Norms: which modules are a batch norm in eval mode, the scale and shift each of them is, and what it does besides.

Those of torch are known by their exact class, that of timm with an activation behind it by name. Frozen ones, of which
torchvision, timm and every detector of transformers have a class each, are known by what they hold; they are believed
only after they were seen to do no more than scale and shift.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WITH_ACTIVATION = "timm.layers.norm_act.BatchNormAct2d"
_HELD = ("weight", "bias", "running_mean", "running_var")
_BEHIND = ("drop", "act")  # what norms of timm do next, in this order


@dataclass(frozen=True)
class Affine:
    """What a norm comes to in eval mode: y·scale + shift [O], and what it does with that."""

    scale: Tensor
    shift: Tensor
    behind: nn.Module


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module looks like one of the norms that are known; `affine_of` tells whether it can be folded.

    >>> is_norm(nn.BatchNorm2d(4)), is_norm(nn.GroupNorm(2, 4))
    (True, False)
    """
    kind = type(module)
    named = f"{kind.__module__}.{kind.__qualname__}" == _WITH_ACTIVATION
    return module is not None and (kind in NORMS or named or _is_frozen(module))


def _is_frozen(module: nn.Module) -> bool:
    held = set(module._buffers) == set(_HELD) and None not in module._buffers.values()
    return held and not module._parameters and set(module._modules) <= set(_BEHIND)


@torch.no_grad()
def affine_of(norm: nn.Module) -> Affine | None:
    """Scale and shift of a norm in eval mode; None where it does more than that, or works on each batch's statistics.

    >>> affine_of(nn.BatchNorm2d(2, eps=0)).scale
    tensor([1., 1.])
    """
    if _is_frozen(norm):
        return _probed(norm)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.running_var is None or norm.running_mean is None:
        return None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -scale * norm.running_mean
    return Affine(scale, shift if norm.bias is None else shift + norm.bias, _behind(norm))


def _probed(norm: nn.Module) -> Affine | None:
    """Of a frozen norm, whose epsilon may stand in its code, by what it makes of 0 and of 1."""
    twin = copy.deepcopy(norm).double()
    for name in twin._modules:
        twin._modules[name] = nn.Identity()
    like = norm.get_buffer("weight")
    x = torch.linspace(-3, 3, 4 * len(like), dtype=torch.float64, device=like.device).view(1, -1, 2, 2)
    try:
        zero, one, found = twin(torch.zeros_like(x)), twin(torch.ones_like(x)), twin(x)
    except (RuntimeError, ValueError, TypeError):
        return None
    scale = one - zero
    if found.shape != x.shape or not torch.allclose(found, scale * x + zero, rtol=1e-9, atol=1e-9):
        return None
    return Affine(scale[0, :, 0, 0].to(like), zero[0, :, 0, 0].to(like), _behind(norm))


def _behind(norm: nn.Module) -> nn.Module:
    found = (norm._modules.get(name) for name in _BEHIND)
    steps = [each for each in found if each is not None and type(each) is not nn.Identity]
    # A plain identity: with the numbers of a norm that does nothing it would be folded once more by code that takes a
    # convolution before a norm to have no bias (timm's ConvNorm.fuse), and the bias that it has now would be lost.
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps) if steps else nn.Identity()
