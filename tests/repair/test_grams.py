"""Products of patches with themselves."""

import pytest
import torch
from torch import nn

from convsplit.data.moments import sampled_patches
from convsplit.repair import grams
from convsplit.repair.grams import Overlap, gram

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x7": {"kernel_size": (1, 7), "padding": (0, 3)},
    "5x1, no padding": {"kernel_size": (5, 1)},
    "even": {"kernel_size": (2, 4), "padding": (1, 2)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": (2, 3)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_overlapping_patches_have_the_products_of_any(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grams, "LEAST_WORK", 1)
    reader = nn.Conv2d(6, 4, **CONVOLUTIONS[name])
    x = torch.randn(3, 6, 10, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = reader.double()(x).shape[-2:]
    overlap = Overlap.of(reader, 6 // reader.groups, positions)
    assert overlap is not None
    patches = sampled_patches(reader, reader.groups, x, positions, (1, 1), 0)
    torch.testing.assert_close(gram(patches, overlap), patches @ patches.mT)
    torch.testing.assert_close(gram(patches), patches @ patches.mT)


@pytest.mark.parametrize("change", [{"stride": 2}, {"kernel_size": 1}, {"dilation": 5, "padding": 5}])
def test_patches_that_do_not_overlap_enough_are_taken_as_they_are(change: dict[str, int]) -> None:
    reader = nn.Conv2d(grams.LEAST_WORK, 4, **{"kernel_size": 3, **change})
    assert Overlap.of(reader, reader.in_channels, (8, 8)) is None


def test_many_rows_are_multiplied_in_blocks() -> None:
    x = torch.randn(2, 3 * grams.LEAST_BLOCK + 5, 50, dtype=torch.float64)
    torch.testing.assert_close(gram(x), x @ x.mT)
