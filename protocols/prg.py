"""The mask generator: AES-256 in counter mode, keyed once per (pair, round, attempt, purpose).

Masks are the keystream read as little-endian uint32, added modulo 2^32. Each key comes from HKDF over a fresh seed with a
label and the attempt's context (`protocols.sealing`), and makes exactly one mask, so a zero initial counter is safe.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocols.encoding import Uint32Vector

BLOCK_VALUES = 1 << 16
"""Values per pass: 256 KiB of keystream stays in the cache while it is added."""

_ZEROS = bytes(4 * BLOCK_VALUES)


def add_mask(total: Uint32Vector, key: bytes, *, subtract: bool = False) -> None:
    """Add to `total` ([d] uint32, in place, modulo 2^32) the mask of a 32-byte `key`, or subtract it."""
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(4 * BLOCK_VALUES)
    mask = np.frombuffer(buffer, dtype="<u4")
    combine = np.subtract if subtract else np.add
    for start in range(0, total.size, BLOCK_VALUES):
        block = total[start : start + BLOCK_VALUES]
        stream.update_into(memoryview(_ZEROS)[: 4 * block.size], buffer)
        combine(block, mask[: block.size], out=block)
