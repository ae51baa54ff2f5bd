"""Running a model on what it is called with, and watching what its modules do meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convsplit.model.guards import same_globals
from convsplit.spec import Pair, pair

Batch = Any  # a tensor, a tuple or list of positional arguments, or a dict of keyword arguments


Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a tensor, a tuple (or list) of positional arguments or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in any nesting of tuples, lists, dicts and dataclasses (or other plain objects), in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


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
    """One use of a module: shapes of the tensor that went in and of the one that came out."""

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def images(self) -> int:
        """N; an unbatched input counts as one image."""
        return self.input_shape[0] if len(self.input_shape) == 4 else 1

    @property
    def input_hw(self) -> Pair:
        return pair(self.input_shape[-2:])

    @property
    def output_hw(self) -> Pair:
        return pair(self.output_shape[-2:])


def observe_calls(
    model: nn.Module, batch: Batch, forward: Forward | None = None
) -> tuple[dict[str, tuple[Call, ...]], int]:
    """Run a model once and note every call of a module that takes and returns one tensor; also the MACs of it all."""
    calls: dict[str, list[Call]] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            use = Call(tuple(args[0].shape), tuple(output.shape))
            calls.setdefault(names[id(module)], []).append(use)

    with watch_modules(model, note), quiet_run(model), FlopCounterMode(display=False) as counter:
        run_or_explain(model, batch, forward)
    return {name: tuple(uses) for name, uses in calls.items()}, counter.get_total_flops() // 2


@contextmanager
def watch_modules(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook(module, args, output)` after every module's forward, while inside."""
    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    entered: list[tuple[str, nn.Module, Any]] = []
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append((names[id(module)], module, args))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while entered and entered.pop()[1] is not module:
            pass

    plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [m.register_forward_pre_hook(enter) for m in plain]
    handles += [m.register_forward_hook(leave) for m in plain]
    try:
        return (forward or call)(model, batch)
    except Exception as error:
        raise ValueError(_explain(error, model, batch, entered)) from error
    finally:
        for handle in handles:
            handle.remove()


def _explain(error: Exception, model: nn.Module, batch: Batch, entered: list[tuple[str, nn.Module, Any]]) -> str:
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(batch)) or "no tensor"
    text = f"{type(model).__name__} does not run on the given inputs (shapes {shapes})"
    if entered and entered[-1][0]:
        name, module, args = entered[-1]
        got = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_in(args)) or "no tensor"
        text += f": module {name!r} ({type(module).__name__}) got {got} and"
    text += f" failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
    if isinstance(error, TypeError) and isinstance(batch, tuple | list) and len(batch) > 1:
        text += (
            f". A tuple of {len(batch)} items is one input of {len(batch)} positional arguments. Where it holds "
            "several batches, make it a list; where it holds images and labels, say "
            "forward=lambda model, batch: model(batch[0])"
        )
    return text
