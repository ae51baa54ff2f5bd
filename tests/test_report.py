"""Reports as values: totals by hand, round trips, the published schema, verdicts by their thresholds, differences."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import convsplit
from convsplit.report.svg import axis, log_ticks, round_ticks
from convsplit.report.verdict import Evidence, judge
from convsplit.tables import Table, count, percent

SCHEMA = Path(__file__).parents[1] / "docs" / "report.schema.json"


def small_model() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.fixture(scope="module")
def report() -> convsplit.Report:
    model = small_model()
    return convsplit.compare(convsplit.convert(model, forms="dw-pw", rank=1), model, torch.randn(5, 3, 9, 9))


@pytest.fixture(scope="module")
def frontier() -> convsplit.Frontier:
    inputs = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return convsplit.frontier(small_model(), batches=inputs, budgets=(0.8, 0.5, 0.3, 0.001), forms=["dw-pw", "pw-dw"])


def test_totals_by_hand(report: convsplit.Report) -> None:
    dense = (3 * 16 * 9 + 16) + (16 * 16 * 9 + 16)
    split = (3 * 9 + 3 * 16 + 16) + (16 * 9 + 16 * 16 + 16)
    rest = (16 * 8 + 8) + (8 * 4 + 4)
    assert report.conv_params == (dense, split)
    assert report.params == (dense + rest, split + rest)
    assert report.stored_bytes == (4 * (dense + rest), 4 * (split + rest))
    assert [(layer.name, layer.reason) for layer in report.kept] == [("4", "1x1 kernel: already pointwise")]


def test_json_round_trip(report: convsplit.Report) -> None:
    assert convsplit.Report.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match="not a report"):
        convsplit.Report.from_json("{}")


def test_json_follows_the_published_schema(report: convsplit.Report) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(json.loads(report.to_json()), schema)
    timed = replace(report, milliseconds=(2.0, 1.5), drift=None)
    jsonschema.validate(json.loads(timed.to_json()), schema)


def test_schema_names_every_field(report: convsplit.Report) -> None:
    schema, written = json.loads(SCHEMA.read_text()), json.loads(report.to_json())
    assert set(schema["properties"]) == set(schema["required"]) == set(written)
    assert set(schema["$defs"]["layer"]["properties"]) == set(written["layers"][0])


def test_components_that_cancel_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3)).eval()
    converted = convsplit.convert(model, forms="pw-dw-pw", rank=4)
    report = convsplit.compare(converted, model, torch.randn(2, 8, 5, 5))
    assert 0 < report.layers[0].largest_component < 2
    assert "cancel" not in report.summary()
    layer = converted[0]
    with torch.no_grad():  # the first two components become large, and each other's negative
        layer.pointwise_out.weight[:, 1] = -layer.pointwise_out.weight[:, 0]
        layer.pointwise_in.weight[1] = layer.pointwise_in.weight[0]
        layer.depthwise.weight[:2] = 100
    report = convsplit.compare(converted, model, torch.randn(2, 8, 5, 5))
    assert report.layers[0].largest_component > 10
    assert "components of 0 cancel each other" in report.summary()


def test_csv_and_pandas_have_a_row_per_layer(report: convsplit.Report) -> None:
    assert len(report.to_csv().splitlines()) == 1 + len(report.layers)
    pandas = pytest.importorskip("pandas")
    table = report.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert table["params_after"].sum() == report.conv_params[1]


def test_narrow_terminals_get_every_cell(report: convsplit.Report) -> None:
    text = report.table().text(40)
    assert all(cell in text for row in report.table().rows for cell in row)
    assert max(map(len, text.splitlines())) <= 40


def test_notebooks_get_escaped_html(report: convsplit.Report) -> None:
    named = replace(report, model="<script>")
    assert "<script>" not in named._repr_html_()
    assert named._repr_html_().count("<table>") == 2


def test_compare_measures_time_when_asked() -> None:
    model = small_model()
    timed = convsplit.compare(model, model, torch.randn(1, 3, 9, 9), time=True)
    assert timed.milliseconds is not None
    assert min(timed.milliseconds) > 0


def test_diff_shows_what_changed(report: convsplit.Report) -> None:
    better = replace(report, agreement=1.0, params=(report.params[0], report.params[1] + 7))
    diff = report.diff(better)
    assert json.loads(diff.to_json())["change"]["params"] == 7
    assert "+7" in str(diff)
    assert "same" in str(report.diff(report))
    assert "| 0 |" in diff.to_markdown()


READY = Evidence(4, 0.5, 0.5, None, 0.1, 0.99, 1000)


@pytest.mark.parametrize(
    ("change", "level"),
    [
        ({}, "ready"),
        ({"inputs": 10}, "ready"),
        ({"agreement": 0.97}, "repair"),
        ({"agreement": 0.4}, "lost"),
        ({"agreement": None, "relative_drift": 0.05}, "ready"),
        ({"agreement": None, "relative_drift": 0.06}, "repair"),
        ({"agreement": None, "relative_drift": 0.95}, "lost"),
        ({"agreement": None, "relative_drift": None}, "unknown"),
        ({"split_layers": 0}, "pointless"),
        ({"params_kept": 0.97, "macs_kept": 0.96}, "pointless"),
        ({"params_kept": 0.97, "macs_kept": 0.7}, "ready"),
        ({"params_kept": 0.8, "speedup": 0.9}, "pointless"),
        ({"params_kept": 0.5, "speedup": 0.9}, "ready"),
    ],
)
def test_verdict_follows_its_thresholds(change: dict, level: str) -> None:
    assert judge(replace(READY, **change)).level == level


def test_verdict_says_when_there_are_few_inputs_or_no_speed() -> None:
    assert judge(replace(READY, inputs=10)).headline.startswith("Looks ready")
    assert "not faster" in judge(replace(READY, speedup=0.9)).headline


def test_frontier_shares_options_and_names_what_cannot_be_met(frontier: convsplit.Frontier) -> None:
    assert [point.budget.fraction for point in frontier.points] == [0.8, 0.5, 0.3]
    assert all(point.kept <= point.budget.fraction for point in frontier.points)
    errors = [point.largest_error for point in frontier.points]
    assert errors == sorted(errors)
    assert len(frontier.notes) == 1
    assert "cannot be met" in frontier.notes[0]
    assert frontier.measured


def test_frontier_is_what_make_plan_and_compare_say(frontier: convsplit.Frontier) -> None:
    alone = convsplit.make_plan(small_model(), budget=convsplit.Budget(params=0.5), forms=["dw-pw", "pw-dw"])
    assert frontier.points[1].plan == alone


def test_frontier_without_inputs_predicts_only() -> None:
    curve = convsplit.frontier(small_model(), budgets=(0.5,), forms="dw-pw")
    assert not curve.measured
    assert curve.points[0].drift is None
    assert curve.knee is None


def test_frontier_prints_in_every_way(frontier: convsplit.Frontier) -> None:
    assert "params=0.5" in str(frontier)
    assert len(frontier.to_csv().splitlines()) == 1 + len(frontier.points)
    assert len(json.loads(frontier.to_json())["points"]) == 3
    assert "<table>" in frontier._repr_html_()


def test_knee_is_the_bend(frontier: convsplit.Frontier) -> None:
    point = frontier.points[1]
    points = [replace(point, largest_error=error, drift=None) for error in (0.1, 0.2, 1.0)]
    plans = [frontier.points[i].plan for i in range(3)]
    bent = replace(frontier, points=tuple(replace(p, plan=plan) for p, plan in zip(points, plans, strict=True)))
    assert bent.knee is bent.points[1]


def test_ticks_are_round() -> None:
    assert round_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert log_ticks(10, 1000) == [10, 20, 50, 100, 200, 500, 1000]
    assert axis("", [0.83]).high == pytest.approx(1.0)
    assert axis("", []).high == 1.0


def test_numbers_have_one_format() -> None:
    assert [count(n) for n in (0, 999, 1000, 999999, 2.5e9)] == ["0", "999", "1.00 k", "1.00 M", "2.50 G"]
    assert percent(None) == "-"
    assert Table(["a"], [["x|y"]]).markdown().endswith("x\\|y |")
