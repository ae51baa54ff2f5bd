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
FEW = 16  # right-hand sides, below which `cholesky_solve` takes half the time of triangles from the right


class Momentum:
    """Step lengths of the extrapolation, one per group: longer while the objective falls, back to none when it rises.

    Constants and update as in Ang et al. 2020, table 1. Plain numbers, as there are few: a call of torch takes longer.
    """

    def __init__(self, groups: int) -> None:
        self.steps, self.limits, self.objectives = [0.5] * groups, [1.0] * groups, [math.inf] * groups

    def reach(self, like: Tensor) -> Tensor:
        """How far to go from the rows before towards the new ones and beyond, [G,1,1]."""
        return like.new_tensor([1 + step for step in self.steps])[:, None, None]

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
        self.energy: list[float] = weight.flatten(1).double().square().sum(1).tolist()
        self.full_ridge, self.ridge = ridge, weight.new_full((len(weight), 1), ridge)
        self.rows = self.guess = self.best_rows = _transposed(factors)
        self.best_loss = [math.inf] * len(weight)
        self.momentum = Momentum(len(weight))
        self.reach = self.momentum.reach(weight)

    def run(self, sweeps: int, tolerance: float) -> tuple[Factors, Tensor, Tensor]:
        """Sweep each problem until its last five sweeps gained less than `tolerance` each.

        Returns the best factors, their |W - X|^2 [G], and the best relative error [G, sweeps] after every sweep, which
        stays what it was after a problem's end.
        """
        running = list(range(len(self.energy)))
        rows = each(torch.clone, self.rows)
        losses, history = [math.inf] * len(running), [list[float]() for _ in running]
        for sweep in range(sweeps):
            self._sweep()
            for problem, loss in zip(running, self.best_loss, strict=True):
                losses[problem] = max(loss, 0.0)
                history[problem].append(math.sqrt(losses[problem]))
            ended = [sweep + 1 == sweeps or _at_rest(history[problem], tolerance) for problem in running]
            if any(ended):
                self._store(rows, running, ended)
                running = [problem for problem, has_ended in zip(running, ended, strict=True) if not has_ended]
                if not running:
                    break
                self._keep([place for place, has_ended in enumerate(ended) if not has_ended])
        errors = [[*own, *own[-1:] * (sweep + 1 - len(own))] for own in history]
        found = torch.tensor([losses, *zip(*errors, strict=True)], dtype=torch.float64, device=self.unfolded.device)
        return _transposed(rows), found[0], found[1:].mT

    def _store(self, rows: Factors, running: list[int], ended: list[bool]) -> None:
        """Copy the best rows of the problems that have ended to their places."""
        for kept, found in zip(rows, self.best_rows, strict=True):
            for place, problem in enumerate(running):
                if ended[place]:
                    kept[problem] = found[place]

    def _keep(self, groups: list[int]) -> None:
        """Go on with these problems alone."""
        self.unfolded, self.ridge, self.reach = self.unfolded[groups], self.ridge[groups], self.reach[groups]
        self.rows, self.guess, self.best_rows = (
            each(lambda factor: factor[groups], rows) for rows in (self.rows, self.guess, self.best_rows)
        )
        self.energy, self.best_loss = ([each[group] for group in groups] for each in (self.energy, self.best_loss))
        self.momentum.keep(groups)

    def _sweep(self) -> None:
        """Update B, C, A in turn from the extrapolated guess, and make the next one."""
        A, B, C = self.guess
        old_A, old_B, old_C = self.rows
        G, R, _ = A.shape

        contracted = torch.bmm(A, self.unfolded).view(G * R, self.K, self.I)  # A'W serves B and C
        gram_A = torch.bmm(A, A.mT)
        mixed = torch.bmm(C.reshape(G * R, 1, self.K), contracted).view(G, R, self.I)
        new_B = _solve(torch.bmm(C, C.mT).mul_(gram_A), mixed, self.ridge)[0]
        B = torch.lerp(old_B, new_B, self.reach)
        gram_B = torch.bmm(B, B.mT)
        # As rows times a transposed matrix: as a matrix times columns it takes four times as long.
        mixed = torch.bmm(B.reshape(G * R, 1, self.I), contracted.mT).view(G, R, self.K)
        new_C = _solve(gram_A.mul_(gram_B), mixed, self.ridge)[0]
        C = torch.lerp(old_C, new_C, self.reach)

        del contracted, mixed
        rhs = torch.bmm((C[..., None] * B[:, :, None]).flatten(2), self.unfolded.mT)
        new_A, added = _solve(gram_B.mul_(torch.bmm(C, C.mT)), rhs, self.ridge)

        fell = self.momentum.update(self._score((new_A, B, C), rhs, added))
        self.reach = self.momentum.reach(A)
        self.rows = new_A, new_B, new_C
        self.guess = _where(fell, (torch.lerp(old_A, new_A, self.reach), B, C), self.rows)

    def _score(self, rows: Factors, rhs: Tensor, added: Tensor) -> list[float]:
        """Objectives at `rows`, which are kept where they are the best so far.

        A solves (normal + D) A = rhs with D = diag(added), so |X|^2 = <normal A, A> = <rhs, A> - <D A, A>, and
        |W - X|^2 = |W|^2 - 2 <rhs, A> + |X|^2 = |W|^2 - <rhs, A> - <D A, A> costs nothing; the last is the penalty.
        """
        A = rows[0]
        explained = (rhs * A).sum((1, 2), dtype=torch.float64)
        penalty = (added * A.square().sum(2)).sum(1, dtype=torch.float64)
        # Plain numbers from here on, as there are few: a call of torch takes longer.
        known = list(zip(self.energy, *torch.stack([explained, penalty]).tolist(), strict=True))
        objective = [energy - own for energy, own, _ in known]
        loss = [energy - own - more for energy, own, more in known]
        better = [new < old for new, old in zip(loss, self.best_loss, strict=True)]
        self.best_rows = _where(better, rows, self.best_rows)
        self.best_loss = [new if new < old else old for new, old in zip(loss, self.best_loss, strict=True)]
        floor, full = RIDGE_FLOOR[rhs.dtype], self.full_ridge
        shares = [
            min(max(best / max(energy, 1e-30) / FULL_RIDGE_LOSS, 0.0), 1.0)
            for best, energy in zip(self.best_loss, self.energy, strict=True)
        ]
        self.ridge = rhs.new_tensor([max(full * share, floor) for share in shares])[:, None]
        return objective


def _at_rest(errors: list[float], tolerance: float) -> bool:
    """Whether the last sweeps gained less than `tolerance` each, or there is nothing more to gain."""
    now = errors[-1]
    return now < 1e-9 or (len(errors) > WINDOW and errors[-1 - WINDOW] - now < WINDOW * tolerance * now)


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
    Rows of X are contiguous: `bmm` multiplies a batch of others one by one, which was a fifth of a sweep.
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
    if rhs.shape[2] < FEW:
        return torch.cholesky_solve(rhs, factor).contiguous(), added
    # X' L L' = rhs': triangles from the right take half the time of `cholesky_solve` in float32.
    half = torch.linalg.solve_triangular(factor.mT, rhs.mT, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False).mT.contiguous(), added
