"""Fixed-point encoding of a float vector into the ring of integers modulo 2^ring_bits (DESIGN section 6).

A value x becomes `rint(clip(x) * 2^fraction_bits) + 2^(value_bits - 1)`, an integer in [1, 2^value_bits - 1]. The agreement
guarantees `n_max * (2^value_bits - 1) < 2^ring_bits`, so a sum of at most n_max encodings never wraps, and decoding is exact:
for values inside the range, |decoded sum - real sum| <= n * 2^-(fraction_bits + 1).

On the wire a value takes ring_bits: 4 bytes, 3 bytes (24 bits), or 5 bytes for two (20 bits), little-endian. All arithmetic
is modulo 2^32, of which every ring here is a quotient; packing drops the bits above the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError, LocalProtocolError, VerificationFailed
from protocols.agreement import Agreement

Float64Vector = NDArray[np.float64]
Uint32Vector = NDArray[np.uint32]
Data = bytes | memoryview
"""Bytes that are made once and then only read: [n] octets, wherever they lie."""

_THREE_BYTES = np.dtype([("low", "<u2"), ("high", "u1")])
_FIVE_BYTES = np.dtype([("low", "<u4"), ("high", "u1")])


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """The agreed encoding: widths in bits, and the largest number of encodings that are ever added."""

    value_bits: int
    fraction_bits: int
    ring_bits: int
    n_max: int

    def __post_init__(self) -> None:
        if not 0 < self.fraction_bits < self.value_bits <= self.ring_bits <= 32 or self.n_max < 1:
            raise ConfigError("fixed point needs 0 < fraction_bits < value_bits <= ring_bits <= 32 and n_max >= 1")
        if self.n_max * (2**self.value_bits - 1) >= 2**self.ring_bits:
            raise ConfigError(
                f"a sum of {self.n_max} values of {self.value_bits} bits can overflow {self.ring_bits} bits; lower value_bits"
            )

    @classmethod
    def from_agreement(cls, agreement: Agreement) -> FixedPoint:
        """The encoding that an agreement fixes, with n_max the number of its members."""
        ring = agreement.secure_sum
        return cls(ring.value_bits, ring.fraction_bits, ring.ring_bits, len(agreement.members))

    @property
    def limit(self) -> float:
        """The largest magnitude that is encoded; larger values are clipped to it."""
        return float(2 ** (self.value_bits - 1) - 1) / float(2**self.fraction_bits)

    def saturated(self, values: Float64Vector) -> int:
        """How many of `values` lie outside the range and would be clipped."""
        return int(np.count_nonzero(np.abs(values) > self.limit))

    def check(self, values: Float64Vector) -> None:
        """See that `values` can be encoded.

        Raises:
            LocalProtocolError: the vector is not one-dimensional float64, or holds NaN or infinity.
        """
        if values.ndim != 1 or values.dtype != np.float64:
            raise LocalProtocolError(
                f"the secure sum takes a flat float64 vector, not {values.dtype} of shape {values.shape}"
            )
        if not np.isfinite(values).all():
            raise LocalProtocolError("the update holds NaN or infinity and was not sent; lower the learning rate")

    def integers(self, values: Float64Vector) -> Float64Vector:
        """The encodings of checked `values` ([m] float64): integers in [1, 2^value_bits - 1], as float64, which holds them exactly."""
        scaled = np.clip(values, -self.limit, self.limit)
        scaled *= 2.0**self.fraction_bits
        np.rint(scaled, out=scaled)
        scaled += 2.0 ** (self.value_bits - 1)
        return scaled

    def encode(self, values: Float64Vector) -> Uint32Vector:
        """Encode `values` ([d] float64) as [d] uint32.

        Raises:
            LocalProtocolError: see `check`.
        """
        self.check(values)
        return self.integers(values).astype(np.uint32)

    def decode(self, total: Uint32Vector, contributors: int) -> Float64Vector:
        """Decode the sum of `contributors` encodings ([d] uint32) to the real sum ([d] float64).

        Raises:
            VerificationFailed: a coordinate cannot be the sum of that many encodings.
        """
        if not 1 <= contributors <= self.n_max:
            raise VerificationFailed(f"a sum of {contributors} contributors; the agreement allows 1 to {self.n_max}")
        if total.size and (
            int(total.max()) > contributors * (2**self.value_bits - 1) or int(total.min()) < contributors
        ):
            raise VerificationFailed(
                "the sum is outside the range of its contributors: it was not computed from their uploads"
            )
        offset = contributors * 2.0 ** (self.value_bits - 1)
        return (total.astype(np.float64) - offset) / 2.0**self.fraction_bits


def packed_bytes(count: int, ring_bits: int) -> int:
    """How many bytes `count` values take; an odd last value of 20 bits is padded to a pair."""
    return (count + count % 2) // 2 * 5 if ring_bits == 20 else count * ring_bits // 8


def pack(values: Uint32Vector, ring_bits: int) -> memoryview:
    """[m] uint32, modulo 2^ring_bits, as `packed_bytes` bytes. At 32 bits this is the memory of `values` itself."""
    if ring_bits == 32:
        return values.astype("<u4", copy=False).data.cast("B")
    if ring_bits == 24:
        packed = np.empty(values.size, dtype=_THREE_BYTES)
        packed["low"], packed["high"] = values, values >> np.uint32(16)
        return packed.view(np.uint8).data
    mask = np.uint32((1 << 20) - 1)
    first = values[::2] & mask
    second = np.zeros_like(first)
    np.bitwise_and(values[1::2], mask, out=second[: values.size // 2])
    pairs = np.empty(first.size, dtype=_FIVE_BYTES)
    pairs["low"], pairs["high"] = first | second << np.uint32(20), second >> np.uint32(12)
    return pairs.view(np.uint8).data


def unpack(data: Data | bytearray, count: int, ring_bits: int) -> Uint32Vector:
    """The inverse of `pack`, without a copy at 32 bits.

    Raises:
        ValueError: `data` is not what so many values take.
    """
    if len(data) != packed_bytes(count, ring_bits):
        raise ValueError(f"{len(data)} bytes are not {count} values of {ring_bits} bits")
    if ring_bits == 32:
        return np.frombuffer(data, dtype="<u4")
    values = np.empty(count, dtype=np.uint32)
    if ring_bits == 24:
        packed = np.frombuffer(data, dtype=_THREE_BYTES)
        np.left_shift(packed["high"], 16, out=values, dtype=np.uint32)
        values |= packed["low"]
        return values
    pairs = np.frombuffer(data, dtype=_FIVE_BYTES)
    low, high = pairs["low"], pairs["high"].astype(np.uint32)
    values[::2] = low & np.uint32((1 << 20) - 1)
    values[1::2] = (low >> np.uint32(20) | high << np.uint32(12))[: count // 2]
    return values
