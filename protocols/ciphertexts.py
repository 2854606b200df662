"""Our own framing of BFV ciphertexts: fixed lengths, every word checked below q, before anything native sees it.

    up       c0 of 4,096 words, then the 64-byte seed of c1      for each plaintext: 28,736 bytes (56-bit q) or 30,784 (60 bits)
    down     c0, then c1 of 4,096 words                          for each plaintext: 57,344 bytes or 61,440

A word takes as many bits as q: 7 bytes, or 15 bytes for two (60 bits), little-endian. There are no sizes, types or headers in it
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
    octets = np.frombuffer(data, dtype=np.uint8)
    words = np.zeros((halves, DEGREE), dtype="<u8")
    wide = words.view(np.uint8)
    match parameters.prime_bits:
        case 56:
            wide.reshape(-1, 8)[:, :7] = octets.reshape(-1, 7)
        case 60:
            pairs, packed = wide.reshape(-1, 2, 8), octets.reshape(-1, 15)
            pairs[:, 0, :7], pairs[:, 1, :7] = packed[:, :7], packed[:, 7:14]
            pairs[:, 0, 7], pairs[:, 1, 7] = packed[:, 14] & 15, packed[:, 14] >> 4
        case bits:
            raise ConfigError(f"there is no framing for words of {bits} bits")
    if words.size and int(words.max()) >= parameters.prime:
        raise FrameBroken("a word is not below q")
    return words


def split_upload(data: bytes | memoryview, parameters: BfvParameters) -> tuple[Words, list[bytes]]:
    """c0 [count, 4096] and the seeds of fresh ciphertexts.

    Raises:
        FrameBroken: not a whole number of ciphertexts, or a word that is not below q.
    """
    size, half = upload_bytes(parameters, 1), half_bytes(parameters)
    if len(data) % size:
        raise FrameBroken(f"{len(data)} bytes are no whole number of ciphertexts")
    frames = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
    words = unpack_words(frames[:, :half].tobytes(), parameters, len(frames))
    return words, [frame.tobytes() for frame in frames[:, half:]]


def add(total: Words, words: Words, parameters: BfvParameters) -> None:
    """Add `words` to `total` in place, modulo q; both below q and of one shape."""
    np.add(total, words, out=total)
    np.minimum(total, total - np.uint64(parameters.prime), out=total)  # a difference below zero wraps to a large number
