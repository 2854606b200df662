"""Sandboxes: the same results as in the process itself, and a crash, a hang or a flood in one costs one call and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from keys.errors import ConfigError
from protocols import bfv
from protocols import ciphertexts as c
from protocols.packing import DEGREE, PARAMETERS, choose
from protocols.prg import MaskSet
from protocols.rings import CiphertextRing
from secgeo import sandbox as module
from secgeo.sandbox import MAX_CIPHERTEXTS, Sandbox, Sandboxes, SandboxLost, SandboxUnavailable

PARAMETERS_HERE = PARAMETERS[0]


@pytest.fixture(scope="module")
def key() -> bytes:
    return bfv.generate_key(PARAMETERS_HERE)


@pytest.fixture(scope="module")
def with_key(key: bytes) -> Iterator[Sandbox]:
    with Sandbox(PARAMETERS_HERE, key) as sandbox:
        yield sandbox


@pytest.fixture
def aggregator() -> Iterator[Sandbox]:
    """One without the key, as the aggregator has it."""
    with Sandbox(PARAMETERS_HERE, seconds=20.0) as sandbox:
        yield sandbox


def plain(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 46, (count, DEGREE), dtype=np.uint64)


def pid(sandbox: Sandbox) -> int:
    assert sandbox._process is not None
    assert sandbox._process.pid is not None
    return sandbox._process.pid


def test_everything_goes_as_in_the_process_itself(with_key: Sandbox, key: bytes) -> None:
    packed, more = plain(3), plain(3, 1)
    data = with_key.encrypt(packed)
    words = with_key.expand(data).copy()
    assert np.array_equal(words, bfv.Expander(PARAMETERS_HERE).expand(data))
    assert np.array_equal(with_key.decrypt(words), packed)
    added = with_key.add_plain(words, more).copy()
    assert np.array_equal(bfv.Decryptor(PARAMETERS_HERE, key).decrypt(added), packed + more & np.uint64((1 << 46) - 1))
    assert with_key.encrypt(plain(0)) == b""


def test_a_sum_of_sixteen_members_by_sandboxes(with_key: Sandbox, aggregator: Sandbox) -> None:
    packing = choose(16, 16)
    vectors = np.random.default_rng(2).integers(0, 1 << 16, (16, 20_000), dtype=np.uint32)
    total = np.zeros((3, 2, DEGREE), np.uint64)
    for vector in vectors:
        c.add(total, aggregator.expand(with_key.encrypt(packing.pack(vector))), PARAMETERS_HERE)
    assert np.array_equal(packing.unpack(with_key.decrypt(total), 20_000), vectors.sum(axis=0))


# --- what goes wrong inside


def dying(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, data: bytes, number: int = signal.SIGKILL) -> list[int]:
    """Every process of this sandbox ends when it is asked with `data`; gives a list that fills with those that did."""
    genuine, ended = module.Sandbox._ask, []

    def ask(self: Sandbox, pipe: object, task: object, count: int, octets: list[np.ndarray], size: int) -> np.ndarray:
        if self is sandbox and octets[0].tobytes() == data:
            ended.append(pid(self))
            os.kill(pid(self), number)
        return genuine(self, pipe, task, count, octets, size)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Sandbox, "_ask", ask)
    return ended


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_bytes_over_which_a_new_process_ends_too_cost_their_call(
    with_key: Sandbox, aggregator: Sandbox, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    data, honest = with_key.encrypt(plain(1)), with_key.encrypt(plain(1, 1))
    before = aggregator.expand(honest).copy()
    ended = dying(aggregator, monkeypatch, data, number)
    with pytest.raises(SandboxLost, match="ended"):
        aggregator.expand(data)
    assert len(set(ended)) == 2
    assert np.array_equal(aggregator.expand(honest), before)


def test_a_process_that_has_ended_before_costs_nobody_anything(with_key: Sandbox, aggregator: Sandbox) -> None:
    """The system has killed it between two calls, or what a call before did to it shows now only."""
    data = with_key.encrypt(plain(1))
    before = aggregator.expand(data).copy()
    for number in (signal.SIGSEGV, signal.SIGKILL):
        os.kill(pid(aggregator), number)
        assert np.array_equal(aggregator.expand(data), before)


def test_a_crash_in_the_middle_of_a_call_is_made_good_by_a_new_process(with_key: Sandbox, aggregator: Sandbox) -> None:
    data = with_key.encrypt(plain(60))
    before = aggregator.expand(data).copy()
    victim = pid(aggregator)
    os.kill(victim, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (victim, signal.SIGSEGV)).start()
    threading.Timer(0.4, os.kill, (victim, signal.SIGCONT)).start()
    assert np.array_equal(aggregator.expand(data), before)
    assert pid(aggregator) != victim


def start_and_hang(pipe: Connection, *_: object) -> None:
    """A process that takes calls and answers none."""
    pipe.recv_bytes()
    pipe.send_bytes(b"\0")
    time.sleep(60.0)


def test_a_hang_ends_at_the_limit(with_key: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_key.encrypt(plain(1))
    with Sandbox(PARAMETERS_HERE, seconds=0.5) as sandbox:
        sandbox.expand(data)
        hung = pid(sandbox)
        os.kill(hung, signal.SIGSTOP)
        assert len(sandbox.expand(data)) == 1
        assert not Path(f"/proc/{hung}").exists()
        monkeypatch.setattr(module, "_serve", start_and_hang)
        os.kill(pid(sandbox), signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(SandboxLost, match=r"no answer within 0\.5 s"):
            sandbox.expand(data)
        assert 1.0 <= time.monotonic() - started < 15.0  # two limits, and the start of a process on a busy machine
        monkeypatch.undo()
        assert len(sandbox.expand(data)) == 1


def test_a_flood_of_memory_ends_at_the_limit(with_key: Sandbox) -> None:
    data = with_key.encrypt(plain(MAX_CIPHERTEXTS))
    with Sandbox(PARAMETERS_HERE, memory_bytes=1 << 20) as sandbox, pytest.raises(SandboxLost):
        sandbox.expand(data)
    with Sandbox(PARAMETERS_HERE, memory_bytes=1 << 26) as sandbox:
        assert len(sandbox.expand(data)) == MAX_CIPHERTEXTS


def test_a_crash_leaves_no_file_of_what_was_in_memory(with_key: Sandbox) -> None:
    with_key.encrypt(plain(1))
    limits = Path(f"/proc/{pid(with_key)}/limits").read_text().splitlines()
    assert next(line for line in limits if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]


def test_what_was_decrypted_outlives_the_next_call(with_key: Sandbox) -> None:
    """The words lie in memory that the next call writes to."""
    first, second = plain(1), plain(1, 1)
    words = [with_key.expand(with_key.encrypt(packed)).copy() for packed in (first, second)]
    opened = [with_key.decrypt(one) for one in words]
    assert np.array_equal(opened[0], first)
    assert np.array_equal(opened[1], second)


class Liar:
    """A taken process at the other end of the pipe."""

    def __init__(self, reply: bytes) -> None:
        self.reply = reply

    def send_bytes(self, data: bytes) -> None:
        pass

    def poll(self, seconds: float) -> bool:
        return True

    def recv_bytes(self, size: int) -> bytes:
        if len(self.reply) > size:
            raise OSError("message too long")
        return self.reply

    def close(self) -> None:
        pass


@pytest.mark.parametrize("reply", [b"", b"\0", bytes(100), b"\0\xff\xff\xff\xff", b"\0\0\0\0\0", b"\7\0\0\0\1"])
def test_an_answer_that_is_none_is_an_error_here(
    aggregator: Sandbox, reply: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Sandbox, "_start", lambda _: Liar(reply))
    with pytest.raises(SandboxLost):
        aggregator.expand(bytes(c.upload_bytes(PARAMETERS_HERE, 1)))


# --- pools


def test_an_upload_over_which_processes_are_lost_leaves_no_trace_in_the_total(
    key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process ends over its ninth chunk, when the first ones were added; then all are killed, and an honest upload is added."""
    sandboxes, packing = Sandboxes(), choose(16, 16)
    values = np.arange(10 * packing.block_values, dtype=np.uint32) % 65_536
    try:
        nodes = CiphertextRing(packing, packing.block_values, sandboxes.cipher(packing.parameters, key))
        pool = sandboxes.cipher(packing.parameters, b"")
        aggregator = CiphertextRing(packing, packing.block_values, pool)
        total = aggregator.zeros(values.size)
        starts = range(0, values.size, packing.block_values)
        chunks = [
            (start, nodes.seal(values[start : start + packing.block_values].copy(), MaskSet([], []), start))
            for start in starts
        ]
        aggregator.add(total, lambda: chunks)
        before, reads = total.copy(), []

        def read() -> Iterator[tuple[int, bytes | memoryview]]:
            reads.append(1)
            yield from chunks

        for sandbox in pool._sandboxes:
            dying(sandbox, monkeypatch, bytes(chunks[8][1]))
        with pytest.raises(SandboxLost):
            aggregator.add(total, read)
        assert len(reads) == 2
        assert np.array_equal(total, before)
        monkeypatch.undo()
        for sandbox in pool._sandboxes:
            if sandbox._process is not None:
                os.kill(pid(sandbox), signal.SIGKILL)
        aggregator.add(total, lambda: chunks)
        assert np.array_equal(nodes.open(total, values.size), 2 * values)
    finally:
        sandboxes.close()


