"""Reports as values: totals by hand, round trips, the published schema, verdicts by their thresholds, differences."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convsplit
from convsplit.model.sites import POINTWISE
from convsplit.model.values import stored_bytes
from convsplit.report import Drift
from convsplit.report.sizes import bytes_on_disk
from convsplit.report.svg import axis, log_ticks, round_ticks
from convsplit.report.verdict import Evidence, judge
from convsplit.tables import Table, changed, count, percent

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"


def small_model() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.fixture(scope="module")
def report() -> convsplit.report.Report:
    model = small_model()
    return convsplit.compare(convsplit.convert(model, forms="dw-pw", rank=1), model, torch.randn(5, 3, 9, 9))


@pytest.fixture(scope="module")
def frontier() -> convsplit.report.Frontier:
    inputs = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return convsplit.frontier(small_model(), batches=inputs, budgets=(0.8, 0.5, 0.3, 0.001), forms=["dw-pw", "pw-dw"])


def test_totals_by_hand(report: convsplit.report.Report) -> None:
    dense = (3 * 16 * 9 + 16) + (16 * 16 * 9 + 16)
    split = (3 * 9 + 3 * 16 + 16) + (16 * 9 + 16 * 16 + 16)
    rest = (16 * 8 + 8) + (8 * 4 + 4)
    assert report.conv_params == (dense, split)
    assert report.params == (dense + rest, split + rest)
    assert report.stored_bytes == (4 * (dense + rest), 4 * (split + rest))
    assert [(layer.name, layer.reason) for layer in report.kept] == [("4", POINTWISE)]


def test_json_round_trip(report: convsplit.report.Report) -> None:
    assert convsplit.report.Report.from_json(report.to_json()) == report
    with pytest.raises(ValueError, match="not a report"):
        convsplit.report.Report.from_json("{}")


def test_json_follows_the_published_schema(report: convsplit.report.Report) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(json.loads(report.to_json()), schema)
    timed = replace(report, milliseconds=(2.0, 1.5), drift=None)
    jsonschema.validate(json.loads(timed.to_json()), schema)


def test_schema_names_every_field(report: convsplit.report.Report) -> None:
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


def test_csv_and_pandas_have_a_row_per_layer(report: convsplit.report.Report) -> None:
    assert len(report.to_csv().splitlines()) == 1 + len(report.layers)
    pandas = pytest.importorskip("pandas")
    table = report.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert table["params_after"].sum() == report.conv_params[1]


def test_narrow_terminals_get_every_cell(report: convsplit.report.Report) -> None:
    text = report.table().text(40)
    assert all(cell in text for row in report.table().rows for cell in row)
    assert max(map(len, text.splitlines())) <= 40


def test_notebooks_get_escaped_html(report: convsplit.report.Report) -> None:
    named = replace(report, model="<script>")
    assert "<script>" not in named._repr_html_()
    assert named._repr_html_().count("<table>") == 2


def test_compare_measures_time_when_asked() -> None:
    model = small_model()
    timed = convsplit.compare(model, model, torch.randn(1, 3, 9, 9), time=True)
    assert timed.milliseconds is not None
    assert min(timed.milliseconds) > 0


# --------------------------------------------------------------------------------------- what is told of inputs


class Answers(nn.Module):
    """A convolution, and an answer made of its output."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.answer = nn.Conv2d(3, 16, 3), answer

    def forward(self, x: Any) -> Any:
        return self.answer(self.conv(torch.stack(x) if isinstance(x, list) else x))


def told_of(answer: Callable[[Tensor], Any], batches: Any = None, **options: Any) -> convsplit.report.Report:
    torch.manual_seed(0)
    model = Answers(answer).eval()
    batches = torch.randn(2, 3, 10, 10) if batches is None else batches
    return convsplit.compare(convsplit.convert(model, forms="dw-pw", rank=1), model, batches, **options)


