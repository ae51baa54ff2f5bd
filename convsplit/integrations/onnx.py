"""ONNX in, ONNX out: for people who have only the file.

Convolutions of the graph become layers of a module (`read`) that is studied, converted and repaired like any other, and
each one that was split goes back into its place in the graph as the nodes of its stages (`write`). Everything else in
the file stays as it is: other nodes, names, metadata, opset. Nothing is imported into PyTorch but the convolutions, so
that no operator is unknown; the rest of the graph is run by ONNX Runtime (`convsplit.integrations.onnx_network`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from convsplit.choose.budget import Budget
from convsplit.choose.plan import Plan
from convsplit.files import write_whole
from convsplit.integrations.onnx_network import OnnxNetwork, attributes_of, names_read, stored_tensors
from convsplit.layers.separable import SeparableConv
from convsplit.layers.stages import ChannelGather, ChannelSum
from convsplit.model.running import Batch, call, quiet_run, tensors_in
from convsplit.spec import Convolution
from convsplit.studies import Study
from convsplit.tables import share

ROUNDING = 1e-3  # of an output's largest value, between a file and the module it was written from, in float32


@dataclass(frozen=True)
class Written:
    """A file that was written and run. Differences are relative to the largest value of an output.

    `rounding` is that between the file and the converted module, `drift` that between the file and the original file.
    `left_alone` has the convolutions that are no layers of the plan, by the names of their nodes, and why.
    """

    path: Path
    plan: Plan
    rounding: float
    drift: float
    left_alone: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        alone = "".join(f"\n{name} is left alone: {reason}" for name, reason in self.left_alone.items())
        return (
            f"{self.plan.summary()}{alone}\nwritten to {self.path} ({self.path.stat().st_size / 1e6:.1f} MB); "
            f"outputs in ONNX Runtime differ from the original file's by {share(self.drift)} of the largest value"
        )


def read(path: str | Path) -> OnnxNetwork:
    """The graph of a file as a module in which its convolutions are layers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no ONNX file, or ONNX Runtime does not take it.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        return OnnxNetwork(onnx.load(str(path)))
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {str(error).strip()[:300]}") from error


def convert(
    path: str | Path, out: str | Path, example_inputs: Batch = None, *, budget: Budget | None = None,
    rank: int | None = None, exact: bool = False, **options: Any,
) -> Written:  # fmt: skip
    """Split the convolutions of an ONNX file, and write another one.

    Args:
        path: the file; it is not changed.
        out: the file to write.
        example_inputs: as for `convsplit.convert`; by default the first batch of `calibration`, else random numbers
            where the graph says its inputs' sizes.
        budget: what may be kept or lost, as for `convsplit.convert`; not of latency.
        rank: instead, as there.
        exact: instead, as there.
        **options: as for `convsplit.study`, such as `calibration`, with which the result is repaired, and `skip`, where
            layers are called what their nodes are called (a slash for a point).

    Raises:
        ValueError: as `read`, `convsplit.convert` and `write`.

    >>> import io, tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)).eval()
    >>> folder, images = Path(tempfile.mkdtemp()), torch.rand(8, 3, 9, 9)
    >>> done = convsplit.export(model, folder / "model.onnx", images, dynamic=(0,))
    >>> written = convert(folder / "model.onnx", folder / "smaller.onnx", calibration=images)
    >>> len(written.plan.split) > 0, written.rounding < 1e-5
    (True, True)
    """
    network = read(path)
    if example_inputs is None and options.get("calibration") is None:
        example_inputs = random_inputs(network)
    known = Study(network, example_inputs, **options)
    plan = known.plan(budget, rank=rank, exact=exact)
    converted = known.apply(plan)
    rounding = write(converted, out, known.example_inputs)
    wanted, found = (run_file(file, known.example_inputs) for file in (path, out))
    return Written(Path(out), plan, rounding, _difference(found, wanted), network.left_alone)


