"""Running a model on what it is called with, and watching what its modules do meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from convsplit.model.guards import RandomState, same_globals
from convsplit.model.hooks import Given, hooked
from convsplit.model.operations import flops_of
from convsplit.model.values import Batch as Batch
from convsplit.model.values import count_inputs
from convsplit.model.values import tensors_in as tensors_in
from convsplit.progress import warn
from convsplit.spec import Axes

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a tensor, a tuple (or list) of positional arguments or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def device_of(model: nn.Module, batch: Batch) -> torch.device:
    """Where a model works on a batch: on a device beside the CPU if any of their tensors is there."""
    found = (tensor.device for tensor in (*model.parameters(), *model.buffers(), *tensors_in(batch)))
    return next((device for device in found if device.type != "cpu"), torch.device("cpu"))


def moved(batch: Batch, device: torch.device | str) -> Batch:
    """The same batch with its tensors on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def batches_in(inputs: Any) -> Iterable[Batch]:
    """One example input (tensor, tuple, dict) as a single batch; any other iterable as the batches it yields."""
    if isinstance(inputs, Tensor | tuple | Mapping):
        return [inputs]
    if isinstance(inputs, Iterable):
        return inputs
    raise TypeError(
        f"inputs of type {type(inputs).__name__}: want a tensor, a tuple of positional arguments, a dict of "
        "keyword arguments, or an iterable of those such as a DataLoader"
    )


@dataclass(frozen=True)
class Call:
    """One use of a module: shapes of the tensor that went in and of the one that came out.

    `inputs` is the number of inputs in the batch that the model was run on: what is counted of a call is a figure of
    the batch, and a figure per input is that over `inputs`.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    inputs: int = 1

    def images(self, axes: int) -> int:
        """N, for maps of so many axes; an unbatched input counts as one image. Of none: rows of a linear layer."""
        return math.prod(self.input_shape[: -axes - 1])

    def sizes(self, axes: int) -> tuple[Axes, Axes]:
        """Of the map that went in and of the one that came out."""
        return self.input_shape[len(self.input_shape) - axes :], self.output_shape[len(self.output_shape) - axes :]


def macs_per_input(calls: Sequence[Call], axes: int, of_an_image: Callable[[Axes, Axes], int]) -> int:
    """The MACs of all calls together, shared among the inputs of the batch; 0 without calls.

    `of_an_image` tells those of one image from the sizes of the maps that go in and come out.
    """
    total = sum(use.images(axes) * of_an_image(*use.sizes(axes)) for use in calls)
    return round(total / calls[0].inputs) if calls else 0


def observe_calls(
    model: nn.Module, batch: Batch, forward: Forward | None = None
) -> tuple[dict[str, tuple[Call, ...]], int]:
    """Run a model once and note every call of a module that takes and returns one tensor; also the MACs per input."""
    shapes: dict[str, list[tuple[torch.Size, torch.Size]]] = {}

    def note(name: str, given: Given, output: Any) -> None:
        x = given.tensor
        if x is not None and isinstance(output, Tensor):
            shapes.setdefault(name, []).append((x.shape, output.shape))

    def run() -> None:
        shapes.clear()
        seen.clear()
        run_or_explain(model, batch, forward)

    with hooked(dict(model.named_modules()), after=note), quiet_run(model), first_convolution(model) as seen:
        flops = flops_of(run)
    inputs = max(1, count_inputs(batch, seen))
    calls = {name: tuple(Call(tuple(x), tuple(y), inputs) for x, y in uses) for name, uses in shapes.items()}
    return calls, round(flops / 2 / inputs)


@contextmanager
def first_convolution(model: nn.Module) -> Iterator[list[int]]:
    """How many images the first convolution to be called works on, one number for each of its calls while inside."""
    first: list[str] = []
    seen: list[int] = []
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, _ConvNd)}

    def note(name: str, given: Given) -> None:
        x, conv = given.tensor, convolutions[name]
        first.append(name)
        if name == first[0] and x is not None:
            seen.append(x.shape[0] if x.dim() == conv.weight.dim() else 1)

    with hooked(convolutions, before=note):
        yield seen


def is_random(model: nn.Module, batch: Batch, forward: Forward | None = None) -> bool:
    """Whether a model draws random numbers on a batch; run as it is, the random state put back.

    Raises:
        ValueError: the model does not run on the batch; names the module that failed and what reached it.
    """
    before = RandomState.now()
    try:
        run_or_explain(model, batch, forward)
        return RandomState.now() != before
    finally:
        before.restore()


def warn_of_noise(model: nn.Module, what: str) -> None:
    """Say why a model that is random in eval mode is not worked on."""
    warn(
        f"{type(model).__name__} draws random numbers in eval mode, so its outputs cannot be compared with those of "
        f"the converted model: nothing was {what}"
    )


@contextmanager
def quiet_run(*models: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and random state and mode flags as before afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad(), same_globals():
            yield
    finally:
        for module, training in flags:
            module.training = training


def run_or_explain(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Any:
    """Run the model; a failure is raised again with the module it happened in and the shapes that reached it."""
    entered: list[tuple[str, Given]] = []

    def leave(name: str, given: Given, output: Any) -> None:
        while entered and entered.pop()[0] != name:
            pass

    modules = dict(model.named_modules())
    with hooked(modules, before=lambda name, given: entered.append((name, given)), after=leave):
        try:
            return (forward or call)(model, batch)
        except Exception as error:
            raise ValueError(_explain(error, model, batch, entered)) from error


def _explain(error: Exception, model: nn.Module, batch: Batch, entered: list[tuple[str, Given]]) -> str:
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(batch)) or "no tensor"
    text = f"{type(model).__name__} does not run on the given inputs (shapes {shapes})"
    if entered and entered[-1][0]:
        name, given = entered[-1]
        got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_in((given.args, given.kwargs))) or "no tensor"
        text += f": module {name!r} ({type(model.get_submodule(name)).__name__}) got {got} and"
    text += f" failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
    if isinstance(error, TypeError) and isinstance(batch, tuple | list) and len(batch) > 1:
        text += (
            f". A tuple of {len(batch)} items is one input of {len(batch)} positional arguments. Where it holds "
            "several batches, make it a list; where it holds images and labels, say "
            "forward=lambda model, batch: model(batch[0])"
        )
    return text + _devices(model, batch)


def _devices(model: nn.Module, batch: Batch) -> str:
    """What to do about inputs that are elsewhere than the model; a model on several devices places them itself."""
    inputs = {str(tensor.device) for tensor in tensors_in(batch)}
    home = {str(parameter.device) for parameter in model.parameters()}
    if len(home) != 1 or inputs <= home:
        return ""
    there = home.pop()
    return (
        f". The model is on {there}, the inputs on {' and '.join(sorted(inputs))}: move them there, one by one as "
        f"they are read with forward=lambda model, batch: model(batch.to({there!r}))"
    )