@pytest.mark.parametrize(
    ("answer", "batches", "inputs"),
    [
        (lambda y: y, None, 2),
        (lambda y: {"boxes": y.flatten()[:1200].view(300, 4), "y": y}, None, 2),
        (lambda y: y.flatten(2).permute(2, 0, 1), None, 2),
        (lambda y: (y.square().mean(), y), None, 2),
        (lambda y: y, [torch.zeros(3, 8, 8), torch.ones(3, 8, 8)], 2),
        (lambda y: y, [([torch.ones(3, 8, 8)] * 3,)], 3),
        (lambda y: y, [torch.ones(0, 3, 8, 8), torch.ones(5, 3, 8, 8)], 5),
    ],
    ids=["plain", "boxes first", "sequence first", "loss first", "unbatched", "list of images", "one empty batch"],
)
def test_inputs_are_counted_from_the_batch(answer: Callable[[Tensor], Any], batches: Any, inputs: int) -> None:
    assert told_of(answer, batches).images == inputs


def test_macs_are_per_input_in_plans_and_reports() -> None:
    model = small_model()
    found = set()
    for batch in (1, 7):
        x = torch.randn(batch, 3, 9, 9)
        plan = convsplit.make_plan(model, x, rank=1, forms="dw-pw")
        report = convsplit.compare(convsplit.apply_plan(model, plan), model, x)
        totals = plan.totals()
        assert report.macs == (totals["model_macs_before"], totals["model_macs_after"])
        assert [layer.macs for layer in report.layers] == [layer.macs for layer in plan.layers if layer.split]
        found.add(report.macs)
    assert len(found) == 1
    assert report.layers[0].macs == (7 * 7 * 3 * 16 * 9, 7 * 7 * 3 * (9 + 16))
    assert "MACs per input" in str(report)


def test_costs_are_those_on_the_originals_inputs() -> None:
    """A detector that makes other proposals runs its head on other inputs, and has saved nothing by that."""

    class Proposes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.most = nn.Parameter(torch.tensor(6.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)[: int(self.most)])

    model = Proposes().eval()
    converted = convsplit.convert(model, forms="dw-pw", rank=1)
    same = convsplit.compare(converted, model, torch.randn(8, 3, 6, 6))
    with torch.no_grad():
        converted.most.fill_(2)
    other = convsplit.compare(converted, model, torch.randn(8, 3, 6, 6))
    assert other.macs == same.macs
    assert any("other sizes" in note for note in other.notes)


def pooled(y: Tensor) -> Tensor:
    """Scores of four classes, each the best for some input."""
    scores = y.mean((2, 3))[:, :4]
    return scores - scores.mean(0)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (pooled, True),
        (lambda y: {"loss": y.mean(), "logits": pooled(y)}, True),
        (lambda y: {"boxes": pooled(y)}, False),
        (lambda y: {"boxes": pooled(y), "scores": y.mean((2, 3))}, True),
        (lambda y: (pooled(y), y.mean((2, 3))), False),
        (lambda y: y.flatten()[:1200].view(300, 4), False),
        (lambda y: y, False),
        (lambda y: pooled(y) + torch.tensor([0.0, 0.0, 1e4, 0.0]), False),
    ],
    ids=["scores", "logits", "boxes", "boxes and scores", "two of them, nameless", "rows of boxes", "map", "one box"],
)
def test_agreement_is_told_of_class_scores_alone(answer: Callable[[Tensor], Any], told: bool) -> None:
    assert (told_of(answer).agreement is not None) == told


def test_outputs_that_are_not_finite_are_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 3, 9, 9)
    plain = told_of(pooled, x)
    all_nan = told_of(lambda y: pooled(y) * math.nan, x)
    assert all_nan.verdict.level == "unknown"
    assert all_nan.drift is not None
    assert math.isnan(all_nan.drift.max_abs)
    one_row = told_of(lambda y: torch.where((torch.arange(len(y)) == 5)[:, None], math.nan, pooled(y)), x)
    assert one_row.drift is not None
    assert one_row.drift.relative == pytest.approx(plain.drift.relative, rel=0.1)
    masked = told_of(lambda y: pooled(y).masked_fill(torch.arange(4) > 2, -math.inf), x)
    assert masked.drift is not None
    assert math.isfinite(masked.drift.relative)
    for report in (all_nan, one_row, masked):
        assert any("finite" in note or "NaN" in note for note in report.notes)
    huge = told_of(lambda y: pooled(y) * 1e25, x)
    assert huge.drift.relative == pytest.approx(plain.drift.relative, rel=1e-4)
    assert huge.drift.cosine == pytest.approx(plain.drift.cosine, rel=1e-4)


