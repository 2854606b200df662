"""The mask generator: AES-256 in counter mode, keyed once per (pair, round, attempt, purpose).

Counters are numbers of 128 bits, big-endian. A mask has a part for each purpose, far apart in the counters of its key:

    tag             counter 0, in the tag's own field
    chunk c         counters from (c + 1) * 2^32 + 2 on, read as little-endian uint32, which mask values modulo 2^32, or as little-endian
                    uint64, which mask coefficients modulo a power of two

Each key comes from HKDF over a fresh seed with a label and the attempt's context (`protocols.sealing`), and makes exactly one mask; a chunk
has fewer than 2^32 blocks, so no counter is used twice. Those of chunk c are what AES-GCM encrypts with under the 96-bit nonce c + 1, so
that its implementations serve too, which on some processors are much the faster ones (docs/adr/0017). GCM's own tag is never asked for:
counter 0 would be its key. The counters make every chunk of a mask reachable, so that chunks are masked in any order and on all cores.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from keys.errors import LocalProtocolError
from protocols.encoding import Uint32Vector

TAG_PRIME = (1 << 61) - 1
"""The field of tags (`protocols.tags`): 128 bits of keystream are uniform in it but for 2^-67."""

BLOCK_BYTES = 1 << 20
"""Keystream per pass: it stays in the cache while it is added."""

COUNT_BYTES = 16
"""One AES block."""

VALUES_PER_COUNT = 4
"""So many values of 4 bytes are in one AES block."""

NONCE_BYTES, FIRST_COUNT = 12, 2
"""AES-GCM counts in the last 32 bits of a block, and begins at 2: 1 is for its authentication, which is not used here."""

_ZEROS = memoryview(bytes(BLOCK_BYTES))


class _Scratch(threading.local):
    """A thread's memory for keystream: new memory would cost as much as what is written into it."""

    def __init__(self) -> None:
        self.buffer = np.empty(BLOCK_BYTES, dtype=np.uint8)


_scratch = _Scratch()

Coordinates = Uint32Vector | NDArray[np.uint64]
"""What is masked: values modulo 2^32, or coefficients modulo 2^64, of which any smaller power of two is a quotient."""


def keystream(key: bytes, start: int, count: int) -> bytes:
    """`count` values of 4 bytes of a 32-byte key's stream, from value `start` on, a multiple of 4."""
    counter, rest = divmod(start, VALUES_PER_COUNT)
    if rest:
        raise LocalProtocolError(f"a keystream is read from multiples of {VALUES_PER_COUNT} values, not from {start}")
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(counter.to_bytes(COUNT_BYTES))).encryptor()
    return encryptor.update(bytes(4 * count))


def _by_gcm(key: bytes, chunk: int) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.GCM((chunk + 1).to_bytes(NONCE_BYTES))).encryptor()


def _by_ctr(key: bytes, chunk: int) -> CipherContext:
    counter = ((chunk + 1) << 32) + FIRST_COUNT
    return Cipher(algorithms.AES256(key), modes.CTR(counter.to_bytes(COUNT_BYTES))).encryptor()


@cache
def _fastest() -> Callable[[bytes, int], CipherContext]:
    """The faster of two ways to the same keystream, as measured on this processor, once."""
    seconds = {}
    for way in (_by_ctr, _by_gcm):
        stream, spent = way(bytes(32), 0), []
        for _ in range(5):
            started = time.perf_counter()
            stream.update_into(_ZEROS, _scratch.buffer.data)
            spent.append(time.perf_counter() - started)
        seconds[way] = min(spent)
    return min(seconds, key=seconds.__getitem__)


def _chunk_stream(key: bytes, chunk: int) -> CipherContext:
    return _fastest()(key, chunk)


class MaskSet:
    """The masks of several keys, some added and some subtracted."""

    def __init__(self, added: Iterable[bytes], subtracted: Iterable[bytes]) -> None:
        self._added, self._subtracted = tuple(added), tuple(subtracted)

    def apply(self, values: Coordinates, chunk: int) -> None:
        """Mask the [m] `values` of a chunk in place, modulo 2^32 or 2^64; chunks count from 0."""
        added = [_chunk_stream(key, chunk) for key in self._added]
        subtracted = [_chunk_stream(key, chunk) for key in self._subtracted]
        buffer = _scratch.buffer
        whole = buffer.view(values.dtype.newbyteorder("<"))
        step = BLOCK_BYTES // values.itemsize
        for first in range(0, values.size, step):
            block = values[first : first + step]
            zeros, mask = _ZEROS[: block.nbytes], whole[: block.size]
            for stream in added:
                stream.update_into(zeros, buffer.data)
                np.add(block, mask, out=block)
            for stream in subtracted:
                stream.update_into(zeros, buffer.data)
                np.subtract(block, mask, out=block)

    def apply_to_tag(self, tag: int) -> int:
        """A tag with its masks, modulo `TAG_PRIME`."""
        added, subtracted = (sum(map(_tag_mask, keys)) for keys in (self._added, self._subtracted))
        return (tag + added - subtracted) % TAG_PRIME


def _tag_mask(key: bytes) -> int:
    return int.from_bytes(keystream(key, 0, VALUES_PER_COUNT), "little")
