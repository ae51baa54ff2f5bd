"""Precision: arithmetic in float32 at least, whatever a model is stored in."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(values: Tensor) -> Tensor:
    """The same in float32 at least: sums of squares are not to be rounded as features are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
