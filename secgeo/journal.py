"""A node's durable memory of which attempts it has begun and revealed (SQLite, write-ahead log, synchronous=FULL).

Implements `protocols.study_node.Journal`. It holds no secret: seeds live in memory only and die with the process, and the
journal makes sure that what they masked is never asked for again.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from keys.errors import ConfigError


class SqliteJournal:
    """The journal of one node in one study."""

    def __init__(self, path: Path, agreement_digest: bytes) -> None:
        self._study = agreement_digest.hex()
        try:
            self._database = sqlite3.connect(path, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS attempts (study TEXT, round INTEGER, attempt INTEGER, event TEXT,"
                " PRIMARY KEY (study, round, attempt, event)) STRICT"
            )
        except sqlite3.Error as error:
            raise ConfigError(f"the journal {path} cannot be opened: {error}") from None

    def last(self) -> tuple[int, int]:
        """The latest (round, attempt) that was begun, (0, 0) if none."""
        row = self._database.execute(
            "SELECT round, attempt FROM attempts WHERE study = ? ORDER BY round DESC, attempt DESC LIMIT 1",
            (self._study,),
        ).fetchone()
        return (int(row[0]), int(row[1])) if row else (0, 0)

    def revealed(self, round_number: int) -> bool:
        """Whether shares were revealed in any attempt of this round."""
        row = self._database.execute(
            "SELECT 1 FROM attempts WHERE study = ? AND round = ? AND event = 'revealed'", (self._study, round_number)
        ).fetchone()
        return row is not None

    def record(self, round_number: int, attempt: int, event: str) -> None:
        """Note an event; it is on disk when this returns."""
        self._database.execute("INSERT INTO attempts VALUES (?, ?, ?, ?)", (self._study, round_number, attempt, event))

    def close(self) -> None:
        """Close the database."""
        self._database.close()
