"""Durable records: append-only line files, and the folder of records that a study leaves behind.

    agreement.toml, agreement.toml.sig, roster.json, roster.json.sig, authority.pem    the study's signed documents
    transcript.jsonl                                                                   what the aggregator recorded
    sums/round-0001.u32                                                                every opened sum, little-endian uint32
    ledgers/NODE.jsonl                                                                 every node's budget ledger
    metrics.json, split.json, curves.png, ...                                          what else the study wants to keep
    manifest.json, manifest.json.sig                                                   SHA-256 of every file, signed by the authority

A line is on disk (fsync) before `append` returns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from keys.errors import ConfigError
from keys.files import write_public
from keys.labels import Label
from keys.signed import sign_document
from protocols.encoding import Uint32Vector

TRANSCRIPT, LEDGERS, SUMS, MANIFEST = "transcript.jsonl", "ledgers", "sums", "manifest.json"


class LineFile:
    """An append-only file of lines, created exclusively: an older record is never continued or overwritten."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise ConfigError(
                f"{path} exists already: this study has run here before. Keep it as a record and choose another folder"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot create {path}: {error.strerror}") from None

    def append(self, line: bytes) -> None:
        """Write one whole line; it is on disk when this returns."""
        written = 0
        while written < len(line):
            written += os.write(self._descriptor, line[written:])
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def sum_path(folder: Path, round_number: int) -> Path:
    """Where a round's sum is kept."""
    return folder / SUMS / f"round-{round_number:04d}.u32"


def write_sum(folder: Path, round_number: int, total: Uint32Vector) -> None:
    """Keep a round's sum ([d] uint32)."""
    sum_path(folder, round_number).parent.mkdir(parents=True, exist_ok=True)
    write_public(sum_path(folder, round_number), total.astype("<u4", copy=False).tobytes())


def read_sum(folder: Path, round_number: int) -> Uint32Vector:
    """Read back what `write_sum` kept."""
    return np.frombuffer(sum_path(folder, round_number).read_bytes(), dtype="<u4").astype(np.uint32)


def list_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the manifest, by relative path.

    Raises:
        ConfigError: a symbolic link or something that is no plain file.
    """
    digests: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ConfigError(f"{name} is a link or a special file; a record folder holds plain files only")
        if path.is_file() and name not in (MANIFEST, f"{MANIFEST}.sig"):
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def write_manifest(folder: Path, sign: Callable[[Label, bytes], bytes]) -> None:
    """Sign the digests of all files, so that not one byte of any of them can change unseen."""
    document = msgspec.json.format(msgspec.json.encode(list_files(folder), order="sorted"), indent=1) + b"\n"
    write_public(folder / f"{MANIFEST}.sig", sign_document(sign, Label.MANIFEST, document))
    write_public(folder / MANIFEST, document)
