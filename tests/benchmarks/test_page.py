"""README and documentation have the figures of the stored results, and pages that tell what was measured no others."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("sklearn")

from benchmarks import page, tables  # noqa: E402
from benchmarks.results import Result, Sheet  # noqa: E402
from benchmarks.suites import finetuning  # noqa: E402
from convsplit.tables import Table  # noqa: E402

TYPED = re.compile(r"\d (?:%|points?|ms|seconds|times)(?!\w)|\d\.?\d*x\b")
MEASURED = {  # pages of measured figures, with what else may have a unit: tested elsewhere, or no measurement
    "README.md": "tells 99.4 % of 500 test images right",  # tests/docs/test_examples.py
    "docs/latency.md": "",
    "docs/fine-tuning.md": "0.002 times the squared drift",
    "docs/calibration.md": "the factorisation of W1 times the roots",
}


@pytest.mark.parametrize("path", page.current(), ids=lambda path: path.name)
def test_documents_are_as_the_results_have_them(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == page.current()[path], "run python -m benchmarks page"


@pytest.mark.parametrize(("path", "known"), MEASURED.items())
def test_no_figure_is_typed_by_hand(path: str, known: str) -> None:
    text = page.TABLE.sub("", page.FIGURE.sub("", (ROOT / path).read_text(encoding="utf-8")))
    assert known in text
    assert not [line for line in text.replace(known, "").splitlines() if TYPED.search(line)]


def test_a_marker_is_filled_with_the_cell_it_names() -> None:
    table = Table(["way", "lost"], [["CP", "2.20"], ["SVD", "9.90"]])
    results = {"peers": Result("peers", "python -m benchmarks peers", [Sheet("digits", table, ["way"])])}
    marked = "CP loses <!-- figure: peers / digits / CP / lost -->7<!-- /figure --> points."
    assert page.filled(marked, results) == marked.replace(">7<", ">2.20<")
    shown = page.filled("<!-- table: whole peers --><!-- /table -->", results)
    assert "| CP | 2.20 |" in shown
    assert page.filled(shown, results) == shown
    with pytest.raises(KeyError, match="no such figure"):
        page.filled("<!-- figure: peers / digits / CP / won -->7<!-- /figure -->", results)


def test_accuracies_are_told_by_budget_with_a_column_for_each_way() -> None:
    headings = ["network", "kept", "way", "points lost", "agreement", "drift"]
    rows = [
        ["A", "0.5", "no data", "1.00", "97.0 %", "0.150"],
        ["A", "0.5", "repaired", "0.25", "99.0 %", "0.080"],
        ["A", "0.125", "repaired", "9.50", "88.0 %", "0.430"],
    ]
    found = {"cifar": Result("accuracy", "", [Sheet("accuracy", Table(headings, rows), headings[:3])])}
    lines = page.filled("<!-- table: points cifar --><!-- /table -->", found).splitlines()
    assert lines[2] == "| kept | A: no data | A: repaired |"
    assert lines[4:6] == ["| 50 % | 1.00 | 0.25 |", "| 12.5 % | - | 9.50 |"]
    drifts = page.filled("<!-- table: drifts cifar --><!-- /table -->", found)
    assert "| 12.5 % | 0.430 | 88.0 % | 9.50 |" in drifts


def test_one_sheet_of_a_result_is_shown_with_its_notes() -> None:
    table = Table(["memory", "ms"], [["kept", "470"]])
    sheets = [Sheet("widths", table, ["memory"]), Sheet("eight bits", table, ["memory"], notes="At batch 8.")]
    shown = page.filled("<!-- table: sheet speed eight bits --><!-- /table -->", {"speed": Result("s", "", sheets)})
    assert shown.count("| kept | 470 |") == 1
    assert "At batch 8." in shown


def test_a_table_of_a_page_of_results_is_shown_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "speed.md").write_text("# Speed\n\n| a |\n| 1 |\n\n### Of VGG\n\nWords.\n\n| b |\n| 2 |\n\n| c |\n")
    monkeypatch.setattr(tables, "STORED", tmp_path)
    shown = page.filled("<!-- table: kept speed Of VGG --><!-- /table -->", {})
    assert [line for line in shown.splitlines() if "|" in line] == ["| b |", "| 2 |"]


def test_what_a_way_back_brings_is_the_mean_over_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"network": "A", "kept": 0.25, "agreement": 90.0, "drift": 0.2, "seconds": 300, "threads": 1}
    runs = [("refitted, distilled", 0, 0.2), ("refitted, distilled", 1, 0.4), ("from scratch, labels", 0, 20.0)]
    results = [case | {"way": way, "seed": seed, "lost": lost} for way, seed, lost in runs]
    monkeypatch.setattr(finetuning, "known", lambda: results)
    lines = page.filled("<!-- table: ways_back --><!-- /table -->", {}).splitlines()
    assert lines[4] == "| A | 25 % | - | - | 0.30 (2) | 20.00 |"


def test_a_figure_typed_by_hand_is_seen() -> None:
    for typed in ("loses 2.2 points", "at 25 % of it", "1.5x faster", "in 3 ms"):
        assert TYPED.search(typed)
    assert not TYPED.search("an 1 x 1 kernel of ResNet-20")
