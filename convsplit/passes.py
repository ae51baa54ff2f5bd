"""The conversion as a pass over fx graphs, for people who build on `torch.fx`."""

from __future__ import annotations

from typing import Any, cast

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from convsplit.api import make_plan
from convsplit.model.copies import deep_copy
from convsplit.model.graphs import attribute, conv_arguments, functional_spec
from convsplit.model.running import Batch
from convsplit.rewrite import apply_plan
from convsplit.spec import Convolution


class SplitConv2d(PassBase):
    """Split the convolutions of a GraphModule: its modules, and each `F.conv2d` (or like) whose weight is a parameter.

    Args:
        example_inputs and keyword arguments: as for `convsplit.convert`, such as `budget`, `rank` or `skip`.

    Called with a GraphModule, returns a `PassResult` with a new one (the one given is not changed) and whether
    anything was split. Nodes keep their names, order and metadata; an `F.conv2d` becomes a `call_module` node.

    Raises:
        TypeError: given something that is no GraphModule.
        ValueError: as `convsplit.convert`.

    >>> import convsplit, torch
    >>> graph_module = fx.symbolic_trace(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
    >>> result = SplitConv2d(rank=2, forms="dw-pw")(graph_module)
    >>> result.modified, type(result.graph_module.get_submodule("0")).__name__
    (True, 'SeparableConv2d')
    """

    def __init__(self, example_inputs: Batch = None, **options: Any) -> None:
        self.example_inputs = example_inputs
        self.options = options

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Refuse what has no graph."""
        if not isinstance(graph_module, fx.GraphModule):
            raise TypeError(
                f"SplitConv2d works on a GraphModule, not on a {type(graph_module).__name__}; trace it with "
                "torch.fx.symbolic_trace, or use convsplit.convert"
            )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass."""
        lifted = cast(fx.GraphModule, deep_copy(graph_module))
        _lift_functional(lifted)
        plan = make_plan(lifted, self.example_inputs, **self.options)
        # Lift again only those that will be split: the others stay the F.conv2d they were.
        lifted = cast(fx.GraphModule, deep_copy(graph_module))
        _lift_functional(lifted, {layer.name for layer in plan.split})
        converted = apply_plan(lifted, plan)
        converted.graph.lint()
        converted.recompile()
        return PassResult(converted, modified=bool(plan.split))


def _lift_functional(graph_module: fx.GraphModule, names: set[str] | None = None) -> None:
    """Make modules of the `F.conv2d` nodes whose weight and bias are parameters; of those `names` only, if given."""
    for node in list(graph_module.graph.nodes):
        conv, arguments, name = _as_module(graph_module, node), conv_arguments(node), f"{node.name}_module"
        if conv is None or arguments is None or (names is not None and name not in names):
            continue
        graph_module.add_submodule(name, conv)
        # Rewritten in place, the node keeps its name and metadata.
        node.op, node.target, node.args, node.kwargs = "call_module", name, (arguments["input"],), {}
        _drop_unread(graph_module, [arguments["weight"], arguments["bias"]])
    graph_module.recompile()


def _as_module(graph_module: fx.GraphModule, node: fx.Node) -> Convolution | None:
    """The convolution that an `F.conv2d` node equals; None for other nodes and where weight or numbers are computed."""
    arguments = conv_arguments(node)
    if arguments is None:
        return None
    weight, bias = (_parameter(graph_module, arguments[key]) for key in ("weight", "bias"))
    if weight is None or (bias is None) != (arguments["bias"] is None):
        return None
    spec = functional_spec(arguments, weight)
    if spec is None:
        return None
    conv = spec.conv()
    conv.weight = weight
    conv.register_parameter("bias", bias)
    return conv.train(graph_module.training)


def _parameter(graph_module: fx.GraphModule, node: Any) -> nn.Parameter | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = attribute(graph_module, str(node.target))
    return value if isinstance(value, nn.Parameter) else None


def _drop_unread(graph_module: fx.GraphModule, nodes: list[Any]) -> None:
    """Erase reads that nobody uses, and parameters that nobody reads: the module that holds them is their home."""
    graph = graph_module.graph
    for node in nodes:
        if not isinstance(node, fx.Node) or node.users:
            continue
        graph.erase_node(node)
        if not graph.find_nodes(op="get_attr", target=node.target):
            owner, _, name = str(node.target).rpartition(".")
            graph_module.get_submodule(owner)._parameters.pop(name, None)
    graph_module.delete_all_unused_submodules()
