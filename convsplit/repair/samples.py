"""What the repair of one layer looks at: patches of its inputs and the answers wanted there, and their moments.

For patches x[P] (P = I·K, channel by channel) and targets y[O] at each position,

    patches  S[P, P] = mean (x - mean x)(x - mean x)'        cross  C[O, P] = mean (y - mean y)(x - mean x)'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from convsplit.data.moments import (
    as_map,
    evenly,
    grids,
    reader_of,
    sampled_outputs,
    sampled_patches,
    thinning,
    tile_of,
)
from convsplit.data.processes import all_reduced, reduced_numbers
from convsplit.data.tail import Tail
from convsplit.data.walk import Stop
from convsplit.parallel import side_by_side
from convsplit.repair.grams import Overlap, gram
from convsplit.spec import Axes, Convolution, axes_of

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """One batch, or some of its images, at some of their positions."""

    patches: Tensor  # [G, P, n], what reaches the layer in the converted model
    answers: Tensor  # [O, n], what the layer answers in the original
    shortcuts: tuple[Tensor, Tensor] | None  # [O, n], what is added to that in the original and the converted model
    overlap: Overlap | None = None  # of patches at all positions
    grid: int = 0  # what number the grid of positions has

    @classmethod
    def of(cls, parts: Sequence[Sample]) -> Sample:
        """Several batches, one after the other."""
        if len(parts) == 1:
            return parts[0]
        own, other = ([part.shortcuts[which] for part in parts if part.shortcuts] for which in range(2))
        return cls(
            torch.cat([part.patches for part in parts], 2), torch.cat([part.answers for part in parts], 1),
            (torch.cat(own, 1), torch.cat(other, 1)) if own else None, parts[0].overlap,
        )  # fmt: skip

    @property
    def positions(self) -> int:
        """How many there are, n."""
        return self.answers.shape[1]

    def at(self, positions: Tensor) -> Sample:
        """The same at some of the positions [m]."""
        here = positions.to(self.answers.device)
        own, other = self.shortcuts or (None, None)
        return Sample(
            self.patches.index_select(2, here), self.answers.index_select(1, here),
            None if own is None or other is None else (own.index_select(1, here), other.index_select(1, here)),
        )  # fmt: skip

    @property
    def added(self) -> Tensor | None:
        """What the converted model adds to the layer's answer."""
        return self.shortcuts[1] if self.shortcuts else None


@dataclass(frozen=True)
class Samples:
    """All batches at some of their positions, and what follows the layer."""

    batches: Sequence[Sample]
    tail: Tail

    def through(self, filters: Tensor) -> Samples:
        """The same with features, filters [G, R, P] times patches, in the place of patches."""

        def filtered(sample: Sample) -> Sample:
            return replace(sample, patches=filters.to(sample.patches) @ sample.patches, overlap=None)

        return replace(self, batches=list(self.each(filtered)))

    def thinned(self, wanted: int) -> Samples:
        """About as many positions as `wanted` of all processes', evenly spread, and others of each grid."""
        count = int(reduced_numbers(sum(sample.positions for sample in self.batches))[0])
        step = count / wanted
        if step < 2:
            return self
        chosen = [evenly(sample.positions, step, sample.grid) for sample in self.batches]
        return replace(self, batches=list(self.each(Sample.at, chosen)))

    def joined(self) -> Samples:
        """The same with batches joined that have fewer positions than unknowns: the moments of each cost a matrix.

        Larger ones are left alone: summed up one by one in float64, they give the same in any number of processes.
        """
        joined: list[Sample] = []
        waiting: list[Sample] = []
        for sample in self.batches:
            enough = sum(each.positions for each in waiting) >= sample.patches.shape[1]
            if waiting and (enough or waiting[0].overlap != sample.overlap):
                joined.append(Sample.of(waiting))
                waiting = []
            waiting.append(sample)
        return replace(self, batches=[*joined, Sample.of(waiting)] if waiting else joined)

    def targets(self) -> list[Tensor]:
        """What the layer should answer [O, n] in each batch, so that the model goes on as the original does."""
        return [
            self.tail.question(wanted, sample.added, otherwise=sample.answers)
            for sample, wanted in zip(self.batches, self.wanted, strict=True)
        ]

    def nearest_targets(self, kernel: Tensor, bias: Tensor) -> list[Tensor]:
        """The same where any answer that the activation makes equal will do: those nearest to the current ones."""

        def nearest(sample: Sample, wanted: Tensor) -> Tensor:
            current = self.tail.answer(_answer(sample, kernel, bias), sample.added)
            z = self.tail.nearest(wanted, current)
            return self.tail.question(z, sample.added, otherwise=sample.answers)

        return list(self.each(nearest, self.wanted))

    @property
    def vary(self) -> bool:
        """Whether patches differ from one another by more than rounding, which moments of float32 cannot tell."""
        seen = [sample.patches for sample in self.batches if sample.positions]
        first = seen[0][..., :1] if seen else torch.zeros(1, device="cpu")
        rounding = min(1e-2, 100 * torch.finfo(first.dtype).eps) * float(first.abs().max())
        ends = (each.aminmax(dim=2, keepdim=True) for each in seen)  # without a copy of the patches
        apart = any(float(torch.maximum(high - first, first - low).max()) > rounding for low, high in ends)
        return bool(all_reduced(torch.tensor(float(apart), device="cpu")) > 0)

    def error(self, kernel: Tensor, bias: Tensor) -> float:
        """Squared error of what the model passes on, for kernels [G, O, I, K], relative to its variance."""

        def missed(sample: Sample, wanted: Tensor) -> Tensor:
            z = self.tail.answer(_answer(sample, kernel, bias), sample.added)
            return (self.tail.activated(z) - self.tail.activated(wanted)).double().square().sum()

        return float(
            _total(self.each(missed, self.wanted)) / self._variance.clamp_min(torch.finfo(torch.float64).tiny)
        )

    @cached_property
    def wanted(self) -> list[Tensor]:
        """What stands before the activation in the original [O, n], in each batch."""
        return [
            self.tail.answer(sample.answers, sample.shortcuts[0] if sample.shortcuts else None)
            for sample in self.batches
        ]

    @cached_property
    def _variance(self) -> Tensor:
        """Of what the original passes on, summed over positions and channels of all processes."""
        sums = [(y.double().square().sum(), y.double().sum(1)) for y in map(self.tail.activated, self.wanted)]
        energy, total = (_total(parts) for parts in zip(*sums, strict=True))
        count = all_reduced(torch.tensor(sum(sample.positions for sample in self.batches), device="cpu"))
        return energy - total.square().sum() / count

    def each(
        self, function: Callable[..., Result], *of_each: Sequence[Tensor], made: float | None = None
    ) -> Iterator[Result]:
        """`function(sample, ...)` of each batch, side by side; results of `made` numbers, by default like patches."""
        read = max((sample.patches.numel() for sample in self.batches), default=0)
        given = zip(self.batches, *of_each, strict=True)
        device = self.batches[0].patches.device if self.batches else None
        return side_by_side(
            lambda own: function(*own), given, read=read, made=read if made is None else made, device=device
        )


