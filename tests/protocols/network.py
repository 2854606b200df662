"""An in-memory network that runs the real machines of one study, with a virtual clock and a tap on every message.

A `Tap` sees (sender, recipient, bytes) and returns what is delivered instead: nothing (a loss), the same, or something else.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

import msgspec
import numpy as np

from keys.errors import SecGeoError
from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols import transcript
from protocols.agreement import (
    Agreement,
    Anchors,
    Deadlines,
    Member,
    Modality,
    Model,
    Precision,
    Privacy,
    RosterPin,
    SecureSum,
    Study,
    Training,
    agreement_digest,
    fit_ciphertexts,
    read_agreement,
    write_agreement,
)
from protocols.attempt_aggregator import ClosedAttempt
from protocols.attempt_node import Parties
from protocols.bfv import InProcess
from protocols.encoding import Float64Vector
from protocols.packing import choose
from protocols.rings import Ciphers
from tests.keys.factory import AGGREGATOR, Consortium, make_consortium

PROTOCOL: ContextVar[str] = ContextVar("PROTOCOL", default="masked")
"""What studies sum by, where a test does not say."""

Tap = Callable[[str, str, bytes], Sequence[bytes]]


def names(count: int) -> list[str]:
    return [f"hospital-{index:02d}" for index in range(count)]


def make_agreement(
    consortium: Consortium, *, rounds: int = 1, threshold: int | None = None, **secure_sum: object
) -> Agreement:
    hospitals = [name for name in consortium.identities if name != AGGREGATOR]
    n = len(hospitals)
    t = threshold or (n + 1) // 2 + 1
    settings: dict[str, object] = {
        "minimum_cohort": max(3, t),
        "threshold": t,
        "value_bits": 24,
        "fraction_bits": 16,
    } | secure_sum
    if settings.setdefault("protocol", PROTOCOL.get()) == "masked":
        settings.setdefault("chunk_values", 1024)
    else:
        settings.setdefault("chunk_values", choose(settings["value_bits"], n).block_values)  # type: ignore[arg-type]
        fit_ciphertexts(settings, n)
    return Agreement(
        study=Study(id="test", rounds=rounds, classes=2),
        roster=RosterPin(1, 1, consortium.roster.digest.hex(), consortium.authority.fingerprint),
        secure_sum=SecureSum(**settings),  # type: ignore[arg-type]
        privacy=Privacy("record", 0.1, 1.0, 1.0, 1e-5, 8.0),
        training=Training(steps_per_round=2, learning_rate=0.1, local_learning_rate=0.1),
        precision=Precision(),
        model=Model(seed=1, trunk_digest="0" * 64),
        anchors=Anchors(count=16),
        deadlines=Deadlines(10.0, 10.0, 10.0),
        modalities=(Modality("mean", "tabular", (10,), "0" * 64),),
        members=tuple(Member(h, consortium.roster.entry(h).certificate_fingerprint, "mean", 10.0) for h in hospitals),
    )


class MemoryJournal:
    def __init__(self) -> None:
        self.entries: list[tuple[int, int, str]] = []
        self.tag_seeds: dict[tuple[int, int], bytes] = {}
        self.receipts: list[tuple[int, bytes]] = []
        self.secret = b""

    def last(self) -> tuple[int, int]:
        return max(((r, a) for r, a, _ in self.entries), default=(0, 0))

    def voted(self, round_number: int) -> bool:
        return any(r == round_number and event == "voted" for r, _, event in self.entries)

    def record(self, round_number: int, attempt: int, event: str, tag_seed: bytes = b"") -> None:
        self.entries.append((round_number, attempt, event))
        if tag_seed:
            self.tag_seeds[round_number, attempt] = tag_seed

    def tag_seed(self, round_number: int, attempt: int) -> bytes:
        return self.tag_seeds.get((round_number, attempt), b"")

    def keep_study_key(self, secret: bytes) -> None:
        self.secret = secret

    def study_key(self) -> bytes:
        return self.secret

    def keep_receipt(self, round_number: int, line: bytes) -> None:
        self.receipts.append((round_number, line))

    def receipt(self, round_number: int) -> bytes:
        return next((line for number, line in self.receipts if number == round_number), b"")


class MemorySpool:
    """Unfinished uploads in memory; counts what it holds at most."""

    def __init__(self) -> None:
        self.kept: dict[str, list[memoryview]] = {}

    def append(self, name: str, data: memoryview) -> None:
        self.kept.setdefault(name, []).append(data)

    def chunks(self, name: str) -> Iterator[memoryview]:
        return iter(self.kept.get(name, []))

    def discard(self, name: str) -> None:
        self.kept.pop(name, None)


@dataclass
class Network:
    """One study in memory. `vectors(node, round)` gives each update."""

    consortium: Consortium
    agreement: Agreement
    vectors: Callable[[str, int], Float64Vector]
    size: int
    tap: Tap = lambda _s, _r, data: [data]
    now: float = 0.0
    nodes: dict[str, node.NodeMachine] = field(default_factory=dict)
    sums: dict[str, list[node.Summed]] = field(default_factory=dict)
    lost: dict[str, list[node.RoundLost]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    faults: dict[str, SecGeoError] = field(default_factory=dict)
    lines: list[bytes] = field(default_factory=list)
    progress: list[agg.Progress] = field(default_factory=list)
    journals: dict[str, MemoryJournal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.digest = agreement_digest(write_agreement(self.agreement))
        keys = {m.node_id: self.consortium.roster.entry(m.node_id).public_key for m in self.agreement.members}
        self.parties = Parties(self.agreement, self.digest, keys)
        self._totals: dict[int, np.ndarray] = {}
        self._queue: deque[tuple[str, str, bytes]] = deque()
        self._attempts: dict[int, int] = {}
        self._old_connections: set[str] = set()
        self._closed: tuple[ClosedAttempt, np.ndarray] | None = None
        self.aggregator = self._new_aggregator()
        for member in self.agreement.members:
            name = member.node_id
            self.journals[name] = MemoryJournal()
            self.sums[name], self.lost[name] = [], []
            self.nodes[name] = self.new_node(name)

    def _new_aggregator(self) -> agg.AggregatorMachine:
        return agg.AggregatorMachine(
            self.parties,
            self.consortium.identities[AGGREGATOR],
            self.size,
            transcript.TranscriptWriter(self.consortium.identities[AGGREGATOR], self.lines),
            load_sum=lambda number: self._totals[number],
            spool=MemorySpool(),
            ciphers=InProcess(),
        )

    def new_node(self, name: str, ciphers: Ciphers | None = None) -> node.NodeMachine:
        """A node's machine as after a crash: nothing left but its keys, its journal and what it has applied."""
        return node.NodeMachine(
            self.parties,
            self.consortium.identities[name],
            (AGGREGATOR, self.consortium.identities[AGGREGATOR].public_key),
            self.size,
            coins=os.urandom,
            journal=self.journals[name],
            completed=max((summed.round for summed in self.sums[name]), default=0),
            ciphers=ciphers or InProcess(),
        )

    def restart_aggregator(self) -> None:
        """The aggregator has crashed, with all that was under way; it starts again, and the nodes connect again."""
        self._queue.clear()
        self.aggregator = self._new_aggregator()
        lines = transcript.read_transcript(b"".join(self.lines), self.consortium.identities[AGGREGATOR].public_key)
        if lines:
            kept = agg.Kept(lines, dict(self._attempts), self._closed)
            self._from_aggregator(self.aggregator.resume(kept, self.now))
        else:
            self._from_aggregator(self.aggregator.start(self.now))
        for name, machine in self.nodes.items():
            if name not in self.faults and not machine.ended:
                self._from_node(name, machine.rejoin())

    def restart_node(self, name: str) -> None:
        """A node has crashed, with all that was under way to it and from it; it starts again.

        What the aggregator sends before it hears of the new connection is lost with the old one.
        """
        self._forget_link(name)
        self._old_connections.add(name)
        self.nodes[name] = self.new_node(name)
        self._from_node(name, self.nodes[name].start())

    def disconnect(self, name: str) -> None:
        """A connection breaks, with all that was under way on it; both sides notice, and the node connects again."""
        self._forget_link(name)
        self._from_aggregator(self.aggregator.leave(name, self.now))
        self._from_node(name, self.nodes[name].rejoin())

    def run(self, *, absent: Sequence[str] = (), order: Callable[[list[str]], list[str]] = sorted) -> None:
        self.start(absent, order)
        self.finish()

    def start(self, absent: Sequence[str] = (), order: Callable[[list[str]], list[str]] = sorted) -> None:
        self._from_aggregator(self.aggregator.start(self.now))
        for name in order(list(self.nodes)):
            if name not in absent:
                self._from_node(name, self.nodes[name].start())

    def finish(self) -> None:
        """Deliver everything, and let time pass when there is nothing to deliver, until the study is over."""
        for _ in range(200_000):
            if self._queue:
                self._deliver(*self._queue.popleft())
            elif self.aggregator.ended:
                return
            else:
                self.pass_time()
        raise AssertionError("the study neither ended nor made progress")

    def pass_time(self) -> None:
        """The aggregator's deadline passes."""
        self.now = max(self.now, self.aggregator.deadline)
        self._from_aggregator(self.aggregator.tick(self.now))

    def _forget_link(self, name: str) -> None:
        pending = [entry for entry in self._queue if name not in entry[:2]]
        self._queue.clear()
        self._queue.extend(pending)

    def _deliver(self, sender: str, recipient: str, data: bytes) -> None:
        if recipient == AGGREGATOR:
            self._old_connections.discard(sender)
            self._from_aggregator(self.aggregator.receive(sender, data, self.now))
        elif recipient not in self.faults:
            try:
                self._from_node(recipient, self.nodes[recipient].receive(data))
            except SecGeoError as fault:
                self.faults[recipient] = fault

    def _post(self, sender: str, recipient: str, data: bytes) -> None:
        for delivered in self.tap(sender, recipient, data):
            if recipient in self._old_connections:
                continue
            self._queue.append((sender, recipient, delivered))

    def _from_node(self, name: str, outputs: list[node.Output]) -> None:
        for output in outputs:
            match output:
                case node.Send():
                    self._post(name, AGGREGATOR, output.data)
                case node.Train():
                    self._from_node(name, self.nodes[name].submit(output.round, self.vectors(name, output.round)))
                case node.Summed():
                    self.sums[name].append(output)
                case node.RoundLost():
                    self.lost[name].append(output)
                case node.Ended():
                    self.ended[name] = output.reason

    def _from_aggregator(self, outputs: list[agg.Output]) -> None:
        for output in outputs:
            match output:
                case agg.SendTo():
                    self._post(AGGREGATOR, output.peer, output.data)
                case agg.Record():
                    self.lines.append(output.line)
                case agg.Begun():
                    self._attempts[output.round] = output.attempt
                case agg.UploadsClosed():
                    self._closed = output.state, output.masked.copy()
                case agg.SumOpened():
                    self._totals[output.round] = output.total
                case agg.Progress():
                    self.progress.append(output)


def make_network(count: int = 4, *, size: int = 3000, rounds: int = 1, seed: int = 0, **settings: object) -> Network:
    """A study of `size` values; of ciphertexts as many more as give as many chunks."""
    consortium = make_consortium(names(count))
    agreement = make_agreement(consortium, rounds=rounds, **settings)  # type: ignore[arg-type]
    if agreement.secure_sum.encrypted:
        size *= agreement.secure_sum.chunk_values // 1024
    limit = 2.0

    def vectors(name: str, number: int) -> Float64Vector:
        key = [seed, number, *name.encode()]
        return np.random.default_rng(key).uniform(-limit, limit, size)

    return Network(consortium, read_agreement(write_agreement(agreement)), vectors, size)


def head(data: bytes) -> list:
    """The head of a message, undecoded: [version, agreement, round, attempt, sender, [type, ...], signature]."""
    return msgspec.msgpack.decode(data[4 : 4 + int.from_bytes(data[:4])])


def body_type(data: bytes) -> str:
    return str(head(data)[5][0])
