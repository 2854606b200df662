"""The operations of `encrypted.json`, by plain integers and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.vectors.reference import TAG_PRIME, bind, ceil_div, chunk_start, hkdf, keystream, label, need, sha256, words

DEGREE = 4096
TABLE = ((0xFFFFFFFFFBA001, 46), (0xFFFFFFFFFFFC001, 50))
"""The primes and, for each, how many bits of t."""

STANDARD = ((58, 256), (75, 192), (109, 128))
LAYOUTS = ((2, 1), (3, 2), (1, 1))


def _bits(n_max: int, bits: int) -> int:
    """Of the largest sum."""
    return len(bin(n_max * (2**bits - 1))) - 2


def _used(layout: tuple[int, int], value_bits: int, n_max: int) -> int:
    field = _bits(n_max, value_bits)
    return {2: 2 * field, 3: field + _bits(n_max, ceil_div(value_bits, 2)), 1: field}[layout[0]]


def _exact(prime: int, plain_bits: int, n_max: int) -> bool:
    """Hoeffding: n_max sums of 42 coins of one half stay within the room, but for 2^-100."""
    room = prime / 2 ** (plain_bits + 1) - (n_max + 1) / 2
    return room > 0 and math.log2(2) - 2 * room**2 / (42 * n_max) * math.log2(math.e) <= -100


def packing(value_bits: int, n_max: int) -> tuple[int, int, tuple[int, int]]:
    """Prime, plain bits and layout: the fewest bits a value, the first of equals."""
    found = []
    for prime, plain_bits in TABLE:
        for layout in LAYOUTS:
            secure = any(len(bin(prime)) - 2 <= most for most, _ in STANDARD)
            fits = _bits(n_max, value_bits) <= 32 and _used(layout, value_bits, n_max) <= plain_bits
            if secure and fits and _exact(prime, plain_bits, n_max):
                size = (len(bin(prime)) - 2) / (DEGREE * layout[0] // layout[1])
                found.append((size, len(found), prime, plain_bits, layout))
    need(bool(found), "no parameters")
    _, _, prime, plain_bits, layout = min(found)
    return prime, plain_bits, layout


def _choose(value_bits: int, n_max: int) -> dict[str, Any]:
    prime, plain_bits, layout = packing(value_bits, n_max)
    return {
        "prime": prime.to_bytes(8),
        "plain_bits": plain_bits,
        "values_in_coefficients": list(layout),
        "field_bits": _bits(n_max, value_bits),
        "block_values": DEGREE * layout[0] // layout[1],
    }


def coefficients(value_bits: int, n_max: int, values: Sequence[int]) -> list[int]:
    """Block by block: value k of a part stands in coefficient k of that part."""
    layout, field = packing(value_bits, n_max)[2], _bits(n_max, value_bits)
    block, part, low = DEGREE * layout[0] // layout[1], DEGREE // layout[1], ceil_div(value_bits, 2)
    found: list[int] = []
    for first in range(0, len(values), block):
        padded = [*values[first : first + block]] + [0] * (block - len(values[first : first + block]))
        parts = [padded[at : at + part] for at in range(0, block, part)]
        if layout[0] == 3:
            found += [a + (c % 2**low << field) for a, c in zip(parts[0], parts[2], strict=True)]
            found += [b + (c >> low << field) for b, c in zip(parts[1], parts[2], strict=True)]
        elif layout[0] == 2:
            found += [a + (b << field) for a, b in zip(parts[0], parts[1], strict=True)]
        else:
            found += parts[0]
    return found


def _pack(value_bits: int, n_max: int, values: Sequence[int]) -> dict[str, Any]:
    found = coefficients(value_bits, n_max, values)
    return {"first": found[:5], "digest": sha256(*(value.to_bytes(8, "little") for value in found))}


def _unpack(value_bits: int, n_max: int, coefficients: Sequence[Sequence[int]], places: Sequence[int]) -> list[int]:
    layout, field = packing(value_bits, n_max)[2], _bits(n_max, value_bits)
    part, low = DEGREE // layout[1], ceil_div(value_bits, 2)
    given = dict(coefficients)
    need(all(value < 2 ** _used(layout, value_bits, n_max) for value in given.values()))

    def value_at(place: int) -> int:
        which, at = divmod(place, part)
        if which < layout[1]:
            return given.get(which * part + at, 0) % 2**field
        above = given.get(at, 0) >> field
        return above + (given.get(part + at, 0) >> field << low) if layout[0] == 3 else above

    return [value_at(place) for place in places]


def _mask(
    values: Sequence[int], added: Sequence[bytes], subtracted: Sequence[bytes], chunk: int, plain_bits: int
) -> list[int]:
    """Modulo t; a coefficient takes half an AES block."""
    masked = list(values)
    for sign, keys in ((1, added), (-1, subtracted)):
        for key in keys:
            stream = words(keystream(key, chunk_start(chunk), 2 * len(masked)), 8)
            masked = [(value + sign * word) % 2**plain_bits for value, word in zip(masked, stream, strict=True)]
    return masked


def _prime(prime_bits: int) -> int:
    return next(prime for prime, _ in TABLE if prime < 2**prime_bits and prime >= 2 ** (prime_bits - 1))


def _packed_words(found: Sequence[int], prime_bits: int) -> bytes:
    """The low 56 bits of each word; of 60 bits, behind every two of them, a byte with the top four of both."""
    lower = [(word % 2**56).to_bytes(7, "little") for word in found]
    if prime_bits == 56:
        return b"".join(lower)
    top = [word >> 56 for word in found]
    return b"".join(lower[at] + lower[at + 1] + bytes([top[at] + 16 * top[at + 1]]) for at in range(0, len(found), 2))


def _ramp(prime_bits: int, multiplier: bytes) -> list[int]:
    return [place * int.from_bytes(multiplier) % _prime(prime_bits) for place in range(DEGREE)]


def _pack_words(prime_bits: int, multiplier: bytes) -> dict[str, bytes]:
    data = _packed_words(_ramp(prime_bits, multiplier), prime_bits)
    return {"first": data[:30], "digest": sha256(data)}


def _unpack_words(prime_bits: int, multiplier: bytes, place: int, word: bytes) -> bytes:
    found = _ramp(prime_bits, multiplier)
    found[place] = int.from_bytes(word)
    need(max(found) < _prime(prime_bits))
    return word


def _cohort(attempt: Sequence[Any], digests: Mapping[str, bytes], study_key: bytes) -> bytes:
    return sha256(
        bind(attempt, "cohort", *(part for name in sorted(digests) for part in (name, digests[name])), study_key)
    )


OPERATIONS = {
    "study_key_id": lambda key: sha256(label("study-key"), key),
    "study_key_info": lambda agreement_digest, dealer, recipient, key_id: bind(
        [agreement_digest, 0, 0], "seal-study-key", dealer, recipient, key_id
    ),
    "study_tag_seed": lambda key, attempt: hkdf(key, bind(attempt, "study-tag-seed")),
    "study_tag_pad": lambda key, attempt, name: (
        int.from_bytes(hkdf(key, bind(attempt, "study-tag-pad", name), 16)) % TAG_PRIME
    ).to_bytes(8),
    "cohort_digest_with_key": _cohort,
    "unmasked_cohort_digest": lambda attempt, study_key, last_record: sha256(
        bind(attempt, "unmasked-cohort", study_key, last_record)
    ),
    "mask_coefficients": _mask,
    "choose": _choose,
    "pack_coefficients": _pack,
    "unpack_coefficients": _unpack,
    "pack_words": _pack_words,
    "unpack_words": _unpack_words,
    "upload_bytes": lambda prime_bits, count: count * (DEGREE * prime_bits // 8 + 64),
}
