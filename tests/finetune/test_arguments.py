"""Reconstruction of models whose modules take more than one tensor: only what its inputs are known for is a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convsplit
from convsplit.data.batches import checked_batches
from convsplit.finetune.blocks import find_modules, walk_blocks
from convsplit.layers import SeparableConv
from convsplit.model.copies import scratch_copy

Batches = list[Any]


class Optional(nn.Module):
    """A block that does something else with each of its arguments, called in three ways by a model without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor | None = None, scale: float = 1.0, act: str = "relu") -> Tensor:
        y = self.first(x)
        y = y if skip is None else y + scale * skip
        return self.second(torch.relu(y) if act == "relu" else torch.tanh(y))


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.plain, self.scaled, self.other = Optional(), Optional(), Optional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > math.inf:  # no graph can be had of this
            return x
        y = self.plain(x)
        return self.other(self.scaled(y, skip=x, scale=3.0), x, act="tanh")


def of_optional_arguments() -> tuple[nn.Module, Batches]:
    return Calls(), [torch.randn(16, 3, 10, 10) for _ in range(2)]


def of_unet() -> tuple[nn.Module, Batches]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 16), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, [{"sample": torch.randn(8, 3, 8, 8), "timestep": torch.tensor(10)} for _ in range(2)]


def of_autoencoder() -> tuple[nn.Module, Batches]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), latent_channels=4, norm_num_groups=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model, [torch.randn(8, 3, 8, 8) for _ in range(2)]


@pytest.mark.parametrize("build", [of_optional_arguments, of_unet, of_autoencoder])
def test_the_model_comes_nearer_and_no_block_gets_worse(build: Callable[[], tuple[nn.Module, Batches]]) -> None:
    torch.manual_seed(0)
    model, data = build()
    model.eval()
    converted = convsplit.convert(model, forms=("dw-pw", "pw-dw"), budget=convsplit.Budget(params=0.3))
    before = convsplit.compare(converted, model, data).drift
    blocks = convsplit.reconstruct(converted, model, data, steps=12)
    after = convsplit.compare(converted, model, data).drift
    assert blocks
    assert all(block.after <= block.before for block in blocks)
    assert after is not None
    assert after.relative < before.relative


class Flagged(nn.Module):
    """Its middle block gets constants beside its tensor, one of them by the size of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.sized = nn.Conv2d(3, 16, 3, padding=1), Optional(), Optional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > math.inf:
            return x
        return self.sized(self.middle(x=x, skip=None, act="tanh"), None, float(x.shape[-1]))


def blocks_of(model: nn.Module, data: Batches) -> list[str]:
    converted = scratch_copy(convsplit.convert(model, forms="dw-pw", rank=1))
    split = {name for name, m in converted.named_modules() if isinstance(m, SeparableConv)}
    return list(find_modules(converted, split, checked_batches(data), None))


def test_modules_with_other_tensors_are_no_blocks() -> None:
    torch.manual_seed(0)
    own = [f"{name}.{part}" for name in ("scaled", "other") for part in ("first", "second")]
    assert blocks_of(*of_optional_arguments()) == ["stem", "plain", *own]


def test_constants_are_replayed_where_they_are_the_same_in_all_batches() -> None:
    torch.manual_seed(0)
    model, data = Flagged().eval(), [torch.randn(8, 3, 10, 10) for _ in range(2)]
    assert blocks_of(model, data) == ["stem", "middle", "sized"]
    assert blocks_of(model, [*data, torch.randn(8, 3, 12, 12)]) == ["stem", "middle", "sized.first", "sized.second"]
    converted = convsplit.convert(model, exact=True)
    _, blocks = walk_blocks(scratch_copy(model), scratch_copy(converted), data, None)
    with torch.no_grad():
        for block in blocks:
            for x, target in zip(block.inputs, block.targets, strict=True):
                torch.testing.assert_close(block.run(x), target, rtol=1e-3, atol=1e-4)
