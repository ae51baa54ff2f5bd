"""Conversions leave no memory, no threads and no files behind. 30 of them; CONVSPLIT_SOAK makes more or fewer."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import soak

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def test_conversions_leave_nothing_behind() -> None:
    soak.check(*soak.soak(int(os.environ.get("CONVSPLIT_SOAK", "30"))))


def test_what_is_left_is_seen() -> None:
    before, done, held = soak.Held.now(), threading.Event(), [[] for _ in range(200_000)]
    assert soak.Held.now().objects >= before.objects + len(held)
    thread = threading.Thread(target=done.wait)
    thread.start()
    with pytest.raises(AssertionError, match="1 threads"):
        soak.check(before, soak.Held.now())
    done.set()
    thread.join()
    if Path("/proc/self/fd").exists():
        with Path(__file__).open(), pytest.raises(AssertionError, match="1 open files"):
            soak.check(before, soak.Held.now())
