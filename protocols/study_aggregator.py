"""The aggregator's side of a whole study: rounds, attempts, transcript.

Sans-IO: `receive` takes what an authenticated peer sent, `tick` the time; both give outputs for the driver to carry out in
order. Stages of one round:

    GATHER -> TRAIN -> SUM (one or more attempts) -> RECEIPTS -> TRAIN ... -> FAREWELL -> ENDED

Every stage has a deadline, so no silent node holds up a round for longer. A node that breaks a rule is named in the
transcript and takes no further part. Once nodes may have voted for survivors, nobody else is summed in that round, in whatever
attempt: two sums over different survivors of the same vectors would differ by one node's vector.

After a crash `resume` begins at GATHER again and then goes on where the transcript and the kept state say: an attempt whose
uploads were closed is completed; one that had not come so far is given up for a new one with fresh seeds. So is one that too many
nodes cannot complete since they crashed: then all its survivors are waited for.

Where uploads are encrypted, a member has joined when it holds the study key. If nobody holds one, a member is asked to make it, and
to seal it to the others; later a holder seals it to whoever lacks it. The aggregator carries the seals and can open none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from keys.errors import RemoteProtocolError, VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label
from protocols import messages as m
from protocols import transcript as t
from protocols.attempt_aggregator import AttemptAggregator, ClosedAttempt, Phase, Spool, SumOutcome
from protocols.attempt_node import Parties
from protocols.key_dealing import KeyDealing
from protocols.rings import Ciphers, Total, make_ring, octets
from protocols.sealing import AttemptId

MAX_REPEATED_JOINS = 64
"""So often in a round a node may ask for the same again; each time costs us one sum."""


class Stage(Enum):
    """Where the study stands."""

    GATHER = auto()
    TRAIN = auto()
    SUM = auto()
    RECEIPTS = auto()
    FAREWELL = auto()
    ENDED = auto()


@dataclass(frozen=True, slots=True)
class SendTo:
    """Send these bytes to this node; if it cannot be reached, call `leave`."""

    peer: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Record:
    """Append this line to the transcript, durably, before the next output is carried out."""

    line: bytes


@dataclass(frozen=True, slots=True)
class Begun:
    """Note durably that this attempt was begun, before the next output is carried out: its number is used up."""

    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class UploadsClosed:
    """Keep this durably, before the next output is carried out: nodes are asked to vote or to unmask, and then sum nobody else."""

    state: ClosedAttempt
    masked: Total = field(repr=False)


@dataclass(frozen=True, slots=True)
class SumOpened:
    """Keep this round's sum: its digest is in the record that follows."""

    round: int
    total: Total = field(repr=False)


@dataclass(frozen=True, slots=True)
class Progress:
    """Something an operator wants to see; `fields` are plain values."""

    event: str
    fields: dict[str, object]


Output = SendTo | Record | Begun | UploadsClosed | SumOpened | Progress

