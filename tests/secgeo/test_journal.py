"""The journals across re-opening, damage and a full disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import numpy as np
import pytest

from keys.errors import ConfigError
from protocols.attempt_aggregator import ClosedAttempt
from secgeo.journal import AggregatorJournal, NodeJournal

SEED = bytes(range(32))
STATE = ClosedAttempt(
    2,
    3,
    ("a", "b", "c"),
    {"a": b"keys"},
    ("a", "b"),
    {"a": {"b": (SEED, SEED)}},
    {},
    (("a", SEED),),
    {"a": b"done"},
    {"a": b"vote"},
    {},
    5,
    b"",
)


def record(number: int, text: str = "x") -> bytes:
    return msgspec.json.encode({"body": {"round": number, "text": text}}) + b"\n"


def test_a_node_remembers_everything_after_a_crash(tmp_path: Path) -> None:
    """Nothing is closed: a killed process closes nothing either. Only the lock on the receipts must go."""
    first = NodeJournal(tmp_path, bytes(32))
    assert (first.last(), first.ballot(1), first.progress(), first.update(1)) == ((0, 0), b"", None, None)
    first.record(1, 1, "begun")
    first.record(1, 1, "used", SEED)
    first.record(1, 2, "begun")
    first.record(1, 2, "voted", b"ballot")
    vector, model = np.arange(5.0), {"w": np.ones((2, 3), np.float32)}
    first.keep_update(2, vector, model)
    first.keep_receipt(1, record(1))
    first._receipts.close()

    again = NodeJournal(tmp_path, bytes(32))
    assert again.last() == (1, 2)
    assert again.ballot(1) == b"ballot"
    assert again.ballot(2) == b""
    assert (again.tag_seed(1, 1), again.tag_seed(1, 2), again.tag_seed(2, 1)) == (SEED, b"", b"")
    assert np.array_equal(again.update(2), vector)  # type: ignore[arg-type]
    assert np.array_equal(again.trained_model()["w"], model["w"])
    assert again.receipt(1) == record(1)
    again.keep_progress(2, "digest", model)
    progress = again.progress()
    assert progress is not None
    assert (progress.completed, progress.link) == (2, "digest")
    assert again.update(2) is None
    assert again.trained_model() == {}


def test_an_attempt_is_begun_once_only(tmp_path: Path) -> None:
    journal = NodeJournal(tmp_path, bytes(32))
    journal.record(1, 1, "used", SEED)
    with pytest.raises(sqlite3.IntegrityError):
        journal.record(1, 1, "used", bytes(32))
    assert journal.tag_seed(1, 1) == SEED


def test_the_first_record_of_a_round_counts_and_both_are_kept(tmp_path: Path) -> None:
    journal = NodeJournal(tmp_path, bytes(32))
    journal.keep_receipt(1, record(1, "one story"))
    journal.keep_receipt(1, record(1, "another"))
    assert journal.receipt(1) == record(1, "one story")
    journal.close()
    again = NodeJournal(tmp_path, bytes(32))
    assert again.receipt(1) == record(1, "one story")
    assert (tmp_path / "receipts.jsonl").read_bytes() == record(1, "one story") + record(1, "another")


def test_the_log_is_written_ahead_and_synced_and_only_the_owner_reads_it(tmp_path: Path) -> None:
    for kind, keys in ((NodeJournal, [bytes(32)]), (AggregatorJournal, [])):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        database = kind(folder, *keys)._database
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)
        assert (folder / "state.sqlite").stat().st_mode & 0o777 == 0o600
        for path in folder.iterdir():
            assert path.stat().st_mode & 0o077 == 0, path.name


def test_two_processes_cannot_use_one_journal(tmp_path: Path) -> None:
    NodeJournal(tmp_path, bytes(32))
    with pytest.raises(ConfigError, match="another process"):
        NodeJournal(tmp_path, bytes(32))


@pytest.mark.parametrize("name", ["state.sqlite", "receipts.jsonl"])
def test_a_damaged_journal_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff rubbish of some length, and a line end\n" * 200)
    with pytest.raises(ConfigError, match=name):
        NodeJournal(tmp_path, bytes(32))


def test_no_secret_in_a_representation(tmp_path: Path) -> None:
    journal = NodeJournal(tmp_path, bytes(32))
    journal.record(1, 1, "used", SEED)
    assert SEED.hex() not in repr(journal)
    assert repr(SEED) not in repr(journal)


def test_an_aggregator_remembers_attempts_and_the_attempt_in_closed(tmp_path: Path) -> None:
    first = AggregatorJournal(tmp_path)
    assert (first.attempts(), first.closed()) == ({}, None)
    first.begun(1, 1)
    first.begun(1, 2)
    first.begun(2, 1)
    first.keep_closed(msgspec.structs.replace(STATE, round=1), np.zeros(7, np.uint32))
    masked = np.arange(7, dtype=np.uint32)
    first.keep_closed(STATE, masked)

    again = AggregatorJournal(tmp_path)
    assert again.attempts() == {1: 2, 2: 1}
    kept = again.closed()
    assert kept is not None
    assert kept[0] == STATE
    assert np.array_equal(kept[1], masked)
    assert len(list(tmp_path.glob("masked-*.u32"))) == 1


def test_a_crash_between_the_masked_sum_and_its_entry_leaves_the_attempt_before(tmp_path: Path) -> None:
    journal = AggregatorJournal(tmp_path)
    journal.keep_closed(STATE, np.zeros(7, np.uint32))
    (tmp_path / "masked-2-4.u32").write_bytes(bytes(28))  # written, but its entry was not
    kept = AggregatorJournal(tmp_path).closed()
    assert kept is not None
    assert kept[0].attempt == 3
    assert [path.name for path in tmp_path.glob("masked-*.u32")] == ["masked-2-3.u32"]


def test_the_study_key_is_kept_encrypted_and_opens_with_the_same_identity_only(tmp_path: Path) -> None:
    secret = bytes(range(256)) * 112
    journal = NodeJournal(tmp_path, bytes(32))
    assert journal.study_key() == b""
    journal.keep_study_key(b"an earlier one")
    journal.keep_study_key(secret)
    journal.close()
    assert NodeJournal(tmp_path, bytes(32)).study_key() == secret
    for path in tmp_path.iterdir():
        assert secret[:32] not in path.read_bytes()
        assert b"an earlier one" not in path.read_bytes()


def test_a_study_key_of_another_identity_is_refused(tmp_path: Path) -> None:
    journal = NodeJournal(tmp_path, bytes(32))
    journal.keep_study_key(b"secret")
    journal.close()
    with pytest.raises(ConfigError, match="does not open with this site's keys"):
        NodeJournal(tmp_path, b"1" * 32).study_key()


def test_the_sum_of_ciphertexts_of_a_closed_attempt_comes_back(tmp_path: Path) -> None:
    words = np.arange(2 * 2 * 4096, dtype=np.uint64).reshape(2, 2, 4096) << np.uint64(40)
    AggregatorJournal(tmp_path).keep_closed(STATE, words)
    kept = AggregatorJournal(tmp_path).closed()
    assert kept is not None
    assert kept[0] == STATE
    assert np.array_equal(kept[1].reshape(words.shape), words)