def test_outputs_that_only_the_conversion_breaks_are_lost() -> None:
    model = small_model()
    converted = convsplit.convert(model, forms="dw-pw", rank=1)
    with torch.no_grad():
        converted[-1].bias.fill_(math.nan)
    report = convsplit.compare(converted, model, torch.randn(128, 3, 9, 9))
    assert report.drift is not None
    assert math.isinf(report.drift.relative)
    assert report.agreement == 0
    assert report.verdict.level == "lost"
    assert "converted model's outputs" in report.summary()


@pytest.mark.parametrize(
    "answer", [lambda y: y.relu().to_sparse(), lambda y: torch.quantize_per_tensor(y, 0.01, 0, torch.qint32)],
    ids=["sparse", "quantised"],
)  # fmt: skip
def test_outputs_are_compared_by_the_numbers_they_stand_for(answer: Callable[[Tensor], Any]) -> None:
    assert 0.1 < told_of(answer).drift.relative < 1


def test_zero_outputs_are_outputs() -> None:
    report = told_of(lambda y: y * 0)
    assert report.drift == Drift(0.0, 1.0, 0.0)
    assert told_of(lambda y: y.argmax(1)).drift is None


def test_random_models_get_the_same_noise() -> None:
    def noisy(y: Tensor) -> Tensor:
        return F.dropout(y, 0.5, training=True) + torch.randn_like(y)

    torch.manual_seed(0)
    model = Answers(noisy).eval()
    x, converted, state = torch.randn(4, 3, 9, 9), convsplit.convert(model, exact=True), torch.get_rng_state()
    report = convsplit.compare(converted, model, x)
    assert report.drift.relative < 1e-4
    assert any("random" in note for note in report.notes)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hook_that_returns_a_tuple_is_no_obstacle() -> None:
    model = Answers(lambda y: y[0]).eval()
    model.conv.register_forward_hook(lambda module, args, output: (output, 1))
    report = convsplit.compare(convsplit.convert(model, exact=True), model, torch.randn(4, 3, 9, 9))
    assert report.layers[0].local.relative < 1e-5
    assert report.drift.relative < 1e-5


def test_inputs_by_keyword_are_seen() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    layer = convsplit.make_plan(Named(), torch.randn(2, 3, 9, 9), rank=1, forms="dw-pw").layer("conv")
    assert layer.macs[0] == 7 * 7 * 3 * 16 * 9


def test_the_order_of_arguments_is_checked() -> None:
    model = small_model()
    converted = convsplit.convert(model, forms="dw-pw", rank=1)
    for call in (convsplit.compare, convsplit.refit, convsplit.reconstruct, convsplit.distill):
        with pytest.raises(ValueError, match=r"the order is \w+\(converted, original, batches\)"):
            call(model, converted, torch.randn(256, 3, 9, 9))


def test_iterables_without_an_end_are_read_so_far() -> None:
    with pytest.warns(convsplit.ConversionWarning, match="stopped there"):
        report = told_of(lambda y: y, itertools.cycle([torch.randn(2500, 3, 3, 3)]))
    assert report.images == 10_000


def test_views_of_one_storage_are_stored_once() -> None:
    whole = torch.zeros(4, 10)
    assert stored_bytes([whole]) == 160
    assert stored_bytes(list(whole)) == 160
    assert stored_bytes([whole, whole[0], whole.T]) == 160
    assert stored_bytes([whole[0], whole[0]]) == 40
    assert stored_bytes([whole[:2], torch.zeros(3)]) == 80 + 12


