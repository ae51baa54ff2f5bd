"""The CP decomposition of a whole kernel: W[g, o, i, k] ~ sum_r A[g, o, r] B[g, i, r] C[g, k, r]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from convsplit.lowrank.als import RIDGE, Alternation
from convsplit.lowrank.factors import (
    CP,
    CPU,
    Factors,
    affordable,
    balanced,
    each,
    norms,
    reconstruct,
    sweep_flops,
    work,
)
from convsplit.lowrank.starts import exact_factors, resized, starting_points

FLOAT64_WORK = 1e5  # O * I * K * R up to which float64 costs next to nothing
FLOAT64_LOSS = 1e-4  # squared relative error below which float32 no longer tells one sweep from the next
FIT_FLOPS = 1.4e10  # what one fit may cost, unless that is less than MIN_SWEEPS
MIN_SWEEPS, MAX_SWEEPS = 3, 300
TINY_FLOPS = 4e6  # per sweep; kernels below it try several starts, up to
MAX_STARTS = 8
# Per sweep; kernels below it are fitted on the CPU wherever they are. A sweep is about sixty calls: at 3.5e7 a GPU is
# as slow as one thread of a CPU, at 3e8 it takes a third, but threads fit several kernels at once (results/cuda.md).
DEVICE_FLOPS = 3e8
TOLERANCE = 1e-5  # of the error, per sweep; of fits swept together the mean counts, which hides what one still gains


def cp(
    weight: Tensor,
    rank: int,
    *,
    start: CP | None = None,
    iterations: int | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    ridge: float = RIDGE,
) -> CP:
    """Fit `rank` components to weight[G,O,I,K].

    start: a fit of any rank to continue from; it is grown from its residual or cut to its largest components. Without
        one, the best SVD form; tiny kernels try several starts beside it, unless `iterations` cuts the fit short.
    iterations: most sweeps; by default what a fixed number of flops buys: small kernels converge, large ones end early.
    tolerance: stop when a sweep lowers the error by less than this fraction of it.

    >>> fit = cp(torch.ones(1, 4, 3, 9), rank=1)
    >>> fit.A.shape, fit.error < 1e-6
    (torch.Size([1, 4, 1]), True)
    """
    (fit,) = cp_each([weight], [rank], starts=[start], iterations=iterations, tolerance=tolerance, seed=seed,
                     ridge=ridge)  # fmt: skip
    return fit


def cp_each(
    weights: Sequence[Tensor],
    ranks: Sequence[int],
    *,
    starts: Sequence[CP | None] | None = None,
    iterations: int | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    ridge: float = RIDGE,
) -> list[CP]:
    """`cp` of several weights of one shape and dtype, swept together: small ones cost a fraction of single fits.

    Components of lower ranks are filled up with zeros, which an alternating fit keeps at zero: ranks should be close.

    >>> [fit.rank for fit in cp_each([torch.ones(1, 4, 3, 9), torch.rand(1, 4, 3, 9)], [1, 2])]
    [1, 2]
    """
    if min(ranks, default=1) < 1:
        raise ValueError(f"a CP decomposition needs a rank of at least 1, got {min(ranks)}")
    there = weights[0].device if weights else CPU
    if there != CPU and sweep_flops(weights[0].shape, max(ranks)) < DEVICE_FLOPS:
        weights = [weight.to(CPU) for weight in weights]
        starts = starts and [fit and fit.to(CPU) for fit in starts]
    exact = [exact_factors(weight, rank) for weight, rank in zip(weights, ranks, strict=True)]
    fits = [None if factors is None else CP(*balanced(factors), error=0.0) for factors in exact]
    open_ = [index for index, fit in enumerate(fits) if fit is None]
    if open_:
        most = max(ranks[index] for index in open_)
        shape = weights[open_[0]].shape
        sweeps = iterations or affordable(shape, most, FIT_FLOPS, MIN_SWEEPS, MAX_SWEEPS)
        # A short fit from another one, as curves are made of, needs no second opinion.
        count = 1 if iterations and starts else affordable(shape, most, TINY_FLOPS, 1, MAX_STARTS)
        dtype = torch.float64 if math.prod(shape[1:]) * most <= FLOAT64_WORK else torch.float32

        def fitted(which: list[int], dtype: torch.dtype, starts: Sequence[CP | None]) -> None:
            problems = [_Problem.of(weights[index], ranks[index], dtype) for index in which]
            _start(problems, [starts[index] for index in which], count, seed)
            for index, fit in zip(which, _solved(problems, sweeps, tolerance, ridge), strict=True):
                before = fits[index]
                fits[index] = fit if before is None or fit.error < before.error else before

        fitted(open_, dtype, starts or [None] * len(weights))
        blurred = [index for index in open_ if cast(CP, fits[index]).error ** 2 < FLOAT64_LOSS]
        if blurred and dtype == torch.float32 and iterations is None:
            fitted(blurred, torch.float64, fits)
    return [cast(CP, fit).to(there) for fit in fits]


def fit_work(shape: Sequence[int], rank: int) -> float:
    """About how long `cp` of a kernel [G,O,I,K] takes, in operations, if it makes all the sweeps that it may."""
    return work(shape, rank, affordable(shape, rank, FIT_FLOPS, MIN_SWEEPS, MAX_SWEEPS))


def ends_early(shape: torch.Size, rank: int) -> bool:
    """Whether `cp` of a kernel [G,O,I,K] is too expensive for all the sweeps it might want."""
    return affordable(shape, rank, FIT_FLOPS, MIN_SWEEPS, MAX_SWEEPS) < MAX_SWEEPS


@dataclass(frozen=True)
class _Problem:
    """What is fitted: W / norm, so that every group weighs the same in stopping and conditioning; and its starts."""

    weight: Tensor  # [G,O,I,K]
    norm: Tensor  # [G,1,1]
    work: Tensor
    rank: int
    starts: list[Factors] = field(default_factory=list)

    @classmethod
    def of(cls, weight: Tensor, rank: int, dtype: torch.dtype) -> _Problem:
        work = weight.detach().to(dtype)
        norm = work.flatten(1).norm(dim=1)
        norm = torch.where(norm > 0, norm, 1)[:, None, None]
        return cls(weight, norm, work / norm[..., None], rank)

    def solution(self, rows: Factors, losses: Tensor, history: Tensor) -> CP:
        """The best of the starts, of each group. losses [starts, G], history [starts, G, sweeps]."""
        loss, winner = losses.min(0)
        groups = torch.arange(len(winner), device=winner.device)
        A, B, C = each(lambda factor: factor[winner, groups, :, : self.rank], rows)
        loss = self._refined((A, B, C), loss)
        weights = self.norm.flatten().double().square()
        error = ((weights * loss).sum() / weights.sum()).sqrt().item()
        stored = self.weight.dtype if self.weight.dtype.itemsize >= 4 else torch.float32
        peak = norms((A, B, C)).max().item()
        A, B, C = each(lambda factor: factor.to(stored), balanced((A * self.norm, B, C)))
        return CP(A, B, C, error=error, peak=peak, history=tuple(history[winner, groups].mean(0).tolist()))

    def _refined(self, factors: Factors, loss: Tensor) -> Tensor:
        """Losses [G], by subtraction where |W|^2 - <W, X> has cancelled too many digits."""
        if loss.max() > (1e-3 if self.work.dtype == torch.float32 else 1e-9):
            return loss
        return (self.work - reconstruct(factors)).flatten(1).double().square().sum(1)


def _start(problems: Sequence[_Problem], fits: Sequence[CP | None], count: int, seed: int) -> None:
    """Give each problem `count` starts, the first from a fit if there is one; those of equal ranks found at once."""
    alike: dict[tuple[int, int | None], list[int]] = {}
    for index, (problem, fit) in enumerate(zip(problems, fits, strict=True)):
        alike.setdefault((problem.rank, None if fit is None else fit.rank), []).append(index)
    for (rank, known), which in alike.items():
        work, parts = torch.cat([problems[index].work for index in which]), len(which)
        found = starting_points(work, rank, seed, count if known is None else count - 1, parts)
        if known is not None:
            held = [
                (fit.A.to(norm) / norm, fit.B.to(norm), fit.C.to(norm))
                for fit, norm in ((cast(CP, fits[index]), problems[index].norm) for index in which)
            ]
            found = [resized(work, each(lambda *factors: torch.cat(factors), *held), rank, seed, parts), *found]
        for start in found:
            for index, *own in zip(which, *(factor.chunk(parts) for factor in start), strict=True):
                A, B, C = own
                problems[index].starts.append((A, B, C))


def _solved(problems: Sequence[_Problem], sweeps: int, tolerance: float, ridge: float) -> list[CP]:
    """Fit them all in one alternation, lower ranks filled up with zeros."""
    rank = max(problem.rank for problem in problems)
    works = [problem.work for problem in problems for _ in problem.starts]
    filled = [
        each(lambda factor: pad(factor, (0, rank - factor.shape[2])), start)
        for problem in problems for start in problem.starts
    ]  # fmt: skip
    rows = each(lambda *parts: torch.cat(parts), *filled)
    factors, losses, history = Alternation(torch.cat(works), rows, ridge).run(sweeps, tolerance)
    fits, first = [], 0
    for problem in problems:
        shape = len(problem.starts), len(problem.work)
        part = slice(first, first + shape[0] * shape[1])
        first = part.stop
        mine = each(lambda factor: factor[part].view(*shape, *factor.shape[1:]), factors)  # noqa: B023
        fits.append(problem.solution(mine, losses[part].view(shape), history[part].view(*shape, -1)))
    return fits
