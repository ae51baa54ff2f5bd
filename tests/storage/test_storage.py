"""save and load: everything comes back, and whatever does not fit is said in words."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import IMAGES, Aliased, Tied, UNet, assert_same_model, awakened, small_net
from safetensors import safe_open
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

import convsplit
from convsplit import SeparableConv2d, load, merge, save, storage
from convsplit.forms import FORMS
from convsplit.storage import save_folder

MIXED = {"forms": ("dw-pw", "pw-dw"), "budget": convsplit.Budget(error=0.4)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def converted_net(**how: object) -> nn.Module:
    torch.manual_seed(0)
    return convsplit.convert(awakened(small_net()), **(how or MIXED)).eval()


# Round trips


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3, None])
def test_every_form_and_rank_comes_back(form: str, rank: int | None, path: Path) -> None:
    converted = converted_net(forms=form, rank=rank, exact=rank is None)
    save(converted, path)
    assert_same_model(converted, load(path, small_net()))


def test_unequal_multiplicities_come_back(path: Path) -> None:
    converted = converted_net()
    assert any(isinstance(m, SeparableConv2d) and not m.even for m in converted.modules())
    save(converted, path)
    assert_same_model(converted, load(path, small_net()))


def test_a_model_on_the_meta_device_is_enough(path: Path) -> None:
    converted = converted_net()
    save(converted, path)
    with torch.device("meta"):
        skeleton = small_net()
    loaded = load(path, skeleton)
    assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}
    assert all(p.is_meta for p in skeleton.parameters())
    assert_same_model(converted, loaded)


def test_the_model_given_is_not_changed(path: Path) -> None:
    save(converted_net(), path)
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    load(path, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(isinstance(m, SeparableConv2d) for m in model.modules())


def test_mode_and_requires_grad_come_from_the_model(path: Path) -> None:
    save(converted_net(), path)
    model = small_net().eval().requires_grad_(False)
    loaded = load(path, model)
    assert not any(m.training for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_one_module_under_two_names(path: Path) -> None:
    converted = convsplit.convert(awakened(Aliased()), forms="dw-pw", rank=2)
    save(converted, path)
    for loaded in (load(path, Aliased()), load(path, Aliased().to("meta"))):
        assert loaded.first is loaded.again
        assert_same_model(converted, loaded, torch.randn(1, 8, 6, 6))
    with safe_open(path, "pt") as file:
        assert not any(name.startswith("again") for name in file.keys())  # noqa: SIM118


def test_tied_parameters_are_stored_once_and_stay_tied(path: Path) -> None:
    converted = convsplit.convert(Tied(), forms="dw-pw", rank=2)
    save(converted, path)
    for loaded in (load(path, Tied()), load(path, Tied().to("meta"))):
        assert_same_model(converted, loaded, torch.randn(1, 8, 6, 6))
    loaded = load(path, Tied())
    assert loaded.decode.weight is loaded.encode.weight


def test_tensors_that_share_memory_without_being_one(path: Path) -> None:
    converted = convsplit.convert(Tied(), forms="dw-pw", rank=2)
    block = torch.randn(8, 16)
    converted.encode.weight = nn.Parameter(block[:, :8])
    converted.decode.weight = nn.Parameter(block[:, 8:])
    converted.encode.bias.data = converted.decode.bias.data
    save(converted, path)
    base = Tied()
    base.decode.weight = nn.Parameter(torch.zeros(8, 8))
    assert_same_model(converted, load(path, base), torch.randn(1, 8, 6, 6))


def test_a_convolution_by_itself(path: Path) -> None:
    converted = convsplit.convert(nn.Conv2d(8, 8, 3), forms="pw-dw", rank=2)
    save(converted, path)
    assert_same_model(converted, load(path, nn.Conv2d(8, 8, 3)), torch.randn(1, 8, 6, 6))


def test_layers_built_by_hand(path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(SeparableConv2d(3, 8, 3, form="pw-dw", components=11), nn.ReLU(), nn.Conv2d(8, 8, 3))

    model = build()
    save(model, path)
    assert_same_model(model, load(path, build()))


def test_channels_last_is_the_models_choice(path: Path) -> None:
    converted = converted_net().to(memory_format=torch.channels_last)
    save(converted, path)
    plain, last = load(path, small_net()), load(path, small_net().to(memory_format=torch.channels_last))
    assert plain[3].weight.is_contiguous()
    assert last[0].stages["depthwise"].weight.is_contiguous(memory_format=torch.channels_last)
    for loaded in (plain, last):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), converted.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, path: Path) -> None:
    converted = convsplit.convert(small_net().to(dtype), forms="dw-pw", rank=2)
    save(converted, path)
    loaded = load(path, small_net().to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), converted.parameters(), strict=True))
    with pytest.raises(ValueError, match=re.escape(f"is {dtype} in the file, torch.float32 in the model: cast")):
        load(path, small_net())
    assert next(load(path, small_net(), strict=False).parameters()).dtype == torch.float32


def test_device_argument(path: Path) -> None:
    save(converted_net(), path)
    assert next(load(path, small_net(), device="cpu").parameters()).device.type == "cpu"
    assert next(load(path, small_net(), device="meta").parameters()).is_meta


def test_trained_after_conversion_comes_back(path: Path) -> None:
    converted = converted_net().train()
    train_a_little(converted)
    save(converted, path)
    assert_same_model(converted, load(path, small_net()))


def test_a_bias_added_after_conversion_comes_back(path: Path) -> None:
    for form in FORMS:
        model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.ReLU())
        converted = convsplit.convert(model, forms=form, rank=2)
        conv = converted[0].merged()
        with_bias = SeparableConv2d.empty_like(conv, form=form, components=converted[0].components, bias=True)
        for parameter in with_bias.parameters():
            nn.init.normal_(parameter)
        converted[0] = with_bias
        save(converted, path)
        assert_same_model(converted, load(path, model), torch.randn(1, 8, 6, 6))


def test_a_layer_swapped_by_hand_comes_back(path: Path) -> None:
    converted = converted_net()
    converted[3] = SeparableConv2d.from_conv(merge(converted)[3], form="dw-pw", components=20)
    save(converted, path)
    assert_same_model(converted, load(path, small_net()))


def computed_net() -> nn.Module:
    """Weights that are computed at every call, and padding that depends on the input's size."""
    return nn.Sequential(
        Conv2dSame(3, 16, 3, stride=2), nn.ReLU(), StdConv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3)),
    )  # fmt: skip


