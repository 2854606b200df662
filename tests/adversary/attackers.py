"""The attackers: an aggregator that lies with its real key, members that lie with theirs, and the two together.

They sit on a network's tap (in memory, or over sockets: `tests.adversary.wire`), so that every honest party stays the real
machine. Colluders are real machines too, which do whatever the aggregator says and give it their secrets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np

from keys.identity import Identity
from keys.labels import Label
from protocols import messages as m
from protocols import sealing
from protocols import study_node as node
from protocols import transcript as t
from protocols.attempt_aggregator import AttemptAggregator, SumOutcome
from protocols.attempt_node import AttemptNode, Parties, Shares, share_digests
from protocols.bfv import Expander, InProcess
from protocols.chain import Entry, Unsigned
from protocols.encoding import Uint32Vector
from protocols.graph import MaskGraph
from protocols.prg import TAG_PRIME
from protocols.rings import Total, make_ring, octets
from protocols.transcript import aggregate_digest, read_line
from tests.adversary.knowledge import Address, Knowledge, packing_of, peek
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import MemorySpool, Network

Bodies = Iterable[tuple[m.AnyBody, bytes]]
Change = Callable[[m.Message, str], Bodies]
"""What goes to a node instead of this message: bodies with their tails."""
Hearing = Callable[[m.Message, bytes], Sequence[bytes]]
"""What the aggregator's machine hears instead of this message."""


def inject(network: Network, sender: str, recipient: str, data: bytes) -> None:
    """Put a message on a link, behind what is there."""
    network._queue.append((sender, recipient, data))


class LooseParties(Parties):
    """Parties as a malicious aggregator sees them: no minimum."""

    @property
    def minimum(self) -> int:
        return 1


class LooseAggregator(AttemptAggregator):
    """An attempt whose aggregator does not mind what only protects the nodes."""

    def _dispatch(self, peer: str, message: m.Message, signed: bytes) -> list:
        if isinstance(message.body, m.RoundKeys):
            self._last_record = message.body.last_record
        return super()._dispatch(peer, message, signed)

    def _on_upload_done(self, peer: str, body: m.UploadDone, signed: bytes) -> None:
        view, self._view = self._view, body.view
        try:
            super()._on_upload_done(peer, body, signed)
        finally:
            self._view = view

    def _close_uploads(self) -> list:
        self._graph = LooseGraph(self._graph.order, self._graph.reach)
        return super()._close_uploads()


class LooseGraph(MaskGraph):
    """A graph that nobody can cut apart."""

    def tolerates(self, survivors: object, colluders: int) -> bool:
        return True


class Accomplice(AttemptNode):
    """A colluder's attempt: it checks nothing that the aggregator does."""

    def _check(self, holds: bool, fault: str) -> None:
        pass


