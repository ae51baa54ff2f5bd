"""Second moments of what reaches convolutions: the metric in which an error of their weights becomes one of outputs.

Sums run over the positions of each image, batch by batch, in float64. Positions are thinned out to a stated multiple of
the unknowns, on a grid that shifts from batch to batch. Where several processes share the work, sums are all-reduced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from convsplit.data.processes import all_reduced_each, is_shared, reduced_numbers
from convsplit.model.hooks import Given, hooked
from convsplit.model.running import Batch, Forward, quiet_run, run_or_explain
from convsplit.model.values import tensors_in
from convsplit.precision import widened
from convsplit.spec import Pair, padding_around

POSITIONS_PER_UNKNOWN = 200
ROUNDING = 1e-12  # of the energy of patches: what is left of it once their mean is taken off equal ones
SAMPLE_BYTES = 256 << 20  # what the patches of one layer may take up: 14 positions an unknown of 512 channels, 3 x 3


def padded(geometry: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the convolution's own padding, in its padding mode."""
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, padding_around(geometry), mode=mode)


def sampled_patches(
    geometry: nn.Conv2d, groups: int, inputs: Tensor, output_hw: Sequence[int], step: Pair, index: int
) -> Tensor:
    """Patches [G, P, n] of inputs [N, I, H, W] at every `step`-th position of each axis; `index` shifts the grid."""
    top, left = _corner(output_hw, step, index)
    stride_y, stride_x = geometry.stride
    shifted = padded(geometry, widened(inputs))[:, :, top * stride_y :, left * stride_x :]
    stride = (step[0] * stride_y, step[1] * stride_x)
    patches = F.unfold(shifted, geometry.kernel_size, dilation=geometry.dilation, stride=stride)
    return patches.transpose(0, 1).reshape(groups, patches.shape[1] // groups, -1)


def sampled_outputs(outputs: Tensor, step: Pair, index: int) -> Tensor:
    """Outputs [N, O, H', W'] at the positions of `sampled_patches`, as [O, n]."""
    top, left = _corner(outputs.shape[-2:], step, index)
    kept = widened(outputs)[:, :, top :: step[0], left :: step[1]]
    return kept.flatten(2).transpose(0, 1).flatten(1)


def _corner(output_hw: Sequence[int], step: Pair, index: int) -> Pair:
    """Where the grid of positions begins; processes that deal out batches in turn take the corners of one alone."""
    height, width = output_hw
    if is_shared():
        index = index * distributed.get_world_size() + distributed.get_rank()
    return min(index // step[1] % step[0], height - 1), min(index % step[1], width - 1)


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

    def roots(self, *, mix_channels: bool) -> tuple[Root, Root]:
        """The roots for channels and for positions.

        Without `mix_channels` the first is diagonal: a form that reads its inputs one by one cannot undo a rotation.
        """
        diagonal = self.channels.diagonal(dim1=1, dim2=2).diag_embed()
        return Root.of(self.channels if mix_channels else diagonal), Root.of(self.positions)


def whitened(kernel: Tensor, channels: Root, positions: Root) -> Tensor:
    """The kernel [G, O, I, K] times the roots of its input's marginals."""
    return torch.einsum("goik,gij,gkl->gojl", kernel.double(), channels.root, positions.root).contiguous()


@torch.no_grad()
def measure_marginals(
    model: nn.Module, convs: Mapping[str, nn.Conv2d], batches: Sequence[Batch], forward: Forward | None = None
) -> dict[str, Marginals]:
    """Marginals at all the named layers, in one forward pass over the batches.

    Layers never reached are left out, and those whose inputs do not vary. `convs` are the plain convolutions that the
    layers of those names equal; the model is left as it is.

    Raises:
        ValueError: a batch leads to NaN or infinite values inside the model.
    """
    sums: dict[str, list[Tensor]] = {}
    seen = dict.fromkeys(convs, 0)
    modules = dict(model.named_modules())
    count = int(reduced_numbers(len(batches))[0])  # once: hooks of several processes do not run in step

    def watch(name: str, given: Given, output: Any) -> None:
        conv, x, y = convs[name], given.tensor, next(tensors_in(output))
        assert x is not None
        if x.dim() == 3:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        positions = math.prod(conv.kernel_size)
        step = thinning(y.shape[-2:], y.shape[0] * count, conv.in_channels, positions, limit=SAMPLE_BYTES // 4)
        patches = sampled_patches(conv, conv.groups, x, y.shape[-2:], step, seen[name])
        seen[name] += 1
        patches = patches.reshape(conv.groups, conv.in_channels // conv.groups, positions, -1)  # [G, I, K, n]
        centred = patches - patches.mean((2, 3), keepdim=True)
        if centred.square().sum() <= ROUNDING * patches.square().sum():
            centred = torch.zeros_like(centred)
        rows = centred.flatten(2)
        parts = [(rows @ rows.mT).double(), (centred @ centred.mT).sum(1).double()]
        sums[name] = parts if name not in sums else [a + b for a, b in zip(sums[name], parts, strict=True)]

    with hooked({name: modules[name] for name in convs}, after=watch), quiet_run(model):
        for batch in batches:
            run_or_explain(model, batch, forward)
    found = [all_reduced_each({name: parts[which] for name, parts in sums.items()}, convs) for which in range(2)]
    reached = {name: [each[name] for each in found] for name in convs if name in found[0]}
    if broken := [name for name, parts in reached.items() if not all(bool(part.isfinite().all()) for part in parts)]:
        raise ValueError(f"the batches lead to NaN or infinite values at {broken[0]!r}: leave out those that do")
    # Without variance in its inputs a layer keeps the plain metric: their moments would say that nothing matters.
    return {name: Marginals(*(part / part.diagonal(dim1=1, dim2=2).mean() for part in parts))
            for name, parts in reached.items() if all(_varies(part) for part in parts)}  # fmt: skip


def _varies(moment: Tensor) -> bool:
    return bool(moment.diagonal(dim1=1, dim2=2).mean() > 0)


def thinning(
    output_hw: Sequence[int], images: int, channels: int, positions: int = 1, limit: int = SAMPLE_BYTES
) -> Pair:
    """How far apart positions of outputs may lie in each axis, so that enough remain of `images` (in all processes).

    Enough for each of `channels` unknowns, in float32 patches of `positions` values a channel that take `limit` bytes.
    """
    height, width = output_hw
    affordable = limit / (4 * channels * positions)
    everything = images * height * width
    apart = everything / min(POSITIONS_PER_UNKNOWN * channels, affordable)
    across = min(max(1, round(math.sqrt(apart))), width)
    down = min(max(1, round(apart / across)), height)
    return down, min(max(1, round(apart / down)), width)  # what a low map cannot give, a wide one can
