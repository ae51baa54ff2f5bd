"""Truncated singular value decompositions of all slices of a kernel at once.

Cutting a kernel W[O, I, K] into one matrix per channel and truncating each matrix's SVD is the best
approximation of that shape (Eckart and Young, 1936). The squared error is the sum of the squared singular
values left out, so the whole curve of error against components is known from one batched SVD, and keeping the
largest values of all slices of a layer, whatever channel they belong to, is optimal for a total number of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tensorly as tl
import torch
from torch import Tensor

DIRECTIONS, DIRECTION_FLOPS = 64, 4e9  # in which correlated errors are added up exactly, and what that may cost
ROWS = 1024  # triplets at a time, for the memory's sake


@dataclass(frozen=True)
class SliceSVD:
    """SVDs of slices [G, C, m, n], with q = min(m, n) triplets each."""

    left: Tensor  # [G, C, m, q]
    values: Tensor  # [G, C, q], falling
    right: Tensor  # [G, C, q, n]

    def keep(self, components: int, *, even: bool) -> Tensor:
        """Positions [G, components] of the kept triplets in the flattened (channel, triplet) order, rising.

        `even` keeps the same number in every channel (components is then a multiple of C); otherwise the
        largest of a group are kept.
        """
        if even:
            components -= components % self.values.shape[1]
        return self._order(even=even)[:, :components].sort(dim=1).values

    def _order(self, *, even: bool) -> Tensor:
        """Positions [G, C * q] in the order in which triplets are kept."""
        groups, channels, triplets = self.values.shape
        if even:
            places = torch.arange(channels * triplets, device=self.values.device)
            return places.view(channels, triplets).mT.reshape(1, -1).expand(groups, -1)
        return self.values.flatten(1).argsort(dim=1, descending=True, stable=True)

    def errors(self, *, even: bool) -> Tensor:
        """Relative error of keeping 0, 1, ... components per group (per channel if `even`), over all groups."""
        energy = self.values.double().square()
        if even:
            lost = energy.sum((0, 1)).flip(0).cumsum(0).flip(0)
        else:
            ranked = energy.flatten(1).sort(dim=1, descending=True).values
            lost = ranked.sum(0).flip(0).cumsum(0).flip(0)
        lost = torch.cat([lost, lost.new_zeros(1)])
        return (lost / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)).clamp(0, 1).sqrt()

    def correlated_errors(self, components: Sequence[int], correlations: Tensor, *, even: bool) -> list[float]:
        """Relative errors of keeping so many components per group, where the channels of the slices have correlations.

        With E[x x'] = Q diag(l) Q' [G, C, C] of the channels, what is left out, E_c [m, n], weighs
        E |sum_c x_c E_c|^2 = sum_k l_k |sum_c Q_ck E_c|^2, and not the sum of |E_c|^2 that `errors` knows. The largest
        l are added up one by one, the others as if they were all as large as their mean. Errors may exceed 1: where
        channels cancel in the whole, what is left out of each may not.
        """
        groups, channels, triplets = self.values.shape
        flops = 2.0 * self.left.shape[2] * channels * triplets * self.right.shape[3]  # of one direction
        exact = max(1, min(channels, DIRECTIONS, int(DIRECTION_FLOPS / flops)))
        weights, directions = torch.linalg.eigh(correlations.double())
        weights = weights.clamp_min(0)
        rest = weights[:, :-exact].mean(1) if exact < channels else weights.new_zeros(groups)

        order, rows = self._order(even=even), torch.arange(groups, device=weights.device).unsqueeze(1)
        left = (self.left.mT * self.values.unsqueeze(3)).flatten(1, 2)[rows, order].double()  # [G, C * q, m]
        right = self.right.flatten(1, 2)[rows, order].double()  # [G, C * q, n]
        mixed = directions[:, :, -exact:][rows, order // triplets]  # [G, C * q, exact]
        plain = left.square().sum(2)

        lost: dict[int, float] = {}
        left_out = left.new_zeros(groups, left.shape[2], exact * right.shape[2])
        end, total = order.shape[1], plain.new_zeros(groups)
        wanted = [min(count, end) for count in components]
        for start in sorted({*wanted, *range(0, end, ROWS)}, reverse=True):
            part = slice(start, end)
            left_out += left[:, part].mT @ (mixed[:, part, :, None] * right[:, part, None]).flatten(2)
            total += plain[:, part].sum(1)
            seen = left_out.view(groups, -1, exact, right.shape[2]).square().sum((1, 3))
            unseen = (total - seen.sum(1)).clamp_min(0)
            lost[start] = float((weights[:, -exact:] * seen).sum() + (rest * unseen).sum())
            end = start
        energy = max(lost[0], torch.finfo(torch.float64).tiny)
        return [math.sqrt(lost[count] / energy) for count in wanted]


def slice_svd(slices: Tensor) -> SliceSVD:
    """Decompose slices [G, C, m, n] in one batched call, on the CPU: a GPU takes five to seventeen times as long.

    Wide ones as their transposes: LAPACK takes the QR decomposition of a tall matrix first, and LQ of a wide one is two
    to four times as slow (1024 x 6272: 4.5 s and 1.1 s).

    >>> svd = slice_svd(torch.eye(3).reshape(1, 1, 3, 3) * torch.tensor([3.0, 2.0, 1.0]))
    >>> svd.values
    tensor([[[3., 2., 1.]]])
    """
    if slices.shape[-1] > slices.shape[-2]:
        tall = slice_svd(slices.mT)
        return SliceSVD(tall.right.mT, tall.values, tall.left.mT)
    with tl.backend_context("pytorch", local_threadsafe=True):
        left, values, right = tl.svd(slices.cpu(), full_matrices=False)
    return SliceSVD(left.to(slices.device), values.to(slices.device), right.to(slices.device))
