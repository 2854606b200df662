"""Our own framing of BFV ciphertexts: fixed lengths, every word checked below q, before anything native sees it.

    up       c0 of 4,096 words, then the 64-byte seed of c1      for each plaintext: 28,736 bytes (56-bit q) or 30,784 (60 bits)
    down     c0, then c1 of 4,096 words                          for each plaintext: 57,344 bytes or 61,440

A word takes as many bits as q: 7 bytes, little-endian; of 60 bits two words take 15 bytes, the low 7 of each and then a byte with the
top four bits of the first (low) and of the second (high). There are no sizes, types or headers in it
that a peer could lie about; how many plaintexts there are follows from the agreement.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError
from protocols.packing import DEGREE, BfvParameters

Words = NDArray[np.uint64]
SEED_BYTES = 64


class FrameBroken(Exception):
    """Bytes that are no ciphertext. Callers turn it into an error that names the peer."""


class CipherLost(Exception):
    """A new cipher's process crashed, hung or outgrew its memory over these bytes; callers know whose they were."""


class CipherUnavailable(Exception):
    """This machine cannot start a cipher's process now. That says nothing about any bytes, so nobody is blamed."""


class TotalSpoiled(Exception):
    """An upload could not be added, and what was added of it could not be taken off again: the total is worth nothing."""


def half_bytes(parameters: BfvParameters) -> int:
    """Bytes of one half of a ciphertext."""
    return DEGREE * parameters.prime_bits // 8


def upload_bytes(parameters: BfvParameters, count: int) -> int:
    """Bytes of `count` fresh ciphertexts."""
    return count * (half_bytes(parameters) + SEED_BYTES)


def pack_words(words: Words, parameters: BfvParameters) -> bytes:
    """[..., 4096] uint64 words below q as bytes."""
    octets = np.ascontiguousarray(words, dtype="<u8").view(np.uint8)
    match parameters.prime_bits:
        case 56:
            return octets.reshape(-1, 8)[:, :7].tobytes()
        case 60:
            pairs = octets.reshape(-1, 2, 8)
            packed = np.empty((len(pairs), 15), dtype=np.uint8)
            packed[:, :7], packed[:, 7:14] = pairs[:, 0, :7], pairs[:, 1, :7]
            packed[:, 14] = pairs[:, 0, 7] | pairs[:, 1, 7] << 4
            return packed.tobytes()
        case bits:
            raise ConfigError(f"there is no framing for words of {bits} bits")


def unpack_words(data: bytes | memoryview, parameters: BfvParameters, halves: int) -> Words:
    """The words that `pack_words` packed, as [halves, 4096] uint64.

    Raises:
        FrameBroken: another length, or a word that is not below q.
    """
    if len(data) != halves * half_bytes(parameters):
        raise FrameBroken(f"{len(data)} bytes are not {halves} halves of ciphertexts")
    words = np.empty((halves, DEGREE), dtype=np.uint64)
    _unpack(np.frombuffer(bytes(data) + b"\0", dtype=np.uint8), half_bytes(parameters), words, parameters)
    return words


def unpack_upload(data: bytes | memoryview, parameters: BfvParameters) -> tuple[Words, list[bytes]]:
    """Fresh ciphertexts as [count, 2, 4096] words, of which c1 is still to be filled in, and the seeds of c1.

    Raises:
        FrameBroken: not a whole number of ciphertexts, or a word that is not below q.
    """
    size = upload_bytes(parameters, 1)
    if len(data) % size:
        raise FrameBroken(f"{len(data)} bytes are no whole number of ciphertexts")
    words = np.empty((len(data) // size, 2, DEGREE), dtype=np.uint64)
    _unpack(np.frombuffer(data, dtype=np.uint8), size, words[:, 0], parameters)
    return words, [bytes(data[start - SEED_BYTES : start]) for start in range(size, len(data) + 1, size)]


def _unpack(octets: NDArray[np.uint8], stride: int, words: Words, parameters: BfvParameters) -> None:
    """The halves that begin at every `stride` bytes, with a byte behind the last, into [halves, 4096] words."""
    match parameters.prime_bits:
        case 56:
            # Eight bytes at every seventh, with what they hold of the next word cut off.
            overlapping: Words = np.ndarray(words.shape, "<u8", octets, 0, (stride, 7))
            np.bitwise_and(overlapping, np.uint64((1 << 56) - 1), out=words)
        case 60:
            packed = np.ndarray((len(words), DEGREE // 2, 15), np.uint8, octets, 0, (stride, 15, 1))
            pairs = words.view(np.uint8).reshape(-1, DEGREE // 2, 2, 8)
            pairs[..., 0, :7], pairs[..., 1, :7] = packed[..., :7], packed[..., 7:14]
            pairs[..., 0, 7], pairs[..., 1, 7] = packed[..., 14] & 15, packed[..., 14] >> 4
        case bits:
            raise ConfigError(f"there is no framing for words of {bits} bits")
    if words.size and int(words.max()) >= parameters.prime:
        raise FrameBroken("a word is not below q")


def add(total: Words, words: Words, parameters: BfvParameters) -> None:
    """Add `words` to `total` in place, modulo q; [count, ...] both, of one shape, and below q."""
    prime = np.uint64(parameters.prime)
    room = _room(total, words)
    for part, more in zip(total, words, strict=True):
        np.add(part, more, out=part)
        np.subtract(part, prime, out=room)  # what would be below zero wraps to a large number
        np.minimum(part, room, out=part)


def subtract(total: Words, words: Words, parameters: BfvParameters) -> None:
    """Take `words` off `total` in place, modulo q; [count, ...] both, of one shape, and below q."""
    prime = np.uint64(parameters.prime)
    room = _room(total, words)
    for part, less in zip(total, words, strict=True):
        np.subtract(part, less, out=part)  # what is below zero has wrapped to a large number
        np.add(part, prime, out=room)
        np.minimum(part, room, out=part)


def _room(total: Words, words: Words) -> Words:
    """Memory for one of `count`: it stays in the cache, where as much as for all would be asked of the system anew each time."""
    if total.shape != words.shape:
        raise ValueError(f"words of shape {words.shape} cannot be added to a total of shape {total.shape}")
    return np.empty(total.shape[1:], dtype=np.uint64)
