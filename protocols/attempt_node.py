"""One node's side of one attempt of the secure sum (Bonawitz et al. 2017, malicious-aggregator variant).

Sans-IO: bodies go in, bodies come out. What an upload is made of is the ring's business (`protocols.rings`): `masked` and `layered` take
the same steps. `homomorphic` has no masks: it begins at UPLOAD and ends at VOTED. The states and what each accepts:

    KEYS       KeySet          -> SealedSeeds to neighbours (a dealer: to all)  -> SEEDS
    SEEDS      SeedSet         -> (journal "used"), masks are ready             -> UPLOAD
    UPLOAD     Credit          -> UploadChunk..., UploadDone                    -> UPLOAD
    UPLOAD     Survivors       -> (journal "voted"), SurvivorVote (if it names us) -> VOTED
    VOTED      SurvivorProof   -> Unmasking                                     -> REVEALED
    VOTED, REVEALED            -> the same again, word for word, for an aggregator that was restarted
    SEEDS      seeds that do not open -> Complaint                              -> COMPLAINED, which ignores the rest
    any other message in any other state is the aggregator's fault

Rules against a malicious aggregator: round keys are signed by roster identities, and our own must be among them unchanged; all
seals are bound to the digest of all round keys; the cohort never falls below the agreed minimum; the survivors keep every
honest node linked to honest ones (`protocols.graph`); a node votes for one survivor set only and reveals only after t
signatures on that set; for each peer it reveals the self-seed share or the pair share, never both. Whoever has voted takes part
in no other attempt of that round but one of the same nodes with the same update, all of them (docs/adr/0019). What was used or voted
is journalled before it is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

from keys.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label
from protocols import messages as m
from protocols import sealing, shamir, tags
from protocols.agreement import MINIMUM_CONTRIBUTORS, Agreement
from protocols.encoding import Data, FixedPoint, Float64Vector
from protocols.graph import MaskGraph
from protocols.prg import MaskSet
from protocols.rings import Ring
from protocols.study_key import StudyKey
from protocols.transcript import survivor_statement
from protocols.upload import Upload


class State(Enum):
    """The states of one attempt at a node."""

    KEYS = auto()
    SEEDS = auto()
    UPLOAD = auto()
    VOTED = auto()
    REVEALED = auto()
    COMPLAINED = auto()


class Shares(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one node seals for another: shares of its self seed and pair master if they are linked, a tag seed if it deals."""

    self_share: m.Share | None
    pair_share: m.Share | None
    tag_seed: m.Digest | None

    def __repr__(self) -> str:
        return "Shares(<redacted>)"


class Ballot(msgspec.Struct, frozen=True):
    """What a node's vote in a round stands for: whose sum, and which update of its own is in it."""

    nodes: tuple[str, ...]
    update_digest: m.Digest

    @classmethod
    def of(cls, nodes: Iterable[str], update: Float64Vector) -> Ballot:
        """The vote for the sum of `nodes` with `update` ([d] float64) in it."""
        return cls(tuple(nodes), hashlib.sha256(np.ascontiguousarray(update).data).digest())


@dataclass(frozen=True, slots=True)
class Parties:
    """Who takes part: the agreement's rules and the roster's identity keys of all members."""

    agreement: Agreement
    agreement_digest: bytes
    public_keys: Mapping[str, Ed25519PublicKey]

    @property
    def threshold(self) -> int:
        """Shamir threshold t, and the number of votes that a survivor set needs."""
        return self.agreement.secure_sum.threshold

    @property
    def minimum(self) -> int:
        """The smallest set whose sum may be opened."""
        return max(self.agreement.secure_sum.minimum_cohort, self.threshold, MINIMUM_CONTRIBUTORS)


