"""Convolutions of other kinds on trained networks: an autoencoder that upsamples, and a network that listens.

    python -m benchmarks every_convolution

Trains both in a few minutes of one core, on data that need no download: the digits of scikit-learn, and sounds that are
synthesised. Then converts them at several budgets, as they are and repaired by `refit` with 256 unlabelled inputs.
Figures are of inputs that neither training nor repair has seen.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import convsplit
from benchmarks.clock import timed
from benchmarks.results import DRIFT, Sheet
from convsplit import Budget
from convsplit.tables import Table

BUDGETS = (0.5, 0.25, 0.125)
CALIBRATION = 256


def autoencoder() -> nn.Sequential:
    """Digits [N, 1, 8, 8] through 16 numbers and back; what upsamples is transposed."""
    down = [(1, 32), (32, 64), (64, 128)]
    up = [(128, 64), (64, 32), (32, 32)]
    encoder = [layer for i, o in down for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())]
    decoder = [layer for i, o in up for layer in (nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU())]
    narrow = [nn.Conv2d(128, 16, 1), nn.Conv2d(16, 128, 1), nn.ReLU()]
    return nn.Sequential(*encoder, *narrow, *decoder, nn.Conv2d(32, 1, 3, padding=1))


def listener() -> nn.Sequential:
    """Sounds [N, 1, 512] into six classes."""
    widths = [(1, 32, 16), (32, 64, 9), (64, 64, 9), (64, 96, 5)]
    layers = [layer for i, o, k in widths for layer in (nn.Conv1d(i, o, k, 2, k // 2), nn.BatchNorm1d(o), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(96, 6))


def digits() -> Tensor:
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sines, squares, saws, rising chirps, plucked strings and beats, at any pitch and phase, in noise."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 8 * 8 ** torch.rand(count, 1, generator=generator)
    phase = torch.rand(count, 1, generator=generator)
    t = torch.linspace(0, 1, 512)
    turn = pitch * t + phase
    sine = torch.sin(2 * torch.pi * turn)
    kinds = torch.stack([
        sine, sine.sign(), 2 * (turn % 1) - 1, torch.sin(2 * torch.pi * pitch * t * (1 + t)), sine * torch.exp(-4 * t),
        sine * torch.sin(2 * torch.pi * 5 * t),
    ])  # fmt: skip
    labels = torch.randint(len(kinds), (count,), generator=generator)
    waves = kinds[labels, torch.arange(count)]
    return (waves + 0.5 * torch.randn(count, 512, generator=generator)).unsqueeze(1), labels


def train(model: nn.Module, x: Tensor, targets: Tensor, epochs: int) -> None:
    torch.manual_seed(0)
    loss = F.mse_loss if targets.is_floating_point() else F.cross_entropy
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    batches = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: 64 * batches].split(64):
            optimiser.zero_grad()
            loss(model(x[rows]), targets[rows]).backward()
            optimiser.step()
            schedule.step()
    model.eval()


def score(model: nn.Module, x: Tensor, targets: Tensor) -> str:
    """Of what a model is for: the part of the images' variance that it gives back, or the sounds that it knows."""
    with torch.no_grad():
        answers = model(x)
    if targets.is_floating_point():
        return f"{1 - float((answers - targets).square().mean() / targets.var()):.3f}"
    return f"{float((answers.argmax(1) == targets).float().mean()):.3f}"


def rows_of(name: str, model: nn.Module, seen: Tensor, x: Tensor, targets: Tensor) -> Iterator[list[str]]:
    """The dense network, and its conversions."""
    yield [name, "1", score(model, x, targets), "", "", "", ""]
    data = list(seen[:CALIBRATION].split(64))
    plain, informed = convsplit.study(model, x[:1]), convsplit.study(model, calibration=data)
    for fraction in BUDGETS:
        without = plain.convert(Budget(params=fraction))
        work = timed(lambda: informed.convert(Budget(params=fraction)))  # noqa: B023
        figures = []
        for each in (without, work.result):
            figures += [score(each, x, targets), f"{convsplit.compare(each, model, x).drift.relative:.3f}"]
        yield [name, f"{fraction:g}", *figures, f"{work.cpu:.1f}"]


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, nargs=2, default=[40, 6], help="of the autoencoder and the listener")


QUICK = {"epochs": [4, 1]}


def measure(arguments: Namespace) -> Iterator[Sheet]:
    images, (x, labels), (held_out, answers) = digits(), sounds(4096, 0), sounds(1000, 1)
    painter, hearer = autoencoder(), listener()
    train(painter, images[:1300], images[:1300], arguments.epochs[0])
    train(hearer, x, labels, arguments.epochs[1])
    rows = [
        *rows_of("autoencoder, variance given back", painter, images[:1300], images[1300:], images[1300:]),
        *rows_of("listener, accuracy", hearer, x, held_out, answers),
    ]
    keys = ["network", "parameters kept"]
    headings = [*keys, "no data", "its drift", "refit", "drift of that", "CPU s"]
    kinds = {"its drift": DRIFT, "drift of that": DRIFT}
    yield Sheet("every convolution", Table(headings, rows, frozenset({"network"})), keys, kinds)
