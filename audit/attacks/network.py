"""One study in memory: real machines with real keys, a queue between them, a clock that jumps to the next deadline, and a tap.

A `Tap` sees (sender, recipient, bytes) and returns what is delivered instead: nothing (a loss), the same, or something else. Nothing
here is a model of the protocol: whoever attacks sits on the tap, or changes a machine. An error of SecGeo's in a node is noted as its
fault, and ends its part; every other error, and those of the aggregator, come out of `run`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from keys.errors import SecGeoError
from keys.identity import Identity
from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols.agreement import Agreement, agreement_digest, write_agreement
from protocols.attempt_node import Parties
from protocols.bfv import Cipher, InProcess
from protocols.encoding import Float64Vector
from protocols.messages import AGGREGATOR
from protocols.packing import BfvParameters
from protocols.rings import Ciphers, Total
from protocols.transcript import TranscriptWriter

MESSAGES_AT_MOST = 200_000
"""A study that has carried so many messages and is not over hangs."""

Tap = Callable[[str, str, bytes], Sequence[bytes]]
Over = Literal["memory", "sockets"]
"""What carries messages: the queue of this file, or the sockets of `audit.attacks.wire`."""


class Hangs(Exception):
    """A study neither ends nor makes progress."""


class NotPlayed(Exception):
    """A study cannot even begin here, which says nothing of its code."""


class SharedCiphers(InProcess):
    """The real ciphers, each made once: the hospitals of a study hold the same key."""

    def __init__(self) -> None:
        self._made: dict[tuple[BfvParameters, bytes], Cipher] = {}

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        """See `protocols.rings.Ciphers`."""
        if (parameters, key) not in self._made:
            self._made[parameters, key] = super().cipher(parameters, key)
        return self._made[parameters, key]


class MemoryJournal:
    """A node's journal, in memory: it outlives the machine."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, str]] = []
        self.tag_seeds: dict[tuple[int, int], bytes] = {}
        self.ballots: dict[int, bytes] = {}
        self.receipts: list[tuple[int, bytes]] = []
        self.secret = b""

    def last(self) -> tuple[int, int]:
        """See `protocols.study_node.Journal`."""
        return max(((r, a) for r, a, _ in self.entries), default=(0, 0))

    def ballot(self, round_number: int) -> bytes:
        """See `protocols.study_node.Journal`."""
        return self.ballots.get(round_number, b"")

    def record(self, round_number: int, attempt: int, event: str, note: bytes = b"") -> None:
        """See `protocols.study_node.Journal`."""
        self.entries.append((round_number, attempt, event))
        match event:
            case "used":
                self.tag_seeds[round_number, attempt] = note
            case "voted":
                self.ballots.setdefault(round_number, note)

    def tag_seed(self, round_number: int, attempt: int) -> bytes:
        """See `protocols.study_node.Journal`."""
        return self.tag_seeds.get((round_number, attempt), b"")

    def keep_receipt(self, round_number: int, line: bytes) -> None:
        """See `protocols.study_node.Journal`."""
        self.receipts.append((round_number, line))

    def receipt(self, round_number: int) -> bytes:
        """See `protocols.study_node.Journal`."""
        return next((line for number, line in self.receipts if number == round_number), b"")

    def keep_study_key(self, secret: bytes) -> None:
        """See `protocols.study_node.Journal`."""
        self.secret = secret

    def study_key(self) -> bytes:
        """See `protocols.study_node.Journal`."""
        return self.secret


class MemorySpool:
    """Unfinished uploads, in memory."""

    def __init__(self) -> None:
        self._kept: dict[str, list[memoryview]] = {}

    def append(self, name: str, data: memoryview) -> None:
        """See `protocols.attempt_aggregator.Spool`."""
        self._kept.setdefault(name, []).append(data)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """See `protocols.attempt_aggregator.Spool`."""
        return iter(self._kept.get(name, []))

    def discard(self, name: str) -> None:
        """See `protocols.attempt_aggregator.Spool`."""
        self._kept.pop(name, None)


