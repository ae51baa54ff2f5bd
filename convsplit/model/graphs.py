"""What a model does, found out without touching it: fx graphs of the parts that trace, shapes of every call.

Two looks complete each other. `torch.fx` reads the code: which module feeds which, also functional convolutions.
One forward pass with hooks sees the shapes, the order and the number of calls, in models that fx cannot trace too.
Both work on a copy that shares parameters only, so that counters, caches and batch-norm statistics in the user's
model stay as they are.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from convsplit.kinds import is_convolution
from convsplit.layers.separable import SeparableConv2d
from convsplit.spec import ConvSpec, Pair, pair

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


@dataclass(frozen=True)
class FunctionalConv:
    """An `F.conv2d` in the code. `weight` names the parameter it uses, and is empty where the weight is computed."""

    name: str
    weight: str
    spec: ConvSpec | None


@dataclass(frozen=True)
class Trace:
    """What was found out about a model.

    `graphs` maps the name of each traced part ("" is the whole model) to its fx graph, `untraced` the name of each
    part that does not trace to the reason. `calls` maps module names to their uses in the order of first use, and
    `macs` are those of the whole model; both are None where no example inputs were given. `functional` lists the
    `F.conv2d` of the graphs, `graph_weights` the parameters that graphs of GraphModules read.
    """

    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    calls: dict[str, tuple[Call, ...]] | None = None
    macs: int | None = None
    functional: tuple[FunctionalConv, ...] = ()
    graph_weights: frozenset[str] = frozenset()


def trace(model: nn.Module, example_inputs: Batch = None) -> Trace:
    """Trace the largest parts of a model that fx can trace; with example inputs, also run it once for the shapes.

    Raises:
        ValueError: the model does not run on the example inputs; names the module that failed and what reached it.
    """
    with same_globals():
        copied = scratch_copy(model)
        graphs: dict[str, fx.Graph] = {}
        untraced: dict[str, str] = {}
        _trace_parts(copied, "", graphs, untraced)
        functional = tuple(conv for part, graph in graphs.items() for conv in _functional_convs(copied, part, graph))
        weights = frozenset(_weights_of_graph_modules(copied))
        # Tracing runs the model's own code on symbols, which may stay behind in attributes: run a second, clean copy.
        calls, macs = (None, None) if example_inputs is None else observe_calls(scratch_copy(model), example_inputs)
    return Trace(graphs, untraced, calls, macs, functional, weights)


@contextmanager
def same_globals() -> Iterator[None]:
    """Random states, default dtype, gradient mode and number of threads are afterwards what they were before."""
    python, numpy, dtype = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    # Asking for the state of a device would start CUDA where nobody uses it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Neither autocast nor inference mode, which would round factors and leave parameters that cannot be trained."""
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))  # which also turns gradients on
            modes.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield


def scratch_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode that shares the parameters: cheap, and free to be run and traced.

    Raises:
        TypeError: the model cannot be deep-copied, so it could not be converted either.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return deep_copy(model, shared).eval()


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` with an error that says what a model must allow.

    Tensors that modules keep as plain attributes and that hang on to a graph, which deepcopy refuses (weight_norm
    leaves such a `weight` behind), are detached in the copy.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be deep-copied ({type(error).__name__}: {error}); convsplit never "
            "changes the model it is given, so it needs a copy. Give it a model whose copy.deepcopy works"
        ) from error


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


class SplitTracer(fx.Tracer):
    """Keeps every kind of convolution in one piece, also subclasses that live outside torch.nn."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(module, SeparableConv2d | torch.jit.ScriptModule) or is_convolution(module)
        return whole or super().is_leaf_module(module, module_qualified_name)


def _trace_parts(module: nn.Module, name: str, graphs: dict[str, fx.Graph], untraced: dict[str, str]) -> None:
    """Trace this module, or else each of its children."""
    if isinstance(module, torch.jit.ScriptModule | LazyModuleMixin) or not any(True for _ in module.children()):
        return
    try:
        graphs[name] = module.graph if isinstance(module, fx.GraphModule) else SplitTracer().trace(module)
    except Exception as error:  # whatever the user's forward does with symbols
        untraced[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        for child_name, child in module.named_children():
            _trace_parts(child, f"{name}.{child_name}" if name else child_name, graphs, untraced)


# F.conv2d, and what it becomes in graphs of torch.export: one overload for each way of writing the padding.
_CONV2D = (F.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


def conv2d_arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of an `F.conv2d` by name, defaults filled in; None for any other node."""
    if node.op != "call_function" or node.target not in _CONV2D:
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def functional_spec(arguments: dict[str, Any], weight: Tensor) -> ConvSpec | None:
    """The numbers of an `F.conv2d` with this weight; None where some are computed in the graph."""
    stride, padding, dilation, groups = (arguments[key] for key in ("stride", "padding", "dilation", "groups"))
    numbers = tree_leaves((stride, padding, dilation, groups))
    if weight.dim() != 4 or any(isinstance(number, fx.Node) for number in numbers):
        return None
    O, I, kh, kw = weight.shape
    return ConvSpec(
        I * groups, O, (kh, kw), _both_axes(stride), padding if isinstance(padding, str) else _both_axes(padding),
        _both_axes(dilation), groups, bias=arguments["bias"] is not None,
    )  # fmt: skip


def _both_axes(value: int | Sequence[int]) -> Pair:
    """A number for both axes may also come as a sequence of one."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return pair(values * 2 if len(values) == 1 else values)


def attribute(module: nn.Module, target: str) -> Any:
    """What a `get_attr` node refers to."""
    return functools.reduce(getattr, target.split("."), module)


def _functional_convs(model: nn.Module, part: str, graph: fx.Graph) -> Iterator[FunctionalConv]:
    prefix = f"{part}." if part else ""
    for node in graph.nodes:
        arguments = conv2d_arguments(node)
        if arguments is None:
            continue
        source, weight, spec = arguments["weight"], "", None
        if isinstance(source, fx.Node) and source.op == "get_attr":
            weight = f"{prefix}{source.target}"
            spec = functional_spec(arguments, attribute(model, weight))
        yield FunctionalConv(f"{prefix}{node.name}", weight, spec)


def _weights_of_graph_modules(model: nn.Module) -> Iterator[str]:
    """Tensors that GraphModules read: their copies want parameters or buffers there, not properties."""
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="get_attr"):
                yield f"{name}.{node.target}" if name else str(node.target)
