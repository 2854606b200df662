"""What a node and an aggregator must remember across a crash: SQLite with a write-ahead log, synchronous=FULL.

`NodeJournal` implements `protocols.study_node.Journal`: in which attempts it began, used seeds or voted, for what, the tag seeds that check
their sums, and every record that the aggregator has signed. It also keeps the update that waits to be summed and the
model, so that no round is trained twice. Seeds of masks are never in it: they die with the process, and what they
masked is never asked for again. Tag seeds are secret from the aggregator only. The study key is kept encrypted, under a key that
follows from the site's identity. The folder is readable by its owner.

`AggregatorJournal` keeps the numbers of attempts and the attempt whose uploads are closed. It holds no secret.
"""

from __future__ import annotations

import io
import os
import sqlite3
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from keys.errors import ConfigError
from keys.files import write_public
from keys.labels import Label
from protocols.attempt_aggregator import ClosedAttempt
from protocols.encoding import Float64Vector
from protocols.rings import Total, octets
from secgeo.records import LineFile

Arrays = Mapping[str, NDArray[np.float32] | NDArray[np.float64]]
Saved = dict[str, NDArray[Any]]

NONCE_BYTES = 12

BUSY_SECONDS = 60.0
"""How long one process waits for another that writes."""

_NODE_TABLES = """
CREATE TABLE IF NOT EXISTS attempts (
  round INTEGER, attempt INTEGER, event TEXT, note BLOB, PRIMARY KEY (round, attempt, event)) STRICT;
CREATE TABLE IF NOT EXISTS updates (round INTEGER PRIMARY KEY, vector BLOB, model BLOB) STRICT;
CREATE TABLE IF NOT EXISTS study_key (id INTEGER PRIMARY KEY CHECK (id = 1), nonce BLOB, sealed BLOB) STRICT;
CREATE TABLE IF NOT EXISTS progress (id INTEGER PRIMARY KEY CHECK (id = 1), completed INTEGER, link TEXT, model BLOB) STRICT;
"""

_AGGREGATOR_TABLES = """
CREATE TABLE IF NOT EXISTS attempts (round INTEGER PRIMARY KEY, attempt INTEGER) STRICT;
CREATE TABLE IF NOT EXISTS closed (id INTEGER PRIMARY KEY CHECK (id = 1), state BLOB, masked TEXT) STRICT;
"""


def open_database(path: Path, tables: str) -> sqlite3.Connection:
    """Open or make a database that its owner alone can read, durable after every commit.

    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.executescript(tables)
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(f"{path} cannot be opened as a journal: {error}") from None
    return database


def _dump(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _load(data: bytes) -> Saved:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a node had come: the last round it applied, the digest of that round's record, and its model."""

    completed: int
    link: str
    model: Saved


class _RecordLine(msgspec.Struct):
    """Of a record line only its round; the line itself was verified before it was kept."""

    class Body(msgspec.Struct):
        """The body of a record line."""

        round: int

    body: Body


