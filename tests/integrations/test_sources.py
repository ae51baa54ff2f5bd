"""Models of other libraries on the command line, and what is said where a library or a file is not there."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import convsplit
from convsplit.cli import main
from convsplit.cli.sources import EXAMPLES, SOURCES, build_from

CHEAP = ["--forms", "dw-pw", "--rank", "1", "--quiet"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def count(model: torch.nn.Module) -> int:
    return sum(isinstance(layer, convsplit.SeparableConv) for layer in model.modules())


def test_every_source_has_an_example():
    assert EXAMPLES.keys() == SOURCES.keys()


@pytest.mark.parametrize(
    ("where", "arguments"), [("timm:test_resnet", {"num_classes": 3}), ("torchvision:resnet18", {"num_classes": 3})]
)
def test_models_by_name_are_built_without_a_download(where: str, arguments: dict[str, object]):
    pytest.importorskip(where.partition(":")[0])
    model = build_from(where, arguments, download=False)
    given = [text for key, value in arguments.items() for text in ("--model-arg", f"{key}={value}")]
    assert main(["convert", where, *given, *CHEAP, "--out", "split.safetensors"]) == 0
    assert count(convsplit.load("split.safetensors", model)) > 0


def test_detectors_do_not_fetch_their_backbone():
    torchvision = pytest.importorskip("torchvision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
        patch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
        build_from("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", {}, download=False)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("timm:test_resnett", r"no model 'test_resnett'; did you mean test_resnet"),
        ("torchvision:resnet19", r"no model 'resnet19'; did you mean resnet1"),
        ("smp:Unett", r"no model 'Unett', and there is no such folder; did you mean Unet"),
        ("ultralytics:missing.pt", r"no file missing.pt, nor .*; with --download"),
        ("diffusers:missing", r"missing"),
        ("transformers:missing", r"missing"),
        ("timm:", r"names no model: want such as timm:resnet50"),
    ],
)
def test_what_a_library_does_not_know_or_the_disk_does_not_have(where: str, said: str, capsys: pytest.CaptureFixture):
    pytest.importorskip(SOURCES[where.partition(":")[0]].module, exc_type=ImportError)
    assert main(["plan", where]) == 1
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("prefix", SOURCES)
def test_a_missing_library_says_what_to_install(
    prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def without(name: str, *given: object) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", without)
    assert main(["plan", f"{prefix}:anything"]) == 1
    assert f"is not installed: pip install {SOURCES[prefix].package}" in capsys.readouterr().err


def test_downloads_are_of_libraries_only(capsys: pytest.CaptureFixture):
    assert main(["plan", "torch.nn:Identity", "--download"]) == 1
    assert "--download is for torchvision, timm" in capsys.readouterr().err


def test_ultralytics_from_yaml_to_a_checkpoint_of_its_own(folder: Path, capsys: pytest.CaptureFixture):
    ultralytics = pytest.importorskip("ultralytics", exc_type=ImportError)
    assert main(["convert", "ultralytics:yolov8n.yaml", *CHEAP, "--out", "half.pt"]) == 0
    assert count(ultralytics.YOLO("half.pt").model) > 0
    assert main(["convert", "ultralytics:yolov8n.yaml", *CHEAP, "--out", "half.onnx"]) == 1
    assert "want a name that ends in .safetensors or .pt" in capsys.readouterr().err


def test_folders_of_diffusers(folder: Path, capsys: pytest.CaptureFixture):
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    small = {"block_out_channels": (16,), "norm_num_groups": 8, "layers_per_block": 1}
    diffusers.AutoencoderKL(**small).save_pretrained("pipeline/vae")
    assert main(["convert", "diffusers:pipeline/vae", *CHEAP, "--out", "split"]) == 0
    assert count(diffusers.AutoencoderKL.from_pretrained("split")) > 0
    assert count(build_from("diffusers:split", {}, download=False)) > 0
    Path("pipeline/model_index.json").write_text("{}")
    assert main(["plan", "diffusers:pipeline"]) == 1
    assert "say which of its models, diffusers:pipeline/vae" in capsys.readouterr().err


def test_folders_of_transformers(folder: Path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained("dense")
    assert main(["convert", "transformers:dense", *CHEAP, "--out", "split"]) == 0
    assert count(transformers.AutoModelForImageClassification.from_pretrained("split")) > 0


def test_folders_and_classes_of_smp(folder: Path):
    smp = pytest.importorskip("segmentation_models_pytorch", exc_type=ImportError)
    given = ["smp:Unet", "--model-arg", "encoder_name=resnet18"]
    assert main(["convert", *given, *CHEAP, "--out", "split"]) == 0
    assert count(smp.from_pretrained("split")) > 0
    assert count(build_from("smp:split", {}, download=False)) > 0
    assert "imagenet" not in (Path("split") / "config.json").read_text()
