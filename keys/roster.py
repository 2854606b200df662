"""The roster: who takes part in the consortium, in one JSON document signed by the authority.

Rules, all checked by `read_roster` before a single entry can be used: the authority signed these very bytes; the
document is in its one canonical form; the pinned root issued every certificate, to that name, in that role; the
certified key signed that CURVE key; no two entries share a name, key, CURVE key or serial; and (epoch, version) is
not lower than what the reader saw before. `version` rises with every change, `epoch` with every change that takes a
key out of use.

An entry that is revoked, expired or not yet valid stays listed, so that one lapsed certificate does not stop the
consortium, but no lookup returns it: `entry` says why. Dates are compared with the reader's clock once, when the
roster is read.

Threats: whoever stores or relays the roster can withhold a new one, which no signature shows; readers compare the
roster's digest with the study agreement. Two rosters of one version are proof against the authority.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct

from keys import certificates
from keys.authority import Authority
from keys.enrolment import EnrolmentRequest, ungroup_digits
from keys.errors import KeyFileError, VerificationFailed
from keys.identity import (
    Key32,
    NodeId,
    Role,
    Signature64,
    binding_bytes,
    check_curve_public,
    check_node,
    check_title,
    load_signing_key,
    verify_signature,
)
from keys.labels import Label
from keys.signed import verify_document

ROSTER_LIMIT_BYTES = 1 << 22
MAXIMUM_ENTRIES = 1024
MAXIMUM_REVOKED = 16384

_Der = Annotated[bytes, Meta(max_length=certificates.CERTIFICATE_LIMIT_BYTES)]
_Serial = Annotated[str, Meta(pattern=r"^[1-9a-f][0-9a-f]{0,39}\Z")]
_Count = Annotated[int, Meta(ge=1, lt=2**31)]


class _EntryDocument(Struct, frozen=True, forbid_unknown_fields=True):
    node_id: NodeId
    role: Role
    certificate: _Der
    curve_public: Key32
    curve_binding: Signature64


class _RosterDocument(Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["secgeo-roster-v1"]
    consortium: Annotated[str, Meta(max_length=64)]
    epoch: _Count
    version: _Count
    entries: Annotated[tuple[_EntryDocument, ...], Meta(max_length=MAXIMUM_ENTRIES)]
    revoked: Annotated[tuple[_Serial, ...], Meta(max_length=MAXIMUM_REVOKED)]


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One party as the authority lists it.

    Attributes:
        curve_public: the CURVE key, 32 bytes.
        curve_binding: the identity key's signature of the CURVE key, 64 bytes.
    """

    node_id: str
    role: Role
    certificate: x509.Certificate
    curve_public: bytes
    curve_binding: bytes

    @classmethod
    def enrolled(cls, request: EnrolmentRequest, certificate: x509.Certificate) -> RosterEntry:
        """The entry of a party to which the authority has issued `certificate` on its `request`."""
        return cls(request.node_id, request.role, certificate, request.curve_public, request.curve_binding)

    @property
    def public_key(self) -> Ed25519PublicKey:
        """The certified identity key."""
        return certificates.ed25519_key(self.certificate)

    @property
    def certificate_fingerprint(self) -> str:
        """SHA-256 of the certificate's DER encoding, 64 hexadecimal digits."""
        return certificates.fingerprint(self.certificate)

    @property
    def serial(self) -> str:
        """The certificate's serial number in hexadecimal."""
        return f"{self.certificate.serial_number:x}"


