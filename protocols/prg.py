"""The mask generator: AES-256 in counter mode, keyed once per (pair, round, attempt, purpose).

Masks are the keystream read as little-endian uint32, added modulo 2^32. Each key comes from HKDF over a fresh seed with a
label and the attempt's context (`protocols.sealing`), and makes exactly one mask, so a zero initial counter is safe.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.encoding import Uint32Vector

BLOCK_VALUES = 1 << 16
"""Values per pass: 256 KiB of keystream stays in the cache while it is added."""

_ZEROS = memoryview(bytes(4 * BLOCK_VALUES))


class Keystream:
    """The keystream of one 32-byte key, as consecutive uint32 values."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def next(self, count: int) -> Uint32Vector:
        """The next `count` <= BLOCK_VALUES values ([count] uint32)."""
        buffer = bytearray(4 * count)
        self.fill(buffer, count)
        return np.frombuffer(buffer, dtype="<u4")

    def fill(self, buffer: bytearray, count: int) -> None:
        """Write the next `count` <= BLOCK_VALUES values into the beginning of `buffer`."""
        self._cipher.update_into(_ZEROS[: 4 * count], buffer)


class MaskSet:
    """The masks of several keys, some added and some subtracted, applied together to consecutive blocks of one vector."""

    def __init__(self, added: Iterable[bytes], subtracted: Iterable[bytes]) -> None:
        self._added = [Keystream(key) for key in added]
        self._subtracted = [Keystream(key) for key in subtracted]
        self._buffer = bytearray(4 * BLOCK_VALUES)
        self._mask = np.frombuffer(self._buffer, dtype="<u4")

    def apply(self, values: Uint32Vector) -> None:
        """Mask the next values.size coordinates ([m] uint32), in place, modulo 2^32."""
        for start in range(0, values.size, BLOCK_VALUES):
            block = values[start : start + BLOCK_VALUES]
            mask = self._mask[: block.size]
            for stream in self._added:
                stream.fill(self._buffer, block.size)
                np.add(block, mask, out=block)
            for stream in self._subtracted:
                stream.fill(self._buffer, block.size)
                np.subtract(block, mask, out=block)
