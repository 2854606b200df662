"""A node's masked upload: from the float vector to packed chunks in one pass, made as they are asked for.

    values -> fixed point -> tags over them -> + masks -> packed ring values -> chunk

The tags' limbs follow the values. Only one chunk exists at a time; the vector itself is never copied.
"""

from __future__ import annotations

import numpy as np

from protocols.encoding import FixedPoint, Float64Vector, pack
from protocols.messages import chunk_digest
from protocols.prg import MaskSet
from protocols.tags import Tagger, limb_count
from protocols.transcript import upload_digest


def coordinates(size: int, fixed_point: FixedPoint) -> int:
    """How many ring values an update of `size` values takes: itself and the limbs of its tags."""
    return size + limb_count(fixed_point.value_bits)


class MaskedUpload:
    """The chunks of one upload, in order. `vector` ([d] float64) must have passed `FixedPoint.check`."""

    def __init__(
        self, fixed_point: FixedPoint, vector: Float64Vector, tagger: Tagger, masks: MaskSet, chunk_values: int
    ) -> None:
        self._fixed_point, self._vector, self._tagger, self._masks = fixed_point, vector, tagger, masks
        self._total = coordinates(vector.size, fixed_point)
        self._block = np.empty(min(chunk_values, self._total), dtype=np.uint32)
        self._chunk_values = chunk_values
        self._digests: list[bytes] = []

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self._total // self._chunk_values)

    @property
    def made(self) -> int:
        """How many chunks were made so far."""
        return len(self._digests)

    @property
    def digest(self) -> bytes:
        """The digest of the upload, once every chunk was made."""
        return upload_digest(b"".join(self._digests))

    def next_chunk(self) -> tuple[bytes, memoryview]:
        """The next chunk: its digest and its packed values, which hold until the next call."""
        start = self.made * self._chunk_values
        block = self._block[: min(self._chunk_values, self._total - start)]
        values = self._vector[start : start + block.size]
        self._fixed_point.encode_into(values, block[: values.size])
        self._tagger.update(block[: values.size])
        if values.size < block.size:
            limbs = self._tagger.limbs(self._fixed_point.value_bits)
            first = start + values.size - self._vector.size
            block[values.size :] = limbs[first : first + block.size - values.size]
        self._masks.apply(block)
        data = pack(block, self._fixed_point.ring_bits)
        self._digests.append(chunk_digest(data))
        return self._digests[-1], data
