"""Detached signatures of documents: `FILE` and `FILE.sig`.

A `.sig` file is 128 lower-case hexadecimal digits and a newline, nothing else, so that one signature has one spelling
and a changed byte is always refused. Ed25519 (RFC 8032) over a label and the exact bytes of the document; the label
says what kind of document it is, so that a signed roster never passes for a signed agreement.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.errors import VerificationFailed
from keys.identity import verify_signature
from keys.labels import Label

_SIGNATURE_FILE = re.compile(rb"[0-9a-f]{128}\n")

Signer = Callable[[Label, bytes], bytes]
"""`Identity.sign` or `Authority.sign`."""


def sign_document(signer: Signer, label: Label, document: bytes) -> bytes:
    """The content of the `.sig` file of a document."""
    return signer(label, document).hex().encode() + b"\n"


def verify_document(public_key: Ed25519PublicKey, label: Label, document: bytes, sig_file: bytes) -> None:
    """Check the content of a `.sig` file.

    Raises:
        VerificationFailed: not in the one accepted form, or not a signature of these bytes under this label and key.
    """
    if _SIGNATURE_FILE.fullmatch(sig_file) is None:
        raise VerificationFailed("a signature file must be 128 lower-case hexadecimal digits and a newline")
    verify_signature(public_key, label, document, bytes.fromhex(sig_file[:-1].decode()))
