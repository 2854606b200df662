"""A node refuses what does not check before it trains; whole studies over real sockets, one party a process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from audit.budget import epsilon_concentrated
from audit.records import verify_folder
from keys.errors import BudgetExceeded, ConfigError, KeyFileError, SecGeoError, VerificationFailed
from keys.identity import Identity
from protocols import study_node as machine
from protocols.agreement import agreement_digest, read_agreement
from protocols.encoding import FixedPoint
from protocols.messages import Join, encode
from protocols.sealing import AttemptId
from protocols.study_aggregator import SendTo
from protocols.transcript import StudyOpened, TranscriptWriter
from secgeo import aggregator, hospital_noise, node
from secgeo.aggregator import AggregatorProcess, run_aggregator
from secgeo.budget import Budget
from secgeo.config import AggregatorConfig, NodeConfig, read_config
from secgeo.datasets import LabelledRecords
from secgeo.hospital_noise import private_values
from secgeo.journal import NodeJournal
from secgeo.node import NodeProcess, run_node
from secgeo.noise import NoiseSource
from secgeo.records import write_manifest
from secgeo.site_budget import SiteBudget, Spent
from secgeo.update import Layout
from tests.keys.factory import AGGREGATOR, make_consortium
from tests.secgeo.site import HOSPITALS, Site, make_site

NODE = HOSPITALS[0]


def quiet(_event: str, _fields: dict[str, object]) -> None:
    pass


def start(site: Site, name: str = NODE) -> NodeProcess:
    config = read_config(site.config(name), NodeConfig)
    return NodeProcess(config, site.base / name, Identity.load(site.base / name / "keys", None), quiet)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def test_a_sound_study_is_accepted(site: Site) -> None:
    assert start(site).ledger_path.exists()


@pytest.mark.parametrize(
    "name", ["agreement.toml", "agreement.toml.sig", "roster.json", "roster.json.sig", "authority.pem"]
)
@pytest.mark.parametrize("where", [0.1, 0.5, 0.95])
def test_one_changed_byte_of_a_study_document_is_refused(site: Site, name: str, where: float) -> None:
    path = site.base / "study" / name
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises((VerificationFailed, KeyFileError, ConfigError)):
        start(site)
    assert not (site.base / NODE / "state").exists()


def test_an_agreement_that_is_signed_but_not_pinned_is_refused(site: Site) -> None:
    document = (site.base / "study" / "agreement.toml").read_bytes()
    site.sign_agreement(document.replace(b"rounds = 2", b"rounds = 3"))
    with pytest.raises(VerificationFailed, match="is pinned"):
        start(site)


def test_an_agreement_of_another_authority_is_refused(site: Site) -> None:
    other = make_consortium(HOSPITALS, now=datetime.now(UTC))
    document = (site.base / "study" / "agreement.toml").read_bytes()
    Site(site.base, other, site.digest).sign_agreement(document)
    with pytest.raises(VerificationFailed):
        start(site)


def test_keys_that_the_roster_does_not_name_are_refused(site: Site) -> None:
    with pytest.raises(KeyFileError, match="other keys"):
        NodeProcess(
            read_config(site.config(NODE), NodeConfig),
            site.base / NODE,
            make_consortium(HOSPITALS, now=datetime.now(UTC)).identities[NODE],
            quiet,
        )


def test_an_agreement_weaker_than_the_local_policy_is_refused_with_every_reason(site: Site) -> None:
    site.write_config(NODE, policy={"max_epsilon": 1.0, "min_noise_multiplier": 5.0, "min_cohort": 4})
    with pytest.raises(ConfigError, match=r"epsilon.*noise multiplier.*minimum cohort"):
        start(site)


def test_other_anchors_than_the_agreed_ones_are_refused(site: Site) -> None:
    path = site.base / "study" / "anchors" / "mean.npy"
    np.save(path, np.load(path) + np.float32(1e-3))
    with pytest.raises(ConfigError, match="anchors"):
        start(site)


@pytest.mark.parametrize(
    "change",
    [{"colour": "red"}, {"state": 3}, {"device": "tpu"}, {"data": {"kind": "table"}}, {"policy": {"max_epsilom": 1.0}}],
)
def test_unknown_or_wrong_configuration_keys_are_refused(site: Site, change: dict[str, object]) -> None:
    site.write_config(NODE, **change)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        start(site)


def test_one_study_runs_in_one_process_only(site: Site) -> None:
    running = start(site)
    with pytest.raises(ConfigError, match="another process"):
        start(site)
    running._budget._file.close()
    running._journal.close()
    start(site)


def test_a_ledger_of_other_records_is_not_continued(site: Site) -> None:
    running = start(site)
    running._budget.close()
    running._journal.close()
    records = dict(np.load(site.base / NODE / "records.npz"))
    records["features"][0] += 1
    np.savez(site.base / NODE / "records.npz", **records)
    with pytest.raises(ConfigError, match="opened for other records"):
        start(site)


# --- what is booked, drawn, kept and sent, in which order

HOSPITAL = {"noise_multiplier": 1.0, "max_update_norm": 0.5, "delta": 1e-3, "epsilon_budget": 9.0}


class Seen:
    """What a node does, in order, with what it was done to; `machine` stands in for its part of the secure sum."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, object]] = []
        for place, name in (
            (Budget, "book"),
            (NoiseSource, "uniform"),
            (NoiseSource, "gaussian"),
            (hospital_noise, "discrete_gaussian"),
            (NodeJournal, "keep_update"),
        ):
            self._watch(monkeypatch, place, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> None:
        inner = getattr(place, name)

        def watched(*arguments: object, **named: object) -> object:
            self.calls.append((name, arguments))
            return inner(*arguments, **named)

        monkeypatch.setattr(place, name, watched)

    def instead_of(self, running: NodeProcess) -> None:
        running._machine = SimpleNamespace(submit=self.submit, decline=self.decline)  # type: ignore[assignment]

    def submit(self, round_number: int, vector: np.ndarray) -> list[machine.Output]:
        self.calls.append(("submit", vector.copy()))
        return []

    def decline(self, reason: str) -> list[machine.Output]:
        self.calls.append(("decline", reason))
        return [machine.Send(b"declined")]

    @property
    def order(self) -> list[str]:
        return [name for name, _ in groupby(name for name, _ in self.calls)]

    @property
    def submitted(self) -> np.ndarray:
        (vector,) = (value for name, value in self.calls if name == "submit")
        assert isinstance(vector, np.ndarray)
        return vector


def after_first_round(site: Site, seen: Seen) -> NodeProcess:
    """A node that has applied the first sum, which is public: its next round is private."""
    running = start(site)
    seen.instead_of(running)
    running._train(SimpleNamespace(), 1)  # type: ignore[arg-type]
    assert seen.order == ["book", "keep_update", "submit"], "the first round draws nothing"
    total = len(HOSPITALS) * seen.submitted
    running._apply(machine.Summed(1, total, HOSPITALS, b"the record of round 1"))
    seen.calls.clear()
    return running


def end(running: NodeProcess) -> None:
    for part in (running._budget, running._site, running._journal):
        part.close()


def test_a_round_in_which_we_have_voted_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is booked or drawn: with another update the node could not take part anyway."""
    site, seen = make_site(tmp_path), Seen(monkeypatch)
    running = after_first_round(site, seen)
    running._journal.record(2, 1, "voted", b"ballot")
    with pytest.raises(ConfigError, match="we have voted in round 2"):
        running._train(SimpleNamespace(), 2)  # type: ignore[arg-type]
    assert seen.order == []
    end(running)


@pytest.mark.parametrize("hospital", [None, HOSPITAL], ids=["dp-sgd alone", "with noise for the hospital"])
def test_a_round_is_booked_before_anything_is_drawn_and_kept_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hospital: dict[str, float] | None
) -> None:
    site, seen = make_site(tmp_path, hospital=hospital), Seen(monkeypatch)
    running = after_first_round(site, seen)
    gaussian, booked = NoiseSource.gaussian, []

    def drawing(*arguments: object, **named: object) -> object:
        booked.append(b'"round":2' in running.ledger_path.read_bytes())
        return gaussian(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(NoiseSource, "gaussian", drawing)
    running._train(SimpleNamespace(), 2)  # type: ignore[arg-type]
    drawn = {"uniform", "gaussian"}
    order = [name for name, _ in groupby("drawn" if name in drawn else name for name in seen.order)]
    shared = ["discrete_gaussian"] if hospital else []
    assert order == ["book", "drawn", *shared, "keep_update", "submit"]
    assert {name for name, _ in seen.calls} >= drawn
    assert booked
    assert all(booked), "the event was on disk"


@pytest.mark.parametrize("hospital", [None, HOSPITAL], ids=["dp-sgd alone", "with noise for the hospital"])
def test_nothing_is_drawn_for_a_round_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hospital: dict[str, float] | None
) -> None:
    site, seen, sent = make_site(tmp_path, hospital=hospital), Seen(monkeypatch), []
    running = after_first_round(site, seen)
    running._budget._max_epsilon = 1e-9
    with pytest.raises(BudgetExceeded):
        running._train(SimpleNamespace(send=sent.append), 2)  # type: ignore[arg-type]
    assert seen.order == ["book", "decline"]
    assert sent == [b"declined"]
    assert running._journal.update(2) is None


def test_a_restart_sends_the_very_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shares of noise on one update would average; the update without its noise is never on disk."""
    site, seen = make_site(tmp_path, hospital=HOSPITAL), Seen(monkeypatch)
    running = after_first_round(site, seen)
    running._train(SimpleNamespace(), 2)  # type: ignore[arg-type]
    first, share = seen.submitted, running._study.agreement.noise_share
    assert share is not None
    noised = first[private_values(running._layout)]
    assert np.std(noised) == pytest.approx(share.std, rel=0.15)
    np.testing.assert_array_equal(np.rint(noised / share.step) * share.step, noised)
    end(running)
    again = start(site)
    seen.instead_of(again)
    seen.calls.clear()
    again._train(SimpleNamespace(), 2)  # type: ignore[arg-type]
    assert seen.order == ["submit"], "nothing is booked or drawn again"
    np.testing.assert_array_equal(seen.submitted, first)
    kept = [arguments for name, arguments in seen.calls if name == "keep_update"]
    assert not kept


def test_an_event_that_a_crash_kept_from_the_ledger_is_linked_as_it_would_have_been(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    running = after_first_round(site, seen)
    link = running._budget.link
    monkeypatch.setattr(running._budget._file, "append", lambda _: (_ for _ in ()).throw(ConfigError("killed")))
    with pytest.raises(ConfigError, match="killed"):
        running._train(SimpleNamespace(), 2)  # type: ignore[arg-type]
    assert seen.order == ["book"]
    end(running)
    again = start(site)
    bodies = [json.loads(line)["body"] for line in again.ledger_path.read_text().splitlines()]
    assert [(b["round"], b["transcript_link"]) for b in bodies if b["type"] == "DpSgdEvent"][1:] == [(2, link)]


@pytest.mark.parametrize("books", ["books are kept", "books are lost"])
def test_a_node_whose_ledger_is_lost_takes_no_part(site: Site, monkeypatch: pytest.MonkeyPatch, books: str) -> None:
    """Nor if the books of the site are lost with it: the journal knows that there were sums."""
    running = after_first_round(site, Seen(monkeypatch))
    running._train(SimpleNamespace(), 2)  # type: ignore[arg-type]
    end(running)
    running.ledger_path.unlink()
    if books == "books are lost":
        for path in running.ledger_path.parent.parent.glob("budget.sqlite*"):
            path.unlink()
    with pytest.raises(ConfigError, match=r"ledger.*backup") as refused:
        start(site)
    assert refused.value.exit_code == 3


def test_what_ended_a_study_is_told_although_the_disk_is_full_and_everything_is_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spent:
        def __init__(self, *_: object, **__: object) -> None:
            raise BudgetExceeded("the budget is spent")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    running = start(site)
    with monkeypatch.context() as patched:
        patched.setattr(node, "NodeEndpoint", Spent)
        patched.setattr(os, "write", full)
        with pytest.raises(BudgetExceeded, match="the budget is spent"):
            running.run()
    again = start(site)  # ledger and journal are free again
    with monkeypatch.context() as patched:
        patched.setattr(node, "NodeEndpoint", Spent)
        patched.setattr(again._ciphers, "close", full)
        with pytest.raises(BudgetExceeded, match="the budget is spent"):
            again.run()
    last = json.loads(again.ledger_path.read_text().splitlines()[-1])
    assert last["body"]["type"] == "LedgerClosed"


def test_a_study_that_ends_well_says_if_its_ledger_could_not_be_closed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start(site)
    monkeypatch.setattr(running, "_take_part", lambda: None)
    monkeypatch.setattr(running._budget._file, "append", lambda _: (_ for _ in ()).throw(ConfigError("full")))
    with pytest.raises(ConfigError, match="full"):
        running.run()
    start(site)


def test_refusals_come_before_torch_is_even_imported(site: Site) -> None:
    document = site.base / "study" / "agreement.toml"
    document.write_bytes(document.read_bytes() + b"\n")
    code = (
        "import sys, pathlib\n"
        "from secgeo.config import NodeConfig, read_config\n"
        "from secgeo.node import run_node\n"
        f"base = pathlib.Path({str(site.base / NODE)!r})\n"
        "try:\n"
        "    run_node(read_config(base / 'config.toml', NodeConfig), base, None, lambda *_: None)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["VerificationFailed", "False"]


# --- whole studies over sockets


def spawn(site: Site, role: str, name: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, *options, "-m", "secgeo.cli", role, str(site.config(name)), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    errors = (site.base / name / "stderr").open("w")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def wait_for(process: subprocess.Popen[str], event: str) -> dict[str, object]:
    for line in process.stdout or ():
        found: dict[str, object] = json.loads(line)
        if found["event"] == event:
            return found
    raise AssertionError(f"the process ended without {event!r}")


def run_study(site: Site, victim: str | None = None) -> dict[str, int]:
    """Run aggregator and nodes; kill -9 `victim` after its first round. Gives the exit codes."""
    aggregator = spawn(site, "aggregator", AGGREGATOR, "-X", "importtime")
    processes = {AGGREGATOR: aggregator}
    try:
        address = wait_for(aggregator, "listening")["address"]
        for name in HOSPITALS:
            site.write_config(name, aggregator_address=address)
            processes[name] = spawn(site, "node", name)
        if victim is not None:
            wait_for(processes[victim], "round")
            processes[victim].kill()
        deadline = time.monotonic() + 150
        codes = {}
        for name, process in reversed(processes.items()):
            if name == AGGREGATOR and victim is not None:
                process.terminate()
            process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            codes[name] = process.returncode
        return codes
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def collect(site: Site) -> Path:
    records = site.base / AGGREGATOR / "records"
    for kind in ("ledger", "receipts"):
        folder = records / ("ledgers" if kind == "ledger" else kind)
        folder.mkdir()
        for name in HOSPITALS:
            for path in (site.base / name / "state").glob(f"*/{kind}.jsonl"):
                (folder / f"{name}.jsonl").write_bytes(path.read_bytes())
    write_manifest(records, site.consortium.authority.sign)
    return records


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_a_study_over_sockets_without_torch_at_the_aggregator(tmp_path: Path, unit: str) -> None:
    site = make_site(tmp_path, unit=unit, records_per_patient=3 if unit == "patient" else 0)
    codes = run_study(site)
    assert codes == dict.fromkeys((AGGREGATOR, *HOSPITALS), 0)
    imported = (site.base / AGGREGATOR / "stderr").read_text()
    assert "msgspec" in imported
    for module in ("torch", "opacus", "sklearn"):
        assert f" {module}\n" not in imported
        assert f" {module}." not in imported
    records = collect(site)
    report = verify_folder(records, authority_fingerprint=site.consortium.authority.fingerprint, now=datetime.now(UTC))
    assert report.ok, report.to_json()
    assert {event.privacy_unit for events, _ in report.ledgers.values() for event in events} == {unit}


def test_a_study_whose_hospitals_share_out_noise(tmp_path: Path) -> None:
    hospital = {"noise_multiplier": 1.0, "max_update_norm": 0.5, "delta": 1e-3, "epsilon_budget": 9.0}
    site = make_site(tmp_path, hospital=hospital)
    assert run_study(site) == dict.fromkeys((AGGREGATOR, *HOSPITALS), 0)
    records = collect(site)
    report = verify_folder(records, authority_fingerprint=site.consortium.authority.fingerprint, now=datetime.now(UTC))
    assert report.ok, report.to_json()
    agreement = read_agreement((site.base / "study" / "agreement.toml").read_bytes())
    assert agreement.noise_share is not None
    expected = epsilon_concentrated(agreement.noise_share.concentrated, 1e-3)
    for claimed in report.hospitals.values():
        assert expected == claimed["google_rdp"] <= claimed["claimed"] <= 9.0
    layout, point = Layout.from_agreement(agreement), FixedPoint.from_agreement(agreement)
    private = np.concatenate([np.arange(segment.start, segment.weight_at) for segment in layout.segments])
    first, second = (
        point.decode(np.fromfile(records / "sums" / f"round-000{number}.u32", dtype="<u4"), len(HOSPITALS))[private]
        for number in (1, 2)
    )
    assert not first.any(), "the first sum is public, and has no noise"
    assert np.std(second) == pytest.approx(agreement.noise_share.std * np.sqrt(len(HOSPITALS)), rel=0.15)


def test_a_policy_may_ask_for_noise_that_hides_the_hospital(tmp_path: Path) -> None:
    for number, (hospital, limit, holds) in enumerate([(None, 5.0, False), (9.0, 5.0, False), (4.0, 5.0, True)]):
        agreed = hospital and {
            "noise_multiplier": 1.0, "max_update_norm": 0.5, "delta": 1e-3, "epsilon_budget": hospital
        }  # fmt: skip
        site = make_site(tmp_path / str(number), hospital=agreed)
        policy = {"max_hospital_epsilon": limit, "min_colluders_tolerated": 0}
        site.write_config(NODE, policy=policy)
        if holds:
            start(site)
        else:
            with pytest.raises(ConfigError, match=r"epsilon of the whole hospital is .*at most 5"):
                start(site)


def test_a_node_killed_in_mid_study_does_not_stop_the_others(tmp_path: Path) -> None:
    site = make_site(tmp_path, rounds=3)
    victim = HOSPITALS[3]
    codes = run_study(site, victim)  # the aggregator waits for the victim until the operator says that it need not
    assert {name: code for name, code in codes.items() if name != victim} == dict.fromkeys(
        (AGGREGATOR, *HOSPITALS[:3]), 0
    )
    transcript = (site.base / AGGREGATOR / "records" / "transcript.jsonl").read_text().splitlines()
    bodies = [json.loads(line)["body"] for line in transcript]
    last = [body for body in bodies if body["type"] == "RoundRecord"][-1]
    assert [survivor["node_id"] for survivor in last["survivors"]] == list(HOSPITALS[:3])


def test_a_node_whose_records_are_spent_leaves_and_the_others_go_on(site: Site) -> None:
    """An earlier study of this site has spent nearly all that its policy allows on one of these records."""
    poor = HOSPITALS[3]
    features = np.load(site.base / poor / "records.npz")["features"]
    (site.base / poor / "state").mkdir()
    earlier = SiteBudget(
        site.base / poor / "state" / "budget.sqlite",
        "earlier",
        LabelledRecords(features[7:8], np.zeros(1, np.int64)).identities,
    )
    earlier.book(
        "an earlier study", 1, Spent(sample_rate=0.1, noise_multiplier=0.8, steps=200, delta=1e-3), lambda _: None
    )
    earlier.close()
    codes = run_study(site)
    assert codes == dict.fromkeys((AGGREGATOR, *HOSPITALS[:3]), 0) | {poor: BudgetExceeded.exit_code}
    assert "all studies on these records" in (site.base / poor / "stderr").read_text()
    records = collect(site)
    report = verify_folder(records, authority_fingerprint=site.consortium.authority.fingerprint, now=datetime.now(UTC))
    assert report.ok, report.to_json()
    assert [sum(event.steps for event in events) > 0 for events, _ in report.ledgers.values()] == [True] * 3 + [False]


def test_the_verifier_never_imports_torch(site: Site) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "secgeo.cli", "verify", str(site.base / "study"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 8
    assert not json.loads(done.stdout)["ok"]
    assert " torch\n" not in done.stderr
    assert " torch." not in done.stderr


def test_the_records_of_another_study_are_left_as_they_are(site: Site) -> None:
    """The folder of the configuration holds an archive: nothing is written into it before that is noticed."""
    site.write_config(AGGREGATOR)
    records = site.base / AGGREGATOR / "records"
    records.mkdir(parents=True)
    other = StudyOpened("other", "0" * 64, "0" * 64, 1, 1)
    (records / "transcript.jsonl").write_bytes(TranscriptWriter(site.consortium.identities[AGGREGATOR]).append(other))
    (records / "agreement.toml").write_bytes(b"theirs")
    before = {path.name: path.read_bytes() for path in records.iterdir()}
    with pytest.raises(ConfigError, match="another study"):
        run_aggregator(
            read_config(site.config(AGGREGATOR), AggregatorConfig), site.base / AGGREGATOR, None, lambda *_: None
        )
    assert {path.name: path.read_bytes() for path in records.iterdir() if path.is_file()} == before


def test_who_asks_and_does_not_read_is_given_up_before_it_fills_the_memory(site: Site) -> None:
    site.write_config(AGGREGATOR)
    identity = site.consortium.identities[AGGREGATOR]
    config = read_config(site.config(AGGREGATOR), AggregatorConfig)
    process = AggregatorProcess(config, site.base / AGGREGATOR, identity, lambda *_: None)
    process._machine.start(0.0)
    join = encode(site.consortium.identities[NODE], AttemptId(bytes.fromhex(site.digest), 0, 0), Join(1))
    process._machine.receive(NODE, join, 0.0)
    endpoint = SimpleNamespace(connected={NODE})
    for _ in range(1000):
        process._carry(endpoint, [SendTo(NODE, bytes(1 << 20))])  # type: ignore[arg-type]
        assert sum(map(len, process._outboxes.get(NODE, ()))) <= process._outbox_limit_bytes
    assert process._outbox_limit_bytes < 100 << 20
    assert process._machine.leave(NODE, 0.0) == []  # it has left already


def test_what_a_long_step_of_the_aggregator_takes_counts_against_nobodys_deadline(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop itself: a message takes a minute, and the deadlines that are looked at next know of a second of it."""
    site.write_config(AGGREGATOR)
    config = read_config(site.config(AGGREGATOR), AggregatorConfig)
    identity = site.consortium.identities[AGGREGATOR]
    process = AggregatorProcess(config, site.base / AGGREGATOR, identity, lambda *_: None)
    source, looked = [0.0], list[float]()
    process._clock = aggregator.WorkClock(lambda: source[0])
    messages = [(NODE, b"long"), None]

    def receive(*_: object) -> list[object]:
        source[0] += 60.0
        return []

    def tick(now: float) -> list[object]:
        looked.append(now)
        machine.ended = len(looked) == 2
        return []

    machine = SimpleNamespace(ended=False, start=lambda now: [], receive=receive, tick=tick)
    endpoint = SimpleNamespace(
        address="here", refused_handshakes=0, connected=set(), receive=lambda _: messages.pop(0), send=lambda *_: True
    )
    process._machine = machine  # type: ignore[assignment]
    monkeypatch.setattr(aggregator, "AggregatorEndpoint", lambda *_, **__: contextlib.nullcontext(endpoint))
    monkeypatch.setattr(aggregator.signal, "signal", lambda *_: None)
    process.run()
    assert looked == [1.0, 1.0]


def test_a_node_that_cannot_reach_the_aggregator_says_so(site: Site) -> None:
    document = (
        (site.base / "study" / "agreement.toml").read_bytes().replace(b"join_seconds = 30.0", b"join_seconds = 2.0")
    )
    read_agreement(document)
    site.sign_agreement(document)
    changed = Site(site.base, site.consortium, agreement_digest(document).hex())
    changed.write_config(NODE)
    with pytest.raises(SecGeoError, match="unreachable"):
        run_node(read_config(changed.config(NODE), NodeConfig), site.base / NODE, None, quiet)
