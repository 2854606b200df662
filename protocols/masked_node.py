"""One node's side of one attempt of the `masked` secure sum (Bonawitz et al. 2017, malicious-aggregator variant).

Sans-IO: bodies go in, bodies come out. The states and what each accepts:

    KEYS       KeySet          -> SealedSeeds to every other node            -> SEEDS
    SEEDS      SeedSet         -> (journal "used"), masked vector is ready   -> UPLOAD
    UPLOAD     Credit          -> MaskedChunk..., UploadDone                 -> UPLOAD
    UPLOAD     Survivors       -> SurvivorVote (once, if it names us)        -> VOTED
    VOTED      SurvivorProof   -> (journal "revealed"), Unmasking            -> REVEALED
    SEEDS      seeds that do not open -> Complaint                           -> COMPLAINED, which ignores the rest
    any other message in any other state is the aggregator's fault

Rules against a malicious aggregator: every round key is signed by a roster identity and our own must be among them
unchanged; all seals are bound to the digest of all round keys; the cohort never falls below the agreed minimum; a node votes
for one survivor set only and reveals only after t signatures on that set; for each peer it reveals the self-seed share
or the pair share, never both. What was used or revealed is journalled before it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import islice

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label
from protocols import messages as m
from protocols import sealing, shamir
from protocols.agreement import MINIMUM_CONTRIBUTORS, Agreement
from protocols.encoding import Uint32Vector
from protocols.prg import add_mask
from protocols.transcript import survivor_statement, upload_digest


class State(Enum):
    """The states of one attempt at a node."""

    KEYS = auto()
    SEEDS = auto()
    UPLOAD = auto()
    VOTED = auto()
    REVEALED = auto()
    COMPLAINED = auto()


class Shares(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one node seals for another: a share of its self seed and a share of its pair master."""

    self_share: m.Share
    pair_share: m.Share

    def __repr__(self) -> str:
        return "Shares(<redacted>)"


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


