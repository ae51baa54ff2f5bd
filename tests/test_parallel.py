"""Layers and batches side by side: in order, the same for any number of threads, and ended by the first error."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from convsplit.parallel import LEAST_NUMBERS, MOST_WEIGHTS, in_parallel, side_by_side


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


MANY = float(LEAST_NUMBERS)


def test_batches_side_by_side_keep_their_order_and_the_gradient_mode() -> None:
    both = threading.Barrier(2, timeout=20)

    def look(item: int) -> tuple[int, int, bool]:
        both.wait()  # would time out if one waited for the other
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert list(side_by_side(look, iter(range(6)), read=MANY, made=1)) == [(n, 1, False) for n in range(6)]


def test_no_more_batches_are_taken_than_there_are_threads_for() -> None:
    taken: list[int] = []
    numbers = (taken.append(n) or n for n in range(10))
    for done, number in enumerate(side_by_side(lambda n: n, numbers, read=MANY, made=1), 1):
        assert number == done - 1
        assert len(taken) <= done + 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_one_batch_ends_them_all(error: type[BaseException]) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 3:
            raise error("enough")
        done.append(item)

    with pytest.raises(error, match="enough"):
        list(side_by_side(work, range(100), read=MANY, made=1))
    assert len(done) < 8


def test_few_numbers_large_results_and_devices_need_no_pool() -> None:
    def where(item: int) -> threading.Thread:
        return threading.current_thread()

    def threads(items: range, read: float = MANY, made: float = 1, device: str = "cpu") -> set[threading.Thread]:
        return set(side_by_side(where, items, read=read, made=made, device=torch.device(device)))

    main = threading.main_thread()
    assert main not in threads(range(2))
    assert threads(range(2), read=10) == threads(range(2), made=MOST_WEIGHTS) == {main}
    assert threads(range(2), device="meta") == threads(range(1)) == {main}
    assert threads(range(0)) == set()
    torch.set_num_threads(1)
    assert threads(range(2)) == {main}
    torch.set_num_threads(2)
