"""Bindings of the secure sum's keys: each derivation equals RFC 5869 over its documented input, and every part of it counts."""

import hashlib
import hmac
import inspect
import os

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import sealing

DIGEST, COHORT, SECRET = bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96))
ATTEMPT = sealing.AttemptId(DIGEST, 3, 2)


def hkdf_sha256(secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with the default salt, by hand."""
    key, block, out = hmac.digest(bytes(32), secret, "sha256"), b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out += block
    return out[:length]


def bound(label: str, *parts: bytes | str) -> bytes:
    return f"secgeo/{label}/v1\0".encode() + msgspec.msgpack.encode([DIGEST, 3, 2, *parts])


def test_derivations_equal_their_definition() -> None:
    def derived(label: str, *parts: bytes | str) -> bytes:
        return hkdf_sha256(SECRET, bound(label, *parts), 32)

    assert sealing.contribution(SECRET, ATTEMPT, COHORT, "a", "b") == derived("pair-contribution", COHORT, "a", "b")
    assert sealing.pair_mask_key(SECRET, ATTEMPT, COHORT, "a", "b") == derived("pair-seed", COHORT, "a", "b")
    assert sealing.self_mask_key(SECRET, ATTEMPT, "a") == derived("self-seed", "a")
    commitment = hashlib.sha256(bound("self-seed-commitment", "a", SECRET)).digest()
    assert sealing.self_seed_commitment(SECRET, ATTEMPT, "a") == commitment
    assert sealing.shares_info(ATTEMPT, COHORT, "a", "b") == bound("seal-shares", COHORT, "a", "b")
    assert sealing.contribution_info(ATTEMPT, COHORT, "a", "b") == bound("seal-contribution", COHORT, "a", "b")


def test_a_public_key_is_that_of_the_derived_private_key() -> None:
    seed = hkdf_sha256(SECRET, bound("pair-key"), 96)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(seed[:64]).public_key().public_bytes_raw()
    x25519 = X25519PrivateKey.from_private_bytes(seed[64:]).public_key().public_bytes_raw()
    assert sealing.public_key_bytes(SECRET, ATTEMPT) == mlkem + x25519
    for other in (sealing.AttemptId(COHORT, 3, 2), sealing.AttemptId(DIGEST, 2, 2), sealing.AttemptId(DIGEST, 3, 1)):
        assert sealing.public_key_bytes(SECRET, other) != mlkem + x25519


@pytest.mark.parametrize(
    "derive",
    [
        sealing.contribution,
        sealing.pair_mask_key,
        sealing.self_mask_key,
        sealing.self_seed_commitment,
        sealing.shares_info,
        sealing.contribution_info,
    ],
    ids=lambda derive: derive.__name__,
)
def test_every_argument_counts(derive: object) -> None:
    arguments = {
        "bytes": [SECRET, bytes(32)],
        "AttemptId": [
            ATTEMPT,
            sealing.AttemptId(COHORT, 3, 2),
            sealing.AttemptId(DIGEST, 2, 2),
            sealing.AttemptId(DIGEST, 3, 3),
        ],
        "str": ["a", "b"],
    }
    kinds = [str(parameter.annotation) for parameter in inspect.signature(derive).parameters.values()]  # type: ignore[arg-type]
    base = [arguments[kind][0] for kind in kinds]
    results = [derive(*base)]  # type: ignore[operator]
    for place, kind in enumerate(kinds):
        results += [derive(*base[:place], other, *base[place + 1 :]) for other in arguments[kind][1:]]  # type: ignore[operator]
    assert len(set(results)) == len(results)


def test_names_do_not_run_into_each_other() -> None:
    assert sealing.shares_info(ATTEMPT, COHORT, "ab", "c") != sealing.shares_info(ATTEMPT, COHORT, "a", "bc")
    assert sealing.AttemptId(DIGEST, 1, 12).bind(sealing.Label.COHORT) != sealing.AttemptId(DIGEST, 11, 2).bind(
        sealing.Label.COHORT
    )


def test_a_cohort_digest_pins_who_sent_which_keys_but_not_their_order() -> None:
    keys = {"a": b"one", "b": b"two", "c": b"three"}
    digest = sealing.cohort_digest(ATTEMPT, keys)
    assert sealing.cohort_digest(ATTEMPT, dict(reversed(keys.items()))) == digest
    others = [
        keys | {"a": b"two", "b": b"one"},
        keys | {"c": b"other"},
        keys | {"d": b"four"},
        {"a": b"one", "b": b"two"},
        {"a": b"one", "b": b"two", "d": b"three"},
    ]
    digests = {sealing.cohort_digest(ATTEMPT, other) for other in others}
    digests.add(sealing.cohort_digest(sealing.AttemptId(DIGEST, 3, 1), keys))
    assert len(digests - {digest}) == len(others) + 1


@given(st.integers(0, 1200), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_no_changed_byte_of_a_seal_opens(place: int, flip: int) -> None:
    sealed = bytearray(sealing.seal(sealing.public_key_bytes(SECRET, ATTEMPT), b"x" * 70, b"info"))
    sealed[place % len(sealed)] ^= flip
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(sealing.private_key(SECRET, ATTEMPT), bytes(sealed), b"info")


@pytest.mark.parametrize(
    "point", [bytes(32), (1).to_bytes(32, "little"), b"\xec" + b"\xff" * 30 + b"\x7f"], ids=["zero", "one", "minus one"]
)
def test_keys_of_small_order_are_not_sealed_to(point: bytes) -> None:
    good = sealing.public_key_bytes(SECRET, ATTEMPT)
    for bad in (good[: sealing.MLKEM_PUBLIC_BYTES] + point, b"\xff" * sealing.MLKEM_PUBLIC_BYTES + good[-32:]):
        with pytest.raises(sealing.SealBroken):
            sealing.seal(bad, b"secret", b"")


def test_two_seals_of_one_text_differ() -> None:
    public = sealing.public_key_bytes(SECRET, ATTEMPT)
    assert sealing.seal(public, b"x", b"") != sealing.seal(public, b"x", b"")
    assert sealing.AttemptSecrets.fresh(os.urandom) != sealing.AttemptSecrets.fresh(os.urandom)
