"""Operations counted as torch counts them, without what torch would import for that."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convsplit.model import operations
from convsplit.model.operations import flops_of


class Branch(nn.Module):
    """One of two convolutions, by an operator that takes functions."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = (lambda x: self.wide(x)), (lambda x: self.narrow(x))
        return torch.cond(x.sum() > 0, wide, narrow, (x,))


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


MODELS = {
    "convolutions": nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2)),
    "attention": nn.Sequential(nn.Linear(8, 16), Attention()),
    "recurrent": nn.Sequential(nn.Flatten(2), nn.GRU(64, 5)),
    "an operator of functions": Branch(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_counts_what_torch_counts(name: str, imported: bool, mode: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MODELS[name].eval(), torch.ones(2, 3, 8, 8)
    with mode(), FlopCounterMode(display=False) as counter:
        model(x)
    if not imported:
        answers = iter([False])  # at first; whoever fails then has imported it meanwhile
        monkeypatch.setattr(operations, "_compiler_is_here", lambda: next(answers, True))
    with mode():
        assert flops_of(lambda: model(x)) == counter.get_total_flops() > 0


def test_an_error_of_the_model_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_compiler_is_here", lambda: False)
    with pytest.raises(RuntimeError, match="shapes"):
        flops_of(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


@pytest.mark.slow
def test_no_compiler_is_imported() -> None:
    """A conversion with data: importing the compiler, or sympy, takes longer than converting a small model."""
    code = """
import sys, torch, convsplit
model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
before = set(sys.modules)
convsplit.merge(convsplit.convert(model, torch.ones(1, 8, 9, 9), calibration=torch.randn(8, 8, 9, 9)))
print([name for name in ("torch._dynamo", "sympy", "torch._refs") if name in sys.modules and name not in before])
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "[]"
