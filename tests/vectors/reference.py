"""The formulas of the secure sum a second time: plain integers and bytes, and nothing of the packages under test.

Written from docs/protocol.md, docs/adr/0007 and the papers that they name. From `cryptography` come the primitives alone: SHA-2, HMAC,
AES, Ed25519, X25519, ML-KEM. Whatever is refused raises `Refused`; which error the product gives is the product's business.
"""

from __future__ import annotations

import hashlib
import hmac
import re
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


def mask(values: Sequence[int], added: Iterable[bytes], subtracted: Iterable[bytes], start: int = 0) -> list[int]:
    """Modulo 2^32, of which every ring is a quotient."""
    masked = list(values)
    for sign, keys in ((1, added), (-1, subtracted)):
        for key in keys:
            masked = [
                (value + sign * word) % 2**32
                for value, word in zip(masked, words(keystream(key, start, len(masked)), 4), strict=True)
            ]
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


def limbs(number: int, value_bits: int) -> list[int]:
    return [number >> value_bits * place & 2**value_bits - 1 for place in range(ceil_div(61, value_bits))]


def tag_of_limbs(sums: Sequence[int], value_bits: int) -> int:
    return sum(limb * 2 ** (value_bits * place) for place, limb in enumerate(sums)) % TAG_PRIME


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


# --- messages


def unpacked(data: bytes) -> Any:
    """The one value that `packed` makes `data` of."""
    value, rest = _next(data)
    need(not rest and packed(value) == data, "not canonical")
    return value


def _next(data: bytes) -> tuple[Any, bytes]:
    need(bool(data), "cut off")
    head, data = data[0], data[1:]
    wide = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD9: 1, 0xDC: 2}.get(head, 0)
    number, rest = int.from_bytes(data[:wide]), data[wide:]
    need(len(data) >= wide, "cut off")
    match head:
        case 0xC0 | 0xC2 | 0xC3:
            return {0xC0: None, 0xC2: False, 0xC3: True}[head], rest
        case _ if head < 0x80:
            return head, rest
        case 0xCC | 0xCD | 0xCE | 0xCF:
            return number, rest
        case 0xC4 | 0xC5 | 0xC6:
            need(len(rest) >= number, "cut off")
            return rest[:number], rest[number:]
        case _ if head >> 5 == 0b101 or head == 0xD9:
            size = number if wide else head & 31
            need(len(rest) >= size and rest[:size].isascii(), "cut off, or not ASCII")
            return rest[:size].decode(), rest[size:]
        case _ if head >> 4 == 0b1001 or head == 0xDC:
            items = []
            for _ in range(number if wide else head & 15):
                item, rest = _next(rest)
                items.append(item)
            return items, rest
    raise Refused("a type that no message has")


def _binary(low: int, high: int) -> Any:
    return lambda value: isinstance(value, bytes) and low <= len(value) <= high


def _list(kind: Any) -> Any:
    return lambda value: isinstance(value, list) and len(value) <= 256 and all(map(kind, value))


def _pair(second: Any) -> Any:
    return lambda value: isinstance(value, list) and len(value) == 2 and _name(value[0]) and second(value[1])


def _name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[a-z0-9][a-z0-9-]{0,62}", value) is not None


def _number(value: Any) -> bool:
    return type(value) is int and value < 2**32


