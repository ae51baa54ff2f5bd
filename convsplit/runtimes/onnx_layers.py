"""Layers as ONNX graphs of their stages, built directly: the exporter takes seconds where this takes none.

A runtime stores images in blocks of channels, and turns them at a graph's borders. Alone in a graph a short layer would
cost less than that, so a graph to be timed holds several copies of the layer side by side, behind a depthwise 1 x 1
convolution that stands for the layer before (what it writes is stored as the runtime likes it) and before an average
over all positions (so that nothing large is turned back).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convsplit.layers.separable import SeparableConv
from convsplit.layers.stages import ChannelGather, ChannelSum
from convsplit.spec import LAYERS, axes_of, padding_around

OPSET, IR = 18, 9  # read by ONNX Runtime since 1.14 and by OpenVINO since 2023.0

_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class GraphOfLayers:
    """An ONNX graph in the making; every method adds nodes and returns the name of the value they give."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.outputs: list[str] = []

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """One node."""
        from onnx import helper

        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def constant(self, values: np.ndarray[Any, Any] | Sequence[int]) -> str:
        """A tensor that the file holds."""
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def convolution(self, x: str, conv: Any, weight: Tensor | None = None, bias: Tensor | None = None) -> str:
        """A convolution of any number of dimensions, with weights of its own or others; or a linear layer."""
        weight = conv.weight if weight is None else weight
        if isinstance(conv, nn.Linear):
            y = self.add("MatMul", [x, self.constant(_array(weight.mT))])
            return y if bias is None else self.add("Add", [y, self.constant(_array(bias))])
        shared = {"kernel_shape": list(weight.shape[2:]), "strides": list(conv.stride), "group": conv.groups,
                  "dilations": list(conv.dilation)}  # fmt: skip
        given = [self.constant(_array(weight)), *([] if bias is None else [self.constant(_array(bias))])]
        if conv.transposed:
            pads, extra = list(conv.padding), list(conv.output_padding)
            return self.add("ConvTranspose", [x, *given], pads=[*pads, *pads], output_padding=extra, **shared)
        around = padding_around(conv)  # last dimension first, as torch pads
        sides = [*around[-2::-2], *around[::-2]]
        if conv.padding_mode != "zeros" and any(sides):
            x = self.padded(x, sides, conv.padding_mode)
            sides = [0] * len(sides)
        return self.add("Conv", [x, *given], pads=sides, **shared)

    def padded(self, x: str, sides: Sequence[int], mode: str = "zeros") -> str:
        """Before and after each dimension of space: all beginnings, then all ends."""
        half = len(sides) // 2
        everything = [0, 0, *sides[:half], 0, 0, *sides[half:]]
        return self.add("Pad", [x, self.constant(everything)], mode=_PAD_MODES[mode])

    def bytes(self) -> bytes:
        """The model as ONNX Runtime and OpenVINO read it."""
        from onnx import TensorProto, helper

        given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs]
        graph = helper.make_graph(self.nodes, "layers", given, results, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        return bytes(model.SerializeToString())


def add_layer(graph: GraphOfLayers, x: str, layer: nn.Module, shape: Sequence[int]) -> str:
    """A convolution or a split layer, padding before it included, on a value of this shape.

    Raises:
        TypeError: another kind of module.
    """
    if isinstance(layer, SeparableConv):
        return _split(graph, x, layer, shape)
    if isinstance(layer, nn.Sequential):  # padding by the input's size, then the convolution
        *pads, conv = layer
        for pad in pads:
            x = _sized(graph, x, pad, shape)
        return add_layer(graph, x, conv, shape)
    if type(layer) in LAYERS.values():
        plain: Any = layer
        return graph.convolution(x, plain, bias=plain.bias)
    raise TypeError(f"no ONNX graph of a {type(layer).__name__}")


def timing_graph(layer: nn.Module, shape: Sequence[int], copies: int) -> bytes:
    """Copies of a layer side by side, as the head of the module says."""
    graph = GraphOfLayers(shape)
    *_, conv = layer.children() if isinstance(layer, nn.Sequential) else (layer,)
    rows = axes_of(conv) == 0  # of a linear layer: nothing is turned
    channels = shape[1]
    ones = np.ones((channels, 1, *[1] * (len(shape) - 2)), np.float32)
    start = "x" if rows else graph.add("Conv", ["x", graph.constant(ones)], group=channels)
    for _ in range(copies):
        y = add_layer(graph, start, _other(layer), shape)
        graph.outputs.append(graph.add("ReduceMean" if rows else "GlobalAveragePool", [y]))
    return graph.bytes()


@torch.no_grad()
def _other(layer: nn.Module) -> nn.Module:
    """The layer with a number changed: of equal nodes a runtime runs one."""
    for weight in layer.parameters():
        weight.mul_(1 + 2**-10)
    return layer


def _split(graph: GraphOfLayers, x: str, layer: SeparableConv, shape: Sequence[int]) -> str:
    if layer.arrangement == "repeated":
        return _repeated(graph, x, layer, shape)
    for name, stage in layer.stages.items():
        if isinstance(stage, ChannelGather):
            x = graph.add("Gather", [x, graph.constant(stage.numbers)], axis=1)
        elif isinstance(stage, ChannelSum):
            x = _sum(graph, x, stage, _output_shape(layer, shape))
        elif name == "pad":
            x = _sized(graph, x, stage, shape)
        else:
            x = graph.convolution(x, stage, bias=stage.bias)  # type: ignore[arg-type]
    return x


def _repeated(graph: GraphOfLayers, x: str, layer: SeparableConv, shape: Sequence[int]) -> str:
    """As `SeparableConv` runs it: the j-th components of all channels, for every j, added up."""
    stages, m = layer.stages, layer.rank
    assert m is not None
    depthwise: Any = layer.geometry
    filters, total = depthwise.weight, ""
    for j in range(m):
        bias, y = layer.bias if j == 0 else None, x
        if "pad" in stages and "pointwise_in" not in stages:
            y = _sized(graph, y, stages["pad"], shape)
        if "pointwise_out" in stages:
            out: Any = stages["pointwise_out"]
            y = graph.convolution(y, depthwise, filters[j::m])
            y = graph.convolution(y, out, out.weight[:, j::m], bias)
        else:
            into: Any = stages["pointwise_in"]
            y = graph.convolution(y, into, into.weight[j::m])
            y = _sized(graph, y, stages["pad"], shape) if "pad" in stages else y
            y = graph.convolution(y, depthwise, filters[:, j : j + 1], bias)
        total = graph.add("Add", [total, y]) if total else y
    return total


def _sum(graph: GraphOfLayers, x: str, stage: ChannelSum, shape: Sequence[int]) -> str:
    """Components added up by channel as PyTorch's exporter writes `index_add`: channels first, scattered, and back."""
    channels_first = [1, 0, *range(2, len(shape))]
    bias: Any = stage.bias
    start = np.zeros(stage.width, np.float32) if bias is None else _array(bias)
    images, _, *size = shape
    flat = graph.constant(start.reshape(-1, *[1] * (len(shape) - 1)))
    total = graph.add("Expand", [flat, graph.constant([stage.width, images, *size])])
    places = graph.constant(np.asarray(stage.numbers)[:, None])
    turned = graph.add("Transpose", [x], perm=channels_first)
    return graph.add(
        "Transpose", [graph.add("ScatterND", [total, places, turned], reduction="add")], perm=channels_first
    )


def _sized(graph: GraphOfLayers, x: str, pad: nn.Module, shape: Sequence[int]) -> str:
    """Padding by a module, as much as it pads at this shape."""
    grown = pad(torch.empty(tuple(shape), device="meta")).shape
    extra = [after - before for after, before in zip(grown[2:], shape[2:], strict=True)]
    return graph.padded(x, [*(size // 2 for size in extra), *(size - size // 2 for size in extra)])


def _output_shape(layer: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(copy.deepcopy(layer).to("meta")(torch.empty(tuple(shape), device="meta")).shape)


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().float().cpu().contiguous().numpy()
    return array
