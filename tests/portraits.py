"""Portraits: all that converting a model must leave as it was, of the model and of the process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import tensorly as tl
import torch
from torch import Tensor, nn

HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def stored_bytes(tensor: Tensor) -> bytes:
    """The numbers bit by bit, so that NaN equals NaN; of a clone, as numpy makes a storage impossible to resize."""
    return (
        tensor.detach().clone().contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.dim()
        else repr(tensor.item()).encode()
    )


def portrait(model: nn.Module) -> list[Any]:
    """Everything about a model that converting a copy of it must not change."""
    lines: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        lines.append((name, id(module), type(module), module.training))
        lines += [(key, list(vars(module)[key].items())) for key in HOOKS if key in vars(module)]
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            lines.append((key, id(tensor)))
            if tensor is not None and not nn.parameter.is_lazy(tensor):
                grad = None if tensor.grad is None else tensor.grad.clone()
                lines.append(
                    (tensor.requires_grad, tensor.dtype, tensor.device, tensor.stride(), tensor._version, grad)
                )
                lines.append(None if tensor.is_meta else stored_bytes(tensor))
    return lines


def globals_now() -> list[Any]:
    state = np.random.get_state()
    return [
        torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2], torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.get_num_threads(), tl.get_backend(),
    ]  # fmt: skip
