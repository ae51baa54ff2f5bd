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
def full_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever faster formats (TF32, bfloat16) the user allows models.

    Their rounding, 1e-3, is as large as what a sweep of an alternating fit gains. Both of PyTorch's settings are put
    back as they were: `torch.set_float32_matmul_precision`, and `fp32_precision` of single backends, which make the
    first unreadable where they differ from it.
    """
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    if set(before) <= {"ieee", "none"}:
        yield
        return
    try:
        whole = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:
        whole = None
        for backend in backends:
            backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        if whole is not None:
            torch.set_float32_matmul_precision(whole)
        for backend, own in zip(backends, before, strict=True):
            backend.fp32_precision = own


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
