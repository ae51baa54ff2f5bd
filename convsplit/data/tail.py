"""What follows a convolution and belongs to its repair: batch norm, the sum with a shortcut, ReLU.

The model goes on with act(g y + h + s), where y is the layer's answer, g and h the batch norm's scale and shift and s
the shortcut. Two things can be gained by fitting that instead of y:

* The shortcut of the converted model carries the errors of earlier blocks, and the layer can correct them: its target
  is y + (s_original - s_converted) / g.
* Where the original's ReLU gives zero, any negative answer will do. The target there is min(z, 0) for the current
  answer z = g y + h + s, and fitting and moving the target in turn minimises the error behind the ReLU by majorisation:
  Zhang et al., "Accelerating very deep convolutional networks", 2016 (1505.06798), section 3.2.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convsplit.model.graphs import attribute

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RECTIFIERS = {
    nn.ReLU: float("inf"), F.relu: float("inf"), F.relu_: float("inf"), torch.relu: float("inf"),
    torch.relu_: float("inf"), "relu": float("inf"), "relu_": float("inf"), nn.ReLU6: 6.0, F.relu6: 6.0,
}  # fmt: skip
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
FAINT = 1e-3  # of the largest scale: channels that batch norm all but switches off keep their own answer as target


@dataclass(frozen=True)
class Tail:
    """z = scale[O] * y + shift[O] + shortcut, then clamped to [0, `ceiling`] where that is not None."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    shortcut: fx.Node | None = None
    ceiling: float | None = None

    def answer(self, y: Tensor, shortcut: Tensor | None) -> Tensor:
        """What stands before the activation, z [C, n], for a layer's answer y [C, n]."""
        if self.scale is not None and self.shift is not None:
            y = y * self.scale.to(y)[:, None] + self.shift.to(y)[:, None]
        return y if shortcut is None else y + shortcut

    def question(self, z: Tensor, shortcut: Tensor | None, otherwise: Tensor) -> Tensor:
        """The layer's answer y that gives z, or `otherwise` in the channels where it hardly matters."""
        if shortcut is not None:
            z = z - shortcut
        if self.scale is None or self.shift is None:
            return z
        scale, shift = self.scale.to(z)[:, None], self.shift.to(z)[:, None]
        audible = scale.abs() > FAINT * scale.abs().max()
        return torch.where(audible, (z - shift) / torch.where(audible, scale, 1.0), otherwise)

    def activated(self, z: Tensor) -> Tensor:
        """What the model goes on with."""
        return z if self.ceiling is None else z.clamp(0, self.ceiling)

    def nearest(self, wanted: Tensor, current: Tensor) -> Tensor:
        """Of all z with the same activation as `wanted`, the one nearest to `current`."""
        if self.ceiling is None:
            return wanted
        target = torch.where(wanted > 0, wanted, current.clamp_max(0))
        return torch.where(wanted < self.ceiling, target, current.clamp_min(self.ceiling))


NO_TAIL = Tail()


def find_tail(model: nn.Module, node: fx.Node) -> Tail:
    """Follow the only use of a node's value as far as the tail goes."""
    modules = dict(model.named_modules())
    scale = shift = shortcut = None
    following = _only_user(node)
    while following is not None:
        kind = _kind(modules, following)
        ceiling = _RECTIFIERS.get(kind)
        if ceiling is not None:
            return Tail(scale, shift, shortcut, ceiling)
        if isinstance(kind, type) and issubclass(kind, _TRANSPARENT):
            pass
        elif kind in _ADDITIONS and shortcut is None and (other := _other_operand(following, node)) is not None:
            shortcut = other
        elif scale is None and shortcut is None and (affine := _affine(model, modules, following)) is not None:
            scale, shift = affine
        else:
            break
        node, following = following, _only_user(following)
    return Tail(scale, shift, shortcut)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _kind(modules: dict[str, nn.Module], node: fx.Node) -> Any:
    """The class of a module, the name of a method, or the function."""
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target


def _other_operand(addition: fx.Node, operand: fx.Node) -> fx.Node | None:
    others = [argument for argument in addition.args if argument is not operand]
    if len(addition.args) != 2 or addition.kwargs or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    return others[0]


def _affine(model: nn.Module, modules: dict[str, nn.Module], node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Scale and shift [O] of a batch norm in eval mode."""
    if node.op == "call_module":
        norm = modules[str(node.target)]
        if not isinstance(norm, nn.BatchNorm2d):
            return None
        statistics: tuple[Tensor | None, ...] = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        eps = norm.eps
    elif node.target is F.batch_norm:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get("training", False):
            return None
        statistics = tuple(_value(model, given.get(name)) for name in names[1:5])
        eps = float(given.get("eps", 1e-5))  # type: ignore[arg-type]
    else:
        return None
    mean, var, weight, bias = statistics
    if mean is None or var is None:
        return None
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    return scale.detach(), ((0 if bias is None else bias) - scale * mean).detach()


def _value(model: nn.Module, argument: Any) -> Tensor | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    found = attribute(model, str(argument.target))
    return found if isinstance(found, Tensor) else None
