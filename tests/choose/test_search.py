"""The search for the cheapest point within a limit: few measurements, near the optimum, whatever law drift follows."""

from __future__ import annotations

import math

import pytest
import torch

from convsplit import Budget
from convsplit.choose.search import MOST, USUAL, Loss, Point, Predicted, cheapest

FRACTIONS = [0.97 * 0.87**step for step in range(26)]


def predicted() -> Predicted:
    return Predicted(FRACTIONS, [0.1 * (1 / f - 1) for f in FRACTIONS])


@pytest.mark.parametrize("factor", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("power", [0.7, 1.0, 1.6, 2.2])
@pytest.mark.parametrize("limit", [0.01, 0.05, 0.2])
def test_smooth_laws_are_met_within_a_few_percent(factor: float, power: float, limit: float) -> None:
    law = predicted()

    def drift(fraction: float) -> float:
        return factor * law.drift(fraction) ** power

    tried = cheapest(lambda f: Point(f, drift(f), drift(f)), law, Loss(limit, float))
    met = [point.fraction for point in tried if point.loss <= limit]
    best = law.fraction((limit / factor) ** (1 / power))
    assert len(tried) <= MOST
    if best < 0.95:
        assert met
        assert min(met) <= 1.05 * best + 0.005


def test_what_seems_small_enough_is_not_halved_to_be_sure() -> None:
    """One that kept far too little is no reason to try again half-way to it, where another just met the limit."""
    law = predicted()

    def drift(fraction: float) -> float:  # far more than the prediction where little is kept
        return law.drift(fraction) * (1.0 if fraction > 0.3 else 4.0)

    tried = [point.fraction for point in cheapest(lambda f: Point(f, drift(f), drift(f)), law, Loss(0.2, float))]
    assert min(tried) == tried[0] < 0.25  # by the prediction before anything was measured
    assert all(fraction > 0.3 for fraction in tried[1:])


def test_what_is_at_the_limit_ends_the_search() -> None:
    tried = cheapest(lambda f: Point(f, 0.98 * 0.2, 0.98 * 0.2), predicted(), Loss(0.2, float))
    assert len(tried) == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("inputs", [200, 1000])
def test_counted_losses_are_met_by_what_was_measured(seed: int, inputs: int) -> None:
    law, generator = predicted(), torch.Generator().manual_seed(seed)
    ranks = torch.rand(inputs, generator=generator)  # an input changes its class from a drift of its own on

    def measure(fraction: float) -> Point:
        drift = 0.6 * law.drift(fraction) ** 1.2
        return Point(fraction, drift, float((ranks < 0.7 * drift).float().mean()))

    loss = Loss(0.02, float, counted=inputs)
    tried = cheapest(measure, law, loss)
    met = [point for point, lost in zip(tried, loss.believed(tried), strict=True) if lost <= loss.limit]
    farthest = float(ranks.sort().values[int(loss.limit * inputs)]) / 0.7  # that just so many do not survive
    best = law.fraction((farthest / 0.6) ** (1 / 1.2))
    assert met
    assert all(point.loss <= loss.limit for point in met)
    # One input more or less is a long way with few inputs.
    assert min(point.fraction for point in met) < best * (1.25 if inputs == 1000 else 1.7)


def test_lucky_counts_are_not_believed() -> None:
    points = [Point(0.5, 0.1, 0.05), Point(0.6, 0.08, 0.005), Point(0.7, 0.05, 0.03)]
    believed = Loss(0.02, float, counted=1_000_000).believed(points)
    assert believed[1] == pytest.approx(0.085 / 0.23 * 0.08, rel=0.01)
    assert believed[::2] == [0.05, 0.03]
    assert Loss(0.02, float).believed(points) == [0.05, 0.005, 0.03]


def test_one_lucky_count_does_not_end_a_search() -> None:
    """Where 2 % of 250 inputs are counted and twice as many were to be expected, the next conversion keeps more."""

    def measure(fraction: float) -> Point:
        return Point(fraction, 0.1 if fraction < 0.6 else 0.04, 0.02 if fraction < 0.6 else 0.012)

    loss = Loss(0.02, lambda drift: 0.3 * drift, counted=250)
    tried = cheapest(measure, predicted(), loss)
    assert tried[0].loss <= loss.limit < loss.believed(tried)[0]
    assert len(tried) > 1
    assert max(point.fraction for point in tried) > 0.6


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.8, 15.0])
def test_many_counts_outweigh_what_was_expected(factor: float) -> None:
    points = [Point(0.5, 0.1, factor * 0.1), Point(0.6, 0.05, factor * 0.05)]
    assert Loss(0.02, float, counted=100_000)._at(points, 0.02) == pytest.approx(factor * 0.02, rel=0.01)
    few = Loss(0.02, float, counted=20)._at(points, 0.02) / 0.02
    assert factor <= few * (1 + 1e-9)
    assert few <= max(USUAL, factor) * (1 + 1e-9)  # few can say at once that it is more, but not that it is less


def test_inputs_that_few_of_are_close_to_another_class_do_not_speak_for_all() -> None:
    """What was counted of them says how much more is lost than expected of them; all say what that comes to."""
    points = [Point(0.5, 0.1, 0.06)]
    alone = Loss(0.02, lambda drift: 0.3 * drift, counted=1000)
    among = Loss(0.02, lambda drift: 0.3 * drift, counted=1000, of_all=lambda drift: 0.5 * drift)
    assert alone._at(points, 0.1) == pytest.approx(0.06)
    assert among._at(points, 0.1) == pytest.approx(0.1)
    assert among.believed(points) == [among._at(points, 0.1)]


def test_nothing_is_tried_twice_and_nothing_after_the_end_of_the_range() -> None:
    tried = cheapest(lambda f: Point(f, 0.0, 0.0), predicted(), Loss(0.1, float))
    assert min(FRACTIONS) == pytest.approx(min(point.fraction for point in tried))
    assert len({round(point.fraction, 3) for point in tried}) == len(tried) <= 2
    hopeless = cheapest(lambda f: Point(f, 1.0, 1.0), predicted(), Loss(0.1, float))
    assert max(point.fraction for point in hopeless) > 0.9


def test_conversions_that_break_the_model_are_misses() -> None:
    def measure(fraction: float) -> Point:
        return Point(fraction, *([math.inf] * 2 if fraction < 0.5 else [0.01] * 2))

    tried = cheapest(measure, predicted(), Loss(0.1, float))
    assert 0.5 <= min(point.fraction for point in tried if point.loss <= 0.1) < 0.8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drift": 0.1, "params": 0.5}, "one of params="),
        ({"drift": 2}, r"\(0, 1\]"),
        ({"agreement": 0.9, "lost": 0.1}, "belong to metric="),
        ({"metric": 3, "lost": 0.1}, "a function"),
        ({"metric": len}, "lost=0.01"),
        ({"drift": 0.1, "minimise": "size"}, "minimise"),
    ],
)
def test_budgets_of_quality_are_checked(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**given)
