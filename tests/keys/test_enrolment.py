import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.enrolment import (
    REQUEST_LIMIT_BYTES,
    EnrolmentRequest,
    group_digits,
    make_request,
    read_request,
    ungroup_digits,
)
from keys.errors import KeyFileError
from keys.identity import Identity, binding_bytes
from keys.labels import Label

IDENTITY = Identity.generate("hospital-a", "hospital")
OTHER = Identity.generate("hospital-b", "hospital")
REQUEST = make_request(IDENTITY)


def refuse(data: bytes) -> None:
    with pytest.raises(KeyFileError):
        read_request(data)


def encode(fields: object) -> bytes:
    """As `make_request` writes it, so that only the content can be the reason of a refusal."""
    return msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"


def test_round_trip():
    request = read_request(REQUEST)
    assert (request.node_id, request.role) == ("hospital-a", "hospital")
    assert request.public_key == IDENTITY.public_key.public_bytes_raw()
    assert request.curve_public == IDENTITY.curve_public
    assert encode(json.loads(REQUEST)) == REQUEST
    assert REQUEST.isascii()
    assert make_request(IDENTITY) == REQUEST


def test_every_byte_is_guarded():
    for position in range(len(REQUEST)):
        for bit in (0x01, 0x20):
            refuse(REQUEST[:position] + bytes([REQUEST[position] ^ bit]) + REQUEST[position + 1 :])


@pytest.mark.parametrize("field", ["node_id", "role", "public_key", "curve_public", "curve_binding", "proof"])
def test_no_field_can_come_from_another_request(field):
    theirs = json.loads(make_request(Identity.generate("other", "aggregator")))
    refuse(encode(json.loads(REQUEST) | {field: theirs[field]}))


def test_request_with_another_partys_key():
    """Mallory enrols hospital-a's identity key under her own name, or her own key with hospital-a's CURVE key."""
    mallory = Identity.generate("mallory", "hospital")
    victim = read_request(REQUEST)

    def signed_by_mallory(public_key: bytes, curve_public: bytes, curve_binding: bytes) -> bytes:
        facts = msgspec.msgpack.encode(("mallory", "hospital", public_key, curve_public))
        fields = {
            "format": "secgeo-enrolment-request-v1",
            "node_id": "mallory",
            "role": "hospital",
            "public_key": public_key,
            "curve_public": curve_public,
            "curve_binding": curve_binding,
            "proof": mallory.sign(Label.ENROLMENT_REQUEST, facts + curve_binding),
        }
        return encode(fields)

    own = mallory.public_key.public_bytes_raw()
    read_request(signed_by_mallory(own, mallory.curve_public, mallory.curve_binding))
    refuse(signed_by_mallory(victim.public_key, mallory.curve_public, mallory.curve_binding))
    refuse(signed_by_mallory(own, victim.curve_public, victim.curve_binding))
    for low_order in (bytes(32), b"\1" + bytes(31)):
        binding = mallory.sign(Label.CURVE_BINDING, binding_bytes("mallory", "hospital", low_order))
        refuse(signed_by_mallory(own, low_order, binding))


def test_a_key_of_small_order_cannot_be_enrolled():
    """Its forged signatures would check."""
    neutral = b"\1" + bytes(31)
    forged = neutral + bytes(32)
    request = EnrolmentRequest(
        node_id="mallory",
        role="hospital",
        public_key=neutral,
        curve_public=IDENTITY.curve_public,
        curve_binding=forged,
        proof=forged,
    )
    with pytest.raises(KeyFileError, match="Ed25519"):
        request.check()


def test_other_forms_are_refused():
    fields = json.loads(REQUEST)
    reordered = dict(reversed(fields.items()))
    duplicate = REQUEST.replace(b'"role": "hospital",', b'"role": "aggregator",\n  "role": "hospital",')
    assert duplicate != REQUEST
    for data in (
        REQUEST + b"\n",
        REQUEST + b"{}",
        REQUEST[:-1],
        json.dumps(fields).encode(),
        encode(reordered),
        encode(fields | {"note": "x"}),
        encode({key: value for key, value in fields.items() if key != "format"}),
        encode(fields | {"format": "secgeo-enrolment-request-v2"}),
        encode(fields | {"node_id": "hospital-a\n"}),
        encode(fields | {"role": "authority"}),
        encode([fields]),
        duplicate,
        b"",
        b"[" * REQUEST_LIMIT_BYTES,
        b"\xff" + REQUEST,
    ):
        refuse(data)


def test_size_is_bounded_before_decoding():
    with pytest.raises(KeyFileError, match="at most"):
        read_request(b" " * (REQUEST_LIMIT_BYTES + 1))


@given(st.binary(max_size=300))
def test_garbage_is_refused(data):
    refuse(data)


def test_fingerprint_covers_every_fact():
    prints = {read_request(REQUEST).fingerprint}
    request = read_request(REQUEST)
    for change in (
        {"node_id": "hospital-c"},
        {"role": "aggregator"},
        {"public_key": OTHER.public_key.public_bytes_raw()},
        {"curve_public": OTHER.curve_public},
    ):
        prints.add(msgspec.structs.replace(request, **change).fingerprint)
    assert len(prints) == 5


def test_fingerprint_is_whole_and_grouped():
    grouped = read_request(REQUEST).fingerprint
    assert [len(group) for group in grouped.split(" ")] == [4] * 16
    digits = grouped.replace(" ", "")
    assert group_digits(digits) == grouped
    for typed in (grouped, digits, grouped.upper(), grouped.replace(" ", ":"), f" {grouped}\n"):
        assert ungroup_digits(typed) == digits
    for typed in ("", digits[:-1], digits + "0", digits[:-1] + "g", digits[:16], digits[:-1] + "\u0661"):
        with pytest.raises(KeyFileError, match="64 hexadecimal"):
            ungroup_digits(typed)
