"""Precision: arithmetic in float32 at least, whatever a model is stored in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def widened(values: Tensor) -> Tensor:
    """The same in float32 at least: sums of squares must not be rounded as features are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def widened_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Parameters and buffers of some modules in float32 at least while inside; afterwards as they are stored."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    narrow = [(t, t.dtype, t.data) for t in tensors if t.dtype != torch.promote_types(t.dtype, torch.float32)]
    try:
        for tensor, _, values in narrow:
            tensor.data = widened(values)
        yield
    finally:
        for tensor, dtype, values in narrow:
            rounded = tensor.data.to(dtype)
            tensor.data = values  # the same memory as before, which others may share
            values.copy_(rounded)
