"""Fitting factors to moments: least squares in closed form, one stage at a time.

A layer with kernel W, as a matrix [O, P], answers patches x with W x + b. With S and C from `samples`, its mean squared
error against the targets is, with the best bias and in a metric F [O, O] of the outputs,

    E(W) = tr(F W S W') - 2 tr(F W C') + const,

a quadratic in W, hence in each factor while the others stand still. A ridge pulls towards the original kernel W0:
S and C become S + lambda and C + lambda W0, so that directions the calibration inputs never take keep their weights.
The best dense kernel W1 = C S^-1 turns E into the distance || F^(1/2) (W - W1) S^(1/2) ||, the metric in which factors
are fitted; everything below works per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from convsplit.forms import Factors, Form
from convsplit.moments import Marginals, Root, whitened
from convsplit.refit.samples import Moments

RIDGE = 1e-3  # of the mean variance of an input
SWEEP_FLOPS = 2e11  # what the alternation of one layer may cost beyond one sweep
CG_STEPS = 4
MOST_SWEEPS = 30


@dataclass(frozen=True)
class Quadratic:
    """E(W) of one group: metrics S [P, P] of inputs and F [O, O] of outputs, the best dense kernel W1 [O, I, K]."""

    S: Tensor
    best: Tensor
    F: Tensor

    @cached_property
    def marginals(self) -> Marginals:
        """Second moments over channels and over positions; S is near their Kronecker product."""
        _, I, K = self.best.shape
        S = self.S.reshape(1, I, K, I, K)
        return Marginals(S.diagonal(dim1=2, dim2=4).mean(3), S.diagonal(dim1=1, dim2=3).mean(3))

    @cached_property
    def pull(self) -> Tensor:
        """W1 S [O, I, K], the gradient's constant part but for F."""
        return (self.best.flatten(1) @ self.S).reshape(self.best.shape)

    def loss(self, kernel: Tensor) -> float:
        """E of a kernel [O, I, K] but for its constant, relative to that of zero."""
        miss, whole = (kernel - self.best).flatten(1), self.best.flatten(1)
        nothing = (self.F @ whole * self.pull.flatten(1)).sum()
        return float((self.F @ miss * (miss @ self.S)).sum() / nothing.clamp_min(1e-300))


def quadratics(kernel: Tensor, moments: Moments, ridge: float = RIDGE, F: Tensor | None = None) -> list[Quadratic]:
    """The quadratic of each group for original kernels [G, O, I, K] and a metric F [G·O, G·O] of the outputs."""
    G, O = kernel.shape[:2]
    P = moments.patches.shape[1]
    # All of S where the inputs never change.
    pull = (ridge * moments.patches.diagonal(dim1=1, dim2=2).mean(1)).clamp_min(1e-12)[:, None, None]
    S = moments.patches + pull * torch.eye(P, dtype=pull.dtype, device=pull.device)
    best = _cholesky_solve(S, (moments.cross + pull * kernel.double().flatten(2)).mT).mT.reshape(kernel.shape)
    metric = torch.eye(G * O, dtype=S.dtype, device=S.device) if F is None else F
    blocks = [metric[g * O : (g + 1) * O, g * O : (g + 1) * O] for g in range(G)]
    return [Quadratic(*parts) for parts in zip(S, best, blocks, strict=True)]


def best_bias(kernel: Tensor, moments: Moments) -> Tensor:
    """The bias [O] that centres the error, for kernels [G, O, I, K]."""
    answered = (kernel.flatten(2).double() @ moments.patch_mean.unsqueeze(2)).squeeze(2)
    return (moments.target_mean - answered).flatten()


def fit_factors(problem: Quadratic, form: Form, current: Factors, *, even: bool, seed: int = 0) -> Factors:
    """The factors of one group ([1, ...]) fitted to its quadratic, from the layer's own or a fresh start if better."""
    fresh = whitened_factors(problem, form, current.spatial.shape[1], even=even, seed=seed)
    starts = (with_last_stage(problem, current), with_last_stage(problem, fresh))
    return improved(problem, min(starts, key=lambda each: problem.loss(_kernel_of(problem, each))))