class MaliciousAggregator:
    """Holds the aggregator's real key, keeps everything it sees, and changes what it likes.

    `on(kind)` sets what goes to nodes instead of a kind of message, `hear(kind)` what its own machine hears.
    """

    def __init__(self, network: Network, colluders: Sequence[str] = ()) -> None:
        self.network, self.identity = network, network.consortium.identities[AGGREGATOR]
        self.knowledge = Knowledge(network, tuple(colluders))
        self._changes: dict[str, Change] = {}
        self._hearings: dict[str, Hearing] = {}
        self._loose = False
        network.tap = self._tap

    def loosen(self) -> None:
        """Stop checking on our own side what protects the nodes only."""
        self._loose = True
        parties = self.network.parties
        self.network.aggregator._parties = LooseParties(
            parties.agreement, parties.agreement_digest, parties.public_keys
        )

    def on(self, *kinds: str) -> Callable[[Change], Change]:
        """Decorate the change of what goes to nodes."""
        return lambda change: [self._changes.update({kind: change}) for kind in kinds] and change  # type: ignore[return-value]

    def hear(self, *kinds: str) -> Callable[[Hearing], Hearing]:
        """Decorate the change of what comes from nodes."""
        return lambda change: [self._hearings.update({kind: change}) for kind in kinds] and change  # type: ignore[return-value]

    def say(self, to: str, address: Address, body: m.AnyBody, tail: bytes = b"") -> None:
        """Send a message of our own."""
        data = self.sign(address, body, tail)
        self.knowledge.watch(AGGREGATOR, to, data)
        inject(self.network, AGGREGATOR, to, data)

    def sign(self, address: Address, body: m.AnyBody, tail: bytes = b"") -> bytes:
        return m.encode(self.identity, sealing.AttemptId(self.network.digest, *address), body, tail)

    def _tap(self, sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        head = peek(data)
        if head is None:
            return [data]
        message = m.Message(head.sender, head.round, head.attempt, head.body, m._split(data)[1])
        kind = type(head.body).__name__
        if sender != AGGREGATOR:
            self.knowledge.watch(sender, recipient, data)
            self._recruit(sender)
            return self._hearings[kind](message, data) if kind in self._hearings else [data]
        if kind == "AttemptOpen" and self._loose and self.network.aggregator._attempt is not None:
            attempt = self.network.aggregator._attempt
            attempt.__class__, attempt._parties = LooseAggregator, self.network.aggregator._parties
        sent = [data]
        if kind in self._changes:
            address = message.round, message.attempt
            sent = [self.sign(address, *changed) for changed in self._changes[kind](message, recipient)]
        for data in sent:
            self.knowledge.watch(AGGREGATOR, recipient, data)
        return sent

    def _recruit(self, name: str) -> None:
        attempt = self.network.nodes[name]._attempt if name in self.knowledge.colluders else None
        if attempt is not None:
            attempt.__class__ = Accomplice


def keep(message: m.Message) -> Bodies:
    """The message as it is."""
    return [(message.body, bytes(message.tail))]


class Impersonator(MaliciousAggregator):
    """Plays the whole cohort towards one victim, with round keys of its own; the others are served as they should be.

    `peers` are the names that it plays, whose messages it signs with keys of its own making.
    """

    def __init__(self, network: Network, victim: str, peers: Sequence[str]) -> None:
        super().__init__(network)
        self.victim, self.peers = victim, sorted(peers)
        self.signers = {name: Identity.generate(name, "hospital") for name in self.peers}
        self._bodies: dict[str, m.RoundKeys] = {}
        self._victims_keys = b""
        for kind in ("KeySet", "SeedSet", "Credit", "Survivors", "SurvivorProof", "SumChunk", "RoundResult"):
            self.on(kind)(lambda message, to: [] if to == victim else keep(message))
        self.hear("RoundKeys")(self._on_keys)
        self.hear("SealedSeeds")(self._on_seeds)
        self.hear("UploadChunk", "UploadDone")(lambda message, data: [] if message.sender == victim else [data])

    def _attempt(self, message: m.Message) -> sealing.AttemptId:
        return sealing.AttemptId(self.network.digest, message.round, message.attempt)

    def _on_keys(self, message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender != self.victim:
            return [data]
        attempt, address = self._attempt(message), (message.round, message.attempt)
        secrets = self.knowledge.attempts[address].secrets
        signed = {self.victim: data}
        for name in self.peers:
            own = secrets[name] = sealing.AttemptSecrets.fresh(os.urandom)
            keys = m.RoundKeys(
                sealing.public_key_bytes(own.share_master, attempt),
                sealing.public_key_bytes(own.pair_master, attempt),
                sealing.self_seed_commitment(own.self_seed, attempt, name),
                node.tags.commitment(own.tag_seed, attempt, name),
                message.body.last_record,
            )
            signed[name] = m.encode(self.signers[name], attempt, keys)
        digests = tuple((name, sealing.keys_digest(signed[name])) for name in sorted(signed))
        self.say(self.victim, address, m.KeySet(digests, tuple(signed[name] for name in sorted(signed))))
        self._bodies[self.victim] = message.body  # type: ignore[assignment]
        return []

    def _on_seeds(self, message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender != self.victim:
            return [data]
        attempt, address = self._attempt(message), (message.round, message.attempt)
        seen = self.knowledge.attempts[address]
        if {to for sender, to in seen.seals if sender == self.victim} != set(self.peers):
            return []
        cohort, theirs, sealed = message.body.cohort_digest, self._bodies[self.victim], []
        for name in self.peers:
            own = seen.secrets[name]
            dealt = Shares(bytes(33), bytes(33), own.tag_seed)
            digests = share_digests(dealt, attempt, name, self.victim)
            shares = msgspec.msgpack.encode(dealt)
            info = sealing.shares_info(attempt, cohort, name, self.victim)
            contribution, contribution_digest = b"", None
            if name < self.victim:
                secret = sealing.contribution(own.pair_master, attempt, cohort, name, self.victim)
                pair_info = sealing.contribution_info(attempt, cohort, name, self.victim)
                contribution = sealing.seal(theirs.pair_public, secret, pair_info)
                contribution_digest = sealing.contribution_digest(secret, attempt, name, self.victim)
            sealed_shares = sealing.seal(theirs.share_public, shares, info)
            seeds = m.SealedSeeds(self.victim, cohort, sealed_shares, contribution, *digests, contribution_digest)
            sealed.append(m.encode(self.signers[name], attempt, seeds))
        self.say(self.victim, address, m.SeedSet(tuple(sorted([self.victim, *self.peers])), tuple(sealed)))
        self.say(self.victim, address, m.Credit(1000))
        return []


class PrivateAttempt:
    """One more attempt that the aggregator runs behind the back of its study machine."""

    def __init__(self, aggregator: MaliciousAggregator, address: Address, cohort: Iterable[str]) -> None:
        self._aggregator, self.address = aggregator, address
        network = aggregator.network
        parties = LooseParties(network.agreement, network.digest, network.parties.public_keys)
        attempt = sealing.AttemptId(network.digest, *address)
        self.machine = AttemptAggregator(
            parties,
            attempt,
            cohort,
            network.size,
            MemorySpool(),
            ring=make_ring(network.agreement, InProcess()),
            study_key=network.aggregator._study_key,
        )
        self.machine.__class__ = LooseAggregator
        self._carry(self.machine.start())

    @property
    def outcome(self) -> SumOutcome | None:
        return self.machine.outcome

    def receive(self, message: m.Message, data: bytes) -> None:
        self._carry(self.machine.receive(message.sender, message, data))

    def expire(self) -> None:
        """Go on without those who are missing."""
        self._carry(self.machine.expire())

    def _carry(self, sends: list[tuple[str, m.AnyBody]]) -> None:
        for to, body in sends:
            self._aggregator.say(to, self.address, body)


def resign(aggregator: Identity, line: bytes, **changes: object) -> bytes:
    """A transcript line of the same place with another body, signed by the aggregator."""
    entry = msgspec.json.decode(line, type=Entry[t.Body])
    body = msgspec.structs.replace(entry.body, **changes)
    signature = aggregator.sign(Label.TRANSCRIPT, msgspec.json.encode(Unsigned(entry.seq, entry.prev, body))).hex()
    return msgspec.json.encode(Entry(entry.seq, entry.prev, body, signature)) + b"\n"


def opened(network: Network, total: Total) -> Uint32Vector:
    """The values of a sum, for an aggregator to which a colluder has given the study key, if there is one."""
    key = network.nodes[next(iter(network.nodes))]._study_key
    return make_ring(network.agreement, InProcess(), b"" if key is None else key.secret).open(total, network.size)


def changed(network: Network, total: Total, change: Callable[[Uint32Vector], Uint32Vector]) -> Total:
    """A sum whose values are changed; where it is encrypted, by adding what makes the difference to the ciphertexts."""
    if not network.agreement.secure_sum.encrypted:
        return change(total.copy())
    packing, values = packing_of(network), opened(network, total)
    before, after = packing.pack(values), packing.pack(change(values.copy()))
    difference = (after - before) & np.uint64(2**packing.parameters.plain_bits - 1)
    words = total.copy()
    Expander(packing.parameters).add_plain(words, difference)
    return words


def sum_bodies(network: Network, total: Total) -> list[tuple[m.AnyBody, bytes]]:
    """The chunks of a sum, as they would be sent."""
    ring = make_ring(network.agreement)
    tails = [bytes(ring.pack_sum(total, start)) for start in range(0, network.size, ring.sum_chunk_values)]
    return [(m.SumChunk(index, m.chunk_digest(tail)), tail) for index, tail in enumerate(tails)]


class WrongSum(MaliciousAggregator):
    """Announces another sum than it opened, with a record that it signs anew, so that the digests fit."""

    def __init__(
        self,
        network: Network,
        change: Callable[[Uint32Vector], Uint32Vector],
        victims: Sequence[str] | None = None,
        retag: Callable[[int], int] = lambda tag: tag,
    ) -> None:
        super().__init__(network)
        self._change, self._victims, self._retag = change, victims, retag
        self.receipts: tuple[tuple[str, bytes], ...] | None = None
        """Receipts to send with it, instead of those that the machine has."""
        self.on("SumChunk")(lambda message, to: [] if self._lies_to(to) else keep(message))
        self.on("RoundResult")(self._result)

    def _lies_to(self, name: str) -> bool:
        return self._victims is None or name in self._victims

    def forged_line(self, line: bytes, number: int) -> tuple[bytes, Total]:
        """The record's line with the digest of the changed sum, and that sum."""
        total = changed(self.network, self.network._totals[number], self._change)
        digest = aggregate_digest(octets(total)).hex()
        tag = int(read_line(line, self.identity.public_key).body.aggregate_tag, 16)  # type: ignore[union-attr]
        forged = f"{self._retag(tag) % TAG_PRIME:016x}"
        return resign(self.identity, line, aggregate_digest=digest, aggregate_tag=forged), total

    def _result(self, message: m.Message, to: str) -> Bodies:
        if not self._lies_to(to):
            return keep(message)
        line, total = self.forged_line(message.body.record, message.round)
        receipts = message.body.receipts if self.receipts is None else self.receipts
        return [*sum_bodies(self.network, total), (m.RoundResult(line, receipts), b"")]


class MaliciousNode:
    """Holds one member's real key and changes what that member sends; the member's machine runs on underneath."""

    def __init__(self, network: Network, name: str) -> None:
        self.network, self.name = network, name
        self.identity = network.consortium.identities[name]
        self._changes: dict[str, Callable[[m.Message, bytes], Sequence[bytes]]] = {}
        self._inner, network.tap = network.tap, self._tap

    def on(self, *kinds: str) -> Callable[[Hearing], Hearing]:
        """Decorate what is sent instead of a kind of message."""
        return lambda change: [self._changes.update({kind: change}) for kind in kinds] and change  # type: ignore[return-value]

    def sign(self, message: m.Message, body: m.AnyBody, tail: bytes = b"") -> bytes:
        """A body of our own, for the round and attempt of `message`."""
        return m.encode(
            self.identity, sealing.AttemptId(self.network.digest, message.round, message.attempt), body, tail
        )

    def _tap(self, sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        head = peek(data) if sender == self.name else None
        kind = type(head.body).__name__ if head is not None else ""
        if head is None or kind not in self._changes:
            return self._inner(sender, recipient, data)
        message = m.Message(head.sender, head.round, head.attempt, head.body, m._split(data)[1])
        return self._changes[kind](message, data)


@contextmanager
def behaving(names: Callable[[AttemptNode], bool], **methods: Callable[..., object]) -> Iterator[None]:
    """Let the attempts of some members have other methods; each gets the genuine method as its first argument."""
    genuine = {name: getattr(AttemptNode, name) for name in methods}

    def replaced(name: str) -> Callable[..., object]:
        def method(self: AttemptNode, *args: object) -> object:
            if names(self):
                return methods[name](genuine[name], self, *args)
            return genuine[name](self, *args)

        return method

    for name in methods:
        setattr(AttemptNode, name, replaced(name))
    try:
        yield
    finally:
        for name, method in genuine.items():
            setattr(AttemptNode, name, method)
