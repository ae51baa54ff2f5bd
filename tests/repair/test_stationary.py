"""Moments of patches by the distance of taps alone, against S itself."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convsplit.repair import stationary
from convsplit.repair.stationary import Stationary

KERNELS = [(1,), (5,), (1, 4), (2, 3), (3, 3), (2, 2, 3)]


def moments(maps: torch.Tensor, kernel_size: tuple[int, ...], padding: str) -> torch.Tensor:
    """S [P, P] about zero of maps [N, I, *size]."""
    x = maps
    for axis, size in enumerate(kernel_size, start=2):
        if padding == "circular":
            x = torch.cat([x, x.narrow(axis, 0, size - 1)], axis)
        x = x.unfold(axis, size, 1)
    axes = len(kernel_size)
    patches = x.permute(1, *range(2 + axes, 2 + 2 * axes), 0, *range(2, 2 + axes)).flatten(1 + axes)
    patches = patches.reshape(-1, patches.shape[-1])
    return patches @ patches.T / patches.shape[1]


def product(S: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    return S @ (B.unsqueeze(1) * C).flatten(0, 1)


@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_it_is_exact_where_maps_have_no_borders(kernel_size, at_once, monkeypatch):
    monkeypatch.setattr(stationary, "SPREAD", at_once)
    maps = torch.randn(4, 3, *(7,) * len(kernel_size), dtype=torch.float64)
    S = moments(maps, kernel_size, "circular")
    B, C = torch.randn(3, 5, dtype=torch.float64), torch.randn(math.prod(kernel_size), 5, dtype=torch.float64)
    found = Stationary.of(S, kernel_size)
    assert found.blocks.shape[1] // 3 == stationary.distances(kernel_size)
    assert stationary.distances(kernel_size) == math.prod(2 * size - 1 for size in kernel_size)
    torch.testing.assert_close(found.filtered(B, C), product(S, B, C))


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_taps_may_see_more_or_less(kernel_size):
    maps = torch.randn(4, 3, *(7,) * len(kernel_size), dtype=torch.float64)
    seen = (0.2 + torch.rand(math.prod(kernel_size), dtype=torch.float64)).repeat(3)
    S = seen[:, None] * moments(maps, kernel_size, "circular") * seen
    B, C = torch.randn(3, 5, dtype=torch.float64), torch.randn(math.prod(kernel_size), 5, dtype=torch.float64)
    torch.testing.assert_close(Stationary.of(S, kernel_size).filtered(B, C), product(S, B, C))


@pytest.mark.parametrize(("side", "off"), [(1, 1e-12), (2, 0.25), (4, 0.1), (16, 0.01)])
def test_it_is_near_on_small_maps_that_are_padded(side, off):
    """On maps of one position only the middle tap sees anything."""
    torch.manual_seed(0)
    mixed = nn.Conv2d(6, 6, 5, padding=2, bias=False)(torch.randn(64, 6, side, side)).detach().relu().double()
    S = moments(F.pad(mixed, (1, 1, 1, 1)), (3, 3), "none")
    B, C = torch.randn(6, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    exact = product(S, B, C)
    assert (Stationary.of(S, (3, 3)).filtered(B, C) - exact).norm() < off * exact.norm()
