"""What can be seen of a deployment without its secrets: key files, certificates, pins, folders, what its aggregator has signed, its door.

`collect_deployment` looks at what a node's or an aggregator's configuration names, and with a node's it knocks at the aggregator as a
stranger (`audit.door`). Files may be hostile: what is wrong with them is evidence. `judge_deployment` is a pure function of it.

Passphrases are not asked for, so that the secret part of a key file is not seen: whether it belongs to the certificate is checked
by the node itself when it starts.
"""

from __future__ import annotations

import math
import os
import stat
import tomllib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from audit.budget import Steps, epsilon_rdp
from audit.door import Probe, judge_knocks, knock
from audit.findings import Finding, Status
from audit.rounds import (
    Certificate,
    Moment,
    RunningStudy,
    certificates_of,
    collect_rounds,
    finding,
    judge_certificates,
    judge_rounds,
)
from keys import certificates
from keys.errors import ConfigError, SecGeoError, VerificationFailed
from keys.files import KEY_FILE_LIMIT_BYTES, SCRYPT_LOG2_N, read_public
from keys.identity import CERTIFICATE_FILE, KEY_FILE
from keys.labels import Label
from protocols.agreement import Agreement
from protocols.policy import LocalPolicy, check_policy
from secgeo.config import AggregatorConfig, NodeConfig, read_config
from secgeo.records import TRANSCRIPT
from secgeo.study import OpenStudy, open_study

RECEIPTS_FILE = "receipts.jsonl"
"""In a node's state: see `secgeo.journal`."""
FILES_LOOKED_AT = 1000
NOT_COMPARED = "not compared"


class FileFacts(Struct, frozen=True, forbid_unknown_fields=True):
    """A file or folder that must be private. `form` is of a key file: "encrypted", "clear", or "other"."""

    name: str
    kind: Literal["missing", "file", "folder", "link", "other"]
    mode: int
    own: bool
    form: str = ""
    scrypt_log2_n: int = 0


class DeploymentEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """What a configuration names, as far as it can be seen without secrets. Empty texts are good."""

    taken_at: Moment
    role: Literal["node", "aggregator"]
    address: str
    allows_clear_keys: bool
    key_file: FileFacts
    passphrase_file: FileFacts | None
    folders: Annotated[tuple[FileFacts, ...], Meta(min_length=1)]
    certificates: tuple[Certificate, ...]
    certificate_problem: str
    study_problem: str
    policy_problem: str
    study: RunningStudy | None
    probes: tuple[Probe, ...]
    not_seen: tuple[str, ...]


def collect_deployment(config: Path, now: datetime, *, probe: bool = True) -> DeploymentEvidence:
    """Look at what a configuration names, and knock at the aggregator's door if it is a node's.

    Raises:
        ConfigError: the configuration cannot be read, or is neither a node's nor an aggregator's.
    """
    settings, base = _read(config), config.parent
    keys = base / settings.keys
    problems: dict[str, str] = {"study": "", "policy": "", "certificate": ""}
    study: OpenStudy | None = None
    certs: tuple[Certificate, ...] = ()
    try:
        study = open_study(settings.study, base, now=now)
        certs = certificates_of(study.roster, {member.node_id for member in study.agreement.members})
    except SecGeoError as error:
        problems["study"] = str(error)
    node = settings if isinstance(settings, NodeConfig) else None
    problems["certificate"] = _own_certificate(keys / CERTIFICATE_FILE, study, "hospital" if node else "aggregator")
    not_seen = ["whether the secret keys belong to the certificate: the key file is not opened"]
    if node is not None and study is not None:
        problems["policy"] = _policy(study.agreement, node.policy)
    state = base / (node.state if node else _state_of(settings))
    folders = [
        _facts(path)
        for path in (state, *sorted(state.glob("*"))[:FILES_LOOKED_AT])
        if not path.name.endswith(("-shm", "-wal"))
    ]
    running = None
    if study is not None:
        own = state / f"{study.agreement.study.id}-{study.agreement_digest.hex()[:16]}" / RECEIPTS_FILE
        written = own if isinstance(settings, NodeConfig) else base / settings.records / TRANSCRIPT
        running = collect_rounds(written, study)
    probes: tuple[Probe, ...] = ()
    if node is None or not probe:
        not_seen.append("the door of the aggregator: only a node's configuration says where it is")
    elif study is None:
        not_seen.append("the door of the aggregator: without the study's documents its key is not known")
    else:
        probes = knock(node.aggregator_address, study.roster.aggregator.curve_public)
    return DeploymentEvidence(
        taken_at=now,
        role="aggregator" if node is None else "node",
        address=settings.listen_address if isinstance(settings, AggregatorConfig) else settings.aggregator_address,
        allows_clear_keys=settings.unencrypted_keys,
        key_file=_facts(keys / KEY_FILE, key_file=True),
        passphrase_file=_facts(base / settings.passphrase_file) if settings.passphrase_file else None,
        folders=(_facts(keys), *folders),
        certificates=certs,
        certificate_problem=problems["certificate"],
        study_problem=problems["study"],
        policy_problem=problems["policy"],
        study=running,
        probes=probes,
        not_seen=tuple(not_seen),
    )


