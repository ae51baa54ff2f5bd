"""Damaged and hostile files: a ValueError in words, nothing executed, no time or memory without bound."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import small_net
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convsplit
from convsplit import SeparableConv2d, load, save

Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]
MANY = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def base() -> nn.Module:
    """Small enough for hundreds of loads, with an uneven gather and an uneven sum."""
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, groups=2))


def saved(path: Path) -> bytes:
    torch.manual_seed(0)
    model = base()
    model[0] = SeparableConv2d.from_conv(model[0], form="dw-pw", components=6)
    model[2] = SeparableConv2d.from_conv(model[2], form="pw-dw", components=10)
    save(model, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return saved(tmp_path_factory.mktemp("good") / "good.safetensors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.safetensors"


def rewrite(path: Path, edit: Edit) -> None:
    """Save a good file, edit its description and tensors, and write it as safetensors that are well formed."""
    saved(path)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["convsplit"])
    tensors = load_file(path)
    edit(description, tensors)
    save_file(tensors, path, {"convsplit": json.dumps(description)})


def refused(path: Path, model: nn.Module | None = None) -> str:
    """Load must raise exactly ValueError, with little memory; returns what it says."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
            load(path, model or base())
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 20_000
    return str(caught.value)


def loads_or_refuses(path: Path) -> None:
    """A mutation may hit a weight, and then the file is as good as any other; anything else is a ValueError."""
    try:
        loaded = load(path, base())
    except ValueError:
        return
    loaded.eval()(torch.zeros(1, 4, 8, 8))


# Random damage


@MANY
@given(data=st.data())
def test_flipped_bits(good: bytes, path: Path, data: st.DataObject) -> None:
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    loads_or_refuses(path)


@MANY
@given(data=st.data())
def test_replaced_stretches_of_the_header(good: bytes, path: Path, data: st.DataObject) -> None:
    (length,) = struct.unpack("<Q", good[:8])
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, min(length, start + 40)))
    path.write_bytes(good[: 8 + start] + data.draw(st.binary(max_size=40)) + good[8 + end :])
    loads_or_refuses(path)


