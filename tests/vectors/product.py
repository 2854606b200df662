"""The operations that the vectors name, as the packages under test compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.errors import VerificationFailed
from keys.identity import verify_signature
from keys.labels import Label
from protocols import messages, sealing, shamir, tags, transcript
from protocols.agreement import agreement_digest, check_rules, read_agreement
from protocols.encoding import FixedPoint, pack, unpack
from protocols.graph import MaskGraph
from protocols.prg import TAG_PRIME, MaskSet, keystream
from protocols.rings import IntegerRing
from protocols.sealing import AttemptId
from protocols.upload import Upload
from tests.vectors import product_encrypted
from tests.vectors.codec import FOLDER


def label_of(name: str) -> Label:
    return Label(f"secgeo/{name}/v1\0".encode())


def _uint32(values: Sequence[int]) -> Any:
    return np.array(values, dtype=np.uint32)


def _mask(values: Sequence[int], added: Sequence[bytes], subtracted: Sequence[bytes], chunk: int) -> list[int]:
    masked = _uint32(values)
    MaskSet(added, subtracted).apply(masked, chunk)
    return masked.tolist()


def _keys(master: bytes, attempt: Sequence[Any]) -> dict[str, bytes]:
    seed = sealing.hkdf(master, AttemptId(*attempt).bind(Label.PAIR_KEY), 96)
    public = sealing.public_key_bytes(master, AttemptId(*attempt))
    return {"mlkem_seed": seed[:64], "x25519_private": seed[64:], "public": public}


def _check_key(public: bytes) -> bool:
    sealing.seal(public, b"", b"")
    return True


def _check_signature(public: bytes, label_name: str, content: bytes, signature: bytes) -> bool:
    verify_signature(Ed25519PublicKey.from_public_bytes(public), label_of(label_name), content, signature)
    return True


def _split(secret: bytes, coins: Sequence[bytes], holders: int) -> list[bytes]:
    given = iter(coins)

    def draw(count: int) -> bytes:
        coin = next(given)
        if len(coin) != count:
            raise ValueError(f"a coin of {len(coin)} bytes where {count} are drawn")
        return coin

    return shamir.split(secret, len(coins) + 1, holders, draw)


def _tag_keys(seed: bytes, attempt: Sequence[Any]) -> dict[str, Any]:
    tagger = tags.Tagger(seed, AttemptId(*attempt))
    column_key = sealing.hkdf(seed, AttemptId(*attempt).bind(Label.TAG_KEY), 64)[:32]
    entries = tagger._columns.astype(int)
    row = np.frombuffer(keystream(tagger._row_key, 0, 2 * tags.COLUMNS), dtype="<u8") & np.uint64(TAG_PRIME)
    return {
        "column_key": column_key,
        "row_key": tagger._row_key,
        "pad": tagger.pad.to_bytes(8),
        "first_row_of_C": entries[0].tolist(),
        "last_row_of_C": entries[-1].tolist(),
        "first_row_of_R": [int(word).to_bytes(8) for word in row],
    }


def _check_tag(
    seed: bytes,
    attempt: Sequence[Any],
    total: Sequence[int],
    tag_total: bytes,
    contributors: int,
) -> bool:
    """As `NodeMachine` does with the sum that it is sent."""
    tagger = tags.Tagger(seed, AttemptId(*attempt))
    expected = (tagger.part(_uint32(total)) + contributors * tagger.pad) % TAG_PRIME
    if expected.to_bytes(8) != tag_total:
        raise VerificationFailed("the sum does not match its tags")
    return True


def _upload(
    encoding: Sequence[int],
    chunk_values: int,
    encoded: Sequence[int],
    tag_seed: bytes,
    attempt: Sequence[Any],
    added: Sequence[bytes],
    subtracted: Sequence[bytes],
) -> dict[str, Any]:
    fixed_point = FixedPoint(*encoding)
    vector = (
        np.array(encoded, dtype=np.float64) - 2.0 ** (fixed_point.value_bits - 1)
    ) / 2.0**fixed_point.fraction_bits
    tagger = tags.Tagger(tag_seed, AttemptId(*attempt))
    upload = Upload(
        IntegerRing(fixed_point.ring_bits, chunk_values),
        fixed_point,
        vector,
        tagger,
        MaskSet(added, subtracted),
        chunk_values,
    )
    messages = upload.make(upload.chunks, lambda _, digest: digest)
    made = [(bytes(data[:32]), bytes(data[32:])) for data in messages]
    tag = (tagger.part(_uint32(encoded)) + tagger.pad) % TAG_PRIME
    return {
        "tag": tag.to_bytes(8),
        "masked_tag": upload.tag.to_bytes(8),
        "chunk_bytes": [len(data) for _, data in made],
        "last_chunk": made[-1][1],
        "chunk_digests": [digest for digest, _ in made],
        "upload_digest": upload.digest,
    }


def _graph(names: Sequence[str], degree: int, cohort: bytes) -> dict[str, Any]:
    graph = MaskGraph.build(names, degree, cohort)
    return {
        "order": list(graph.order),
        "dealers": list(graph.dealers),
        "neighbours": {name: list(graph.neighbours(name)) for name in sorted(names)},
        "recipients": {name: list(graph.recipients(name)) for name in sorted(names)},
        "sources": {name: list(graph.sources(name)) for name in sorted(names)},
    }


def _agreed_graph(members: int, threshold: int, degree: int, share_threshold: int) -> int:
    agreement = read_agreement((FOLDER / "agreement.toml").read_bytes())
    ring = msgspec.structs.replace(
        agreement.secure_sum,
        ring_bits=32,
        minimum_cohort=max(3, threshold),
        threshold=threshold,
        neighbours=degree,
        share_threshold=share_threshold,
    )
    who = tuple(
        msgspec.structs.replace(agreement.members[0], node_id=f"hospital-{i:02d}", certificate_fingerprint=f"{i:064x}")
        for i in range(members)
    )
    agreement = msgspec.structs.replace(agreement, secure_sum=ring, members=who)
    check_rules(agreement)
    return agreement.colluders_tolerated


def body_fields(body: Any) -> list[Any]:
    """A body as the plain array that is on the wire: its name, then its fields."""
    fields: list[Any] = msgspec.msgpack.decode(msgspec.msgpack.encode(body))
    return fields


def head_of(data: bytes) -> list[Any]:
    head: list[Any] = msgspec.msgpack.decode(data[4 : 4 + int.from_bytes(data[:4])])
    return head


def _read_message(data: bytes, peer: str, public: bytes, agreement_digest: bytes) -> dict[str, Any]:
    message = messages.decode(data, peer, Ed25519PublicKey.from_public_bytes(public), agreement_digest)
    return {
        "round": message.round,
        "attempt": message.attempt,
        "body": body_fields(message.body),
        "signature": head_of(data)[6],
        "tail": bytes(message.tail),
    }


OPERATIONS: dict[str, Any] = {
    "limit": lambda encoding: FixedPoint(*encoding).limit,
    "encode": lambda encoding, values: FixedPoint(*encoding).encode(np.array(values, dtype=np.float64)).tolist(),
    "decode": lambda encoding, total, contributors: FixedPoint(*encoding).decode(_uint32(total), contributors).tolist(),
    "pack": lambda values, ring_bits: bytes(pack(_uint32(values), ring_bits)),
    "unpack": lambda data, count, ring_bits: unpack(data, count, ring_bits).tolist(),
    "keystream": keystream,
    "mask": _mask,
    "label": lambda name: bytes(label_of(name)),
    "bind": lambda attempt, label_name, parts: AttemptId(*attempt).bind(label_of(label_name), *parts),
    "agreement_digest": lambda document: agreement_digest(document.encode()),
    "keys": _keys,
    "check_key": _check_key,
    "check_signature": _check_signature,
    "self_mask_key": lambda self_seed, attempt, owner: sealing.self_mask_key(self_seed, AttemptId(*attempt), owner),
    "self_seed_commitment": lambda self_seed, attempt, owner: sealing.self_seed_commitment(
        self_seed, AttemptId(*attempt), owner
    ),
    "tag_commitment": lambda seed, attempt, dealer: tags.commitment(seed, AttemptId(*attempt), dealer),
    "share_digest": lambda share, attempt, owner, holder: sealing.share_digest(
        share, AttemptId(*attempt), owner, holder
    ),
    "contribution_digest": lambda contribution, attempt, low, high: sealing.contribution_digest(
        contribution, AttemptId(*attempt), low, high
    ),
    "keys_digest": sealing.keys_digest,
    "cohort_digest": lambda attempt, digests: sealing.cohort_digest(AttemptId(*attempt), digests),
    "senders_view": lambda attempt, cohort, senders: sealing.senders_view(AttemptId(*attempt), cohort, senders),
    "contribution": lambda master_low, attempt, cohort, low, high: sealing.contribution(
        master_low, AttemptId(*attempt), cohort, low, high
    ),
    "pair_mask_key": lambda contribution, attempt, cohort, low, high: sealing.pair_mask_key(
        contribution, AttemptId(*attempt), cohort, low, high
    ),
    "shares_info": lambda attempt, cohort, sender, recipient: sealing.shares_info(
        AttemptId(*attempt), cohort, sender, recipient
    ),
    "contribution_info": lambda attempt, cohort, low, high: sealing.contribution_info(
        AttemptId(*attempt), cohort, low, high
    ),
    "unseal": lambda master, attempt, info, sealed: sealing.unseal(
        sealing.private_key(master, AttemptId(*attempt)), sealed, info
    ),
    "survivor_statement": lambda attempt, view, survivors: transcript.survivor_statement(
        AttemptId(*attempt), view, survivors
    ),
    "receipt_statement": lambda agreement_digest, round, record_digest: transcript.receipt_statement(
        agreement_digest, round, record_digest
    ),
    "upload_digest": lambda chunks, tag: transcript.upload_digest(
        b"".join(map(messages.chunk_digest, chunks)), int.from_bytes(tag)
    ),
    "aggregate_digest": lambda total: transcript.aggregate_digest(_uint32(total).data),
    "split": _split,
    "combine": lambda shares, threshold: shamir.combine(dict(shares), threshold),
    "is_share": shamir.is_share,
    "tag_keys": _tag_keys,
    "tag": lambda seed, attempt, values, start: (
        tags.Tagger(seed, AttemptId(*attempt)).part(_uint32(values), start).to_bytes(8)
    ),
    "mask_tag": lambda tag, added, subtracted: MaskSet(added, subtracted).apply_to_tag(int.from_bytes(tag)).to_bytes(8),
    "check_tag": _check_tag,
    "upload": _upload,
    "graph": _graph,
    "tolerates": lambda names, degree, cohort, survivors, colluders: MaskGraph.build(names, degree, cohort).tolerates(
        survivors, colluders
    ),
    "agreed_graph": _agreed_graph,
    "read_message": _read_message,
    **product_encrypted.OPERATIONS,
}
