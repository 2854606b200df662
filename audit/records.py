"""Offline verification of a study's folder of records, with no trust in whoever kept it. Torch-free, no network.

Checks, each with a name and a verdict: root, roster and agreement; the transcript's chain, signatures, votes and receipts; each
kept sum against its record; the records that each member was shown against those of the transcript (two that differ prove
that the aggregator equivocated); each member's ledger, its link to the transcript, and epsilon recomputed from its events;
the manifest over every byte of every file. Hostile input gives a failed check that names the file, never a crash.

A node is in the cohort of a record only after it has said that it has trained, so every such round must be booked. A round that
was abandoned, or an attempt before the one that was recorded, leaves no cohort: an event that was left out of it is not found.

What this proves and what not: who signed what, that nothing was changed since, and that the claimed epsilon follows from
the booked events. It does not prove that a node really ran DP-SGD as it booked (see `secgeo audit`, and docs/threat-model.md).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np
from cryptography import x509

from audit.budget import DeltaTooSmall, Steps, epsilon_concentrated, epsilon_pld, epsilon_rdp
from keys.certificates import check_root, fingerprint, from_pem
from keys.errors import SecGeoError, VerificationFailed
from keys.files import read_public
from keys.labels import Label
from keys.roster import load_root
from keys.signed import verify_document
from protocols.agreement import Agreement
from protocols.chain import GENESIS, line_digest
from protocols.encoding import FixedPoint
from protocols.ledger import HOSPITAL_RELATION, DpSgdEvent, EpsilonClaim, read_ledger, verify_ledger
from protocols.rings import make_ring
from protocols.transcript import (
    Body,
    Misbehaved,
    Receipts,
    RoundRecord,
    aggregate_digest,
    read_line,
    read_transcript,
    verify_transcript,
)
from secgeo.records import LEDGERS, MANIFEST, RECEIPTS, SUMS, TRANSCRIPT, file_digests, list_files, sum_path
from secgeo.study import AGREEMENT, DOCUMENTS, ROOT, OpenStudy, check_documents
from secgeo.update import Layout

FILE_LIMIT_BYTES = 1 << 30
EPSILON_TOLERANCE = 1e-3
"""Relative slack when a claim is compared with Google's accountants: for the discretisation of PLD, and for RDP's series, which is not
Opacus'. `audit.ledgers` compares with Opacus' own, without such slack."""

HOSPITAL_TOLERANCE = 1e-9
"""The same for a whole hospital, where both are formulas."""

MAXIMUM_PLDS = 400
"""Of the claims of one ledger: PLD takes about half a second. An honest node needs one wherever epsilon has grown by as much as RDP lies
above PLD, which is some ten for a hundred rounds."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked."""

    name: str
    ok: bool
    detail: str


@dataclass(slots=True)
class VerificationReport:
    """All checks of one folder."""

    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unit: str = ""
    """What is added or removed: a record or a patient, as the agreement says."""
    epsilons: dict[str, dict[str, float | None]] = field(default_factory=dict)
    hospitals: dict[str, dict[str, float | str]] = field(default_factory=dict)
    ledgers: dict[str, tuple[tuple[DpSgdEvent, ...], tuple[tuple[int, EpsilonClaim], ...]]] = field(
        default_factory=dict
    )
    """Of every member whose ledger links to transcript and agreement: its events, and its claims with the events before each."""

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, object]:
        """A JSON-able form."""
        return {
            "ok": self.ok,
            **msgspec.to_builtins({"checks": self.checks, "warnings": self.warnings, "epsilon": self.epsilons}),
            **({"unit": self.unit} if self.unit else {}),
            **({"hospital": self.hospitals} if self.hospitals else {}),
        }