def improved(problem: Quadratic, factors: Factors, sweeps: int = MOST_SWEEPS) -> Factors:
    """All stages alternately, the last one exactly in the end."""
    return with_last_stage(problem, alternate(problem, factors, min(sweeps, _affordable_sweeps(problem, factors))))


def whitened_factors(problem: Quadratic, form: Form, components: int, *, even: bool, seed: int) -> Factors:
    """Factors [1, ...] that are best where F = 1 and the metric is a Kronecker product S_I x S_K: E's own, nearly.

    There E is the plain distance to the kernel W1 times the roots of S_I and S_K, which the form factorises as ever.
    Its last stage is to be fitted afterwards: a pointwise one comes in the metric F^(1/2) W1 and is not used.
    """
    channels, positions = problem.marginals.roots(mix_channels=form.expands)
    white = whitened(problem.best.unsqueeze(0), channels, positions)
    if form.projects:
        white = torch.einsum("po,goik->gpik", Root.of(problem.F.unsqueeze(0)).root[0], white).contiguous()
    fit = form.factorise(white, components, even=even, seed=seed)
    inputs = None if fit.inputs is None else fit.inputs @ channels.inverse
    return replace(fit, spatial=fit.spatial @ positions.inverse, inputs=inputs)


def with_last_stage(problem: Quadratic, start: Factors) -> Factors:
    """The same factors but for the last stage, which is the best there is."""
    if start.outputs is not None:
        outputs = fit_outputs(problem, _filters(*_inputs_and_spatial(problem, start)))
        return replace(start, outputs=outputs.unsqueeze(0))
    assert start.inputs is not None
    assert start.channels is not None
    spatial = fit_spatial_last(problem, start.inputs[0], start.channels[0])
    return replace(start, spatial=spatial.unsqueeze(0))


def alternate(problem: Quadratic, start: Factors, sweeps: int, tolerance: float = 2e-4) -> Factors:
    """Alternating least squares on E: outputs exactly, inputs and spatial by a few conjugate gradient steps.

    The systems of the latter two have I·R and K·R unknowns and are never formed: applying one is two products with S.
    A stage that only picks channels stays as it is.
    """
    B, C = _inputs_and_spatial(problem, start)
    A = start.outputs[0] if start.outputs is not None else _picks(start, len(problem.best))
    loss = float("inf")
    for _ in range(sweeps):
        if start.outputs is not None:
            A = fit_outputs(problem, _filters(B, C))
        before, loss = loss, problem.loss(_kernel(A, B, C))
        if before - loss < tolerance * before:
            break
        if start.outputs is not None:
            A, C = _unit_columns(A, C)
        if start.inputs is not None:
            C, B = _unit_columns(C, B)
        weighted = problem.F @ A
        gram, pulled = A.mT @ weighted, torch.einsum("or,oik->ikr", weighted, problem.pull)
        if start.inputs is not None:
            B = _improved_inputs(problem, gram, pulled, B, C)
        C = _improved_spatial(problem, gram, pulled, B, C)
    return Factors(
        spatial=C.mT.unsqueeze(0),
        outputs=None if start.outputs is None else A.unsqueeze(0),
        inputs=None if start.inputs is None else B.mT.unsqueeze(0),
        channels=start.channels,
    )


def fit_outputs(problem: Quadratic, filters: Tensor) -> Tensor:
    """The last pointwise stage A[O, R] for filters [P, R] in front of it: A = W1 S M (M' S M)^-1."""
    SM = problem.S @ filters
    return _cholesky_solve(filters.mT @ SM, (problem.best.flatten(1) @ SM).mT).mT


def fit_spatial_last(problem: Quadratic, inputs: Tensor, channels: Tensor) -> Tensor:
    """The depthwise stage [R, K] of pw-dw behind inputs [R, I]: one small system per output channel."""
    _, I, K = problem.best.shape
    R = len(inputs)
    S = problem.S.reshape(I, K, I * K)
    spatial = torch.zeros(R, K, dtype=inputs.dtype, device=inputs.device)
    for channel in torch.unique(channels):
        own = (channels == channel).nonzero().squeeze(1)
        b = inputs[own]
        mixed = torch.einsum("ri,ikp->rkp", b, S).reshape(-1, I, K)
        normal = torch.einsum("nik,ri->nrk", mixed, b).reshape(len(own) * K, -1)
        rhs = torch.einsum("ri,ik->rk", b, problem.pull[channel]).reshape(-1, 1)
        spatial[own] = _cholesky_solve(normal, rhs).reshape(-1, K)
    return spatial