def write(converted: OnnxNetwork, path: str | Path, example_inputs: Batch = None) -> float:
    """Write a module of `read`, converted and repaired or not, as the file that it was read from is written.

    The file is run in ONNX Runtime before it takes its place. Returns the largest difference to the module's outputs,
    relative to the largest value of an output.

    Raises:
        ValueError: ONNX Runtime does not take the file, or its outputs are not the module's; no inputs are given and
            the graph does not say their sizes.
    """
    batch = random_inputs(converted) if example_inputs is None else example_inputs
    model = onnx.ModelProto()
    model.CopyFrom(converted.graph.value)
    _put_layers(model, converted)
    with quiet_run(converted):
        wanted = list(tensors_in(call(converted, batch)))
    differences: list[float] = []

    def checked(temporary: Path) -> None:
        onnx.save(model, str(temporary))
        differences.append(_difference(run_file(temporary, batch), wanted))
        if not differences[0] <= _allowed(wanted):
            raise ValueError(f"{path} is not written: its outputs differ from the module's by {differences[0]:.2g}")

    write_whole(Path(path), checked)
    return differences[0]


def random_inputs(network: OnnxNetwork) -> tuple[Tensor, ...]:
    """Inputs of the sizes that a graph says; of a batch of unknown size, one.

    Raises:
        ValueError: it does not say one.
    """
    graph, made = network.graph.value.graph, []
    for each in graph.input:
        if each.name not in network.inputs:
            continue
        sizes = [size.dim_value for size in each.type.tensor_type.shape.dim]
        sizes = [1, *sizes[1:]] if sizes and sizes[0] == 0 else sizes
        if not sizes or 0 in sizes:
            raise ValueError(f"the graph does not say the size of {each.name}: give example inputs")
        kind = helper.tensor_dtype_to_np_dtype(each.type.tensor_type.elem_type)
        noise = np.random.default_rng(0).standard_normal(sizes)
        made.append(torch.from_numpy(noise.astype(kind)))
    return tuple(made)


