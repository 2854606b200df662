"""The consortium authority: an offline certificate authority with one Ed25519 key.

Rules: its machine is offline; it reads enrolment requests and writes certificates, rosters and agreements, all of
them public. It issues only to requests whose signatures check, after a person has compared the request's fingerprint.
Its secret is kept and shown like that of `Identity`: never in a repr, never pickled. Everybody else pins the root
certificate by its fingerprint.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from keys import certificates
from keys.enrolment import EnrolmentRequest
from keys.errors import KeyFileError, LocalProtocolError
from keys.files import read_secret, write_public, write_secret
from keys.identity import Key32, check_title, load_signing_key, make_directory, sign_labelled
from keys.labels import Label
from keys.signed import sign_document

KEY_FILE: Final = "authority.key"
ROOT_FILE: Final = "root.pem"

ROOT_LIFETIME = timedelta(days=3652)
CLOCK_SKEW = timedelta(hours=1)
"""A new root is valid from this long before its creation, for sites whose clocks are late."""

_Der = Annotated[bytes, Meta(max_length=certificates.CERTIFICATE_LIMIT_BYTES)]
_KeyFile = tuple[Literal["authority"], Key32, _Der]


class Authority:
    """The authority's key and root certificate. Make one with `create` or `load`."""

    __slots__ = ("_root", "_signing_key")

    def __init__(self, signing_key: Ed25519PrivateKey, root: x509.Certificate) -> None:
        if certificates.check_root(root) != signing_key.public_key():
            raise KeyFileError("the authority's key and root certificate do not belong together")
        self._signing_key, self._root = signing_key, root

    @classmethod
    def create(cls, name: str, now: datetime | None = None) -> Authority:
        """A new key and its self-signed root, valid for ten years from `now` (the present, if not given).

        Raises:
            KeyFileError: the name is not 1 to 64 printable characters.
        """
        check_title(name)
        now = datetime.now(UTC) if now is None else now
        certificates.require_aware(now)
        key, subject = Ed25519PrivateKey.generate(), certificates.root_name(name)
        builder = _builder(subject, subject, key.public_key(), now - CLOCK_SKEW, now + ROOT_LIFETIME)
        for extension in certificates.root_extensions(key.public_key()):
            builder = builder.add_extension(extension.value, extension.critical)
        return cls(key, builder.sign(key, None))

    @classmethod
    def load(cls, directory: Path, passphrase: bytes | None) -> Authority:
        """Read what `save` wrote.

        Raises:
            KeyFileError: see `keys.files.read_secret`; or not an authority's key file.
        """
        secret = read_secret(directory / KEY_FILE, passphrase)
        try:
            _, seed, root = msgspec.msgpack.decode(secret, type=_KeyFile)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise KeyFileError(f"{directory / KEY_FILE} is not the key file of an authority") from None
        return cls(Ed25519PrivateKey.from_private_bytes(seed), certificates.from_der(root))

    def save(self, directory: Path, passphrase: bytes | None) -> None:
        """Write the key with its root certificate, and the root alone as a public file.

        Raises:
            KeyFileError: the directory holds an authority already, or cannot be written.
        """
        parts = ("authority", self._signing_key.private_bytes_raw(), certificates.to_der(self._root))
        make_directory(directory)
        write_secret(directory / KEY_FILE, msgspec.msgpack.encode(parts), passphrase)
        write_public(directory / ROOT_FILE, self.root_pem)

    def issue(self, request: EnrolmentRequest, not_before: datetime, not_after: datetime) -> x509.Certificate:
        """The certificate of a party whose request's fingerprint a person has compared.

        Raises:
            KeyFileError: the request's signatures do not check, or the dates do not fit into the root's.
            LocalProtocolError: a date has no time zone.
        """
        request.check()
        certificates.require_aware(not_before)
        certificates.require_aware(not_after)
        not_before, not_after = _whole_seconds(not_before), _whole_seconds(not_after)
        if not self._root.not_valid_before_utc <= not_before < not_after <= self._root.not_valid_after_utc:
            raise KeyFileError(
                f"a certificate must begin before it ends, between {self._root.not_valid_before_utc:%Y-%m-%d %H:%M:%S} "
                f"and {self._root.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC, as the authority's own does"
            )
        key, subject = load_signing_key(request.public_key), certificates.leaf_name(request.node_id, request.role)
        builder = _builder(subject, self._root.subject, key, not_before, not_after)
        for extension in certificates.leaf_extensions(key, self.public_key):
            builder = builder.add_extension(extension.value, extension.critical)
        return builder.sign(self._signing_key, None)

    def sign(self, label: Label, data: bytes) -> bytes:
        """Ed25519 over label and data, 64 bytes."""
        return sign_labelled(self._signing_key, label, data)

    def sign_roster(self, document: bytes) -> bytes:
        """The `.sig` file of a roster."""
        return sign_document(self.sign, Label.ROSTER, document)

    @property
    def root(self) -> x509.Certificate:
        """The root certificate."""
        return self._root

    @property
    def root_pem(self) -> bytes:
        """The root certificate as a PEM file."""
        return certificates.to_pem(self._root)

    @property
    def public_key(self) -> Ed25519PublicKey:
        """The key that verifies `sign`."""
        return self._signing_key.public_key()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the root's DER encoding, 64 hexadecimal digits: what everybody pins."""
        return certificates.fingerprint(self._root)

    def __repr__(self) -> str:
        return f"<Authority {self.fingerprint[:16]}, secret not shown>"

    def __reduce__(self) -> NoReturn:
        raise LocalProtocolError("an authority is never pickled or copied; load it from its key file")


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Ed25519PublicKey, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_whole_seconds(not_before))
        .not_valid_after(_whole_seconds(not_after))
    )


def _whole_seconds(moment: datetime) -> datetime:
    """X.509 has no fractions of a second."""
    return moment.astimezone(UTC).replace(microsecond=0)
