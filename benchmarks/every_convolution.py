"""Convolutions of other kinds on trained networks: an autoencoder that upsamples, and a network that listens.

    python benchmarks/every_convolution.py

Trains both in a few minutes of one core, on data that need no download: the digits of scikit-learn, and sounds that are
synthesised. Then converts them at several budgets, as they are and repaired by `refit` with 256 unlabelled inputs, and
prints a Markdown table. Figures are of inputs that neither training nor repair has seen.
"""

from __future__ import annotations

import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import convsplit
from convsplit import Budget

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


def measure(name: str, model: nn.Module, seen: Tensor, x: Tensor, targets: Tensor) -> None:
    print(f"| {name} | 1 | {score(model, x, targets)} | | |", flush=True)
    data = list(seen[:CALIBRATION].split(64))
    plain, informed = convsplit.study(model, x[:1]), convsplit.study(model, calibration=data)
    for fraction in BUDGETS:
        budget = Budget(params=fraction)
        without = plain.convert(budget)
        began = time.process_time()
        repaired = informed.convert(budget)
        took = time.process_time() - began
        drifts = [convsplit.compare(each, model, x).drift.relative for each in (without, repaired)]
        print(
            f"| | {fraction:g} | {score(without, x, targets)}, drift {drifts[0]:.3f} | {score(repaired, x, targets)}, "
            f"drift {drifts[1]:.3f} | {took:.1f} |",
            flush=True,
        )


def main() -> None:
    print("| network | parameters kept | no data | refit | CPU s |\n|:---|---:|:---|:---|---:|")
    images = digits()
    model: nn.Module = autoencoder()
    train(model, images[:1300], images[:1300], epochs=40)
    measure("autoencoder, variance given back", model, images[:1300], images[1300:], images[1300:])
    (x, labels), (held_out, answers) = sounds(4096, 0), sounds(1000, 1)
    model = listener()
    train(model, x, labels, epochs=6)
    measure("listener, accuracy", model, x, held_out, answers)


if __name__ == "__main__":
    main()
