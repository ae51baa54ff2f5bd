"""MONAI: nets of two dimensions, `copy_model_state`, checkpoint handlers."""

from pathlib import Path

import pytest
import torch
from torch import nn

import convsplit
from convsplit.checkpoints import skeleton

pytest.importorskip("monai", exc_type=ImportError)

from monai.networks import copy_model_state, save_state
from monai.networks.nets import BasicUNet, UNet

IMAGES = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
NETS = {
    "UNet": lambda: UNet(2, 1, 2, channels=(16, 24, 32), strides=(2, 2), num_res_units=1),
    "BasicUNet": lambda: BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 24, 8)),
}


@pytest.fixture(params=NETS)
def build(request: pytest.FixtureRequest):
    def built() -> nn.Module:
        torch.manual_seed(0)
        return NETS[request.param]().eval()

    return built


def test_states_go_from_model_to_model_and_through_files(build, tmp_path: Path):
    smaller = convsplit.convert(build(), IMAGES, forms=("dw-pw", "pw-dw"))
    assert any(layer.transposed for layer in smaller.modules() if isinstance(layer, convsplit.SeparableConv))
    with torch.no_grad():
        wanted = smaller(IMAGES)
    save_state(smaller, str(tmp_path / "net.pt"))
    restored = convsplit.restore(build(), tmp_path / "net.pt")
    empty = skeleton(build(), smaller.state_dict())
    _, changed, untouched = copy_model_state(empty, smaller)
    assert not untouched
    assert len(changed) == len(smaller.state_dict())
    with torch.no_grad():
        assert torch.allclose(restored(IMAGES), wanted, atol=1e-6)
        assert torch.allclose(empty(IMAGES), wanted, atol=1e-6)


def test_ignite_handlers_save_and_load(build, tmp_path: Path):
    pytest.importorskip("ignite")
    from ignite.engine import Engine
    from monai.handlers import CheckpointLoader, CheckpointSaver

    smaller = convsplit.convert(build(), IMAGES, forms=("dw-pw", "pw-dw"))
    engine = Engine(lambda engine, batch: None)
    CheckpointSaver(str(tmp_path), {"net": smaller}, save_final=True, final_filename="net.pt").attach(engine)
    engine.run([0], max_epochs=1)
    empty = skeleton(build(), smaller.state_dict())
    other = Engine(lambda engine, batch: None)
    CheckpointLoader(str(tmp_path / "net.pt"), {"net": empty}).attach(other)
    other.run([0], max_epochs=1)
    with torch.no_grad():
        assert torch.allclose(empty(IMAGES), smaller(IMAGES), atol=1e-6)
