"""Layers side by side: in order, the same for any number of threads, and ended by the first error."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from convsplit.parallel import in_parallel


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_results_keep_their_order_whatever_runs_first() -> None:
    numbers = list(range(20))
    assert in_parallel(str, numbers, "Naming", size=float) == list(map(str, numbers))
    assert in_parallel(str, [], "Naming", size=float) == []


def test_each_item_has_its_thread_and_the_gradient_mode() -> None:
    both = threading.Barrier(2, timeout=20)

    def look(item: int) -> tuple[int, bool]:
        both.wait()  # would time out if one waited for the other
        return torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert in_parallel(look, [1, 2], "Looking", size=float) == [(1, False)] * 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_it(error: type[BaseException]) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 99:  # the largest is first
            raise error("enough")
        time.sleep(0.02)
        done.append(item)

    with pytest.raises(error, match="enough"):
        in_parallel(work, range(100), "Working", size=float)
    assert len(done) < 50
    count = len(done)
    time.sleep(0.1)
    assert len(done) == count  # nothing goes on in the background


def test_one_thread_needs_no_pool_and_large_layers_share_no_memory() -> None:
    def where(item: int) -> threading.Thread:
        return threading.current_thread()

    assert threading.main_thread() not in in_parallel(where, [1, 2], "", size=float)
    assert set(in_parallel(where, [1, 10**9], "", size=float)) == {threading.main_thread()}
    torch.set_num_threads(1)
    assert set(in_parallel(where, [1, 2], "", size=float)) == {threading.main_thread()}
    torch.set_num_threads(2)
