"""What the repair of one layer looks at: patches of its inputs and the answers wanted there, and their moments.

For patches x[P] (P = I·K, channel by channel) and targets y[O] at each position,

    patches  S[P, P] = mean (x - mean x)(x - mean x)'        cross  C[O, P] = mean (y - mean y)(x - mean x)'
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from convsplit.data.moments import (
    as_map,
    evenly,
    in_all_processes,
    positions_wanted,
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

PIECE = 4096  # positions that are worked on at a time
DROWNS = 1e-4  # of the square of means: products of float32 tell variances below it to a hundredth at best
JOINED = 4  # positions for each unknown, up to which batches with fewer of them are joined


@dataclass(frozen=True)
class Sample:
    """One batch at some of its positions."""

    patches: Tensor  # [G, P, n], what reaches the layer in the converted model
    answers: Tensor  # [O, n], what the layer answers in the original
    wanted: Tensor  # [O, n], what stands before the activation there
    added: Tensor | None = None  # [O, n], what the converted model adds to the layer's answer
    overlap: Overlap | None = None  # of patches at all positions
    batch: int = 0  # which one, in all processes

    @classmethod
    def of(cls, parts: Sequence[Sample]) -> Sample:
        """Several batches, one after the other."""
        if len(parts) == 1:
            return parts[0]
        added = [part.added for part in parts if part.added is not None]
        return replace(
            parts[0],
            patches=torch.cat([part.patches for part in parts], 2),
            answers=torch.cat([part.answers for part in parts], 1),
            wanted=torch.cat([part.wanted for part in parts], 1),
            added=torch.cat(added, 1) if added else None,
        )

    @property
    def positions(self) -> int:
        """How many there are, n."""
        return self.answers.shape[1]

    def at(self, positions: Tensor) -> Sample:
        """The same at some of the positions [m]."""
        here = positions.to(self.answers.device)
        return Sample(
            self.patches.index_select(2, here), self.answers.index_select(1, here), self.wanted.index_select(1, here),
            None if self.added is None else self.added.index_select(1, here), batch=self.batch,
        )  # fmt: skip


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
        """About as many positions as `wanted` of all processes', evenly spread, and others of each batch."""
        count = int(reduced_numbers(sum(sample.positions for sample in self.batches))[0])
        step = count / wanted
        if step < 2:
            return self
        chosen = [evenly(sample.positions, step, sample.batch) for sample in self.batches]
        return replace(self, batches=list(self.each(Sample.at, chosen)))

    def joined(self) -> Samples:
        """The same with batches joined that have fewer positions than unknowns: the moments of each cost a matrix.

        Larger ones are left alone: summed up one by one in float64, they give the same in any number of processes.
        """
        joined: list[Sample] = []
        waiting: list[Sample] = []
        for sample in self.batches:
            unknowns = sample.patches.shape[1]
            small = all(each.positions < unknowns for each in (*waiting[:1], sample))
            full = sum(each.positions for each in waiting) >= JOINED * unknowns
            if waiting and (full or not small or waiting[0].overlap != sample.overlap):
                joined.append(Sample.of(waiting))
                waiting = []
            waiting.append(sample)
        return replace(self, batches=[*joined, Sample.of(waiting)] if waiting else joined)

    def targets(self) -> list[Tensor]:
        """What the layer should answer [O, n] in each batch, so that the model goes on as the original does."""
        return [self.tail.question(sample.wanted, sample.added, otherwise=sample.answers) for sample in self.batches]

    @cached_property
    def equal_answers(self) -> list[tuple[Tensor, Tensor]]:
        """The least and the largest answers [O, n] in each batch after which the model goes on as the original does."""
        return list(
            self.each(lambda sample: self.tail.equal_answers(sample.wanted, sample.added, otherwise=sample.answers))
        )

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

        def missed(sample: Sample) -> Tensor:
            total = torch.zeros((), dtype=torch.float64, device=sample.answers.device)
            for x, wanted, added in _pieces(sample.patches, sample.wanted, sample.added):
                z = self.tail.answer(_answer(x, kernel, bias), added)
                total += self.tail.activated(z).sub_(self.tail.activated(wanted)).square_().sum()
            return total

        return float(_total(self.each(missed)) / self._variance.clamp_min(torch.finfo(torch.float64).tiny))

    @cached_property
    def _variance(self) -> Tensor:
        """Of what the original passes on, summed over positions and channels of all processes."""

        def sums(sample: Sample) -> tuple[Tensor, Tensor]:
            passed = self.tail.activated(sample.wanted).double()
            return passed.sum(1), passed.square_().sum()

        total, energy = _totals(self.each(sums))
        count = all_reduced(torch.tensor(sum(sample.positions for sample in self.batches), device="cpu"))
        return energy - total.square().sum() / count

    def each(
        self, function: Callable[..., Result], *of_each: Sequence[Any], made: float | None = None
    ) -> Iterator[Result]:
        """`function(sample, ...)` of each batch, side by side; results of `made` numbers, by default like patches."""
        numbers = [sample.patches.numel() for sample in self.batches]
        given = zip(self.batches, *of_each, strict=True)
        device = self.batches[0].patches.device if self.batches else None
        return side_by_side(
            lambda own: function(*own), given, read=sum(numbers),
            made=max(numbers, default=0) if made is None else made, device=device,
        )  # fmt: skip


