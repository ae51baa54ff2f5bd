"""Where a CP fit starts: from the singular vectors of a kernel's slices, from another fit, or from noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorly as tl
import torch
from torch import Tensor
from torch.nn.functional import pad

from convsplit.lowrank.factors import Factors, each, norms, reconstruct
from convsplit.lowrank.svd import slice_svd

BY_POSITION, BY_INPUT, BY_OUTPUT = 3, 2, 1  # modes of [G,O,I,K]


def svd_start(
    weight: Tensor, rank: int, seed: int, problems: int = 1, modes: Sequence[int] = (BY_POSITION, BY_INPUT, BY_OUTPUT)
) -> Factors:
    """The best of three exact-in-the-limit SVD forms with `rank` components, for each of some equal shares of groups.

    Cut W into slices along one mode, take the SVD of every slice, keep the largest singular values of all slices
    together. Slices along the input channels give dw-pw, along the output channels pw-dw; the positions are first
    turned to their principal axes, as a few of those carry most of a trained kernel.
    """
    with tl.backend_context("pytorch", local_threadsafe=True):
        starts = [_slice_form(weight, mode, rank, seed) for mode in modes]
    captured = torch.stack([energy.view(problems, -1).sum(1) for energy, _ in starts])
    best = captured.argmax(0).repeat_interleave(len(weight) // problems).tolist()
    forms = [_padded(factors, rank, seed, problems) for _, factors in starts]
    return each(lambda *factors: torch.stack([factors[form][group] for group, form in enumerate(best)]), *forms)


def starting_points(weight: Tensor, rank: int, seed: int, count: int, problems: int = 1) -> list[Factors]:
    """`count` starts: the best SVD form, then random ones. The groups of `problems` of one shape may come together."""
    if count < 1:
        return []
    starts = [svd_start(weight, rank, seed, problems)]
    A, B, C = (weight.new_zeros(weight.shape[0], size, 0) for size in weight.shape[1:])
    return starts + [_padded((A, B, C), rank, seed + extra, problems) for extra in range(1, count)]


def exact_factors(weight: Tensor, rank: int) -> Factors | None:
    """Factors that equal the kernel, zeros filling them up to the rank; None where the rank is too low for them.

    The SVDs of all slices along one mode, complete, with unit vectors for that mode: min over modes of N min(P, Q).
    """
    G, *sizes = weight.shape
    mode = min((0, 1, 2), key=lambda n: sizes[n] * min(sizes[:n] + sizes[n + 1 :]))
    N, D = sizes[mode], min(sizes[:mode] + sizes[mode + 1 :])
    if rank < N * D:
        return None
    svd = slice_svd(weight.movedim(mode + 1, 1))
    unit = torch.eye(N, dtype=weight.dtype, device=weight.device).repeat_interleave(D, dim=1).expand(G, -1, -1)
    left = (svd.left * svd.values.unsqueeze(2)).transpose(1, 2).flatten(2)
    three = [left, svd.right.mT.transpose(1, 2).flatten(2)]
    three.insert(mode, unit)
    A, B, C = (pad(factor, (0, rank - N * D)) for factor in three)
    return A, B, C


def _slice_form(weight: Tensor, mode: int, rank: int, seed: int) -> tuple[Tensor, Factors]:
    """(energy captured [G], factors) of the SVDs of all slices along `mode`, sharing at most `rank` components."""
    slices = weight.movedim(mode, 1)  # [G,N,P,Q]
    G, N, P, Q = slices.shape
    axes = torch.eye(N, dtype=weight.dtype, device=weight.device).expand(G, N, N)
    if mode == BY_POSITION:
        unfolded = slices.flatten(2)
        axes = tl.eigh(unfolded @ unfolded.mT)[1]  # columns
        slices = (axes.mT @ unfolded).view(G, N, P, Q)
    left, sigma, right = _leading(slices, math.ceil(1.5 * rank / N) + 4, seed)
    sigma = sigma.flatten(1)
    picked = sigma.topk(min(rank, sigma.shape[1]), dim=1)
    where = picked.indices // left.shape[-1]  # [G,R], the slice each component came from

    def pick(stack: Tensor) -> Tensor:  # [G,N,X,D] -> [G,X,R]
        columns = stack.transpose(1, 2).flatten(2)
        return columns.gather(2, picked.indices[:, None].expand(-1, columns.shape[1], -1))

    along = axes.gather(2, where[:, None].expand(-1, N, -1))
    three = [pick(left) * picked.values[:, None], pick(right)]
    three.insert(mode - 1, along)
    A, B, C = three
    return picked.values.square().sum(1), (A, B, C)


def _leading(slices: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets U[G,N,P,D], s[G,N,D], V[G,N,Q,D] of slices[G,N,P,Q], D = min(count, P, Q).

    Wide slices are first projected on a range found by one step of subspace iteration (Halko, Martinsson & Tropp 2011).
    The rest is the eigenvalue problem of the smaller Gram matrix: exact enough for a start, and batched.
    """
    if slices.shape[-1] > slices.shape[-2]:
        right, sigma, left = _leading(slices.mT, count, seed)
        return left, sigma, right
    Q = slices.shape[-1]
    if count + 8 < Q / 2:
        noise = torch.randn(
            Q, count + 8, generator=torch.Generator().manual_seed(seed), dtype=slices.dtype, device="cpu"
        ).to(slices)
        basis = tl.qr(slices.mT @ (slices @ noise))[0]
    else:
        basis = torch.eye(Q, dtype=slices.dtype, device=slices.device)
    small = slices @ basis  # [G,N,P,D+8]
    squares, vectors = tl.eigh(small.mT @ small)
    squares, vectors = squares.flip(-1)[..., :count], vectors.flip(-1)[..., :count]
    sigma = squares.clamp_min(0).sqrt()
    left = small @ vectors / sigma.clamp_min(1e-20)[..., None, :]
    return left, sigma, basis @ vectors


def _padded(factors: Factors, rank: int, seed: int, problems: int = 1) -> Factors:
    """Small random components for what no SVD form can fill (ranks above an exact decomposition's).

    Each of the problems gets those that it would get alone.
    """
    missing = rank - factors[0].shape[-1]
    if missing <= 0:
        return factors
    random = torch.Generator().manual_seed(seed)

    def filled(factor: Tensor) -> Tensor:
        G, N, _ = factor.shape
        noise = torch.randn(G // problems, N, missing, generator=random, dtype=factor.dtype, device="cpu").to(factor)
        return torch.cat([factor, 0.1 * noise.repeat(problems, 1, 1) / math.sqrt(N)], dim=-1)

    return each(filled, factors)


def resized(weight: Tensor, factors: Factors, rank: int, seed: int, problems: int = 1) -> Factors:
    """`factors` cut to their `rank` largest components, or grown by an SVD form of what they leave.

    By positions alone: of all residuals of the fits of ResNet-20, ResNet-56 and InceptionV3 it was the best form.
    """
    have = factors[0].shape[-1]
    if have < rank:
        extra = svd_start(weight - reconstruct(factors), rank - have, seed, problems, modes=(BY_POSITION,))
        return each(lambda *parts: torch.cat(parts, dim=-1), factors, extra)
    keep = norms(factors).topk(rank, dim=1).indices[:, None]
    return each(lambda factor: factor.gather(2, keep.expand(-1, factor.shape[1], -1)), factors)