def _read(config: Path) -> NodeConfig | AggregatorConfig:
    try:
        names = tomllib.loads(config.read_text(encoding="utf-8")).keys()
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{config}: {error}") from None
    return read_config(config, AggregatorConfig) if "listen_address" in names else read_config(config, NodeConfig)


def _state_of(settings: NodeConfig | AggregatorConfig) -> str:
    return settings.state or f"{settings.records}.state" if isinstance(settings, AggregatorConfig) else settings.state


def _facts(path: Path, *, key_file: bool = False) -> FileFacts:
    """What the file system says; of a key file also its header, which holds no secret."""
    try:
        status = path.lstat()
    except OSError:
        return FileFacts(path.name, "missing", 0, False)
    mode, own = stat.S_IMODE(status.st_mode), status.st_uid == os.geteuid()
    if stat.S_ISLNK(status.st_mode):
        return FileFacts(path.name, "link", mode, own)
    if stat.S_ISDIR(status.st_mode):
        return FileFacts(path.name, "folder", mode, own)
    if not stat.S_ISREG(status.st_mode):
        return FileFacts(path.name, "other", mode, own)
    if not key_file:
        return FileFacts(path.name, "file", mode, own)
    form, log2_n = "other", 0
    size = len(Label.KEY_FILE) + 2
    try:
        with path.open("rb") as file:
            head = file.read(size)
    except OSError:
        head = b""
    if status.st_size <= KEY_FILE_LIMIT_BYTES and len(head) == size and head.startswith(Label.KEY_FILE):
        form = {0: "clear", 1: "encrypted"}.get(head[-2], "other")
        log2_n = head[-1] if form == "encrypted" else 0
    return FileFacts(path.name, "file", mode, own, form, log2_n)


def _own_certificate(path: Path, study: OpenStudy | None, role: str) -> str:
    """Why the certificate in the key folder is not that of a party of this study in this role; empty if it is."""
    if study is None:
        return f"{NOT_COMPARED}: the study's documents do not check"
    try:
        certificate = certificates.from_pem(read_public(path, certificates.CERTIFICATE_LIMIT_BYTES))
    except SecGeoError as error:
        return str(error)
    own = certificates.fingerprint(certificate)
    for entry in study.roster.usable:
        if entry.certificate_fingerprint == own and entry.role == role:
            if role == "hospital" and entry.node_id not in study.public_keys:
                return f"{entry.node_id} is in the roster, but is no member of the study"
            return ""
    return f"{path.name} is not the certificate of any {role} in the roster"


def _policy(agreement: Agreement, policy: LocalPolicy) -> str:
    privacy = agreement.privacy
    try:
        epsilon = epsilon_rdp(
            [Steps(privacy.sample_rate, privacy.noise_multiplier, agreement.total_steps)], privacy.delta
        )
    except VerificationFailed:
        epsilon = math.inf
    try:
        check_policy(agreement, policy, epsilon=epsilon)
    except ConfigError as error:
        return str(error)
    return ""


# --- judging


