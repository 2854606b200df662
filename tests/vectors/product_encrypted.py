"""The operations of `encrypted.json`, as the packages under test compute them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from protocols import ciphertexts, sealing, study_key
from protocols.messages import chunk_digest
from protocols.packing import DEGREE, PARAMETERS, BfvParameters, choose
from protocols.prg import MaskSet
from protocols.sealing import AttemptId
from protocols.study_key import StudyKey


def _mask(
    values: Sequence[int], added: Sequence[bytes], subtracted: Sequence[bytes], chunk: int, plain_bits: int
) -> list[int]:
    masked = np.array(values, dtype=np.uint64)
    MaskSet(added, subtracted).apply(masked, chunk)
    found: list[int] = (masked & np.uint64(2**plain_bits - 1)).tolist()
    return found


def _choose(value_bits: int, n_max: int) -> dict[str, Any]:
    packing = choose(value_bits, n_max)
    return {
        "prime": packing.parameters.prime.to_bytes(8),
        "plain_bits": packing.parameters.plain_bits,
        "values_in_coefficients": list(packing.layout.value),
        "field_bits": packing.field_bits,
        "block_values": packing.block_values,
    }


def _pack(value_bits: int, n_max: int, values: Sequence[int]) -> dict[str, Any]:
    packed = choose(value_bits, n_max).pack(np.array(values, dtype=np.uint32)).reshape(-1)
    return {"first": packed[:5].tolist(), "digest": chunk_digest(packed.astype("<u8").tobytes())}


def _unpack(value_bits: int, n_max: int, coefficients: Sequence[Sequence[int]], places: Sequence[int]) -> list[int]:
    packing, packed = choose(value_bits, n_max), np.zeros((1, DEGREE), dtype=np.uint64)
    for place, value in coefficients:
        packed[0, place] = value
    values = packing.unpack(packed, packing.block_values)
    return [int(values[place]) for place in places]


def _parameters(prime_bits: int) -> BfvParameters:
    return next(parameters for parameters in PARAMETERS if parameters.prime_bits == prime_bits)


def _ramp(prime_bits: int, multiplier: bytes) -> Any:
    factor, prime = int.from_bytes(multiplier), _parameters(prime_bits).prime
    return np.array([place * factor % prime for place in range(DEGREE)], dtype=np.uint64)


def _pack_words(prime_bits: int, multiplier: bytes) -> dict[str, bytes]:
    data = ciphertexts.pack_words(_ramp(prime_bits, multiplier), _parameters(prime_bits))
    return {"first": data[:30], "digest": chunk_digest(data)}


def _unpack_words(prime_bits: int, multiplier: bytes, place: int, word: bytes) -> bytes:
    words = _ramp(prime_bits, multiplier)
    words[place] = int.from_bytes(word)
    data = ciphertexts.pack_words(words, _parameters(prime_bits))
    return int(ciphertexts.unpack_words(data, _parameters(prime_bits), 1)[0, place]).to_bytes(8)


def _cohort(attempt: Sequence[Any], digests: Mapping[str, bytes], study_key: bytes) -> bytes:
    return sealing.cohort_digest(AttemptId(*attempt), digests, study_key)


OPERATIONS = {
    "study_key_id": lambda key: StudyKey(key).id,
    "study_key_info": lambda agreement_digest, dealer, recipient, key_id: study_key._seal_info(
        agreement_digest, dealer, recipient, key_id
    ),
    "study_tag_seed": lambda key, attempt: StudyKey(key).tag_seed(AttemptId(*attempt)),
    "study_tag_pad": lambda key, attempt, name: StudyKey(key).tag_pad(AttemptId(*attempt), name).to_bytes(8),
    "cohort_digest_with_key": _cohort,
    "unmasked_cohort_digest": lambda attempt, study_key, last_record: sealing.unmasked_cohort_digest(
        AttemptId(*attempt), study_key, last_record
    ),
    "mask_coefficients": _mask,
    "choose": _choose,
    "pack_coefficients": _pack,
    "unpack_coefficients": _unpack,
    "pack_words": _pack_words,
    "unpack_words": _unpack_words,
    "upload_bytes": lambda prime_bits, count: ciphertexts.upload_bytes(_parameters(prime_bits), count),
}
