"""The page of figures with its picture, and the figures in README and docs, from the stored results.

    python -m benchmarks page            # writes docs/benchmarks.md and fills every marker
    python -m benchmarks page --check    # exit 1 where something differs from the results

A document says where a figure goes and which, and the cell of the stored result is put there:

    <!-- figure: peers-digits / digits / macs=0.25 / dense / accuracy -->99.4<!-- /figure -->
    <!-- table: peers digits -->...<!-- /table -->

A figure is named by file, table, the cells that name its row, and column; tables are functions in `TABLES`. Of files of
one name in several dated folders the newest counts.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

from benchmarks import plots
from benchmarks.results import SEPARATOR, STORED, Result
from benchmarks.subjects import ROOT
from benchmarks.tables import TABLES

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURE = re.compile(r"(<!-- figure: (.+?) -->)(.*?)(<!-- /figure -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- table: (.+?) -->)(.*?)(<!-- /table -->)", re.DOTALL)
TEMPLATE = Path(__file__).with_name("page.md")
PICTURED = [("peers-digits", "macs=0.5"), ("peers-digits", "macs=0.25")]
GENERATED = "<!-- Written by `python -m benchmarks page` from benchmarks/results/: edit benchmarks/page.md. -->"


def main(words: list[str]) -> int:
    parser = ArgumentParser(
        "python -m benchmarks page", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where something differs")
    check = parser.parse_args(words).check
    stale = [path for path, text in current().items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'differs from the results' if check else 'written'}")
        if not check:
            path.write_text(current()[path], encoding="utf-8")
    if not check:
        plots.peers(stored(), PICTURED, ROOT / "docs" / "images" / "peers.png")
    return int(check and bool(stale))


def current() -> dict[Path, str]:
    """Every document as the stored results have it."""
    results = stored()
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    texts[ROOT / "docs" / "benchmarks.md"] = f"{GENERATED}\n\n{TEMPLATE.read_text(encoding='utf-8')}"
    return {path: filled(text, results) for path, text in texts.items()}


def stored() -> dict[str, Result]:
    """By the name of their file."""
    files = sorted(STORED.glob("20*/*.json"))  # by date, so that later ones replace earlier ones
    return {path.stem: Result.read(path) for path in files}


def filled(text: str, results: dict[str, Result]) -> str:
    """The text with the figures and tables that its markers name.

    Raises:
        KeyError: a marker names what is in no stored result.
    """
    figures = {
        SEPARATOR.join([stem, name]): cell for stem, result in results.items()
        for name, (cell, _) in result.figures().items()
    }  # fmt: skip

    def figure(found: re.Match[str]) -> str:
        if found[2] not in figures:
            raise KeyError(f"{found[2]}: no such figure in benchmarks/results/")
        return f"{found[1]}{figures[found[2]]}{found[4]}"

    def table(found: re.Match[str]) -> str:
        name, _, argument = found[2].partition(" ")
        make: Callable[[dict[str, Result], str], str] = TABLES[name]
        return f"{found[1]}\n\n{make(results, argument)}\n\n{found[4]}"

    return FIGURE.sub(figure, TABLE.sub(table, text))