class MaskedNode:
    """One attempt at one node. Drive it with `open` once and `receive` for every body of the aggregator.

    Args:
        parties: agreement and roster keys.
        identity: our own keys.
        attempt: agreement digest, round and attempt number.
        cohort: whom the aggregator wants to sum; checked here.
        vector: the encoded update, [d] uint32; a masked copy is sent, the caller's array is not touched.
        coins: randomness, `os.urandom` outside tests.
        journal: called with "used" or "revealed" and must have made it durable when it returns.

    Raises:
        RemoteProtocolError: the cohort breaks the agreement.
    """

    def __init__(
        self,
        parties: Parties,
        identity: Identity,
        attempt: sealing.AttemptId,
        cohort: tuple[str, ...],
        vector: Uint32Vector,
        *,
        coins: shamir.Coins,
        journal: Callable[[str], None],
    ) -> None:
        self._parties, self._identity, self._attempt = parties, identity, attempt
        self._me = identity.node_id
        self._journal = journal
        self._coins = coins
        self._secrets = sealing.AttemptSecrets.fresh(coins)
        self._vector = vector
        self._cohort = frozenset(cohort)
        self._state = State.KEYS
        self._keys: dict[str, m.RoundKeys] = {}
        self._own_keys = b""
        self._cohort_digest = b""
        self._own_shares: Shares | None = None
        self._peer_shares: dict[str, Shares] = {}
        self._chunks: list[m.MaskedChunk | m.UploadDone] = []
        self._chunks_sent = 0
        self._digest = b""
        self._survivors: tuple[tuple[str, bytes], ...] = ()
        self._check(len(cohort) == len(self._cohort), "named a node twice in the cohort")
        self._check(self._cohort <= parties.public_keys.keys(), "put a stranger into the cohort")
        self._check(self._me in self._cohort, "opened an attempt that we are not part of")
        self._check(len(self._cohort) >= parties.minimum, "shrank the cohort below the agreed minimum")

    @property
    def state(self) -> State:
        """Where this attempt stands."""
        return self._state

    @property
    def survivors(self) -> tuple[tuple[str, bytes], ...]:
        """The survivor set that this node voted for, with upload digests; empty before."""
        return self._survivors

    def open(self) -> list[bytes]:
        """The first message: our signed round keys."""
        keys = m.RoundKeys(
            sealing.public_key_bytes(self._secrets.share_master, self._attempt),
            sealing.public_key_bytes(self._secrets.pair_master, self._attempt),
            sealing.self_seed_commitment(self._secrets.self_seed, self._attempt, self._me),
        )
        self._own_keys = self._sign(keys)
        return [self._own_keys]

    def receive(self, body: m.AnyBody) -> list[bytes]:
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
            case State.VOTED, m.SurvivorProof():
                return self._on_proof(body)
            case State.COMPLAINED, _:
                return []  # What crossed our complaint on the way; the attempt is void.
            case _:
                raise RemoteProtocolError(m.AGGREGATOR, f"sent {type(body).__name__} in state {self._state.name}")

    # --- KEYS: verify everyone's round keys, distribute shares and contributions

    def _on_keys(self, body: m.KeySet) -> list[bytes]:
        signed: dict[str, bytes] = {}
        for data in body.keys:
            sender = self._open_relayed(data, m.RoundKeys)
            self._check(sender.sender not in signed, f"relayed two round keys of {sender.sender}")
            self._check(
                sender.sender in self._cohort, f"relayed round keys of {sender.sender}, who is not in the cohort"
            )
            signed[sender.sender] = data
            self._keys[sender.sender] = sender.body  # type: ignore[assignment]
        self._check(signed.get(self._me) == self._own_keys, "left out or replaced our own round keys")
        self._check(len(signed) >= self._parties.minimum, "shrank the cohort below the agreed minimum")
        self._cohort_digest = sealing.cohort_digest(self._attempt, signed)
        names = sorted(self._keys)
        self_shares = shamir.split(self._secrets.self_seed, self._parties.threshold, len(names), self._coins)
        pair_shares = shamir.split(self._secrets.pair_master, self._parties.threshold, len(names), self._coins)
        answer: list[bytes] = []
        for name, self_share, pair_share in zip(names, self_shares, pair_shares, strict=True):
            if name == self._me:
                self._own_shares = Shares(self_share, pair_share)
            else:
                answer.append(self._sign(self._seal_for(name, Shares(self_share, pair_share))))
        self._state = State.SEEDS
        return answer

    def _seal_for(self, peer: str, shares: Shares) -> m.SealedSeeds:
        keys = self._keys[peer]
        attempt, cohort = self._attempt, self._cohort_digest
        sealed_contribution = b""
        try:
            sealed_shares = sealing.seal(
                keys.share_public, msgspec.msgpack.encode(shares), sealing.shares_info(attempt, cohort, self._me, peer)
            )
            if self._me < peer:
                own = sealing.contribution(self._secrets.pair_master, attempt, cohort, self._me, peer)
                info = sealing.contribution_info(attempt, cohort, self._me, peer)
                sealed_contribution = sealing.seal(keys.pair_public, own, info)
        except sealing.SealBroken:
            raise RemoteProtocolError(peer, "published round keys that are not valid keys") from None
        return m.SealedSeeds(peer, cohort, sealed_shares, sealed_contribution)

    # --- SEEDS: open what the others sealed, mask

    def _on_seeds(self, body: m.SeedSet) -> list[bytes]:
        senders = set(body.senders)
        self._check(len(senders) == len(body.senders), "named a sender of seeds twice")
        self._check(senders <= self._keys.keys(), "named a sender of seeds who has no round keys")
        self._check(self._me in senders, "left us out after we distributed our seeds")
        self._check(len(senders) >= self._parties.minimum, "shrank the cohort below the agreed minimum")
        contributions: dict[str, bytes] = {}
        for data in body.sealed:
            relayed = self._open_relayed(data, m.SealedSeeds)
            peer, seeds = relayed.sender, relayed.body
            if not isinstance(seeds, m.SealedSeeds):  # _open_relayed has checked the type already
                raise LocalProtocolError("unreachable")
            self._check(seeds.recipient == self._me, f"delivered seeds of {peer} that are not for us")
            self._check(
                peer in senders and peer not in self._peer_shares, f"delivered unasked or repeated seeds of {peer}"
            )
            self._check(seeds.cohort_digest == self._cohort_digest, f"showed {peer} other round keys than us")
            try:
                self._open_seeds(peer, seeds, contributions)
            except sealing.SealBroken:
                return self._complain(peer)
        self._check(senders == self._peer_shares.keys() | {self._me}, "held back seeds that were sent to us")
        self._journal("used")
        masked = self._vector.copy()
        add_mask(masked, sealing.self_mask_key(self._secrets.self_seed, self._attempt, self._me))
        for peer, contribution in contributions.items():
            low, high = min(self._me, peer), max(self._me, peer)
            key = sealing.pair_mask_key(contribution, self._attempt, self._cohort_digest, low, high)
            add_mask(masked, key, subtract=self._me == high)
        self._digest = self._split(masked)
        self._state = State.UPLOAD
        return []

    def _open_seeds(self, peer: str, seeds: m.SealedSeeds, contributions: dict[str, bytes]) -> None:
        attempt, cohort, secrets = self._attempt, self._cohort_digest, self._secrets
        self._peer_shares[peer] = open_shares(secrets.share_master, attempt, cohort, peer, self._me, seeds)
        if self._me < peer:
            contributions[peer] = sealing.contribution(secrets.pair_master, attempt, cohort, self._me, peer)
        else:
            contributions[peer] = open_contribution(secrets.pair_master, attempt, cohort, peer, self._me, seeds)

    def _complain(self, accused: str) -> list[bytes]:
        """Leave this attempt before anything is masked. Keys that would prove who lied also open other nodes' shares."""
        self._state = State.COMPLAINED
        return [self._sign(m.Complaint(accused))]

    def _split(self, masked: Uint32Vector) -> bytes:
        data = masked.astype("<u4", copy=False).tobytes()
        step = 4 * self._parties.agreement.secure_sum.chunk_values
        self._chunks = [
            m.MaskedChunk(index, data[start : start + step]) for index, start in enumerate(range(0, len(data), step))
        ]
        digest = upload_digest(data)
        self._chunks.append(m.UploadDone(digest))
        return digest

    # --- UPLOAD: chunks as far as credit goes

    def _on_credit(self, body: m.Credit) -> list[bytes]:
        limit = min(body.chunks, len(self._chunks) - 1)
        # The final UploadDone needs no credit of its own.
        stop = len(self._chunks) if limit == len(self._chunks) - 1 else limit
        answer = [self._sign(chunk) for chunk in islice(self._chunks, self._chunks_sent, stop)]
        self._chunks_sent = max(self._chunks_sent, stop)
        return answer

    # --- survivors: one vote, then one revelation

    def _on_survivors(self, body: m.Survivors) -> list[bytes]:
        names = [name for name, _ in body.survivors]
        self._check(names == sorted(set(names)), "sent a survivor set that is not sorted and distinct")
        self._check(set(names) <= self._peer_shares.keys() | {self._me}, "named a survivor who never distributed seeds")
        self._check(len(names) >= self._parties.minimum, "announced fewer survivors than the agreed minimum")
        digest = dict(body.survivors).get(self._me)
        if digest is None:
            return []  # Our upload was too late: others recover our pair masks; our self mask keeps it private.
        self._check(sealing.same(digest, self._digest), "announced another digest than that of our upload")
        self._check(self._chunks_sent == len(self._chunks), "announced survivors before our upload was complete")
        self._survivors = body.survivors
        self._chunks = []
        self._state = State.VOTED
        return [self._sign(m.SurvivorVote(self._identity.sign(Label.SURVIVORS, self._statement())))]

    def _statement(self) -> bytes:
        a = self._attempt
        return survivor_statement(a.agreement_digest, a.round, a.attempt, self._survivors)

    def _on_proof(self, body: m.SurvivorProof) -> list[bytes]:
        survivors = dict(self._survivors)
        voters = {name for name, _ in body.votes}
        self._check(
            len(voters) == len(body.votes) and voters <= survivors.keys(), "sent votes of strangers, or one twice"
        )
        self._check(len(voters) >= self._parties.threshold, f"sent fewer than {self._parties.threshold} survivor votes")
        for name, signature in body.votes:
            try:
                verify_signature(self._parties.public_keys[name], Label.SURVIVORS, self._statement(), signature)
            except VerificationFailed:
                raise RemoteProtocolError(m.AGGREGATOR, f"sent a survivor vote that {name} never signed") from None
        if self._own_shares is None:
            raise LocalProtocolError("no shares were made in this attempt")
        shares = self._peer_shares | {self._me: self._own_shares}
        self._journal("revealed")
        self._state = State.REVEALED
        unmasking = m.Unmasking(
            tuple((name, shares[name].self_share) for name in sorted(shares) if name in survivors),
            tuple((name, shares[name].pair_share) for name in sorted(shares) if name not in survivors),
        )
        self._peer_shares, self._own_shares = {}, None
        return [self._sign(unmasking)]

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
    share_master: bytes, attempt: sealing.AttemptId, cohort: bytes, sender: str, recipient: str, seeds: m.SealedSeeds
) -> Shares:
    """Open the shares that `sender` sealed to `recipient`.

    Raises:
        SealBroken: they do not open, or are not two field elements.
    """
    key = sealing.private_key(share_master, attempt)
    plaintext = sealing.unseal(key, seeds.shares, sealing.shares_info(attempt, cohort, sender, recipient))
    try:
        shares = msgspec.msgpack.decode(plaintext, type=Shares)
    except msgspec.DecodeError:
        raise sealing.SealBroken from None
    if not (shamir.is_share(shares.self_share) and shamir.is_share(shares.pair_share)):
        raise sealing.SealBroken
    return shares


def open_contribution(
    pair_master_high: bytes, attempt: sealing.AttemptId, cohort: bytes, low: str, high: str, seeds: m.SealedSeeds
) -> bytes:
    """Open the contribution that the pair's first node sealed to its second.

    Raises:
        SealBroken: it does not open, or is not 32 bytes.
    """
    key = sealing.private_key(pair_master_high, attempt)
    opened = sealing.unseal(key, seeds.contribution, sealing.contribution_info(attempt, cohort, low, high))
    if len(opened) != sealing.SEED_BYTES:
        raise sealing.SealBroken
    return opened