Receipts = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a crashed aggregator had kept: its transcript, attempts used per round, and the attempt whose uploads were closed."""

    transcript: tuple[tuple[t.Body, bytes], ...]
    attempts: Mapping[int, int]
    closed: tuple[ClosedAttempt, Total] | None


class AggregatorMachine:
    """Runs one study.

    Args:
        parties: agreement and identity keys of the members.
        identity: the aggregator's own identity, as in the roster.
        vector_size: values per update, d.
        transcript: the writer that makes signed, chained lines.
        load_sum: gives back the sum of a completed round (flat), for nodes that missed it.
        spool: keeps unfinished uploads.
        ciphers: for agreements by which uploads are encrypted.
    """

    def __init__(
        self,
        parties: Parties,
        identity: Identity,
        vector_size: int,
        transcript: t.TranscriptWriter,
        *,
        load_sum: Callable[[int], Total],
        spool: Spool,
        ciphers: Ciphers | None = None,
    ) -> None:
        self._parties, self._identity, self._size = parties, identity, vector_size
        self._transcript, self._load_sum, self._spool = transcript, load_sum, spool
        self._agreement = parties.agreement
        self._ring = make_ring(parties.agreement, ciphers)
        self._joined: set[str] = set()
        self._keys = KeyDealing()
        self._waited_enough = False
        self._out: dict[str, str] = {}
        self._records: dict[int, tuple[bytes, Receipts]] = {}
        self._round = 0
        self._attempts: dict[int, int] = {}
        self._ready: set[str] = set()
        self._trained: set[str] = set()
        """Who has said in this round that it has an update, also if it is away for the moment."""
        self._voted_on: dict[int, frozenset[str]] = {}
        """By round: the survivors for whom somebody may have voted. Nobody else is summed in that round."""
        self._overtime = False
        """Whether too few were ready in time, and those who are missing are waited for, once."""
        self._chunks: tuple[int, list[bytes]] = 0, []
        """The messages of the sum that was sent last, and of which round: all nodes that it is for share them."""
        self._attempt: AttemptAggregator | None = None
        self._attempt_phase = Phase.KEYS
        self._contributors: frozenset[str] = frozenset()
        self._record_line = b""
        self._resume_at = Stage.TRAIN
        self._farewells_due: set[str] = set()
        self._receipts: dict[str, bytes] = {}
        self._received_bytes = self._sent_bytes = 0
        self._round_started = 0.0
        self._deadline = 0.0
        self._end_reason = ""
        self._joins: Counter[str] = Counter()
        self._asked_for: dict[str, int] = {}
        self._taking_part: set[str] = set()
        self.stage = Stage.GATHER

    @property
    def ended(self) -> bool:
        """Whether the study is over."""
        return self.stage is Stage.ENDED

    @property
    def deadline(self) -> float:
        """When `tick` must be called at the latest."""
        return self._deadline

    def start(self, now: float) -> list[Output]:
        """Open the transcript and wait for hospitals."""
        self._deadline = now + self._agreement.deadlines.join_seconds
        roster = self._agreement.roster
        opened = t.StudyOpened(
            study_id=self._agreement.study.id,
            agreement_digest=self._parties.agreement_digest.hex(),
            roster_digest=roster.digest,
            roster_epoch=roster.epoch,
            roster_version=roster.version,
        )
        return [Record(self._transcript.append(opened))]

    def resume(self, kept: Kept, now: float) -> list[Output]:
        """Instead of `start`, after a crash: wait for the hospitals to come back, then go on."""
        self._deadline = now + self._agreement.deadlines.join_seconds
        self._attempts = dict(kept.attempts)
        for body, line in kept.transcript:
            match body:
                case t.RoundRecord():
                    self._round, self._record_line = body.round, line
                    self._contributors = frozenset(survivor.node_id for survivor in body.survivors)
                    self._records[body.round] = line, ()
                    self._taking_part |= set(body.cohort)
                    self._keys.key = bytes.fromhex(body.study_key)
                    self._resume_at = Stage.RECEIPTS
                case t.RoundAbandoned():
                    self._round, self._resume_at = body.round, Stage.TRAIN
                case t.Receipts():
                    signed = tuple((c.node_id, bytes.fromhex(c.signature)) for c in body.countersignatures)
                    self._records[body.round], self._resume_at = (self._record_line, signed), Stage.TRAIN
                case t.Misbehaved():
                    self._out[body.node_id] = body.fault
                case t.StudyClosed():
                    self.stage, self._end_reason = Stage.FAREWELL, body.reason
                    self._farewells_due = {m.node_id for m in self._agreement.members} - self._out.keys()
                    self._deadline = now + self._agreement.deadlines.train_seconds
        if kept.closed is not None and kept.closed[0].round == self._round + 1:
            state, masked = kept.closed
            self._keys.key = state.study_key
            self._voted_on[state.round] = frozenset(name for name, _ in state.survivors)
            if kept.attempts.get(state.round, 0) > state.attempt:
                return self._resumed  # It was given up for another attempt, which is begun anew.
            self._round += 1
            self._trained |= self._voted_on[state.round]
            self._attempt = AttemptAggregator.resume(
                self._parties, state, masked, self._size, self._spool, ring=self._ring, last_record=self._last_record
            )
            self._attempt_phase, self._resume_at = self._attempt.phase, Stage.SUM
        return self._resumed

    @property
    def _resumed(self) -> list[Output]:
        return [Progress("resumed", {"round": self._round, "completed": len(self._records)})]

    def receive(self, peer: str, data: bytes, now: float) -> list[Output]:
        """Take one message of the transport-authenticated `peer`. Nothing that a peer sends raises."""
        self._received_bytes += len(data)
        if self.ended or peer in self._out or peer not in self._parties.public_keys:
            return []
        try:
            message = m.decode(data, peer, self._parties.public_keys[peer], self._parties.agreement_digest)
            return self._dispatch(peer, message, data, now)
        except RemoteProtocolError as fault:
            return self._expel(peer, str(fault), now)

    def leave(self, peer: str, now: float) -> list[Output]:
        """The transport cannot reach `peer` any more. It may join again later."""
        self._keys.left(peer)
        if peer not in self._joined:
            return []
        self._joined.discard(peer)
        self._ready.discard(peer)
        return [Progress("left", {"node": peer}), *self._ask_dealer(), *self._lose(peer, now)]

    def tick(self, now: float) -> list[Output]:
        """Time has passed."""
        if self.ended or now < self._deadline:
            return []
        match self.stage:
            case Stage.GATHER if self._lacks_key:
                self._waited_enough = True
                return self._have_key_made(now)
            case Stage.GATHER if len(self._joined) < self._parties.minimum:
                came = "are left" if self._round else "joined before the deadline"
                return self._end(f"too few hospitals {came}", now)
            case Stage.GATHER:
                return self._gathered(now)
            case Stage.TRAIN:
                return self._begin_sum(now)
            case Stage.FAREWELL:
                self.stage = Stage.ENDED
                return []
            case Stage.SUM if self._attempt is not None:
                self._deadline = now + self._agreement.deadlines.phase_seconds
                return self._carry(self._attempt.expire(), now)
            case _:
                return self._close_round(now)

    def stop(self, reason: str, now: float) -> list[Output]:
        """End the study early, by the operator's wish: no longer wait for those who are away, nor long for the others."""
        answer = self._record_receipts() if self.stage is Stage.RECEIPTS else []
        if self.stage not in (Stage.FAREWELL, Stage.ENDED):
            answer += self._end(reason, now)
        self._deadline = min(self._deadline, now + self._agreement.deadlines.phase_seconds)
        self._await_farewells(self._farewells_due & self._joined)
        return answer

    # --- dispatch

    def _dispatch(self, peer: str, message: m.Message, data: bytes, now: float) -> list[Output]:
        body = message.body
        match body:
            case m.Join():
                return self._on_join(peer, body, data, now)
            case m.SealedKey():
                return self._on_sealed_key(peer, body, data)
            case m.Declined():
                return self._on_declined(peer, body, now)
            case m.Farewell():
                return self._on_farewell(peer)
            case m.Receipt():
                return self._on_receipt(peer, message.round, body, now)
        if self.stage in (Stage.GATHER, Stage.FAREWELL):
            return []  # After a crash of ours a node may be ahead of us; it is asked again.
        here, there = (self._round, self._attempts.get(self._round, 0)), (message.round, message.attempt)
        match body:
            case m.Ready():
                here, there = (self._round, 0), (message.round, 0)
        if there < here or peer not in self._joined:
            return []  # Late, or it was under way when the connection was given up.
        if there > here:
            raise RemoteProtocolError(peer, f"sent {type(body).__name__} for a round or attempt that is not open")
        match body:
            case m.Ready():
                return self._on_ready(peer, now)
            case _ if self.stage is Stage.SUM and self._attempt is not None:
                return self._carry(self._attempt.receive(peer, message, data), now)
            case _:
                return []

    def _on_join(self, peer: str, body: m.Join, data: bytes, now: float) -> list[Output]:
        if body.next_round > self._agreement.study.rounds + 1:
            raise RemoteProtocolError(peer, f"asked for round {body.next_round}, which the agreement does not have")
        if body.next_round > self._asked_for.get(peer, 0):
            self._asked_for[peer], self._joins[peer] = body.next_round, 0
        self._joins[peer] += 1
        if self._joins[peer] > MAX_REPEATED_JOINS:
            return []  # No fault: whose connection is cut again and again is not to blame for it.
        if self._agreement.secure_sum.encrypted and not self._keys.joined(peer, body, data):
            return [*self.leave(peer, now), *self._want_key(peer, now)]
        answer: list[Output] = []
        # Before the attempt goes on without it: a sum that this opens is sent to all who have joined, and is not stored yet.
        missed = [number for number in sorted(self._records) if number >= body.next_round]
        if peer not in self._joined:
            self._joined.add(peer)
            self._taking_part.add(peer)
            answer.append(Progress("joined", {"node": peer, "joined": len(self._joined)}))
            answer += self._ask_dealer()
        if self.stage is Stage.SUM and self._attempt is not None:
            if self._round in self._voted_on:
                self._ready.discard(peer)  # It may have started again: should another attempt be needed, it says so.
            answer += self._carry(self._attempt.rejoin(peer), now)
        if missed:
            answer += self._missed_sum(peer, missed[0])  # It asks for the next when it has applied this one.
        if self._collecting and body.next_round > self._round and peer not in self._receipts:
            answer.append(
                self._send(peer, m.RoundResult(self._record_line), self._round, 0)
            )  # Its receipt may be lost.
        everybody = len(self._joined) == len(self._left)
        enough = self._waited_enough and not self._keys.wanting and len(self._joined) >= self._parties.minimum
        if self.stage is Stage.GATHER and (everybody or enough):
            return answer + self._gathered(now)
        match self.stage:
            case Stage.TRAIN if len(missed) <= 1:
                self._ready.discard(peer)  # It may have forgotten in a crash that it was; it says so again.
                answer.append(self._send(peer, m.RoundOpen(self._last_completed)))
            case Stage.FAREWELL:
                self._farewells_due.add(peer)
                if len(missed) <= 1:
                    answer.append(self._send(peer, m.StudyEnded(self._end_reason)))
        return answer

    # --- the study key

    @property
    def _lacks_key(self) -> bool:
        """Whether the study can begin with a new study key only, and there is a member who may make it."""
        here = self._joined | self._keys.wanting
        begun = self._records or self._attempt is not None
        return not begun and len(self._joined) < self._parties.minimum <= len(here) and not here <= self._keys.makers

    def _want_key(self, peer: str, now: float) -> list[Output]:
        self._keys.lacks(peer)
        waiting: list[Output] = [Progress("waits for the study key", {"node": peer})]
        if self._joined:
            return waiting + self._ask_dealer()
        everybody = len(self._keys.wanting) == len(self._left)
        if self.stage is Stage.GATHER and everybody and not self._keys.makers and self._lacks_key:
            return waiting + self._have_key_made(now)
        return waiting

    def _have_key_made(self, now: float) -> list[Output]:
        for name in self._joined:
            self._keys.lacks(name)
        self._joined.clear()
        self._deadline = now + self._agreement.deadlines.phase_seconds
        maker, task = self._keys.make()
        return [Progress("study key", {"maker": maker}), self._send(maker, task, 0, 0)]

    def _ask_dealer(self) -> list[Output]:
        asked = self._keys.deal(self._joined)
        return [self._send(*asked, 0, 0)] if asked else []

    def _on_sealed_key(self, peer: str, body: m.SealedKey, data: bytes) -> list[Output]:
        if peer not in self._joined or not self._keys.carries(peer, body):
            return []
        return [self._send(body.recipient, m.DealtKey(data), 0, 0)]

    # --- rounds that a node has missed

    def _missed_sum(self, peer: str, number: int) -> list[Output]:
        if number == self._round and self._collecting and peer not in self._contributors:
            return []  # It gets the sum with the others' receipts, when the round is closed.
        return [self._post(peer, data) for data in self._result(number)]

    def _gathered(self, now: float) -> list[Output]:
        """Everyone is here, or those who are not had their time: begin, or go on after a crash."""
        match self._resume_at:
            case Stage.SUM if self._attempt is not None:
                self.stage, self._deadline = Stage.SUM, now + self._agreement.deadlines.phase_seconds
                sends = [send for name in sorted(self._joined) for send in self._attempt.rejoin(name)]
                return self._carry(sends, now)
            case Stage.RECEIPTS:
                self.stage, self._deadline = Stage.RECEIPTS, now + self._agreement.deadlines.phase_seconds
                return self._maybe_close(now)
            case _:
                return self._next_round(now)

    def _on_farewell(self, peer: str) -> list[Output]:
        if self.stage is not Stage.FAREWELL:
            raise RemoteProtocolError(peer, "said farewell before the end of the study")
        self._joined.discard(peer)
        self._await_farewells(self._farewells_due - {peer})
        return []

    def _await_farewells(self, due: set[str]) -> None:
        self._farewells_due = due
        if not due:
            self.stage = Stage.ENDED

    def _on_declined(self, peer: str, body: m.Declined, now: float) -> list[Output]:
        self._put_out(peer, "declined")
        return [Progress("declined", {"node": peer, "reason": body.reason}), *self._lose(peer, now, for_good=True)]

    def _on_ready(self, peer: str, now: float) -> list[Output]:
        if self.stage is not Stage.TRAIN:
            return []
        self._ready.add(peer)
        self._trained.add(peer)
        if self._overtime and self._cohort:  # The others have as long as for any message.
            self._deadline = min(self._deadline, now + self._agreement.deadlines.phase_seconds)
        return self._begin_sum(now) if self._all_ready else []

    @property
    def _all_ready(self) -> bool:
        """Nobody who is here, or who is needed, still trains."""
        return self._ready >= self._voted_on.get(self._round, self._joined)

    def _lose(self, peer: str, now: float, *, for_good: bool = False) -> list[Output]:
        match self.stage:
            case Stage.SUM if self._attempt is not None:
                attempt = self._attempt
                return self._carry(attempt.put_out(peer) if for_good else attempt.leave(peer), now)
            case Stage.TRAIN if not self._enough(self._left) or (self._ready and self._all_ready):
                return self._begin_sum(now)
            case Stage.RECEIPTS:
                return self._maybe_close(now)
            case _:
                return []

    def _put_out(self, peer: str, why: str) -> None:
        self._out[peer] = why
        self._joined.discard(peer)
        self._ready.discard(peer)
        self._keys.left(peer)
        if self.stage is Stage.FAREWELL:
            self._await_farewells(self._farewells_due - {peer})

    def _expel(self, peer: str, fault: str, now: float) -> list[Output]:
        closed = self.stage is Stage.FAREWELL
        self._put_out(peer, fault)
        expelled = Progress("expelled", {"node": peer, "fault": fault})
        if closed:
            return [expelled]  # Nothing is written behind the transcript's end.
        record = self._transcript.append(t.Misbehaved(round=self._round, node_id=peer, fault=fault[:500]))
        return [Record(record), expelled, *self._lose(peer, now, for_good=True)]

    # --- stages

    def _next_round(self, now: float) -> list[Output]:
        if self._round == self._agreement.study.rounds:
            return self._end("all rounds are done", now)
        if len(self._joined) < self._parties.minimum or self._overtime:
            return self._wait_for_hospitals(now)
        self._round += 1
        self._ready.clear()
        self._trained.clear()
        self._joins.clear()
        self._keys.next_round()
        self._received_bytes = self._sent_bytes = 0
        self._round_started = now
        trained = self._round in self._voted_on  # by all who are needed, before we crashed
        deadlines = self._agreement.deadlines
        self._deadline = now + (deadlines.phase_seconds if trained else deadlines.train_seconds)
        self.stage = Stage.TRAIN
        return [
            Progress("round", {"round": self._round, "nodes": len(self._joined)}),
            *self._ask_dealer(),
            *(self._send(name, m.RoundOpen(self._last_completed)) for name in sorted(self._joined)),
        ]

    def _wait_for_hospitals(self, now: float) -> list[Output]:
        """Too few are here. If that is because lines are broken, they have as long to come back as they had to join, once."""
        if self.stage is Stage.GATHER or self._overtime or len(self._left) < self._parties.minimum:
            return self._end("too few hospitals are left", now)
        self.stage, self._resume_at = Stage.GATHER, Stage.TRAIN
        self._deadline = now + self._agreement.deadlines.join_seconds
        return [Progress("waits for hospitals", {"joined": len(self._joined)})]

    @property
    def _left(self) -> set[str]:
        """All members who are here or may come back."""
        return {member.node_id for member in self._agreement.members} - self._out.keys()

    def _enough(self, names: set[str]) -> bool:
        """Whether these can be summed in this round."""
        return len(names) >= self._parties.minimum and names >= self._voted_on.get(self._round, frozenset())

    @property
    def _cohort(self) -> set[str]:
        """Whom the next attempt of this round sums, nobody while they are not enough."""
        ready = self._ready & self._joined
        return set(self._voted_on.get(self._round, ready)) if self._enough(ready) else set()

    def _begin_sum(self, now: float) -> list[Output]:
        cohort = self._cohort
        if not cohort:
            if not self._enough(self._left) or (self._overtime and now >= self._deadline):
                if self._round not in self._voted_on:
                    return self._abandon("too few nodes were ready", (), now)
                self._overtime = False  # Others may be enough for the next round.
                return self._abandon("not all came back for whom nodes have voted", (), now)
            if self._overtime:
                return []
            # Perhaps a line is down and nobody noticed. To open the next round would not help, and would throw updates away.
            self._overtime = True
            self._deadline = now + self._agreement.deadlines.join_seconds
            return [Progress("waits for hospitals", {"joined": len(self._joined), "ready": len(self._ready)})]
        self._overtime = False
        number = self._attempts.get(self._round, 0) + 1
        if number > self._agreement.secure_sum.max_attempts:
            return self._abandon("every agreed attempt was used up", (), now)
        self._attempts[self._round] = number
        self._chunks = 0, []  # Uploads need the memory.
        self.stage, self._deadline = Stage.SUM, now + self._agreement.deadlines.phase_seconds
        attempt = AttemptId(self._parties.agreement_digest, self._round, number)
        self._attempt = AttemptAggregator(
            self._parties,
            attempt,
            cohort,
            self._size,
            self._spool,
            ring=self._ring,
            last_record=self._last_record,
            study_key=self._keys.key,
            whole=self._round in self._voted_on,
        )
        self._attempt_phase = Phase.KEYS
        return [Begun(self._round, number), *self._carry(self._attempt.start(), now)]

    def _carry(self, sends: list[tuple[str, m.AnyBody]], now: float) -> list[Output]:
        """Sign what an attempt wants to send, then see whether it is over."""
        attempt = self._attempt
        if attempt is None:
            return []
        answer: list[Output] = [self._send(peer, body) for peer, body in sends]
        if attempt.phase is not self._attempt_phase:
            self._attempt_phase = attempt.phase
            if attempt.phase in (Phase.VOTES, Phase.UNMASK):
                self._voted_on[self._round] = attempt.survivors
                answer.insert(0, UploadsClosed(*attempt.closed_attempt()))
            self._deadline = now + self._agreement.deadlines.phase_seconds
            answer.append(Progress("phase", {"round": self._round, "phase": attempt.phase.value}))
        blamed = [peer for peer in attempt.blamed if peer not in self._out]
        for peer in blamed:
            answer += self._expel(peer, attempt.blamed[peer], now)
        if self._attempt is not attempt or (blamed and self.stage is not Stage.SUM):
            return answer  # Expelling has already moved the round on.
        if attempt.outcome is not None:
            return answer + self._open_sum(attempt.outcome, now)
        if attempt.phase is Phase.FAILED:
            return answer + self._retry(attempt, now)
        return answer

    def _retry(self, attempt: AttemptAggregator, now: float) -> list[Output]:
        blamed = tuple(sorted(attempt.blamed))
        self._attempt = None
        self._ready -= attempt.dropped.keys()
        answer: list[Output] = []
        if attempt.disputed is not None:
            self._ready -= set(attempt.disputed)
            accuser, accused = attempt.disputed
            number = self._attempts[self._round]
            dispute = t.Disputed(round=self._round, attempt=number, accuser=accuser, accused=accused)
            answer.append(Record(self._transcript.append(dispute)))
        again = self._attempts[self._round] < self._agreement.secure_sum.max_attempts
        trained = self._trained - self._out.keys() - set(attempt.disputed or ())
        if not again or not self._enough(trained):
            return answer + self._abandon(attempt.failure, blamed, now)
        failed = m.AttemptFailed(attempt.failure, final=False)
        answer += [self._send(name, failed) for name in sorted(self._joined)]
        answer.append(Progress("attempt failed", {"round": self._round, "reason": attempt.failure}))
        if self._cohort:
            return answer + self._begin_sum(now)
        # Who has an update and was lost for a moment is needed: as many as come back by then are in the next attempt.
        self.stage, self._deadline = Stage.TRAIN, now + self._agreement.deadlines.phase_seconds
        back = sorted(self._joined & trained - self._ready)
        return [*answer, *(self._send(name, m.RoundOpen(self._last_completed)) for name in back)]

    def _abandon(self, reason: str, blamed: tuple[str, ...], now: float) -> list[Output]:
        record = t.RoundAbandoned(
            round=self._round, attempt=self._attempts.get(self._round, 0), reason=reason, blamed=blamed
        )
        failed = m.AttemptFailed(reason, final=True)
        return [
            Record(self._transcript.append(record)),
            Progress("round abandoned", {"round": self._round, "reason": reason}),
            *(self._send(name, failed) for name in sorted(self._joined)),
            *self._next_round(now),
        ]

    def _open_sum(self, outcome: SumOutcome, now: float) -> list[Output]:
        self._attempt = None
        roster = self._agreement.roster
        total = outcome.total
        record = t.RoundRecord(
            agreement_digest=self._parties.agreement_digest.hex(),
            roster_epoch=roster.epoch,
            roster_version=roster.version,
            round=self._round,
            attempt=self._attempts[self._round],
            protocol=self._agreement.secure_sum.protocol,
            study_key=self._keys.key.hex(),
            builds_on=self._last_record.hex(),
            cohort=outcome.cohort,
            senders_view=outcome.view.hex(),
            survivors=tuple(
                t.Survivor(node_id=name, upload_digest=digest.hex(), signature=outcome.votes.get(name, b"").hex())
                for name, digest in outcome.survivors
            ),
            dropped=tuple(t.Dropped(node_id=name, phase=phase) for name, phase in sorted(outcome.dropped.items())),
            aggregate_digest=t.aggregate_digest(octets(total)).hex(),
            aggregate_tag=outcome.tag.to_bytes(8).hex(),
            upload_bytes=self._received_bytes,
            download_bytes=self._sent_bytes,
            seconds=round(now - self._round_started, 6),
        )
        line = self._transcript.append(record)
        self._record_line, self._records[self._round] = line, (line, ())
        self._contributors = frozenset(name for name, _ in outcome.survivors)
        self._taking_part |= set(outcome.cohort)
        self._receipts.clear()
        self.stage, self._deadline = Stage.RECEIPTS, now + self._agreement.deadlines.phase_seconds
        answer: list[Output] = [SumOpened(self._round, total), Record(line)]
        messages = self._result(self._round, total)
        answer += [self._post(name, data) for name in sorted(self._joined & self._contributors) for data in messages]
        fields = {"round": self._round, "survivors": len(self._contributors), "seconds": record.seconds}
        answer.append(Progress("sum", fields | {"bytes": self._received_bytes, "dropped": sorted(outcome.dropped)}))
        return answer

    def _result(self, number: int, total: Total | None = None) -> list[bytes]:
        """The messages that bring a sum (by default the one that was kept), with the receipts that there are by now."""
        address = AttemptId(self._parties.agreement_digest, number, 0)
        if self._chunks[0] != number:
            opened = (self._load_sum(number) if total is None else total).reshape(self._ring.shape)
            self._chunks = (
                number,
                [
                    m.encode(self._identity, address, m.SumChunk(index, m.chunk_digest(data)), data)
                    for index, start in enumerate(range(0, self._size, self._ring.sum_chunk_values))
                    for data in [self._ring.pack_sum(opened, start)]
                ],
            )
        return [*self._chunks[1], m.encode(self._identity, address, m.RoundResult(*self._records[number]))]

    def _on_receipt(self, peer: str, number: int, body: m.Receipt, now: float) -> list[Output]:
        if number > self._round:
            raise RemoteProtocolError(peer, f"sent Receipt for round {number}, which is not open")
        if number not in self._records or peer not in self._joined:
            return []
        line, before = self._records[number]
        statement = t.receipt_statement(self._parties.agreement_digest, number, t.line_digest(line))
        try:
            verify_signature(self._parties.public_keys[peer], Label.RECEIPT, statement, body.signature)
        except VerificationFailed:
            raise RemoteProtocolError(peer, "countersigned another record than the one it was sent") from None
        if number < self._round or not self._collecting:
            # Too late for the transcript, but a node that took no part in that round may be waiting for it.
            self._records[number] = line, tuple(sorted({**dict(before), peer: body.signature}.items()))
            return []
        self._receipts[peer] = body.signature
        return self._maybe_close(now) if self.stage is Stage.RECEIPTS else []

    def _maybe_close(self, now: float) -> list[Output]:
        waiting = self._joined & self._contributors - self._receipts.keys()
        return [] if waiting else self._close_round(now)

    def _close_round(self, now: float) -> list[Output]:
        return [*self._record_receipts(), *self._next_round(now)]

    def _record_receipts(self) -> list[Output]:
        """Write down who has countersigned, and send the sum to those who took no part in it."""
        receipts = t.Receipts(
            round=self._round,
            record_digest=t.line_digest(self._record_line).hex(),
            countersignatures=tuple(
                t.Countersignature(node_id=name, signature=signature.hex())
                for name, signature in sorted(self._receipts.items())
            ),
        )
        answer: list[Output] = [Record(self._transcript.append(receipts))]
        self._records[self._round] = self._record_line, tuple(sorted(self._receipts.items()))
        others = sorted(self._joined - self._contributors)
        if others:
            messages = self._result(self._round)
            answer += [self._post(name, data) for name in others for data in messages]
        return answer

    def _end(self, reason: str, now: float) -> list[Output]:
        # A node may still be training for a round that it missed, or be starting again after a crash: it too needs the sums.
        self.stage, self._deadline = Stage.FAREWELL, now + self._agreement.deadlines.train_seconds
        self._end_reason = reason
        self._await_farewells(self._taking_part - self._out.keys())
        away = sorted(self._farewells_due - self._joined)
        closed = t.StudyClosed(rounds_completed=len(self._records), reason=reason)
        return [
            Record(self._transcript.append(closed)),
            *(self._send(name, m.StudyEnded(reason)) for name in sorted(self._joined | self._keys.wanting)),
            Progress("ended", {"reason": reason, "rounds_completed": len(self._records), "away": away}),
        ]

    # --- helpers

    @property
    def _collecting(self) -> bool:
        """Whether countersignatures of the latest round are still taken."""
        return self.stage is Stage.RECEIPTS or (self.stage is Stage.GATHER and self._resume_at is Stage.RECEIPTS)

    @property
    def _last_completed(self) -> int:
        return max(self._records, default=0)

    @property
    def _last_record(self) -> bytes:
        return t.line_digest(self._records[self._last_completed][0]) if self._records else m.NO_RECORD

    def _send(self, peer: str, body: m.AnyBody, number: int | None = None, attempt: int | None = None) -> SendTo:
        address = AttemptId(
            self._parties.agreement_digest,
            self._round if number is None else number,
            self._attempts.get(self._round, 0) if attempt is None else attempt,
        )
        return self._post(peer, m.encode(self._identity, address, body))

    def _post(self, peer: str, data: bytes) -> SendTo:
        self._sent_bytes += len(data)
        return SendTo(peer, data)
