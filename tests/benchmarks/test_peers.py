"""The suite of peers: what a way cannot do is said in its row, and answers are measured against the dense network's."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("sklearn")

from benchmarks.clock import at_most  # noqa: E402
from benchmarks.subjects import Subject, answers  # noqa: E402
from benchmarks.suites import peers  # noqa: E402
from convsplit import Budget  # noqa: E402


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(8, 4)).eval()
    images = torch.randn(20, 3, 8, 8)
    return Subject("small", model, images, images, answers(model, images).argmax(1))


def row(subject: Subject, name: str, way: peers.Way, limit: float = 60.0) -> dict[str, str]:
    task = peers.Task(subject, [subject.unlabelled], Budget(macs=0.5))
    found = peers.candidate(name, way, task, peers.Meter(subject), limit)
    return dict(zip(peers.HEADINGS, peers._row("macs=0.5", found, task, [(None, None)] * 2), strict=True))


def test_what_a_package_cannot_do_is_said_in_its_row(subject: Subject) -> None:
    def broken(task: peers.Task) -> nn.Module:
        raise ValueError("no 7 | 1 kernels\nbut others")

    cells = row(subject, "package", broken)
    assert cells["cannot"] == "ValueError: no 7 / 1 kernels"
    assert cells["accuracy"] == cells["MACs kept"] == cells["recalibrated: drift"] == "-"
    with pytest.raises(ValueError, match="kernels"):
        row(subject, "convsplit", broken)


def test_a_package_that_is_not_installed_has_a_row(subject: Subject) -> None:
    def absent(task: peers.Task) -> nn.Module:
        import convsplit_has_no_such_peer  # noqa: F401

        return task.subject.model

    assert row(subject, "package", absent)["cannot"].startswith("ModuleNotFoundError")


def test_what_takes_too_long_is_stopped_and_nothing_else(subject: Subject) -> None:
    def endless(task: peers.Task) -> nn.Module:
        while True:
            torch.ones(10).sum()

    assert row(subject, "package", endless, limit=0.05)["cannot"].startswith("TimeoutError: more than 0.05 s")
    with at_most(0.05):
        pass
    until = time.process_time() + 0.2
    while time.process_time() < until:  # the alarm was taken back
        pass


def test_the_dense_network_has_not_moved_and_a_changed_head_moves_no_features(subject: Subject) -> None:
    cells = row(subject, "package", lambda task: task.subject.model)
    assert cells["drift"] == cells["drift of features"] == "0.000"
    assert cells["MACs kept"] == cells["parameters kept"] == cells["bytes kept"] == "100.0 %"
    other = peers.copy.deepcopy(subject.model)
    with torch.no_grad():
        other[-1].weight.mul_(2)
    cells = row(subject, "package", lambda task: other)
    assert float(cells["drift"]) > 0.1
    assert cells["drift of features"] == "0.000"


def test_features_of_another_width_are_not_compared(subject: Subject) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)))

    cells = row(subject, "package", lambda task: Narrow().eval())
    assert cells["drift of features"] == "-"
    assert float(cells["drift"]) > 0


def test_without_labels_there_is_no_accuracy(subject: Subject) -> None:
    unlabelled = Subject("small", subject.model, subject.unlabelled, subject.images, subject.labels, labelled=False)
    cells = row(unlabelled, "package", lambda task: task.subject.model)
    assert cells["accuracy"] == cells["points lost"] == cells["recalibrated: points lost"] == "-"
    assert cells["agreement"] == "100.0 %"
