"""SplitConv2d: GraphModule in, GraphModule out, in company of other passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from awkward import UsesWeightElsewhere, images, settled
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F

from convsplit.layers.separable import SeparableConv2d
from convsplit.passes import SplitConv2d


class Functional(nn.Module):
    """Three of its five F.conv2d can be rewritten; the others share a kernel or compute one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.module = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3)
        self.kernel, self.strided, self.twice = (nn.Parameter(torch.randn(6, 6, 3, 3)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=[1])
        x = F.conv2d(input=F.relu(x), weight=self.kernel, padding="same")
        x = F.conv2d(x, self.strided, None, (1, 2), (2, 0), 1, 1)
        x = F.conv2d(x, self.twice, padding=1) + F.conv2d(x, 2 * self.twice, padding=1)
        return self.module(x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return settled(Functional())


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_functional_and_module_convolutions_are_split(model: nn.Module) -> None:
    traced, x = fx.symbolic_trace(model), images(2, 4, 12, 14)
    for index, node in enumerate(traced.graph.nodes):
        node.meta["index"] = index
    before, meta = copy.deepcopy(traced.state_dict()), {node.name: node.meta for node in traced.graph.nodes}
    result = SplitConv2d(exact=True)(traced)
    graph_module = result.graph_module
    assert result.modified
    assert isinstance(graph_module, fx.GraphModule)
    graph_module.graph.lint()
    assert "self.conv2d_module(" in graph_module.code
    assert sum(isinstance(m, SeparableConv2d) for m in graph_module.modules()) == 4
    assert all(node.meta["index"] == meta[node.name]["index"] for node in graph_module.graph.nodes)
    assert relative(graph_module(x), model(x)) < 1e-9
    assert not {"kernel", "strided", "conv.weight"} & dict(graph_module.named_parameters()).keys()
    assert traced.state_dict().keys() == before.keys()
    assert relative(traced(x), model(x)) == 0


def test_budget_and_shapes(model: nn.Module) -> None:
    import convsplit

    x = images(2, 4, 12, 14)
    result = SplitConv2d(x, budget=convsplit.Budget(macs=0.9))(fx.symbolic_trace(model))
    assert result.graph_module(x).shape == model(x).shape


class RemoveNothing(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return PassResult(graph_module, False)


def test_composes_in_a_pass_manager_and_comes_to_rest(model: nn.Module) -> None:
    x = images(2, 4, 12, 14)
    manager = PassManager(
        [RemoveNothing(), SplitConv2d(exact=True), RemoveNothing()], run_checks_after_each_pass=True
    )
    result = manager(fx.symbolic_trace(model))
    assert result.modified
    assert relative(result.graph_module(x), model(x)) < 1e-9
    again = manager(result.graph_module)
    assert not again.modified


def test_exported_graph(model: nn.Module) -> None:
    x = images(2, 4, 12, 14)
    exported = torch.export.export(model, (x,)).module()
    result = SplitConv2d(exact=True)(exported)
    assert sum(isinstance(m, SeparableConv2d) for m in result.graph_module.modules()) == 4
    assert relative(result.graph_module(x), model(x)) < 1e-9


@pytest.mark.filterwarnings("ignore::convsplit.ConversionWarning")
def test_nothing_to_split_is_not_modified() -> None:
    result = SplitConv2d(exact=True)(fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(3, 3))))
    assert not result.modified


@pytest.mark.parametrize("wrong", [nn.Conv2d(4, 4, 3), UsesWeightElsewhere()])
def test_other_modules_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="GraphModule"):
        SplitConv2d()(wrong)
