"""Foreign images are as large and as bright as the network's own, and differ in what they show."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("sklearn")

from benchmarks.suites import foreign  # noqa: E402


@pytest.mark.parametrize("shape", [(20, 1, 8, 8), (20, 3, 40, 50), (20, 3, 20, 20)])
def test_images_take_size_channels_means_and_deviations(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    own = torch.randn(16, 3, 32, 32) * torch.tensor([1.0, 2, 3]).view(3, 1, 1) + 5
    made = foreign.like(own, torch.rand(shape))
    assert made.shape == (20, 3, 32, 32)
    for figure in (torch.mean, torch.std):
        torch.testing.assert_close(figure(made, (0, 2, 3)), figure(own, (0, 2, 3)), rtol=1e-3, atol=1e-3)


def test_squares_of_photos_do_not_repeat() -> None:
    photos = torch.rand(2, 3, 200, 300)
    found = foreign.squares(photos, 10)
    assert found.shape == (10, 3, foreign.PATCH, foreign.PATCH)
    assert len({float(each.sum()) for each in found}) == 10
