"""Comparing results: losses beyond noise are told, gains and noise are not; the stored quick results still hold."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("sklearn")

from benchmarks import __main__ as runner  # noqa: E402
from benchmarks import regress  # noqa: E402
from benchmarks.results import COUNT, FASTER, POINTS, STORED, Kind, Result, Sheet  # noqa: E402
from convsplit.tables import Table  # noqa: E402

QUICK = STORED / "quick"


def result(params: str, points: str, faster: str, ms: str = "3.0") -> Result:
    headings = ["way", "params", "points lost", "faster", "ms"]
    kinds = {"params": COUNT, "points lost": POINTS, "faster": FASTER}
    sheet = Sheet("digits", Table(headings, [["CP", params, points, faster, ms]]), ["way"], kinds)
    return Result("some", "python -m benchmarks some", [sheet])


OLD = result("100 k", "2.00", "2.00x")


@pytest.mark.parametrize(
    ("new", "lost"),
    [
        (OLD, []),
        (result("100.4 k", "2.90", "1.50x"), []),  # noise
        (result("50 k", "-1.00", "4.00x"), []),  # gains
        (result("100 k", "2.00", "2.00x", ms="300"), []),  # another machine
        (result("101 k", "2.00", "2.00x"), ["params"]),
        (result("100 k", "3.70", "2.00x"), ["points lost"]),
        (result("100 k", "2.00", "1.10x"), ["faster"]),
        (result("100 k", "nan", "-"), ["points lost", "faster"]),
    ],
)
def test_losses_beyond_noise_are_told(new: Result, lost: list[str]) -> None:
    assert [line.split(" / ")[-1].split(":")[0] for line in regress.losses(OLD, new)] == lost


def test_what_vanished_is_lost_and_what_is_new_is_not() -> None:
    empty = replace(OLD, sheets=[replace(OLD.sheets[0], table=Table(OLD.sheets[0].table.headings, []))])
    assert len(list(regress.losses(OLD, empty))) == 3
    with pytest.raises(ValueError, match="nothing can be compared"):
        list(regress.losses(empty, OLD))


def test_the_exit_status_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    OLD.write(tmp_path / "old.json")
    result("101 k", "2.00", "2.00x").write(tmp_path / "new.json")
    assert regress.main([str(tmp_path / "old.json"), str(tmp_path / "old.json")]) == 0
    assert regress.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 1
    assert "params: 100 k -> 101 k" in capsys.readouterr().out
    with pytest.raises(ValueError, match="different suites"):
        list(regress.losses(OLD, replace(OLD, suite="other")))


def test_an_unknown_figure_is_no_loss() -> None:
    assert not regress.is_worse("-", "3", Kind("lower"))
    assert regress.is_worse("3", "-", Kind("lower"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accuracy", "factorisation"])
def test_the_quick_suites_lose_nothing_against_the_stored_results(name: str) -> None:
    assert not list(regress.losses(Result.read(QUICK / f"{name}.json"), runner.run(name, ["--quick"])))