def test_diff_shows_what_changed(report: convsplit.report.Report) -> None:
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
        ({"relative_drift": math.nan}, "unknown"),
        ({"relative_drift": math.inf}, "lost"),
        ({"unused": 1}, "unknown"),
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
    slower = judge(replace(READY, speedup=0.9))
    assert slower.headline.startswith("Slower than before (0.90x the speed); ready to use")
    assert slower.level == judge(READY).level


def test_frontier_shares_options_and_names_what_cannot_be_met(frontier: convsplit.report.Frontier) -> None:
    assert [point.budget.fraction for point in frontier.points] == [0.8, 0.5, 0.3]
    assert all(point.kept <= point.budget.fraction for point in frontier.points)
    errors = [point.largest_error for point in frontier.points]
    assert errors == sorted(errors)
    assert len(frontier.notes) == 1
    assert "cannot be met" in frontier.notes[0]
    assert frontier.measured


def test_frontier_is_what_make_plan_and_compare_say(frontier: convsplit.report.Frontier) -> None:
    alone = convsplit.make_plan(small_model(), budget=convsplit.Budget(params=0.5), forms=["dw-pw", "pw-dw"])
    assert frontier.points[1].plan == alone


def test_frontier_without_inputs_predicts_only() -> None:
    curve = convsplit.frontier(small_model(), budgets=(0.5,), forms="dw-pw")
    assert not curve.measured
    assert curve.points[0].drift is None
    assert curve.knee is None


def test_frontier_prints_in_every_way(frontier: convsplit.report.Frontier) -> None:
    assert "params=0.5" in str(frontier)
    assert len(frontier.to_csv().splitlines()) == 1 + len(frontier.points)
    assert len(json.loads(frontier.to_json())["points"]) == 3
    assert "<table>" in frontier._repr_html_()


def test_knee_is_the_bend(frontier: convsplit.report.Frontier) -> None:
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


def test_bytes_on_disk_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 4)).half()
    weights, rest = 3 * 16 * 9 + 16 * 4, 4 * 16 + 4  # a norm's four rows, a bias; and a counter in int64
    assert bytes_on_disk(model) == {
        "float32": 4 * (weights + rest) + 8,
        "float16": 2 * (weights + rest) + 8,
        "int8": weights + 4 * (16 + 4) + 4 * rest + 8,
    }
    tied = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert bytes_on_disk(tied)["float32"] == 4 * 40
    for precision, size in bytes_on_disk(small_model()).items():
        if precision != "int8":
            kept = small_model().to(getattr(torch, precision))
            assert size == stored_bytes(list(kept.state_dict().values()))


def test_report_tells_sizes_units_and_plain_words(report: convsplit.report.Report) -> None:
    assert list(report.bytes_on_disk) == ["float32", "float16", "int8"]
    assert report.bytes_on_disk["float32"] == report.stored_bytes
    assert all(after < before for before, after in report.bytes_on_disk.values())
    for text in (str(report), report.to_markdown(), report._repr_html_(), report.text(60)):
        assert "bytes on disk, int8" in text
        words = " ".join(text.split())
        assert "MACs: multiply-accumulates per input." in words
        assert "local, of the layer's output when" in words.replace("&#x27;", "'")
        assert words.index("MACs: multiply-accumulates") < words.index("dw-pw")
    told = replace(report, agreement=0.992)
    assert "of 1,000 inputs 8 get another top-1 class" in str(told)


@pytest.mark.parametrize(
    ("agreement", "words"),
    [
        (1.0, "no input gets another top-1 class"),
        (0.992, "of 1,000 inputs 8 get another top-1 class"),
        (0.999, "of 1,000 inputs 1 gets another top-1 class"),
        (0.9998, "of 5,000 inputs 1 gets another top-1 class"),
    ],
)
def test_agreement_in_plain_words(agreement: float, words: str) -> None:
    assert changed(agreement) == words
