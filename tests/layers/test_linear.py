"""Linear layers, where they are asked for: two of lower rank, through their whole life."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import convsplit
from convsplit import Budget, SeparableConv, Stopwatch
from convsplit.data.following import see_what_follows
from convsplit.forms import POINTWISE
from convsplit.layers.separable import SeparableLinear
from convsplit.model.graphs import trace
from convsplit.model.sites import find_sites
from convsplit.runtimes import RUNTIMES


class Mixer(nn.Module):
    """A convolution, a block of a transformer with its attention, and a classifier with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.up, self.down, self.layer_norm = nn.Linear(16, 48), nn.Linear(48, 16, bias=False), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu().flatten(2).transpose(1, 2)
        x = x + self.down(self.up(x).relu())
        y = self.layer_norm(x)
        x = x + self.attention(y, y, y)[0]
        return self.head(x.mean(1))


def mixer() -> Mixer:
    torch.manual_seed(0)
    model = Mixer()
    for layer in (model.up, model.down, model.head[0]):
        U, S, V = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        layer.weight.data = U * (S * 0.8 ** torch.arange(len(S))) @ V * 3  # a falling spectrum, as trained ones have
    return model.eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def small(model: nn.Module, x: Tensor, kept: float = 0.6) -> nn.Module:
    return convsplit.convert(model, calibration=list(x.split(32)), budget=Budget(params=kept), linear=True)


@pytest.mark.parametrize("leading", [(), (5,), (2, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_exact_merged_and_what_it_costs(leading: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 8, bias=bias, dtype=torch.float64), torch.randn(*leading, 12, dtype=torch.float64)
    exact = SeparableConv.from_conv(linear, form="pw-pw", rank=10**6)
    assert type(exact) is SeparableLinear
    torch.testing.assert_close(exact(x), linear(x), rtol=1e-9, atol=1e-9)
    layer = SeparableConv.from_conv(linear, form="pw-pw", rank=3)
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-9, atol=1e-9)
    values = torch.linalg.svdvals(linear.weight)
    torch.testing.assert_close((merged.weight - linear.weight).norm(), values[3:].norm())
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert 2 * POINTWISE.macs(layer.spec, 3, (), ()) * x[..., 0].numel() == counter.get_total_flops()
    assert POINTWISE.params(layer.spec, 3) == sum(p.numel() for p in layer.parameters()) - 8 * bias
    scale, shift = torch.randn(2, 8, dtype=torch.float64)
    expected = layer(x) * scale + shift
    layer.absorb(scale, shift)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_it_has_the_metadata_of_a_linear_layer_and_no_other() -> None:
    layer = SeparableLinear(12, 8, rank=2)
    assert (layer.in_features, layer.out_features, layer.rank, tuple(layer.weight.shape)) == (12, 8, 2, (8, 12))
    with torch.no_grad():
        layer.weight *= 2.0  # folding writes to it
    with pytest.raises(AttributeError):
        layer.stride = 2
    with pytest.raises(ValueError, match="is for maps"):
        layer.arrangement = "by image"
    with pytest.raises(ValueError, match="form 'dw-pw' filters maps; a linear layer is split as 'pw-pw'"):
        SeparableConv.from_conv(nn.Linear(4, 4))


def reasons(model: nn.Module, x: Tensor | None = None, **options: Any) -> dict[str, str]:
    return {site.name: site.reason for site in find_sites(model, trace(model, x), **options)}


def test_each_that_is_left_alone_has_a_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.narrow, self.read = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 8)
            self.embedding, self.tied = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
            self.tied.weight = self.embedding.weight
            self.own = type("Scaled", (nn.Linear,), {})(8, 8)
            self.computed = parametrizations.weight_norm(nn.Linear(8, 8))
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.computed(self.own(self.tied(self.plain(x))))
            return self.narrow(F.linear(F.linear(x, self.read.weight), self.weight))

    assert reasons(Odd()) == {}
    found = reasons(Odd(), linear=True)
    assert found.pop("own").endswith("Scaled may compute more than Linear does (see convsplit.kinds.register)")
    assert found.pop("read").startswith("F.linear uses its weight")
    assert found.pop("computed").endswith("_WeightNorm; bake=True splits the weight that runs")
    (functional,) = [name for name in found if name.startswith("linear")]
    assert found.pop(functional).startswith("F.linear with the parameter weight")
    assert found.pop("tied") == "shares a parameter with another module"
    assert found == {"plain": "", "narrow": "one input or output: of rank 1 as it is"}
    assert reasons(Odd(), linear=True, bake=True)["computed"] == ""
    assert reasons(nn.LazyLinear(3), linear=True) == {"": "LazyLinear has no weight yet: run the model once first"}


def test_attention_is_left_alone_and_the_plan_says_why() -> None:
    model, x = mixer(), images(4)
    assert [layer.name for layer in convsplit.make_plan(model, x).layers] == ["stem"]
    plan = convsplit.make_plan(model, x, linear=True, budget=Budget(params=0.5))
    assert {layer.name for layer in plan.split} <= {"stem", "up", "down", "head.0", "head.3"}
    assert plan.layer("attention.out_proj").reason == "nn.MultiheadAttention uses its weight without calling it"
    assert convsplit.Plan.from_json(plan.to_json()) == plan
    rows = 16  # positions of an image's map
    assert plan.layer("up").macs[0] == 16 * 48 * rows
    assert plan.layer("head.0").macs[0] == 16 * 32


def test_repair_is_reduced_rank_regression_over_all_rows() -> None:
    """The best of its rank for the inputs: a truncated SVD in the metric of their second moments."""
    torch.manual_seed(0)
    linear, mixing = nn.Linear(16, 12), torch.randn(16, 16) * 0.7 ** torch.arange(16)
    x = torch.randn(64, 6, 16) @ mixing.mT
    layer = SeparableConv.from_conv(linear, form="pw-pw", rank=3)
    plain = (layer(x) - linear(x)).norm()
    convsplit.refit(layer, linear, x, target="layer", ridge=1e-9)
    rows = x.flatten(0, 1).double()
    moved = (rows - rows.mean(0)) @ linear.weight.detach().double().mT
    best = torch.linalg.svdvals(moved)[3:].norm()
    assert plain > 1.2 * best
    assert float((layer(x) - linear(x)).detach().norm()) == pytest.approx(float(best), rel=1e-2)


def test_batch_norm_over_the_rows_is_not_taken_for_that_of_the_channels() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x)).relu()

    model = Rows().eval()
    model.norm.running_mean.normal_()
    by_row = see_what_follows(model, ["linear"], torch.randn(4, 6, 8), None).tails["linear"]
    by_channel = see_what_follows(model, ["linear"], torch.randn(4, 8), None).tails["linear"]
    assert by_row.scale is by_row.ceiling is None
    assert by_channel.scale is not None
    x = torch.randn(64, 6, 8)
    converted = small(model, x, 0.9)
    assert isinstance(converted.linear, SeparableLinear)
    deployed = convsplit.for_inference(converted, x)
    torch.testing.assert_close(deployed(x), converted(x))


