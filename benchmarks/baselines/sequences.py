"""Convolutions as two or three smaller ones in a row: what papers and other packages do, written short.

A baseline says which stages stand for a convolution at a rank, and fills them. All layers get the same part of their
own MACs (or parameters), which is what these methods do unless somebody searches with labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import tensorly as tl
import torch
from tensorly.decomposition import parafac, partial_tucker
from torch import Size, Tensor, nn

Chain = nn.Sequential
TUCKER_STEPS = 64  # ranks of a Tucker decomposition are so many parts of the channels


@dataclass(frozen=True)
class Baseline:
    """`stages(conv, rank)` makes empty convolutions, `fit(conv, chain, rank)` fills them from the kernel."""

    name: str
    source: str
    stages: Callable[[nn.Conv2d, int], Chain]
    fit: Callable[[nn.Conv2d, Chain, int], nn.Module]
    most: Callable[[nn.Conv2d], int]


def split_equally(model: nn.Module, image: Tensor, kind: str, kept: float, baseline: Baseline) -> nn.Module:
    """A copy in which every layer has the largest rank with at most that part of its MACs or parameters.

    Layers for which rank 1 is too much stay as they are.
    """
    model = copy.deepcopy(model)
    for name, (conv, shape) in convolutions(model, image).items():
        rank = largest_rank(conv, shape, kind, kept, baseline)
        if rank:
            with torch.no_grad():
                replace(model, name, baseline.fit(conv, baseline.stages(conv, rank), rank))
    return model.eval()


def convolutions(model: nn.Module, image: Tensor) -> dict[str, tuple[nn.Conv2d, Size]]:
    """The convolutions of kernels larger than 1x1 and more than one input channel, and the shapes of their inputs."""
    found: dict[str, tuple[nn.Conv2d, Size]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, given: found.update({name: (module, given[0].shape)})

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.in_channels > 1
        and module.kernel_size != (1, 1)
    ]
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    return found


def largest_rank(conv: nn.Conv2d, shape: Size, kind: str, kept: float, baseline: Baseline) -> int:
    """0 where not even rank 1 keeps so little."""
    limit = kept * cost(Chain(conv), shape, kind)
    low, high = 0, baseline.most(conv)
    while low < high:
        middle = (low + high + 1) // 2
        with torch.device("meta"):
            spent = cost(baseline.stages(conv, middle), shape, kind)
        low, high = (middle, high) if spent <= limit else (low, middle - 1)
    return low


def cost(chain: Chain, shape: Size, kind: str) -> int:
    """Parameters, or multiply-adds for one input of that shape."""
    if kind == "params":
        return sum(stage.weight.numel() for stage in chain)
    total, x = 0, torch.empty(1, *shape[1:], device="meta")
    for stage in chain:
        x = copy.deepcopy(stage).to("meta")(x)
        total += stage.weight.numel() * x.shape[2] * x.shape[3]
    return total


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def row(conv: nn.Conv2d, *stages: tuple[int, tuple[int, int], int]) -> Chain:
    """Stages of (output channels, kernel, groups), each along the axes in which its kernel reaches; the bias last."""
    made, channels = [], conv.in_channels
    size = conv.kernel_size
    for index, (outputs, kernel, groups) in enumerate(stages):
        reaches = [k > 1 or (k == whole == 1 and max(kernel) > 1) for k, whole in zip(kernel, size, strict=True)]
        stride = tuple(s if own else 1 for s, own in zip(conv.stride, reaches, strict=True))
        padding = tuple(p if own else 0 for p, own in zip(conv.padding, reaches, strict=True))
        dilation = tuple(d if own else 1 for d, own in zip(conv.dilation, reaches, strict=True))
        bias = conv.bias is not None and index == len(stages) - 1
        made.append(nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias))
        channels = outputs
    return Chain(*made)


def filled(conv: nn.Conv2d, chain: Chain, *weights: Tensor) -> Chain:
    for stage, weight in zip(chain, weights, strict=True):
        stage.weight.copy_(weight.reshape(stage.weight.shape))
    if conv.bias is not None:
        chain[-1].bias.copy_(conv.bias)
    return chain


# Network Decoupling (Guo et al., 2018, 1808.05517, sections 3.2 and 3.3): an SVD of each slice, equal ranks.


def _fit_pointwise_first(conv: nn.Conv2d, chain: Chain, rank: int) -> Chain:
    U, S, V = _svd(conv.weight.flatten(2), rank)  # of each output channel: [O, I, r], [O, r], [O, K, r]
    return filled(conv, chain, (U * S[:, None]).transpose(1, 2), V.transpose(1, 2))


def _fit_depthwise_first(conv: nn.Conv2d, chain: Chain, rank: int) -> Chain:
    U, S, V = _svd(
        conv.weight.flatten(2).transpose(0, 1), rank
    )  # of each input channel: [I, O, r], [I, r], [I, K, r]
    return filled(conv, chain, V.transpose(1, 2), (U * S[:, None]).permute(1, 0, 2))


# Spatial decomposition (Jaderberg et al., 2014, 1405.3866), as AIMET's spatial SVD: k x 1, then 1 x k.


def _fit_spatial(conv: nn.Conv2d, chain: Chain, rank: int) -> Chain:
    O, I, height, width = conv.weight.shape
    U, S, V = _svd(conv.weight.permute(1, 2, 0, 3).reshape(I * height, O * width), rank)
    root = S.sqrt()  # AIMET gives both stages the root
    return filled(
        conv, chain, (U * root).T.reshape(rank, I, height), (V * root).T.reshape(rank, O, width).transpose(0, 1)
    )


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :].transpose(-2, -1)


# CP with a spatial mode (musco's CP3) and with two (Lebedev et al., 2015, 1412.6553), Tucker-2 (Kim et al., 2016,
# 1511.06530), all with tensorly's functions and their defaults.


def _fit_cp3(conv: nn.Conv2d, chain: Chain, rank: int) -> Chain:
    weights, (A, B, C) = _parafac(conv.weight.flatten(2), rank)
    return filled(conv, chain, B.T, C.T, A * weights)


def _fit_cp4(conv: nn.Conv2d, chain: Chain, rank: int) -> Chain:
    weights, (A, B, down, across) = _parafac(conv.weight, rank)
    return filled(conv, chain, B.T, down.T, across.T, A * weights)


def _parafac(kernel: Tensor, rank: int) -> tuple[Tensor, list[Tensor]]:
    with tl.backend_context("pytorch"):
        found = parafac(kernel, rank, init="svd", random_state=0)
        return found.weights, found.factors


def _fit_tucker(conv: nn.Conv2d, chain: Chain, rank: int) -> Chain:
    with tl.backend_context("pytorch"):
        (core, (last, first)), _ = partial_tucker(
            conv.weight, rank=tucker_ranks(conv, rank), modes=[0, 1], init="svd"
        )
    return filled(conv, chain, first.T, core, last)


def tucker_ranks(conv: nn.Conv2d, step: int) -> tuple[int, int]:
    """So many parts of the output and of the input channels."""
    return max(1, step * conv.out_channels // TUCKER_STEPS), max(1, step * conv.in_channels // TUCKER_STEPS)


def _rows_and_columns(conv: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    return (conv.kernel_size[0], 1), (1, conv.kernel_size[1])


def _cp4_stages(conv: nn.Conv2d, r: int) -> Chain:
    down, across = _rows_and_columns(conv)
    return row(conv, (r, (1, 1), 1), (r, down, r), (r, across, r), (conv.out_channels, (1, 1), 1))


def _spatial_stages(conv: nn.Conv2d, r: int) -> Chain:
    down, across = _rows_and_columns(conv)
    return row(conv, (r, down, 1), (conv.out_channels, across, 1))


def _tucker_stages(conv: nn.Conv2d, r: int) -> Chain:
    last, first = tucker_ranks(conv, r)
    return row(conv, (first, (1, 1), 1), (last, conv.kernel_size, 1), (conv.out_channels, (1, 1), 1))


def _positions(conv: nn.Conv2d) -> int:
    return conv.kernel_size[0] * conv.kernel_size[1]


BASELINES = (
    Baseline(
        "slice-wise SVD, pw-dw", "Network Decoupling, 1808.05517",
        lambda conv, r: row(
            conv, (conv.out_channels * r, (1, 1), 1), (conv.out_channels, conv.kernel_size, conv.out_channels)
        ),
        _fit_pointwise_first, lambda conv: min(conv.in_channels, _positions(conv)),
    ),
    Baseline(
        "slice-wise SVD, dw-pw", "Network Decoupling, 1808.05517",
        lambda conv, r: row(
            conv, (conv.in_channels * r, conv.kernel_size, conv.in_channels), (conv.out_channels, (1, 1), 1)
        ),
        _fit_depthwise_first, lambda conv: min(conv.out_channels, _positions(conv)),
    ),
    Baseline(
        "spatial SVD, k x 1 and 1 x k", "1405.3866, as AIMET", _spatial_stages, _fit_spatial,
        lambda conv: min(conv.in_channels * conv.kernel_size[0], conv.out_channels * conv.kernel_size[1]),
    ),
    Baseline(
        "tensorly parafac, three modes", "tensorly, CP of musco",
        lambda conv, r: row(conv, (r, (1, 1), 1), (r, conv.kernel_size, r), (conv.out_channels, (1, 1), 1)),
        _fit_cp3, lambda conv: 4 * max(conv.in_channels, conv.out_channels),
    ),
    Baseline(
        "tensorly parafac, four modes", "tensorly, 1412.6553", _cp4_stages, _fit_cp4,
        lambda conv: 4 * max(conv.in_channels, conv.out_channels),
    ),
    Baseline(
        "tensorly partial Tucker", "tensorly, 1511.06530", _tucker_stages, _fit_tucker, lambda conv: TUCKER_STEPS
    ),
)  # fmt: skip
