"""Threads for the numeric work on chunks: ciphers, digests and numpy let go of the interpreter while they run.

The caller works along. It is on a processor already, so that each helper wakes up on another one; a caller that slept would leave two of
them on its own until the kernel balances the load, which takes as long as the work.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CORES = os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CORES, thread_name_prefix="secgeo-sum")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool, but none of its threads


def spread(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a pure function to every item, on all cores; results come in order, and an exception ends the work and is raised."""
    queue = deque(enumerate(items))
    results: dict[int, Result] = {}

    def work() -> None:
        while queue:
            try:
                index, item = queue.popleft()
            except IndexError:  # Another thread has taken the last one.
                return
            try:
                results[index] = function(item)
            except BaseException:
                queue.clear()
                raise

    helpers = [_pool().submit(work) for _ in range(min(CORES, len(queue)) - 1)]
    try:
        work()
    finally:
        started = [helper for helper in helpers if not helper.cancel()]
        faults = [helper.exception() for helper in started]  # Waits: nothing runs on behind an exception of ours.
    for fault in faults:
        if fault is not None:
            raise fault
    return [results[index] for index in sorted(results)]
