"""The study key: the BFV secret key that all hospitals of a study hold, and the aggregator does not (DESIGN section 6).

One hospital makes it when the study begins and seals it to each of the others by HPKE; the aggregator carries the seals. It belongs
to one agreement: a new agreement means a new key. Its id is a digest of the key itself, so whoever deals another key under the same id is
found out, and the id is bound into every upload and every record: nobody adds up under two keys.

Threat assumption: every hospital holds the key. In `homomorphic` one that colludes with the aggregator decrypts every upload; in
`layered` it finds uniform masks there.
"""

from __future__ import annotations

import hashlib
from typing import NoReturn

from keys.errors import LocalProtocolError
from keys.labels import Label
from protocols import sealing
from protocols.prg import TAG_PRIME
from protocols.sealing import AttemptId
from protocols.shamir import Coins


class StudyKey:
    """A study's secret key, as `protocols.bfv.generate_key` packs it. Never printed, never pickled."""

    __slots__ = ("_secret", "id")

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.id = hashlib.sha256(Label.STUDY_KEY + secret).digest()

    @property
    def secret(self) -> bytes:
        """The packed words of the key."""
        return self._secret

    def seal(self, box: bytes, agreement_digest: bytes, dealer: str, recipient: str) -> bytes:
        """Seal the key to the public key `box` of another hospital.

        Raises:
            SealBroken: `box` is no valid key.
        """
        return sealing.seal(box, self._secret, _seal_info(agreement_digest, dealer, recipient, self.id))

    def tag_seed(self, attempt: AttemptId) -> bytes:
        """The seed of the tags of an attempt that has no dealt ones."""
        return sealing.hkdf(self._secret, attempt.bind(Label.STUDY_TAG_SEED), sealing.SEED_BYTES)

    def tag_pad(self, attempt: AttemptId, name: str) -> int:
        """What hides one node's tag from the aggregator where nothing masks it: every hospital can take it off the sum."""
        return int.from_bytes(sealing.hkdf(self._secret, attempt.bind(Label.STUDY_TAG_PAD, name), 16)) % TAG_PRIME

    def __repr__(self) -> str:
        return f"StudyKey({self.id.hex()[:16]}..., <redacted>)"

    def __reduce__(self) -> NoReturn:
        raise LocalProtocolError("a study key is never pickled")


class Box:
    """A key pair of one process, to which the study key is sealed; it lives in memory only."""

    def __init__(self, coins: Coins, agreement_digest: bytes) -> None:
        self._agreement_digest = agreement_digest
        self._private, self.public = sealing.key_pair(coins(sealing.SEED_BYTES), AttemptId(agreement_digest, 0, 0))

    def open(self, sealed: bytes, dealer: str, recipient: str, key_id: bytes) -> StudyKey:
        """The key that `dealer` sealed.

        Raises:
            SealBroken: it does not open, or is another key than its id says.
        """
        key = StudyKey(
            sealing.unseal(self._private, sealed, _seal_info(self._agreement_digest, dealer, recipient, key_id))
        )
        if not sealing.same(key.id, key_id):
            raise sealing.SealBroken
        return key


def _seal_info(agreement_digest: bytes, dealer: str, recipient: str, key_id: bytes) -> bytes:
    return AttemptId(agreement_digest, 0, 0).bind(Label.SEAL_STUDY_KEY, dealer, recipient, key_id)
