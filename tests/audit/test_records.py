"""Offline verification of a folder: an honest one passes; one changed byte, or one signed lie, is found and named."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from scipy import optimize, special

from audit import budget, records
from audit.records import VerificationReport, verify_folder
from keys.errors import ConfigError, VerificationFailed
from keys.labels import Label
from keys.roster import revoke
from keys.signed import sign_document
from protocols import ledger as led
from protocols import transcript as t
from protocols.chain import GENESIS
from secgeo.accountant import hospital_epsilon
from tests.audit.factory import NOW, Study, make_study
from tests.audit.tamper import byte_changes, line_changes

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(count=4, rounds=3)


@pytest.fixture(scope="module")
def honest(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study.write(tmp_path_factory.mktemp("honest") / "study")


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "study"))


def verify(study: Study, folder: Path, **changes: object) -> VerificationReport:
    settings = {"authority_fingerprint": study.consortium.authority.fingerprint, "now": NOW} | changes
    return verify_folder(folder, **settings)  # type: ignore[arg-type]


def failed(report: VerificationReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.ok}


def test_an_honest_folder_passes(study: Study, honest: Path) -> None:
    report = verify(study, honest)
    assert report.ok, failed(report)
    assert report.warnings == []
    assert {check.name for check in report.checks} >= {
        "authority.pem",
        "manifest.json",
        "agreement.toml",
        "transcript.jsonl",
        "sums",
        *(f"ledgers/{name}.jsonl" for name in study.names),
    }
    epsilon = report.epsilons[study.names[0]]
    assert epsilon["claimed_opacus_rdp"] == pytest.approx(epsilon["rdp"], rel=1e-3)
    assert 0 < epsilon["google_pld"] < epsilon["rdp"]
    assert report.unit == "record"
    text = json.dumps(report.to_json())
    assert json.loads(text)["ok"] is True


def test_without_a_pin_it_says_that_only_consistency_was_shown(study: Study, honest: Path) -> None:
    report = verify(study, honest, authority_fingerprint=None)
    assert report.ok
    assert "agrees with itself" in report.warnings[0]


def test_another_authority_is_refused(study: Study, tmp_path: Path) -> None:
    other = make_study(count=4, rounds=3).write(tmp_path / "other")
    assert "authority.pem" in failed(verify(study, other))
    assert verify(study, other, authority_fingerprint=None).ok


def test_verification_never_imports_torch(honest: Path) -> None:
    code = (
        "import sys; from datetime import datetime; from pathlib import Path; from audit.records import verify_folder\n"
        "report = verify_folder(Path(sys.argv[1]), authority_fingerprint=None, now=datetime.fromisoformat(sys.argv[2]))\n"
        "assert report.ok, report\n"
        "print(*[m for m in ('torch', 'opacus', 'zmq', 'tensorflow', 'jax') if m in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(honest), NOW.isoformat()], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""
    assert run.stderr == ""


# --- one changed byte


SIGNED = [
    "agreement.toml",
    "agreement.toml.sig",
    "authority.pem",
    "roster.json",
    "roster.json.sig",
    "transcript.jsonl",
    "sums/round-0002.u32",
    "ledgers/hospital-01.jsonl",
]
STEMS = {"agreement.toml.sig": "agreement", "roster.json": "roster", "roster.json.sig": "roster"}


@pytest.mark.parametrize("name", [*SIGNED, "metrics.json", "manifest.json", "manifest.json.sig"])
def test_one_changed_byte_is_found_and_its_file_is_named(study: Study, folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    chosen = sorted({0, len(data) - 1, *random.Random(name).sample(range(len(data)), 4)})  # noqa: S311
    for position, changed in byte_changes(data, chosen):
        path.write_bytes(changed)
        report = verify(study, folder)
        assert not report.ok, f"byte {position} of {name} can be changed"
        assert any(name.removesuffix(".sig") in check + detail for check, detail in failed(report).items())


@pytest.mark.parametrize("name", SIGNED)
def test_it_is_found_also_where_the_manifest_was_signed_after_the_change(study: Study, folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    chosen = sorted({0, len(data) - 1, *random.Random(name).sample(range(len(data)), 2)})  # noqa: S311
    for position, changed in byte_changes(data, chosen):
        path.write_bytes(changed)
        study.seal(folder)
        report = verify(study, folder)
        assert not report.ok, f"byte {position} of {name} can be changed"
        assert "manifest.json" not in failed(report)
        assert any(STEMS.get(name, name) in check + detail for check, detail in failed(report).items())


@pytest.mark.parametrize("name", ["transcript.jsonl", "ledgers/hospital-01.jsonl"])
def test_lines_deleted_doubled_swapped_cut_or_added_are_found(study: Study, folder: Path, name: str) -> None:
    path = folder / name
    for what, changed in line_changes(path.read_bytes()):
        path.write_bytes(changed)
        study.seal(folder)
        assert name in failed(verify(study, folder)), what


@pytest.mark.parametrize("name", [*SIGNED, "manifest.json", "manifest.json.sig"])
@pytest.mark.parametrize("content", [None, b"", b"\0" * 100, b"[" * 200_000, b"\xff" * 1000, b"{}", b"null", b"\n"])
def test_a_file_that_is_missing_or_garbage_is_a_failed_check(
    study: Study, folder: Path, name: str, content: bytes | None
) -> None:
    path = folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if not name.startswith("manifest"):
        study.seal(folder)
    report = verify(study, folder)
    assert not report.ok
    assert not verify(study, folder, authority_fingerprint=None).ok
    assert any(name.split(".")[0] in check + detail for check, detail in failed(report).items())


def test_files_added_to_the_folder_are_found(study: Study, folder: Path) -> None:
    (folder / "notes.txt").write_bytes(b"x")
    assert "notes.txt was added" in failed(verify(study, folder))["manifest.json"]
    (folder / "notes.txt").unlink()
    (folder / "metrics.json").unlink()
    assert "metrics.json is missing" in failed(verify(study, folder))["manifest.json"]
    (folder / "sums" / "round-0009.u32").write_bytes(b"x")
    (folder / "ledgers" / "stranger.jsonl").write_bytes(b"x")
    study.seal(folder)
    found = failed(verify(study, folder))
    assert "round-0009" in found["sums"]
    assert "stranger" in found["ledgers"]


@pytest.mark.parametrize("kind", ["link", "folder link", "pipe"])
def test_links_and_special_files_are_refused_before_anything_is_opened(study: Study, folder: Path, kind: str) -> None:
    target = folder / "transcript.jsonl"
    kept = folder.parent / "kept"
    if kind == "folder link":
        (folder / "ledgers").rename(kept)
        (folder / "ledgers").symlink_to(kept)
    else:
        target.rename(kept)
        target.symlink_to(kept) if kind == "link" else os.mkfifo(target)
    report = verify(study, folder)
    assert list(failed(report)) == ["folder"]
    assert len(report.checks) == 1


def test_a_folder_that_is_none_is_a_failed_check(study: Study, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "file", "empty"):
        assert not verify(study, tmp_path / name).ok


# --- signed lies


def test_a_ledger_of_another_study_cannot_be_replayed(study: Study, folder: Path) -> None:
    second = study.with_sections(study={"id": "second"})
    name = study.names[0]
    (folder / "ledgers" / f"{name}.jsonl").write_bytes(second.ledger(name, second.transcript()))
    study.seal(folder)
    assert "another node or study" in failed(verify(study, folder))[f"ledgers/{name}.jsonl"]


def test_a_transcript_of_another_study_cannot_be_replayed(study: Study, folder: Path) -> None:
    second = study.with_sections(study={"id": "second"})
    (folder / "transcript.jsonl").write_bytes(second.transcript())
    study.seal(folder)
    assert "another agreement" in failed(verify(study, folder))["transcript.jsonl"]


def test_a_ledger_cannot_be_dropped(study: Study, folder: Path) -> None:
    name = study.names[1]
    (folder / "ledgers" / f"{name}.jsonl").unlink()
    study.seal(folder)
    assert f"ledgers/{name}.jsonl" in failed(verify(study, folder))


def test_only_a_member_that_took_part_in_no_round_may_have_no_ledger(study: Study, folder: Path) -> None:
    here, absent = study.names[:3], study.names[3]

    def change(bodies: list) -> None:
        for index in (1, 3, 5):
            bodies[index] = study.round_record(bodies[index].round, survivors=here, cohort=here)

    transcript = study.transcript(change)
    study.put(folder, transcript, {name: study.ledger(name, transcript) for name in here})
    (folder / "ledgers" / f"{absent}.jsonl").unlink()
    study.seal(folder)
    report = verify(study, folder)
    assert report.ok, failed(report)
    assert any(absent in warning for warning in report.warnings)


def claim(factor: float) -> Callable[[list], None]:
    def change(bodies: list) -> None:
        bodies[-2] = replace(bodies[-2], epsilon=bodies[-2].epsilon * factor)

    return change


def lie_in_ledger(study: Study, folder: Path, change: Callable[[list], object]) -> str:
    name = study.names[0]
    transcript = (folder / "transcript.jsonl").read_bytes()
    study.put(folder, transcript, {name: study.ledger(name, transcript, change)})
    found = failed(verify(study, folder))
    assert set(found) <= {f"ledgers/{name}.jsonl"}
    return found.get(f"ledgers/{name}.jsonl", "")


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.8])
def test_an_epsilon_claimed_too_low_is_found(study: Study, folder: Path, factor: float) -> None:
    assert "claims epsilon" in lie_in_ledger(study, folder, claim(factor))


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_an_epsilon_claimed_too_high_harms_nobody(study: Study, folder: Path, factor: float) -> None:
    assert lie_in_ledger(study, folder, claim(factor)) == ""


LIES = {
    "less noise than agreed": lambda b: b.__setitem__(2, replace(b[2], noise_multiplier=0.5)),
    "an event missing": lambda b: b.__setitem__(
        slice(3, None), [replace(b[4], steps_total=2, epsilon=9.9), led.LedgerClosed(2, 2, GENESIS)]
    ),
    "no private steps where they are due": lambda b: b.__setitem__(
        slice(2, None), [replace(b[2], steps=0), b[3], replace(b[4], steps_total=2), led.LedgerClosed(3, 2, GENESIS)]
    ),
    "private steps before there is a consensus": lambda b: b.__setitem__(
        slice(1, None), [replace(b[1], steps=2), *b[2:4], replace(b[4], steps_total=6), led.LedgerClosed(3, 6, GENESIS)]
    ),
    "an event that is not linked": lambda b: b.__setitem__(3, replace(b[3], transcript_link=GENESIS)),
    "an event linked to an older record": lambda b: b.__setitem__(
        3, replace(b[3], transcript_link=b[2].transcript_link)
    ),
    "an event linked to a record that is not there": lambda b: b.__setitem__(
        3, replace(b[3], transcript_link="1" * 64)
    ),
    "not closed": lambda b: b.pop(),
    "noise of a generator that nobody knows": lambda b: b.__setitem__(2, replace(b[2], rng_kind="mersenne-twister")),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_node_that_signs_a_lie_is_named(study: Study, folder: Path, lie: str) -> None:
    assert lie_in_ledger(study, folder, LIES[lie])


def test_a_node_that_dropped_out_may_lag_behind_but_links_to_real_records_only(study: Study, folder: Path) -> None:
    lost = study.names[3]
    transcript = study.transcript(lambda b: b.__setitem__(5, study.round_record(3, survivors=study.names[:3])))
    ledgers = {name: study.ledger(name, transcript) for name in study.names}
    study.put(folder, transcript, ledgers)
    assert verify(study, folder).ok
    for link, good in ((GENESIS, True), ("1" * 64, False)):

        def change(bodies: list, link: str = link) -> None:
            bodies[3] = replace(bodies[3], transcript_link=link)

        study.put(folder, transcript, {lost: study.ledger(lost, transcript, change)})
        assert verify(study, folder).ok is good


def without(number: int, study: Study) -> Callable[[list], None]:
    """A ledger that leaves out the event of a round, and counts and claims as if there had been none."""

    def change(bodies: list) -> None:
        bodies[:] = [body for body in bodies if getattr(body, "round", 0) != number]
        events = [body for body in bodies if isinstance(body, led.DpSgdEvent)]
        steps = sum(event.steps for event in events)
        epsilon = budget.epsilon_rdp(events, study.agreement.privacy.delta)
        bodies[-2] = replace(bodies[-2], steps_total=steps, epsilon=epsilon)
        bodies[-1] = replace(bodies[-1], rounds=len(events), steps_total=steps)

    return change


@pytest.mark.parametrize("round_number", [2, 3])
def test_a_node_that_trained_and_was_dropped_cannot_leave_the_event_out(
    study: Study, folder: Path, round_number: int
) -> None:
    """A node is in the cohort only after it said that it was ready, that is, after it has trained."""
    lost = study.names[3]

    def drop(bodies: list) -> None:
        bodies[2 * round_number - 1] = study.round_record(round_number, survivors=study.names[:3])

    transcript = study.transcript(drop)
    ledgers = {name: study.ledger(name, transcript) for name in study.names}
    study.put(folder, transcript, ledgers | {lost: study.ledger(lost, transcript, without(round_number, study))})
    found = failed(verify(study, folder))
    assert set(found) == {f"ledgers/{lost}.jsonl"}
    assert f"the record of round {round_number} names the node" in found[f"ledgers/{lost}.jsonl"]


def test_a_round_whose_cohort_a_node_was_not_in_needs_no_event(study: Study, folder: Path) -> None:
    away, here = study.names[3], study.names[:3]
    transcript = study.transcript(
        lambda bodies: bodies.__setitem__(3, study.round_record(2, survivors=here, cohort=here))
    )
    ledgers = {name: study.ledger(name, transcript) for name in study.names}
    study.put(folder, transcript, ledgers | {away: study.ledger(away, transcript, without(2, study))})
    assert failed(verify(study, folder)) == {}


def test_a_ledger_without_an_end_says_what_that_may_mean(study: Study, folder: Path) -> None:
    detail = lie_in_ledger(study, folder, lambda bodies: bodies.pop())
    assert "no closing line" in detail
    assert "machine died" in detail


# --- many claims


def claim_after_every_round(
    study: Study, factor: Callable[[float, int], float] = lambda epsilon, _: epsilon
) -> Callable:
    def change(bodies: list) -> None:
        told, steps, last = [], 0, bodies[-2]
        for body in bodies[:-2]:
            told.append(body)
            if isinstance(body, led.DpSgdEvent):
                steps += body.steps
                events = [body for body in told if isinstance(body, led.DpSgdEvent)]
                epsilon = budget.epsilon_rdp(events, study.agreement.privacy.delta)
                told.append(replace(last, steps_total=steps, epsilon=factor(epsilon, steps)))
        bodies[:] = [*told, bodies[-1]]

    return change


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of steps of every PLD that the verifier asks for, each of them answered at once."""
    steps: list[int] = []

    def pld(events: Sequence[budget.Steps], delta: float) -> float:
        steps.append(sum(event.steps for event in events))
        return 0.5 * budget.epsilon_rdp(events, delta)

    monkeypatch.setattr("audit.records.epsilon_pld", pld)
    return steps


