"""What the repair of one layer looks at: patches of its inputs and the answers wanted there, and their moments.

For patches x[P] (P = I·K, channel by channel) and targets y[O] at each position,

    patches  S[P, P] = mean (x - mean x)(x - mean x)'        cross  C[O, P] = mean (y - mean y)(x - mean x)'
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convsplit.layers import SeparableConv2d
from convsplit.moments import all_reduced, sampled_outputs, sampled_patches, thinning
from convsplit.refit.tail import Tail
from convsplit.refit.walk import Stop


@dataclass(frozen=True)
class Sample:
    """One batch at some of its positions."""

    patches: Tensor  # [G, P, n], what reaches the layer in the converted model
    answers: Tensor  # [O, n], what the layer answers in the original
    shortcuts: (
        tuple[Tensor, Tensor] | None
    )  # [O, n], what is added to that in the original and in the converted model

    @property
    def added(self) -> Tensor | None:
        """What the converted model adds to the layer's answer."""
        return self.shortcuts[1] if self.shortcuts else None


@dataclass(frozen=True)
class Samples:
    """All batches at some of their positions, and what follows the layer."""

    batches: Sequence[Sample]
    tail: Tail

    def targets(self) -> list[Tensor]:
        """What the layer should answer [O, n] in each batch, so that the model goes on as the original does."""
        return [
            self.tail.question(self._wanted(sample), sample.added, otherwise=sample.answers)
            for sample in self.batches
        ]

    def nearest_targets(self, kernel: Tensor, bias: Tensor) -> list[Tensor]:
        """The same where any answer that the activation makes equal will do: those nearest to the current ones."""
        found = []
        for sample in self.batches:
            current = self.tail.answer(_answer(sample, kernel, bias), sample.added)
            z = self.tail.nearest(self._wanted(sample), current)
            found.append(self.tail.question(z, sample.added, otherwise=sample.answers))
        return found

    def error(self, kernel: Tensor, bias: Tensor) -> float:
        """Squared error of what the model goes on with, for kernels [G, O, I, K], relative to its variance."""
        missed = energy = total = torch.zeros((), dtype=torch.float64)
        for sample in self.batches:
            wanted = self.tail.activated(self._wanted(sample))
            z = self.tail.answer(_answer(sample, kernel, bias), sample.added)
            missed = missed + (self.tail.activated(z) - wanted).double().square().sum()
            energy, total = energy + wanted.double().square().sum(), total + wanted.double().sum(1)
        count = all_reduced(torch.tensor(sum(sample.answers.shape[1] for sample in self.batches)))
        variance = all_reduced(energy) - all_reduced(total).square().sum() / count
        return float(all_reduced(missed) / variance.clamp_min(torch.finfo(torch.float64).tiny))

    def _wanted(self, sample: Sample) -> Tensor:
        return self.tail.answer(sample.answers, sample.shortcuts[0] if sample.shortcuts else None)


def _answer(sample: Sample, kernel: Tensor, bias: Tensor) -> Tensor:
    weights = kernel.flatten(2).to(sample.patches)
    return (weights @ sample.patches).flatten(0, 1) + bias.to(sample.patches)[:, None]


def take_samples(layer: nn.Conv2d | SeparableConv2d, stop: Stop, batches: int) -> Samples:
    """Sample what the walk has stopped at; `batches` says how many to expect, so as to thin out from the first on.

    Raises:
        ValueError: no batch reached the layer, or one with NaN or infinite values (says which).
    """
    taken: list[Sample] = []
    step = 1
    for index, (inputs, answers, shortcuts) in enumerate(stop.values()):
        if inputs.dim() == 3:  # an image on its own
            inputs, answers = inputs.unsqueeze(0), answers.unsqueeze(0)
            shortcuts = shortcuts and (shortcuts[0].unsqueeze(0), shortcuts[1].unsqueeze(0))
        if index == 0:
            step = thinning(answers[:, 0].numel() * batches, layer.in_channels * math.prod(layer.kernel_size))
        added = shortcuts and (
            sampled_outputs(shortcuts[0], step, index),
            sampled_outputs(shortcuts[1], step, index),
        )
        patches = _patches(layer, inputs, answers, step, index)
        sample = Sample(patches, sampled_outputs(answers, step, index), added)
        if not (sample.patches.isfinite().all() and sample.answers.isfinite().all()):
            raise ValueError(f"batch {index} leads to NaN or infinite values inside the model: leave it out")
        taken.append(sample)
    if not taken:
        raise ValueError("no calibration batch reached this layer")
    return Samples(taken, stop.tail)


def _patches(layer: nn.Conv2d | SeparableConv2d, inputs: Tensor, answers: Tensor, step: int, index: int) -> Tensor:
    if isinstance(layer, SeparableConv2d) and "pad" in layer.stages:
        inputs = layer.stages["pad"](inputs)
    geometry = layer.depthwise if isinstance(layer, SeparableConv2d) else layer
    return sampled_patches(geometry, layer.groups, inputs, answers.shape[-2:], step, index)


@dataclass(frozen=True)
class Moments:
    """Centred moments per group, in float64."""

    patches: Tensor  # S [G, P, P]
    cross: Tensor  # C [G, O, P]
    patch_mean: Tensor  # [G, P]
    target_mean: Tensor  # [G, O]
    count: int  # of positions, in all processes

    @classmethod
    def of(cls, samples: Samples, targets: Sequence[Tensor]) -> Moments:
        """Moments of all patches and of targets [O, n]."""
        patches = [sample.patches for sample in samples.batches]
        count = int(all_reduced(torch.tensor(sum(x.shape[2] for x in patches))))
        mean = _total([x.sum(2).double() for x in patches]) / count
        second = _total([(x @ x.mT).double() for x in patches]) / count - mean.unsqueeze(2) * mean.unsqueeze(1)
        empty = second.new_empty(0)
        return cls(second, empty, mean, empty, count).towards(samples, targets)

    def towards(self, samples: Samples, targets: Sequence[Tensor]) -> Moments:
        """The same patches with other targets."""
        G = len(self.patch_mean)
        grouped = [y.reshape(G, len(y) // G, -1) for y in targets]
        mean = _total([y.sum(2).double() for y in grouped]) / self.count
        cross = _total([(y @ s.patches.mT).double() for y, s in zip(grouped, samples.batches, strict=True)])
        return replace(
            self, cross=cross / self.count - mean.unsqueeze(2) * self.patch_mean.unsqueeze(1), target_mean=mean
        )

    def uncentred(self) -> Moments:
        """The same about zero: for a layer that has no bias."""
        t, m = self.target_mean.unsqueeze(2), self.patch_mean.unsqueeze(1)
        return Moments(
            self.patches + self.patch_mean.unsqueeze(2) * m, self.cross + t * m,
            torch.zeros_like(self.patch_mean), torch.zeros_like(self.target_mean), self.count,
        )  # fmt: skip


def _total(parts: Sequence[Tensor]) -> Tensor:
    return all_reduced(sum(parts[1:], parts[0].clone()))
