"""The mask generator: AES-256 in counter mode, keyed once per (pair, round, attempt, purpose).

The first block of a keystream masks the tag, in the tag's own field; from the second on it is read as little-endian uint32, which mask
values modulo 2^32, or as little-endian uint64, which mask coefficients modulo a power of two. Each key comes from HKDF over a fresh
seed with a label and the attempt's context (`protocols.sealing`), and makes exactly one mask, so counting from zero is safe. The
counter makes every place of a mask reachable, so that blocks are masked in any order and on all cores.
"""

from __future__ import annotations

from collections.abc import Iterable

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

_ZEROS = memoryview(bytes(BLOCK_BYTES))

Coordinates = Uint32Vector | NDArray[np.uint64]
"""What is masked: values modulo 2^32, or coefficients modulo 2^64, of which any smaller power of two is a quotient."""


def _stream(key: bytes, place: int) -> CipherContext:
    """The keystream of a 32-byte key from byte `place` on."""
    count, rest = divmod(place, COUNT_BYTES)
    if rest:
        raise LocalProtocolError(f"a keystream is read from multiples of {COUNT_BYTES} bytes, not from {place}")
    return Cipher(algorithms.AES256(key), modes.CTR(count.to_bytes(16))).encryptor()


def keystream(key: bytes, start: int, count: int) -> bytes:
    """`count` values of 4 bytes from value `start` on, a multiple of 4."""
    return _stream(key, 4 * start).update(bytes(4 * count))


class MaskSet:
    """The masks of several keys, some added and some subtracted."""

    def __init__(self, added: Iterable[bytes], subtracted: Iterable[bytes]) -> None:
        self._added, self._subtracted = tuple(added), tuple(subtracted)

    def apply(self, values: Coordinates, start: int = 0) -> None:
        """Mask [m] `values` in place, modulo 2^32 or 2^64, as coordinates `start` (whole AES blocks) and following."""
        place = COUNT_BYTES + values.itemsize * start
        added = [_stream(key, place) for key in self._added]
        subtracted = [_stream(key, place) for key in self._subtracted]
        buffer = bytearray(min(values.nbytes, BLOCK_BYTES))
        whole = np.frombuffer(buffer, dtype=values.dtype.newbyteorder("<"))
        step = BLOCK_BYTES // values.itemsize
        for first in range(0, values.size, step):
            block = values[first : first + step]
            zeros, mask = _ZEROS[: block.nbytes], whole[: block.size]
            for stream in added:
                stream.update_into(zeros, buffer)
                np.add(block, mask, out=block)
            for stream in subtracted:
                stream.update_into(zeros, buffer)
                np.subtract(block, mask, out=block)

    def apply_to_tag(self, tag: int) -> int:
        """A tag with its masks, modulo `TAG_PRIME`."""
        added, subtracted = (sum(map(_tag_mask, keys)) for keys in (self._added, self._subtracted))
        return (tag + added - subtracted) % TAG_PRIME


def _tag_mask(key: bytes) -> int:
    return int.from_bytes(keystream(key, 0, VALUES_PER_COUNT), "little")
