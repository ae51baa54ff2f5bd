"""Memory layout of convolutions' weights: channels-last is what CPU kernels of depthwise convolutions are fast in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

M = TypeVar("M", bound=nn.Module)


def channels_last(value: Any) -> Any:
    """The same value with every [N, C, H, W] tensor in it in channels-last layout."""
    return tree_map(lambda x: x.contiguous(memory_format=torch.channels_last) if _is_image(x) else x, value)


def in_channels_last(model: M) -> M:
    """The model, its [N, C, H, W] tensors in channels-last layout; those of other dimensions stay as they are."""
    for tensor in (*model.parameters(), *model.buffers()):
        if _is_image(tensor):
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


@contextmanager
def channels_last_weights(*models: nn.Module) -> Iterator[None]:
    """Weights of convolutions in channels-last layout while inside; the parameters stay the same objects."""
    weights = [p for model in models for p in model.parameters() if _is_image(p) and p.is_contiguous()]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.layout is torch.strided
