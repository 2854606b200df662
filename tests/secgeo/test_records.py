"""Durable records: what is on disk after a crash, a full disk or a second start, and what a folder may hold."""

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keys.errors import ConfigError, VerificationFailed
from keys.labels import Label
from keys.signed import verify_document
from protocols import ledger as led
from secgeo import records
from secgeo.records import (
    LineFile,
    file_digests,
    forget_sums,
    list_files,
    read_sum,
    sum_path,
    write_manifest,
    write_sum,
)
from tests.audit.factory import Study, make_study


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study()


def test_lines_are_appended_whole_in_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        file = LineFile(tmp_path / "deep" / "ledger.jsonl")
    finally:
        os.umask(old)
    file.append(b"one\n")
    file.append(b"two\n")
    file.close()
    path = tmp_path / "deep" / "ledger.jsonl"
    assert path.read_bytes() == b"one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_record_is_continued_behind_its_last_whole_line_and_by_one_process_only(tmp_path: Path) -> None:
    path = tmp_path / "transcript.jsonl"
    path.write_bytes(b"one\ntwo\ntorn by a cra")
    file = LineFile(path)
    assert file.lines == (b"one\n", b"two\n")
    with pytest.raises(ConfigError, match="another process"):
        LineFile(path)
    file.append(b"three\n")
    file.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        LineFile(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_line_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_write, real_sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: (calls.append("write"), real_write(fd, data))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_sync(fd))[1])
    file = LineFile(tmp_path / "a")
    assert calls == ["fsync"]  # of the directory, without which a new file may vanish
    file.append(b"line\n")
    assert calls[1:] == ["write", "fsync"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    file = LineFile(tmp_path / "a")
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    file.append(b"a longer line\n")
    assert (tmp_path / "a").read_bytes() == b"a longer line\n"


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    file = LineFile(tmp_path / "a")
    file.append(b"first\n")
    real, count = os.write, 0

    def write(fd: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:4])

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, write if failing == "write" else fail)
        with pytest.raises(ConfigError, match="nothing was recorded"):
            file.append(b"second\n")
    assert (tmp_path / "a").read_bytes() == b"first\n"
    file.append(b"third\n")
    assert (tmp_path / "a").read_bytes() == b"first\nthird\n"


def test_a_killed_writer_loses_no_acknowledged_line(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from secgeo.records import LineFile\n"
        "f = LineFile(Path(sys.argv[1]))\n"
        "for n in range(20): f.append(b'line %d\\n' % n)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert (tmp_path / "a").read_bytes().count(b"\n") == 20


def test_a_torn_last_line_is_named(study: Study) -> None:
    node = study.names[0]
    lines = study.ledger(node, study.transcript())
    for cut in (1, 20, len(lines.splitlines()[-1])):
        with pytest.raises(VerificationFailed, match=r"line 5 is cut off: a crash in mid-write"):
            led.read_ledger(lines[:-cut], study.public_keys[node])


def test_sums_are_little_endian_and_read_back(tmp_path: Path) -> None:
    total = np.array([1, 2**32 - 1, 258], dtype=np.uint32)
    write_sum(tmp_path, 7, total.astype(">u4"))
    assert sum_path(tmp_path, 7, total.dtype) == tmp_path / "sums" / "round-0007.u32"
    assert sum_path(tmp_path, 7, total.dtype).read_bytes() == bytes([1, 0, 0, 0, 255, 255, 255, 255, 2, 1, 0, 0])
    assert (read_sum(tmp_path, 7, total.dtype) == total).all()


def test_a_manifest_names_every_file_but_itself(tmp_path: Path, study: Study) -> None:
    folder = study.write(tmp_path / "study")
    digests = file_digests(folder)
    assert set(digests) == set(list_files(folder)) - {"manifest.json", "manifest.json.sig"}
    assert "ledgers/hospital-00.jsonl" in digests
    assert digests["metrics.json"] == hashlib.sha256((folder / "metrics.json").read_bytes()).hexdigest()
    document, signature = (folder / "manifest.json").read_bytes(), (folder / "manifest.json.sig").read_bytes()
    verify_document(study.consortium.authority.public_key, Label.MANIFEST, document, signature)
    write_manifest(folder, study.consortium.authority.sign)
    assert (folder / "manifest.json").read_bytes() == document


def link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def folder_link(path: Path) -> None:
    path.symlink_to("/")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def newline(path: Path) -> None:
    path.with_name("a\nb").write_bytes(b"")


@pytest.mark.parametrize("intruder", [link, folder_link, pipe, newline])
def test_links_special_files_and_strange_names_are_refused(tmp_path: Path, intruder) -> None:
    (tmp_path / "sums").mkdir()
    intruder(tmp_path / "sums" / "intruder")
    with pytest.raises(ConfigError, match=r"intruder|no name"):
        list_files(tmp_path)


def test_number_and_size_of_files_are_bounded_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(records.FOLDER_LIMIT_BYTES + 1)
    with pytest.raises(ConfigError, match="too many"):
        file_digests(tmp_path)
    (tmp_path / "sparse").unlink()
    monkeypatch.setattr(records, "FOLDER_LIMIT_FILES", 3)
    for name in "abcd":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match="too many"):
        list_files(tmp_path)


def test_sums_of_no_record_and_half_written_ones_are_forgotten(tmp_path: Path) -> None:
    """What a kill between the sum and its record leaves behind would make an honest study fail its audit."""
    for number in (1, 2):
        write_sum(tmp_path, number, np.arange(3, dtype=np.uint32))
    (tmp_path / "sums" / ".round-0002.u32.abcd").write_bytes(b"half")
    forget_sums(tmp_path, [1])
    assert [path.name for path in (tmp_path / "sums").iterdir()] == ["round-0001.u32"]
    forget_sums(tmp_path / "new", [])
