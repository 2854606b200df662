"""A part of an audit in a process of its own: its evidence, its progress and its errors come back, and it never outlives the audit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from audit.beside import Beside
from audit.target import Target
from keys.errors import ConfigError, LocalProtocolError
from tests.audit.targets import target


def found(target: Target, *, profile: str, progress: Callable[[str, float], None]) -> list[object]:
    """A part that says what it was given."""
    progress("looking", 0.5)
    trainer = target.trainer()
    trainer.step()
    return [os.getpid(), profile, torch.get_num_threads(), len(target.records), trainer.steps_taken]


def refuses(target: Target, *, profile: str, progress: Callable[[str, float], None]) -> object:
    raise ConfigError("too few records")


def dies(target: Target, *, profile: str, progress: Callable[[str, float], None]) -> object:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def waits(target: Target, *, profile: str, progress: Callable[[str, float], None]) -> object:
    progress("waiting", 0.1)
    time.sleep(600)
    return None


def test_evidence_and_progress_come_from_another_process() -> None:
    told = list[tuple[str, float]]()
    with Beside(found, target(), "fast") as beside:
        process, *rest = beside.outcome(lambda *news: told.append(news))
        assert beside.outcome(lambda *_: None)[0] == process
    assert process != os.getpid()
    assert rest == ["fast", 1, len(target().records), 1]
    assert told == [("looking", 0.5)]


def test_its_error_is_raised_here() -> None:
    with Beside(refuses, target(), "fast") as beside, pytest.raises(ConfigError, match="too few records"):
        beside.outcome(lambda *_: None)


def test_a_process_that_ends_early_is_a_part_that_could_not_be_done() -> None:
    with Beside(dies, target(), "fast") as beside, pytest.raises(LocalProtocolError, match="ended with code -9"):
        beside.outcome(lambda *_: None)


def test_it_is_followed_without_waiting_and_ends_with_the_audit() -> None:
    told = list[str]()
    with Beside(waits, target(), "fast") as beside:
        while not told:
            beside.follow(lambda doing, _: told.append(doing))
            time.sleep(0.05)
        process = beside._process
    assert told == ["waiting"]
    assert not process.is_alive()


def test_it_does_not_outlive_an_audit_that_is_killed() -> None:
    program = """
import os, signal
from audit.beside import Beside
from tests.audit.targets import target
from tests.audit.test_beside import waits
beside, told = Beside(waits, target(), "fast"), []
while not told:
    beside.follow(lambda *news: told.append(news))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=300
    )  # until nobody holds its output
    assert done.returncode == -signal.SIGKILL, done.stderr
