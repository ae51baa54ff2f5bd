"""Fitting factors to moments: least squares in closed form, one stage at a time.

A layer with kernel W, as a matrix [O, P], answers patches x with W x + b. With S and C from `samples`, its mean squared
error against the targets is, with the best bias and in a metric F [O, O] of the outputs,

    E(W) = tr(F W S W') - 2 tr(F W C') + const,

a quadratic in W, hence in each factor while the others stand still. A ridge pulls towards the original kernel W0:
S and C become S + lambda and C + lambda W0, so that directions the calibration inputs never take keep their weights.
The best dense kernel W1 = C S^-1 turns E into the distance || F^(1/2) (W - W1) S^(1/2) ||, the metric in which factors
are fitted; everything below works per group.

What costs time is S times filters [P, R]: 2 P²R operations, the only ones that grow with the square of P. They are
counted below, and done once for each set of filters; steps on the way to the next are found with `Stationary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from convsplit.data.moments import Marginals, Root, whitened
from convsplit.forms import Factors, Form
from convsplit.lowrank import CP, affordable, cp
from convsplit.repair.samples import Moments
from convsplit.repair.stationary import Stationary, distances
from convsplit.spec import Axes

RIDGE = 1e-3  # of the mean variance of an input
SWEEP_FLOPS = 1e11  # what CP of one layer may cost, and the alternation, which the largest do without
CG_STEPS = 2
MIXED_VALUES = 1 << 24  # of S times filters, for some output channels of pw-dw at once
LEAST_CP_SWEEPS, CP_SWEEPS = 10, 60  # in the metric of the marginals, from factors that are near
WIDE = 500  # patches from here on are multiplied in float32
MOST_SWEEPS = 4  # more of them change the drift of a network by less than the choice of images does


@dataclass(frozen=True)
class Metric:
    """S [P, P] of one group's inputs, the ridge on its diagonal included; P = I·K, of K positions."""

    S: Tensor
    ridge: Tensor
    kernel_size: Axes

    @classmethod
    def of(cls, moments: Moments, kernel_size: Axes, ridge: float = RIDGE) -> list[Metric]:
        """The metric of each group. The moments of patches are taken over: wide ones are not there twice."""
        diagonal = moments.patches.diagonal(dim1=1, dim2=2)
        # A patch whose inputs never change has no variance, but a metric all the same.
        pulls = (ridge * diagonal.mean(1)).clamp_min(1e-12)
        diagonal.add_(pulls.unsqueeze(1))
        return [cls(S, pull, kernel_size) for S, pull in zip(moments.patches, pulls, strict=True)]

    @property
    def taps(self) -> int:
        """Positions of the kernel, K."""
        return math.prod(self.kernel_size)

    @cached_property
    def narrow(self) -> Tensor:
        """S as it is multiplied, in float32 where P is large: that rounds off far less than the ridge adds."""
        return self.S.float() if len(self.S) > WIDE else self.S

    def solve(self, pull: Tensor) -> Tensor:
        """Kernels W [O, P] with W S = pull, in float32 where P is large: off by its rounding times S's condition."""
        return torch.cholesky_solve(pull.mT.to(self._factor.dtype), self._factor).mT.to(pull.dtype)

    @cached_property
    def _factor(self) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(self.narrow)
        return _cholesky(self.narrow) if failed else factor

    @cached_property
    def stationary(self) -> Stationary:
        """What of S depends on the distance of positions alone."""
        return Stationary.of(self.narrow, self.kernel_size)

    @cached_property
    def marginals(self) -> Marginals:
        """Second moments over channels and over positions; S is near their Kronecker product."""
        S = self.S.reshape(1, -1, self.taps, len(self.S) // self.taps, self.taps)
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
    def narrow_pull(self) -> Tensor:
        """What pulls, [O, P], in the precision that S is multiplied in."""
        return self.pull.flatten(1).to(self.metric.narrow.dtype)

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
    starts = (current, *starts, whitened_factors(problem, form, current, even=even, seed=seed))
    start = min((Point.of(problem, each) for each in starts), key=lambda point: point.loss)
    # Of one position the metric is that of the channels, and the SVD in it the best there is.
    sweeps = min(MOST_SWEEPS, _affordable_sweeps(problem.metric, current.spatial.shape[1])) if form.filters else 0
    return improved(problem, start, sweeps).factors


def with_last_stage(problem: Quadratic, start: Factors) -> Factors:
    """The same factors but for the last stage, which is the best there is."""
    return Point.of(problem, start).factors


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
        sweeps = affordable(white.shape, A.shape[2], SWEEP_FLOPS, LEAST_CP_SWEEPS, CP_SWEEPS)
        cp_fit = cp(white, A.shape[2], start=CP(A, B, C, error=1.0), iterations=sweeps)
        fit = Factors(spatial=cp_fit.C.mT, inputs=cp_fit.B.mT, outputs=cp_fit.A)
    else:
        fit = form.factorise(white, current.spatial.shape[1], even=even, seed=seed)
    inputs = None if fit.inputs is None else fit.inputs @ channels.inverse
    return replace(fit, spatial=fit.spatial @ positions.inverse, inputs=inputs)


@dataclass(frozen=True)
class Point:
    """Factors of one group whose last stage is the best there is behind the others; picks stand as one-hot columns."""

    start: Factors  # which of the stages pick, and what
    A: Tensor  # [O, R]
    B: Tensor  # [I, R]
    C: Tensor  # [K, R]
    SM: Tensor  # [P, R], S times the filters
    loss: float  # E, but for its constant

    @classmethod
    def of(cls, problem: Quadratic, start: Factors) -> Point:
        """From factors [1, ...]."""
        I, dtype = problem.pull.shape[1], problem.metric.narrow.dtype
        B = start.inputs[0].mT if start.inputs is not None else _picks(start, I)
        return cls.behind(problem, start, B.to(dtype), start.spatial[0].mT.to(dtype))

    @classmethod
    def behind(cls, problem: Quadratic, start: Factors, B: Tensor, C: Tensor) -> Point:
        """The last stage solved for, behind the others."""
        S, pull = problem.metric.narrow, problem.narrow_pull
        if start.outputs is None:
            A, C = _picks(start, len(pull)).to(B), fit_spatial_last(problem, B, start).mT
            M = _filters(B, C)
            SM = S @ M
            gained = (M * ((SM @ A.mT - 2 * pull.mT) @ A)).sum(dtype=torch.float64)
            return cls(start, A, B, C, SM, float(gained))  # F = 1 where outputs are only picked
        C = _unit_columns(C)
        M = _filters(B, C)
        SM, pulled = S @ M, pull @ M
        A = _cholesky_solve((M.mT @ SM).double(), pulled.mT.double()).mT.to(B)
        gained = -(problem.F.to(A) @ A * pulled).sum(dtype=torch.float64)  # A solves its own system
        return cls(start, A, B, C, SM, float(gained))

    @property
    def factors(self) -> Factors:
        """As they were given, [1, ...]."""
        return Factors(
            spatial=self.C.double().mT.unsqueeze(0),
            outputs=None if self.start.outputs is None else self.A.double().unsqueeze(0),
            inputs=None if self.start.inputs is None else self.B.double().mT.unsqueeze(0),
            channels=self.start.channels,
        )


def improved(problem: Quadratic, start: Point, sweeps: int, tolerance: float = 2e-4) -> Point:
    """Alternating least squares on E, the last stage exactly.

    The stages before the last take a few conjugate gradient steps each: their systems have I·R and K·R unknowns and are
    never formed. A stage that only picks channels stays as it is. Steps are those of a metric that is only near S; what
    has not lowered E is not kept.
    """
    metric, point = problem.metric, start
    F, pull = problem.F.to(metric.narrow), problem.narrow_pull
    for _ in range(sweeps):
        A, B, C, SM = point.A, point.B, point.C, point.SM
        if point.start.outputs is not None:
            scale = A.norm(dim=0)
            A, C, SM = _unit_columns(A), C * scale, SM * scale
        weighted = F @ A
        gram = A.mT @ weighted
        residual = pull.mT @ weighted - SM @ gram
        if point.start.inputs is not None:
            moved = _improved_inputs(metric, gram, residual, B, C)
            if point.start.outputs is not None:
                residual = residual - metric.stationary.filtered(moved - B, C) @ gram
            B = moved
        if point.start.outputs is not None:
            C = _improved_spatial(metric, gram, residual, B, C)
        before, found = point.loss, Point.behind(problem, point.start, B, C)
        point = found if found.loss < before else point
        if before - found.loss < tolerance * (problem.constant + found.loss):
            break
    return point


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
            mixed = (b.flatten(1).mT @ S).reshape(len(some), count, K, I, K)
            normal = torch.einsum("cmkil,icn->cmknl", mixed, b).reshape(len(some), count * K, count * K)
            rhs = torch.einsum("icm,cik->cmk", b.double(), problem.pull[some]).reshape(len(some), -1, 1)
            spatial[own] = _cholesky_solve(normal.double(), rhs).reshape(-1, K).to(B)
    return spatial


def _improved_inputs(metric: Metric, gram: Tensor, residual: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """B [I, R] nearer to the solution of its normal equations; `residual` is S (W1 - W)'F A as [P, R]."""
    rows = C.mT.contiguous()

    def apply(X: Tensor) -> Tensor:
        moved = metric.stationary.times(metric.stationary.seen(X.mT), rows)
        return (rows.unsqueeze(1) @ _mixed(gram, moved)).squeeze(1).mT

    residual = torch.einsum("ikr,kr->ir", residual.view(len(B), len(C), -1), C)
    channels, positions = (each[0].to(B) for each in (metric.marginals.channels, metric.marginals.positions))
    precondition = _kronecker_inverse(channels, gram * (C.mT @ positions @ C))
    return _conjugate_gradients(apply, precondition, B, residual)


def _improved_spatial(metric: Metric, gram: Tensor, residual: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C [K, R] likewise."""
    rows = B.mT.contiguous()
    seen = metric.stationary.seen(rows)

    def apply(X: Tensor) -> Tensor:
        return (_mixed(gram, metric.stationary.times(seen, X.mT)) @ rows.unsqueeze(2)).squeeze(2).mT

    residual = torch.einsum("ikr,ir->kr", residual.view(len(B), len(C), -1), B)
    channels, positions = (each[0].to(B) for each in (metric.marginals.channels, metric.marginals.positions))
    precondition = _kronecker_inverse(positions, gram * (B.mT @ channels @ B))
    return _conjugate_gradients(apply, precondition, C, residual)


def _mixed(gram: Tensor, rows: Tensor) -> Tensor:
    """Rows [R, K, I] of components times their products [R, R]."""
    return (gram @ rows.flatten(1)).view_as(rows)


def _kronecker_inverse(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    """X -> left^-1 X right^-1: what solves the system where S is the Kronecker product of its marginals."""
    left_factor, right_factor = _cholesky(left), _cholesky(right)
    return lambda X: torch.cholesky_solve(torch.cholesky_solve(X, left_factor).mT, right_factor).mT


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor
) -> Tensor:
    """A few steps from x with its residual; every step lowers the quadratic of `apply`, so stopping early is safe."""
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


def _picks(factors: Factors, channels: int) -> Tensor:
    """The stage [channels, R] that only picks channels, as a matrix."""
    assert factors.channels is not None
    return one_hot(factors.channels[0], channels).mT.to(factors.spatial.dtype)


def _affordable_sweeps(metric: Metric, rank: int) -> int:
    """As many sweeps as the operations allow; none for the largest layers, whose start is good already."""
    P, share = len(metric.S), distances(metric.kernel_size) / metric.taps**2
    products = 1 + (CG_STEPS + 2) * share  # of `Point.behind`, and of both steps
    return int(SWEEP_FLOPS / (2.0 * P * P * rank * products))
