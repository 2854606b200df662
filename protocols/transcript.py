"""The aggregator's transcript: what was summed, by whom, with whose signatures (DESIGN section 7).

Each round leaves a `RoundRecord`, signed by the aggregator and chained, which nodes get as a receipt and countersign.
Two different records of one round, both signed, prove equivocation. A node's signature on the survivor statement says
that it saw this very set of survivors and uploads before it revealed anything; t of them are needed.

Threat assumption: the aggregator holds the signing key and may lie. It cannot invent a survivor set, or a receipt
that nobody gave. It can leave out rounds at the end before it signs the closing line: the ledgers, which are linked
to the last record that their node had seen, show that (`audit.records`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct

from keys.errors import VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label
from protocols.agreement import MAXIMUM_MEMBERS, MINIMUM_CONTRIBUTORS, Agreement, Name
from protocols.chain import ChainWriter, Entry, Hex32, Hex64, read_chain
from protocols.chain import line_digest as line_digest
from protocols.chain import read_line as read_chain_line
from protocols.sealing import AttemptId

Number = Annotated[int, Meta(ge=0, lt=1 << 53)]
Text = Annotated[str, Meta(max_length=500)]
OptionalHex64 = Annotated[str, Meta(pattern=r"\A([0-9a-f]{128})?\Z")]
Names = Annotated[tuple[Name, ...], Meta(max_length=MAXIMUM_MEMBERS)]


class Survivor(Struct, frozen=True, forbid_unknown_fields=True):
    """A contributor: the digest of its upload and, unless it vanished after uploading, its vote on the survivor set."""

    node_id: Name
    upload_digest: Hex32
    signature: OptionalHex64


class Dropped(Struct, frozen=True, forbid_unknown_fields=True):
    """A node that was lost, and in which phase of the attempt."""

    node_id: Name
    phase: Text


class Countersignature(Struct, frozen=True, forbid_unknown_fields=True):
    """A node's signature on the digest of a round's record."""

    node_id: Name
    signature: Hex64


class StudyOpened(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The first line."""

    study_id: Name
    agreement_digest: Hex32
    roster_digest: Hex32
    roster_epoch: Number
    roster_version: Number


