"""The progress bar: quiet unless asked, and as far along as the work is."""

import pytest
import torch
from rich.progress import Progress
from torch import nn

import convsplit
from convsplit.forms import FORMS
from convsplit.progress import track
from convsplit.spec import ConvSpec


@pytest.fixture
def advances(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float | None, float]]:
    """The total and every advance of all bars."""
    seen: list[tuple[float | None, float]] = []
    plain = Progress.advance

    def advance(self: Progress, task: int, by: float = 1) -> None:
        seen.append((self.tasks[task].total, by))
        plain(self, task, by)

    monkeypatch.setattr(Progress, "advance", advance)
    return seen


def test_items_count_as_much_as_they_cost(advances: list[tuple[float | None, float]]) -> None:
    assert list(track([1, 2, 5], "Working", cost=float, progress=True)) == [1, 2, 5]
    assert advances == [(8.0, 1.0), (8.0, 2.0), (8.0, 5.0)]


def test_without_costs_items_are_equal(advances: list[tuple[float | None, float]]) -> None:
    assert list(track(iter("ab"), "Working", total=2, progress=True)) == ["a", "b"]
    assert advances == [(2, 1.0), (2, 1.0)]


def test_a_larger_kernel_is_expected_to_take_longer() -> None:
    for form in FORMS.values():
        curves, fits = [], []
        for channels in (8, 16, 64, 256):
            spec = ConvSpec(channels, channels, (3, 3))
            count = form.channels(spec)
            curves.append(form.curve_work(spec, [count, 4 * count]))
            fits.append(form.fit_work(spec, form.most_components(spec)))
        assert curves == sorted(curves)
        assert fits[0] < fits[2]


def test_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2], "Working", cost=float)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_conversion_and_repair_come_to_the_end(advances: list[tuple[float | None, float]]) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    convsplit.convert(model, calibration=torch.randn(16, 8, 9, 9), progress=True)
    totals = {total for total, _ in advances}
    for total in totals:
        runs = sum(by for of, by in advances if of == total) / total
        assert runs == pytest.approx(round(runs))
        assert runs >= 1
    assert len(totals) == 3  # curves, factors, repair
