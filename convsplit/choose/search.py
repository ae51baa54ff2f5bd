"""Searching for the cheapest conversion that loses no more than a limit, in a handful of conversions.

How far a conversion drifts is predicted for any fraction kept, from the errors of its plan's layers: up to a factor,
and about right in how fast it falls. So each conversion that is measured corrects the prediction (a secant, in the
logarithms of drift and prediction), and the next one is aimed just below the limit. Where the limit is not one of
drift but of something counted on the same inputs (how many change their class), drift, which is known far more exactly
than a count, carries the search: what is `expected` to be lost at a drift is corrected by what was counted so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MOST = 5  # conversions
AIM = 0.9  # of the limit
NEAR = 0.02  # fractions this close, relatively, are not told apart
WORTH = 1.05  # of what is known to be too little: nearer to that, another conversion gains too little
REPAIRED = 0.5  # measured over predicted drift, as far as nothing was measured yet
SLOPES = (0.3, 3.0)  # between which that of measured against predicted drift is believed
NEXT_TO_NOTHING = 1e-9


@dataclass(frozen=True)
class Predicted:
    """The drift that is predicted where `fractions` (falling) are kept."""

    fractions: Sequence[float]
    drifts: Sequence[float]

    def drift(self, fraction: float) -> float:
        """Interpolated in logarithms."""
        xs, ys = self._rising()
        return float(np.exp(np.interp(-math.log(fraction), xs, ys)))

    def fraction(self, drift: float) -> float:
        """The smallest fraction with no more drift than that."""
        xs, ys = self._rising()
        return float(np.exp(-np.interp(math.log(max(drift, NEXT_TO_NOTHING)), ys, xs)))

    def _rising(self) -> tuple[np.ndarray, np.ndarray]:
        ys = np.maximum.accumulate(np.log(np.maximum(self.drifts, NEXT_TO_NOTHING)))
        # Strictly, so that there is one fraction for each drift.
        return -np.log(np.asarray(self.fractions)), ys + 1e-9 * np.arange(len(ys))


@dataclass(frozen=True)
class Point:
    """A conversion that was measured: what was kept, how far it drifted, and what was lost by it."""

    fraction: float
    drift: float
    loss: float


def cheapest(
    measure: Callable[[float], Point],
    predicted: Predicted,
    expected: Callable[[float], float],
    limit: float,
    *,
    most: int = MOST,
) -> list[Point]:
    """Convert and measure at up to `most` fractions; all that was measured, in that order.

    `expected` is what is lost at a drift, rising, and known up to a factor. The search ends early where less than a
    twentieth could still be gained.

    >>> tried = cheapest(lambda f: Point(f, 1 / f - 1, 1 / f - 1), Predicted([0.9, 0.5, 0.1], [0.1, 1, 9]), float, 1.0)
    >>> len(tried) <= 5, 0.5 <= min(point.fraction for point in tried if point.loss <= 1) < 0.53
    (True, True)
    """
    points: list[Point] = []
    while len(points) < most:
        fraction = _next(points, predicted, expected, limit, last=len(points) + 1 == most)
        if fraction is None:
            break
        points.append(measure(fraction))
    return points


def _next(
    points: Sequence[Point], predicted: Predicted, expected: Callable[[float], float], limit: float, last: bool
) -> float | None:
    """The fraction to try; None where nothing is left to be gained."""
    met = [point.fraction for point in points if point.loss <= limit]
    missed = [point.fraction for point in points if point.loss > limit]
    least, most = min(predicted.fractions), max(predicted.fractions)
    low, high = max(missed, default=least), min(met, default=most)
    aim = AIM * limit if met or not last else AIM * limit / 2  # the last one should be one that can be had
    guess = predicted.fraction(_prediction_for(_drift_for(aim, points, expected), points, predicted))
    guess = min(max(guess, least), most)
    if met and not missed and guess > high * (1 - NEAR):
        return None
    if missed and not low * (1 + NEAR) < guess < high * (1 - NEAR):
        guess = math.sqrt(low * high)  # between what is known to be too little and what is known to be enough
    if missed and met and high < low * WORTH:
        return None
    if any(abs(guess / point.fraction - 1) < NEAR / 2 for point in points):
        return None
    return guess


def _drift_for(aim: float, points: Sequence[Point], expected: Callable[[float], float]) -> float:
    """The drift at which so much is lost, by what was expected and what was measured."""
    # How many times more was lost than expected: known where it was measured, in between by interpolation.
    told = sorted((p.drift, p.loss) for p in points if math.isfinite(p.loss) and math.isfinite(p.drift) and p.drift)
    at = [math.log(drift) for drift, _ in told]
    factors = [math.log(max(loss, aim / 10) / max(expected(drift), NEXT_TO_NOTHING)) for drift, loss in told]
    low, high = math.log(NEXT_TO_NOTHING), math.log(10.0)
    for _ in range(60):
        middle = (low + high) / 2
        factor = math.exp(float(np.interp(middle, at, factors))) if told else 1.0
        low, high = (middle, high) if factor * expected(math.exp(middle)) < aim else (low, middle)
    return math.exp(low)


def _prediction_for(drift: float, points: Sequence[Point], predicted: Predicted) -> float:
    """The prediction that stands for a drift, on the line through the two measured points nearest to it."""
    known = [
        (math.log(predicted.drift(point.fraction)), math.log(max(point.drift, NEXT_TO_NOTHING)))
        for point in points
        if math.isfinite(point.drift)
    ]
    wanted = math.log(drift)
    if not known:
        return drift / REPAIRED
    known.sort(key=lambda pair: abs(pair[1] - wanted))
    (x, y), slope = known[0], 1.0
    if len(known) > 1 and known[1][0] != x:
        slope = min(max((known[1][1] - y) / (known[1][0] - x), SLOPES[0]), SLOPES[1])
    return math.exp(x + (wanted - y) / slope)
