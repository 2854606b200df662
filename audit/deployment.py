"""What can be seen of a deployment without its secrets: key files, certificates, pins, folders, what its aggregator has signed, its door.

`collect_deployment` looks at what a node's or an aggregator's configuration names, and with a node's it knocks at the aggregator as a
stranger (`audit.door`). Files may be hostile: what is wrong with them is evidence. `judge_deployment` is a pure function of it.

Passphrases are not asked for, so that the secret part of a key file is not seen: whether it belongs to the certificate is checked
by the node itself when it starts. Files belong to who runs the site, whoever looks at them: root may audit a service's node.
"""

from __future__ import annotations

import math
import os
import stat
import tomllib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
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
from keys.errors import ConfigError, KeyFileError, SecGeoError, VerificationFailed
from keys.files import (
    KEY_FILE_LIMIT_BYTES,
    PASSPHRASE_LIMIT_BYTES,
    SCRYPT_LOG2_N,
    parse_key_file,
    parse_passphrase,
    read_public,
)
from keys.identity import CERTIFICATE_FILE, KEY_FILE
from protocols.agreement import Agreement
from protocols.policy import LocalPolicy, check_policy
from secgeo.config import AggregatorConfig, EntryPointData, NodeConfig, read_config
from secgeo.records import TRANSCRIPT
from secgeo.study import OpenStudy, open_study

RECEIPTS_FILE = "receipts.jsonl"
"""In a node's state: see `secgeo.journal`."""
FILES_LOOKED_AT = 1000
NOT_COMPARED = "not compared"
TWO_KEYS_BYTES = 64
"""What an identity's key file holds at least: a signing key, and a key for CURVE."""
GROUP_WRITES, EVERYBODY_READS, EVERYBODY_WRITES = 0o020, 0o004, 0o002


class FileFacts(Struct, frozen=True, forbid_unknown_fields=True):
    """A file or folder that must be private.

    Attributes:
        own: whether it belongs to who runs the site.
        form: of a key file "encrypted", "clear", "other" (none that would be read), or "unread" (it may not be opened here).
        scrypt_log2_n: of an encrypted key file.
        problem: what is wrong with its content.
    """

    name: str
    kind: Literal["missing", "file", "folder", "link", "other"]
    mode: int
    own: bool
    form: str = ""
    scrypt_log2_n: int = 0
    problem: str = ""


class Reach(Struct, frozen=True, forbid_unknown_fields=True):
    """What others than its owner can do with a file or folder, by the modes of it and of all folders above.

    Attributes:
        what: the configuration, a file of records, or the folder of a program that gives records.
        others: permission bits of its group and of everybody, as in a mode; those that folders keep from them are left out.
    """

    name: str
    what: Literal["configuration", "data", "program"]
    kind: Literal["missing", "file", "folder", "other"]
    others: Annotated[int, Meta(ge=0, le=0o77)]


class DeploymentEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """What a configuration names, as far as it can be seen without secrets. Empty texts are good."""

    taken_at: Moment
    role: Literal["node", "aggregator"]
    address: str
    allows_clear_keys: bool
    key_file: FileFacts
    passphrase_file: FileFacts | None
    configuration: Reach
    data: tuple[Reach, ...]
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
    settings, base = read_any_config(config), config.parent
    keys = base / settings.keys
    owner = _owner(config, keys)
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
        _facts(path, owner)
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
        key_file=_key_file(keys / KEY_FILE, owner),
        passphrase_file=_passphrase_file(base / settings.passphrase_file, owner) if settings.passphrase_file else None,
        configuration=_reach(config, "configuration"),
        data=_data(node, base) if node is not None else (),
        folders=(_facts(keys, owner), *folders),
        certificates=certs,
        certificate_problem=problems["certificate"],
        study_problem=problems["study"],
        policy_problem=problems["policy"],
        study=running,
        probes=probes,
        not_seen=tuple(not_seen),
    )


def read_any_config(config: Path) -> NodeConfig | AggregatorConfig:
    """A node's configuration or an aggregator's, whichever it is.

    Raises:
        ConfigError: it is neither.
    """
    try:
        names = tomllib.loads(config.read_text(encoding="utf-8")).keys()
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{config}: {error}") from None
    return read_config(config, AggregatorConfig) if "listen_address" in names else read_config(config, NodeConfig)


def _state_of(settings: NodeConfig | AggregatorConfig) -> str:
    return settings.state or f"{settings.records}.state" if isinstance(settings, AggregatorConfig) else settings.state


def _owner(config: Path, keys: Path) -> int:
    """Whose the site is: the configuration's owner; where that is root, who has set up a service, the key folder's."""
    try:
        return config.stat().st_uid or keys.lstat().st_uid
    except OSError:
        return 0


def _facts(path: Path, owner: int) -> FileFacts:
    """What the file system says."""
    try:
        status = path.lstat()
    except OSError:
        return FileFacts(path.name, "missing", 0, False)
    mode, own = stat.S_IMODE(status.st_mode), status.st_uid == owner
    if stat.S_ISLNK(status.st_mode):
        return FileFacts(path.name, "link", mode, own)
    if stat.S_ISDIR(status.st_mode):
        return FileFacts(path.name, "folder", mode, own)
    return FileFacts(path.name, "file" if stat.S_ISREG(status.st_mode) else "other", mode, own)


