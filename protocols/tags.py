"""A tag that makes the sum verifiable by whoever knows the tag seed, which the aggregator does not (docs/adr/0007).

The vector x, in rows of 1,024 values, is hashed in two steps that are both linear over the integers:

    v = X C          C: [1024, 5] uniform integers of 11 bits; exact in float64, since 2^32 * 2^11 * 1024 = 2^53
    tag = <R, v> + R0    R: one uniform integer of 61 bits for each entry of v, R0: another, modulo the prime 2^61 - 1

Each node sends its tag masked in that field, by the same seeds as its vector, so that only the sum of the tags opens. After the round
<R, v> of the sum, with R0 for each contributor, must equal it. R0 hides <R, v> from the aggregator, which sees the sum of the tags; without
it a multiple of the sum with the same multiple of the tags would pass.

A sum changed by integers delta != 0, |delta_i| < 2^32, passes with probability below 2^-54: in a row that changed, each column
of C makes the change of v vanish for at most one of the 2^11 values of one of its entries, so all five do with
probability at most 2^-55; otherwise some entry of v changed, and one value of its R in 2^61 - 1 hides it.

Threat assumption: one member that tells the aggregator the seed takes the detection away from all, not the privacy. A
member that sends a false tag spoils the check for all; nobody can tell it from an aggregator that changed the sum.
"""

from __future__ import annotations

import hashlib
from operator import mul

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keys.labels import Label
from protocols.encoding import Uint32Vector
from protocols.prg import TAG_PRIME, keystream
from protocols.sealing import AttemptId

ROW_VALUES = 1024
COLUMNS = 5
COLUMN_BITS = 11
BLOCK_ROWS = 64
ROW_STRIDE = 12


def commitment(seed: bytes, attempt: AttemptId, dealer: str) -> bytes:
    """A dealer's commitment to the uniformly random tag seed that it deals, so that it deals the same to all."""
    return hashlib.sha256(attempt.bind(Label.TAG_COMMITMENT, dealer, seed)).digest()


class Tagger:
    """The tags of one attempt, from its 32-byte seed."""

    def __init__(self, seed: bytes, attempt: AttemptId) -> None:
        info = attempt.bind(Label.TAG_KEY)
        keys = HKDF(algorithm=hashes.SHA256(), length=96, salt=None, info=info).derive(seed)
        columns = np.frombuffer(keystream(keys[:32], 0, ROW_VALUES * COLUMNS // 2), dtype="<u2")
        self._columns = (columns & ((1 << COLUMN_BITS) - 1)).reshape(ROW_VALUES, COLUMNS).astype(np.float64)
        self._row_key = keys[32:64]
        self.pad = int.from_bytes(keys[64:]) % TAG_PRIME
        """What every node adds to its tag."""

    def part(self, values: Uint32Vector, start: int = 0) -> int:
        """What [m] uint32 `values` at coordinate `start` (a multiple of 1,024) and following add to the tag."""
        rows = -(-values.size // ROW_VALUES)
        hashed = np.zeros((rows, COLUMNS))
        matrix = np.empty((min(rows, BLOCK_ROWS), ROW_VALUES))
        for first in range(0, rows, BLOCK_ROWS):
            block = values[first * ROW_VALUES : (first + BLOCK_ROWS) * ROW_VALUES]
            part = matrix[: -(-block.size // ROW_VALUES)]
            part.reshape(-1)[: block.size] = block
            part.reshape(-1)[block.size :] = 0.0
            np.matmul(part, self._columns, out=hashed[first : first + len(part)])
        # Two 4-byte values of the keystream make one of R; a row takes 6 of them, whole AES blocks, and uses 5.
        place = start // ROW_VALUES * ROW_STRIDE
        words = np.frombuffer(keystream(self._row_key, place, rows * ROW_STRIDE), dtype="<u8")
        random = words.reshape(rows, ROW_STRIDE // 2)[:, :COLUMNS].reshape(-1) & np.uint64(TAG_PRIME)
        total: int = sum(map(mul, random.tolist(), hashed.reshape(-1).astype(np.int64).tolist()))
        return total % TAG_PRIME
