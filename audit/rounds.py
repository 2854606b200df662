"""What a study's signed documents and records of rounds show by themselves: certificates, and whether anything comes twice.

`collect_records` reads a study's folder of records; `collect_rounds` what the aggregator of a running study has signed so far. Files may
be hostile: what is wrong with them is evidence. `judge_...` are pure functions of it. What `secgeo verify` checks of records
(`audit.records`) is not repeated here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from audit.findings import Finding, Status
from keys import certificates
from keys.errors import ConfigError, SecGeoError, VerificationFailed
from keys.files import read_public
from keys.roster import Roster, load_root, read_roster
from protocols.transcript import RoundRecord, read_line, read_transcript, verify_round
from secgeo.records import RECEIPTS, TRANSCRIPT, list_files
from secgeo.study import DOCUMENTS, ROOT, ROSTER, OpenStudy, check_documents

FILE_LIMIT_BYTES = 1 << 28
SOON_DAYS = 30
"""A certificate that ends within so many days should have been renewed."""

Moment = Annotated[datetime, Meta(tz=True)]


class Certificate(Struct, frozen=True, forbid_unknown_fields=True):
    """One certificate: whose, until when, and why it cannot be used (empty: it can)."""

    node_id: str
    role: str
    not_before: Moment
    not_after: Moment
    key: str
    member: bool
    problem: str


class Repeats(Struct, frozen=True, forbid_unknown_fields=True):
    """How many values of a kind there were, in different places, and how many different ones."""

    kind: str
    seen: int
    distinct: int


class RecordsEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """A folder of records. `problems` are what could not be read or does not fit, with the file's name."""

    taken_at: Moment
    rounds: int
    receipts: int
    study_keys: int
    repeats: tuple[Repeats, ...]
    certificates: tuple[Certificate, ...]
    problems: tuple[str, ...]


class RunningStudy(Struct, frozen=True, forbid_unknown_fields=True):
    """The records of rounds that the running aggregator has signed, as this site has kept them: how many, and what is wrong with them."""

    records: Annotated[int, Meta(ge=0)]
    repeats: tuple[Repeats, ...]
    study_keys: Annotated[int, Meta(ge=0)]
    problems: tuple[str, ...]


# --- collecting


def collect_records(folder: Path, now: datetime) -> RecordsEvidence:
    """Look for repetitions in a study's folder of records, and at its certificates.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of records")
    problems: list[str] = []
    certs: tuple[Certificate, ...] = ()
    study: OpenStudy | None = None
    with _noting(problems, "folder"):
        list_files(folder)
    if problems:
        return RecordsEvidence(now, 0, 0, 0, (), (), tuple(problems))  # Nothing in it is opened.
    documents: dict[str, bytes] = {}
    for name in DOCUMENTS:
        with _noting(problems, name):
            documents[name] = read_public(folder / name)
    with _noting(problems, "agreement and roster"):
        pem = documents[ROOT]
        root = load_root(pem, certificates.fingerprint(certificates.from_pem(pem)))
        roster = read_roster(documents[ROSTER], documents[f"{ROSTER}.sig"], root, now=now)
        certs = certificates_of(roster, set())
        study = check_documents(documents, root, now=now)
        certs = certificates_of(roster, {member.node_id for member in study.agreement.members})
    seen: dict[str, dict[bytes, set[object]]] = defaultdict(lambda: defaultdict(set))
    rounds, receipts, keys = 0, 0, set[str]()
    if study is not None:
        key = study.roster.aggregator.public_key
        with _noting(problems, TRANSCRIPT):
            for body, _ in read_transcript(read_public(folder / TRANSCRIPT, FILE_LIMIT_BYTES), key):
                if isinstance(body, RoundRecord):
                    rounds += 1
                    keys.add(body.study_key)
                    _note_record(seen, body)
        for path in sorted((folder / RECEIPTS).glob("*.jsonl")):
            with _noting(problems, f"{RECEIPTS}/{path.name}"):
                for line in read_public(path, FILE_LIMIT_BYTES).splitlines(keepends=True):
                    shown = read_line(line, key).body
                    if not isinstance(shown, RoundRecord):
                        raise VerificationFailed(f"a {type(shown).__name__} is no receipt")
                    receipts += 1
                    _note_record(seen, shown)
    return RecordsEvidence(now, rounds, receipts, len(keys - {""}), _repeats(seen), certs, tuple(problems))


def _repeats(seen: dict[str, dict[bytes, set[object]]]) -> tuple[Repeats, ...]:
    return tuple(
        Repeats(kind, sum(len(places) for places in values.values()), len(values))
        for kind, values in sorted(seen.items())
    )


def _note_record(seen: dict[str, dict[bytes, set[object]]], record: RoundRecord) -> None:
    """What must be another one in every round and attempt; the same record, told again, is in the same place."""
    place = record.round, record.attempt
    seen["views (digests of all round keys, and who dealt)"][bytes.fromhex(record.senders_view)].add(place)
    seen["digests of sums"][bytes.fromhex(record.aggregate_digest)].add(record.round)
    seen["records that a sum builds on"][bytes.fromhex(record.builds_on)].add(record.round)
    for survivor in record.survivors:
        seen["digests of uploads"][bytes.fromhex(survivor.upload_digest)].add((*place, survivor.node_id))
        if survivor.signature:
            seen["votes"][bytes.fromhex(survivor.signature)].add((*place, survivor.node_id))


def collect_rounds(path: Path, study: OpenStudy) -> RunningStudy:
    """Look at the lines that the aggregator of a running study has signed. It may be writing: what is no whole line yet is left out."""
    problems: list[str] = []
    seen: dict[str, dict[bytes, set[object]]] = defaultdict(lambda: defaultdict(set))
    lines: dict[int, bytes] = {}
    keys, count = set[str](), 0
    with _noting(problems, path.name):
        written = read_public(path, FILE_LIMIT_BYTES) if path.exists() else b""
        for line in written[: written.rfind(b"\n") + 1].splitlines(keepends=True):
            body = read_line(line, study.roster.aggregator.public_key).body
            if not isinstance(body, RoundRecord):
                continue
            verify_round(body, study.agreement, study.agreement_digest, study.public_keys)
            if lines.setdefault(body.round, line) != line:
                raise VerificationFailed(f"EQUIVOCATION: the aggregator has signed two records of round {body.round}")
            keys.add(body.study_key)
            _note_record(seen, body)
            count += 1
    return RunningStudy(count, _repeats(seen), len(keys - {""}), tuple(problems))


def certificates_of(roster: Roster, members: set[str]) -> tuple[Certificate, ...]:
    """All certificates of a roster; which are those of a study's parties."""
    return tuple(
        Certificate(
            entry.node_id,
            entry.role,
            entry.certificate.not_valid_before_utc,
            entry.certificate.not_valid_after_utc,
            type(entry.public_key).__name__,
            entry.node_id in members or entry.role == "aggregator",
            roster.unusable.get(entry.node_id, ""),
        )
        for entry in roster.listed
    )


