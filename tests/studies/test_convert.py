"""convert, make_plan, apply_plan, merge: the main job, end to end."""

import json
import warnings

import pytest
import torch
from residual import SmallNet, Untraceable, images, small_net
from timm.layers import StdConv2d
from torch import Tensor, nn

import convsplit
from convsplit import Budget, Plan, SeparableConv2d
from convsplit.forms import FORMS


def conv_params(model: nn.Module) -> int:
    """Parameters of k x k convolutions, split or not."""
    kinds = (nn.Conv2d, SeparableConv2d)
    tops = [m for name, m in model.named_modules() if isinstance(m, kinds) and "wise" not in name]
    return sum(p.numel() for m in tops for p in m.parameters())


def split_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, SeparableConv2d)]


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_the_budget_is_kept_and_used(fraction, with_inputs):
    model = small_net()
    converted = convsplit.convert(model, images() if with_inputs else None, budget=Budget(params=fraction))
    assert type(converted) is SmallNet
    biases = sum(m.bias.numel() for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    kept = (conv_params(converted) - biases) / (conv_params(model) - biases)
    assert 0.85 * fraction < kept <= fraction
    assert converted(images()).shape == model(images()).shape


def test_half_is_the_default():
    assert convsplit.make_plan(small_net()).budget == Budget(params=0.5)


def test_macs_budget():
    model = small_net()
    plan = convsplit.make_plan(model, images(), budget=Budget(macs=0.4))
    totals = plan.totals()
    assert 0.3 < totals["macs_after"] / totals["macs_before"] <= 0.4
    report = convsplit.compare(convsplit.apply_plan(model, plan), model, images())
    assert report.macs == (totals["model_macs_before"], totals["model_macs_after"])
    assert report.params == (totals["model_params_before"], totals["model_params_after"])


def test_error_budget():
    plan = convsplit.make_plan(small_net(), budget=Budget(error=0.3))
    assert plan.totals()["largest_error"] <= 0.3
    assert plan.totals()["params_after"] < plan.totals()["params_before"]


@pytest.mark.parametrize("forms", [*FORMS, tuple(FORMS)], ids=str)
def test_exact_at_full_rank(forms):
    model, x = small_net(dtype=torch.float64), images(dtype=torch.float64)
    converted = convsplit.convert(model, exact=True, forms=forms)
    assert len(split_names(converted)) == 6
    torch.testing.assert_close(converted(x), model(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("forms", ["dw-pw", "pw-dw"])
def test_rank_one_is_the_classical_separable_convolution(forms):
    converted = convsplit.convert(small_net(), rank=1, forms=forms)
    layer = converted.blocks[0].conv1
    assert layer.rank == 1
    assert [stage.groups for stage in layer.stages.values()] in ([16, 1], [1, 16])


def test_no_layer_ends_with_more_than_before():
    for rank in (1, 2, 5, 40):
        plan = convsplit.make_plan(small_net(), images(), rank=rank)
        for layer in plan.split:
            assert layer.params[1] < layer.params[0]
            assert layer.macs[1] < layer.macs[0]


@pytest.mark.parametrize("budget", [Budget(params=0.5), Budget(params=0.25)])
def test_traced_or_not_the_conversion_is_the_same(budget):
    traced, untraced = small_net(SmallNet), small_net(Untraceable)
    for inputs in (None, images()):
        one, two = (convsplit.convert(m, inputs, budget=budget).state_dict() for m in (traced, untraced))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_same_seed_same_result():
    one, two = (convsplit.convert(small_net(), seed=7).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_model_is_never_touched():
    model = small_net().train()
    model.blocks[0].bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    converted = convsplit.convert(model, images())
    convsplit.compare(converted, model, images())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [m.training for m in converted.modules() if not isinstance(m, SeparableConv2d)]
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in converted.parameters()}
    assert not shared


def test_merge_is_dense_and_equal():
    model, x = small_net(dtype=torch.float64), images(dtype=torch.float64)
    converted = convsplit.convert(model, budget=Budget(params=0.4))
    dense = convsplit.merge(converted)
    assert type(dense) is SmallNet
    assert dense.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(dense(x), converted(x), rtol=1e-9, atol=1e-10)


def test_skip_by_name_pattern_and_predicate():
    model = small_net()
    for skip in ("stem", "blocks.0.*", ["stem", "down"], lambda name, conv: conv.stride != (1, 1)):
        plan = convsplit.make_plan(model, skip=skip)
        assert [layer.reason for layer in plan.layers].count("skipped as asked") in (1, 2)
    with pytest.raises(ValueError, match=r"skip='body\.\*' matches no convolution; their names are stem"):
        convsplit.make_plan(model, skip="body.*")


def test_plans_are_values(tmp_path):
    model = small_net()
    plan = convsplit.make_plan(model, images(), seed=3)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan == Plan.from_json(plan.to_json())
    one, two = (convsplit.apply_plan(model, p)(images()) for p in (plan, Plan.load(tmp_path / "plan.json")))
    assert torch.equal(one, two)


def test_plans_print():
    text = str(convsplit.make_plan(small_net(), images(), skip="stem"))
    for piece in ("blocks.0.conv1", "16x16x3x3", "skipped as asked", "MACs", "Budget(params=0.5)"):
        assert piece in text


def test_plans_can_be_edited():
    model = small_net()
    plan = convsplit.make_plan(model).keep_dense("blocks.1.*").choose("stem", "dw-pw", rank=2)
    assert plan.layer("stem").option.structure.components == 6
    converted = convsplit.apply_plan(model, plan)
    assert type(converted.blocks[1].conv1) is nn.Conv2d
    assert converted.stem.rank == 2
    with pytest.raises(ValueError, match="matches no split layer"):
        plan.keep_dense("nothing")
    with pytest.raises(KeyError, match="no convolution 'steam' in the plan; it has stem"):
        plan.layer("steam")


def test_a_plan_applies_to_another_instance_and_fills_from_a_checkpoint():
    model, other = small_net(), small_net(seed=1)
    plan = convsplit.make_plan(model)
    converted = convsplit.apply_plan(model, plan)
    empty = convsplit.apply_plan(other, plan, initialise=False)
    empty.load_state_dict(converted.state_dict())
    assert torch.equal(empty(images()), converted(images()))


def test_a_plan_for_another_model_is_refused():
    plan = convsplit.make_plan(small_net())
    with pytest.raises(ValueError, match="the plan splits 'stem', a convolution; the model has no such module there"):
        convsplit.apply_plan(nn.Sequential(nn.Conv2d(3, 16, 3)), plan)
    model = small_net()
    model.stem = nn.Conv2d(3, 16, 5)
    with pytest.raises(ValueError, match="another 'stem'"):
        convsplit.apply_plan(model, plan)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", json.dumps({"format": 99}), '{"format": 1, "layers": [{}]}']
)
def test_what_is_not_a_plan_is_refused(text):
    with pytest.raises(ValueError, match="not a plan of convsplit"):
        Plan.from_json(text)


def test_a_model_that_is_a_convolution():
    conv = nn.Conv2d(8, 8, 3, dtype=torch.float64)
    converted = convsplit.convert(conv, exact=True)
    assert isinstance(converted, SeparableConv2d)
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(converted(x), conv(x), rtol=1e-9, atol=1e-10)
    assert type(convsplit.merge(converted)) is nn.Conv2d


def test_nothing_to_split_warns_and_copies():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with pytest.warns(convsplit.ConversionWarning, match=r"no convolution found in Sequential"):
        converted = convsplit.convert(model)
    assert converted is not model
    assert torch.equal(converted[1].weight, model[1].weight)


def test_not_a_module():
    with pytest.raises(TypeError, match="model is a str; want a torch.nn.Module"):
        convsplit.convert("resnet18")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forms": "dwpw"}, "unknown form 'dwpw'; the forms are 'dw-pw', 'pw-dw', 'pw-dw-pw'"),
        ({"forms": ()}, "forms is empty"),
        ({"rank": 0}, "rank=0: the rank is at least 1"),
        ({"rank": 1.5}, "rank=1.5: want a positive integer"),
        ({"rank": "half"}, "say exact=True"),
        ({"rank": 1, "budget": Budget(params=0.5)}, "give one of budget=, rank= and exact=, not budget= and rank="),
        ({"budget": Budget(params=0.001)}, r"cannot be met: the smallest that can is params=0\.\d+"),
        ({"budget": Budget(macs=0.5)}, "pass example_inputs"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(ValueError, match=message):
        convsplit.make_plan(small_net(), **arguments)


def test_wrong_example_inputs_name_the_module_and_the_shape():
    with pytest.raises(ValueError, match=r"module 'stem' \(Conv2d\) got \(2, 1, 8, 8\)"):
        convsplit.make_plan(small_net(), torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"forward=lambda model, batch: model\(batch\[0\]\)"):
        convsplit.make_plan(small_net(), (images(), torch.zeros(4)))


def test_layers_that_cannot_be_split_say_why():
    model = small_net()
    model.stem.weight.data[0] = float("nan")
    model.down = nn.LazyConv2d(32, 3)
    model.extra = nn.Conv2d(4, 4, 3, device="meta")
    plan = convsplit.make_plan(model)
    assert plan.layer("stem").reason == "NaN or infinite values in its weight"
    assert "run the model once first" in plan.layer("down").reason
    assert "meta device" in plan.layer("extra").reason
    assert len(plan.split) == 4


def test_dead_filters_and_zero_kernels():
    model, x = small_net(dtype=torch.float64), images(dtype=torch.float64)
    model.blocks[0].conv1.weight.data.zero_()
    model.blocks[1].conv1.weight.data[:5].zero_()
    model.blocks[1].conv2.weight.data[:, :5].zero_()
    converted = convsplit.convert(model, budget=Budget(params=0.5))
    assert torch.isfinite(converted(x)).all()
    assert converted.blocks[0].conv1.weight.abs().max() == 0


def test_compare_every_kind_of_output():
    class Wrapper(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.net, self.wrap = small_net(), wrap

        def forward(self, x):
            y = self.net(x)
            return self.wrap(y - y.mean(0))  # so that not all inputs have one class

    for wrap, agreement in (
        (lambda y: y, 1),
        (lambda y: (y, [y * 2]), 1),
        (lambda y: {"logits": y, "count": 3}, 1),
        (lambda y: {"a": (y, None)}, None),  # "a" may be anything: boxes, or an embedding
    ):
        model = Wrapper(wrap)
        report = convsplit.compare(convsplit.convert(model, exact=True), model, images())
        assert report.drift.relative < 1e-4
        assert report.drift.cosine == pytest.approx(1, abs=1e-6)
        assert report.agreement == agreement
        assert report.images == 4


def test_local_drift_is_the_layers_own_and_accumulated_has_everything_upstream():
    model = small_net()
    converted = convsplit.convert(model, budget=Budget(params=0.3))
    first, *_, last = convsplit.compare(converted, model, images()).layers
    assert first.local.relative == pytest.approx(first.accumulated.relative, rel=1e-5)
    assert last.local.relative < last.accumulated.relative


def test_compare_streams_batches():
    model = small_net()
    converted = convsplit.convert(model, budget=Budget(params=0.3))
    whole = convsplit.compare(converted, model, images(6))
    parts = convsplit.compare(converted, model, (batch for batch in images(6).split(2)))
    assert parts.drift.relative == pytest.approx(whole.drift.relative, rel=1e-5)
    assert parts.layers[0].accumulated.relative == pytest.approx(whole.layers[0].accumulated.relative, rel=1e-5)
    labelled = [(batch, torch.zeros(2)) for batch in images(6).split(2)]
    again = convsplit.compare(converted, model, labelled, forward=lambda m, batch: m(batch[0]))
    assert again.drift == parts.drift


def test_compare_refuses_nothing_and_strangers():
    model = small_net()
    with pytest.raises(ValueError, match="held no input"):
        convsplit.compare(convsplit.convert(model), model, [])
    with pytest.raises(ValueError, match="not its conversion"):
        convsplit.compare(convsplit.convert(model), nn.Sequential(nn.Conv2d(3, 3, 3)), images())


def test_functions_that_hold_on_to_the_original_are_named():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    first = model[0]
    model[2].register_forward_hook(lambda module, args, output: output + first.bias.sum())
    with pytest.warns(convsplit.ConversionWarning, match=r"hold on to parts of the original model.*<lambda> of 2"):
        convsplit.convert(model)
    harmless = nn.Sequential(nn.Conv2d(8, 8, 3)).eval()
    factor = 2.0
    harmless[0].register_forward_hook(lambda module, args, output: output * factor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", convsplit.ConversionWarning)
        convsplit.convert(harmless)


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_any_mode_around_a_conversion_gives_the_same_model(mode):
    model, x = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval(), torch.randn(16, 8, 9, 9)
    wanted = convsplit.convert(model, x[:1], calibration=x)
    with mode():
        found = convsplit.convert(model, x[:1], calibration=x)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in wanted.state_dict().items())
    assert all(parameter.requires_grad for parameter in found.parameters())
    found(x).sum().backward()  # nothing of the mode sticks to the parameters


def test_an_unknown_argument_is_named_with_those_there_are():
    with pytest.raises(TypeError, match=r"frontier\(\) has no argument 'inputs'; it takes model, example_inputs"):
        convsplit.frontier(small_net(), inputs=images())


NOTHING = {
    "pointwise": (
        nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)),
        r'already pointwise; "pw-pw" among forms= splits it \(2\)',
    ),
    "standardised": (nn.Sequential(StdConv2d(8, 8, 3)), r"standardises its weight at every call; bake=True .* \(1\)"),
    "patches": (nn.Sequential(nn.Conv2d(3, 32, 8, stride=8)), r"a patch embedding .* \(1\)"),
}


@pytest.mark.parametrize(("model", "reason"), NOTHING.values(), ids=NOTHING)
def test_where_nothing_can_be_split_the_reasons_are_given(model, reason):
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(2, convolution.in_channels, 16, 16)
    for how in ({}, {"budget": Budget(macs=0.5), "calibration": x}, {"budget": Budget(macs=0.5), "forms": "dw-pw"}):
        inputs = () if "calibration" in how or not how else (x,)
        with pytest.warns(
            convsplit.ConversionWarning, match=f"no convolution of Sequential can be split.*{reason}"
        ) as warned:
            convsplit.convert(model, *inputs, **how)
        assert len(warned) == 1


def test_what_was_asked_for_is_no_reason_to_warn():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convsplit.convert(model, skip="*")
        convsplit.convert(model, budget=Budget(params=1.0))


class AtHome(nn.Sequential):
    """As any model on a GPU: inputs that are elsewhere are refused."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device != self[0].weight.device:
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().forward(x)


def test_inputs_that_are_elsewhere_are_told_where_to_go() -> None:
    with pytest.raises(ValueError, match=r"The model is on cpu, the inputs on meta: .*batch\.to\('cpu'\)"):
        convsplit.make_plan(AtHome(nn.Conv2d(3, 8, 3)), torch.randn(1, 3, 9, 9, device="meta"))


def test_devices_without_float64_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convsplit.model.sites.WITHOUT_FLOAT64", ("cpu",))
    with pytest.warns(convsplit.ConversionWarning, match=r"on cpu, which has no float64: convert model\.cpu\(\)"):
        convsplit.convert(small_net(), calibration=images(8))