def _reason(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[ -~]{0,500}", value) is not None


_digest, _signature, _share, _key = _binary(32, 32), _binary(64, 64), _binary(33, 33), _binary(1216, 1216)
_names, _relayed = _list(_name), _list(_binary(0, 8192))

BODIES: dict[str, tuple[Any, ...]] = {
    "Join": (_number,),
    "Ready": (),
    "Declined": (_reason,),
    "RoundKeys": (_key, _key, _digest, _digest),
    "SealedSeeds": (_name, _digest, _binary(0, 2048), _binary(0, 2048), *2 * [lambda v: v is None or _digest(v)]),
    "Complaint": (_name,),
    "MaskedChunk": (_number, _digest),
    "UploadDone": (_digest, _digest),
    "SurvivorVote": (_signature,),
    "Unmasking": (_list(_pair(_share)), _list(_pair(_share))),
    "Receipt": (_signature,),
    "Farewell": (),
    "RoundOpen": (_number,),
    "AttemptOpen": (_names,),
    "KeySet": (_list(_pair(_digest)), _relayed),
    "SeedSet": (_names, _relayed),
    "Credit": (_number,),
    "Survivors": (_list(_pair(_digest)), _relayed),
    "SurvivorProof": (_list(_pair(_signature)),),
    "SumChunk": (_number, _digest),
    "RoundResult": (_binary(0, 2**19), _list(_pair(_signature))),
    "AttemptFailed": (_reason, lambda value: isinstance(value, bool)),
    "StudyEnded": (_reason,),
}
"""The fields of every body behind its name."""


def read_message(data: bytes, peer: str, public: bytes, agreement_digest: bytes) -> dict[str, Any]:
    """Length of the head (4 bytes), head, tail."""
    need(len(data) <= 2**20 + 2**16, "too long")
    end = 4 + int.from_bytes(data[:4])
    need(4 <= end <= len(data), "cut off")
    fields, tail = unpacked(data[4:end]), data[end:]
    need(isinstance(fields, list) and len(fields) == 7)
    version, agreement, number, attempt, sender, body, signature = fields
    need([version, agreement, sender] == [2, agreement_digest, peer] and _number(number) and _number(attempt))
    need(isinstance(body, list) and bool(body) and isinstance(body[0], str) and body[0] in BODIES)
    kinds = BODIES[body[0]]
    need(len(body) == 1 + len(kinds) and all(kind(value) for kind, value in zip(kinds, body[1:], strict=True)))
    need(_signature(signature) and signed(public, "message", packed(fields[:6]), signature), "signature")
    need(sha256(tail) == body[2] if body[0] in ("MaskedChunk", "SumChunk") else not tail, "tail")
    return {"round": number, "attempt": attempt, "body": body, "signature": signature, "tail": tail}


def signed(public: bytes, name: str, content: bytes, signature: bytes) -> bool:
    """Ed25519 over the label and the content."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, label(name) + content)
    except InvalidSignature:
        return False
    return True


# --- the operations that the vectors name


def _sequence(attempt: Sequence[Any], cohort: bytes, name: str, low: str, high: str, secret: bytes) -> bytes:
    return hkdf(secret, bind(attempt, name, cohort, low, high))


def _check_key(public: bytes) -> bool:
    need(is_public_key(public))
    return True


def _check_signature(public: bytes, label_name: str, content: bytes, signature: bytes) -> bool:
    need(signed(public, label_name, content, signature))
    return True


def _tag_keys(seed: bytes, attempt: Sequence[Any]) -> dict[str, Any]:
    columns, rows = tag_keys(seed, attempt)
    entries = [word % 2**11 for word in words(keystream(columns, 0, 2560), 2)]
    return {
        "column_key": columns,
        "row_key": rows,
        "first_row_of_C": entries[:5],
        "last_row_of_C": entries[-5:],
        "first_row_of_R": [(word % 2**61).to_bytes(8) for word in words(keystream(rows, 0, 10), 8)],
    }


def _check_tag(
    seed: bytes, attempt: Sequence[Any], total: Sequence[int], limbs_total: Sequence[int], value_bits: int
) -> bool:
    need(tag(seed, attempt, total) == tag_of_limbs(limbs_total, value_bits))
    return True


def _upload(
    encoding: Sequence[int],
    chunk_values: int,
    encoded: Sequence[int],
    tag_seed: bytes,
    attempt: Sequence[Any],
    added: Sequence[bytes],
    subtracted: Sequence[bytes],
) -> dict[str, Any]:
    value_bits, _, ring_bits, _ = encoding
    number = tag(tag_seed, attempt, encoded)
    masked = mask([*encoded, *limbs(number, value_bits)], added, subtracted)
    chunks = [pack(masked[at : at + chunk_values], ring_bits) for at in range(0, len(masked), chunk_values)]
    digests = [sha256(chunk) for chunk in chunks]
    return {
        "tag": number.to_bytes(8),
        "limbs": limbs(number, value_bits),
        "chunk_bytes": [len(chunk) for chunk in chunks],
        "last_chunk": chunks[-1],
        "chunk_digests": digests,
        "upload_digest": sha256(label("upload"), *digests),
    }


def _graph(names: Sequence[str], degree: int, cohort: bytes) -> dict[str, Any]:
    circle = order(names, cohort)
    linked = {name: neighbours(circle, degree, name) for name in sorted(names)}
    dealers = circle[:3]
    return {
        "order": circle,
        "dealers": dealers,
        "neighbours": linked,
        "recipients": {n: sorted(set(names) - {n}) if n in dealers else linked[n] for n in linked},
        "sources": {n: sorted({*linked[n], *dealers} - {n}) for n in linked},
    }


def _keys(master: bytes, attempt: Sequence[Any]) -> dict[str, bytes]:
    seed = key_seed(master, attempt)
    return {"mlkem_seed": seed[:64], "x25519_private": seed[64:], "public": public_key(master, attempt)}


OPERATIONS: dict[str, Any] = {
    "limit": lambda encoding: float(FixedPoint(*encoding).limit),
    "encode": lambda encoding, values: FixedPoint(*encoding).encode([float(value) for value in values]),
    "decode": lambda encoding, total, contributors: FixedPoint(*encoding).decode(total, contributors),
    "pack": pack,
    "unpack": unpack,
    "keystream": keystream,
    "mask": mask,
    "label": label,
    "bind": lambda attempt, label_name, parts: bind(attempt, label_name, *parts),
    "agreement_digest": lambda document: sha256(label("agreement"), document.encode()),
    "keys": _keys,
    "check_key": _check_key,
    "check_signature": _check_signature,
    "self_mask_key": lambda self_seed, attempt, owner: hkdf(self_seed, bind(attempt, "self-seed", owner)),
    "self_seed_commitment": lambda self_seed, attempt, owner: sha256(
        bind(attempt, "self-seed-commitment", owner, self_seed)
    ),
    "tag_commitment": lambda seed, attempt, dealer: sha256(bind(attempt, "tag-commitment", dealer, seed)),
    "share_digest": lambda share, attempt, owner, holder: sha256(bind(attempt, "share-digest", owner, holder, share)),
    "keys_digest": lambda signed_keys: sha256(signed_keys),
    "cohort_digest": cohort_digest,
    "senders_view": lambda attempt, cohort, senders: sha256(bind(attempt, "senders", cohort, *sorted(senders))),
    "contribution": lambda master_low, attempt, cohort, low, high: _sequence(
        attempt, cohort, "pair-contribution", low, high, master_low
    ),
    "pair_mask_key": lambda contribution, attempt, cohort, low, high: _sequence(
        attempt, cohort, "pair-seed", low, high, contribution
    ),
    "shares_info": lambda attempt, cohort, sender, recipient: bind(attempt, "seal-shares", cohort, sender, recipient),
    "contribution_info": lambda attempt, cohort, low, high: bind(attempt, "seal-contribution", cohort, low, high),
    "unseal": unseal,
    "survivor_statement": lambda attempt, view, survivors: packed([*attempt, view, survivors]),
    "receipt_statement": lambda agreement_digest, round, record_digest: packed(
        [agreement_digest, round, record_digest]
    ),
    "upload_digest": lambda chunks: sha256(label("upload"), *map(sha256, chunks)),
    "aggregate_digest": lambda total: sha256(label("aggregate"), pack(total, 32)),
    "split": lambda secret, coins, holders: split(secret, [int.from_bytes(coin) % FIELD for coin in coins], holders),
    "combine": combine,
    "is_share": lambda data: len(data) == 33 and int.from_bytes(data) < FIELD,
    "tag_keys": _tag_keys,
    "tag": lambda seed, attempt, values, start: tag(seed, attempt, values, start).to_bytes(8),
    "limbs": lambda tag, value_bits: limbs(int.from_bytes(tag), value_bits),
    "tag_of_limbs": lambda limbs, value_bits: tag_of_limbs(limbs, value_bits).to_bytes(8),
    "check_tag": _check_tag,
    "upload": _upload,
    "graph": _graph,
    "tolerates": lambda names, degree, cohort, survivors, colluders: tolerates(
        order(names, cohort), degree, survivors, colluders
    ),
    "read_message": read_message,
}
