"""Report: the figures of a conversion, and every way to look at them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convsplit.report.curves import Frontier
from convsplit.report.diff import ReportDiff
from convsplit.report.page import page
from convsplit.report.values import Measured


@dataclass(frozen=True)
class Report(Measured):
    """What a conversion saved and how far the output moved; print it, or use one of the `to_` methods.

    Made by `convsplit.compare`; the fields are those of `Measured`.
    """

    def to_html(self, path: str | Path, *, frontier: Frontier | None = None) -> None:
        """Write one self-contained page to look at; needs the extra `report` (jinja2).

        Args:
            path: the file; it needs nothing else and no network.
            frontier: from `convsplit.frontier`; adds the curve of budget against drift, and those of every layer.
        """
        Path(path).write_text(page(self, frontier), encoding="utf-8")

    def diff(self, other: Report) -> ReportDiff:
        """Put another report beside this one, such as that after fine-tuning; prints as a table."""
        return ReportDiff(self, other)
