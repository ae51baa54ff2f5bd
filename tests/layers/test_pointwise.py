"""1x1 kernels: two pointwise stages, the best there are of that rank, with and without data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import convsplit
from convsplit import Budget, SeparableConv
from convsplit.forms import FORMS, POINTWISE
from convsplit.model.graphs import trace
from convsplit.model.sites import find_sites
from convsplit.spec import CONVOLUTIONS, Convolution

ALL = (*FORMS, "pw-pw")


def convs(axes: int, transposed: bool) -> list[Convolution]:
    """Of stride 1 and 2, padded and grouped: the first stage has it all."""
    torch.manual_seed(0)
    found = []
    for stride, groups, bias in itertools.product((1, 2), (1, 2), (True, False)):
        further: dict[str, Any] = {"output_padding": stride - 1} if transposed else {"padding": 1}
        kind = CONVOLUTIONS[axes, transposed]
        found.append(kind(8, 6, 1, stride, groups=groups, bias=bias, dtype=torch.float64, **further))  # type: ignore[arg-type]
    return found


def maps(conv: Convolution, count: int = 2) -> Tensor:
    return torch.randn(count, 8, *(5, 6, 4)[: conv.weight.dim() - 2], dtype=conv.weight.dtype)


@pytest.mark.parametrize("kind", CONVOLUTIONS, ids=lambda kind: CONVOLUTIONS[kind].__name__)
def test_exact_merged_and_what_it_costs(kind: tuple[int, bool]) -> None:
    for conv in convs(*kind):
        exact, x = SeparableConv.from_conv(conv, form="pw-pw", rank=10**6), maps(conv)
        assert list(exact.stages) == ["pointwise_in", "pointwise_out"]
        torch.testing.assert_close(exact(x), conv(x), rtol=1e-9, atol=1e-9)
        layer = SeparableConv.from_conv(conv, form="pw-pw", rank=2)
        torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-9, atol=1e-9)
        scale, shift = torch.randn(2, 6, dtype=torch.float64)
        expected = layer(x) * scale.view(-1, *[1] * kind[0]) + shift.view(-1, *[1] * kind[0])
        layer.absorb(scale, shift)
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
        with FlopCounterMode(display=False) as counter:
            y = layer(x[:1])
        macs = POINTWISE.macs(layer.spec, layer.components, tuple(x.shape[2:]), tuple(y.shape[2:]))
        assert 2 * macs == counter.get_total_flops()
        weights = sum(p.numel() for p in layer.parameters()) - 6
        assert POINTWISE.params(layer.spec, layer.components) == weights


def test_it_is_the_truncated_svd() -> None:
    conv = nn.Conv2d(20, 12, 1, dtype=torch.float64)
    values = torch.linalg.svdvals(conv.weight.detach().flatten(1))
    for rank in (1, 5, 11):
        error = float((SeparableConv.from_conv(conv, form="pw-pw", rank=rank).weight - conv.weight).detach().norm())
        assert error == pytest.approx(float(values[rank:].norm()), rel=1e-9)
        predicted = POINTWISE.curve(conv.weight.detach().reshape(1, 12, 20, 1), [rank]).errors[0]
        assert predicted == pytest.approx(error / float(values.norm()), rel=1e-9)


def test_with_data_it_is_the_best_of_its_rank_for_them() -> None:
    """Reduced-rank regression: the truncated SVD of the weight times the root of the inputs' second moments."""
    torch.manual_seed(0)
    conv, mixing = nn.Conv2d(16, 12, 1), torch.randn(16, 16) * 0.7 ** torch.arange(16)
    x = torch.einsum("ij,njhw->nihw", mixing, torch.randn(64, 16, 6, 6))
    layer = SeparableConv.from_conv(conv, form="pw-pw", rank=3)
    plain = (layer(x) - conv(x)).norm()
    convsplit.refit(layer, conv, x, target="layer", ridge=1e-9)
    centred = x.transpose(0, 1).flatten(1).double()
    centred = centred - centred.mean(1, keepdim=True)
    moved = conv.weight.detach().double().flatten(1) @ centred
    best = torch.linalg.svdvals(moved)[3:].norm()
    assert plain > 1.2 * best
    assert float((layer(x) - conv(x)).norm()) == pytest.approx(float(best), rel=1e-2)


def bottleneck() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 24, 1, stride=2), nn.Conv2d(24, 24, 1, groups=24),
    ).eval()  # fmt: skip
    model[5].weight.data = (torch.randn(24, 5) @ torch.randn(5, 32) / 12).reshape(24, 32, 1, 1)
    return model


def test_they_are_split_where_their_form_is_asked_for(tmp_path: Path) -> None:
    model, x = bottleneck(), torch.randn(16, 8, 9, 9)
    left = {site.name: site.reason for site in find_sites(model, trace(model), pointwise=True)}
    assert left == {"0": "", "3": "", "5": "", "6": "1x1 kernel with one input or output: of rank 1 as it is"}
    assert {site.name for site in convsplit.study(model, forms=ALL).sites if site.splittable} == {"0", "3", "5"}
    converted = convsplit.convert(model, calibration=x, forms=ALL, budget=Budget(params=0.3, of="model"))
    forms = {name: m.form for name, m in converted.named_modules() if isinstance(m, SeparableConv)}
    assert forms["5"] == "pw-pw"
    assert (
        sum(p.numel() for p in converted.parameters()) <= 0.3 * sum(p.numel() for p in model.parameters()) + 64
    )  # and biases
    convsplit.save(converted, tmp_path / "small.safetensors")
    assert torch.equal(convsplit.load(tmp_path / "small.safetensors", bottleneck())(x), converted(x))
    torch.testing.assert_close(convsplit.merge(converted)(x), converted(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(convsplit.for_inference(converted)(x), converted(x), rtol=1e-4, atol=1e-5)
    exact = convsplit.convert(model, exact=True, forms=ALL)
    torch.testing.assert_close(exact(x), model(x), rtol=1e-4, atol=1e-5)
    other = convsplit.convert(model, forms="pw-pw", rank=4)
    assert [m.components for m in other.modules() if isinstance(m, SeparableConv)] == [4, 4]


def test_budgets_of_the_whole_model_need_them() -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 256, 1))
    with pytest.raises(ValueError, match='cannot be met.*with "pw-pw" among forms=, 1x1 kernels'):
        convsplit.make_plan(model, budget=Budget(params=0.25, of="model"), forms=tuple(FORMS))
    plan = convsplit.make_plan(model, budget=Budget(params=0.25, of="model"), forms=ALL)
    assert plan.totals()["model_params_after"] <= 0.25 * plan.model_params
