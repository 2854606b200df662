"""The aggregator's side of one attempt of the `masked` secure sum.

Sans-IO: `receive(peer, body, signed bytes)` and `expire()` give messages to send; deadlines belong to the caller. Phases:

    KEYS -> SEEDS -> UPLOAD -> VOTES -> UNMASK -> DONE | FAILED

A phase ends when everyone who is still in it has answered, or when the caller's deadline expires; those who are missing
drop out, and the attempt goes on while the agreed minimum remains. A node that breaks a rule is put out of the attempt and
blamed by name. The aggregator holds no secret: what it reconstructs is the self seed of a survivor or the pair master of
a lost node, never both of one node.

Memory: the running sum, plus the unfinished uploads. A finished upload is added to the sum and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from itertools import combinations, islice

import numpy as np

from keys.errors import RemoteProtocolError, VerificationFailed
from keys.identity import verify_signature
from keys.labels import Label
from protocols import messages as m
from protocols import sealing, shamir
from protocols.encoding import Uint32Vector
from protocols.masked_node import Parties, open_contribution
from protocols.prg import add_mask
from protocols.transcript import survivor_statement, upload_digest

MAX_RECONSTRUCTIONS = 500
"""How many subsets of shares are tried when some of them are wrong."""


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
    m.MaskedChunk: Phase.UPLOAD,
    m.UploadDone: Phase.UPLOAD,
    m.SurvivorVote: Phase.VOTES,
    m.Unmasking: Phase.UNMASK,
}


@dataclass(slots=True)
class _Upload:
    """One node's upload as it arrives: [d] uint32 little-endian, and how many chunks of it are here."""

    data: bytearray
    chunks: int = 0


@dataclass(frozen=True, slots=True)
class SumOutcome:
    """A finished attempt: the sum, its contributors, and the evidence for the transcript."""

    total: Uint32Vector = field(repr=False)
    cohort: tuple[str, ...]
    survivors: tuple[tuple[str, bytes], ...]
    votes: dict[str, bytes]
    dropped: dict[str, str]


Send = tuple[str, m.AnyBody]
"""A recipient and the body to sign and send to it."""


