"""The records as each member was shown them: an aggregator that told two stories is caught, and nobody can frame an honest one."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from audit import records
from audit.attacks.forged import resign
from audit.records import VerificationReport, verify_folder
from keys.identity import Identity
from keys.labels import Label
from protocols import transcript as t
from protocols.chain import Unsigned, line_digest
from secgeo import cli
from secgeo.records import RECEIPTS, TRANSCRIPT
from tests.audit.factory import NOW, Study, make_study
from tests.audit.tamper import byte_changes
from tests.keys.factory import AGGREGATOR

ROUNDS = 2
AT = f"{NOW:%Y-%m-%dT%H:%M:%S}"


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(count=4, rounds=ROUNDS)


@pytest.fixture(scope="module", autouse=True)
def epsilon_at_once() -> Iterator[None]:
    """What the events cost is not this file's subject, and takes nearly all of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "epsilon_rdp", lambda events, delta: 0.0)
        patch.setattr(records, "epsilon_pld", lambda events, delta: 0.0)
        yield


@pytest.fixture(scope="module")
def honest(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study.write(tmp_path_factory.mktemp("honest") / "study")


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "study"))


def verify(study: Study, folder: Path) -> VerificationReport:
    return verify_folder(folder, authority_fingerprint=study.consortium.authority.fingerprint, now=NOW)


def failed(report: VerificationReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.ok}


def receipts(study: Study, folder: Path, index: int = 1) -> Path:
    return folder / RECEIPTS / f"{study.names[index]}.jsonl"


def give(study: Study, folder: Path, content: bytes) -> VerificationReport:
    """One member hands in these receipts, and the authority seals the folder in good faith."""
    receipts(study, folder).write_bytes(content)
    study.seal(folder)
    return verify(study, folder)


def refused(study: Study, folder: Path, content: bytes) -> str:
    """Why these receipts are refused; everything else must still hold. Empty if they are not."""
    found = failed(give(study, folder, content))
    name = f"{RECEIPTS}/{study.names[1]}.jsonl"
    assert set(found) <= {name}
    return found.get(name, "")


def shown(study: Study, folder: Path) -> list[bytes]:
    return receipts(study, folder).read_bytes().splitlines(keepends=True)


# --- two stories


def another(study: Study, line: bytes, **changes: object) -> bytes:
    return resign(study.consortium.identities[AGGREGATOR], line, **changes)


def record(line: bytes) -> t.RoundRecord:
    body = msgspec.json.decode(line, type=t._TranscriptEntry).body
    assert isinstance(body, t.RoundRecord)
    return body


def at_another_place(study: Study, line: bytes) -> bytes:
    """The same record, as line 77 of another chain."""
    unsigned = Unsigned(77, "0" * 64, record(line))
    signature = study.consortium.identities[AGGREGATOR].sign(Label.TRANSCRIPT, msgspec.json.encode(unsigned)).hex()
    return msgspec.json.encode(t._TranscriptEntry(77, "0" * 64, unsigned.body, signature)) + b"\n"


STORIES: dict[str, Callable[[Study, bytes], bytes]] = {
    "other survivors": lambda s, line: another(
        s,
        line,
        survivors=record(line).survivors[:3],
        dropped=(t.Dropped(s.names[3], "upload"),),
    ),
    "other uploads": lambda s, line: another(
        s,
        line,
        survivors=tuple(msgspec.structs.replace(x, upload_digest="1" * 64) for x in record(line).survivors),
    ),
    "other votes": lambda s, line: another(
        s, line, survivors=tuple(msgspec.structs.replace(x, signature="") for x in record(line).survivors)
    ),
    "another sum": lambda s, line: another(s, line, aggregate_digest="1" * 64),
    "another attempt": lambda s, line: another(s, line, attempt=2),
    "other times": lambda s, line: another(s, line, seconds=0.5),
    "another place in the chain": at_another_place,
}


