"""The range of the fixed-point encoding: where it clips, what it counts, what it never exceeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import VerificationFailed
from protocols.encoding import FixedPoint
from tests.protocols.network import make_network

FIXED = FixedPoint(value_bits=24, fraction_bits=16, ring_bits=32, n_max=200)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=20))
@settings(deadline=None)
def test_encodings_stay_inside_their_width_for_every_float(values: list[float]) -> None:
    encoded = FIXED.encode(np.array(values, dtype=np.float64)).astype(np.int64)
    assert encoded.size == len(values)
    assert ((encoded >= 1) & (encoded <= 2**24 - 1)).all()


def test_clipping_begins_just_beyond_the_limit_and_is_counted_on_both_sides() -> None:
    limit, beyond = FIXED.limit, np.nextafter(FIXED.limit, np.inf)
    assert limit == (2**23 - 1) / 2**16
    values = np.array([limit, -limit, beyond, -beyond, 0.0, 1e308])
    assert FIXED.saturated(values) == 3
    assert FIXED.saturated(values[:2]) == 0
    decoded = FIXED.decode(FIXED.encode(values), 1)
    assert np.array_equal(decoded, np.clip(values, -limit, limit))


def test_halves_go_to_the_even_neighbour_so_that_rounding_has_no_drift() -> None:
    step = 2.0**-16
    values = np.arange(-1000, 1000) * step + step / 2
    error = FIXED.decode(FIXED.encode(values), 1) - values
    assert np.abs(error).max() == step / 2
    assert error.sum() == 0.0


@pytest.mark.parametrize("contributors", [1, 3, 200])
def test_the_least_and_the_greatest_sum_decode_and_one_beyond_does_not(contributors: int) -> None:
    least, greatest = contributors, contributors * (2**24 - 1)
    ends = FIXED.decode(np.array([least, greatest], dtype=np.uint32), contributors)
    assert np.array_equal(ends, [-contributors * FIXED.limit, contributors * FIXED.limit])
    for bad in (least - 1, greatest + 1):
        with pytest.raises(VerificationFailed):
            FIXED.decode(np.array([least, bad], dtype=np.uint32), contributors)


def test_the_agreement_fixes_the_encoding_for_all_its_members() -> None:
    agreement = make_network(7, threshold=5).agreement
    assert FixedPoint.from_agreement(agreement) == FixedPoint(24, 16, 32, 7)
