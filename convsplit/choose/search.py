"""Searching for the cheapest conversion that loses no more than a limit, in a handful of conversions.

How far a conversion drifts is predicted for any fraction kept, from the errors of its plan's layers: up to a factor,
and about right in how fast it falls. So each conversion that is measured corrects the prediction (a secant, in the
logarithms of drift and prediction), and the next one is aimed just below the limit. Where the limit is not one of
drift but of something counted on the same inputs (how many change their class), drift, which is known far more exactly
than a count, carries the search: what is `expected` to be lost at a drift is corrected by all that was counted so far,
and a conversion whose own count came out lucky is not believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MOST = 5  # conversions
AIM = 0.9  # of the limit
CLOSER = 0.97  # likewise, once a conversion has met it, so that the line to the limit is known
NEAR = 0.02  # fractions this close, relatively, are not told apart
WORTH = 1.05  # of what is known to be too little: nearer to that, another conversion gains too little
STEP = 1.08  # less than what is known to be enough, where nothing says that much less would be
REPAIRED = 0.5  # measured over predicted drift, as far as nothing was measured yet
USUAL = 1.4  # inputs of another class over those expected: 1.3 to 1.8 of ResNets, 15 of one sure of its digits
SURE = 6.0  # counted inputs that this is worth: it is off by 1 / sqrt(6), 40 %
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


@dataclass(frozen=True)
class Loss:
    """What may be lost, `limit`, and what is `expected` to be lost at a drift: rising, and known up to a factor.

    A loss that is `counted` on so many inputs is noisy: all such figures together, and what the factor usually is,
    say what it is. Others (none counted) are taken as they were measured, and the factor in between is
    interpolated. What is expected of more inputs, `of_all`, says what a factor that few told comes to.
    """

    limit: float
    expected: Callable[[float], float]
    counted: int = 0
    of_all: Callable[[float], float] | None = None

    def believed(self, points: Sequence[Point]) -> list[float]:
        """What is lost at each point: where it is counted no less than is expected by all counts together."""
        if not self.counted:
            return [point.loss for point in points]
        return [max(point.loss, self._at(points, point.drift)) for point in points]

    def drift_for(self, aim: float, points: Sequence[Point]) -> float:
        """The drift at which so much is lost, by what was expected and what was measured."""
        low, high = math.log(NEXT_TO_NOTHING), math.log(10.0)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._at(points, math.exp(middle)) < aim else (low, middle)
        return math.exp(low)

    def _at(self, points: Sequence[Point], drift: float) -> float:
        """What is lost at a drift: so many times more than expected as it was where that was measured."""
        told = sorted(
            (p.drift, p.loss) for p in points if math.isfinite(p.loss) and math.isfinite(p.drift) and p.drift
        )
        of_all = self.of_all or self.expected
        hoped = [max(self.expected(each), NEXT_TO_NOTHING) for each, _ in told]
        if not told or not math.isfinite(drift):
            return (USUAL if self.counted else 1.0) * of_all(drift)
        if self.counted:
            # Counts are Poisson about the factor times what was expected. The first is the factor's mean were it gamma
            # about USUAL, of the shape SURE, which no lucky count takes far down; but it may be far larger, as where a
            # network is sure of all its answers, and then counts show it.
            # Several counts are of the same inputs, hence their mean: together they know no more than one of so many.
            lost, hope = sum(loss for _, loss in told) / len(told), sum(hoped) / len(told)
            sure = SURE / self.counted
            return max((sure * USUAL + lost) / (sure + hope), lost / hope) * of_all(drift)
        least = AIM * self.limit / 10  # of nothing lost no factor can be told
        factors = [math.log(max(loss, least) / each) for (_, loss), each in zip(told, hoped, strict=True)]
        at = [math.log(each) for each, _ in told]
        return math.exp(float(np.interp(math.log(max(drift, NEXT_TO_NOTHING)), at, factors))) * self.expected(drift)


def cheapest(measure: Callable[[float], Point], predicted: Predicted, loss: Loss, *, most: int = MOST) -> list[Point]:
    """Convert and measure at up to `most` fractions; all that was measured, in that order.

    The search ends early where less than a twentieth could still be gained.

    >>> law = Predicted([0.9, 0.5, 0.1], [0.1, 1, 9])
    >>> tried = cheapest(lambda f: Point(f, 1 / f - 1, 1 / f - 1), law, Loss(1.0, float))
    >>> len(tried) <= 5, 0.5 <= min(point.fraction for point in tried if point.loss <= 1) < 0.53
    (True, True)
    """
    points: list[Point] = []
    while len(points) < most:
        fraction = _next(points, predicted, loss, last=len(points) + 1 == most)
        if fraction is None:
            break
        points.append(measure(fraction))
    return points


def _next(points: Sequence[Point], predicted: Predicted, loss: Loss, last: bool) -> float | None:
    """The fraction to try; None where nothing is left to be gained."""
    believed = list(zip(points, loss.believed(points), strict=True))
    met = [point.fraction for point, lost in believed if lost <= loss.limit]
    missed = [point.fraction for point, lost in believed if lost > loss.limit]
    least, most = min(predicted.fractions), max(predicted.fractions)
    low, high = max(missed, default=least), min(met, default=most)
    near = [point for point, lost in believed if point.fraction == high and CLOSER * loss.limit <= lost <= loss.limit]
    if near and not loss.counted:
        return None  # as near to the limit as the search would aim
    aim = loss.limit * (CLOSER if met and not loss.counted else AIM)
    if last and not met:
        aim /= 2  # the last one should be one that can be had
    guess = predicted.fraction(_prediction_for(loss.drift_for(aim, points), points, predicted))
    guess = min(max(guess, least), most)
    between = guess < high * (1 - NEAR) and (not missed or guess > low * (1 + NEAR))
    if met and not between and (loss.counted or not missed):
        return None
    if missed and not between:
        middle = math.sqrt(low * high)  # between what is known to be too little and what is known to be enough
        guess = max(middle, high / STEP) if met and guess > low else middle
    if missed and met and high < low * WORTH:
        return None
    if any(abs(guess / point.fraction - 1) < NEAR / 2 for point in points):
        return None
    return guess


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
