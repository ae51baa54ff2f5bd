"""Budgets: how much of a model may be kept, or how much of its quality may be lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

KINDS = ("params", "macs", "latency", "error")  # of what may be kept
QUALITIES = ("drift", "agreement", "metric")  # of what may be lost
MINIMISED = ("params", "macs", "latency")

Metric = Callable[[Any], float]


@dataclass(frozen=True)
class Budget:
    """How much may be kept, or how much quality may be lost. Give exactly one of the first seven.

    What may be kept:

    Args:
        params: parameters, as a fraction in (0, 1] of what the splittable convolutions have today.
        macs: multiply-accumulates, likewise; needs example inputs.
        latency: measured milliseconds, likewise; needs example inputs.
        error: instead, the largest relative error any layer may have in the metric of its inputs; the cheapest such
            plan is made.
        of: "splittable" measures the fraction against the convolutions that can be split, "model" against all of
            the model's parameters (or all its MACs or milliseconds).

    What may be lost, measured on calibration inputs that are held out: the cheapest conversion, repaired, that keeps
    it is searched for (`Study.search`).

    Args:
        drift: relative change of the model's output, |converted - original| / |original| over all held-out inputs.
        agreement: the share of inputs, in (0, 1], that must keep their top-1 class.
        metric: a function of a model that returns a number, higher being better; with `lost`, how much lower it may
            be than the original's, as a difference or, with `relative`, as a fraction of the original's.
        lost: see `metric`.
        relative: see `metric`.
        lower_is_better: the metric is an error or a loss.
        minimise: what the search makes as small as it can: "params", "macs" or "latency".

    Raises:
        ValueError: none or several of the first seven, or a value outside its range.

    >>> Budget(params=0.5)
    Budget(params=0.5)
    >>> Budget(agreement=0.99, minimise="macs")
    Budget(agreement=0.99, minimise='macs')
    """

    params: float | None = None
    macs: float | None = None
    error: float | None = None
    latency: float | None = None
    of: str = "splittable"
    drift: float | None = None
    agreement: float | None = None
    metric: Metric | None = None
    lost: float | None = None
    relative: bool = False
    lower_is_better: bool = False
    minimise: str = "params"

    def __post_init__(self) -> None:
        given = {key: getattr(self, key) for key in (*KINDS, *QUALITIES) if getattr(self, key) is not None}
        if len(given) != 1:
            got = ", ".join(f"{key}={value}" for key, value in given.items()) or "none"
            raise ValueError(
                "a budget is one of params=, macs=, latency= or error= (what may be kept), drift=, agreement= or "
                f"metric= (what may be lost); got {got}"
            )
        if self.metric is None:
            self._check_fraction()
        else:
            self._check_metric()
        if self.of not in ("splittable", "model"):
            raise ValueError(f'Budget(of={self.of!r}): want "splittable" or "model"')
        if self.minimise not in MINIMISED:
            raise ValueError(f"Budget(minimise={self.minimise!r}): want one of {', '.join(map(repr, MINIMISED))}")

    def _check_fraction(self) -> None:
        key, value = self.kind, getattr(self, self.kind)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"Budget({key}={value!r}): want a fraction in (0, 1]; for a half, say {key}=0.5")
        if self.lost is not None or self.relative or self.lower_is_better:
            raise ValueError(f"lost=, relative= and lower_is_better= belong to metric=, not to {key}=")

    def _check_metric(self) -> None:
        if not callable(self.metric):
            raise ValueError(f"metric is {self.metric!r}; want a function of a model that returns a number")
        if isinstance(self.lost, bool) or not isinstance(self.lost, int | float) or not self.lost >= 0:
            raise ValueError(f"Budget(metric=..., lost={self.lost!r}): want how much may be lost, such as lost=0.01")

    @classmethod
    def of_kind(cls, kind: str, fraction: float) -> Budget:
        """The budget of a kind named in a variable.

        >>> Budget.of_kind("macs", 0.25)
        Budget(macs=0.25)
        """
        return cls(**{kind: fraction})  # type: ignore[arg-type]

    @property
    def kind(self) -> str:
        """Which one is given: "params", "macs", "latency", "error", "drift", "agreement" or "metric"."""
        return next(key for key in (*KINDS, *QUALITIES) if getattr(self, key) is not None)

    @property
    def of_quality(self) -> bool:
        """Whether it says what may be lost, not what may be kept."""
        return self.kind in QUALITIES

    @property
    def fraction(self) -> float:
        """The number given; of a metric, what may be lost."""
        return float(self.lost or 0.0) if self.kind == "metric" else float(getattr(self, self.kind))

    def __repr__(self) -> str:
        if not self.of_quality:
            of = "" if self.of == "splittable" else f", of={self.of!r}"
            return f"Budget({self.kind}={self.fraction:g}{of})"
        minimise = "" if self.minimise == "params" else f", minimise={self.minimise!r}"
        if self.kind != "metric":
            return f"Budget({self.kind}={self.fraction:g}{minimise})"
        name = getattr(self.metric, "__name__", type(self.metric).__name__)
        flags = "".join(f", {flag}=True" for flag in ("relative", "lower_is_better") if getattr(self, flag))
        return f"Budget(metric={name}, lost={self.fraction:g}{flags}{minimise})"