# --- judging


def judge_records(evidence: RecordsEvidence) -> list[Finding]:
    """The findings on a folder of records."""
    problems = "; ".join(evidence.problems)
    readable = "everything in the folder that is looked at can be read, and documents belong together"
    findings = [finding("records can be read", readable, "broken" if problems else "held", problems or "they can")]
    repeated = [item for item in evidence.repeats if item.distinct < item.seen]
    shown = "; ".join(f"{item.seen} {item.kind}, {item.distinct} different" for item in evidence.repeats)
    status: Status = "broken" if repeated or evidence.study_keys > 1 else "held" if evidence.rounds else "not testable"
    several = f"; {evidence.study_keys} study keys" if evidence.study_keys > 1 else ""
    detail = (
        f"{evidence.rounds} rounds, {evidence.receipts} receipts: {shown}{several}" if shown else "no round is recorded"
    )
    promise = "no round keys, upload, vote or sum of a round or attempt come twice in transcript and receipts; one study has one key"
    return [
        *findings,
        finding("records repeat nothing", promise, status, detail),
        *judge_certificates("certificates of the records", evidence.certificates, evidence.taken_at),
    ]


def judge_rounds(study: RunningStudy | None) -> Finding:
    """What the running aggregator has signed so far."""
    name, promise = (
        "rounds of the running study",
        "what the aggregator has signed is of this agreement, with enough contributors and votes; a round has one record, and nothing "
        "that must be fresh comes twice",
    )
    if study is None or not (study.records or study.problems):
        return finding(
            name, promise, "not testable", "no round is finished yet" if study else "the study does not open"
        )
    repeated = [f"{r.seen} {r.kind}, {r.distinct} different" for r in study.repeats if r.distinct < r.seen]
    several = [f"{study.study_keys} study keys"] if study.study_keys > 1 else []
    faults = [*study.problems, *repeated, *several]
    shown = f"{study.records} records: " + ", ".join(f"{r.seen} {r.kind}" for r in study.repeats) + ", all different"
    return finding(name, promise, "broken" if faults else "held", "; ".join(faults) or shown)


def judge_certificates(name: str, certs: Iterable[Certificate], now: datetime) -> list[Finding]:
    """Whether they are sound, and last for a while."""
    certs = list(certs)
    sound_promise = "every certificate of the study is valid, of an Ed25519 key, and signed by the authority"
    last_promise = f"no certificate of the study ends within {SOON_DAYS} days"
    if not certs:
        why = "no roster could be read"
        return [
            finding(name, sound_promise, "not testable", why),
            finding(f"{name} last", last_promise, "not testable", why),
        ]
    party = [c for c in certs if c.member]
    bad = [f"{c.node_id}: {c.problem or c.key}" for c in party if c.problem or "Ed25519" not in c.key]
    idle = [c.node_id for c in certs if not c.member and c.problem]
    left = {c.node_id: (c.not_after - now) / timedelta(days=1) for c in party}
    first = min(left, key=lambda node_id: left[node_id], default="")
    detail = "; ".join(bad) or f"{len(party)} certificates" + (
        f"; not of this study and out of use: {', '.join(idle)}" if idle else ""
    )
    soon = f"{first} has {left[first]:.0f} days left" if first else "no certificate of the study was seen"
    ends: Status = "not testable" if not first else "broken" if left[first] < SOON_DAYS else "held"
    return [
        finding(name, sound_promise, "broken" if bad or not party else "held", detail),
        finding(f"{name} last", last_promise, ends, soon),
    ]


def finding(name: str, promise: str, status: Status, detail: str) -> Finding:
    """One of this part of the audit."""
    return Finding("protocol", name, promise, status, detail)


@contextmanager
def _noting(problems: list[str], name: str) -> Iterator[None]:
    """Whatever a hostile file provokes is a problem of that file, also what nobody thought of."""
    try:
        yield
    except SecGeoError as error:
        problems.append(f"{name}: {error}"[:400])
    except Exception as error:
        problems.append(f"{name}: {type(error).__name__}: {error}"[:400])
