"""A part of an audit in a process of its own, since the others keep one thread busy and most machines have two cores.

What it collects is the same as here: it is given the target, draws its own noise, and sends back evidence or the error that it met.
Progress comes with it; nobody has to wait for that. A process that ends early, as when memory runs out, is a part that could not be done.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, TypeVar

from audit.target import Target
from audit.threads import one_thread
from keys.errors import ConfigError, LocalProtocolError, SecGeoError, VerificationFailed

T = TypeVar("T")
Doing = Callable[[str, float], None]


def _end_with(parent: BaseProcess | None) -> None:
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(pipe: Connection, collect: Callable[..., object], target: Target, profile: str) -> None:
    # Whoever ends the audit ends this too, and nothing waits for progress to be told.
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    outcome: object
    try:
        with one_thread():
            outcome = collect(target, profile=profile, progress=lambda doing, done: pipe.send((doing, done)))
    except (ConfigError, VerificationFailed, LocalProtocolError) as error:
        outcome = error
    except Exception as error:
        traceback.print_exc()
        outcome = LocalProtocolError(f"{type(error).__name__}: {error}")  # others may not survive the pipe
    pipe.send(outcome)


class Beside(Generic[T]):
    """Starts to collect at once; it ends with the `with` block, done or not.

    Args:
        collect: a part's, by keywords `profile` and `progress`.
        target: what it is of.
        profile: as everywhere.
    """

    def __init__(self, collect: Callable[..., T], target: Target, profile: str) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(theirs, collect, target, profile), daemon=True)
        self._process.start()
        theirs.close()
        self._outcome: Any = None

    def __enter__(self) -> Beside[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def follow(self, doing: Doing) -> None:
        """Tell of what was done since, without waiting."""
        while self._outcome is None and self._pipe.poll():
            self._receive(doing)

    def outcome(self, doing: Doing) -> T:
        """Wait for the evidence.

        Raises:
            SecGeoError: what the part raised, or its process ended before it was done.
        """
        while self._outcome is None:
            self._receive(doing)
        if isinstance(self._outcome, SecGeoError):
            raise self._outcome
        evidence: T = self._outcome
        return evidence

    def _receive(self, doing: Doing) -> None:
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(1.0)
            message = LocalProtocolError(
                f"its process ended with code {self._process.exitcode} before it was done; see that memory is left"
            )
        if isinstance(message, tuple):
            doing(*message)
        else:
            self._outcome = message
