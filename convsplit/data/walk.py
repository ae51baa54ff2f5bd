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
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from convsplit.data.tail import NO_TAIL, Tail, find_tail
from convsplit.model.copies import scratch_copy
from convsplit.model.graphs import SplitTracer
from convsplit.model.running import Batch, Forward, call, tensors_in

_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
Value = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Stop:
    """One layer on the walk, called `calls` times per batch.

    `values` may be read again until the walk goes on. Each is the layer's input in the converted model, its answer in
    the original, and what the `tail` adds to that in the original and in the converted model (or None).
    """

    name: str
    calls: int
    values: Callable[[], Iterator[Value]]
    tail: Tail = NO_TAIL


def walk(
    original: nn.Module,
    converted: nn.Module,
    names: Iterable[str],
    others: Iterable[str],
    batches: Sequence[Batch],
    forward: Forward | None,
    memory_limit: int,
    *,
    tails: bool = True,
) -> Iterator[Stop]:
    """Stop at each of the named layers, in the order of execution; layers that the batches never reach are left out.

    Stops at `others` too, as long as lockstep goes and once there is something to make good. Without `tails`, what
    follows the layers is not looked at.
    Both models must be in eval mode, and stay so. The caller may change a layer of `converted` at its stop.
    """
    counts = _count_calls(converted, {*names, *others}, batches[0], forward)
    remaining = [name for name in counts if name in set(names)]
    if all(counts[name] == 1 for name in remaining):
        once = {name for name, count in counts.items() if count == 1}
        for stop in _lockstep(original, converted, remaining, once, batches, forward, memory_limit, tails):
            if stop.name in remaining:
                remaining.remove(stop.name)
            yield stop
    for name in remaining:
        yield Stop(name, counts[name], replayed(original, converted, name, counts[name], batches, forward))


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


def replayed(
    original: nn.Module,
    converted: nn.Module,
    name: str,
    count: int,
    batches: Sequence[Batch],
    forward: Forward | None,
) -> Callable[[], Iterator[Value]]:
    def values() -> Iterator[Value]:
        for batch in batches:
            inputs = _run_until(converted, name, count, batch, forward, lambda args, output: args[0].clone())
            outputs = _run_until(original, name, count, batch, forward, lambda args, output: output.clone())
            for given, answer in zip(inputs, outputs, strict=False):
                yield given, answer, None

    return values


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
    split: Iterable[str],
    once: set[str],
    batches: Sequence[Batch],
    forward: Forward | None,
    memory_limit: int,
    tails: bool,
) -> Iterator[Stop]:
    """Advance both graphs together and stop at each of the layers; ends early where the memory limit is passed."""
    started = start_lockstep(original, converted, batches, forward)
    if started is None:
        return
    before, after = started
    walker = _Walker(before, after, set(split), once - set(split), tails)
    for index in range(len(before.nodes)):
        yield from walker.visit(index)
        if walker.finished or before.live_bytes() + after.live_bytes() > memory_limit:
            return


def start_lockstep(
    original: nn.Module, converted: nn.Module, batches: Sequence[Batch], forward: Forward | None
) -> tuple[Steps, Steps] | None:
    """Both models as graphs of the same nodes, ready to be advanced; None where graphs do not tell what they do."""
    try:
        graphs = [SplitTracer().trace(scratch_copy(model)) for model in (original, converted)]
        arguments = [_arguments(original, batch, forward) for batch in batches]
        before, after = Steps(original, graphs[0], arguments), Steps(converted, graphs[1], arguments)
        same = _computes_the_same(before, original, batches[0], forward)
    except Exception:  # tracing runs the model's own code on symbols; whatever fails, replay does not need it
        return None
    if not same or [str(n.target) for n in before.nodes] != [str(n.target) for n in after.nodes]:
        return None
    return before, after