class Network:
    """One study. `vectors(node, round)` gives each update of `size` values; `ciphers` is where all machines have theirs from.

    Attributes:
        faults: the error with which a node left.
        sums: the sums that each node took.
        totals: the sums that the aggregator opened, by round, as its ring has them.
        lines: the transcript.
        progress: what the aggregator told its operator.
    """

    over: ClassVar[Over] = "memory"

    def __init__(
        self,
        identities: Mapping[str, Identity],
        agreement: Agreement,
        vectors: Callable[[str, int], Float64Vector],
        size: int,
        ciphers: Ciphers,
    ) -> None:
        self.identities, self.agreement, self.vectors, self.size = identities, agreement, vectors, size
        self.ciphers = ciphers
        self.names = [member.node_id for member in agreement.members]
        self.digest = agreement_digest(write_agreement(agreement))
        self.parties = Parties(agreement, self.digest, {name: identities[name].public_key for name in self.names})
        self.tap: Tap = lambda _sender, _recipient, data: [data]
        self.now = 0.0
        self.faults: dict[str, SecGeoError] = {}
        self.sums: dict[str, list[node.Summed]] = {name: [] for name in self.names}
        self.totals: dict[int, Total] = {}
        self.lines: list[bytes] = []
        self.progress: list[agg.Progress] = []
        self.journals = {name: MemoryJournal() for name in self.names}
        self._queue: deque[tuple[str, str, bytes]] = deque()
        self.aggregator = self.new_aggregator(self.parties)
        self.nodes = {name: self.new_node(name) for name in self.names}

    @property
    def expelled(self) -> list[str]:
        """Whom the aggregator has put out."""
        return [str(output.fields["node"]) for output in self.progress if output.event == "expelled"]

    def new_aggregator(self, parties: Parties) -> agg.AggregatorMachine:
        """The aggregator's machine."""
        identity = self.identities[AGGREGATOR]
        return agg.AggregatorMachine(
            parties,
            identity,
            self.size,
            TranscriptWriter(identity, self.lines),
            load_sum=lambda number: self.totals[number],
            spool=MemorySpool(),
            ciphers=self.ciphers,
        )

    def new_node(self, name: str, ciphers: Ciphers | None = None) -> node.NodeMachine:
        """A node's machine, as after a crash: nothing left but its keys, its journal and what it has applied."""
        return node.NodeMachine(
            self.parties,
            self.identities[name],
            (AGGREGATOR, self.identities[AGGREGATOR].public_key),
            self.size,
            coins=os.urandom,
            journal=self.journals[name],
            completed=max((summed.round for summed in self.sums[name]), default=0),
            ciphers=ciphers or self.ciphers,
        )

    def run(self, absent: Collection[str] = (), order: Callable[[list[str]], list[str]] = sorted) -> None:
        """Carry everything, until the study is over.

        Raises:
            Hangs: it never is.
        """
        self.start(absent, order)
        self.finish()

    def start(self, absent: Collection[str] = (), order: Callable[[list[str]], list[str]] = sorted) -> None:
        """Start all machines, the nodes in this order."""
        self._from_aggregator(self.aggregator.start(self.now))
        for name in order(list(self.nodes)):
            if name not in absent:
                self._from_node(name, self.nodes[name].start())

    def finish(self) -> None:
        """Deliver everything, and let time pass when there is nothing to deliver, until the study is over."""
        for _ in range(MESSAGES_AT_MOST):
            if self._queue:
                self._deliver(*self._queue.popleft())
            elif self.aggregator.ended:
                return
            else:
                self.pass_time()
        raise Hangs("the study neither ended nor made progress")

    def pass_time(self) -> None:
        """The aggregator's deadline passes."""
        self.now = max(self.now, self.aggregator.deadline)
        self._from_aggregator(self.aggregator.tick(self.now))

    def inject(self, sender: str, recipient: str, data: bytes) -> None:
        """Put a message on the wire, behind what is there; the tap does not see it."""
        self._queue.append((sender, recipient, data))

    def lose(self, name: str) -> None:
        """The connection of a node breaks, for good, with all that is under way on it; the aggregator notices."""
        self._forget_link(name)
        self._from_aggregator(self.aggregator.leave(name, self.now))

    def disconnect(self, name: str) -> None:
        """The connection of a node breaks; both sides notice, and the node connects again."""
        self.lose(name)
        self._from_node(name, self.nodes[name].rejoin())

    def _forget_link(self, name: str) -> None:
        self._queue = deque(entry for entry in self._queue if name not in entry[:2])

    def _deliver(self, sender: str, recipient: str, data: bytes) -> None:
        if recipient == AGGREGATOR:
            self._from_aggregator(self.aggregator.receive(sender, data, self.now))
        elif recipient not in self.faults:
            try:
                self._from_node(recipient, self.nodes[recipient].receive(data))
            except SecGeoError as fault:
                self.faults[recipient] = fault

    def _post(self, sender: str, recipient: str, data: bytes) -> None:
        for delivered in self.tap(sender, recipient, data):
            self._queue.append((sender, recipient, delivered))

    def _from_node(self, name: str, outputs: Sequence[node.Output]) -> None:
        for output in outputs:
            match output:
                case node.Send():
                    self._post(name, AGGREGATOR, bytes(output.data))
                case node.Train():
                    self._from_node(name, self.nodes[name].submit(output.round, self.vectors(name, output.round)))
                case node.Summed():
                    self.sums[name].append(output)

    def _from_aggregator(self, outputs: Sequence[agg.Output]) -> None:
        for output in outputs:
            match output:
                case agg.SendTo():
                    self._post(AGGREGATOR, output.peer, output.data)
                case agg.Record():
                    self.lines.append(output.line)
                case agg.SumOpened():
                    self.totals[output.round] = output.total
                case agg.Progress():
                    self.progress.append(output)
