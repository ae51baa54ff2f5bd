"""Walking two models side by side: what reaches each split layer in one, what the other answers.

Repair is sequential: every layer is fitted on the features of a model whose earlier layers are already repaired. Two
walks serve the layers in the order of execution.

    lockstep   both models as fx graphs, advanced node by node with all batches at once: one forward pass in all,
               while the values that later nodes still need are kept
    replay     any model: for each layer again, run both models up to it; nothing is kept

Lockstep is taken where the whole model traces, computes what the model computes, calls each split layer once, and
its live values fit the memory limit; replay takes over wherever it does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from convsplit.trace import Batch, Forward, SplitTracer, call, scratch_copy, tensors_in

Pairs = Iterable[tuple[Tensor, Tensor]]  # inputs of a layer in the converted model, its outputs in the original


@dataclass(frozen=True)
class Stop:
    """One layer on the walk, called `calls` times per batch. `pairs` may be read again until the walk goes on."""

    name: str
    calls: int
    pairs: Callable[[], Iterator[tuple[Tensor, Tensor]]]


def walk(
    original: nn.Module,
    converted: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    forward: Forward | None,
    memory_limit: int,
) -> Iterator[Stop]:
    """Stop at each of the named layers, in the order of execution; layers that the batches never reach are left out.

    Both models must be in eval mode, and stay so. The caller may change a layer of `converted` at its stop.
    """
    counts = _count_calls(converted, set(names), batches[0], forward)
    remaining = list(counts)
    if all(count == 1 for count in counts.values()):
        for stop in _lockstep(original, converted, counts, batches, forward, memory_limit):
            remaining.remove(stop.name)
            yield stop
    for name in remaining:
        yield Stop(name, counts[name], _replayed(original, converted, name, counts[name], batches, forward))


def _count_calls(model: nn.Module, names: set[str], batch: Batch, forward: Forward | None) -> dict[str, int]:
    """How often each layer is called on one batch, in the order of first calls."""
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    handles = [m.register_forward_hook(count(n)) for n, m in model.named_modules() if n in names]
    try:
        (forward or call)(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counts


class _Reached(Exception):  # noqa: N818 - not an error: ends a forward pass that has gone far enough
    """Carries what a partial forward pass was run for."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _replayed(
    original: nn.Module,
    converted: nn.Module,
    name: str,
    count: int,
    batches: Sequence[Batch],
    forward: Forward | None,
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            inputs = _run_until(converted, name, count, batch, forward, lambda args, output: args[0].clone())
            outputs = _run_until(original, name, count, batch, forward, lambda args, output: output.clone())
            yield from zip(inputs, outputs, strict=False)

    return pairs


def _run_until(
    model: nn.Module,
    name: str,
    count: int,
    batch: Batch,
    forward: Forward | None,
    take: Callable[[tuple[Any, ...], Tensor], Tensor],
) -> list[Tensor]:
    """Run the model until a layer was called `count` times; copies (later steps may be in place) of what to take."""
    taken: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        taken.append(take(args, output))
        if len(taken) == count:
            raise _Reached(taken)

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        (forward or call)(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return taken


def _lockstep(
    original: nn.Module,
    converted: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    forward: Forward | None,
    memory_limit: int,
) -> Iterator[Stop]:
    """Advance both graphs together and stop at each of the layers; ends early where the memory limit is passed."""
    try:
        graphs = [SplitTracer().trace(scratch_copy(model)) for model in (original, converted)]
        arguments = [_arguments(original, batch, forward) for batch in batches]
        steps = [_Steps(model, graph, arguments) for model, graph in zip((original, converted), graphs, strict=True)]
        same = _computes_the_same(steps[0], original, batches[0], forward)
    except Exception:  # tracing runs the model's own code on symbols; whatever fails, replay does not need it
        return
    if not same or [str(n.target) for n in graphs[0].nodes] != [str(n.target) for n in graphs[1].nodes]:
        return
    waiting = set(names)
    for before, after in zip(graphs[0].nodes, graphs[1].nodes, strict=True):
        name = str(after.target)
        if before.op == "call_module" and name in waiting:
            steps[0].advance(before)
            inputs, outputs = steps[1].values(after.args[0]), steps[0].values(before)
            yield Stop(name, 1, partial(zip, inputs, outputs, strict=True))
            waiting.remove(name)
            steps[1].advance(after)
        else:
            steps[0].advance(before)
            steps[1].advance(after)
        if not waiting or steps[0].live_bytes() + steps[1].live_bytes() > memory_limit:
            return


class _Steps:
    """One graph, executed node by node on several batches at once; values are dropped after their last use."""

    def __init__(self, model: nn.Module, graph: fx.Graph, arguments: list[dict[str, Any]]) -> None:
        self.interpreter = fx.Interpreter(fx.GraphModule(model, graph), garbage_collect_values=True)
        self.nodes = {node.name: node for node in self.interpreter.graph.nodes}
        self.environments: list[dict[fx.Node, Any]] = [{} for _ in arguments]
        self.arguments = arguments

    def advance(self, node: fx.Node) -> None:
        """Compute one node for every batch."""
        own = self.nodes[node.name]
        for environment, arguments in zip(self.environments, self.arguments, strict=True):
            if own.op == "placeholder":
                environment[own] = arguments[str(own.target)]
                continue
            self.interpreter.env = environment
            environment[own] = self.interpreter.run_node(own)
            for dead in self.interpreter.user_to_last_uses.get(own, []):
                del environment[dead]

    def values(self, node: Any) -> list[Tensor]:
        """What a node has become, batch by batch."""
        return [environment[self.nodes[node.name]] for environment in self.environments]

    def live_bytes(self) -> int:
        """Memory held by values that are still needed."""
        tensors = (
            t for environment in self.environments for value in environment.values() for t in tensors_in(value)
        )
        return sum(t.numel() * t.element_size() for t in tensors)


def _arguments(model: nn.Module, batch: Batch, forward: Forward | None) -> dict[str, Any]:
    """The arguments of the model's forward by name, defaults included, for one batch."""

    class Listener(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise _Reached((args, kwargs))

    try:
        (forward or call)(Listener(), batch)
    except _Reached as reached:
        args, kwargs = reached.value
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    raise ValueError("forward= never calls the model it is given")


def _computes_the_same(steps: _Steps, model: nn.Module, batch: Batch, forward: Forward | None) -> bool:
    """Whether the graph gives what the model gives: a traced branch may not be the one the model takes."""
    arguments = _arguments(model, batch, forward)
    wanted = list(tensors_in(model(**arguments)))
    got = list(tensors_in(fx.Interpreter(steps.interpreter.module).run(*arguments.values())))
    return len(wanted) == len(got) and all(
        w.shape == g.shape and torch.allclose(w, g, rtol=1e-3, atol=1e-5) for w, g in zip(wanted, got, strict=True)
    )