class AttemptNode:
    """One attempt at one node. Drive it with `open` once and `receive` for every body of the aggregator.

    Args:
        parties: agreement and roster keys.
        identity: our own keys.
        attempt: agreement digest, round and attempt number.
        cohort: whom the aggregator wants to sum; checked here.
        last_record: digest of the record of the last sum that we applied, which all others must have applied too.
        ring: how values are sealed.
        study_key: where uploads are encrypted.
        vector: the update, [d] float64, finite; it is read while chunks are made and never written.
        coins: randomness, `os.urandom` outside tests.
        journal: called with "used" and the tag seed, or "voted" and the encoded ballot; durable when it returns.
        ballot: what we voted for in an attempt of this round before, if we did.

    Raises:
        RemoteProtocolError: the cohort breaks the agreement.
    """

    def __init__(
        self,
        parties: Parties,
        identity: Identity,
        attempt: sealing.AttemptId,
        cohort: tuple[str, ...],
        vector: Float64Vector,
        *,
        ring: Ring,
        study_key: StudyKey | None = None,
        coins: shamir.Coins,
        journal: Callable[[str, bytes], None],
        last_record: bytes = m.NO_RECORD,
        ballot: Ballot | None = None,
    ) -> None:
        self._parties, self._identity, self._attempt = parties, identity, attempt
        self._me = identity.node_id
        self._journal = journal
        self._last_record, self._ballot = last_record, ballot
        self._ring, self._study_key = ring, study_key
        self._coins = coins
        self._secrets = sealing.AttemptSecrets.fresh(coins)
        self._share_key, self._share_public = sealing.key_pair(self._secrets.share_master, attempt)
        self._pair_key, self._pair_public = sealing.key_pair(self._secrets.pair_master, attempt)
        self._vector = vector
        self._cohort = frozenset(cohort)
        self._state = State.KEYS
        self._keys: dict[str, m.RoundKeys] = {}
        self._names: frozenset[str] = frozenset()
        self._graph = MaskGraph((), 0)
        self._own_keys = b""
        self._cohort_digest = b""
        self._senders: frozenset[str] = frozenset()
        self._view = b""
        self._shares: dict[str, Shares] = {}
        self._upload: Upload | None = None
        self._digest = b""
        self._survivors: tuple[tuple[str, bytes], ...] = ()
        self._answer: list[bytes] = []
        self._check(len(cohort) == len(self._cohort), "named a node twice in the cohort")
        self._check(self._cohort <= parties.public_keys.keys(), "put a stranger into the cohort")
        self._check(self._me in self._cohort, "opened an attempt that we are not part of")
        self._check(len(self._cohort) >= parties.minimum, "shrank the cohort below the agreed minimum")
        self._check(
            ballot is None or self._cohort == set(ballot.nodes),
            "asked for a second sum of a round in which we have voted, of other nodes",
        )

    @property
    def state(self) -> State:
        """Where this attempt stands."""
        return self._state

    @property
    def uploaded(self) -> bool:
        """Whether our upload is sent, so that this attempt can go on without our connection."""
        return bool(self._digest)

    @property
    def survivors(self) -> tuple[tuple[str, bytes], ...]:
        """The survivor set that this node voted for, with upload digests; empty before."""
        return self._survivors

    def open(self) -> list[bytes]:
        """The first message: our signed round keys; nothing where nothing is masked."""
        if not self._parties.agreement.secure_sum.masked:
            self._open_unmasked()
            return []
        keys = m.RoundKeys(
            self._share_public,
            self._pair_public,
            sealing.self_seed_commitment(self._secrets.self_seed, self._attempt, self._me),
            tags.commitment(self._secrets.tag_seed, self._attempt, self._me),
            self._last_record,
        )
        self._own_keys = self._sign(keys)
        return [self._own_keys]

    def receive(self, body: m.AnyBody) -> Sequence[Data]:
        """Take one body of the aggregator and give the signed messages that answer it.

        Raises:
            RemoteProtocolError: the aggregator broke a rule; nothing was revealed and the node must leave the study.
        """
        match self._state, body:
            case State.KEYS, m.KeySet():
                return self._on_keys(body)
            case State.SEEDS, m.SeedSet():
                return self._on_seeds(body)
            case State.UPLOAD, m.Credit():
                return self._on_credit(body)
            case State.UPLOAD, m.Survivors():
                return self._on_survivors(body)
            case ((State.VOTED | State.REVEALED), m.Survivors()) if body.survivors == self._survivors:
                return self._vote()
            case State.VOTED, m.SurvivorProof() if self._parties.agreement.secure_sum.masked:
                return self._on_proof(body)
            case State.REVEALED, m.SurvivorProof():
                return self._answer
            case State.COMPLAINED, _:
                return []  # What crossed our complaint on the way; the attempt is void.
            case _:
                raise RemoteProtocolError(m.AGGREGATOR, f"sent {type(body).__name__} in state {self._state.name}")

    def _open_unmasked(self) -> None:
        """All of the cohort are senders, and the study key gives the tag seed."""
        if self._study_key is None:
            raise LocalProtocolError("there is no study key")
        self._names = self._senders = self._cohort
        self._cohort_digest = sealing.unmasked_cohort_digest(self._attempt, self._study_key.id, self._last_record)
        self._graph = MaskGraph.build(self._cohort, 0, self._cohort_digest)
        pad = self._study_key.tag_pad(self._attempt, self._me)
        self._begin_upload(self._study_key.tag_seed(self._attempt), MaskSet((), ()), pad)

    # --- KEYS: verify the round keys of all whom we deal with, distribute shares and contributions

    def _on_keys(self, body: m.KeySet) -> list[bytes]:
        digests = dict(body.digests)
        self._check(
            list(digests) == sorted(digests) == [name for name, _ in body.digests], "sent unsorted digests of keys"
        )
        self._check(digests.keys() <= self._cohort, "sent round keys of a node that is not in the cohort")
        self._check(
            digests.get(self._me) == sealing.keys_digest(self._own_keys), "left out or replaced our own round keys"
        )
        self._check(len(digests) >= self._parties.minimum, "shrank the cohort below the agreed minimum")
        ring = self._parties.agreement.secure_sum
        self._names = frozenset(digests)
        key_id = b"" if self._study_key is None else self._study_key.id
        self._cohort_digest = sealing.cohort_digest(self._attempt, digests, key_id)
        self._graph = MaskGraph.build(digests, ring.neighbours, self._cohort_digest)
        for data in body.keys:
            relayed = self._open_relayed(data, m.RoundKeys)
            self._check(
                sealing.keys_digest(data) == digests.get(relayed.sender),
                f"relayed other round keys of {relayed.sender} than it announced",
            )
            self._keys[relayed.sender] = relayed.body  # type: ignore[assignment]
        self._check_last_records()
        recipients = self._graph.recipients(self._me)
        self._check(
            self._keys.keys() >= {*recipients, *self._graph.sources(self._me)}, "held back round keys that we need"
        )
        holders = sorted({self._me, *self._graph.neighbours(self._me)})
        self_shares = shamir.split(self._secrets.self_seed, ring.shares_needed, len(holders), self._coins)
        pair_shares = shamir.split(self._secrets.pair_master, ring.shares_needed, len(holders), self._coins)
        dealt = self._secrets.tag_seed if self._me in self._graph.dealers else None
        given = {
            name: Shares(self_share, pair_share, dealt)
            for name, self_share, pair_share in zip(holders, self_shares, pair_shares, strict=True)
        }
        self._shares[self._me] = given[self._me]
        self._state = State.SEEDS
        seeds = [self._seal_for(name, given.get(name, Shares(None, None, dealt))) for name in recipients]
        return m.encode_together(self._identity, self._attempt, seeds)

    def _check_last_records(self) -> None:
        """All build on the same sum: nobody was told that a round was lost which others have applied."""
        for name, keys in self._keys.items():
            self._check(
                sealing.same(keys.last_record, self._last_record),
                f"told {name} another story about the last sum than us",
            )

    def _seal_for(self, peer: str, shares: Shares) -> m.SealedSeeds:
        keys = self._keys[peer]
        attempt, cohort = self._attempt, self._cohort_digest
        sealed_contribution, contribution_digest = b"", None
        try:
            sealed_shares = sealing.seal(
                keys.share_public, msgspec.msgpack.encode(shares), sealing.shares_info(attempt, cohort, self._me, peer)
            )
            if self._me < peer and shares.pair_share is not None:
                own = sealing.contribution(self._secrets.pair_master, attempt, cohort, self._me, peer)
                info = sealing.contribution_info(attempt, cohort, self._me, peer)
                sealed_contribution = sealing.seal(keys.pair_public, own, info)
                contribution_digest = sealing.contribution_digest(own, attempt, self._me, peer)
        except sealing.SealBroken:
            raise RemoteProtocolError(peer, "published round keys that are not valid keys") from None
        digests = share_digests(shares, attempt, self._me, peer)
        return m.SealedSeeds(peer, cohort, sealed_shares, sealed_contribution, *digests, contribution_digest)

    # --- SEEDS: open what the others sealed, prepare the masks

    def _on_seeds(self, body: m.SeedSet) -> list[bytes]:
        senders = frozenset(body.senders)
        self._check(len(senders) == len(body.senders), "named a sender of seeds twice")
        self._check(senders <= self._names, "named a sender of seeds who has no round keys")
        self._check(self._me in senders, "left us out after we distributed our seeds")
        self._check(len(senders) >= self._parties.minimum, "shrank the cohort below the agreed minimum")
        dealers = [name for name in self._graph.dealers if name in senders]
        self._check(bool(dealers), "went on although nobody dealt a tag seed")
        added = [sealing.self_mask_key(self._secrets.self_seed, self._attempt, self._me)]
        subtracted: list[bytes] = []
        for data in body.sealed:
            relayed = self._open_relayed(data, m.SealedSeeds)
            peer, seeds = relayed.sender, relayed.body
            if not isinstance(seeds, m.SealedSeeds):  # _open_relayed has checked the type already
                raise LocalProtocolError("unreachable")
            self._check(seeds.recipient == self._me, f"delivered seeds of {peer} that are not for us")
            self._check(peer in senders and peer not in self._shares, f"delivered unasked or repeated seeds of {peer}")
            self._check(seeds.cohort_digest == self._cohort_digest, f"showed {peer} other round keys than us")
            try:
                contribution = self._open_seeds(peer, seeds)
            except sealing.SealBroken:
                return self._complain(peer)
            if contribution is not None:
                low, high = min(self._me, peer), max(self._me, peer)
                key = sealing.pair_mask_key(contribution, self._attempt, self._cohort_digest, low, high)
                (added if self._me == low else subtracted).append(key)
        expected = {self._me, *self._graph.sources(self._me)} & senders
        self._check(self._shares.keys() == expected, "held back seeds that were sent to us")
        tag_seed = self._shares[dealers[0]].tag_seed
        if tag_seed is None:
            raise LocalProtocolError("unreachable")
        self._senders = senders
        self._begin_upload(tag_seed, MaskSet(added, subtracted))
        return []

    def _begin_upload(self, tag_seed: bytes, masks: MaskSet, pad: int = 0) -> None:
        self._view = sealing.senders_view(self._attempt, self._cohort_digest, self._senders)
        self._journal("used", tag_seed)
        self._upload = Upload(
            self._ring,
            FixedPoint.from_agreement(self._parties.agreement),
            self._vector,
            tags.Tagger(tag_seed, self._attempt),
            masks,
            self._parties.agreement.secure_sum.chunk_values,
            pad,
        )
        self._state = State.UPLOAD

    def _open_seeds(self, peer: str, seeds: m.SealedSeeds) -> bytes | None:
        """Keep the shares of `peer`; gives what the pair's first node contributes to the pair seed, if we are linked."""
        attempt, cohort, secrets = self._attempt, self._cohort_digest, self._secrets
        linked = peer in self._graph.neighbours(self._me)
        shares = open_shares(self._share_key, attempt, cohort, peer, self._me, seeds)
        if {shares.self_share is not None, shares.pair_share is not None} != {linked}:
            raise sealing.SealBroken
        if share_digests(shares, attempt, peer, self._me) != (seeds.self_share_digest, seeds.pair_share_digest):
            raise sealing.SealBroken
        if peer in self._graph.dealers and (
            shares.tag_seed is None
            or tags.commitment(shares.tag_seed, attempt, peer) != self._keys[peer].tag_commitment
        ):
            raise sealing.SealBroken
        self._shares[peer] = shares
        if not linked:
            return None
        if self._me < peer:
            return sealing.contribution(secrets.pair_master, attempt, cohort, self._me, peer)
        return open_contribution(self._pair_key, attempt, cohort, peer, self._me, seeds)

    def _complain(self, accused: str) -> list[bytes]:
        """Leave this attempt before anything is masked. Keys that would prove who lied also open other nodes' shares."""
        self._state = State.COMPLAINED
        return [self._sign(m.Complaint(accused))]

    # --- UPLOAD: chunks as far as credit goes

    def _on_credit(self, body: m.Credit) -> Sequence[Data]:
        upload = self._upload
        if upload is None or self._digest:
            return []  # Everything is sent already.
        answer = upload.make(
            body.chunks,
            lambda index, digest: m.envelope(self._identity, self._attempt, m.UploadChunk(index, digest)),
        )
        if upload.made == upload.chunks:
            self._digest, self._upload = upload.digest, None
            answer.append(self._sign(m.UploadDone(self._digest, self._view, upload.tag)))
        return answer

    # --- survivors: one vote, then one revelation

    def _on_survivors(self, body: m.Survivors) -> list[bytes]:
        names = [name for name, _ in body.survivors]
        self._check(names == sorted(set(names)), "sent a survivor set that is not sorted and distinct")
        self._check(self._senders.issuperset(names), "named a survivor who never distributed seeds")
        self._check(len(names) >= self._parties.minimum, "announced fewer survivors than the agreed minimum")
        colluders = self._parties.agreement.colluders_tolerated
        self._check(self._graph.tolerates(names, colluders), "announced survivors that colluders could cut apart")
        digests = dict(body.survivors)
        digest = digests.get(self._me)
        if digest is None:
            return []  # Our upload was too late: others recover our pair masks; our self mask keeps it private.
        self._check(bool(self._digest), "announced survivors before our upload was complete")
        self._check(sealing.same(digest, self._digest), "announced another digest than that of our upload")
        self._check_neighbours(body.uploads, digests)
        ballot = Ballot.of(names, self._vector)
        self._check(
            self._ballot in (None, ballot), "announced other survivors than in the attempt before in which we voted"
        )
        self._survivors = body.survivors
        self._journal("voted", msgspec.msgpack.encode(ballot))
        self._state = State.VOTED
        return self._vote()

    def _vote(self) -> list[bytes]:
        return [self._sign(m.SurvivorVote(self._identity.sign(Label.SURVIVORS, self._statement())))]

    def _check_neighbours(self, signed: tuple[bytes, ...], digests: Mapping[str, bytes]) -> None:
        """Every surviving neighbour has signed its upload, and masked it with the seeds of the very senders that we know of.

        Without this the aggregator could tell a node that its honest neighbours never dealt seeds, and unmask its upload.
        """
        uploads = {}
        for data in signed:
            relayed = self._open_relayed(data, m.UploadDone)
            if isinstance(relayed.body, m.UploadDone):  # _open_relayed has checked the type already
                uploads[relayed.sender] = relayed.body.digest, relayed.body.view
        for name in self._graph.neighbours(self._me):
            if name in digests:
                self._check(
                    uploads.get(name) == (digests[name], self._view),
                    f"announced an upload that {name} did not sign, or that it masked for other senders of seeds",
                )

    def _statement(self) -> bytes:
        return survivor_statement(self._attempt, self._view, self._survivors)

    def _on_proof(self, body: m.SurvivorProof) -> list[bytes]:
        survivors = dict(self._survivors)
        voters = {name for name, _ in body.votes}
        self._check(
            len(voters) == len(body.votes) and voters <= survivors.keys(), "sent votes of strangers, or one twice"
        )
        self._check(len(voters) >= self._parties.threshold, f"sent fewer than {self._parties.threshold} survivor votes")
        statement = self._statement()
        for name, signature in body.votes:
            try:
                verify_signature(self._parties.public_keys[name], Label.SURVIVORS, statement, signature)
            except VerificationFailed:
                raise RemoteProtocolError(m.AGGREGATOR, f"sent a survivor vote that {name} never signed") from None
        self._state = State.REVEALED
        held = sorted(self._shares.items())
        self_shares = tuple((name, s.self_share) for name, s in held if s.self_share and name in survivors)
        pair_shares = tuple((name, s.pair_share) for name, s in held if s.pair_share and name not in survivors)
        self._shares = {}
        self._answer = [self._sign(m.Unmasking(self_shares, pair_shares))]
        return self._answer

    # --- helpers

    def _sign(self, body: m.AnyBody) -> bytes:
        return m.encode(self._identity, self._attempt, body)

    def _open_relayed(self, data: bytes, kind: type[m.AnyBody]) -> m.Message:
        """Verify a message that another node signed and the aggregator relays."""
        sender = m.claimed_sender(data)
        key = self._parties.public_keys.get(sender)
        self._check(key is not None, "relayed a message of a stranger")
        if key is None:
            raise LocalProtocolError("unreachable")
        try:
            message = m.decode(data, sender, key, self._attempt.agreement_digest)
        except RemoteProtocolError:
            raise RemoteProtocolError(m.AGGREGATOR, f"relayed a message that {sender} never signed") from None
        self._check(
            (message.round, message.attempt) == (self._attempt.round, self._attempt.attempt),
            f"replayed a message of {sender} from another round or attempt",
        )
        self._check(
            isinstance(message.body, kind), f"relayed a {type(message.body).__name__} instead of {kind.__name__}"
        )
        return message

    def _check(self, holds: bool, fault: str) -> None:
        if not holds:
            raise RemoteProtocolError(m.AGGREGATOR, fault)


