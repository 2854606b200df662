"""Where unfinished uploads wait: in memory as they came while there is room, on disk beyond it.

Implements `protocols.attempt_aggregator.Spool`. So the aggregator's memory does not grow with the number of nodes, and a
slow or malicious node holds up nobody. What is here is masked; the files are deleted when an upload ends, and left-overs
of a crash when the next aggregator starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from keys.errors import ConfigError
from secgeo.descriptors import Reserve


@dataclass(slots=True)
class _Upload:
    in_memory: list[memoryview] = field(default_factory=list)
    on_disk: list[int] = field(default_factory=list)
    file: BinaryIO | None = None


class DiskSpool:
    """Unfinished uploads: `budget_bytes` of them in memory, the rest in files of `folder`."""

    def __init__(self, folder: Path, budget_bytes: int, reserve: Reserve) -> None:
        self._folder, self._room_bytes, self._reserve = folder, budget_bytes, reserve
        self._uploads: dict[str, _Upload] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left_over in folder.glob("*.upload"):
            left_over.unlink()

    def append(self, name: str, data: memoryview) -> None:
        """Keep the next chunk of a node's upload.

        Raises:
            ConfigError: the disk is full.
        """
        upload = self._uploads.setdefault(name, _Upload())
        if upload.file is None and len(data) <= self._room_bytes:
            self._room_bytes -= len(data)
            upload.in_memory.append(data)
            return
        try:
            if upload.file is None:
                with self._reserve:
                    upload.file = (self._folder / f"{name}.upload").open("w+b", buffering=0)
            written = 0
            while written < len(data):
                written += upload.file.write(data[written:])
        except OSError as error:
            raise ConfigError(f"cannot keep an upload in {self._folder}: {error.strerror}") from None
        upload.on_disk.append(len(data))

    def chunks(self, name: str) -> Iterator[memoryview | bytes]:
        """All chunks of a node's upload, in order."""
        upload = self._uploads.get(name, _Upload())
        yield from upload.in_memory
        if upload.file is not None:
            upload.file.seek(0)
            for size in upload.on_disk:
                yield upload.file.read(size)

    def discard(self, name: str) -> None:
        """Forget a node's upload, if there is one."""
        upload = self._uploads.pop(name, None)
        if upload is None:
            return
        self._room_bytes += sum(len(data) for data in upload.in_memory)
        if upload.file is not None:
            upload.file.close()
            (self._folder / f"{name}.upload").unlink(missing_ok=True)
