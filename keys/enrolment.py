"""Enrolment requests: the public facts that a party sends to the authority, signed by the keys that they name.

Rules: a request is a small JSON file in one canonical form, safe to send by mail: it holds no secret. The identity
key signs the whole request (proof of possession) and the CURVE key (binding), so nobody can enrol another's key or
move a CURVE key to another name.

Threat: somebody exchanges the request on its way. No signature can show that, because the forger signs with his own
key; both sides therefore compare `fingerprint` over another channel (a call, a meeting) before the authority issues.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec
from msgspec import Struct

from keys.errors import KeyFileError, VerificationFailed
from keys.identity import (
    Identity,
    Key32,
    NodeId,
    Role,
    Signature64,
    binding_bytes,
    check_curve_public,
    check_node,
    load_signing_key,
    verify_signature,
)
from keys.labels import Label

REQUEST_LIMIT_BYTES = 4096


class EnrolmentRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The public facts of a party. `read_request` returns one whose signatures are checked.

    Attributes:
        public_key: Ed25519, 32 bytes.
        curve_public: the CURVE key, 32 bytes.
        curve_binding: the identity key's signature of the CURVE key, node id and role.
        proof: the identity key's signature of all of these.
    """

    format: Literal["secgeo-enrolment-request-v1"] = "secgeo-enrolment-request-v1"
    node_id: NodeId
    role: Role
    public_key: Key32
    curve_public: Key32
    curve_binding: Signature64
    proof: Signature64

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the node id, role and both public keys: 64 hexadecimal digits in 16 groups of 4."""
        return group_digits(hashlib.sha256(Label.ENROLMENT_REQUEST + self._facts()).hexdigest())

    def _facts(self) -> bytes:
        return msgspec.msgpack.encode((self.node_id, self.role, self.public_key, self.curve_public))

    def check(self) -> None:
        """Check names, keys and both signatures.

        Raises:
            KeyFileError: the first that fails.
        """
        check_node(self.node_id, self.role)
        key = load_signing_key(self.public_key)
        check_curve_public(self.curve_public)
        try:
            binding = binding_bytes(self.node_id, self.role, self.curve_public)
            verify_signature(key, Label.CURVE_BINDING, binding, self.curve_binding)
            verify_signature(key, Label.ENROLMENT_REQUEST, self._facts() + self.curve_binding, self.proof)
        except VerificationFailed:
            raise KeyFileError(
                f"the request of {self.node_id} is not signed by the keys it names; make a new one"
            ) from None


def make_request(identity: Identity) -> bytes:
    """The enrolment request of an identity, as the text of a file."""
    unsigned = EnrolmentRequest(
        node_id=identity.node_id,
        role=identity.role,
        public_key=identity.public_key.public_bytes_raw(),
        curve_public=identity.curve_public,
        curve_binding=identity.curve_binding,
        proof=bytes(64),
    )
    proof = identity.sign(Label.ENROLMENT_REQUEST, unsigned._facts() + unsigned.curve_binding)
    return _encode(msgspec.structs.replace(unsigned, proof=proof))


def read_request(data: bytes) -> EnrolmentRequest:
    """Decode and check a request. Whose keys these are only the comparison of fingerprints shows.

    Raises:
        KeyFileError: too long, malformed, not canonical, an unusable key, or a wrong signature.
    """
    if len(data) > REQUEST_LIMIT_BYTES:
        raise KeyFileError(f"an enrolment request has at most {REQUEST_LIMIT_BYTES} bytes; this is something else")
    try:
        request = msgspec.json.decode(data, type=EnrolmentRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeyFileError(f"the enrolment request cannot be read: {error}") from None
    if _encode(request) != data:
        raise KeyFileError("the enrolment request was edited; ask for the file as it was made")
    request.check()
    return request


def group_digits(fingerprint: str) -> str:
    """A hexadecimal fingerprint in groups of 4, for people to read to each other."""
    return " ".join(fingerprint[i : i + 4] for i in range(0, len(fingerprint), 4))


def ungroup_digits(text: str) -> str:
    """A SHA-256 fingerprint as a person typed it: spaces, colons and upper case do not matter.

    Raises:
        KeyFileError: not 64 hexadecimal digits; a part of a fingerprint is never enough.
    """
    digits = "".join(text.split()).replace(":", "").lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise KeyFileError("a fingerprint has 64 hexadecimal digits; give all of them")
    return digits


def _encode(request: EnrolmentRequest) -> bytes:
    fields = {"format": request.format} | msgspec.to_builtins(request)
    return msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"
