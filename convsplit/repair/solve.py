"""Fitting factors to moments: least squares in closed form, one stage at a time.

A layer with kernel W, as a matrix [O, P], answers patches x with W x + b. With S and C from `samples`, its mean squared
error against the targets is, with the best bias and in a metric F [O, O] of the outputs,

    E(W) = tr(F W S W') - 2 tr(F W C') + const,

a quadratic in W, hence in each factor while the others stand still. A ridge pulls towards the original kernel W0:
S and C become S + lambda and C + lambda W0, so that directions the calibration inputs never take keep their weights.
The best dense kernel W1 = C S^-1 turns E into the distance || F^(1/2) (W - W1) S^(1/2) ||, the metric in which factors
are fitted; everything below works per group.

What costs time is S times filters [P, R]: 2 P²R operations, the only ones that grow with the square of P. They are
counted below, and done again only where the filters have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from convsplit.data.moments import Marginals, Root, whitened
from convsplit.forms import Factors, Form
from convsplit.lowrank import CP, cp
from convsplit.repair.samples import Moments

RIDGE = 1e-3  # of the mean variance of an input
SWEEP_FLOPS = 1e11  # what the alternation of one layer may cost: the largest layers do without
CG_STEPS = 2
MIXED_VALUES = 1 << 24  # of S times filters, for some output channels of pw-dw at once
CP_SWEEPS = 60  # in the metric of the marginals, from factors that are near
WIDE = 500  # patches from here on are multiplied in float32
MOST_SWEEPS = 4  # more of them change the drift of a network by less than the choice of images does


@dataclass(frozen=True)
class Metric:
    """S [P, P] of one group's inputs, the ridge on its diagonal included; P = I·K, of K positions."""

    S: Tensor
    ridge: Tensor
    K: int

    @classmethod
    def of(cls, moments: Moments, K: int, ridge: float = RIDGE) -> list[Metric]:
        """The metric of each group. The moments of patches are taken over: wide ones are not there twice."""
        diagonal = moments.patches.diagonal(dim1=1, dim2=2)
        # A patch whose inputs never change has no variance, but a metric all the same.
        pulls = (ridge * diagonal.mean(1)).clamp_min(1e-12)
        diagonal.add_(pulls.unsqueeze(1))
        return [cls(S, pull, K) for S, pull in zip(moments.patches, pulls, strict=True)]

    def times(self, filters: Tensor) -> Tensor:
        """S times filters [P, R], in float32 where P is large: it rounds off far less than the ridge adds."""
        return (self.narrow @ filters.to(self.narrow.dtype)).to(filters.dtype)

    @cached_property
    def narrow(self) -> Tensor:
        """S in the precision that it is multiplied in."""
        return self.S.float() if len(self.S) > WIDE else self.S

    def solve(self, pull: Tensor) -> Tensor:
        """Kernels W [O, P] with W S = pull, in float32 where P is large: off by its rounding times S's condition."""
        return torch.cholesky_solve(pull.mT.to(self._factor.dtype), self._factor).mT.to(pull.dtype)

    @cached_property
    def _factor(self) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(self.narrow)
        return _cholesky(self.narrow) if failed else factor

    @cached_property
    def marginals(self) -> Marginals:
        """Second moments over channels and over positions; S is near their Kronecker product."""
        S = self.S.reshape(1, -1, self.K, len(self.S) // self.K, self.K)
        return Marginals(S.diagonal(dim1=2, dim2=4).mean(3), S.diagonal(dim1=1, dim2=3).mean(3))


@dataclass(frozen=True)
class Quadratic:
    """E(W) of one group: metrics of its inputs and F [O, O] of its outputs, and what pulls, W1 S [O, I, K]."""

    metric: Metric
    pull: Tensor
    F: Tensor

    @cached_property
    def best(self) -> Tensor:
        """The best dense kernel W1 [O, I, K]."""
        best = self.nearly_best.flatten(1)
        if self.metric.narrow is not self.metric.S:  # one step of iterative refinement
            best = best + self.metric.solve(self.pull.flatten(1) - best @ self.metric.S)
        return best.reshape(self.pull.shape)

    @cached_property
    def nearly_best(self) -> Tensor:
        """The same but for the rounding of `Metric.solve`: what factors start from."""
        return self.metric.solve(self.pull.flatten(1)).reshape(self.pull.shape)

    @cached_property
    def constant(self) -> float:
        """E(0), nearly: what the constant in E is."""
        return float((self.F @ self.nearly_best.flatten(1) * self.pull.flatten(1)).sum())


def quadratics(kernel: Tensor, moments: Moments, metrics: list[Metric], F: Tensor | None = None) -> list[Quadratic]:
    """The quadratic of each group for original kernels [G, O, I, K] and a metric F [G·O, G·O] of the outputs."""
    G, O = kernel.shape[:2]
    F = torch.eye(G * O, dtype=torch.float64, device=kernel.device) if F is None else F
    return [
        Quadratic(
            metric,
            moments.cross[g].reshape(kernel.shape[1:]) + metric.ridge * kernel[g].double(),
            F[g * O : (g + 1) * O, g * O : (g + 1) * O],
        )
        for g, metric in enumerate(metrics)
    ]


def best_bias(kernel: Tensor, moments: Moments) -> Tensor:
    """The bias [O] that centres the error, for kernels [G, O, I, K]."""
    answered = (kernel.flatten(2).double() @ moments.patch_mean.unsqueeze(2)).squeeze(2)
    return (moments.target_mean - answered).flatten()


def fit_factors(
    problem: Quadratic, form: Form, current: Factors, *, even: bool, seed: int = 0, starts: Sequence[Factors] = ()
) -> Factors:
    """The factors of one group ([1, ...]) fitted to its quadratic, from whichever start is best.

    The SVD forms have a best start, and it is cheap. CP goes on from the layer's own factors and from `starts`, fits of
    the same kernel in other metrics.
    """
    whitened = [whitened_factors(problem, form, current, even=even, seed=seed)]
    fitted = [improved(problem, start, sweeps=0) for start in (current, *starts, *whitened)]
    start = min(fitted, key=lambda each: each[1])[0]
    # Of one position the metric is that of the channels, and the SVD in it the best there is.
    sweeps = min(MOST_SWEEPS, _affordable_sweeps(problem, start)) if form.filters else 0
    return improved(problem, start, sweeps)[0] if sweeps else start


def with_last_stage(problem: Quadratic, start: Factors) -> Factors:
    """The same factors but for the last stage, which is the best there is."""
    return improved(problem, start, sweeps=0)[0]


def whitened_factors(problem: Quadratic, form: Form, current: Factors, *, even: bool, seed: int) -> Factors:
    """Factors [1, ...] that are best where F = 1 and the metric is a Kronecker product S_I x S_K: E's own, nearly.

    There E is the plain distance to the kernel W1 times the roots of S_I and S_K, which the form factorises as ever; CP
    does so from the `current` factors. The last stage is to be fitted afterwards: a pointwise one comes in the metric
    F^(1/2) W1 and is not used.
    """
    channels, positions = problem.metric.marginals.roots(mix_channels=form.expands)
    white = whitened(problem.nearly_best.unsqueeze(0), channels, positions)
    if form.projects:
        outputs = Root.of(problem.F.unsqueeze(0)).root
        white = torch.einsum("gpo,goik->gpik", outputs, white).contiguous()
    if form.filters and current.outputs is not None and current.inputs is not None:
        A, B, C = outputs @ current.outputs, channels.root @ current.inputs.mT, positions.root @ current.spatial.mT
        cp_fit = cp(white, A.shape[2], start=CP(A, B, C, error=1.0), iterations=CP_SWEEPS)
        fit = Factors(spatial=cp_fit.C.mT, inputs=cp_fit.B.mT, outputs=cp_fit.A)
    else:
        fit = form.factorise(white, current.spatial.shape[1], even=even, seed=seed)
    inputs = None if fit.inputs is None else fit.inputs @ channels.inverse
    return replace(fit, spatial=fit.spatial @ positions.inverse, inputs=inputs)


def improved(problem: Quadratic, start: Factors, sweeps: int, tolerance: float = 2e-4) -> tuple[Factors, float]:
    """Alternating least squares on E, the last stage exactly in the end; with it E, but for its constant.

    The last stage is solved for, the ones before it take a few conjugate gradient steps each: their systems have I·R
    and K·R unknowns and are never formed. A stage that only picks channels stays as it is.
    """
    S = problem.metric.times
    B, C = _inputs_and_spatial(problem, start)
    A = start.outputs[0] if start.outputs is not None else _picks(start, len(problem.pull))
    pull = problem.pull.flatten(1)
    loss = float("inf")
    for sweep in range(sweeps + 1):
        if start.outputs is None:
            C = fit_spatial_last(problem, B, start).mT
            M = _filters(B, C)
            W = A @ M.mT
            before, loss = loss, float((W * (S(W.mT).mT - 2 * pull)).sum())  # F = 1 where outputs are only picked
        else:
            C = _unit_columns(C)
            M = _filters(B, C)
            SM = S(M)
            A = _cholesky_solve(M.mT @ SM, (pull @ M).mT).mT
            before, loss = loss, -float((problem.F @ A * (pull @ M)).sum())  # A solves its own system
        if sweep == sweeps or before - loss < tolerance * (problem.constant + loss):
            break
        if start.outputs is None:
            SM = S(M)
        else:
            scale = A.norm(dim=0)
            A, C, SM = _unit_columns(A), C * scale, SM * scale
        weighted = problem.F @ A
        gram, pulled = A.mT @ weighted, pull.mT @ weighted
        if start.inputs is not None:
            B = _improved_inputs(problem, gram, pulled - SM @ gram, B, C)
        if start.outputs is not None:
            SM = SM if start.inputs is None else S(_filters(B, C))
            C = _improved_spatial(problem, gram, pulled - SM @ gram, B, C)
    fitted = Factors(
        spatial=C.mT.unsqueeze(0),
        outputs=None if start.outputs is None else A.unsqueeze(0),
        inputs=None if start.inputs is None else B.mT.unsqueeze(0),
        channels=start.channels,
    )
    return fitted, loss


def fit_spatial_last(problem: Quadratic, B: Tensor, start: Factors) -> Tensor:
    """The depthwise stage [R, K] of pw-dw behind inputs B [I, R]: one small system per output channel.

    Channels with equally many components are one batch, as far as S times their filters fits into memory.
    """
    assert start.channels is not None
    channels = start.channels[0]
    O, I, K = problem.pull.shape
    S = problem.metric.narrow.reshape(I, K * I * K)
    spatial = torch.zeros(len(channels), K, dtype=B.dtype, device=B.device)
    counts = torch.bincount(channels, minlength=O)
    for count in torch.unique(counts).tolist():
        at_once = max(1, MIXED_VALUES // max(1, count * S.shape[1]))
        for some in torch.split((counts == count).nonzero().squeeze(1), at_once) if count else ():
            own = torch.isin(channels, some).nonzero().squeeze(1)  # `count` of each channel in turn, as channels rise
            b = B[:, own].reshape(I, len(some), count)
            mixed = (b.flatten(1).to(S).mT @ S).reshape(len(some), count, K, I, K)
            normal = torch.einsum("cmkil,icn->cmknl", mixed, b.to(S)).reshape(len(some), count * K, count * K)
            rhs = torch.einsum("icm,cik->cmk", b, problem.pull[some]).reshape(len(some), -1, 1)
            spatial[own] = _cholesky_solve(normal.to(rhs), rhs).reshape(-1, K)
    return spatial


def _improved_inputs(problem: Quadratic, gram: Tensor, residual: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """B [I, R] nearer to the solution of its normal equations; `residual` is A'F (W1 - W) S as [P, R]."""
    positions = problem.metric.marginals.positions[0]
    return _improved(
        problem, gram, residual, B, problem.metric.marginals.channels[0], gram * (C.mT @ positions @ C),
        filters=lambda X: _filters(X, C), gather=lambda Y: torch.einsum("ikr,kr->ir", Y, C),
    )  # fmt: skip


def _improved_spatial(problem: Quadratic, gram: Tensor, residual: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C [K, R] likewise."""
    channels = problem.metric.marginals.channels[0]
    return _improved(
        problem, gram, residual, C, problem.metric.marginals.positions[0], gram * (B.mT @ channels @ B),
        filters=lambda X: _filters(B, X), gather=lambda Y: torch.einsum("ikr,ir->kr", Y, B),
    )  # fmt: skip


def _improved(
    problem: Quadratic, gram: Tensor, residual: Tensor, start: Tensor, own: Tensor, mixed: Tensor, *,
    filters: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """A few conjugate gradient steps on gather(S filters(X) gram) = gather(pull), preconditioned by own x mixed."""
    shape, S = (-1, problem.metric.K, residual.shape[1]), problem.metric.narrow

    def apply(X: Tensor) -> Tensor:
        return gather((S @ filters(X).to(S) @ gram.to(S)).to(X).reshape(shape))

    return _conjugate_gradients(apply, _kronecker_inverse(own, mixed), start, gather(residual.reshape(shape)))


def _kronecker_inverse(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    """X -> left^-1 X right^-1: what solves the system where S is the Kronecker product of its marginals."""
    left_factor, right_factor = _cholesky(left), _cholesky(right)
    return lambda X: torch.cholesky_solve(torch.cholesky_solve(X, left_factor).mT, right_factor).mT


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor
) -> Tensor:
    """A few steps from x with its residual; every step lowers the quadratic, so stopping early is safe."""
    direction = z = precondition(residual)
    rz = (residual * z).sum()
    for _ in range(CG_STEPS):
        moved = apply(direction)
        curvature = (direction * moved).sum()
        if curvature <= 0 or rz <= 0:
            break
        step = rz / curvature
        x, residual = x + step * direction, residual - step * moved
        z = precondition(residual)
        rz, previous = (residual * z).sum(), rz
        direction = z + (rz / previous) * direction
    return x


def _cholesky_solve(normal: Tensor, rhs: Tensor) -> Tensor:
    """Solve a positive semi-definite system."""
    return torch.cholesky_solve(rhs, _cholesky(normal))


def _cholesky(normal: Tensor) -> Tensor:
    """The Cholesky factors of positive semi-definite matrices [..., n, n], diagonals raised until there are some."""
    most = normal.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).clamp_min(torch.finfo(normal.dtype).tiny)
    factor: Tensor
    for exponent in range(-12, 1):
        factor, failed = torch.linalg.cholesky_ex(_lifted(normal, 10.0**exponent * most))
        if not failed.any():
            break
    return factor


def _lifted(matrix: Tensor, by: Tensor) -> Tensor:
    """The matrices with their diagonals raised."""
    lifted = matrix.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(by)
    return lifted


def _filters(B: Tensor, C: Tensor) -> Tensor:
    """The kernels [P, R] of the components: b_r times c_r."""
    return (B.unsqueeze(1) * C).reshape(-1, B.shape[1])


def _unit_columns(matrix: Tensor) -> Tensor:
    norms: Tensor = matrix.norm(dim=0)
    return matrix / norms.clamp_min(torch.finfo(matrix.dtype).tiny)


def _inputs_and_spatial(problem: Quadratic, factors: Factors) -> tuple[Tensor, Tensor]:
    """B [I, R] and C [K, R] of one group."""
    B = factors.inputs[0].mT if factors.inputs is not None else _picks(factors, problem.pull.shape[1])
    return B, factors.spatial[0].mT


def _picks(factors: Factors, channels: int) -> Tensor:
    """The stage [channels, R] that only picks channels, as a matrix."""
    assert factors.channels is not None
    return one_hot(factors.channels[0], channels).mT.to(factors.spatial.dtype)


def _affordable_sweeps(problem: Quadratic, factors: Factors) -> int:
    """As many sweeps as the operations allow; none for the largest layers, whose start is good already."""
    P, R = len(problem.metric.S), factors.spatial.shape[1]
    products = 2 + 2 * CG_STEPS
    return int(SWEEP_FLOPS / (2.0 * P * P * R * products))
