"""Key files and small durable files.

Rules: a key file is created exclusively with mode 0600 whatever the umask, is never overwritten, and is refused when
it is looser than 0600, owned by somebody else, or a symbolic link. It is encrypted under a passphrase unless the
caller passes None after an explicit flag. A public file is replaced atomically. Both are on disk before the call
returns.

Threats: another user of the machine, and a backup or disk that is read by somebody else. A person who may write the
key file can destroy it, not weaken it: the scrypt parameters are bounded before use and bound as associated data.
Python cannot wipe memory, so an attacker who reads the process's memory is out of scope.

Format: label, kind (1 byte), then for kind 1 log2(n), r, p (1 byte each), salt [16], nonce [12] and AES-256-GCM
ciphertext with all that precedes it as associated data, its key from scrypt (RFC 7914); for kind 0 the secret in
clear and its SHA-256.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import constant_time
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from keys.errors import KeyFileError
from keys.labels import Label

SCRYPT_LOG2_N = 17
"""128 MiB and about half a second per guess (with r = 8, p = 1)."""

SCRYPT_LOG2_N_ACCEPTED = range(14, 19)
"""What a key file may ask for: at most 256 MiB."""

SCRYPT_R = 8
SCRYPT_P = 1
KEY_FILE_LIMIT_BYTES = 1 << 16
PUBLIC_FILE_LIMIT_BYTES = 1 << 23
PASSPHRASE_LIMIT_BYTES = 1 << 12

_PLAIN, _ENCRYPTED = b"\0", b"\1"
_PARAMETERS = struct.Struct("BBB16s12s")
_CHECKSUM_BYTES = 32
_TAG_BYTES = 16
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def write_secret(path: Path, secret: bytes, passphrase: bytes | None) -> None:
    """Create a key file with mode 0600; it and its directory entry are on disk when this returns.

    Args:
        path: must not exist.
        secret: what to keep.
        passphrase: encrypts the secret; None keeps it in clear, which callers do only after an explicit flag.

    Raises:
        KeyFileError: the file exists, cannot be written, or the passphrase is empty.
    """
    if passphrase is None:
        header = Label.KEY_FILE + _PLAIN
        content = header + secret + hashlib.sha256(header + secret).digest()
    else:
        salt, nonce = os.urandom(16), os.urandom(12)
        header = Label.KEY_FILE + _ENCRYPTED + _PARAMETERS.pack(SCRYPT_LOG2_N, SCRYPT_R, SCRYPT_P, salt, nonce)
        content = header + _cipher(passphrase, salt, SCRYPT_LOG2_N).encrypt(nonce, secret, header)
    if len(content) > KEY_FILE_LIMIT_BYTES:
        raise KeyFileError(f"{path}: {len(secret)} bytes are too many for a key file")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise KeyFileError(f"{path} exists already and is never overwritten; choose another directory") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be created: {error.strerror}") from None
    try:
        _write_all(descriptor, content, 0o600)
        _sync_directory(path.parent)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise KeyFileError(f"{path} cannot be written: {error.strerror}") from None
        raise


def read_secret(path: Path, passphrase: bytes | None) -> bytes:
    """The secret of a key file. A passphrase given for a file in clear is ignored.

    Raises:
        KeyFileError: missing, looser than 0600, owned by another user, a symbolic link, malformed, changed, asking for
            scrypt parameters out of bounds, encrypted and no passphrase given, or a wrong passphrase.
    """
    parts = parse_key_file(path, _read(path, KEY_FILE_LIMIT_BYTES, private=True))
    if not parts.encrypted:
        return parts.body
    if passphrase is None:
        raise KeyFileError(f"{path} is encrypted; give its passphrase, for example with a passphrase file of mode 0600")
    try:
        return _cipher(passphrase, parts.salt, parts.log2_n).decrypt(parts.nonce, parts.body, parts.header)
    except InvalidTag:
        raise KeyFileError(f"{path}: wrong passphrase, or the file was changed") from None


@dataclass(frozen=True, slots=True)
class KeyFile:
    """The parts of a key file.

    Attributes:
        header: all that stands before the secret.
        body: the ciphertext with its tag, or the secret in clear.
        log2_n: of scrypt; 0 if the secret is in clear.
        salt: of scrypt, 16 bytes.
        nonce: of AES-256-GCM, 12 bytes.
    """

    header: bytes
    body: bytes = field(repr=False)
    log2_n: int = 0
    salt: bytes = b""
    nonce: bytes = b""

    @property
    def encrypted(self) -> bool:
        """Whether the secret is under a passphrase."""
        return self.log2_n > 0

    @property
    def secret_bytes(self) -> int:
        """How long the secret is."""
        return len(self.body) - _TAG_BYTES * self.encrypted


def parse_key_file(path: Path, content: bytes) -> KeyFile:
    """Check all of a key file that can be checked without its passphrase. `path` is for messages only.

    Raises:
        KeyFileError: malformed, cut off, changed, asking for scrypt parameters out of bounds, or with a salt or nonce that nobody drew.
    """
    start = len(Label.KEY_FILE) + 1
    header, body = content[:start], content[start:]
    if header == Label.KEY_FILE + _PLAIN and len(body) >= _CHECKSUM_BYTES:
        secret, checksum = body[:-_CHECKSUM_BYTES], body[-_CHECKSUM_BYTES:]
        if not constant_time.bytes_eq(hashlib.sha256(header + secret).digest(), checksum):
            raise KeyFileError(f"{path} was changed or is damaged; restore it from a backup or enrol again")
        return KeyFile(header, secret)
    if header != Label.KEY_FILE + _ENCRYPTED or len(body) < _PARAMETERS.size:
        raise KeyFileError(f"{path} is not a SecGeo key file of version 1")
    log2_n, r, p, salt, nonce = _PARAMETERS.unpack_from(body)
    if log2_n not in SCRYPT_LOG2_N_ACCEPTED or r != SCRYPT_R or p != SCRYPT_P:
        raise KeyFileError(f"{path} asks for scrypt parameters out of bounds; it was changed, restore it from a backup")
    if not any(salt) or not any(nonce):
        raise KeyFileError(f"{path} has a salt or nonce of zeros, which nobody drew; restore it from a backup")
    associated, ciphertext = header + body[: _PARAMETERS.size], body[_PARAMETERS.size :]
    if len(ciphertext) < _TAG_BYTES:
        raise KeyFileError(f"{path} is cut off: it holds no secret; restore it from a backup")
    return KeyFile(associated, ciphertext, log2_n, salt, nonce)


def write_public(path: Path, data: bytes | memoryview, opening: AbstractContextManager[object] | None = None) -> None:
    """Replace a file of mode 0644 atomically: a reader sees the old bytes or the new, also after a crash.

    `opening` is entered while descriptors are opened, and no longer.

    Raises:
        KeyFileError: the directory is missing or cannot be written.
    """
    temporary: Path | None = None
    directory = -1
    try:
        with opening or nullcontext():
            directory = os.open(path.parent, _DIRECTORY)
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        _write_all(descriptor, data, 0o644)
        temporary.replace(path)
        temporary = None
        os.fsync(directory)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        if directory >= 0:
            os.close(directory)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def read_public(path: Path, limit_bytes: int = PUBLIC_FILE_LIMIT_BYTES) -> bytes:
    """The bytes of a small public file.

    Raises:
        KeyFileError: missing, not a regular file, or larger than `limit_bytes`.
    """
    return _read(path, limit_bytes, private=False)


def read_passphrase_file(path: Path) -> bytes:
    """A passphrase kept in a file of mode 0600; one newline at its end is not part of it.

    Raises:
        KeyFileError: missing, looser than 0600, owned by another user, a symbolic link, too long or empty.
    """
    return parse_passphrase(path, _read(path, PASSPHRASE_LIMIT_BYTES, private=True))


def parse_passphrase(path: Path, content: bytes) -> bytes:
    """The passphrase in the content of its file. `path` is for messages only.

    Raises:
        KeyFileError: it is empty.
    """
    passphrase = content.removesuffix(b"\n")
    if not passphrase:
        raise KeyFileError(f"{path} holds an empty passphrase")
    return passphrase


def _cipher(passphrase: bytes, salt: bytes, log2_n: int) -> AESGCM:
    if not passphrase:
        raise KeyFileError("an empty passphrase protects nothing; choose one")
    return AESGCM(Scrypt(salt=salt, length=32, n=1 << log2_n, r=SCRYPT_R, p=SCRYPT_P).derive(passphrase))


def _read(path: Path, limit_bytes: int, *, private: bool) -> bytes:
    """Read a regular file. The *opened* file is checked, so that it cannot be exchanged between check and use."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if private else 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise KeyFileError(f"{path} does not exist") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise KeyFileError(f"{path} is a symbolic link; give the path of the file itself") from None
        raise KeyFileError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"{path} is not a regular file")
        if private:
            _check_private(path, status)
        content = b""
        while len(content) <= limit_bytes and (chunk := os.read(descriptor, limit_bytes + 1 - len(content))):
            content += chunk
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    if len(content) > limit_bytes:
        raise KeyFileError(f"{path} is larger than {limit_bytes} bytes")
    return content


def _check_private(path: Path, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid():
        raise KeyFileError(f"{path} belongs to another user (uid {status.st_uid}); a secret must be your own file")
    if mode & ~0o600:
        raise KeyFileError(f"{path} has mode {mode:04o}, looser than 0600; if nobody read it: chmod 600 {path}")


def _write_all(descriptor: int, content: bytes | memoryview, mode: int) -> None:
    """Write, set the exact mode (creation leaves it to the umask), sync and close."""
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, _DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
