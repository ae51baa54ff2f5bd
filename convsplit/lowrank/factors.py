"""The components of a CP decomposition as factor matrices: norms, balance, the kernel they sum to, what they cost.

Shape letters as in spec.py; N, P and Q stand for O, I and K in some order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]  # A [G, O, R], B [G, I, R], C [G, K, R]

CPU = torch.device("cpu")
CALLS = 2e7  # operations that take as long as calling those of a sweep


@dataclass(frozen=True)
class CP:
    """Components r: W[g,o,i,k] ~ sum_r A[g,o,r] B[g,i,r] C[g,k,r], each with equal norms in its three stages.

    error: |W - sum_r w_r| / |W| in the metric of the fit (0 for a zero kernel).
    peak: the largest |w_r| / |W| (per group); far above 1, components cancel each other.
    history: the best error after every sweep, the mean over groups.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    error: float
    peak: float = 0.0
    history: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        return self.A.shape[-1]

    def to(self, device: torch.device) -> CP:
        """The same on a device."""
        A, B, C = (factor.to(device) for factor in (self.A, self.B, self.C))
        return replace(self, A=A, B=B, C=C)

    def kernel(self) -> Tensor:
        """The kernel [G,O,I,K] these components sum to."""
        return reconstruct((self.A, self.B, self.C))


def each(function: Callable[..., Tensor], *factors: Factors) -> Factors:
    """Apply a function to the three factors in turn (of several fits at once, where it takes several)."""
    A, B, C = (function(*parts) for parts in zip(*factors, strict=True))
    return A, B, C


def norms(factors: Factors) -> Tensor:
    """|w_r| [G,R]."""
    A, B, C = factors
    product: Tensor = A.norm(dim=1) * B.norm(dim=1) * C.norm(dim=1)
    return product


def balanced(factors: Factors) -> Factors:
    """The same components, each with the cube root of its norm in every stage."""
    share = norms(factors).pow(1 / 3)[:, None]
    return each(lambda factor: factor / factor.norm(dim=1, keepdim=True).clamp_min(1e-30) * share, factors)


def reconstruct(factors: Factors) -> Tensor:
    """sum_r A B C as [G,O,I,K], one position at a time: no intermediate exceeds the result."""
    A, B, C = factors
    out = A.new_empty(A.shape[0], A.shape[1], B.shape[1], C.shape[1])
    for k in range(C.shape[1]):
        out[..., k] = (A * C[:, k, None]) @ B.mT
    return out


def sweep_flops(shape: Sequence[int], rank: int) -> float:
    """Operations of a sweep over a kernel [G,O,I,K]."""
    G, O, I, K = shape
    return G * (4 * O * I * K * rank + 2 * rank**3 + 4 * rank**2 * (O + I + K))


def work(shape: Sequence[int], rank: int, sweeps: int) -> float:
    """About how long so many sweeps take, in operations."""
    return sweeps * (CALLS + sweep_flops(shape, rank))


def affordable(shape: Sequence[int], rank: int, flops: float, least: int, most: int) -> int:
    """Sweeps (or starts) that `flops` buy. Counted, not timed: the same call gives the same result on every machine."""
    return round(min(max(flops / sweep_flops(shape, rank), least), most))
