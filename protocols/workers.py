"""Threads for the numeric work on chunks: ciphers, digests and numpy let go of the interpreter while they run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="secgeo-sum")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool, but none of its threads


def spread(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Apply a pure function to every item, on all cores; results come in order, and the first exception is raised."""
    return list(_pool().map(function, items))
