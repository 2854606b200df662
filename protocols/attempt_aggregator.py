"""The aggregator's side of one attempt of the secure sum.

Sans-IO: `receive(peer, body, signed bytes)` and `expire()` give messages to send; deadlines belong to the caller. Phases:

    KEYS -> SEEDS -> UPLOAD -> VOTES -> UNMASK -> DONE | FAILED         masked, layered
                     UPLOAD -> VOTES           -> DONE | FAILED         homomorphic

A phase ends when everyone who is still in it has answered, or when the caller's deadline expires; those who are missing
drop out, and the attempt goes on while the agreed minimum remains. A node that breaks a rule is put out of the attempt and
blamed by name. The aggregator holds no secret: what it reconstructs is the self seed of a survivor or the pair master of
a lost node, never both of one node. Ciphertexts it adds without the key; the sum stays one.

Memory: the running sum, and what `Spool` keeps of unfinished uploads. An upload is added to the sum when it is whole and its
digest is right, since one that stops half way must leave no trace; then it is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import msgspec
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

from keys.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from keys.identity import verify_signature
from keys.labels import Label
from protocols import messages as m
from protocols import sealing, shamir
from protocols.attempt_node import Parties, open_contribution
from protocols.ciphertexts import CipherLost, CipherUnavailable, FrameBroken, TotalSpoiled
from protocols.graph import MaskGraph
from protocols.prg import TAG_PRIME, MaskSet
from protocols.rings import Ring, Total
from protocols.transcript import survivor_statement, upload_digest

CREDIT_CHUNKS, CREDIT_CHUNKS_TOGETHER = 4, 32
"""So many chunks of one upload may be under way, and of all uploads together; but one of each."""


class Spool(Protocol):
    """Keeps the chunks of unfinished uploads, in order; where is not this file's business."""

    def append(self, name: str, data: memoryview) -> None:
        """Keep the next chunk of a node's upload."""

    def chunks(self, name: str) -> Iterator[memoryview | bytes]:
        """All chunks of a node's upload, in order."""

    def discard(self, name: str) -> None:
        """Forget a node's upload, if there is one."""


class Phase(Enum):
    """The phases of one attempt, in order."""

    KEYS = "keys"
    SEEDS = "seeds"
    UPLOAD = "upload"
    VOTES = "votes"
    UNMASK = "unmask"
    DONE = "done"
    FAILED = "failed"


_ORDER = list(Phase)
_EXPECTED: dict[type[m.Body], Phase] = {
    m.RoundKeys: Phase.KEYS,
    m.SealedSeeds: Phase.SEEDS,
    m.Complaint: Phase.UPLOAD,
    m.UploadChunk: Phase.UPLOAD,
    m.UploadDone: Phase.UPLOAD,
    m.SurvivorVote: Phase.VOTES,
    m.Unmasking: Phase.UNMASK,
}


@dataclass(slots=True)
class _Upload:
    """One node's upload as it arrives: the digests of its chunks so far, and how many it may send."""

    digests: list[bytes]
    credit: int


class ClosedAttempt(msgspec.Struct, frozen=True):
    """What an attempt whose uploads are closed needs beside the masked sum, to survive a crash. Nothing is secret."""

    round: int
    attempt: int
    cohort: tuple[str, ...]
    signed_keys: dict[str, bytes]
    senders: tuple[str, ...]
    share_digests: dict[str, dict[str, tuple[bytes, bytes]]]
    seeds_across: dict[str, dict[str, bytes]]
    survivors: tuple[tuple[str, bytes], ...]
    signed_uploads: dict[str, bytes]
    votes: dict[str, bytes]
    dropped: dict[str, str]
    masked_tag: int
    study_key: bytes


@dataclass(frozen=True, slots=True)
class SumOutcome:
    """A finished attempt: the sum and the sum of its tags, its contributors, and the evidence."""

    total: Total = field(repr=False)
    tag: int
    cohort: tuple[str, ...]
    view: bytes
    survivors: tuple[tuple[str, bytes], ...]
    votes: dict[str, bytes]
    dropped: dict[str, str]


Send = tuple[str, m.AnyBody]
"""A recipient and the body to sign and send to it."""


