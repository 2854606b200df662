"""The inputs of the vectors for sums of ciphertexts: the study key, masks of coefficients, packing, words."""

from __future__ import annotations

from collections.abc import Iterator

from tests.vectors.cases import ATTEMPT, COHORT, DIGEST, SECRET, Case, case, named, refused

KEY = bytes(range(200, 240))
"""Stands for a study key: nothing below depends on what is in it."""


def encrypted() -> Iterator[Case]:
    yield from _study_key()
    yield from _masks()
    yield from _packing()
    yield from _words()


def _study_key() -> Iterator[Case]:
    yield case("the id of a study key", "study_key_id", key=KEY)
    given = {"agreement_digest": DIGEST, "key_id": COHORT}
    yield case(
        "the info of a sealed study key", "study_key_info", dealer="hospital-00", recipient="hospital-01", **given
    )
    yield case("dealt the other way", "study_key_info", dealer="hospital-01", recipient="hospital-00", **given)
    for attempt, why in ((ATTEMPT, "this attempt"), ([DIGEST, 3, 3], "the next one")):
        yield case(f"the tag seed of {why}", "study_tag_seed", key=KEY, attempt=attempt)
    for name in named(2):
        yield case(f"the pad of the tag of {name}", "study_tag_pad", key=KEY, attempt=ATTEMPT, name=name)
    digests = dict(zip(named(2), (SECRET, COHORT), strict=True))
    yield case(
        "round keys, and the study key", "cohort_digest_with_key", attempt=ATTEMPT, digests=digests, study_key=SECRET
    )
    for last in (bytes(32), COHORT):
        yield case("no round keys", "unmasked_cohort_digest", attempt=ATTEMPT, study_key=SECRET, last_record=last)


def _masks() -> Iterator[Case]:
    values = {"first": 2**46 - 3, "step": 1, "modulus": 2**46, "count": 9}
    keys = {"added": [SECRET, COHORT], "subtracted": [DIGEST]}
    for plain_bits, chunk in ((46, 0), (46, 1), (50, 2)):
        why = f"coefficients of chunk {chunk}, modulo 2^{plain_bits}"
        yield case(why, "mask_coefficients", values=values, chunk=chunk, plain_bits=plain_bits, **keys)


def _packing() -> Iterator[Case]:
    for value_bits, n_max in (
        (16, 4),
        (16, 128),
        (17, 64),
        (18, 128),
        (20, 16),
        (22, 64),
        (23, 128),
        (24, 5),
        (26, 4),
        (30, 4),
    ):
        yield case(f"{n_max} values of {value_bits} bits", "choose", value_bits=value_bits, n_max=n_max)
    for value_bits, n_max in ((30, 5), (26, 128), (24, 257)):
        yield refused(
            "ConfigError", f"{n_max} values of {value_bits} bits", "choose", value_bits=value_bits, n_max=n_max
        )
    for value_bits, n_max, count in ((16, 128, 8192 + 5), (22, 64, 6144 + 3), (24, 128, 4096 + 2)):
        given = {"value_bits": value_bits, "n_max": n_max}
        values = {"first": 1, "step": 2**value_bits // 3, "modulus": 2**value_bits, "count": count}
        yield case(f"{count} values of {value_bits} bits in coefficients", "pack_coefficients", values=values, **given)
    top = [[0, 2**46 - 1]]
    yield case(
        "the largest coefficient", "unpack_coefficients", value_bits=16, n_max=128, coefficients=top, places=[0, 4096]
    )
    three = [[0, 5], [1, 2**28 + 7], [2048, 2**28 * 3], [2049, 2**28 + 1]]
    places = [0, 1, 2048, 2049, 4096, 4097]
    yield case("three in two", "unpack_coefficients", value_bits=22, n_max=64, coefficients=three, places=places)
    yield refused(
        "VerificationFailed",
        "a coefficient that no sum fills",
        "unpack_coefficients",
        value_bits=16,
        n_max=64,
        coefficients=[[7, 2**44]],
        places=[0],
    )


def _words() -> Iterator[Case]:
    for prime_bits in (56, 60):
        given = {"prime_bits": prime_bits, "multiplier": bytes(range(1, 8))}
        yield case(f"{prime_bits} bits: i times the multiplier modulo q, packed", "pack_words", **given)
        last = (2**prime_bits - 1).to_bytes(8)
        yield refused("FrameBroken", f"{prime_bits} bits: all ones", "unpack_words", place=4095, word=last, **given)
    prime = (0xFFFFFFFFFBA001).to_bytes(8)
    yield refused("FrameBroken", "q itself", "unpack_words", prime_bits=56, multiplier=b"\1", place=0, word=prime)
    less = (0xFFFFFFFFFBA000).to_bytes(8)
    yield case("one less than q", "unpack_words", prime_bits=56, multiplier=b"\1", place=0, word=less)
    for prime_bits, count in ((56, 1), (56, 123), (60, 2)):
        yield case(f"{count} fresh ciphertexts", "upload_bytes", prime_bits=prime_bits, count=count)
