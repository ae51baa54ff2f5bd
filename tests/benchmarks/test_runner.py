"""The runner of benchmarks: every suite keeps the contract, and a result is read back as it was written."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("sklearn")

from benchmarks import __main__ as runner  # noqa: E402
from benchmarks.figures import Quality, compared  # noqa: E402
from benchmarks.results import COUNT, Result, Sheet, number  # noqa: E402
from convsplit.tables import Table  # noqa: E402

SHEET = Sheet(
    "digits",
    Table(["way", "kept", "params", "s"], [["CP", "0.5", "12.3 k", "4"]]),
    ["way", "kept"],
    {"params": COUNT},
)


@pytest.mark.parametrize("name", runner.names())
def test_every_suite_says_what_it_is_and_takes_its_quick_arguments(name: str) -> None:
    suite = runner.suite(name)
    assert suite.__doc__
    assert f"python -m benchmarks {name}" in suite.__doc__
    parser = argparse.ArgumentParser()
    suite.options(parser)
    known = {action.dest for action in parser._actions}
    assert set(suite.QUICK) <= known
    assert callable(suite.measure)


def test_a_cell_is_a_figure_named_by_suite_table_row_and_column() -> None:
    figures = {name: cell for name, cell, _ in SHEET.figures()}
    assert figures == {"digits / CP / 0.5 / params": "12.3 k", "digits / CP / 0.5 / s": "4"}


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result = Result("some", "python -m benchmarks some", [SHEET])
    result.write(tmp_path / "some.json")
    again = Result.read(tmp_path / "some.json")
    assert again.figures() == result.figures()
    assert again.markdown() == (tmp_path / "some.md").read_text(encoding="utf-8") == result.markdown()
    assert "| CP | 0.5 | 12.3 k | 4 |" in again.markdown().replace("---:", "")


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("12.3 k", 12300.0),
        ("98.1 %", 98.1),
        ("1.50x", 1.5),
        ("-0.25", -0.25),
        ("4e-15", 4e-15),
        ("-", None),
        ("", None),
    ],
)
def test_a_cell_begins_with_its_number(cell: str, value: float | None) -> None:
    assert number(cell) == pytest.approx(value)


def test_losing_nothing_has_no_sign() -> None:
    right, logits = torch.tensor([0, 1, 2]), torch.eye(3)
    assert compared(logits, logits.clone(), right).lost == "0.00"
    assert Quality(90.0, 85.0, 94.0, -1e-6, 100.0, 0.0).lost == "0.00"


def test_the_command_line_lists_suites_and_refuses_others() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in listed.splitlines()] == runner.names()
    assert runner.main(["nothing"]) == 2
