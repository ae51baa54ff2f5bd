"""As small as a quality allows: drift, agreement and metrics, measured on inputs that were held out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convsplit
from convsplit import Budget
from convsplit.data.batches import checked_batches, hold_out
from convsplit.data.sensitivity import measure_gains
from convsplit.report.quality import HeldOut, inputs_to_narrow, wilson
from convsplit.tables import changed, milliseconds, share

QUICK = ("dw-pw", "pw-dw")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)).eval()
    with torch.no_grad():
        model[-1].bias -= model(images()).mean(0)  # so that every class is the best for some inputs
    return model


def images(count: int = 192, seed: int = 0) -> Tensor:
    smooth = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(smooth, size=12, mode="bilinear")


def brightness(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(images(64, seed=2)).softmax(1)[:, 0].mean())


@pytest.fixture(scope="module")
def known() -> convsplit.Study[nn.Sequential]:
    return convsplit.study(net(), calibration=list(images().split(32)), forms=QUICK, progress=False)


@pytest.mark.parametrize("minimise", ["params", "macs"])
def test_drift_is_met_on_inputs_that_were_held_out(known: Any, minimise: str) -> None:
    found = known.search(Budget(drift=0.1, minimise=minimise))
    assert found.met
    assert found.chosen.quality.loss <= 0.1
    assert found.inputs == 64
    assert len(found.trials) <= 5
    assert all(trial.budget.kind == minimise for trial in found.trials)
    assert found.plan.totals()["model_params_after"] < found.plan.totals()["model_params_before"]
    _, held = hold_out(known.batches, 1 / 3)
    assert convsplit.compare(found.model, net(), held).drift.relative == pytest.approx(found.chosen.quality.drift)


def test_so_many_inputs_as_are_said_to_tell_do(known: Any) -> None:
    """With them, drawn anew, the error bar of the same conversion ends where the limit is, about."""
    model, converted = net(), known.convert(Budget(params=0.5))
    few = HeldOut(model, [images(40, seed=5)], None, Budget(drift=0.1)).measure(converted)
    distance = (few.high - few.low) / 6
    count = inputs_to_narrow(40, (few.high - few.low) / 2, distance)
    assert count == 360
    more = HeldOut(model, [images(count, seed=6)], None, Budget(drift=0.1)).measure(converted)
    assert (more.high - more.low) / 2 == pytest.approx(distance, rel=0.35)
    found = known.search(Budget(drift=1.1 * few.drift), most=1)
    assert found.certain or "would tell" in found.summary()


def test_inputs_alike_say_how_many_are_close_to_another_class() -> None:
    model, sure = net(), images(48)
    with torch.no_grad():
        best = model(sure).topk(2, dim=1).values
    order = (best[:, 0] - best[:, 1]).argsort()
    close, far = sure[order[:24]], sure[order[24:]]
    held, all_of_them = (HeldOut(model, [far], None, Budget(agreement=0.9), alike) for alike in ((), [close]))
    whole = HeldOut(model, [far, close], None, Budget(agreement=0.9))
    assert held.expected(0.1) == held.expected_of_all(0.1) == all_of_them.expected(0.1) < whole.expected(0.1)
    assert all_of_them.expected_of_all(0.1) == pytest.approx(whole.expected(0.1))
    assert all_of_them.count == 24
    assert HeldOut(model, [far], None, Budget(drift=0.1), [close]).expected_of_all(0.3) == 0.3


def test_looser_targets_keep_less(known: Any) -> None:
    kept = [
        known.search(Budget(drift=drift), most=3).plan.totals()["model_params_after"] for drift in (0.02, 0.1, 0.4)
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_agreement_has_an_error_bar_and_the_verdict_says_so(known: Any) -> None:
    found = known.search(Budget(agreement=0.95))
    assert found.met
    quality = found.chosen.quality
    assert quality.low <= quality.loss <= quality.high
    assert "error bar" in found.summary()
    assert changed(1 - quality.loss) in found.summary()
    _, held = hold_out(known.batches, 1 / 3)
    assert convsplit.compare(found.model, net(), held).agreement == pytest.approx(1 - quality.loss)
    assert json.loads(found.to_json())["met"]
    curve = found.frontier
    assert len(curve.points) == len(found.trials)
    assert curve.chosen.plan is found.plan
    assert curve.chosen.drift == quality.drift
    assert "* chosen" in str(curve)


@pytest.mark.parametrize(
    ("budget", "worse"),
    [
        (Budget(metric=brightness, lost=0.01), lambda before, after: before - after <= 0.01),
        (Budget(metric=brightness, lost=0.05, relative=True), lambda before, after: before - after <= 0.05 * before),
        (Budget(metric=brightness, lost=0.01, lower_is_better=True), lambda before, after: after - before <= 0.01),
    ],
    ids=["absolute", "relative", "lower is better"],
)
def test_metrics_of_ones_own(known: Any, budget: Budget, worse: Any) -> None:
    found = known.search(budget, most=3)
    assert found.met
    assert worse(brightness(net()), found.chosen.quality.value)
    assert found.chosen.quality.value == pytest.approx(brightness(found.model))


def test_convert_returns_the_model_that_was_found() -> None:
    data = list(images().split(32))
    converted = convsplit.convert(net(), calibration=data, budget=Budget(drift=0.2), forms=QUICK)
    _, held = hold_out(checked_batches(data), 1 / 3)
    assert convsplit.compare(converted, net(), held).drift.relative <= 0.2
    plan = convsplit.make_plan(net(), calibration=data, budget=Budget(drift=0.2), forms=QUICK)
    assert {layer.name for layer in plan.split} == {
        name for name, m in converted.named_modules() if isinstance(m, convsplit.SeparableConv2d)
    }


@pytest.mark.parametrize(
    ("then", "seconds"), [("reconstruct", 300), ("distill", 3)]
)  # the first has an end of its own
def test_fine_tuning_goes_on_in_the_same_call(known: Any, then: str, seconds: float) -> None:
    before = known.convert(Budget(params=0.4))
    after = convsplit.convert(
        net(),
        calibration=list(images().split(32)),
        budget=Budget(params=0.4),
        then=then,
        seconds=seconds,
        forms=QUICK,
    )
    drifts = [convsplit.compare(each, net(), images()).drift.relative for each in (before, after)]
    assert drifts[1] < 1.05 * drifts[0]  # what is repaired so well already has little to gain
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))


def test_the_search_measures_what_fine_tuning_gained(known: Any) -> None:
    def nothing(converted: nn.Module, original: nn.Module, batches: Any) -> None:
        assert len(batches) == 6
        assert not any(p is q for p, q in zip(converted.parameters(), original.parameters(), strict=False))

    found = known.search(Budget(drift=0.3), most=1, then=nothing)
    assert found.chosen is found.trials[-1]
    assert found.chosen.after == "then nothing"
    assert found.chosen.quality == found.trials[0].quality


def test_what_cannot_be_met_says_how_near_it_came(known: Any) -> None:
    noisy = net()

    def impossible(model: nn.Module) -> float:
        return float(not any(isinstance(m, convsplit.SeparableConv2d) for m in model.modules()))

    with pytest.raises(ValueError, match=r"cannot be met.*skip=\["):
        convsplit.convert(noisy, calibration=images(), budget=Budget(metric=impossible, lost=0.0), forms=QUICK)
    found = known.search(Budget(metric=impossible, lost=0.5), most=2)
    assert not found.met
    assert "missed" in found.summary()
    assert 'then="distill"' in found.summary()
    assert f"skip={list(found.costliest)!r}" in found.summary()
    assert set(found.costliest) <= {layer.name for layer in found.plan.split}

    def nothing(*_: Any) -> None:
        pass

    tuned = known.search(Budget(metric=impossible, lost=0.5), most=1, then=nothing)
    assert "fine-tuning, for longer" in tuned.summary()
    with pytest.raises(ValueError, match="by converting and repairing. The nearest"):
        tuned.checked()


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_what_is_said_of_a_metric_are_its_figures_and_the_loss_that_was_allowed(
    known: Any, relative: bool, lower: bool
) -> None:
    budget = Budget(metric=brightness, lost=0.05, relative=relative, lower_is_better=lower)
    found = known.search(budget, most=1)
    before, after = brightness(net()), found.chosen.quality.value
    assert f"the metric is {share(after)} instead of {share(before)}" in found.summary()
    assert ("worse" in found.summary()) == ((after > before) if lower else (after < before))
    allowed = f"(allowed: {share(0.05 * before)}, 5.0 % of the original's)" if relative else "(allowed: 0.05)"
    assert allowed in found.summary()
    assert "held-out" not in found.summary()  # a metric has inputs of its own


def test_what_is_as_fast_as_can_be_says_how_fast_that_is() -> None:
    def by_parameters(model: nn.Module, batch: Any) -> Any:
        milliseconds = sum(p.numel() for p in model.parameters()) / 1000
        return lambda: milliseconds

    data = list(images(48).split(24))
    known = convsplit.study(net(), calibration=data, forms=QUICK, progress=False)
    stopwatch = convsplit.Stopwatch(seconds=0.1, runtime=by_parameters)
    found = known.search(Budget(drift=0.5, minimise="latency"), most=1, stopwatch=stopwatch)
    slow, fast = found.plan.model_milliseconds
    assert f"{milliseconds(slow)} -> {milliseconds(fast)} milliseconds" in found.summary()
    assert "ms" in found.table().headings
    assert found.records()[0]["milliseconds"] == fast
    assert "ms" not in known.search(Budget(drift=0.5), most=1).table().headings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": Budget(drift=0.1)}, "give calibration="),
        ({"budget": Budget(drift=0.1), "calibration": torch.randn(1, 3, 12, 12)}, "give more inputs"),
        ({"then": "prune", "calibration": torch.randn(1, 3, 12, 12)}, "'reconstruct', 'distill'"),
        ({"then": "distill"}, "give calibration="),
        ({"seconds": 3.0}, "say then="),
        ({"budget": Budget(drift=0.1), "rank": 1}, "budget= and rank="),
        (
            {"budget": Budget(drift=0.1), "rank": 1, "then": "distill", "calibration": torch.randn(1, 3, 12, 12)},
            "rank=",
        ),
    ],
)
def test_bad_requests_say_what_to_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convsplit.convert(net(), **options)


def test_agreement_needs_classes() -> None:
    model = net()[:4]
    with pytest.raises(ValueError, match="ask for drift="):
        convsplit.convert(model, calibration=images(12), budget=Budget(agreement=0.9))


def test_held_out_inputs_are_spread_and_none_is_lost() -> None:
    data = checked_batches([(torch.arange(n).float().view(n, 1, 1, 1) + 100 * i,) for i, n in enumerate((5, 4, 3))])
    kept, held = hold_out(data, 0.25)
    numbers = [torch.cat([batch[0].flatten() for batch in side]).tolist() for side in (kept, held)]
    assert len(numbers[1]) == 3
    assert sorted(numbers[0] + numbers[1]) == sorted(torch.cat([batch[0].flatten() for batch in data]).tolist())
    whole = checked_batches([([torch.randn(3, 8, 8), torch.randn(3, 9, 9)],) for _ in range(4)])  # lists of images
    kept, held = hold_out(whole, 0.5)
    assert (len(kept), len(held)) == (2, 2)
    for impossible in (0.0, 1.0, 2):
        with pytest.raises(ValueError, match="held_out"):
            hold_out(data, impossible)


def test_gains_predict_what_an_error_does_to_the_output() -> None:
    """Noise of independent signs in one layer's output moves the model's output as far as its gain says."""
    model, data = net().double(), images(64).double()
    gains = measure_gains(model, ["0", "2"], [data])
    with torch.no_grad():
        clean = model(data)
        for name, gain in gains.items():
            noise = torch.Generator().manual_seed(1)

            def disturb(module: nn.Module, args: Any, y: Tensor, noise: torch.Generator = noise) -> Tensor:
                return y + 1e-3 * y * (2 * torch.randint(2, y.shape, generator=noise) - 1)

            handle = model.get_submodule(name).register_forward_hook(disturb)
            moved = (model(data) - clean).square().sum() / clean.square().sum()
            handle.remove()
            assert float(moved) == pytest.approx(1e-6 * gain, rel=0.35)


def test_predicted_drift_rises_as_less_is_kept(known: Any) -> None:
    drifts = [known.predicted_drift(known.plan(Budget(params=kept))) for kept in (1.0, 0.7, 0.4, 0.2)]
    assert drifts[0] == 0
    assert drifts == sorted(drifts)


def test_intervals_hold_what_they_should() -> None:
    """In 95 of 100 samples, about, the interval holds the true value; here in no fewer than 85."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        changed = int((torch.rand(150, generator=generator) < 0.03).sum())
        low, high = wilson(changed, 150)
        inside += low <= 0.03 <= high
    assert inside >= 85
    model, converted = net(), convsplit.convert(net(), rank=1, forms="dw-pw")
    true = convsplit.compare(converted, model, images(2000, seed=9)).drift.relative
    inside = 0
    for seed in range(40):
        quality = HeldOut(model, [images(60, seed=100 + seed)], None, Budget(drift=0.1)).measure(converted)
        inside += quality.low <= true <= quality.high
    assert inside >= 34
