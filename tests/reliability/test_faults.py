"""An exception from any call of torch leaves models, files and settings as documented.

12 places in each of four functions; CONVSPLIT_FAULTS in the environment tries more or fewer.
"""

from __future__ import annotations

import os

import faults
import pytest


@pytest.fixture(scope="module")
def bench() -> faults.Bench:
    return faults.Bench()


@pytest.mark.parametrize("step", faults.STEPS)
def test_faults_leave_everything_as_documented(bench: faults.Bench, step: str) -> None:
    places = faults.positions(bench, step, int(os.environ.get("CONVSPLIT_FAULTS", "12")))
    came = [getattr(bench, step)(faults.Counter(at)) for at in places]
    assert any(came), "no fault came out: the calls that were counted are not those that are made"


def test_faults_reach_other_threads() -> None:
    import threading

    import torch

    counter, raised = faults.Counter(at=3), []

    def work() -> None:
        try:
            torch.ones(1) + torch.ones(1)
        except faults.Fault as fault:
            raised.append(fault)

    with faults.counting(counter):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(raised) == 1
