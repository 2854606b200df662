"""One attack under way: an attacker on the wire of a study, with the real keys of whom it plays.

Every honest party stays the real machine, with real keys and real messages. What the attacker plays is a real machine too, made to do
without the checks that protect others from it, and its messages are changed on the tap. It reads what an aggregator could read
(`Knowledge`), with the secrets of its colluders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import msgspec

from audit.attacks.knowledge import Address, Knowledge, peek
from audit.attacks.network import MemorySpool, Network, NotPlayed
from keys.errors import SecGeoError
from protocols import messages as m
from protocols import transcript as t
from protocols.attempt_aggregator import AttemptAggregator, Phase
from protocols.attempt_node import AttemptNode, Parties
from protocols.chain import Entry
from protocols.graph import MaskGraph
from protocols.key_dealing import KeyDealing
from protocols.messages import AGGREGATOR
from protocols.rings import make_ring
from protocols.sealing import AttemptId

Bodies = Iterable[tuple[m.AnyBody, bytes]]
Telling = Callable[[m.Message, str], Bodies]
"""What goes to a node instead of this message: bodies with their tails."""
Hearing = Callable[[m.Message, bytes], Sequence[bytes]]
"""What the aggregator's machine hears instead of this message."""

# --- the attacker's side of the machines


class LooseParties(Parties):
    """Parties as a malicious aggregator sees them: no minimum."""

    @property
    def minimum(self) -> int:
        """Any number will do."""
        return 1


class LooseGraph(MaskGraph):
    """A graph that nobody can cut apart."""

    def tolerates(self, survivors: object, colluders: int) -> bool:
        """Always."""
        return True


class LooseAttempt(AttemptAggregator):
    """An attempt whose aggregator does not mind what protects the nodes only."""

    def _dispatch(self, peer: str, message: m.Message, signed: bytes) -> Any:
        if isinstance(message.body, m.RoundKeys):
            self._last_record = message.body.last_record
        return super()._dispatch(peer, message, signed)

    def _on_seeds(self, peer: str, body: m.SealedSeeds, signed: bytes) -> None:
        own, self._cohort_digest = self._cohort_digest, body.cohort_digest
        try:
            super()._on_seeds(peer, body, signed)
        finally:
            self._cohort_digest = own

    def _on_upload_done(self, peer: str, body: m.UploadDone, signed: bytes) -> None:
        own, self._view = self._view, body.view
        try:
            super()._on_upload_done(peer, body, signed)
        finally:
            self._view = own

    def _close_uploads(self) -> Any:
        self._graph = LooseGraph(self._graph.order, self._graph.reach)
        return super()._close_uploads()


class LooseKeys(KeyDealing):
    """Whoever says that it holds a key has joined."""

    def joined(self, peer: str, body: m.Join, data: bytes) -> bool:
        """Whether a member has joined with a key."""
        if not super().joined(peer, body, data) and body.study_key != m.NO_KEY:
            self._wanting.pop(peer, None)
        return body.study_key != m.NO_KEY


class Accomplice(AttemptNode):
    """A colluder's attempt: it does whatever the aggregator says."""

    def _check(self, holds: bool, fault: str) -> None:
        pass


def turn(machine: object, kind: type) -> None:
    """Make a machine one of the attacker's."""
    machine.__class__ = kind


