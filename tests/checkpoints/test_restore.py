"""restore: a converted model comes back from whatever its state_dict was kept in, and what does not fit is said."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IMAGES, Aliased, Tied, UNet, assert_same_model, awakened, small_net
from safetensors.torch import save_file, save_model
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn

import convsplit
from convsplit import SeparableConv2d, restore
from convsplit.checkpoints import recognise, skeleton
from convsplit.forms import FORMS
from convsplit.layers import SeparableConv


def converted_net(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    how = how or {"forms": ("dw-pw", "pw-dw"), "budget": convsplit.Budget(error=0.4)}
    return convsplit.convert(awakened(small_net()), **how).eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [1, 3, None])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_form_and_rank(form: str, rank: int | None, device: str) -> None:
    converted = converted_net(forms=form, rank=rank, exact=rank is None)
    with torch.device(device):
        model = small_net()
    before = copy.deepcopy(model)
    assert_same_model(converted, restore(model, converted.state_dict()))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


KINDS = [
    nn.Conv2d(6, 12, 3, padding=1, groups=3), nn.Conv1d(6, 12, 5, stride=2), nn.Conv3d(6, 4, 3),
    nn.ConvTranspose2d(6, 12, 4, stride=2, groups=2), nn.ConvTranspose1d(6, 12, 3), nn.Conv2d(12, 12, 1),
    Conv2dSame(6, 12, 3, stride=2), nn.Conv2d(6, 12, 3, padding="same", padding_mode="circular"), nn.Conv2d(1, 8, 3),
]  # fmt: skip


@pytest.mark.parametrize("conv", KINDS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_convolution(conv: nn.Module, bias: bool) -> None:
    for form in ("pw-pw",) if conv.kernel_size == (1, 1) else FORMS:
        for how in ({"rank": 1}, {"components": 6}):
            if isinstance(conv, Conv2dSame):
                layer = convsplit.convert(conv, forms=form, exact=True)
            else:
                layer = SeparableConv.from_conv(conv, form=form, **how)
            layer.bias = torch.randn(layer.out_channels) if bias else None
            model = copy.deepcopy(conv)
            model.bias = None  # also where a refit has added one since
            again = restore(model, layer.state_dict())
            assert str(again) == str(layer)
            x = torch.randn(1, layer.in_channels, *[7] * layer.axes)
            torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.ones(1))


PREFIXES: dict[str, Callable[[str], str]] = {
    "none": lambda key: key,
    "data parallel": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "Lightning": lambda key: f"model.{key}",
    "a part compiled": lambda key: key.replace("0.", "0._orig_mod.", 1) if key.startswith("0.") else key,
    "any": lambda key: f"net.0.encoder.{key}",
}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_what_wrappers_put_before_names(prefix: Callable[[str], str]) -> None:
    converted = converted_net()
    state = {prefix(key): value for key, value in converted.state_dict().items()}
    assert_same_model(converted, restore(small_net(), state))


def test_a_wrapped_model_takes_what_it_wraps() -> None:
    converted = converted_net()
    again = restore(nn.DataParallel(small_net()), converted.state_dict())
    assert_same_model(converted, again.module)
    with pytest.raises(ValueError, match="Missing key.*scale"):
        restore(Wrapped(small_net()), converted.state_dict())
    partly = restore(Wrapped(small_net()), converted.state_dict(), strict=False)
    assert_same_model(converted, partly.model)


def sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    names = list(state)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / file)
    where = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def written(path: Path, write: Callable[[Any, Path], Any], what: Any) -> Path:
    write(what, path)
    return path


SOURCES: dict[str, Callable[[Path, dict[str, Tensor]], Any]] = {
    "mapping": lambda folder, state: state,
    "pt": lambda folder, state: written(folder / "a.pt", torch.save, state),
    "checkpoint": lambda folder, state: written(
        folder / "a.pth.tar", torch.save,
        {"epoch": 3, "optimizer": {"state": {}}, "state_dict": state, "args": argparse.Namespace(lr=0.1)},
    ),
    "under model": lambda folder, state: str(written(folder / "a.ckpt", torch.save, {"model": state, "step": 1})),
    "safetensors": lambda folder, state: written(folder / "a.safetensors", save_file, state),
    "folder": lambda folder, state: written(folder / "model.safetensors", save_file, state).parent,
    "folder of torch's": lambda folder, state: written(folder / "pytorch_model.bin", torch.save, state).parent,
    "shards": sharded,
}  # fmt: skip


@pytest.mark.parametrize("keep", SOURCES.values(), ids=SOURCES)
def test_whatever_it_is_kept_in(keep: Callable[[Path, dict[str, Tensor]], Any], tmp_path: Path) -> None:
    converted = converted_net()
    assert_same_model(converted, restore(small_net(), keep(tmp_path, converted.state_dict())))


def test_a_file_of_save_and_one_of_safetensors(tmp_path: Path) -> None:
    converted = convsplit.convert(Tied(), forms="dw-pw", rank=2)
    convsplit.save(converted, tmp_path / "own.safetensors")
    save_model(converted, str(tmp_path / "other.safetensors"))
    for file in ("own", "other"):
        again = restore(Tied(), tmp_path / f"{file}.safetensors")
        assert_same_model(converted, again, torch.randn(1, 8, 6, 6))
        assert again.decode.weight is again.encode.weight
    aliased = convsplit.convert(awakened(Aliased()), forms="dw-pw", rank=2)
    again = restore(Aliased(), aliased.state_dict())
    assert again.first is again.again
    assert_same_model(aliased, again, torch.randn(1, 8, 6, 6))


def test_shared_layers_may_be_stored_under_either_name() -> None:
    converted = convsplit.convert(awakened(Aliased()), forms="dw-pw", rank=2)
    for dropped in ("first.", "again."):
        state = {key: value for key, value in converted.state_dict().items() if not key.startswith(dropped)}
        assert_same_model(converted, restore(Aliased(), state), torch.randn(1, 8, 6, 6))


def test_computed_weights_that_were_split_for_good() -> None:
    build = lambda: nn.Sequential(StdConv2d(8, 8, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))  # noqa: E731
    converted = convsplit.convert(build(), forms="pw-dw", rank=2, bake=True)
    assert isinstance(converted[1], SeparableConv)
    assert_same_model(converted, restore(build(), converted.state_dict()), torch.randn(1, 8, 9, 9))
    dense = build()  # and one of which nothing is split comes back as it is
    assert_same_model(dense, restore(build(), dense.state_dict()), torch.randn(1, 8, 9, 9))


def test_a_real_network_and_an_average_of_it() -> None:
    from timm.utils import ModelEmaV3

    converted = convsplit.convert(awakened(UNet()), forms=("dw-pw", "pw-dw"), budget=convsplit.Budget(params=0.4))
    average = ModelEmaV3(converted)
    assert_same_model(converted.eval(), restore(UNet(), average.state_dict()))


def test_dtypes_are_the_models() -> None:
    half = {key: t.half() if t.is_floating_point() else t for key, t in converted_net().state_dict().items()}
    assert {p.dtype for p in restore(small_net(), half).parameters()} == {torch.float32}


def test_recognised_layers_are_values_and_build_the_model() -> None:
    converted = converted_net()
    state, model = converted.state_dict(), small_net()
    found = {layer.name: layer for layer in recognise(model, state)}
    split = {name: m for name, m in converted.named_modules() if isinstance(m, SeparableConv)}
    assert list(found) == list(split)
    for name, layer in split.items():
        read = found[name]
        assert (read.form, read.components, read.even) == (layer.form, layer.components, layer.even)
    empty = skeleton(model, state)
    assert all(not p.any() for p in empty.get_submodule(next(iter(split))).parameters())
    empty.load_state_dict(state)
    assert_same_model(converted, empty)


# What does not fit


def without(state: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    gone = next(key for key in state if key.endswith(ending))
    return {key: value for key, value in state.items() if key != gone}


def test_other_peoples_stages() -> None:
    state = converted_net().state_dict()
    mine = {key.replace("depthwise", "dw").replace("pointwise_out", "pw"): value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"'\w+' has .*no stages of a split layer .depthwise.weight.*renamed"):
        restore(small_net(), mine, strict=False)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], str]] = {
    "a stage missing": (lambda state: without(state, "pointwise_out.weight"), "stages of no form"),
    "the numbers missing": (lambda state: without(state, "gather.channels"), "components"),
    "another shape": (
        lambda state: {k: v[:-1] if k.endswith("depthwise.weight") else v for k, v in state.items()},
        "shape|components",
    ),
    "another kernel": (
        lambda state: {k: v[..., :2] if k.endswith("depthwise.weight") else v for k, v in state.items()},
        "shape|components",
    ),
    "numbers out of range": (
        lambda state: {k: v + 99 if k.endswith("channels") else v for k, v in state.items()}, "outside of their group",
    ),
    "a bias missing": (lambda state: without(state, "running_var"), "Missing key"),
    "something over": (lambda state: {**state, "more.weight": torch.zeros(1)}, "Unexpected key"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage: Callable[[dict[str, Tensor]], dict[str, Any]], message: str) -> None:
    state = converted_net(forms="dw-pw", budget=convsplit.Budget(error=0.35)).state_dict()
    assert any(key.endswith("gather.channels") for key in state)
    with pytest.raises(ValueError, match=message):
        restore(small_net(), damage(dict(state)))


def test_another_model_and_no_state_dict() -> None:
    state = converted_net().state_dict()
    with pytest.raises(ValueError, match="no names in common"):
        restore(nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2)))), {"a.b": torch.zeros(1)})
    with pytest.raises(ValueError, match="give the part of it that is the state_dict"):
        restore(small_net(), {"epoch": 3, "weights": None})
    twice = {f"{name}.{key}": value for name in ("student", "average") for key, value in state.items()}
    with pytest.raises(ValueError, match=r"under 'average\.' and under 'student\.'|under 'student\.' and under"):
        restore(small_net(), twice)


def test_layers_under_other_names_are_named() -> None:
    state = {key.replace("3.", "later.3.", 1): value for key, value in converted_net().state_dict().items()}
    with pytest.raises(
        ValueError, match=r"no convolution and no linear layer \(later\.3\)\. What wrote it may have renamed them"
    ):
        restore(small_net(), state)


def test_nothing_stays_without_values() -> None:
    state = dict(converted_net().state_dict())
    gone = next(key for key in state if key.endswith("running_mean"))
    del state[gone]
    with torch.device("meta"):
        model = small_net()
    with pytest.raises(ValueError, match=f"on the meta device, and not in the state_dict: {gone}"):
        restore(model, state, strict=False)


def test_any_tensor_gone_or_exchanged_is_an_error_in_words() -> None:
    whole = converted_net().state_dict()
    # Not these: torch fills one in for old files, and without the other equal shares are what is meant.
    state = {key: value for key, value in whole.items() if not key.endswith(("num_batches_tracked", "channels"))}
    others: list[Any] = ["text", torch.zeros(2, 2, 2, 2)]
    for key, value in state.items():
        for other in others:
            if not isinstance(other, Tensor) or other.shape != value.shape:
                with pytest.raises(ValueError, match="."):
                    restore(small_net(), {**whole, key: other})
        with pytest.raises(ValueError, match="."):
            restore(small_net(), {each: tensor for each, tensor in whole.items() if each != key})
    with pytest.raises(ValueError, match="no named tensors"):
        restore(small_net(), {**whole, 3: torch.zeros(1)})
    for other in (None, "text", torch.zeros(3)):
        with pytest.raises(ValueError, match="channels"):
            restore(small_net(), {**whole, "0.gather.channels": other})


@pytest.mark.parametrize("file", ["a.safetensors", "a.pt"])
def test_damaged_files_give_an_error_in_words_or_the_model(file: str, tmp_path: Path) -> None:
    state, path, draw = converted_net().state_dict(), tmp_path / file, random.Random(0)
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    good = path.read_bytes()
    for _ in range(60):
        place, length = draw.randrange(len(good)), draw.randrange(40)
        damaged = good[:place] + draw.randbytes(draw.randrange(40)) + good[place + length :]
        path.write_bytes(draw.choice([damaged, good[:place]]))
        with contextlib.suppress(ValueError):
            assert isinstance(restore(small_net(), path), nn.Module)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code from the file was run')",))


def test_no_code_is_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": Harmful()}}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Harmful()))
    torch.save(converted_net(), tmp_path / "c.pt")
    for file in "abc":
        with pytest.raises(ValueError, match="cannot be read without running code"):
            restore(small_net(), tmp_path / f"{file}.pt")


def test_folders_that_do_not_say_which(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        restore(small_net(), tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no state_dict in .* no files"):
        restore(small_net(), tmp_path)
    for name in ("a", "b"):
        save_file({"weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"has a\.safetensors, b\.safetensors: give the file"):
        restore(small_net(), tmp_path)
    (tmp_path / "c.index.json").write_text(json.dumps({"weight_map": {"weight": "../a.safetensors"}}))
    with pytest.raises(ValueError, match="outside of its folder"):
        restore(small_net(), tmp_path)
    (tmp_path / "c.index.json").write_text("[]")
    with pytest.raises(ValueError, match="no index of shards"):
        restore(small_net(), tmp_path)


def test_a_layer_that_is_split_otherwise() -> None:
    state = SeparableConv2d(8, 8, 3, form="pw-dw").state_dict()
    with pytest.raises(ValueError, match="already split in the model, and otherwise"):
        restore(SeparableConv2d(8, 8, 3, form="dw-pw"), state)
    with pytest.raises(ValueError, match="may compute more than Conv2d does"):
        restore(type("Odd", (nn.Conv2d,), {})(8, 8, 3), state)


# A dense state_dict for a split model


def test_a_split_model_refuses_a_dense_state_dict_in_words() -> None:
    model, converted = small_net(), converted_net()
    before = copy.deepcopy(converted.state_dict())
    split = [name for name, m in converted.named_modules() if isinstance(m, SeparableConv)]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="is split here, and dense in the state_dict") as raised:
            converted.load_state_dict(model.state_dict(), strict=strict)
        text = str(raised.value)
        assert text.count("factorise=True") == 1
        assert text.count("is, too") == len(split) - 1
        assert "Missing key" not in text
        assert "Unexpected key" not in text
        for name in split:
            own = converted.get_submodule(name).state_dict()
            assert all(torch.equal(value, before[f"{name}.{key}"]) for key, value in own.items())
    with pytest.raises(RuntimeError, match="the model is split here"):
        SeparableConv2d(4, 4, 3).load_state_dict(nn.Conv2d(4, 4, 3).state_dict())
    with pytest.raises(ValueError, match="split in the model and dense in the source: .* factorise=True"):
        restore(converted, model.state_dict())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("repaired", [False, True])
def test_a_dense_state_dict_is_split_when_asked_for(form: str, repaired: bool) -> None:
    converted, other = converted_net(forms=form, rank=2), awakened(small_net(), seed=5).eval()
    if repaired:  # has biases then that the dense model has not
        for layer in converted.modules():
            if isinstance(layer, SeparableConv):
                layer.add_bias()
    again = restore(converted, other.state_dict(), factorise=True)
    expected = convsplit.apply_plan(other, convsplit.make_plan(other, forms=form, rank=2))
    assert_same_model(expected, again)


def test_exactly_split_models_take_any_dense_weights_exactly() -> None:
    converted, other = converted_net(exact=True), awakened(small_net(), seed=5).eval()
    again = restore(converted, {f"module.{key}": value for key, value in other.state_dict().items()}, factorise=True)
    torch.testing.assert_close(again(IMAGES), other(IMAGES), rtol=1e-4, atol=1e-5)
    assert_same_model(again, restore(converted, again.state_dict(), factorise=True))  # nothing to factorise there
