"""Keys and seeds of one attempt: HPKE key pairs, pair seeds, self seeds, and the seals that carry shares (DESIGN 5 and 6).

Every attempt of every round has fresh secrets. A node has two HPKE key pairs (X-Wing-style hybrid ML-KEM-768 + X25519, so
that recorded traffic stays closed to a later quantum computer), after the two key pairs of Bonawitz et al. 2017:

- the *share* key opens what neighbours seal to the node for its own eyes; it never leaves the node;
- the *pair* key opens the contributions to pair seeds; its 32-byte master is Shamir-shared, so that survivors can
  recover the pair masks of a node that is lost. Contributions that the node makes itself derive from the same master.

For a pair (low, high) in name order, low contributes: contribution = HKDF(master_low), sealed to high's pair key. Whoever
knows either master and the relayed seal can derive the pair seed; nobody else can. Everything is bound to the agreement,
round, attempt, both names and the digest of all signed round keys, so that two nodes that were shown different keys
never share a seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import constant_time, hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keys.errors import LocalProtocolError
from keys.labels import Label
from protocols.shamir import Coins

SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
MLKEM_PUBLIC_BYTES = 1184
PUBLIC_KEY_BYTES = MLKEM_PUBLIC_BYTES + 32
SEED_BYTES = 32


class SealBroken(Exception):
    """A ciphertext does not open under this key and context. Callers turn it into an error that names the peer."""


@dataclass(frozen=True, slots=True)
class AttemptId:
    """What every derivation and signature of one attempt is bound to."""

    agreement_digest: bytes
    round: int
    attempt: int

    def bind(self, label: Label, *parts: bytes | str) -> bytes:
        """An unambiguous byte string: the label, then a MessagePack array of this attempt and `parts`."""
        return label + msgspec.msgpack.encode((self.agreement_digest, self.round, self.attempt, *parts))


@dataclass(frozen=True, slots=True)
class AttemptSecrets:
    """One node's fresh secrets of one attempt, 32 bytes each. Never stored, never printed."""

    self_seed: bytes = field(repr=False)
    share_master: bytes = field(repr=False)
    pair_master: bytes = field(repr=False)
    tag_seed: bytes = field(repr=False)

    @classmethod
    def fresh(cls, coins: Coins) -> AttemptSecrets:
        """Draw new secrets."""
        return cls(coins(SEED_BYTES), coins(SEED_BYTES), coins(SEED_BYTES), coins(SEED_BYTES))

    def __reduce__(self) -> NoReturn:
        raise LocalProtocolError("attempt secrets are never pickled")


def key_pair(master: bytes, attempt: AttemptId) -> tuple[MLKEM768X25519PrivateKey, bytes]:
    """The HPKE key pair that a 32-byte master gives in this attempt.

    The public key is encoded: ML-KEM-768 encapsulation key, then X25519 public key (1,216 bytes).
    """
    seed = hkdf(master, attempt.bind(Label.PAIR_KEY), 96)
    mlkem, x25519 = MLKEM768PrivateKey.from_seed_bytes(seed[:64]), X25519PrivateKey.from_private_bytes(seed[64:])
    public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
    return MLKEM768X25519PrivateKey(mlkem, x25519), public


def private_key(master: bytes, attempt: AttemptId) -> MLKEM768X25519PrivateKey:
    """The private half of `key_pair`."""
    return key_pair(master, attempt)[0]


def public_key_bytes(master: bytes, attempt: AttemptId) -> bytes:
    """The public half of `key_pair`."""
    return key_pair(master, attempt)[1]


def seal(public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """HPKE base mode to an encoded public key (RFC 9180, single shot).

    Raises:
        SealBroken: `public` is not a valid key.
    """
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:MLKEM_PUBLIC_BYTES]),
            X25519PublicKey.from_public_bytes(public[MLKEM_PUBLIC_BYTES:]),
        )
        return SUITE.encrypt(plaintext, key, info)
    except ValueError:
        raise SealBroken from None


def is_public_key(public: bytes) -> bool:
    """Whether something can be sealed to `public`: both parts are valid keys, and X25519 is not of low order."""
    try:
        seal(public, b"", b"")
    except SealBroken:
        return False
    return True


