"""The error of CP fits over ranks, for the price of a few short fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convsplit.lowrank.canonical import FIT_FLOPS, MAX_SWEEPS, MIN_SWEEPS, cp_each
from convsplit.lowrank.factors import CP, affordable, sweep_flops, work

CURVE_FLOPS = 2e9  # what one of the short fits may cost
CURVE_SWEEPS = 32  # from 16, what 300 reach is guessed far too low where the spectrum decays fast
# Fractions of the kernel's parameters at which a curve is fitted, if two sweeps there cost no more than ANCHOR_FLOPS:
# 512x512x9 stops at 0.4.
ANCHORS = (0.05, 0.2, 0.4, 0.65, 0.9)
ANCHOR_FLOPS = 4e10
DECAY = 0.95  # of the gain from one doubling of the sweeps to the next, at most


@dataclass(frozen=True)
class Curve:
    """Relative errors of a form at some numbers of components, and the fits they were read from, if any.

    The fits, of CP at `ANCHORS`, hold at most 2.2 times as many numbers as the kernel.
    """

    errors: tuple[float, ...]
    fits: tuple[CP, ...] = ()


def cp_curve(weight: Tensor, ranks: Sequence[int], *, seed: int = 0) -> Curve:
    """Relative errors of `cp` at every one of `ranks`, for the price of a few short fits.

    >>> curve = cp_curve(torch.rand(1, 8, 8, 9), [4, 8, 16])
    >>> curve.errors[0] > curve.errors[1] > curve.errors[2]
    True
    """
    return cp_curves([weight], ranks, seed=seed)[0]


def cp_curves(weights: Sequence[Tensor], ranks: Sequence[int], *, seed: int = 0) -> list[Curve]:
    """`cp_curve` of several weights of one shape, fitted together.

    Every fit grows from the one below. Between them log(error) is a parabola in the rank; it goes on where the largest
    ranks are too expensive to fit, and close to the kernel's own number of parameters.
    """
    shape, count = weights[0].shape, len(weights)
    chains: list[list[CP]] = [[] for _ in weights]
    for rank in _anchors(shape, sorted(set(ranks))):
        sweeps = affordable(shape, rank, CURVE_FLOPS, 2, CURVE_SWEEPS)
        before = [chain[-1] if chain else None for chain in chains]
        found = cp_each(weights, [rank] * count, starts=before, iterations=sweeps, tolerance=3e-4, seed=seed)
        for chain, fit in zip(chains, found, strict=True):
            chain.append(fit)
    return [_read(chain, shape, ranks) for chain in chains]


def curve_work(shape: Sequence[int], ranks: Sequence[int]) -> float:
    """About how long `cp_curve` of a kernel [G,O,I,K] takes, in operations."""
    return sum(
        work(shape, rank, affordable(shape, rank, CURVE_FLOPS, 2, CURVE_SWEEPS))
        for rank in _anchors(shape, sorted(set(ranks)))
    )


def _read(fits: Sequence[CP], shape: torch.Size, ranks: Sequence[int]) -> Curve:
    points = [(fit.rank, math.log(max(_settled(fit, shape), 1e-6))) for fit in fits]
    errors = {rank: math.exp(min(_parabola(points, rank), 0.0)) for rank in set(ranks)}
    falling = (min(errors[lower] for lower in errors if lower <= rank) for rank in ranks)
    return Curve(tuple(falling), tuple(fits))


def _anchors(shape: Sequence[int], ranks: list[int]) -> list[int]:
    """The sorted ranks to fit: the lowest, and those nearest to ANCHORS as far as two sweeps are affordable."""
    _, O, I, K = shape
    dense = O * I * K / (O + I + K)  # the rank with as many parameters as the kernel
    near = {min(ranks, key=lambda rank: abs(rank - fraction * dense)) for fraction in ANCHORS}
    return sorted({ranks[0]} | {rank for rank in near if 2 * sweep_flops(shape, rank) <= ANCHOR_FLOPS})


def _settled(fit: CP, shape: torch.Size) -> float:
    """The error `cp` would reach with all its sweeps: log(error) falls geometrically from doubling to doubling.

    A fit that is about to converge gains less from each, one that creeps (high ranks do) as much as before; the ratio
    of the last two gains tells them apart, but overstates it: of the powers tried, its cube root was off least.
    """
    done = len(fit.history)
    if done < 4 or fit.history[-1] <= 0:
        return fit.error
    gain = math.log(fit.history[-1] / fit.history[done // 2 - 1])  # of the last doubling
    before = math.log(fit.history[done // 2 - 1] / fit.history[done // 4 - 1]) if done >= 8 else 0.0
    decay = DECAY * (min(gain / before, 1.0) ** (1 / 3) if before < 0 else 1.0)
    doublings = math.log2(max(affordable(shape, fit.rank, FIT_FLOPS, MIN_SWEEPS, MAX_SWEEPS) / done, 1))
    return fit.error * math.exp(
        gain * sum(decay**j * min(doublings - j + 1, 1) for j in range(1, math.ceil(doublings) + 1))
    )


def _parabola(points: list[tuple[int, float]], x: float) -> float:
    """Newton's parabola through the three points nearest to x (a line or a constant through fewer)."""
    near = sorted(sorted(points, key=lambda point: abs(math.log(point[0] / x)))[:3])
    if len(near) == 1:
        return near[0][1]
    (x0, y0), (x1, y1) = near[:2]
    first = (y1 - y0) / (x1 - x0)
    if len(near) == 2:
        return y0 + first * (x - x0)
    x2, y2 = near[2]
    second = ((y2 - y1) / (x2 - x1) - first) / (x2 - x0)
    return y0 + (x - x0) * (first + second * (x - x1))
