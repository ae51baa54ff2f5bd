"""What graphs say of modules: which of them run, in how many places, and what follows them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx, nn

from convsplit.model.graphs import Trace


@dataclass
class Usage:
    """The nodes that call each module, by its name in the model, in the parts of it that trace."""

    parts: tuple[str, ...]
    nodes: dict[str, list[fx.Node]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, trace: Trace) -> Usage:
        usage = cls(tuple(f"{part}." if part else "" for part in trace.graphs))
        for part, graph in trace.graphs.items():
            for node in graph.find_nodes(op="call_module"):
                usage.nodes[f"{part}.{node.target}" if part else str(node.target)].append(node)
        return usage

    def count(self, names: Iterable[str]) -> int | None:
        """In how many places a module of these names is called; None where no graph shows it."""
        names = list(names)
        if not any(name.startswith(part) for name in names for part in self.parts):
            return None
        return sum(len(self.nodes.get(name, ())) for name in names)

    def followed_by(self, names: Iterable[str], modules: dict[str, nn.Module]) -> str:
        """What uses the output of a module that is called in one place, in the order of the graph."""
        nodes = [node for name in names for node in self.nodes.get(name, ())]
        if len(nodes) != 1:
            return ""
        return ", ".join(self._kind(user, modules) for user in nodes[0].users if user.op != "output")

    def _kind(self, node: fx.Node, modules: dict[str, nn.Module]) -> str:
        if node.op == "call_module":
            owner = next(name for name, nodes in self.nodes.items() if node in nodes)
            return type(modules[owner]).__name__
        return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))
