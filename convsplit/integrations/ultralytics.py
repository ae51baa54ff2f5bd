"""Ultralytics: YOLO models that stay split through predict, val, export, save, train and a fresh process.

Its trainers build a model anew from the yaml that a checkpoint holds and copy what fits, with `BaseModel.load`: of a
split model that is the layers left dense; the rest starts from random numbers, which a line of the log says. All tasks
and all ways to start a training meet in that one method, and importing this file makes it give the new model the
structure of the weights first. `Model.train` is told to train the module at hand, whether it came from a file or not.

Importing happens by itself: when a model of ultralytics is converted, and when one that was is unpickled, since it
holds a `Settled` of this file. A checkpoint is therefore what ultralytics' own are, a pickle: open those you trust.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.data.augment import LetterBox
from ultralytics.data.loaders import LoadImagesAndVideos
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv
from ultralytics.nn.tasks import BaseModel

from convsplit.api import convert as convert_model
from convsplit.folding import move_bias
from convsplit.integrations.folders import is_split, put_split
from convsplit.kinds import equivalent
from convsplit.layers.separable import SeparableConv
from convsplit.norms import affine_of
from convsplit.progress import warn
from convsplit.spec import ConvSpec

ROOT = (BaseModel, Model)  # a YOLO is a module, too, and may be converted whole


class Settled:
    """A model that holds one has whoever unpickles it import this file."""


def settle(converted: Any) -> None:
    """Make a checkpoint of a split model bring this file along; called for every model that was converted or merged.

    A merged one gives the biases of a repair to its batch norms: those of its class have none, and are copied by name.
    """
    model = converted.model if isinstance(converted, Model) else converted
    if is_split(model):
        model.convsplit = Settled()
        return
    vars(model).pop("convsplit", None)
    for block in model.modules():
        if isinstance(block, Conv) and hasattr(block, "bn"):
            move_bias(block.conv, block.bn)


def convert(yolo: Model, example_inputs: Tensor | None = None, **options: Any) -> Model:
    """A YOLO whose module is converted; the one given is not changed.

    Args:
        yolo: a `YOLO`, `RTDETR` or the like, of PyTorch weights.
        example_inputs: images [N, 3, H, W] from 0 to 1, such as one batch of `images`.
        **options: as for `convsplit.convert`, such as `budget` and `calibration`.

    Raises:
        TypeError: not a model of ultralytics, or one that runs an exported file.
        ValueError: as `convsplit.convert`.

    >>> from ultralytics import YOLO
    >>> half = convert(YOLO("yolov8n.yaml"), forms="dw-pw")
    >>> any(isinstance(layer, SeparableConv) for layer in half.model.modules())
    True
    """
    if not isinstance(yolo, Model) or not isinstance(yolo.model, nn.Module):
        found = yolo.model if isinstance(yolo, Model) else type(yolo).__name__
        raise TypeError(f"want a YOLO of PyTorch weights, not {found}; modules go to convsplit.convert")
    smaller = copy.copy(yolo)
    smaller._modules = dict(yolo._modules)
    smaller.model = convert_model(yolo.model, example_inputs, **options)
    smaller.predictor = None  # it holds the module that was
    smaller.ckpt = {**(yolo.ckpt or {}), "model": smaller.model, "ema": None}
    smaller.overrides = dict(yolo.overrides)
    smaller.callbacks = copy.copy(yolo.callbacks)
    return smaller


def images(source: str | Path, *, size: int = 640, batch: int = 16) -> Iterator[Tensor]:
    """The images of a file or folder as YOLO models see them, in batches [N, 3, size, size]: padded to squares, 0 to 1.

    Raises:
        FileNotFoundError: no images there.
    """
    square = LetterBox((size, size))
    for _, pictures, _ in LoadImagesAndVideos(str(source), batch=batch):
        padded = np.stack([square(image=picture) for picture in pictures])
        yield torch.from_numpy(padded[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255  # BGR to RGB


def split_like(model: nn.Module, weights: nn.Module) -> None:
    """Give a model, in place, empty split layers where the one whose weights it is to take has them.

    Layers of other numbers (the heads of a data set with other classes) stay as they are.
    """
    own = dict(model.named_modules())
    for name, layer in weights.named_modules():
        if isinstance(layer, SeparableConv) and name in own and _stands_for(layer, own[name]):
            put_split(model, name, layer)


def _stands_for(layer: SeparableConv, module: nn.Module) -> bool:
    original = equivalent(module)
    return not isinstance(original, str) and _without_bias(ConvSpec.of(original.conv)) == _without_bias(layer.spec)


def _without_bias(spec: ConvSpec) -> ConvSpec:
    return replace(spec, bias=False)  # a repair adds one


def _with_structure(load: Any) -> Any:
    """`BaseModel.load` that takes over split layers first."""

    @functools.wraps(load)
    def loads(self: nn.Module, weights: Any, *args: Any, **options: Any) -> Any:
        source = (weights.get("ema") or weights["model"]) if isinstance(weights, dict) else weights
        if not is_split(source):
            return load(self, weights, *args, **options)
        split_like(self, source)
        settle(self)
        result = load(self, weights, *args, **options)
        kept = {name for name, layer in self.named_modules() if isinstance(layer, SeparableConv)}
        lost = [
            name for name, layer in source.named_modules() if isinstance(layer, SeparableConv) and name not in kept
        ]
        if lost:
            warn(f"layers of another size in the new model, dense and with weights of its own: {', '.join(lost)}")
        return result

    return loads


def _with_weights(train: Any) -> Any:
    """`Model.train` that trains the module at hand, as it does once `load` was called."""

    @functools.wraps(train)
    def trains(self: Model, *args: Any, **options: Any) -> Any:
        split = is_split(self.model)
        others = options.get("pretrained", self.overrides.get("pretrained", True)) not in (True, None)
        if split and others:
            warn("pretrained= asks for other weights than those of this model: what is trained will not be split")
        if split:
            self.ckpt = self.ckpt or {"model": self.model}
        result = train(self, *args, **options)
        if split and not others and not is_split(self.model):
            warn("the trainer built a model of its own: what was trained and saved is dense. Let its get_model call "
                 "load(weights) of the model that it builds")  # fmt: skip
        return result

    return trains


def _absorbing(fuse: Any) -> Any:
    """`fuse_conv_and_bn` that leaves a split layer split: up to 8.3.50 it builds a dense convolution of its numbers."""

    @functools.wraps(fuse)
    def fuses(conv: nn.Module, bn: nn.Module) -> Any:
        found = affine_of(bn) if isinstance(conv, SeparableConv) else None
        if found is None:
            return fuse(conv, bn)
        cast(SeparableConv, conv).absorb(found.scale, found.shift)
        return conv.requires_grad_(False)

    return fuses


def _install() -> None:
    base, model, functions = cast(Any, BaseModel), cast(Any, Model), cast(Any, tasks)
    if not hasattr(base.load, "__wrapped__"):
        base.load, model.train = _with_structure(base.load), _with_weights(model.train)
        for name in ("fuse_conv_and_bn", "fuse_deconv_and_bn"):
            setattr(functions, name, _absorbing(getattr(functions, name)))


_install()