def test_chunks_that_are_added_at_the_same_time_come_out_of_their_own_process(key: bytes) -> None:
    """A process gives words in memory that its next call writes to: they are added before it is free for one."""
    sandboxes = Sandboxes()
    pool = sandboxes.cipher(PARAMETERS_HERE, key)
    try:
        packed = [plain(4, seed) for seed in range(12)]
        data = [pool.encrypt(one) for one in packed]
        totals = [np.zeros((4, 2, DEGREE), dtype=np.uint64) for _ in data]
        for _ in range(3):
            with ThreadPoolExecutor(6) as threads:
                list(threads.map(pool.add, totals, data))
        for one, total in zip(packed, totals, strict=True):
            assert np.array_equal(pool.decrypt(total), 3 * one & np.uint64((1 << 46) - 1))
    finally:
        sandboxes.close()


def test_the_last_sandbox_used_is_the_next_so_that_no_more_are_started_than_are_needed(key: bytes) -> None:
    sandboxes = Sandboxes()
    pool = sandboxes.cipher(PARAMETERS_HERE, key)
    try:
        data = pool.encrypt(plain(1))
        total = np.zeros((1, 2, DEGREE), dtype=np.uint64)
        pool.add(total, data)
        pool.add_plain(total, plain(1, 1))
        pool.subtract(total, data)
        assert np.array_equal(pool.decrypt(total), plain(1, 1))
        assert [sandbox._process is not None for sandbox in pool._sandboxes].count(True) == 1
    finally:
        sandboxes.close()
    assert repr(pool) == "Pool(<redacted>)"


