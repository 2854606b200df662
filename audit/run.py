"""An audit from beginning to end: collect evidence part by part, judge it, draw the report, sign the bundle.

Leakage, the longest part, is measured in a process of its own beside the others.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import bundle, conformance, leakage, protocol, training
from audit.beside import Beside
from audit.bundle import About, Auditor, Verdict
from audit.deployment import read_any_config
from audit.plants import PLANTS
from audit.report import render
from audit.target import SPLIT, Target, study_of_config, study_of_folder, target_of_config, target_of_folder, whose
from audit.threads import one_thread
from keys.errors import ConfigError, SecGeoError
from keys.files import read_public, write_public
from keys.identity import Identity, sign_labelled
from secgeo.config import AggregatorConfig, NodeConfig, read_config
from secgeo.records import MANIFEST, TRANSCRIPT, list_files
from secgeo.study import DOCUMENTS, OpenStudy

LEAKAGE = "leakage"

Report = Callable[[str, str, float], None]
"""Told of a part, what it does, and how much of it is done."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to audit.

    Attributes:
        source: a folder of records, or a node's configuration.
        out: where the bundle goes; a new or empty folder.
        profile: how long it may take.
        plant: a bug to plant into the training; then only that is audited.
        node: whose training, for a folder of records.
        authority: the authority's fingerprint, to be pinned.
        identity: who signs; without it a key is made for this bundle alone.
    """

    source: Path
    out: Path
    profile: training.Profile = "fast"
    plant: str | None = None
    node: str | None = None
    authority: str | None = None
    identity: Identity | None = None


@dataclass(slots=True)
class _Parts:
    """Keeps time, and the reason of what could not be done. `beside` is what goes on at the same time."""

    report: Report
    beside: Beside[leakage.LeakageEvidence] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    not_done: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[Callable[[str, float], None]]:
        started = time.monotonic()

        def progress(doing: str, done: float) -> None:
            self.report(name, doing, done)
            if self.beside is not None and name != LEAKAGE:
                self.beside.follow(lambda doing, done: self.report(LEAKAGE, doing, done))

        try:
            yield progress
        except SecGeoError as error:
            self.not_done[name] = bundle.reason(error)
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.report(name, "done" if name not in self.not_done else "could not be done", 1.0)


@one_thread()
def run_audit(request: Request, report: Report) -> Verdict:
    """Audit, and leave the bundle in `request.out`.

    Raises:
        ConfigError: there is nothing to audit, or nowhere to write.
    """
    source, out, started = request.source, request.out.resolve(), bundle.now()
    if not source.exists():
        raise ConfigError(f"{source} does not exist; give a study's folder of records or a node's configuration")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; give --out a new folder")
    if request.plant is not None and request.plant not in PLANTS:
        raise ConfigError(f"there is no planted bug {request.plant!r}; choose one of: {', '.join(PLANTS)}")
    records, left_out = source.is_dir(), tuple[str, ...]()
    if records and out.is_relative_to(source.resolve()):
        raise ConfigError(f"{out} is in the folder that is audited, where nothing may be added; give --out another one")
    study, authority = _study(request, started)
    if request.node is not None and not (records and any(m.node_id == request.node for m in study.agreement.members)):
        raise ConfigError(
            f"{request.node} is no member of the study, or not the node of this configuration; leave --node out"
        )
    target, why = _target(request, study)
    _make(out, confidential=not records)
    for name, document in study.documents.items():
        write_public(out / bundle.STUDY / name, document)
    parts = _Parts(report)
    with ExitStack() as stack:
        if target is not None and request.plant is None:
            parts.beside = stack.enter_context(Beside(leakage.collect, target, request.profile))
        if records and request.plant is None:
            with parts.part("records") as doing:
                doing("copying", 0.0)
                left_out = _copy_records(source, out / bundle.RECORDS)
        if target is None:
            parts.not_done["training data"] = why
        for name, collect in _training_parts(target, request) if target is not None else ():
            with parts.part(name) as doing:
                bundle.write_struct(out / bundle.EVIDENCE / f"{name}.json", collect(doing))
        if request.plant is None:
            with parts.part("protocol") as doing:
                folder, config = (source, None) if records else (None, source)
                played = protocol.collect(
                    study.agreement, profile=request.profile, folder=folder, config=config, progress=doing
                )
                bundle.write_struct(out / bundle.EVIDENCE / "protocol.json", played)
        if parts.beside is not None:
            with parts.part(LEAKAGE) as doing:
                leaked = parts.beside.outcome(doing)
                bundle.write_struct(out / bundle.EVIDENCE / f"{LEAKAGE}.json", leaked)
            if LEAKAGE not in parts.not_done:
                parts.seconds[LEAKAGE] = leaked.seconds
    about = About(
        format=bundle.FORMAT,
        study=study.agreement.study.id,
        agreement_digest=study.agreement_digest.hex(),
        kind="records" if records else "configuration",
        source=source.resolve().name,
        node=target.member.node_id if target else "",
        data="" if target is None else target.source if request.plant is None else whose("", target.member.node_id),
        authority=authority,
        started=started,
        profile=request.profile,
        plant=request.plant,
        seconds=parts.seconds,
        not_done=parts.not_done,
        left_out=left_out,
        python=bundle.python_version(),
        versions=bundle.versions(),
    )
    bundle.write_struct(out / bundle.ABOUT, about)
    report("verdict", "judging", 0.2)
    verdict = bundle.conclude(out, render)
    _sign(out, request.identity)
    report("verdict", "done", 1.0)
    return verdict


def _study(request: Request, started: datetime) -> tuple[OpenStudy, str | None]:
    """The study, and who pinned its authority. What does not check is not audited: it is refused with its own exit code."""
    if request.source.is_dir():
        for name in (*DOCUMENTS, TRANSCRIPT):
            if not (request.source / name).exists():
                raise ConfigError(
                    f"{request.source} has no {name}: that is no folder of records; give one, or a node's configuration"
                )
        return study_of_folder(request.source, request.authority, started), request.authority
    if isinstance(read_any_config(request.source), AggregatorConfig):
        raise ConfigError(
            f"{request.source} is an aggregator's configuration, which has no training to audit: give a node's, or a folder of records"
        )
    pinned = read_config(request.source, NodeConfig).study.authority_fingerprint
    if request.authority not in (None, pinned):
        raise ConfigError(f"the configuration pins the authority {pinned}, not {request.authority}")
    return study_of_config(request.source, started), pinned


def _target(request: Request, study: OpenStudy) -> tuple[Target | None, str]:
    """Whose training is audited; for records that are not a demonstration's there is nobody, and why."""
    source = request.source
    if source.is_dir() and request.plant is None and not (source / SPLIT).exists():
        return (
            None,
            f"{source.name} has no {SPLIT}, as only demonstrations have; audit the training with a node's configuration",
        )
    target = target_of_folder(source, study, request.node) if source.is_dir() else target_of_config(source, study)
    return (target if request.plant is None else PLANTS[request.plant].target(target)), ""


