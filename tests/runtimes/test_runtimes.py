"""Runtimes: each gives the numbers of the module, is timed, chosen by, named; those that are not there say so."""

from __future__ import annotations

import copy
import json
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import convsplit
from convsplit import Budget, SeparableConv, SeparableConv2d, Stopwatch
from convsplit.choose.options import find_menus
from convsplit.folding import folded
from convsplit.layers.stages import PaddedConv2d, SamePad2d
from convsplit.measure import time_models
from convsplit.measure.stopwatch import _Candidate, _in_blocks, _taken
from convsplit.measure.timing import conditions_of, milliseconds_in_turns
from convsplit.model.graphs import trace
from convsplit.model.sites import find_sites
from convsplit.runtimes import RUNTIMES, runtime_of
from convsplit.runtimes.base import Runtime, vector_block
from convsplit.runtimes.onnx_layers import GraphOfLayers, add_layer, timing_graph
from convsplit.runtimes.onnx_models import as_arrays, write_onnx
from convsplit.runtimes.onnx_runtimes import FromOnnx

FROM_ONNX = ["onnxruntime", "openvino"]


def installed(name: str) -> FromOnnx:
    runtime = RUNTIMES[name]
    if runtime.missing:
        pytest.skip(f"{name} needs {', '.join(runtime.missing)}")
    assert isinstance(runtime, FromOnnx)
    return runtime


def model() -> nn.Module:
    torch.manual_seed(0)
    body = [
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
    ]
    return nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval()


def single(layer: nn.Module, shape: tuple[int, ...]) -> bytes:
    graph = GraphOfLayers(shape)
    graph.outputs.append(add_layer(graph, "x", layer, shape))
    return graph.bytes()