@MANY
@given(data=st.data())
def test_truncated_or_extended(good: bytes, path: Path, data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(good) - 1))
    path.write_bytes(data.draw(st.sampled_from([good[:end], good + good[: end + 1], good[end + 1 :]])))
    refused(path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def values_in(data: Any) -> list[tuple[Any, Any]]:
    """Every place in nested JSON, as container and key."""
    places = []
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        places += [(data, key), *values_in(data[key])]
    return places


@MANY
@given(data=st.data())
def test_any_value_of_the_description_replaced(path: Path, data: st.DataObject) -> None:
    def edit(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        container, key = data.draw(st.sampled_from(values_in(description)))
        if data.draw(st.booleans()):
            container[key] = data.draw(JUNK)
        else:
            del container[key]

    rewrite(path, edit)
    loads_or_refuses(path)


# Lies about sizes


@pytest.mark.parametrize("components", [10**5, 10**12, 10**30, 0, -6, 6.0, True, "6", None, [6]])
@pytest.mark.parametrize("even", [True, False])
def test_components_that_the_file_does_not_hold(components: Any, even: bool, path: Path) -> None:
    rewrite(path, lambda d, t: d["layers"][0].update(components=components, even=even))
    assert "component" in refused(path)


def test_many_components_that_it_does_hold_fit_no_exact_layer(path: Path) -> None:
    def edit(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        description["layers"][0].update(components=4000, even=True)
        tensors["0.depthwise.weight"] = torch.zeros(4000, 1, 3, 3)

    rewrite(path, edit)
    assert "more than the 24 that are exact" in refused(path)


@pytest.mark.parametrize(
    ("channels", "name"),
    [([0, 0, 1, 2, 3, 4], "gather"), ([-1, 0, 1, 2, 3, 3], "gather"), ([2**62] * 6, "gather"),
     ([-(2**63)] * 6, "gather"), ([0, 1, 2, 3, 0, 4, 5, 6, 7, 8], "sum"), ([0, 1, 2, 3, 4, 4, 5, 6, 7, 4], "sum")],
)  # fmt: skip
def test_channels_out_of_range(channels: list[int], name: str, path: Path) -> None:
    def edit(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        (key,) = (key for key in tensors if key.endswith(f"{name}.channels"))
        tensors[key] = torch.tensor(channels)

    rewrite(path, edit)
    assert "names channels" in refused(path)


def test_channels_of_another_group(path: Path) -> None:
    def edit(description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["2.sum.channels"] = tensors["2.sum.channels"].flip(0)

    rewrite(path, edit)
    assert "sum.channels of '2' names channels" in refused(path)


def test_header_that_claims_to_be_huge(path: Path) -> None:
    for length in (2**40, 2**63, 2**64 - 1, 99_000_000):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        refused(path)


@pytest.mark.parametrize(
    "tensor",
    [{"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
     {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]},
     {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
     {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
     {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
     {"dtype": "O", "shape": [1], "data_offsets": [0, 4]},
     {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]}],
)  # fmt: skip
def test_tensors_that_the_file_does_not_hold(tensor: dict[str, Any], path: Path) -> None:
    header = json.dumps({"x": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "9" * 10_000, "{", "null", "[]", "0", '"x"', ""])
def test_descriptions_that_are_no_description(text: str, path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path, {"convsplit": text})
    refused(path)


def test_a_description_too_long_to_read(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path, {"convsplit": "[" + "[]," * 6_000_000 + "0]"})
    assert "characters" in refused(path)


def test_memory_stays_bounded_whatever_the_file_asks_for(path: Path) -> None:
    rewrite(path, lambda d, t: d["layers"][0].update(components=10**11, even=False))
    code = f"""
import resource, torch
from torch import nn
import convsplit
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    convsplit.load({str(path)!r}, nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, groups=2)))
except ValueError:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 64  # MB


# Lies about names and numbers


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "0.__class__", "__dict__", "..", "", "0\0", "forward", "1", "x" * 10**5, 7],
)
def test_names_are_only_looked_up(name: Any, path: Path) -> None:
    rewrite(path, lambda d, t: d["layers"][0].update(name=name))
    refused(path)


def test_tensor_names_are_only_looked_up(path: Path) -> None:
    for name in ("../../../tmp/x", "/etc/passwd", "__class__.x", "0.depthwise.weight.data"):
        rewrite(path, lambda d, t, name=name: t.update({name: torch.zeros(2)}))
        assert "the model has no place for tensor" in refused(path)


def test_layer_listed_twice(path: Path) -> None:
    rewrite(path, lambda d, t: d["layers"].append(d["layers"][0]))
    assert "twice" in refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(value: float, path: Path) -> None:
    rewrite(path, lambda d, t: d["layers"][0].update(components=value))
    assert "found the number" in refused(path)


@pytest.mark.parametrize(
    "change",
    [{"form": "os.system"}, {"form": ["dw-pw"]}, {"form": "pw-dw-pw"}, {"even": "yes"}, {"more": 1}, {"spec": {}},
     {"spec": None}, {"spec": {"bias": 1}}],
)  # fmt: skip
def test_layers_that_are_none(change: dict[str, Any], path: Path) -> None:
    rewrite(path, lambda d, t: d["layers"][0].update(change))
    refused(path)


def test_shared_names_that_lead_nowhere(path: Path) -> None:
    for shared in ({"a": "missing"}, {"0.depthwise.weight": "1.weight"}, {"a": "b", "b": "a"}, {"a": 3}, []):
        rewrite(path, lambda d, t, shared=shared: d.update(shared=shared))
        refused(path)


def test_fingerprint_of_another_model(path: Path) -> None:
    rewrite(path, lambda d, t: d.update(fingerprint="0" * 64))
    assert "fingerprint" in refused(path)


def test_a_newer_format_names_the_version_to_install(path: Path) -> None:
    rewrite(path, lambda d, t: d.update(format=2, versions={"convsplit": "9.1"}, layers={"all": "new"}))
    text = refused(path)
    assert "written by convsplit 9.1" in text
    assert "Install a newer convsplit" in text


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None, float("nan")])
def test_formats_that_never_were(version: Any, path: Path) -> None:
    rewrite(path, lambda d, t: d.update(format=version))
    refused(path)


# Other people's files


class Bomb:
    """Its pickle would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_pickles_are_not_executed(path: Path) -> None:
    proof = path.with_name("executed")
    torch.save(Bomb(proof), path)
    refused(path)
    path.write_bytes(pickle.dumps(Bomb(proof)))
    refused(path)
    assert not proof.exists()


def test_safetensors_of_others(path: Path) -> None:
    save_file(small_net().state_dict(), path)
    text = refused(path)
    assert "was not written by convsplit.save" in text
    assert "convsplit.restore" in text


def test_no_file_at_all(tmp_path: Path) -> None:
    for content in (b"", b"\0" * 8, b"\0" * 7, b"GIF89a" * 100):
        (tmp_path / "x").write_bytes(content)
        refused(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "missing", base())
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path, base())
    with pytest.raises(ValueError, match="is not a regular file"):
        load("/dev/zero", base())


def test_a_plan_is_as_careful(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a plan of convsplit"):
        convsplit.Plan.from_json("[" * 10)
