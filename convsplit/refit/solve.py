"""Fitting factors to moments: least squares in closed form, one stage at a time.

A layer with kernel W, as a matrix [O, P], answers patches x with W x + b. With S and C from `moments`, its mean squared
error against the targets is, with the best bias,

    E(W) = tr(W S W') - 2 tr(W C') + const,

a quadratic in W, hence in each factor while the others stand still. A ridge pulls towards the original kernel W0:
S and C become S + lambda and C + lambda W0, so that directions the calibration inputs never take keep their weights.
The best dense kernel W1 = C S^-1 turns E into the distance || (W - W1) S^(1/2) ||, the metric in which factors are
fitted; everything below works per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from convsplit.forms import Factors, Form
from convsplit.moments import Marginals, Moments, whitened

RIDGE = 1e-3  # of the mean variance of an input
SWEEP_FLOPS = 2e11  # what the alternation of one layer may cost beyond one sweep
CG_STEPS = 4


@dataclass(frozen=True)
class Quadratic:
    """E(W) of one group: metric S [P, P], and the best dense kernel W1 [O, I, K]."""

    S: Tensor
    best: Tensor

    @property
    def marginals(self) -> Marginals:
        """Second moments over channels and over positions; S is near their Kronecker product."""
        _, I, K = self.best.shape
        S = self.S.reshape(1, I, K, I, K)
        return Marginals(S.diagonal(dim1=2, dim2=4).mean(3), S.diagonal(dim1=1, dim2=3).mean(3))

    def loss(self, kernel: Tensor) -> float:
        """|| (W - W1) S^(1/2) ||^2 relative to || W1 S^(1/2) ||^2."""
        miss, whole = (kernel - self.best).flatten(1), self.best.flatten(1)
        return float(((miss @ self.S) * miss).sum() / ((whole @ self.S) * whole).sum().clamp_min(1e-300))


def quadratics(kernel: Tensor, moments: Moments, ridge: float = RIDGE) -> list[Quadratic]:
    """The quadratic of each group for original kernels [G, O, I, K]."""
    found = []
    for W0, S, C in zip(kernel.double(), moments.patches, moments.cross, strict=True):
        pull = (ridge * S.diagonal().mean()).clamp_min(1e-12)  # all of S where the inputs never change
        S = S + pull * torch.eye(len(S), dtype=S.dtype, device=S.device)
        best = _cholesky_solve(S, (C + pull * W0.flatten(1)).mT).mT
        found.append(Quadratic(S, best.reshape(W0.shape)))
    return found


def relative_loss(kernel: Tensor, bias: Tensor, moments: Moments) -> float:
    """Mean squared error of kernels [G, O, I, K] with bias [O] on the data, relative to the targets' variance."""
    W = kernel.flatten(2).double()
    quadratic = ((W @ moments.patches) * W).sum(2) - 2 * (W * moments.cross).sum(2) + moments.energy
    offset = (best_bias(kernel, moments) - bias).reshape(moments.energy.shape)
    whole = moments.energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((quadratic + offset.square()).sum().clamp_min(0) / whole)


def best_bias(kernel: Tensor, moments: Moments) -> Tensor:
    """The bias [O] that centres the error, for kernels [G, O, I, K]."""
    answered = (kernel.flatten(2).double() @ moments.patch_mean.unsqueeze(2)).squeeze(2)
    return (moments.target_mean - answered).flatten()


def fit_factors(
    problem: Quadratic, form: Form, current: Factors, *, even: bool, seed: int = 0, last_stage_only: bool = False
) -> Factors:
    """The factors of one group ([1, ...]) fitted to its quadratic, from the layer's own or a fresh start if better."""
    fit = _last_stage_fitted(problem, current)
    if last_stage_only:
        return fit
    fresh = whitened_factors(problem, form, current.spatial.shape[1], even=even, seed=seed)
    better = min(fit, _last_stage_fitted(problem, fresh), key=lambda each: problem.loss(_kernel_of(problem, each)))
    return _last_stage_fitted(problem, alternate(problem, better))


def whitened_factors(problem: Quadratic, form: Form, components: int, *, even: bool, seed: int) -> Factors:
    """Factors [1, ...] that are best in the Kronecker approximation S ~ S_I x S_K of the metric.

    There E is the plain distance to the kernel W1 times the roots of S_I and S_K, which the form factorises as ever.
    """
    channels, positions = problem.marginals.roots(mix_channels=form.expands)
    white = whitened(problem.best.unsqueeze(0), channels, positions)
    fit = form.factorise(white, components, even=even, seed=seed)
    inputs = None if fit.inputs is None else fit.inputs @ channels.inverse
    return replace(fit, spatial=fit.spatial @ positions.inverse, inputs=inputs)


