"""Split models in folders of transformers, in its Trainer and in accelerate."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convsplit
from convsplit.layers.separable import SeparableConv

pytest.importorskip("transformers", exc_type=ImportError)

from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

IMAGES = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def resnet() -> ResNetForImageClassification:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic", num_labels=4)
    return ResNetForImageClassification(config).eval()


@pytest.fixture(scope="module")
def split() -> ResNetForImageClassification:
    converted = convsplit.convert(resnet(), IMAGES, forms=("dw-pw", "pw-dw"))
    layers = [layer for layer in converted.modules() if isinstance(layer, SeparableConv)]
    assert any(not layer.even for layer in layers)  # channel numbers are no parameters, and have to come back, too
    for layer in layers:
        nn.init.normal_(layer.add_bias(), std=0.1)  # as a repair does, after the conversion
    return converted


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES).logits


def test_the_original_keeps_its_config():
    dense = resnet()
    convsplit.convert(dense, forms="dw-pw", rank=1)
    assert not hasattr(dense.config, "quantization_config")
    assert not hasattr(dense, "hf_quantizer")


@pytest.mark.parametrize("kind", [ResNetForImageClassification, AutoModelForImageClassification])
def test_a_saved_model_comes_back_through_from_pretrained(split: nn.Module, tmp_path: Path, kind: Any):
    split.save_pretrained(tmp_path)
    again, found = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.allclose(logits(again), logits(split), atol=1e-6)
    again.save_pretrained(tmp_path / "twice")
    assert torch.allclose(logits(kind.from_pretrained(tmp_path / "twice")), logits(split), atol=1e-6)
    assert again.half().dtype == torch.float16


def test_a_class_that_is_saved_under_names_of_old_comes_back(tmp_path: Path):
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[16] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16
    )
    images = torch.rand(1, 3, 64, 64)
    converted = convsplit.convert(SegformerForSemanticSegmentation(config).eval(), images)
    converted.save_pretrained(tmp_path)
    again = SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "twice")
    for each in (again, SegformerForSemanticSegmentation.from_pretrained(tmp_path / "twice")):
        assert torch.allclose(each(images).logits, converted(images).logits, atol=1e-6)
    merged = convsplit.merge(converted)
    merged.save_pretrained(tmp_path / "merged")
    dense = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "merged")
    assert torch.allclose(dense(images).logits, merged(images).logits, atol=1e-6)


def test_shards_are_read_like_one_file(split: nn.Module, tmp_path: Path):
    split.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.allclose(logits(type(split).from_pretrained(tmp_path)), logits(split), atol=1e-6)


def test_restore_reads_the_folder_as_well(split: nn.Module, tmp_path: Path):
    split.save_pretrained(tmp_path)
    assert torch.allclose(logits(convsplit.restore(resnet(), tmp_path)), logits(split), atol=1e-6)


def test_a_process_without_the_integration_stops_and_one_with_it_loads(split: nn.Module, tmp_path: Path):
    split.save_pretrained(tmp_path)
    code = f"""
from transformers import ResNetForImageClassification as ResNet
try:
    ResNet.from_pretrained({str(tmp_path)!r})
except RuntimeError as error:
    print("stopped:", error)
import convsplit.integrations.transformers
print("loaded:", type(ResNet.from_pretrained({str(tmp_path)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Unknown quantization type, got convsplit" in done.stderr
    assert re.search(r"stopped: .*mismatched_sizes.*\nloaded: ResNet", done.stdout), done.stderr[-2000:]


def test_a_merged_model_is_a_plain_one_whose_batch_norms_hold_the_biases_of_a_repair(
    split: nn.Module, tmp_path: Path
):
    merged = convsplit.merge(split)
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path)
    again, found = type(split).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.allclose(logits(again), logits(split), atol=1e-6)
    with torch.no_grad():  # and in training, where the mean of the batch takes biases away
        trained = (copy.deepcopy(split).train()(IMAGES).logits, again.train()(IMAGES).logits)
    assert torch.allclose(*trained, atol=1e-5)


def test_biases_that_no_batch_norm_takes_are_named(split: nn.Module):
    changed = copy.deepcopy(split)
    block = changed.resnet.encoder.stages[0].layers[0].layer[0]
    block.normalization = nn.GroupNorm(4, 16)
    with pytest.warns(
        convsplit.ConversionWarning, match=r"builds no [\w.]*stages\.0\.layers\.0\.layer\.0[\w.]*bias, which"
    ):
        convsplit.merge(changed)


def test_the_trainer_trains_its_checkpoints_resume_and_factors_are_not_decayed(split: nn.Module, tmp_path: Path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from convsplit.integrations.transformers import optimizer_of

    data = [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(torch.rand(8, 3, 24, 24))]

    def trainer(model: nn.Module, steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            weight_decay=0.1, disable_tqdm=True, logging_strategy="no", learning_rate=1e-3,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer_of(model, arguments), None))

    split.save_pretrained(tmp_path / "start")
    first = trainer(type(split).from_pretrained(tmp_path / "start"), 2)
    first.train()
    first.model.eval()
    assert not torch.allclose(logits(first.model), logits(split), atol=1e-4)
    decay = {group["name"]: group["weight_decay"] for group in first.optimizer.param_groups}
    assert decay == {"factors": 0.0, "weights": 0.1, "undecayed": 0.0}

    again = type(split).from_pretrained(tmp_path / "checkpoint-2")
    assert torch.allclose(logits(again), logits(first.model), atol=1e-6)
    second = trainer(type(split).from_pretrained(tmp_path / "start"), 3)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.state.global_step == 3


def test_accelerate_states_resume(split: nn.Module, tmp_path: Path):
    accelerate = pytest.importorskip("accelerate")
    prepared = accelerate.Accelerator(cpu=True)
    model = prepared.prepare(convsplit.convert(resnet(), forms="dw-pw", rank=1))
    wanted = logits(model.eval())
    prepared.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    prepared.load_state(str(tmp_path))
    assert torch.allclose(logits(model), wanted)
