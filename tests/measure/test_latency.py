"""Measured time: arrangements equal the stages, stopwatches fill in every option, choices keep their promise."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import convsplit
from convsplit import Budget, SeparableConv2d, Stopwatch
from convsplit.choose.options import Option, find_menus
from convsplit.choose.plan import Conditions
from convsplit.measure.speed import CLOSE, TOLERANCE, TRIES, Timed, _Aim, _faster_only, choose_by_time
from convsplit.measure.timing import Timing, conditions_of, time_models
from convsplit.model.graphs import trace
from convsplit.model.sites import find_sites
from convsplit.structure import Structure


def model() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)).eval()


def menus_of(net: nn.Module, x: torch.Tensor) -> list:
    traced = trace(net, x)
    return find_menus(find_sites(net, traced), progress=False)


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"stride": 2, "padding": "valid"},
        {"groups": 2, "padding": (1, 0), "bias": False},
        {"padding": "same", "dilation": 2, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_repeated_stages_give_the_same_answer_and_the_same_state(form: str, rank: int, geometry: dict) -> None:
    torch.manual_seed(0)
    layer = SeparableConv2d(8, 12, 3, form=form, rank=rank, dtype=torch.float64, **geometry)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    wanted, keys, kernel = layer(x), list(layer.state_dict()), layer.weight
    layer.arrangement = "repeated"
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    assert list(layer.state_dict()) == keys
    assert torch.equal(layer.weight, kernel)
    torch.testing.assert_close(layer.merged()(x), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
@pytest.mark.parametrize("components", [8, 11, 16])
def test_image_by_image_gives_the_same_answer_and_is_not_seen_in_graphs(form: str, components: int) -> None:
    torch.manual_seed(0)
    layer = SeparableConv2d(8, 8, 3, padding=1, form=form, components=components, dtype=torch.float64)
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    wanted, keys = layer(x), list(layer.state_dict())
    (gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    layer.arrangement = "by image"
    assert list(layer.state_dict()) == keys
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), x)[0], gradient, rtol=1e-12, atol=1e-12)
    assert layer(x[0]).shape == wanted[0].shape
    assert layer(x[:0]).shape == (0, *wanted.shape[1:])
    many = torch.randn(7, 8, 9, 9, dtype=torch.float64)
    batch = torch.export.Dim("batch")
    recorded = [
        torch.jit.trace(layer, x),
        torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module(),
        torch.fx.symbolic_trace(layer),
    ]
    for graph in recorded:  # with no trace of how many images there were
        torch.testing.assert_close(graph(many), layer(many), rtol=1e-12, atol=1e-12)


def test_arrangements_that_do_not_exist_are_refused() -> None:
    layer = SeparableConv2d(8, 8, 3, form="pw-dw-pw", rank=4)
    with pytest.raises(ValueError, match="equal multiplicities above 1"):
        layer.arrangement = "repeated"
    with pytest.raises(ValueError, match="'stages', 'repeated', 'by image'"):
        layer.arrangement = "sideways"


def test_every_option_gets_milliseconds_and_equal_layers_are_measured_once() -> None:
    net, x = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)).eval(), None
    x = torch.randn(2, 16, 12, 12)
    stopwatch = Stopwatch(seconds=0.5)
    first, second = stopwatch.timed(menus_of(net, x), conditions_of(net, x))
    assert len(stopwatch._known) == 1
    assert [o.milliseconds for o in first.options] == [o.milliseconds for o in second.options]
    assert all(option.milliseconds is not None and option.milliseconds > 0 for option in first.options)
    known = dict(stopwatch._known)
    stopwatch.timed(menus_of(net, x), conditions_of(net, x))
    assert stopwatch._known == known  # remembered, not measured again


@pytest.mark.clock
def test_wider_options_take_longer() -> None:
    """Not pairwise, as interpolation and noise forbid that, but from one end of the grid to the other."""
    net, x = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).eval(), torch.randn(4, 64, 32, 32)
    (menu,) = Stopwatch(seconds=2).timed(menus_of(net, x), conditions_of(net, x))
    times = [
        option.milliseconds for option in menu.options if option.structure and option.structure.form == "pw-dw-pw"
    ]
    assert times[0] < times[-1]


@pytest.mark.clock
def test_training_is_slower_than_inference() -> None:
    net, x = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)).eval(), torch.randn(4, 32, 24, 24)
    forward, both = (
        Stopwatch(seconds=1, training=training).timed(menus_of(net, x), conditions_of(net, x))[0].dense
        for training in (False, True)
    )
    assert both.milliseconds > forward.milliseconds


def test_layers_that_are_never_called_cost_nothing() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.used(x)

    net, x = Half().eval(), torch.randn(1, 8, 8, 8)
    used, unused = Stopwatch(seconds=0.2).timed(menus_of(net, x), conditions_of(net, x))
    assert used.dense.milliseconds > 0
    assert all(option.milliseconds == 0 for option in unused.options)


def test_only_faster_options_stay() -> None:
    net, x = model(), torch.randn(1, 32, 8, 8)
    (menu, _) = menus_of(net, x)
    slow = [replace(option, milliseconds=2.0) for option in menu.options[1:]]
    dense = replace(menu.dense, milliseconds=1.0)
    left = _faster_only(replace(menu, options=(dense, *slow)))
    assert left.options == (dense,)
    assert "no option is faster: dense 1 ms, the fastest 2 ms" in left.note
    slow[3] = replace(slow[3], milliseconds=0.5)
    assert _faster_only(replace(menu, options=(dense, *slow))).options == (dense, slow[3])


@pytest.mark.clock
def test_a_plan_made_for_speed_is_faster_and_says_how_it_was_measured() -> None:
    net, x = model(), torch.randn(8, 32, 32, 32)
    plan = convsplit.make_plan(net, x, budget=Budget(macs=0.3), prefer="speed", stopwatch=Stopwatch(seconds=3))
    assert plan.split
    assert all(layer.milliseconds[1] < layer.milliseconds[0] for layer in plan.split)
    assert plan.conditions == replace(
        Conditions("cpu", "float32", "contiguous", 1), runtime="torch", version=torch.__version__
    )
    assert f"inference in torch {torch.__version__} on cpu, float32, contiguous, 1 thread" in plan.summary()
    assert "faster" in plan.table().headings
    assert convsplit.Plan.from_json(plan.to_json()) == plan
    before, after = time_models([net, convsplit.apply_plan(net, plan)], x)
    assert after.total < before.total


@pytest.mark.clock
def test_a_budget_of_latency_is_met() -> None:
    net, x = model(), torch.randn(16, 32, 32, 32)
    plan = convsplit.make_plan(net, x, budget=Budget(latency=0.5), stopwatch=Stopwatch(seconds=3))
    totals = plan.totals()
    assert totals["milliseconds_after"] <= 0.5 * 1.05 * totals["milliseconds_before"]


def test_a_budget_of_latency_out_of_reach_is_refused() -> None:
    net, x = model(), torch.randn(1, 32, 8, 8)
    with pytest.raises(ValueError, match=r"cannot be met|could not be reached"):
        convsplit.make_plan(net, x, budget=Budget(latency=0.001), stopwatch=Stopwatch(seconds=1))


def test_speed_needs_shapes_and_a_known_word() -> None:
    with pytest.raises(ValueError, match="pass example_inputs"):
        convsplit.make_plan(model(), prefer="speed")
    with pytest.raises(ValueError, match="pass example_inputs"):
        convsplit.make_plan(model(), budget=Budget(latency=0.5))
    with pytest.raises(ValueError, match="'accuracy', 'speed'"):
        convsplit.make_plan(model(), torch.randn(1, 32, 8, 8), prefer="fast")


@pytest.mark.clock
def test_with_a_fixed_rank_layers_that_get_slower_stay_dense() -> None:
    """A layer of one pixel gains nothing from three stages."""
    net, x = nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), torch.randn(1, 4, 3, 3)
    plan = convsplit.make_plan(net, x, rank=1, prefer="speed", stopwatch=Stopwatch(seconds=1))
    assert not plan.split
    assert "faster" in plan.layers[0].reason or "slower" in plan.layers[0].reason


@pytest.mark.clock
def test_choosing_leaves_model_threads_and_random_state_alone() -> None:
    net, x = model().train(), torch.randn(1, 32, 8, 8)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    random = torch.get_rng_state()
    convsplit.make_plan(net, x, budget=Budget(macs=0.9), stopwatch=Stopwatch(seconds=0.5))
    convsplit.make_plan(net, x, budget=Budget(latency=1.0), stopwatch=Stopwatch(seconds=0.5))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert net.training
    assert not net[0]._forward_hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == 1


def test_conditions_tell_the_layout() -> None:
    net, x = model(), torch.randn(2, 32, 8, 8)
    assert conditions_of(net, x).layout == "contiguous"
    assert conditions_of(net, x.contiguous(memory_format=torch.channels_last)).layout == "channels_last"
    assert conditions_of(net.to(memory_format=torch.channels_last), x).layout == "channels_last"


@pytest.mark.clock
def test_arrangements_chosen_go_into_the_model() -> None:
    net, x = model(), torch.randn(4, 32, 24, 24)
    plan = convsplit.make_plan(net, x, rank=2, forms="dw-pw", prefer="speed", stopwatch=Stopwatch(seconds=2))
    converted = convsplit.apply_plan(net, plan)
    for layer in plan.split:
        assert converted.get_submodule(layer.name).arrangement == layer.option.arrangement


def test_options_of_older_plans_have_no_time() -> None:
    plan = convsplit.make_plan(model(), rank=1, forms="dw-pw")
    data = json.loads(plan.to_json())
    del data["model_milliseconds"], data["conditions"]
    for layer in data["layers"]:
        for key in ("dense", "option"):
            for new in ("milliseconds", "arrangement"):
                del layer[key][new]
    assert convsplit.Plan.from_json(json.dumps(data)) == plan
    assert plan.layers[0].option == Option(
        Structure("dw-pw", 32, True), 32 * (9 + 64), None, plan.layers[0].option.error
    )


@pytest.mark.clock
def test_a_report_has_the_milliseconds_of_its_layers() -> None:
    net = model()
    report = convsplit.compare(convsplit.convert(net), net, torch.randn(2, 32, 12, 12), time=True)
    assert all(layer.milliseconds and min(layer.milliseconds) > 0 for layer in report.layers)
    assert "faster" in report.table().headings
    assert convsplit.report.Report.from_json(report.to_json()) == report
    assert sum(layer.milliseconds[0] for layer in report.layers) <= 1.5 * report.milliseconds[0]


def test_choosing_again_takes_out_what_is_slower_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone every option looks faster; within the model one layer turns out slower, and stays dense."""
    net, x = model(), torch.randn(2, 32, 8, 8)
    menus = menus_of(net, x)

    def flattering(self, menus, conditions, *, progress=None):
        return [
            replace(m, options=tuple(replace(o, milliseconds=1.0 if o.dense else 0.5) for o in m.options))
            for m in menus
        ]

    def truth(models, batch, *, layers=None, forward=None, seconds=2.0):
        def of(each: nn.Module) -> Timing:
            split = {name: isinstance(each.get_submodule(name), SeparableConv2d) for name in ("0", "2")}
            times = {"0": 2.0 if split["0"] else 1.0, "2": 0.5 if split["2"] else 1.0}
            return Timing(sum(times.values()), times)

        return [of(each) for each in models]

    monkeypatch.setattr(Stopwatch, "timed", flattering)
    monkeypatch.setattr("convsplit.measure.speed.time_models", truth)
    found = choose_by_time(
        net, x, menus, Budget(macs=0.8), prefer="speed", stopwatch=Stopwatch(), model_params=0, model_macs=None
    )
    assert [option.dense for option in found.chosen] == [True, False]
    assert found.model_milliseconds == (2.0, 1.5)
    widest = max(option.structure.components for option in menus[0].options[1:])
    assert max(option.structure.components for option in found.menus[0].options[1:]) < 0.8 * widest