def _answer(sample: Sample, kernel: Tensor, bias: Tensor) -> Tensor:
    weights = kernel.flatten(2).to(sample.patches)
    return (weights @ sample.patches).flatten(0, 1).add_(bias.to(sample.patches)[:, None])


def take_samples(
    reader: Convolution, stop: Stop, groups: int, before: Callable[[Tensor, Axes], Tensor] | None = None
) -> Samples:
    """Sample what the walk has stopped at, thinned out as the number of calls allows.

    Patches are those that `reader` sees, of what `before` makes of the inputs where the answers have a given size.

    Raises:
        ValueError: a batch led to NaN or infinite values (says which).
    """
    taken: list[Sample] = []
    axes, reader = axes_of(reader), reader_of(reader)
    step, tile = (1,) * axes_of(reader), tile_of(reader)
    for index, (given, answer, others) in enumerate(stop.values()):
        answers, *shortcuts = (as_map(each, axes) for each in (answer, *(others or ())))
        size = tuple(answers.shape[2:])
        features = as_map(given if before is None else before(given, size), axes)
        if index == 0:
            unknowns = reader.in_channels * math.prod(reader.kernel_size)
            count = int(reduced_numbers(len(answers) * stop.calls)[0])
            step = thinning(size, count, unknowns, tile=tile)
        whole = Overlap.of(reader, groups, size) if max(step) == 1 else None
        for images, grid in grids(index, len(features), step):
            patches = sampled_patches(reader, groups, features[images], size, step, grid)
            wanted, *added = (sampled_outputs(each[images], step, grid, tile) for each in (answers, *shortcuts))
            if not (_finite(patches) and _finite(wanted)):
                raise ValueError(f"batch {index} leads to NaN or infinite values inside the model: leave it out")
            taken.append(Sample(patches, wanted, (added[0], added[1]) if added else None, whole, grid))
    return Samples(taken, stop.tail)


def _finite(x: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, in one reading."""
    return x.numel() == 0 or all(math.isfinite(end) for end in torch.stack(x.aminmax()).tolist())


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
        count = int(all_reduced(torch.tensor(sum(x.shape[2] for x in patches), device="cpu")))
        mean = _total(x.sum(2) for x in patches) / count
        products = samples.each(lambda own: gram(own.patches, own.overlap), made=mean.numel() * mean.shape[1])
        second = _total(products).div_(count).sub_(mean.unsqueeze(2) * mean.unsqueeze(1))
        empty = second.new_empty(0)
        return cls(second, empty, mean, empty, count).towards(samples, targets)

    def towards(self, samples: Samples, targets: Sequence[Tensor]) -> Moments:
        """The same patches with other targets."""
        G = len(self.patch_mean)
        grouped = [y.reshape(G, len(y) // G, -1) for y in targets]
        mean = _total(y.sum(2) for y in grouped) / self.count
        cross = _total(samples.each(lambda own, y: y @ own.patches.mT, grouped))
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


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum over batches and processes, in float64; one part is held at a time."""
    rest = iter(parts)
    total = next(rest).double()
    for part in rest:
        total += part
    return all_reduced(total)
