"""Models from the command line: `library:name` or `package.module:callable`, arguments, and a file of weights."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from convsplit.cli.parser import did_you_mean
from convsplit.cli.sources import SOURCES, build_from, source_of

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # what checkpoints call the weights inside them


def load_model(
    where: str, arguments: Mapping[str, Any], weights: Path | None = None, *, download: bool = False
) -> nn.Module:
    """Build `library:name` or call `package.module:callable`, then load weights; the model comes back in eval mode.

    Raises:
        ValueError: not of that form, the callable fails or returns no module, or the weights do not fit.
        ImportError: no such module.
    """
    if source_of(where) is not None:
        model = build_from(where, arguments, download)
    else:
        if download:
            raise ValueError(f"--download is for {', '.join(SOURCES)}; {where} is called as it is")
        model = _called(where, arguments)
    if weights is not None:
        load_weights(model, weights)
    model.eval()
    return model


def _called(where: str, arguments: Mapping[str, Any]) -> nn.Module:
    found = imported(where, "model", "torchvision.models:resnet18")
    return found if isinstance(found, nn.Module) else _call(where, found, arguments)


def imported(where: str, what: str, example: str) -> Any:
    """What `package.module:name` names.

    Raises:
        ValueError: not of that form, or no such name in the module.
        ImportError: no such module.
    """
    module_name, colon, path = where.partition(":")
    if not colon or not path:
        raise ValueError(f"{what} {where!r}: want package.module:callable, such as {example}")
    found = _import(module_name)
    for name in path.split("."):
        found = _attribute(found, name)
    return found


def argument(text: str) -> tuple[str, Any]:
    """Read `key=value`; the value is a Python literal or else text.

    >>> argument("num_classes=10"), argument("norm=batch")
    (('num_classes', 10), ('norm', 'batch'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"{text!r}: want name=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a .safetensors file or a checkpoint that torch.load reads with weights_only=True.

    Raises:
        ValueError: the file holds no state_dict, or one of another model; names what is missing or left over.
    """
    state = read_state_dict(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        complaints = [f"misses {_some(missing)}"] * bool(missing)
        complaints += [f"has {_some(unexpected)}, which the model has not"] * bool(unexpected)
        raise ValueError(f"{path} does not fit {type(model).__name__}: it {' and '.join(complaints)}")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, taken out of whatever a training script wrapped them in."""
    if path.suffix == ".safetensors":
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict: want a dict of tensors, possibly under {', '.join(WRAPPERS)}")
    return {key.removeprefix("module."): value for key, value in state.items()}  # DataParallel's prefix


def _import(name: str) -> Any:
    # Like `python -m`, look in the folder the command was started in: that is where a user's own model.py is.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(error.name or ""):
            raise ImportError(f"importing {name} needs {error.name}, which is not installed") from error
        raise ImportError(f"no module {error.name}: is it installed, or in this folder?") from error


def _attribute(owner: Any, name: str) -> Any:
    if hasattr(owner, name):
        return getattr(owner, name)
    inside = getattr(owner, "__name__", type(owner).__name__)
    raise ValueError(f"nothing called {name!r} in {inside}{did_you_mean(name, dir(owner))}")


def _call(where: str, build: Any, arguments: Mapping[str, Any]) -> nn.Module:
    if not callable(build):
        raise ValueError(f"{where} is a {type(build).__name__}: want something to call that returns a model")
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    try:
        model = build(**arguments)
    except Exception as error:
        raise ValueError(f"{where}({given}) failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{where}({given}) returned a {type(model).__name__}: want a torch.nn.Module")
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