def open_shares(
    share_key: MLKEM768X25519PrivateKey,
    attempt: sealing.AttemptId,
    cohort: bytes,
    sender: str,
    recipient: str,
    seeds: m.SealedSeeds,
) -> Shares:
    """Open the shares that `sender` sealed to `recipient`.

    Raises:
        SealBroken: they do not open, or a share is not a field element.
    """
    plaintext = sealing.unseal(share_key, seeds.shares, sealing.shares_info(attempt, cohort, sender, recipient))
    try:
        shares = msgspec.msgpack.decode(plaintext, type=Shares)
    except msgspec.DecodeError:
        raise sealing.SealBroken from None
    if not all(share is None or shamir.is_share(share) for share in (shares.self_share, shares.pair_share)):
        raise sealing.SealBroken
    return shares


def share_digests(
    shares: Shares, attempt: sealing.AttemptId, owner: str, holder: str
) -> tuple[bytes | None, bytes | None]:
    """The digests of the self share and of the pair share that `owner` deals to `holder`."""
    self_share, pair_share = shares.self_share, shares.pair_share
    return (
        None if self_share is None else sealing.share_digest(self_share, attempt, owner, holder),
        None if pair_share is None else sealing.share_digest(pair_share, attempt, owner, holder),
    )


def open_contribution(
    pair_key: MLKEM768X25519PrivateKey,
    attempt: sealing.AttemptId,
    cohort: bytes,
    low: str,
    high: str,
    seeds: m.SealedSeeds,
) -> bytes:
    """Open the contribution that the pair's first node sealed to its second.

    Raises:
        SealBroken: it does not open, is not 32 bytes, or is another one than the digest says.
    """
    opened = sealing.unseal(pair_key, seeds.contribution, sealing.contribution_info(attempt, cohort, low, high))
    if len(opened) != sealing.SEED_BYTES:
        raise sealing.SealBroken
    if seeds.contribution_digest != sealing.contribution_digest(opened, attempt, low, high):
        raise sealing.SealBroken
    return opened
