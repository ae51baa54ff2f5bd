"""Blocks: the parts of a model that are reconstructed one after the other.

A block is a span of the traced graph between two points where a single tensor passes, such as a residual block or a
convolution with its batch norm and ReLU. Where long skip connections leave no such points (U-Net, DenseNet), or the
model does not trace, it is the smallest module around a split layer that takes one tensor, and nothing else that is not
the same in every call (None, a flag, a number), and returns one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convsplit.data.walk import walk
from convsplit.finetune.steps import Steps, start_lockstep
from convsplit.layers.separable import SeparableConv
from convsplit.model.copies import scratch_copy
from convsplit.model.hooks import Given, hooked
from convsplit.model.running import Batch, Forward, call, quiet_run, run_or_explain
from convsplit.precision import widened

MOST_LAYERS = 8  # split layers in a span; more of them are no block any longer
_GOES_ON = ("batchnorm", "activation", "dropout", "normalization", "instancenorm")  # modules of torch.nn
_CONSTANTS = (type(None), bool, int, float, str)
_GOES_ON_FUNCTIONS = (
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.elu, F.dropout,
    F.batch_norm, torch.sigmoid, "relu", "relu_", "sigmoid", "contiguous",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A part of the converted model at the moment its turn has come.

    `run` computes it, differentiably and under the autocast that the model itself runs it under; `modules` are those in
    it, `layers` the split ones; `inputs` come from the converted model as it is now, `targets` from the original, both
    in float32 at least.
    """

    name: str
    layers: tuple[SeparableConv, ...]
    modules: tuple[nn.Module, ...]
    run: Callable[[Tensor], Any]
    inputs: list[Tensor]
    targets: list[Tensor]


def walk_blocks(
    original: nn.Module, converted: nn.Module, batches: Sequence[Batch], forward: Forward | None
) -> tuple[int, Iterator[Block]]:
    """How many blocks there are, and each in the order of execution; the caller may change its split layers."""
    split = {name: m for name, m in converted.named_modules() if isinstance(m, SeparableConv)}
    started = start_lockstep(original, converted, batches, forward)
    if started is not None:
        nodes = started[1].nodes
        spans = find_spans(nodes, started[1].model, set(split))
        held = [_layers_in(nodes[start + 1 : end + 1], split) for start, end in spans]
        covered = {name for names in held for name in names} == set(_layers_in(nodes, split))
        if spans and covered and max(map(len, held)) <= MOST_LAYERS:
            return len(spans), _by_spans(*started, spans, split)
    rests = find_modules(converted, set(split), batches, forward)
    return len(rests), _by_modules(original, converted, rests, batches, forward)


def find_spans(nodes: Sequence[fx.Node], model: nn.Module, split: set[str]) -> list[tuple[int, int]]:
    """Spans (start, end) of node indices: the block computes the value of `end` from that of `start` alone."""
    position = {node: index for index, node in enumerate(nodes)}
    # Weights read by the graph are not values that pass.
    last_use = [
        max((position[user] for user in node.users), default=-1) if node.op != "get_attr" else -1 for node in nodes
    ]
    inputs = max((position[node] for node in nodes if node.op == "placeholder" and node.users), default=0)
    cuts, reach = [], -1
    for index, node in enumerate(nodes):
        if node.op == "output":
            break
        passes_alone = index >= inputs and reach <= index < last_use[index]
        if passes_alone and node.op != "get_attr" and _ends(nodes, index, model):
            cuts.append(index)
        reach = max(reach, last_use[index])
    spans, start = [], None
    for end in cuts:
        if start is not None and _layers_in(nodes[start + 1 : end + 1], dict.fromkeys(split)):
            spans.append((start, end))
        start = end
    return spans


def _ends(nodes: Sequence[fx.Node], index: int, model: nn.Module) -> bool:
    """Whether a block may end here: not before the norm or the activation that belongs to it."""
    following = next((node for node in nodes[index + 1 :] if node.op != "get_attr"), None)
    if following is None or following.op == "output":
        return True
    if following.op == "call_module":
        home = type(model.get_submodule(str(following.target))).__module__
        return not (home.startswith("torch.nn.") and home.endswith(_GOES_ON))
    return following.target not in _GOES_ON_FUNCTIONS


def _layers_in(nodes: Sequence[fx.Node], split: dict[str, Any]) -> list[str]:
    return [str(node.target) for node in nodes if node.op == "call_module" and str(node.target) in split]


def _by_spans(
    before: Steps, after: Steps, spans: list[tuple[int, int]], split: dict[str, SeparableConv]
) -> Iterator[Block]:
    done = 0
    for start, end in spans:
        _advance(after, done, start)
        _advance(before, done, end)
        own = after.nodes[start + 1 : end + 1]
        names = _layers_in(own, split)
        inputs = [widened(value.clone()) for value in after.values(after.nodes[start])]  # blocks may work in place
        targets = [widened(value.clone()) for value in before.values(before.nodes[end])]
        modules = tuple(after.model.get_submodule(str(n.target)) for n in own if n.op == "call_module")
        yield Block(
            names[0], tuple(split[n] for n in names), modules, _Span(after.model, start, end), inputs, targets
        )
        _advance(after, start, end)
        done = end


def _advance(steps: Steps, start: int, end: int) -> None:
    for node in steps.nodes[start : end + 1]:
        steps.advance(node)


