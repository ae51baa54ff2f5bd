"""Budgets: how much of a model may be kept."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("params", "macs", "latency", "error")  # of budgets


@dataclass(frozen=True)
class Budget:
    """How much may be kept. Give exactly one of the fractions.

    Args:
        params: parameters, as a fraction in (0, 1] of what the splittable convolutions have today.
        macs: multiply-accumulates, likewise; needs example inputs.
        latency: measured milliseconds, likewise; needs example inputs.
        error: instead, the largest relative weight error any layer may have; the cheapest such plan is made.
        of: "splittable" measures the fraction against the convolutions that can be split, "model" against all of
            the model's parameters (or all its MACs or milliseconds).

    Raises:
        ValueError: none or several fractions, or one outside (0, 1].

    >>> Budget(params=0.5)
    Budget(params=0.5)
    """

    params: float | None = None
    macs: float | None = None
    error: float | None = None
    latency: float | None = None
    of: str = "splittable"

    def __post_init__(self) -> None:
        given = {key: getattr(self, key) for key in KINDS if getattr(self, key) is not None}
        if len(given) != 1:
            got = ", ".join(f"{key}={value}" for key, value in given.items()) or "none"
            raise ValueError(f"a budget is one of params=, macs=, latency= or error=; got {got}")
        ((key, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"Budget({key}={value!r}): want a fraction in (0, 1]; for a half, say {key}=0.5")
        if self.of not in ("splittable", "model"):
            raise ValueError(f'Budget(of={self.of!r}): want "splittable" or "model"')

    @classmethod
    def of_kind(cls, kind: str, fraction: float) -> Budget:
        """The budget of a kind named in a variable.

        >>> Budget.of_kind("macs", 0.25)
        Budget(macs=0.25)
        """
        return cls(**{kind: fraction})  # type: ignore[arg-type]

    @property
    def kind(self) -> str:
        """Which of the fractions is given: "params", "macs", "latency" or "error"."""
        return next(key for key in KINDS if getattr(self, key) is not None)

    @property
    def fraction(self) -> float:
        return float(getattr(self, self.kind))

    def __repr__(self) -> str:
        of = "" if self.of == "splittable" else f", of={self.of!r}"
        return f"Budget({self.kind}={self.fraction:g}{of})"
