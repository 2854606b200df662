"""The bundle that an audit leaves: evidence, the verdict that follows from it, a report, and the auditor's signature over all of it.

    evidence/about.json        what was audited, when, how, and with which versions
    evidence/study/            the signed agreement, roster and root
    evidence/PART.json         what each audit saw: conformance, training, leakage, protocol
    evidence/records/          the study's folder of records, if there was one
    verdict.json, report.html  computed from the evidence alone
    auditor.json               the key that signed
    manifest.json(.sig)        SHA-256 of every file, signed

Whoever has the bundle can compute verdict and report again and compare (`verify`). What an audit of this kind must have and has not
makes it incomplete, whatever it says of the rest; and evidence must be of the agreement that is in it. The signature says who ran the
audit, not that the evidence is true: for that, run it again.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidKey, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct

from audit import conformance, leakage, protocol, training
from audit.findings import Finding
from audit.ledgers import BudgetReport, verify_budgets
from audit.plants import PLANTS
from audit.rounds import collect_records
from audit.target import SPLIT, split_of_folder, study_of_folder, whose
from audit.threads import one_thread
from audit.whole import check_leakage, check_protocol, check_units
from keys.errors import ConfigError, SecGeoError, VerificationFailed
from keys.files import read_public, write_public
from keys.labels import Label
from keys.roster import load_root
from keys.signed import Signer, sign_document, verify_document
from secgeo.accountant import epsilon_after
from secgeo.records import MANIFEST, file_digests, list_files
from secgeo.study import AGREEMENT, DOCUMENTS, ROOT, OpenStudy

FORMAT = "secgeo-audit/3"
"""Changes with what is collected, and with how it is judged: what other rules made cannot be computed again by these."""
EVIDENCE, RECORDS, STUDY, ABOUT = "evidence", "evidence/records", "evidence/study", "evidence/about.json"
VERDICT, REPORT, AUDITOR = "verdict.json", "report.html", "auditor.json"
FILE_LIMIT_BYTES = 1 << 28
NOT_TRIED = "attacks that were not played"
SUM_PARAMETERS = (
    "protocol", "threshold", "minimum_cohort", "neighbours", "share_threshold", "ring_bits", "value_bits", "fraction_bits",
    "chunk_values", "max_attempts",
)  # fmt: skip
PACKAGES = ("secgeo", "torch", "opacus", "dp-accounting", "numpy", "scipy", "scikit-learn", "matplotlib")


class About(Struct, frozen=True, forbid_unknown_fields=True):
    """What was audited and how.

    Attributes:
        kind: whether a folder of records was audited or a node's configuration.
        source: the folder or configuration, by name only.
        node: the hospital whose training was audited; empty if none was.
        data: whose records these are, and of which public data if the bundle holds a demonstration's.
        authority: the fingerprint of the authority that was pinned, by the auditor or the configuration; None if nobody did.
        started: UTC; certificates and records are judged as of then.
        plant: the bug that was planted, if any.
        seconds: of each part.
        not_done: parts that could not be done, and why.
        left_out: files in the folder of records that no manifest lists, and which were not copied.
    """

    format: str
    study: str
    agreement_digest: str
    kind: Literal["records", "configuration"]
    source: str
    node: str
    data: str
    authority: str | None
    started: datetime
    profile: training.Profile
    plant: str | None
    seconds: dict[str, Annotated[float, Meta(ge=0.0)]]
    not_done: dict[str, str]
    left_out: tuple[str, ...]
    python: str
    versions: dict[str, str]


class Auditor(Struct, frozen=True, forbid_unknown_fields=True):
    """Who signed: a name, and the Ed25519 key in hexadecimal."""

    name: Annotated[str, Meta(pattern=r"\A[ -~]{1,100}\Z")]
    public_key: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class Verdict(Struct, frozen=True, forbid_unknown_fields=True):
    """What came of the audit.

    Attributes:
        ok: no promise was broken, and nothing is missing.
        missing: parts that an audit of this kind has, and this one has not.
    """

    ok: bool
    missing: tuple[str, ...]
    findings: tuple[Finding, ...]
    about: About

    def of(self, status: str) -> list[Finding]:
        """The findings with this status."""
        return [finding for finding in self.findings if finding.status == status]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything in a bundle that findings come from; `split`: which public data the hospitals had, if there are records that say so."""

    about: About
    study: OpenStudy
    split: str
    conformance: conformance.ConformanceEvidence | None
    training: training.TrainingEvidence | None
    leakage: leakage.LeakageEvidence | None
    protocol: protocol.ProtocolEvidence | None
    records: BudgetReport | None


