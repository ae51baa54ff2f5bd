"""For training loops of one's own: parameter groups that treat factors as they want, and a check of the optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convsplit.layers.separable import SeparableConv
from convsplit.spec import is_plain


def parameter_groups(
    converted: nn.Module, *, lr: float = 1e-3, weight_decay: float = 1e-4, split_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` optimiser: factors, other weights, and what is never decayed.

    Factors of split layers are not decayed: decay on factors pulls at the sum of their squared norms, which is
    a penalty on components (a nuclear norm) that lowers the rank, not the plain decay of a dense weight. For
    that, add `weight_decay / 2 * kernel_penalty(converted)` to the loss. Biases, norms and every other parameter of one
    dimension are not decayed either.

    Args:
        converted: a converted model.
        lr: learning rate of what is not split.
        weight_decay: of weights that are not split.
        split_lr: learning rate of the factors; `lr` by default.

    Raises:
        ValueError: no parameter of the model can be trained.

    >>> model = convsplit.convert(nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 8, 1)))
    >>> [(group["name"], len(group["params"])) for group in parameter_groups(model)]
    [('factors', 3), ('weights', 1), ('undecayed', 4)]
    """
    factors = {
        id(stage.weight)
        for layer in converted.modules()
        if isinstance(layer, SeparableConv)
        for stage in layer.stages.values()
        if is_plain(stage)
    }
    trained = [parameter for parameter in converted.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient; say model.requires_grad_(True) first")
    own = [p for p in trained if id(p) in factors]
    weights = [p for p in trained if id(p) not in factors and p.dim() > 1]
    rest = [p for p in trained if id(p) not in factors and p.dim() <= 1]
    groups = [
        {"name": "factors", "params": own, "lr": lr if split_lr is None else split_lr, "weight_decay": 0.0},
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {"name": "undecayed", "params": rest, "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def kernel_penalty(converted: nn.Module) -> Tensor:
    """The sum of squares of the kernels that split layers add up to: what weight decay of the dense layers is.

    >>> model = convsplit.convert(nn.Sequential(nn.Conv2d(8, 32, 3)))
    >>> bool(torch.isclose(kernel_penalty(model), model[0].weight.square().sum()))
    True
    """
    kernels = [layer.weight for layer in converted.modules() if isinstance(layer, SeparableConv)]
    return torch.stack([kernel.square().sum() for kernel in kernels]).sum() if kernels else torch.zeros(())


def check_optimizer(optimizer: torch.optim.Optimizer, converted: nn.Module) -> None:
    """Make sure that an optimiser trains the converted model, not the one it came from.

    Raises:
        ValueError: the optimiser holds parameters that are not the model's, or lacks some that require gradients.

    >>> model = nn.Sequential(nn.Conv2d(8, 32, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> check_optimizer(optimizer, convsplit.convert(model))
    Traceback (most recent call last):
    ...
    ValueError: the optimizer holds 2 parameters that are not the model's (it was made for the model before conversion?) and lacks 4 of its 4 trainable ones: make it anew, torch.optim.SGD(convsplit.finetune.parameter_groups(converted))
    """  # noqa: E501
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in converted.parameters()}
    trainable = {id(p) for p in converted.parameters() if p.requires_grad}
    foreign, missing = len(held - own), len(trainable - held)
    parts = []
    if foreign:
        parts.append(
            f"holds {foreign} parameters that are not the model's (it was made for the model before conversion?)"
        )
    if missing:
        parts.append(f"lacks {missing} of its {len(trainable)} trainable ones")
    if parts:
        anew = f"torch.optim.{type(optimizer).__name__}(convsplit.finetune.parameter_groups(converted))"
        raise ValueError(f"the optimizer {' and '.join(parts)}: make it anew, {anew}")
