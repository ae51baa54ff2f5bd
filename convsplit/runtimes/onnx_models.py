"""Whole models as ONNX files, through PyTorch's exporter.

There are two: the one that records with torch.export, and the older one that traces. The first is tried first. Where it
fails (data that decide what runs, kinds of inputs it does not know), the older one may not; it refuses to add to one
place twice and fixes all sizes but those that are said to vary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from convsplit.model.running import Batch, Forward, quiet_run, tensors_in

_TALKATIVE = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


def write_onnx(
    model: nn.Module, batch: Batch, path: Path, *, forward: Forward | None = None, dynamic: Sequence[int] = ()
) -> None:
    """Write a model in eval mode as an ONNX file whose inputs are the tensors of the batch, in order.

    `dynamic`: dimensions of every input that may have other sizes later, such as 0 for the batch.

    Raises:
        ValueError: neither exporter takes it; says why.
    """
    flat, tensors = flattened(model, batch, forward)
    problems = []
    for exporter in (_recorded, _traced):
        try:
            with quiet_run(model), _silence():
                exporter(flat, tensors, path, dynamic)
        except Exception as error:  # noqa: PERF203 - of two; what exporters raise is not theirs alone
            text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            problems.append(f"{exporter.__name__.strip('_')}: {type(error).__name__}: {text}")
        else:
            return
    raise ValueError(f"{type(model).__name__} cannot be exported to ONNX ({'; '.join(problems)})")


def flattened(model: nn.Module, batch: Batch, forward: Forward | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module that takes the tensors of the batch one by one, and those; the model itself where it does already."""
    tensors = tuple(tensors_in(batch))
    positional = batch if isinstance(batch, tuple | list) else (batch,)
    if forward is None and all(isinstance(each, Tensor) for each in positional):
        return model, tensors
    return _Flat(model, batch, forward), tensors


class _Flat(nn.Module):
    """A model behind a row of tensors: numbers, strings and None in the batch stay what they were."""

    def __init__(self, model: nn.Module, batch: Batch, forward: Forward | None) -> None:
        super().__init__()
        leaves, self.structure = tree_flatten(batch)
        self.constants: list[Any] = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.model, self.through = model, forward

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.constants)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        batch = tree_unflatten(leaves, self.structure)
        if self.through is not None:
            return self.through(self.model, batch)
        return self.model(**batch) if isinstance(batch, Mapping) else self.model(*batch)


def _recorded(model: nn.Module, tensors: tuple[Tensor, ...], path: Path, dynamic: Sequence[int]) -> None:
    varying: Any = tuple(_sizes(tensor, dynamic) for tensor in tensors) if dynamic else None
    if varying and isinstance(model, _Flat):
        varying = (varying,)  # its arguments are one row
    program = torch.onnx.export(model, tensors, dynamo=True, verbose=False, dynamic_shapes=varying)
    assert program is not None
    program.save(path)


def _traced(model: nn.Module, tensors: tuple[Tensor, ...], path: Path, dynamic: Sequence[int]) -> None:
    names = [f"input_{index}" for index in range(len(tensors))]
    axes = {
        name: {axis: f"{name}_{axis}" for axis in dynamic if axis < tensor.dim()}
        for name, tensor in zip(names, tensors, strict=True)
    }
    torch.onnx.export(
        model, tensors, str(path), dynamo=False, input_names=names, dynamic_axes=axes if dynamic else None
    )


def _sizes(tensor: Tensor, dynamic: Sequence[int]) -> dict[int, Any]:
    return {axis: torch.export.Dim.AUTO for axis in dynamic if axis < tensor.dim()}


@contextmanager
def _silence() -> Iterator[None]:
    """Exporters report every step and warn of what is none of the user's making."""
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def as_arrays(batch: Batch) -> list[Any]:
    """The tensors of a batch as NumPy arrays, in order."""
    return [tensor.detach().cpu().contiguous().numpy() for tensor in tensors_in(batch)]
