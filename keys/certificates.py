"""The certificate profile: one self-signed Ed25519 root, and leaves that it issues directly (RFC 5280, RFC 8410).

The profile is exact. `root_extensions` and `leaf_extensions` say which extensions a certificate has; `Authority`
writes just those, and `check_root` and `check_leaf` refuse any other, so there is nothing to interpret: no path
building, no intermediates, no unknown extensions. A leaf's subject is OU = role, CN = node id.
"""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from keys.errors import KeyFileError, LocalProtocolError

CERTIFICATE_LIMIT_BYTES = 4096

_ED25519_TAIL = bytes.fromhex("300506032b6570034100")
"""What stands between the signed part of a certificate and its signature: the algorithm, a bit string of 64 bytes."""

_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER encoding, 64 lower-case hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def to_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as a PEM file."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def to_der(certificate: x509.Certificate) -> bytes:
    """The certificate's DER encoding."""
    return certificate.public_bytes(serialization.Encoding.DER)


def from_pem(pem: bytes) -> x509.Certificate:
    """Parse a file that holds one PEM certificate and nothing else.

    Raises:
        KeyFileError: not such a file, or the certificate is not signed with Ed25519.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem) if len(pem) <= CERTIFICATE_LIMIT_BYTES else None
        if certificate is None or to_pem(certificate) != pem:
            raise KeyFileError("this is not a file with exactly one PEM certificate as SecGeo writes it")
    except _UNREADABLE:
        raise KeyFileError("this is not a readable PEM certificate") from None
    _check_encoding(certificate)
    return certificate


def from_der(der: bytes) -> x509.Certificate:
    """Parse a DER certificate.

    Raises:
        KeyFileError: too long, or not a certificate signed with Ed25519.
    """
    try:
        certificate = x509.load_der_x509_certificate(der) if len(der) <= CERTIFICATE_LIMIT_BYTES else None
    except _UNREADABLE:
        certificate = None
    if certificate is None:
        raise KeyFileError("this is not a readable DER certificate")
    _check_encoding(certificate)
    return certificate


def root_name(name: str) -> x509.Name:
    """The subject of an authority."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def leaf_name(node_id: str, role: str) -> x509.Name:
    """The subject of a node or an aggregator."""
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role), x509.NameAttribute(NameOID.COMMON_NAME, node_id)]
    )


def root_extensions(public_key: Ed25519PublicKey) -> list[x509.Extension[x509.ExtensionType]]:
    """The extensions of a root, in order."""
    return [
        _extension(x509.BasicConstraints(ca=True, path_length=0), critical=True),
        _extension(_key_usage(certificates=True), critical=True),
        _extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False),
    ]


def leaf_extensions(
    public_key: Ed25519PublicKey, root_key: Ed25519PublicKey
) -> list[x509.Extension[x509.ExtensionType]]:
    """The extensions of a leaf that the holder of `root_key` issues, in order."""
    return [
        _extension(x509.BasicConstraints(ca=False, path_length=None), critical=True),
        _extension(_key_usage(certificates=False), critical=True),
        _extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False),
        _extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key), critical=False),
    ]


def check_root(root: x509.Certificate) -> Ed25519PublicKey:
    """Check that a certificate is a SecGeo root, whatever its dates; returns its key.

    Raises:
        KeyFileError: not self-signed with Ed25519, or outside the profile.
    """
    key = ed25519_key(root)
    _check_issued(root, root, root_extensions(key), "the authority's root certificate")
    return key


def check_leaf(certificate: x509.Certificate, root: x509.Certificate, node_id: str, role: str) -> Ed25519PublicKey:
    """Check that `root`, itself checked, issued a certificate to a node in a role, whatever its dates; returns its key.

    Raises:
        KeyFileError: another issuer, a wrong signature, another subject, or outside the profile.
    """
    key = ed25519_key(certificate)
    check_subject(certificate, node_id, role)
    _check_issued(certificate, root, leaf_extensions(key, ed25519_key(root)), f"the certificate of {node_id}")
    return key


def check_subject(certificate: x509.Certificate, node_id: str, role: str) -> None:
    """Check that a certificate names `node_id` in `role`.

    Raises:
        KeyFileError: it names another node or role.
    """
    try:
        matches = certificate.subject == leaf_name(node_id, role)
    except _UNREADABLE:
        matches = False
    if not matches:
        raise KeyFileError(f"the certificate does not name {node_id} as {role}")


def ed25519_key(certificate: x509.Certificate) -> Ed25519PublicKey:
    """The certified key.

    Raises:
        KeyFileError: not an Ed25519 key.
    """
    try:
        key = certificate.public_key()
    except _UNREADABLE:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError("the certificate does not hold an Ed25519 key")
    return key


def validity_problem(certificate: x509.Certificate, now: datetime) -> str | None:
    """Why a certificate cannot be used at `now`, or None if its dates allow it.

    Raises:
        LocalProtocolError: `now` has no time zone.
    """
    require_aware(now)
    if now < certificate.not_valid_before_utc:
        return f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC; check this machine's clock"
    if now > certificate.not_valid_after_utc:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC; the authority must issue a new one"
    return None


def require_aware(moment: datetime) -> None:
    """Refuse a date without a time zone, which would be read differently at different sites.

    Raises:
        LocalProtocolError: it has none.
    """
    if moment.tzinfo is None or moment.utcoffset() is None:
        raise LocalProtocolError("a date must carry its time zone; use datetime.now(timezone.utc)")


def _check_issued(
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    extensions: list[x509.Extension[x509.ExtensionType]],
    what: str,
) -> None:
    try:
        certificate.verify_directly_issued_by(issuer)
        exact = list(certificate.extensions) == extensions and certificate.version is x509.Version.v3
    except InvalidSignature:
        raise KeyFileError(f"{what} was not signed by the pinned authority") from None
    except _UNREADABLE:
        raise KeyFileError(f"{what} was not issued by the pinned authority, or is malformed") from None
    if not exact:
        raise KeyFileError(f"{what} has other extensions than SecGeo's profile allows")


def _check_encoding(certificate: x509.Certificate) -> None:
    """Refuse a second spelling of a certificate, which would have another fingerprint.

    The signature guards its own part alone, and the library ignores the bit string's count of unused bits.
    """
    tail = certificate.tbs_certificate_bytes + _ED25519_TAIL + certificate.signature
    if len(certificate.signature) != 64 or not to_der(certificate).endswith(tail):
        raise KeyFileError("the certificate is not signed with Ed25519, or was changed")


def _extension(value: x509.ExtensionType, *, critical: bool) -> x509.Extension[x509.ExtensionType]:
    return x509.Extension(value.oid, critical, value)


def _key_usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
