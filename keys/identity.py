"""A party's long-term keys: an Ed25519 signing key, an X25519 key for CURVE, and the certificate of the first.

Rules: secrets never show in a repr, cannot be pickled or copied, and leave the object only through `sign`,
`curve_secret` and `save`. Every signature is over a label and the data. Public keys of others are accepted in their
one canonical encoding, and never if they are of small order: such a signing key accepts signatures that nobody made,
and such a CURVE key gives everybody the same shared secret (RFC 7748 section 6.1; Chalkias et al. 2020, "Taming the
many EdDSAs").
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from msgspec import Meta
from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from keys import certificates
from keys.errors import KeyFileError, LocalProtocolError, VerificationFailed
from keys.files import read_public, read_secret, write_public, write_secret
from keys.labels import Label

Role = Literal["hospital", "aggregator"]
NodeId = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
Key32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature64 = Annotated[bytes, Meta(min_length=64, max_length=64)]

KEY_FILE: Final = "identity.key"
CERTIFICATE_FILE: Final = "certificate.pem"

_FIELD_PRIME = 2**255 - 19
_KeyFile = tuple[Literal["identity"], NodeId, Role, Key32, Key32]


class Identity:
    """The long-term keys of a node or of the aggregator. Make one with `generate` or `load`."""

    __slots__ = ("_certificate", "_curve_key", "_node_id", "_role", "_signing_key")

    def __init__(self, node_id: str, role: Role, signing_key: Ed25519PrivateKey, curve_key: X25519PrivateKey) -> None:
        check_node(node_id, role)
        self._node_id, self._role = node_id, role
        self._signing_key, self._curve_key = signing_key, curve_key
        self._certificate: x509.Certificate | None = None

    @classmethod
    def generate(cls, node_id: str, role: Role) -> Identity:
        """New keys from the operating system's generator.

        Raises:
            KeyFileError: `node_id` or `role` is not allowed.
        """
        return cls(node_id, role, Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def load(cls, directory: Path, passphrase: bytes | None) -> Identity:
        """Read what `save` wrote, with the certificate if one is there.

        Raises:
            KeyFileError: see `keys.files.read_secret`; or not an identity, or the certificate is of another key.
        """
        secret = read_secret(directory / KEY_FILE, passphrase)
        try:
            _, node_id, role, signing_seed, curve_secret = msgspec.msgpack.decode(secret, type=_KeyFile)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise KeyFileError(f"{directory / KEY_FILE} is not the key file of a node or aggregator") from None
        identity = cls(
            node_id,
            role,
            Ed25519PrivateKey.from_private_bytes(signing_seed),
            X25519PrivateKey.from_private_bytes(curve_secret),
        )
        if (directory / CERTIFICATE_FILE).exists():
            limit = certificates.CERTIFICATE_LIMIT_BYTES
            identity.install_certificate(read_public(directory / CERTIFICATE_FILE, limit))
        return identity

    def save(self, directory: Path, passphrase: bytes | None) -> None:
        """Write the keys into a directory (made with mode 0700 if missing), and the certificate if there is one.

        Raises:
            KeyFileError: the directory holds an identity already, or cannot be written.
        """
        parts = ("identity", self._node_id, self._role, self._signing_key.private_bytes_raw(), self.curve_secret)
        make_directory(directory)
        write_secret(directory / KEY_FILE, msgspec.msgpack.encode(parts), passphrase)
        if self._certificate is not None:
            self.save_certificate(directory)

    def install_certificate(self, pem: bytes) -> None:
        """Take the certificate that the authority issued. Who issued it is checked with the roster.

        Raises:
            KeyFileError: not one PEM certificate, or for another key, node id or role.
        """
        certificate = certificates.from_pem(pem)
        certificates.check_subject(certificate, self._node_id, self._role)
        if certificates.ed25519_key(certificate) != self.public_key:
            raise KeyFileError(f"the certificate is for another key than that of {self._node_id}; enrol with this key")
        self._certificate = certificate

    def save_certificate(self, directory: Path) -> None:
        """Write the installed certificate next to the keys.

        Raises:
            KeyFileError: none is installed, or the directory cannot be written.
        """
        write_public(directory / CERTIFICATE_FILE, certificates.to_pem(self._installed()))

    def sign(self, label: Label, data: bytes) -> bytes:
        """Ed25519 over label and data, 64 bytes."""
        return sign_labelled(self._signing_key, label, data)

    @property
    def node_id(self) -> str:
        """The name in the roster."""
        return self._node_id

    @property
    def role(self) -> Role:
        """What the party does in the consortium."""
        return self._role

    @property
    def public_key(self) -> Ed25519PublicKey:
        """The key that verifies `sign`."""
        return self._signing_key.public_key()

    @property
    def curve_public(self) -> bytes:
        """The CURVE public key, 32 bytes."""
        return self._curve_key.public_key().public_bytes_raw()

    @property
    def curve_secret(self) -> bytes:
        """The CURVE secret key, 32 bytes; for the transport only."""
        return self._curve_key.private_bytes_raw()

    @property
    def curve_binding(self) -> bytes:
        """The signature that binds the CURVE key to this identity."""
        return self.sign(Label.CURVE_BINDING, binding_bytes(self._node_id, self._role, self.curve_public))

    @property
    def certificate(self) -> x509.Certificate | None:
        """The installed certificate."""
        return self._certificate

    @property
    def certificate_fingerprint(self) -> str:
        """SHA-256 of the certificate's DER encoding, in hexadecimal.

        Raises:
            KeyFileError: no certificate is installed.
        """
        return certificates.fingerprint(self._installed())

    def _installed(self) -> x509.Certificate:
        if self._certificate is None:
            raise KeyFileError(f"{self._node_id} has no certificate yet; send the enrolment request to the authority")
        return self._certificate

    def __repr__(self) -> str:
        return f"<Identity {self._node_id} ({self._role}), secrets not shown>"

    def __reduce__(self) -> NoReturn:
        raise LocalProtocolError("an identity is never pickled or copied; load it from its key file")


def verify_signature(public_key: Ed25519PublicKey, label: Label, data: bytes, signature: bytes) -> None:
    """Check an Ed25519 signature over label and data, strictly (docs/adr/0015): one encoding, no points of small order.

    Raises:
        VerificationFailed: it is not a signature of these bytes under this label and key.
    """
    try:
        VerifyKey(public_key.public_bytes_raw()).verify(label + data, signature)
    except (BadSignatureError, ValueError):  # ValueError: not 64 bytes
        raise VerificationFailed("the signature is wrong: other data, another key, or changed on the way") from None


def sign_labelled(key: Ed25519PrivateKey, label: Label, data: bytes) -> bytes:
    """Ed25519 over label and data, for `Identity` and `Authority`.

    Raises:
        LocalProtocolError: the label is not from the registry.
    """
    if not isinstance(label, Label):
        raise LocalProtocolError("data is signed under a label of keys.labels only")
    return key.sign(label + data)


def binding_bytes(node_id: str, role: str, curve_public: bytes) -> bytes:
    """What an identity key signs (under `Label.CURVE_BINDING`) to own a CURVE key."""
    return msgspec.msgpack.encode((node_id, role, curve_public))


def check_node(node_id: str, role: str) -> None:
    """Check a node id and its role. "aggregator" may name only an aggregator, because nodes call theirs so.

    Raises:
        KeyFileError: not allowed.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", node_id) is None:
        raise KeyFileError("a node id has 1 to 63 lower-case letters, digits and dashes, and no dash at its start")
    if role not in ("hospital", "aggregator") or (role == "hospital" and node_id == "aggregator"):
        raise KeyFileError(f"{node_id} cannot have the role {role!r}")


