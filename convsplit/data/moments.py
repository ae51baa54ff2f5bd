"""Second moments of what reaches convolutions: the metric in which an error of their weights becomes one of outputs.

Sums run over the positions of each image, batch by batch, in float64. Positions are thinned out to a stated multiple of
the unknowns, on a grid that shifts from batch to batch. Where several processes share the work, sums are all-reduced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from convsplit.data.processes import all_reduced_each, is_shared, reduced_numbers
from convsplit.model.hooks import Given, hooked
from convsplit.model.running import Batch, Forward, quiet_run, run_or_explain
from convsplit.model.values import tensors_in
from convsplit.precision import full_products, widened
from convsplit.spec import Axes, Convolution, ConvSpec, axes_of, padding_around, per_axis

POSITIONS_PER_UNKNOWN = 100
LEAST_POSITIONS = 10_000  # as far as there are so many: a few unknowns are cheap, and all of them want variety
GOLDEN = 0.618
GRID_IMAGES = 16  # that are looked at at the same positions
GRIDS = 61  # of a batch; a prime, so that every one of them differs from batch to batch
NEIGHBOURS = 0.4  # correlation of inputs one position apart, where it is not measured
ROUNDING = 1e-12  # of the energy of patches: what is left of it once their mean is taken off equal ones
WIDEST = 5000  # channels: moments of more take memory and time that grow with their square and their cube
SAMPLE_BYTES = 256 << 20  # what the patches of one layer may take up: 14 positions an unknown of 512 channels, 3 x 3


def as_map(x: Tensor, axes: int) -> Tensor:
    """What goes into or comes out of a layer as [N, C, *size]: an image on its own as one of a batch.

    Rows [..., C] of a linear layer, which has no axes, are a map of one: that of a batch [N, C] has one position.
    """
    if axes:
        return x.unsqueeze(0) if x.dim() == axes + 1 else x
    rows = x.reshape(-1, 1, x.shape[-1]) if x.dim() < 3 else x.flatten(1, -2)
    return rows.transpose(1, 2)


def reader_of(layer: Convolution) -> Convolution:
    """The convolution that reads `as_map` of a layer's inputs: itself or, of a linear layer, a 1x1 one."""
    if axes_of(layer):
        return layer
    spec = ConvSpec.of(layer)
    return ConvSpec(spec.in_channels, spec.out_channels, (1,)).conv()


def padded(geometry: Convolution, x: Tensor) -> Tensor:
    """The input with the convolution's own padding, in its padding mode."""
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, padding_around(geometry), mode=mode)


def in_all_processes(index: int) -> int:
    """The number of a process's batch among those of all: as one alone would have it, if they are dealt out in turn."""
    return index * distributed.get_world_size() + distributed.get_rank() if is_shared() else index


def grids(index: int, images: int, step: Axes) -> Iterator[tuple[slice, int]]:
    """The images of a batch that are looked at at the same positions, and the number of that grid in all processes."""
    index = in_all_processes(index)
    apart = max(1, images if max(step) == 1 else GRID_IMAGES)
    for number, first in enumerate(range(0, max(1, images), apart)):
        yield slice(first, first + apart), GRIDS * index + number