@dataclass(frozen=True, slots=True)
class Roster:
    """A roster that was checked. Make one with `read_roster`.

    Attributes:
        listed: every entry, usable or not: for editing and display. To trust a key, use the other lookups.
        revoked: the serials that are out of use for good, in hexadecimal.
        unusable: why a listed entry must not be used, by node id.
        digest: SHA-256 over the label and the document, 32 bytes: what an agreement pins.
    """

    consortium: str
    epoch: int
    version: int
    listed: tuple[RosterEntry, ...]
    revoked: frozenset[str]
    unusable: Mapping[str, str]
    digest: bytes

    def entry(self, node_id: str) -> RosterEntry:
        """The usable entry of that name.

        Raises:
            KeyFileError: nobody of this name is listed, or the entry is revoked or out of its dates.
        """
        if node_id in self.unusable:
            raise KeyFileError(f"the certificate of {node_id} cannot be used: {self.unusable[node_id]}")
        for entry in self.listed:
            if entry.node_id == node_id:
                return entry
        raise KeyFileError(f"{node_id!r} is not in the roster of {self.consortium} (version {self.version})")

    @property
    def usable(self) -> tuple[RosterEntry, ...]:
        """The entries that may be used, in the order of their names."""
        return tuple(entry for entry in self.listed if entry.node_id not in self.unusable)

    @property
    def hospitals(self) -> tuple[RosterEntry, ...]:
        """The usable hospitals, in the order of their names."""
        return tuple(entry for entry in self.usable if entry.role == "hospital")

    @property
    def aggregator(self) -> RosterEntry:
        """The one usable aggregator.

        Raises:
            KeyFileError: there is none, or more than one.
        """
        found = [entry for entry in self.usable if entry.role == "aggregator"]
        if len(found) != 1:
            raise KeyFileError(f"the roster has {len(found)} usable aggregators where one is needed; ask the authority")
        return found[0]

    @property
    def curve_to_node(self) -> dict[bytes, str]:
        """The name behind each usable CURVE public key: who may connect."""
        return {entry.curve_public: entry.node_id for entry in self.usable}


def load_root(pem: bytes, expected_fingerprint: str) -> x509.Certificate:
    """The authority's root certificate, pinned by a fingerprint that came over another channel.

    Raises:
        KeyFileError: not a root certificate, or not the pinned one.
    """
    root = certificates.from_pem(pem)
    if certificates.fingerprint(root) != ungroup_digits(expected_fingerprint):
        raise KeyFileError(
            f"this root has the fingerprint {certificates.fingerprint(root)}, not the pinned one; "
            "do not go on before you have spoken to the authority"
        )
    certificates.check_root(root)
    return root


def read_roster(
    document: bytes,
    signature: bytes,
    root: x509.Certificate,
    *,
    now: datetime,
    minimum: tuple[int, int] = (0, 0),
) -> Roster:
    """Check a roster by every rule of this file.

    Args:
        document: the bytes of the roster file.
        signature: the bytes of its `.sig` file.
        root: from `load_root`.
        now: the reader's clock, with time zone; for an old record, the time of the record.
        minimum: the highest (epoch, version) that the reader has accepted before.

    Raises:
        KeyFileError: names the first rule that fails.
    """
    if len(document) > ROSTER_LIMIT_BYTES:
        raise KeyFileError(f"a roster has at most {ROSTER_LIMIT_BYTES} bytes; this is something else")
    if problem := certificates.validity_problem(root, now):
        raise KeyFileError(f"the authority's root certificate cannot be used: {problem}")
    try:
        verify_document(certificates.check_root(root), Label.ROSTER, document, signature)
    except VerificationFailed as error:
        raise KeyFileError(f"the roster was not signed by the pinned authority: {error}") from None
    parsed = _decode(document)
    if (parsed.epoch, parsed.version) < minimum:
        raise KeyFileError(
            f"the roster (epoch {parsed.epoch}, version {parsed.version}) is older than the last one accepted "
            f"(epoch {minimum[0]}, version {minimum[1]}); ask the authority for the current one"
        )
    entries = tuple(
        RosterEntry(e.node_id, e.role, certificates.from_der(e.certificate), e.curve_public, e.curve_binding)
        for e in parsed.entries
    )
    _check_entries(entries, root)
    revoked = frozenset(parsed.revoked)
    unusable: dict[str, str] = {}
    for entry in entries:
        if entry.serial in revoked:
            unusable[entry.node_id] = "revoked by the authority"
        elif problem := certificates.validity_problem(entry.certificate, now):
            unusable[entry.node_id] = problem
    digest = hashlib.sha256(Label.ROSTER + document).digest()
    return Roster(parsed.consortium, parsed.epoch, parsed.version, entries, revoked, MappingProxyType(unusable), digest)