def check_title(title: str) -> None:
    """Check the name of an authority or a consortium: 1 to 64 printable characters.

    Raises:
        KeyFileError: not allowed.
    """
    if not 1 <= len(title) <= 64 or not title.isprintable():
        raise KeyFileError("the name of an authority or consortium has 1 to 64 printable characters")


def load_signing_key(raw: bytes) -> Ed25519PublicKey:
    """Another party's Ed25519 public key, 32 bytes.

    Raises:
        KeyFileError: not the canonical encoding of a point of the prime-order group.
    """
    if len(raw) != 32 or not crypto_core_ed25519_is_valid_point(raw):
        raise KeyFileError("this is not a usable Ed25519 public key")
    return Ed25519PublicKey.from_public_bytes(raw)


def check_curve_public(raw: bytes) -> None:
    """Check another party's CURVE public key.

    Raises:
        KeyFileError: not 32 bytes, not the canonical encoding, or a point of small order.
    """
    try:
        if len(raw) != 32 or int.from_bytes(raw, "little") >= _FIELD_PRIME:
            raise ValueError
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(raw))
    except ValueError:
        raise KeyFileError("this is not a usable CURVE public key") from None


def make_directory(directory: Path) -> None:
    """Make a directory of mode 0700 if it is missing.

    Raises:
        KeyFileError: it cannot be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeyFileError(f"{directory} cannot be made: {error.strerror}") from None