def sampled_patches(
    geometry: Convolution, groups: int, inputs: Tensor, output_size: Sequence[int], step: Axes, index: int
) -> Tensor:
    """Patches [G, P, n] of inputs [N, I, H, W] for every `step`-th tile of outputs of each axis.

    `index` is that of the batch, whose `grids` it shifts. Tiles are single positions but in transposed convolutions:
    see `tile_of`.
    """
    found = _patches_transposed if geometry.transposed else _patches
    wide = widened(inputs)
    views = [found(geometry, wide[images], output_size, step, grid) for images, grid in grids(index, len(wide), step)]
    I, *kernel = views[0].shape[: 1 + len(step)]
    counts = [math.prod(view.shape[1 + len(step) :]) for view in views]
    patches = wide.new_empty(I, math.prod(kernel), sum(counts))
    for view, own in zip(views, torch.split(patches, counts, 2), strict=True):
        own.view(view.shape).copy_(view)  # the only copy of what overlaps
    return patches.view(groups, patches.shape[0] * patches.shape[1] // groups, -1)


def sampled_outputs(outputs: Tensor, step: Axes, index: int, tile: Axes) -> Tensor:
    """Outputs [N, O, H', W'] at the positions of `sampled_patches`, as [O, n]."""
    wide, parts = widened(outputs), []
    for images, grid in grids(index, len(wide), step):
        kept = wide[images]
        for axis, positions in enumerate(_positions(outputs.shape[2:], step, grid, tile), start=2):
            if isinstance(positions, slice):
                kept = kept[(slice(None),) * axis + (positions,)]
            else:
                kept = kept.index_select(axis, positions.to(kept.device))
        parts.append(kept.flatten(2).transpose(0, 1).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def evenly(count: int, step: float, index: int) -> Tensor:
    """About one in `step` of `count` positions, at uneven distances: even ones would be some columns of a map alone.

    `index` is that of their grid; others are chosen of each.

    >>> evenly(20, 5, index=0)
    tensor([ 2,  5, 13, 16])
    """
    slots = torch.arange(math.ceil(count / step), dtype=torch.float64, device="cpu")
    chosen = ((slots + (0.5 + GOLDEN * (slots + index)) % 1) * step).long()
    return chosen[chosen < count]


def tile_of(geometry: Convolution) -> Axes:
    """How many outputs in a row see different positions of the kernel: in transposed convolutions one in each phase.

    A grid of single positions with the stride's step would look at one phase alone.
    """
    axes = axes_of(geometry)
    return per_axis(geometry.stride, axes) if geometry.transposed else (1,) * axes


def _patches(geometry: Convolution, inputs: Tensor, output_size: Sequence[int], step: Axes, index: int) -> Tensor:
    """[I, *kernel, N, *positions]: windows that are views of the padded input."""
    x, axes = padded(geometry, inputs), len(step)
    kernel, stride, dilation = _geometry(geometry)
    for axis, first in enumerate(_corner(output_size, step, index)):
        x = x[(slice(None),) * (2 + axis) + (slice(first * stride[axis], None),)]
        x = x.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, step[axis] * stride[axis])
        x = x[..., :: dilation[axis]]
    channel, image, outputs = 1, 0, range(2, 2 + axes)
    return x.permute(channel, *range(2 + axes, 2 + 2 * axes), image, *outputs)


def _patches_transposed(
    geometry: Convolution, inputs: Tensor, output_size: Sequence[int], step: Axes, index: int
) -> Tensor:
    """[I, *kernel, N, *positions]: output u sees at kernel position k the input (u + padding - dilation k) / stride."""
    kernel, stride, dilation = _geometry(geometry)
    assert not isinstance(geometry.padding, str)
    padding = per_axis(geometry.padding, len(step))
    x = F.pad(inputs, [0, 1] * len(step))  # what is read where there is no such input
    for axis, outputs in enumerate(_positions(output_size, step, index, stride)):
        size = inputs.shape[2 + axis]
        if isinstance(outputs, slice):
            outputs = torch.arange(output_size[axis], device="cpu")[outputs]
        ahead = outputs + padding[axis] - dilation[axis] * torch.arange(kernel[axis], device="cpu").unsqueeze(1)
        seen = ahead.div(stride[axis], rounding_mode="floor")
        seen = torch.where((ahead % stride[axis] == 0) & (seen >= 0) & (seen < size), seen, size)
        read = x.index_select(2 + 2 * axis, seen.flatten().to(x.device))
        x = read.reshape(*x.shape[: 2 + 2 * axis], *seen.shape, *x.shape[3 + 2 * axis :])
    around = range(2, 2 + 2 * len(step))  # kernel and output positions in turns
    return x.permute(1, *around[::2], 0, *around[1::2])


def _geometry(conv: Convolution) -> tuple[Axes, Axes, Axes]:
    """Kernel size, stride and dilation."""
    axes = axes_of(conv)
    return (
        per_axis(conv.kernel_size, axes),
        per_axis(conv.stride, axes),
        per_axis(conv.dilation, axes),
    )


def _positions(output_size: Sequence[int], step: Axes, index: int, tile: Axes) -> list[slice | Tensor]:
    """Of each axis, the positions of outputs that are looked at."""
    corner = _corner(tiles(output_size, tile), step, index)
    found: list[slice | Tensor] = []
    for size, apart, first, width in zip(output_size, step, corner, tile, strict=True):
        every = torch.arange(size, device="cpu")
        found.append(slice(first, None, apart) if width == 1 else every[every // width % apart == first])
    return found


def tiles(output_size: Sequence[int], tile: Axes) -> Axes:
    """How many tiles an output has in each axis; the last one may stick out."""
    return tuple(-(-size // width) for size, width in zip(output_size, tile, strict=True))


def _corner(sizes: Sequence[int], step: Axes, index: int) -> Axes:
    """Where the grid begins. The first one does in the middle of its cell.

    Later ones are about a golden section of the cell's positions apart, which spreads any number of them: in their
    order few batches would see one border only.
    """
    cell = math.prod(step)
    apart = next(each for each in range(math.ceil(GOLDEN * cell), 2 * cell + 1) if math.gcd(each, cell) == 1)
    index = sum(size // 2 * math.prod(step[axis + 1 :]) for axis, size in enumerate(step)) + index * apart
    corner = []
    for size, width in zip(reversed(sizes), reversed(step), strict=True):
        corner.append(min(index % width, size - 1))
        index //= width
    return tuple(reversed(corner))


@dataclass(frozen=True)
class Root:
    """The symmetric square root of covariances [G, n, n] and its inverse, small eigenvalues lifted."""

    root: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> Root:
        values, vectors = torch.linalg.eigh(covariance)
        least = values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny) * 1e-6
        values = values.maximum(least).sqrt().unsqueeze(1)
        return cls((vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT)


@dataclass(frozen=True)
class Marginals:
    """Second moments of a layer's inputs over channels and over kernel positions, per group, in float64.

    The patches' moments S [P, P] are near the Kronecker product of the two, as images look alike at every position. A
    kernel whose last two modes are multiplied by the marginals' roots is then measured in the metric of the data.
    """

    channels: Tensor  # [G, I, I]
    positions: Tensor  # [G, K, K]
    means: Tensor | None = None  # [G, I, K], of the patches themselves

    @property
    def correlations(self) -> Tensor:
        """Between channels [G, I, I]: what `roots` leaves out without `mix_channels`."""
        sizes = self.channels.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(self.channels.dtype).tiny).sqrt()
        return self.channels / (sizes.unsqueeze(1) * sizes.unsqueeze(2))

    def roots(self, *, mix_channels: bool) -> tuple[Root, Root]:
        """The roots for channels and for positions.

        Without `mix_channels` the first is diagonal: a form that reads its inputs one by one cannot undo a rotation.
        """
        diagonal = self.channels.diagonal(dim1=1, dim2=2).diag_embed()
        return Root.of(self.channels if mix_channels else diagonal), Root.of(self.positions)


@dataclass(frozen=True)
class Assumed:
    """What is taken for granted of inputs that nobody has shown: neighbouring positions correlate, channels do not.

    Features of trained networks are smooth: on CIFAR-10 those of ResNet-20 correlate by 0.25 to 0.88 from a position
    to the next. A fit that weighs all directions alike spends components on changes that inputs hardly hold. What is
    assumed is a first-order autoregressive process along each axis, of correlation `NEIGHBOURS`: it took a tenth to a
    half off the drift of three trained networks (benchmarks/results/accuracy.md).
    """

    positions: Tensor  # [G, K, K]

    @classmethod
    def of(cls, spec: ConvSpec, device: torch.device) -> Assumed:
        """For the kernel of a convolution. Positions of a transposed one that never meet in an output do not correlate.

        >>> Assumed.of(ConvSpec(4, 8, (3,)), torch.device("cpu")).positions[0, 0]
        tensor([1.0000, 0.4000, 0.1600], dtype=torch.float64)
        """
        joint = torch.ones(1, 1, dtype=torch.float64, device=device)
        for size, stride, dilation in zip(spec.kernel_size, spec.stride, spec.dilation, strict=True):
            place = dilation * torch.arange(size, dtype=torch.float64, device=device)
            apart = (place[:, None] - place).abs()
            if spec.transposed:
                apart = torch.where(apart % stride == 0, apart / stride, math.inf)
            joint = torch.kron(joint, NEIGHBOURS**apart)
        return cls(joint.expand(spec.groups, -1, -1).contiguous())

    def roots(self, *, mix_channels: bool) -> tuple[None, Root]:
        """The root for positions; channels are as they are."""
        return None, Root.of(self.positions)


def whitened(kernel: Tensor, channels: Root | None, positions: Root) -> Tensor:
    """The kernel [G, O, I, K] times the roots of its input's marginals."""
    white = kernel.double() @ positions.root.unsqueeze(1)
    return (white if channels is None else torch.einsum("goik,gij->gojk", white, channels.root)).contiguous()


@torch.no_grad()
@full_products()
def measure_marginals(
    model: nn.Module, convs: Mapping[str, Convolution], batches: Sequence[Batch], forward: Forward | None = None
) -> dict[str, Marginals]:
    """Marginals at all the named layers, in one forward pass over the batches.

    Layers never reached are left out, those whose inputs do not vary, and those of more than `WIDEST` channels. `convs`
    are the plain convolutions that the layers of those names equal; the model is left as it is.

    Raises:
        ValueError: a batch leads to NaN or infinite values inside the model.
    """
    convs = {name: conv for name, conv in convs.items() if ConvSpec.of(conv).in_channels <= WIDEST}
    sums: dict[str, list[Tensor]] = {}
    seen = dict.fromkeys(convs, 0)
    modules = dict(model.named_modules())
    count = int(reduced_numbers(len(batches))[0])  # once: hooks of several processes do not run in step

    def watch(name: str, given: Given, output: Any) -> None:
        assert given.tensor is not None
        axes, conv = axes_of(convs[name]), reader_of(convs[name])
        x, y = as_map(given.tensor, axes), as_map(next(tensors_in(output)), axes)
        positions, size = math.prod(conv.kernel_size), y.shape[2:]
        numbers = conv.in_channels * positions
        wanted = positions_wanted(numbers // conv.groups, numbers, SAMPLE_BYTES // 4)
        step = thinning(size, y.shape[0] * count, wanted, tile_of(conv))
        patches = sampled_patches(conv, conv.groups, x, size, step, seen[name])
        seen[name] += 1
        patches = patches.reshape(conv.groups, conv.in_channels // conv.groups, positions, -1)  # [G, I, K, n]
        centred = patches - patches.mean((2, 3), keepdim=True)
        if centred.square().sum() <= ROUNDING * patches.square().sum():
            centred = torch.zeros_like(centred)
        rows = centred.flatten(2)
        number = torch.full_like(patches[:1, :1, :1, 0], patches.shape[3])
        parts = [
            (rows @ rows.mT).double(), (centred @ centred.mT).sum(1).double(), patches.sum(3).double(), number.double(),
        ]  # fmt: skip
        sums[name] = parts if name not in sums else [a + b for a, b in zip(sums[name], parts, strict=True)]

    with hooked({name: modules[name] for name in convs}, after=watch), quiet_run(model):
        for batch in batches:
            run_or_explain(model, batch, forward)
    found = [all_reduced_each({name: parts[which] for name, parts in sums.items()}, convs) for which in range(4)]
    reached = {name: [each[name] for each in found] for name in convs if name in found[0]}
    if broken := [name for name, parts in reached.items() if not all(bool(part.isfinite().all()) for part in parts)]:
        raise ValueError(f"the batches lead to NaN or infinite values at {broken[0]!r}: leave out those that do")
    # Without variance in its inputs a layer keeps the plain metric: their moments would say that nothing matters.
    return {name: _marginals(parts) for name, parts in reached.items() if all(_varies(part) for part in parts[:2])}


def _marginals(parts: Sequence[Tensor]) -> Marginals:
    """From sums over positions, of products and of patches, and the number of positions."""
    channels, positions = (part / part.diagonal(dim1=1, dim2=2).mean() for part in parts[:2])
    return Marginals(channels, positions, parts[2] / parts[3])


def _varies(moment: Tensor) -> bool:
    return bool(moment.diagonal(dim1=1, dim2=2).mean() > 0)


def positions_wanted(unknowns: int, numbers: int, limit: int = SAMPLE_BYTES) -> float:
    """How many positions are enough for so many unknowns, as far as float32 patches of `numbers` fit into `limit`."""
    return min(max(POSITIONS_PER_UNKNOWN * unknowns, LEAST_POSITIONS), limit / (4 * numbers))


def thinning(output_size: Sequence[int], images: int, wanted: float, tile: Axes | None = None) -> Axes:
    """How far apart tiles of outputs may lie in each axis, so that enough remain of the `images` of all processes."""
    apart = images * math.prod(output_size) / wanted
    sizes = tiles(output_size, tile or (1,) * len(output_size))
    steps: dict[int, int] = {}
    backwards = range(len(sizes) - 1, -1, -1)
    for axis in (*backwards, *backwards[:-1]):  # again: what a low map cannot give, a wide one can
        others = math.prod(step for other, step in steps.items() if other != axis)
        share = 1 / (len(sizes) - len(steps.keys() - {axis}))
        steps[axis] = min(max(1, round((apart / others) ** share)), sizes[axis])
    return tuple(steps[axis] for axis in range(len(sizes)))