class RoundRecord(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """One sum, with the sum of its tags (hexadecimal, big-endian), which only members can check, the id of the key that opens
    it, if it is encrypted, and the digest of the record of the sum before it (zeros: none), on which all contributors built.
    Bytes count messages as the aggregator received and sent them in this round so far."""

    agreement_digest: Hex32
    roster_epoch: Number
    roster_version: Number
    round: Number
    attempt: Number
    protocol: Name
    study_key: Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")]
    builds_on: Hex32
    cohort: Names
    senders_view: Hex32
    survivors: Annotated[tuple[Survivor, ...], Meta(max_length=MAXIMUM_MEMBERS)]
    dropped: Annotated[tuple[Dropped, ...], Meta(max_length=MAXIMUM_MEMBERS)]
    aggregate_digest: Hex32
    aggregate_tag: Annotated[str, Meta(pattern=r"\A[0-9a-f]{16}\Z")]
    upload_bytes: Number
    download_bytes: Number
    seconds: Annotated[float, Meta(ge=0.0)]


class Receipts(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The countersignatures under a round's record."""

    round: Number
    record_digest: Hex32
    countersignatures: Annotated[tuple[Countersignature, ...], Meta(max_length=MAXIMUM_MEMBERS)]


class RoundAbandoned(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A round that came to nothing, and who is to blame, if anyone."""

    round: Number
    attempt: Number
    reason: Text
    blamed: Names


class Misbehaved(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A node broke a rule and takes no further part."""

    round: Number
    node_id: Name
    fault: Text


class Disputed(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """One of the two is at fault: what `accused` sealed to `accuser` did not open, or the accuser says so falsely."""

    round: Number
    attempt: Number
    accuser: Name
    accused: Name


class StudyClosed(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The last line; without it the transcript was cut off."""

    rounds_completed: Number
    reason: Text


Body = StudyOpened | RoundRecord | Receipts | RoundAbandoned | Misbehaved | Disputed | StudyClosed
_TranscriptEntry = Entry[Body]


class TranscriptWriter(ChainWriter[Body]):
    """Makes transcript lines, signed by the aggregator."""

    def __init__(self, aggregator: Identity, written: Sequence[bytes] = ()) -> None:
        super().__init__(aggregator, Label.TRANSCRIPT, _TranscriptEntry, written)


def read_line(line: bytes, aggregator_key: Ed25519PublicKey) -> Entry[Body]:
    """Verify one transcript line by itself, as a node does with its receipt.

    Raises:
        VerificationFailed: malformed, edited, or not signed by the aggregator.
    """
    return read_chain_line(line, _TranscriptEntry, aggregator_key, Label.TRANSCRIPT)


def read_transcript(lines: bytes, aggregator_key: Ed25519PublicKey) -> tuple[tuple[Body, bytes], ...]:
    """Verify the chain and signatures of a whole transcript; gives every body with its line.

    Raises:
        VerificationFailed: names the first line that is wrong.
    """
    return tuple(
        (entry.body, line) for entry, line in read_chain(lines, _TranscriptEntry, aggregator_key, Label.TRANSCRIPT)
    )


def survivor_statement(attempt: AttemptId, view: bytes, survivors: Sequence[tuple[str, bytes]]) -> bytes:
    """What a survivor signs (with `Label.SURVIVORS`): who dealt seeds (`sealing.senders_view`), who uploaded, and what."""
    address = (attempt.agreement_digest, attempt.round, attempt.attempt)
    return msgspec.msgpack.encode((*address, view, [list(pair) for pair in survivors]))


def receipt_statement(agreement_digest: bytes, round_number: int, record_digest: bytes) -> bytes:
    """What a node countersigns (with `Label.RECEIPT`): the digest of the round's transcript line."""
    return msgspec.msgpack.encode((agreement_digest, round_number, record_digest))


def upload_digest(chunk_digests: bytes, tag: int) -> bytes:
    """SHA-256 of a masked upload: over the SHA-256 digests of its packed chunks, in order, and its masked tag (8 bytes, big-endian)."""
    return hashlib.sha256(Label.UPLOAD + chunk_digests + tag.to_bytes(8)).digest()


def aggregate_digest(total: bytes | bytearray | memoryview) -> bytes:
    """SHA-256 of a sum as the aggregator holds it at the end (`protocols.rings.octets`): values, or words of ciphertexts."""
    digest = hashlib.sha256(Label.AGGREGATE)
    digest.update(total)
    return digest.digest()


def verify_round(
    record: RoundRecord, agreement: Agreement, agreement_digest: bytes, public_keys: Mapping[str, Ed25519PublicKey]
) -> None:
    """Check one round's record against the agreement and the members' keys. Nodes and auditors call this alike.

    Raises:
        VerificationFailed: another agreement, strangers, too few survivors, or too few valid votes.
    """
    ring, pin = agreement.secure_sum, agreement.roster
    names = [survivor.node_id for survivor in record.survivors]
    dropped = [lost.node_id for lost in record.dropped]
    minimum = max(ring.minimum_cohort, ring.threshold, MINIMUM_CONTRIBUTORS)
    rules = [
        ("it belongs to another agreement", record.agreement_digest == agreement_digest.hex()),
        (
            "its round or attempt is not in the agreement",
            1 <= record.round <= agreement.study.rounds and 1 <= record.attempt <= ring.max_attempts,
        ),
        ("it names another protocol", record.protocol == ring.protocol),
        ("it names a study key, or none, against the agreement", bool(record.study_key) == ring.encrypted),
        ("it names another roster", (record.roster_epoch, record.roster_version) == (pin.epoch, pin.version)),
        ("its cohort has strangers", set(record.cohort) <= public_keys.keys()),
        ("its cohort is not sorted and distinct", list(record.cohort) == sorted(set(record.cohort))),
        ("its dropped are not sorted and distinct", dropped == sorted(set(dropped))),
        ("its cohort is not made of survivors and dropped", set(names) | set(dropped) == set(record.cohort)),
        ("its survivors are not sorted and distinct", names == sorted(set(names))),
        (f"it has fewer than {minimum} survivors", len(names) >= minimum),
    ]
    for fault, holds in rules:
        if not holds:
            raise VerificationFailed(f"the record of round {record.round} does not hold: {fault}")
    statement = survivor_statement(
        AttemptId(agreement_digest, record.round, record.attempt),
        bytes.fromhex(record.senders_view),
        [(s.node_id, bytes.fromhex(s.upload_digest)) for s in record.survivors],
    )
    votes = [survivor for survivor in record.survivors if survivor.signature]
    if len(votes) < ring.threshold:
        raise VerificationFailed(
            f"the record of round {record.round} has {len(votes)} votes; {ring.threshold} are needed"
        )
    for vote in votes:
        try:
            verify_signature(public_keys[vote.node_id], Label.SURVIVORS, statement, bytes.fromhex(vote.signature))
        except VerificationFailed:
            raise VerificationFailed(
                f"the record of round {record.round} holds a vote that {vote.node_id} never signed"
            ) from None


def verify_transcript(
    transcript: Sequence[tuple[Body, bytes]],
    agreement: Agreement,
    agreement_digest: bytes,
    public_keys: Mapping[str, Ed25519PublicKey],
) -> dict[int, RoundRecord]:
    """Check what a transcript says, after `read_transcript` has checked its chain; gives the record of every sum.

    Raises:
        VerificationFailed: no proper beginning or end, a record that does not hold, rounds out of order, or a receipt
            that was never signed.
    """
    if not transcript or not isinstance(transcript[0][0], StudyOpened):
        raise VerificationFailed("the transcript does not begin with the opening of the study")
    opened, closed = transcript[0][0], transcript[-1][0]
    if opened.agreement_digest != agreement_digest.hex() or opened.study_id != agreement.study.id:
        raise VerificationFailed("the transcript belongs to another agreement")
    pin = agreement.roster
    if (opened.roster_digest, opened.roster_epoch, opened.roster_version) != (pin.digest, pin.epoch, pin.version):
        raise VerificationFailed("the transcript was opened with another roster than agreed")
    if not isinstance(closed, StudyClosed):
        raise VerificationFailed("the transcript has no closing line: it was cut off, or the study still runs")
    records: dict[int, RoundRecord] = {}
    digests: dict[int, bytes] = {}
    last_record = bytes(32)
    receipted: set[int] = set()
    latest = 0
    for body, line in transcript[1:-1]:
        match body:
            case RoundRecord() | RoundAbandoned() if body.round != latest + 1:
                raise VerificationFailed(f"round {body.round} follows round {latest}: one is missing or told twice")
            case RoundRecord():
                verify_round(body, agreement, agreement_digest, public_keys)
                if body.builds_on != last_record.hex():
                    raise VerificationFailed(f"the record of round {body.round} does not build on the sum before it")
                records[body.round], latest = body, body.round
                digests[body.round] = last_record = line_digest(line)
            case RoundAbandoned():
                if body.round > agreement.study.rounds or not set(body.blamed) <= public_keys.keys():
                    raise VerificationFailed(
                        f"the abandoned round {body.round}, or who is blamed, is not in the agreement"
                    )
                latest = body.round
            case Receipts():
                if body.round in receipted:
                    raise VerificationFailed(f"the receipts of round {body.round} are told twice")
                _verify_receipts(body, digests, agreement_digest, public_keys)
                receipted.add(body.round)
            case Misbehaved():
                if body.node_id not in public_keys or body.round > latest + 1:
                    raise VerificationFailed(
                        f"{body.node_id} is said to have misbehaved in round {body.round}, but is no member, or it was not open"
                    )
            case Disputed():
                if not {body.accuser, body.accused} <= public_keys.keys():
                    raise VerificationFailed("a dispute is recorded between parties that are no members")
            case _:
                raise VerificationFailed(f"{type(body).__name__} stands in the middle of the transcript")
    if closed.rounds_completed != len(records):
        raise VerificationFailed(
            f"the closing line counts {closed.rounds_completed} rounds, the transcript has {len(records)}"
        )
    return records


def _verify_receipts(
    body: Receipts, digests: Mapping[int, bytes], agreement_digest: bytes, public_keys: Mapping[str, Ed25519PublicKey]
) -> None:
    digest = digests.get(body.round)
    if digest is None or digest.hex() != body.record_digest:
        raise VerificationFailed(f"the receipts of round {body.round} are for another record")
    names = [receipt.node_id for receipt in body.countersignatures]
    if names != sorted(set(names)):
        raise VerificationFailed(f"the receipts of round {body.round} are not sorted and distinct")
    statement = receipt_statement(agreement_digest, body.round, digest)
    for receipt in body.countersignatures:
        key = public_keys.get(receipt.node_id)
        if key is None:
            raise VerificationFailed(f"{receipt.node_id} countersigned round {body.round} but is no member")
        try:
            verify_signature(key, Label.RECEIPT, statement, bytes.fromhex(receipt.signature))
        except VerificationFailed:
            raise VerificationFailed(f"a receipt of round {body.round} was never signed by {receipt.node_id}") from None