class OwnState(nn.Sequential):
    """Gives a state_dict of its own, of another form."""

    def state_dict(self) -> dict[str, object]:  # type: ignore[override]
        return {"inside": nn.Module.state_dict(self)}

    def load_state_dict(self, state: dict[str, object]) -> None:  # type: ignore[override]
        nn.Module.load_state_dict(self, state["inside"])


def test_overridden_state_dicts(path: Path) -> None:
    def build() -> OwnState:
        return OwnState(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))

    converted, x = convsplit.convert(build(), forms=("dw-pw", "pw-dw")), torch.randn(1, 8, 9, 9)
    save(converted, path)
    assert torch.equal(load(path, build())(x), converted(x))
    with pytest.raises(ValueError, match="a part of Sequential overrides state_dict in a way that torch cannot call"):
        save(nn.Sequential(converted), path)


def test_stages_edited_after_the_conversion_are_refused(path: Path) -> None:
    for edit in ({"padding": (2, 2)}, {"dilation": (2, 2)}, {"padding_mode": "circular"}, {"stride": (2, 2)}):
        converted = converted_net()
        for name, value in edit.items():
            setattr(converted[3].depthwise, name, value)
        with pytest.raises(ValueError, match="depthwise stage of '3' was edited after the layer was made"):
            save(converted, path)
        assert not path.exists()


def test_numbers_that_attributes_do_not_tell_come_back(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3))
    model[0].weight = nn.Parameter(torch.randn(16, 1, 3, 3))
    model[1].padding = (2, 2)
    converted = convsplit.convert(model, forms=("dw-pw", "pw-dw"))
    save(converted, path)
    assert_same_model(converted, load(path, model), torch.randn(1, 1, 6, 6))


def test_unequal_multiplicities_of_one_module_under_two_names(path: Path) -> None:
    def build() -> nn.Module:
        layer = SeparableConv2d(8, 8, 3, components=11)
        return nn.Sequential(layer, layer)

    model = build()
    save(model, path)
    assert_same_model(model, load(path, build()), torch.randn(1, 8, 9, 9))
    with safe_open(path, "pt") as file:
        assert not any(name.startswith("1.") for name in file.keys())  # noqa: SIM118


def test_other_kinds_of_convolutions_come_back(path: Path) -> None:
    converted = convsplit.convert(computed_net().eval(), forms=("dw-pw", "pw-dw"), rank=2, bake=True)
    assert sum(isinstance(m, SeparableConv2d) for m in converted.modules()) == 3
    save(converted, path)
    for base in (computed_net(), computed_net().to("meta")):
        assert_same_model(converted, load(path, base))
    other = computed_net()
    other[0] = nn.Conv2d(3, 16, 3, stride=2)
    with pytest.raises(ValueError, match=r"'0' pads by SamePad2d\(.*\) in the file, nothing in the model"):
        load(path, other)


def test_metadata_tells_versions_and_layers(path: Path) -> None:
    converted = converted_net()
    save(converted, path)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["convsplit"])
    assert description["versions"]["torch"] == str(torch.__version__)
    assert [layer["name"] for layer in description["layers"]] == ["0", "3", "5"]


