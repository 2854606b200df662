"""A node's masked upload: from the float vector to packed chunks, made as they are asked for, on all cores.

    values -> fixed point -> tag over them -> + masks -> packed ring values -> chunk

The tag's limbs follow the values. Only the chunks that are asked for exist; the vector itself is never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from protocols.encoding import FixedPoint, Float64Vector, Uint32Vector, pack
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


@dataclass(slots=True)
class _Chunk:
    """A masked chunk, [m] uint32, and what its values add to the tag."""

    index: int
    part: int
    masked: Uint32Vector
    digest: bytes = b""
    message: bytes = b""


class MaskedUpload:
    """The chunks of one upload. `vector` ([d] float64) must have passed `FixedPoint.check`."""

    def __init__(
        self, fixed_point: FixedPoint, vector: Float64Vector, tagger: Tagger, masks: MaskSet, chunk_values: int
    ) -> None:
        self._fixed_point, self._vector, self._tagger, self._masks = fixed_point, vector, tagger, masks
        self._total = coordinates(vector.size, fixed_point)
        self._chunk_values = chunk_values
        self._digests: list[bytes] = []
        self._tag = tagger.pad

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
        made = spread(lambda index: self._make(index, finish), range(self.made, min(stop, self.chunks)))
        tag = (self._tag + sum(chunk.part for chunk in made)) % TAG_PRIME
        for chunk in made:
            if not chunk.message:
                self._add_limbs(chunk, tag)
                self._finish(chunk, finish)
        self._tag = tag
        self._digests += [chunk.digest for chunk in made]
        return [chunk.message for chunk in made]

    def _make(self, index: int, finish: Finish) -> _Chunk:
        """A chunk with its message, or without if it holds limbs of the tag, which has to be known first."""
        start = index * self._chunk_values
        masked = np.zeros(min(self._chunk_values, self._total - start), dtype=np.uint32)
        values = self._vector[start : start + masked.size]
        encoded = masked[: values.size]
        self._fixed_point.encode_into(values, encoded)
        chunk = _Chunk(index, self._tagger.part(encoded, start), masked)
        self._masks.apply(masked, start)
        if values.size == masked.size:
            self._finish(chunk, finish)
        return chunk

    def _add_limbs(self, chunk: _Chunk, tag: int) -> None:
        limbs = to_limbs(tag, self._fixed_point.value_bits)
        start = chunk.index * self._chunk_values
        first = max(self._vector.size, start)
        place = chunk.masked[first - start :]
        place += limbs[first - self._vector.size :][: place.size]

    def _finish(self, chunk: _Chunk, finish: Finish) -> None:
        data = pack(chunk.masked, self._fixed_point.ring_bits)
        chunk.digest = chunk_digest(data)
        chunk.message = finish(chunk.index, chunk.digest, data)
