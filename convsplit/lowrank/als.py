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

import torch
from torch import Tensor

from convsplit.lowrank.factors import Factors, each

RIDGE = (
    3e-4  # of every component's energy; 1e-5 fits worse (swamps) and lets components grow two to three times larger
)
FULL_RIDGE_LOSS = 0.01  # squared relative error below which the ridge falls in proportion
RIDGE_FLOOR = {torch.float32: 1e-6, torch.float64: 1e-12}  # below, Cholesky may fail
WINDOW = 5  # sweeps over which the gain is measured


class Momentum:
    """Step lengths of the extrapolation, one per group: longer while the objective falls, back to none when it rises.

    Constants and update as in Ang et al. 2020, table 1. Plain numbers, as there are few: a call of torch takes longer.
    """

    def __init__(self, groups: int) -> None:
        self.steps, self.limits, self.objectives = [0.5] * groups, [1.0] * groups, [math.inf] * groups

    def reach(self, like: Tensor) -> Tensor:
        """How far to go from the rows before towards the new ones and beyond, [G,1,1]."""
        return torch.tensor(self.steps, dtype=torch.float64, device=like.device).add_(1).to(like)[:, None, None]

    def update(self, objectives: list[float]) -> list[bool]:
        """Take the objectives of the extrapolated points; True where they have fallen."""
        fell = [new <= old for new, old in zip(objectives, self.objectives, strict=True)]
        for group, has_fallen in enumerate(fell):
            step, limit = self.steps[group], self.limits[group]
            limit = min(1.01 * limit, 1.0) if has_fallen else step
            self.steps[group] = min(limit, 1.05 * step) if has_fallen else step / 1.5
            self.limits[group] = limit
        self.objectives = objectives
        return fell

    def keep(self, groups: list[int]) -> None:
        """Go on with these alone."""
        self.steps, self.limits, self.objectives = (
            [each[group] for group in groups] for each in (self.steps, self.limits, self.objectives)
        )


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
        self.momentum = Momentum(len(weight))

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
        self.best_loss = self.best_loss[groups]
        self.momentum.keep(groups.nonzero().flatten().tolist())

    def _sweep(self) -> None:
        """Update B, C, A in turn from the extrapolated guess, and make the next one."""
        A, B, C = self.guess
        old_A, old_B, old_C = self.rows
        reach = self.momentum.reach(A)

        contracted = (A @ self.unfolded).view(*A.shape[:2], self.K, self.I)  # A'W [G,R,K,I] serves B and C
        gram_A = A @ A.mT
        new_B = _solve(gram_A * (C @ C.mT), (C[:, :, None] @ contracted).squeeze(2), self.ridge)[0]
        B = torch.lerp(old_B, new_B, reach)
        gram_B = B @ B.mT
        # As rows times a transposed matrix: as a matrix times columns it takes four times as long.
        new_C = _solve(gram_A.mul_(gram_B), (B[:, :, None] @ contracted.mT).squeeze(2), self.ridge)[0]
        C = torch.lerp(old_C, new_C, reach)

        del contracted
        rhs = (C[..., None] * B[:, :, None]).flatten(2) @ self.unfolded.mT
        new_A, added = _solve(gram_B.mul_(C @ C.mT), rhs, self.ridge)

        fell = self.momentum.update(self._score((new_A, B, C), rhs, added))
        self.rows = new_A, new_B, new_C
        self.guess = _where(fell, (torch.lerp(old_A, new_A, self.momentum.reach(A)), B, C), self.rows)

    def _score(self, rows: Factors, rhs: Tensor, added: Tensor) -> list[float]:
        """Objectives at `rows`, which are kept where they are the best so far.

        A solves (normal + D) A = rhs with D = diag(added), so |X|^2 = <normal A, A> = <rhs, A> - <D A, A>, and
        |W - X|^2 = |W|^2 - 2 <rhs, A> + |X|^2 = |W|^2 - <rhs, A> - <D A, A> costs nothing; the last is the penalty.
        """
        A = rows[0].double()
        objective = self.energy - (rhs * A).sum((1, 2))
        loss = objective - (added * A.square().sum(2)).sum(1)
        better = loss < self.best_loss
        self.best_rows = _where(better.tolist(), rows, self.best_rows)
        self.best_loss = torch.where(better, loss, self.best_loss)
        share = (self.best_loss / self.energy.clamp_min(1e-30) / FULL_RIDGE_LOSS).clamp(0, 1)
        self.ridge = (self.full_ridge * share)[:, None].to(self.ridge).clamp_min(RIDGE_FLOOR[self.ridge.dtype])
        return objective.tolist()


def _where(chosen: list[bool], first: Factors, second: Factors) -> Factors:
    """The first where a group is chosen, else the second."""
    if all(chosen):
        return first
    if not any(chosen):
        return second
    mask = torch.tensor(chosen, device=first[0].device)[:, None, None]
    return each(lambda one, other: torch.where(mask, one, other), first, second)


def _transposed(factors: Factors) -> Factors:
    return each(lambda factor: factor.mT.contiguous(), factors)


def _solve(normal: Tensor, rhs: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """X[G,R,N] with (normal + D) X = rhs, and the diagonal of D = ridge * diag(normal) + floor; changes `normal`.

    The ridge grows until Cholesky succeeds. Cholesky's accuracy does not depend on the scaling of the components
    (Higham, Accuracy and Stability, 10.1), so they are not normalised. The floor keeps a zero component at zero.
    """
    diagonal = normal.diagonal(dim1=1, dim2=2)
    added = (ridge * diagonal).add_(torch.finfo(normal.dtype).tiny ** 0.5)
    diagonal.add_(added)
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(normal)
        if not failed.any():
            break
        diagonal.add_(9 * added)
        added *= 10
    # X' L L' = rhs': triangles from the right take half the time of `cholesky_solve` in float32.
    half = torch.linalg.solve_triangular(factor.mT, rhs.mT, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False).mT, added
