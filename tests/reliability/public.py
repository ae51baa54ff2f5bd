"""The calls of the library that these checks make, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import convsplit
from convsplit import Plan

QUICK = ("dw-pw", "pw-dw")  # forms whose fits take no iterations


def exact_plan(model: nn.Module, inputs: Any) -> Plan:
    return convsplit.make_plan(model, inputs, exact=True)


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    return convsplit.apply_plan(model, plan)


def convert(model: nn.Module, inputs: Any, calibration: Any = None) -> nn.Module:
    return convsplit.convert(model, inputs, rank=1, forms=QUICK, calibration=calibration, progress=False)


def refit(converted: nn.Module, original: nn.Module, batches: Any) -> None:
    convsplit.refit(converted, original, batches, progress=False)


def distill(converted: nn.Module, teacher: nn.Module, batches: Any) -> None:
    convsplit.distill(converted, teacher, batches, epochs=2, progress=False)


def run(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """The tensors of a model's answer."""
    arguments = inputs if isinstance(inputs, tuple | dict) else (inputs,)
    with torch.no_grad():
        return tree_leaves(model(**arguments) if isinstance(arguments, dict) else model(*arguments))
