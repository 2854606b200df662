"""File descriptors kept back, so that the aggregator can open its files while strangers hold all others.

A stranger needs no key to hold a connection for `handshake_seconds`, and libzmq has no limit for their number.
"""

from __future__ import annotations

import os
from contextlib import suppress
from types import TracebackType

KEPT_BACK = 64
FREED_AT_ONCE = 8
"""No file takes more than two, but libzmq may be quicker than we with some of those that are given free."""


class Reserve:
    """Frees a few descriptors while it is entered, and takes as many again as it can get: enter it to open files, not to use them."""

    def __init__(self) -> None:
        self._source = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._kept: list[int] = []
        self.refill()

    def __enter__(self) -> None:
        for _ in range(min(FREED_AT_ONCE, len(self._kept))):
            os.close(self._kept.pop())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refill()

    def close(self) -> None:
        """Give all back."""
        for descriptor in (*self._kept, self._source):
            os.close(descriptor)
        self._kept.clear()

    def refill(self) -> None:
        """Take back what is missing, as far as descriptors are free."""
        with suppress(OSError):  # the next ones to become free are ours
            while len(self._kept) < KEPT_BACK:
                self._kept.append(os.dup(self._source))