def _improved_inputs(problem: Quadratic, gram: Tensor, pulled: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """B [I, R] nearer to the solution of its normal equations; `pulled` is A'F W1 S [I, K, R]."""
    positions = problem.marginals.positions[0]
    return _improved(
        problem, gram, pulled, B, problem.marginals.channels[0], gram * (C.mT @ positions @ C),
        filters=lambda X: _filters(X, C), gather=lambda Y: torch.einsum("ikr,kr->ir", Y, C),
    )  # fmt: skip


def _improved_spatial(problem: Quadratic, gram: Tensor, pulled: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """C [K, R] likewise."""
    channels = problem.marginals.channels[0]
    return _improved(
        problem, gram, pulled, C, problem.marginals.positions[0], gram * (B.mT @ channels @ B),
        filters=lambda X: _filters(B, X), gather=lambda Y: torch.einsum("ikr,ir->kr", Y, B),
    )  # fmt: skip


def _improved(
    problem: Quadratic, gram: Tensor, pulled: Tensor, start: Tensor, own: Tensor, mixed: Tensor, *,
    filters: Callable[[Tensor], Tensor], gather: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """A few conjugate gradient steps on gather(S filters(X) gram) = gather(pulled), preconditioned by own x mixed."""

    def apply(X: Tensor) -> Tensor:
        return gather((problem.S @ filters(X) @ gram).reshape(pulled.shape))

    return _conjugate_gradients(apply, _kronecker_inverse(own, mixed), start, gather(pulled))


def _kronecker_inverse(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    """X -> left^-1 X right^-1: what solves the system where S is the Kronecker product of its marginals."""
    left_factor, right_factor = _cholesky(left), _cholesky(right)
    return lambda X: torch.cholesky_solve(torch.cholesky_solve(X, left_factor).mT, right_factor).mT


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], x: Tensor, rhs: Tensor
) -> Tensor:
    """A few steps towards apply(x) = rhs; every step lowers the quadratic, so stopping early is safe."""
    residual = rhs - apply(x)
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
    """The Cholesky factor of positive semi-definite matrices [..., n, n], the diagonal raised until there is one."""
    most = normal.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(normal.dtype).tiny)[..., None, None]
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    factor: Tensor
    for exponent in range(-12, 1):
        factor, failed = torch.linalg.cholesky_ex(normal + 10.0**exponent * most * eye)
        if not failed.any():
            break
    return factor


def _filters(B: Tensor, C: Tensor) -> Tensor:
    """The kernels [P, R] of the components: b_r times c_r."""
    return (B.unsqueeze(1) * C).reshape(-1, B.shape[1])


def _kernel(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return (A @ _filters(B, C).mT).reshape(len(A), len(B), len(C))


def _unit_columns(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with unit columns in the first: well-scaled systems for the other."""
    norms = one.norm(dim=0).clamp_min(torch.finfo(one.dtype).tiny)
    return one / norms, other * norms


def _inputs_and_spatial(problem: Quadratic, factors: Factors) -> tuple[Tensor, Tensor]:
    """B [I, R] and C [K, R] of one group."""
    B = factors.inputs[0].mT if factors.inputs is not None else _picks(factors, problem.best.shape[1])
    return B, factors.spatial[0].mT


def _picks(factors: Factors, channels: int) -> Tensor:
    """The stage [channels, R] that only picks channels, as a matrix."""
    assert factors.channels is not None
    return one_hot(factors.channels[0], channels).mT.to(factors.spatial.dtype)


def _kernel_of(problem: Quadratic, factors: Factors) -> Tensor:
    O, I, _ = problem.best.shape
    return factors.kernel(O, I)[0]


def _affordable_sweeps(problem: Quadratic, factors: Factors) -> int:
    """As many sweeps as the flops allow: one for the largest layers."""
    P, R = len(problem.S), factors.spatial.shape[1]
    sweep = 2.0 * P * P * R * (2 + 2 * (CG_STEPS + 1))
    return int(max(SWEEP_FLOPS / sweep, 1))
