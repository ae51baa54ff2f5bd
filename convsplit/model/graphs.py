"""What a model does, found out without touching it: fx graphs of the parts that trace, shapes of every call.

Two looks complete each other. `torch.fx` reads the code: which module feeds which, also functional convolutions.
One forward pass with hooks sees the shapes, the order and the number of calls, in models that fx cannot trace too.
Both work on copies, so that weights, counters, caches and batch-norm statistics in the user's model stay as they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves

from convsplit.kinds import is_convolution
from convsplit.layers.separable import SeparableConv2d
from convsplit.model.copies import scratch_copy
from convsplit.model.guards import same_globals
from convsplit.model.running import Batch, Call, Forward, observe_calls
from convsplit.spec import ConvSpec, Pair, pair


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
    `macs` are those of the whole model per input; both are None where no example inputs were given. `functional` lists
    the `F.conv2d` of the graphs, `graph_weights` the parameters that graphs of GraphModules read.
    """

    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    calls: dict[str, tuple[Call, ...]] | None = None
    macs: int | None = None
    functional: tuple[FunctionalConv, ...] = ()
    graph_weights: frozenset[str] = frozenset()


def trace(model: nn.Module, example_inputs: Batch = None, forward: Forward | None = None) -> Trace:
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
        calls, macs = None, None
        if example_inputs is not None:
            calls, macs = observe_calls(scratch_copy(model), example_inputs, forward)
    return Trace(graphs, untraced, calls, macs, functional, weights)


_TRACING = threading.RLock()


class SplitTracer(fx.Tracer):
    """Keeps every kind of convolution in one piece, also subclasses that live outside torch.nn.

    While it traces, torch.fx has exchanged `__call__` and `__getattr__` of all modules of the process. So one thread
    traces at a time, and modules that other threads run meanwhile are run as they are.
    """

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with _TRACING:
            self.thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

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
