"""`secgeo budget`: answers, plans, and claims that are checked without trust in whoever made them."""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from typer.testing import CliRunner, Result

from audit import accountants
from audit.accountants import epsilons, opacus_prv, opacus_rdp
from audit.budget import Steps, epsilon_pld
from audit.plan import Budget, calibrate, trade_offs
from keys.errors import ConfigError, VerificationFailed
from protocols.agreement import HospitalPrivacy
from secgeo import cli
from secgeo.accountant import hospital_epsilon
from secgeo.console import emit
from tests.audit.factory import NOW, Study, make_study
from tests.secgeo.site import make_spec

replace = msgspec.structs.replace

KNOWN = [
    (0.01, 1.0, 1000, 1e-5, 1.828),
    (0.004266, 0.7, 14100, 1e-5, 6.547),
    (0.05, 0.8, 500, 1e-5, 12.035),
    (1.0, 5.0, 30, 1e-6, 5.423),
]
"""Sampling rate, noise multiplier, steps, delta, epsilon by PLD: Poisson, add or remove one."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["budget", *map(str, arguments)])


def ask(rate: float, noise: float, steps: int, delta: float) -> dict:
    options = ["--sample-rate", rate, "--noise-multiplier", noise, "--steps", steps, "--delta", delta, "--json"]
    result = run("epsilon", *options)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


# --- epsilon


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "known"), KNOWN)
def test_the_answers_are_the_known_ones(rate: float, noise: float, steps: int, delta: float, known: float) -> None:
    answer = ask(rate, noise, steps, delta)
    assert answer["epsilon"]["pld"] == pytest.approx(known, abs=1e-3)
    assert answer["epsilon"]["pld"] <= answer["epsilon"]["prv"] <= answer["epsilon"]["pld"] + accountants.PRV_ERROR
    assert answer["epsilon"]["rdp"] > answer["epsilon"]["prv"]
    assert answer["delta"] == delta
    assert answer["neighbouring_relation"] == "add-or-remove-one"
    assert "refused" not in answer


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ((0.01, 0.0, 10, 1e-5), {"rdp": "no noise", "prv": "no noise", "pld": "no noise"}),
        ((0.001, 200.0, 10, 1e-5), {"rdp": "at most 0.0035"}),
        ((0.5, 0.3, 100, 1e-5), {"rdp": "at most 40", "prv": "above 300", "pld": "above 300"}),
        ((1.0, 5.0, 30, 1e-15), {"prv": "PLD, which PRV is compared with", "pld": "which 1e-15 is below"}),
        ((1.0, 316.22776601683796, 100_000, 1e-12), {"prv": "has no answer", "pld": "which 1e-12 is below"}),
        ((0.001, 1.0, 2_000_000, 1e-5), {"prv": "too much memory"}),
    ],
)
def test_outside_its_range_an_accountant_says_why_it_has_no_number(settings: tuple, refused: dict[str, str]) -> None:
    answer = ask(*settings)
    assert (
        {name for name, value in answer["epsilon"].items() if value is None}
        == answer["refused"].keys()
        == refused.keys()
    )
    for name, reason in refused.items():
        assert reason in answer["refused"][name]


@pytest.mark.parametrize(
    "settings",
    [
        (0.0, 1.0, 10, 1e-5),
        (0.1, 0.01, 10, 1e-5),
        (0.1, 1e9, 10, 1e-5),
        (0.1, math.inf, 10, 1e-5),
        (-3.0, 0.0, 10, 1e-5),
        (-3.0, 1.0, 0, 1e-5),
        (0.1, 1.0, 0, math.nan),
        (0.1, 1.0, 10**9, 1e-5),
        (math.nan, 1.0, 1, 1e-5),
    ],
)
def test_what_no_accountant_can_answer_is_refused(settings: tuple) -> None:
    rate, noise, steps, delta = settings
    with pytest.raises(VerificationFailed):
        epsilons([Steps(rate, noise, steps)], delta)
    options = ["--sample-rate", rate, "--noise-multiplier", noise, "--steps", steps, "--delta", delta]
    result = run("epsilon", *options)
    usage = result.exit_code == 2  # not a number at all
    assert isinstance(result.exception, ConfigError) is not usage
    assert usage is any(math.isnan(setting) for setting in settings)


def test_a_rate_that_is_next_to_nothing_is_answered_without_a_crash() -> None:
    answer = ask(1e-320, 1.0, 10_000_000, 1e-5)
    assert answer["epsilon"]["pld"] is None
    assert "no number here" in answer["refused"]["pld"]


def test_an_answer_names_relation_and_unit() -> None:
    result = run("epsilon", "--sample-rate", 0.01, "--noise-multiplier", 1, "--steps", 10, "--delta", 1e-5)
    assert "add or remove one unit" in result.output
    assert ask(0.01, 1.0, 10, 1e-5).keys() == {"epsilon", "delta", "neighbouring_relation"}


def test_no_epsilon_is_negative() -> None:
    """PRV gives -0.008 there, and less than nothing is nothing."""
    for settings in ((0.4, 20.0, 132, 0.1), (0.01, 100.0, 10, 0.5)):
        assert all(value is None or value >= 0.0 for value in ask(*settings)["epsilon"].values())
    assert ask(0.4, 20.0, 132, 0.1)["epsilon"]["prv"] == 0.0


def test_no_step_costs_nothing() -> None:
    assert ask(0.1, 1.0, 0, 1e-5)["epsilon"] == {"rdp": 0.0, "prv": 0.0, "pld": 0.0}


def test_a_numerical_accountant_that_is_off_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [Steps(0.01, 1.0, 1000)]
    for wrong in (1.0, 2.5):
        monkeypatch.setattr(
            "opacus.accountants.PRVAccountant.get_epsilon", lambda *_args, wrong=wrong, **_kwargs: wrong
        )
        with pytest.raises(VerificationFailed, match="where PLD gives"):
            opacus_prv(history, 1e-5)


def test_an_accountant_that_runs_out_of_memory_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> float:
        raise MemoryError

    monkeypatch.setattr("opacus.accountants.PRVAccountant.get_epsilon", full)
    answer = ask(0.01, 1.0, 1000, 1e-5)
    assert answer["epsilon"]["prv"] is None
    assert "memory" in answer["refused"]["prv"]


def test_what_is_no_number_is_never_printed() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit(True, epsilon=math.inf)


# --- plan


def test_a_plan_is_the_smallest_noise_that_keeps_the_budget() -> None:
    plan = calibrate(Budget(3.0, 1e-5, 2000, 20, 10), 64)
    for noise, kept in ((plan.noise_multiplier, True), (plan.noise_multiplier - 1e-4, False)):
        assert (opacus_rdp([Steps(64 / 2000, noise, 200)], 1e-5)[0] <= 3.0) is kept
    pld = plan.answer.epsilon["pld"]
    assert pld is not None
    assert pld < 3.0


def test_and_back(tmp_path: Path) -> None:
    """What is planned and written is what `budget epsilon` and the agreement's own rules give."""
    spec = make_spec(rounds=7)
    spec["members"] = [
        {"node_id": name, "modality": "m", "expected_batch_size": size} for name, size in (("a", 100.0), ("b", 50))
    ]
    (tmp_path / "study.toml").write_text(tomli_w.dumps(spec))
    options = [
        "--epsilon",
        4,
        "--delta",
        1e-4,
        "--patients",
        400,
        "--rounds",
        12,
        "--steps-per-round",
        3,
        "--batch",
        40,
    ]
    files = ["--study", tmp_path / "study.toml", "--out", tmp_path / "new.toml", "--plot", tmp_path / "plan.png"]
    result = run("plan", *options, *files, "--json")
    assert result.exit_code == 0, result.output
    plan, warnings = (json.loads(result.stdout)[part] for part in ("plan", "warnings"))
    assert len(warnings) == 1
    assert "than 400: b 200. The sample rate of 0.1" in warnings[0]
    written = tomllib.loads((tmp_path / "new.toml").read_text())
    assert written["study"] == {"id": "test-study", "rounds": 12, "classes": 2}
    assert written["training"]["steps_per_round"] == 3
    privacy = written["privacy"]
    assert (privacy["sample_rate"], privacy["delta"], privacy["epsilon_budget"]) == (0.1, 1e-4, 4.0)
    assert privacy["noise_multiplier"] == plan["noise_multiplier"]
    before = spec["privacy"]["sample_rate"]
    for member, old in zip(written["members"], spec["members"], strict=True):  # they have the patients that they had
        assert member["expected_batch_size"] / 0.1 == pytest.approx(old["expected_batch_size"] / before)
    assert ask(0.1, privacy["noise_multiplier"], 36, 1e-4)["epsilon"] == plan["epsilon"]
    assert plan["epsilon"]["rdp"] <= 4.0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("budget", "batch", "why"),
    [
        (Budget(3.0, 1e-5, 50, 20, 10), 64, "cannot be drawn"),
        (Budget(0.01, 1e-9, 100, 1000, 100), 100, "no noise keeps"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(budget: Budget, batch: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        calibrate(budget, batch)


def test_a_plan_is_made_although_other_batches_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.plan.NOISE_RANGE", (0.3, 2.0))
    budget = Budget(6.0, 1e-5, 2, 10, 1)
    assert [other.batch for other in trade_offs(calibrate(budget, 1))] == [1]
    with pytest.raises(ConfigError, match="no noise keeps"):
        calibrate(budget, 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda spec: spec["privacy"].pop("sample_rate"), "no sample_rate"),
        (lambda spec: spec["privacy"].update(max_grad_norm=-1.0), "no agreement may have"),
        (lambda spec: spec["members"][0].pop("expected_batch_size"), "each need a number"),
        (lambda spec: spec.update(members=3), "each need a number"),
        (lambda spec: spec.update(members=["a"]), "each need a number"),
    ],
)
def test_a_study_that_a_plan_does_not_fit_is_refused(tmp_path: Path, change: Any, why: str) -> None:
    spec = make_spec()
    spec["members"] = [{"node_id": "a", "modality": "m", "expected_batch_size": 20.0}]
    change(spec)
    (tmp_path / "study.toml").write_text(tomli_w.dumps(spec))
    result = run(*PLAN, "--study", tmp_path / "study.toml", "--out", tmp_path / "new.toml")
    assert isinstance(result.exception, ConfigError)
    assert why in str(result.exception)
    assert not (tmp_path / "new.toml").exists()


def test_a_plan_that_no_agreement_may_have_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(tomli_w.dumps(make_spec()))
    options = ["plan", "--epsilon", 4, "--delta", 0.3, "--patients", 400, "--rounds", 2, "--batch", 40]
    result = run(*options, "--study", tmp_path / "study.toml", "--out", tmp_path / "new.toml")
    assert isinstance(result.exception, ConfigError)
    assert "delta" in str(result.exception)


def test_a_plan_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(tomli_w.dumps(make_spec()))
    options = ["--epsilon", 4, "--delta", 1e-4, "--patients", 400, "--rounds", 2, "--batch", 40]
    result = run("plan", *options, "--study", tmp_path / "study.toml", "--out", tmp_path / "study.toml")
    assert isinstance(result.exception, ConfigError)
    assert tomllib.loads((tmp_path / "study.toml").read_text()) == make_spec()
    assert isinstance(run("plan", *options, "--out", tmp_path / "new.toml").exception, ConfigError)


PLAN = ["plan", "--epsilon", 4, "--delta", 1e-4, "--patients", 400, "--rounds", 2, "--batch", 40]


@pytest.mark.parametrize(
    "options",
    [
        ["--plot", "{folder}/plan.xyz"],
        ["--plot", "{folder}/missing/plan.png"],
        ["--plot", "{folder}/folder.png"],
        ["--study", "{folder}/study.toml", "--out", "{folder}/missing/new.toml"],
        ["--study", "{folder}/missing.toml", "--out", "{folder}/new.toml"],
    ],
)
def test_a_plan_that_cannot_be_written_is_a_setting_to_mend(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "study.toml").write_text(tomli_w.dumps(make_spec()))
    (tmp_path / "folder.png").mkdir()
    result = run(*PLAN, *(option.format(folder=tmp_path) for option in options))
    assert isinstance(result.exception, ConfigError)
    assert "plan" in str(result.exception) or "toml" in str(result.exception)


def test_a_plan_with_a_delta_that_gives_somebody_away_says_so() -> None:
    options = ["plan", "--epsilon", 4, "--patients", 400, "--rounds", 2, "--batch", 40]
    assert "gives one unit away" in run(*options, "--delta", 0.0025).output


def test_a_plan_names_the_unit_of_its_study(tmp_path: Path) -> None:
    spec = make_spec()
    spec["privacy"] |= {"unit": "patient", "records_per_patient": 3}
    (tmp_path / "study.toml").write_text(tomli_w.dumps(spec))
    files = ["--study", tmp_path / "study.toml", "--out", tmp_path / "new.toml"]
    assert "add or remove one patient" in run(*PLAN, *files).output
    (tmp_path / "new.toml").unlink()
    assert json.loads(run(*PLAN, *files, "--json").stdout)["unit"] == "patient"
    assert "add or remove one unit" in run(*PLAN).output


# --- verify and compose


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(count=4, rounds=3)


@pytest.fixture(scope="module")
def honest(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study.write(tmp_path_factory.mktemp("honest") / "study")


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "study"))


