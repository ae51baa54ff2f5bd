"""S of patches as far as it depends on the distance of two positions of the kernel, not on the positions themselves.

Patches are cut from maps, so that the products of what reaches two taps k and l of a kernel are, but for the borders of
the maps, a function of k - l alone: S [I·K, I·K] has K² blocks [I, I] and only as many different ones as there are
distances, 25 instead of 81 for a kernel of 3 x 3. Taps that often look past a border see less, so that is

    S[k, l] ~ w_k w_l T[k - l]    with w_k² the variance at tap k, of the mean of all, and T [D, I, I] by least squares.

Products with filters of one component each, b_r times c_r, come down to products of T with B, and to sums over taps.
What is found so is near S, not S: good for the direction and the length of a step, not for what the step has gained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD = 1 << 24  # values of filters that are spread over all distances at once


@dataclass(frozen=True)
class Stationary:
    """T of all distances, and which taps are so far apart."""

    blocks: Tensor  # [I, D·I], the transposed T[d] side by side
    weights: Tensor  # w [K]
    places: Tensor  # [K·K], of tap k and the distance k - l in [K, D], for each k and l

    @classmethod
    def of(cls, S: Tensor, kernel_size: Sequence[int]) -> Stationary:
        """What is nearest to S [P, P], channel by channel, of the patches of a kernel.

        >>> Stationary.of(torch.eye(6), (3,)).blocks.shape  # 2 channels, 5 distances
        torch.Size([2, 10])
        """
        apart = _numbered_distances(kernel_size).to(S.device)
        K, I = len(apart), len(S) // len(apart)
        by_tap = S.reshape(I, K, I, K)
        variance = by_tap.diagonal(dim1=1, dim2=3).diagonal().mean(1)
        w = (variance / variance.mean()).sqrt()
        blocks = S.new_zeros(distances(kernel_size), I, I)
        for l in range(K):  # S is symmetric: the blocks of all k and this l, transposed
            blocks.index_add_(0, apart[:, l], by_tap[:, l].permute(2, 0, 1) * (w * w[l])[:, None, None])
        total = w.new_zeros(len(blocks)).index_add_(0, apart.flatten(), w.square().outer(w.square()).flatten())
        blocks /= total.clamp_min(torch.finfo(S.dtype).tiny)[:, None, None]
        places = torch.arange(K, device=S.device).unsqueeze(1) * len(blocks) + apart
        return cls(blocks.transpose(0, 1).flatten(1), w, places.flatten())

    def seen(self, B: Tensor) -> Tensor:
        """Each block times the inputs [R, I] of components: [R, D, I]."""
        return (B @ self.blocks).view(len(B), -1, len(self.blocks))

    def times(self, seen: Tensor, C: Tensor) -> Tensor:
        """S times the filters b_r c_r, for `seen` of b and c [R, K]: [R, K, I]."""
        K, D = len(self.weights), seen.shape[1]
        weighed = C * self.weights
        at_once, parts = max(1, SPREAD // (K * D)), list[Tensor]()
        for own, c in zip(torch.split(seen, at_once), torch.split(weighed, at_once), strict=True):
            spread = c.new_zeros(len(c), K * D)
            spread[:, self.places] = (self.weights[:, None] * c.unsqueeze(1)).flatten(1)
            parts.append(spread.view(len(c), K, D) @ own)
        return torch.cat(parts)

    def filtered(self, B: Tensor, C: Tensor) -> Tensor:
        """S times the filters of inputs [I, R] and positions [K, R]: [P, R], channel by channel."""
        return self.times(self.seen(B.mT), C.mT).permute(2, 1, 0).flatten(0, 1)


def distances(kernel_size: Sequence[int]) -> int:
    """How many there are between the taps of a kernel, D."""
    return math.prod(2 * size - 1 for size in kernel_size)


def _numbered_distances(kernel_size: Sequence[int]) -> Tensor:
    """The number [K, K] of the distance of each two taps."""
    numbers = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    for size in kernel_size:  # each further axis splits every tap into `size`
        along = torch.arange(size, device="cpu")
        own = along.unsqueeze(1) - along + size - 1
        numbers = (numbers[:, None, :, None] * (2 * size - 1) + own[:, None]).flatten(2).flatten(0, 1)
    return numbers
