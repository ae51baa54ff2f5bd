"""Results: tables whose cells are figures with a name, kept as JSON and shown as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from convsplit.tables import Table

STORED = Path(__file__).with_name("results")
SEPARATOR = " / "


@dataclass(frozen=True)
class Kind:
    """Which way a column's figures are better, and the changes that are noise: a part of the figure and an amount."""

    better: str  # "lower" or "higher"
    relative: float = 0.0
    absolute: float = 0.0


COUNT = Kind("lower", relative=0.005)  # parameters, MACs: deterministic, but for a rank that a rounding turns
ERROR = Kind("lower", relative=0.02, absolute=0.002)  # of fits: other processors round otherwise
DRIFT = Kind("lower", relative=0.2, absolute=0.01)  # equally good fits differ in what they do to outputs
POINTS = Kind("lower", relative=0.3, absolute=1.0)  # of accuracy lost: a point of 500 images is five of them
SCORE = Kind("higher", absolute=1.0)  # accuracy and agreement in per cent
FASTER = Kind("higher", relative=0.4)  # of times measured side by side in one run
MULTIPLE = Kind("lower", relative=0.4)  # the same, where less is better


@dataclass(frozen=True)
class Sheet:
    """One table of a result: which columns name a row, and what kind of figures others hold."""

    title: str
    table: Table
    keys: Sequence[str]
    kinds: dict[str, Kind] = field(default_factory=dict)
    notes: str = ""

    def figures(self) -> Iterator[tuple[str, str, Kind | None]]:
        """Name, cell and kind of each cell but the keys."""
        for row in self.table.rows:
            cells = dict(zip(self.table.headings, row, strict=True))
            name = [self.title, *(cells[key] for key in self.keys)]
            for heading, cell in cells.items():
                if heading not in self.keys:
                    yield SEPARATOR.join([*name, heading]), cell, self.kinds.get(heading)

    def markdown(self) -> str:
        return "\n\n".join(filter(None, [f"## {self.title}", self.table.markdown(), self.notes]))

    def to_json(self) -> dict[str, Any]:
        kinds = {heading: asdict(kind) for heading, kind in self.kinds.items()}
        table = {"headings": [*self.table.headings], "left": sorted(self.table.left), "rows": [*self.table.rows]}
        return {"title": self.title, "keys": [*self.keys], "kinds": kinds, "notes": self.notes} | table

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Sheet:
        table = Table(read["headings"], read["rows"], frozenset(read["left"]))
        kinds = {heading: Kind(**kind) for heading, kind in read["kinds"].items()}
        return cls(read["title"], table, read["keys"], kinds, read["notes"])


@dataclass(frozen=True)
class Result:
    """All tables of one run, and what they were measured with."""

    suite: str
    command: str
    sheets: Sequence[Sheet]
    date: str = field(default_factory=lambda: date.today().isoformat())
    machine: dict[str, str | int] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)

    def figures(self) -> dict[str, tuple[str, Kind | None]]:
        """Cell and kind by name."""
        return {name: (cell, kind) for sheet in self.sheets for name, cell, kind in sheet.figures()}

    def conditions(self) -> str:
        """Command, day, machine and versions in words."""
        on = self.machine
        return (
            f"`{self.command}`, {self.date}, {on['cpu']}, {on['threads']} of {on['cores']} cores; "
            + ", ".join(f"{name} {found}" for name, found in self.versions.items())
        )  # fmt: skip

    def markdown(self) -> str:
        parts = [f"# {self.suite}", self.conditions(), *(sheet.markdown() for sheet in self.sheets)]
        return "\n\n".join(parts) + "\n"

    def write(self, path: Path) -> None:
        """The JSON file, and Markdown beside it."""
        sheets = [sheet.to_json() for sheet in self.sheets]
        whole = {
            "suite": self.suite, "date": self.date, "command": self.command, "machine": self.machine,
            "versions": self.versions, "sheets": sheets,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Result:
        read = json.loads(path.read_text(encoding="utf-8"))
        return cls(**read | {"sheets": [Sheet.from_json(sheet) for sheet in read["sheets"]]})


def number(cell: str) -> float | None:
    """The number that a cell begins with, its unit letter multiplied in.

    >>> number("12.3 k"), number("98.1 %"), number("1.50x"), number("-")
    (12300.0, 98.1, 1.5, None)
    """
    found = re.match(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)(?: ([kMGT])\b)?", cell)
    sizes = {None: 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    return float(found[1]) * sizes[found[2]] if found else None
