"""Two models as graphs of the same nodes, advanced node by node with all batches at once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from convsplit.data.baton import Abandoned
from convsplit.model.copies import scratch_copy
from convsplit.model.graphs import SplitTracer
from convsplit.model.running import Batch, Forward, call, tensors_in


def start_lockstep(
    original: nn.Module, converted: nn.Module, batches: Sequence[Batch], forward: Forward | None
) -> tuple[Steps, Steps] | None:
    """Both models as graphs of the same nodes, ready to be advanced; None where graphs do not tell what they do."""
    arguments = [_arguments(original, batch, forward) for batch in batches]
    try:
        before, after = (Steps(model, _graph(scratch_copy(model)), arguments) for model in (original, converted))
        same = _computes_the_same(before, original, batches[0], forward)
    except Exception:  # tracing runs the model's own code on symbols; whatever fails, blocks are modules then
        return None
    if not same or [str(n.target) for n in before.nodes] != [str(n.target) for n in after.nodes]:
        return None
    return before, after


def _graph(model: nn.Module) -> fx.Graph:
    return model.graph if isinstance(model, fx.GraphModule) else SplitTracer().trace(model)


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

    def values(self, node: Any) -> list[Tensor]:
        """What a node has become, batch by batch."""
        self._catch_up()
        return [environment[node] for environment in self.environments]


def _arguments(model: nn.Module, batch: Batch, forward: Forward | None) -> dict[str, Any]:
    """The arguments of the model's forward by name, defaults included, for one batch."""

    class Listener(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            heard.append((args, kwargs))
            raise Abandoned

    heard: list[Any] = []
    try:
        (forward or call)(Listener(), batch)
    except Abandoned:
        args, kwargs = heard[0]
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