def verify_folder(folder: Path, *, authority_fingerprint: str | None, now: datetime) -> VerificationReport:
    """Verify everything in `folder`.

    Args:
        folder: as `secgeo.records` lays it out.
        authority_fingerprint: the authority as you know it; without it the folder proves only that it is consistent.
        now: certificates are checked against this moment; an archive may be checked against the day of the study.
    """
    report = VerificationReport()
    if not folder.is_dir():
        report.checks.append(Check("folder", False, f"{folder} is not a folder"))
        return report
    if authority_fingerprint is None:
        report.warnings.append(
            "no authority was pinned: this shows only that the folder agrees with itself; give --authority FINGERPRINT"
        )
    with _checking(report, "folder") as done:
        done(f"{len(list_files(folder))} plain files")
    if not report.ok:
        return report  # Nothing in it is opened.
    root: x509.Certificate | None = None
    study: OpenStudy | None = None
    with _checking(report, ROOT) as done:
        pem = read_public(folder / ROOT)
        root = load_root(pem, authority_fingerprint or fingerprint(from_pem(pem)))
        done(f"root certificate {fingerprint(root)[:16]}...")
    if root is not None:
        with _checking(report, MANIFEST) as done:
            done(_verify_manifest(folder, root))
        with _checking(report, AGREEMENT):
            agreement, signature = read_public(folder / AGREEMENT), read_public(folder / f"{AGREEMENT}.sig")
            verify_document(check_root(root), Label.AGREEMENT, agreement, signature)
        with _checking(report, "agreement and roster") as done:
            study = check_documents({name: read_public(folder / name) for name in DOCUMENTS}, root, now=now)
            done(f"study {study.agreement.study.id}, {len(study.agreement.members)} members")
    if study is not None:
        _verify_study(folder, study, report)
    return report