PARTS: dict[str, type[Struct]] = {
    "conformance": conformance.ConformanceEvidence,
    "training": training.TrainingEvidence,
    "leakage": leakage.LeakageEvidence,
    "protocol": protocol.ProtocolEvidence,
}

FILES = {
    VERDICT, REPORT, AUDITOR, MANIFEST, f"{MANIFEST}.sig", ABOUT, *(f"{STUDY}/{name}" for name in DOCUMENTS),
    *(f"{EVIDENCE}/{name}.json" for name in PARTS),
}  # fmt: skip
"""Beside those in `RECORDS`."""

Kind = TypeVar("Kind", bound=Struct)


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def python_version() -> str:
    """Of the interpreter."""
    return platform.python_version()


def write_struct(path: Path, value: Struct) -> None:
    """Write a struct as JSON, one spelling for one value."""
    make_folder(path.parent)
    write_public(path, _spelled(value))


def make_folder(folder: Path) -> None:
    """Make a folder in a bundle, and those above.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None


def _spelled(value: Struct | dict[str, str]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="sorted"), indent=1) + b"\n"


def _read(folder: Path, name: str, kind: type[Kind]) -> Kind:
    try:
        return msgspec.json.decode(read_public(folder / name, FILE_LIMIT_BYTES), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise VerificationFailed(f"{name} cannot be decoded: {error}") from None


def read_evidence(folder: Path) -> Evidence:
    """Read what is in `evidence/`.

    Raises:
        KeyFileError, VerificationFailed, ConfigError: a file is missing or malformed.
    """
    about = _read(folder, ABOUT, About)
    if about.format != FORMAT:
        raise VerificationFailed(
            f"this bundle has format {about.format!r} and this program reads {FORMAT}; verify it with the release that made it"
        )
    study = study_of_folder(folder / STUDY, about.authority, about.started)
    found = {
        name: _read(folder, f"{EVIDENCE}/{name}.json", kind)
        for name, kind in PARTS.items()
        if (folder / EVIDENCE / f"{name}.json").exists()
    }
    records = None
    if (folder / RECORDS).exists():
        records = verify_budgets(folder / RECORDS, authority_fingerprint=about.authority, now=about.started)
        if read_public(folder / RECORDS / AGREEMENT) != study.documents[AGREEMENT]:
            raise VerificationFailed(f"{RECORDS} and {STUDY} are of different agreements")
        _check_repeats(folder / RECORDS, about, found.get("protocol"))
    split = split_of_folder(folder / RECORDS)[0] if (folder / RECORDS / SPLIT).exists() else ""
    return Evidence(about, study, split, records=records, **{name: found.get(name) for name in PARTS})  # type: ignore[arg-type]


def _check_repeats(folder: Path, about: About, seen: Struct | None) -> None:
    """What was counted in the records is what is counted in the copy, if that is all of them and all could be read."""
    if (
        not isinstance(seen, protocol.ProtocolEvidence)
        or seen.records is None
        or seen.records.problems
        or about.left_out
    ):
        return
    if collect_records(folder, seen.records.taken_at) != seen.records:
        raise VerificationFailed(f"what was counted in the records is not what is in {RECORDS}")


# --- from evidence to verdict


def judge(evidence: Evidence) -> Verdict:
    """What all the evidence says; a pure function.

    Raises:
        VerificationFailed: it says nothing: counts that do not go together, or numbers that are none.
    """
    try:
        _check_belongs(evidence)
        findings = _findings(evidence)
    except (ArithmeticError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise VerificationFailed(f"the evidence cannot be judged: {error}") from None
    missing = {part for part in _due(evidence) if getattr(evidence, part) is None}
    if any(finding.name == NOT_TRIED for finding in findings) or _without_keys(evidence):
        missing.add("protocol")
    ok = not missing and not any(finding.status == "broken" for finding in findings)
    return Verdict(ok, tuple(sorted(missing)), tuple(findings), evidence.about)


def _due(evidence: Evidence) -> set[str]:
    """The parts that this kind of audit has. Of a real study's records nobody but the hospitals can audit the training."""
    about = evidence.about
    due = set() if about.plant else {"protocol"}
    if about.kind == "records" and not about.plant:
        due.add("records")
    if about.kind == "configuration" or about.plant or evidence.split:
        due |= {"conformance", "training"} | (set() if about.plant else {"leakage"})
    return due


