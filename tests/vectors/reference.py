"""The formulas of the secure sum a second time: plain integers and bytes, and nothing of the packages under test.

Written from docs/protocol.md, docs/adr/0007 and the papers that they name. From `cryptography` come the primitives alone: SHA-2, HMAC,
AES, Ed25519, X25519, ML-KEM. Whatever is refused raises `Refused`; which error the product gives is the product's business.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FIELD = 2**256 + 297
TAG_PRIME = 2**61 - 1
XWING_LABEL = bytes.fromhex("5c2e2f2f5e5c")


class Refused(Exception):
    """An input that the protocol does not allow."""


def need(holds: bool, why: str = "") -> None:
    if not holds:
        raise Refused(why)


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


# --- bytes


def packed(value: Any) -> bytes:
    """MessagePack, the shortest form of everything: null, booleans, integers from 0, binary, ASCII text, arrays."""
    match value:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int():
            for limit, head, size in (
                (128, b"", 1),
                (1 << 8, b"\xcc", 1),
                (1 << 16, b"\xcd", 2),
                (1 << 32, b"\xce", 4),
            ):
                if value < limit:
                    return head + value.to_bytes(size)
            return b"\xcf" + value.to_bytes(8)
        case bytes():
            size = len(value)
            head = (
                b"\xc4" + bytes([size])
                if size < 256
                else b"\xc5" + size.to_bytes(2)
                if size < 65536
                else b"\xc6" + size.to_bytes(4)
            )
            return head + value
        case str():
            text = value.encode("ascii")
            return (bytes([0xA0 | len(text)]) if len(text) < 32 else b"\xd9" + bytes([len(text)])) + text
        case list() | tuple():
            size = len(value)
            head = bytes([0x90 | size]) if size < 16 else b"\xdc" + size.to_bytes(2)
            return head + b"".join(map(packed, value))
    raise TypeError(type(value))


def label(name: str) -> bytes:
    return f"secgeo/{name}/v1\0".encode()


def bind(attempt: Sequence[Any], name: str, *parts: bytes | str) -> bytes:
    """The label, then an array of agreement digest, round, attempt and the parts."""
    return label(name) + packed([*attempt, *parts])


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), secret, "sha256")


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2.3."""
    block, out = b"", b""
    for counter in range(1, ceil_div(length, 32) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        out += block
    return out[:length]


def hkdf(secret: bytes, info: bytes, length: int = 32) -> bytes:
    return hkdf_expand(hkdf_extract(b"", secret), info, length)


# --- encoding


class FixedPoint:
    """The encoding of DESIGN section 6 over exact fractions."""

    def __init__(self, value_bits: int, fraction_bits: int, ring_bits: int, n_max: int) -> None:
        need(0 < fraction_bits < value_bits <= ring_bits <= 32 and n_max >= 1)
        need(n_max * (2**value_bits - 1) < 2**ring_bits)
        self.value_bits, self.fraction_bits, self.n_max = value_bits, fraction_bits, n_max
        self.limit = Fraction(2 ** (value_bits - 1) - 1, 2**fraction_bits)

    def encode(self, values: Sequence[float]) -> list[int]:
        need(all(value - value == 0 for value in values), "NaN or infinity")
        clipped = (min(max(Fraction(value), -self.limit), self.limit) for value in values)
        # `round` of a fraction takes halves to the even neighbour.
        return [round(value * 2**self.fraction_bits) + 2 ** (self.value_bits - 1) for value in clipped]

    def decode(self, total: Sequence[int], contributors: int) -> list[float]:
        need(1 <= contributors <= self.n_max)
        need(all(contributors <= value <= contributors * (2**self.value_bits - 1) for value in total))
        offset = contributors * 2 ** (self.value_bits - 1)
        return [float(Fraction(value - offset, 2**self.fraction_bits)) for value in total]


def pack(values: Sequence[int], ring_bits: int) -> bytes:
    """Little-endian, modulo 2^ring_bits; two values of 20 bits make 5 bytes, a last one alone as if 0 followed."""
    values = [value % 2**ring_bits for value in values]
    if ring_bits == 20:
        pairs = zip(values[::2], [*values[1::2], 0], strict=False)
        return b"".join((low | high << 20).to_bytes(5, "little") for low, high in pairs)
    return b"".join(value.to_bytes(ring_bits // 8, "little") for value in values)


def unpack(data: bytes, count: int, ring_bits: int) -> list[int]:
    need(len(data) == (ceil_div(count, 2) * 5 if ring_bits == 20 else count * ring_bits // 8))
    whole = int.from_bytes(data, "little")
    return [whole >> ring_bits * place & 2**ring_bits - 1 for place in range(count)]


# --- masks


def keystream(key: bytes, start: int, count: int) -> bytes:
    """AES-256 of the counters themselves: the definition of counter mode. Four values make a block."""
    need(start % 4 == 0)
    first = start // 4
    counters = b"".join((first + place).to_bytes(16) for place in range(ceil_div(count, 4)))
    return Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(counters)[: 4 * count]  # noqa: S305


def words(stream: bytes, size: int) -> list[int]:
    return [int.from_bytes(stream[at : at + size], "little") for at in range(0, len(stream), size)]


def chunk_start(chunk: int) -> int:
    """The value of a keystream with which the mask of a chunk begins: that of counter (chunk + 1) * 2^32 + 2."""
    return 4 * ((chunk + 1) * 2**32 + 2)


def mask(values: Sequence[int], added: Iterable[bytes], subtracted: Iterable[bytes], chunk: int = 0) -> list[int]:
    """Modulo 2^32, of which every ring is a quotient."""
    masked = list(values)
    for sign, keys in ((1, added), (-1, subtracted)):
        for key in keys:
            stream = words(keystream(key, chunk_start(chunk), len(masked)), 4)
            masked = [(value + sign * word) % 2**32 for value, word in zip(masked, stream, strict=True)]
    return masked


# --- keys


def key_seed(master: bytes, attempt: Sequence[Any]) -> bytes:
    """64 bytes (d, z) of FIPS 203, then the X25519 private key."""
    return hkdf(master, bind(attempt, "pair-key"), 96)


def public_key(master: bytes, attempt: Sequence[Any]) -> bytes:
    seed = key_seed(master, attempt)
    mlkem = MLKEM768PrivateKey.from_seed_bytes(seed[:64]).public_key().public_bytes_raw()
    return mlkem + X25519PrivateKey.from_private_bytes(seed[64:]).public_key().public_bytes_raw()


def unseal(master: bytes, attempt: Sequence[Any], info: bytes, sealed: bytes) -> bytes:
    """HPKE base mode (RFC 9180, sections 4 to 6) with KEM 0x647a (X-Wing), KDF 0x0001 and AEAD 0x0002; enc comes first."""
    suite = b"HPKE" + bytes.fromhex("647a00010002")
    seed = key_seed(master, attempt)
    need(len(sealed) >= 1120 + 16, "too short")
    mlkem_part, x25519_part, ciphertext = sealed[:1088], sealed[1088:1120], sealed[1120:]
    own = X25519PrivateKey.from_private_bytes(seed[64:])
    try:
        secrets = (
            MLKEM768PrivateKey.from_seed_bytes(seed[:64]).decapsulate(mlkem_part),
            own.exchange(X25519PublicKey.from_public_bytes(x25519_part)),
        )
    except ValueError:
        raise Refused from None
    combined = b"".join((*secrets, x25519_part, own.public_key().public_bytes_raw(), XWING_LABEL))
    shared = hashlib.sha3_256(combined).digest()

    def extract(salt: bytes, name: bytes, secret: bytes) -> bytes:
        return hkdf_extract(salt, b"HPKE-v1" + suite + name + secret)

    context = b"\0" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")

    def expand(name: bytes, length: int) -> bytes:
        return hkdf_expand(secret, length.to_bytes(2) + b"HPKE-v1" + suite + name + context, length)

    try:
        return AESGCM(expand(b"key", 32)).decrypt(expand(b"base_nonce", 12), ciphertext, None)
    except InvalidTag:
        raise Refused from None


def is_public_key(public: bytes) -> bool:
    """FIPS 203, section 7.2: 1,152 bytes hold 768 numbers of 12 bits below 3329. RFC 7748, section 6.1: no zero secret."""
    if len(public) != 1216:
        return False
    number = int.from_bytes(public[:1152], "little")
    if any(number >> 12 * place & 0xFFF >= 3329 for place in range(768)):
        return False
    try:
        X25519PrivateKey.from_private_bytes(sha256(b"any")).exchange(X25519PublicKey.from_public_bytes(public[1184:]))
    except ValueError:
        return False
    return True


def cohort_digest(attempt: Sequence[Any], digests: Mapping[str, bytes]) -> bytes:
    return sha256(bind(attempt, "cohort", *(part for name in sorted(digests) for part in (name, digests[name]))))


# --- Shamir


def split(secret: bytes, coefficients: Sequence[int], holders: int) -> list[bytes]:
    """Share i (from 0) is secret + c_1 x + c_2 x^2 + ... at x = i + 1."""
    need(len(secret) == 32 and len(coefficients) < holders)
    numbers = [int.from_bytes(secret), *coefficients]
    return [
        (sum(number * x**power for power, number in enumerate(numbers)) % FIELD).to_bytes(33)
        for x in range(1, holders + 1)
    ]


def combine(shares: Sequence[tuple[int, bytes]], threshold: int) -> bytes | None:
    """Lagrange's formula at 0."""
    points = [(index + 1, int.from_bytes(share)) for index, share in shares]
    places = {x for x, _ in points}
    need(len(places) == len(points) == threshold)
    need(all(len(share) == 33 for _, share in shares) and all(y < FIELD for _, y in points))
    secret = 0
    for x, y in points:
        for other in places - {x}:
            y = y * other * pow(other - x, FIELD - 2, FIELD) % FIELD
        secret = (secret + y) % FIELD
    return secret.to_bytes(32) if secret < 2**256 else None


# --- tags


def tag_keys(seed: bytes, attempt: Sequence[Any]) -> tuple[bytes, bytes]:
    keys = hkdf(seed, bind(attempt, "tag-key"), 64)
    return keys[:32], keys[32:]


def tag_pad(seed: bytes, attempt: Sequence[Any]) -> int:
    """What each node adds to its tag."""
    return int.from_bytes(hkdf(seed, bind(attempt, "tag-key"), 96)[64:]) % TAG_PRIME


def tag(seed: bytes, attempt: Sequence[Any], values: Sequence[int], start: int = 0) -> int:
    """Sum over rows r and columns j of R[r, j] * (sum over i of values[1024 r + i] * C[i, j]), modulo 2^61 - 1."""
    column_key, row_key = tag_keys(seed, attempt)
    entries = [word % 2**11 for word in words(keystream(column_key, 0, 1024 * 5 // 2), 2)]
    total = 0
    for first in range(0, len(values), 1024):
        row = values[first : first + 1024]
        # 12 keystream values a row, 8-byte words of two; the sixth word of a row is not used.
        factors = [word % 2**61 for word in words(keystream(row_key, (start + first) // 1024 * 12, 10), 8)]
        for column, factor in enumerate(factors):
            total += factor * sum(value * entries[5 * place + column] for place, value in enumerate(row))
    return total % TAG_PRIME


def mask_tag(number: int, added: Sequence[bytes], subtracted: Sequence[bytes]) -> int:
    """The first block of each keystream, a little-endian number, masks the tag."""
    first = {key: int.from_bytes(keystream(key, 0, 4), "little") for key in (*added, *subtracted)}
    return (number + sum(first[key] for key in added) - sum(first[key] for key in subtracted)) % TAG_PRIME


# --- graph


def order(names: Iterable[str], cohort: bytes) -> list[str]:
    return sorted(names, key=lambda name: sha256(label("graph"), cohort, name.encode()))


def neighbours(circle: Sequence[str], degree: int, name: str) -> list[str]:
    """All others if `degree` is 0 or not below their number, else the `degree` / 2 nearest on both sides of the circle."""
    size, place = len(circle), circle.index(name)
    if not 0 < degree < size - 1:
        return sorted(set(circle) - {name})
    return sorted(circle[(place + sign * step) % size] for sign in (1, -1) for step in range(1, degree // 2 + 1))


def tolerates(circle: Sequence[str], degree: int, survivors: Iterable[str], colluders: int) -> bool:
    """In every stretch of `degree` / 2 places more than half as many survivors as there may be colluders."""
    size, alive = len(circle), set(survivors)
    if not 0 < degree < size - 1:
        return True
    stretches = ([circle[(at + step) % size] for step in range(degree // 2)] for at in range(size))
    return min(len(alive.intersection(stretch)) for stretch in stretches) * 2 > colluders


def agreed_graph(members: int, threshold: int, degree: int, share_threshold: int) -> int:
    """How many colluders a graph that may be agreed tolerates, wherever they stand."""
    need(members + 1 < 2 * threshold <= 2 * members, "a colluder votes twice, or nobody may be asked for a vote")
    if degree == 0:
        need(share_threshold == 0, "in a complete graph threshold counts")
        return min(threshold - 1, 2 * threshold - members - 1)
    need(members > 16, "a complete graph is due")
    need(degree % 2 == 0 and 4 <= degree < members - 1, "no circle has so many neighbours")
    need(2 <= share_threshold <= degree, "one share alone, or more than there are, recover a secret")
    need(2 * threshold > members + share_threshold - 1, "colluders have two survivor sets signed")
    return share_threshold - 1


# --- signatures


def signed(public: bytes, name: str, content: bytes, signature: bytes) -> bool:
    """Ed25519 over the label and the content."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, label(name) + content)
    except InvalidSignature:
        return False
    return True
