"""An audit from beginning to end: collect evidence part by part, judge it, draw the report, sign the bundle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import bundle, conformance, leakage, protocol, training
from audit.bundle import About, Auditor, Verdict
from audit.plants import PLANTS
from audit.report import render
from audit.target import Target, study_of_config, study_of_folder, target_of_config, target_of_folder
from keys.errors import ConfigError, SecGeoError
from keys.files import write_public
from keys.identity import Identity, sign_labelled
from secgeo.records import list_files
from secgeo.study import AGREEMENT, OpenStudy

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
    """Keeps time, and the reason of what could not be done."""

    report: Report
    seconds: dict[str, float] = field(default_factory=dict)
    not_done: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[Callable[[str, float], None]]:
        started = time.monotonic()
        try:
            yield lambda doing, done: self.report(name, doing, done)
        except SecGeoError as error:
            self.not_done[name] = bundle.reason(error)
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.report(name, "done" if name not in self.not_done else "could not be done", 1.0)


def run_audit(request: Request, report: Report) -> Verdict:
    """Audit, and leave the bundle in `request.out`.

    Raises:
        ConfigError: there is nothing to audit, or nowhere to write.
    """
    source, out, started = request.source, request.out, bundle.now()
    if not source.exists():
        raise ConfigError(f"{source} does not exist; give a study's folder of records or a node's configuration")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; give --out a new folder")
    if request.plant is not None and request.plant not in PLANTS:
        raise ConfigError(f"there is no planted bug {request.plant!r}; choose one of: {', '.join(PLANTS)}")
    (out / bundle.EVIDENCE).mkdir(parents=True, exist_ok=True)
    parts = _Parts(report)
    if source.is_dir() and request.plant is None:
        with parts.part("records") as doing:
            doing("copying", 0.0)
            _copy_records(source, out / bundle.RECORDS)
    study = _study(request, started, parts)
    if (
        study is not None
        and request.node is not None
        and not any(m.node_id == request.node for m in study.agreement.members)
    ):
        raise ConfigError(f"{request.node} is no member of the study; leave --node out, or name one of its members")
    target = None
    if study is not None:
        write_public(out / bundle.AGREEMENT, study.documents[AGREEMENT])
        with parts.part("training data"):
            target = _target(request, study)
    if target is not None:
        for name, collect in _training_parts(target, request):
            with parts.part(name) as doing:
                bundle.write_struct(out / bundle.EVIDENCE / f"{name}.json", collect(doing))
    if study is not None and request.plant is None:
        with parts.part("protocol") as doing:
            folder, config = (source, None) if source.is_dir() else (None, source)
            evidence = protocol.collect(
                study.agreement, profile=request.profile, folder=folder, config=config, progress=doing
            )
            bundle.write_struct(out / bundle.EVIDENCE / "protocol.json", evidence)
    bundle.write_struct(out / bundle.ABOUT, _about(request, started, study, target, parts))
    with parts.part("verdict") as doing:
        doing("judging", 0.2)
        verdict = bundle.conclude(out, render)
    _sign(out, request.identity)
    return verdict


def _study(request: Request, started: datetime, parts: _Parts) -> OpenStudy | None:
    study = None
    with parts.part("documents"):
        if request.source.is_dir():
            study = study_of_folder(request.source, request.authority, started)
        else:
            study = study_of_config(request.source, started)
    return study


def _target(request: Request, study: OpenStudy) -> Target:
    source = request.source
    target = target_of_folder(source, study, request.node) if source.is_dir() else target_of_config(source, study)
    return target if request.plant is None else PLANTS[request.plant].target(target)


def _training_parts(
    target: Target, request: Request
) -> Iterator[tuple[str, Callable[[Callable[[str, float], None]], msgspec.Struct]]]:
    profile = request.profile
    yield "conformance", lambda doing: conformance.collect(target, doing)
    yield "training", lambda doing: training.collect(target, profile=profile, progress=doing)
    if request.plant is None:
        yield "leakage", lambda doing: leakage.collect(target, profile=profile, progress=doing)


def _copy_records(source: Path, to: Path) -> None:
    for name in list_files(source):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, to / name, follow_symlinks=False)


def _about(request: Request, started: datetime, study: OpenStudy | None, target: Target | None, parts: _Parts) -> About:
    return About(
        format=bundle.FORMAT,
        study=study.agreement.study.id if study else "",
        agreement_digest=study.agreement_digest.hex() if study else "",
        source=request.source.resolve().name,
        node=target.member.node_id if target else "",
        data=target.source if target else "",
        authority=request.authority,
        started=started,
        profile=request.profile,
        plant=request.plant,
        seconds=parts.seconds,
        not_done=parts.not_done,
        python=bundle.python_version(),
        versions=bundle.versions(),
    )


def _sign(out: Path, identity: Identity | None) -> None:
    if identity is not None:
        auditor = Auditor(identity.node_id, identity.public_key.public_bytes_raw().hex())
        bundle.seal(out, auditor, identity.sign)
        return
    key = Ed25519PrivateKey.generate()
    auditor = Auditor("a key of this bundle alone", key.public_key().public_bytes_raw().hex())
    bundle.seal(out, auditor, lambda label, data: sign_labelled(key, label, data))
