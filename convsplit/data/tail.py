"""What follows a convolution and belongs to its repair: batch norm, the sum with a shortcut, ReLU.

The model passes on act(g y + h + s), where y is the layer's answer, g and h the batch norm's scale and shift and s
the shortcut. Two things can be gained by fitting that instead of y:

* The shortcut of the converted model carries the errors of earlier blocks, and the layer can correct them: its target
  is y + (s_original - s_converted) / g.
* Where the original's ReLU gives zero, any negative answer will do. The target there is min(z, 0) for the current
  answer z = g y + h + s, and fitting and moving the target in turn minimises the error behind the ReLU by majorisation:
  Zhang et al., "Accelerating very deep convolutional networks", 2016 (1505.06798), section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convsplit.data.recipe import Recipe

FAINT = 1e-3  # of the largest scale: channels that batch norm all but switches off keep their own answer as target


@dataclass(frozen=True)
class Tail:
    """z = scale[O] * y + shift[O] + shortcut, then clamped to [0, `ceiling`] where that is not None."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    shortcut: Recipe | None = None
    ceiling: float | None = None

    def needs(self) -> list[Recipe]:
        """What the shortcut is made of."""
        return [] if self.shortcut is None else list(self.shortcut.walk())

    def alone(self) -> Tail:
        """The tail up to the sum with the shortcut."""
        return self if self.shortcut is None else Tail(self.scale, self.shift)

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
        if audible.all():
            return (z - shift) / scale
        return torch.where(audible, (z - shift) / torch.where(audible, scale, 1.0), otherwise)

    def activated(self, z: Tensor) -> Tensor:
        """What the model passes on."""
        return z if self.ceiling is None else z.clamp(0, self.ceiling)

    def equal_answers(self, wanted: Tensor, shortcut: Tensor | None, otherwise: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest of the answers y after which the model passes on what it does after `wanted`."""
        if self.ceiling is None:
            y = self.question(wanted, shortcut, otherwise)
            return y, y
        least = wanted.masked_fill(wanted <= 0, -math.inf).clamp_max_(self.ceiling)
        largest = wanted.masked_fill(wanted >= self.ceiling, math.inf).clamp_min_(0)
        ends = [self.question(z, shortcut, otherwise) for z in (least, largest)]
        return torch.minimum(*ends), torch.maximum(*ends)  # batch norm may turn the sign


NO_TAIL = Tail()
