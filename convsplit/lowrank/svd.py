"""Truncated singular value decompositions of all slices of a kernel at once.

Cutting a kernel W[O, I, K] into one matrix per channel and truncating each matrix's SVD is the best
approximation of that shape (Eckart and Young, 1936). The squared error is the sum of the squared singular
values left out, so the whole curve of error against components is known from one batched SVD, and keeping the
largest values of all slices of a layer, whatever channel they belong to, is optimal for a total number of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import tensorly as tl
import torch
from torch import Tensor


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
        groups, channels, triplets = self.values.shape
        if even:
            kept = torch.arange(channels * triplets, device=self.values.device).reshape(channels, triplets)[
                :, : components // channels
            ]
            return kept.reshape(1, -1).expand(groups, -1).to(self.values.device)
        order = self.values.flatten(1).argsort(dim=1, descending=True, stable=True)
        return order[:, :components].sort(dim=1).values

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


def slice_svd(slices: Tensor) -> SliceSVD:
    """Decompose slices [G, C, m, n] in one batched call.

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
        left, values, right = tl.svd(slices, full_matrices=False)
    return SliceSVD(left, values, right)