class MaskedAggregator:
    """One attempt at the aggregator, over the members `cohort` and vectors of `vector_size` values."""

    def __init__(self, parties: Parties, attempt: sealing.AttemptId, cohort: Iterable[str], vector_size: int) -> None:
        self._parties, self._attempt, self._size = parties, attempt, vector_size
        self._cohort = tuple(sorted(cohort))
        self._active = set(self._cohort)
        self._chunk_bytes = 4 * parties.agreement.secure_sum.chunk_values
        self._chunk_count = -(-4 * vector_size // self._chunk_bytes)
        self._signed_keys: dict[str, bytes] = {}
        self._keys: dict[str, m.RoundKeys] = {}
        self._seeds: dict[str, dict[str, m.SealedSeeds]] = {}
        self._signed_seeds: dict[str, dict[str, bytes]] = {}
        self._senders: tuple[str, ...] = ()
        self._cohort_digest = b""
        self._uploads: dict[str, _Upload] = {}
        self._digests: dict[str, bytes] = {}
        self._total = np.zeros(vector_size, dtype=np.uint32)
        self._survivors: tuple[tuple[str, bytes], ...] = ()
        self._votes: dict[str, bytes] = {}
        self._self_shares: dict[str, dict[str, bytes]] = {}
        self._pair_shares: dict[str, dict[str, bytes]] = {}
        self._unmasked: set[str] = set()
        self.phase = Phase.KEYS
        self.opened = False
        """Whether nodes may have revealed shares: from then on this round is not attempted again."""
        self.dropped: dict[str, str] = {}
        self.blamed: dict[str, str] = {}
        self.disputed: tuple[str, str] | None = None
        """An accuser and whom it accuses, when that is why the attempt failed."""
        self.failure = ""
        self.outcome: SumOutcome | None = None

    def start(self) -> list[Send]:
        """Ask the cohort for round keys."""
        return [(name, m.AttemptOpen(self._cohort)) for name in self._cohort]

    def receive(self, peer: str, body: m.AnyBody, signed: bytes) -> list[Send]:
        """Take one verified message of `peer`. A peer at fault is blamed and put out; nothing is raised."""
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
            return self._dispatch(peer, body, signed)
        except RemoteProtocolError as fault:
            self.blamed[peer] = str(fault)
            return self._drop(peer)

    def leave(self, peer: str) -> list[Send]:
        """The transport has lost `peer`."""
        return self._drop(peer) if peer in self._active and self.phase not in (Phase.DONE, Phase.FAILED) else []

    def expire(self) -> list[Send]:
        """The deadline of this phase has passed: go on without those who are missing."""
        for peer in sorted(self._missing()):
            self._active.discard(peer)
            self.dropped.setdefault(peer, self.phase.value)
        return self._advance()

    def _dispatch(self, peer: str, body: m.AnyBody, signed: bytes) -> list[Send]:
        match body:
            case m.RoundKeys():
                self._once(peer, peer in self._keys and self._signed_keys[peer] != signed, "two different round keys")
                if not (sealing.is_public_key(body.share_public) and sealing.is_public_key(body.pair_public)):
                    raise RemoteProtocolError(peer, "published round keys that are not valid keys")
                self._keys[peer], self._signed_keys[peer] = body, signed
            case m.SealedSeeds():
                self._on_seeds(peer, body, signed)
            case m.MaskedChunk():
                return self._on_chunk(peer, body)
            case m.UploadDone():
                self._on_upload_done(peer, body)
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
                complete = len(self._keys) - 1
                return {name for name in self._active if len(self._seeds.get(name, ())) < complete}
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
        self._uploads.pop(peer, None)
        return self._advance()

    def _advance(self) -> list[Send]:
        answer: list[Send] = []
        while self.phase not in (Phase.DONE, Phase.FAILED) and not self._missing():
            answer += self._next_phase()
        return answer

    def _next_phase(self) -> list[Send]:
        match self.phase:
            case Phase.KEYS:
                if len(self._active) < self._parties.minimum:
                    return self._fail("too few nodes sent round keys")
                self._keys = {name: self._keys[name] for name in self._active}
                self._signed_keys = {name: self._signed_keys[name] for name in sorted(self._active)}
                self._cohort_digest = sealing.cohort_digest(self._attempt, self._signed_keys)
                self.phase = Phase.SEEDS
                keys = m.KeySet(tuple(self._signed_keys.values()))
                return [(name, keys) for name in sorted(self._active)]
            case Phase.SEEDS:
                if len(self._active) < self._parties.minimum:
                    return self._fail("too few nodes distributed seeds")
                self._senders = tuple(sorted(self._active))
                self.phase = Phase.UPLOAD
                return [send for name in self._senders for send in self._open_upload(name)]
            case Phase.UPLOAD:
                return self._close_uploads()
            case Phase.VOTES:
                if len(self._votes) < self._parties.threshold:
                    return self._fail("fewer survivors than the threshold signed the survivor set")
                self.phase, self.opened = Phase.UNMASK, True
                proof = m.SurvivorProof(tuple(sorted(self._votes.items())))
                self._active = set(self._votes)
                return [(name, proof) for name in sorted(self._active)]
            case _:
                return self._unmask()

    def _open_upload(self, name: str) -> list[Send]:
        sealed = tuple(self._signed_seeds[sender][name] for sender in self._senders if sender != name)
        self._uploads[name] = _Upload(bytearray(4 * self._size))
        return [(name, m.SeedSet(self._senders, sealed)), (name, m.Credit(self._chunk_count))]

    def _close_uploads(self) -> list[Send]:
        self._uploads.clear()
        self._survivors = tuple(sorted(self._digests.items()))
        if len(self._survivors) < self._parties.minimum:
            self._survivors = ()
            return self._fail("too few nodes uploaded")
        self.phase = Phase.VOTES
        # A node that uploaded and then vanished is still a survivor: its upload counts, only its vote is missing.
        self._active = set(self._digests) & self._active
        survivors = m.Survivors(self._survivors)
        return [(name, survivors) for name in sorted(self._active)]

    # --- what nodes send

    def _once(self, peer: str, differs: bool, what: str) -> None:
        if differs:
            raise RemoteProtocolError(peer, f"sent {what} in one attempt: equivocation")

    def _on_seeds(self, peer: str, body: m.SealedSeeds, signed: bytes) -> None:
        if body.recipient == peer or body.recipient not in self._keys:
            raise RemoteProtocolError(peer, f"sealed seeds for {body.recipient}, who takes no part")
        if body.cohort_digest != self._cohort_digest:
            raise RemoteProtocolError(peer, "sealed seeds for another set of round keys")
        signed_before = self._signed_seeds.setdefault(peer, {})
        self._once(
            peer, signed_before.get(body.recipient, signed) != signed, f"two different seeds for {body.recipient}"
        )
        signed_before[body.recipient] = signed
        self._seeds.setdefault(peer, {})[body.recipient] = body

    def _on_complaint(self, accuser: str, body: m.Complaint) -> list[Send]:
        """Seeds that do not open, or a false complaint: nobody can tell without opening more, so both sit this round out."""
        if body.accused == accuser or body.accused not in self._senders or accuser in self._digests:
            raise RemoteProtocolError(accuser, f"complained about {body.accused} without ground")
        self.disputed = (accuser, body.accused)
        return self._fail(f"{accuser} cannot open what {body.accused} sealed to it")

    def _on_chunk(self, peer: str, body: m.MaskedChunk) -> list[Send]:
        upload = self._uploads.get(peer)
        if upload is None or peer in self._digests:
            raise RemoteProtocolError(peer, "sent a chunk outside its upload")
        start = body.index * self._chunk_bytes
        expected = min(self._chunk_bytes, len(upload.data) - start)
        if body.index >= self._chunk_count or len(body.data) != expected:
            raise RemoteProtocolError(peer, f"sent chunk {body.index} of {len(body.data)} bytes, which no upload has")
        if body.index > upload.chunks:
            return self._drop(peer)  # Chunks were lost with a connection: no fault, but no upload either.
        if body.index < upload.chunks:
            self._once(peer, upload.data[start : start + expected] != body.data, "two different chunks of one index")
            return []
        upload.data[start : start + expected] = body.data
        upload.chunks += 1
        return []

    def _on_upload_done(self, peer: str, body: m.UploadDone) -> None:
        if peer in self._digests:
            self._once(peer, self._digests[peer] != body.digest, "two different uploads")
            return
        upload = self._uploads.get(peer)
        if upload is None:
            raise RemoteProtocolError(peer, "ended an upload that it never began")
        if upload.chunks != self._chunk_count:
            self._active.discard(peer)
            self.dropped.setdefault(peer, self.phase.value)
            return
        data = bytes(upload.data)
        if not sealing.same(upload_digest(data), body.digest):
            raise RemoteProtocolError(peer, "sent a digest that is not that of its upload")
        np.add(self._total, np.frombuffer(data, dtype="<u4"), out=self._total)
        self._digests[peer] = body.digest
        del self._uploads[peer]

    def _on_vote(self, peer: str, body: m.SurvivorVote) -> None:
        a = self._attempt
        statement = survivor_statement(a.agreement_digest, a.round, a.attempt, self._survivors)
        try:
            verify_signature(self._parties.public_keys[peer], Label.SURVIVORS, statement, body.signature)
        except VerificationFailed:
            raise RemoteProtocolError(peer, "voted for another survivor set") from None
        self._votes[peer] = body.signature

    def _on_unmasking(self, peer: str, body: m.Unmasking) -> None:
        survivors = {name for name, _ in self._survivors}
        lost = set(self._senders) - survivors
        if peer in self._unmasked:
            return
        if {name for name, _ in body.self_shares} != survivors or {name for name, _ in body.pair_shares} != lost:
            raise RemoteProtocolError(peer, "unmasked other nodes than the survivor set says")
        if len(body.self_shares) != len(survivors) or len(body.pair_shares) != len(lost):
            raise RemoteProtocolError(peer, "sent two shares of one secret")
        if not all(shamir.is_share(share) for _, share in (*body.self_shares, *body.pair_shares)):
            raise RemoteProtocolError(peer, "sent a share that is not a field element")
        for name, share in body.self_shares:
            self._self_shares.setdefault(name, {})[peer] = share
        for name, share in body.pair_shares:
            self._pair_shares.setdefault(name, {})[peer] = share
        self._unmasked.add(peer)

    # --- unmasking

    def _unmask(self) -> list[Send]:
        if len(self._unmasked) < self._parties.threshold:
            return self._fail("fewer nodes than the threshold answered in the unmasking")
        attempt, cohort = self._attempt, self._cohort_digest
        survivors = [name for name, _ in self._survivors]
        for name in survivors:
            commitment = self._keys[name].self_seed_commitment
            seed = self._reconstruct(
                self._self_shares[name],
                lambda s, n=name, c=commitment: sealing.same(sealing.self_seed_commitment(s, attempt, n), c),  # type: ignore[misc]
            )
            if seed is None:
                return self._blame_secret(name, "self seed")
            add_mask(self._total, sealing.self_mask_key(seed, attempt, name), subtract=True)
        for name in sorted(set(self._senders) - set(survivors)):
            public = self._keys[name].pair_public
            master = self._reconstruct(
                self._pair_shares[name],
                lambda s, p=public: sealing.same(sealing.public_key_bytes(s, attempt), p),  # type: ignore[misc]
            )
            if master is None:
                return self._blame_secret(name, "pair master")
            for survivor in survivors:
                low, high = min(name, survivor), max(name, survivor)
                if name == low:
                    secret = sealing.contribution(master, attempt, cohort, low, high)
                else:
                    try:
                        secret = open_contribution(master, attempt, cohort, low, high, self._seeds[low][high])
                    except sealing.SealBroken:
                        return self._blame_secret(low, "contribution")
                # The survivor's own mask is still in the total: low added it, high subtracted it.
                add_mask(
                    self._total, sealing.pair_mask_key(secret, attempt, cohort, low, high), subtract=survivor == low
                )
        self.phase = Phase.DONE
        self.outcome = SumOutcome(self._total, self._cohort, self._survivors, dict(self._votes), dict(self.dropped))
        return []

    def _reconstruct(self, shares: dict[str, bytes], genuine: Callable[[bytes], bool]) -> bytes | None:
        """Combine shares until the result matches what the owner signed, and blame the holders of shares that do not fit."""
        index = {name: position for position, name in enumerate(sorted(self._keys))}
        points = {index[holder]: share for holder, share in shares.items()}
        threshold = self._parties.threshold
        for subset in islice(combinations(sorted(points), threshold), MAX_RECONSTRUCTIONS):
            secret = shamir.combine({x: points[x] for x in subset}, threshold)
            if secret is None or not genuine(secret):
                continue
            for holder in shares.keys() - {name for name, x in index.items() if x in subset}:
                probe = {x: points[x] for x in (*subset[1:], index[holder])}
                if shamir.combine(probe, threshold) != secret:
                    self.blamed[holder] = f"{holder}: sent a wrong share in the unmasking"
            return secret
        return None

    def _blame_secret(self, owner: str, what: str) -> list[Send]:
        self.blamed[owner] = f"{owner}: the {what} that it shared cannot be reconstructed"
        return self._fail(f"the {what} of {owner} cannot be reconstructed from the shares that came back")

    def _fail(self, reason: str) -> list[Send]:
        self.failure = reason
        self._uploads.clear()
        self.phase = Phase.FAILED
        return []