def _make(out: Path, *, confidential: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        if confidential:
            out.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error.strerror}") from None
    bundle.make_folder(out / bundle.STUDY)


def _training_parts(
    target: Target, request: Request
) -> Iterator[tuple[str, Callable[[Callable[[str, float], None]], msgspec.Struct]]]:
    profile = request.profile
    yield "conformance", lambda doing: conformance.collect(target, doing)
    yield "training", lambda doing: training.collect(target, profile=profile, progress=doing)


def _copy_records(source: Path, to: Path) -> tuple[str, ...]:
    """Copy what the manifest lists, and nothing else: a folder may hold what is nobody's business. Gives the names of the rest."""
    listed = {MANIFEST, f"{MANIFEST}.sig", *DOCUMENTS, TRANSCRIPT}
    if (source / MANIFEST).exists():
        with suppress(msgspec.DecodeError, UnicodeDecodeError):  # the verification of the copy will say so
            manifest = read_public(source / MANIFEST, bundle.FILE_LIMIT_BYTES)
            listed |= msgspec.json.decode(manifest, type=dict[str, str]).keys()
    found = list_files(source)
    for name in found:
        if name in listed:
            bundle.make_folder((to / name).parent)
            try:
                shutil.copyfile(source / name, to / name, follow_symlinks=False)
            except OSError as error:
                raise ConfigError(f"{name} cannot be copied to {to}: {error.strerror}") from None
    return tuple(name for name in found if name not in listed)


def _sign(out: Path, identity: Identity | None) -> None:
    if identity is not None:
        auditor = Auditor(identity.node_id, identity.public_key.public_bytes_raw().hex())
        bundle.seal(out, auditor, identity.sign)
        return
    key = Ed25519PrivateKey.generate()
    auditor = Auditor("a key of this bundle alone", key.public_key().public_bytes_raw().hex())
    bundle.seal(out, auditor, lambda label, data: sign_labelled(key, label, data))
