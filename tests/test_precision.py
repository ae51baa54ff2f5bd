"""Precision: what users allow their models' products does not reach factorisations, and is there afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import convsplit
from convsplit.lowrank import cp
from convsplit.precision import full_products

BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def by_single_backends() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


SETTINGS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "single backends": by_single_backends,
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def setting(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    before = precisions()
    yield request.param
    torch.set_float32_matmul_precision("highest")
    for backend, own in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = own


def precisions() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


def test_products_are_full_inside_and_the_users_own_afterwards(setting: Callable[[], None]) -> None:
    setting()
    before = precisions()
    with full_products():
        assert set(precisions()) <= {"ieee", "none"}
    assert precisions() == before
    with pytest.raises(ValueError, match="rank of at least 1"):
        full_products()(cp)(torch.ones(1, 4, 4, 9), 0)
    assert precisions() == before


def test_factors_are_fitted_with_full_products(setting: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    for module in ("convsplit.forms.cp_each", "convsplit.forms.cp_curves", "convsplit.forms.slice_svd"):
        monkeypatch.setattr(module, watched(module, seen))
    monkeypatch.setattr("convsplit.repair.solve.cp", watched("convsplit.repair.solve.cp", seen))
    setting()
    before = precisions()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    convsplit.convert(model, calibration=torch.randn(16, 16, 9, 9), budget=convsplit.Budget(params=0.5))
    assert len(seen) > 5
    assert all(set(each) <= {"ieee", "none"} for each in seen)
    assert precisions() == before


def watched(name: str, seen: list[list[str]]) -> Callable[..., object]:
    module, _, function = name.rpartition(".")
    plain = getattr(__import__(module, fromlist=[function]), function)

    def watch(*args: object, **kwargs: object) -> object:
        seen.append(precisions())
        return plain(*args, **kwargs)

    return watch
