"""Second moments of what reaches a convolution and of what it should answer: all that its repair needs to know.

For patches x[P] (P = I·K, channel by channel) and targets y[O] at each position of each image,

    patches  S[P, P] = mean (x - mean x)(x - mean x)'        cross  C[O, P] = mean (y - mean y)(x - mean x)'

They are streamed: summed in float64 batch by batch, and positions are thinned out to a stated multiple of the
unknowns, on a grid that shifts from batch to batch. Where several processes share the work, sums are all-reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from convsplit.layers import SeparableConv2d
from convsplit.trace import Batch, Forward, batches_in, quiet_run, run_or_explain, tensors_in

POSITIONS_PER_UNKNOWN = 20


@dataclass(frozen=True)
class Moments:
    """Centred moments per group, in float64; `energy` [G, O] are the targets' variances, `count` the positions."""

    patches: Tensor  # [G, P, P]
    cross: Tensor  # [G, O, P]
    patch_mean: Tensor  # [G, P]
    target_mean: Tensor  # [G, O]
    energy: Tensor  # [G, O]
    count: int


def measure_moments(layer: SeparableConv2d, pairs: Iterable[tuple[Tensor, Tensor]], batches: int) -> Moments:
    """Moments of the patches that a layer sees in inputs [N, I, H, W], and of targets [N, O, H', W'].

    `batches` says how many pairs to expect, so that positions can be thinned out from the first on.

    Raises:
        ValueError: no pairs, or a pair with NaN or infinite values (says which).
    """
    geometry, pad, groups = layer.depthwise, layer.stages.get("pad"), layer.groups
    unknowns = layer.in_channels // groups * math.prod(layer.kernel_size)
    sums: list[Tensor] | None = None
    step = 1
    for index, (inputs, targets) in enumerate(pairs):
        if sums is None:
            step = _thinning(targets[:, 0].numel() * batches, unknowns)
        x, y = sampled(geometry, groups, inputs if pad is None else pad(inputs), targets, step, index)
        if not (x.isfinite().all() and y.isfinite().all()):
            raise ValueError(f"batch {index} leads to NaN or infinite values inside the model: leave it out")
        parts = _sums(x, y)
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
    if sums is None:
        raise ValueError("no calibration batch reached this layer")
    return _centred([_all_reduced(part) for part in sums])


def padded(geometry: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the convolution's own padding, in its padding mode."""
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return F.pad(x, geometry._reversed_padding_repeated_twice, mode=mode)


def sampled(
    geometry: nn.Conv2d, groups: int, inputs: Tensor, targets: Tensor, step: int, index: int
) -> tuple[Tensor, Tensor]:
    """Patches [G, P, n] and targets [G, O, n] at every `step`-th position of both axes; `index` shifts the grid."""
    height, width = targets.shape[-2:]
    top, left = min(index // step % step, height - 1), min(index % step, width - 1)
    wide = torch.promote_types(inputs.dtype, torch.float32)
    stride_y, stride_x = geometry.stride
    shifted = padded(geometry, inputs.to(wide))[:, :, top * stride_y :, left * stride_x :]
    stride = (step * stride_y, step * stride_x)
    patches = F.unfold(shifted, geometry.kernel_size, dilation=geometry.dilation, stride=stride)
    kept = targets.to(wide)[:, :, top::step, left::step].flatten(2)
    return _by_group(patches, groups), _by_group(kept, groups)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """[N, C, L] as [G, C / G, N·L]."""
    return values.transpose(0, 1).reshape(groups, values.shape[1] // groups, -1)


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
    """Marginals at all the named layers, in one forward pass over the batches; layers never reached are left out.

    `convs` are the plain convolutions that the layers of those names equal; the model is left as it is.
    """
    sums: dict[str, list[Tensor]] = {}
    seen = dict.fromkeys(convs, 0)
    modules = dict(model.named_modules())

    def watch(name: str, conv: nn.Conv2d) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x, y = args[0], output
            if x.dim() == 3:
                x, y = x.unsqueeze(0), y.unsqueeze(0)
            per_group = conv.in_channels // conv.groups
            step = _thinning(y[:, 0].numel() * len(batches), per_group)
            patches, _ = sampled(conv, conv.groups, x, y, step, seen[name])
            seen[name] += 1
            positions = math.prod(conv.kernel_size)
            channels = patches.reshape(conv.groups, per_group, positions, -1).double()  # [G, I, K, n]
            centred = channels - channels.mean((2, 3), keepdim=True)
            parts = [
                torch.einsum("gikn,gjkn->gij", centred, centred),
                torch.einsum("gikn,giln->gkl", centred, centred),
            ]
            sums[name] = parts if name not in sums else [a + b for a, b in zip(sums[name], parts, strict=True)]

        return hook

    handles = [modules[name].register_forward_hook(watch(name, conv)) for name, conv in convs.items()]
    try:
        with quiet_run(model):
            for batch in batches:
                run_or_explain(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    reached = {name: [_all_reduced(part) for part in sums[name]] for name in convs if name in sums}
    return {name: Marginals(*(part / part.diagonal(dim1=1, dim2=2).mean() for part in parts))
            for name, parts in reached.items()}  # fmt: skip


def checked_batches(batches: Any) -> list[Batch]:
    """All batches, read once, none of them NaN or infinite.

    Raises:
        ValueError: no batches, or one with NaN or infinite values (says which).
    """
    data = list(batches_in(batches))
    if not data:
        raise ValueError("no batches: give some unlabelled inputs to calibrate on")
    for index, batch in enumerate(data):
        if any(t.is_floating_point() and not bool(t.isfinite().all()) for t in tensors_in(batch)):
            raise ValueError(f"batch {index} holds NaN or infinite values: leave it out")
    return data


def _thinning(positions: int, unknowns: int) -> int:
    """How far apart positions may lie so that enough of them remain."""
    if _shared():
        everywhere = torch.tensor(positions)
        distributed.all_reduce(everywhere)
        positions = int(everywhere)
    return max(1, int(math.sqrt(positions / (POSITIONS_PER_UNKNOWN * unknowns))))


def _sums(x: Tensor, y: Tensor) -> list[Tensor]:
    """Uncentred sums over positions."""
    count = torch.tensor(float(x.shape[2]), dtype=torch.float64, device=x.device)
    products = [x @ x.mT, y @ x.mT, x.sum(2), y.sum(2), y.square().sum(2)]
    return [product.double() for product in products] + [count]


def _centred(sums: list[Tensor]) -> Moments:
    xx, yx, x, y, yy, count = sums
    patch_mean, target_mean = x / count, y / count
    return Moments(
        patches=xx / count - patch_mean.unsqueeze(2) * patch_mean.unsqueeze(1),
        cross=yx / count - target_mean.unsqueeze(2) * patch_mean.unsqueeze(1),
        patch_mean=patch_mean,
        target_mean=target_mean,
        energy=(yy / count - target_mean.square()).clamp_min(0),
        count=int(count),
    )


def _all_reduced(part: Tensor) -> Tensor:
    if _shared():
        distributed.all_reduce(part)
    return part


def _shared() -> bool:
    return distributed.is_available() and distributed.is_initialized()
