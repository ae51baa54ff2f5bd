"""Reports on models whose later layers run on what earlier ones propose, and that answer with boxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import convsplit
from convsplit import Budget


class Proposing(nn.Module):
    """Looks closer at as many places as its own features make it; `most` of them at most."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 32, 3, padding=1)
        self.box = nn.Linear(32, 4)
        self.proposals: list[int] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.features(x)
        count = 1 + int(y.abs().sum() * 1e4) % 7
        self.proposals.append(count)
        crops = y[:1, :, :8, :8].expand(count, -1, -1, -1)
        return {"boxes": self.box(self.head(crops).mean((2, 3))), "scores": y.mean((1, 2, 3))}


@pytest.mark.parametrize("seed", range(3))
def test_other_proposals_are_no_savings(seed: int) -> None:
    torch.manual_seed(seed)
    model = Proposing().eval()
    converted = convsplit.convert(model, forms="dw-pw", rank=1)
    x = torch.randn(1, 3, 16, 16)
    report = convsplit.compare(converted, model, x)
    dense, split = report.conv_macs
    assert 0 < split < dense
    assert report.macs[0] - report.macs[1] == dense - split
    with torch.no_grad():
        differ = len(model(x)["boxes"]) != len(converted(x)["boxes"])
    assert any("on the original's" in note for note in report.notes) == differ


def test_seeds_make_proposals_differ() -> None:
    """What the test above rests on."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = Proposing().eval()
        converted = convsplit.convert(model, forms="dw-pw", rank=1)
        x = torch.randn(1, 3, 16, 16)
        with torch.no_grad():
            found.append(len(model(x)["boxes"]) != len(converted(x)["boxes"]))
    assert any(found)


class Boxes(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        self.body, self.box, self.named = nn.Conv2d(3, 32, 3), nn.Linear(32, 4), named

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        boxes = self.box(self.body(x).mean((2, 3))) + torch.tensor([0.0, 0.0, 9.0, 30.0])
        return {"boxes": boxes} if self.named else boxes


@pytest.mark.parametrize("named", [True, False])
def test_box_coordinates_are_no_classes(named: bool) -> None:
    torch.manual_seed(0)
    model = Boxes(named).eval()
    converted = convsplit.convert(model, forms="dw-pw", rank=1)
    report = convsplit.compare(converted, model, torch.randn(8, 3, 12, 12))
    assert report.agreement is None
    assert "top-1 class for" not in str(report.verdict)


# Cost of a first pointwise stage, which runs at the input's size

CONVOLUTIONS = [
    (nn.Conv2d, 16, {"stride": 16}), (nn.Conv2d, 8, {"stride": 8}), (nn.Conv2d, 7, {"stride": 4, "padding": 3}),
    (nn.Conv2d, 4, {"stride": 2, "padding": 1}), (nn.Conv2d, 3, {"stride": 2, "padding": 1}),
    (nn.Conv2d, 3, {"padding": 1}), (nn.Conv2d, 5, {"stride": (1, 4), "padding": 2}),
    (nn.ConvTranspose2d, 4, {"stride": 2, "padding": 1}), (nn.ConvTranspose2d, 8, {"stride": 4, "padding": 2}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:no convolution of")
@pytest.mark.parametrize(("kind", "size", "geometry"), CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("with_inputs", [False, True])
def test_no_conversion_costs_more_where_it_runs(
    kind: type[nn.Module], size: int, geometry: dict[str, int], with_inputs: bool
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(kind(8, 8, size, **geometry)), torch.randn(1, 8, 32, 32)
    known = convsplit.study(model, x if with_inputs else None)
    for fraction in (0.9, 0.3):
        converted = known.convert(Budget(params=fraction))
        before, after = convsplit.compare(converted, model, x).macs
        assert after <= before
