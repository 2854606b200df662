"""What an upload looks like: by the product's own code, of any vector."""

from __future__ import annotations

import secrets

import numpy as np

from audit.leakage.evidence import Values
from protocols import sealing
from protocols.agreement import Agreement
from protocols.ciphertexts import unpack_upload
from protocols.encoding import Data, FixedPoint, unpack
from protocols.packing import choose
from protocols.prg import MaskSet
from protocols.rings import make_ring
from protocols.tags import Tagger
from protocols.upload import Upload


class Uploads:
    """Uploads by the product's code, with fresh keys each, and how an attacker reads them."""

    def __init__(self, agreement: Agreement, me: str) -> None:
        self._agreement, self._me = agreement, me
        self._ring_of = agreement.secure_sum
        self._packing = choose(self._ring_of.value_bits, len(agreement.members)) if self._ring_of.encrypted else None
        self._attempt = sealing.AttemptId(secrets.token_bytes(32), 1, 1)
        if self._packing is None:
            self._ring = make_ring(agreement)
        else:
            from protocols.bfv import InProcess  # TenSEAL is slow to load, and not needed for `masked`

            ciphers = InProcess()
            self._ring = make_ring(agreement, ciphers, ciphers.generate_key(self._packing.parameters))

    def masks(self) -> MaskSet:
        """Fresh masks: our own, and one with every other hospital."""
        if not self._ring_of.masked:
            return MaskSet((), ())
        added = [sealing.self_mask_key(secrets.token_bytes(32), self._attempt, self._me)]
        subtracted: list[bytes] = []
        for member in self._agreement.members:
            if member.node_id != self._me:
                low, high = sorted((self._me, member.node_id))
                shared = sealing.contribution(secrets.token_bytes(32), self._attempt, bytes(32), low, high)
                key = sealing.pair_mask_key(shared, self._attempt, bytes(32), low, high)
                (added if low == self._me else subtracted).append(key)
        return MaskSet(added, subtracted)

    def seen(self, vector: Values, *, protected: bool = True) -> Values:
        """An upload of `vector` ([d]) as [d] numbers; unprotected it is only encoded."""
        code = FixedPoint.from_agreement(self._agreement)
        if not protected:
            return code.decode(code.encode(vector), 1)
        tagger = Tagger(secrets.token_bytes(32), self._attempt)
        upload = Upload(self._ring, code, vector, tagger, self.masks(), self._ring_of.chunk_values)
        chunks = upload.make(upload.chunks, lambda _, __: b"")
        sizes = [
            min(self._ring_of.chunk_values, vector.size - start)
            for start in range(0, vector.size, self._ring_of.chunk_values)
        ]
        return np.concatenate([self.read(chunk, count) for chunk, count in zip(chunks, sizes, strict=True)])

    def read(self, chunk: Data, count: int) -> Values:
        """`count` numbers out of a chunk, as if nothing protected it: c0 of a ciphertext is then the plaintext times q / t."""
        if self._packing is None:
            values = unpack(chunk, count, self._ring_of.ring_bits)
        else:
            parameters = self._packing.parameters
            words, _ = unpack_upload(chunk, parameters)
            plain = np.rint(words[:, 0].astype(np.float64) * (2.0**parameters.plain_bits / parameters.prime))
            values = self._packing.unpack(plain.astype(np.uint64) % np.uint64(2**self._packing.used_bits), count)
        return (values.astype(np.float64) - 2.0 ** (self._ring_of.value_bits - 1)) / 2.0**self._ring_of.fraction_bits
