"""Trained networks with their images: the digits of this repository, or those of a file of one's own."""

from __future__ import annotations

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Subject:
    """A trained network, training images to calibrate with, and test images with their labels.

    Where nobody has labelled the images, the network's own answers stand for labels: accuracy is then agreement.
    """

    name: str
    model: nn.Module
    unlabelled: Tensor
    images: Tensor
    labels: Tensor
    labelled: bool = True

    def calibration(self, count: int, seed: int) -> list[Tensor]:
        """Batches of so many training images."""
        order = torch.randperm(len(self.unlabelled), generator=torch.Generator().manual_seed(seed))
        return list(self.unlabelled[order[:count]].split(64))


def add_options(parser: ArgumentParser) -> None:
    """Which networks a suite takes."""
    parser.add_argument("networks", nargs="?", metavar="NETWORKS.py", help="trained networks; without, the digits'")
    parser.add_argument("--networks", dest="more", nargs="+", default=[], metavar="NETWORKS.py")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56], help="of the ResNets in NETWORKS.py")


def subjects(arguments: Namespace, photos: int = 64) -> Iterator[Subject]:
    """Those asked for, with so many photos to calibrate with where photos are few.

    NETWORKS.py defines `resnet(depth)`, a trained network in eval mode, and `cifar10()`, which returns training images
    and labels, test images and labels; or `inception_v3()` and `photos(count, start)`, which need no labels.
    """
    files = [file for file in (arguments.networks, *arguments.more) if file]
    if not files:
        yield digits()
    for file in files:
        networks = load_networks(file)
        if hasattr(networks, "resnet"):
            unlabelled, _, images, labels = networks.cifar10()
            for depth in arguments.depths:
                yield Subject(f"ResNet-{depth}", networks.resnet(depth), unlabelled, images, labels)
        else:
            yield _inception(networks, min(photos, 96))


def digits() -> Subject:
    """The network that examples/train_digits.py trains, 99.4 % of 500 test images."""
    sys.path.append(str(ROOT / "examples"))
    import digits as example

    unlabelled, _, images, labels = example.digits()
    return Subject("digits", example.trained(), unlabelled, images, labels)


def _inception(networks: ModuleType, calibration: int, count: int = 100) -> Subject:
    model, images = networks.inception_v3(), networks.photos(count, calibration)
    return Subject(
        "InceptionV3", model, networks.photos(calibration), images, answers(model, images).argmax(1), False
    )


def load_networks(path: str) -> ModuleType:
    """The module that defines the networks and their images."""
    spec = importlib.util.spec_from_file_location("networks", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    networks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(networks)
    return networks


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """The outputs, batch by batch."""
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(100)])
