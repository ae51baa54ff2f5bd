"""Batches: an iterable of what a model is called with, read and checked once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from convsplit.data.processes import all_reduced
from convsplit.model.running import Batch, batches_in, tensors_in
from convsplit.progress import ConversionWarning


def checked_batches(batches: Any) -> list[Batch]:
    """All batches, read once, none of them NaN or infinite.

    Raises:
        ValueError: no batches, or one with NaN or infinite values (says which).
    """
    data = list(batches_in(batches))
    counts = all_reduced(torch.tensor([len(data), -len(data)]), "MAX").tolist()
    if counts[0] and not counts[1]:
        raise ValueError("one of the processes has no batches: deal them out so that each has some")
    if counts[0] != -counts[1]:
        text = f"processes have from {-counts[1]} to {counts[0]} batches: each position counts the same, whoever has it"
        warnings.warn(text, ConversionWarning, stacklevel=3)
    if not data:
        raise ValueError("no batches: give some unlabelled inputs to calibrate on")
    for index, batch in enumerate(data):
        if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors_in(batch)):
            raise ValueError(f"batch {index} holds NaN or infinite values: leave it out")
    return data if torch.is_inference_mode_enabled() else [tree_map(_outside_inference, batch) for batch in data]


def _outside_inference(value: Any) -> Any:
    """Tensors made in inference mode cannot be part of a graph outside of it, their copies can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
