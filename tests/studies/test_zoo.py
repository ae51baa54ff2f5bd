"""Every model of torchvision and one of every timm family: exact at full rank, what is left alone explained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.suites import zoo

# One of each kind: plain, residual, branching, squeezed, grouped, inverted, segmenting, without convolutions.
QUICK = {
    "resnet18", "googlenet", "squeezenet1_1", "shufflenet_v2_x0_5", "regnet_x_400mf", "mobilenet_v3_small",
    "mnasnet0_5", "vit_b_16", "vgg11", "resnext101_64x4d", "mvit_v1_b", "lraspp_mobilenet_v3_large",
}  # fmt: skip
ALL = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in zoo.names()]


def skip_if_missing(name: str) -> None:
    if name.startswith("timm/"):
        timm = pytest.importorskip("timm")
        if not timm.is_model(name.removeprefix("timm/")):
            pytest.skip("not in this version of timm")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL)
def test_zoo(name: str) -> None:
    skip_if_missing(name)
    result = zoo.examine(name, zoo.LARGEST_IN_TESTS)
    bar = 1e-9 if zoo.precision(name) == torch.float64 else 1e-3
    assert result.difference is None or result.difference < bar
    assert result.split + sum(result.left.values()) == result.sites


LARGEST_REPAIRED = 15e6  # parameters
BLOCKS = {"resnet50"}  # larger, and of blocks that no smaller model has


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL)
def test_every_model_is_repaired(name: str) -> None:
    skip_if_missing(name)
    if name not in BLOCKS and not zoo.is_repaired(name, LARGEST_REPAIRED):
        pytest.skip("too large for the tests, or for video")
    assert all(layer.after <= layer.before for layer in zoo.repair(name))


def test_the_zoo_is_complete() -> None:
    assert len(zoo.torchvision_names()) > 100
    assert len(set(zoo.TIMM.split())) > 90
