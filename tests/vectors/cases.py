"""The inputs of the vectors over integers: encoding, masks, secret sharing. Outputs are computed, not written here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.vectors.codec import coins


@dataclass(frozen=True)
class Case:
    """One call; `error` names the class of error that is due, if any."""

    description: str
    operation: str
    input: dict[str, Any]
    error: str = ""


def case(description: str, operation: str, **values: Any) -> Case:
    return Case(description, operation, values)


def refused(error: str, description: str, operation: str, **values: Any) -> Case:
    return Case(description, operation, values, error)


def named(count: int) -> list[str]:
    return [f"hospital-{index:02d}" for index in range(count)]


DIGEST = bytes(range(32))
COHORT = bytes(range(32, 64))
ATTEMPT = [DIGEST, 3, 2]
SECRET = bytes(range(64, 96))
WIDE, MIDDLE, NARROW = [24, 16, 32, 200], [20, 12, 24, 16], [17, 12, 20, 8]
"""value_bits, fraction_bits, ring_bits, n_max: three rings that can be agreed."""


def encoding() -> Iterator[Case]:
    for given in (WIDE, MIDDLE, NARROW, [26, 20, 32, 64], [24, 16, 32, 256], [30, 29, 32, 4]):
        yield case(f"limit of value_bits, fraction_bits, ring_bits, n_max = {given}", "limit", encoding=given)
    for given, why in (
        ([24, 16, 32, 257], "257 (2^24 - 1) is not below 2^32"),
        ([17, 12, 20, 9], "9 (2^17 - 1) is not below 2^20"),
        ([24, 24, 32, 4], "fraction_bits is not below value_bits"),
        ([24, 0, 32, 4], "no fraction bits"),
        ([24, 16, 33, 4], "no ring is wider than 32 bits"),
        ([25, 16, 24, 1], "a value is wider than the ring"),
        ([24, 16, 32, 0], "no contributors"),
    ):
        yield refused("ConfigError", why, "limit", encoding=given)
    for given in (WIDE, MIDDLE, NARROW):
        unit = 2.0 ** -given[1]
        top = (2 ** (given[0] - 1) - 1) * unit
        ring = f"{given[2]}-bit ring"
        yield case(
            f"{ring}: zero of both signs, plain values",
            "encode",
            encoding=given,
            values=[0.0, -0.0, 1.0, -1.0, 0.3, -0.3],
        )
        yield case(
            f"{ring}: halves of a unit go to the even neighbour",
            "encode",
            encoding=given,
            values=[place * unit / 2 for place in (1, 3, 5, 7, -1, -3, -5, -7)],
        )
        yield case(
            f"{ring}: next to a half, up and down",
            "encode",
            encoding=given,
            values=[0.5000001 * unit, 0.4999999 * unit, -0.5000001 * unit, -0.4999999 * unit, 1.5000001 * unit],
        )
        yield case(
            f"{ring}: the range ends at 1 and 2^value_bits - 1; beyond it values are clipped",
            "encode",
            encoding=given,
            values=[top, -top, top - unit, unit - top, top + unit, -top - 0.75 * unit, 1e300, -1e300],
        )
    yield case("the smallest numbers are zero", "encode", encoding=WIDE, values=[5e-324, -5e-324, 2.0**-1022])
    yield case("no values", "encode", encoding=WIDE, values=[])
    for value in ("nan", "inf", "-inf"):
        yield refused(
            "LocalProtocolError", f"{value} among finite values", "encode", encoding=WIDE, values=[1.0, value]
        )
    yield case(
        "the least, the middle and the largest sum of 3",
        "decode",
        encoding=WIDE,
        total=[3, 3 << 23, 3 * (2**24 - 1)],
        contributors=3,
    )
    yield case(
        "the sum of the largest encodings of n_max does not wrap",
        "decode",
        encoding=[24, 16, 32, 256],
        total=[256 * (2**24 - 1)],
        contributors=256,
    )
    yield case(
        "20-bit ring, sum of 8",
        "decode",
        encoding=NARROW,
        total=[8 << 16, (8 << 16) + 1, (8 << 16) - 4096],
        contributors=8,
    )
    for total, contributors, why in (
        ([3 * 2**24 - 2], 3, "more than three encodings can make"),
        ([100, 2], 3, "less than three encodings can make"),
        ([0], 1, "0 encodes nothing"),
        ([100], 0, "no contributors"),
        ([300], 201, "more contributors than the agreement has members"),
    ):
        yield refused("VerificationFailed", why, "decode", encoding=WIDE, total=total, contributors=contributors)
    values = [1, 0x89ABCDEF, 0xFFFFFFFF, 0xABCDE, 0x12345]
    for bits in (32, 24, 20):
        yield case(
            f"{bits} bits: little-endian, bits above the ring are dropped", "pack", values=values, ring_bits=bits
        )
    yield case("20 bits: an even count has no padding", "pack", values=[0xABCDE, 0x12345], ring_bits=20)
    yield case("20 bits: one value alone takes 5 bytes", "pack", values=[0xABCDE], ring_bits=20)
    for bits, data in ((32, "efcdab8904030201"), (24, "efcdab030201"), (20, "debc5a3412")):
        yield case(f"{bits} bits", "unpack", data=bytes.fromhex(data), count=2, ring_bits=bits)
        yield refused(
            "ValueError",
            f"{bits} bits: a byte is missing",
            "unpack",
            data=bytes.fromhex(data)[:-1],
            count=2,
            ring_bits=bits,
        )
        yield refused(
            "ValueError",
            f"{bits} bits: a byte too many",
            "unpack",
            data=bytes.fromhex(data) + b"\0",
            count=2,
            ring_bits=bits,
        )
    yield case(
        "20 bits: an odd count, whose padding is not looked at",
        "unpack",
        data=bytes.fromhex("debc5a3412"),
        count=1,
        ring_bits=20,
    )


def prg() -> Iterator[Case]:
    draw = coins("prg")
    first, second, third = draw(32), draw(32), draw(32)
    yield case("two blocks from the beginning", "keystream", key=first, start=0, count=8)
    yield case("the second block, as it stands in the case before", "keystream", key=first, start=4, count=4)
    yield case("part of a block", "keystream", key=first, start=0, count=3)
    yield case("another key", "keystream", key=second, start=0, count=4)
    yield case("the counter carries into its second byte", "keystream", key=first, start=4 * 255, count=8)
    yield case("the counter carries beyond 32 bits", "keystream", key=first, start=4 * (2**32 - 1), count=8)
    for start in (1, 2, 3, 6):
        yield refused(
            "LocalProtocolError", f"value {start} does not begin a block", "keystream", key=first, start=start, count=4
        )
    yield case(
        "a mask over zeros is the keystream from counter 2^32 + 2 on, read as little-endian words of 32 bits",
        "mask",
        values=[0] * 5,
        added=[first],
        subtracted=[],
        chunk=0,
    )
    yield case("the same as a keystream", "keystream", key=first, start=4 * (2**32 + 2), count=5)
    yield case("a subtracted mask, modulo 2^32", "mask", values=[0] * 5, added=[], subtracted=[first], chunk=0)
    yield case(
        "two masks on, one off",
        "mask",
        values=[1, 2**24, 2**32 - 1, 0, 7],
        added=[first, second],
        subtracted=[third],
        chunk=0,
    )
    yield case(
        "the same key on and off leaves the values",
        "mask",
        values=[1, 2, 3],
        added=[first],
        subtracted=[first],
        chunk=0,
    )
    yield case("the second chunk", "mask", values=[7, 8, 9], added=[first, second], subtracted=[third], chunk=1)
    yield case("a chunk far away", "mask", values=[0] * 4, added=[second], subtracted=[], chunk=2**32 - 1)
    number = (2**61 - 2).to_bytes(8)
    yield case("the first block masks the tag", "mask_tag", tag=bytes(8), added=[first], subtracted=[])
    yield case("two masks on the tag, one off", "mask_tag", tag=number, added=[first, second], subtracted=[third])
    yield case("the same key on and off leaves the tag", "mask_tag", tag=number, added=[first], subtracted=[first])


def shamir() -> Iterator[Case]:
    yield case("f(x) = 5 + 7 x", "split", secret=(5).to_bytes(32), coins=[(7).to_bytes(48)], holders=3)
    draw = coins("shamir")
    secret, drawn = draw(32), [draw(48), draw(48)]
    yield case(
        "threshold 3 of 5; a coefficient is 48 bytes, big-endian, modulo the prime",
        "split",
        secret=secret,
        coins=drawn,
        holders=5,
    )
    yield case("threshold 1: every share is the secret", "split", secret=secret, coins=[], holders=2)
    yield case(
        "the largest coins and the largest secret", "split", secret=b"\xff" * 32, coins=[b"\xff" * 48], holders=3
    )
    prime = 2**256 + 297
    yield case(
        "a coin that is the prime gives the coefficient 0",
        "split",
        secret=secret,
        coins=[prime.to_bytes(48)],
        holders=2,
    )
    yield case(
        "a coin of 2^256 gives shares with a first byte of 1",
        "split",
        secret=bytes(32),
        coins=[(1 << 256).to_bytes(48)],
        holders=2,
    )
    yield refused("LocalProtocolError", "a secret of 31 bytes", "split", secret=bytes(31), coins=[drawn[0]], holders=3)
    yield refused("LocalProtocolError", "threshold 3 of 2 holders", "split", secret=secret, coins=drawn, holders=2)
    numbers = [int.from_bytes(secret), *(int.from_bytes(coin) % prime for coin in drawn)]
    shares = [sum(c * x**p for p, c in enumerate(numbers)) % prime for x in range(1, 6)]
    given = [[index, share.to_bytes(33)] for index, share in enumerate(shares)]
    yield case("the first three shares", "combine", shares=given[:3], threshold=3)
    yield case("the last three shares, in another order", "combine", shares=given[:1:-1], threshold=3)
    yield case("shares 0, 2 and 4", "combine", shares=given[::2], threshold=3)
    wrong = [*given[:2], [2, bytes([*given[2][1][:-1], given[2][1][-1] ^ 1])]]
    yield case(
        "a wrong share gives another secret: only the owner's commitment shows it", "combine", shares=wrong, threshold=3
    )
    yield case(
        "a share under another's index gives another secret",
        "combine",
        shares=[*given[:2], [3, given[2][1]]],
        threshold=3,
    )
    yield case(
        "shares of the number 2^256, which is no secret of 32 bytes: null",
        "combine",
        shares=[[0, (2**256).to_bytes(33)]],
        threshold=1,
    )
    yield case(
        "the largest field element is no secret either: null",
        "combine",
        shares=[[0, (prime - 1).to_bytes(33)]],
        threshold=1,
    )
    for bad, why in (
        (given[:2], "too few shares"),
        (given[:4], "too many shares: exactly as many as the threshold are combined"),
        ([given[0], given[1], given[1]], "one index twice"),
        ([given[0], given[1], [1, given[2][1]]], "one index twice, with two different shares"),
        ([*given[:2], [2, prime.to_bytes(33)]], "the prime is no field element"),
        ([*given[:2], [2, b"\xff" * 33]], "a number far above the prime"),
        ([*given[:2], [2, given[2][1][1:]]], "a share of 32 bytes"),
        ([*given[:2], [2, b"\0" + given[2][1]]], "a share of 34 bytes"),
    ):
        yield refused("LocalProtocolError", why, "combine", shares=bad, threshold=3)
    for number, why in (
        (0, "zero"),
        (prime - 1, "the largest field element"),
        (prime, "the prime"),
        (2**264 - 1, "all bits"),
    ):
        yield case(f"{why}, in 33 bytes", "is_share", data=number.to_bytes(33))
    yield case("32 bytes are no share", "is_share", data=bytes(32))
