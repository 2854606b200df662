"""kill -9 of the real processes at every phase, then restart: every round is summed and no record is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from audit.records import verify_folder
from tests.keys.factory import AGGREGATOR
from tests.secgeo.site import HOSPITALS, Site, make_site
from tests.secgeo.test_node import collect

FROM_AGGREGATOR = [
    "RoundOpen",
    "AttemptOpen",
    "KeySet",
    "SeedSet",
    "Survivors",
    "SurvivorProof",
    "SumChunk",
    "StudyEnded",
]
FROM_NODE = ["Ready", "RoundKeys", "SealedSeeds", "UploadChunk", "SurvivorVote", "Unmasking", "Receipt"]


def start(site: Site, role: str, name: str, kill_before: str | None) -> subprocess.Popen[str]:
    program = ["-m", "secgeo.cli"] if kill_before is None else ["-m", "tests.secgeo.killed", kill_before]
    command = [sys.executable, *program, role, str(site.config(name)), "--json"]
    with (site.base / name / "stderr").open("a") as errors:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(site: Site, victim: str, kinds: list[str]) -> dict[str, int]:
    """Run the study; kill `victim` before each of `kinds` in turn and start it again. Gives the last exit codes."""
    address = f"tcp://127.0.0.1:{free_port()}"
    site.write_config(AGGREGATOR, listen_address=address)
    for name in HOSPITALS:
        site.write_config(name, aggregator_address=address)
    roles = {AGGREGATOR: "aggregator"} | dict.fromkeys(HOSPITALS, "node")
    waiting, deadline = list(kinds), time.monotonic() + 170
    processes = {
        name: start(site, role, name, waiting.pop(0) if name == victim else None) for name, role in roles.items()
    }
    try:
        while any(process.poll() is None for process in processes.values()):
            assert time.monotonic() < deadline, {name: process.poll() for name, process in processes.items()}
            if processes[victim].poll() == -9:
                processes[victim] = start(site, roles[victim], victim, waiting.pop(0) if waiting else None)
            time.sleep(0.05)
        return {name: process.returncode for name, process in processes.items()}
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def transcript(site: Site) -> list[dict[str, object]]:
    lines = (site.base / AGGREGATOR / "records" / "transcript.jsonl").read_text().splitlines()
    return [json.loads(line)["body"] for line in lines]


def check(site: Site, rounds: int) -> None:
    """All rounds summed, by at least three; records verify, receipts and ledgers of all nodes included."""
    records = [body for body in transcript(site) if body["type"] == "RoundRecord"]
    assert [body["round"] for body in records] == list(range(1, rounds + 1))
    folder = collect(site)
    report = verify_folder(folder, authority_fingerprint=site.consortium.authority.fingerprint, now=datetime.now(UTC))
    assert report.ok, report.to_json()
    for name in HOSPITALS:
        assert len((folder / "receipts" / f"{name}.jsonl").read_text().splitlines()) == rounds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "victim", "kinds"),
    [
        ("layered", AGGREGATOR, ["DealKey", "DealtKey", "Survivors", "SurvivorProof"]),
        (
            "homomorphic",
            HOSPITALS[0],
            ["SealedKey", "UploadChunk", "SurvivorVote", "Receipt"],
        ),  # the first makes the key
    ],
)
def test_studies_of_ciphertexts_go_on_after_kills(tmp_path: Path, protocol: str, victim: str, kinds: list[str]) -> None:
    site = make_site(tmp_path, rounds=3, protocol=protocol)
    codes = run(site, victim, kinds)
    assert codes == dict.fromkeys((AGGREGATOR, *HOSPITALS), 0), (site.base / victim / "stderr").read_text()
    check(site, 3)
    assert not [body for body in transcript(site) if body["type"] in ("Misbehaved", "RoundAbandoned")]


@pytest.mark.slow
def test_the_aggregator_killed_in_every_phase(tmp_path: Path) -> None:
    site = make_site(tmp_path, rounds=4)
    codes = run(site, AGGREGATOR, FROM_AGGREGATOR)
    assert codes == dict.fromkeys((AGGREGATOR, *HOSPITALS), 0), (site.base / AGGREGATOR / "stderr").read_text()
    check(site, 4)
    assert not [body for body in transcript(site) if body["type"] in ("Misbehaved", "RoundAbandoned")]


@pytest.mark.slow
def test_a_node_killed_in_every_phase(tmp_path: Path) -> None:
    site = make_site(tmp_path, rounds=9)
    victim = HOSPITALS[1]
    codes = run(site, victim, FROM_NODE)
    assert codes == dict.fromkeys((AGGREGATOR, *HOSPITALS), 0), (site.base / victim / "stderr").read_text()
    check(site, 9)
    assert not [body for body in transcript(site) if body["type"] in ("Misbehaved", "RoundAbandoned")]
    (ledger,) = (site.base / victim / "state").glob("*/ledger.jsonl")
    kinds = Counter(json.loads(line)["body"]["type"] for line in ledger.read_text().splitlines())
    assert kinds["LedgerReopened"] == len(FROM_NODE)
    # Its update was kept before it was announced: no round was trained, or booked, twice.
    assert kinds["DpSgdEvent"] <= 9
