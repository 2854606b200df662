"""Descriptors kept back: files can be opened although strangers hold all others."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from audit.records import verify_folder
from tests.keys.factory import AGGREGATOR
from tests.secgeo.site import HOSPITALS, Site, make_site
from tests.secgeo.test_crash import free_port, transcript
from tests.secgeo.test_node import collect

ALL_TAKEN = """
import errno, os, resource
from secgeo.descriptors import FREED_AT_ONCE, KEPT_BACK, Reserve
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
reserve, held = Reserve(), []
def take():
    try:
        while True:
            held.append(os.dup(0))
    except OSError as error:
        assert error.errno == errno.EMFILE
for _ in range(3):
    take()
    try:
        open("/dev/null")
        raise SystemExit("a descriptor was free")
    except OSError:
        pass
    with reserve:
        files = [open("/dev/null") for _ in range(FREED_AT_ONCE)]
        for file in files:
            file.close()
with reserve:
    take()  # a thief that is quicker than we
for descriptor in held:
    os.close(descriptor)
with reserve:
    pass
assert len(reserve._kept) == KEPT_BACK
reserve.close()
assert not reserve._kept
"""


def test_files_can_be_opened_when_all_other_descriptors_are_taken() -> None:
    subprocess.run([sys.executable, "-c", ALL_TAKEN], check=True)


@contextmanager
def flood(port: int, process: int) -> Iterator[Counter[str]]:
    """Strangers that hold as many connections as there can be, and come again when they are thrown out."""
    over, seen = threading.Event(), Counter[str]()

    def hold() -> None:
        held: list[socket.socket] = []
        while not over.wait(0.005):
            peer = socket.socket()
            peer.setblocking(False)
            peer.connect_ex(("127.0.0.1", port))
            held.append(peer)
            if len(held) > 600:
                held.pop(0).close()
            with suppress(OSError):  # the aggregator may have ended
                seen["most"] = max(seen["most"], len(list(Path(f"/proc/{process}/fd").iterdir())))
        for peer in held:
            peer.close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def start(site: Site, role: str, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "secgeo.cli", role, str(site.config(name)), "--json"]
    with (site.base / name / "stderr").open("a") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


@pytest.mark.slow
def test_a_study_ends_well_although_strangers_hold_every_connection(tmp_path: Path) -> None:
    site = make_site(tmp_path, rounds=3)
    port, limit = free_port(), 256
    site.write_config(AGGREGATOR, listen_address=f"tcp://127.0.0.1:{port}")
    for name in HOSPITALS:
        site.write_config(name, aggregator_address=f"tcp://127.0.0.1:{port}")
    processes = {AGGREGATOR: start(site, "aggregator", AGGREGATOR)}
    processes |= {name: start(site, "node", name) for name in HOSPITALS}
    try:
        deadline = time.monotonic() + 120
        records = site.base / AGGREGATOR / "records" / "sums"
        while not records.exists():  # the hospitals are connected, and the first sum is opened
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes.values())
            time.sleep(0.01)
        aggregator = processes[AGGREGATOR].pid
        resource.prlimit(aggregator, resource.RLIMIT_NOFILE, (limit, limit))
        with flood(port, aggregator) as seen:
            codes = {name: process.wait(deadline - time.monotonic()) for name, process in processes.items()}
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
    assert codes == dict.fromkeys(processes, 0), (site.base / AGGREGATOR / "stderr").read_text()
    assert seen["most"] >= limit - 8  # what is kept back counts too: all but what is free for a moment
    assert sum(body["type"] == "RoundRecord" for body in transcript(site)) == 3
    folder = collect(site)
    fingerprint = site.consortium.authority.fingerprint
    assert verify_folder(folder, authority_fingerprint=fingerprint, now=datetime.now(UTC)).ok
