"""Whole models as ONNX files, through PyTorch's exporter.

There are two: the one that records with torch.export, and the older one that traces. The first is tried first. Where it
fails (data that decide what runs, kinds of inputs it does not know), the older one may not; it refuses to add to one
place twice and fixes all sizes but those that are said to vary.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_flatten, tree_unflatten

from convsplit.model.running import Batch, Forward, quiet_run, tensors_in
from convsplit.model.values import named_tensors_in

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
    names = _names(model, batch, forward)
    problems = []
    for exporter in (_recorded, _traced):
        try:
            with quiet_run(model), _silence():
                exporter(flat, tensors, names, path, dynamic)
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


def sizes_that_vary(model: nn.Module, tensors: Sequence[Tensor], dynamic: Sequence[int]) -> Any:
    """`dynamic_shapes` of `torch.export` for what `flattened` gave; None where all sizes are fixed."""
    if not dynamic:
        return None
    sizes = tuple({axis: Dim.AUTO for axis in dynamic if axis < tensor.dim()} for tensor in tensors)
    return (sizes,) if isinstance(model, _Flat) else sizes  # its arguments are one row


def _recorded(
    model: nn.Module, tensors: tuple[Tensor, ...], names: list[str], path: Path, dynamic: Sequence[int]
) -> None:
    program = torch.onnx.export(
        model, tensors, dynamo=True, verbose=False, input_names=names,
        dynamic_shapes=sizes_that_vary(model, tensors, dynamic),
    )  # fmt: skip
    assert program is not None
    program.save(path)


def _traced(
    model: nn.Module, tensors: tuple[Tensor, ...], names: list[str], path: Path, dynamic: Sequence[int]
) -> None:
    axes = {
        name: {axis: f"{name}_{axis}" for axis in dynamic if axis < tensor.dim()}
        for name, tensor in zip(names, tensors, strict=True)
    }
    torch.onnx.export(
        model, tensors, str(path), dynamo=False, input_names=names, dynamic_axes=axes if dynamic else None
    )


def _names(model: nn.Module, batch: Batch, forward: Forward | None) -> list[str]:
    """Of the inputs: keys of a dict, else arguments of the model, else numbers."""
    found = [name for name, _ in named_tensors_in(batch)]
    if forward is None and not any(found):
        found = list(inspect.signature(model.forward).parameters)[: len(found)] if len(found) else []
    fits = len(set(found)) == len(list(tensors_in(batch))) and all(found)
    return found if fits else [f"input_{index}" for index, _ in enumerate(tensors_in(batch))]


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