def write_claims(study: Study, folder: Path, change: Callable) -> VerificationReport:
    study.write(folder)
    transcript = (folder / "transcript.jsonl").read_bytes()
    study.put(folder, transcript, {name: study.ledger(name, transcript, change) for name in study.names})
    return verify(study, folder)


def test_only_the_last_of_many_honest_claims_costs_a_pld(tmp_path: Path, asked: list[int]) -> None:
    study = make_study(count=3, rounds=20).with_sections(privacy={"epsilon_budget": 50.0})
    report = write_claims(study, tmp_path / "study", claim_after_every_round(study))
    assert report.ok, failed(report)
    assert asked == [38] * 3


def test_claims_below_rdp_cost_a_pld_only_where_that_of_more_steps_does_not_tell(
    tmp_path: Path, asked: list[int]
) -> None:
    study = make_study(count=3, rounds=20).with_sections(privacy={"epsilon_budget": 50.0})
    report = write_claims(study, tmp_path / "study", claim_after_every_round(study, lambda epsilon, _: 0.9 * epsilon))
    assert report.ok, failed(report)
    assert 3 <= len(asked) <= 30


def test_claims_that_would_cost_hours_are_refused(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("audit.records.MAXIMUM_PLDS", 5)
    study = make_study(count=3, rounds=20).with_sections(privacy={"epsilon_budget": 50.0})
    report = write_claims(study, tmp_path / "study", claim_after_every_round(study, lambda epsilon, _: 0.5 * epsilon))
    assert all("more than 5 claims" in detail for detail in failed(report).values())
    assert len(failed(report)) == 3


def test_more_claims_than_a_node_makes_are_refused(study: Study, folder: Path) -> None:
    """One for every round that was summed, and one whenever it stops."""
    rounds = study.agreement.study.rounds
    for count, good in ((rounds, True), (rounds + 1, False)):

        def change(bodies: list, count: int = count) -> None:
            bodies[-1:-1] = count * [bodies[-2]]

        detail = lie_in_ledger(study, folder, change)
        assert (detail == "") is good
        assert good or "more claims than a node makes" in detail


def test_a_claim_is_compared_with_the_smaller_bound(
    study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over millions of steps PLD's discretisation is looser than RDP: honest nodes claim less than it."""
    monkeypatch.setattr("audit.records.epsilon_pld", lambda events, delta: 1.1 * budget.epsilon_rdp(events, delta))
    assert failed(verify(study, folder)) == {}
    assert lie_in_ledger(study, folder, claim(1.0)) == ""
    assert "(RDP)" in lie_in_ledger(study, folder, claim(1 - 2e-3))


def exact_epsilon(noise: float, steps: int, delta: float) -> float:
    """Of the Gaussian mechanism itself (Balle and Wang 2018, theorem 8)."""
    shift = math.sqrt(steps) / noise

    def excess(epsilon: float) -> float:
        above = special.log_ndtr(shift / 2 - epsilon / shift)
        below = epsilon + special.log_ndtr(-shift / 2 - epsilon / shift)
        return float(above + math.log(-math.expm1(min(below - above, -1e-300))) - math.log(delta))

    return float(optimize.brentq(excess, 1e-9, 400.0, xtol=1e-12))


def test_a_claim_that_pld_would_accept_at_a_tiny_delta_fails(study: Study, tmp_path: Path) -> None:
    """Rounding makes PLD 7.382 there, below the true 7.869."""
    strange = study.with_sections(
        training={"steps_per_round": 50_000},
        privacy={"sample_rate": 1.0, "noise_multiplier": 316.22776601683796, "delta": 1e-14, "epsilon_budget": 9.0},
    )
    assert exact_epsilon(316.22776601683796, 100_000, 1e-14) == pytest.approx(7.8687, abs=1e-3)
    folder = strange.write(tmp_path / "strange")
    assert failed(verify(strange, folder)) == {}

    def lie(bodies: list) -> None:
        bodies[-2] = msgspec.structs.replace(bodies[-2], epsilon=7.40)

    assert "RDP" in lie_in_ledger(strange, folder, lie)


@pytest.mark.parametrize("steps", [1, 30, 1000, 30_000])
def test_pld_is_never_below_the_truth_where_it_gives_a_number(steps: int) -> None:
    for target in (0.1, 1.0, 3.0, 10.0, 14.0):
        for delta in (budget.least_delta(steps), 1e-8, 1e-5):
            noise = math.sqrt(steps) / target
            if not 0.3 <= noise <= 1e4:
                continue
            found = budget.epsilon_pld([budget.Steps(1.0, noise, steps)], delta)
            assert found >= exact_epsilon(noise, steps, delta) * (1 - 1e-5)
    with pytest.raises(VerificationFailed, match="is below"):
        budget.epsilon_pld([budget.Steps(1.0, math.sqrt(steps), steps)], 0.9 * budget.least_delta(steps))


def test_honest_claims_hold_where_pld_is_looser_than_rdp() -> None:
    """Values of opacus.accountants.RDPAccountant 1.6."""
    history = [budget.Steps(0.001, 16.0, 1_000_000)]
    rdp = budget.epsilon_rdp(history, 1e-5)
    assert rdp == pytest.approx(0.226177, abs=1e-6)
    assert rdp < budget.epsilon_pld(history, 1e-5)


def test_what_is_no_privacy_is_not_recomputed(study: Study, tmp_path: Path) -> None:
    strange = study.with_sections(
        privacy={"noise_multiplier": 0.31, "sample_rate": 1.0, "epsilon_budget": 1e4}, training={"steps_per_round": 20}
    )
    found = failed(verify(strange, strange.write(tmp_path / "strange")))
    assert len(found) == len(strange.names)
    assert all("no privacy" in detail for detail in found.values())


@pytest.mark.parametrize("kind", sorted(led.RNG_KINDS))
def test_events_of_every_known_noise_generator_verify(study: Study, folder: Path, kind: str) -> None:
    assert lie_in_ledger(study, folder, lambda b: b.__setitem__(2, replace(b[2], rng_kind=kind))) == ""


def small_budget(study: Study) -> Study:
    return study.with_sections(privacy={"epsilon_budget": 1.0})


def test_a_budget_that_was_passed_is_found_also_behind_an_infinite_claim(study: Study, tmp_path: Path) -> None:
    poor = small_budget(study)
    folder = poor.write(tmp_path / "poor")
    found = failed(verify(poor, folder))
    assert set(found) == {f"ledgers/{name}.jsonl" for name in poor.names}
    assert all("budget of 1" in detail for detail in found.values())
    name, transcript = poor.names[0], poor.transcript()
    hidden = poor.ledger(name, transcript, lambda b: b.__setitem__(-2, replace(b[-2], epsilon=None)))
    poor.put(folder, transcript, {name: hidden})
    assert "budget of 1" in failed(verify(poor, folder))[f"ledgers/{name}.jsonl"]


def test_a_study_without_noise_passes_with_a_plain_warning(study: Study, tmp_path: Path) -> None:
    loud = study.with_sections(privacy={"noise_multiplier": 0.0})
    report = verify(loud, loud.write(tmp_path / "loud"))
    assert report.ok, failed(report)
    assert any("no differential privacy" in warning for warning in report.warnings)
    finite = loud.ledger(loud.names[0], loud.transcript(), lambda b: b.__setitem__(-2, replace(b[-2], epsilon=1.0)))
    loud.put(tmp_path / "loud", loud.transcript(), {loud.names[0]: finite})
    assert "claims epsilon" in failed(verify(loud, tmp_path / "loud"))[f"ledgers/{loud.names[0]}.jsonl"]


TRANSCRIPT_LIES = {
    "a survivor who is not in the roster": lambda s, b: b.__setitem__(
        1, s.round_record(1, survivors=[*s.names, "stranger"])
    ),
    "too few survivor signatures": lambda s, b: b.__setitem__(1, s.round_record(1, voters=s.names[:2])),
    "the last round is hidden": lambda s, b: b.__setitem__(slice(5, None), [t.StudyClosed(2, "x")]),
    "a round is hidden as abandoned": lambda s, b: b.__setitem__(
        slice(5, None), [t.RoundAbandoned(3, 1, "x", ()), t.StudyClosed(2, "x")]
    ),
    "another sum is recorded": lambda s, b: b.__setitem__(3, s.round_record(2, aggregate_digest="1" * 64)),
}


@pytest.mark.parametrize("lie", sorted(TRANSCRIPT_LIES))
def test_an_aggregator_that_signs_a_lie_is_found(study: Study, folder: Path, lie: str) -> None:
    transcript = study.transcript(lambda bodies: TRANSCRIPT_LIES[lie](study, bodies))
    study.put(folder, transcript, {})
    assert failed(verify(study, folder))


def test_a_sum_of_another_size_is_found_though_its_record_vouches_for_it(study: Study, folder: Path) -> None:
    short = study.total(2)[:-1].tobytes()
    record = study.round_record(2, aggregate_digest=t.aggregate_digest(short).hex())
    transcript = study.transcript(lambda bodies: bodies.__setitem__(3, record))
    (folder / "sums" / "round-0002.u32").write_bytes(short)
    study.put(folder, transcript, {name: study.ledger(name, transcript) for name in study.names})
    assert "round-0002.u32 has another size" in failed(verify(study, folder))["sums"]


def test_the_last_round_cannot_be_hidden(study: Study, folder: Path) -> None:
    """Also where its sum is gone: the closing line of each ledger names the last record that its node has seen."""
    transcript = study.transcript(lambda b: TRANSCRIPT_LIES["a round is hidden as abandoned"](study, b))
    study.put(folder, transcript, {})
    assert "round-0003" in failed(verify(study, folder))["sums"]
    (folder / "sums" / "round-0003.u32").unlink()
    study.seal(folder)
    hidden = failed(verify(study, folder))
    assert set(hidden) == {f"ledgers/{name}.jsonl" for name in study.names}
    assert all("the transcript hides" in detail for detail in hidden.values())


def test_a_round_in_the_middle_cannot_be_hidden(study: Study, folder: Path) -> None:
    """The ledgers link to the record of round 2, so the aggregator cannot call it abandoned afterwards."""
    ledgers = {name: (folder / "ledgers" / f"{name}.jsonl").read_bytes() for name in study.names}

    def change(bodies: list) -> None:
        bodies[3:5] = [t.RoundAbandoned(2, 1, "x", ())]
        bodies[-1] = t.StudyClosed(2, "x")

    study.put(folder, study.transcript(change), ledgers)
    (folder / "sums" / "round-0002.u32").unlink()
    study.seal(folder)
    assert set(failed(verify(study, folder))) == {f"ledgers/{name}.jsonl" for name in study.names}


def test_rounds_without_enough_receipts_are_named_in_a_warning(study: Study, folder: Path) -> None:
    transcript = study.transcript(lambda bodies: bodies.pop(4))
    study.put(folder, transcript, {name: study.ledger(name, transcript) for name in study.names})
    report = verify(study, folder)
    assert report.ok, failed(report)
    assert report.warnings == ["round 2 was countersigned by only 0 nodes"]


def test_a_revoked_member_is_refused(study: Study, folder: Path) -> None:
    consortium = study.consortium
    document, signature = revoke(consortium.authority, consortium.roster, study.names[2])
    (folder / "roster.json").write_bytes(document)
    (folder / "roster.json.sig").write_bytes(signature)
    study.seal(folder)
    assert "revoked" in failed(verify(study, folder))["agreement and roster"]


@pytest.mark.parametrize("days", [-400, 400])
def test_certificates_are_checked_against_the_given_moment(study: Study, honest: Path, days: int) -> None:
    assert not verify(study, honest, now=NOW + timedelta(days=days)).ok


def test_an_agreement_that_somebody_else_signed_is_refused(study: Study, folder: Path) -> None:
    signer = study.consortium.identities[study.names[0]].sign
    signature = sign_document(signer, Label.AGREEMENT, study.document)
    (folder / "agreement.toml.sig").write_bytes(signature)
    study.seal(folder)
    assert "agreement.toml" in failed(verify(study, folder))


def test_a_manifest_that_somebody_else_signed_is_refused(study: Study, folder: Path) -> None:
    (folder / "metrics.json").write_bytes(b'{"accuracy": 1.0}\n')
    from secgeo.records import write_manifest

    write_manifest(folder, study.consortium.identities["aggregator"].sign)
    assert "manifest.json" in failed(verify(study, folder))


@pytest.mark.parametrize("noise", [1e-300, 0.2, 1e7])
def test_parameters_out_of_range_cost_no_time(study: Study, tmp_path: Path, noise: float) -> None:
    """They are not agreed on, nor computed with."""
    with pytest.raises(ConfigError, match="no accountant verifies others"):
        study.with_sections(privacy={"noise_multiplier": noise}).write(tmp_path / "strange")
    for accountant in (budget.epsilon_rdp, budget.epsilon_pld):
        with pytest.raises(VerificationFailed, match="not recomputed"):
            accountant([budget.Steps(0.1, noise, 10)], 1e-5)


# --- epsilon


def event(rate: float, noise: float, steps: int) -> led.DpSgdEvent:
    return led.DpSgdEvent(1, rate, noise, 1.0, steps, "record", "ab" * 32, "rng", GENESIS)


def test_the_accountants_give_known_answers() -> None:
    """PLD, Poisson, add or remove one."""
    known = [
        (0.01, 1.0, 1000, 1e-5, 1.828),
        (0.05, 0.8, 500, 1e-5, 12.035),
        (1.0, 5.0, 30, 1e-6, 5.423),
    ]
    for rate, noise, steps, delta, epsilon in known:
        events = [event(rate, noise, steps)]
        assert budget.epsilon_pld(events, delta) == pytest.approx(epsilon, abs=2e-3)
        assert budget.epsilon_rdp(events, delta) > epsilon


def test_an_honest_opacus_claim_is_never_below_what_the_auditor_computes() -> None:
    """Values of opacus.accountants.RDPAccountant 1.6."""
    for rate, noise, steps, delta, claim in [(0.1, 1.0, 6, 1e-5, 3.0260), (0.25, 0.8, 48, 1e-3, 15.3453)]:
        assert budget.epsilon_pld([event(rate, noise, steps)], delta) < claim


OPACUS = [
    (0.1, 1.0, 6, 1e-5, 3.0260196518145777),
    (0.25, 0.8, 48, 1e-3, 15.345320026175783),
    (0.4, 0.55, 78, 2e-3, 66.71352308965395),
    (1.0, 5.0, 30, 1e-6, 5.790609852476926),
    (0.001, 16.0, 1_000_000, 1e-5, 0.22617710060602594),
    (0.0001, 0.6, 100_000, 1e-5, 1.8195713845024588),
    (0.9, 12.0, 1000, 1e-5, 13.242398245346598),
]
"""Sampling rate, noise multiplier, steps, delta, epsilon by opacus.accountants.RDPAccountant 1.6."""


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "claim"), OPACUS)
def test_an_honest_claim_reaches_one_of_the_two_bounds(
    rate: float, noise: float, steps: int, delta: float, claim: float
) -> None:
    history = [budget.Steps(rate, noise, steps)]
    smaller = min(budget.epsilon_rdp(history, delta), budget.epsilon_pld(history, delta))
    assert claim >= smaller * (1 - records.EPSILON_TOLERANCE)