def judge_deployment(evidence: DeploymentEvidence) -> list[Finding]:
    """The findings on a deployment, but for the strangers' (`judge_strangers`)."""
    return [
        *_judge_key_files(evidence),
        _judge_folders(evidence),
        _judge_text(
            "documents of the study",
            "agreement and roster have the pinned digests and the authority's signatures, and belong together",
            evidence.study_problem,
        ),
        _judge_text(
            "own certificate",
            "the certificate in the key folder is that which the roster has for this party in this role",
            evidence.certificate_problem,
            "; ".join(evidence.not_seen[:1]),
        ),
        finding(
            "local policy",
            "the agreement is not weaker than the site's policy",
            "not testable",
            "an aggregator has none",
        )
        if evidence.role == "aggregator"
        else _judge_text("local policy", "the agreement is not weaker than the site's policy", evidence.policy_problem)
        if not evidence.study_problem
        else finding(
            "local policy",
            "the agreement is not weaker than the site's policy",
            "not testable",
            "the study does not open",
        ),
        judge_rounds(evidence.study),
        *judge_certificates("certificates of the study", evidence.certificates, evidence.taken_at),
    ]


def _judge_key_files(evidence: DeploymentEvidence) -> list[Finding]:
    faults = _not_private(evidence.key_file, 0o600)
    promise = "key and passphrase files are plain files of their owner with mode 0600"
    if evidence.passphrase_file is not None:
        faults += _not_private(evidence.passphrase_file, 0o600)
    detail = "; ".join(faults) or f"mode {evidence.key_file.mode:04o}, own"
    missing = evidence.key_file.kind == "missing"
    private = finding("key files are private", promise, "broken" if faults else "held", detail)
    if missing:
        private = finding("key files are private", promise, "not testable", "there is no key file")
    form, log2_n = evidence.key_file.form, evidence.key_file.scrypt_log2_n
    strong = form == "encrypted" and log2_n >= SCRYPT_LOG2_N
    status: Status = "not testable" if missing else "held" if strong else "broken"
    said = {
        "encrypted": f"scrypt with N = 2^{log2_n}",
        "clear": "the keys are in clear" + (", as the configuration allows" if evidence.allows_clear_keys else ""),
        "other": "this is no key file of SecGeo",
    }.get(form, "there is no key file to look at")
    encrypted = f"key files are encrypted under a passphrase, by scrypt with N = 2^{SCRYPT_LOG2_N} at least"
    return [private, finding("key files are encrypted", encrypted, status, said)]


def _judge_folders(evidence: DeploymentEvidence) -> Finding:
    """The key folder, and what lies in the state folder: folders 0700, files 0600. The state folder itself may be searched."""
    keys, *rest = evidence.folders
    faults = _not_private(keys, 0o700)
    for facts in rest[1:]:
        faults += _not_private(facts, 0o700 if facts.kind == "folder" else 0o600)
    faults += [
        f"{facts.name} belongs to another user" for facts in rest[:1] if facts.kind != "missing" and not facts.own
    ]
    seen = [facts for facts in rest if facts.kind != "missing"]
    detail = "; ".join(faults) or (f"{1 + len(seen)} files and folders" if seen else "there is no state folder yet")
    promise = "key folder and what lies in the state folder can be read by their owner only"
    return finding("folders are private", promise, "broken" if faults else "held", detail)


def _not_private(facts: FileFacts, mode: int) -> list[str]:
    if facts.kind == "missing":
        return []
    faults = [f"{facts.name} is a link or no plain file"] if facts.kind in ("link", "other") else []
    faults += [f"{facts.name} belongs to another user"] if not facts.own else []
    loose = facts.kind != "link" and facts.mode & ~mode
    return faults + ([f"{facts.name} has mode {facts.mode:04o}, looser than {mode:04o}"] if loose else [])


def judge_strangers(evidence: DeploymentEvidence | None) -> tuple[Status, str]:
    """Whether a stranger was kept out of the running aggregator, and it is still there."""
    if evidence is None:
        return (
            "not testable",
            "no configuration of a node was given, so that the door of no running aggregator was tried",
        )
    if not evidence.probes:
        return "not testable", "; ".join(evidence.not_seen[1:]) or "nothing was tried"
    return judge_knocks(evidence.address, evidence.probes)


def _judge_text(name: str, promise: str, problem: str, note: str = "") -> Finding:
    status: Status = "not testable" if problem.startswith(NOT_COMPARED) else "broken" if problem else "held"
    return finding(name, promise, status, problem or note or "it does")
