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
from protocols.encoding import Data, FixedPoint, Float64Vector
from protocols.messages import CHUNK_ENVELOPE_BYTES, chunk_digest
from protocols.prg import TAG_PRIME, MaskSet
from protocols.rings import Ring
from protocols.tags import COLUMNS, ROW_VALUES, Tagger
from protocols.transcript import upload_digest
from protocols.workers import spread

Envelope = Callable[[int, bytes], bytes]
"""Makes what goes before a chunk in its message, of the chunk's index and digest; called from any thread."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A masked chunk."""

    digest: bytes
    message: Data


class _Room:
    """Memory for a chunk's values, `values` ([count] uint32), and before them for their envelope: sealed in place they need no copy."""

    def __init__(self, count: int) -> None:
        self._memory = np.empty(CHUNK_ENVELOPE_BYTES + 4 * count, dtype=np.uint8)
        self.values = self._memory[CHUNK_ENVELOPE_BYTES:].view(np.uint32)

    def message(self, envelope: bytes, data: Data) -> Data:
        """The envelope and the sealed `data` behind it; a view of this memory if the data lie in it.

        Raises:
            LocalProtocolError: the envelope is too long.
        """
        lies_in: object = data.obj if isinstance(data, memoryview) else None
        if lies_in is not self.values:
            return b"".join((envelope, data))  # Packed or encrypted.
        if len(envelope) > CHUNK_ENVELOPE_BYTES:
            raise LocalProtocolError(f"an envelope of {len(envelope)} bytes; there is room for {CHUNK_ENVELOPE_BYTES}")
        start = CHUNK_ENVELOPE_BYTES - len(envelope)
        self._memory.data[start:CHUNK_ENVELOPE_BYTES] = envelope
        return self._memory.data[start:].toreadonly()


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

    def make(self, stop: int, envelope: Envelope) -> list[Data]:
        """The messages of the next chunks, up to chunk `stop`, each an envelope and the sealed values; each chunk is made once."""
        made = spread(lambda index: self._make(index, envelope), range(self.made, min(stop, self.chunks)))
        self._digests += [chunk.digest for chunk in made]
        return [chunk.message for chunk in made]

    def _make(self, index: int, envelope: Envelope) -> _Chunk:
        start = index * self._chunk_values
        values = self._vector[start : start + self._chunk_values]
        integers = self._fixed_point.integers(values)
        hashed = self._tagger.hashed(integers)
        first = start // ROW_VALUES
        self._hashed[first : first + len(hashed)] = hashed
        room = _Room(integers.size)
        np.copyto(room.values, integers, casting="unsafe")
        data = self._ring.seal(room.values, self._masks, start)
        digest = chunk_digest(data)
        return _Chunk(digest, room.message(envelope(index, digest), data))
