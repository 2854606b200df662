"""A node's masked upload: from the float vector to packed chunks, made as they are asked for, on all cores.

    values -> fixed point -> tag over them -> + masks -> packed ring values -> chunk

The tag's limbs follow the values. Only the chunks that are asked for exist; the vector itself is never copied.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from protocols.encoding import FixedPoint, Float64Vector, pack
from protocols.messages import chunk_digest
from protocols.prg import MaskSet
from protocols.tags import TAG_PRIME, Tagger, limb_count, to_limbs
from protocols.transcript import upload_digest
from protocols.workers import spread


def coordinates(size: int, fixed_point: FixedPoint) -> int:
    """How many ring values an update of `size` values takes: itself and the limbs of its tag."""
    return size + limb_count(fixed_point.value_bits)


Finish = Callable[[int, bytes, memoryview], bytes]
"""Makes a message of a chunk's index, digest and packed values, which hold only during the call; called from any thread."""


class MaskedUpload:
    """The chunks of one upload. `vector` ([d] float64) must have passed `FixedPoint.check`."""

    def __init__(
        self, fixed_point: FixedPoint, vector: Float64Vector, tagger: Tagger, masks: MaskSet, chunk_values: int
    ) -> None:
        self._fixed_point, self._vector, self._tagger, self._masks = fixed_point, vector, tagger, masks
        self._total = coordinates(vector.size, fixed_point)
        self._chunk_values = chunk_values
        self._digests: list[bytes] = []
        self._tag = 0

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

    def make(self, stop: int, finish: Finish) -> list[bytes]:
        """The messages of the next chunks, up to chunk `stop`; each chunk is made once."""
        full = self._vector.size // self._chunk_values  # these hold values only
        made = self._take(spread(lambda index: self._make(index, finish), range(self.made, min(stop, full))))
        while self.made < min(stop, self.chunks):
            made += self._take([self._make(self.made, finish)])
        return made

    def _take(self, made: list[tuple[bytes, bytes, int]]) -> list[bytes]:
        self._digests += [digest for _, digest, _ in made]
        self._tag = (self._tag + sum(part for _, _, part in made)) % TAG_PRIME
        return [message for message, _, _ in made]

    def _make(self, index: int, finish: Finish) -> tuple[bytes, bytes, int]:
        """The message of a chunk, the chunk's digest, and what its values add to the tag."""
        start = index * self._chunk_values
        block = np.empty(min(self._chunk_values, self._total - start), dtype=np.uint32)
        values = self._vector[start : start + block.size]
        encoded = block[: values.size]
        self._fixed_point.encode_into(values, encoded)
        part = self._tagger.part(encoded, start)
        if encoded.size < block.size:
            limbs = to_limbs((self._tag + part) % TAG_PRIME, self._fixed_point.value_bits)
            first = start + encoded.size - self._vector.size
            block[encoded.size :] = limbs[first : first + block.size - encoded.size]
        self._masks.apply(block, start)
        data = pack(block, self._fixed_point.ring_bits)
        digest = chunk_digest(data)
        return finish(index, digest, data), digest, part