def test_repaired_trained_kept_and_compared(tmp_path: Path) -> None:
    model, x, held_out = mixer(), images(256), images(64, seed=2)
    plain = convsplit.convert(model, x[:1], budget=Budget(params=0.6), linear=True)
    converted = small(model, x)
    split = {name for name, layer in converted.named_modules() if isinstance(layer, SeparableLinear)}
    assert len(split) >= 2
    before, after = (convsplit.compare(each, model, held_out).drift.relative for each in (plain, converted))
    assert after < 0.8 * before
    report = convsplit.compare(converted, model, held_out)
    assert split <= {layer.name for layer in report.layers}
    assert {"attention.out_proj"} <= {layer.name for layer in report.kept}
    trained = copy.deepcopy(converted)
    blocks = convsplit.reconstruct(trained, model, list(x.split(32)), steps=20)
    assert any(block.after < block.before for block in blocks)
    convsplit.distill(trained, model, list(x.split(32)), epochs=2)
    assert convsplit.compare(trained, model, held_out).drift.relative < 1.05 * after
    convsplit.save(converted, tmp_path / "small.safetensors")
    assert torch.equal(convsplit.load(tmp_path / "small.safetensors", mixer())(x), converted(x))
    merged = convsplit.merge(converted)
    assert [type(module) for module in merged.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(merged(x), converted(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(convsplit.for_inference(converted, x)(x), converted(x), rtol=1e-4, atol=1e-5)
    exact = convsplit.convert(model, exact=True, linear=True)
    torch.testing.assert_close(exact(x), model(x), rtol=1e-4, atol=1e-5)


def test_exported(tmp_path: Path) -> None:
    x = images(2)
    converted = small(mixer(), images(64))
    done = convsplit.export(converted, tmp_path / "model.onnx", x, seconds=0.05)
    assert done.difference < 1e-4
    torch.testing.assert_close(torch.export.export(converted, (x,)).module()(x), converted(x))
    torch.testing.assert_close(torch.jit.script(converted)(x), converted(x))


def test_restored_from_any_checkpoint_and_a_dense_one_split_as_they_are() -> None:
    model, x = mixer(), images(8)
    converted = small(model, images(64))
    restored = convsplit.restore(mixer(), {f"module.{name}": value for name, value in converted.state_dict().items()})
    assert torch.equal(restored(x), converted(x))
    split = convsplit.restore(converted, model.state_dict(), factorise=True)
    assert [type(module) for module in split.modules()] == [type(module) for module in converted.modules()]
    with pytest.raises(RuntimeError, match="up is split here, and dense in the state_dict"):
        converted.load_state_dict(model.state_dict())


@pytest.mark.clock
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
@pytest.mark.parametrize("leading", [(64,), (4, 16)], ids=str)
def test_measured(runtime: str, leading: tuple[int, ...]) -> None:
    if RUNTIMES[runtime].missing:
        pytest.skip(f"{runtime} is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    x, stopwatch = torch.randn(*leading, 512), Stopwatch(1.0, runtime=runtime)
    plan = convsplit.make_plan(model, x, linear=True, budget=Budget(params=0.25), prefer="speed", stopwatch=stopwatch)
    assert plan.split
    assert all(layer.dense.milliseconds > layer.option.milliseconds > 0 for layer in plan.split)


def test_one_rank_means_one_thing() -> None:
    model, x = mixer(), images(2)
    with pytest.raises(ValueError, match=r'CP rank of "pw-dw-pw" \(of "pw-pw" and linear layers that of a matrix\)'):
        convsplit.make_plan(model, x, rank=2, linear=True)
    plan = convsplit.make_plan(model, x, rank=2, linear=True, forms="pw-dw-pw")
    assert {layer.option.structure.components for layer in plan.split} == {2}


def test_budgets_of_the_whole_model_need_them() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 256), nn.Linear(256, 256)
    )
    with pytest.raises(ValueError, match="cannot be met.*with linear=True, linear layers"):
        convsplit.make_plan(model, budget=Budget(params=0.4, of="model"))
    plan = convsplit.make_plan(model, budget=Budget(params=0.4, of="model"), linear=True)
    assert plan.totals()["model_params_after"] <= 0.4 * plan.model_params


def test_transformers_run_without_their_fast_path() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).double().eval()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    exact = convsplit.convert(model, x, exact=True, linear=True)
    assert isinstance(exact.linear1, SeparableLinear)
    with torch.no_grad():
        torch.testing.assert_close(exact(x), model(x), rtol=1e-9, atol=1e-9)


def test_wide_ones_are_repaired_in_closed_form_without_moments_of_their_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("convsplit.data.moments.WIDEST", 100)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 24), nn.Linear(24, 3)
    )
    x = torch.randn(128, 4, 6, 6)
    known = convsplit.study(model, calibration=list(x.split(32)), linear=True)
    assert set(known.marginals) == {"0", "4"}
    plan = known.plan(Budget(params=0.4))
    assert plan.layer("3").split
    before = convsplit.compare(convsplit.apply_plan(model, plan), model, x).drift.relative
    assert convsplit.compare(known.apply(plan), model, x).drift.relative < 0.9 * before


def test_messages_speak_of_layers_where_linear_ones_are_meant():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    known = convsplit.study(model, linear=True)
    plan = convsplit.make_plan(model, linear=True, rank=2, forms="pw-dw-pw")
    assert known.summary().startswith("2 of 2 layers can be split")
    assert plan.summary().startswith("2 of 2 splittable layers are split")
    with pytest.raises(KeyError, match="no layer 'nine' in the plan; it has 0, 2"):
        plan.layer("nine")
    with pytest.raises(ValueError, match="the plan splits '0', a layer; the model has a ReLU there"):
        convsplit.apply_plan(nn.Sequential(nn.ReLU()), plan)
    with pytest.raises(ValueError, match=r"matches no layer; their names are 0, 2"):
        convsplit.study(model, linear=True, skip="nine")
    with pytest.warns(convsplit.ConversionWarning, match=r"no convolution and no linear layer found in Sequential"):
        convsplit.convert(nn.Sequential(nn.ReLU()), linear=True)
    with pytest.warns(convsplit.ConversionWarning, match=r"no layer of Sequential can be split"):
        convsplit.convert(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))), linear=True)