def _without_keys(evidence: Evidence) -> bool:
    """Whether a deployment was looked at that has no keys: then little of it was."""
    deployed = evidence.protocol.deployment if evidence.protocol is not None else None
    return deployed is not None and "missing" in (deployed.key_file.kind, deployed.folders[0].kind)


def _check_belongs(evidence: Evidence) -> None:
    """Check that all evidence is of the agreement that is in the bundle, and of the member that it names.

    Raises:
        VerificationFailed: it is of another one.
    """
    about, agreement = evidence.about, evidence.study.agreement
    privacy = agreement.privacy
    wrong = [
        about.agreement_digest != evidence.study.agreement_digest.hex() or about.study != agreement.study.id,
        bool(about.node) and not any(member.node_id == about.node for member in agreement.members),
        about.plant is not None and about.plant not in PLANTS,
        about.data != (whose(evidence.split, about.node) if about.node else ""),
    ]
    for part in (evidence.conformance, evidence.training, evidence.leakage):
        wrong.append(part is not None and part.member != about.node)
    seen = evidence.conformance
    if seen is not None:
        unit = "patient" if about.plant and PLANTS[about.plant].needs_patients else privacy.unit
        wrong.append(
            (seen.noise_multiplier, seen.sample_rate, seen.unit)
            != (privacy.noise_multiplier, privacy.sample_rate, unit)
        )
    for attack in evidence.training.attacks if evidence.training is not None else ():
        claim = attack.claim
        claimed = epsilon_after(privacy, claim.steps, privacy.delta)
        wrong += [
            (claim.noise_multiplier, claim.sample_rate, claim.delta)
            != (privacy.noise_multiplier, privacy.sample_rate, privacy.delta),
            claim.steps > agreement.total_steps,
            claim.epsilon is None or not math.isclose(claim.epsilon, claimed, rel_tol=1e-6),
        ]
    if evidence.leakage is not None:
        wrong.append(evidence.leakage.protocol != agreement.secure_sum.protocol)
        wrong.append(evidence.leakage.profile != about.profile)
    if evidence.protocol is not None:
        played = evidence.protocol.parameters
        wrong.append(evidence.protocol.profile != about.profile or played.members != len(agreement.members))
        wrong += [getattr(played, name) != getattr(agreement.secure_sum, name) for name in SUM_PARAMETERS]
    wrong += _of_another_kind(evidence)
    if any(wrong):
        raise VerificationFailed("the evidence is not of the agreement, member or claim that the bundle names")


def _of_another_kind(evidence: Evidence) -> list[bool]:
    """What cannot be in an audit of this kind: of a folder of records, or of a node's configuration."""
    records, seen, trained = evidence.about.kind == "records", evidence.protocol, evidence.training
    return [
        evidence.records is not None and (not records or evidence.about.plant is not None),
        seen is not None and (seen.records is not None, seen.deployment is not None) != (records, not records),
        trained is not None and records and not trained.others,
        seen is not None and seen.deployment is not None and seen.deployment.role != "node",
    ]


