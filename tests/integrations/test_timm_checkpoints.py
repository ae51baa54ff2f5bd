"""timm's train script: its averaged weights, its checkpoints, its groups for weight decay."""

from pathlib import Path

import pytest
import torch
from torch import nn

import convsplit
from convsplit.finetune import parameter_groups

timm = pytest.importorskip("timm")

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def built() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4).eval()


@pytest.fixture
def split() -> nn.Module:
    return convsplit.convert(built(), IMAGES, forms=("dw-pw", "pw-dw"))


def test_checkpoints_of_its_saver_come_back_with_averaged_weights_or_without(split: nn.Module, tmp_path: Path):
    from timm.models import load_checkpoint
    from timm.utils import CheckpointSaver, ModelEmaV3

    optimizer = torch.optim.SGD(split.parameters(), lr=0.1)
    average = ModelEmaV3(split, decay=0.5)
    split.train()(IMAGES).sum().backward()
    optimizer.step()
    average.update(split)
    saver = CheckpointSaver(split, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, 0.5)
    with torch.no_grad():
        wanted, averaged = split.eval()(IMAGES), average.module.eval()(IMAGES)
        assert not torch.allclose(wanted, averaged, atol=1e-4)
        again = convsplit.restore(built(), tmp_path / "last.pth.tar")
        assert torch.allclose(again(IMAGES), wanted, atol=1e-5)
        load_checkpoint(
            again, str(tmp_path / "last.pth.tar"), use_ema=True
        )  # takes the averages where there are some
        assert torch.allclose(again(IMAGES), averaged, atol=1e-5)


def test_its_groups_decay_factors_and_ours_do_not(split: nn.Module):
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    factors = {id(p) for group in parameter_groups(split) if group["name"] == "factors" for p in group["params"]}
    decayed = {
        id(p) for group in param_groups_weight_decay(split, 0.1) if group["weight_decay"] for p in group["params"]
    }
    assert factors <= decayed  # what docs/fine-tuning.md warns of
    optimizer = create_optimizer_v2(parameter_groups(split, lr=0.1, weight_decay=0.1), opt="adamw", lr=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[factor] for factor in factors} == {0.0}