@pytest.mark.parametrize("rho", [1e-9, 1e-6, 1.3e-5, 1e-4, 0.0029, 0.0031, 0.0033, 0.0037, 0.02, 0.4, 7.0, 90.0, 3e4])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.02])
def test_an_honest_claim_for_the_hospital_is_never_below_what_the_auditor_computes(rho: float, delta: float) -> None:
    assert hospital_epsilon(rho, delta) >= budget.epsilon_concentrated(rho, delta) * (1 - 1e-9)


def test_the_two_accountants_order_and_compose_as_they_must() -> None:
    events = [event(0.1, 1.0, 5), event(0.1, 1.0, 5)]
    assert budget.epsilon_rdp(events, 1e-5) == budget.epsilon_rdp([event(0.1, 1.0, 10)], 1e-5)
    pld = budget.epsilon_pld(events, 1e-5)
    assert pld < budget.epsilon_rdp(events, 1e-5)
    assert budget.epsilon_rdp([event(0.1, 1.0, 0)], 1e-5) == budget.epsilon_pld([], 1e-5) == 0.0
    assert math.isinf(budget.epsilon_rdp([event(0.1, 0.0, 1)], 1e-5))
    for extreme in (event(0.5, 0.15, 10), event(1.0, 0.3, 1000)):
        with pytest.raises(VerificationFailed, match="not recomputed"):
            budget.epsilon_pld([extreme], 1e-5)