def timed_whole(kept: float) -> Timed:
    return Timed([], [], (1.0, kept), Conditions("cpu", "float32", "contiguous", 1))


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(
    "kept",
    [
        lambda asked: asked**2,  # alone, layers look slower than they are within the model
        lambda asked: 0.1 + 0.9 * asked,  # what is not splittable takes its time
        lambda asked: 1.0 if asked > 0.8 else 0.45 * asked,  # ratios alone would go between two answers for ever
        lambda asked: min(1.0, round(1.4 * asked * 8) / 8),  # few options
    ],
    ids=["square", "constant", "jump", "steps"],
)
def test_asking_anew_closes_in_on_a_budget_of_latency(wanted: float, kept) -> None:
    aim = _Aim(Budget(latency=wanted, of="model"))
    tried = [timed_whole(kept(aim.asked))]
    while aim.missed_by(tried[-1]) > (False, CLOSE) and len(tried) < TRIES:
        asked = aim.corrected(tried[-1])
        assert aim.fast <= asked.fraction <= aim.slow
        tried.append(timed_whole(kept(asked.fraction)))
    best = min(tried, key=aim.missed_by)
    assert aim.kept(best) <= wanted * (1 + TOLERANCE)


def test_a_choice_that_is_fast_enough_goes_before_one_that_is_nearer() -> None:
    aim = _Aim(Budget(latency=0.7, of="model"))
    assert aim.missed_by(timed_whole(0.5)) < aim.missed_by(timed_whole(0.74))
    assert aim.missed_by(timed_whole(0.65)) < aim.missed_by(timed_whole(0.5))


