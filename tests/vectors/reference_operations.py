"""The operations that the vectors name, by the second implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.vectors import reference_encrypted
from tests.vectors.reference import (
    FIELD,
    TAG_PRIME,
    FixedPoint,
    agreed_graph,
    bind,
    cohort_digest,
    combine,
    hkdf,
    is_public_key,
    key_seed,
    keystream,
    label,
    mask,
    mask_tag,
    need,
    neighbours,
    order,
    pack,
    packed,
    public_key,
    sha256,
    signed,
    split,
    tag,
    tag_keys,
    tag_pad,
    tolerates,
    unpack,
    unseal,
    words,
)
from tests.vectors.reference_messages import read_message


def _sequence(attempt: Sequence[Any], cohort: bytes, name: str, low: str, high: str, secret: bytes) -> bytes:
    return hkdf(secret, bind(attempt, name, cohort, low, high))


def _check_key(public: bytes) -> bool:
    need(is_public_key(public))
    return True


def _check_signature(public: bytes, label_name: str, content: bytes, signature: bytes) -> bool:
    need(signed(public, label_name, content, signature))
    return True


def _tag_keys(seed: bytes, attempt: Sequence[Any]) -> dict[str, Any]:
    columns, rows = tag_keys(seed, attempt)
    entries = [word % 2**11 for word in words(keystream(columns, 0, 2560), 2)]
    return {
        "column_key": columns,
        "row_key": rows,
        "pad": tag_pad(seed, attempt).to_bytes(8),
        "first_row_of_C": entries[:5],
        "last_row_of_C": entries[-5:],
        "first_row_of_R": [(word % 2**61).to_bytes(8) for word in words(keystream(rows, 0, 10), 8)],
    }


def _check_tag(
    seed: bytes,
    attempt: Sequence[Any],
    total: Sequence[int],
    tag_total: bytes,
    contributors: int,
) -> bool:
    expected = tag(seed, attempt, total) + contributors * tag_pad(seed, attempt)
    need((expected % TAG_PRIME).to_bytes(8) == tag_total)
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
    ring_bits = encoding[2]
    number = (tag(tag_seed, attempt, encoded) + tag_pad(tag_seed, attempt)) % TAG_PRIME
    masked_tag = mask_tag(number, added, subtracted).to_bytes(8)
    parts = [encoded[at : at + chunk_values] for at in range(0, len(encoded), chunk_values)]
    chunks = [pack(mask(part, added, subtracted, index), ring_bits) for index, part in enumerate(parts)]
    digests = [sha256(chunk) for chunk in chunks]
    return {
        "tag": number.to_bytes(8),
        "masked_tag": masked_tag,
        "chunk_bytes": [len(chunk) for chunk in chunks],
        "last_chunk": chunks[-1],
        "chunk_digests": digests,
        "upload_digest": sha256(label("upload"), *digests, masked_tag),
    }


def _graph(names: Sequence[str], degree: int, cohort: bytes) -> dict[str, Any]:
    circle = order(names, cohort)
    linked = {name: neighbours(circle, degree, name) for name in sorted(names)}
    dealers = circle[:3]
    return {
        "order": circle,
        "dealers": dealers,
        "neighbours": linked,
        "recipients": {n: sorted(set(names) - {n}) if n in dealers else linked[n] for n in linked},
        "sources": {n: sorted({*linked[n], *dealers} - {n}) for n in linked},
    }


def _keys(master: bytes, attempt: Sequence[Any]) -> dict[str, bytes]:
    seed = key_seed(master, attempt)
    return {"mlkem_seed": seed[:64], "x25519_private": seed[64:], "public": public_key(master, attempt)}


OPERATIONS: dict[str, Any] = {
    "limit": lambda encoding: float(FixedPoint(*encoding).limit),
    "encode": lambda encoding, values: FixedPoint(*encoding).encode([float(value) for value in values]),
    "decode": lambda encoding, total, contributors: FixedPoint(*encoding).decode(total, contributors),
    "pack": pack,
    "unpack": unpack,
    "keystream": keystream,
    "mask": mask,
    "label": label,
    "bind": lambda attempt, label_name, parts: bind(attempt, label_name, *parts),
    "agreement_digest": lambda document: sha256(label("agreement"), document.encode()),
    "keys": _keys,
    "check_key": _check_key,
    "check_signature": _check_signature,
    "self_mask_key": lambda self_seed, attempt, owner: hkdf(self_seed, bind(attempt, "self-seed", owner)),
    "self_seed_commitment": lambda self_seed, attempt, owner: sha256(
        bind(attempt, "self-seed-commitment", owner, self_seed)
    ),
    "tag_commitment": lambda seed, attempt, dealer: sha256(bind(attempt, "tag-commitment", dealer, seed)),
    "contribution_digest": lambda contribution, attempt, low, high: sha256(
        bind(attempt, "contribution-digest", low, high, contribution)
    ),
    "share_digest": lambda share, attempt, owner, holder: sha256(bind(attempt, "share-digest", owner, holder, share)),
    "keys_digest": lambda signed_keys: sha256(signed_keys),
    "cohort_digest": cohort_digest,
    "senders_view": lambda attempt, cohort, senders: sha256(bind(attempt, "senders", cohort, *sorted(senders))),
    "contribution": lambda master_low, attempt, cohort, low, high: _sequence(
        attempt, cohort, "pair-contribution", low, high, master_low
    ),
    "pair_mask_key": lambda contribution, attempt, cohort, low, high: _sequence(
        attempt, cohort, "pair-seed", low, high, contribution
    ),
    "shares_info": lambda attempt, cohort, sender, recipient: bind(attempt, "seal-shares", cohort, sender, recipient),
    "contribution_info": lambda attempt, cohort, low, high: bind(attempt, "seal-contribution", cohort, low, high),
    "unseal": unseal,
    "survivor_statement": lambda attempt, view, survivors: packed([*attempt, view, survivors]),
    "receipt_statement": lambda agreement_digest, round, record_digest: packed(
        [agreement_digest, round, record_digest]
    ),
    "upload_digest": lambda chunks, tag: sha256(label("upload"), *map(sha256, chunks), tag),
    "aggregate_digest": lambda total: sha256(label("aggregate"), pack(total, 32)),
    "split": lambda secret, coins, holders: split(secret, [int.from_bytes(coin) % FIELD for coin in coins], holders),
    "combine": combine,
    "is_share": lambda data: len(data) == 33 and int.from_bytes(data) < FIELD,
    "tag_keys": _tag_keys,
    "tag": lambda seed, attempt, values, start: tag(seed, attempt, values, start).to_bytes(8),
    "mask_tag": lambda tag, added, subtracted: mask_tag(int.from_bytes(tag), added, subtracted).to_bytes(8),
    "check_tag": _check_tag,
    "upload": _upload,
    "graph": _graph,
    "tolerates": lambda names, degree, cohort, survivors, colluders: tolerates(
        order(names, cohort), degree, survivors, colluders
    ),
    "agreed_graph": agreed_graph,
    "read_message": read_message,
    **reference_encrypted.OPERATIONS,
}