def _findings(evidence: Evidence) -> list[Finding]:
    findings: list[Finding] = []
    if evidence.records is not None:
        findings += _judge_records(evidence.records)
    if evidence.conformance is not None:
        conformance.check_whole(evidence.conformance, evidence.study.agreement)
        findings += conformance.judge(evidence.conformance)
    if evidence.training is not None:
        training.check_whole(evidence.training, evidence.study.agreement, evidence.about.profile)
        findings += training.judge(evidence.training)
    if evidence.leakage is not None:
        check_leakage(evidence.leakage, evidence.study.agreement)
        findings += leakage.judge(evidence.leakage, evidence.study.agreement)
    check_units(evidence.conformance, evidence.training, evidence.leakage, evidence.study, split=bool(evidence.split))
    if evidence.protocol is not None:
        check_protocol(evidence.protocol, evidence.study, evidence.about.started)
        findings += protocol.judge(evidence.protocol)
        if lacking := protocol.not_tried(evidence.protocol, evidence.study.agreement):
            promise = "everything is tried that the catalogue has for this agreement"
            detail = f"did not take place: {', '.join(lacking)}"
            findings.append(Finding("protocol", NOT_TRIED, promise, "not testable", detail))
    if evidence.about.left_out:
        names = ", ".join(evidence.about.left_out)
        findings.append(
            Finding("records", "manifest", "signed, complete and unchanged", "broken", f"no manifest lists {names}")
        )
    for part, reason in evidence.about.not_done.items():
        kind = part if part in ("records", "leakage", "protocol") else "training"
        findings.append(Finding(kind, part, f"the {part} audit can be done", "not testable", reason))  # type: ignore[arg-type]
    return findings


def _judge_records(report: BudgetReport) -> list[Finding]:
    signed, claimed = "signed, complete and unchanged", "no claim is lower than what the booked events give"
    findings = [
        Finding("records", check.name, signed, "held" if check.ok else "broken", check.detail)
        for check in report.checks
    ]
    for name, (claim, answer) in report.budgets.items():
        shown = ", ".join(f"{kind.upper()} {value:.3f}" for kind, value in answer.epsilon.items() if value is not None)
        told = "infinite" if claim is None else f"{claim:.3f}"
        detail = f"claims epsilon {told} at delta {answer.delta:g}, add or remove one; recomputed: {shown or 'no finite answer'}"
        findings.append(Finding("records", f"budget of {name}", claimed, "held", detail))
    return findings + [Finding("records", "remark", signed, "not testable", warning) for warning in report.warnings]


# --- sealing and verifying


def conclude(folder: Path, render: Callable[[Verdict, Evidence], str]) -> Verdict:
    """Judge the evidence in `folder` and write verdict and report beside it."""
    evidence = read_evidence(folder)
    verdict = judge(evidence)
    write_struct(folder / VERDICT, verdict)
    write_public(folder / REPORT, _rendered(render, verdict, evidence))
    return verdict


