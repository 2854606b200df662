"""The typed messages of the secure sum, and the signed envelope that carries each (DESIGN section 4).

A message is the head's length (4 bytes, big-endian), the head, and the tail. The head is one MessagePack array: version,
agreement digest, round, attempt, sender, body, Ed25519 signature by the sender over all that precedes it; or one signature
for several messages that go out together, with the digests that it is over (docs/adr/0018). Only chunks have a tail: their
packed values, which the signed body binds by SHA-256, so that bulk data is hashed once and never copied. Bodies are tagged
arrays of fixed fields; every string and list has a bound that is checked while decoding, trailing bytes and extra fields
are refused, and a decoded head must re-encode to the very same bytes. Bytes from the network are hostile: the only
exception that leaves this module for them is `RemoteProtocolError(peer)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct

from keys.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label
from protocols.agreement import MAXIMUM_MEMBERS, Name
from protocols.encoding import Data
from protocols.prg import TAG_PRIME
from protocols.sealing import PUBLIC_KEY_BYTES, AttemptId
from protocols.shamir import SHARE_BYTES

VERSION: Final = 2
AGGREGATOR: Final = "aggregator"
"""How errors name the aggregator when a node blames it."""

CHUNK_LIMIT_BYTES: Final = 1 << 20
MESSAGE_LIMIT_BYTES: Final = CHUNK_LIMIT_BYTES + (1 << 16)
"""No message is larger: one chunk of at most 1 MiB and its head. The transport enforces the same bound."""

CHUNK_ENVELOPE_BYTES: Final = 256
"""The head of an `UploadChunk` and its length take no more. A multiple of an AES block: masks are fastest on aligned values."""

BATCH_MESSAGES: Final = 16
"""Messages that share a signature, at most: each of them holds the digests of all."""

NO_RECORD: Final = bytes(32)
"""Stands for the digest of the last record before the first sum."""

NO_KEY: Final = bytes(32)
"""Stands for the id of a study key that a node does not have, or that its study does not need."""

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
MaskedTag = Annotated[int, Meta(ge=0, lt=TAG_PRIME)]
PublicKey = Annotated[bytes, Meta(min_length=PUBLIC_KEY_BYTES, max_length=PUBLIC_KEY_BYTES)]
Share = Annotated[bytes, Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)]
Sealed = Annotated[bytes, Meta(max_length=2048)]
Box = Annotated[bytes, Meta(max_length=PUBLIC_KEY_BYTES)]
SealedKeyBytes = Annotated[bytes, Meta(max_length=1 << 15)]
SignedMessage = Annotated[bytes, Meta(max_length=8192)]
Number = Annotated[int, Meta(ge=0, lt=1 << 32)]
Names = Annotated[tuple[Name, ...], Meta(max_length=MAXIMUM_MEMBERS)]
PeerShares = Annotated[tuple[tuple[Name, Share], ...], Meta(max_length=MAXIMUM_MEMBERS)]
Reason = Annotated[str, Meta(max_length=500, pattern=r"\A[\x20-\x7e]*\Z")]
"""Text for people, in printable ASCII: nothing that a peer sends can steer an operator's terminal."""


class Body(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=lambda name: name):
    """Base of all message bodies: a frozen array whose first element is the message type."""


# --- node to aggregator


class Join(Body, frozen=True):
    """I am here, and the next round whose sum I lack is `next_round`.

    In a study with a study key: the id of the one that I hold, and a public key to which another may be sealed.
    """

    next_round: Number
    study_key: Digest = NO_KEY
    box: Box = b""


class Ready(Body, frozen=True):
    """I have trained this round and can take part in its secure sum."""


class Declined(Body, frozen=True):
    """I do not take part in this round or any later one (my privacy budget is spent, or I leave)."""

    reason: Reason


