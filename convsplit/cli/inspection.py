"""What is in a file of convsplit's: a converted model, a plan or a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from convsplit.choose.plan import Plan
from convsplit.report import Report
from convsplit.storage import KEY
from convsplit.tables import Table, count


@dataclass(frozen=True)
class Inspected:
    """Plain values, and how they are shown at a width."""

    data: Any
    text: Callable[[int | None], str]


def inspect_file(path: Path) -> Inspected:
    """Look into a file; only its header is read where it holds tensors.

    Raises:
        ValueError: it is none of convsplit's.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        return _model(path)
    text = path.read_text(encoding="utf-8")
    for kind in (Plan, Report):
        try:
            found = kind.from_json(text)
        except ValueError:
            continue
        return Inspected(json.loads(text), partial(_any_text, found))
    raise ValueError(f"{path} is neither a converted model nor a plan nor a report of convsplit")


def _any_text(found: Plan | Report, width: int | None) -> str:
    return found.text(width) if isinstance(found, Report) else f"{found.table().text(width)}\n\n{found.summary()}"


def _model(path: Path) -> Inspected:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            sizes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if KEY not in metadata:
        raise ValueError(f"{path} holds {len(sizes)} tensors, but was not written by convsplit.save")
    data = {**json.loads(metadata[KEY]), "numbers": {key: _product(shape) for key, shape in sizes.items()}}
    return Inspected(data, lambda width: _shown(path, data, width))


def _shown(path: Path, data: dict[str, Any], width: int | None) -> str:
    rows = [_row(layer, data["numbers"]) for layer in data["layers"]]
    table = Table(["layer", "kernel", "form", "R", "numbers"], rows, frozenset({"layer", "kernel", "form"}))
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    total = f"{count(sum(data['numbers'].values()))} numbers, {len(rows)} split layer{'s' * (len(rows) != 1)}"
    return f"{path}: {total}\nwritten with {versions}\n\n{table.text(width)}"


def _row(layer: dict[str, Any], numbers: dict[str, int]) -> list[str]:
    spec, prefix = layer["spec"], f"{layer['name']}."
    kernel = "x".join(map(str, (spec["out_channels"], spec["in_channels"] // spec["groups"], *spec["kernel_size"])))
    own = sum(size for key, size in numbers.items() if key.startswith(prefix))
    return [layer["name"], kernel, layer["form"], str(layer["components"]), count(own)]


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
