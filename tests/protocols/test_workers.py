"""Threads for chunks: order, errors, and processes that fork."""

import multiprocessing
import threading
import time

import pytest

from protocols import workers
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


def test_the_caller_and_threads_of_this_process_work_at_the_same_time() -> None:
    met = threading.Barrier(min(workers.CORES, 4))

    def meet(_: int) -> int:
        met.wait(timeout=20)
        return threading.get_ident()

    if met.parties > 1:
        at_work = set(spread(meet, range(met.parties)))
        assert len(at_work) == met.parties
        assert threading.get_ident() in at_work


def test_nothing_runs_on_behind_an_error_and_the_rest_is_not_begun() -> None:
    """All threads are at work when one fails: each ends what it has in hand, and takes nothing more."""
    begun, ended, met = [], [], threading.Barrier(workers.CORES)

    def work(value: int) -> None:
        begun.append(value)
        if value < workers.CORES:
            met.wait(timeout=20)
        if value == 0:
            raise KeyError(value)
        time.sleep(0.05)
        ended.append(value)

    with pytest.raises(KeyError):
        spread(work, range(1000))
    assert sorted(begun) == [0, *sorted(ended)]
    assert len(begun) <= 2 * workers.CORES


def test_work_that_spreads_work_ends() -> None:
    """Every thread of the pool waits for work of its own, which nobody but itself is left to do."""
    depth = 3 * workers.CORES
    found = spread(lambda value: sum(spread(slow_square, [value, value])), range(1, depth))
    assert found == [2 * value * value for value in range(1, depth)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    spread(slow_square, range(4))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(spread, (slow_square, [2, 3])).get(timeout=20) == [4, 9]
