"""Folders of models in the layout of hubs: what their weight files hold split, and a model made to hold it so.

The structure is read off the names and shapes in the files, never off a config, so that a repair, fine-tuning or an
edit after the conversion cannot make the two differ. Nothing in a file is executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from convsplit.checkpoints import recognise
from convsplit.checkpoints.names import aligned
from convsplit.folding import biases_into_norms
from convsplit.kinds import equivalent
from convsplit.layers.separable import SeparableConv
from convsplit.model.running import Batch
from convsplit.progress import warn
from convsplit.storage import StoredLayer

METHOD = "convsplit"  # what configs name as the way in which weights are stored


def is_split(model: Any) -> bool:
    """Whether something is a module with split layers."""
    return isinstance(model, nn.Module) and any(isinstance(layer, SeparableConv) for layer in model.modules())


def shapes_in(files: Iterable[str | Path]) -> dict[str, Tensor]:
    """The tensors of weight files by name, on the meta device: their headers are all that is read of safetensors."""
    found: dict[str, Tensor] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    found[name] = torch.empty(opened.get_slice(name).get_shape(), device="meta")
        else:
            found.update(torch.load(file, map_location="meta", weights_only=True))
    return found


def split_as_in(model: nn.Module, shapes: Mapping[str, Tensor]) -> None:
    """Put empty split layers into a model, in place, wherever weight files hold a layer split.

    Raises:
        ValueError: the files hold stages that fit no convolution of the model; names each.
    """
    held = aligned({name: tensor for name, tensor in shapes.items() if tensor.numel()}, model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SeparableConv) and _shapes(module.state_dict(prefix=f"{name}.")) != _shapes(
            {key: value for key, value in held.items() if key.startswith(f"{name}.")}
        ):
            model.set_submodule(name, module.merged())  # split otherwise: the files' way is put there next
    for layer in recognise(model, held):
        put_split(model, layer.name, layer)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def put_split(model: nn.Module, name: str, layer: StoredLayer | SeparableConv) -> None:
    """Put an empty split layer, like another one, in the place of a convolution that it can stand for; in place."""
    found = model.get_submodule(name)
    original = equivalent(found)
    if isinstance(found, SeparableConv) or isinstance(original, str):
        return
    bias = layer.bias is not None if isinstance(layer, SeparableConv) else layer.bias
    empty = SeparableConv.empty_like(
        original.conv, form=layer.form, components=layer.components, even=layer.even, bias=bias, pad=original.pad
    )
    for alias, module in list(model.named_modules(remove_duplicate=False)):
        if module is found:
            model.set_submodule(alias, empty)


def guard(model: nn.Module) -> dict[str, Tensor]:
    """A tensor of no elements under the name of a kernel that was split, to be stored among the others.

    Loaders that know nothing of split layers give those they do not find random numbers, and say so in a line of a log;
    a tensor of another size is what they stop at.
    """
    name = next(name for name, layer in model.named_modules() if isinstance(layer, SeparableConv))
    return {f"{name}.weight": torch.empty(0)}


def make_plain(merged: nn.Module, built: nn.Module, example_inputs: Batch = None) -> None:
    """Have a merged model hold the tensors that its class builds, in place: biases of a repair go into batch norms.

    Warns:
        ConversionWarning: there is none behind them, or nothing proves that it alone sees them. Loading by the class
            would leave them out, in some libraries without a word.
    """
    if not _lost(merged, built):
        return
    layers = {name.removesuffix(".bias") for name in _lost(merged, built)}
    with suppress(ValueError):  # of a model that does not run on these inputs, nothing is proven
        biases_into_norms(merged, layers, example_inputs)
    if lost := _lost(merged, built):
        warn(
            f"{type(merged).__name__} builds no {', '.join(lost[:3])}{' and others' * (len(lost) > 3)}, which "
            "from_pretrained will leave out: keep the model split, or save it with convsplit.save"
        )


def _lost(merged: nn.Module, built: nn.Module) -> list[str]:
    """Which tensors of a merged model its class does not build."""
    return sorted(set(merged.state_dict()) - set(built.state_dict()))
