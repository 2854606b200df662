"""The typed messages of the secure sum, and the signed envelope that carries each (DESIGN section 4).

Every message is one MessagePack array: version, agreement digest, round, attempt, sender, body, Ed25519 signature by the
sender over all that precedes it. Bodies are tagged arrays of fixed fields; every string and list has a bound that is checked
while decoding, trailing bytes and extra fields are refused, and a decoded envelope must re-encode to the very same bytes.
Bytes from the network are hostile: the only exception that leaves this module for them is `RemoteProtocolError(peer)`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct

from keys.errors import RemoteProtocolError, VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label
from protocols.agreement import MAXIMUM_MEMBERS, Name
from protocols.sealing import PUBLIC_KEY_BYTES, AttemptId
from protocols.shamir import SHARE_BYTES

VERSION: Final = 1
AGGREGATOR: Final = "aggregator"
"""How errors name the aggregator when a node blames it."""

CHUNK_LIMIT_BYTES: Final = 1 << 20
MESSAGE_LIMIT_BYTES: Final = CHUNK_LIMIT_BYTES + (1 << 16)
"""No message is larger: one chunk of at most 1 MiB and its envelope. The transport enforces the same bound."""

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
PublicKey = Annotated[bytes, Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
Share = Annotated[bytes, Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
Sealed = Annotated[bytes, Meta(max_length=2048)]
SignedMessage = Annotated[bytes, Meta(max_length=8192)]
Number = Annotated[int, Meta(ge=0, lt=1 << 32)]
Names = Annotated[tuple[Name, ...], Meta(max_length=MAXIMUM_MEMBERS)]
Chunk = Annotated[bytes, Meta(min_length=4, max_length=CHUNK_LIMIT_BYTES)]
PeerShares = Annotated[tuple[tuple[Name, Share], ...], Meta(max_length=MAXIMUM_MEMBERS)]
Reason = Annotated[str, Meta(max_length=500, pattern=r"\A[\x20-\x7e]*\Z")]
"""Text for people, in printable ASCII: nothing that a peer sends can steer an operator's terminal."""


class Body(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=lambda name: name):
    """Base of all message bodies: a frozen array whose first element is the message type."""


# --- node to aggregator


class Join(Body, frozen=True):
    """I am here, and the next round whose sum I lack is `next_round`."""

    next_round: Number


class Ready(Body, frozen=True):
    """I have trained this round and can take part in its secure sum."""


class Declined(Body, frozen=True):
    """I do not take part in this round or any later one (my privacy budget is spent, or I leave)."""

    reason: Reason


class RoundKeys(Body, frozen=True):
    """My fresh public keys of this attempt, and a commitment to my self seed."""

    share_public: PublicKey
    pair_public: PublicKey
    self_seed_commitment: Digest


class SealedSeeds(Body, frozen=True):
    """For one recipient: my shares under its share key; if I am the pair's first, my contribution under its pair key."""

    recipient: Name
    cohort_digest: Digest
    shares: Sealed
    contribution: Sealed


class Complaint(Body, frozen=True):
    """The seeds that `accused` sealed to me do not open. Nothing is disclosed: see docs/adr/0006."""

    accused: Name


class MaskedChunk(Body, frozen=True):
    """Chunk `index` of my masked vector: little-endian uint32 values."""

    index: Number
    data: Chunk


class UploadDone(Body, frozen=True):
    """All chunks are sent; `digest` is over the whole masked vector."""

    digest: Digest


class SurvivorVote(Body, frozen=True):
    """My signature on the survivor statement of this attempt."""

    signature: Signature


class Unmasking(Body, frozen=True):
    """For every survivor my share of its self seed; for every lost node my share of its pair master; never both."""

    self_shares: PeerShares
    pair_shares: PeerShares


class Receipt(Body, frozen=True):
    """I hold the sum and countersign the round's record."""

    signature: Signature


class Farewell(Body, frozen=True):
    """I know that the study is over."""


# --- aggregator to node


class RoundOpen(Body, frozen=True):
    """Train this round, on top of the sum of round `last_completed` (0: none yet)."""

    last_completed: Number


class AttemptOpen(Body, frozen=True):
    """Sum among this cohort: send fresh round keys."""

    cohort: Names


class KeySet(Body, frozen=True):
    """The signed round keys of all who answered."""

    keys: Annotated[tuple[SignedMessage, ...], Meta(max_length=MAXIMUM_MEMBERS)]


class SeedSet(Body, frozen=True):
    """Who distributed seeds, and the signed seeds that each of them sealed to the recipient of this message."""

    senders: Names
    sealed: Annotated[tuple[SignedMessage, ...], Meta(max_length=MAXIMUM_MEMBERS)]


