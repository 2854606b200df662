"""The framing of ciphertexts: exact lengths, words below q, and nothing else that a peer could say."""

from __future__ import annotations

import random

import numpy as np
import pytest

from protocols import ciphertexts as c
from protocols.packing import DEGREE, PARAMETERS, BfvParameters

each = pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: f"{p.prime_bits} bits")


def words(parameters: BfvParameters, halves: int, seed: int = 0) -> c.Words:
    found = np.random.default_rng(seed).integers(0, parameters.prime, (halves, DEGREE), dtype=np.uint64)
    found[0, :2] = 0, parameters.prime - 1
    return found


@each
def test_words_go_and_come(parameters: BfvParameters) -> None:
    for halves in (1, 2, 5):
        before = words(parameters, halves)
        data = c.pack_words(before, parameters)
        assert len(data) == halves * c.half_bytes(parameters)
        assert np.array_equal(c.unpack_words(data, parameters, halves), before)


def test_sizes_are_those_of_the_design() -> None:
    small, large = PARAMETERS
    assert (c.half_bytes(small), c.upload_bytes(small, 1)) == (28_672, 28_736)
    assert (c.half_bytes(large), c.upload_bytes(large, 1)) == (30_720, 30_784)
    assert c.upload_bytes(small, 123) / 1e6 < 3.6


@each
def test_words_little_end_first(parameters: BfvParameters) -> None:
    data = c.pack_words(np.arange(DEGREE, dtype=np.uint64).reshape(1, -1) << np.uint64(40), parameters)
    if parameters.prime_bits == 56:
        assert int.from_bytes(data[7 * 300 : 7 * 301], "little") == 300 << 40
    else:
        pair = int.from_bytes(data[15 * 150 : 15 * 151], "little")
        nibbles = pair >> 112
        assert (pair & (1 << 56) - 1) | (nibbles & 15) << 56 == 300 << 40
        assert (pair >> 56 & (1 << 56) - 1) | (nibbles >> 4) << 56 == 301 << 40


@each
def test_a_word_of_q_or_more_is_refused_wherever_it_stands(parameters: BfvParameters) -> None:
    good = words(parameters, 2)
    for place in (0, 1, DEGREE, 2 * DEGREE - 1):
        for value in (parameters.prime, parameters.prime + 1, 2**parameters.prime_bits - 1):
            bad = good.copy()
            bad.reshape(-1)[place] = value
            data = bytearray(c.pack_words(bad, parameters))
            with pytest.raises(c.FrameBroken, match="below q"):
                c.unpack_words(bytes(data), parameters, 2)


@each
def test_any_other_length_is_refused(parameters: BfvParameters) -> None:
    data = c.pack_words(words(parameters, 1), parameters) + bytes(c.SEED_BYTES)
    assert len(c.unpack_upload(data * 2, parameters)[1]) == 2
    for length in (1, 63, 64, len(data) - 1, len(data) - 64, len(data) + 1, 2 * len(data) - 1):
        with pytest.raises(c.FrameBroken):
            c.unpack_upload((data * 2)[:length], parameters)
    for halves in (0, 2):
        with pytest.raises(c.FrameBroken):
            c.unpack_words(data[:-64], parameters, halves)


@each
def test_random_changes_are_words_below_q_or_refused(parameters: BfvParameters) -> None:
    generator = random.Random(1)  # noqa: S311
    data = c.pack_words(words(parameters, 1), parameters) + bytes(range(64))
    for _ in range(500):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        if generator.random() < 0.3:
            del changed[generator.randrange(len(changed)) :]
        try:
            found, seeds = c.unpack_upload(bytes(changed), parameters)
        except c.FrameBroken:
            continue
        assert found.size == 0 or int(found[:, 0].max()) < parameters.prime
        assert [len(seed) for seed in seeds] == [64] * len(found)


@each
def test_addition_is_that_of_integers_modulo_q(parameters: BfvParameters) -> None:
    left, right = words(parameters, 2, 1), words(parameters, 2, 2)
    left[1, :4], right[1, :4] = parameters.prime - 1, [0, 1, 2, parameters.prime - 1]
    before = left.copy()
    expected = (left.astype(object) + right.astype(object)) % parameters.prime
    c.add(left, right, parameters)
    assert np.array_equal(left, expected.astype(np.uint64))
    c.subtract(left, right, parameters)
    assert np.array_equal(left, before)


def test_what_is_added_must_be_of_one_shape() -> None:
    total = words(PARAMETERS[0], 4, 1).reshape(2, 2, -1)
    for step in (c.add, c.subtract):
        before = total.copy()
        with pytest.raises(ValueError, match="shape"):
            step(total, total[:1].copy(), PARAMETERS[0])
        assert np.array_equal(total, before)
