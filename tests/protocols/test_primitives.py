"""Encoding, masks, secret sharing and seals: known answers, bounds, and what an adversary must not manage."""

import os
import pickle
from itertools import combinations, pairwise

import numpy as np
import pytest
import sympy
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import ConfigError, LocalProtocolError, VerificationFailed
from protocols import prg, sealing, shamir
from protocols.encoding import FixedPoint

# --- encoding

BLOCK_VALUES = prg.BLOCK_BYTES // 4
FIXED = FixedPoint(value_bits=24, fraction_bits=16, ring_bits=32, n_max=200)


@given(st.lists(st.lists(st.floats(-200, 200), min_size=4, max_size=4), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_a_sum_is_exact_up_to_quantisation_and_clipping(rows: list[list[float]]) -> None:
    total = np.zeros(4, dtype=np.uint32)
    for row in rows:
        total += FIXED.encode(np.array(row))
    reference = np.clip(np.array(rows), -FIXED.limit, FIXED.limit).sum(axis=0)
    assert np.abs(FIXED.decode(total, len(rows)) - reference).max() <= len(rows) * 2.0**-17 + 1e-9


def test_the_largest_sum_does_not_wrap() -> None:
    for value in (1e30, -1e30):
        encoded = FIXED.encode(np.array([value]))
        total = np.sum([encoded] * FIXED.n_max, axis=0, dtype=np.uint64)
        assert total[0] < 2**32
        assert FIXED.decode(total.astype(np.uint32), FIXED.n_max)[0] == pytest.approx(
            np.sign(value) * 200 * FIXED.limit
        )


def test_parameters_that_could_overflow_cannot_exist() -> None:
    FixedPoint(24, 16, 32, 256)
    for parameters in (
        (24, 16, 32, 257),
        (30, 16, 32, 5),
        (24, 24, 32, 4),
        (24, 0, 32, 4),
        (24, 16, 33, 4),
        (24, 16, 32, 0),
    ):
        with pytest.raises(ConfigError):
            FixedPoint(*parameters)


@pytest.mark.parametrize(
    "values",
    [np.array([np.nan]), np.array([np.inf]), np.array([-np.inf]), np.zeros((2, 2)), np.zeros(2, np.float32)],
    ids=["nan", "inf", "-inf", "matrix", "float32"],
)
def test_what_is_no_finite_flat_float64_vector_is_refused(values: np.ndarray) -> None:
    with pytest.raises(LocalProtocolError):
        FIXED.encode(values)


def test_a_sum_that_no_contributors_can_have_made_is_refused() -> None:
    for total, contributors in ((3 * 2**24, 3), (2, 3), (100, 0), (300, 201)):
        with pytest.raises(VerificationFailed):
            FIXED.decode(np.array([total], dtype=np.uint32), contributors)


# --- masks


@pytest.mark.parametrize("size", [1, BLOCK_VALUES - 1, BLOCK_VALUES, BLOCK_VALUES + 1, 3 * BLOCK_VALUES + 5])
@pytest.mark.parametrize("chunk", [0, 1, 2**40])
def test_a_mask_is_the_aes_256_ctr_keystream_and_comes_off_again(chunk: int, size: int) -> None:
    key = bytes(range(32))
    values = np.arange(size, dtype=np.uint32) * np.uint32(2654435761)
    masked = values.copy()
    prg.MaskSet([key], []).apply(masked, chunk)
    first = (chunk + 1) * 2**32 + 2
    blocks = b"".join(counter.to_bytes(16) for counter in range(first, first - -4 * size // 16))
    encryptor = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305 - counter mode by definition
    keystream = np.frombuffer(encryptor.update(blocks)[: 4 * size], dtype="<u4")
    assert np.array_equal(masked - values, keystream)
    prg.MaskSet([], [key]).apply(masked, chunk)
    assert np.array_equal(masked, values)


def test_no_counter_masks_two_things() -> None:
    """The tag, and every chunk of the largest size that an agreement allows, have counters of their own."""
    largest = 8 * 262_144 // 16
    first = [0, *((chunk + 1) * 2**32 + 2 for chunk in (0, 1, 2, 2**20))]
    assert all(place + largest <= following for place, following in pairwise(first))
    masks = prg.MaskSet([bytes(32)], [])
    chunks = []
    for chunk in range(4):
        values = np.zeros(4096, dtype=np.uint32)
        masks.apply(values, chunk)
        chunks.append(values)
    assert np.unique(np.concatenate(chunks)).size >= 4 * 4096 - 3  # of 2^32: three pairs alike are one case in 10^6


# --- Shamir


def test_the_modulus_is_prime() -> None:
    assert sympy.isprime(shamir.PRIME)


@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_any_threshold_of_shares_gives_the_secret_back(secret: bytes, threshold: int, spare: int) -> None:
    shares = shamir.split(secret, threshold, threshold + spare, os.urandom)
    for subset in combinations(range(len(shares)), threshold):
        assert shamir.combine({index: shares[index] for index in subset}, threshold) == secret


def test_known_answer_with_given_coins() -> None:
    """f(x) = 5 + 7 x over the field."""
    shares = shamir.split((5).to_bytes(32), 2, 3, lambda n: (7).to_bytes(n))
    assert [int.from_bytes(share) for share in shares] == [12, 19, 26]


def test_fewer_shares_than_the_threshold_fit_every_secret() -> None:
    shares = shamir.split(b"s" * 32, 3, 5, os.urandom)
    known = {0: shares[0], 1: shares[1]}
    # For any candidate there is a third share that completes it: two shares exclude nothing.
    found = {shamir.combine(known | {2: (third).to_bytes(33)}, 3) for third in range(50)}
    assert len(found - {None}) >= 49


def test_bad_shares_are_refused() -> None:
    good = shamir.split(bytes(32), 2, 3, os.urandom)
    for bad in ({0: good[0]}, {0: good[0], 1: b"short"}, {0: good[0], 1: b"\xff" * 33}):
        with pytest.raises(LocalProtocolError):
            shamir.combine(bad, 2)
    for secret, threshold, holders in ((b"short", 2, 3), (bytes(32), 4, 3), (bytes(32), 0, 3)):
        with pytest.raises(LocalProtocolError):
            shamir.split(secret, threshold, holders, os.urandom)


# --- seals

ATTEMPT = sealing.AttemptId(bytes(32), 1, 1)
MASTER = bytes(range(32))


def test_a_seal_opens_only_with_its_key_and_context() -> None:
    public = sealing.public_key_bytes(MASTER, ATTEMPT)
    info = sealing.shares_info(ATTEMPT, b"c" * 32, "a", "b")
    sealed = sealing.seal(public, b"secret", info)
    assert sealing.unseal(sealing.private_key(MASTER, ATTEMPT), sealed, info) == b"secret"
    others = [
        sealing.shares_info(sealing.AttemptId(b"x" * 32, 1, 1), b"c" * 32, "a", "b"),
        sealing.shares_info(sealing.AttemptId(bytes(32), 2, 1), b"c" * 32, "a", "b"),
        sealing.shares_info(sealing.AttemptId(bytes(32), 1, 2), b"c" * 32, "a", "b"),
        sealing.shares_info(ATTEMPT, b"d" * 32, "a", "b"),
        sealing.shares_info(ATTEMPT, b"c" * 32, "b", "a"),
        sealing.contribution_info(ATTEMPT, b"c" * 32, "a", "b"),
    ]
    for other in others:
        with pytest.raises(sealing.SealBroken):
            sealing.unseal(sealing.private_key(MASTER, ATTEMPT), sealed, other)
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(sealing.private_key(bytes(32), ATTEMPT), sealed, info)


@given(st.binary(max_size=1300))
@settings(max_examples=60, deadline=None)
def test_hostile_keys_and_ciphertexts_only_break_the_seal(data: bytes) -> None:
    with pytest.raises(sealing.SealBroken):
        sealing.unseal(sealing.private_key(MASTER, ATTEMPT), data, b"")
    if len(data) != sealing.PUBLIC_KEY_BYTES:
        with pytest.raises(sealing.SealBroken):
            sealing.seal(data, b"secret", b"")


def test_everything_derived_from_one_secret_differs() -> None:
    cohort = bytes(32)
    derived = [
        sealing.contribution(MASTER, ATTEMPT, cohort, "a", "b"),
        sealing.contribution(MASTER, ATTEMPT, cohort, "a", "c"),
        sealing.contribution(MASTER, sealing.AttemptId(bytes(32), 1, 2), cohort, "a", "b"),
        sealing.pair_mask_key(MASTER, ATTEMPT, cohort, "a", "b"),
        sealing.pair_mask_key(MASTER, ATTEMPT, b"d" * 32, "a", "b"),
        sealing.self_mask_key(MASTER, ATTEMPT, "a"),
        sealing.self_mask_key(MASTER, ATTEMPT, "b"),
        sealing.self_mask_key(MASTER, sealing.AttemptId(bytes(32), 2, 1), "a"),
        sealing.self_seed_commitment(MASTER, ATTEMPT, "a"),
        sealing.public_key_bytes(MASTER, ATTEMPT)[-32:],
    ]
    assert len(set(derived)) == len(derived)


def test_secrets_are_not_shown_nor_pickled() -> None:
    secrets = sealing.AttemptSecrets(b"\x11" * 32, b"\x22" * 32, b"\x33" * 32, b"\x44" * 32)
    for text in (repr(secrets), str(secrets), f"{secrets}"):
        assert "\\x11" not in text
        assert "1111" not in text
    with pytest.raises(LocalProtocolError):
        pickle.dumps(secrets)
