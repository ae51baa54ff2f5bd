"""All that a model is, as a value: two snapshots are equal if nothing changed between them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module, *, values: bool = True) -> dict[str, Any]:
    """Modules, parameters, buffers, attributes, modes and hooks by name; without `values`, whatever tensors hold."""
    return {
        name: (id(module), type(module), {key: _frozen(value, values) for key, value in vars(module).items()})
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _frozen(value: Any, values: bool) -> Any:
    if isinstance(value, Tensor):
        return _frozen_tensor(value, values)
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, Mapping):
        return [(key, _frozen(item, values)) for key, item in value.items()]
    if isinstance(value, list | tuple | set):
        return type(value), [_frozen(item, values) for item in value]
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device):
        return value
    return id(value), repr(value)


def _frozen_tensor(tensor: Tensor, values: bool) -> Any:
    kind = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
    if not values:
        return kind
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    gradient = None if not tensor.is_leaf or tensor.grad is None else _frozen_tensor(tensor.grad, values)
    return id(tensor), kind, hashlib.sha256(raw).hexdigest(), gradient
