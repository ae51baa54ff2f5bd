"""How good the answers of a conversion are: figures that suites share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchmarks.results import DRIFT, POINTS, SCORE, Kind
from convsplit.report.quality import wilson

QUALITY: dict[str, Kind] = {"accuracy": SCORE, "points lost": POINTS, "agreement": SCORE, "drift": DRIFT}


@dataclass(frozen=True)
class Quality:
    """Shares in per cent. `low` and `high` are the ends of the accuracy's 95 % interval."""

    accuracy: float
    low: float
    high: float
    points: float
    same: float
    moved: float

    @property
    def interval(self) -> str:
        """The accuracy with its 95 % interval."""
        return f"{self.accuracy:.1f} ({self.low:.1f} to {self.high:.1f})"

    @property
    def lost(self) -> str:
        """Points of accuracy, against the dense network."""
        return f"{round(self.points, 2) + 0.0:.2f}"  # no minus before nothing

    @property
    def agreement(self) -> str:
        """Inputs of the dense network's class."""
        return f"{self.same:.1f} %"

    @property
    def drift(self) -> str:
        """Of the logits, relative to the dense network's."""
        return f"{self.moved:.3f}"

    def cells(self) -> list[str]:
        """In the order of `QUALITY`."""
        return [self.interval, self.lost, self.agreement, self.drift]


def compared(before: Tensor, after: Tensor, labels: Tensor) -> Quality:
    """Logits [N, classes] of the dense and of the converted network on the same inputs."""
    right = int((after.argmax(1) == labels).sum())
    low, high = wilson(right, len(labels))
    accuracy = right / len(labels)
    lost = float((before.argmax(1) == labels).float().mean()) - accuracy
    agreement = float((before.argmax(1) == after.argmax(1)).float().mean())
    drift = float((after - before).norm() / before.norm())
    return Quality(*(100 * share for share in (accuracy, low, high, lost, agreement)), drift)