# --- hostile bytes


def test_ten_thousand_mutations_and_nothing_lost(with_key: Sandbox, aggregator: Sandbox) -> None:
    """Every one gives words below q or is refused, by one process that outlives them all; then an honest sum is still exact."""
    generator = random.Random(11)  # noqa: S311
    packed = plain(1)
    honest = with_key.encrypt(packed)
    total = aggregator.expand(honest).copy()
    first, refused = pid(aggregator), 0
    for turn in range(10_000):
        mutated = bytearray(honest)
        match turn % 4:
            case 0:
                for _ in range(generator.randint(1, 16)):
                    mutated[generator.randrange(len(mutated))] = generator.randrange(256)
            case 1:
                del mutated[generator.randrange(len(mutated)) :]
            case 2:
                mutated += generator.randbytes(generator.randrange(1, 200))
            case 3:
                place = generator.randrange(len(mutated) - 64)
                mutated[place : place + 64] = generator.randbytes(64)
        try:
            words = aggregator.expand(bytes(mutated))
        except c.FrameBroken:
            refused += 1
        else:
            assert not words.size or int(words.max()) < PARAMETERS_HERE.prime
    assert 4000 < refused < 9000
    assert pid(aggregator) == first
    c.add(total, aggregator.expand(honest), PARAMETERS_HERE)
    assert np.array_equal(with_key.decrypt(total), packed * np.uint64(2) & np.uint64((1 << 46) - 1))


def test_more_than_fits_is_refused_here(aggregator: Sandbox) -> None:
    with pytest.raises(c.FrameBroken, match="the most is"):
        aggregator.expand(bytes(c.upload_bytes(PARAMETERS_HERE, MAX_CIPHERTEXTS + 1)))


# --- keys


def test_the_key_is_in_no_argument_variable_or_text(with_key: Sandbox, key: bytes) -> None:
    with_key.encrypt(plain(1))
    for name in ("cmdline", "environ"):
        content = Path(f"/proc/{pid(with_key)}/{name}").read_bytes()
        assert key[:64] not in content
        assert key[:32].hex().encode() not in content
    assert repr(with_key) == "Sandbox(<redacted>)"


def test_one_without_a_key_neither_encrypts_nor_decrypts(with_key: Sandbox, aggregator: Sandbox) -> None:
    words = with_key.expand(with_key.encrypt(plain(1))).copy()
    for call in (lambda: aggregator.decrypt(words), lambda: aggregator.encrypt(plain(1))):
        with pytest.raises(SandboxLost):
            call()


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_serve", sys.exit)
    with Sandbox(PARAMETERS_HERE) as sandbox, pytest.raises(SandboxUnavailable, match="could not be started"):
        sandbox.expand(b"")
    with contextlib.closing(Sandboxes()) as sandboxes:
        sandboxes.cipher(PARAMETERS_HERE, b"")
        with pytest.raises(ConfigError, match="could not be started"):
            sandboxes.start()


def test_nothing_is_left_behind() -> None:
    program = (
        "from secgeo.sandbox import Sandbox\n"
        "from protocols.packing import PARAMETERS\n"
        "if __name__ == '__main__':\n"
        "    with Sandbox(PARAMETERS[0]) as sandbox:\n"
        "        print(len(sandbox.expand(b'')), sandbox._space.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, name = done.stdout.split()
    assert (count, done.stderr) == ("0", "")
    assert not Path("/dev/shm", name.lstrip("/")).exists()  # noqa: S108
