"""What a model does, found out without touching it: fx graphs of the parts that trace, shapes of every call.

Two looks complete each other. `torch.fx` reads the code: which module feeds which, also functional convolutions.
One forward pass with hooks sees the shapes, the order and the number of calls, in models that fx cannot trace too.
Both work on copies, so that weights, counters, caches and batch-norm statistics in the user's model stay as they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._pytree import tree_leaves

from convsplit.kinds import is_convolution
from convsplit.layers.separable import SeparableConv
from convsplit.model.copies import scratch_copy
from convsplit.model.guards import same_globals
from convsplit.model.running import Batch, Call, Forward, observe_calls
from convsplit.spec import ConvSpec


@dataclass(frozen=True)
class FunctionalConv:
    """An `F.conv2d`, or its like (`F.linear` too), in the code.

    `weight` names the parameter it uses, and is empty where the weight is computed.
    """

    name: str
    weight: str
    spec: ConvSpec | None
    function: str = "F.conv2d"


@dataclass(frozen=True)
class Trace:
    """What was found out about a model.

    `graphs` maps the name of each traced part ("" is the whole model) to its fx graph, `untraced` the name of each
    part that does not trace to the reason. `calls` maps module names to their uses in the order of first use, and
    `macs` are those of the whole model per input; both are None where no example inputs were given. `functional` lists
    the `F.conv2d` and the like of the graphs, `graph_weights` the parameters that graphs of GraphModules read.
    """

    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    calls: dict[str, tuple[Call, ...]] | None = None
    macs: int | None = None
    functional: tuple[FunctionalConv, ...] = ()
    graph_weights: frozenset[str] = frozenset()


def trace(
    model: nn.Module,
    example_inputs: Batch = None,
    forward: Forward | None = None,
    *,
    whole: Callable[[nn.Module], bool] = is_convolution,
) -> Trace:
    """Trace the largest parts of a model that fx can trace; with example inputs, also run it once for the shapes.

    Modules that are `whole` are calls in the graphs, as convolutions and modules of torch.nn are.

    Raises:
        ValueError: the model does not run on the example inputs; names the module that failed and what reached it.
    """
    with same_globals():
        copied = scratch_copy(model)
        graphs: dict[str, fx.Graph] = {}
        untraced: dict[str, str] = {}
        _trace_parts(copied, "", graphs, untraced, whole)
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

    def __init__(self, whole: Callable[[nn.Module], bool] = is_convolution) -> None:
        super().__init__()
        self.whole = whole

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
        known = isinstance(module, SeparableConv | torch.jit.ScriptModule) or is_convolution(module)
        return known or self.whole(module) or super().is_leaf_module(module, module_qualified_name)


def _trace_parts(
    module: nn.Module, name: str, graphs: dict[str, fx.Graph], untraced: dict[str, str],
    whole: Callable[[nn.Module], bool],
) -> None:  # fmt: skip
    """Trace this module, or else each of its children."""
    if isinstance(module, torch.jit.ScriptModule | LazyModuleMixin) or not any(True for _ in module.children()):
        return
    if is_convolution(module):  # one that pads first has a child; its own forward would show as an F.conv2d
        return
    try:
        graphs[name] = module.graph if isinstance(module, fx.GraphModule) else SplitTracer(whole).trace(module)
    except Exception as error:  # whatever the user's forward does with symbols
        untraced[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        for child_name, child in module.named_children():
            _trace_parts(child, f"{name}.{child_name}" if name else child_name, graphs, untraced, whole)


LINEAR = "F.linear"  # as a function's name
aten = torch.ops.aten
# F.conv2d and its like, with axes and whether transposed, and what they become in graphs of torch.export: one overload
# for each way of writing the padding.
_FUNCTIONS: dict[Any, tuple[int, bool]] = {
    **dict.fromkeys((F.linear, aten.linear.default), (0, False)),
    **dict.fromkeys((F.conv1d, aten.conv1d.default, aten.conv1d.padding), (1, False)),
    **dict.fromkeys((F.conv2d, aten.conv2d.default, aten.conv2d.padding), (2, False)),
    **dict.fromkeys((F.conv3d, aten.conv3d.default, aten.conv3d.padding), (3, False)),
    **dict.fromkeys((F.conv_transpose1d, aten.conv_transpose1d.default), (1, True)),
    **dict.fromkeys((F.conv_transpose2d, aten.conv_transpose2d.input), (2, True)),
    **dict.fromkeys((F.conv_transpose3d, aten.conv_transpose3d.input), (3, True)),
}
_ARGUMENTS = {
    False: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    True: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}


def conv_arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of an `F.conv2d`, or its like, by name, defaults filled in; None for any other node.

    `axes` and `transposed` are added.
    """
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return None
    axes, transposed = _FUNCTIONS[node.target]
    given = dict(zip(_ARGUMENTS[transposed], node.args, strict=False))
    defaults = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    return {**defaults, **given, **node.kwargs, "axes": axes, "transposed": transposed}


def functional_spec(arguments: dict[str, Any], weight: Tensor) -> ConvSpec | None:
    """The numbers of an `F.conv2d`, or its like, with this weight; None where some are computed in the graph."""
    axes, transposed, groups = arguments["axes"], arguments["transposed"], arguments["groups"]
    per_axis = {key: arguments[key] for key in ("stride", "padding", "dilation", "output_padding")}
    if weight.dim() != axes + 2 or any(isinstance(each, fx.Node) for each in tree_leaves((per_axis, groups))):
        return None
    across, within, *kernel = weight.shape
    O, I = (within * groups, across) if transposed else (across, within * groups)
    return ConvSpec(I, O, tuple(kernel), groups=groups, bias=arguments["bias"] is not None, transposed=transposed,
                    **{key: value if isinstance(value, str | int) else tuple(value)  # type: ignore[arg-type]
                       for key, value in per_axis.items()})  # fmt: skip


def attribute(module: nn.Module, target: str) -> Any:
    """What a `get_attr` node refers to."""
    return functools.reduce(getattr, target.split("."), module)


def _functional_convs(model: nn.Module, part: str, graph: fx.Graph) -> Iterator[FunctionalConv]:
    prefix = f"{part}." if part else ""
    for node in graph.nodes:
        arguments = conv_arguments(node)
        if arguments is None:
            continue
        axes = arguments["axes"]
        function = f"F.conv{'_transpose' * arguments['transposed']}{axes}d" if axes else LINEAR
        source, weight, spec = arguments["weight"], "", None
        if isinstance(source, fx.Node) and source.op == "get_attr":
            weight = f"{prefix}{source.target}"
            spec = functional_spec(arguments, attribute(model, weight))
        yield FunctionalConv(f"{prefix}{node.name}", weight, spec, function)


def _weights_of_graph_modules(model: nn.Module) -> Iterator[str]:
    """Tensors that GraphModules read: their copies want parameters or buffers there, not properties."""
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="get_attr"):
                yield f"{name}.{node.target}" if name else str(node.target)