def _verify_manifest(folder: Path, root: x509.Certificate) -> str:
    document = read_public(folder / MANIFEST)
    verify_document(check_root(root), Label.MANIFEST, document, read_public(folder / f"{MANIFEST}.sig"))
    try:
        listed = msgspec.json.decode(document, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise VerificationFailed(f"{MANIFEST} cannot be decoded") from None
    found = file_digests(folder)
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            raise VerificationFailed(f"{name} is missing")
        if name not in listed:
            raise VerificationFailed(f"{name} was added")
        if listed[name] != found[name]:
            raise VerificationFailed(f"{name} was changed")
    return f"{len(listed)} files"


def _verify_study(folder: Path, study: OpenStudy, report: VerificationReport) -> None:
    report.unit = study.agreement.privacy.unit
    records: dict[int, RoundRecord] | None = None
    lines: tuple[tuple[Body, bytes], ...] = ()
    with _checking(report, TRANSCRIPT) as done:
        lines = read_transcript(read_public(folder / TRANSCRIPT, FILE_LIMIT_BYTES), study.roster.aggregator.public_key)
        records = verify_transcript(lines, study.agreement, study.agreement_digest, study.public_keys)
        done(f"{len(lines)} lines, {len(records)} rounds summed")
    if records is None:
        return
    for body, _ in lines:
        if isinstance(body, Misbehaved):
            report.warnings.append(
                f"the aggregator says that {body.node_id} misbehaved in round {body.round} ({body.fault}); no more than its word"
            )
    if study.agreement.privacy.noise_multiplier == 0:
        report.warnings.append("no differential privacy: the agreement's noise multiplier is 0, so epsilon is infinite")
    signed = {body.round: len(body.countersignatures) for body, _ in lines if isinstance(body, Receipts)}
    for number in records:
        if signed.get(number, 0) < study.agreement.secure_sum.threshold:
            report.warnings.append(f"round {number} was countersigned by only {signed.get(number, 0)} nodes")
    with _checking(report, SUMS) as done:
        done(_verify_sums(folder, study, records))
    digests = {body.round: line_digest(line).hex() for body, line in lines if isinstance(body, RoundRecord)}
    written = {body.round: line for body, line in lines if isinstance(body, RoundRecord)}
    for member in study.agreement.members:
        path = folder / LEDGERS / f"{member.node_id}.jsonl"
        with _checking(report, f"{LEDGERS}/{member.node_id}.jsonl") as done:
            if not path.exists() and not any(member.node_id in record.cohort for record in records.values()):
                report.warnings.append(f"{member.node_id} took part in no round and left no ledger")
                done("none; it took part in no round")
            else:
                done(_verify_ledger(path, member.node_id, study, records, digests, report))
        path = folder / RECEIPTS / f"{member.node_id}.jsonl"
        due = [number for number, record in records.items() if member.node_id in {s.node_id for s in record.survivors}]
        if path.exists():
            with _checking(report, f"{RECEIPTS}/{path.name}") as done:
                shown = _verify_receipts(path, study, written)
                due = [number for number in due if number not in shown]
                done(f"receipts of {len(shown)} rounds, all as in the transcript")
        if due:
            rounds = ", ".join(map(str, due))
            report.warnings.append(
                f"{member.node_id} gave no receipt of its upload in round {rounds}: it may have been told another story"
            )
    for kind in (LEDGERS, RECEIPTS):
        with _checking(report, kind):
            allowed = {f"{member.node_id}.jsonl" for member in study.agreement.members}
            if strangers := {path.name for path in (folder / kind).glob("*")} - allowed:
                raise VerificationFailed(f"{kind}/{min(strangers)} belongs to no member")


def _verify_receipts(path: Path, study: OpenStudy, transcript: Mapping[int, bytes]) -> set[int]:
    """Compare the records that a node was shown with those of the transcript: the aggregator has signed both. Gives the rounds."""
    rounds = set()
    for line in read_public(path, FILE_LIMIT_BYTES).splitlines(keepends=True):
        record = read_line(line, study.roster.aggregator.public_key).body
        if not isinstance(record, RoundRecord):
            raise VerificationFailed(f"a {type(record).__name__} is no receipt")
        if record.agreement_digest != study.agreement_digest.hex():
            raise VerificationFailed("a receipt belongs to another agreement; collect those of this study only")
        written = transcript.get(record.round)
        if written is None:
            raise VerificationFailed(
                f"the aggregator has signed a record of round {record.round} that the transcript hides"
            )
        if written != line:
            other = read_line(written, study.roster.aggregator.public_key).body
            raise VerificationFailed(
                f"EQUIVOCATION: the aggregator has signed two records of round {record.round}: "
                f"{_describe(record, line)} to this node, {_describe(other, written)} in the transcript"
            )
        rounds.add(record.round)
    return rounds


def _describe(record: Body, line: bytes) -> str:
    if not isinstance(record, RoundRecord):
        return "another line"
    digest, survivors = line_digest(line).hex()[:16], len(record.survivors)
    return f"record {digest} (attempt {record.attempt}, {survivors} contributors, sum {record.aggregate_digest[:16]})"


def _verify_sums(folder: Path, study: OpenStudy, records: Mapping[int, RoundRecord]) -> str:
    size = Layout.from_agreement(study.agreement).size
    fixed_point = FixedPoint.from_agreement(study.agreement)
    ring = make_ring(study.agreement)
    size_bytes = ring.zeros(size).nbytes
    expected = {sum_path(folder, number, ring.dtype) for number in records}
    strangers = set((folder / SUMS).glob("*")) - expected
    if strangers:
        raise VerificationFailed(f"{SUMS}/{min(strangers).name} belongs to no recorded round")
    for number, record in records.items():
        path = sum_path(folder, number, ring.dtype)
        data, name = read_public(path, FILE_LIMIT_BYTES), f"{SUMS}/{path.name}"
        if len(data) != size_bytes:
            raise VerificationFailed(f"{name} has another size than agreed")
        if aggregate_digest(data).hex() != record.aggregate_digest:
            raise VerificationFailed(f"{name} is not the sum that was recorded")
        if not study.agreement.secure_sum.encrypted:
            fixed_point.decode(np.frombuffer(data, dtype="<u4"), len(record.survivors))
    kind = "encrypted sums" if study.agreement.secure_sum.encrypted else "sums"
    return f"{len(records)} {kind} of {size} values"


def _verify_ledger(
    path: Path,
    node_id: str,
    study: OpenStudy,
    records: Mapping[int, RoundRecord],
    digests: Mapping[int, str],
    report: VerificationReport,
) -> str:
    body = read_ledger(read_public(path, FILE_LIMIT_BYTES), study.public_keys[node_id])
    events, claims, closed = verify_ledger(body, node_id, study.agreement, study.agreement_digest)
    _link_to_transcript(events, node_id, study, records, digests)
    if closed.transcript_link not in (GENESIS, *digests.values()):
        raise VerificationFailed("the node has seen the record of a round that the transcript hides")
    privacy = study.agreement.privacy
    rdp = epsilon_rdp(events, privacy.delta)
    pld = _pld_or_infinite(events, privacy.delta)
    claimed = _claimed(claims[-1][1])
    report.epsilons[node_id] = {
        "claimed_opacus_rdp": _finite(claimed),
        "rdp": _finite(rdp),
        "google_pld": _finite(pld),
        "delta": privacy.delta,
    }
    if privacy.noise_multiplier > 0 and any(claim.epsilon is None for _, claim in claims):
        report.warnings.append(
            f"{node_id} claims an infinite epsilon although there is noise; its node is broken, or misleads"
        )
    _verify_claims(study.agreement, events, claims)
    report.ledgers[node_id] = events, claims
    whole = _verify_hospital(node_id, study.agreement, events, claims, records, report)
    spent = min(rdp, pld * (1 - EPSILON_TOLERANCE))
    if privacy.noise_multiplier > 0 and max(spent, claimed if math.isfinite(claimed) else 0.0) > privacy.epsilon_budget:
        raise VerificationFailed(
            f"the node spent epsilon {min(rdp, pld):.6g} ({claimed:.6g} by its own count), more than the budget of "
            f"{privacy.epsilon_budget:g}"
        )
    steps = sum(event.steps for event in events)
    tight = f"{pld:.3f}" if math.isfinite(pld) else "no answer"
    shown = f"{claimed:.3f} claimed, which must reach the smaller of {rdp:.3f} by Google's RDP and {tight} by PLD"
    relation = f"at delta {privacy.delta:g}, add or remove one {privacy.unit}"
    return f"{len(events)} events, {steps} steps, epsilon {shown}, {relation}{whole}"


def _verify_claims(
    agreement: Agreement, events: Sequence[DpSgdEvent], claims: Sequence[tuple[int, EpsilonClaim]]
) -> None:
    """Check every claim against the smaller of RDP and PLD of the steps before it, which all have the agreed rate and noise.

    RDP costs next to nothing, and honest claims reach it. PLD is slow, so it is asked about the last claim first: epsilon grows
    with the steps, and an earlier claim that reaches what more steps cost needs no PLD of its own.
    """
    privacy, enough, asked = agreement.privacy, math.inf, 0
    for count, claim in reversed(claims):
        history = [Steps(privacy.sample_rate, privacy.noise_multiplier, claim.steps_total)]
        rdp = epsilon_rdp(history, privacy.delta)
        if _claimed(claim) >= min(enough, rdp * (1 - EPSILON_TOLERANCE)):
            continue
        asked += 1
        if asked > MAXIMUM_PLDS:
            raise VerificationFailed(
                f"more than {MAXIMUM_PLDS} claims are below RDP and near PLD, which is too slow for all"
            )
        try:
            pld = epsilon_pld(history, privacy.delta)
        except DeltaTooSmall:
            pld = math.inf
        enough = min(enough, pld * (1 - EPSILON_TOLERANCE))
        smaller, accountant = min((pld, "PLD"), (rdp, "RDP"))
        check_claim(claim, events[:count], smaller * (1 - EPSILON_TOLERANCE), accountant)


def _pld_or_infinite(events: Sequence[DpSgdEvent | Steps], delta: float) -> float:
    """What PLD has no answer to, only RDP bounds."""
    try:
        return epsilon_pld(events, delta)
    except VerificationFailed:
        return math.inf


def _verify_hospital(
    node_id: str,
    agreement: Agreement,
    events: Sequence[DpSgdEvent],
    claims: Sequence[tuple[int, EpsilonClaim]],
    records: Mapping[int, RoundRecord],
    report: VerificationReport,
) -> str:
    """Check what is claimed for the hospital as a whole: counted for the fewest shares of noise, and shown for those that were summed."""
    hospital, share = agreement.hospital_privacy, agreement.noise_share
    if hospital is None or share is None:
        return ""
    claimed = counted = 0.0
    noised_rounds = [0, *accumulate(event.noise_share is not None for event in events)]
    for number, claim in claims:
        counted = epsilon_concentrated(noised_rounds[number] * share.concentrated, hospital.delta)
        claimed = -1.0 if claim.hospital is None else claim.hospital.epsilon
        if claimed < counted * (1 - HOSPITAL_TOLERANCE):
            raise VerificationFailed(
                f"the claim for the hospital after {noised_rounds[number]} noised rounds is lower than epsilon {counted:.6g} "
                "(Google RDP)"
            )
        if claimed > hospital.epsilon_budget:
            raise VerificationFailed(
                f"the hospital spent epsilon {claimed:.6g}, more than the budget of {hospital.epsilon_budget:g}"
            )
    summed = [records[event.round] for event in events if event.noise_share and event.round in records]
    # Any one member knows its own share.
    everyone = [msgspec.structs.replace(share, contributors=len(record.survivors) - 1) for record in summed]
    outside = epsilon_concentrated(sum(noised.concentrated for noised in everyone), hospital.delta)
    report.hospitals[node_id] = {
        "claimed": claimed,
        "google_rdp": counted,
        "if_nobody_colludes": outside,
        "delta": hospital.delta,
        "neighbouring_relation": HOSPITAL_RELATION,
    }
    return (
        f"; the whole hospital: {claimed:.3f} claimed, {counted:.3f} by RDP with {share.contributors} shares of noise, {outside:.3f} if "
        f"nobody colludes, at delta {hospital.delta:g}, one hospital's updates zero"
    )


def check_claim(claim: EpsilonClaim, events: Sequence[DpSgdEvent], least: float, accountant: str) -> None:
    """Compare a claim with the `least` that holds for the events before it, by this accountant.

    Raises:
        VerificationFailed: the claim is lower.
    """
    if _claimed(claim) < least:
        after = f"after the event of round {events[-1].round}" if events else "before any event"
        raise VerificationFailed(
            f"the claim {after} ({claim.steps_total} steps): the node claims epsilon {_claimed(claim):.12g}, "
            f"but its events give at least {least:.12g} ({accountant})"
        )


def _claimed(claim: EpsilonClaim) -> float:
    return math.inf if claim.epsilon is None else claim.epsilon


def _link_to_transcript(
    events: Sequence[DpSgdEvent],
    node_id: str,
    study: OpenStudy,
    records: Mapping[int, RoundRecord],
    digests: Mapping[int, str],
) -> None:
    summed = {
        number
        for number, record in records.items()
        if any(survivor.node_id == node_id for survivor in record.survivors)
    }
    named = {number for number, record in records.items() if node_id in record.cohort}
    if missing := named - {event.round for event in events}:
        number = min(missing)
        if number in summed:
            raise VerificationFailed(
                f"the node's update is in the sum of round {number}, but no event is booked for it"
            )
        raise VerificationFailed(
            f"the record of round {number} names the node among those that had trained, but no event is booked for it: the node "
            "left it out, or the aggregator names it falsely"
        )
    numbers, rounds = sorted(digests), {digest: number for number, digest in digests.items()}
    first = numbers[0] if numbers else study.agreement.study.rounds + 1
    for event in events:
        due = study.agreement.training.steps_per_round if event.round > first else 0
        if event.steps != due:
            raise VerificationFailed(f"round {event.round} takes {due} private steps, but {event.steps} are booked")
        if event.transcript_link != GENESIS and rounds.get(event.transcript_link, event.round) >= event.round:
            raise VerificationFailed(
                f"the event of round {event.round} is linked to a record that is not in the transcript"
            )
        before = bisect_left(numbers, event.round)
        latest = digests[numbers[before - 1]] if before else GENESIS
        if event.round in summed and event.transcript_link != latest:
            raise VerificationFailed(f"the event of round {event.round} is not linked to the record before it")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _checking:  # noqa: N801 - reads as a verb where it is used
    """Turns whatever goes wrong inside a `with` into one failed check, and `done(detail)` into a good one."""

    def __init__(self, report: VerificationReport, name: str) -> None:
        self._report, self._name, self._detail = report, name, "ok"

    def __enter__(self) -> _checking:
        return self

    def __call__(self, detail: str) -> None:
        self._detail = detail

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if error is None:
            self._report.checks.append(Check(self._name, True, self._detail))
            return True
        if isinstance(error, Exception):
            # Whatever a hostile file provokes is a failed check, also what nobody thought of.
            detail = str(error) if isinstance(error, SecGeoError) else f"{type(error).__name__}: {error}"
            self._report.checks.append(Check(self._name, False, detail))
            return True
        return False
