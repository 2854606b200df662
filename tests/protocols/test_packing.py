"""Packing: sums of packed values are packed sums, at the largest values and the most members; parameters that could fail are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import ConfigError, VerificationFailed
from protocols.packing import (
    DEGREE,
    FAILURE_BITS,
    NOISE_COINS,
    PARAMETERS,
    BfvParameters,
    Layout,
    Packing,
    choose,
)

SMALL, LARGE = PARAMETERS

CHOSEN = {
    (16, 16): (Layout.TWO_IN_ONE, SMALL, 3.5),
    (16, 128): (Layout.TWO_IN_ONE, SMALL, 3.5),
    (18, 128): (Layout.TWO_IN_ONE, LARGE, 3.75),
    (22, 64): (Layout.THREE_IN_TWO, SMALL, 14 / 3),
    (28, 15): (Layout.THREE_IN_TWO, LARGE, 5.0),
}


@pytest.mark.parametrize("setting", CHOSEN)
def test_what_is_chosen(setting: tuple[int, int]) -> None:
    packing = choose(*setting)
    layout, parameters, size = CHOSEN[setting]
    assert (packing.layout, packing.parameters) == (layout, parameters)
    assert packing.parameters.prime_bits / 8 * DEGREE / packing.block_values == pytest.approx(size)
    assert packing.fault == ""


@given(st.integers(2, 28), st.integers(3, 130), st.integers(1, 20_000), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_sums_of_packed_values_are_packed_sums(value_bits: int, n_max: int, size: int, seed: int) -> None:
    packings = [
        packing
        for parameters in PARAMETERS
        for layout in Layout
        if not (packing := Packing(parameters, layout, value_bits, n_max)).fault
    ]
    generator = np.random.default_rng(seed)
    vector = generator.integers(0, 2**value_bits, size, dtype=np.uint32)
    vector[generator.random(size) < 0.2] = 2**value_bits - 1
    for packing in packings:
        packed = packing.pack(vector)
        assert packed.shape == (math.ceil(size / packing.block_values), DEGREE)
        total = packed * np.uint64(n_max)
        assert int(total.max()) < 2**packing.parameters.plain_bits
        assert np.array_equal(packing.unpack(total, size), vector * np.uint32(n_max))


@pytest.mark.parametrize("setting", CHOSEN)
def test_one_member_more_than_there_is_room_for_would_carry(setting: tuple[int, int]) -> None:
    """The fields are as narrow as they can be: at twice the members the largest values run into each other."""
    packing = choose(*setting)
    largest = packing.pack(np.full(packing.block_values, 2**packing.value_bits - 1, dtype=np.uint32))
    with pytest.raises(VerificationFailed):
        packing.unpack(largest * np.uint64(2 * setting[1]), packing.block_values)


def test_a_decrypted_coefficient_that_no_values_add_up_to_is_refused() -> None:
    """What another key decrypts to, say."""
    packing = choose(16, 16)
    packed = packing.pack(np.ones(10, dtype=np.uint32))
    packed[0, 4095] = 1 << packing.used_bits
    with pytest.raises(VerificationFailed, match="no members' values"):
        packing.unpack(packed, 10)


@pytest.mark.parametrize(("value_bits", "n_max"), [(16, 140), (26, 128), (32, 1000), (8, 1000)])
def test_what_would_overflow_or_drown_in_noise_is_refused(value_bits: int, n_max: int) -> None:
    with pytest.raises(ConfigError, match=r"lower value_bits|members"):
        choose(value_bits, n_max)


def test_less_than_128_bits_of_security_is_refused() -> None:
    weak = BfvParameters(prime=(1 << 110) + 1, plain_bits=46)
    assert weak.security_bits == 0
    assert "128 bits of security" in Packing(weak, Layout.TWO_IN_ONE, 16, 16).fault
    assert [parameters.security_bits for parameters in PARAMETERS] == [256, 192]


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_the_bound_on_the_noise_is_that_of_hoeffding(parameters: BfvParameters) -> None:
    """Against the exact tail of the centred binomial, in logarithms: the bound is above it, by no more than a factor of 2^12."""
    for members in (4, 16, 128):
        coins = NOISE_COINS * members
        room = (parameters.prime >> parameters.plain_bits + 1) - (members + 1) // 2 - 1
        if room > coins // 2:
            assert parameters.failure_bits(members) > FAILURE_BITS
            continue  # it cannot fail at all
        ways = sum(math.comb(coins, coins // 2 + excess) for excess in range(room, coins // 2 + 1))
        exact = coins - math.log2(2 * ways)
        assert parameters.failure_bits(members) <= exact + 1
        assert parameters.failure_bits(members) > exact - 12
    assert parameters.failure_bits(128) > FAILURE_BITS > parameters.failure_bits(150)
    assert parameters.failure_bits(2000) == 0.0
