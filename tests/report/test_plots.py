"""Matplotlib figures: they hold every layer and budget, and leave pyplot alone."""

import io

import pytest
import torch
from torch import nn

import convsplit

matplotlib = pytest.importorskip("matplotlib")
from convsplit.report import plots  # noqa: E402


@pytest.fixture(scope="module")
def results() -> tuple[convsplit.report.Report, convsplit.report.Frontier]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)
    ).eval()
    inputs = torch.randn(2, 3, 9, 9)
    report = convsplit.compare(convsplit.convert(model, forms="dw-pw", rank=1), model, inputs)
    return report, convsplit.frontier(model, batches=inputs, budgets=(0.8, 0.5, 0.3), forms="dw-pw")


def test_every_picture_draws(results: tuple[convsplit.report.Report, convsplit.report.Frontier]) -> None:
    report, frontier = results
    drawn = [plots.plot_savings(report), plots.plot_depth(report), plots.plot_frontier(frontier)]
    for figure in [*drawn, plots.plot_curves(frontier, report), plots.plot_curves(frontier)]:
        figure.savefig(io.BytesIO(), format="svg")


def test_lines_hold_the_figures(results: tuple[convsplit.report.Report, convsplit.report.Frontier]) -> None:
    report, frontier = results
    local, accumulated = plots.plot_depth(report).axes[0].lines
    assert list(local.get_ydata()) == [layer.local.relative for layer in report.layers]
    assert list(accumulated.get_ydata()) == [layer.accumulated.relative for layer in report.layers]
    measured = plots.plot_frontier(frontier).axes[0].lines[0]
    assert list(measured.get_xdata()) == [point.kept for point in frontier.points]
    titled = [axes.get_title() for axes in plots.plot_curves(frontier, report).axes]
    assert titled[:3] == ["0", "2", "4"]


def test_a_repaired_frontier_shows_both_lines(results) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(3)).eval()
    inputs = torch.randn(64, 3, 9, 9)
    model(inputs)
    frontier = convsplit.frontier(model, batches=inputs, budgets=(0.7, 0.4), forms="dw-pw", calibration=inputs)
    assert frontier.repaired
    assert all(point.drift < point.unrepaired for point in frontier.points)
    assert "before repair" in str(frontier)
    assert {line.get_label() for line in plots.plot_frontier(frontier).axes[0].lines} >= {
        "measured drift of the output, repaired", "measured drift before repair",
    }  # fmt: skip
    assert not results[1].repaired


def test_the_chosen_point_is_marked(results: tuple[convsplit.report.Report, convsplit.report.Frontier]) -> None:
    report, frontier = results
    budget = convsplit.Budget(params=0.5)
    chosen = frontier.choosing(budget)
    assert "chosen: Budget(params=0.5), measured drift" in chosen.summary()
    assert [row[-1].startswith("* chosen") for row in chosen.table().rows] == [False, True, False]
    assert [record["chosen"] for record in chosen.records()] == [False, True, False]
    marks = {line.get_label(): line for line in plots.plot_frontier(chosen, report).axes[0].lines}
    assert list(marks["chosen"].get_ydata()) == [chosen.points[1].drift]
    assert list(marks["this report"].get_ydata()) == [report.drift.relative]
    assert 0 < marks["this report"].get_xdata()[0] < 1
    assert "chosen" not in str(frontier)
    with pytest.raises(ValueError, match=r"Budget\(params=0.4\) is none of the budgets here: Budget\(params=0.8\)"):
        frontier.choosing(convsplit.Budget(params=0.4))