class _Span:
    """A span of a graph as a function of the tensor that enters it."""

    def __init__(self, model: fx.GraphModule, start: int, end: int) -> None:
        self.interpreter = fx.Interpreter(model, garbage_collect_values=False)
        nodes = list(model.graph.nodes)
        self.start = nodes[start]
        self.own = [node for node in nodes[start + 1 : end + 1] if node.op != "placeholder"]  # which nobody reads
        weights = {used for node in self.own for used in node.all_input_nodes if used.op == "get_attr"}
        self.weights = [node for node in nodes[:start] if node in weights]

    def __call__(self, x: Tensor) -> Any:
        self.interpreter.env = {self.start: x.clone()}
        for node in (*self.weights, *self.own):
            self.interpreter.env[node] = self.interpreter.run_node(node)
        answer = self.interpreter.env[self.own[-1]]
        self.interpreter.env = {}
        return answer


@dataclass(frozen=True)
class Rest:
    """What a module is called with beside the tensor that it works on, which is the first, perhaps by a `keyword`."""

    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    keyword: str = ""

    @classmethod
    def of(cls, given: Given) -> Rest | None:
        """None where that is not a tensor first, and constants."""
        named = tuple(given.kwargs.items())
        if not given.args and not named:
            return None
        first, keyword = (given.args[0], "") if given.args else (named[0][1], named[0][0])
        rest = cls(given.args[1:], named[bool(keyword) :], keyword)
        return rest if isinstance(first, Tensor) and _is_constant((*rest.args, *dict(rest.kwargs).values())) else None

    def call(self, module: nn.Module, x: Tensor) -> Any:
        """Run a module on a tensor and the rest."""
        kwargs = dict(self.kwargs)
        return module(**{self.keyword: x}, **kwargs) if self.keyword else module(x, *self.args, **kwargs)


def _is_constant(value: Any) -> bool:
    return all(map(_is_constant, value)) if isinstance(value, tuple | list) else isinstance(value, _CONSTANTS)


def find_modules(
    converted: nn.Module, split: set[str], batches: Sequence[Batch], forward: Forward | None
) -> dict[str, Rest]:
    """The smallest modules around split layers that map a tensor to one, or the layers, in the order of first calls.

    What else they are called with is the same in all batches.
    """
    copied = scratch_copy(converted)
    calls = _calls(copied, batches[0], forward)
    if any(rests[0] not in (None, Rest()) for rests in calls.values()):
        for batch in batches[1:]:
            others = _calls(copied, batch, forward)
            calls = {name: rests if others.get(name) == rests else [None] for name, rests in calls.items()}
    around = dict.fromkeys(_around(name, calls) for name in calls if name in split)
    outermost = [n for n in around if not any(n != other and n.startswith(f"{other}.") for other in around)]
    return {name: calls[name][0] or Rest() for name in outermost}


def _calls(model: nn.Module, batch: Batch, forward: Forward | None) -> dict[str, list[Rest | None]]:
    """Of each call of each module what it gets beside a tensor; None where it does not map one tensor to another."""
    calls: dict[str, list[Rest | None]] = {}

    def note(name: str, given: Given, output: Any) -> None:
        calls.setdefault(name, []).append(Rest.of(given) if isinstance(output, Tensor) else None)

    with hooked(dict(model.named_modules()), after=note), quiet_run(model):
        run_or_explain(model, batch, forward)
    return calls


def _around(name: str, calls: dict[str, list[Rest | None]]) -> str:
    """The parent of a split layer, if it is called, once and with one tensor alone; not the whole model."""
    parent = name.rpartition(".")[0]
    return parent if parent and len(calls.get(parent, ())) == 1 and calls[parent][0] is not None else name


def _by_modules(
    original: nn.Module, converted: nn.Module, rests: dict[str, Rest], batches: Sequence[Batch],
    forward: Forward | None,
) -> Iterator[Block]:  # fmt: skip
    names = list(rests)
    modes = _autocast_around(converted, names, batches[0], forward)
    stops = walk(original, converted, names, (), batches, forward, math.inf, tails=False, every_call=False)
    with closing(stops):
        for stop in stops:
            module = converted.get_submodule(stop.name)
            layers = tuple(m for m in module.modules() if isinstance(m, SeparableConv))
            pairs = [
                (widened(x.clone()), widened(y.clone())) for x, y, _ in stop.values()
            ]  # may be worked on in place
            run = _Module(module, rests[stop.name], modes[stop.name])
            yield Block(stop.name, layers, (module,), run, [x for x, _ in pairs], [y for _, y in pairs])


def _autocast_around(
    model: nn.Module, names: Sequence[str], batch: Batch, forward: Forward | None
) -> dict[str, dict[str, torch.dtype]]:
    """Under which autocast the model itself runs each of its modules: device types with their dtypes."""
    found: dict[str, dict[str, torch.dtype]] = {name: {} for name in names}

    def note(name: str, given: Given) -> None:
        kinds = ("cpu", "cuda")
        found[name] = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}

    with hooked({name: model.get_submodule(name) for name in names}, before=note):
        (forward or call)(model, batch)
    return found


class _Module:
    """A module as a function of the tensor that enters it."""

    def __init__(self, module: nn.Module, rest: Rest, autocast: dict[str, torch.dtype]) -> None:
        self.module, self.rest, self.autocast = module, rest, autocast

    def __call__(self, x: Tensor) -> Any:
        with ExitStack() as modes:
            for kind, dtype in self.autocast.items():
                modes.enter_context(torch.autocast(kind, dtype))
            return self.rest.call(self.module, x.clone())
