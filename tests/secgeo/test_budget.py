"""Budgets are refused before they are passed: in one study, over all studies on the same records, and across kill -9."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from keys.errors import BudgetExceeded, ConfigError
from keys.identity import Identity
from protocols import ledger
from protocols.agreement import Agreement, HospitalPrivacy
from protocols.chain import GENESIS
from secgeo import budget as budget_module
from secgeo.accountant import epsilon_of, hospital_epsilon
from secgeo.budget import Budget
from secgeo.datasets import LabelledRecords
from secgeo.site_budget import SiteBudget, Spent
from tests.keys.factory import make_consortium
from tests.protocols.network import make_agreement, names

CONSORTIUM = make_consortium(names(4))
IDENTITY = CONSORTIUM.identities[names(1)[0]]
STUDY, OTHER_STUDY = b"a" * 32, b"b" * 32
STEPS = 5


def records(first: int, last: int) -> np.ndarray:
    """Records that are the same whenever their number is."""
    return np.stack([np.full(3, number, np.float32) for number in range(first, last)])


def identities(features: np.ndarray, patients: Sequence[str] | None = None) -> set[bytes]:
    names = None if patients is None else np.array(patients)
    return LabelledRecords(features, np.zeros(len(features), np.int64), names).identities


def agreement(hospital: HospitalPrivacy | None = None, **privacy: object) -> Agreement:
    agreed = make_agreement(CONSORTIUM)
    changed = msgspec.structs.replace(agreed.privacy, **privacy)
    return msgspec.structs.replace(agreed, privacy=changed, hospital_privacy=hospital)


def open_budget(
    folder: Path,
    features: np.ndarray | None = None,
    study: bytes = STUDY,
    max_epsilon: float = 100.0,
    identity: Identity = IDENTITY,
    patients: Sequence[str] | None = None,
    link: str = GENESIS,
    **privacy: object,
) -> Budget:
    folder.mkdir(exist_ok=True)
    features = records(0, 10) if features is None else features
    fingerprint = hashlib.sha256(features.tobytes()).hexdigest()
    site = SiteBudget(folder / "budget.sqlite", fingerprint, identities(features, patients))
    path = folder / study.hex()[:4] / "ledger.jsonl"
    return Budget(agreement(**privacy), study, identity, site, path, fingerprint, max_epsilon, link)


def close(budget: Budget) -> None:
    budget.close()
    budget._site.close()


def events(folder: Path, study: bytes = STUDY) -> list[ledger.DpSgdEvent]:
    path = folder / study.hex()[:4] / "ledger.jsonl"
    whole, _, _ = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    lines = whole + b"\n" if whole else b""
    return [body for body in ledger.read_ledger(lines, IDENTITY.public_key) if isinstance(body, ledger.DpSgdEvent)]


def steps_until_refused(budget: Budget, most: int = 50) -> int:
    for number in range(most):
        try:
            budget.book(number + 2, STEPS)
        except BudgetExceeded:
            return number * STEPS
    return most * STEPS


def test_the_step_that_would_pass_the_agreed_budget_is_refused_and_not_booked(tmp_path: Path) -> None:
    budget = open_budget(tmp_path, epsilon_budget=3.0)
    taken = steps_until_refused(budget)
    privacy = agreement().privacy
    assert (
        0 < taken == sum(event.steps for event in events(tmp_path)) == sum(event.steps for event in spent_by(tmp_path))
    )
    spent = [
        epsilon_of([(privacy.noise_multiplier, privacy.sample_rate, taken + more)], privacy.delta)
        for more in (0, STEPS)
    ]
    assert spent[0] <= 3.0 < spent[1]
    assert budget.claim() == spent[0]


def test_the_round_that_would_pass_the_budget_of_the_hospital_is_refused_over_restarts_too(tmp_path: Path) -> None:
    hospital = HospitalPrivacy(noise_multiplier=2.0, max_update_norm=1.0, delta=1e-3, epsilon_budget=5.0)
    share = agreement(hospital).noise_share
    assert share is not None
    affordable = max(n for n in range(20) if hospital_epsilon(n * share.concentrated, 1e-3) <= 5.0)
    assert affordable > 2
    open_it = partial(open_budget, tmp_path, hospital=hospital, epsilon_budget=100.0, max_epsilon=1000.0)
    budget = open_it()
    budget.book(1, 0)
    for number in range(affordable):
        budget.book(number + 2, STEPS)
        close(budget)
        budget = open_it()
    with pytest.raises(BudgetExceeded, match="of the hospital"):
        budget.book(affordable + 2, STEPS)
    booked = events(tmp_path)
    assert [event.noise_share for event in booked] == [None, *[share] * affordable]
    budget.claim()
    claim = ledger.read_ledger((tmp_path / STUDY.hex()[:4] / "ledger.jsonl").read_bytes(), IDENTITY.public_key)[-1]
    assert isinstance(claim, ledger.EpsilonClaim)
    assert claim.hospital is not None
    assert claim.hospital.epsilon == hospital_epsilon(affordable * share.concentrated, 1e-3)


def test_without_noise_nothing_is_within_a_finite_limit(tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded, match="inf"):
        open_budget(tmp_path, noise_multiplier=0.0).book(2, STEPS)
    open_budget(tmp_path, study=OTHER_STUDY, noise_multiplier=0.0, max_epsilon=float("inf")).book(2, STEPS)


def test_rounds_without_private_steps_cost_nothing(tmp_path: Path) -> None:
    budget = open_budget(tmp_path, max_epsilon=1e-9)
    budget.book(1, 0)
    assert budget.claim() == 0.0
    assert budget._site.spent() == ()


@pytest.mark.parametrize(
    "features",
    [records(0, 10), records(0, 10)[::-1].copy(), records(0, 11), records(9, 30), np.repeat(records(3, 4), 5, axis=0)],
    ids=["the same", "another order", "a record added", "one record in common", "one record many times"],
)
def test_a_second_study_inherits_what_was_spent_on_any_of_its_records(tmp_path: Path, features: np.ndarray) -> None:
    first = open_budget(tmp_path, max_epsilon=3.0)
    taken = steps_until_refused(first)
    close(first)
    second = open_budget(tmp_path, features, OTHER_STUDY, max_epsilon=3.0)
    with pytest.raises(BudgetExceeded, match="all studies on these records"):
        second.book(2, STEPS)
    assert events(tmp_path, OTHER_STUDY) == []
    assert sum(event.steps for event in second._site.spent()) == taken


def test_a_patient_is_recognised_in_other_records(tmp_path: Path) -> None:
    earlier = SiteBudget(tmp_path / "budget.sqlite", "earlier", identities(records(0, 3), ["ann", "bob", "bob"]))
    earlier.book("study", 1, Spent(0.1, 1.0, STEPS, 1e-5), lambda _: None)
    for patients, known in ((["bob", "cy"], True), (["cy", "dan"], False)):
        other = SiteBudget(tmp_path / "budget.sqlite", str(patients), identities(records(50, 52), patients))
        assert bool(other.spent()) is known


def test_other_records_have_their_own_budget(tmp_path: Path) -> None:
    first = open_budget(tmp_path, max_epsilon=3.0)
    taken = steps_until_refused(first)
    close(first)
    assert steps_until_refused(open_budget(tmp_path, records(10, 20), OTHER_STUDY, max_epsilon=3.0)) == taken


def test_new_keys_of_the_site_do_not_begin_anew(tmp_path: Path) -> None:
    first = open_budget(tmp_path, max_epsilon=3.0)
    taken = steps_until_refused(first)
    close(first)
    renewed = open_budget(tmp_path, records(0, 10), OTHER_STUDY, 3.0, CONSORTIUM.identities[names(2)[1]])
    assert sum(event.steps for event in renewed._site.spent()) == taken


def test_studies_of_different_delta_compose_at_the_smallest(tmp_path: Path) -> None:
    first = open_budget(tmp_path, delta=1e-7)
    first.book(2, STEPS)
    close(first)
    second = open_budget(tmp_path, study=OTHER_STUDY, delta=1e-3)
    second.book(2, STEPS)
    epsilon, delta = second.epsilon_of_all()
    privacy = agreement().privacy
    assert delta == 1e-7
    assert epsilon == epsilon_of([(privacy.noise_multiplier, privacy.sample_rate, 2 * STEPS)], 1e-7)


def test_restarts_go_on_counting(tmp_path: Path) -> None:
    for _ in range(3):
        budget = open_budget(tmp_path)
        budget.book(2, STEPS)
        close(budget)
    assert budget.steps == 3 * STEPS
    assert sum(event.steps for event in spent_by(tmp_path)) == 3 * STEPS


def spent_by(folder: Path) -> tuple[Spent, ...]:
    site = SiteBudget(folder / "budget.sqlite", "looking", identities(records(0, 1)))
    try:
        return site.spent()
    finally:
        site.close()


def test_books_that_were_deleted_are_filled_from_the_ledger(tmp_path: Path) -> None:
    budget = open_budget(tmp_path)
    budget.book(2, STEPS)
    close(budget)
    for path in tmp_path.glob("budget.sqlite*"):
        path.unlink()
    close(open_budget(tmp_path))
    assert sum(event.steps for event in spent_by(tmp_path)) == STEPS


def ledger_path(folder: Path, study: bytes = STUDY) -> Path:
    return folder / study.hex()[:4] / "ledger.jsonl"


def lose_books(folder: Path) -> None:
    for path in folder.glob("budget.sqlite*"):
        path.unlink()


def test_a_study_whose_ledger_is_lost_does_not_begin_anew(tmp_path: Path) -> None:
    budget = open_budget(tmp_path, epsilon_budget=3.0, max_epsilon=6.0)
    assert steps_until_refused(budget) > 0
    close(budget)
    whole = ledger_path(tmp_path).read_bytes()
    ledger_path(tmp_path).unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"ledger.*backup"):
            open_budget(tmp_path, epsilon_budget=3.0, max_epsilon=6.0)
    assert events(tmp_path) == []
    ledger_path(tmp_path).write_bytes(whole)
    assert steps_until_refused(open_budget(tmp_path, epsilon_budget=3.0, max_epsilon=6.0)) == 0


def test_not_even_one_round_is_forgotten_with_the_ledger(tmp_path: Path) -> None:
    """A crash between the two writes leaves the opening line."""
    budget = open_budget(tmp_path)
    budget.book(2, STEPS)
    close(budget)
    ledger_path(tmp_path).unlink()
    with pytest.raises(ConfigError, match=r"ledger.*backup"):
        open_budget(tmp_path)


def test_a_ledger_that_is_lost_with_the_books_is_missed_once_a_sum_was_applied(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ledger.*backup"):
        open_budget(tmp_path, link="ab" * 32)
    close(open_budget(tmp_path))
    close(open_budget(tmp_path, link="ab" * 32))


def test_an_older_copy_of_the_ledger_is_refused_or_counted_in_full(tmp_path: Path) -> None:
    """What lacks one event looks like a crash between the two writes: the books tell that event."""
    budget, copies = open_budget(tmp_path), []
    for round_number in (2, 3, 4):
        copies.append(ledger_path(tmp_path).read_bytes())
        budget.book(round_number, STEPS)
    close(budget)
    for older in copies[:2]:
        ledger_path(tmp_path).write_bytes(older)
        with pytest.raises(ConfigError, match=r"ledger.*backup"):
            open_budget(tmp_path)
    ledger_path(tmp_path).write_bytes(copies[2])
    budget = open_budget(tmp_path)
    assert budget.steps == 3 * STEPS
    assert [event.round for event in events(tmp_path)] == [2, 3, 4]
    assert sum(event.steps for event in spent_by(tmp_path)) == 3 * STEPS


def test_books_and_ledger_that_tell_different_rounds_are_refused(tmp_path: Path) -> None:
    for round_number in (2, 3):
        open_budget(tmp_path / str(round_number)).book(round_number, STEPS)
    here = ledger_path(tmp_path / "2").parent
    (here / "new").write_bytes(ledger_path(tmp_path / "3").read_bytes())
    (here / "new").replace(ledger_path(tmp_path / "2"))
    with pytest.raises(ConfigError, match=r"ledger.*backup"):
        open_budget(tmp_path / "2")


def test_what_a_crash_between_the_two_writes_left_out_goes_into_the_ledger(tmp_path: Path) -> None:
    """However often: the round is booked again each time, and each of them counts, for the hospital too."""
    hospital = HospitalPrivacy(noise_multiplier=2.0, max_update_norm=1.0, delta=1e-3, epsilon_budget=50.0)
    open_it = partial(open_budget, tmp_path, hospital=hospital)
    for _ in range(3):
        budget = open_it()
        budget._file.append = lambda _: (_ for _ in ()).throw(ConfigError("killed"))  # type: ignore[method-assign]
        with pytest.raises(ConfigError, match="killed"):
            budget.book(2, STEPS)
        close(budget)
    budget = open_it(link="ab" * 32)
    budget.book(2, STEPS)
    budget.claim()
    close(budget)
    agreed = agreement(hospital, epsilon_budget=agreement().privacy.epsilon_budget)
    sections = {"training": {"steps_per_round": STEPS}, "study": {"rounds": 9}}
    agreed = msgspec.structs.replace(
        agreed, **{name: msgspec.structs.replace(getattr(agreed, name), **fields) for name, fields in sections.items()}
    )
    told = ledger.read_ledger(ledger_path(tmp_path).read_bytes(), IDENTITY.public_key)
    booked, claims, closed = ledger.verify_ledger(told, IDENTITY.node_id, agreed, STUDY)
    assert [(event.round, event.steps, event.noise_share) for event in booked] == [(2, STEPS, agreed.noise_share)] * 4
    assert booked[2].transcript_link == closed.transcript_link == "ab" * 32
    assert claims[-1][1].steps_total == 4 * STEPS == sum(event.steps for event in spent_by(tmp_path))
    share = agreed.noise_share
    assert share is not None
    assert claims[-1][1].hospital is not None
    assert claims[-1][1].hospital.epsilon == hospital_epsilon(4 * share.concentrated, 1e-3)


def test_books_that_are_lost_beside_other_ledgers_are_not_begun_anew(tmp_path: Path) -> None:
    budget = open_budget(tmp_path, max_epsilon=3.0)
    budget.book(1, 0)
    lose_books(tmp_path)
    second = open_budget(tmp_path, study=OTHER_STUDY)  # nothing was spent yet
    close(second)
    lose_books(tmp_path)
    close(budget)
    budget = open_budget(tmp_path, max_epsilon=3.0)
    assert steps_until_refused(budget) > 0
    close(budget)
    kept = (tmp_path / "budget.sqlite").read_bytes()
    lose_books(tmp_path)
    for study in (OTHER_STUDY, b"c" * 32):
        with pytest.raises(ConfigError, match=r"budget\.sqlite.*backup"):
            open_budget(tmp_path, study=study)
    lose_books(tmp_path)
    (tmp_path / "budget.sqlite").write_bytes(kept)
    with pytest.raises(BudgetExceeded):
        open_budget(tmp_path, study=OTHER_STUDY, max_epsilon=3.0).book(2, STEPS)


def test_an_older_copy_of_the_books_is_not_gone_on_with(tmp_path: Path) -> None:
    first = open_budget(tmp_path)
    first.book(2, STEPS)
    close(first)
    kept = (tmp_path / "budget.sqlite").read_bytes()
    first = open_budget(tmp_path)
    first.book(3, STEPS)
    close(first)
    lose_books(tmp_path)
    (tmp_path / "budget.sqlite").write_bytes(kept)
    with pytest.raises(ConfigError, match=r"budget\.sqlite.*backup"):
        open_budget(tmp_path, study=OTHER_STUDY)
    close(open_budget(tmp_path))  # fills them from its own ledger
    assert sum(event.steps for event in spent_by(tmp_path)) == 2 * STEPS
    close(open_budget(tmp_path, study=OTHER_STUDY))


def test_another_ledger_that_is_torn_or_damaged(tmp_path: Path) -> None:
    first = open_budget(tmp_path)
    first.book(2, STEPS)
    close(first)
    with ledger_path(tmp_path).open("ab") as file:
        file.write(b'{"seq":')  # killed in mid-write
    close(open_budget(tmp_path, study=OTHER_STUDY))
    with ledger_path(tmp_path).open("ab") as file:
        file.write(b"rubbish\n")
    with pytest.raises(ConfigError, match="damaged"):
        open_budget(tmp_path, study=OTHER_STUDY)


PATIENTS = ["ann", "bob"] * 5
UNITS: list[dict[str, object]] = [{"unit": "record"}, {"unit": "patient", "records_per_patient": 3}]


@pytest.mark.parametrize("order", [1, -1], ids=["records first", "patients first"])
def test_records_and_patients_are_not_counted_together(tmp_path: Path, order: int) -> None:
    (earlier, later), other = UNITS[::order], records(10, 20)
    first = open_budget(tmp_path, patients=PATIENTS, **earlier)
    second = open_budget(tmp_path, study=OTHER_STUDY, patients=PATIENTS, **later)  # nothing is spent yet
    first.book(2, STEPS)
    assert [(event.unit, event.records_per_patient) for event in first._site.spent()] == [
        (earlier["unit"], earlier.get("records_per_patient", 0))
    ]
    with pytest.raises(BudgetExceeded, match="unit"):
        second.book(2, STEPS)
    assert events(tmp_path, OTHER_STUDY) == []
    close(second)
    for features, patients in ((None, PATIENTS), (None, None), (other, PATIENTS)):
        with pytest.raises(ConfigError, match="unit patient"):
            open_budget(tmp_path, features, b"c" * 32, patients=patients, **later)
    open_budget(tmp_path, records(20, 30), b"d" * 32, patients=["cy"] * 10, **later).book(2, STEPS)
    first.book(3, STEPS)


def test_books_that_did_not_keep_the_unit_are_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "budget.sqlite") as older:
        older.execute(
            "CREATE TABLE events (id INTEGER PRIMARY KEY, dataset TEXT, study TEXT, round INTEGER, "
            "sample_rate REAL, noise_multiplier REAL, steps INTEGER, delta REAL) STRICT"
        )
    older.close()
    with pytest.raises(ConfigError, match=r"budget\.sqlite.*earlier version"):
        open_budget(tmp_path)


@pytest.mark.parametrize("at", ["write", "fsync", "truncate too"])
def test_after_a_failed_write_nothing_more_is_written_and_a_restart_counts_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The disk is full for an event; the claim, which is shorter, would fit."""
    write, fsync, truncate = os.write, os.fsync, os.ftruncate
    full = False

    def writing(descriptor: int, data: bytes) -> int:
        nonlocal full
        full = b"DpSgdEvent" in data
        if full and at != "fsync":
            write(descriptor, data[:50])
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    def syncing(descriptor: int) -> None:
        if full:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    def cutting(descriptor: int, size: int) -> None:
        if full and at == "truncate too":
            raise OSError(5, "Input/output error")
        truncate(descriptor, size)

    budget = open_budget(tmp_path)
    budget.book(1, 0)
    with monkeypatch.context() as disk:
        for name, function in (("write", writing), ("fsync", syncing), ("ftruncate", cutting)):
            disk.setattr(os, name, function)
        with pytest.raises(ConfigError, match="No space left"):
            budget.book(2, STEPS)
    before = ledger_path(tmp_path).read_bytes()
    for again in (budget.claim, partial(budget.book, 2, STEPS), partial(budget.book, 3, 0)):
        with pytest.raises(ConfigError, match="start this node again"):
            again()
    close(budget)
    assert ledger_path(tmp_path).read_bytes() == before
    budget = open_budget(tmp_path)
    assert budget.steps == STEPS == sum(event.steps for event in spent_by(tmp_path))
    budget.book(2, STEPS)
    budget.claim()
    close(budget)
    assert [event.round for event in events(tmp_path)] == [1, 2, 2]


