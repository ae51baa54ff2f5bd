"""Products of patches with themselves, X X' of [P, n]: most of what the moments of wide layers cost.

Patches overlap. Where a kernel moves by one position at a time, the product of its taps k and l,

    sum over positions p of    x[I](p + k) x(p + l)',

depends on l - k alone but for the borders: of the taps k + e and l + e it is that of k and l, less its first row (or
column) of positions, plus what is now the last one. So one product for each difference is enough, 13 instead of 45 for
a kernel of 3 x 3, and two strips for each further pair of taps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convsplit.spec import Convolution, Pair, axes_of, pair

BLOCKS = 4  # of rows of a product; those above the diagonal are copies
LEAST_BLOCK = 64  # rows
LEAST_WORK = 1000  # channels times the shorter side of a map: below, strips cost as much as what they save


@dataclass(frozen=True)
class Overlap:
    """Patches of whole maps [H, W] of positions, image by image, where a tap's neighbour is `dilation` positions on."""

    kernel_size: Pair
    dilation: Pair
    positions_hw: Pair

    @classmethod
    def of(cls, reader: Convolution, channels: int, positions_hw: Sequence[int]) -> Overlap | None:
        """How patches of so many channels overlap; None where knowing that would save no time, or for other axes."""
        if axes_of(reader) != 2 or reader.transposed:
            return None
        height, width = positions_hw
        found = cls(pair(reader.kernel_size), pair(reader.dilation), (height, width))
        holds_strips = all(size > 2 * d for size, d in zip(found.positions_hw, found.dilation, strict=True))
        moves = tuple(reader.stride) == (1, 1) and math.prod(found.kernel_size) > 1
        saves = channels * min(height, width) >= LEAST_WORK
        return found if holds_strips and moves and saves else None


def gram(patches: Tensor, overlap: Overlap | None = None) -> Tensor:
    """The products [G, P, P] of patches [G, P, n].

    >>> patches = torch.ones(1, 4, 10)
    >>> gram(patches).shape, float(gram(patches)[0, 0, 1])
    (torch.Size([1, 4, 4]), 10.0)
    """
    return _symmetric(patches) if overlap is None else torch.stack([_overlapping(each, overlap) for each in patches])


def _symmetric(x: Tensor) -> Tensor:
    """The products of [G, P, n]; most blocks are computed on one side of the diagonal only."""
    height = max(LEAST_BLOCK, math.ceil(x.shape[1] / BLOCKS))
    blocks = torch.split(x, height, 1)
    product = x.new_empty(len(x), x.shape[1], x.shape[1])
    for i, rows in enumerate(blocks):
        for j, columns in enumerate(blocks[: i + 1]):
            block = rows @ columns.mT
            a, b = i * height, j * height
            product[:, a : a + block.shape[1], b : b + block.shape[2]] = block
            if j < i:
                product[:, b : b + block.shape[2], a : a + block.shape[1]] = block.mT
    return product


def _overlapping(patches: Tensor, overlap: Overlap) -> Tensor:
    """The product [P, P] of patches [P, n] of whole maps."""
    (kh, kw), (down, across) = overlap.kernel_size, overlap.dilation
    taps = patches.reshape(-1, kh, kw, patches.shape[1])
    I = len(taps)
    maps = patches.reshape(I, kh, kw, -1, *overlap.positions_hw)
    first = maps[..., :down, :].flatten(3), maps[..., :across].flatten(3)
    last = maps[..., -down:, :].flatten(3), maps[..., -across:].flatten(3)
    product = patches.new_empty(kh, kw, kh, kw, I, I)
    for y, x, v, u in itertools.product(range(kh), range(kw), range(kh), range(kw)):
        if (v, u) < (y, x):
            product[y, x, v, u] = product[v, u, y, x].mT
        elif y == 0 and min(x, u) == 0:  # nothing went before
            torch.mm(taps[:, y, x], taps[:, v, u].mT, out=product[y, x, v, u])
        else:
            axis, up, left = (0, 1, 0) if y else (1, 0, 1)
            before = product[y - up, x - left, v - up, u - left]
            gone = torch.addmm(
                before, first[axis][:, y - up, x - left], first[axis][:, v - up, u - left].mT, alpha=-1
            )
            torch.addmm(gone, last[axis][:, y, x], last[axis][:, v, u].mT, out=product[y, x, v, u])
    return product.permute(4, 0, 1, 5, 2, 3).reshape(len(patches), len(patches))
