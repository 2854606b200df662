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

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from keys.labels import Label
from protocols.encoding import Float64Vector, Uint32Vector
from protocols.prg import TAG_PRIME, keystream
from protocols.sealing import AttemptId

ROW_VALUES = 1024
COLUMNS = 5
COLUMN_BITS = 11
ROW_STRIDE = 12

Hashed = NDArray[np.float64]
"""v, or some of its rows: [rows, 5] integers below 2^53."""

BATCH_ROWS = 32
"""So few rows at once that BLAS starts no threads of its own: chunks are spread over the cores already."""


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

    def part(self, values: Uint32Vector | Float64Vector, start: int = 0) -> int:
        """What [m] `values` add to the tag, at coordinate `start` (a multiple of 1,024) and following: uint32, or the same as float64."""
        return self.inner_product(self.hashed(values), start // ROW_VALUES)

    def hashed(self, values: Uint32Vector | Float64Vector) -> Hashed:
        """v of [m] `values` that begin with a row: [ceil(m / 1,024), 5]. Nearly all of the work, without the interpreter."""
        integers = values.astype(np.float64, copy=False)
        full, rest = divmod(integers.size, ROW_VALUES)
        hashed = np.empty((full + bool(rest), COLUMNS))
        batched = full - full % BATCH_ROWS
        batches = integers[: batched * ROW_VALUES].reshape(-1, BATCH_ROWS, ROW_VALUES)
        np.matmul(batches, self._columns, out=hashed[:batched].reshape(-1, BATCH_ROWS, COLUMNS))
        others = integers[batched * ROW_VALUES : full * ROW_VALUES].reshape(-1, ROW_VALUES)
        np.matmul(others, self._columns, out=hashed[batched:full])
        if rest:
            hashed[full] = integers[full * ROW_VALUES :] @ self._columns[:rest]
        return hashed

    def inner_product(self, hashed: Hashed, first: int = 0) -> int:
        """<R, v> of [rows, 5], the rows `first` and following. Many small steps: best taken once for all rows, in one thread."""
        # Two 4-byte values of the keystream make one of R; a row takes 6 of them, whole AES blocks, and uses 5.
        rows = len(hashed)
        words = np.frombuffer(keystream(self._row_key, first * ROW_STRIDE, rows * ROW_STRIDE), dtype="<u8")
        random = words.reshape(rows, ROW_STRIDE // 2)[:, :COLUMNS].reshape(-1) & np.uint64(TAG_PRIME)
        return _inner_product(random, hashed.reshape(-1).astype(np.uint64)) % TAG_PRIME


def _inner_product(left: NDArray[np.uint64], right: NDArray[np.uint64]) -> int:
    """The exact inner product of [n] below 2^63 and [n] below 2^54, n <= 2^25: sums of products of limbs fit 64 bits."""
    products = _limbs(left, 21) @ _limbs(right, 18).T
    return sum(int(product) << 21 * i + 18 * j for (i, j), product in np.ndenumerate(products))


def _limbs(numbers: NDArray[np.uint64], bits: int) -> NDArray[np.uint64]:
    """[3, n]: the lowest three times `bits` bits of [n] numbers."""
    shifts = np.array([[0], [bits], [2 * bits]], dtype=np.uint64)
    return numbers >> shifts & np.uint64((1 << bits) - 1)