def run_file(path: str | Path, batch: Batch) -> list[Tensor]:
    """The outputs of a file in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"ONNX Runtime does not take {path}: {error}") from error
    names = [each.name for each in session.get_inputs()]
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(batch)]
    named = batch if isinstance(batch, dict) else dict(zip(names, arrays, strict=True))
    try:
        found = session.run(None, {name: np.asarray(value) for name, value in named.items()})
    except Exception as error:
        raise ValueError(f"{path} does not run on these inputs: {error}") from error
    return [torch.from_numpy(np.asarray(array)) for array in found]


def _allowed(outputs: list[Tensor]) -> float:
    """What is rounding, in the precision of outputs."""
    precisions = [float(torch.finfo(each.dtype).eps) for each in outputs if each.is_floating_point()]
    return max([ROUNDING, *map(math.sqrt, precisions)])


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max(
        (
            float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30))
            for one, other in zip(found, wanted, strict=True)
            if other.numel() and other.is_floating_point()
        ),
        default=0.0,
    )


def _put_layers(model: onnx.ModelProto, converted: OnnxNetwork) -> None:
    """Put the layers of a module into the graph it came from, those that have changed."""
    graph, stored = model.graph, stored_tensors(model.graph)
    nodes: list[onnx.NodeProto] = []
    layers = {place: converted.get_submodule(name) for name, place in converted.nodes.items()}
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 1)
    added: list[onnx.TensorProto] = []
    for place, node in enumerate(graph.node):
        layer = layers.get(place)
        if isinstance(layer, SeparableConv):
            writer = _Stages(node, opset)
            nodes += writer.nodes_of(layer)
            added += writer.constants
        elif isinstance(layer, Convolution) and _is_other(layer, node, stored):
            writer = _Stages(node, opset)
            nodes.append(writer.convolution(node.input[0], layer, node.output[0], node.name, whole=True))
            added += writer.constants
        else:
            nodes.append(node)
    _replace_nodes(model, nodes, added)


def _is_other(layer: Convolution, node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    """Whether a dense layer has other numbers than the file: a repair moves some, and gives biases."""
    held = [numpy_helper.to_array(stored[name]) for name in node.input[1:] if name]
    own = [each.detach().numpy() for each in (layer.weight, layer.bias) if each is not None]
    return len(held) != len(own) or not all(np.array_equal(*pair) for pair in zip(held, own, strict=True))


def _replace_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto], added: list[onnx.TensorProto]) -> None:
    """Give the graph these nodes and tensors, without the tensors that only the nodes that were there had read."""
    graph = model.graph
    before = set(names_read(graph.node))
    needed = {*names_read(nodes), *(each.name for each in graph.output)}
    unread = before - needed
    kept = [node for node in nodes if not (node.op_type == "Constant" and node.output[0] in unread)]
    fresh = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(fresh)
    for held in (graph.initializer, graph.input):
        rest = [each for each in held if each.name not in unread]
        copies = [type(each).FromString(each.SerializeToString()) for each in rest]
        del held[:]
        held.extend(copies)
    graph.initializer.extend(added)
    if model.ir_version < 4:  # in which what a file holds is among the inputs, too
        graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in added)


class _Stages:
    """The nodes of one layer, in the place of one node."""

    def __init__(self, node: onnx.NodeProto, opset: int) -> None:
        self.node, self.opset = node, opset
        self.base = node.name or node.output[0]
        self.constants: list[onnx.TensorProto] = []

    def nodes_of(self, layer: SeparableConv) -> Iterator[onnx.NodeProto]:
        """Stages in their order; the last gives the value that the node gave."""
        x = self.node.input[0]
        stages = {name: stage for name, stage in layer.stages.items() if name != "pad"}  # the attributes say it
        for position, (name, stage) in enumerate(stages.items()):
            last = position == len(stages) - 1
            result = self.node.output[0] if last else f"{self.base}/{name}"
            label = self.node.name if last else f"{self.base}/{name}"
            if isinstance(stage, ChannelGather):
                places = self.constant(f"{name}.channels", np.asarray(stage.numbers))
                yield helper.make_node("Gather", [x, places], [result], label, axis=1)
            elif isinstance(stage, ChannelSum):
                yield from self._sum(x, stage, result, label, layer.axes)
            else:
                assert isinstance(stage, Convolution)
                yield self.convolution(x, stage, result, label, whole=stage is layer.geometry, name=name)
            x = result

    def convolution(
        self, x: str, conv: Convolution, result: str, label: str, *, whole: bool, name: str = "dense"
    ) -> onnx.NodeProto:
        """A convolution, `whole` with the strides, the padding and the dilations that the node had."""
        numbers = attributes_of(self.node) if whole else {}
        numbers.update(kernel_shape=list(conv.weight.shape[2:]), group=conv.groups)
        given = [x, self.constant(f"{name}.weight", conv.weight.detach().cpu().numpy())]
        if conv.bias is not None:
            given.append(self.constant(f"{name}.bias", conv.bias.detach().cpu().numpy()))
        return helper.make_node("ConvTranspose" if conv.transposed else "Conv", given, [result], label, **numbers)

    def constant(self, name: str, values: np.ndarray[Any, Any]) -> str:
        """A tensor that the file holds."""
        full = f"{self.base}/{name}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), full))
        return full

    def _sum(self, x: str, stage: ChannelSum, result: str, label: str, axes: int) -> Iterator[onnx.NodeProto]:
        """Ever the j-th component of all channels, added up; a channel of zeros stands in where there are fewer."""
        members: list[list[int]] = [[] for _ in range(stage.width)]
        for place, channel in enumerate(stage.numbers):
            members[channel].append(place)
        rank, nothing = axes + 2, len(stage.numbers)
        around = [0] * (2 * rank)
        around[rank + 1] = 1  # behind the last channel
        padded = f"{label}/padded"
        if self.opset >= 11:
            yield helper.make_node("Pad", [x, self.constant("sum.pads", np.asarray(around))], [padded], padded)
        else:
            yield helper.make_node("Pad", [x], [padded], padded, pads=around)
        terms: list[str] = []
        for j in range(max(len(mine) for mine in members)):
            places = [mine[j] if j < len(mine) else nothing for mine in members]
            terms.append(f"{label}/{j}")
            channels = self.constant(f"sum.channels.{j}", np.asarray(places))
            yield helper.make_node("Gather", [padded, channels], [terms[-1]], terms[-1], axis=1)
        bias: Any = stage.bias
        if bias is not None:
            terms.append(self.constant("sum.bias", bias.detach().cpu().numpy().reshape(-1, *[1] * axes)))
        elif len(terms) == 1:
            yield helper.make_node("Identity", terms, [result], label)
        total = terms[0]
        for j, term in enumerate(terms[1:], 1):
            given, total = [total, term], result if j == len(terms) - 1 else f"{label}/{j}/added"
            yield helper.make_node("Add", given, [total], label if total == result else total)
