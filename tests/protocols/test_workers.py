"""Threads for chunks: order, errors, and processes that fork."""

import multiprocessing
import threading
import time

import pytest

from protocols.workers import spread


def slow_square(value: int) -> int:
    time.sleep(0.02 if value == 0 else 0.0)
    return value * value


def test_results_come_in_order() -> None:
    assert spread(slow_square, range(20)) == [value * value for value in range(20)]


def test_the_first_error_is_raised_and_the_next_call_works() -> None:
    with pytest.raises(ZeroDivisionError):
        spread(lambda value: 1 // value, [1, 0, 2])
    assert spread(slow_square, []) == []
    assert spread(slow_square, [3]) == [9]


def test_work_is_done_in_threads_of_this_process() -> None:
    assert threading.get_ident() not in spread(lambda _: threading.get_ident(), range(4))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    spread(slow_square, range(4))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(spread, (slow_square, [2, 3])).get(timeout=20) == [4, 9]
