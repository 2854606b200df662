"""What all studies together have spent on this site's records: SQLite with a write-ahead log, synchronous=FULL, in the state folder.

Spending belongs to records and patients, not to the name of a dataset: a study inherits what was spent on every dataset that shares
even one of them with its own, so that neither a new study nor an added record nor a new identity begins anew. A record is known by
a keyed hash of its features, a patient by one of the name that the data give; who is in another file under another name is not
recognised (docs/privacy.md). No clock is asked.

An event is on disk before its noise is drawn. Two studies at a time are booked one after the other. With each event goes the privacy
unit of its study: what was spent on records and what was spent on patients cannot be added up here (`secgeo.budget` refuses it).
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from keys.errors import ConfigError
from protocols.agreement import PrivacyUnit
from secgeo.journal import open_database

DIGEST_BYTES = 16
KEY_BYTES = 32

_TABLES = """
CREATE TABLE IF NOT EXISTS site (id INTEGER PRIMARY KEY CHECK (id = 1), key BLOB) STRICT;
CREATE TABLE IF NOT EXISTS records (dataset TEXT, digest BLOB, PRIMARY KEY (digest, dataset)) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_dataset ON records (dataset);
CREATE TABLE IF NOT EXISTS events (
  id INTEGER PRIMARY KEY, dataset TEXT, study TEXT, round INTEGER,
  sample_rate REAL, noise_multiplier REAL, steps INTEGER, delta REAL, unit TEXT, records_per_patient INTEGER) STRICT;
"""

_SPENT = """
SELECT sample_rate, noise_multiplier, steps, delta, unit, records_per_patient FROM events WHERE dataset IN (
  SELECT theirs.dataset FROM records AS ours JOIN records AS theirs USING (digest) WHERE ours.dataset = ?)
ORDER BY id
"""


@dataclass(frozen=True, slots=True)
class Spent:
    """`steps` DP-SGD steps, the delta at which their study counts, and whom it protects."""

    sample_rate: float
    noise_multiplier: float
    steps: int
    delta: float
    unit: PrivacyUnit = "record"
    records_per_patient: int = 0


class SiteBudget:
    """The spending on one dataset and on all that overlap with it.

    Args:
        path: the database; made if it is missing.
        dataset: the dataset's name: its fingerprint.
        identities: of its records and patients, as `secgeo.datasets.LabelledRecords` gives them.

    Raises:
        ConfigError: the database cannot be opened, or is of an earlier version, which did not keep the privacy unit.
    """

    def __init__(self, path: Path, dataset: str, identities: Iterable[bytes]) -> None:
        self._database, self._dataset = open_database(path, _TABLES), dataset
        if "unit" not in {column[1] for column in self._database.execute("PRAGMA table_info(events)")}:
            self._database.close()
            raise ConfigError(
                f"{path} was begun by an earlier version, which did not keep the privacy unit; go on with that version, or count "
                "what it holds by hand (docs/privacy.md) and begin with another state folder"
            )
        with self._transaction():
            self._database.execute("INSERT OR IGNORE INTO site VALUES (1, ?)", (os.urandom(KEY_BYTES),))
            (key,) = self._database.execute("SELECT key FROM site").fetchone()
            hashed = (hashlib.blake2b(identity, digest_size=DIGEST_BYTES, key=key).digest() for identity in identities)
            self._database.executemany(
                "INSERT OR IGNORE INTO records VALUES (?, ?)", ((dataset, digest) for digest in hashed)
            )

    def spent(self) -> tuple[Spent, ...]:
        """All events on datasets that share a record with this one."""
        return tuple(Spent(*row) for row in self._database.execute(_SPENT, (self._dataset,)))

    def book(self, study: str, round_number: int, event: Spent, permit: Callable[[tuple[Spent, ...]], None]) -> None:
        """Make an event durable, if `permit` does not raise over all that would then be spent."""
        with self._transaction():
            permit((*self.spent(), event))
            row = (
                self._dataset,
                study,
                round_number,
                event.sample_rate,
                event.noise_multiplier,
                event.steps,
                event.delta,
                event.unit,
                event.records_per_patient,
            )
            self._database.execute("INSERT INTO events VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def booked(self, study: str) -> list[tuple[int, int]]:
        """Round and steps of all events of a study, on whatever records, in their order."""
        rows = self._database.execute("SELECT round, steps FROM events WHERE study = ? ORDER BY id", (study,))
        return [(int(round_number), int(steps)) for round_number, steps in rows]

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._database)


class _Transaction:
    """All or nothing, with no other process in between."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._database.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.execute("COMMIT" if kind is None else "ROLLBACK")