GEOMETRIES = [
    {"padding": 1},
    {"stride": 2, "padding": (2, 0), "bias": False},
    {"groups": 2, "padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "replicate"},
]


@pytest.mark.parametrize("runtime", FROM_ONNX)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {"form": "dw-pw", "rank": 1}, {"form": "dw-pw", "rank": 2}, {"form": "pw-dw", "rank": 2},
        {"form": "dw-pw", "components": 18}, {"form": "pw-dw", "components": 18}, {"form": "pw-dw-pw", "rank": 8},
    ],
    ids=str,
)  # fmt: skip
def test_graphs_of_layers_give_what_the_layers_give(runtime: str, geometry: dict, how: dict) -> None:
    torch.manual_seed(0)
    layer = SeparableConv2d(8, 12, (3, 5), **geometry, **how).eval()
    x = torch.randn(2, 8, 11, 12)
    for arrangement in ("stages", "repeated"):
        if layer.can_run(arrangement):
            layer.arrangement = arrangement
            (found,) = installed(runtime).load(single(layer, tuple(x.shape)))(as_arrays(x))
            torch.testing.assert_close(torch.from_numpy(found), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", FROM_ONNX)
def test_graphs_of_dense_layers_and_of_padding_by_size(runtime: str) -> None:
    torch.manual_seed(0)
    x, conv = torch.randn(1, 6, 10, 11), nn.Conv2d(6, 4, 3, stride=2)
    padded = PaddedConv2d(6, 4, 3, stride=2)
    padded.pad = SamePad2d(3, 2)
    split = SeparableConv2d.empty_like(conv, form="dw-pw", components=6, even=True, pad=SamePad2d(3, 2))
    for layer, wanted in ((conv, conv(x)), (nn.Sequential(SamePad2d(3, 2), conv), conv(SamePad2d(3, 2)(x)))):
        (found,) = installed(runtime).load(single(layer, tuple(x.shape)))(as_arrays(x))
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
    (found,) = installed(runtime).load(single(split, tuple(x.shape)))(as_arrays(x))
    assert tuple(found.shape) == tuple(split(x).shape)


OTHER_KINDS = [
    (nn.Conv1d(8, 12, 5, 2, 2, dilation=2), (2, 8, 15)),
    (nn.Conv1d(8, 12, 3, padding=1, padding_mode="replicate", groups=2), (2, 8, 15)),
    (nn.Conv3d(8, 6, (1, 3, 3), (1, 2, 1), (0, 1, 1), bias=False), (2, 8, 3, 6, 5)),
    (nn.ConvTranspose1d(8, 6, 5, 3, 1, output_padding=1), (2, 8, 7)),
    (nn.ConvTranspose2d(8, 12, 4, (2, 1), 1, groups=2), (2, 8, 5, 6)),
    (nn.ConvTranspose3d(8, 6, (1, 2, 2), (1, 2, 2)), (1, 8, 2, 3, 4)),
    (nn.Conv1d(8, 12, 1, 2), (2, 8, 9)), (nn.Conv2d(8, 12, 1, 2, padding=1), (2, 8, 6, 5)),
    (nn.ConvTranspose2d(8, 6, 1, 2), (2, 8, 4, 5)), (nn.Linear(8, 12), (2, 8)),
    (nn.Linear(8, 12, bias=False), (2, 5, 8)),
]  # fmt: skip


@pytest.mark.parametrize("runtime", FROM_ONNX)
@pytest.mark.parametrize(("conv", "shape"), OTHER_KINDS, ids=lambda case: str(case))
def test_layers_of_every_kind_have_graphs_and_times(runtime: str, conv: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    load, x = installed(runtime).load, torch.randn(shape)
    forms = ("dw-pw", "pw-dw", "pw-dw-pw") if conv.weight[0, 0].numel() > 1 else ("pw-pw",)
    layers = [SeparableConv.from_conv(conv, form=form, rank=2) for form in forms]
    for layer in (conv, *layers):
        (found,) = load(single(layer.eval(), shape))(as_arrays(x))
        torch.testing.assert_close(torch.from_numpy(found), layer(x), rtol=1e-4, atol=1e-4)
        averages = load(timing_graph(copy.deepcopy(layer), shape, 2))(as_arrays(x))
        assert all(torch.as_tensor(average).isfinite().all() for average in averages)


def test_graphs_to_be_timed_hold_different_copies() -> None:
    onnx = pytest.importorskip("onnx")
    layer = SeparableConv2d(8, 8, 3, form="pw-dw-pw", rank=8)
    graph = onnx.load_from_string(timing_graph(layer, (1, 8, 9, 9), 3)).graph
    assert len(graph.output) == 3
    weights = [bytes(each.raw_data) for each in graph.initializer]
    assert len(weights) == len(set(weights)) == 1 + 3 * 4  # three stages and a bias


@pytest.mark.parametrize("runtime", FROM_ONNX)
def test_whole_models_give_the_same_numbers_there(runtime: str, tmp_path: Path) -> None:
    found, x = installed(runtime), torch.randn(2, 32, 12, 12)
    for net in (model(), convsplit.convert(model(), forms=["dw-pw", "pw-dw"], budget=Budget(params=0.5))):
        write_onnx(folded(net), x, tmp_path / "m.onnx")
        (answer,) = found.load(tmp_path / "m.onnx")(as_arrays(x))
        np.testing.assert_allclose(answer, net(x).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", FROM_ONNX)
def test_batches_of_any_kind_and_a_forward_of_ones_own(runtime: str, tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x, scale, times=1):
            return {"y": self.conv(x) * scale * times}

    net, x, scale = Scaled().eval(), torch.randn(1, 3, 8, 8), torch.tensor(2.0)
    cases = [
        ((x, scale), None), ({"scale": scale, "x": x, "times": 3}, None), ((x, scale, 3), None),
        ([{"image": x}], lambda net, batch: net(batch[0]["image"], 0.5)),
    ]  # fmt: skip
    for batch, forward in cases:
        wanted = forward(net, batch) if forward else net(**batch) if isinstance(batch, dict) else net(*batch)
        write_onnx(net, batch, tmp_path / "m.onnx", forward=forward)
        (answer,) = installed(runtime).load(tmp_path / "m.onnx")(as_arrays(batch))
        np.testing.assert_allclose(answer, wanted["y"].detach().numpy(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_said_with_both_reasons(tmp_path: Path) -> None:
    installed("onnxruntime")

    class Unexportable(nn.Module):
        def forward(self, x):
            raise RuntimeError("on purpose")

    with pytest.raises(ValueError, match=r"recorded: .*; traced: .*on purpose"):
        write_onnx(Unexportable(), torch.zeros(1, 3, 4, 4), tmp_path / "m.onnx")


@pytest.mark.clock
@pytest.mark.parametrize("runtime", FROM_ONNX)
def test_plans_for_a_runtime_are_made_of_its_milliseconds(runtime: str) -> None:
    installed(runtime)
    net, x = model(), torch.randn(2, 32, 24, 24)
    plan = convsplit.make_plan(
        net, x, budget=Budget(macs=0.4), prefer="speed", stopwatch=Stopwatch(seconds=2, runtime=runtime)
    )
    assert plan.split
    assert all(layer.milliseconds[1] < layer.milliseconds[0] for layer in plan.split)
    assert all(layer.option.structure.components % vector_block() == 0 for layer in plan.split)
    assert (plan.conditions.runtime, plan.conditions.version) == (runtime, runtime_of(runtime).version)
    assert f"in {runtime} {runtime_of(runtime).version} on cpu, float32, its own layout, 1 thread" in plan.summary()
    assert convsplit.Plan.from_json(plan.to_json()) == plan
    totals = plan.totals()
    assert totals["macs_after"] <= 0.4 * totals["macs_before"]
    saved = plan.model_milliseconds[0] - plan.model_milliseconds[1]  # what the model gained, its layers gained
    assert totals["milliseconds_before"] - totals["milliseconds_after"] == pytest.approx(saved, rel=1e-6)


@pytest.mark.clock
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_budget_of_latency_is_met_there(runtime: str) -> None:
    installed(runtime)
    net, x, budget = model(), torch.randn(8, 32, 32, 32), Budget(latency=0.7, of="model")
    plan = convsplit.make_plan(net, x, budget=budget, stopwatch=Stopwatch(seconds=3, runtime=runtime))
    before, after = time_models([net, convsplit.apply_plan(net, plan)], x, runtime=runtime, seconds=3)
    assert plan.model_milliseconds[1] <= 1.05 * 0.7 * plan.model_milliseconds[0]
    assert after.total < 0.9 * before.total


@pytest.mark.clock
def test_what_has_run_keeps_no_core_busy() -> None:
    pytest.importorskip("onnxruntime")
    threads, x = torch.get_num_threads(), torch.randn(1, 16, 64, 64)
    torch.set_num_threads(2)  # the second thread of a session waits for work by spinning, unless it is told not to
    try:
        run = runtime_of("onnxruntime").prepare_layer(nn.Conv2d(16, 64, 3).eval(), x)
        busy = []
        for _ in range(3):
            run()
            before = time.process_time()
            time.sleep(0.1)
            busy.append(time.process_time() - before)
    finally:
        torch.set_num_threads(threads)
    assert min(busy) < 0.005


def test_a_function_of_the_users_own_is_a_runtime() -> None:
    """Where a MAC costs a nanosecond, whatever it does: the function may measure by itself."""
    seen = []

    def device(net: nn.Module, batch: object) -> object:
        seen.append(net)
        with torch.no_grad():
            flops = torch.utils.flop_counter.FlopCounterMode(display=False)
            with flops:
                net(batch)
        return lambda: flops.get_total_flops() / 2 / 1e6

    net, x = model(), torch.randn(1, 32, 16, 16)
    plan = convsplit.make_plan(net, x, budget=Budget(latency=0.5), stopwatch=Stopwatch(seconds=0.1, runtime=device))
    totals = plan.totals()
    assert totals["milliseconds_before"] == pytest.approx(totals["macs_before"] / 1e6, rel=1e-6)
    assert 0.45 <= totals["milliseconds_after"] / totals["milliseconds_before"] <= 0.525
    assert plan.conditions.runtime == "device"
    assert any(isinstance(each, SeparableConv2d) for each in seen)
    assert any(isinstance(each, nn.Sequential) for each in seen)


def test_runs_that_measure_themselves_are_believed() -> None:
    def forever() -> float:
        raise AssertionError("no clock is needed")

    assert milliseconds_in_turns([lambda: 2.5, lambda: 7.0], 0.01, clock=lambda: 0.0) == [2.5, 7.0]


def test_widths_fill_blocks_where_there_are_such() -> None:
    net, x = model(), torch.randn(1, 32, 8, 8)
    for menu in find_menus(find_sites(net, trace(net, x)), progress=False):
        kept = _in_blocks(menu, 16)
        assert kept.dense == menu.dense
        assert 1 < len(kept.options) < len(menu.options)
        assert all(option.structure.components % 16 == 0 for option in kept.options[1:])
        assert _in_blocks(menu, 4096) == menu  # none fits: all stay


@pytest.mark.clock
@pytest.mark.slow
def test_compiled_models_are_timed_and_chosen_for() -> None:
    net, x = model(), torch.randn(2, 32, 16, 16)
    plan = convsplit.make_plan(
        net, x, budget=Budget(macs=0.5), prefer="speed", stopwatch=Stopwatch(seconds=1, runtime="torch.compile")
    )
    assert plan.conditions.runtime == "torch.compile"
    torch.compiler.reset()


def test_autocast_says_so() -> None:
    net, x = model(), torch.randn(1, 32, 8, 8)
    assert conditions_of(net, x, runtime="torch.amp").dtype == "float32 with autocast"
    assert time_models([net], x, runtime="torch.amp", seconds=0.05)[0].total > 0


def test_cuda_graphs_are_for_cuda() -> None:
    if torch.cuda.is_available():
        net, x = model().cuda(), torch.randn(1, 32, 8, 8, device="cuda")
        assert time_models([net], x, runtime="torch.cuda_graph", seconds=0.05)[0].total > 0
    else:
        with pytest.raises(ValueError, match="is for CUDA"):
            time_models([model()], torch.randn(1, 32, 8, 8), runtime="torch.cuda_graph")


def test_runtimes_that_are_unknown_or_missing_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="'onnxruntime', 'openvino', or a function"):
        Stopwatch(runtime="tensorrt")
    with pytest.raises(ValueError, match="want a name"):
        runtime_of(3)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"pip install 'convsplit\[nowhere\]'"):
        runtime_of(Runtime("absent", needs=("no_such_package",), extra="nowhere"))
    with pytest.raises(ValueError, match="does not train"):
        Stopwatch(runtime=lambda net, batch: lambda: None, training=True)


@pytest.mark.slow
def test_bench_puts_runtimes_side_by_side() -> None:
    names = ["torch", *(name for name in FROM_ONNX[:1] if find_spec(name))]
    found = convsplit.bench(
        model(), torch.randn(1, 32, 16, 16), budgets=[Budget(macs=0.4)], batch_sizes=[2], threads=[1, 2],
        runtimes=names, layouts=["contiguous"], seconds=0.5, prefer="accuracy",
    )  # fmt: skip
    assert [row.conditions.runtime for row in found.rows] == [name for name in names for _ in range(2)]
    assert all(row["version"] for row in json.loads(found.to_json())["rows"])
    assert found.summary().count("2 threads instead of 1 make the dense model") == len(names)


def test_reports_name_where_time_was_measured() -> None:
    installed("onnxruntime")
    net = model()
    report = convsplit.compare(
        convsplit.convert(net), net, torch.randn(2, 32, 12, 12), time=True, runtime="onnxruntime"
    )
    assert report.conditions.runtime == "onnxruntime"
    assert "milliseconds of inference in onnxruntime" in report.summary()
    assert convsplit.report.Report.from_json(report.to_json()) == report


def test_few_candidates_are_ready_at_once_where_feature_maps_are_large() -> None:
    """And are put in relation to the dense layer, on a machine that becomes slower with everything it runs."""
    ready = []

    def run_of(module: nn.Module) -> object:
        ready.append(module)
        slower = len(ready) // 2
        return lambda: float(module.out_features * 2**slower)

    candidates = {_Candidate(None, str(size)): nn.Linear(1, size) for size in (8, 3, 2, 5)}
    times = _taken(candidates, run_of, 0.0, clock=lambda: 0.0, at_once=1)
    assert [module.out_features for module in ready] == [8, 3, 8, 2, 8, 5]
    assert list(times.values()) == [8.0, 6.0, 4.0, 10.0]  # each pair by the dense layer beside it
    assert _taken(dict(list(candidates.items())[:1]), run_of, 0.0, clock=lambda: 0.0, at_once=9)
