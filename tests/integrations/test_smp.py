"""Split models of segmentation_models_pytorch in its own folders."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convsplit

smp = pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)

IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def split() -> torch.nn.Module:
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8)).eval()
    converted = convsplit.convert(model, IMAGES, forms=("dw-pw", "pw-dw"))
    layers = [layer for layer in converted.modules() if isinstance(layer, convsplit.SeparableConv)]
    torch.nn.init.normal_(layers[0].add_bias(), std=0.1)
    assert any(not layer.even for layer in layers)
    return converted


def test_a_saved_model_comes_back_in_this_process_and_in_a_fresh_one(split: torch.nn.Module, tmp_path: Path):
    split.save_pretrained(tmp_path)
    torch.save(IMAGES, tmp_path / "images.pt")
    again = smp.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        wanted = split(IMAGES)
        assert torch.allclose(again(IMAGES), wanted, atol=1e-5)
        assert torch.allclose(convsplit.restore(smp.Unet(
            "resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8)).eval(), tmp_path)(IMAGES), wanted,
            atol=1e-5)  # fmt: skip
    code = f"""
import torch, segmentation_models_pytorch as smp
try:
    smp.from_pretrained({str(tmp_path)!r})
except RuntimeError as error:
    print("stopped:", error)
import convsplit.integrations.segmentation_models_pytorch
model = smp.from_pretrained({str(tmp_path)!r}).eval()
torch.save(model(torch.load({str(tmp_path / "images.pt")!r})), {str(tmp_path / "found.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Missing key" in done.stdout, done.stderr[-2000:]
    assert torch.allclose(torch.load(tmp_path / "found.pt"), wanted, atol=1e-5)


def test_a_merged_model_is_a_plain_one_whose_batch_norms_hold_the_biases_of_a_repair(
    split: torch.nn.Module, tmp_path: Path
):
    merged = convsplit.merge(split)
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(smp.from_pretrained(str(tmp_path)).eval()(IMAGES), split(IMAGES), atol=1e-5)


def test_dense_models_come_back_as_ever(tmp_path: Path):
    model = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(smp.from_pretrained(str(tmp_path)).eval()(IMAGES), model(IMAGES))
