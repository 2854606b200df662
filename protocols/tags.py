"""Tags that make the sum verifiable by whoever knows the tag seed, which the aggregator does not (docs/adr/0007).

The seed expands to two vectors alpha of uniform 32-bit integers. Each node adds to its vector x the tags <alpha, x> mod 2^64,
cut into limbs that cannot overflow the ring when all nodes' limbs are added, and masked like any other value. After the
round <alpha, sum> must equal the sum of the tags.

A sum changed by delta != 0, |delta_i| < 2^32, passes one tag with probability at most 2^-32: for any other entries of alpha,
alpha_i -> alpha_i * delta_i mod 2^64 is injective on 32-bit integers. Two independent tags: 2^-64.

Threat assumption: one member that tells the aggregator the seed takes the detection away from all, not the privacy. A
member that sends a false tag spoils the check for all; nobody can tell it from an aggregator that changed the sum.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keys.labels import Label
from protocols.encoding import Uint32Vector
from protocols.prg import BLOCK_VALUES, Keystream
from protocols.sealing import AttemptId

TAGS = 2
TAG_BITS = 64


def limb_count(value_bits: int) -> int:
    """How many ring values the tags of one vector take."""
    return TAGS * -(-TAG_BITS // value_bits)


def commitment(seed: bytes, attempt: AttemptId, dealer: str) -> bytes:
    """A dealer's commitment to the uniformly random tag seed that it deals, so that it deals the same to all."""
    return hashlib.sha256(attempt.bind(Label.TAG_COMMITMENT, dealer, seed)).digest()


class Tagger:
    """Computes the tags of one vector that arrives in consecutive blocks of any length."""

    def __init__(self, seed: bytes, attempt: AttemptId) -> None:
        info = attempt.bind(Label.TAG_KEY)
        keys = HKDF(algorithm=hashes.SHA256(), length=32 * TAGS, salt=None, info=info).derive(seed)
        self._streams = [Keystream(keys[32 * index : 32 * index + 32]) for index in range(TAGS)]
        self._tags = [0] * TAGS

    def update(self, values: Uint32Vector) -> None:
        """Take the next values ([m] uint32)."""
        for start in range(0, values.size, BLOCK_VALUES):
            block = values[start : start + BLOCK_VALUES].astype(np.uint64)
            for index, stream in enumerate(self._streams):
                alpha = stream.next(block.size).astype(np.uint64)
                self._tags[index] = (self._tags[index] + int(np.dot(alpha, block))) % (1 << TAG_BITS)

    def limbs(self, value_bits: int) -> Uint32Vector:
        """The tags so far as [limb_count] uint32 values below 2^value_bits, the lowest bits of each tag first."""
        mask = (1 << value_bits) - 1
        shifts = range(0, TAG_BITS, value_bits)
        return np.array([tag >> shift & mask for tag in self._tags for shift in shifts], dtype=np.uint32)

    def matches(self, summed_limbs: Uint32Vector, value_bits: int) -> bool:
        """Whether sums of limbs ([limb_count] uint32) are the tags of the vector, which is the sum, so far."""
        rows = summed_limbs.reshape(TAGS, -1)
        sums = [sum(int(limb) << value_bits * place for place, limb in enumerate(row)) for row in rows]
        return [total % (1 << TAG_BITS) for total in sums] == self._tags