def unseal(private: MLKEM768X25519PrivateKey, ciphertext: bytes, info: bytes) -> bytes:
    """Open what `seal` made.

    Raises:
        SealBroken: wrong key, wrong context, or changed bytes.
    """
    try:
        return SUITE.decrypt(ciphertext, private, info)
    except (InvalidTag, ValueError):
        raise SealBroken from None


def keys_digest(signed_keys: bytes) -> bytes:
    """The digest of one node's signed round keys."""
    return hashlib.sha256(signed_keys).digest()


def cohort_digest(attempt: AttemptId, digests: Mapping[str, bytes], study_key: bytes = b"") -> bytes:
    """The digest of all nodes' `keys_digest`, and of the id of the study key if there is one.

    Two nodes with the same cohort digest work with the same keys.
    """
    parts = [part for name in sorted(digests) for part in (name, digests[name])]
    return hashlib.sha256(attempt.bind(Label.COHORT, *parts, *[study_key] * bool(study_key))).digest()


def unmasked_cohort_digest(attempt: AttemptId, study_key: bytes, last_record: bytes) -> bytes:
    """What stands for the cohort digest where there are no round keys: the id of the study key, and what the sum builds on."""
    return hashlib.sha256(attempt.bind(Label.UNMASKED_COHORT, study_key, last_record)).digest()


def senders_view(attempt: AttemptId, cohort: bytes, senders: Iterable[str]) -> bytes:
    """The digest of who distributed seeds: two nodes with the same view masked with the same pairs of nodes."""
    return hashlib.sha256(attempt.bind(Label.SENDERS, cohort, *sorted(senders))).digest()


def contribution(master_low: bytes, attempt: AttemptId, cohort: bytes, low: str, high: str) -> bytes:
    """What the first node of a pair contributes to the pair seed, derived from its pair master."""
    return hkdf(master_low, attempt.bind(Label.PAIR_CONTRIBUTION, cohort, low, high), SEED_BYTES)


def contribution_info(attempt: AttemptId, cohort: bytes, low: str, high: str) -> bytes:
    """The HPKE info of a sealed contribution."""
    return attempt.bind(Label.SEAL_CONTRIBUTION, cohort, low, high)


def shares_info(attempt: AttemptId, cohort: bytes, sender: str, recipient: str) -> bytes:
    """The HPKE info of sealed shares."""
    return attempt.bind(Label.SEAL_SHARES, cohort, sender, recipient)


def pair_mask_key(contribution_bytes: bytes, attempt: AttemptId, cohort: bytes, low: str, high: str) -> bytes:
    """The pair seed: the AES-256 key of the mask that low adds and high subtracts."""
    return hkdf(contribution_bytes, attempt.bind(Label.PAIR_SEED, cohort, low, high), SEED_BYTES)


def self_mask_key(self_seed: bytes, attempt: AttemptId, owner: str) -> bytes:
    """The AES-256 key of a node's own mask."""
    return hkdf(self_seed, attempt.bind(Label.SELF_SEED, owner), SEED_BYTES)


def self_seed_commitment(self_seed: bytes, attempt: AttemptId, owner: str) -> bytes:
    """A commitment to a uniformly random self seed; hiding because the seed has 256 bits of entropy."""
    return hashlib.sha256(attempt.bind(Label.SELF_SEED_COMMITMENT, owner, self_seed)).digest()


def share_digest(share: bytes, attempt: AttemptId, owner: str, holder: str) -> bytes:
    """A commitment to the share of one of `owner`'s secrets that `holder` gets; hiding because a share is a uniform field element."""
    return hashlib.sha256(attempt.bind(Label.SHARE_DIGEST, owner, holder, share)).digest()


def contribution_digest(contribution_bytes: bytes, attempt: AttemptId, low: str, high: str) -> bytes:
    """A commitment to what the first node of a pair contributes; hiding because a contribution has 256 bits of entropy."""
    return hashlib.sha256(attempt.bind(Label.CONTRIBUTION_DIGEST, low, high, contribution_bytes)).digest()


def same(left: bytes, right: bytes) -> bool:
    """Compare two byte strings in constant time."""
    return constant_time.bytes_eq(left, right)


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256 without salt."""
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=None, info=info).derive(secret)
