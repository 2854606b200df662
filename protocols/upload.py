"""A node's masked upload: from the float vector to packed chunks, made as they are asked for, on all cores.

    values -> fixed point -> hashed for the tag -> masked and sealed by the ring (`protocols.rings`) -> chunk

The masked tag goes with the upload's end. Only the chunks that are asked for exist, and the rows of the tag (1 / 200 of the vector); the
vector itself is never copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from keys.errors import LocalProtocolError
from protocols.encoding import FixedPoint, Float64Vector
from protocols.messages import chunk_digest
from protocols.prg import TAG_PRIME, MaskSet
from protocols.rings import Data, Ring
from protocols.tags import COLUMNS, ROW_VALUES, Tagger
from protocols.transcript import upload_digest
from protocols.workers import spread

Finish = Callable[[int, bytes, Data], bytes]
"""Makes a message of a chunk's index, digest and sealed values, which hold only during the call; called from any thread."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A masked chunk."""

    digest: bytes
    message: bytes


class Upload:
    """The chunks of one upload. `vector` ([d] float64) must have passed `FixedPoint.check`; `pad` is added to the tag."""

    def __init__(
        self,
        ring: Ring,
        fixed_point: FixedPoint,
        vector: Float64Vector,
        tagger: Tagger,
        masks: MaskSet,
        chunk_values: int,
        pad: int = 0,
    ) -> None:
        self._ring, self._fixed_point, self._vector = ring, fixed_point, vector
        self._tagger, self._masks, self._chunk_values = tagger, masks, chunk_values
        self._digests: list[bytes] = []
        self._hashed = np.empty((-(-vector.size // ROW_VALUES), COLUMNS))
        self._pad = tagger.pad + pad

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self._vector.size // self._chunk_values)

    @property
    def made(self) -> int:
        """How many chunks were made so far."""
        return len(self._digests)

    @cached_property
    def tag(self) -> int:
        """The masked tag, once every chunk was made.

        Raises:
            LocalProtocolError: some were not: their rows would be whatever was in memory.
        """
        if self.made < self.chunks:
            raise LocalProtocolError(f"the tag is over all {self.chunks} chunks, of which {self.made} were made")
        return self._masks.apply_to_tag((self._tagger.inner_product(self._hashed) + self._pad) % TAG_PRIME)

    @property
    def digest(self) -> bytes:
        """The digest of the upload, once every chunk was made."""
        return upload_digest(b"".join(self._digests), self.tag)

    def make(self, stop: int, finish: Finish) -> list[bytes]:
        """The messages of the next chunks, up to chunk `stop`; each chunk is made once."""
        made = spread(lambda index: self._make(index, finish), range(self.made, min(stop, self.chunks)))
        self._digests += [chunk.digest for chunk in made]
        return [chunk.message for chunk in made]

    def _make(self, index: int, finish: Finish) -> _Chunk:
        start = index * self._chunk_values
        values = self._vector[start : start + self._chunk_values]
        integers = self._fixed_point.integers(values)
        hashed = self._tagger.hashed(integers)
        first = start // ROW_VALUES
        self._hashed[first : first + len(hashed)] = hashed
        data = self._ring.seal(integers.astype(np.uint32), self._masks, start)
        digest = chunk_digest(data)
        return _Chunk(digest, finish(index, digest, data))