def test_fingerprint_is_that_of_the_dense_model() -> None:
    model, converted = small_net(), converted_net()
    assert storage._architecture(model, ["0", "3", "5"]) == storage._architecture(converted, ["0", "3", "5"])
    other = small_net()
    other[4] = nn.ReLU()
    assert storage._architecture(other, ["0", "3", "5"])[1] != storage._architecture(model, ["0", "3", "5"])[1]


# Folders, plans and plain state_dicts


def test_folder_for_model_hubs(tmp_path: Path) -> None:
    converted = converted_net()
    save_folder(converted, tmp_path / "hub" / "model", config={"num_classes": 16})
    config = json.loads((tmp_path / "hub" / "model" / "config.json").read_text())
    assert config["num_classes"] == 16
    assert config["architectures"] == ["Sequential"]
    assert_same_model(converted, load(tmp_path / "hub" / "model", small_net()))


def test_folder_refuses_what_is_no_json(tmp_path: Path) -> None:
    for wrong in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="config does not go into JSON"):
            save_folder(converted_net(), tmp_path, config=wrong)
    assert not list(tmp_path.iterdir())


def test_plain_state_dict_and_plan(tmp_path: Path) -> None:
    model = awakened(small_net())
    plan = convsplit.make_plan(model, **MIXED)
    converted = convsplit.apply_plan(model, plan)
    torch.save(converted.state_dict(), tmp_path / "state.pt")
    plan.save(tmp_path / "plan.json")

    again = convsplit.apply_plan(small_net(), convsplit.Plan.load(tmp_path / "plan.json"), initialise=False)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_model(converted, again)


def test_whole_model_pickles_and_deep_copies(tmp_path: Path) -> None:
    converted = converted_net()
    torch.save(converted, tmp_path / "model.pt")
    assert_same_model(converted, torch.load(tmp_path / "model.pt", weights_only=False))
    assert_same_model(converted, copy.deepcopy(converted))


# What does not fit


def test_another_architecture_is_named_in_every_detail(path: Path) -> None:
    save(converted_net(), path)
    other = small_net()
    other[0] = nn.Conv2d(3, 16, 3, stride=1, padding=1)
    other[3] = nn.Flatten()
    other[4] = nn.ReLU()
    with pytest.raises(ValueError, match="does not fit this Sequential") as caught:
        load(path, other)
    text = str(caught.value)
    assert "'0' has {" in text
    assert "the file splits '3'; in the model, a Flatten is no convolution" in text
    assert "'4' is SiLU in the file, ReLU in the model" in text
    assert "fresh instance of the model that was converted" in text


def test_tensors_that_do_not_fit_are_named(path: Path) -> None:
    save(converted_net(), path)
    other = small_net()
    other[8] = nn.Conv2d(24, 17, 1, bias=False)
    with pytest.raises(ValueError, match=r"'8.weight' has shape \(16, 24, 1, 1\) in the file, \(17, 24") as caught:
        load(path, other)
    assert "the model has no place for tensor '8.bias'" in str(caught.value)
    with pytest.raises(ValueError, match="has shape"):
        load(path, other, strict=False)


def test_not_strict_lets_names_and_classes_differ(path: Path) -> None:
    save(converted_net(), path)
    other = small_net()
    other[4] = nn.ReLU()
    other[8] = nn.Sequential(nn.Conv2d(24, 5, 1))
    with pytest.raises(ValueError, match=r"'8' is Conv2d in the file, Sequential in the model"):
        load(path, other)
    loaded = load(path, other, strict=False)
    assert torch.equal(loaded[8][0].weight, other[8][0].weight)
    with pytest.raises(ValueError, match=r"'8\.0\.weight' is missing in the file"):
        load(path, other.to("meta"), strict=False)


def test_a_converted_model_is_a_base_only_if_split_alike(path: Path) -> None:
    converted = converted_net()
    save(converted, path)
    assert_same_model(converted, load(path, copy.deepcopy(converted)))
    with pytest.raises(ValueError, match="'0' is already split in the model, and otherwise"):
        load(path, converted_net(forms="dw-pw", rank=1))


def test_one_module_against_two(path: Path) -> None:
    two = Aliased()
    two.again = nn.Conv2d(8, 8, 3, padding=1)
    save(convsplit.convert(two, forms="dw-pw", rank=2), path)
    with pytest.raises(ValueError, match="'again' and 'first' are one module in the model, two in the file"):
        load(path, Aliased())


def test_one_tensor_against_two(path: Path) -> None:
    untied = Tied()
    untied.decode.weight = nn.Parameter(torch.randn(8, 8))
    save(convsplit.convert(untied, forms="dw-pw", rank=2), path)
    with pytest.raises(ValueError, match=r"'decode.weight' and 'encode.weight' are one tensor in the model"):
        load(path, Tied())


