"""Sources: what a state_dict is read from, without running anything that a file says."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Source = Mapping[str, Any] | str | Path

# Under which training code keeps the state_dict among other things.
_WITHIN = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
_INDEX, _SAFE, _PICKLED = (".index.json",), (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")


def read_state(source: Source) -> dict[str, Any]:
    """The state_dict in a mapping, in a file or in a folder, its own or one that training code keeps it in.

    Raises:
        ValueError: there is no state_dict in it, the file is damaged or wants to run code, or a folder holds several.
        FileNotFoundError: there is no such file.

    >>> sorted(read_state({"epoch": 3, "state_dict": {"weight": torch.zeros(2), "bias": torch.zeros(2)}}))
    ['bias', 'weight']
    """
    found = source if isinstance(source, Mapping) else _read(Path(source))
    where = "the mapping" if isinstance(source, Mapping) else str(source)
    while (key := next((key for key in _WITHIN if isinstance(found.get(key), Mapping)), None)) is not None:
        found = found[key]
    if not all(isinstance(key, str) for key in found) or not any(isinstance(t, Tensor) for t in found.values()):
        keys = ", ".join(map(repr, list(found)[:8])) or "nothing"
        raise ValueError(f"no named tensors in {where}, which has {keys}: give the part of it that is the state_dict")
    # Tensors of no elements are what `convsplit.integrations` puts under a kernel's name, for others to stop at.
    state = OrderedDict((k, v) for k, v in found.items() if not (isinstance(v, Tensor) and v.numel() == 0))
    if metadata := getattr(found, "_metadata", None):
        state._metadata = metadata  # type: ignore[attr-defined]  # versions that modules ask for when they load
    return state


def _read(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    if path.is_dir():
        path = _file_in(path)
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)


def _file_in(folder: Path) -> Path:
    """The one state_dict of a folder: an index of shards, else safetensors, else what torch.save wrote."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for endings in (_INDEX, _SAFE, _PICKLED):
        found = [name for name in names if name.endswith(endings)]
        if len(found) > 1:
            raise ValueError(f"{folder} has {', '.join(found)}: give the file that is meant")
        if found:
            return folder / found[0]
    raise ValueError(f"no state_dict in {folder}, which has {', '.join(names[:8]) or 'no files'}")


def _read_shards(index: Path) -> dict[str, Any]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{index} is no index of shards: {type(error).__name__}: {error}") from error
    state: dict[str, Any] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names a shard outside of its folder: {name!r}")
        state.update(_read(index.parent / name))
    return state


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            named = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable safetensors file, or is damaged: {error}") from error
    # safetensors.torch.save_model notes in the metadata what else a tensor is called.
    aliases = {name: tensors[first] for name, first in named.items() if first in tensors and name not in tensors}
    return {**tensors, **aliases}


def _read_pickled(path: Path) -> Mapping[str, Any]:
    """Tensors and plain values; a Namespace, in which training scripts keep their arguments, is no more than that."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what reading a pickle of unknown origin may raise has no bounds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{path} cannot be read without running code from it ({type(error).__name__}: {reason}). Load it where you "
            "trust it and give the state_dict itself"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, want a state_dict")
    return found
