"""A module that runs an ONNX graph: its convolutions are modules of torch, all else is left to ONNX Runtime.

So whatever operators a graph has, its convolutions are where hooks, plans and repairs find them, and no importer has to
know the graph's other nodes. The graph is cut before and after every convolution whose weight is stored in the file;
what lies between two cuts is one inference session.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from convsplit.layers.stages import PaddedConv2d, SamePad2d
from convsplit.spec import CONVOLUTIONS, Convolution, Pair


class Held:
    """A graph or a session: shared by copies of the module that runs it, as neither is ever changed."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self


@dataclass(frozen=True)
class Step:
    """A convolution, by the name of its module, or (where that is empty) a session that gives some values of others."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: str = ""
    session: Held | None = None


class OnnxNetwork(nn.Module):
    """An ONNX graph as a module: takes and returns what the graph does, in its order, as tensors.

    `nodes` maps the name of each convolution's module to the place of its node in the graph. A point in a node's name
    is a slash here, as points separate modules. `left_alone` has the convolutions that are no modules, by the names of
    their nodes, and why.

    Raises:
        ValueError: a value between two parts of the graph is of unknown type.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.graph = Held(model)
        self.nodes: dict[str, int] = {}
        self.left_alone: dict[str, str] = dict(_inner(model.graph.node))
        stored = stored_tensors(model.graph)
        shared: dict[str, nn.Parameter] = {}
        for place, node in enumerate(model.graph.node):
            if not _is_convolution(node):
                continue
            conv, label = _convolution(node, stored, shared), node.name or node.output[0]
            if isinstance(conv, str):
                self.left_alone[label] = conv
            else:
                name = self._free_name(label)
                self.add_module(name, conv)
                self.nodes[name] = place
        names = {place: name for name, place in self.nodes.items()}
        self.steps = tuple(_steps(model, names))
        self.inputs = tuple(each.name for each in model.graph.input if each.name not in stored)
        self.outputs = tuple(each.name for each in model.graph.output)
        self._last_use = {name: at for at, step in enumerate(self.steps) for name in step.inputs}
        self.eval()

    def _free_name(self, wanted: str) -> str:
        name = wanted.replace(".", "/")
        while hasattr(self, name):
            name += "_"
        return name

    def forward(self, *given: Tensor, **named: Tensor) -> Any:
        values: dict[str, Tensor] = {**dict(zip(self.inputs, given, strict=False)), **named}
        missing = [name for name in self.inputs if name not in values]
        if missing or len(given) > len(self.inputs):
            raise TypeError(
                f"the graph takes {', '.join(self.inputs)}; got {len(given)} and {', '.join(named) or 'none'}"
            )
        for at, step in enumerate(self.steps):
            if step.layer:
                values[step.outputs[0]] = self.get_submodule(step.layer)(values[step.inputs[0]])
            else:
                values.update(_run(step, values))
            for name in step.inputs:
                if self._last_use[name] == at and name not in self.outputs:
                    values.pop(name, None)
        found = tuple(values[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found

    def extra_repr(self) -> str:
        return f"{', '.join(self.inputs)} -> {', '.join(self.outputs)}"


def stored_tensors(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The tensors that a graph holds, as initialisers or as constants."""
    found = {tensor.name: tensor for tensor in graph.initializer}
    constants = [node for node in graph.node if node.op_type == "Constant"]
    found.update((node.output[0], each.t) for node in constants for each in node.attribute if each.name == "value")
    return found


def names_read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """All values that nodes read, those in the branches and bodies of their subgraphs too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from names_read(graph.node)
                yield from (each.name for each in graph.output)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node by name."""
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


_KINDS = {"Conv": False, "ConvTranspose": True}  # what adds up to convolutions, and whether those are transposed
_TYPES = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16}
_COMPUTING = {"ConvInteger", "QLinearConv", "DeformConv"}


def _is_convolution(node: onnx.NodeProto) -> bool:
    return node.op_type in _COMPUTING | set(_KINDS)


def _inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, str]]:
    """The convolutions in the branches and bodies of nodes, which one session runs as a whole, and what they are in."""
    for node in nodes:
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                for each in filter(_is_convolution, graph.node):
                    yield each.name or each.output[0], f"inside of the {node.op_type} node {node.name!r}"
                yield from _inner(graph.node)


def _convolution(
    node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], shared: dict[str, nn.Parameter]
) -> Convolution | str:
    """The convolution of torch that a node equals, or the reason why there is none."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _COMPUTING:
        return f"a {node.op_type} node is no plain convolution"
    computed = [name for name in node.input[1:] if name and name not in stored]
    if computed:
        return f"{computed[0]!r} is computed by other nodes, not stored"
    given = [name for name in node.input[1:] if name]
    other = next((stored[name] for name in given if stored[name].data_type not in _TYPES), None)
    if other is not None:
        return f"{other.name!r} is of type {onnx.TensorProto.DataType.Name(other.data_type)}"
    for name in given:
        if name not in shared:
            shared[name] = nn.Parameter(torch.from_numpy(numpy_helper.to_array(stored[name]).copy()))
    weight, bias = shared[node.input[1]], shared.get(node.input[2]) if len(node.input) > 2 else None
    transposed, axes = _KINDS[node.op_type], weight.dim() - 2
    if axes not in (1, 2, 3):
        return f"convolutions of {axes} axes are not known"
    numbers = _transposed_numbers(node, axes) if transposed else _plain_numbers(node, tuple(weight.shape[2:]))
    if isinstance(numbers, str):
        return numbers
    pad, group = numbers.pop("pad", None), attributes_of(node).get("group", 1)
    kind: Any = CONVOLUTIONS[axes, transposed] if pad is None else PaddedConv2d
    rest, per_group = len(weight), weight.shape[1] * group
    conv = kind(
        *((rest, per_group) if transposed else (per_group, rest)), tuple(weight.shape[2:]), groups=group,
        bias=bias is not None, device="meta", **numbers,
    )  # fmt: skip
    conv.weight, conv.bias = weight, bias
    if pad is not None:
        conv.pad = pad
    return conv  # type: ignore[no-any-return]


def _plain_numbers(node: onnx.NodeProto, kernel: tuple[int, ...]) -> dict[str, Any] | str:
    """Strides, dilations and padding of a Conv node, as a module of torch takes them, and what pads before it."""
    numbers, axes = attributes_of(node), len(kernel)
    strides, dilations = (tuple(numbers.get(key, [1] * axes)) for key in ("strides", "dilations"))
    padded = _padding(numbers, kernel, strides, dilations)
    if padded is None:
        return "it pads its two sides unequally, as no module of torch of its axes does"
    return {"stride": strides, "dilation": dilations, "padding": padded[0], "pad": padded[1]}


def _transposed_numbers(node: onnx.NodeProto, axes: int) -> dict[str, Any] | str:
    """Those of a ConvTranspose node."""
    numbers = attributes_of(node)
    strides, dilations = (tuple(numbers.get(key, [1] * axes)) for key in ("strides", "dilations"))
    extra, sides = (tuple(numbers.get(key, [0] * n)) for key, n in (("output_padding", axes), ("pads", 2 * axes)))
    if "output_shape" in numbers or numbers.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return "its padding follows from the size of its output"
    if sides[:axes] != sides[axes:]:
        return "it crops its two sides unequally, as no module of torch does"
    return {"stride": strides, "dilation": dilations, "padding": sides[:axes], "output_padding": extra}


def _padding(
    numbers: Mapping[str, Any], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[tuple[int, ...], nn.Module | None] | None:
    """What the convolution pads itself, and a module that pads before it; None where there is none that does."""
    axes, auto = len(kernel), numbers.get("auto_pad", b"NOTSET").decode()
    none = (0,) * axes
    if auto.startswith("SAME"):
        exact = all((k - 1) * d % 2 == 0 for k, d in zip(kernel, dilations, strict=True))
        if set(strides) == {1} and exact:  # both sides alike
            return tuple((k - 1) * d // 2 for k, d in zip(kernel, dilations, strict=True)), None
        if auto != "SAME_UPPER" or axes != 2:
            return None
        return none, SamePad2d(*(cast(Pair, each) for each in (kernel, strides, dilations)))
    sides = list(numbers.get("pads", [0] * (2 * axes))) if auto == "NOTSET" else [0] * (2 * axes)
    before, after = tuple(sides[:axes]), tuple(sides[axes:])
    if before == after:
        return before, None
    return (none, nn.ZeroPad2d((before[1], after[1], before[0], after[0]))) if axes == 2 else None


def _steps(model: onnx.ModelProto, names: Mapping[int, str]) -> Iterator[Step]:
    """The graph's nodes in their order, which is one of execution, cut at the convolutions."""
    nodes = list(model.graph.node)
    types = _types(model)
    pending: list[int] = []
    for place in range(len(nodes) + 1):
        if place < len(nodes) and place not in names:
            pending.append(place)
            continue
        if pending:
            later = {*names_read(nodes[i] for i in range(pending[-1] + 1, len(nodes)))}
            later.update(each.name for each in model.graph.output)
            step = _session(model, [nodes[i] for i in pending], later, types)
            if step.outputs:
                yield step
            pending = []
        if place < len(nodes):
            yield Step((nodes[place].input[0],), (nodes[place].output[0],), names[place])


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value of which it can be told."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {each.name: each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info, *graph.output)}


def _session(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], later: set[str], types: Mapping[str, int]
) -> Step:
    """The part of a graph that some nodes are; what it reads from elsewhere, and others of it, are its borders."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {name for node in nodes for name in node.output if name}
    read = dict.fromkeys(name for name in names_read(nodes) if name)
    inner = {name for node in nodes for a in node.attribute for g in (a.g, *a.graphs) for name in _made_in(g)}
    inputs = tuple(name for name in read if name not in held and name not in made and name not in inner)
    outputs = tuple(name for name in dict.fromkeys(n for node in nodes for n in node.output) if name in later)
    unknown = [name for name in (*inputs, *outputs) if not types.get(name)]
    if unknown:
        raise ValueError(f"the type of {unknown[0]!r} between two parts of the graph cannot be told")
    if not outputs:
        return Step(inputs, ())
    given, results = ([helper.make_tensor_value_info(n, types[n], None) for n in side] for side in (inputs, outputs))
    graph = helper.make_graph(list(nodes), "part", given, results, [held[name] for name in read if name in held])
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    part.functions.extend(model.functions)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Step(inputs, outputs, session=Held(session))


def _made_in(graph: onnx.GraphProto) -> Iterator[str]:
    """Values of a subgraph that are its own."""
    yield from (each.name for each in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _made_in(inner)


def _run(step: Step, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert step.session is not None
    arrays = {name: values[name].detach().cpu().contiguous().numpy() for name in step.inputs}
    found: list[np.ndarray[Any, Any]] = step.session.value.run(list(step.outputs), arrays)
    return {name: torch.from_numpy(array) for name, array in zip(step.outputs, found, strict=True)}
