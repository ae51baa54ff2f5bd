"""Lightning: conversion before a fit, checkpoints that come back split."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import convsplit

lightning = pytest.importorskip("lightning", exc_type=ImportError)

from convsplit.integrations.lightning import ConvertBeforeFit  # noqa: E402

MODULE = """
import lightning, torch
from torch import nn
from torch.nn import functional as F

class Classifier(lightning.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 32, 3, bias=False), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
        )

    def training_step(self, batch):
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.01)
"""
IMAGES = torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    (tmp_path / "lit_classifier.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("lit_classifier", None)
    import lit_classifier

    torch.manual_seed(0)
    return lit_classifier.Classifier


def trainer(folder: Path, steps: int, *callbacks: object) -> object:
    return lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), default_root_dir=folder, enable_checkpointing=False,
    )  # fmt: skip


def loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, torch.arange(8) % 2), batch_size=4)


def split(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, convsplit.SeparableConv)]


def callback() -> ConvertBeforeFit:
    budget = convsplit.Budget(params=0.4)
    return ConvertBeforeFit("network", choice={"budget": budget}, forms=("dw-pw", "pw-dw"), calibration=IMAGES)


def test_convert_train_save_and_load_in_this_process_and_in_a_fresh_one(classifier: type, tmp_path: Path):
    module, converts = classifier(), callback()
    fit = trainer(tmp_path, 2, converts)
    fit.fit(module, loader())
    assert split(module) == [f"network.{layer.name}" for layer in converts.plan.split]
    trained = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}  # those of the split layers, not of the original

    fit.save_checkpoint(tmp_path / "split.ckpt")
    again = classifier.load_from_checkpoint(tmp_path / "split.ckpt", weights_only=True)
    with torch.no_grad():
        wanted = module.network.eval()(IMAGES)
        assert torch.allclose(again.network.eval()(IMAGES), wanted)
        assert torch.allclose(convsplit.restore(classifier(), tmp_path / "split.ckpt").network.eval()(IMAGES), wanted)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch, lit_classifier;"
        "import convsplit.integrations.lightning;"
        f"again = lit_classifier.Classifier.load_from_checkpoint({str(tmp_path / 'split.ckpt')!r}, weights_only=True);"
        f"torch.save(again.state_dict(), {str(tmp_path / 'again.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    found = torch.load(tmp_path / "again.pt")
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in module.state_dict().items())


def test_a_fit_goes_on_from_a_checkpoint_with_the_structure_that_it_holds(classifier: type, tmp_path: Path):
    first = trainer(tmp_path, 2, callback())
    module = classifier()
    first.fit(module, loader())
    first.save_checkpoint(tmp_path / "split.ckpt")
    converts, other = callback(), classifier()
    converts.choice = {"rank": 1}
    second = trainer(tmp_path, 3, converts)
    second.fit(other, loader(), ckpt_path=tmp_path / "split.ckpt", weights_only=True)
    assert split(other) == split(module)
    assert second.global_step == 3
    assert {layer.option.structure.components for layer in converts.plan.split} == {
        layer.components for layer in module.modules() if isinstance(layer, convsplit.SeparableConv)
    }  # the plan came with the checkpoint


def test_what_is_split_already_is_not_converted_again(classifier: type, tmp_path: Path):
    module = classifier()
    module.network = convsplit.convert(module.network, forms="dw-pw", rank=1)
    before = module.network
    trainer(tmp_path, 1, callback()).fit(module, loader())
    assert module.network is before


def test_a_dense_module_loads_as_ever(classifier: type):
    module, other = classifier(), classifier()
    other.load_state_dict(module.state_dict())
    assert F.mse_loss(other.network.eval()(IMAGES), module.network.eval()(IMAGES)) == 0
