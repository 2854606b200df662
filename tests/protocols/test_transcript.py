"""The transcript: what verifies, every byte of it, and everything an aggregator may lie about."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.errors import LocalProtocolError, VerificationFailed
from keys.labels import Label
from protocols import transcript as t
from protocols.chain import GENESIS
from protocols.sealing import AttemptId
from tests.audit.factory import Study, make_study
from tests.audit.tamper import byte_changes, line_changes
from tests.keys.factory import AGGREGATOR

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(count=4, rounds=2)


def verify(study: Study, lines: bytes) -> dict[int, t.RoundRecord]:
    transcript = t.read_transcript(lines, study.aggregator_key)
    return t.verify_transcript(transcript, study.agreement, study.digest, study.public_keys)


def refuse(study: Study, lines: bytes, match: str | None = None) -> None:
    with pytest.raises(VerificationFailed, match=match):
        verify(study, lines)


def test_an_honest_transcript_verifies(study: Study) -> None:
    records = verify(study, study.transcript())
    assert sorted(records) == [1, 2]
    assert [s.node_id for s in records[1].survivors] == study.names


def test_every_changed_byte_is_refused() -> None:
    small = make_study(count=3, rounds=1)
    lines = small.transcript()
    verify(small, lines)
    for position, changed in byte_changes(lines):
        try:
            verify(small, changed)
        except VerificationFailed:
            continue
        pytest.fail(f"byte {position} can be changed: {changed[max(0, position - 30) : position + 30]!r}")


def test_lines_cannot_be_deleted_doubled_swapped_cut_or_added(study: Study) -> None:
    for what, changed in line_changes(study.transcript()):
        try:
            verify(study, changed)
        except VerificationFailed:
            continue
        pytest.fail(what)


@given(st.binary(max_size=400))
def test_garbage_is_refused_and_never_crashes(data: bytes) -> None:
    study = make_cached()
    refuse(study, data)
    with pytest.raises(VerificationFailed):
        t.read_line(data, study.aggregator_key)


_CACHE: list[Study] = []


def make_cached() -> Study:
    if not _CACHE:
        _CACHE.append(make_study())
    return _CACHE[0]


def other_spellings(line: bytes) -> dict[str, bytes]:
    value = json.loads(line)
    entry = {key: value[key] for key in ("seq", "prev", "body", "signature")}
    return {
        "spaces": json.dumps(entry).encode() + b"\n",
        "key order": json.dumps(dict(reversed(entry.items())), separators=(",", ":")).encode() + b"\n",
        "unknown field": line[:-2] + b',"x":1}\n',
        "doubled key": line[:-2] + b',"seq":' + str(value["seq"]).encode() + b"}\n",
        "escaped letter": line.replace(b'"type":"', b'"\\u0074ype":"', 1),
        "upper-case hex": line.replace(value["signature"].encode(), value["signature"].upper().encode()),
        "float for an integer": line.replace(b'"seq":0', b'"seq":0.0'),
        "exponent": line.replace(b"0.25", b"25e-2"),
        "leading space": b" " + line,
        "no newline": line[:-1],
    }


@pytest.mark.parametrize("spelling", sorted(other_spellings(make_study().transcript().splitlines(keepends=True)[0])))
def test_the_same_value_in_another_spelling_is_refused(study: Study, spelling: str) -> None:
    for line in study.transcript().splitlines(keepends=True)[:2]:
        changed = other_spellings(line)[spelling]
        if changed != line:
            with pytest.raises(VerificationFailed):
                t.read_line(changed, study.aggregator_key)


def test_a_line_signed_by_another_key_or_under_another_label_is_refused(study: Study) -> None:
    line = study.transcript().splitlines(keepends=True)[0]
    with pytest.raises(VerificationFailed):
        t.read_line(line, study.public_keys[study.names[0]])
    entry = msgspec.json.decode(line)
    unsigned = msgspec.json.encode({key: entry[key] for key in ("seq", "prev", "body")})
    identity = study.consortium.identities[AGGREGATOR]
    assert identity.sign(Label.TRANSCRIPT, unsigned).hex() == entry["signature"]
    entry["signature"] = identity.sign(Label.LEDGER, unsigned).hex()
    with pytest.raises(VerificationFailed):
        t.read_line(msgspec.json.encode(entry) + b"\n", study.aggregator_key)


LIES = {
    "no opening": lambda s, b: b.pop(0),
    "opened twice": lambda s, b: b.insert(1, b[0]),
    "another agreement": lambda s, b: b.__setitem__(0, replace(b[0], agreement_digest="1" * 64)),
    "another study": lambda s, b: b.__setitem__(0, replace(b[0], study_id="other")),
    "another roster": lambda s, b: b.__setitem__(0, replace(b[0], roster_digest="1" * 64)),
    "an older roster": lambda s, b: b.__setitem__(0, replace(b[0], roster_version=0)),
    "a record's agreement": lambda s, b: b.__setitem__(1, s.round_record(1, agreement_digest="1" * 64)),
    "a record's roster": lambda s, b: b.__setitem__(1, s.round_record(1, roster_epoch=9)),
    "a record that builds on another sum": lambda s, b: b.__setitem__(3, s.round_record(2, builds_on="1" * 64)),
    "a first record that builds on a sum": lambda s, b: b.__setitem__(1, s.round_record(1, builds_on="1" * 64)),
    "a study key where there is none": lambda s, b: b.__setitem__(1, s.round_record(1, study_key="1" * 64)),
    "another protocol": lambda s, b: b.__setitem__(1, s.round_record(1, protocol="plain")),
    "a stranger in the cohort": lambda s, b: b.__setitem__(1, s.round_record(1, cohort=(*s.names, "stranger"))),
    "a stranger survives": lambda s, b: b.__setitem__(1, s.round_record(1, survivors=[*s.names, "stranger"])),
    "a survivor outside the cohort": lambda s, b: b.__setitem__(1, s.round_record(1, cohort=s.names[:-1])),
    "a survivor twice": lambda s, b: b.__setitem__(1, s.round_record(1, survivors=sorted([*s.names, s.names[0]]))),
    "survivors out of order": lambda s, b: b.__setitem__(1, s.round_record(1, survivors=s.names[::-1])),
    "a cohort member twice": lambda s, b: b.__setitem__(1, s.round_record(1, cohort=sorted([*s.names, s.names[0]]))),
    "a lost node is not told": lambda s, b: b.__setitem__(1, s.round_record(1, survivors=s.names[:-1], dropped=())),
    "a lost node twice": lambda s, b: b.__setitem__(
        1, s.round_record(1, survivors=s.names[:-1], dropped=(t.Dropped(s.names[-1], "x"),) * 2)
    ),
    "too few survivors": lambda s, b: b.__setitem__(1, s.round_record(1, survivors=s.names[:2])),
    "too few votes": lambda s, b: b.__setitem__(1, s.round_record(1, voters=s.names[:2])),
    "votes for another attempt": lambda s, b: b.__setitem__(1, replace(s.round_record(1), attempt=2)),
    "votes for another round": lambda s, b: b.__setitem__(1, replace(s.round_record(2), round=1)),
    "more attempts than agreed": lambda s, b: b.__setitem__(1, s.round_record(1, attempt=4)),
    "attempt zero": lambda s, b: b.__setitem__(1, s.round_record(1, attempt=0)),
    "a round told twice": lambda s, b: b.insert(3, s.round_record(1)),
    "a round left out": lambda s, b: b.__delitem__(slice(1, 3)),
    "more rounds than agreed": lambda s, b: b.insert(-1, s.round_record(3)),
    "more abandoned rounds than agreed": lambda s, b: b.insert(-1, t.RoundAbandoned(3, 1, "x", ())),
    "a round recorded and abandoned": lambda s, b: b.insert(2, t.RoundAbandoned(1, 1, "x", ())),
    "blaming a stranger": lambda s, b: b.__setitem__(slice(3, 5), [t.RoundAbandoned(2, 1, "x", ("stranger",))]),
    "somebody misbehaved in a round that never was": lambda s, b: b.insert(1, t.Misbehaved(9, s.names[0], "x")),
    "a stranger misbehaved": lambda s, b: b.insert(1, t.Misbehaved(1, "stranger", "x")),
    "receipts of nothing": lambda s, b: b.insert(1, s.receipts(1, bytes(32))),
    "receipts of another record": lambda s, b: b.__setitem__(2, s.receipts(1, bytes(32))),
    "receipts twice": lambda s, b: b.insert(2, b[2]),
    "no end": lambda s, b: b.pop(),
    "two ends": lambda s, b: b.append(b[-1]),
    "a wrong count at the end": lambda s, b: b.__setitem__(-1, t.StudyClosed(1, "x")),
    "something after the end": lambda s, b: b.append(t.Misbehaved(1, s.names[0], "x")),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_an_aggregator_that_signs_a_lie_is_caught(study: Study, lie: str) -> None:
    refuse(study, study.transcript(lambda bodies: LIES[lie](study, bodies)))


def test_three_contributors_are_needed_whatever_the_agreement_says() -> None:
    study = make_study(count=4, rounds=1)
    weak = study.with_sections(secure_sum={"minimum_cohort": 2, "threshold": 2})
    record = study.round_record(1, survivors=study.names[:2])
    with pytest.raises(VerificationFailed, match="fewer than 3 survivors"):
        t.verify_round(record, weak.agreement, study.digest, study.public_keys)


def test_a_vote_by_another_node_is_refused_even_above_the_threshold(study: Study) -> None:
    record = study.round_record(1)
    first, second, *rest = record.survivors
    forged = replace(record, survivors=(replace(first, signature=second.signature), second, *rest))
    with pytest.raises(VerificationFailed, match=first.node_id):
        t.verify_round(forged, study.agreement, study.digest, study.public_keys)


def test_a_survivor_that_vanished_before_its_vote_is_allowed(study: Study) -> None:
    record = study.round_record(1, voters=study.names[:3], dropped=(t.Dropped(study.names[3], "votes"),))
    t.verify_round(record, study.agreement, study.digest, study.public_keys)


def test_receipts_must_name_the_record_that_they_sign(study: Study) -> None:
    lines = study.sign_transcript([study.opened(), study.round_record(1)])
    honest = study.receipts(1, t.line_digest(lines[1]))
    lie = replace(honest, record_digest="1" * 64)
    refuse(study, study.transcript(lambda bodies: bodies.__setitem__(2, lie)), "another record")


def test_long_lines_are_refused_before_they_are_decoded(study: Study) -> None:
    with pytest.raises(VerificationFailed, match="longer than 1 MiB"):
        t.read_line(b"[" * (1 << 20) + b"\n", study.aggregator_key)


@pytest.mark.parametrize("forgery", ["stranger", "twice", "swapped"])
def test_forged_receipts_are_refused(study: Study, forgery: str) -> None:
    line = study.sign_transcript([study.opened(), study.round_record(1)])[1]
    good = study.receipts(1, t.line_digest(line)).countersignatures
    bad = {
        "stranger": (*good, replace(good[0], node_id="stranger")),
        "twice": (good[0], *good),
        "swapped": (replace(good[0], signature=good[1].signature), *good[1:]),
    }[forgery]

    def change(bodies: list) -> None:
        bodies[2] = t.Receipts(1, t.line_digest(line).hex(), bad)

    refuse(study, study.transcript(change), "receipt|countersigned")


def test_abandoned_rounds_and_misbehaviour_are_allowed(study: Study) -> None:
    def change(bodies: list) -> None:
        bodies[1:3] = [t.RoundAbandoned(1, 3, "too few nodes", (study.names[3],)), t.Misbehaved(1, study.names[3], "x")]
        bodies[-1] = t.StudyClosed(1, "all rounds are done")

    assert sorted(verify(study, study.transcript(change))) == [2]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_line_that_no_reader_would_accept_is_not_made(study: Study, seconds: float) -> None:
    writer = t.TranscriptWriter(study.consortium.identities[AGGREGATOR])
    with pytest.raises(LocalProtocolError):
        writer.append(study.round_record(1, seconds=seconds))
    line = writer.append(study.opened())
    assert msgspec.json.decode(line)["seq"] == 0
    assert msgspec.json.decode(line)["prev"] == GENESIS


def test_statements_are_unambiguous() -> None:
    digest = bytes(32)
    statements = {
        t.survivor_statement(AttemptId(digest, 1, 1), digest, [("a", digest), ("b", digest)]),
        t.survivor_statement(AttemptId(digest, 1, 2), digest, [("a", digest), ("b", digest)]),
        t.survivor_statement(AttemptId(digest, 2, 1), digest, [("a", digest), ("b", digest)]),
        t.survivor_statement(AttemptId(digest, 1, 1), digest, [("a", digest)]),
        t.survivor_statement(AttemptId(digest, 1, 1), digest, [("b", digest), ("a", digest)]),
        t.survivor_statement(AttemptId(digest, 1, 1), digest, [("ab", digest)]),
        t.survivor_statement(AttemptId(digest, 1, 1), b"\2" * 32, [("a", digest), ("b", digest)]),
        t.survivor_statement(AttemptId(b"\1" * 32, 1, 1), digest, [("a", digest), ("b", digest)]),
    }
    assert len(statements) == 8
    assert t.upload_digest(b"x", 0) != t.aggregate_digest(b"x" + bytes(8))
    assert t.upload_digest(b"x", 0) != t.upload_digest(b"x", 1)