def _last_stage_fitted(problem: Quadratic, start: Factors) -> Factors:
    if start.outputs is not None:
        outputs = fit_outputs(problem, _filters(*_inputs_and_spatial(problem, start)))
        return replace(start, outputs=outputs.unsqueeze(0))
    assert start.inputs is not None
    assert start.channels is not None
    spatial = fit_spatial_last(problem, start.inputs[0], start.channels[0])
    return replace(start, spatial=spatial.unsqueeze(0))


def alternate(problem: Quadratic, start: Factors, sweeps: int | None = None, tolerance: float = 2e-4) -> Factors:
    """Alternating least squares on E: outputs exactly, inputs and spatial by a few conjugate gradient steps.

    The systems of the latter two have I·R and K·R unknowns and are never formed: applying one is two products with S.
    A stage that only picks channels stays as it is.
    """
    B, C = _inputs_and_spatial(problem, start)
    A = start.outputs[0] if start.outputs is not None else _picks(start, len(problem.best))
    sweeps = _affordable_sweeps(problem, B.shape[1]) if sweeps is None else sweeps
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
        gram, pulled = A.mT @ A, torch.einsum("or,oik->rik", A, _times_metric(problem))
        if start.inputs is not None:
            B = _solve_inputs(problem, gram, pulled, B, C)
        C = _solve_spatial(problem, gram, pulled, B, C)
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
    pulled = _times_metric(problem)
    spatial = torch.zeros(R, K, dtype=inputs.dtype, device=inputs.device)
    for channel in torch.unique(channels):
        own = (channels == channel).nonzero().squeeze(1)
        b = inputs[own]
        mixed = torch.einsum("ri,ikp->rkp", b, S).reshape(-1, I, K)
        normal = torch.einsum("nik,ri->nrk", mixed, b).reshape(len(own) * K, -1)
        rhs = torch.einsum("ri,ik->rk", b, pulled[channel]).reshape(-1, 1)
        spatial[own] = _cholesky_solve(normal, rhs).reshape(-1, K)
    return spatial


def _solve_inputs(problem: Quadratic, gram: Tensor, pulled: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Improve B[I, R] by conjugate gradients on its normal equations, sum_k S (B x C) gram · C = pulled · C."""
    S_I, S_K = problem.marginals.channels[0], problem.marginals.positions[0]
    I, R, K = len(B), B.shape[1], len(C)

    def apply(X: Tensor) -> Tensor:
        return torch.einsum("ikr,kr->ir", (problem.S @ _filters(X, C) @ gram).reshape(I, K, R), C)

    precondition = _kronecker_inverse(S_I, gram * (C.mT @ S_K @ C))
    return _conjugate_gradients(apply, precondition, B, torch.einsum("rik,kr->ir", pulled, C))


def _solve_spatial(problem: Quadratic, gram: Tensor, pulled: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Improve C[K, R] likewise."""
    S_I, S_K = problem.marginals.channels[0], problem.marginals.positions[0]
    I, R, K = len(B), B.shape[1], len(C)

    def apply(X: Tensor) -> Tensor:
        return torch.einsum("ikr,ir->kr", (problem.S @ _filters(B, X) @ gram).reshape(I, K, R), B)

    precondition = _kronecker_inverse(S_K, gram * (B.mT @ S_I @ B))
    return _conjugate_gradients(apply, precondition, C, torch.einsum("rik,ir->kr", pulled, B))


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
    """The Cholesky factor of a positive semi-definite matrix, its diagonal raised until there is one."""
    diagonal = normal.diagonal()
    most = diagonal.max().clamp_min(torch.finfo(normal.dtype).tiny)
    eye = torch.eye(len(normal), dtype=normal.dtype, device=normal.device)
    factor: Tensor
    for exponent in range(-12, 1):
        factor, failed = torch.linalg.cholesky_ex(normal + 10.0**exponent * most * eye)
        if not failed:
            break
    return factor


def _times_metric(problem: Quadratic) -> Tensor:
    return (problem.best.flatten(1) @ problem.S).reshape(problem.best.shape)


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


def _affordable_sweeps(problem: Quadratic, R: int) -> int:
    """As many sweeps as the flops allow: some thirty for small layers, one for the largest."""
    P = len(problem.S)
    sweep = 2.0 * P * P * R * (2 + 2 * (CG_STEPS + 1))
    return int(min(max(SWEEP_FLOPS / sweep, 1), 30))
