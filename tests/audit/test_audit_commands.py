"""`secgeo audit`: from a real demonstration to a signed bundle, and everything that somebody might change in one afterwards."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from threadpoolctl import threadpool_info, threadpool_limits

from audit import bundle
from audit.bundle import Auditor
from audit.figures import figures
from audit.findings import Finding
from audit.report import render
from audit.run import Request, run_audit
from keys.errors import SecGeoError, VerificationFailed
from keys.identity import sign_labelled
from secgeo.accountant import epsilon_of
from secgeo.records import MANIFEST
from tests.secgeo.site import make_site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 900


def secgeo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "secgeo.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE, env=environment)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demonstration's records, and its authority."""
    folder = tmp_path_factory.mktemp("demo") / "records"
    done = secgeo("demo", "--rounds", 2, "--out", folder, "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])["authority_fingerprint"]


@pytest.fixture(scope="module")
def audited(demo: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole audit of it, and what it said."""
    folder = tmp_path_factory.mktemp("audit") / "bundle"
    done = secgeo("audit", "run", demo[0], "--authority", demo[1], "--out", folder, "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return folder, json.loads(done.stdout)


@pytest.fixture
def copy(audited: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(audited[0], tmp_path / "bundle"))


def reseal(folder: Path) -> None:
    """Sign what is there now: by whoever lies."""
    key = Ed25519PrivateKey.generate()
    auditor = Auditor("the auditor", key.public_key().public_bytes_raw().hex())
    bundle.seal(folder, auditor, lambda label, data: sign_labelled(key, label, data))


@pytest.mark.timeout(PATIENCE)
def test_an_audit_of_the_demonstration_breaks_no_promise(audited: tuple[Path, dict[str, Any]]) -> None:
    folder, said = audited
    assert said["ok"]
    assert {finding["part"] for finding in said["findings"]} == {"records", "training", "leakage", "protocol"}
    held = [finding for finding in said["findings"] if finding["status"] == "held"]
    assert len(held) > len(said["findings"]) / 2
    for part in ("records", "training", "leakage", "protocol"):
        assert any(finding["part"] == part for finding in held)
    tested = {f["name"]: f["status"] for f in said["findings"] if f["part"] == "training"}
    weak = {name for name, status in tested.items() if status == "not testable"}
    assert "broken" not in tested.values()
    assert all(name.startswith(("mislabelled", "out of distribution")) for name in weak), weak
    assert said["about"]["not_done"] == {}
    assert json.loads((folder / "verdict.json").read_bytes())["findings"] == said["findings"]


@pytest.mark.timeout(PATIENCE)
def test_everything_in_the_report_can_be_computed_again(audited: tuple[Path, dict[str, Any]]) -> None:
    done = secgeo("audit", "verify", audited[0], "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["findings"] == audited[1]["findings"]
    assert secgeo("audit", "verify", audited[0], "--auditor", said["auditor"]).returncode == 0
    other = secgeo("audit", "verify", audited[0], "--auditor", "ab" * 32)
    assert other.returncode == 8
    assert "signed by" in other.stderr


@pytest.mark.timeout(PATIENCE)
def test_no_byte_of_any_file_can_change_unseen(copy: Path) -> None:
    bundle.check_seal(copy, None)
    names = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    assert len(names) > 20
    for path in names:
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(SecGeoError):
            bundle.check_seal(copy, None)
        path.write_bytes(kept)
    (copy / "evidence" / "one-more.json").write_text("{}")
    with pytest.raises(VerificationFailed, match="one-more"):
        bundle.check_seal(copy, None)


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_bytes())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def without_records_of_one_hospital(folder: Path) -> None:
    next((folder / "evidence" / "records" / "ledgers").iterdir()).unlink()


LIES: dict[str, Callable[[Path], None]] = {
    "a broken promise that held": edit("verdict.json", lambda v: v["findings"][0].update(detail="all is well")),
    "a finding left out": edit("verdict.json", lambda v: v["findings"].pop()),
    "less noise in the evidence": edit(
        "evidence/conformance.json", lambda v: v["noise"][0].update(mean_square=0.01)
    ),
    "another claim": edit("evidence/training.json", lambda v: v["attacks"][0]["claim"].update(epsilon=99.0)),
    "scores that say nothing": edit(
        "evidence/training.json", lambda v: v["attacks"][0].update(scores=[0.0] * len(v["attacks"][0]["scores"]))
    ),
    "a part left out": lambda folder: (folder / "evidence" / "leakage.json").unlink(),
    "a ledger left out": without_records_of_one_hospital,
    "a friendlier report": lambda folder: (folder / "report.html").write_text("<h1>All is well</h1>"),
    "evidence that is none": lambda folder: (folder / "evidence" / "training.json").write_text("{}"),
    "no agreement": lambda folder: shutil.rmtree(folder / "evidence" / "study"),
    "another study": edit("evidence/about.json", lambda v: v.update(study="another")),
    "another hospital": edit("evidence/about.json", lambda v: v.update(node="charite")),
    "another agreement": edit("evidence/about.json", lambda v: v.update(agreement_digest="ab" * 32)),
    "data of another name": edit("evidence/about.json", lambda v: v.update(data="40,000 patients of a large hospital")),
    "a time below none": edit("evidence/about.json", lambda v: v["seconds"].update(training=-5.0)),
    "one more page": lambda folder: (folder / "evidence" / "addendum.html").write_text("<h1>All is well</h1>") and None,
    "a verdict that says two things": lambda folder: (folder / "verdict.json").write_text(
        (folder / "verdict.json").read_text().replace('"ok": true', '"ok": false,\n "ok": true')
    ) and None,
    "another format": edit("evidence/about.json", lambda v: v.update(format="secgeo-audit/9")),
}  # fmt: skip


def fewer_canaries(training: Any) -> None:
    for attack in training["attacks"]:
        attack.update(included=[True, False, True, False], scores=[0.0, 0.1, 0.2, 0.3])


def more_steps(training: Any) -> None:
    for attack in training["attacks"]:
        claim = attack["claim"]
        booked = [(claim["noise_multiplier"], claim["sample_rate"], claim["steps"] + 1)]
        claim.update(steps=claim["steps"] + 1, epsilon=epsilon_of(booked, claim["delta"]))


def none_among_the_records(training: Any) -> None:
    training.update(attacks=training["attacks"][:2], others=False)


def of_one_unit(conformance: Any) -> None:
    sampling = conformance["sampling"]
    steps = len(sampling["sizes"])
    often = round(steps * conformance["sample_rate"])
    sizes = [1] * often + [0] * (steps - often)
    overlaps = [max(0, often - lag) for lag in range(1, steps)]
    sampling.update(units=1, expected_units=1, sizes=sizes, inclusions=[often], overlaps=overlaps)


def all_in(training: Any) -> None:
    for attack in training["attacks"]:
        attack.update(included=[True] * len(attack["included"]))


def all_skipped(protocol: Any) -> None:
    protocol["skipped"] += [{"name": a["name"], "row": a["row"], "why": "no time"} for a in protocol["played"]]
    protocol["played"] = []


def nothing_took_place(protocol: Any) -> None:
    for attack in protocol["played"]:
        attack["took_place"] = False


CAREFUL: dict[str, Callable[[Path], None]] = {
    "a part left out": lambda folder: (folder / "evidence" / "conformance.json").unlink(),
    "no training at all": lambda folder: [
        (folder / "evidence" / f"{part}.json").unlink() for part in ("conformance", "training", "leakage")
    ] and None,
    "no records": lambda folder: shutil.rmtree(folder / "evidence" / "records"),
    "no noise agreed": edit("evidence/conformance.json", lambda v: v.update(noise_multiplier=0.0)),
    "a generous claim": edit("evidence/training.json", lambda v: v["attacks"][0]["claim"].update(epsilon=99.0)),
    "a generous noise": edit("evidence/training.json", lambda v: v["attacks"][0]["claim"].update(noise_multiplier=0.4)),
    "training of another hospital": edit("evidence/training.json", lambda v: v.update(member="hospital-2-standard-error")),
    "leakage of another hospital": edit("evidence/leakage.json", lambda v: v.update(member="hospital-2-standard-error")),
    "white-box tests of another hospital": edit(
        "evidence/conformance.json", lambda v: v.update(member="hospital-2-standard-error")
    ),
    "no noise measured": edit(
        "evidence/conformance.json", lambda v: v.update(noise=[], step_mean_squares=[], step_correlations=[])
    ),
    "noise of few steps": edit(
        "evidence/conformance.json",
        lambda v: v.update(step_mean_squares=v["step_mean_squares"][:5], step_correlations=v["step_correlations"][:4]),
    ),
    "the influence of one": edit("evidence/conformance.json", lambda v: v.update(influences=v["influences"][:1])),
    "six samples": edit("evidence/conformance.json", lambda v: v["sampling"].update(sizes=v["sampling"]["sizes"][:6])),
    "no steps": edit(
        "evidence/conformance.json", lambda v: v["bookkeeping"].update(touched=0, moved=0, booked=0, reported=0, agreed=0)
    ),
    "nothing compared": edit("evidence/conformance.json", lambda v: v.update(compared=0)),
    "no canaries": edit("evidence/training.json", lambda v: v.update(attacks=[])),
    "few canaries": edit("evidence/training.json", fewer_canaries),
    "more steps": edit("evidence/training.json", more_steps),
    "no canaries among the records": edit("evidence/training.json", none_among_the_records),
    "a model of few parameters": edit("evidence/training.json", lambda v: v.update(parameters=4)),
    "the profile of another audit": edit("evidence/about.json", lambda v: v.update(profile="full")),
    "no attacks on the sum": edit("evidence/protocol.json", lambda v: v.update(played=[])),
    "samples of one unit": edit("evidence/conformance.json", of_one_unit),
    "samples without bound": edit("evidence/conformance.json", lambda v: v["sampling"].update(sizes=[10**15] * 300)),
    "influences of nobody": edit(
        "evidence/conformance.json", lambda v: v.update(influences=[{"unit": "x", "norm": 0.0}] * len(v["influences"]))
    ),
    "one value compared": edit("evidence/conformance.json", lambda v: v.update(compared=1)),
    "training of one unit": edit("evidence/training.json", lambda v: v.update(units=1)),
    "a larger model": edit("evidence/training.json", lambda v: v.update(parameters=10**9)),
    "all canaries in": edit("evidence/training.json", all_in),
    "one score": edit("evidence/training.json", lambda v: v["attacks"][1].update(scores=[0.5] * len(v["attacks"][1]["scores"]))),
    "one attack on the sum left out": edit("evidence/protocol.json", lambda v: v["played"].pop()),
    "attacks on the sum that were skipped": edit("evidence/protocol.json", all_skipped),
    "attacks that never took place": edit("evidence/protocol.json", nothing_took_place),
    "no look at uploads": edit("evidence/protocol.json", lambda v: v.update(series=[], pairs=[], correlations=[])),
    "no secrets looked for": edit("evidence/protocol.json", lambda v: v.update(secrets_searched=0)),
    "no rounds looked at": edit("evidence/protocol.json", lambda v: v["records"].update(rounds=0, receipts=0, repeats=[])),
    "few scores of leakage": edit(
        "evidence/leakage.json",
        lambda v: [row.update(members=row["members"][:9], others=row["others"][:9]) for row in v["membership"]],
    ),
    "few reconstructions": edit(
        "evidence/leakage.json", lambda v: [row.update(similarity=[s[:3] for s in row["similarity"][:3]]) for row in v["inversion"]]
    ),
    "no control": edit("evidence/protocol.json", lambda v: v.update(control=None)),
    "a larger cohort": edit("evidence/protocol.json", lambda v: v["parameters"].update(minimum_cohort=9)),
    "records of a configuration": edit("evidence/about.json", lambda v: v.update(kind="configuration")),
    "perfect attacks": edit(
        "evidence/leakage.json",
        lambda v: [row.update(members=[1e6 + s for s in row["members"]]) for row in v["membership"] if row["protection"] == "ours"],
    ),
}  # fmt: skip


@pytest.mark.timeout(PATIENCE)
def test_an_attack_that_was_not_played_makes_the_audit_incomplete(copy: Path) -> None:
    CAREFUL["one attack on the sum left out"](copy)
    verdict = bundle.judge(bundle.read_evidence(copy))
    assert verdict.missing == ("protocol",)
    (told,) = [finding for finding in verdict.findings if finding.name == bundle.NOT_TRIED]
    assert "did not take place: " in told.detail


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("lie", CAREFUL)
def test_a_careful_liar_gets_no_good_verdict(copy: Path, lie: str) -> None:
    CAREFUL[lie](copy)
    with contextlib.suppress(VerificationFailed):
        assert not bundle.judge(bundle.read_evidence(copy)).ok


@pytest.mark.timeout(PATIENCE)
def test_a_report_of_another_version_is_drawn_anew_not_believed(copy: Path, tmp_path: Path) -> None:
    edit("evidence/about.json", lambda v: v["versions"].update(numpy="9.9"))(copy)
    bundle.conclude(copy, render)
    (copy / "report.html").write_text("<h1>All is perfect</h1>")
    (copy / MANIFEST).unlink()
    (copy / f"{MANIFEST}.sig").unlink()
    reseal(copy)
    with pytest.raises(VerificationFailed, match="--report"):
        bundle.verify(copy, None, None, render)
    verdict, _, notes = bundle.verify(copy, None, None, render, tmp_path / "new.html")
    assert verdict.ok
    assert any("not compared" in note for note in notes)
    assert "perfect" not in (tmp_path / "new.html").read_text()


@pytest.mark.timeout(PATIENCE)
def test_a_study_of_one_round_spends_nothing_and_can_be_audited(tmp_path: Path) -> None:
    assert secgeo("demo", "--rounds", 1, "--out", tmp_path / "r", "--json").returncode == 0
    done = secgeo("audit", "run", tmp_path / "r", "--plant", "half-noise", "--out", tmp_path / "b", "--json")
    assert done.returncode == 8, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("lie", LIES)
def test_a_verdict_that_does_not_follow_is_found_although_it_is_signed(copy: Path, lie: str) -> None:
    LIES[lie](copy)
    (copy / MANIFEST).unlink()
    (copy / f"{MANIFEST}.sig").unlink()
    reseal(copy)
    with pytest.raises(SecGeoError):
        bundle.verify(copy, None, None, render)


@pytest.mark.timeout(PATIENCE)
def test_whoever_verifies_pins_the_authority(audited: tuple[Path, dict[str, Any]], demo: tuple[Path, str]) -> None:
    _, _, notes = bundle.verify(audited[0], None, demo[1], render)
    assert not any("authority" in note for note in notes)
    _, _, notes = bundle.verify(audited[0], None, None, render)
    assert any("--authority" in note for note in notes)
    with pytest.raises(SecGeoError, match="fingerprint"):
        bundle.verify(audited[0], None, "ab" * 32, render)


@pytest.mark.timeout(PATIENCE)
def test_the_users_own_settings_of_plots_change_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 5.0)
    bundle.verify(copy, None, None, render)
    assert matplotlib.rcParams["lines.linewidth"] == 5.0


@pytest.mark.parametrize("out", ["{}/audit", "{}/nowhere/../audit", "{}/nowhere/.."])
def test_an_audit_adds_nothing_to_what_it_audits(demo: tuple[Path, str], out: str) -> None:
    before = sorted(demo[0].rglob("*"))
    with pytest.raises(SecGeoError, match=r"not empty|nothing may be added"):
        run_audit(Request(demo[0], Path(out.format(demo[0]))), lambda *_: None)
    assert sorted(demo[0].rglob("*")) == before


def test_an_aggregators_configuration_is_told_from_a_nodes(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    with pytest.raises(SecGeoError, match="an aggregator's configuration"):
        run_audit(Request(site.config("aggregator"), tmp_path / "b"), lambda *_: None)


def test_a_report_is_not_written_over_another_file(copy: Path) -> None:
    done = secgeo("audit", "verify", copy, "--report", copy / "report.html")
    assert done.returncode == 3
    assert "exists" in done.stderr


def spoilt(value: Any, random: np.random.Generator) -> Any:
    """The value with one leaf, somewhere inside, replaced by something else."""
    if isinstance(value, dict | list) and value and random.random() < 0.97:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[int(random.integers(len(keys)))]
        other = dict(value) if isinstance(value, dict) else list(value)
        other[key] = spoilt(value[key], random)
        return other
    return [0, -1, 1e300, 2**62, 0.5, "", "x" * 50, [], {}, None, True][int(random.integers(11))]


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("part", ["conformance", "leakage", "protocol"])
def test_evidence_of_a_liar_gives_a_verdict_or_a_clear_error(audited: tuple[Path, dict[str, Any]], part: str) -> None:
    random, whole = np.random.default_rng(3), bundle.read_evidence(audited[0])
    seed = json.loads((audited[0] / "evidence" / f"{part}.json").read_bytes())
    alone = dict.fromkeys(bundle.PARTS) | {"records": None}
    decoded = 0
    for _ in range(150):
        try:
            evidence = msgspec.convert(spoilt(seed, random), bundle.PARTS[part])
        except msgspec.ValidationError:
            continue
        decoded += 1
        with contextlib.suppress(VerificationFailed):
            bundle.judge(dataclasses.replace(whole, **(alone | {part: evidence})))
    assert decoded > 20


@pytest.mark.timeout(PATIENCE)
def test_the_report_holds_everything_and_asks_for_nothing(audited: tuple[Path, dict[str, Any]]) -> None:
    page = (audited[0] / "report.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) >= 6
    for image in images:
        drawn = b64decode(image).decode()
        assert "<script" not in drawn
        assert not re.findall(r"""(?:href|url)\s*[=(]\s*["']?https?:""", drawn)
    assert page.index("No promise was broken") < page.index("Records and budgets") < page.index("Limits of the method")


@pytest.mark.timeout(PATIENCE)
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; .ci/run installs it")
def test_the_report_in_headless_chromium(audited: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [
        str(CHROMIUM),
        *quiet.split(),
        "--disable-component-update",
        "--disable-quic",
        f"--user-data-dir={tmp_path}",
    ]
    page = (audited[0] / "report.html").as_uri()
    for width in (400, 1200):
        done = subprocess.run(
            [*command, "--enable-logging=stderr", "--hide-scrollbars", f"--window-size={width},2000", "--dump-dom", page],
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert "No promise was broken" in done.stdout
        assert not re.findall(r"CONSOLE.*(?:Refused|Error|Failed)", done.stderr)
        picture = tmp_path / f"{width}.png"
        shot = [*command, "--hide-scrollbars", f"--window-size={width},2000", f"--screenshot={picture}", page]
        subprocess.run(shot, capture_output=True, check=True, timeout=120)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 20_000


def test_figures_fit_and_write_plain_numbers(audited: tuple[Path, dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drawn = [figure for part in figures(bundle.read_evidence(audited[0])).values() for figure in part]
    for figure in drawn:
        assert "$" not in figure.svg
        assert "mathdefault" not in figure.svg
    rocs = next(figure.svg for figure in drawn if figure.title == "Membership inference")
    for written in ("0.001", "0.1", "false positives", "guessing", "most that DP allows"):
        assert f">{written}</text>" in rocs


def test_an_audit_computes_on_one_thread(demo: tuple[Path, str], copy: Path, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def threads() -> set[int]:
        return {torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())}

    def draw(verdict: bundle.Verdict, evidence: bundle.Evidence) -> str:
        seen.append(threads())
        return render(verdict, evidence)

    def report(*_: object) -> None:
        seen.append(threads())
        raise StopError

    seen: list[set[int]] = []
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2):
            before = threads()
            bundle.verify(copy, None, None, draw)
            with pytest.raises(StopError):
                run_audit(Request(demo[0], tmp_path / "new"), report)
            after = threads()
    finally:
        torch.set_num_threads(1)
    assert seen == [{1}, {1}]
    assert before == after == {2}


def test_the_verdict_says_what_is_claimed(audited: tuple[Path, dict[str, Any]]) -> None:
    evidence = bundle.read_evidence(audited[0])
    box = (audited[0] / "report.html").read_text().split('<section class="verdict')[1].split("</section>")[0]
    assert evidence.records is not None
    claimed = max(claim or 0.0 for claim, _ in evidence.records.budgets.values())
    assert f"Claimed by the hospitals: epsilon at most {claimed:.2f} at delta 0.001, where one record is added" in box
    alone = dataclasses.replace(evidence, records=None)
    assert f"Claimed for 2 rounds: epsilon at most {claimed:.2f} at delta 0.001" in render(
        bundle.judge(evidence), alone
    )


def test_a_confidential_report_says_so_first(audited: tuple[Path, dict[str, Any]]) -> None:
    evidence = bundle.read_evidence(audited[0])
    verdict = bundle.judge(evidence)
    own = msgspec.structs.replace(evidence.about, kind="configuration")
    page = render(msgspec.structs.replace(verdict, about=own), evidence)
    assert page.index("Confidential.") < page.index("No promise was broken")
    assert "Confidential." not in render(verdict, evidence)


def test_words_from_outside_stay_words(audited: tuple[Path, dict[str, Any]]) -> None:
    evidence = bundle.read_evidence(audited[0])
    hostile = Finding("training", "<script>alert(1)</script>", "<b>", "broken", "<img src=x onerror=alert(1)>")
    page = render(bundle.Verdict(False, (), (hostile,), evidence.about), evidence)
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert "1 promise was</strong>" in page or "1 promise was broken" in page


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(("plant", "found"), [("half-noise", "noise"), ("not-finite", "sensitivity")])
def test_a_planted_bug_is_found(demo: tuple[Path, str], tmp_path: Path, plant: str, found: str) -> None:
    done = secgeo("audit", "run", demo[0], "--plant", plant, "--out", tmp_path / "b", "--json")
    assert done.returncode == 8
    said = json.loads(done.stdout)
    broken = {finding["name"] for finding in said["findings"] if finding["status"] == "broken"}
    assert found in broken
    assert "planted on purpose" in (tmp_path / "b" / "report.html").read_text()
    assert secgeo("audit", "verify", tmp_path / "b").returncode == 8


@pytest.mark.timeout(PATIENCE)
def test_a_hospital_audits_its_own_training(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    done = secgeo("audit", "run", site.config("hospital-1"), "--plant", "clip-off", "--out", tmp_path / "b", "--json")
    assert done.returncode == 8, done.stderr
    said = json.loads(done.stdout)
    assert said["about"]["node"] == "hospital-1"
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o700  # it is confidential
    assert {f["name"] for f in said["findings"] if f["status"] == "broken"} >= {"sensitivity"}


@pytest.mark.timeout(PATIENCE)
def test_records_that_were_changed_break_their_promise(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo[0], tmp_path / "records"))
    path = next((folder / "ledgers").iterdir())
    path.write_bytes(path.read_bytes().replace(b'"sample_rate":0.25', b'"sample_rate":0.20'))
    (folder / "split.json").unlink()
    (folder / "secret.key").write_text("a secret")
    done = secgeo("audit", "run", folder, "--out", tmp_path / "b", "--json")
    assert done.returncode == 8, done.stderr
    said = json.loads(done.stdout)
    broken = [f for f in said["findings"] if f["status"] == "broken"]
    assert any(f["part"] == "records" and "secret.key" in f["detail"] for f in broken)
    assert any(f["part"] == "records" and "changed" in f["detail"] for f in broken)
    assert not list((tmp_path / "b").rglob("secret.key"))
    assert "split.json" in said["about"]["not_done"]["training data"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("plant", [[], ["--plant", "half-noise"]])
def test_what_does_not_check_is_not_audited(demo: tuple[Path, str], tmp_path: Path, plant: list[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = secgeo("audit", "run", empty, *plant, "--out", tmp_path / "a")
    assert done.returncode == 3
    assert "no folder of records" in done.stderr
    folder = Path(shutil.copytree(demo[0], tmp_path / "records"))
    path = folder / "agreement.toml"
    path.write_bytes(path.read_bytes().replace(b"noise_multiplier", b"noise_multiplier ", 1))
    assert secgeo("audit", "run", folder, *plant, "--out", tmp_path / "b").returncode == 8
    assert secgeo("audit", "run", demo[0], *plant, "--authority", "ab" * 32, "--out", tmp_path / "c").returncode in (
        4,
        8,
    )
    assert not (tmp_path / "b").exists()


def test_a_folder_of_keys_is_not_copied(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    done = secgeo("audit", "run", site.config("hospital-1").parent, "--out", tmp_path / "b")
    assert done.returncode == 3
    assert not list(tmp_path.glob("b/**/*.key"))
    other = secgeo("audit", "run", site.config("hospital-1"), "--authority", "ab" * 32, "--out", tmp_path / "b")
    assert other.returncode == 3
    assert "pins" in other.stderr
    assert (
        secgeo("audit", "run", site.config("hospital-1"), "--node", "hospital-2", "--out", tmp_path / "b").returncode
        == 3
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 3, "does not exist"),
        (["{demo}", "--plant", "gremlins"], 3, "half-noise"),
        (["{demo}", "--profile", "slow"], 3, "fast or full"),
        (["{demo}", "--node", "hospital-77"], 3, "no member"),
        (["{demo}", "--out", "{demo}"], 3, "not empty"),
        (["{demo}", "--out", "/proc/none/b"], 3, "cannot write"),
    ],
)
def test_wrong_options_say_so(
    demo: tuple[Path, str], tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    given = [argument.format(demo=demo[0]) for argument in arguments]
    out = [] if "--out" in given else ["--out", tmp_path / "b"]
    done = secgeo("audit", "run", *given, *out)
    assert done.returncode == code, done.stderr
    assert says in done.stderr


def test_verify_of_nothing_fails_without_a_crash(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        done = secgeo("audit", "verify", folder)
        assert done.returncode in (3, 4, 8)
        assert "Traceback" not in done.stderr
