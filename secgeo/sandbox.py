"""BFV in processes of its own: TenSEAL holds the interpreter, and what it makes of a peer's bytes must not take the aggregator down.

A sandbox is one spawned process with limits on memory and time. It gets words and bytes through shared memory, and small fixed
messages through a pipe. When it crashes, hangs or grows too large it is killed, and a new one gets the same call: the old one may have
been killed by the system, or damaged by a call before. If the new one is lost over it too the call raises `SandboxLost`; the caller still
has everything that was handed in, and knows whose bytes they were. That no process can be started is another error: nobody's fault.

Threat assumption: native code behind our framing may still be crashed, not taken over; a sandbox is no jail.
"""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from queue import LifoQueue
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError
from protocols.bfv import Decryptor, Encryptor, Expander, generate_key, is_key
from protocols.ciphertexts import CipherLost, CipherUnavailable, FrameBroken, Words, add, subtract, upload_bytes
from protocols.packing import DEGREE, BfvParameters, Uint64Matrix

Octets = NDArray[np.uint8]

MAX_CIPHERTEXTS = 64
"""Most ciphertexts of one call."""

WHOLE_BYTES = 2 * 8 * DEGREE
SPACE_BYTES = MAX_CIPHERTEXTS * (WHOLE_BYTES + 8 * DEGREE)
REQUEST, REPLY = struct.Struct("<BII"), struct.Struct("<BI")
DONE, REFUSED = 0, 1
START_SECONDS = 20.0
CALL_SECONDS = 10.0
"""A hundred times what the largest call takes on a machine that is not busy."""


class SandboxLost(CipherLost):
    """A new process crashed, hung or outgrew its memory over this call; callers turn it into an error that names the peer."""


class SandboxUnavailable(CipherUnavailable):
    """No process can be started."""


class Task(IntEnum):
    """What a sandbox does."""

    ENCRYPT = 1
    DECRYPT = 2
    EXPAND = 3
    ADD_PLAIN = 4


