"""Restoring: a model rebuilt as a state_dict holds it, split where that is split, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from convsplit.checkpoints.names import STAGES, aligned
from convsplit.checkpoints.recognition import recognise
from convsplit.checkpoints.sources import Source, read_state
from convsplit.choose.options import Option
from convsplit.choose.plan import Plan, PlannedLayer
from convsplit.layers.separable import SeparableConv
from convsplit.rewrite import apply_plan, copy_with
from convsplit.spec import parameter_count
from convsplit.storage import off_meta, rebuild, state_of
from convsplit.structure import Structure

M = TypeVar("M", bound=nn.Module)


def restore(model: M, source: Source, *, strict: bool = True, factorise: bool = False) -> M:
    """A copy of a model with the weights of a checkpoint of its conversion, whoever wrote that.

    Which layers are split, in which form and with how many components is read off names and shapes, so no plan is
    needed: trainers' and hubs' own checkpoints come back. What wrappers put before names is undone (`module.`,
    `_orig_mod.`, `model.`); dtypes are the model's.

    Args:
        model: a fresh instance of the model that was converted; it may be on the meta device. It is not changed.
        source: a state_dict; a file of torch.save, which may keep it under "state_dict", "model" or the like; a
            safetensors file; or a folder with one of these or with shards and their index. Nothing in a file is
            executed.
        strict: False lets names be missing or be left over, as in `load_state_dict`; shapes have to fit in any case.
        factorise: the other way round: where `model` is split and the source dense, split its kernels as the model's
            layers are, an approximation without repair.

    Returns:
        a module of the model's own class with the split layers and the tensors of the source.

    Raises:
        ValueError: the source cannot be read, or does not fit the model: says what does not. Also where the model is
            split, the source dense, and `factorise` is not asked for.
        FileNotFoundError: there is no such file.

    >>> import convsplit, torch
    >>> model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3))
    >>> trained = nn.DataParallel(convsplit.convert(model))
    >>> again = restore(model, {"epoch": 7, "state_dict": trained.state_dict()})
    >>> images = torch.zeros(1, 16, 8, 8)
    >>> torch.equal(again(images), trained.module(images))
    True
    """
    state = aligned(read_state(source), model)
    dense = _dense_in(state, model)
    if dense and not factorise:
        raise ValueError(
            f"split in the model and dense in the source: {', '.join(list(dense)[:8])}. Give the original model, or "
            "let factorise=True split their kernels as these layers are"
        )
    rebuilt = skeleton(
        copy_with(model, {name: _dense_of(layer, name, state) for name, layer in dense.items()}), state
    )
    problem = _unfilled(rebuilt, state)
    if problem:
        raise ValueError(problem)
    rebuilt = off_meta(rebuilt, "cpu")
    _load(rebuilt, state, strict)
    return apply_plan(rebuilt, _as_split(dense, rebuilt)) if dense else rebuilt


def skeleton(model: M, state: Mapping[str, Any]) -> M:
    """A copy of a model, split as a state_dict under the model's names is: zeros in those layers, to be loaded into.

    Raises:
        ValueError: as `recognise`.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
    >>> state = convsplit.convert(model, forms="dw-pw", rank=2).state_dict()
    >>> skeleton(model, state).load_state_dict(state)
    <All keys matched successfully>
    """
    return rebuild(model, recognise(model, state))


def _dense_in(state: Mapping[str, Any], model: nn.Module) -> dict[str, SeparableConv]:
    """The split layers of a model that a state_dict has one kernel for."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SeparableConv)}
    return {name: layer for name, layer in layers.items() if f"{name}.weight".lstrip(".") in state}


def _dense_of(layer: SeparableConv, name: str, state: Mapping[str, Any]) -> nn.Module:
    """The convolution that a split layer stands for, with a bias if the state_dict has one."""
    conv = layer.merged()
    if f"{name}.bias".lstrip(".") not in state:
        conv.register_parameter("bias", None)
    elif conv.bias is None:
        conv.register_parameter("bias", nn.Parameter(conv.weight.new_zeros(conv.out_channels)))
    return conv


def _as_split(layers: Mapping[str, SeparableConv], dense: nn.Module) -> Plan:
    """The plan that splits a model again as these layers are."""
    planned = []
    for name, layer in layers.items():
        spec = replace(layer.spec, bias=dense.get_submodule(name).bias is not None)
        structure = Structure(layer.form, layer.components, layer.even)
        option = Option(structure, structure.params(spec), None, None, arrangement=layer.arrangement)
        planned.append(PlannedLayer(name, spec, option=option))
    return Plan(tuple(planned), parameter_count(dense))


def _unfilled(rebuilt: nn.Module, state: Mapping[str, Any]) -> str:
    """What would stay without values, because it is on the meta device and not in the state_dict; empty if nothing."""
    places = state_of(rebuilt)
    filled = {id(place) for key, place in places.items() if key in state}
    tensors = [*places.items(), *rebuilt.named_buffers()]
    empty = [key for key, t in tensors if isinstance(t, Tensor) and t.is_meta and id(t) not in filled]
    if not empty:
        return ""
    return f"on the meta device, and not in the state_dict: {', '.join(empty[:8])}. Build the model on the CPU"


def _load(rebuilt: nn.Module, state: dict[str, Any], strict: bool) -> None:
    """`load_state_dict`, whose names may be fewer: of tensors that are one, some libraries store only one."""
    places = state_of(rebuilt)
    stored = {id(places[key]): state[key] for key in places if key in state}
    for key, place in places.items():
        if key not in state and id(place) in stored:
            state[key] = stored[id(place)]
    try:
        nn.Module.load_state_dict(rebuilt, state, strict=strict)
    except RuntimeError as error:
        text = f"the state_dict does not fit this {type(rebuilt).__name__}: {_renamed(rebuilt, state)}{error}"
        raise ValueError(text) from error


def _renamed(rebuilt: nn.Module, state: Mapping[str, Any]) -> str:
    """Which split layers of a state_dict have no place in the model, as the likeliest cause that it does not fit."""
    endings = tuple(f".{stage}" for stage in STAGES)
    names = dict.fromkeys(key.rsplit(".", 2)[0] for key in state if key.endswith(endings))
    lost = [name for name in names if not isinstance(dict(rebuilt.named_modules()).get(name), SeparableConv)]
    if not lost:
        return ""
    return (
        "it has split layers under names at which the model has no convolution and no linear layer "
        f"({', '.join(lost[:4])}). What wrote it "
        "may have renamed them, as transformers does where save_original_format=False is not said. "
    )