class NodeJournal:
    """The journal of one node in one study: `state.sqlite` and `receipts.jsonl` in `folder`.

    `wrapping_key` (32 bytes) encrypts the study key.
    """

    def __init__(self, folder: Path, wrapping_key: bytes) -> None:
        self._wrapping = AESGCM(wrapping_key)
        self._database = open_database(folder / "state.sqlite", _NODE_TABLES)
        self._receipts = LineFile(folder / "receipts.jsonl")
        self._lines: dict[int, bytes] = {}
        for line in self._receipts.lines:
            try:
                number = msgspec.json.decode(line, type=_RecordLine).body.round
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise ConfigError(f"{folder / 'receipts.jsonl'} is damaged; put back a copy of it") from None
            self._lines.setdefault(number, line)

    # --- the secure sum

    def last(self) -> tuple[int, int]:
        """The latest (round, attempt) that was begun, (0, 0) if none."""
        row = self._database.execute(
            "SELECT round, attempt FROM attempts ORDER BY round DESC, attempt DESC LIMIT 1"
        ).fetchone()
        return (int(row[0]), int(row[1])) if row else (0, 0)

    def ballot(self, round_number: int) -> bytes:
        """What we voted for in this round, empty if we have not."""
        query = "SELECT note FROM attempts WHERE round = ? AND event = 'voted'"
        row = self._database.execute(query, (round_number,)).fetchone()
        return bytes(row[0]) if row else b""

    def record(self, round_number: int, attempt: int, event: str, note: bytes = b"") -> None:
        """Note an event; it is on disk when this returns."""
        self._database.execute("INSERT INTO attempts VALUES (?, ?, ?, ?)", (round_number, attempt, event, note))

    def tag_seed(self, round_number: int, attempt: int) -> bytes:
        """The tag seed of an attempt, empty if this node does not know it."""
        query = "SELECT note FROM attempts WHERE round = ? AND attempt = ? AND event = 'used'"
        row = self._database.execute(query, (round_number, attempt)).fetchone()
        return bytes(row[0]) if row else b""

    def keep_receipt(self, round_number: int, line: bytes) -> None:
        """Keep a record that the aggregator signed."""
        self._receipts.append(line)
        self._lines.setdefault(round_number, line)

    def receipt(self, round_number: int) -> bytes:
        """The first record of this round that was kept, empty if none."""
        return self._lines.get(round_number, b"")

    def keep_study_key(self, secret: bytes) -> None:
        """Keep the study key, instead of one that was kept before."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._wrapping.encrypt(nonce, secret, Label.KEEP_STUDY_KEY)
        self._database.execute("INSERT OR REPLACE INTO study_key VALUES (1, ?, ?)", (nonce, sealed))

    def study_key(self) -> bytes:
        """The study key that was kept, empty if none.

        Raises:
            ConfigError: it was changed, or kept by another identity.
        """
        row = self._database.execute("SELECT nonce, sealed FROM study_key").fetchone()
        if row is None:
            return b""
        try:
            return self._wrapping.decrypt(row[0], row[1], Label.KEEP_STUDY_KEY)
        except InvalidTag:
            raise ConfigError("the study key in the journal does not open with this site's keys") from None

    # --- the update and the model

    def keep_update(self, round_number: int, vector: Float64Vector, model: Arrays) -> None:
        """Keep what was trained, before anybody is told that it was."""
        self._database.execute(
            "INSERT OR REPLACE INTO updates VALUES (?, ?, ?)", (round_number, vector.tobytes(), _dump(model))
        )

    def update(self, round_number: int) -> Float64Vector | None:
        """The update of a round that was trained before a crash."""
        row = self._database.execute("SELECT vector FROM updates WHERE round = ?", (round_number,)).fetchone()
        return np.frombuffer(row[0], dtype=np.float64) if row else None

    def trained_model(self) -> Saved:
        """The local model of the latest update that no sum has followed yet, empty if there is none."""
        row = self._database.execute("SELECT model FROM updates ORDER BY round DESC LIMIT 1").fetchone()
        return _load(row[0]) if row else {}

    def keep_progress(self, completed: int, link: str, model: Arrays) -> None:
        """Keep the model after a sum was applied, and drop the updates up to that round."""
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(
                "INSERT OR REPLACE INTO progress VALUES (1, ?, ?, ?)", (completed, link, _dump(model))
            )
            self._database.execute("DELETE FROM updates WHERE round <= ?", (completed,))

    def progress(self) -> Progress | None:
        """How far this node had come, None before the first sum."""
        row = self._database.execute("SELECT completed, link, model FROM progress").fetchone()
        return Progress(int(row[0]), str(row[1]), _load(row[2])) if row else None

    def close(self) -> None:
        """Close the database and the receipts."""
        self._database.close()
        self._receipts.close()


class AggregatorJournal:
    """The journal of the aggregator in one study: `state.sqlite` and the masked sum of the attempt whose uploads are closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._database = open_database(folder / "state.sqlite", _AGGREGATOR_TABLES)
        kept = self._database.execute("SELECT masked FROM closed").fetchone()
        for left_over in folder.glob("masked-*"):  # of a crash between the file and its entry
            if kept is None or left_over.name != kept[0]:
                left_over.unlink()

    def begun(self, round_number: int, attempt: int) -> None:
        """Note that an attempt was begun."""
        self._database.execute("INSERT OR REPLACE INTO attempts VALUES (?, ?)", (round_number, attempt))

    def attempts(self) -> dict[int, int]:
        """The number of the latest attempt of every round."""
        return {int(row[0]): int(row[1]) for row in self._database.execute("SELECT round, attempt FROM attempts")}

    def keep_closed(
        self, state: ClosedAttempt, masked: Total, opening: AbstractContextManager[object] | None = None
    ) -> None:
        """Keep the attempt whose survivors are about to be asked for votes, instead of the one before.

        `opening` is entered while descriptors are opened.
        """
        name = f"masked-{state.round}-{state.attempt}.u{8 * masked.itemsize}"
        if not (self._folder / name).exists():  # it is kept again with the votes, and the sum is the same
            write_public(self._folder / name, octets(masked), opening)
        before = self._database.execute("SELECT masked FROM closed").fetchone()
        row = msgspec.msgpack.encode(state), name
        self._database.execute("INSERT OR REPLACE INTO closed VALUES (1, ?, ?)", row)
        if before is not None and before[0] != name:
            (self._folder / before[0]).unlink(missing_ok=True)

    def closed(self) -> tuple[ClosedAttempt, Total] | None:
        """What `keep_closed` kept last."""
        row = self._database.execute("SELECT state, masked FROM closed").fetchone()
        if row is None:
            return None
        dtype = np.dtype(np.uint32 if row[1].endswith(".u32") else np.uint64)
        masked = np.fromfile(self._folder / row[1], dtype=dtype.newbyteorder("<")).astype(dtype, copy=False)
        return msgspec.msgpack.decode(row[0], type=ClosedAttempt), masked

    def close(self) -> None:
        """Close the database."""
        self._database.close()
