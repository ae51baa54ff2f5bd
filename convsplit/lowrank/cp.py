"""placeholder until the real one lands"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convsplit.lowrank.svd import slice_svd


@dataclass(frozen=True)
class CP:
    A: Tensor  # [G, O, R]
    B: Tensor  # [G, I, R]
    C: Tensor  # [G, K, R]
    error: float


def _start(W: Tensor, R: int) -> tuple[Tensor, Tensor, Tensor]:
    G, O, I, K = W.shape
    best = None
    for mode in (1, 2, 3):
        other = [d for d in (1, 2, 3) if d != mode]
        S = slice_svd(W.permute(0, mode, *other))
        kept = S.keep(min(R, S.values[0].numel()), even=False)
        rows = torch.arange(G).unsqueeze(1)
        vals = S.values.flatten(1)[rows, kept]
        if best is None or vals.square().sum() > best[0]:
            q = S.values.shape[2]
            onehot = torch.nn.functional.one_hot(kept // q, W.shape[mode]).to(W.dtype)
            left = S.left.mT.flatten(1, 2)[rows, kept] * vals.unsqueeze(2)
            right = S.right.flatten(1, 2)[rows, kept]
            f = {mode: onehot, other[0]: left, other[1]: right}
            best = (vals.square().sum(), tuple(f[d].mT for d in (1, 2, 3)))
    A, B, C = best[1]
    if A.shape[2] < R:
        pad = (0, R - A.shape[2])
        A, B, C = (torch.nn.functional.pad(x, pad) for x in (A, B, C))
    return A, B, C


def cp(weight: Tensor, rank: int, *, iterations: int = 40, seed: int = 0) -> CP:
    W = weight.double()
    G, O, I, K = W.shape
    A, B, C = _start(W, rank)
    norm = W.norm().clamp_min(1e-300)
    if rank >= min(I * min(O, K), O * min(I, K), K * min(O, I)):
        return CP(A.to(weight.dtype), B.to(weight.dtype), C.to(weight.dtype), 0.0)

    def solve(g: Tensor, m: Tensor) -> Tensor:
        ridge = 1e-9 * g.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        return torch.linalg.solve(g + ridge[:, None, None] * torch.eye(rank, dtype=g.dtype), m.mT).mT

    for _ in range(iterations):
        T = torch.einsum("gor,goik->grik", A, W)
        B = solve((A.mT @ A) * (C.mT @ C), torch.einsum("grik,gkr->gir", T, C))
        C = solve((A.mT @ A) * (B.mT @ B), torch.einsum("grik,gir->gkr", T, B))
        A = solve((B.mT @ B) * (C.mT @ C), torch.einsum("goik,gir,gkr->gor", W, B, C))
    error = (torch.einsum("gor,gir,gkr->goik", A, B, C) - W).norm() / norm
    return CP(A.to(weight.dtype), B.to(weight.dtype), C.to(weight.dtype), float(error))


def cp_curve(weight: Tensor, ranks: Sequence[int], *, seed: int = 0) -> list[float]:
    import numpy as np

    pts = sorted(set(ranks))
    sub = sorted({pts[0], pts[len(pts) // 3], pts[2 * len(pts) // 3], pts[-1]})
    err = [max(cp(weight, r, iterations=10, seed=seed).error, 1e-12) for r in sub]
    return np.exp(np.interp(ranks, sub, np.log(err))).tolist()
