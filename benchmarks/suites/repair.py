"""What repair costs, as a multiple of one forward pass of both models over its batches, for models of several kinds.

    python -m benchmarks repair [--cases resnet18 yolo recogniser detection hed] [--budget params=0.5] [--threads 2]
        [--rounds 3] [--busy]

Each case gives a model and batches. Its convolutions become CP forms of rank 64 without data (which is quick), or keep
a budget; then one forward pass of both models and `refit` are timed in turn, and medians told.
`PYTHONPATH` of another commit measures that one.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convsplit
from benchmarks.clock import another_process, timed
from benchmarks.results import MULTIPLE, Sheet
from convsplit import Budget
from convsplit.cli.arguments import budget as budget_of
from convsplit.tables import Table

Case = Callable[[], tuple[nn.Module, list[Any]]]


def resnet18() -> tuple[nn.Module, list[Any]]:
    """ResNet-18 of torchvision, 256 images of 224x224."""
    import torchvision

    return torchvision.models.resnet18(), list(torch.randn(256, 3, 224, 224).split(16))


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut, as in YOLOv8."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = convolution(channels, channels), convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class Split(nn.Module):
    """Half of the channels goes through bottlenecks; all that passes is concatenated."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.first = convolution(channels, channels, 1)
        self.inner = nn.ModuleList(Bottleneck(channels // 2) for _ in range(depth))
        self.last = convolution(channels // 2 * (2 + depth), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.inner:
            parts.append(block(parts[-1]))
        return self.last(torch.cat(parts, 1))


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())


class Detector(nn.Module):
    """A backbone as in YOLOv8n with heads on three scales; a branch on the data keeps fx out."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 64, 128, 256)
        self.stem = convolution(3, 16, 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(convolution(i, o, 3, 2), Split(o, depth))
            for i, o, depth in zip(widths, widths[1:], (1, 2, 2, 1), strict=False)
        )
        self.heads = nn.ModuleList(
            nn.Sequential(convolution(c, 64), convolution(64, 64), nn.Conv2d(64, 144, 1)) for c in widths[2:]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        if not bool(x.isfinite().all()):
            raise ValueError("bad image")
        features, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return [head(feature) for head, feature in zip(self.heads, features[1:], strict=True)]


def yolo() -> tuple[nn.Module, list[Any]]:
    """A detector like YOLOv8n, 16 images of 320x320 one by one."""
    return Detector(), list(torch.randn(16, 3, 320, 320).split(1))


class Recogniser(nn.Module):
    """Seven convolutions of up to 256 channels with a BiLSTM behind them: CRNN for lines of text."""

    def __init__(self) -> None:
        super().__init__()
        widths, pools = (1, 32, 64, 128, 128, 256, 256, 256), (2, 2, 1, (2, 1), 1, (2, 1), (4, 1))
        layers: list[nn.Module] = []
        for i, o, pool in zip(widths, widths[1:], pools, strict=False):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(pool)]
        self.features, self.lstm = nn.Sequential(*layers), nn.LSTM(256, 128, bidirectional=True, batch_first=True)
        self.head = nn.Linear(256, 80)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.features(x).squeeze(2).transpose(1, 2))[0])


def recogniser() -> tuple[nn.Module, list[Any]]:
    """A text recogniser, 10 lines of 64x400."""
    return Recogniser(), list(torch.randn(10, 1, 64, 400).split(1))


def detection() -> tuple[nn.Module, list[Any]]:
    """SSD with VGG16 of torchvision, whole, 6 images of 300x300: it does not trace."""
    from torchvision.models.detection import ssd300_vgg16

    model = ssd300_vgg16(weights=None, weights_backbone=None)
    return model, [([image],) for image in torch.rand(6, 3, 300, 300)]


class Edges(nn.Module):
    """HED: VGG16 with an output on each of five scales and one of all."""

    def __init__(self) -> None:
        super().__init__()
        import torchvision

        layers, ends = torchvision.models.vgg16().features, (0, 4, 9, 16, 23, 30)
        self.stages = nn.ModuleList(layers[first:end] for first, end in itertools.pairwise(ends))
        self.sides = nn.ModuleList(nn.Conv2d(channels, 1, 1) for channels in (64, 128, 256, 512, 512))
        self.fuse = nn.Conv2d(5, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        sides, size = [], x.shape[-2:]
        for stage, side in zip(self.stages, self.sides, strict=True):
            x = stage(x)
            sides.append(F.interpolate(side(x), size, mode="bilinear"))
        return self.fuse(torch.cat(sides, 1)).sigmoid()


def hed() -> tuple[nn.Module, list[Any]]:
    """HED, 16 images of 224x224."""
    return Edges(), list(torch.randn(16, 3, 224, 224).split(4))


CASES: dict[str, Case] = {
    "resnet18": resnet18, "yolo": yolo, "recogniser": recogniser, "detection": detection, "hed": hed,
}  # fmt: skip


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="+", default=list(CASES)[:4], choices=list(CASES))
    parser.add_argument("--budget", type=budget_of, help="what convolutions keep, such as params=0.5; else rank 64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="with another process that keeps one core busy")


QUICK = {"cases": ["recogniser"], "threads": 1, "rounds": 1}


def measure(arguments: Namespace) -> Iterator[Sheet]:
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    rows = []
    with another_process() if arguments.busy else nullcontext():
        for name in arguments.cases:
            passes, repairs = medians(*CASES[name](), arguments.budget, arguments.rounds)
            rows.append([name, f"{passes:.1f}", f"{repairs:.1f}", f"{repairs / passes:.1f}"])
            print(rows[-1], file=sys.stderr, flush=True)
    table = Table(["case", "forward pass of both (s)", "refit (s)", "multiple"], rows, frozenset({"case"}))
    yield Sheet("repair", table, ["case"], {"multiple": MULTIPLE})


def medians(model: nn.Module, batches: list[Any], budget: Budget | None, rounds: int) -> tuple[float, float]:
    """Medians of the seconds that one forward pass of both models and a repair take."""
    torch.manual_seed(0)
    if all(isinstance(batch, Tensor) for batch in batches):
        with torch.no_grad():  # statistics of batch norm under which features live
            model.train()(torch.cat(batches[:4]))
    model.eval()
    how: dict[str, Any] = {"rank": 64, "forms": "pw-dw-pw"} if budget is None else {"budget": budget}
    converted = convsplit.convert(model, **how)
    passes, repairs = [], []
    for _ in range(rounds):
        twin = copy.deepcopy(converted)
        passes.append(timed(lambda: run_both(model, twin, batches)).seconds)  # noqa: B023
        repairs.append(timed(lambda: convsplit.refit(twin, model, batches)).seconds)  # noqa: B023
    return statistics.median(passes), statistics.median(repairs)


@torch.inference_mode()
def run_both(model: nn.Module, twin: nn.Module, batches: list[Any]) -> None:
    for batch in batches:
        for each in (model, twin):
            each(*batch) if isinstance(batch, tuple) else each(batch)