def verify(study: Study, folder: Path) -> tuple[int, dict]:
    at = NOW.replace(tzinfo=None).isoformat(timespec="seconds")
    result = run("verify", folder, "--authority", study.consortium.authority.fingerprint, "--at", at, "--json")
    return result.exit_code, json.loads(result.stdout)


def test_honest_claims_verify_by_three_accountants(study: Study, honest: Path) -> None:
    code, report = verify(study, honest)
    assert code == 0, report
    assert report["budgets"].keys() == set(study.names)
    for budget in report["budgets"].values():
        assert budget["claimed"] == pytest.approx(budget["epsilon"]["rdp"])
        assert budget["epsilon"]["rdp"] > budget["epsilon"]["prv"] > budget["epsilon"]["pld"] > 0
        assert budget["unit"] == "record"
        assert budget["neighbouring_relation"] == "add-or-remove-one"


LIES: dict[str, tuple[Callable[[list], object], str]] = {
    "a claim below PLD": (lambda b: b.__setitem__(4, replace(b[4], epsilon=1.0)), "after the event of round 3"),
    "a claim between PLD and RDP": (
        lambda b: b.__setitem__(4, replace(b[4], epsilon=0.9 * b[4].epsilon)),
        "Opacus RDP",
    ),
    "a claim hardly below RDP": (
        lambda b: b.__setitem__(4, replace(b[4], epsilon=(1 - 1e-6) * b[4].epsilon)),
        "Opacus RDP",
    ),
    "an early claim that a later one mends": (
        lambda b: b.insert(3, replace(b[4], steps_total=b[2].steps, epsilon=0.1)),
        "after the event of round 2",
    ),
    "an event missing": (lambda b: b.pop(3), "the claim after the event of round 2 counts"),
    "other noise than agreed": (
        lambda b: b.__setitem__(2, replace(b[2], noise_multiplier=0.5)),
        "the event of round 2 has another noise_multiplier than agreed",
    ),
    "another rate and clip norm than agreed": (
        lambda b: b.__setitem__(3, replace(b[3], sample_rate=0.01, max_grad_norm=7.0)),
        "the event of round 3 has another sample_rate, max_grad_norm than agreed",
    ),
    "fewer steps than agreed": (lambda b: b.__setitem__(3, replace(b[3], steps=1)), "the event of round 3"),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_lie_exits_8_and_names_the_event(study: Study, folder: Path, lie: str) -> None:
    change, named = LIES[lie]
    name = study.names[2]
    transcript = (folder / "transcript.jsonl").read_bytes()
    study.put(folder, transcript, {name: study.ledger(name, transcript, change)})
    code, report = verify(study, folder)
    assert code == VerificationFailed.exit_code
    ((found),) = report["failed"]
    assert found["name"] == f"ledgers/{name}.jsonl"
    assert named in found["detail"]


def test_a_changed_byte_of_a_ledger_exits_8(study: Study, folder: Path) -> None:
    path = folder / "ledgers" / f"{study.names[0]}.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    study.seal(folder)
    code, report = verify(study, folder)
    assert code == VerificationFailed.exit_code
    assert study.names[0] in report["failed"][0]["name"]


def test_a_patient_in_two_ledgers_has_the_composition_and_one_in_one_has_that(study: Study, honest: Path) -> None:
    ledgers = [f"{honest}:{name}" for name in study.names[:2]]
    at = NOW.replace(tzinfo=None).isoformat(timespec="seconds")
    result = run("compose", *ledgers, "--at", at, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    privacy, steps = study.agreement.privacy, 2 * study.agreement.training.steps_per_round
    for count, found in ((1, answer["patients_of_one"][ledgers[0]]), (2, answer["patients_of_all"])):
        expected = epsilon_pld([Steps(privacy.sample_rate, privacy.noise_multiplier, count * steps)], privacy.delta)
        assert found["epsilon"]["pld"] == pytest.approx(expected, rel=1e-6)
    assert answer["unit"] == "record"
    one, both = answer["patients_of_one"][ledgers[0]]["epsilon"]["pld"], answer["patients_of_all"]["epsilon"]["pld"]
    assert one < both < 2 * one


def test_studies_are_composed_at_the_smallest_delta_of_theirs(study: Study, honest: Path, tmp_path: Path) -> None:
    other = study.with_sections(privacy={"delta": study.agreement.privacy.delta / 100})
    second, name = other.write(tmp_path / "second"), study.names[0]
    at = NOW.replace(tzinfo=None).isoformat(timespec="seconds")
    for ledgers in ([f"{honest}:{name}", f"{second}:{name}"], [f"{second}:{name}", f"{honest}:{name}"]):
        result = run("compose", *ledgers, "--at", at, "--json")
        assert json.loads(result.stdout)["patients_of_all"]["delta"] == other.agreement.privacy.delta


def test_one_ledger_under_two_spellings_is_not_counted_twice(study: Study, honest: Path) -> None:
    other = honest.parent / "elsewhere" / ".." / honest.name
    (honest.parent / "elsewhere").mkdir(exist_ok=True)
    at = NOW.replace(tzinfo=None).isoformat(timespec="seconds")
    result = run("compose", *(f"{folder}:{study.names[0]}" for folder in (honest, other)), "--at", at)
    assert isinstance(result.exception, ConfigError)
    assert "each once" in str(result.exception)


def test_an_infinite_claim_although_there_is_noise_is_remarked(study: Study, folder: Path) -> None:
    name, transcript = study.names[2], (folder / "transcript.jsonl").read_bytes()
    lie = study.ledger(name, transcript, lambda b: b.__setitem__(4, replace(b[4], epsilon=None)))
    study.put(folder, transcript, {name: lie})
    assert any(name in warning and "infinite" in warning for warning in verify(study, folder)[1]["warnings"])


def test_each_folder_is_pinned_to_its_own_authority(study: Study, honest: Path, tmp_path: Path) -> None:
    other = make_study(count=4, rounds=3)  # of another authority
    second, name = other.write(tmp_path / "second"), study.names[0]
    ledgers = [f"{honest}:{name}", f"{second}:{name}", f"{honest}:{study.names[1]}"]
    first_authority, second_authority = (s.consortium.authority.fingerprint for s in (study, other))
    at = ["--at", NOW.replace(tzinfo=None).isoformat(timespec="seconds")]
    pinned = run("compose", *ledgers, "--authority", first_authority, "--authority", second_authority, *at)
    assert pinned.exit_code == 0, pinned.output
    assert "note    " not in pinned.output
    exchanged = run("compose", *ledgers, "--authority", second_authority, "--authority", first_authority, *at)
    assert isinstance(exchanged.exception, VerificationFailed)
    assert isinstance(run("compose", *ledgers, "--authority", first_authority, *at).exception, VerificationFailed)
    assert isinstance(run("compose", *ledgers, *["--authority", first_authority] * 3, *at).exception, ConfigError)
    unpinned = run("compose", *ledgers, *at, "--json")
    warnings = json.loads(unpinned.stdout)["warnings"]
    assert all(any(str(folder) in warning for warning in warnings) for folder in (honest, second))
    assert "note    " in run("compose", *ledgers, *at).output


def test_records_and_patients_are_not_composed(study: Study, honest: Path, tmp_path: Path) -> None:
    other = study.with_sections(privacy={"unit": "patient", "records_per_patient": 3})
    second = other.write(tmp_path / "second")
    name, at = study.names[0], NOW.replace(tzinfo=None).isoformat(timespec="seconds")
    refused = run("compose", f"{honest}:{name}", f"{second}:{name}", "--at", at)
    assert isinstance(refused.exception, ConfigError)
    assert "record" in str(refused.exception)
    assert "patient" in str(refused.exception)
    both = run("compose", f"{second}:{name}", f"{second}:{study.names[1]}", "--at", at)
    assert "a patient in all of them" in both.output
    assert "add or remove one patient" in both.output


def test_many_claims_cost_each_accountant_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answer = epsilons

    def counted(history: list[Steps], delta: float) -> accountants.Epsilons:
        asked.append(sum(steps.steps for steps in history))
        return answer(history, delta)

    monkeypatch.setattr("audit.ledgers.epsilons", counted)
    study = make_study(count=3, rounds=3)
    code, report = verify(study, study.write(tmp_path / "study"))
    assert code == 0, report
    assert asked == [4]


@pytest.mark.parametrize(
    "wrong", [["x"], ["A:a", "A:a"], ["{honest}:nobody", "{honest}:hospital-00"], ["{honest}:hospital-00"]]
)
def test_ledgers_that_cannot_be_composed_are_refused(honest: Path, wrong: list[str]) -> None:
    at = NOW.replace(tzinfo=None).isoformat(timespec="seconds")
    result = run("compose", *(name.format(honest=honest) for name in wrong), "--at", at)
    assert isinstance(result.exception, ConfigError)


def test_a_folder_that_does_not_verify_is_not_composed(study: Study, folder: Path) -> None:
    (folder / "ledgers" / f"{study.names[3]}.jsonl").unlink()
    ledgers = [f"{folder}:{name}" for name in study.names[:2]]
    at = NOW.replace(tzinfo=None).isoformat(timespec="seconds")
    assert isinstance(run("compose", *ledgers, "--at", at).exception, VerificationFailed)


# --- the hospital as a whole


HOSPITAL = HospitalPrivacy(noise_multiplier=2.0, max_update_norm=1.0, delta=1e-5, epsilon_budget=8.0)


@pytest.fixture(scope="module")
def noised() -> Study:
    return make_study(count=5, rounds=3, hospital=HOSPITAL)


def test_a_claim_for_the_hospital_verifies(noised: Study, tmp_path: Path) -> None:
    code, report = verify(noised, noised.write(tmp_path / "study"))
    assert code == 0, report
    for budget in report["budgets"].values():
        hospital = budget["hospital"]
        assert (
            0
            < hospital["if_nobody_colludes"]
            < hospital["google_rdp"]
            <= hospital["claimed"]
            <= HOSPITAL.epsilon_budget
        )
        assert hospital["neighbouring_relation"] == "one-hospital-zero"


HOSPITAL_LIES: dict[str, tuple[Callable[[list], object], str]] = {
    "a claim too low": (
        lambda b: b.__setitem__(4, replace(b[4], hospital=replace(b[4].hospital, epsilon=0.9 * b[4].hospital.epsilon))),
        "after 2 noised rounds",
    ),
    "no claim": (lambda b: b.__setitem__(4, replace(b[4], hospital=None)), "for the whole hospital is missing"),
    "a claim at another delta": (
        lambda b: b.__setitem__(4, replace(b[4], hospital=replace(b[4].hospital, delta=0.01))),
        "another delta",
    ),
    "a round without noise": (lambda b: b.__setitem__(2, replace(b[2], noise_share=None)), "the event of round 2"),
    "less noise": (
        lambda b: b.__setitem__(3, replace(b[3], noise_share=replace(b[3].noise_share, std=0.1))),
        "the event of round 3",
    ),
    "more shares counted on": (
        lambda b: b.__setitem__(3, replace(b[3], noise_share=replace(b[3].noise_share, contributors=5))),
        "the event of round 3",
    ),
    "noise in the public round": (
        lambda b: b.__setitem__(1, replace(b[1], noise_share=b[2].noise_share)),
        "the event of round 1",
    ),
    "the budget passed": (
        lambda b: b.__setitem__(4, replace(b[4], hospital=replace(b[4].hospital, epsilon=9.0))),
        "more than the budget",
    ),
}


@pytest.mark.parametrize("lie", sorted(HOSPITAL_LIES))
def test_a_lie_about_the_hospital_exits_8(noised: Study, tmp_path: Path, lie: str) -> None:
    change, named = HOSPITAL_LIES[lie]
    folder, name = noised.write(tmp_path / "study"), noised.names[2]
    transcript = (folder / "transcript.jsonl").read_bytes()
    noised.put(folder, transcript, {name: noised.ledger(name, transcript, change)})
    code, report = verify(noised, folder)
    assert code == VerificationFailed.exit_code
    ((found),) = report["failed"]
    assert found["name"] == f"ledgers/{name}.jsonl"
    assert named in found["detail"]


def test_noise_for_a_hospital_is_the_smallest_that_keeps_the_budget() -> None:
    result = run(
        "hospital", "--epsilon", 8, "--delta", 1e-5, "--rounds", 21, "--members", 12, "--contributors", 8, "--json"
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    noise = answer["noise_multiplier"]
    assert (
        answer["epsilon"]
        == hospital_epsilon(20 / (2 * noise**2), 1e-5)
        <= 8
        < hospital_epsilon(10 / (noise - 1e-4) ** 2, 1e-5)
    )
    assert answer["share_over_max_update_norm"] == pytest.approx(noise / 8**0.5)
    assert answer["noise_of_all_over_central"] == pytest.approx((12 / 8) ** 0.5)


def test_more_hospitals_cannot_be_counted_on_than_there_are() -> None:
    result = run("hospital", "--epsilon", 8, "--delta", 1e-5, "--rounds", 21, "--members", 4, "--contributors", 5)
    assert isinstance(result.exception, ConfigError)