class Play:
    """One attack under way: an attacker on the wire of a study, with the keys of the `culprits`.

    `tell` sets what goes to nodes instead of a kind of message, `hear` what the aggregator's machine hears instead of one.
    """

    def __init__(self, network: Network, *culprits: str, colluders: Sequence[str] = ()) -> None:
        self.network, self.culprits, self.colluders = network, culprits or (AGGREGATOR,), tuple(colluders)
        self.knowledge = Knowledge(network, colluders)
        self._inner = network.tap
        self.honest = [name for name in network.names if name not in {*self.culprits, *colluders}]
        self.gave: list[str] = []
        self.took_place = False
        self.must_refuse: Collection[str] = ()
        self.must_sum: Collection[str] = ()
        self.must_be_put_out: Collection[str] = ()
        self.granted: Collection[str] = ()
        self.sent: list[tuple[str, Any]] = []
        """What honest nodes have said, whatever was heard of it: sender and head."""
        self.crashes: list[str] = []
        """Errors that are none of SecGeo's, or of the aggregator's machine, and studies that hang."""
        self.node_attempt: type[AttemptNode] | None = None
        """The attempts of a culprit that is a member."""
        self._telling: dict[str, Telling] = {}
        self._hearing: dict[str, Hearing] = {}
        self._loose = False
        network.tap = self._tap

    def tell(self, *kinds: str) -> Callable[[Telling], Telling]:
        """Decorate the change of what goes to nodes."""
        return lambda change: [self._telling.update({kind: change}) for kind in kinds] and change  # type: ignore[return-value]

    def hear(self, *kinds: str) -> Callable[[Hearing], Hearing]:
        """Decorate the change of what comes from nodes."""
        return lambda change: [self._hearing.update({kind: change}) for kind in kinds] and change  # type: ignore[return-value]

    def loosen(self) -> None:
        """The aggregator's own machine no longer checks what protects the nodes only."""
        self._loose = True
        turn(self.network.aggregator._keys, LooseKeys)
        parties = self.network.parties
        self.network.aggregator._parties = LooseParties(
            parties.agreement, parties.agreement_digest, parties.public_keys
        )

    def recruit(self, *names: str) -> None:
        """Members go over to the attacker, with the secrets of the attempt that they are in."""
        self.colluders = (*self.colluders, *names)
        self.honest = [name for name in self.honest if name not in names]
        for name in names:
            self.knowledge.corrupt(name)

    def say(self, to: str, address: Address, body: m.AnyBody, tail: bytes = b"") -> None:
        """Send a message of the aggregator's own; an attack took place."""
        self.took_place = True
        data = self.sign(AGGREGATOR, address, body, tail)
        self.knowledge.watch(AGGREGATOR, to, data)
        self.network.inject(AGGREGATOR, to, data)

    def sign(self, name: str, address: Address, body: m.AnyBody, tail: bytes = b"") -> bytes:
        """A message under somebody's real key."""
        return m.encode(self.network.identities[name], AttemptId(self.network.digest, *address), body, tail)

    def run(self, absent: Collection[str] = ()) -> Play:
        """Play it to the end. A study that hangs, or crashes, is noted.

        Raises:
            NotPlayed: it could not begin.
        """
        try:
            self.network.run(absent)
        except NotPlayed:
            raise
        except SecGeoError as error:
            self.crashes.append(f"{AGGREGATOR}: {type(error).__name__}: {error}"[:300])
        except Exception as error:  # whatever an attack provokes is evidence
            self.crashes.append(f"{type(error).__name__}: {error}"[:300])
        return self

    def has_sent(self, name: str, kind: type[m.Body], address: Address | None = None) -> bool:
        """Whether a node has sent such a message."""
        return any(
            sender == name and isinstance(head.body, kind) and address in (None, (head.round, head.attempt))
            for sender, head in self.sent
        )

    def gives(self, holds: bool, what: str) -> None:
        """Note what an honest party should not have done, if it did."""
        if holds:
            self.gave.append(what)

    def _tap(self, sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        head = peek(data)
        if head is None:
            return [data]
        message = m.Message(head.sender, head.round, head.attempt, head.body, m._split(data)[1])
        kind = type(head.body).__name__
        if sender != AGGREGATOR:
            self.knowledge.watch(sender, recipient, data)
            if sender in self.honest:
                self.sent.append((sender, head))
                self._inner(sender, recipient, data)  # who only listens
            attempt = self.network.nodes[sender]._attempt
            if attempt is not None and sender in self.colluders:
                turn(attempt, Accomplice)
            if attempt is not None and sender in self.culprits and self.node_attempt is not None:
                turn(attempt, self.node_attempt)
            return self._hearing[kind](message, data) if kind in self._hearing else [data]
        running = self.network.aggregator._attempt
        if kind == "AttemptOpen" and self._loose and running is not None:
            turn(running, LooseAttempt)
            running._parties = self.network.aggregator._parties
        sent = [data]
        if kind in self._telling:
            address = message.round, message.attempt
            bodies = list(self._telling[kind](message, recipient))
            if bodies != [(message.body, bytes(message.tail))]:
                self.took_place = True
                sent = [self.sign(AGGREGATOR, address, body, tail) for body, tail in bodies]
        for posted in sent:
            self.knowledge.watch(AGGREGATOR, recipient, posted)
        return sent


class PrivateAttempt:
    """One more attempt that the aggregator runs behind the back of its study machine."""

    def __init__(self, play: Play, address: Address, cohort: Iterable[str]) -> None:
        self._play, self.address = play, address
        network = play.network
        self.machine = AttemptAggregator(
            LooseParties(network.agreement, network.digest, network.parties.public_keys),
            AttemptId(network.digest, *address),
            cohort,
            network.size,
            MemorySpool(),
            ring=make_ring(network.agreement, network.ciphers),
            study_key=network.aggregator._keys.key,
        )
        turn(self.machine, LooseAttempt)
        self._carry(self.machine.start())

    def receive(self, message: m.Message, data: bytes) -> None:
        """What a node has sent into it."""
        self._carry(self.machine.receive(message.sender, message, data))

    def lose(self, *names: str) -> None:
        """Say that these have not uploaded, as soon as all others have."""
        if self.machine.phase is Phase.UPLOAD and not self.machine._missing() - set(names):
            self._carry(self.machine.expire())

    def _carry(self, sends: list[tuple[str, m.AnyBody]]) -> None:
        for to, body in sends:
            self._play.say(to, self.address, body)


def keep(message: m.Message) -> Bodies:
    """The message as it is."""
    return [(message.body, bytes(message.tail))]


def record_bodies(lines: Iterable[bytes]) -> list[t.Body]:
    """What stands in the lines of a transcript."""
    return [msgspec.json.decode(line, type=Entry[t.Body]).body for line in lines]


def instead(play: Play, kind: str, change: Hearing, rounds: Collection[int] = (1,)) -> None:
    """The liar sends something else instead of a kind of message."""

    @play.hear(kind)
    def lie(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender not in play.culprits or message.round not in rounds:
            return [data]
        play.took_place = True
        return change(message, data)


def replaced(play: Play, message: m.Message, body: m.AnyBody, tail: bytes = b"") -> list[bytes]:
    """Another message in the place of this one, under its sender's real key."""
    return [play.sign(message.sender, (message.round, message.attempt), body, tail)]


def listed(names: Iterable[str]) -> str:
    """Names in one line."""
    return ", ".join(names)
