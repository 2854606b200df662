"""A signed hash chain of JSON lines: the form of the transcript and of every budget ledger (DESIGN section 7).

One line is one canonical JSON document {seq, prev, body, signature}: `prev` is the SHA-256 of the previous line's
exact bytes (64 zeros at first), the signature is Ed25519 over label and the canonical bytes of the first three.
Reading encodes each line again and compares, so no byte can change without being noticed: not a space, not the case
of a digit, not a key's place. Pure functions of bytes; where lines are kept is not this file's business.

Threat assumption: whoever stores the lines wants to change them, and lacks the key. Lines can then only be cut off at
the end, which closing bodies make visible. The keeper of the key can write two histories: two signed lines of one
place prove it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Generic, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct

from keys.errors import LocalProtocolError, VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label

LINE_LIMIT_BYTES = 1 << 20
GENESIS = "0" * 64

Hex32 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Hex64 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{128}\Z")]
Body = TypeVar("Body")


class Unsigned(Struct, Generic[Body], frozen=True, forbid_unknown_fields=True):
    """What the signature of a line covers."""

    seq: Annotated[int, Meta(ge=0)]
    prev: Hex32
    body: Body


class Entry(Struct, Generic[Body], frozen=True, forbid_unknown_fields=True):
    """One verified line of a chain."""

    seq: Annotated[int, Meta(ge=0)]
    prev: Hex32
    body: Body
    signature: Hex64


def line_digest(line: bytes) -> bytes:
    """SHA-256 of a line's exact bytes, its newline included: what the next line's `prev` holds."""
    return hashlib.sha256(line).digest()


class ChainWriter(Generic[Body]):
    """Makes the lines of one chain, of bodies that `kind` reads, behind the lines that are `written` already.

    Every line that was made has to be kept: the next one follows it. Whoever could not keep one makes no more, and begins again with
    what is written.
    """

    def __init__(
        self, identity: Identity, label: Label, kind: type[Entry[Body]], written: Sequence[bytes] = ()
    ) -> None:
        self._identity, self._label, self._kind = identity, label, kind
        self._seq, self._prev = len(written), line_digest(written[-1]).hex() if written else GENESIS

    def append(self, body: Body) -> bytes:
        """The next line, newline included.

        Raises:
            LocalProtocolError: the body holds what no reader would accept, for example NaN; no line was made.
        """
        unsigned = Unsigned(self._seq, self._prev, body)
        signature = self._identity.sign(self._label, msgspec.json.encode(unsigned)).hex()
        line = msgspec.json.encode(Entry(self._seq, self._prev, body, signature)) + b"\n"
        try:
            _decode(line, self._kind)
        except VerificationFailed as error:
            raise LocalProtocolError(f"{type(body).__name__} cannot be recorded: {error}") from None
        self._seq, self._prev = self._seq + 1, line_digest(line).hex()
        return line


def read_line(line: bytes, kind: type[Entry[Body]], public_key: Ed25519PublicKey, label: Label) -> Entry[Body]:
    """Decode and verify one line by itself.

    Raises:
        VerificationFailed: malformed, not canonical, or a wrong signature.
    """
    entry = _decode(line, kind)
    unsigned = msgspec.json.encode(Unsigned(entry.seq, entry.prev, entry.body))
    verify_signature(public_key, label, unsigned, bytes.fromhex(entry.signature))
    return entry


def _decode(line: bytes, kind: type[Entry[Body]]) -> Entry[Body]:
    if len(line) > LINE_LIMIT_BYTES:
        raise VerificationFailed("the line is longer than 1 MiB")
    try:
        entry = msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError, OverflowError) as error:
        raise VerificationFailed(f"the line cannot be decoded: {error}") from None
    if msgspec.json.encode(entry) + b"\n" != line:
        raise VerificationFailed("the line is not in its canonical form: it was edited")
    return entry


def read_chain(
    lines: bytes, kind: type[Entry[Body]], public_key: Ed25519PublicKey, label: Label
) -> Iterator[tuple[Entry[Body], bytes]]:
    """Decode and verify a whole chain; gives every entry with its line.

    Raises:
        VerificationFailed: names the first line that is wrong.
    """
    *complete, rest = lines.split(b"\n")
    if rest:
        raise VerificationFailed(
            f"line {len(complete) + 1} is cut off: a crash in mid-write, or somebody shortened the file"
        )
    prev = GENESIS
    for seq, content in enumerate(complete):
        line = content + b"\n"
        try:
            entry = read_line(line, kind, public_key, label)
        except VerificationFailed as error:
            raise VerificationFailed(f"line {seq + 1}: {error}") from None
        if entry.seq != seq or entry.prev != prev:
            raise VerificationFailed(
                f"line {seq + 1} does not follow the line before it: one was removed, added or moved"
            )
        prev = line_digest(line).hex()
        yield entry, line
