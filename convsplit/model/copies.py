"""Copies of models: the user's own is never run, traced or changed."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def scratch_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode that shares the parameters: cheap, and free to be run and traced.

    Raises:
        TypeError: the model cannot be deep-copied, so it could not be converted either.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return deep_copy(model, shared).eval()


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` with an error that says what a model must allow.

    Tensors that modules keep as plain attributes and that hang on to a graph, which deepcopy refuses (weight_norm
    leaves such a `weight` behind), are detached in the copy.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}); convsplit never "
            "changes the model it is given, so it needs a copy. Give it a model whose copy.deepcopy works"
        ) from error
