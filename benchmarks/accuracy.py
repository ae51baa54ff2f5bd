"""Accuracy that trained networks keep after conversion, without data and with label-free repair; no training at all.

    python benchmarks/accuracy.py NETWORKS.py [--depths 20 56] [--kept 0.5 0.25 0.125] [--images 512] [--ways ...]

NETWORKS.py defines `resnet(depth)`, a trained network in eval mode, and `cifar10()`, which returns training images and
labels, test images and labels. Prints a Markdown table: points of test accuracy lost against the dense network, top-1
agreement with it and relative drift of the logits, on the test images. A seed chooses the calibration images.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor, nn

import convsplit
from convsplit import Budget
from convsplit.tables import Table

if TYPE_CHECKING:  # it lies elsewhere in earlier versions, which this is run with to compare
    from convsplit.choose.plan import Plan

Way = Callable[[nn.Module, Tensor, list[Tensor], float, int], nn.Module]


def equal_fractions(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    """The same fraction of every layer, CP: what allocation has to beat."""
    plan: Plan = convsplit.make_plan(model, image, budget=Budget(params=1.0), seed=seed)
    for layer in plan.layers:
        if layer.spec is not None and layer.dense is not None:
            O, I, K = layer.spec.out_channels, layer.spec.in_channels, layer.spec.positions
            plan = plan.choose(layer.name, "pw-dw-pw", rank=max(1, int(kept * O * I * K / (O + I + K))))
    return convsplit.apply_plan(model, plan)


def allocated(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    return convsplit.convert(model, image, budget=Budget(params=kept), seed=seed)


def refitted(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    return convsplit.convert(model, image, budget=Budget(params=kept), calibration=data, seed=seed)


def equal_refitted(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    converted = equal_fractions(model, image, data, kept, seed)
    convsplit.refit(converted, model, data, seed=seed)
    return converted


def last_stage_only(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    converted = allocated(model, image, data, kept, seed)
    convsplit.refit(converted, model, data, stages="last", seed=seed)
    return converted


def bias_corrected(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    converted = allocated(model, image, data, kept, seed)
    convsplit.refit(converted, model, data, stages="bias", dense=False, seed=seed)
    return converted


def recalibrated(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    converted = allocated(model, image, data, kept, seed)
    convsplit.repair.recalibrate(converted, data)
    return converted


def layer_by_layer(model: nn.Module, image: Tensor, data: list[Tensor], kept: float, seed: int) -> nn.Module:
    plan = convsplit.make_plan(model, image, budget=Budget(params=kept), calibration=data, seed=seed)
    converted = convsplit.apply_plan(model, plan)
    convsplit.refit(converted, model, data, target="layer", seed=seed)
    return converted


WAYS: dict[str, Way] = {
    "no data, equal fractions": equal_fractions,
    "no data": allocated,
    "no data, batch norm recalibrated": recalibrated,
    "no data, biases corrected": bias_corrected,
    "no data, last stages refitted": last_stage_only,
    "equal fractions, refitted": equal_refitted,
    "calibrated and refitted, target the layer": layer_by_layer,
    "calibrated and refitted": refitted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--images", type=int, nargs="+", default=[512])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    networks = load_networks(arguments.networks)
    train_x, _, test_x, test_y = networks.cifar10()
    rows = []
    for depth in arguments.depths:
        model = networks.resnet(depth)
        for kept in arguments.kept:
            for way in arguments.ways:
                for images in arguments.images:
                    for seed in arguments.seeds:
                        start = time.perf_counter()
                        order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
                        data = list(train_x[order[:images]].split(64))
                        converted = WAYS[way](model, test_x[:1], data, kept, seed)
                        seconds = time.perf_counter() - start
                        figures = measure(model, converted, test_x, test_y)
                        rows.append([f"ResNet-{depth}", f"{kept:g}", way, str(images), str(seed), *figures,
                                     f"{seconds:.0f}"])  # fmt: skip
                        Console(stderr=True).print(rows[-1])
    headings = ["network", "kept", "way", "images", "seed", "points lost", "agreement", "drift", "seconds"]
    print(Table(headings, rows, frozenset({"network", "way"})).markdown())


def load_networks(path: str) -> ModuleType:
    """The module that defines the networks and their images."""
    spec = importlib.util.spec_from_file_location("networks", path)
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    return networks


def measure(model: nn.Module, converted: nn.Module, images: Tensor, labels: Tensor) -> list[str]:
    with torch.inference_mode():
        before, after = model(images), converted(images)
    lost = (before.argmax(1) == labels).float().mean() - (after.argmax(1) == labels).float().mean()
    agreement = (before.argmax(1) == after.argmax(1)).float().mean()
    drift = (after - before).norm() / before.norm()
    return [f"{100 * lost:.2f}", f"{100 * agreement:.1f} %", f"{drift:.3f}"]


if __name__ == "__main__":
    main()