@dataclass
class _Walker:
    """Two graphs of the same nodes, the split layers ahead (`waiting`) and the others that may be stopped at.

    `stopped` are the layers it stands before: more than one where a shortcut has layers of its own.
    """

    before: Steps
    after: Steps
    waiting: set[str]
    others: set[str]
    tails: bool
    drifted: bool = False
    stopped: set[fx.Node] = field(default_factory=set)

    @property
    def finished(self) -> bool:
        return not (self.waiting or self.others)

    def visit(self, index: int) -> Iterator[Stop]:
        """Compute a node in both graphs, unless that was done; stop before it if it is a layer to be repaired."""
        own, other = self.before.nodes[index], self.after.nodes[index]
        name = str(other.target)
        if own in self.before.done:
            return
        self.drifted = self.drifted or name in self.waiting
        if own.op == "call_module" and (name in self.waiting or (name in self.others and self.drifted)):
            self.before.advance(own)
            tail = find_tail(self.before.model, own) if self.tails else NO_TAIL
            shortcut = None if tail.shortcut is None else self._index(tail.shortcut)
            self.stopped.add(other)
            early = [] if shortcut is None else self._before_the_shortcut(shortcut)
            if early is None:
                tail = replace(tail, shortcut=None, ceiling=None)
            else:
                for each in early:
                    yield from self.visit(each)
            yield Stop(name, 1, self._values(own, other, tail), tail)
            self.stopped.remove(other)
        self.waiting.discard(name)
        self.others.discard(name)
        self.before.advance(own)
        self.after.advance(other)

    def _index(self, node: fx.Node) -> int:
        return self.before.nodes.index(node)

    def _before_the_shortcut(self, shortcut: int) -> list[int] | None:
        """The nodes to compute before what is added to a layer is known; None if that needs layers not yet repaired.

        Of two layers whose answers are added to one another, the one stopped at first makes good what the other lost.
        """
        missing = self.after.missing(self.after.nodes[shortcut])
        if missing is None or missing & self.stopped or any(str(each.target) in self.waiting for each in missing):
            return None
        return [index for index, each in enumerate(self.after.nodes) if each in missing]

    def _values(self, own: fx.Node, other: fx.Node, tail: Tail) -> Callable[[], Iterator[Value]]:
        inputs, answers = self.after.values(other.args[0]), self.before.values(own)
        shortcuts: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(inputs)
        if tail.shortcut is not None:
            same = self.after.nodes[self._index(tail.shortcut)]
            shortcuts = list(zip(self.before.values(tail.shortcut), self.after.values(same), strict=True))
        return partial(zip, inputs, answers, shortcuts, strict=True)


class Steps:
    """One graph, executed node by node on several batches; values are dropped after their last use.

    Nodes that are due wait until a value is asked for, and are then computed one batch after the other: what lies
    between two stops is never held for all batches at once.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, arguments: list[dict[str, Any]]) -> None:
        self.model = fx.GraphModule(model, graph)
        self.interpreter = fx.Interpreter(self.model, garbage_collect_values=False)
        self.nodes = list(self.model.graph.nodes)
        self.environments: list[dict[fx.Node, Any]] = [{} for _ in arguments]
        self.arguments = arguments
        self.done: set[fx.Node] = set()
        self.due: list[tuple[fx.Node, list[fx.Node]]] = []  # and the values whose last use each node is

    def advance(self, node: fx.Node) -> None:
        """Have one node computed for every batch, unless that was done."""
        if node in self.done:
            return
        self.done.add(node)
        dropped = [
            u for u in dict.fromkeys((*node.all_input_nodes, node)) if all(user in self.done for user in u.users)
        ]
        self.due.append((node, dropped))

    def _catch_up(self) -> None:
        due, self.due = self.due, []
        for environment, arguments in zip(self.environments, self.arguments, strict=True):
            for node, dropped in due:
                if node.op == "placeholder":
                    environment[node] = arguments[str(node.target)]
                else:
                    self.interpreter.env = environment
                    environment[node] = self.interpreter.run_node(node)
                for used in dropped:
                    environment.pop(used, None)

    def missing(self, node: fx.Node) -> set[fx.Node] | None:
        """The nodes still to be computed for a value; None where computing them now, out of order, would change it.

        That is so where a node that comes before them works in place on a value that they read.
        """
        needed: set[fx.Node] = set()
        front = [node]
        while front:
            each = front.pop()
            if each not in self.done and each not in needed:
                needed.add(each)
                front.extend(each.all_input_nodes)
        read = {value for each in needed for value in each.all_input_nodes}
        last = max((index for index, each in enumerate(self.nodes) if each in needed), default=0)
        skipped = (each for each in self.nodes[:last] if each not in self.done and each not in needed)
        harmful = any(_in_place(self.model, each) and read & set(each.all_input_nodes) for each in skipped)
        return None if harmful else needed

    def values(self, node: Any) -> list[Tensor]:
        """What a node has become, batch by batch."""
        self._catch_up()
        return [environment[node] for environment in self.environments]

    def live_bytes(self) -> int:
        """Memory held by values that are still needed."""
        tensors = (
            t for environment in self.environments for value in environment.values() for t in tensors_in(value)
        )
        return sum(t.numel() * t.element_size() for t in tensors)


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or node.target in _IN_PLACE_OPERATORS or bool(node.kwargs.get("inplace", False))


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


def _computes_the_same(steps: Steps, model: nn.Module, batch: Batch, forward: Forward | None) -> bool:
    """Whether the graph gives what the model gives: a traced branch may not be the one the model takes."""
    arguments = _arguments(model, batch, forward)
    wanted = list(tensors_in(model(**arguments)))
    got = list(tensors_in(fx.Interpreter(steps.interpreter.module).run(*arguments.values())))
    return len(wanted) == len(got) and all(
        w.shape == g.shape and torch.allclose(w, g, rtol=1e-3, atol=1e-5) for w, g in zip(wanted, got, strict=True)
    )
