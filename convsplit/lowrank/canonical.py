"""The CP decomposition of a whole kernel: W[g, o, i, k] ~ sum_r A[g, o, r] B[g, i, r] C[g, k, r]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convsplit.lowrank.als import RIDGE, Alternation
from convsplit.lowrank.factors import CP, Factors, affordable, balanced, each, norms, reconstruct
from convsplit.lowrank.starts import exact_factors, resized, starting_points

FLOAT64_WORK = 5e6  # G * O * I * K * R up to which float64 costs next to nothing
FIT_FLOPS = 2e10  # what one fit may cost, unless that is less than MIN_SWEEPS
MIN_SWEEPS, MAX_SWEEPS = 5, 300
TINY_FLOPS = 4e6  # per sweep; kernels below it try several starts, up to
MAX_STARTS = 8


def cp(
    weight: Tensor,
    rank: int,
    *,
    start: CP | None = None,
    iterations: int | None = None,
    tolerance: float = 5e-5,
    seed: int = 0,
    output_scale: Tensor | None = None,
    ridge: float = RIDGE,
) -> CP:
    """Fit `rank` components to weight[G,O,I,K].

    start: a fit of any rank to continue from; it is grown from its residual or cut to its largest components. Without
        one, the best SVD form; tiny kernels try several starts.
    iterations: most sweeps; by default what a fixed number of flops buys: small kernels converge, large ones end early.
    tolerance: stop when a sweep lowers the error by less than this fraction of it.
    output_scale: weights [G,O] of the output channels in the error, for example batch norm's |gamma| / sigma.

    >>> fit = cp(torch.ones(1, 4, 3, 9), rank=1)
    >>> fit.A.shape, fit.error < 1e-6
    (torch.Size([1, 4, 1]), True)
    """
    if rank < 1:
        raise ValueError(f"a CP decomposition needs a rank of at least 1, got {rank}")
    exact = exact_factors(weight, rank)
    if exact is not None:
        return CP(*balanced(exact), error=0.0)
    metric = _Metric.of(weight, rank, output_scale)
    work = metric.apply(weight)
    if start is None:
        starts = starting_points(work, rank, seed, affordable(work.shape, rank, TINY_FLOPS, 1, MAX_STARTS))
    else:
        starts = [resized(work, metric.apply_to(start), rank, seed)]
    sweeps = iterations or affordable(work.shape, rank, FIT_FLOPS, MIN_SWEEPS, MAX_SWEEPS)
    fit = Alternation(work.repeat(len(starts), 1, 1, 1), each(lambda *parts: torch.cat(parts), *starts), ridge)
    history = fit.run(sweeps, tolerance)
    factors, loss = _best_of(fit, len(starts))
    return metric.undo(factors, _refined(work, factors, loss), weight.dtype, history)


def _best_of(fit: Alternation, starts: int) -> tuple[Factors, Tensor]:
    """The factors of the best start of every group, and their losses [G]."""
    losses = fit.losses.view(starts, -1)
    loss, winner = losses.min(0)
    groups = torch.arange(len(winner), device=winner.device)
    return each(lambda factor: factor.reshape(starts, len(groups), *factor.shape[1:])[winner, groups], fit.best), loss


@dataclass(frozen=True)
class _Metric:
    """The problem solved: diag(scale) W / norm, so that every group weighs the same in stopping and conditioning."""

    scale: Tensor  # [G,O,1]
    norm: Tensor  # [G,1,1]

    @classmethod
    def of(cls, weight: Tensor, rank: int, output_scale: Tensor | None) -> _Metric:
        work = weight.detach().to(torch.float64 if weight.numel() * rank <= FLOAT64_WORK else torch.float32)
        scale = work.new_ones(*work.shape[:2], 1)
        if output_scale is not None:  # floored: a channel of weight zero would come back as 0 / 0
            scale = output_scale.detach().abs().to(work)[..., None]
            scale = scale.clamp_min(1e-3 * scale.max().item() or 1.0)
        norm = (work * scale[..., None]).flatten(1).norm(dim=1)
        return cls(scale, torch.where(norm > 0, norm, 1)[:, None, None])

    def apply(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.scale) * (self.scale / self.norm)[..., None]

    def apply_to(self, start: CP) -> Factors:
        return start.A.to(self.scale) * self.scale / self.norm, start.B.to(self.scale), start.C.to(self.scale)

    def undo(self, factors: Factors, loss: Tensor, dtype: torch.dtype, history: tuple[float, ...]) -> CP:
        weights = self.norm.flatten().double().square()
        error = ((weights * loss).sum() / weights.sum()).sqrt().item()
        A, B, C = factors
        stored = dtype if dtype.itemsize >= 4 else torch.float32
        A, B, C = each(lambda factor: factor.to(stored), balanced((A * self.norm / self.scale, B, C)))
        return CP(A, B, C, error=error, peak=norms(factors).max().item(), history=history)


def _refined(work: Tensor, factors: Factors, loss: Tensor) -> Tensor:
    """Losses [G], by subtraction where |W|^2 - <W, X> has cancelled too many digits."""
    if loss.max() > 1e-3 if work.dtype == torch.float32 else loss.max() > 1e-9:
        return loss
    return (work - reconstruct(factors)).flatten(1).double().square().sum(1)
