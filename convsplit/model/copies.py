"""Copies of models: the user's own is never run, traced or changed.

`deep_copy` is what convsplit gives back. `scratch_copy` is to be run and traced: it owns all its tensors, as `eval()`
and `forward` may write to weights (adapters that merge themselves, masks that are multiplied in), and so takes the
memory of another model. `working_copy` is trained in place of the model: the weights are the model's own, what it
counts and remembers is not.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from convsplit.layers.separable import SeparableConv


def scratch_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode that shares nothing with the model: free to be run and traced.

    Raises:
        TypeError: the model cannot be deep-copied, so it could not be converted either.
    """
    copied = deep_copy(model)
    copied.eval()  # on a line of its own: there are models whose eval() returns nothing
    return copied


@contextmanager
def working_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A deep copy that holds the model's own parameters, stages of split layers and statistics of batch norms.

    What these learn while inside, the model has learnt; attributes, counters and caches are the copy's, and so are the
    modes. A bias that a split layer gets while inside, it gets in the model. Scripted parts, whose copies have weights
    of their own, are the model's.

    Raises:
        TypeError: the model cannot be deep-copied, or its copy has weights of its own.
        ValueError: `eval()` writes to the model's weights.
    """
    _refuse_writing_eval(model)
    split = [layer for layer in model.modules() if isinstance(layer, SeparableConv)]
    own: list[Any] = [*model.parameters(), *(stage for layer in split for stage in layer.stages.values())]
    own += [part for part in model.modules() if isinstance(part, torch.jit.ScriptModule)]
    own += [buffer for norm in model.modules() if isinstance(norm, _BatchNorm) for buffer in norm.buffers()]
    copied = deep_copy(model, {id(part): part for part in own})
    if {id(p) for p in copied.parameters()} != {id(p) for p in model.parameters()}:
        raise TypeError(
            f"copy.deepcopy of {type(model).__name__} gives a model with other weights in it (a __deepcopy__ of its "
            "own?), so it cannot be trained in place"
        )
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield copied
    finally:
        for module, training in flags:
            module.training = training


def _refuse_writing_eval(model: nn.Module) -> None:
    """Layers that merge adapters into their weights on `eval()` would leave them changed and trained half-way."""
    own = {
        type(module).train is nn.Module.train and type(module).eval is nn.Module.eval for module in model.modules()
    }
    if own == {True}:
        return
    before = dict(model.named_parameters())
    written = [
        name
        for name, after in scratch_copy(model).named_parameters()
        if not after.is_meta and name in before and not torch.equal(after.nan_to_num(), before[name].nan_to_num())
    ]
    if written:
        raise ValueError(
            f"eval() of {type(model).__name__} writes to its weights ({', '.join(written[:3])}), as adapters do that "
            "merge themselves: merge them for good before converting, or call eval() on the model first"
        )


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` with an error that says what a model must allow.

    Tensors that modules keep and that hang on to a graph, which deepcopy refuses (weight_norm leaves such a `weight`
    behind, attention layers such caches), are detached in the copy. Functions set on a module (a `forward` of its own,
    a compiled method), which deepcopy would hand on with the original inside, run the copy; compiled ones run
    uncompiled.
    """
    memo = {} if memo is None else memo
    try:
        with _Detaching():
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}); convsplit never "
            "changes the model it is given, so it needs a copy. Give it a model whose copy.deepcopy works"
        ) from error
    for module in model.modules():
        new = memo.get(id(module))
        if not isinstance(new, nn.Module) or new is module:
            continue
        for name, value in vars(new).items():
            if name == "forward" or isinstance(value, types.FunctionType):
                new.__dict__[name] = _rebound(value, memo)
    return copied


class _Detaching(TorchFunctionMode):
    """Whatever tensor comes to be copied, in whatever container, is taken out of its graph first."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """A callable (or what it holds) with every part of the original in it exchanged for that of the copy.

    Deepcopy takes functions, and weak references, for constants: what a decorator has closed over, or a partial refers
    to, would go on being the original.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _rebound(value.__self__, memo))
    if isinstance(value, weakref.ref):
        target = value()
        return weakref.ref(memo[id(target)]) if id(target) in memo else value
    if isinstance(value, functools.partial):
        arguments = [_rebound(each, memo) for each in value.args]
        keywords = {key: _rebound(each, memo) for key, each in value.keywords.items()}
        return functools.partial(_rebound(value.func, memo), *arguments, **keywords)
    if isinstance(value, types.FunctionType):
        if hasattr(value, "_torchdynamo_orig_callable"):  # compiled: the compiler's state belongs to the original
            return _rebound(value._torchdynamo_orig_callable, memo)
        return _function_rebound(value, memo)
    return value


def _function_rebound(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    if not function.__closure__:
        return function
    cells = tuple(types.CellType() for _ in function.__closure__)
    new = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    memo[id(function)] = new  # before its cells are filled: a function may close over itself
    new.__kwdefaults__, new.__qualname__, new.__doc__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__doc__,
    )
    new.__dict__.update({key: _rebound(each, memo) for key, each in vars(function).items()})
    for cell, own in zip(cells, function.__closure__, strict=True):
        with suppress(ValueError):  # an empty cell stays empty
            cell.cell_contents = _rebound(own.cell_contents, memo)
    return new
