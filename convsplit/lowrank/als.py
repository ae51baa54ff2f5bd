"""Alternating least squares for the CP decomposition of kernels.

Changes to the textbook's, in the order of what they brought on trained kernels:

* It starts from an SVD form instead of noise (starts.py).
* Every factor is extrapolated along its last step: Ang, Cohen, Hien and Gillis, "Extrapolated alternating algorithms
  for approximate canonical polyadic decomposition", ICASSP 2020 (`Momentum`). That halves the sweeps, at least.
* W is contracted with A once for the updates of B and C (a dimension tree; Phan, Tichavsky and Cichocki, 2013). Two
  products as large as A'W make up nearly the whole sweep.
* The energy of single components is penalised: |W - sum_r w_r|^2 + ridge * sum_r |w_r|^2 is minimised. Components that
  grow while cancelling each other ruin fine-tuning and half precision (Phan et al., "Stable low-rank tensor
  decomposition", ECCV 2020). In the update of A, |w_r|^2 = |a_r|^2 |b_r|^2 |c_r|^2, so the penalty multiplies the
  diagonal of the normal matrix by 1 + ridge: it does not see how a component's norm is shared among its stages, and it
  bounds the condition number.
* Problems of one shape are swept together: on small kernels the calls cost more than what they compute. Each has its
  own momentum, its own ridge and its own end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convsplit.lowrank.factors import Factors, each

RIDGE = (
    3e-4  # of every component's energy; 1e-5 fits worse (swamps) and lets components grow two to three times larger
)
FULL_RIDGE_LOSS = 0.01  # squared relative error below which the ridge falls in proportion
RIDGE_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}  # below, Cholesky may fail
WINDOW = 5  # sweeps over which the gain is measured


@dataclass
class Momentum:
    """Step lengths of the extrapolation, one per group: longer while the objective falls, back to none when it rises.

    Constants and update as in Ang et al. 2020, table 1.
    """

    step: Tensor
    limit: Tensor
    objective: Tensor

    @classmethod
    def at_rest(cls, groups: int, like: Tensor) -> Momentum:
        ones = like.new_ones(groups, 1, 1)
        return cls(0.5 * ones, ones.clone(), torch.full_like(ones, math.inf, dtype=torch.float64))

    def extrapolate(self, new: Tensor, old: Tensor) -> Tensor:
        return torch.lerp(old, new, 1 + self.step)

    def update(self, objective: Tensor) -> Tensor:
        """Take the objective [G,1,1] of the extrapolated point; True where it has fallen."""
        fell = objective <= self.objective
        self.limit = torch.where(fell, (1.01 * self.limit).clamp_max(1), self.step)
        self.step = torch.where(fell, torch.minimum(self.limit, 1.05 * self.step), self.step / 1.5)
        self.objective = objective
        return fell

    def at(self, groups: Tensor) -> Momentum:
        return Momentum(self.step[groups], self.limit[groups], self.objective[groups])


class Alternation:
    """One alternating fit of G independent problems of energy 1: the unfolded kernels, the factors, the best ones seen.

    In here components are rows (A[G,R,O], B[G,R,I], C[G,R,K]) and positions come before channels: every product is
    then a plain matrix product, and every sum runs along contiguous channels.
    """

    def __init__(self, weight: Tensor, factors: Factors, ridge: float):
        self.I, self.K = weight.shape[2:]
        self.unfolded = weight.mT.flatten(2)  # [G,O,K*I]
        self.energy = weight.flatten(1).double().square().sum(1)
        self.full_ridge, self.ridge = ridge, weight.new_full((len(weight), 1), ridge)
        self.rows = self.guess = self.best_rows = _transposed(factors)
        self.best_loss = torch.full_like(self.energy, math.inf)
        self.momentum = Momentum.at_rest(len(weight), self.unfolded)

    def run(self, sweeps: int, tolerance: float) -> tuple[Factors, Tensor, Tensor]:
        """Sweep each problem until its last five sweeps gained less than `tolerance` each.

        Returns the best factors, their |W - X|^2 [G], and the best relative error [G, sweeps] after every sweep, which
        stays what it was after a problem's end.
        """
        running = torch.arange(len(self.energy), device=self.energy.device)
        rows = each(torch.clone, self.rows)
        loss, history = torch.empty_like(self.energy), self.energy.new_zeros(len(running), sweeps)
        for sweep in range(sweeps):
            self._sweep()
            history[running, sweep:] = self.best_loss.clamp_min(0).sqrt()[:, None]
            ended = self._ended(history[running], sweep, tolerance) if sweep + 1 < sweeps else running >= 0
            if ended.any():
                for kept, found in zip(rows, self.best_rows, strict=True):
                    kept[running[ended]] = found[ended]
                loss[running[ended]] = self.best_loss[ended].clamp_min(0)
                running = running[~ended]
                if not len(running):
                    break
                self._keep(~ended)
        return _transposed(rows), loss, history[:, : sweep + 1]

    @staticmethod
    def _ended(errors: Tensor, sweep: int, tolerance: float) -> Tensor:
        now = errors[:, sweep]
        if sweep < WINDOW:
            return now < 1e-9
        return (now < 1e-9) | (errors[:, sweep - WINDOW] - now < WINDOW * tolerance * now)

    def _keep(self, groups: Tensor) -> None:
        """Go on with these problems alone."""
        self.unfolded, self.energy, self.ridge = self.unfolded[groups], self.energy[groups], self.ridge[groups]
        self.rows, self.guess, self.best_rows = (
            each(lambda factor: factor[groups], rows) for rows in (self.rows, self.guess, self.best_rows)
        )
        self.best_loss, self.momentum = self.best_loss[groups], self.momentum.at(groups)

    def _sweep(self) -> None:
        """Update B, C, A in turn from the extrapolated guess, and make the next one."""
        A, B, C = self.guess
        old_A, old_B, old_C = self.rows
        momentum = self.momentum

        contracted = (A @ self.unfolded).view(*A.shape[:2], self.K, self.I)  # A'W [G,R,K,I] serves B and C
        gram_A = A @ A.mT
        new_B = _solve(gram_A * (C @ C.mT), (C[:, :, None] @ contracted).squeeze(2), self.ridge)[0]
        B = momentum.extrapolate(new_B, old_B)
        gram_B = B @ B.mT
        new_C = _solve(gram_A * gram_B, (contracted @ B[..., None]).squeeze(3), self.ridge)[0]
        C = momentum.extrapolate(new_C, old_C)

        del contracted
        rhs = (C[..., None] * B[:, :, None]).flatten(2) @ self.unfolded.mT
        new_A, added = _solve(gram_B * (C @ C.mT), rhs, self.ridge)

        fell = momentum.update(self._score((new_A, B, C), rhs, added))
        self.rows = new_A, new_B, new_C
        A = torch.where(fell, momentum.extrapolate(new_A, old_A), new_A)
        self.guess = A, torch.where(fell, B, new_B), torch.where(fell, C, new_C)

    def _score(self, rows: Factors, rhs: Tensor, added: Tensor) -> Tensor:
        """Objective [G,1,1] at `rows`, which are kept if they are the best so far.

        A solves (normal + D) A = rhs with D = diag(added), so |X|^2 = <normal A, A> = <rhs, A> - <D A, A>, and
        |W - X|^2 = |W|^2 - 2 <rhs, A> + |X|^2 = |W|^2 - <rhs, A> - <D A, A> costs nothing; the last is the penalty.
        """
        A = rows[0].double()
        objective = self.energy - (rhs * A).sum((1, 2))
        loss = objective - (added * A.square().sum(2)).sum(1)
        better = loss < self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_rows = each(lambda new, old: torch.where(better[:, None, None], new, old), rows, self.best_rows)
        share = (self.best_loss / self.energy.clamp_min(1e-30) / FULL_RIDGE_LOSS).clamp(0, 1)
        self.ridge = (self.full_ridge * share)[:, None].to(self.ridge).clamp_min(RIDGE_FLOOR[self.ridge.dtype])
        return objective[:, None, None]


def _transposed(factors: Factors) -> Factors:
    return each(lambda factor: factor.mT.contiguous(), factors)


def _solve(normal: Tensor, rhs: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """X[G,R,N] with (normal + D) X = rhs, and the diagonal of D = ridge * diag(normal) + floor; changes `normal`.

    The ridge grows until Cholesky succeeds. Cholesky's accuracy does not depend on the scaling of the components
    (Higham, Accuracy and Stability, 10.1), so they are not normalised. The floor keeps a zero component at zero.
    """
    diagonal = normal.diagonal(dim1=1, dim2=2)
    bare = diagonal.clone()
    floor = 1e-14 * bare.amax(1, keepdim=True) + torch.finfo(bare.dtype).tiny ** 0.5
    for step in range(8):
        added = 10**step * ridge * bare + floor
        diagonal.copy_(bare + added)
        factor, failed = torch.linalg.cholesky_ex(normal)
        if not failed.any():
            break
    # X' L L' = rhs': triangles from the right take half the time of `cholesky_solve` in float32.
    half = torch.linalg.solve_triangular(factor.mT, rhs.mT, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False).mT, added
