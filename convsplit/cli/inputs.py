"""Inputs from the command line: shapes, .npy, .npz and .pt files, or a folder of images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convsplit.cli.parser import did_you_mean

SHAPE = re.compile(r"\d+(x\d+)*")
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which most networks are trained with


def read_inputs(given: list[str], *, batch: int, limit: int | None, size: int, seed: int) -> list[Any]:
    """What the model is called with, in batches: one tensor each, a tuple for several, a dict where they are named.

    Each of `given` is `[name=]source`, where the source is a shape (`1x3x224x224`: random values), a file of one
    array, `file.npz:key`, or a folder of images: cropped to squares of `size`, normalised as for ImageNet.
    """
    if not given:
        return []
    random = torch.Generator().manual_seed(seed)
    named: dict[str, Tensor] = {}
    for position, text in enumerate(given):
        name, equals, source = text.rpartition("=")
        named[name if equals else f" {position}"] = _read(source, size, limit, random)
    by_name = [not name.startswith(" ") for name in named]
    if any(by_name) and not all(by_name):
        raise ValueError("name all of the inputs (--input x=1x3x32x32) or none of them")
    return list(_batches(named, batch, limit, all(by_name)))


def _batches(named: dict[str, Tensor], batch: int, limit: int | None, by_name: bool) -> Iterator[Any]:
    length = min(len(tensor) for tensor in named.values())
    length = length if limit is None else min(length, limit)
    for start in range(0, length, batch):
        parts = {name: tensor[start : min(start + batch, length)] for name, tensor in named.items()}
        values = tuple(parts.values())
        yield parts if by_name else values[0] if len(values) == 1 else values


def _read(source: str, size: int, limit: int | None, random: torch.Generator) -> Tensor:
    if SHAPE.fullmatch(source):
        return torch.randn([int(number) for number in source.split("x")], generator=random)
    name, colon, key = source.partition(".npz:")
    path = Path(f"{name}.npz" if colon else source)
    if path.is_dir():
        return _images(path, size, limit)
    if path.suffix not in READERS:
        raise ValueError(
            f"input {source!r}: want a shape such as 1x3x224x224, a {', '.join(READERS)} file or a folder of images"
        )
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    tensor = READERS[path.suffix](path, key)
    return tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor


def _from_npy(path: Path, key: str) -> Tensor:
    return torch.from_numpy(np.load(path, allow_pickle=False))


def _from_npz(path: Path, key: str) -> Tensor:
    with np.load(path, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays[_key(path, list(arrays), key)])


def _from_pt(path: Path, key: str) -> Tensor:
    value = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} holds a {type(value).__name__}: want one tensor")
    return value


READERS: dict[str, Callable[[Path, str], Tensor]] = {".npy": _from_npy, ".npz": _from_npz, ".pt": _from_pt}


def _key(path: Path, keys: list[str], key: str) -> str:
    if not key and len(keys) == 1:
        return keys[0]
    if key not in keys:
        raise ValueError(f"{path} holds {', '.join(keys)}: say which, as {path}:{keys[0]}{did_you_mean(key, keys)}")
    return key


def _images(folder: Path, size: int, limit: int | None) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("a folder of images needs Pillow: pip install pillow") from error
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)[:limit]
    if not paths:
        raise ValueError(f"no images in {folder} ({', '.join(sorted(IMAGES))})")
    squares = []
    for path in paths:
        with Image.open(path) as image:
            squares.append(torch.from_numpy(np.array(ImageOps.fit(image.convert("RGB"), (size, size)))))
    images = torch.stack(squares).permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
