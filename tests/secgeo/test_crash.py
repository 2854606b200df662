"""kill -9 of the real processes at every phase, then restart: every round is summed, no record is lost, no mask is used twice.

Whom to kill, and when, `tests.secgeo.killed` is told; there each node also notes what it hands to its socket. While a node that was
killed starts again the others wait before their next round, so that each is back for the next kill, however slow the machine is.
"""

from __future__ import annotations

import hashlib
import json
import signal
import socket
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import combinations
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from audit.attacks.knowledge import decrypted, peek
from audit.attacks.network import SharedCiphers
from audit.attacks.stage import Freshness
from audit.records import verify_folder
from keys.labels import Label
from protocols import messages as m
from protocols.agreement import read_agreement
from protocols.study_key import StudyKey
from secgeo.journal import NodeJournal
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import body_type
from tests.secgeo.killed import CONTEXT, entries, live
from tests.secgeo.site import HOSPITALS, Site, make_site
from tests.secgeo.test_node import collect

Order = tuple[str, str]
"""Who is to be killed, before which kind of message."""

FIRST, SECOND, THIRD, FOURTH = HOSPITALS


def of_aggregator(*kinds: str) -> list[Order]:
    return [(AGGREGATOR, kind) for kind in kinds]


def start(site: Site, name: str, life: int) -> BaseProcess:
    folder = site.base / name / f"life-{life}"
    folder.mkdir()
    process = CONTEXT.Process(target=live, args=(site.base, folder, site.config(name)))
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def give(site: Site, orders: list[Order]) -> None:
    """Give the next order, and let everybody go on."""
    if orders:
        draft = site.base / "order.draft"
        draft.write_text(" ".join(orders.pop(0)))
        draft.rename(site.base / "order")
    (site.base / "hold").unlink(missing_ok=True)


def run(site: Site, orders: list[Order]) -> Counter[str]:
    """Run the study to its end; who is killed by order starts again. Gives how often each was killed."""
    address = f"tcp://127.0.0.1:{free_port()}"
    site.write_config(AGGREGATOR, listen_address=address)
    for name in HOSPITALS:
        site.write_config(name, aggregator_address=address)
    killed, back, waiting, deadline = Counter[str](), "", list(orders), time.monotonic() + 170
    give(site, waiting)
    processes = {name: start(site, name, 0) for name in (AGGREGATOR, *HOSPITALS)}
    try:
        while not set(exit_codes(processes).values()).isdisjoint((None, -signal.SIGKILL)):
            assert time.monotonic() < deadline, (waiting, processes)
            for name in [name for name, code in exit_codes(processes).items() if code == -signal.SIGKILL]:
                killed[name] += 1
                back = name
                processes[name] = start(site, name, killed[name])
            if back == AGGREGATOR or (back and is_ready(site.base / back / f"life-{killed[back]}")):
                back = ""
                give(site, waiting)
            time.sleep(0.05)
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    errors = "".join(path.read_text() for path in site.base.glob("*/life-*/stderr"))
    assert exit_codes(processes) == dict.fromkeys(processes, 0), errors
    assert killed.total() == len(orders)
    return killed


def exit_codes(processes: dict[str, BaseProcess]) -> dict[str, int | None]:
    return {name: process.exitcode for name, process in processes.items()}


def is_ready(life: Path) -> bool:
    return any(body_type(data) == "Ready" for data in entries(life / "sent"))


def transcript(site: Site) -> list[dict[str, object]]:
    lines = (site.base / AGGREGATOR / "records" / "transcript.jsonl").read_text().splitlines()
    return [json.loads(line)["body"] for line in lines]


