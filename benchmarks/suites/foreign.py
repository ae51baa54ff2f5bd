"""Repair with images of another data set: how much is lost?

    python -m benchmarks foreign NETWORKS.py [--depths 20] [--photos PHOTOS.py] [--kept 0.5 0.25] [--calibration 512]

Each network is converted without data, and repaired with its own images, with foreign ones and with noise, all scaled
channel by channel to the mean and deviation of the network's own inputs, so that content differs and brightness does
not. Foreign are the digits of scikit-learn, their 8x8 pixels made as large as the network's images, and with PHOTOS.py
(`photos(count)`, images in 0 to 1) photos, cut into squares and shrunk. Without NETWORKS.py the network of the digits
is repaired with noise alone.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

import convsplit
from benchmarks.clock import timed
from benchmarks.figures import QUALITY, compared
from benchmarks.results import Sheet
from benchmarks.subjects import Subject, add_options, answers, digits, load_networks, subjects
from convsplit import Budget
from convsplit.tables import Table

PATCH = 96  # pixels of a photo that become one image


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--photos", metavar="PHOTOS.py")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--calibration", type=int, default=512)


QUICK = {"kept": [0.25], "calibration": 128}


def measure(arguments: Namespace) -> Iterator[Sheet]:
    rows = []
    for subject in subjects(arguments):
        dense = answers(subject.model, subject.images)
        for kept, (name, images) in product(arguments.kept, sources(subject, arguments)):
            data = None if images is None else list(images.split(64))
            budget = Budget(params=kept)
            work = timed(
                lambda: convsplit.convert(subject.model, subject.images[:1], budget=budget, calibration=data)  # noqa: B023
            )
            quality = compared(dense, answers(work.result, subject.images), subject.labels)
            rows.append([subject.name, f"{kept:g}", name, *quality.cells()])
            print(rows[-1], file=sys.stderr, flush=True)
    keys = ["network", "kept", "repaired with"]
    table = Table([*keys, *QUALITY], rows, frozenset({"network", "repaired with"}))
    yield Sheet("foreign", table, keys, QUALITY, f"{arguments.calibration} images without labels")


def sources(subject: Subject, arguments: Namespace) -> Iterator[tuple[str, Tensor | None]]:
    """Names and images, None for no repair."""
    count, own = arguments.calibration, torch.cat(subject.calibration(arguments.calibration, seed=0))
    yield "nothing", None
    yield "its own images", own
    if subject.name != "digits":
        yield "digits", like(own, torch.cat(digits().calibration(count, seed=0)))
    if arguments.photos:
        yield "photos", like(own, squares(load_networks(arguments.photos).photos(min(count, 120)), count))
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    yield "noise", like(own, noise)


def like(own: Tensor, images: Tensor) -> Tensor:
    """Images [N, C, H, W] in the size of the network's own, with their channels, means and deviations."""
    images = F.interpolate(images, own.shape[2:], mode="bilinear", antialias=True)
    images = images.expand(-1, own.shape[1], -1, -1) if images.shape[1] == 1 else images[:, : own.shape[1]]
    axes = (0, 2, 3)
    standard = (images - images.mean(axes, keepdim=True)) / images.std(axes, keepdim=True)
    return standard * own.std(axes, keepdim=True) + own.mean(axes, keepdim=True)


def squares(photos: Tensor, count: int) -> Tensor:
    """So many squares of photos, evenly spread over each."""
    cut = photos.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [N, C, down, across, PATCH, PATCH]
    each = cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    order = torch.randperm(len(each), generator=torch.Generator().manual_seed(0))
    return each[order[:count]]
