"""What a vector is summed in: integers modulo 2^ring_bits, or BFV ciphertexts of packed integers.

    masked                 IntegerRing       values + masks -> packed
    layered                CiphertextRing    values -> coefficients modulo t + masks -> ciphertexts
    homomorphic            CiphertextRing    values -> coefficients modulo t -> ciphertexts

A node seals its values chunk by chunk and opens the sum. The aggregator holds one total, adds uploads to it, takes masks off it and
sends it back; with ciphertexts it does so without the key. The state machines know nothing else of what they sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError, LocalProtocolError, VerificationFailed
from protocols.agreement import Agreement
from protocols.ciphertexts import (
    CipherLost,
    CipherUnavailable,
    FrameBroken,
    TotalSpoiled,
    Words,
    pack_words,
    unpack_words,
    upload_bytes,
)
from protocols.encoding import Data, Uint32Vector, pack, packed_bytes, unpack
from protocols.packing import DEGREE, BfvParameters, Packing, Uint64Matrix, choose
from protocols.prg import MaskSet
from protocols.workers import spread

Total = NDArray[Any]
"""A sum under way: [d] uint32, or [blocks, 2, 4096] uint64 words below q."""

Chunk = tuple[int, Data]
"""The index of its first value, and what a node sealed."""

CHUNKS_AT_ONCE = 4
"""Chunks that are in memory beside the total while they are added."""


class Ring(Protocol):
    """One way to sum. Counts and starts are of values; starts are multiples of the chunk's size."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    """Of a total that was kept as flat numbers."""
    sum_chunk_values: int
    """So many values of the sum go back in one message."""

    def seal(self, values: Uint32Vector, masks: MaskSet, start: int) -> Data:
        """The chunk of a node's encoded values ([m] uint32) that begins at `start`, masked; `values` may be overwritten.

        What comes back may be the memory of `values`: `memoryview.obj` says so.
        """

    def sealed_bytes(self, count: int) -> int:
        """The size of a sealed chunk."""

    def zeros(self, size: int) -> Total:
        """The empty sum of `size` values."""

    def add(self, total: Total, read: Callable[[], Iterable[Chunk]]) -> None:
        """Add the chunks of a whole upload, each of the right size; all of them or, if it raises, none.

        Raises:
            FrameBroken: they are no chunks of this ring.
            CipherLost: the cipher's process was lost over them.
            TotalSpoiled: and over taking off again what was added; this attempt is void.
            CipherUnavailable: there is no cipher to be had; this attempt is void, by nobody's fault.
        """

    def unmask(self, total: Total, masks: MaskSet) -> None:
        """Add masks to the total.

        Raises:
            CipherLost, CipherUnavailable: the cipher's process was lost, or cannot be started.
        """

    def pack_sum(self, total: Total, start: int) -> Data:
        """The message of the sum that begins at value `start`."""

    def unpack_sum(self, total: Total, start: int, data: Data) -> None:
        """Put such a message into a node's copy of the sum.

        Raises:
            FrameBroken: it is none.
        """

    def open(self, total: Total, size: int) -> Uint32Vector:
        """The sum's values ([size] uint32), by whoever holds the key.

        Raises:
            VerificationFailed: there are no such values in it.
        """


class Cipher(Protocol):
    """BFV of one set of parameters, and with the key if it was given: `protocols.bfv`, or the same in sandboxes."""

    def encrypt(self, packed: Uint64Matrix) -> bytes:
        """[count, 4096] coefficients below t as fresh ciphertexts, framed."""

    def decrypt(self, words: Words) -> Uint64Matrix:
        """[count, 2, 4096] words below q as [count, 4096] coefficients below t."""

    def add(self, total: Words, data: Data) -> None:
        """Add framed fresh ciphertexts to [count, 2, 4096] words below q, in place."""

    def subtract(self, total: Words, data: Data) -> None:
        """Take them off again."""

    def add_plain(self, total: Words, packed: Uint64Matrix) -> None:
        """Add [count, 4096] coefficients below t to what [count, 2, 4096] words encrypt, in place."""