class AttemptAggregator:
    """One attempt at the aggregator, over the members `cohort` and updates of `vector_size` values.

    `last_record` is the digest of the record of the last sum, on which every member must build; `study_key` the id of the key
    under which they encrypt, if they do. With `whole` the attempt fails if one of the cohort drops out before the votes: somebody
    has voted for all of them in an attempt before, and votes for nothing else.
    """

    def __init__(
        self,
        parties: Parties,
        attempt: sealing.AttemptId,
        cohort: Iterable[str],
        vector_size: int,
        spool: Spool,
        *,
        ring: Ring,
        last_record: bytes = m.NO_RECORD,
        study_key: bytes = b"",
        whole: bool = False,
    ) -> None:
        self._parties, self._attempt, self._spool, self._ring = parties, attempt, spool, ring
        self._last_record, self._study_key = last_record, study_key
        self._cohort = tuple(sorted(cohort))
        self._active = set(self._cohort)
        self._whole = whole
        self._chunk_values, self._masked = (
            parties.agreement.secure_sum.chunk_values,
            parties.agreement.secure_sum.masked,
        )
        self._size, self._total = vector_size, ring.zeros(vector_size)
        self._tag = 0
        self._chunk_count = -(-vector_size // self._chunk_values)
        self._signed_keys: dict[str, bytes] = {}
        self._keys: dict[str, m.RoundKeys] = {}
        self._graph = MaskGraph((), 0)
        self._recipients: dict[str, frozenset[str]] = {}
        self._seeds: dict[str, dict[str, bytes]] = {}
        self._share_digests: dict[str, dict[str, tuple[bytes, bytes]]] = {}
        self._senders: tuple[str, ...] = ()
        self._key_digests: tuple[tuple[str, bytes], ...] = ()
        self._cohort_digest = self._view = b""
        self._window = CREDIT_CHUNKS
        self._uploads: dict[str, _Upload] = {}
        self._digests: dict[str, bytes] = {}
        self._signed_uploads: dict[str, bytes] = {}
        self._survivors: tuple[tuple[str, bytes], ...] = ()
        self._statement = b""
        self._votes: dict[str, bytes] = {}
        self._self_shares: dict[str, dict[str, bytes]] = {}
        self._pair_shares: dict[str, dict[str, bytes]] = {}
        self._unmasked: set[str] = set()
        self.phase = Phase.KEYS
        self.dropped: dict[str, str] = {}
        self.blamed: dict[str, str] = {}
        self.disputed: tuple[str, str] | None = None
        """An accuser and whom it accuses, when that is why the attempt failed."""
        self.failure = ""
        self.outcome: SumOutcome | None = None

    def start(self) -> list[Send]:
        """Ask the cohort for round keys, or for uploads if nothing is to be masked."""
        opened: list[Send] = [(name, m.AttemptOpen(self._cohort)) for name in self._cohort]
        if self._masked:
            return opened
        self._senders = self._cohort
        self._link()
        return opened + self._open_uploads()

    def receive(self, peer: str, message: m.Message, signed: bytes) -> list[Send]:
        """Take one verified message of `peer`. A peer at fault is blamed and put out; nothing is raised."""
        body = message.body
        if peer not in self._active or self.phase in (Phase.DONE, Phase.FAILED):
            return []
        try:
            expected = _EXPECTED.get(type(body))
            if expected is None:
                raise RemoteProtocolError(peer, f"sent {type(body).__name__} in an attempt")
            here, there = _ORDER.index(self.phase), _ORDER.index(expected)
            if there < here:
                return []  # Late: it crossed our deadline on the way.
            if there > here:
                raise RemoteProtocolError(peer, f"sent {type(body).__name__} before its phase")
            return self._dispatch(peer, message, signed)
        except RemoteProtocolError as fault:
            self.blamed[peer] = str(fault)
            return self._drop(peer)

    @property
    def survivors(self) -> frozenset[str]:
        """Whose sum nodes were asked to vote for; empty before."""
        return frozenset(name for name, _ in self._survivors)

    @property
    def _minimum(self) -> int:
        """So many must be left until the votes."""
        return len(self._cohort) if self._whole else self._parties.minimum

    def leave(self, peer: str) -> list[Send]:
        """The transport has lost `peer`. From the votes on it has until the deadline to come back: its vote and shares count."""
        return [] if self.phase in (Phase.VOTES, Phase.UNMASK) else self.put_out(peer)

    def put_out(self, peer: str) -> list[Send]:
        """`peer` does not come back."""
        return self._drop(peer) if peer in self._active and self.phase not in (Phase.DONE, Phase.FAILED) else []

    def rejoin(self, peer: str) -> list[Send]:
        """`peer` has a new connection: say again what it may have missed, or go on without it."""
        if peer not in self._active or self.phase in (Phase.DONE, Phase.FAILED):
            return []
        match self.phase:
            case Phase.UPLOAD if peer in self._digests:
                return []
            case Phase.VOTES:
                return [] if peer in self._votes else [(peer, self._survivors_for(peer))]
            case Phase.UNMASK:
                return [] if peer in self._unmasked else [(peer, self._proof())]
            case _:
                return self._drop(peer)

    def expire(self) -> list[Send]:
        """The deadline of this phase has passed: go on without those who are missing."""
        for peer in sorted(self._missing()):
            self._active.discard(peer)
            self.dropped.setdefault(peer, self.phase.value)
        return self._advance()

    def _dispatch(self, peer: str, message: m.Message, signed: bytes) -> list[Send]:
        match body := message.body:
            case m.RoundKeys():
                self._once(peer, peer in self._keys and self._signed_keys[peer] != signed, "two different round keys")
                if not (sealing.is_public_key(body.share_public) and sealing.is_public_key(body.pair_public)):
                    raise RemoteProtocolError(peer, "published round keys that are not valid keys")
                if body.last_record != self._last_record:
                    raise RemoteProtocolError(peer, "builds on another sum than the last one that we signed")
                self._keys[peer], self._signed_keys[peer] = body, signed
            case m.SealedSeeds():
                self._on_seeds(peer, body, signed)
            case m.UploadChunk():
                return self._on_chunk(peer, body, message.tail)
            case m.UploadDone():
                self._on_upload_done(peer, body, signed)
            case m.Complaint():
                return self._on_complaint(peer, body)
            case m.SurvivorVote():
                self._on_vote(peer, body)
            case m.Unmasking():
                self._on_unmasking(peer, body)
        return self._advance()

    # --- phases

    def _missing(self) -> set[str]:
        """Active nodes that have not yet done what this phase asks."""
        match self.phase:
            case Phase.KEYS:
                return self._active - self._keys.keys()
            case Phase.SEEDS:
                return {name for name in self._active if len(self._seeds[name]) < len(self._recipients[name])}
            case Phase.UPLOAD:
                return self._active - self._digests.keys()
            case Phase.VOTES:
                return self._active - self._votes.keys()
            case Phase.UNMASK:
                return self._active - self._unmasked
            case _:
                return set()

    def _drop(self, peer: str) -> list[Send]:
        self._active.discard(peer)
        self.dropped.setdefault(peer, self.phase.value)
        if self._uploads.pop(peer, None) is not None:
            self._spool.discard(peer)
        return self._advance()

    def _advance(self) -> list[Send]:
        answer: list[Send] = []
        while self.phase not in (Phase.DONE, Phase.FAILED) and not self._missing():
            answer += self._next_phase()
        return answer

    def _next_phase(self) -> list[Send]:
        match self.phase:
            case Phase.KEYS:
                return self._close_keys()
            case Phase.SEEDS:
                return self._close_seeds()
            case Phase.UPLOAD:
                return self._close_uploads()
            case Phase.VOTES:
                if len(self._votes) < self._parties.threshold:
                    return self._fail("fewer survivors than the threshold signed the survivor set")
                if not self._masked:
                    return self._done()
                self.phase = Phase.UNMASK
                self._active = set(self._votes)
                return [(name, self._proof()) for name in sorted(self._active)]
            case _:
                return self._unmask()

    def _close_keys(self) -> list[Send]:
        if len(self._active) < self._minimum:
            return self._fail("too few nodes sent round keys")
        self._keys = {name: self._keys[name] for name in sorted(self._active)}
        self._signed_keys = {name: self._signed_keys[name] for name in self._keys}
        self._link()
        self.phase = Phase.SEEDS
        answer: list[Send] = []
        for name in self._keys:
            needed = sorted({*self._graph.recipients(name), *self._graph.sources(name)})
            answer.append((name, m.KeySet(self._key_digests, tuple(self._signed_keys[peer] for peer in needed))))
        return answer

    def _link(self) -> None:
        """Fix cohort digest and graph, from the signed round keys if there are any."""
        neighbours = self._parties.agreement.secure_sum.neighbours
        if not self._masked:
            self._cohort_digest = sealing.unmasked_cohort_digest(self._attempt, self._study_key, self._last_record)
            self._graph = MaskGraph.build(self._cohort, neighbours, self._cohort_digest)
            return
        digests = {name: sealing.keys_digest(signed) for name, signed in self._signed_keys.items()}
        self._key_digests = tuple(sorted(digests.items()))
        self._cohort_digest = sealing.cohort_digest(self._attempt, digests, self._study_key)
        self._graph = MaskGraph.build(digests, neighbours, self._cohort_digest)
        self._recipients = {name: frozenset(self._graph.recipients(name)) for name in digests}
        self._seeds = {name: {} for name in digests}

    def _close_seeds(self) -> list[Send]:
        if len(self._active) < self._minimum:
            return self._fail("too few nodes distributed seeds")
        if not self._active.intersection(self._graph.dealers):
            return self._fail("nobody is left who dealt a tag seed")
        self._senders = tuple(sorted(self._active))
        answer: list[Send] = []
        for name in self._senders:
            sources = [peer for peer in self._graph.sources(name) if peer in self._active]
            answer.append((name, m.SeedSet(self._senders, tuple(self._seeds[peer][name] for peer in sources))))
        return answer + self._open_uploads()

    def _open_uploads(self) -> list[Send]:
        self._view = sealing.senders_view(self._attempt, self._cohort_digest, self._senders)
        self.phase = Phase.UPLOAD
        self._window = max(1, min(CREDIT_CHUNKS, CREDIT_CHUNKS_TOGETHER // len(self._senders)))
        credit = min(self._window, self._chunk_count)
        self._uploads = {name: _Upload([], credit) for name in self._senders}
        return [(name, m.Credit(credit)) for name in self._senders]

    def _close_uploads(self) -> list[Send]:
        self._forget_uploads()
        names = sorted(self._digests)
        if len(names) < self._minimum:
            return self._fail("too few nodes uploaded")
        if not self._graph.tolerates(names, self._parties.agreement.colluders_tolerated):
            return self._fail("so many neighbours were lost that colluders could cut the others apart")
        self._survivors = tuple((name, self._digests[name]) for name in names)
        self._statement = survivor_statement(self._attempt, self._view, self._survivors)
        self.phase = Phase.VOTES
        # A node that uploaded and then vanished is still a survivor: its upload counts, only its vote is missing.
        self._active &= set(names)
        return [(name, self._survivors_for(name)) for name in sorted(self._active)]

    def _survivors_for(self, name: str) -> m.Survivors:
        alive = [peer for peer in self._graph.neighbours(name) if peer in self._digests]
        return m.Survivors(self._survivors, tuple(self._signed_uploads[peer] for peer in alive))

    def _proof(self) -> m.SurvivorProof:
        return m.SurvivorProof(tuple(sorted(self._votes.items())[: self._parties.threshold]))

    # --- what nodes send

    def _once(self, peer: str, differs: bool, what: str) -> None:
        if differs:
            raise RemoteProtocolError(peer, f"sent {what} in one attempt: equivocation")

    def _on_seeds(self, peer: str, body: m.SealedSeeds, signed: bytes) -> None:
        if body.recipient not in self._recipients[peer]:
            raise RemoteProtocolError(peer, f"sealed seeds for {body.recipient}, who is not to have any of it")
        if body.cohort_digest != self._cohort_digest:
            raise RemoteProtocolError(peer, "sealed seeds for another set of round keys")
        linked = body.recipient in self._graph.neighbours(peer)
        self_digest, pair_digest = body.self_share_digest, body.pair_share_digest
        if {self_digest is not None, pair_digest is not None} != {linked}:
            raise RemoteProtocolError(peer, f"committed to other shares than those that {body.recipient} is to have")
        if (body.contribution_digest is not None) != (linked and peer < body.recipient):
            raise RemoteProtocolError(
                peer, f"committed to a contribution that {body.recipient} is not to have, or to none"
            )
        before = self._seeds[peer]
        self._once(peer, before.get(body.recipient, signed) != signed, f"two different seeds for {body.recipient}")
        before[body.recipient] = signed
        if self_digest is not None and pair_digest is not None:
            self._share_digests.setdefault(peer, {})[body.recipient] = (self_digest, pair_digest)

    def _on_complaint(self, accuser: str, body: m.Complaint) -> list[Send]:
        """Seeds that do not open, or a false complaint: nobody can tell without opening more, so both sit this round out."""
        sealed_to_it = set(self._graph.sources(accuser)) & set(self._senders) if self._masked else set()
        if body.accused not in sealed_to_it or accuser in self._digests:
            raise RemoteProtocolError(accuser, f"complained about {body.accused} without ground")
        self.disputed = (accuser, body.accused)
        return self._fail(f"{accuser} cannot open what {body.accused} sealed to it")

    def _on_chunk(self, peer: str, body: m.UploadChunk, data: memoryview) -> list[Send]:
        upload = self._uploads.get(peer)
        if upload is None:
            raise RemoteProtocolError(peer, "sent a chunk outside its upload")
        if body.index >= upload.credit or len(data) != self._ring.sealed_bytes(self._values_in(body.index)):
            raise RemoteProtocolError(peer, f"sent chunk {body.index} of {len(data)} bytes, which no upload has")
        if body.index > len(upload.digests):
            return self._drop(peer)  # Chunks were lost with a connection: no fault, but no upload either.
        if body.index < len(upload.digests):
            self._once(peer, upload.digests[body.index] != body.digest, "two different chunks of one index")
            return []
        upload.digests.append(body.digest)
        self._spool.append(peer, data)
        if upload.credit - len(upload.digests) > self._window // 2 or upload.credit == self._chunk_count:
            return []
        upload.credit = min(len(upload.digests) + self._window, self._chunk_count)
        return [(peer, m.Credit(upload.credit))]

    def _values_in(self, chunk: int) -> int:
        return min(self._chunk_values, self._size - chunk * self._chunk_values)

    def _on_upload_done(self, peer: str, body: m.UploadDone, signed: bytes) -> None:
        if peer in self._digests:
            self._once(peer, self._signed_uploads[peer] != signed, "two different uploads")
            return
        upload = self._uploads.pop(peer, None)
        if upload is None:
            raise RemoteProtocolError(peer, "ended an upload that it never began")
        try:
            if len(upload.digests) != self._chunk_count:
                self._active.discard(peer)
                self.dropped.setdefault(peer, self.phase.value)
                return
            if body.digest != upload_digest(b"".join(upload.digests), body.tag):
                raise RemoteProtocolError(peer, "sent a digest that is not that of its upload")
            if body.view != self._view:
                raise RemoteProtocolError(peer, "masked for other senders of seeds than it was told")
            self._ring.add(
                self._total,
                lambda: ((index * self._chunk_values, data) for index, data in enumerate(self._spool.chunks(peer))),
            )
        except (FrameBroken, CipherLost) as error:
            raise RemoteProtocolError(peer, f"sent an upload that cannot be added: {error}") from None
        except CipherUnavailable as error:
            self._fail(f"the sum was lost: {error}")
            return
        except TotalSpoiled as error:
            self.blamed[peer] = f"{peer}: sent an upload that cannot be added, nor taken off again: {error}"
            self._fail(f"the sum was lost over an upload of {peer}")
            return
        finally:
            self._spool.discard(peer)
        self._tag = (self._tag + body.tag) % TAG_PRIME
        self._digests[peer], self._signed_uploads[peer] = body.digest, signed

    def _forget_uploads(self) -> None:
        for name in self._uploads:
            self._spool.discard(name)
        self._uploads.clear()

    def _on_vote(self, peer: str, body: m.SurvivorVote) -> None:
        try:
            verify_signature(self._parties.public_keys[peer], Label.SURVIVORS, self._statement, body.signature)
        except VerificationFailed:
            raise RemoteProtocolError(peer, "voted for another survivor set") from None
        self._votes[peer] = body.signature

    def _on_unmasking(self, peer: str, body: m.Unmasking) -> None:
        if peer in self._unmasked:
            return
        held = {peer, *self._graph.neighbours(peer)} & set(self._senders)
        survivors = held & {name for name, _ in self._survivors}
        if {name for name, _ in body.self_shares} != survivors or {n for n, _ in body.pair_shares} != held - survivors:
            raise RemoteProtocolError(peer, "unmasked other nodes than the survivor set says")
        if len(body.self_shares) != len(survivors) or len(body.pair_shares) != len(held - survivors):
            raise RemoteProtocolError(peer, "sent two shares of one secret")
        if not all(shamir.is_share(share) for _, share in (*body.self_shares, *body.pair_shares)):
            raise RemoteProtocolError(peer, "sent a share that is not a field element")
        self._check_dealt(peer, body.self_shares, 0)
        self._check_dealt(peer, body.pair_shares, 1)
        for name, share in body.self_shares:
            self._self_shares.setdefault(name, {})[peer] = share
        for name, share in body.pair_shares:
            self._pair_shares.setdefault(name, {})[peer] = share
        self._unmasked.add(peer)

    def _check_dealt(self, holder: str, revealed: tuple[tuple[str, bytes], ...], which: int) -> None:
        """Every share is the one that its owner has signed the digest of; `which` says self share or pair share."""
        for owner, share in revealed:
            if owner == holder:
                continue
            digest = self._share_digests[owner][holder][which]
            if not sealing.same(sealing.share_digest(share, self._attempt, owner, holder), digest):
                raise RemoteProtocolError(holder, f"revealed another share of {owner} than the one it was dealt")

    # --- unmasking

    def _unmask(self) -> list[Send]:
        survivors = [name for name, _ in self._survivors]
        added: list[bytes] = []
        subtracted: list[bytes] = []
        for name in survivors:
            commitment = self._keys[name].self_seed_commitment
            seed = self._reconstruct(
                name,
                self._self_shares,
                lambda s, n=name, c=commitment: sealing.same(sealing.self_seed_commitment(s, self._attempt, n), c),  # type: ignore[misc]
            )
            if seed is None:
                return self._fail_secret(name, "self seed", self._self_shares)
            subtracted.append(sealing.self_mask_key(seed, self._attempt, name))
        for name in sorted(set(self._senders) - set(survivors)):
            neighbours = [peer for peer in self._graph.neighbours(name) if peer in self._digests]
            if not neighbours:
                continue
            public = self._keys[name].pair_public
            master = self._reconstruct(
                name,
                self._pair_shares,
                lambda s, p=public: sealing.same(sealing.public_key_bytes(s, self._attempt), p),  # type: ignore[misc]
            )
            if master is None:
                return self._fail_secret(name, "pair master", self._pair_shares)
            pair_key = sealing.private_key(master, self._attempt)
            for survivor in neighbours:
                try:
                    key = self._lost_pair_key(master, pair_key, name, survivor)
                except sealing.SealBroken:
                    low = min(name, survivor)
                    self.blamed[low] = f"{low}: sealed a contribution that does not open, or is not its pair master's"
                    return self._fail(f"the pair seed of {name} and {survivor} cannot be recovered")
                # The survivor's own mask is still in the total: the first of a pair added it, the second subtracted it.
                (subtracted if survivor < name else added).append(key)
        masks = MaskSet(added, subtracted)
        try:
            self._ring.unmask(self._total, masks)
        except (CipherLost, CipherUnavailable) as error:
            return self._fail(f"the masks cannot be taken off: {error}")
        self._tag = masks.apply_to_tag(self._tag)
        return self._done()

    def _done(self) -> list[Send]:
        self.phase = Phase.DONE
        self.outcome = SumOutcome(
            self._total, self._tag, self._cohort, self._view, self._survivors, dict(self._votes), dict(self.dropped)
        )
        return []

    def _lost_pair_key(self, master: bytes, pair_key: MLKEM768X25519PrivateKey, lost: str, survivor: str) -> bytes:
        low, high = min(lost, survivor), max(lost, survivor)
        attempt, cohort = self._attempt, self._cohort_digest
        # Its signature was checked when it came.
        seeds = m.decode(self._seeds[low][high], low, self._parties.public_keys[low], attempt.agreement_digest).body
        if not isinstance(seeds, m.SealedSeeds):
            raise LocalProtocolError("unreachable")
        if lost == low:
            secret = sealing.contribution(master, attempt, cohort, low, high)
            if seeds.contribution_digest != sealing.contribution_digest(secret, attempt, low, high):
                raise sealing.SealBroken  # The survivor was given, and masked with, another one.
        else:
            secret = open_contribution(pair_key, attempt, cohort, low, high, seeds)
        return sealing.pair_mask_key(secret, attempt, cohort, low, high)

    def _reconstruct(
        self, owner: str, all_shares: dict[str, dict[str, bytes]], genuine: Callable[[bytes], bool]
    ) -> bytes | None:
        """Combine shares; if they do not give what the owner signed, the owner is to blame: all others hold what it dealt."""
        shares = all_shares.get(owner, {})
        holders = sorted({owner, *self._graph.neighbours(owner)})
        threshold = self._parties.agreement.secure_sum.shares_needed
        chosen = sorted(shares, key=lambda holder: (holder == owner, holder))[:threshold]
        if len(chosen) < threshold:
            return None
        secret = shamir.combine({holders.index(holder): shares[holder] for holder in chosen}, threshold)
        return secret if secret is not None and genuine(secret) else None

    def _fail_secret(self, owner: str, what: str, all_shares: dict[str, dict[str, bytes]]) -> list[Send]:
        if len(all_shares.get(owner, {})) < self._parties.agreement.secure_sum.shares_needed:
            return self._fail(f"too few nodes answered in the unmasking to recover the {what} of {owner}")
        return self._blame_secret(owner, what)

    def _blame_secret(self, owner: str, what: str) -> list[Send]:
        self.blamed[owner] = f"{owner}: the {what} that it shared cannot be reconstructed"
        return self._fail(f"the {what} of {owner} cannot be reconstructed from the shares that came back")

    def _fail(self, reason: str) -> list[Send]:
        self.failure = reason
        self._forget_uploads()
        self.phase = Phase.FAILED
        return []

    # --- crash and resume

    def closed_attempt(self) -> tuple[ClosedAttempt, Total]:
        """What must be durable before anybody is asked for a vote, and again, with the votes, before anybody unmasks."""
        alive = {name for name, _ in self._survivors}
        senders = set(self._senders)
        # What the first node of each pair, of which one is lost, has sealed to the second.
        across = {
            low: {
                high: data for high, data in sent.items() if low < high in senders and (low in alive) != (high in alive)
            }
            for low, sent in self._seeds.items()
            if low in senders
        }
        state = ClosedAttempt(
            self._attempt.round,
            self._attempt.attempt,
            self._cohort,
            self._signed_keys,
            self._senders,
            {
                owner: {holder: digests for holder, digests in dealt.items() if holder in alive}
                for owner, dealt in self._share_digests.items()
            },
            {low: sent for low, sent in across.items() if sent},
            self._survivors,
            self._signed_uploads,
            dict(self._votes),
            dict(self.dropped),
            self._tag,
            self._study_key,
        )
        return state, self._total

    @classmethod
    def resume(
        cls,
        parties: Parties,
        state: ClosedAttempt,
        total: Total,
        vector_size: int,
        spool: Spool,
        *,
        ring: Ring,
        last_record: bytes,
    ) -> AttemptAggregator:
        """Take up an attempt where survivors vote or unmask; each is asked again, as it joins (`rejoin`)."""
        attempt = sealing.AttemptId(parties.agreement_digest, state.round, state.attempt)
        key = state.study_key
        resumed = cls(
            parties, attempt, state.cohort, vector_size, spool, ring=ring, last_record=last_record, study_key=key
        )
        resumed._signed_keys = dict(state.signed_keys)
        for name, signed in state.signed_keys.items():
            body = m.decode(signed, name, parties.public_keys[name], attempt.agreement_digest).body
            if not isinstance(body, m.RoundKeys):
                raise LocalProtocolError(f"the saved attempt holds no round keys of {name}")
            resumed._keys[name] = body
        resumed._link()
        resumed._senders, resumed._survivors = state.senders, state.survivors
        resumed._view = sealing.senders_view(attempt, resumed._cohort_digest, state.senders)
        resumed._share_digests = state.share_digests
        resumed._seeds, resumed._votes, resumed.dropped = state.seeds_across, dict(state.votes), dict(state.dropped)
        resumed._digests, resumed._signed_uploads = dict(state.survivors), dict(state.signed_uploads)
        resumed._statement = survivor_statement(attempt, resumed._view, state.survivors)
        if total.size != resumed._total.size:
            raise LocalProtocolError(f"the saved attempt holds a sum of {total.size} values")
        resumed._total[:], resumed._tag = total.reshape(resumed._total.shape), state.masked_tag
        resumed._active = set(state.votes) or resumed._digests.keys() - state.dropped.keys()
        resumed.phase = Phase.UNMASK if state.votes else Phase.VOTES
        return resumed