@pytest.mark.parametrize("number", range(1, ROUNDS + 1))
@pytest.mark.parametrize("story", sorted(STORIES))
def test_two_signed_records_of_a_round_are_named_as_equivocation(
    study: Study, folder: Path, story: str, number: int
) -> None:
    lines = shown(study, folder)
    told = STORIES[story](study, lines[number - 1])
    other, lines[number - 1] = lines[number - 1], told
    detail = refused(study, folder, b"".join(lines))
    assert f"EQUIVOCATION: the aggregator has signed two records of round {number}" in detail
    for line in (told, other):
        assert line_digest(line).hex()[:16] in detail
        assert f"{len(record(line).survivors)} contributors, sum {record(line).aggregate_digest[:16]}" in detail


@pytest.mark.parametrize("first", [True, False])
def test_the_record_of_the_transcript_beside_it_hides_no_second_one(study: Study, folder: Path, first: bool) -> None:
    one, two = shown(study, folder)
    told = STORIES["another sum"](study, one)
    pair = [told, one] if first else [one, two, told]
    assert "EQUIVOCATION" in refused(study, folder, b"".join(pair))


def test_a_single_member_that_was_told_the_truth_convicts_a_lying_transcript(study: Study, folder: Path) -> None:
    """All but one collude and hand in the story of the transcript."""
    genuine = receipts(study, folder).read_bytes()
    transcript = study.transcript(lambda bodies: bodies.__setitem__(3, study.round_record(2, attempt=2)))
    study.put(folder, transcript, {name: study.ledger(name, transcript) for name in study.names})
    assert verify(study, folder).ok
    assert "EQUIVOCATION: the aggregator has signed two records of round 2" in refused(study, folder, genuine)


def test_a_round_that_the_transcript_hides_is_found_by_its_receipt(study: Study, folder: Path) -> None:
    """Also where no ledger tells of it: the others have booked nothing, and their last record is of round 1."""
    genuine = receipts(study, folder).read_bytes()

    def hide(bodies: list[t.Body]) -> None:
        bodies[3:] = [t.RoundAbandoned(2, 1, "too few", ()), t.StudyClosed(1, "x")]

    transcript = study.transcript(hide)
    study.put(folder, transcript, {name: study.ledger(name, transcript) for name in study.names})
    (folder / "sums" / "round-0002.u32").unlink()
    study.seal(folder)
    assert verify(study, folder).ok
    assert "signed a record of round 2 that the transcript hides" in refused(study, folder, genuine)


@pytest.mark.parametrize("number", [0, ROUNDS + 1, 10**6])
def test_a_record_of_a_round_that_was_never_agreed(study: Study, folder: Path, number: int) -> None:
    lines = shown(study, folder)
    content = b"".join([*lines, another(study, lines[0], round=number)])
    assert f"round {number} that the transcript hides" in refused(study, folder, content)


# --- framing the aggregator


def signed_by(identity: Identity, label: Label, line: bytes, **changes: object) -> bytes:
    body = msgspec.structs.replace(record(line), **changes)
    entry = msgspec.json.decode(line, type=t._TranscriptEntry)
    unsigned = Unsigned(entry.seq, entry.prev, body)
    signature = identity.sign(label, msgspec.json.encode(unsigned)).hex()
    return msgspec.json.encode(t._TranscriptEntry(entry.seq, entry.prev, body, signature)) + b"\n"


def test_a_record_that_the_aggregator_never_signed_convicts_nobody(study: Study, folder: Path) -> None:
    line, *rest = shown(study, folder)
    forgeries = [
        signed_by(study.consortium.identities[study.names[1]], Label.TRANSCRIPT, line, upload_bytes=1),
        signed_by(study.consortium.identities[AGGREGATOR], Label.LEDGER, line, upload_bytes=1),
        line.replace(b'"upload_bytes":1000', b'"upload_bytes":1001'),
    ]
    for forged in forgeries:
        assert forged != line
        detail = refused(study, folder, b"".join([forged, *rest]))
        assert detail
        assert "EQUIVOCATION" not in detail