class Ciphers(Protocol):
    """Where ciphers come from."""

    def generate_key(self, parameters: BfvParameters) -> bytes:
        """A new secret key."""

    def is_key(self, parameters: BfvParameters, key: bytes) -> bool:
        """Whether it could be such a key: a weak one would open every ciphertext to everybody."""

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        """A cipher with that key; without one (empty) for the aggregator."""


class IntegerRing:
    """Integers modulo 2^ring_bits."""

    dtype: np.dtype[Any] = np.dtype(np.uint32)
    shape: tuple[int, ...] = (-1,)

    def __init__(self, ring_bits: int, chunk_values: int) -> None:
        self._ring_bits, self.sum_chunk_values = ring_bits, chunk_values

    def seal(self, values: Uint32Vector, masks: MaskSet, start: int) -> Data:
        """See `Ring`."""
        masks.apply(values, start // self.sum_chunk_values)
        return pack(values, self._ring_bits)

    def sealed_bytes(self, count: int) -> int:
        """See `Ring`."""
        return packed_bytes(count, self._ring_bits)

    def zeros(self, size: int) -> Total:
        """See `Ring`."""
        return np.zeros(size, dtype=np.uint32)

    def add(self, total: Total, read: Callable[[], Iterable[Chunk]]) -> None:
        """See `Ring`."""
        for start, data in read():
            part = total[start : start + self.sum_chunk_values]
            try:
                values = unpack(data, part.size, self._ring_bits)
            except ValueError as error:
                raise FrameBroken(str(error)) from None
            np.add(part, values, out=part)

    def unmask(self, total: Total, masks: MaskSet) -> None:
        """See `Ring`."""
        step = self.sum_chunk_values
        spread(lambda start: masks.apply(total[start : start + step], start // step), range(0, total.size, step))
        if self._ring_bits < 32:
            total &= np.uint32((1 << self._ring_bits) - 1)

    def pack_sum(self, total: Total, start: int) -> Data:
        """See `Ring`."""
        return pack(total[start : start + self.sum_chunk_values], self._ring_bits)

    def unpack_sum(self, total: Total, start: int, data: Data) -> None:
        """See `Ring`."""
        part = total[start : start + self.sum_chunk_values]
        try:
            part[:] = unpack(data, part.size, self._ring_bits)
        except ValueError as error:
            raise FrameBroken(str(error)) from None

    def open(self, total: Total, size: int) -> Uint32Vector:
        """See `Ring`."""
        return total[:size]


class CiphertextRing:
    """BFV ciphertexts. What they encrypt is added modulo t, a power of two."""

    dtype: np.dtype[Any] = np.dtype(np.uint64)
    shape: tuple[int, ...] = (-1, 2, DEGREE)

    def __init__(self, packing: Packing, chunk_values: int, cipher: Cipher | None) -> None:
        self._packing, self._given_cipher = packing, cipher
        self._parameters = packing.parameters
        self._chunk_blocks = chunk_values // packing.block_values
        # A ciphertext of the sum is twice as large as a fresh one, and a message is as large.
        self._sum_blocks = max(1, self._chunk_blocks // 2)
        self.sum_chunk_values = self._sum_blocks * packing.block_values

    @property
    def _cipher(self) -> Cipher:
        if self._given_cipher is None:
            raise ConfigError("this ring was made to look at sums only")
        return self._given_cipher

    def seal(self, values: Uint32Vector, masks: MaskSet, start: int) -> Data:
        """See `Ring`."""
        packed = self._packing.pack(values)
        masks.apply(packed.reshape(-1), self._block(start) // self._chunk_blocks)
        packed &= np.uint64(2**self._parameters.plain_bits - 1)
        try:
            return self._cipher.encrypt(packed)
        except (CipherLost, CipherUnavailable) as error:
            raise LocalProtocolError(f"our upload could not be encrypted: {error}; start the node again") from None

    def sealed_bytes(self, count: int) -> int:
        """See `Ring`."""
        return upload_bytes(self._parameters, self._blocks(count))

    def zeros(self, size: int) -> Total:
        """See `Ring`."""
        return np.zeros((self._blocks(size), 2, DEGREE), dtype=np.uint64)

    def add(self, total: Total, read: Callable[[], Iterable[Chunk]]) -> None:
        """See `Ring`."""
        added: list[int] = []

        def add(chunk: Chunk) -> FrameBroken | CipherLost | CipherUnavailable | None:
            try:
                self._cipher.add(self._part(total, chunk), chunk[1])
            except (FrameBroken, CipherLost, CipherUnavailable) as error:
                return error  # The others of its batch are still at work.
            added.append(chunk[0])
            return None

        for chunks in _batches(read()):
            faults = [fault for fault in spread(add, chunks) if fault is not None]
            for fault in faults:
                if isinstance(fault, CipherUnavailable):
                    raise fault  # The sum is void; there is no cipher to take anything off with.
            if faults:
                self._take_off(total, (chunk for chunk in read() if chunk[0] in added))
                raise faults[0]

    def _take_off(self, total: Total, chunks: Iterable[Chunk]) -> None:
        try:
            for chunk in chunks:
                self._cipher.subtract(self._part(total, chunk), chunk[1])
        except (CipherLost, CipherUnavailable) as error:
            raise TotalSpoiled(str(error)) from None

    def unmask(self, total: Total, masks: MaskSet) -> None:
        """See `Ring`."""

        def unmask(first: int) -> None:
            part = total[first : first + self._chunk_blocks]
            packed = np.zeros((len(part), DEGREE), dtype=np.uint64)
            masks.apply(packed.reshape(-1), first // self._chunk_blocks)
            packed &= np.uint64(2**self._parameters.plain_bits - 1)
            self._cipher.add_plain(part, packed)

        spread(unmask, range(0, len(total), self._chunk_blocks))

    def pack_sum(self, total: Total, start: int) -> Data:
        """See `Ring`."""
        return pack_words(total[self._block(start) :][: self._sum_blocks], self._parameters)

    def unpack_sum(self, total: Total, start: int, data: Data) -> None:
        """See `Ring`."""
        part = total[self._block(start) :][: self._sum_blocks]
        part[:] = unpack_words(data, self._parameters, 2 * len(part)).reshape(part.shape)

    def open(self, total: Total, size: int) -> Uint32Vector:
        """See `Ring`."""
        try:
            opened = spread(
                lambda first: self._packing.unpack(
                    self._cipher.decrypt(part := total[first : first + self._chunk_blocks]),
                    len(part) * self._packing.block_values,
                ),
                range(0, len(total), self._chunk_blocks),
            )
        except CipherLost:
            raise VerificationFailed("the sum could not be decrypted: the cipher's process was lost over it") from None
        except CipherUnavailable as error:
            raise LocalProtocolError(f"the sum could not be decrypted: {error}; start the node again") from None
        return np.concatenate(opened)[:size]

    def _blocks(self, count: int) -> int:
        return -(-count // self._packing.block_values)

    def _block(self, start: int) -> int:
        return start // self._packing.block_values

    def _part(self, total: Total, chunk: Chunk) -> Total:
        start, data = chunk
        return total[self._block(start) :][: len(data) // upload_bytes(self._parameters, 1)]


def make_ring(agreement: Agreement, ciphers: Ciphers | None = None, key: bytes = b"") -> Ring:
    """The ring of an agreement; `ciphers` and the study's `key` are for ciphertexts."""
    secure_sum = agreement.secure_sum
    if secure_sum.protocol == "masked":
        return IntegerRing(secure_sum.ring_bits, secure_sum.chunk_values)
    packing = choose(secure_sum.value_bits, len(agreement.members))
    cipher = ciphers.cipher(packing.parameters, key) if ciphers is not None else None
    return CiphertextRing(packing, secure_sum.chunk_values, cipher)


def octets(total: Total) -> memoryview:
    """A sum as it is stored and digested: little-endian."""
    return total.astype(total.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    waiting = iter(chunks)
    while batch := list(islice(waiting, CHUNKS_AT_ONCE)):
        yield batch
