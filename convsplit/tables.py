"""One table and one number format for everything that is printed."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

MARGIN = 100  # columns of text at which words break, at least
NARROWEST = 14  # columns of text that a left-aligned column is folded to before a table is stacked


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
    return "-" if not before or after is None else percent(after / before)


def percent(fraction: float | None) -> str:
    """A fraction as a percentage: `percent(0.25) == "25.0 %"`."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def changed(agreement: float) -> str:
    """An agreement in plain words: `changed(0.992) == "of 1,000 inputs 8 get another top-1 class"`.

    Where it is less than one of 1,000, of so many that it is one.
    """
    lost = 1 - agreement
    if lost <= 0:
        return "no input gets another top-1 class"
    many = 1000 if round(1000 * lost) else round(1 / lost)
    return f"of {many:,} inputs {round(many * lost)} get another top-1 class".replace(" 1 get ", " 1 gets ")


def share(fraction: float | None) -> str:
    """A relative error with three significant digits; exact zeros and unknowns look different."""
    if fraction is None:
        return "-"
    return "0" if fraction == 0 else f"{fraction:.3g}"


def milliseconds(time: float | None) -> str:
    """A time with three significant digits and no exponent: `milliseconds(3172.4) == "3172"`."""
    return "-" if time is None else f"{time:.0f}" if time >= 100 else f"{time:.3g}"


def times_faster(before: float | None, after: float | None) -> str:
    """How many times faster: `times_faster(3.0, 2.0) == "1.50x"`."""
    return "-" if not before or not after else f"{before / after:.2f}x"


def _three_digits(number: float) -> str:
    return f"{number:.{max(0, 2 - len(str(int(abs(number)))) + 1)}f}"


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; columns named in `left` are aligned to the left, the others to the right.

    `words` say what the columns mean, and stand at the table's head.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[str] = frozenset()
    words: str = ""

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
        """Plain text, as wide as it needs to be unless a width is given; too narrow for columns, rows are stacked."""
        if width is not None and width < self._narrowest():
            return self._with_words(self._stacked(), width)
        console = Console(file=io.StringIO(), width=width or 1000, color_system=None, legacy_windows=False)
        with console.capture() as capture:
            console.print(self.rich())
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return self._with_words("\n".join(lines).strip("\n"), width or max(MARGIN, *map(len, lines)))

    def _with_words(self, text: str, width: int) -> str:
        return f"{textwrap.fill(self.words, width)}\n\n{text}" if self.words else text

    def markdown(self) -> str:
        """GitHub-flavoured Markdown."""
        rule = [":---" if heading in self.left else "---:" for heading in self.headings]
        lines = [self.headings, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{self.words}\n\n{rows}" if self.words else rows

    def html(self) -> str:
        """A plain HTML table, for notebooks."""
        sides = ["left" if heading in self.left else "right" for heading in self.headings]
        lines = [_html_row("th", self.headings, sides), *(_html_row("td", row, sides) for row in self.rows)]
        words = f"<caption style='text-align:left'>{escape(self.words)}</caption>" if self.words else ""
        return f"<table>{words}<thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"

    def csv(self) -> str:
        """Comma-separated values with a heading line."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([self.headings, *self.rows])
        return out.getvalue()

    def _narrowest(self) -> int:
        """The width below which cells would be cut off."""
        columns = zip(*([len(cell) for cell in row] for row in (self.headings, *self.rows)), strict=True)
        widest = [int(max(lengths)) for lengths in columns]
        named = zip(self.headings, widest, strict=True)
        return sum(min(size, NARROWEST) if name in self.left else size for name, size in named) + 2 * len(widest)

    def _stacked(self) -> str:
        """One line per cell, one paragraph per row, headed by its first cell."""
        margin = max(map(len, self.headings[1:]), default=0)
        paragraphs = []
        for first, *cells in self.rows:
            named = zip(self.headings[1:], cells, strict=True)
            paragraphs.append("\n".join([first, *(f"  {name:<{margin}}  {cell}" for name, cell in named if cell)]))
        return "\n\n".join(paragraphs)


class Tabular:
    """A result that people look at and programs read; whoever inherits says what is in it, in these four methods."""

    @property
    def title(self) -> str:
        """A heading, or nothing."""
        return ""

    def table(self) -> Table:
        """One row per record."""
        raise NotImplementedError

    def summary(self) -> str:
        """What the figures come to, in words."""
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per row."""
        raise NotImplementedError

    def tables(self) -> list[Table]:
        """All tables, the one of the records first."""
        return [self.table()]

    def text(self, width: int | None = None) -> str:
        """Everything as plain text, for a terminal of some width."""
        title = f"{self.title}\n" if self.title else ""
        return title + "\n\n".join(filter(None, [*(each.text(width) for each in self.tables()), self.summary()]))

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return html_page_part(self.title or type(self).__name__, self.summary(), *self.tables())

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown, for pull requests."""
        title = f"### {self.title}" if self.title else ""
        return "\n\n".join(filter(None, [title, self.summary(), *(each.markdown() for each in self.tables())])) + "\n"

    def to_csv(self) -> str:
        """One line per record, plain numbers; unknown ones are empty."""
        rows = self.records()
        cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
        return Table(list(rows[0]) if rows else [], cells).csv()

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with one row per record.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame.from_records(self.records())


def _html_row(tag: str, cells: Sequence[str], sides: Sequence[str]) -> str:
    named = zip(cells, sides, strict=True)
    cells = [f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in named]
    return f"<tr>{''.join(cells)}</tr>"


def html_page_part(title: str, words: str, *tables: Table) -> str:
    """A title, words and tables for a notebook cell."""
    text = f"<p style='white-space:pre-line'>{escape(words)}</p>" if words else ""
    return f"<b>{escape(title)}</b>{text}{''.join(table.html() for table in tables)}"