class RoundKeys(Body, frozen=True):
    """My fresh public keys of this attempt, commitments to my self seed and to the tag seed that I would deal, and what I build on.

    `last_record` is the digest of the record of the last sum that I applied (`NO_RECORD`: none yet).
    """

    share_public: PublicKey
    pair_public: PublicKey
    self_seed_commitment: Digest
    tag_commitment: Digest
    last_record: Digest


class SealedSeeds(Body, frozen=True):
    """For one recipient: my shares, and the tag seed if I deal it, under its share key; if we are linked and I am the pair's
    first, my contribution under its pair key.

    The digests are open: when the recipient reveals a share, or my pair master is recovered, it shows whether I dealt that share
    and sealed that contribution.
    """

    recipient: Name
    cohort_digest: Digest
    shares: Sealed
    contribution: Sealed
    self_share_digest: Digest | None
    pair_share_digest: Digest | None
    contribution_digest: Digest | None


class Complaint(Body, frozen=True):
    """The seeds that `accused` sealed to me do not open. Nothing is disclosed: see docs/adr/0006."""

    accused: Name


class UploadChunk(Body, frozen=True):
    """Chunk `index` of my masked vector: the tail holds its packed values."""

    index: Number
    digest: Digest


class UploadDone(Body, frozen=True):
    """All chunks are sent: `digest` is over the digests of all of them and the masked tag, masked with seeds of the senders in `view`."""

    digest: Digest
    view: Digest
    tag: MaskedTag


class SurvivorVote(Body, frozen=True):
    """My signature on the survivor statement of this attempt."""

    signature: Signature


class Unmasking(Body, frozen=True):
    """My share of each surviving neighbour's self seed, and of my own; of each lost neighbour's pair master; never both."""

    self_shares: PeerShares
    pair_shares: PeerShares


class Receipt(Body, frozen=True):
    """I hold the sum and countersign the round's record."""

    signature: Signature


class SealedKey(Body, frozen=True):
    """The study key `key_id`, sealed to the box of `recipient`."""

    recipient: Name
    key_id: Digest
    sealed: SealedKeyBytes


class Farewell(Body, frozen=True):
    """I know that the study is over."""


# --- aggregator to node


class DealKey(Body, frozen=True):
    """Seal the study key to those who said these `Join`s. With `make`: nobody shows one, so make it, and say that you have it."""

    joins: Annotated[tuple[SignedMessage, ...], Meta(max_length=MAXIMUM_MEMBERS)]
    make: bool


class DealtKey(Body, frozen=True):
    """The `SealedKey` that another node has signed for you."""

    message: Annotated[bytes, Meta(max_length=1 << 16)]


class RoundOpen(Body, frozen=True):
    """Train this round, on top of the sum of round `last_completed` (0: none yet)."""

    last_completed: Number


class AttemptOpen(Body, frozen=True):
    """Sum among this cohort: send fresh round keys."""

    cohort: Names


class KeySet(Body, frozen=True):
    """Who answered, with the digest of its signed round keys; in full those that the recipient needs."""

    digests: Annotated[tuple[tuple[Name, Digest], ...], Meta(max_length=MAXIMUM_MEMBERS)]
    keys: Annotated[tuple[SignedMessage, ...], Meta(max_length=MAXIMUM_MEMBERS)]


class SeedSet(Body, frozen=True):
    """Who distributed seeds, and the signed seeds that each of them sealed to the recipient of this message."""

    senders: Names
    sealed: Annotated[tuple[SignedMessage, ...], Meta(max_length=MAXIMUM_MEMBERS)]


class Credit(Body, frozen=True):
    """You may send chunks with an index below `chunks`."""

    chunks: Number


class Survivors(Body, frozen=True):
    """Who uploaded, and the digest of each upload; of the recipient's neighbours also the signed `UploadDone`."""

    survivors: Annotated[tuple[tuple[Name, Digest], ...], Meta(max_length=MAXIMUM_MEMBERS)]
    uploads: Annotated[tuple[SignedMessage, ...], Meta(max_length=MAXIMUM_MEMBERS)]