def check(site: Site, rounds: int, killed: Counter[str]) -> None:
    """All rounds are summed, and nobody is blamed; records verify, receipts and ledgers of all nodes included."""
    records = [body for body in transcript(site) if body["type"] == "RoundRecord"]
    assert [body["round"] for body in records] == list(range(1, rounds + 1))
    assert not [body for body in transcript(site) if body["type"] in ("Misbehaved", "RoundAbandoned")]
    folder = collect(site)
    report = verify_folder(folder, authority_fingerprint=site.consortium.authority.fingerprint, now=datetime.now(UTC))
    assert report.ok, report.to_json()
    for name in HOSPITALS:
        assert len((folder / "receipts" / f"{name}.jsonl").read_text().splitlines()) == rounds
        ledger = [json.loads(line)["body"] for line in (folder / "ledgers" / f"{name}.jsonl").read_text().splitlines()]
        assert Counter(body["type"] for body in ledger)["LedgerReopened"] == killed[name]
        # An update is kept before it is announced: no round is trained, or booked, twice.
        booked = Counter(body["round"] for body in ledger if body["type"] == "DpSgdEvent")
        assert set(booked.values()) <= {1}
    check_what_went_out(site)


# --- what really went out


def sent(site: Site, name: str) -> Iterator[tuple[Any, bytes]]:
    """What a node has handed to its socket, in all its lives: heads, and whole messages."""
    for life in sorted((site.base / name).glob("life-*")):
        for data in entries(life / "sent"):
            yield peek(data), data


def check_what_went_out(site: Site) -> None:
    """No keys, commitments, seals, chunks or tags come twice, nor the secrets behind them; and every attempt is begun once."""
    fresh, begun, digests = Freshness(), defaultdict[tuple[str, int, int], set[bytes]](set), set[str]()
    agreement = read_agreement((site.base / "study" / "agreement.toml").read_bytes())
    for name in HOSPITALS:
        for head, data in sent(site, name):
            fresh.watch(data, agreement.secure_sum.encrypted)
            if isinstance(head.body, m.RoundKeys):
                begun[name, head.round, head.attempt].add(data)
            if isinstance(head.body, m.UploadDone):
                digests.add(head.body.digest.hex())
    assert fresh.seen == fresh.distinct
    assert all(len(keys) == 1 for keys in begun.values())
    drawn = [secret for path in site.base.glob("*/life-*/drawn") for secret in entries(path)]
    assert len(set(drawn)) == len(drawn) >= 4 * len(begun)
    records = [body for body in transcript(site) if body["type"] == "RoundRecord"]
    assert {survivor["upload_digest"] for body in records for survivor in body["survivors"]} <= digests
    check_tag_seeds(site)


def check_tag_seeds(site: Site) -> None:
    """Every attempt has one tag seed, of which all who know it know the same, and no other attempt has it."""
    seeds = defaultdict[tuple[int, int], set[bytes]](set)
    for path in site.base.glob("*/state/*/state.sqlite"):
        with sqlite3.connect(path) as database:
            rows = database.execute("SELECT round, attempt, note FROM attempts WHERE event = 'used'")
            for number, attempt, seed in rows:
                seeds[number, attempt].add(seed)
    assert all(len(known) == 1 for known in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds)


def what_is_masked(site: Site) -> Callable[[bytes], np.ndarray]:
    """Gives the masked numbers in a chunk: its values, or the coefficients that it encrypts, for who has the study key."""
    agreement = read_agreement((site.base / "study" / "agreement.toml").read_bytes())
    if not agreement.secure_sum.encrypted:
        return lambda data: np.frombuffer(data, dtype="<u4")
    (folder,) = (path.parent for path in (site.base / FIRST / "state").glob("*/state.sqlite"))
    identity = site.consortium.identities[FIRST]
    wrapping = hashlib.sha256(identity.sign(Label.KEEP_STUDY_KEY, bytes.fromhex(site.digest))).digest()
    key = StudyKey(NodeJournal(folder, wrapping).study_key())
    holder = SimpleNamespace(agreement=agreement, ciphers=SharedCiphers())
    return lambda data: decrypted(holder, data, key).reshape(-1)  # type: ignore[arg-type]


