"""The published table of Network Decoupling, AIMET and stable CP, for those who have ImageNet.

    python -m benchmarks imagenet --imagenet DIR --weights torchvision
    python -m benchmarks imagenet --imagenet DIR --weights torchvision --networks resnet50 --speedups 2 --images 5000

DIR has the folder `val` (or is it) with a folder of images for each class, which sorted by name are the classes 0 to
999; a folder `train` beside it, laid out likewise, gives the images for repair, without it they are images of `val`,
which are then not measured. `--weights torchvision` takes the weights that torchvision distributes, a file of a
state_dict for one network, `none` random ones (to try the recipe). ResNet-18, ResNet-50 and VGG16 are converted at a
half, a third and a fifth of the multiply-adds of the whole model: without data, repaired, and with --seconds distilled.
Top-1 and top-5 are of the images that were measured, with 95 % intervals.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import convsplit
from benchmarks.baselines.packages import multiply_adds
from benchmarks.clock import timed
from benchmarks.results import COUNT, SCORE, Kind, Sheet
from convsplit import Budget
from convsplit.report.quality import wilson
from convsplit.tables import Table, count

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDINGS = {".jpeg", ".jpg", ".png"}
LOST = Kind("lower", absolute=0.5)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--imagenet", type=Path, required=True, metavar="DIR")
    parser.add_argument("--weights", default="torchvision", help="torchvision, none, or a file of one network")
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50", "vgg16"])
    parser.add_argument("--speedups", type=float, nargs="+", default=[2, 3, 5], help="fewer multiply-adds by so much")
    parser.add_argument("--images", type=int, help="measured; all without it")
    parser.add_argument("--calibration", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.0, help="of distillation")


QUICK = {"networks": ["resnet18"], "speedups": [2], "images": 64, "calibration": 16, "batch": 8}


@dataclass(frozen=True)
class Top:
    """Images whose class is first, or among the first five."""

    one: int
    five: int
    total: int

    def cells(self, dense: Top) -> list[str]:
        """Per cent with intervals, and points lost."""
        shown = [_interval(right, self.total) for right in (self.one, self.five)]
        lost = [100 * (a - b) / self.total for a, b in ((dense.one, self.one), (dense.five, self.five))]
        return [shown[0], f"{lost[0]:.2f}", shown[1], f"{lost[1]:.2f}"]


def measure(arguments: Namespace) -> Iterator[Sheet]:
    known, tests = split(arguments)
    rows = []
    for name in arguments.networks:
        model = network(name, arguments.weights)
        data = [batch for batch, _ in batches(known, arguments.batch)]
        whole, dense = multiply_adds(model, data[0][:1]), top(model, tests, arguments.batch)
        rows.append([name, "dense", "", count(whole), *dense.cells(dense), ""])
        study = timed(lambda: convsplit.study(model, calibration=data))  # noqa: B023
        plain = timed(lambda: convsplit.study(model, data[0]))  # noqa: B023
        for speedup in arguments.speedups:
            budget = Budget(macs=1 / speedup, of="model")
            for way, known_of in (("no data", plain), ("repaired", study)):
                work = timed(lambda: known_of.result.convert(budget))  # noqa: B023
                rows.append([name, f"{speedup:g}x", way, *_figures(work.result, dense, tests, data, arguments),
                             f"{known_of.cpu + work.cpu:.0f}"])  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
            if arguments.seconds:
                convsplit.distill(work.result, model, data, epochs=10_000, seconds=arguments.seconds)
                rows.append([name, f"{speedup:g}x", "distilled", *_figures(work.result, dense, tests, data, arguments),
                             ""])  # fmt: skip
    keys = ["network", "speed-up", "way"]
    headings = [*keys, "MACs", "top-1", "top-1 lost", "top-5", "top-5 lost", "CPU s"]
    kinds = {"MACs": COUNT, "top-1": SCORE, "top-5": SCORE, "top-1 lost": LOST, "top-5 lost": LOST}
    notes = f"{len(tests)} images measured, {len(known)} without labels for repair, weights: {arguments.weights}"
    yield Sheet("imagenet", Table(headings, rows, frozenset(keys)), keys, kinds, notes)


def _figures(
    converted: nn.Module, dense: Top, tests: list[tuple[Path, int]], data: list[Tensor], arguments: Namespace
) -> list[str]:
    own = top(converted, tests, arguments.batch)
    return [count(multiply_adds(converted, data[0][:1])), *own.cells(dense)]


def split(arguments: Namespace) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Images for repair, and images to measure, with their classes, spread evenly over the classes.

    Raises:
        ValueError: too few images.
    """
    folder = arguments.imagenet
    tests = labelled(folder / "val" if (folder / "val").is_dir() else folder)
    beside = folder / "train"
    pool = labelled(beside) if beside.is_dir() else tests
    known = _spread(pool, arguments.calibration)
    used = {path for path, _ in known}
    tests = [each for each in tests if each[0] not in used]
    if not known or not tests:
        raise ValueError(
            f"{folder}: {len(tests) + len(known)} images are too few for --calibration {arguments.calibration}"
        )
    return known, _spread(tests, arguments.images or len(tests))


def labelled(folder: Path) -> list[tuple[Path, int]]:
    """Every image below a folder of classes, and its class."""
    classes = sorted(each for each in folder.iterdir() if each.is_dir() and each.name not in {"train", "val"})
    return [
        (path, label) for label, each in enumerate(classes)
        for path in sorted(each.iterdir()) if path.suffix.lower() in ENDINGS
    ]  # fmt: skip


def _spread(found: list[tuple[Path, int]], wanted: int) -> list[tuple[Path, int]]:
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[index] for index in order[:wanted]]


def batches(found: list[tuple[Path, int]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(found), size):
        paths, labels = zip(*found[start : start + size], strict=True)
        yield torch.stack([picture(path) for path in paths]), torch.tensor(labels)


def picture(path: Path) -> Tensor:
    """As torchvision's weights were measured: the shorter side 256, the central 224 x 224, normalised."""
    import numpy
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    factor = 256 / min(image.size)
    image = image.resize([max(256, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)
    left, upper = ((side - 224) // 2 for side in image.size)
    pixels = torch.from_numpy(numpy.array(image.crop((left, upper, left + 224, upper + 224)))).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def network(name: str, weights: str) -> nn.Module:
    """Of torchvision, in eval mode."""
    from torchvision import models

    if weights == "torchvision":
        return models.get_model(name, weights="IMAGENET1K_V1").eval()
    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    if weights != "none":
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


@torch.inference_mode()
def top(model: nn.Module, tests: list[tuple[Path, int]], size: int) -> Top:
    one = five = 0
    for images, labels in batches(tests, size):
        hits = model(images).topk(5).indices == labels[:, None]
        one, five = one + int(hits[:, 0].sum()), five + int(hits.any(1).sum())
    return Top(one, five, len(tests))


def _interval(right: int, total: int) -> str:
    low, high = wilson(right, total)
    return f"{100 * right / total:.1f} ({100 * low:.1f} to {100 * high:.1f})"
