"""What can be tried with shares of one secret: interpolate with however few there are, or take off coefficients that are known.

Sound shares (`protocols.shamir`) of fewer than the threshold fit every secret equally well, so that none of these guesses is ever right.
Shares are field elements here, by holder index from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from protocols.shamir import PRIME, SECRET_BYTES

Offsets = Mapping[int, Iterable[int]]
"""What coefficients that are known add to a secret, by the place of the share that they make."""


def basis(holders: Sequence[int]) -> list[list[int]]:
    """For each of these holders the polynomial, by its coefficients, that is 1 at its place and 0 at those of the others (Lagrange)."""
    points, found = [holder + 1 for holder in holders], []
    for x in points:
        polynomial, denominator = [1], 1
        for other in points:
            if other != x:
                shifted, scaled = [0, *polynomial], [-other * c for c in polynomial] + [0]
                polynomial = [(a + b) % PRIME for a, b in zip(shifted, scaled, strict=True)]
                denominator = denominator * (x - other) % PRIME
        inverse = pow(denominator, -1, PRIME)
        found.append([c * inverse % PRIME for c in polynomial])
    return found


def value_at_zero(shares: Mapping[int, int]) -> int:
    """The value at 0 of the polynomial of least degree through these shares."""
    return sum(b[0] * share for b, share in zip(basis(list(shares)), shares.values(), strict=True)) % PRIME


def interpolations(shares: Mapping[int, int], needed: int) -> Iterator[bytes]:
    """The secret, if so many of the shares give it: first as many as are needed, then all of them, then fewer and fewer."""
    held = sorted(shares.items())
    counts = dict.fromkeys((needed, len(held), *range(min(needed, len(held)) - 1, 0, -1)))
    for count in counts:
        if count <= len(held):
            yield from _secret(value_at_zero(dict(held[:count])))


def without(shares: Mapping[int, int], offsets: Offsets) -> Iterator[bytes]:
    """The secret, if its share at one place is made with coefficients that are known."""
    for holder, share in shares.items():
        for offset in offsets.get(holder, ()):
            yield from _secret((share - offset) % PRIME)


def _secret(value: int) -> Iterator[bytes]:
    if value < 1 << 8 * SECRET_BYTES:
        yield value.to_bytes(SECRET_BYTES)
