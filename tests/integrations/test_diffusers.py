"""Split autoencoders and U-Nets in folders of diffusers, alone and in pipelines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import convsplit
from convsplit.layers.separable import SeparableConv

pytest.importorskip("diffusers", exc_type=ImportError)

from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8,
        block_out_channels=(16, 24), layers_per_block=1,
    ).eval()  # fmt: skip


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, block_out_channels=(16, 24), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES).sample


@pytest.fixture(scope="module")
def split() -> AutoencoderKL:
    converted = convsplit.convert(autoencoder(), IMAGES, forms=("dw-pw", "pw-dw"))
    assert any(not layer.even for layer in converted.modules() if isinstance(layer, SeparableConv))
    return converted


def test_a_saved_model_comes_back_through_from_pretrained(split: AutoencoderKL, tmp_path: Path):
    split.save_pretrained(tmp_path)
    again, found = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.allclose(output(again), output(split), atol=1e-6)
    again.save_pretrained(tmp_path / "twice")
    assert torch.allclose(output(AutoencoderKL.from_pretrained(tmp_path / "twice")), output(split), atol=1e-6)
    half = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert torch.allclose(output(convsplit.restore(autoencoder(), tmp_path)), output(split), atol=1e-6)


def test_a_process_without_the_integration_stops_and_one_with_it_loads(split: AutoencoderKL, tmp_path: Path):
    split.save_pretrained(tmp_path)
    code = f"""
from diffusers import AutoencoderKL
try:
    AutoencoderKL.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    print("stopped:", error)
import convsplit.integrations.diffusers
print("loaded:", type(AutoencoderKL.from_pretrained({str(tmp_path)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(r"stopped: Unknown quantization type, got convsplit.*\nloaded: A", done.stdout), done.stderr[
        -2000:
    ]


def test_a_pipeline_keeps_a_split_unet(tmp_path: Path):
    dense = unet()
    smaller = convsplit.convert(dense, (torch.rand(1, 3, 8, 8), torch.tensor([1])), forms=("dw-pw", "pw-dw"))
    assert "quantization_config" not in dense.config
    pipeline = DDPMPipeline(unet=smaller, scheduler=DDPMScheduler(num_train_timesteps=10))
    pipeline.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    pictures = [
        each(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
        for each in (pipeline, again)
    ]
    assert torch.allclose(*map(torch.from_numpy, pictures), atol=1e-5)


def test_a_merged_model_is_a_plain_one(split: AutoencoderKL, tmp_path: Path):
    dense = convsplit.merge(split)
    assert "quantization_config" not in dense.config
    dense.save_pretrained(tmp_path)
    assert torch.allclose(output(AutoencoderKL.from_pretrained(tmp_path)), output(split), atol=1e-4)
