"""Shamir's secret sharing of 32-byte secrets over the prime field of order 2^256 + 297 (Shamir 1979).

Any t shares of one secret give it back; t - 1 say nothing about it. Shares carry no authentication of their own: whoever
reconstructs compares the result with a commitment or public key that the owner signed beforehand.
"""

from collections.abc import Callable, Mapping

from keys.errors import LocalProtocolError

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

Coins = Callable[[int], bytes]
"""A source of randomness: `coins(n)` gives n bytes. `os.urandom` outside tests."""


def split(secret: bytes, threshold: int, holders: int, coins: Coins) -> list[bytes]:
    """Split a 32-byte `secret` into `holders` shares of 33 bytes; share i (from 0) is the polynomial at x = i + 1.

    Raises:
        LocalProtocolError: the secret is not 32 bytes, or not 1 <= threshold <= holders.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise LocalProtocolError("secret sharing needs a 32-byte secret and 1 <= threshold <= holders")
    # 48 random bytes reduced modulo a 257-bit prime are within 2^-127 of uniform.
    polynomial = [int.from_bytes(secret)] + [int.from_bytes(coins(48)) % PRIME for _ in range(threshold - 1)]
    return [_evaluate(polynomial, x).to_bytes(SHARE_BYTES) for x in range(1, holders + 1)]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes | None:
    """The secret of exactly `threshold` shares, by holder index from 0; None if they fit no 32-byte secret.

    Raises:
        LocalProtocolError: not exactly `threshold` shares, or one is not a field element of 33 bytes.
    """
    if len(shares) != threshold:
        raise LocalProtocolError(f"{len(shares)} shares given, {threshold} needed")
    points = {index + 1: int.from_bytes(share) for index, share in shares.items()}
    if any(len(share) != SHARE_BYTES for share in shares.values()) or any(y >= PRIME for y in points.values()):
        raise LocalProtocolError("a share is not an element of the field")
    secret = 0
    for x, y in points.items():
        numerator = denominator = 1
        for other in points:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        secret = (secret + y * numerator * pow(denominator, -1, PRIME)) % PRIME
    return secret.to_bytes(SECRET_BYTES) if secret < 1 << 256 else None


def is_share(data: bytes) -> bool:
    """Whether `data` is an encoded field element."""
    return len(data) == SHARE_BYTES and int.from_bytes(data) < PRIME


def _evaluate(polynomial: list[int], x: int) -> int:
    result = 0
    for coefficient in reversed(polynomial):
        result = (result * x + coefficient) % PRIME
    return result
