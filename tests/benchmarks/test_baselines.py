"""The baselines are what they say: exact where nothing is cut off, within their budgets, and not worse by mistake."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tensorly as tl
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.baselines import packages  # noqa: E402
from benchmarks.baselines.sequences import (  # noqa: E402
    BASELINES,
    Chain,
    convolutions,
    cost,
    largest_rank,
    split_equally,
)

SVD = [baseline for baseline in BASELINES if "parafac" not in baseline.name]
names = {"ids": lambda baseline: baseline.name}


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@pytest.mark.parametrize("baseline", SVD, **names)
def test_the_whole_rank_is_exact(baseline) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 8, (3, 5), (2, 1), (1, 2)), torch.randn(2, 6, 9, 9)
    rank = baseline.most(conv)
    with torch.no_grad():
        torch.testing.assert_close(
            baseline.fit(conv, baseline.stages(conv, rank), rank)(x), conv(x), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("baseline", [b for b in BASELINES if "parafac" in b.name], **names)
def test_what_has_a_low_rank_is_found(baseline) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 8, 3, 2, 1), torch.randn(2, 6, 9, 9)
    factors = [torch.randn(size, 2) for size in conv.weight.shape]
    with torch.no_grad():
        conv.weight.copy_(torch.einsum("or,ir,hr,wr->oihw", *factors))
        torch.testing.assert_close(baseline.fit(conv, baseline.stages(conv, 2), 2)(x), conv(x), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("baseline", BASELINES, **names)
def test_every_layer_keeps_the_largest_rank_within_its_budget(baseline, kind: str, model: nn.Module) -> None:
    for conv, shape in convolutions(model, torch.randn(1, 3, 10, 10)).values():
        rank, limit = largest_rank(conv, shape, kind, 0.5, baseline), 0.5 * cost(Chain(conv), shape, kind)
        if rank:
            assert cost(baseline.stages(conv, rank), shape, kind) <= limit
        if rank < baseline.most(conv):
            assert cost(baseline.stages(conv, rank + 1), shape, kind) > limit


def test_costs_are_those_that_torch_counts(model: nn.Module) -> None:
    image = torch.randn(1, 3, 10, 10)
    found = convolutions(model, image)
    assert set(found) == {"0", "2"}
    pointwise = 16 * 8 * 5 * 5
    counted = sum(cost(Chain(conv), shape, "macs") for conv, shape in found.values())
    assert counted + pointwise == packages.multiply_adds(model, image)
    smaller = split_equally(model, image, "macs", 0.5, BASELINES[2])
    assert packages.multiply_adds(smaller, image) <= 0.5 * counted + pointwise
    assert smaller(image).shape == model(image).shape


def test_the_least_is_removed(model: nn.Module) -> None:
    def widths(part: float) -> nn.Module:
        return nn.Linear(10, round(100 * (1 - part)), bias=False)

    assert packages.parameters(packages.least_removed(widths, packages.parameters, 500)) == 500

    def often(part: float) -> nn.Module:
        if part == 0.5:
            raise RuntimeError("sizes do not match")
        return widths(part)

    assert packages.parameters(packages.least_removed(often, packages.parameters, 500)) == 470


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
@pytest.mark.parametrize("package", ["tltorch", "torch_pruning", "fasterai"])
def test_packages_give_models_that_run(package: str, model: nn.Module) -> None:
    pytest.importorskip(package)
    image = torch.randn(1, 3, 10, 10)
    if package == "tltorch":
        with tl.backend_context("pytorch"):  # which the package sets for good
            made = [split_equally(model, image, "params", 0.5, baseline) for baseline in packages.tensorly_torch()]
    elif package == "torch_pruning":
        classifier = nn.Sequential(model, nn.Linear(8, 4)).eval()
        made = [packages.torch_pruning(classifier, image)(0.5)]
    else:
        made = [packages.fasterai(model, method)(0.5) for method in ("tucker", "svd", "spatial", "cp")]
    for each in made:
        assert packages.parameters(each) < packages.parameters(model) + 36
        assert each(image).isfinite().all()
