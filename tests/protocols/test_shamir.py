"""Secret sharing at the edges of its field."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import shamir

TOP = b"\xff" * 32


@pytest.mark.parametrize("secret", [bytes(32), TOP, TOP[:-1] + b"\xfe"], ids=["zero", "greatest", "one less"])
@pytest.mark.parametrize(("threshold", "holders"), [(1, 1), (2, 2), (129, 256)])
def test_extreme_secrets_and_sizes(secret: bytes, threshold: int, holders: int) -> None:
    shares = shamir.split(secret, threshold, holders, os.urandom)
    assert all(shamir.is_share(share) for share in shares)
    last = range(holders - threshold, holders)
    assert shamir.combine({index: shares[index] for index in last}, threshold) == secret


@given(st.integers(0, 296), st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_shares_of_what_is_no_32_byte_secret_give_none(excess: int, threshold: int) -> None:
    """The field has 297 elements beyond the secrets. A holder who knows the others' shares can steer to one: no crash."""
    beyond = (2**256 + excess).to_bytes(shamir.SHARE_BYTES)
    assert shamir.combine(dict.fromkeys(range(threshold), beyond), threshold) is None


def test_only_field_elements_of_33_bytes_are_shares() -> None:
    assert shamir.is_share((shamir.PRIME - 1).to_bytes(33))
    for bad in (shamir.PRIME.to_bytes(33), b"\xff" * 33, bytes(32), bytes(34), b""):
        assert not shamir.is_share(bad)


def test_coefficients_are_drawn_with_a_margin_that_hides_the_reduction() -> None:
    asked: list[int] = []

    def coins(count: int) -> bytes:
        asked.append(count)
        return os.urandom(count)

    shamir.split(TOP, 4, 5, coins)
    assert asked == [48] * 3  # 127 bits more than the field has


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_one_share_less_fits_every_secret(data: st.DataObject) -> None:
    """For any t - 1 shares and any other secret there is a t-th share that leads to it: Lagrange, solved for the share."""
    threshold = data.draw(st.integers(2, 5))
    other = data.draw(st.binary(min_size=32, max_size=32))
    shares = shamir.split(os.urandom(32), threshold, threshold, os.urandom)
    known = {index: shares[index] for index in range(threshold - 1)}
    # The secret is linear in the last share: secret(y) = secret(0) + y * weight.
    weight = 1
    for x in range(1, threshold):
        weight = weight * x * pow(x - threshold, -1, shamir.PRIME) % shamir.PRIME
    rest = 0
    for index, share in known.items():
        x, part = index + 1, int.from_bytes(share)
        for y in range(1, threshold + 1):
            if y != x:
                part = part * y * pow(y - x, -1, shamir.PRIME) % shamir.PRIME
        rest += part
    last = (int.from_bytes(other) - rest) * pow(weight, -1, shamir.PRIME) % shamir.PRIME
    assert shamir.combine(known | {threshold - 1: last.to_bytes(33)}, threshold) == other