def test_who_is_said_to_have_misbehaved_is_a_warning_and_no_proof(study: Study, tmp_path: Path) -> None:
    transcript = study.transcript(lambda bodies: bodies.insert(1, t.Misbehaved(1, study.names[2], "sent rubbish")))
    folder = study.write(tmp_path / "study")
    study.put(folder, transcript, {name: study.ledger(name, transcript) for name in study.names})
    report = verify_folder(folder, authority_fingerprint=study.consortium.authority.fingerprint, now=NOW)
    assert report.ok
    assert report.warnings == [
        f"the aggregator says that {study.names[2]} misbehaved in round 1 (sent rubbish); no more than its word"
    ]


@pytest.mark.parametrize("noise", [0.5, 0.9, 1.0, 1.1, 3.0])
@pytest.mark.parametrize("most", [1.0, 7.0, 30.0])
def test_whether_epsilon_is_at_most_so_much_is_told_as_from_all_orders(noise: float, most: float) -> None:
    events = [budget.Steps(0.2, noise, 50)]
    assert budget.at_most_rdp(events, 1e-5, most) == (budget.epsilon_rdp(events, 1e-5) <= most)
    assert budget.at_most_rdp([], 1e-5, most)
    assert not budget.at_most_rdp([budget.Steps(0.2, 0.0, 1)], 1e-5, most)