def _pieces(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Views of the tensors [..., n], or None, at a few positions each: what is made of them stays in a core's cache."""
    most = max(tensor.shape[-1] for tensor in tensors if tensor is not None)
    for first in range(0, most, PIECE):
        yield tuple(None if tensor is None else tensor[..., first : first + PIECE] for tensor in tensors)


def _answer(patches: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """What kernels [G, O, I, K] answer [G·O, n] to patches [G, P, n]."""
    weights = kernel.flatten(2).to(patches)
    return (weights @ patches).flatten(0, 1).add_(bias.to(patches)[:, None])


def take_samples(
    reader: Convolution,
    stop: Stop,
    groups: int,
    before: Callable[[Tensor, Axes], Tensor] | None = None,
    unknowns: int | None = None,
) -> Samples:
    """Sample what the walk has stopped at, thinned out as the number of calls and of `unknowns` allows.

    Patches are those that `reader` sees, of what `before` makes of the inputs where the answers have a given size. Each
    output has as many unknowns as patches have values, unless there are fewer.

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
            numbers = features.shape[1] * math.prod(reader.kernel_size)
            count = int(reduced_numbers(len(answers) * stop.calls)[0])
            wanted = positions_wanted(min(numbers // groups, unknowns or numbers), numbers)
            step = thinning(size, count, wanted, tile=tile)
        whole = Overlap.of(reader, features.shape[1] // groups, size) if max(step) == 1 else None
        patches = sampled_patches(reader, groups, features, size, step, index)
        own, *added = (sampled_outputs(each, step, index, tile) for each in (answers, *shortcuts))
        if not (_finite(patches) and _finite(own)):
            raise ValueError(f"batch {index} leads to NaN or infinite values inside the model: leave it out")
        before_activation = stop.tail.answer(own, added[0] if added else None)
        taken.append(
            Sample(patches, own, before_activation, added[1] if added else None, whole, in_all_processes(index))
        )
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
    dtype: torch.dtype | None = None  # what products of patches are computed in; None for their own

    @classmethod
    def of(cls, samples: Samples) -> Moments:
        """Moments of all patches, with no targets yet: in float64 where rounding of the means would drown variances."""
        moments = cls._of(samples, None)
        variance = moments.patches.diagonal(dim1=1, dim2=2).mean()
        drowns = bool(variance < DROWNS * moments.patch_mean.square().max())
        return cls._of(samples, torch.float64) if drowns else moments

    @classmethod
    def _of(cls, samples: Samples, dtype: torch.dtype | None) -> Moments:
        patches = [sample.patches for sample in samples.batches]
        count = int(all_reduced(torch.tensor(sum(x.shape[2] for x in patches), device="cpu")))
        mean = _total(samples.each(lambda own: own.patches.sum(2, dtype=dtype), made=patches[0].shape[1])) / count
        products = samples.each(
            lambda own: gram(own.patches.to(dtype), own.overlap), made=mean.numel() * mean.shape[1]
        )
        second = _total(products).div_(count).baddbmm_(mean.unsqueeze(2), mean.unsqueeze(1), alpha=-1)
        nothing = second.new_zeros(len(mean), 0)
        return cls(second, second.new_zeros(len(mean), 0, mean.shape[1]), mean, nothing, count, dtype)

    def towards(self, samples: Samples, targets: Sequence[Tensor]) -> Moments:
        """The same patches with targets [O, n] in each batch."""
        return self._with(*_totals(samples.each(lambda sample, y: self._sums(sample.patches, y), targets)))

    def towards_nearest(self, samples: Samples, kernel: Tensor, bias: Tensor) -> tuple[Moments, float]:
        """The same where any answer that the activation makes equal will do: those nearest to the current ones.

        Also the sum of squared distances to them, over the positions of all processes.
        """
        nothing = torch.zeros((), device=bias.device)

        def sums(sample: Sample, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            total, cross, missed = nothing, nothing, nothing
            for x, least, largest in _pieces(sample.patches, *ends):
                answer = _answer(x, kernel, bias)
                y = answer.clamp(least, largest)
                missed = missed + torch.linalg.vector_norm(answer.sub_(y)).square()
                own = self._sums(x, y)
                total, cross = total + own[0], cross + own[1]
            return total, cross, missed

        total, cross, missed = _totals(samples.each(sums, samples.equal_answers))
        return self._with(total, cross), float(missed)

    def _sums(self, patches: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of targets [O, n] and of their products with patches [G, P, n]: [G, O / G] and [G, O / G, P]."""
        x = patches.to(self.dtype)
        y = targets.reshape(len(x), -1, targets.shape[1]).to(x)
        return y.sum(2), y @ x.mT

    def _with(self, total: Tensor, products: Tensor) -> Moments:
        """The same with targets of the sum [G, O] over all positions; `products` [G, O, P] with patches likewise."""
        mean = total / self.count
        cross = products / self.count - mean.unsqueeze(2) * self.patch_mean.unsqueeze(1)
        return replace(self, cross=cross, target_mean=mean)

    def uncentred(self) -> Moments:
        """The same about zero: for a layer that has no bias."""
        t, m = self.target_mean.unsqueeze(2), self.patch_mean.unsqueeze(1)
        return Moments(
            torch.baddbmm(self.patches, self.patch_mean.unsqueeze(2), m), self.cross + t * m,
            torch.zeros_like(self.patch_mean), torch.zeros_like(self.target_mean), self.count, self.dtype,
        )  # fmt: skip


def _totals(parts: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    """The sums of what each batch has several of."""
    return [_total(each) for each in zip(*parts, strict=True)]


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum over batches and processes, in float64; one part is held at a time."""
    rest = iter(parts)
    total = next(rest).double()
    for part in rest:
        total += part
    return all_reduced(total)