class SurvivorProof(Body, frozen=True):
    """At least t signatures on the survivor statement: now unmask."""

    votes: Annotated[tuple[tuple[Name, Signature], ...], Meta(max_length=MAXIMUM_MEMBERS)]


class SumChunk(Body, frozen=True):
    """Chunk `index` of the unmasked sum: the tail holds its packed values."""

    index: Number
    digest: Digest


class RoundResult(Body, frozen=True):
    """The transcript line that records this round; its aggregate digest is over the sum sent before.

    `receipts` are countersignatures of others, for a node that cannot check the sum's tags because it took no part.
    """

    record: Annotated[bytes, Meta(max_length=CHUNK_LIMIT_BYTES // 2)]
    receipts: Annotated[tuple[tuple[Name, Signature], ...], Meta(max_length=MAXIMUM_MEMBERS)] = ()


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
    | UploadChunk
    | UploadDone
    | SurvivorVote
    | Unmasking
    | Receipt
    | SealedKey
    | Farewell
    | DealKey
    | DealtKey
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


class BatchSignature(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One signature over the digests of several messages that went out together; that of the message that it is in is among them."""

    signature: Signature
    digests: Annotated[tuple[Digest, ...], Meta(min_length=2, max_length=BATCH_MESSAGES)]


class _Head(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    agreement_digest: Digest
    round: Number
    attempt: Number
    sender: Name
    body: AnyBody
    signature: Signature | BatchSignature


@dataclass(frozen=True, slots=True)
class Message:
    """A message whose signature has been checked. `tail` is a view of the received bytes, empty but for chunks."""

    sender: str
    round: int
    attempt: int
    body: AnyBody
    tail: memoryview = field(default=memoryview(b""), repr=False)


_LENGTH_BYTES = 4
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Head)


def chunk_digest(data: Data) -> bytes:
    """SHA-256 of one chunk's packed values."""
    return hashlib.sha256(data).digest()


def encode(identity: Identity, attempt: AttemptId, body: AnyBody, tail: Data = b"") -> bytes:
    """Sign and encode one message; `tail` is for chunks, whose body must hold its digest."""
    return b"".join((envelope(identity, attempt, body), tail))


def envelope(identity: Identity, attempt: AttemptId, body: AnyBody) -> bytes:
    """Sign one message and encode all but its tail: the head's length and the head. A chunk's is at most `CHUNK_ENVELOPE_BYTES`."""
    unsigned = _unsigned(identity, attempt, body)
    return _framed(unsigned, identity.sign(Label.MESSAGE, _encoder.encode(unsigned)))


def encode_together(identity: Identity, attempt: AttemptId, bodies: Sequence[AnyBody]) -> list[bytes]:
    """Sign and encode messages without tails that go out together, `BATCH_MESSAGES` under one signature.

    Who gets one of them gets digests of the others, and could test a guess at them: bodies must hold what nobody guesses.

    Raises:
        LocalProtocolError: two of them are the same.
    """
    batches = [bodies[first : first + BATCH_MESSAGES] for first in range(0, len(bodies), BATCH_MESSAGES)]
    return [message for batch in batches for message in _encode_batch(identity, attempt, batch)]


def _encode_batch(identity: Identity, attempt: AttemptId, bodies: Sequence[AnyBody]) -> list[bytes]:
    if len(bodies) == 1:
        return [encode(identity, attempt, bodies[0])]
    heads = [_unsigned(identity, attempt, body) for body in bodies]
    digests = tuple(_batch_digest(_encoder.encode(unsigned)) for unsigned in heads)
    if len(set(digests)) < len(digests):
        raise LocalProtocolError("the same message twice in one batch")
    signature = BatchSignature(identity.sign(Label.MESSAGE_BATCH, _encoder.encode(digests)), digests)
    return [_framed(unsigned, signature) for unsigned in heads]


_Unsigned = tuple[int, bytes, int, int, str, AnyBody]
"""The fields of a head before its signature."""


def _unsigned(identity: Identity, attempt: AttemptId, body: AnyBody) -> _Unsigned:
    return VERSION, attempt.agreement_digest, attempt.round, attempt.attempt, identity.node_id, body


def _framed(unsigned: _Unsigned, signature: bytes | BatchSignature) -> bytes:
    head = _encoder.encode((*unsigned, signature))
    return len(head).to_bytes(_LENGTH_BYTES) + head


def _batch_digest(unsigned: bytes) -> bytes:
    """What stands for a message in a batch: SHA-256 of the very bytes that would be signed if it went alone."""
    return hashlib.sha256(Label.MESSAGE + unsigned).digest()


def decode(
    data: Data, peer: str, public_key: Ed25519PublicKey, agreement_digest: bytes, name: str | None = None
) -> Message:
    """Decode and verify one message of `peer`, whose roster key is `public_key`.

    Args:
        data: the bytes as received.
        peer: whom to blame; `name` is the sender it must claim where that differs (a node calls the aggregator "aggregator").
        public_key: the identity key that the roster gives for the sender.
        agreement_digest: the pinned agreement.
        name: the roster name of the sender, if other than `peer`.

    Raises:
        RemoteProtocolError: oversized, malformed, another version, sender or agreement, a wrong signature or chunk digest.
    """
    if len(data) > MESSAGE_LIMIT_BYTES:
        raise RemoteProtocolError(peer, f"a message of {len(data)} bytes is over the limit of {MESSAGE_LIMIT_BYTES}")
    encoded, tail = _split(data)
    try:
        head = _decoder.decode(encoded)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise RemoteProtocolError(peer, "a message that cannot be decoded") from None
    if head.version != VERSION:
        raise RemoteProtocolError(
            peer, f"speaks protocol version {head.version}, not {VERSION}; use the same release at all sites"
        )
    if head.sender != (name or peer):
        raise RemoteProtocolError(peer, f"sent a message in the name of {head.sender}")
    if head.agreement_digest != agreement_digest:
        raise RemoteProtocolError(peer, "works under another study agreement; compare the digests out of band")
    if _encoder.encode(head) != encoded or len(encoded) != int.from_bytes(data[:_LENGTH_BYTES]):
        raise RemoteProtocolError(peer, "a message that is not in canonical form")
    unsigned = (head.version, head.agreement_digest, head.round, head.attempt, head.sender, head.body)
    try:
        _verify(public_key, _encoder.encode(unsigned), head.signature)
    except VerificationFailed:
        raise RemoteProtocolError(peer, "a message with a wrong signature") from None
    if isinstance(head.body, UploadChunk | SumChunk):
        if chunk_digest(tail) != head.body.digest:
            raise RemoteProtocolError(peer, "a chunk that is not the one it signed")
    elif tail:
        raise RemoteProtocolError(peer, f"a {type(head.body).__name__} with bytes behind it")
    return Message(head.sender, head.round, head.attempt, head.body, tail)


def _verify(public_key: Ed25519PublicKey, unsigned: bytes, signature: bytes | BatchSignature) -> None:
    """Check the signature of an encoded head without it.

    Raises:
        VerificationFailed: it is not its sender's; or the message is not in the batch, or one is in it twice.
    """
    if not isinstance(signature, BatchSignature):
        verify_signature(public_key, Label.MESSAGE, unsigned, signature)
        return
    digests = signature.digests
    if _batch_digest(unsigned) not in digests or len(set(digests)) < len(digests):
        raise VerificationFailed("a batch that this message is not in, or that has one twice")
    verify_signature(public_key, Label.MESSAGE_BATCH, _encoder.encode(digests), signature.signature)


def _split(data: Data) -> tuple[memoryview, memoryview]:
    view = memoryview(data)
    end = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES])
    return view[_LENGTH_BYTES:end], view[end:]


def claimed_sender(data: bytes) -> str:
    """The sender that a relayed message claims, before anything is verified; empty if it cannot be decoded."""
    try:
        return _decoder.decode(_split(data)[0]).sender
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return ""