class Credit(Body, frozen=True):
    """You may send chunks with an index below `chunks`."""

    chunks: Number


class Survivors(Body, frozen=True):
    """Who uploaded, and the digest of each upload."""

    survivors: Annotated[tuple[tuple[Name, Digest], ...], Meta(max_length=MAXIMUM_MEMBERS)]


class SurvivorProof(Body, frozen=True):
    """At least t signatures on the survivor statement: now unmask."""

    votes: Annotated[tuple[tuple[Name, Signature], ...], Meta(max_length=MAXIMUM_MEMBERS)]


class SumChunk(Body, frozen=True):
    """Chunk `index` of the unmasked sum: little-endian uint32 values."""

    index: Number
    data: Chunk


class RoundResult(Body, frozen=True):
    """The transcript line that records this round; its aggregate digest is over the chunks sent before."""

    record: Annotated[bytes, Meta(max_length=CHUNK_LIMIT_BYTES)]


class AttemptFailed(Body, frozen=True):
    """This attempt is void. If `final`, so is the round."""

    reason: Reason
    final: bool


class StudyEnded(Body, frozen=True):
    """The study is over."""

    reason: Reason


AnyBody = (
    Join
    | Ready
    | Declined
    | RoundKeys
    | SealedSeeds
    | Complaint
    | MaskedChunk
    | UploadDone
    | SurvivorVote
    | Unmasking
    | Receipt
    | Farewell
    | RoundOpen
    | AttemptOpen
    | KeySet
    | SeedSet
    | Credit
    | Survivors
    | SurvivorProof
    | SumChunk
    | RoundResult
    | AttemptFailed
    | StudyEnded
)


class _Envelope(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    agreement_digest: Digest
    round: Number
    attempt: Number
    sender: Name
    body: AnyBody
    signature: Signature


class Message(Struct, frozen=True):
    """A message whose signature has been checked."""

    sender: str
    round: int
    attempt: int
    body: AnyBody


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Envelope)


def encode(identity: Identity, attempt: AttemptId, body: AnyBody) -> bytes:
    """Sign and encode one message."""
    signed = _encoder.encode(
        (VERSION, attempt.agreement_digest, attempt.round, attempt.attempt, identity.node_id, body)
    )
    signature = identity.sign(Label.MESSAGE, signed)
    return _encoder.encode(
        _Envelope(VERSION, attempt.agreement_digest, attempt.round, attempt.attempt, identity.node_id, body, signature)
    )


def decode(
    data: bytes, peer: str, public_key: Ed25519PublicKey, agreement_digest: bytes, name: str | None = None
) -> Message:
    """Decode and verify one message of `peer`, whose roster key is `public_key`.

    Args:
        data: the bytes as received.
        peer: whom to blame; `name` is the sender it must claim where that differs (a node calls the aggregator "aggregator").
        public_key: the identity key that the roster gives for the sender.
        agreement_digest: the pinned agreement.
        name: the roster name of the sender, if other than `peer`.

    Raises:
        RemoteProtocolError: oversized, malformed, another version, sender or agreement, or a wrong signature.
    """
    if len(data) > MESSAGE_LIMIT_BYTES:
        raise RemoteProtocolError(peer, f"a message of {len(data)} bytes is over the limit of {MESSAGE_LIMIT_BYTES}")
    try:
        envelope = _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise RemoteProtocolError(peer, "a message that cannot be decoded") from None
    if envelope.version != VERSION:
        raise RemoteProtocolError(
            peer, f"speaks protocol version {envelope.version}, not {VERSION}; use the same release at all sites"
        )
    if envelope.sender != (name or peer):
        raise RemoteProtocolError(peer, f"sent a message in the name of {envelope.sender}")
    if envelope.agreement_digest != agreement_digest:
        raise RemoteProtocolError(peer, "works under another study agreement; compare the digests out of band")
    if _encoder.encode(envelope) != data:
        raise RemoteProtocolError(peer, "a message that is not in canonical form")
    fields = (
        envelope.version,
        envelope.agreement_digest,
        envelope.round,
        envelope.attempt,
        envelope.sender,
        envelope.body,
    )
    try:
        verify_signature(public_key, Label.MESSAGE, _encoder.encode(fields), envelope.signature)
    except VerificationFailed:
        raise RemoteProtocolError(peer, "a message with a wrong signature") from None
    return Message(envelope.sender, envelope.round, envelope.attempt, envelope.body)


def claimed_sender(data: bytes) -> str:
    """The sender that a relayed message claims, before anything is verified; empty if it cannot be decoded."""
    try:
        return _decoder.decode(data).sender
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return ""
