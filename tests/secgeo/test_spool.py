"""Unfinished uploads in memory and on disk."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from keys.errors import ConfigError
from secgeo.descriptors import Reserve
from secgeo.spool import DiskSpool

RESERVE = Reserve()


def chunk(fill: int, size: int = 1000) -> memoryview:
    return memoryview(bytes([fill]) * size)


def read(spool: DiskSpool, name: str) -> list[bytes]:
    return [bytes(data) for data in spool.chunks(name)]


def test_chunks_come_back_in_order_from_memory_and_disk(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, 2500, RESERVE)
    for fill in range(5):
        for name in ("a", "b"):
            spool.append(name, chunk(fill, 1000 - fill))
    for name in ("a", "b"):
        assert read(spool, name) == [bytes([fill]) * (1000 - fill) for fill in range(5)]
    assert read(spool, "nobody") == []


def test_memory_is_bounded_and_given_back(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, 3000, RESERVE)
    for fill in range(100):
        spool.append(f"node-{fill}", chunk(fill))
    held = sum(len(data) for upload in spool._uploads.values() for data in upload.in_memory)
    assert held == 3000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 97_000
    for fill in range(100):
        spool.discard(f"node-{fill}")
        spool.discard(f"node-{fill}")
    assert not list(tmp_path.iterdir())
    spool.append("late", chunk(1, 3000))
    assert not list(tmp_path.iterdir())


def test_an_upload_that_went_to_disk_stays_in_order_when_memory_is_free_again(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, 1000, RESERVE)
    spool.append("first", chunk(0))
    spool.append("second", chunk(1))
    spool.discard("first")
    spool.append("second", chunk(2))
    assert read(spool, "second") == [bytes(chunk(1)), bytes(chunk(2))]


def test_what_a_crash_left_is_deleted(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, 0, RESERVE)
    spool.append("node", chunk(1))
    assert list(tmp_path.iterdir())
    assert read(DiskSpool(tmp_path, 0, RESERVE), "node") == []
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = DiskSpool(tmp_path, 0, RESERVE)
    spool.append("node", chunk(1))

    class Full:
        def write(self, _data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool._uploads["node"], "file", Full())
    with pytest.raises(ConfigError, match=f"{tmp_path}.*No space left"):
        spool.append("node", chunk(2))