def test_buffers_outside_the_state_dict_need_a_real_model(path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(8, 8, 3))
        model.register_buffer("grid", torch.arange(4.0), persistent=False)
        return model

    save(convsplit.convert(build(), forms="dw-pw", rank=2), path)
    assert torch.equal(load(path, build()).grid, torch.arange(4.0))
    with pytest.raises(ValueError, match="'grid' is not part of the state_dict and is on the meta device"):
        load(path, build().to("meta"))


# What cannot be stored


class WithSecret(nn.Module):
    def get_extra_state(self) -> object:
        return {"not": "a tensor"}

    def set_extra_state(self, state: object) -> None:
        pass


def test_what_cannot_be_stored_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"'1._extra_state' in the state_dict is a dict"):
        save(nn.Sequential(SeparableConv2d(3, 8, 3), WithSecret()), path)
    with pytest.raises(ValueError, match="no values yet"):
        save(SeparableConv2d(3, 8, 3, device="meta"), path)
    with pytest.raises(ValueError, match="no values yet"):
        save(nn.Sequential(nn.LazyLinear(3)), path)
    sparse = nn.Module()
    sparse.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="'mask' is a quantised or sparse tensor"):
        save(sparse, path)
    assert not path.parent.joinpath("model.safetensors").exists()


def test_a_layer_edited_out_of_shape_is_refused(path: Path) -> None:
    converted = converted_net(forms="dw-pw", rank=2)
    converted[0].pointwise_out = nn.Conv2d(6, 16, 3)
    with pytest.raises(ValueError, match="stages of '0' were changed into something load cannot rebuild"):
        save(converted, path)


def test_extra_state_that_is_a_tensor_is_kept(path: Path) -> None:
    class Counter(nn.Module):
        seen = torch.zeros(1)

        def get_extra_state(self) -> Tensor:
            return self.seen

        def set_extra_state(self, state: Tensor) -> None:
            self.seen = state.clone()

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(SeparableConv2d(3, 8, 3), Counter())
    model[1].seen = torch.tensor([7.0])
    save(model, path)
    assert load(path, nn.Sequential(nn.Conv2d(3, 8, 3), Counter()))[1].seen.item() == 7.0


# Atomic writes


@pytest.mark.parametrize("failing", ["storage.save_file", "files.os.replace", "files.os.fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_old_file(
    failing: str, error: BaseException, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(converted_net(), path)
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        if failing == "storage.save_file":
            Path(args[1]).write_bytes(b"half")
        raise error

    monkeypatch.setattr(f"convsplit.{failing}", fail)
    with pytest.raises(type(error)):
        save(converted_net(forms="dw-pw", rank=1), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_save_leaves_the_old_file(path: Path) -> None:
    save(converted_net(), path)
    before = path.read_bytes()
    code = f"""
import os, signal
from convsplit import SeparableConv2d, files, save
files.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
save(SeparableConv2d(3, 8, 3), {str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode != 0
    assert path.read_bytes() == before


def test_a_link_stays_a_link_and_rights_are_ordinary(path: Path) -> None:
    link = path.with_name("latest.safetensors")
    link.symlink_to(path)
    save(SeparableConv2d(3, 8, 3), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Merging back


def train_a_little(model: nn.Module, steps: int = 3) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = IMAGES.to(next(model.parameters()).dtype)
    for _ in range(steps):
        optimiser.zero_grad()
        model(images).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [small_net, UNet])
def test_merge_is_exact_in_double_precision_after_training(form: str, build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = awakened(build()).double()
    converted = convsplit.convert(model, forms=form, rank=2).train()
    train_a_little(converted)
    dense = merge(converted.eval())
    assert type(dense) is type(model)
    assert list(dense.state_dict()) == list(model.state_dict())
    images = IMAGES.double()
    torch.testing.assert_close(dense(images), converted(images), rtol=0, atol=1e-9)


def test_merge_of_unequal_multiplicities_and_of_one_layer() -> None:
    model = awakened(small_net()).double()
    converted = convsplit.convert(model, **MIXED).eval()
    images = IMAGES.double()
    torch.testing.assert_close(merge(converted)(images), converted(images), rtol=0, atol=1e-9)
    conv = merge(converted[0])
    assert type(conv) is nn.Conv2d
    torch.testing.assert_close(conv(images), converted[0](images), rtol=0, atol=1e-9)


def test_merged_models_save_as_dense_ones(path: Path) -> None:
    dense = merge(converted_net())
    small_net().load_state_dict(dense.state_dict())
    save(dense, path)
    assert_same_model(dense, load(path, small_net()))
