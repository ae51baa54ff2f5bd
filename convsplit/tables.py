"""One table and one number format for everything that is printed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable


def count(number: float | None) -> str:
    """A count with three significant digits and its unit letter: `count(11689512) == "11.7 M"`."""
    if number is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            return f"{_three_digits(number / size)} {letter}"
    return f"{number:g}"


def ratio(after: float | None, before: float | None) -> str:
    """What is kept, as a percentage: `ratio(1, 4) == "25.0 %"`."""
    return "-" if not before or after is None else f"{100 * after / before:.1f} %"


def share(fraction: float | None) -> str:
    """A relative error with three significant digits; exact zeros and unknowns are told apart."""
    if fraction is None:
        return "-"
    return "0" if fraction == 0 else f"{fraction:.3g}"


def _three_digits(number: float) -> str:
    return f"{number:.{max(0, 2 - len(str(int(abs(number)))) + 1)}f}"


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; columns named in `left` are aligned to the left, the others to the right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[str] = frozenset()

    def rich(self) -> RichTable:
        """For a rich console."""
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for heading in self.headings:
            if heading in self.left:
                table.add_column(heading, justify="left", overflow="fold")
            else:
                table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def text(self, width: int | None = None) -> str:
        """Plain text, as wide as it needs to be unless a width is given."""
        console = Console(file=io.StringIO(), width=width or 1000, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self.rich())
        return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")

    def markdown(self) -> str:
        """GitHub-flavoured Markdown."""
        rule = [":---" if heading in self.left else "---:" for heading in self.headings]
        lines = [self.headings, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def csv(self) -> str:
        """Comma-separated values with a heading line."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([self.headings, *self.rows])
        return out.getvalue()