def check_differences(site: Site) -> set[tuple[str, int]]:
    """Any two uploads of a node differ by something uniform: no keystream is in both, of whatever vectors they are.

    Gives the nodes and rounds of which there is a chunk in more than one attempt: there the vector is the same.
    """
    masked, chunks = what_is_masked(site), defaultdict[tuple[str, int], dict[tuple[int, int], np.ndarray]](dict)
    for name in HOSPITALS:
        for head, data in sent(site, name):
            if isinstance(head.body, m.UploadChunk):
                chunks[name, head.body.index][head.round, head.attempt] = masked(bytes(m._split(data)[1]))
    twice = set()
    for (name, _), uploads in chunks.items():
        for (one, first), (other, second) in combinations(uploads.items(), 2):
            lower = (first - second).view(np.uint8).reshape(-1, first.itemsize)[:, :4]  # coefficients have 46 bits
            counts = np.bincount(lower.reshape(-1), minlength=256)
            assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 430, (name, one, other)  # p < 1e-10
            if one[0] == other[0]:
                twice.add((name, one[0]))
    return twice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "rounds", "orders"),
    [
        ("layered", 3, of_aggregator("DealKey", "DealtKey", "UploadDone", "Survivors", "SurvivorProof")),
        (
            "homomorphic",
            4,
            [(FIRST, "SealedKey"), (FOURTH, "UploadChunk"), (THIRD, "SurvivorVote"), (SECOND, "Receipt")],
        ),  # the first makes the key
    ],
)
def test_studies_of_ciphertexts_go_on_after_kills(
    tmp_path: Path, protocol: str, rounds: int, orders: list[Order]
) -> None:
    site = make_site(tmp_path, rounds=rounds, protocol=protocol, patience=2.0)
    check(site, rounds, run(site, orders))
    if protocol == "layered":
        assert check_differences(site) >= {(name, 1) for name in HOSPITALS}


@pytest.mark.slow
def test_the_aggregator_killed_in_every_phase(tmp_path: Path) -> None:
    """Twice when all have uploaded: they upload the same again, also those that are killed themselves in between."""
    site = make_site(tmp_path, rounds=3, patience=2.0)
    orders = of_aggregator("RoundOpen", "AttemptOpen", "KeySet", "SeedSet")
    orders += [(AGGREGATOR, "UploadDone"), (FIRST, "Join"), (AGGREGATOR, "UploadDone"), (FOURTH, "Join")]
    orders += of_aggregator("Survivors", "SurvivorProof", "SumChunk", "StudyEnded")
    check(site, 3, run(site, orders))
    assert check_differences(site) >= {(name, 1) for name in HOSPITALS}


@pytest.mark.slow
@pytest.mark.parametrize(
    "orders",
    [
        [(FIRST, "Ready"), (SECOND, "RoundKeys"), ("dealer", "SealedSeeds"), ("other", "UploadChunk")],
        [(THIRD, "UploadDone"), (FOURTH, "SurvivorVote"), (FIRST, "Unmasking"), (SECOND, "Receipt")],
    ],
    ids=["before its upload", "after it"],
)
def test_a_node_killed_in_every_phase(tmp_path: Path, orders: list[Order]) -> None:
    """Each of the four in some, one that deals a tag seed and one that deals none among them."""
    site = make_site(tmp_path, rounds=len(orders) + 1, patience=2.0)
    check(site, len(orders) + 1, run(site, orders))
    check_differences(site)


@pytest.mark.slow
def test_a_node_killed_after_the_votes_although_nobody_can_be_spared(tmp_path: Path) -> None:
    """All four are needed, and the seeds of one are gone: it is waited for, and the same four are summed in a new attempt."""
    site = make_site(tmp_path, rounds=1, patience=1.5, needed=4)
    check(site, 1, run(site, [(FOURTH, "SurvivorVote"), (FIRST, "Unmasking")]))
    assert check_differences(site) == {(name, 1) for name in HOSPITALS}
    summed = [body for body in transcript(site) if body["type"] == "RoundRecord"]
    assert all(len(body["survivors"]) == 4 for body in summed)  # type: ignore[arg-type]
