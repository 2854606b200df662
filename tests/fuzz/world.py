"""The study that the fuzzers attack: real keys, documents and messages, the same in every process, so that inputs can be replayed.

Every secret follows from a counter, but for those of HPKE and BFV. Inputs are scripts in which digests of messages stand for
themselves, so they mean the same in every run. A run of the in-memory network gives the seeds: every message, and the state in which its
recipient was just before it.
"""

from __future__ import annotations

import hashlib
import itertools
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.audit.factory import Study, make_study
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, make_network

NODE = "hospital-01"
"""The node whose machine is attacked."""


@contextmanager
def fixed_coins() -> Iterator[None]:
    """Keys, serial numbers and seeds that are made inside follow from a counter."""
    counter = itertools.count()

    def coins(count: int) -> bytes:
        return hashlib.shake_256(f"secgeo fuzzing {next(counter)}".encode()).digest(count)

    def serial() -> int:
        return int.from_bytes(coins(19)) | 1 << 151

    def generate(kind: Any) -> Callable[[], Any]:
        return lambda: kind.from_private_bytes(coins(32))

    with (
        mock.patch.object(Ed25519PrivateKey, "generate", generate(Ed25519PrivateKey)),
        mock.patch.object(X25519PrivateKey, "generate", generate(X25519PrivateKey)),
        mock.patch.object(x509, "random_serial_number", serial),
        mock.patch("os.urandom", coins),
    ):
        yield


@dataclass(frozen=True)
class Moment:
    """A message, its sender, the machine of its recipient just before it came, and the transcript so far."""

    sender: str
    data: bytes = field(repr=False)
    machine: Any = field(repr=False)
    lines: tuple[bytes, ...] = field(repr=False)


@dataclass
class Recording:
    """One run: the network as it ended, every message, and moments before the first and last message of each type."""

    network: Network
    messages: list[tuple[str, str, bytes]] = field(default_factory=list)
    node: list[Moment] = field(default_factory=list)
    aggregator: list[Moment] = field(default_factory=list)


class _Spy:
    """Stands for a machine and takes a snapshot of it before each message that it receives."""

    def __init__(self, machine: Any, network: Network) -> None:
        self.machine, self.network = machine, network
        self.first: dict[str, Moment] = {}
        self.last: dict[str, Moment] = {}

    def receive(self, *arguments: Any) -> Any:
        sender, data = (arguments[0], arguments[1]) if len(arguments) > 1 else (AGGREGATOR, arguments[0])
        kind = body_type(data)
        moment = Moment(sender, data, snapshot(self.machine, self.network), tuple(self.network.lines))
        self.first.setdefault(kind, moment)
        self.last[kind] = moment
        return self.machine.receive(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.machine, name)

    def moments(self) -> list[Moment]:
        return list({id(m): m for m in (*self.first.values(), *self.last.values())}.values())


def _lose_uploads(sender: str, _recipient: str, data: bytes) -> Sequence[bytes]:
    """hospital-03 vanishes while it uploads, so that pair masks have to be recovered."""
    return [] if sender == "hospital-03" and body_type(data) == "UploadDone" else [data]


def _break_first_attempt(sender: str, _recipient: str, data: bytes) -> Sequence[bytes]:
    """Two nodes vanish when votes are due, so that the attempt fails."""
    return [] if sender in ("hospital-02", "hospital-03") and body_type(data) == "SurvivorVote" else [data]


_RUNS: tuple[tuple[Callable[[str, str, bytes], Sequence[bytes]], dict[str, Any]], ...] = (
    (lambda _s, _r, data: [data], {"rounds": 2}),
    (_lose_uploads, {"rounds": 1, "ring_bits": 20, "value_bits": 17, "fraction_bits": 12}),
    (_break_first_attempt, {"rounds": 1, "ring_bits": 24, "value_bits": 20, "fraction_bits": 12}),
    (_lose_uploads, {"rounds": 1, "protocol": "layered"}),
    (lambda _s, _r, data: [data], {"rounds": 1, "protocol": "homomorphic"}),
)


@cache
def recordings() -> tuple[Recording, ...]:
    """Studies of four hospitals: one that goes well, one that loses a node, one whose attempt fails, and two with ciphertexts."""
    return tuple(itertools.starmap(_record, _RUNS))


def _record(tap: Callable[[str, str, bytes], Sequence[bytes]], settings: dict[str, Any]) -> Recording:
    with fixed_coins():
        network = make_network(4, size=1500, **settings)
        recording = Recording(network)

        def listen(sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
            recording.messages.append((sender, recipient, data))
            return tap(sender, recipient, data)

        network.tap = listen
        node, aggregator = _Spy(network.nodes[NODE], network), _Spy(network.aggregator, network)
        network.nodes[NODE], network.aggregator = node, aggregator  # type: ignore[assignment]
        network.run()
        recording.node, recording.aggregator = node.moments(), aggregator.moments()
        return recording


@cache
def study() -> Study:
    """A small study made by hand, with a folder of records."""
    with fixed_coins():
        return make_study()


# --- snapshots


def snapshot(machine: Any, network: Network) -> Any:
    """A machine that goes on from here by itself: all that it may change is copied, keys and constants are shared.

    `copy.deepcopy` cannot do it, since secrets refuse to be copied. Of the network only the sums that it kept are taken.
    """
    kept = object.__new__(Network)
    memo: dict[int, Any] = {id(network): kept}
    vars(kept).update(_copy({name: value for name, value in vars(network).items() if name == "totals"}, memo))
    return _copy(machine, memo)


def again(machine: Any) -> Any:
    """A copy of a snapshot."""
    return _copy(machine, {})


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    copied = value
    match value:
        case np.ndarray():
            copied = memo[id(value)] = value.copy()
        case dict():
            copied = memo[id(value)] = type(value)()
            copied.update({key: _copy(item, memo) for key, item in value.items()})
        case list() | set() | deque():
            copied = memo[id(value)] = type(value)(_copy(item, memo) for item in value)
        case tuple() if type(value) is tuple:
            copied = tuple(_copy(item, memo) for item in value)
        case types.FunctionType() if value.__closure__:
            cells = tuple(types.CellType(_copy(cell.cell_contents, memo)) for cell in value.__closure__)
            copied = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
            copied.__kwdefaults__ = value.__kwdefaults__
        case types.MethodType():
            copied = types.MethodType(value.__func__, _copy(value.__self__, memo))
        case _ if _has_state(value):
            copied = memo[id(value)] = object.__new__(type(value))
            slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
            for name in [*slots, *getattr(value, "__dict__", ())]:
                if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                    object.__setattr__(copied, name, _copy(getattr(value, name), memo))
    return copied


def _has_state(value: Any) -> bool:
    """Whether this is an object of ours that can change."""
    kind = type(value)
    if not kind.__module__.startswith(("protocols.", "tests.", "audit.attacks.")) or isinstance(
        value, type | BaseException
    ):
        return False
    if is_dataclass(kind):
        return not kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return kind.__init__ is not object.__init__ and not hasattr(kind, "__struct_fields__") and not _is_enum(kind)


def _is_enum(kind: type) -> bool:
    return hasattr(kind, "__members__")