def make_roster(
    authority: Authority,
    consortium: str,
    epoch: int,
    version: int,
    entries: Iterable[RosterEntry],
    revoked: Iterable[str] = (),
) -> tuple[bytes, bytes]:
    """A roster document and its `.sig` file; a roster that breaks a rule cannot be made.

    Raises:
        KeyFileError: names the first rule that fails.
    """
    listed = tuple(sorted(entries, key=lambda entry: entry.node_id))
    _check_entries(listed, authority.root)
    document = _encode(
        _RosterDocument(
            "secgeo-roster-v1",
            consortium,
            epoch,
            version,
            tuple(
                _EntryDocument(e.node_id, e.role, certificates.to_der(e.certificate), e.curve_public, e.curve_binding)
                for e in listed
            ),
            tuple(sorted(set(revoked))),
        )
    )
    if len(document) > ROSTER_LIMIT_BYTES:
        raise KeyFileError("the roster would be too large")
    _decode(document)
    return document, authority.sign_roster(document)


def add_entry(
    authority: Authority, roster: Roster, entry: RosterEntry, *, replace: bool = False
) -> tuple[bytes, bytes]:
    """The next version of a roster, with one more party.

    With `replace`, a party of the same name gives up its old keys (rotation): the old certificate is revoked, and the
    epoch rises.

    Raises:
        KeyFileError: the name is listed and `replace` is not set, the entry's certificate is revoked, or a rule fails.
    """
    if entry.serial in roster.revoked:
        raise KeyFileError(f"this certificate of {entry.node_id} is revoked for good; issue a new one")
    old = [other for other in roster.listed if other.node_id == entry.node_id]
    if old and not replace:
        raise KeyFileError(f"{entry.node_id} is listed already; to give it new keys, ask for a replacement explicitly")
    kept = [other for other in roster.listed if other.node_id != entry.node_id]
    revoked = roster.revoked | {other.serial for other in old}
    epoch = roster.epoch + bool(old)
    return make_roster(authority, roster.consortium, epoch, roster.version + 1, [*kept, entry], revoked)


def revoke(authority: Authority, roster: Roster, node_id: str) -> tuple[bytes, bytes]:
    """The next version and epoch of a roster, in which a party's certificate is out of use for good.

    Raises:
        KeyFileError: nobody of this name is listed, or it is revoked already.
    """
    for entry in roster.listed:
        if entry.node_id == node_id and entry.serial not in roster.revoked:
            revoked = roster.revoked | {entry.serial}
            return make_roster(
                authority, roster.consortium, roster.epoch + 1, roster.version + 1, roster.listed, revoked
            )
    raise KeyFileError(f"{node_id!r} is not listed, or is revoked already")


def _check_entries(entries: tuple[RosterEntry, ...], root: x509.Certificate) -> None:
    seen: set[tuple[str, object]] = set()
    for entry in entries:
        check_node(entry.node_id, entry.role)
        key = certificates.check_leaf(entry.certificate, root, entry.node_id, entry.role)
        raw = key.public_bytes_raw()
        load_signing_key(raw)
        check_curve_public(entry.curve_public)
        binding = binding_bytes(entry.node_id, entry.role, entry.curve_public)
        try:
            verify_signature(key, Label.CURVE_BINDING, binding, entry.curve_binding)
        except VerificationFailed:
            raise KeyFileError(f"the CURVE key listed for {entry.node_id} was not signed by its identity key") from None
        facts = {
            ("node id", entry.node_id),
            ("identity key", raw),
            ("CURVE key", entry.curve_public),
            ("certificate serial", entry.serial),
        }
        for kind, _ in facts & seen:
            raise KeyFileError(f"two entries of the roster share one {kind}; the second is {entry.node_id}")
        seen |= facts


def _decode(document: bytes) -> _RosterDocument:
    try:
        parsed = msgspec.json.decode(document, type=_RosterDocument)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeyFileError(f"the roster cannot be read: {error}") from None
    check_title(parsed.consortium)
    if _encode(parsed) != document:
        raise KeyFileError("the roster is not in its canonical form; use the file as the authority wrote it")
    names = [entry.node_id for entry in parsed.entries]
    if names != sorted(names) or list(parsed.revoked) != sorted(set(parsed.revoked)):
        raise KeyFileError("the roster is not in its canonical order; use the file as the authority wrote it")
    return parsed


def _encode(roster: _RosterDocument) -> bytes:
    return msgspec.json.format(msgspec.json.encode(roster), indent=2) + b"\n"