def _key_file(path: Path, owner: int) -> FileFacts:
    """A key file, and whether `keys.files.read_secret` would take it: all of it but what the passphrase opens."""
    facts = _facts(path, owner)
    if facts.kind != "file":
        return facts
    if not os.access(path, os.R_OK):
        return msgspec.structs.replace(facts, form="unread")
    try:
        parts = parse_key_file(Path(path.name), read_public(path, KEY_FILE_LIMIT_BYTES))
    except KeyFileError as error:
        return msgspec.structs.replace(facts, form="other", problem=str(error))
    if parts.secret_bytes < TWO_KEYS_BYTES:
        short = f"{path.name} is too short to hold two keys"
        return msgspec.structs.replace(facts, form="other", problem=short)
    return msgspec.structs.replace(facts, form="encrypted" if parts.encrypted else "clear", scrypt_log2_n=parts.log2_n)


def _passphrase_file(path: Path, owner: int) -> FileFacts:
    """A passphrase file, and whether `keys.files.read_passphrase_file` would take it. What stands in it is not kept."""
    facts = _facts(path, owner)
    if facts.kind != "file" or not os.access(path, os.R_OK):
        return facts
    try:
        parse_passphrase(Path(path.name), read_public(path, PASSPHRASE_LIMIT_BYTES))
    except KeyFileError as error:
        return msgspec.structs.replace(facts, problem=str(error))
    return facts


def _data(settings: NodeConfig, base: Path) -> tuple[Reach, ...]:
    """The records that a node's configuration names, of training and of evaluation, or the programs that give them."""
    found = []
    for data in (settings.data, settings.evaluation):
        if isinstance(data, EntryPointData):
            found.append(_reach(base / data.folder, "program"))
        elif data is not None:
            found.append(_reach(base / data.path, "data"))
    return tuple(found)


def _reach(path: Path, what: Literal["configuration", "data", "program"]) -> Reach:
    """Whoever may not enter a folder cannot read what is in it; whoever may write there (without a sticky bit) can replace it."""
    try:
        place = path.resolve(strict=True)
        status, above = place.stat(), [folder.stat() for folder in place.parents]
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return Reach(path.name, what, "missing", 0)
    others = status.st_mode & 0o077
    if above and not above[0].st_mode & stat.S_ISVTX:
        others |= above[0].st_mode & (GROUP_WRITES | EVERYBODY_WRITES)
    for folder in above:
        another_group = folder.st_gid != status.st_gid and folder.st_mode & stat.S_IXGRP
        if not folder.st_mode & stat.S_IXOTH and not another_group:
            others &= ~0o007
        if not folder.st_mode & (stat.S_IXOTH | stat.S_IXGRP):
            others &= ~0o070
    kind: Literal["file", "folder", "other"] = (
        "folder" if stat.S_ISDIR(status.st_mode) else "file" if stat.S_ISREG(status.st_mode) else "other"
    )
    return Reach(path.name, what, kind, others)


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
        _judge_configuration(evidence.configuration),
        *([_judge_data(evidence.data)] if evidence.role == "node" else []),
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
    key, passphrase = evidence.key_file, evidence.passphrase_file
    faults = _not_private(key, 0o600)
    promise = "key and passphrase files are plain files of their owner with mode 0600, and no passphrase is empty"
    detail = f"mode {key.mode:04o}, own"
    if passphrase is not None:
        faults += [*_not_private(passphrase, 0o600), *filter(None, [passphrase.problem])]
        detail += "" if passphrase.kind != "missing" else f"; {passphrase.name}, the passphrase file, is not there"
    missing = key.kind == "missing"
    private = finding("key files are private", promise, "broken" if faults else "held", "; ".join(faults) or detail)
    if missing and not faults:
        private = finding("key files are private", promise, "not testable", "there is no key file")
    strong = key.form == "encrypted" and key.scrypt_log2_n >= SCRYPT_LOG2_N
    unseen = missing or key.form == "unread"
    status: Status = "not testable" if unseen else "held" if strong else "broken"
    said = {
        "encrypted": f"scrypt with N = 2^{key.scrypt_log2_n}",
        "clear": "the keys are in clear" + (", as the configuration allows" if evidence.allows_clear_keys else ""),
        "other": key.problem or "this is no key file of SecGeo",
        "unread": "the key file may not be opened by who audits",
    }.get(key.form, "there is no key file to look at")
    encrypted = f"key files are encrypted under a passphrase, by scrypt with N = 2^{SCRYPT_LOG2_N} at least"
    return [private, finding("key files are encrypted", encrypted, status, said)]


def _judge_configuration(configuration: Reach) -> Finding:
    faults = _writers(configuration)
    promise = "nobody but its owner can change the configuration"
    status: Status = "broken" if faults else "held"
    return finding("configuration is protected", promise, status, "; ".join(faults) or f"{configuration.name} is")


def _judge_data(data: Sequence[Reach]) -> Finding:
    """Records may be read by a group, as where several people work with them; programs that give them by anybody."""
    faults = [fault for reach in data for fault in _writers(reach)]
    faults += [f"{r.name} can be read by everybody" for r in data if r.what == "data" and r.others & EVERYBODY_READS]
    missing = [reach.name for reach in data if reach.kind == "missing"]
    promise = "records can be read by nobody but their owner and its group, and changed by nobody but their owner"
    if not faults and missing:
        return finding("data are private", promise, "not testable", f"not there: {', '.join(missing)}")
    seen = "; ".join(
        f"{r.name}: {'its group reads it' if r.others & 0o040 else 'its owner only'}" for r in data if r.what == "data"
    )
    detail = "; ".join(faults) or seen or "records come from a program that only its owner can change"
    return finding("data are private", promise, "broken" if faults else "held", detail)


def _writers(reach: Reach) -> list[str]:
    """Who else can change something, or put another one in its place."""
    who = "everybody" if reach.others & EVERYBODY_WRITES else "its group" if reach.others & GROUP_WRITES else ""
    return [f"{reach.name} can be changed by {who}"] if who else []


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
