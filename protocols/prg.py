"""The mask generator: AES-256 in counter mode, keyed once per (pair, round, attempt, purpose).

The first block of a keystream masks the tag, in the tag's own field; from the second on it is read as little-endian uint32, which
mask the values modulo 2^32. Each key comes from HKDF over a fresh seed with a
label and the attempt's context (`protocols.sealing`), and makes exactly one mask, so counting from zero is safe. The
counter makes every place of a mask reachable, so that blocks are masked in any order and on all cores.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from keys.errors import LocalProtocolError
from protocols.encoding import Uint32Vector

TAG_PRIME = (1 << 61) - 1
"""The field of tags (`protocols.tags`): 128 bits of keystream are uniform in it but for 2^-67."""

BLOCK_VALUES = 1 << 18
"""Values per pass: 256 KiB of keystream stays in the cache while it is added."""

VALUES_PER_COUNT = 4
"""One AES block makes four values."""

_ZEROS = memoryview(bytes(4 * BLOCK_VALUES))


def _stream(key: bytes, start: int) -> CipherContext:
    """The keystream of a 32-byte key from value `start` on."""
    count, rest = divmod(start, VALUES_PER_COUNT)
    if rest:
        raise LocalProtocolError(f"a keystream is read from multiples of {VALUES_PER_COUNT} values, not from {start}")
    return Cipher(algorithms.AES256(key), modes.CTR(count.to_bytes(16))).encryptor()


def keystream(key: bytes, start: int, count: int) -> bytes:
    """`count` values of 4 bytes from value `start` on, a multiple of 4."""
    return _stream(key, start).update(bytes(4 * count))


class MaskSet:
    """The masks of several keys, some added and some subtracted."""

    def __init__(self, added: Iterable[bytes], subtracted: Iterable[bytes]) -> None:
        self._added, self._subtracted = tuple(added), tuple(subtracted)

    def apply(self, values: Uint32Vector, start: int = 0) -> None:
        """Mask [m] uint32 `values` in place, modulo 2^32, as coordinates `start` (a multiple of 4) and following."""
        added = [_stream(key, start + VALUES_PER_COUNT) for key in self._added]
        subtracted = [_stream(key, start + VALUES_PER_COUNT) for key in self._subtracted]
        buffer = bytearray(4 * min(values.size, BLOCK_VALUES))
        whole = np.frombuffer(buffer, dtype="<u4")
        for first in range(0, values.size, BLOCK_VALUES):
            block = values[first : first + BLOCK_VALUES]
            zeros, mask = _ZEROS[: 4 * block.size], whole[: block.size]
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