def test_a_receipt_of_another_study_convicts_nobody(study: Study, folder: Path) -> None:
    """One aggregator may serve two studies of one roster: its record of the other is no lie about this one."""
    second = study.with_sections(study={"id": "second"})
    content = b"".join(second.shown(second.transcript()))
    detail = refused(study, folder, content)
    assert "another agreement" in detail
    assert "EQUIVOCATION" not in detail


# --- what is no receipt


def test_no_other_signed_line_is_a_receipt(study: Study, folder: Path) -> None:
    lines = shown(study, folder)
    bodies = [
        study.opened(),
        study.receipts(1, line_digest(lines[0])),
        t.RoundAbandoned(1, 1, "x", ()),
        t.Misbehaved(1, study.names[0], "x"),
        t.Disputed(1, 1, study.names[0], study.names[1]),
        t.StudyClosed(ROUNDS, "x"),
    ]
    for body, line in zip(bodies, study.sign_transcript(bodies), strict=True):
        assert f"a {type(body).__name__} is no receipt" in refused(study, folder, b"".join([*lines, line]))
    ledger = (folder / "ledgers" / f"{study.names[1]}.jsonl").read_bytes().splitlines(keepends=True)
    assert refused(study, folder, ledger[0])


def test_one_changed_byte_is_found_also_where_the_manifest_was_signed_after_it(study: Study, folder: Path) -> None:
    data = receipts(study, folder).read_bytes()
    chosen = sorted({0, len(data) - 1, *random.Random(5).sample(range(len(data)), 8)})  # noqa: S311
    for position, changed in byte_changes(data, chosen):
        assert refused(study, folder, changed), f"byte {position} can be changed"


RUBBISH = [
    b"\n",
    b" ",
    b"{}\n",
    b"null\n",
    b"\0" * 100,
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b"x" * (2 << 20) + b"\n",
]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=range(len(RUBBISH)))
def test_rubbish_behind_or_instead_of_receipts_is_a_failed_check(study: Study, folder: Path, rubbish: bytes) -> None:
    genuine = receipts(study, folder).read_bytes()
    for content in (rubbish, genuine + rubbish, rubbish + genuine, genuine[:-7], genuine[:-1]):
        assert refused(study, folder, content)


def test_a_folder_in_place_of_receipts_is_a_failed_check(study: Study, folder: Path) -> None:
    path = receipts(study, folder)
    path.unlink()
    path.mkdir()
    (path / "x").write_bytes(b"x")
    study.seal(folder)
    assert list(failed(verify(study, folder))) == [f"{RECEIPTS}/{path.name}"]


def test_receipts_of_nobody_in_the_study_are_found(study: Study, folder: Path) -> None:
    shutil.copy(receipts(study, folder), folder / RECEIPTS / "hospital-99.jsonl")
    study.seal(folder)
    assert failed(verify(study, folder)) == {RECEIPTS: f"{RECEIPTS}/hospital-99.jsonl belongs to no member"}


def test_true_receipts_harm_nobody_in_whatever_order(study: Study, folder: Path) -> None:
    one, two = shown(study, folder)
    for content in (two + one, one + two + two):
        report = give(study, folder, content)
        assert report.ok, failed(report)
        assert report.warnings == []


# --- receipts that are not there


def test_missing_receipts_are_named_in_a_warning(study: Study, folder: Path) -> None:
    for index in (1, 2):
        receipts(study, folder, index).unlink()
    study.seal(folder)
    report = verify(study, folder)
    assert report.ok, failed(report)
    assert report.warnings == [
        f"{study.names[index]} gave no receipt of its upload in round 1, 2: it may have been told another story"
        for index in (1, 2)
    ]


