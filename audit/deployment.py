"""What can be seen of a deployment without its secrets: key files, certificates, pins, folders, records, and the aggregator's door.

`collect_records` reads a study's folder of records; `collect_deployment` what a node's or an aggregator's configuration names, and
with a node's it knocks at the aggregator as a stranger (`audit.door`). Files may be hostile: what is wrong with them is evidence.
`judge_records` and `judge_deployment` are pure functions of that evidence.

Passphrases are not asked for, so that the secret part of a key file is not seen: whether it belongs to the certificate is checked
by the node itself when it starts. What `secgeo verify` checks of records (`audit.records`) is not repeated here.
"""

from __future__ import annotations

import math
import os
import stat
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from audit.budget import Steps, epsilon_rdp
from audit.door import Probe, judge_knocks, knock
from audit.findings import Finding, Status
from keys import certificates
from keys.errors import ConfigError, SecGeoError, VerificationFailed
from keys.files import KEY_FILE_LIMIT_BYTES, SCRYPT_LOG2_N, read_public
from keys.identity import CERTIFICATE_FILE, KEY_FILE
from keys.labels import Label
from keys.roster import Roster, load_root, read_roster
from protocols.agreement import Agreement
from protocols.policy import LocalPolicy, check_policy
from protocols.transcript import RoundRecord, read_line, read_transcript, verify_round
from secgeo.config import AggregatorConfig, NodeConfig, read_config
from secgeo.records import RECEIPTS, TRANSCRIPT, list_files
from secgeo.study import DOCUMENTS, ROOT, ROSTER, OpenStudy, check_documents, open_study

RECEIPTS_FILE = "receipts.jsonl"
"""In a node's state: see `secgeo.journal`."""
FILE_LIMIT_BYTES = 1 << 28
FILES_LOOKED_AT = 1000
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


class FileFacts(Struct, frozen=True, forbid_unknown_fields=True):
    """A file or folder that must be private. `form` is of a key file: "encrypted", "clear", or "other"."""

    name: str
    kind: Literal["missing", "file", "folder", "link", "other"]
    mode: int
    own: bool
    form: str = ""
    scrypt_log2_n: int = 0


class RunningStudy(Struct, frozen=True, forbid_unknown_fields=True):
    """The records of rounds that the running aggregator has signed, as this site has kept them: how many, and what is wrong with them."""

    records: Annotated[int, Meta(ge=0)]
    repeats: tuple[Repeats, ...]
    study_keys: Annotated[int, Meta(ge=0)]
    problems: tuple[str, ...]


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


# --- records


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


def judge_records(evidence: RecordsEvidence) -> list[Finding]:
    """The findings on a folder of records."""
    problems = "; ".join(evidence.problems)
    readable = "everything in the folder that is looked at can be read, and documents belong together"
    findings = [_finding("records can be read", readable, "broken" if problems else "held", problems or "they can")]
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
        _finding("records repeat nothing", promise, status, detail),
        *_judge_certificates("certificates of the records", evidence.certificates, evidence.taken_at),
    ]


# --- a deployment


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


def _own_certificate(path: Path, study: OpenStudy | None, role: str) -> str:
    """Why the certificate in the key folder is not that of a party of this study in this role; empty if it is."""
    if study is None:
        return "not compared: the study's documents do not check"
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
        _finding(
            "local policy",
            "the agreement is not weaker than the site's policy",
            "not testable",
            "an aggregator has none",
        )
        if evidence.role == "aggregator"
        else _judge_text("local policy", "the agreement is not weaker than the site's policy", evidence.policy_problem)
        if not evidence.study_problem
        else _finding(
            "local policy",
            "the agreement is not weaker than the site's policy",
            "not testable",
            "the study does not open",
        ),
        _judge_rounds(evidence.study),
        *_judge_certificates("certificates of the study", evidence.certificates, evidence.taken_at),
    ]


def _judge_rounds(study: RunningStudy | None) -> Finding:
    """What the running aggregator has signed so far."""
    name, promise = (
        "rounds of the running study",
        "what the aggregator has signed is of this agreement, with enough contributors and votes; a round has one record, and nothing "
        "that must be fresh comes twice",
    )
    if study is None or not (study.records or study.problems):
        return _finding(
            name, promise, "not testable", "no round is finished yet" if study else "the study does not open"
        )
    repeated = [f"{r.seen} {r.kind}, {r.distinct} different" for r in study.repeats if r.distinct < r.seen]
    several = [f"{study.study_keys} study keys"] if study.study_keys > 1 else []
    faults = [*study.problems, *repeated, *several]
    shown = f"{study.records} records: " + ", ".join(f"{r.seen} {r.kind}" for r in study.repeats) + ", all different"
    return _finding(name, promise, "broken" if faults else "held", "; ".join(faults) or shown)


def _judge_key_files(evidence: DeploymentEvidence) -> list[Finding]:
    faults = _not_private(evidence.key_file, 0o600)
    promise = "key and passphrase files are plain files of their owner with mode 0600"
    if evidence.passphrase_file is not None:
        faults += _not_private(evidence.passphrase_file, 0o600)
    detail = "; ".join(faults) or f"mode {evidence.key_file.mode:04o}, own"
    missing = evidence.key_file.kind == "missing"
    private = _finding("key files are private", promise, "broken" if faults else "held", detail)
    if missing:
        private = _finding("key files are private", promise, "not testable", "there is no key file")
    form, log2_n = evidence.key_file.form, evidence.key_file.scrypt_log2_n
    strong = form == "encrypted" and log2_n >= SCRYPT_LOG2_N
    status: Status = "not testable" if missing else "held" if strong else "broken"
    said = {
        "encrypted": f"scrypt with N = 2^{log2_n}",
        "clear": "the keys are in clear" + (", as the configuration allows" if evidence.allows_clear_keys else ""),
        "other": "this is no key file of SecGeo",
    }.get(form, "there is no key file to look at")
    encrypted = f"key files are encrypted under a passphrase, by scrypt with N = 2^{SCRYPT_LOG2_N} at least"
    return [private, _finding("key files are encrypted", encrypted, status, said)]


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
    return _finding("folders are private", promise, "broken" if faults else "held", detail)


def _not_private(facts: FileFacts, mode: int) -> list[str]:
    if facts.kind == "missing":
        return []
    faults = [f"{facts.name} is a link or no plain file"] if facts.kind in ("link", "other") else []
    faults += [f"{facts.name} belongs to another user"] if not facts.own else []
    loose = facts.kind != "link" and facts.mode & ~mode
    return faults + ([f"{facts.name} has mode {facts.mode:04o}, looser than {mode:04o}"] if loose else [])


def _judge_certificates(name: str, certs: Iterable[Certificate], now: datetime) -> list[Finding]:
    certs = list(certs)
    sound_promise = "every certificate of the study is valid, of an Ed25519 key, and signed by the authority"
    last_promise = f"no certificate of the study ends within {SOON_DAYS} days"
    if not certs:
        why = "no roster could be read"
        return [
            _finding(name, sound_promise, "not testable", why),
            _finding(f"{name} last", last_promise, "not testable", why),
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
        _finding(name, sound_promise, "broken" if bad or not party else "held", detail),
        _finding(f"{name} last", last_promise, ends, soon),
    ]


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
    status: Status = "not testable" if problem.startswith("not compared") else "broken" if problem else "held"
    return _finding(name, promise, status, problem or note or "it does")


def _finding(name: str, promise: str, status: Status, detail: str) -> Finding:
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