class Sandbox:
    """One process for one set of parameters, and with the secret key if `key` is given. Started by the first call.

    Args:
        parameters: of all ciphertexts.
        key: from `bfv.generate_key`; empty at the aggregator.
        seconds: how long a call may take.
        memory_bytes: how much address space the process may take beyond what it starts with.
    """

    def __init__(
        self, parameters: BfvParameters, key: bytes = b"", *, seconds: float = CALL_SECONDS, memory_bytes: int = 1 << 28
    ) -> None:
        self._parameters, self._key, self._seconds, self._memory_bytes = parameters, key, seconds, memory_bytes
        self._space = SharedMemory(create=True, size=SPACE_BYTES)
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        """Start the process now, and not when it is first needed.

        Raises:
            SandboxUnavailable: it does not start.
        """
        if self._pipe is None:
            self._start()

    def encrypt(self, packed: Uint64Matrix) -> bytes:
        """See `Encryptor.encrypt`."""
        size = upload_bytes(self._parameters, len(packed))
        return self._call(Task.ENCRYPT, len(packed), [packed], size).tobytes()

    def decrypt(self, words: Words) -> Uint64Matrix:
        """See `Decryptor.decrypt`."""
        found = self._call(Task.DECRYPT, len(words), [words], 8 * DEGREE * len(words))
        return found.view(np.uint64).reshape(-1, DEGREE).copy()

    def expand(self, data: bytes | memoryview) -> Words:
        """See `Expander.expand`. The words are a view that holds until the next call."""
        count = len(data) // upload_bytes(self._parameters, 1)
        found = self._call(Task.EXPAND, count, [np.frombuffer(data, np.uint8)], count * WHOLE_BYTES)
        return found.view(np.uint64).reshape(-1, 2, DEGREE)

    def add_plain(self, words: Words, packed: Uint64Matrix) -> Words:
        """See `Expander.add_plain`; gives the sums, a view that holds until the next call."""
        found = self._call(Task.ADD_PLAIN, len(words), [words, packed], len(words) * WHOLE_BYTES)
        return found.view(np.uint64).reshape(-1, 2, DEGREE)

    def close(self) -> None:
        """End the process and give its memory back."""
        self._stop()
        self._space.unlink()
        with suppress(BufferError):  # a view of it is still held somewhere, and keeps it until it goes
            self._space.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return "Sandbox(<redacted>)"

    def _call(self, task: Task, count: int, given: Sequence[Words | Octets], answer_bytes: int) -> Octets:
        """What the process answers: `answer_bytes` bytes, a view until the next call.

        Raises:
            FrameBroken: what was given are no ciphertexts.
            SandboxLost: there is no answer, of a new process either.
            SandboxUnavailable: there is no process.
        """
        octets = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in given]
        size = sum(part.size for part in octets)
        if count > MAX_CIPHERTEXTS or size > SPACE_BYTES:
            raise FrameBroken(f"{count} ciphertexts at once; the most is {MAX_CIPHERTEXTS}")
        while True:
            is_new = self._pipe is None
            pipe = self._pipe or self._start()
            try:
                return self._ask(pipe, task, count, octets, answer_bytes)
            except SandboxLost:
                self._stop()
                if is_new:
                    raise

    def _ask(self, pipe: Connection, task: Task, count: int, octets: Sequence[Octets], answer_bytes: int) -> Octets:
        space, place = _octets(self._space), 0
        for part in octets:
            space[place : place + part.size] = part
            place += part.size
        try:
            pipe.send_bytes(REQUEST.pack(task, count, place))
            if not pipe.poll(self._seconds):
                raise SandboxLost(f"no answer within {self._seconds:g} s")
            status, length = REPLY.unpack(pipe.recv_bytes(REPLY.size))
        except (OSError, EOFError, struct.error) as error:
            raise SandboxLost("the process ended") from error
        if status == REFUSED:
            raise FrameBroken("these bytes are no ciphertexts of the agreed parameters")
        if length != answer_bytes:
            raise SandboxLost(f"it answered {length} bytes instead of {answer_bytes}")
        return space[:length]

    def _start(self) -> Connection:
        context = get_context("spawn")
        try:
            ours, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._space.name, self._parameters, self._memory_bytes), daemon=True
            )
            self._process.start()
            theirs.close()
            self._pipe = ours
            ours.send_bytes(self._key)  # by the pipe: what is in argv or the environment can be read by others
            if not ours.poll(START_SECONDS):
                raise EOFError
            ours.recv_bytes(1)
        except (OSError, EOFError) as error:
            self._stop()
            raise SandboxUnavailable(
                "a process for ciphers could not be started: see that memory and file descriptors are left"
            ) from error
        return ours

    def _stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


class Pool:
    """As many sandboxes as there are cores, each for one call at a time (`protocols.rings.Cipher`). The last one used is the next."""

    def __init__(self, parameters: BfvParameters, key: bytes) -> None:
        self._parameters = parameters
        self._sandboxes = [Sandbox(parameters, key) for _ in range(os.cpu_count() or 1)]
        self._idle: LifoQueue[Sandbox] = LifoQueue()
        for sandbox in self._sandboxes:
            self._idle.put(sandbox)

    def encrypt(self, packed: Uint64Matrix) -> bytes:
        """See `Sandbox.encrypt`."""
        with self._sandbox() as sandbox:
            return sandbox.encrypt(packed)

    def decrypt(self, words: Words) -> Uint64Matrix:
        """See `Sandbox.decrypt`."""
        with self._sandbox() as sandbox:
            return sandbox.decrypt(words)

    def add(self, total: Words, data: bytes | memoryview) -> None:
        """Add framed fresh ciphertexts to [count, 2, 4096] words below q, in place."""
        with self._sandbox() as sandbox:
            add(total, sandbox.expand(data), self._parameters)

    def subtract(self, total: Words, data: bytes | memoryview) -> None:
        """Take them off again."""
        with self._sandbox() as sandbox:
            subtract(total, sandbox.expand(data), self._parameters)

    def add_plain(self, total: Words, packed: Uint64Matrix) -> None:
        """Add [count, 4096] coefficients below t to what [count, 2, 4096] words encrypt, in place."""
        with self._sandbox() as sandbox:
            total[:] = sandbox.add_plain(total, packed)

    def start(self) -> None:
        """Start the processes now."""
        for sandbox in self._sandboxes:
            sandbox.start()

    def close(self) -> None:
        """End the processes."""
        for sandbox in self._sandboxes:
            sandbox.close()

    def __repr__(self) -> str:
        return "Pool(<redacted>)"

    @contextmanager
    def _sandbox(self) -> Iterator[Sandbox]:
        sandbox = self._idle.get()
        try:
            yield sandbox
        finally:
            self._idle.put(sandbox)