def test_asking_for_less_than_there_is_asks_for_more_the_next_time() -> None:
    aim = _Aim(Budget(latency=0.5, of="model"))
    asked = aim.corrected(timed_whole(0.9))
    assert asked.fraction < aim.raised().fraction < 0.5


def test_bench_measures_every_case_and_notes_what_cannot_be() -> None:
    found = convsplit.bench(
        model(), torch.randn(1, 32, 16, 16), budgets=[Budget(macs=0.4), Budget(macs=0.0001)], batch_sizes=[2, 3],
        threads=[1], layouts=["contiguous"], seconds=1, deployed=True, prefer="accuracy",
    )  # fmt: skip
    assert [(row.batch_size, row.conditions.threads) for row in found.rows] == [(2, 1), (3, 1)]
    assert all(row.macs[1] < row.macs[0] and min(row.milliseconds) > 0 for row in found.rows)
    assert found.rows[1].macs == found.rows[0].macs
    assert len(found.notes) == 2
    assert "cannot be met" in found.notes[0]
    assert len(found.to_csv().splitlines()) == 3
    assert json.loads(found.to_json())["rows"][0]["speedup"] == pytest.approx(found.rows[0].speedup)
    assert all(text in str(found) for text in ("of promised", "each model in its faster layout"))
    assert "<table>" in found._repr_html_()
    assert found.to_markdown().startswith("### Sequential")


def test_bench_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        convsplit.bench(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(ValueError, match="unknown layout"):
        convsplit.bench(model(), torch.randn(1, 32, 8, 8), layouts=["sideways"])
