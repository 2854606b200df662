"""One hospital's side of a whole study.

Sans-IO: `receive` takes what the aggregator sent and gives outputs for the driver to carry out in order. The driver answers
`Train` with `submit`. The node trusts nothing that the aggregator says: parameters come from the pinned agreement, identities
from the roster, rounds only move forward, and in a round in which it has voted it takes part in no sum but that of the same nodes
with the same updates, should a crash have cost the attempt.

What the journal guarantees across crashes: an attempt that was begun is never begun again, because every (round, attempt)
must be later than the last one journalled; seeds of masks live in memory only, so no mask is ever used twice. The tag seed
of an attempt is kept, so that a restarted node can still check the sum. Every record that the aggregator signs is kept:
two of one round prove that it told two stories.

Where uploads are encrypted, all hospitals hold one study key (`protocols.study_key`). The first one makes it when it is asked to,
and whoever holds it seals it to those who ask; a node takes part in no round without it.

A sum is accepted when its tags match. A node that took no part in the attempt has no tag seed; it accepts the sum on the
countersignatures of more contributors than may collude.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label
from protocols import messages as m
from protocols import sealing, tags
from protocols import transcript as t
from protocols.attempt_node import AttemptNode, Ballot, Parties, State
from protocols.ciphertexts import FrameBroken
from protocols.encoding import Data, FixedPoint, Float64Vector, Uint32Vector
from protocols.packing import Packing, choose
from protocols.prg import TAG_PRIME
from protocols.rings import Ciphers, Ring, Total, make_ring, octets
from protocols.sealing import AttemptId
from protocols.shamir import Coins
from protocols.study_key import Box, StudyKey
from protocols.workers import spread

MAX_REPEATS = 16
"""How often a sum may arrive incomplete, or before the one that we lack, over one connection before the aggregator is blamed."""


class Journal(Protocol):
    """Durable memory of what this node has used and was told; each call returns only when the entry is on disk."""

    def last(self) -> tuple[int, int]:
        """The latest (round, attempt) that was begun, (0, 0) if none."""

    def ballot(self, round_number: int) -> bytes:
        """What we voted for in this round, empty if we have not."""

    def record(self, round_number: int, attempt: int, event: str, note: bytes = b"") -> None:
        """Note "begun", "used" (with the attempt's tag seed) or "voted" (with the ballot)."""

    def tag_seed(self, round_number: int, attempt: int) -> bytes:
        """The tag seed of an attempt, empty if this node does not know it."""

    def keep_receipt(self, round_number: int, line: bytes) -> None:
        """Keep a record that the aggregator signed."""

    def receipt(self, round_number: int) -> bytes:
        """The first record of this round that was kept, empty if none."""

    def keep_study_key(self, secret: bytes) -> None:
        """Keep the study key, instead of one that was kept before."""

    def study_key(self) -> bytes:
        """The study key that was kept, empty if none."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes to the aggregator."""

    data: Data = field(repr=False)


@dataclass(frozen=True, slots=True)
class Train:
    """Train this round and call `submit` with the update vector."""

    round: int


@dataclass(frozen=True, slots=True)
class Summed:
    """A round's sum ([d] float64) of `contributors` nodes, checked against the signed record `line`."""

    round: int
    total: Float64Vector = field(repr=False)
    contributors: tuple[str, ...]
    line: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RoundLost:
    """An attempt or (if `final`) a round came to nothing. The model stays as it was."""

    round: int
    reason: str
    final: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """The study is over."""

    reason: str


Output = Send | Train | Summed | RoundLost | Ended


class NodeMachine:
    """Takes part in one study.

    Args:
        parties: agreement and identity keys of the members.
        identity: our own identity; must be a member.
        aggregator: the aggregator's roster name and identity key.
        vector_size: values per update, d.
        coins: randomness, `os.urandom` outside tests.
        journal: what this node has used before.
        completed: the last round whose sum this node had applied before a restart.
        ciphers: for agreements by which uploads are encrypted.
    """

    def __init__(
        self,
        parties: Parties,
        identity: Identity,
        aggregator: tuple[str, Ed25519PublicKey],
        vector_size: int,
        *,
        coins: Coins,
        journal: Journal,
        completed: int = 0,
        ciphers: Ciphers | None = None,
    ) -> None:
        parties.agreement.member(identity.node_id)
        self._parties, self._identity, self._size = parties, identity, vector_size
        self._aggregator_name, self._aggregator_key = aggregator
        self._coins, self._journal = coins, journal
        self._fixed_point = FixedPoint.from_agreement(parties.agreement)
        self._round = 0
        self._completed = completed
        self._vector: Float64Vector | None = None
        self._training = False
        self._attempt: AttemptNode | None = None
        self._attempt_number = 0
        self._voted: dict[tuple[int, int], tuple[tuple[str, bytes], ...]] = {}
        self._ciphers = ciphers
        self._encrypted = parties.agreement.secure_sum.encrypted
        self._box = Box(coins, parties.agreement_digest) if self._encrypted else None
        self._study_key: StudyKey | None = None
        self._made_ring: Ring | None = None
        if kept := journal.study_key():
            self._study_key = StudyKey(kept)
        self._sum: Total | None = None
        self._sum_round, self._sum_chunks = 0, 0
        self._asked_again, self._reconnected = 0, False
        self._newest = completed
        self._abandoned = journal.last()
        self.ended = False

    @property
    def finished(self) -> bool:
        """Whether the agreement's last round is summed, so that nothing more is to come."""
        return self._completed == self._parties.agreement.study.rounds

    def rejoin(self) -> list[Output]:
        """After a lost connection: say that we are here, and leave an attempt in which our upload is not whole."""
        self._asked_again, self._reconnected = 0, True  # What a lost connection cuts short is nobody's fault.
        if self._attempt is not None and not self._attempt.uploaded:
            self._attempt, self._abandoned = None, (self._round, self._attempt_number)
        return self.start()

    def start(self) -> list[Output]:
        """Say that we are here, and countersign again what we applied last: the first time may be lost."""
        line = self._journal.receipt(self._completed)
        again = [self._countersign(self._completed, line)] if line else []
        return [self._join(), *again]

    def _join(self) -> Send:
        if self._box is None:
            return self._send(m.Join(self._completed + 1), 0, 0)
        held = m.NO_KEY if self._study_key is None else self._study_key.id
        return self._send(m.Join(self._completed + 1, held, self._box.public), 0, 0)

    def submit(self, round_number: int, vector: Float64Vector) -> list[Output]:
        """Hand in the update of a round ([d] float64) after `Train`.

        Raises:
            LocalProtocolError: nobody asked for it, or it is not a finite vector of the agreed size.
        """
        if not self._training or round_number != self._round:
            raise LocalProtocolError(f"an update for round {round_number} was submitted, but none is asked for")
        if vector.shape != (self._size,):
            raise LocalProtocolError(f"the update has shape {vector.shape}, the agreement says ({self._size},)")
        self._fixed_point.check(vector)
        ballot = self._ballot(round_number)
        if ballot is not None and ballot != Ballot.of(ballot.nodes, vector):
            raise LocalProtocolError(
                f"we have voted in round {round_number} with another update than the one that was submitted; "
                "put back the state folder as it was"
            )
        self._training, self._vector = False, vector
        return [self._send(m.Ready(), self._round, 0)]

    def decline(self, reason: str) -> list[Output]:
        """Leave the study in good order (a spent budget, say)."""
        self.ended = True
        return [self._send(m.Declined(reason), self._round, 0)]

    def receive(self, data: bytes) -> list[Output]:
        """Take one message of the aggregator.

        Raises:
            RemoteProtocolError: the aggregator, or the peer that it names, broke the protocol. Nothing was revealed beyond
                what the rules allow, and the node must leave the study.
            VerificationFailed: the sum is not the sum of what the members sent; it was not applied.
        """
        if self.ended:
            return []
        message = m.decode(
            data, m.AGGREGATOR, self._aggregator_key, self._parties.agreement_digest, name=self._aggregator_name
        )
        body = message.body
        match body:
            case m.DealKey():
                return self._on_deal(body)
            case m.DealtKey():
                return self._on_dealt(body)
            case m.RoundOpen():
                return self._on_round(message.round, body)
            case m.AttemptOpen():
                return self._on_attempt(message.round, message.attempt, body)
            case m.SumChunk():
                return self._on_sum_chunk(message.round, body, message.tail)
            case m.RoundResult():
                return self._on_result(message.round, body)
            case m.AttemptFailed():
                return self._on_failed(message.round, message.attempt, body)
            case m.StudyEnded():
                return self._on_ended(message.round, body)
            case m.KeySet() | m.SeedSet() | m.Credit() | m.Survivors() | m.SurvivorProof():
                return self._on_attempt_body(message.round, message.attempt, body)
            case _:
                raise RemoteProtocolError(m.AGGREGATOR, f"sent {type(body).__name__}, which only nodes send")

    # --- the study key

    @property
    def _packing(self) -> Packing:
        agreement = self._parties.agreement
        return choose(agreement.secure_sum.value_bits, len(agreement.members))

    @property
    def _ring(self) -> Ring:
        """Made when it is first used, with processes for ciphers; from then on the study key stays."""
        if self._made_ring is None:
            key = b"" if self._study_key is None else self._study_key.secret
            self._made_ring = make_ring(self._parties.agreement, self._ciphers, key)
        return self._made_ring

    @property
    def _key_in_use(self) -> bool:
        """Whether a round was begun under the study key, in this life or in one before."""
        begun = self._completed or self._round or self._journal.last() > (0, 0)
        return self._study_key is not None and (bool(begun) or self._made_ring is not None)

    def _adopt(self, key: StudyKey) -> None:
        self._journal.keep_study_key(key.secret)
        self._study_key, self._made_ring = key, None

    def _on_deal(self, body: m.DealKey) -> list[Output]:
        """Seal the key to the members who ask for it; make it first, if we are to and have none."""
        self._check(self._encrypted, "asked for a study key in a study that has none")
        self._check(body.make or self._study_key is not None, "asked for a study key that we do not have")
        me, key = self._identity.node_id, self._study_key or self._make_key()
        answer: list[Output] = [self._join()] if body.make else []
        for data in body.joins:
            join, name = self._open_member(data)
            self._check(isinstance(join, m.Join), f"relayed a {type(join).__name__} of {name} instead of Join")
            if not isinstance(join, m.Join):
                raise LocalProtocolError("unreachable")
            try:
                sealed = key.seal(join.box, self._parties.agreement_digest, me, name)
            except sealing.SealBroken:
                continue  # Its own fault, and its own loss.
            answer.append(self._send(m.SealedKey(name, key.id, sealed), 0, 0))
        return answer

    def _make_key(self) -> StudyKey:
        self._check(not self._completed, "asked for a new study key in the midst of a study")
        if self._ciphers is None:
            raise LocalProtocolError("there are no ciphers to make a study key for")
        key = StudyKey(self._ciphers.generate_key(self._packing.parameters))
        self._adopt(key)
        return key

    def _on_dealt(self, body: m.DealtKey) -> list[Output]:
        """Take the key that another hospital has sealed to us. None is changed once a round was opened under it."""
        self._check(self._box is not None, "brought a study key to a study that has none")
        sealed, dealer = self._open_member(body.message)
        self._check(isinstance(sealed, m.SealedKey), f"relayed a {type(sealed).__name__} of {dealer} instead of a key")
        if not isinstance(sealed, m.SealedKey) or self._box is None:
            raise LocalProtocolError("unreachable")
        me = self._identity.node_id
        self._check(sealed.recipient == me, f"brought a study key that {dealer} sealed to {sealed.recipient}")
        if self._study_key is not None and sealed.key_id == self._study_key.id:
            return [self._join()]
        if self._key_in_use:
            return []
        try:
            key = self._box.open(sealed.sealed, dealer, me, sealed.key_id)
        except sealing.SealBroken:  # sealed to our life before a restart, say
            return [self._join()]
        if self._ciphers is None or not self._ciphers.is_key(self._packing.parameters, key.secret):
            return [self._join()]  # We ask again, and another one deals.
        self._adopt(key)
        return [self._join()]

    def _open_member(self, data: bytes) -> tuple[m.AnyBody, str]:
        """What a member has signed outside of rounds and the aggregator brings."""
        name = m.claimed_sender(data)
        public_key = self._parties.public_keys.get(name)
        self._check(public_key is not None, "relayed a message of a stranger")
        if public_key is None:
            raise LocalProtocolError("unreachable")
        try:
            return m.decode(data, name, public_key, self._parties.agreement_digest).body, name
        except RemoteProtocolError:
            raise RemoteProtocolError(m.AGGREGATOR, f"relayed a message that {name} never signed") from None

    # --- rounds and attempts

    def _on_round(self, number: int, body: m.RoundOpen) -> list[Output]:
        self._check(
            1 <= number <= self._parties.agreement.study.rounds, "opened a round that the agreement does not have"
        )
        if number == self._round and body.last_completed == self._completed:
            # Said again after a reconnect: our answer may be lost.
            return [] if self._vector is None else [self._send(m.Ready(), number, 0)]
        self._check(number > max(self._round, self._completed), f"went back to round {number}")
        self._check(not self._encrypted or self._study_key is not None, "opened a round before we had the study key")
        self._check(not self._training, "opened a round while we train for another")
        if body.last_completed > self._completed:
            return self.start()  # We missed a sum; ask for it, and the round is opened to us again.
        self._check(body.last_completed == self._completed, "forgot a completed round")
        self._round, self._attempt_number, self._vector, self._attempt = number, 0, None, None
        self._training = True
        return [Train(number)]

    def _on_attempt(self, number: int, attempt: int, body: m.AttemptOpen) -> list[Output]:
        if not self._round:
            return []  # Meant for our life before a restart; the round is opened to us again when our joining has arrived.
        self._check(number == self._round, f"opened an attempt of round {number} during round {self._round}")
        self._check(self._vector is not None, "opened an attempt before we were ready")
        self._check(attempt > self._attempt_number, "opened an old attempt again")
        self._check(attempt <= self._parties.agreement.secure_sum.max_attempts, "opened more attempts than agreed")
        self._check((number, attempt) > self._journal.last(), "opened an attempt again that we began before a restart")
        if self._vector is None:
            raise LocalProtocolError("no update to sum")
        self._attempt_number, self._reconnected = attempt, False
        self._attempt = AttemptNode(
            self._parties,
            self._identity,
            AttemptId(self._parties.agreement_digest, number, attempt),
            body.cohort,
            self._vector,
            ring=self._ring,
            study_key=self._study_key,
            coins=self._coins,
            journal=lambda event, note: self._journal.record(number, attempt, event, note),
            last_record=self._last_record,
            ballot=self._ballot(number),
        )
        self._journal.record(number, attempt, "begun")
        return [Send(data) for data in self._attempt.open()]

    def _on_attempt_body(self, number: int, attempt: int, body: m.AnyBody) -> list[Output]:
        if not self._round or (number, attempt) <= self._abandoned:
            return []  # Meant for our life before a restart, or we left it with a lost connection; its messages may still come.
        if self._reconnected and (self._attempt is None or (number, attempt) > (self._round, self._attempt_number)):
            return []  # It was opened to our old connection.
        self._check(
            self._attempt is not None and (number, attempt) == (self._round, self._attempt_number),
            f"sent {type(body).__name__} for an attempt that is not open",
        )
        if self._attempt is None:
            raise LocalProtocolError("no attempt is open")
        sends: list[Output] = [Send(data) for data in self._attempt.receive(body)]
        if self._attempt.state is State.VOTED:
            self._voted[number, attempt] = self._attempt.survivors
        return sends

    def _on_failed(self, number: int, attempt: int, body: m.AttemptFailed) -> list[Output]:
        if (number, attempt) < (self._round, self._attempt_number):
            return []
        self._attempt = None
        if body.final:
            self._vector = None
            self._training = False
        return [RoundLost(number, body.reason, body.final)]

    # --- results

    def _on_sum_chunk(self, number: int, body: m.SumChunk, data: memoryview) -> list[Output]:
        if number != self._sum_round or body.index == 0:  # a sum is sent again from its start after a reconnect
            self._sum_round, self._sum_chunks = number, 0
            self._sum = self._ring.zeros(self._size)
        if self._sum is None or body.index != self._sum_chunks:
            return []  # Chunks were lost with a connection; the result will find the sum too short, and ask again.
        start = body.index * self._ring.sum_chunk_values
        self._check(start < self._size, "sent a chunk that no sum has")
        try:
            self._ring.unpack_sum(self._sum, start, data)
        except FrameBroken:
            raise RemoteProtocolError(m.AGGREGATOR, "sent a chunk that no sum has") from None
        self._sum_chunks += 1
        return []

    def _on_result(self, number: int, body: m.RoundResult) -> list[Output]:
        chunks = -(-self._size // self._ring.sum_chunk_values)
        total, whole = self._sum, number == self._sum_round and self._sum_chunks == chunks
        self._sum, self._sum_round, self._sum_chunks = None, 0, 0
        record = self._read_record(number, body.record)
        self._newest = max(self._newest, number)
        if number <= self._completed:
            # Only what we applied is countersigned, not a round that we were made to take for lost.
            return [self._countersign(number, body.record)] if number == self._completed else []
        if total is None or not whole or not self._follows(record):
            self._asked_again += 1
            self._check(self._asked_again <= MAX_REPEATS, "keeps sending sums that are incomplete, or not the next one")
            return self.start()
        self._check(
            t.aggregate_digest(octets(total)).hex() == record.aggregate_digest,
            "sent a sum that its record does not vouch for",
        )
        values = self._ring.open(total, self._size)
        if not self._check_tags(record, body, values):
            self._asked_again = 0  # Whole, and the next one: members owe receipts, the aggregator nothing.
            return []  # Not yet. We ask again when the next round is opened.
        decoded = self._fixed_point.decode(values, len(record.survivors))
        caught_up = number == self._round
        self._completed, self._asked_again = number, 0
        self._attempt, self._vector = None, None
        contributors = tuple(survivor.node_id for survivor in record.survivors)
        summed: list[Output] = [
            Summed(number, decoded, contributors, body.record),
            self._countersign(number, body.record),
        ]
        return summed if caught_up else [*summed, *self.start()]  # There may be more that we missed.

    def _on_ended(self, number: int, body: m.StudyEnded) -> list[Output]:
        if self._newest > self._completed and self._asked_again < MAX_REPEATS:
            self._asked_again += 1
            return self.start()  # There is a sum that we lack.
        self.ended = True
        return [self._send(m.Farewell(), number, 0), Ended(body.reason)]

    def _follows(self, record: t.RoundRecord) -> bool:
        """Whether a sum builds on the one that we applied last."""
        return record.builds_on == self._last_record.hex()

    def _read_record(self, number: int, line: bytes) -> t.RoundRecord:
        """Verify the record of a round, and keep it."""
        try:
            record = t.read_line(line, self._aggregator_key).body
        except VerificationFailed as error:
            raise RemoteProtocolError(m.AGGREGATOR, f"sent a record that does not verify: {error}") from None
        if not isinstance(record, t.RoundRecord):
            raise RemoteProtocolError(m.AGGREGATOR, "sent another kind of record as a round's result")
        self._check(record.round == number, "sent the record of another round")
        begun_round, begun_attempt = self._journal.last()
        self._check(
            number != begun_round or record.attempt >= begun_attempt,
            "recorded an attempt that it had given up for another one",
        )
        kept = self._journal.receipt(number)
        if kept != line:
            self._journal.keep_receipt(number, line)
        self._check(
            kept in (b"", line), f"signed two different records of round {number}; both are in our receipts, as proof"
        )
        held = "" if self._study_key is None else self._study_key.id.hex()
        self._check(record.study_key == held, "sent a record of a sum under another study key than ours")
        try:
            t.verify_round(record, self._parties.agreement, self._parties.agreement_digest, self._parties.public_keys)
        except VerificationFailed as error:
            raise RemoteProtocolError(m.AGGREGATOR, str(error)) from None
        survivors = tuple((s.node_id, bytes.fromhex(s.upload_digest)) for s in record.survivors)
        self._check(
            self._voted.get((number, record.attempt), survivors) == survivors,
            "recorded another survivor set than the one we voted for",
        )
        return record

    def _check_tags(self, record: t.RoundRecord, body: m.RoundResult, total: Uint32Vector) -> bool:
        """Whether the sum is confirmed: by its tags, or for a node that has no tag seed by enough contributors."""
        attempt = AttemptId(self._parties.agreement_digest, record.round, record.attempt)
        seed, pads = self._journal.tag_seed(record.round, record.attempt), 0
        if self._study_key is not None and not self._parties.agreement.secure_sum.masked:
            seed = self._study_key.tag_seed(attempt)
            pads = sum(self._study_key.tag_pad(attempt, survivor.node_id) for survivor in record.survivors)
        if not seed:
            needed = self._parties.agreement.colluders_tolerated + 1
            statement = t.receipt_statement(self._parties.agreement_digest, record.round, t.line_digest(body.record))
            contributors = {survivor.node_id for survivor in record.survivors}
            signers = {name for name, _ in body.receipts} & contributors
            for name, signature in body.receipts:
                try:
                    verify_signature(self._parties.public_keys[name], Label.RECEIPT, statement, signature)
                except (KeyError, VerificationFailed):
                    raise RemoteProtocolError(m.AGGREGATOR, f"sent a receipt that {name} never signed") from None
            return len(signers) >= needed
        tagger = tags.Tagger(seed, attempt)
        step = self._parties.agreement.secure_sum.chunk_values
        parts = spread(lambda start: tagger.part(total[start : start + step], start), range(0, self._size, step))
        expected = (sum(parts) + len(record.survivors) * tagger.pad + pads) % TAG_PRIME
        if not sealing.same(record.aggregate_tag.encode(), expected.to_bytes(8).hex().encode()):
            raise VerificationFailed(
                f"the sum of round {record.round} does not match its tags and was not applied: "
                "the aggregator changed it, or a member sent a false tag; keep the receipts and ask for an audit"
            )
        return True

    def _countersign(self, number: int, line: bytes) -> Send:
        statement = t.receipt_statement(self._parties.agreement_digest, number, t.line_digest(line))
        return self._send(m.Receipt(self._identity.sign(Label.RECEIPT, statement)), number, 0)

    # --- helpers

    def _ballot(self, number: int) -> Ballot | None:
        kept = self._journal.ballot(number)
        return msgspec.msgpack.decode(kept, type=Ballot) if kept else None

    @property
    def _last_record(self) -> bytes:
        line = self._journal.receipt(self._completed)
        return t.line_digest(line) if line else m.NO_RECORD

    def _send(self, body: m.AnyBody, number: int, attempt: int) -> Send:
        return Send(m.encode(self._identity, AttemptId(self._parties.agreement_digest, number, attempt), body))

    def _check(self, holds: bool, fault: str) -> None:
        if not holds:
            raise RemoteProtocolError(m.AGGREGATOR, fault)
