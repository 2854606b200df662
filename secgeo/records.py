"""Durable records: append-only line files, and the folder of records that a study leaves behind.

    agreement.toml, agreement.toml.sig, roster.json, roster.json.sig, authority.pem    the study's signed documents
    transcript.jsonl                                                                   what the aggregator recorded
    sums/round-0001.u32                                                                every opened sum, little-endian uint32; or .u64:
                                                                                       every encrypted sum, words of ciphertexts
    ledgers/NODE.jsonl                                                                 every node's budget ledger
    receipts/NODE.jsonl                                                                the records as each node was shown them
    metrics.json, split.json, curves.png, ...                                          what else the study wants to keep
    manifest.json, manifest.json.sig                                                   SHA-256 of every file, signed

A line is on disk (fsync) before `append` returns, or it is not in the file at all. A folder may come from a stranger:
links and special files are refused, and number and size of files are bounded before any of them is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from keys.errors import ConfigError
from keys.files import write_public
from keys.labels import Label
from keys.signed import sign_document
from protocols.rings import Total, octets

FOLDER_LIMIT_FILES = 50_000
FOLDER_LIMIT_BYTES = 1 << 36
"""A study of 10,000 rounds with a million values a sum takes 40 GB."""

TRANSCRIPT, LEDGERS, RECEIPTS, SUMS = "transcript.jsonl", "ledgers", "receipts", "sums"
MANIFEST = "manifest.json"


class LineFile:
    """An append-only file of lines, for one process at a time. What is there already stays; a torn last line goes.

    Attributes:
        lines: the whole lines that were there when the file was opened. A torn one was never acknowledged to anybody.

    Raises:
        ConfigError: it cannot be opened, or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with os.fdopen(os.dup(self._descriptor), "rb") as file:
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            os.ftruncate(self._descriptor, len(whole))
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConfigError(f"another process is writing to {path}; it runs this study already") from None
        except OSError as error:
            raise ConfigError(f"cannot open {path}: {error.strerror}") from None
        self.lines = tuple(whole.splitlines(keepends=True))
        self._path, self._size = path, len(whole)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def append(self, line: bytes) -> None:
        """Write one whole line; it is on disk when this returns.

        Raises:
            ConfigError: it cannot be written, for example because the disk is full; what was written of it is undone.
        """
        written = 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise ConfigError(f"cannot write to {self._path}: {error.strerror}; nothing was recorded") from None
        self._size += len(line)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def sum_path(folder: Path, round_number: int, dtype: np.dtype[Any]) -> Path:
    """Where a round's sum is kept: values (`.u32`), or words of ciphertexts (`.u64`)."""
    return folder / SUMS / f"round-{round_number:04d}.u{8 * dtype.itemsize}"


def write_sum(
    folder: Path, round_number: int, total: Total, opening: AbstractContextManager[object] | None = None
) -> None:
    """Keep a round's sum; `opening` is entered while descriptors are opened."""
    path = sum_path(folder, round_number, total.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_public(path, octets(total), opening)


def read_sum(
    folder: Path, round_number: int, dtype: np.dtype[Any], opening: AbstractContextManager[object] | None = None
) -> Total:
    """Read back what `write_sum` kept, flat."""
    with opening or contextlib.nullcontext():
        file = sum_path(folder, round_number, dtype).open("rb")
    with file:
        return np.fromfile(file, dtype=dtype.newbyteorder("<")).astype(dtype, copy=False)


def forget_sums(folder: Path, recorded: Collection[int]) -> None:
    """Delete sums of rounds that were never recorded, and what a crash has left half written."""
    keep = {f"round-{number:04d}" for number in recorded}
    for path in (folder / SUMS).glob("*"):
        if path.stem not in keep:
            path.unlink()


def list_files(folder: Path) -> tuple[str, ...]:
    """The relative paths of all files below `folder`, sorted. No link is followed and no file is opened.

    Raises:
        ConfigError: a link, something that is no plain file, a strange name, or too many files or bytes.
    """
    names: list[str] = []
    waiting, entries, total = [folder], 0, 0
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                name = Path(entry.path).relative_to(folder).as_posix()
                status = entry.stat(follow_symlinks=False)
                entries, total = entries + 1, total + status.st_size
                if entries > FOLDER_LIMIT_FILES or total > FOLDER_LIMIT_BYTES:
                    raise ConfigError(f"{folder} holds too many files or bytes for a folder of records")
                if not name.isprintable():
                    raise ConfigError(f"{name!r} is no name for a file of records")
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(Path(entry.path))
                elif stat.S_ISREG(status.st_mode):
                    names.append(name)
                else:
                    raise ConfigError(f"{name} is a link or a special file; a folder of records holds plain files only")
    return tuple(sorted(names))


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 (hexadecimal) of every file below `folder` but the manifest, by relative path.

    Raises:
        ConfigError: see `list_files`.
    """
    digests: dict[str, str] = {}
    for name in list_files(folder):
        if name not in (MANIFEST, f"{MANIFEST}.sig"):
            with (folder / name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def write_manifest(folder: Path, sign: Callable[[Label, bytes], bytes]) -> None:
    """Sign the digests of all files, so that not one byte of any of them can change unseen."""
    document = msgspec.json.format(msgspec.json.encode(file_digests(folder), order="sorted"), indent=1) + b"\n"
    write_public(folder / f"{MANIFEST}.sig", sign_document(sign, Label.MANIFEST, document))
    write_public(folder / MANIFEST, document)