def test_books_that_are_damaged_are_refused(tmp_path: Path) -> None:
    (tmp_path / "budget.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ConfigError, match=r"budget\.sqlite"):
        open_budget(tmp_path)


def test_two_studies_at_the_same_time_cannot_both_take_the_last_step(tmp_path: Path) -> None:
    """Each would stay within the limit alone, and sees the other's steps only in the books."""
    alone = steps_until_refused(open_budget(tmp_path / "alone", max_epsilon=3.0))

    def run(study: bytes) -> int:
        return steps_until_refused(open_budget(tmp_path, study=study, max_epsilon=3.0))

    close(open_budget(tmp_path, study=b"c" * 32))
    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(run, (STUDY, OTHER_STUDY))) == alone


def test_the_books_are_the_owners_alone_and_hold_no_record(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    budget = open_budget(tmp_path, features)
    budget.book(2, STEPS)
    close(budget)
    path = tmp_path / "budget.sqlite"
    assert path.stat().st_mode & 0o077 == 0
    assert not any(row.tobytes() in path.read_bytes() for row in features)


class Countdown:
    """Kills this process (SIGKILL) at the k-th call."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def book_and_draw(folder: Path, study: bytes, drawn: int, countdown: Countdown) -> None:
    """Book two rounds, and a byte into `drawn` for each step whose noise is used; the countdown runs at every durable write.

    Those are the ledger's (with half of the line written, before and after the disk has it) and the statements of SQLite.
    """
    fsync, write, made = os.fsync, os.write, SiteBudget.__init__

    def synced(descriptor: int) -> None:
        countdown()
        fsync(descriptor)
        countdown()

    def written(descriptor: int, data: bytes) -> int:
        half = write(descriptor, data[: len(data) // 2])
        countdown()
        return half + write(descriptor, data[len(data) // 2 :])

    def watched(site: SiteBudget, *arguments: object) -> None:
        made(site, *arguments)  # type: ignore[arg-type]
        site._database.set_trace_callback(countdown)

    os.fsync, os.write, SiteBudget.__init__ = synced, written, watched  # type: ignore[method-assign, assignment]
    budget_module.epsilon_of = lambda *_: 0.0  # nothing is refused here
    budget = open_budget(folder, study=study)
    for round_number in (2, 3):
        budget.book(round_number, STEPS)
        write(drawn, b"." * STEPS)
        countdown()
    close(budget)


@pytest.mark.parametrize("study", [STUDY, OTHER_STUDY], ids=["the same study", "another study"])
def test_kill_9_between_any_two_writes_never_undercounts(tmp_path: Path, study: bytes) -> None:
    """A child is killed at its k-th durable write, for every k until it lives, and the next one goes on with what is there."""
    close(open_budget(tmp_path))
    drawn = tmp_path / "drawn"
    descriptor, killed, alive = os.open(drawn, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 0, False
    while not alive:
        child = os.fork()
        if child == 0:
            try:
                book_and_draw(tmp_path, study, descriptor, Countdown(killed + 1))
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        alive = status == 0
        assert alive or os.WTERMSIG(status) == signal.SIGKILL
        ledger_steps = sum(event.steps for event in events(tmp_path, study))
        site_steps = sum(event.steps for event in spent_by(tmp_path))
        assert drawn.stat().st_size <= ledger_steps <= site_steps, f"killed at write {killed + 1}"
        assert site_steps <= ledger_steps + STEPS, "of any number of crashes the ledger lacks one event at most"
        killed += not alive
    assert killed > 15
    assert drawn.stat().st_size > 2 * STEPS
