"""Alternating least squares for the CP decomposition of kernels.

Four changes to the textbook's, in the order of what they brought on trained kernels:

* It starts from an SVD form instead of noise (starts.py).
* Every factor is extrapolated along its last step: Ang, Cohen, Hien and Gillis, "Extrapolated alternating algorithms
  for approximate canonical polyadic decomposition", ICASSP 2020 (`Momentum`). That halves the sweeps, at least.
* W is contracted with A once for the updates of B and C (a dimension tree; Phan, Tichavsky and Cichocki, 2013). Two
  products as large as A'W make up nearly the whole sweep, and no Khatri-Rao product is ever formed.
* The energy of single components is penalised: |W - sum_r w_r|^2 + ridge * sum_r |w_r|^2 is minimised. Components that
  grow while cancelling each other ruin fine-tuning and half precision (Phan et al., "Stable low-rank tensor
  decomposition", ECCV 2020). In the update of A, |w_r|^2 = |a_r|^2 |b_r|^2 |c_r|^2, so the penalty multiplies the
  diagonal of the normal matrix by 1 + ridge: it does not see how a component's norm is shared among its stages, and it
  bounds the condition number.
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
        return cls(0.5 * ones, ones.clone(), ones * math.inf)

    def extrapolate(self, new: Tensor, old: Tensor) -> Tensor:
        return torch.lerp(old, new, 1 + self.step)

    def update(self, objective: Tensor) -> Tensor:
        """Take the objective [G,1,1] of the extrapolated point; True where it has fallen."""
        fell = objective <= self.objective
        self.limit = torch.where(fell, (1.01 * self.limit).clamp_max(1), self.step)
        self.step = torch.where(fell, torch.minimum(self.limit, 1.05 * self.step), self.step / 1.5)
        self.objective = objective
        return fell


class Alternation:
    """One alternating fit: the kernel unfolded twice, the current factors and the best ones seen.

    In here components are rows (A[G,R,O], B[G,R,I], C[G,R,K]) and positions come before channels: every product is
    then a plain matrix product, and every sum runs along contiguous channels.
    """

    def __init__(self, weight: Tensor, factors: Factors, ridge: float):
        self.G, self.O, self.I, self.K = weight.shape
        self.by_output = weight.mT.flatten(2)  # [G,O,K*I]
        self.by_input = weight.permute(0, 2, 3, 1).flatten(2)  # [G,I,K*O]
        self.energy = weight.flatten(1).double().square().sum(1)
        self.full_ridge, self.ridge = ridge, self.energy.new_full((self.G, 1), ridge).to(weight.dtype)
        self.rows = self.best_rows = _transposed(factors)
        self.best_loss = torch.full_like(self.energy, math.inf)

    @property
    def best(self) -> Factors:
        return _transposed(self.best_rows)

    @property
    def losses(self) -> Tensor:
        """|W - X|^2 [G] of the best factors."""
        return self.best_loss.clamp_min(0)

    def run(self, sweeps: int, tolerance: float) -> tuple[float, ...]:
        """Sweep until the last five gained less than `tolerance` each; returns the mean error after every sweep."""
        momentum = Momentum.at_rest(self.G, self.by_output)
        guess, errors = self.rows, []
        for sweep in range(sweeps):
            guess = self._sweep(guess, momentum)
            errors.append(self.losses.sqrt().mean().item())
            if errors[-1] < 1e-9 or (sweep >= 5 and errors[-6] - errors[-1] < 5 * tolerance * errors[-1]):
                break
        return tuple(errors)

    def _sweep(self, guess: Factors, momentum: Momentum) -> Factors:
        """Update B, C, A in turn from the extrapolated `guess`; returns the next one."""
        A, B, C = guess
        old_A, old_B, old_C = self.rows

        contracted = (A @ self.by_output).reshape(self.G, -1, self.K, self.I)  # A'W [G,R,K,I] serves B and C
        gram_A = A @ A.mT
        new_B = _solve(gram_A * (C @ C.mT), _weighted_sum(contracted, C), self.ridge)[0]
        B = momentum.extrapolate(new_B, old_B)
        gram_B = B @ B.mT
        new_C = _solve(gram_A * gram_B, contracted.mul_(B[:, :, None]).sum(3), self.ridge)[0]
        C = momentum.extrapolate(new_C, old_C)

        contracted = (B @ self.by_input).reshape(self.G, -1, self.K, self.O)
        rhs = _weighted_sum(contracted, C)
        new_A, added = _solve(gram_B * (C @ C.mT), rhs, self.ridge)

        fell = momentum.update(self._score((new_A, B, C), rhs, added))
        self.rows = new_A, new_B, new_C
        A = torch.where(fell, momentum.extrapolate(new_A, old_A), new_A)
        return A, torch.where(fell, B, new_B), torch.where(fell, C, new_C)

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


def _weighted_sum(stack: Tensor, weights: Tensor) -> Tensor:
    """sum_k stack[G,R,k,N] weights[G,R,k], without a second array as large as `stack`."""
    total = stack[:, :, 0] * weights[:, :, :1]
    for k in range(1, stack.shape[2]):
        total.addcmul_(stack[:, :, k], weights[:, :, k, None])
    return total


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
    return torch.cholesky_solve(rhs, factor), added