def test_a_member_in_no_sum_owes_no_receipts(study: Study, folder: Path) -> None:
    present, lost = study.names[:3], study.names[3]

    def change(bodies: list[t.Body]) -> None:
        for index in (1, 3):
            bodies[index] = study.round_record(index // 2 + 1, survivors=present)

    transcript = study.transcript(change)
    study.put(folder, transcript, {name: study.ledger(name, transcript) for name in study.names})
    receipts(study, folder, 3).unlink()
    study.seal(folder)
    report = verify(study, folder)
    assert report.ok, failed(report)
    assert not [warning for warning in report.warnings if lost in warning]


@pytest.mark.parametrize("kept", [0, 1])
def test_receipts_that_leave_out_a_round_are_named_in_a_warning(study: Study, folder: Path, kept: int) -> None:
    """Whoever was told another story can also leave that line out: then this round has no witness but the transcript."""
    report = give(study, folder, b"".join(shown(study, folder)[:kept]))
    assert any(study.names[1] in warning for warning in report.warnings)


# --- the command line


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["verify", *map(str, arguments)])


def two_stories(study: Study, folder: Path) -> str:
    one, two = shown(study, folder)
    receipts(study, folder).write_bytes(STORIES["another sum"](study, one) + two)
    study.seal(folder)
    return study.consortium.authority.fingerprint


def test_the_command_exits_8_and_names_who_was_told_another_story(study: Study, folder: Path) -> None:
    fingerprint = study.consortium.authority.fingerprint
    good = run(folder, "--authority", fingerprint, "--at", AT)
    assert (good.exit_code, "every check holds" in good.output, "FAILED" in good.output) == (0, True, False)

    two_stories(study, folder)
    bad = run(folder, "--authority", fingerprint, "--at", AT)
    assert bad.exit_code == 8
    lines = [line for line in bad.output.splitlines() if line.startswith("FAILED")]
    assert len(lines) == 1
    assert lines[0].startswith(f"FAILED  {RECEIPTS}/{study.names[1]}.jsonl: EQUIVOCATION")
    assert bad.output.splitlines()[-1] == "verification FAILED"


def test_the_command_gives_one_json_object(study: Study, folder: Path) -> None:
    fingerprint = study.consortium.authority.fingerprint
    good = run(folder, "--authority", fingerprint, "--at", AT, "--json")
    report = json.loads(good.stdout)
    assert (good.exit_code, report["ok"], report["warnings"]) == (0, True, [])
    assert set(report["epsilon"]) == set(study.names)

    two_stories(study, folder)
    bad = run(folder, "--authority", fingerprint, "--at", AT, "--json")
    report = json.loads(bad.stdout)
    assert (bad.exit_code, report["ok"]) == (8, False)
    (check,) = [check for check in report["checks"] if not check["ok"]]
    assert check["name"] == f"{RECEIPTS}/{study.names[1]}.jsonl"
    assert check["detail"].startswith("EQUIVOCATION")


def test_exit_codes_of_other_refusals(study: Study, honest: Path, tmp_path: Path) -> None:
    fingerprint = study.consortium.authority.fingerprint
    grouped = " ".join(fingerprint[start : start + 4].upper() for start in range(0, 64, 4))
    assert run(honest, "--authority", grouped, "--at", AT).exit_code == 0
    assert run(honest, "--authority", "0" * 64, "--at", AT).exit_code == 8
    assert run(honest, "--authority", fingerprint, "--at", "2029-06-01").exit_code == 8
    assert run(tmp_path / "missing", "--at", AT, "--json").exit_code == 8
    assert run(honest / TRANSCRIPT, "--at", AT).exit_code == 8
    assert run().exit_code == 2
    assert run(honest, "--at", "yesterday").exit_code == 2
    unpinned = run(honest, "--at", AT)
    assert unpinned.exit_code == 0
    assert "no authority was pinned" in unpinned.output


@pytest.mark.parametrize("as_json", [False, True])
def test_half_a_fingerprint_is_an_error_and_no_verdict(
    study: Study,
    honest: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    half = study.consortium.authority.fingerprint[:32]
    options = ["--authority", half, *(["--json"] if as_json else [])]
    monkeypatch.setattr(sys, "argv", ["secgeo", "verify", str(honest), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (4, "")
    text = json.loads(err)["message"] if as_json else err
    assert "64 hexadecimal digits" in text