class Sandboxes:
    """Ciphers in sandboxes (`protocols.rings.Ciphers`); `close` ends them all."""

    def __init__(self) -> None:
        self._pools: list[Pool] = []

    def generate_key(self, parameters: BfvParameters) -> bytes:
        """A new secret key; nothing of a peer's is touched, so it is made in this process."""
        return generate_key(parameters)

    def is_key(self, parameters: BfvParameters, key: bytes) -> bool:
        """Whether it could be such a key. Of a peer's key nothing native sees more than words below q, so this process does it."""
        return is_key(parameters, key)

    def cipher(self, parameters: BfvParameters, key: bytes) -> Pool:
        """A cipher with that key; without one (empty) for the aggregator."""
        pool = Pool(parameters, key)
        self._pools.append(pool)
        return pool

    def start(self) -> None:
        """Start all processes now: later strangers may hold every file descriptor.

        Raises:
            ConfigError: one does not start.
        """
        try:
            for pool in self._pools:
                pool.start()
        except SandboxUnavailable as error:
            raise ConfigError(f"the processes for the homomorphic sum cannot be started: {error}") from None

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools:
            pool.close()


def _serve(pipe: Connection, space_name: str, parameters: BfvParameters, memory_bytes: int) -> None:
    """The process: answer calls until the other side closes the pipe."""
    key = pipe.recv_bytes()
    space = SharedMemory(name=space_name)
    octets = _octets(space)
    work = _workers(parameters, key)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _address_space_bytes() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send_bytes(b"\0")
    while True:
        try:
            task, count, size = REQUEST.unpack(pipe.recv_bytes(REQUEST.size))
        except EOFError:
            return
        try:
            answer = work[Task(task)](count, octets[:size])
        except FrameBroken:
            pipe.send_bytes(REPLY.pack(REFUSED, 0))
            continue
        octets[: answer.size] = answer
        pipe.send_bytes(REPLY.pack(DONE, answer.size))


def _workers(parameters: BfvParameters, key: bytes) -> dict[Task, Callable[[int, Octets], Octets]]:
    expander = Expander(parameters)

    def add_plain(count: int, given: Octets) -> Octets:
        words = given[: count * WHOLE_BYTES].view(np.uint64).reshape(-1, 2, DEGREE)
        expander.add_plain(words, given[count * WHOLE_BYTES :].view(np.uint64).reshape(-1, DEGREE))
        return given[: count * WHOLE_BYTES]

    def expand(_: int, given: Octets) -> Octets:
        return expander.expand(given.data).reshape(-1).view(np.uint8)

    if not key:
        return {Task.EXPAND: expand, Task.ADD_PLAIN: add_plain}
    encryptor, decryptor = Encryptor(parameters, key), Decryptor(parameters, key)

    def encrypt(_: int, given: Octets) -> Octets:
        return np.frombuffer(encryptor.encrypt(given.view(np.uint64).reshape(-1, DEGREE)), np.uint8)

    def decrypt(_: int, given: Octets) -> Octets:
        return decryptor.decrypt(given.view(np.uint64).reshape(-1, 2, DEGREE)).reshape(-1).view(np.uint8)

    return {Task.ENCRYPT: encrypt, Task.DECRYPT: decrypt, Task.EXPAND: expand, Task.ADD_PLAIN: add_plain}


def _octets(space: SharedMemory) -> Octets:
    return np.ndarray(SPACE_BYTES, np.uint8, space.buf)


def _address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