def _rendered(render: Callable[[Verdict, Evidence], str], verdict: Verdict, evidence: Evidence) -> bytes:
    try:
        return render(verdict, evidence).encode()
    except (ArithmeticError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise VerificationFailed(f"the report cannot be drawn: {error}") from None


def seal(folder: Path, auditor: Auditor, sign: Signer) -> None:
    """Sign every byte in `folder`."""
    write_struct(folder / AUDITOR, auditor)
    document = _spelled(file_digests(folder))
    write_public(folder / f"{MANIFEST}.sig", sign_document(sign, Label.AUDIT, document))
    write_public(folder / MANIFEST, document)


def check_seal(folder: Path, auditor_key: str | None) -> Auditor:
    """Check the signature over every byte; gives who signed.

    Args:
        folder: the bundle.
        auditor_key: the auditor's public key in hexadecimal, from a source you trust; without it the bundle names its own.

    Raises:
        ConfigError, KeyFileError, VerificationFailed: a file was changed, added or removed, or the signature does not hold.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    list_files(folder)
    auditor = _read(folder, AUDITOR, Auditor)
    if auditor_key is not None and auditor.public_key != auditor_key.lower():
        raise VerificationFailed(f"the bundle was signed by {auditor.public_key}, not by {auditor_key}")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(auditor.public_key))
    except (ValueError, InvalidKey, UnsupportedAlgorithm):
        raise VerificationFailed(f"{AUDITOR} holds no Ed25519 key") from None
    document = read_public(folder / MANIFEST, FILE_LIMIT_BYTES)
    verify_document(key, Label.AUDIT, document, read_public(folder / f"{MANIFEST}.sig"))
    try:
        listed = msgspec.json.decode(document, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise VerificationFailed(f"{MANIFEST} cannot be decoded") from None
    found = file_digests(folder)
    for name in sorted(listed.keys() | found.keys()):
        if listed.get(name) != found.get(name):
            raise VerificationFailed(f"{name} was changed, added or removed since the bundle was signed")
    for name in found:
        if name not in FILES and not name.startswith(f"{RECORDS}/"):
            raise VerificationFailed(
                f"{name} is no part of a bundle: nothing was computed from it, and it is not to be believed"
            )
    return auditor


@one_thread()
def verify(
    folder: Path,
    auditor_key: str | None,
    authority: str | None,
    render: Callable[[Verdict, Evidence], str],
    redrawn: Path | None = None,
) -> tuple[Verdict, Auditor, list[str]]:
    """Check the seal, then compute verdict and report again from the evidence and compare; gives notes beside.

    `auditor_key` and `authority` are from sources that the caller trusts, or None. With `redrawn` the report is written there anew
    and not compared, for bundles that other versions have made.

    Raises:
        ConfigError, KeyFileError, VerificationFailed: the seal, the verdict or the report does not hold.
    """
    auditor = check_seal(folder, auditor_key)
    evidence = read_evidence(folder)
    if authority is not None:
        load_root(evidence.study.documents[ROOT], authority)
    verdict, notes = judge(evidence), []
    if _spelled(verdict) != read_public(folder / VERDICT, FILE_LIMIT_BYTES):
        raise VerificationFailed(f"{VERDICT} does not follow from the evidence")
    if auditor_key is None:
        notes.append("no auditor was pinned: this shows only that the bundle agrees with itself; give --auditor KEY")
    if authority is None:
        notes.append(
            "no authority was pinned here: who says so in the bundle is its auditor; give --authority FINGERPRINT"
        )
    differing = [f"{name} {there} (here {here})" for name, there, here in _differences(evidence.about)]
    page = _rendered(render, verdict, evidence)
    if redrawn is not None:
        write_public(redrawn, page)
        notes.append(f"{REPORT} was not compared; read {redrawn}")
    elif page != read_public(folder / REPORT, FILE_LIMIT_BYTES):
        why = f": it was drawn with {', '.join(differing)}, or it says something else" if differing else ""
        raise VerificationFailed(
            f"{REPORT} is not what follows from the evidence{why}; draw it again with --report FILE and read that one"
        )
    return verdict, auditor, notes


def _differences(about: About) -> list[tuple[str, str, str]]:
    here = {"python": python_version(), **versions()}
    there = {"python": about.python, **about.versions}
    return [(name, there.get(name, "?"), version) for name, version in here.items() if there.get(name) != version]


def now() -> datetime:
    """This moment, to the second: JSON keeps it as it is."""
    return datetime.now(UTC).replace(microsecond=0)


def reason(error: SecGeoError) -> str:
    """Why a part of the audit could not be done."""
    return f"{type(error).__name__}: {error}"
