"""Targets of documents: agreement, roster, certificates, requests, signatures, key files, chains of records, whole folders.

Where a document counts only with a signature, there are two targets or two modes: the bytes as they come, and the bytes
signed anew by the party that is to sign them, for that party may be hostile too and its decoder lies behind the signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from audit.budget import epsilon_pld, epsilon_rdp
from audit.records import verify_folder
from keys import certificates, files
from keys.authority import KEY_FILE as AUTHORITY_KEY_FILE
from keys.authority import Authority
from keys.enrolment import EnrolmentRequest, make_request, read_request
from keys.errors import ConfigError, KeyFileError, VerificationFailed
from keys.identity import KEY_FILE, Identity, binding_bytes
from keys.labels import Label
from keys.roster import load_root, make_roster, read_roster
from keys.signed import sign_document, verify_document
from protocols.agreement import read_agreement, write_agreement
from protocols.chain import GENESIS, line_digest
from protocols.ledger import LedgerWriter, read_ledger, verify_ledger
from protocols.policy import LocalPolicy, check_policy
from protocols.transcript import TranscriptWriter, read_transcript, verify_transcript
from secgeo.records import LEDGERS, MANIFEST, RECEIPTS, SUMS, TRANSCRIPT, write_manifest
from tests.fuzz import mutate
from tests.fuzz.property import Target, require
from tests.fuzz.world import NODE, fixed_coins, recordings, study
from tests.keys.factory import AGGREGATOR, NOW

DEEP = b"[" * 4000
PASSPHRASE = b"correct horse"


@cache
def scratch() -> Path:
    """A folder in memory if there is one, removed when the process ends."""
    shared = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it
    folder = tempfile.TemporaryDirectory(prefix="secgeo-fuzz-", dir=shared if os.access(shared, os.W_OK) else None)
    _folders.append(folder)
    return Path(folder.name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


# --- agreement


def _agreement(data: bytes) -> None:
    try:
        agreement = read_agreement(data)
    except ConfigError:
        return
    require(read_agreement(write_agreement(agreement)) == agreement, "an agreement that is written is read back")
    with suppress(ConfigError):
        check_policy(agreement, LocalPolicy(), epsilon=5.0)


def _agreement_seeds() -> list[bytes]:
    return [study().document, *(write_agreement(run.network.agreement) for run in recordings()), b"a = " + DEEP]


# --- signed documents, rosters, certificates, requests


def _signature(data: bytes) -> None:
    key, document = study().consortium.authority.public_key, b"document"
    try:
        verify_document(key, Label.AGREEMENT, document, data)
    except VerificationFailed:
        return
    require(data == _signature_seeds()[0], "one signature, one spelling")


@cache
def _signature_seeds() -> list[bytes]:
    sign = study().consortium.authority.sign
    return [sign_document(sign, Label.AGREEMENT, b"document"), sign_document(sign, Label.ROSTER, b"document")]


def _roster(data: bytes) -> None:
    """The authority signs any bytes."""
    consortium = study().consortium
    signature = consortium.authority.sign_roster(data)
    try:
        roster = read_roster(data, signature, consortium.root, now=NOW)
    except KeyFileError:
        return
    encoded = make_roster(
        consortium.authority, roster.consortium, roster.epoch, roster.version, roster.listed, roster.revoked
    )
    require(encoded == (data, signature), "a roster has one spelling")
    for entry in roster.usable:
        require(roster.entry(entry.node_id) == entry, "a usable entry is found by its name")


def _roster_seeds() -> list[bytes]:
    consortium = study().consortium
    entries = consortium.roster.listed
    revoked = make_roster(consortium.authority, "Test consortium", 2, 3, entries, [entries[0].serial])[0]
    return [consortium.document, revoked, DEEP]


def _certificate(data: bytes) -> None:
    """As DER, as PEM, and as the signed part of a certificate that the authority signs."""
    authority, node_id = study().consortium.authority, study().names[0]
    tail = bytes.fromhex("300506032b6570034100")
    signed = data + tail + authority._signing_key.sign(data)
    enveloped = b"\x30\x82" + len(signed).to_bytes(2) + signed if 256 <= len(signed) < 1 << 16 else data
    for read, write, encoded in (
        (certificates.from_der, certificates.to_der, data),
        (certificates.from_der, certificates.to_der, enveloped),
        (certificates.from_pem, certificates.to_pem, data),
    ):
        with suppress(KeyFileError):
            certificate = read(encoded)
            require(write(certificate) == encoded, "a certificate has one spelling")
            certificates.fingerprint(certificate)
            certificates.validity_problem(certificate, NOW)
            with suppress(KeyFileError):
                certificates.check_root(certificate)
            certificates.check_leaf(certificate, authority.root, node_id, "hospital")
    with suppress(KeyFileError):
        load_root(data, authority.fingerprint)


def _certificate_seeds() -> list[bytes]:
    consortium = study().consortium
    leaf = consortium.roster.entry(study().names[0]).certificate
    ders = [certificates.to_der(leaf), certificates.to_der(consortium.root)]
    return [*ders, leaf.tbs_certificate_bytes, certificates.to_pem(leaf), consortium.authority.root_pem]


def _request(data: bytes) -> None:
    """As it is, and signed by an identity that claims what the input says."""
    for document in (data, _sign_request(data)):
        with suppress(KeyFileError):
            request = read_request(document)
            require(
                json.dumps(json.loads(document), indent=2).encode() + b"\n" == document, "a request has one spelling"
            )
            require(len(request.fingerprint) == 79, "a fingerprint is shown in 16 groups of 4")


def _sign_request(data: bytes) -> bytes:
    identity = study().consortium.identities[study().names[0]]
    try:
        fields = msgspec.json.decode(data, type=EnrolmentRequest)
    except Exception:  # not a request
        return data
    binding = identity.sign(Label.CURVE_BINDING, binding_bytes(fields.node_id, fields.role, fields.curve_public))
    facts = msgspec.msgpack.encode((fields.node_id, fields.role, fields.public_key, fields.curve_public))
    proof = identity.sign(Label.ENROLMENT_REQUEST, facts + binding)
    changed = {"format": fields.format, **msgspec.to_builtins(fields), "curve_binding": binding, "proof": proof}
    return msgspec.json.format(msgspec.json.encode(changed), indent=2) + b"\n"


def _request_seeds() -> list[bytes]:
    return [*(make_request(identity) for identity in study().consortium.identities.values()), DEEP]


# --- key files


def _key_file(data: bytes) -> None:
    path = scratch() / "secret.key"
    _put(path, data)
    with suppress(KeyFileError):
        secret = files.read_secret(path, None)
        plain = Label.KEY_FILE + b"\0" + secret
        require(data == plain + hashlib.sha256(plain).digest(), "a key file in clear has one spelling")
    with suppress(KeyFileError):
        files.read_secret(path, PASSPHRASE)


def _key_file_seeds() -> list[bytes]:
    path = scratch() / "seed.key"
    seeds = []
    for passphrase in (None, PASSPHRASE):
        path.unlink(missing_ok=True)
        files.write_secret(path, b"secret", passphrase)
        seeds.append(_cheap(path.read_bytes()))
    return seeds


def _cheap(content: bytes) -> bytes:
    """The least scrypt that a key file may ask for: it does not open, but takes 16 MiB instead of 128."""
    place = len(Label.KEY_FILE) + 1
    return content if content[place - 1] == 0 else content[:place] + b"\x0e" + content[place + 1 :]


def _cheaper(data: bytes, rng: random.Random) -> bytes:
    changed = mutate.flip(data, rng)
    encrypted = changed.startswith(Label.KEY_FILE + b"\1") and len(changed) > len(Label.KEY_FILE) + 1
    return _cheap(changed) if encrypted and rng.randrange(8) else changed


def _key_content(data: bytes) -> None:
    """What a key file holds, behind its checksum: the keys of an identity, of an authority."""
    folder = scratch() / "keys"
    folder.mkdir(mode=0o700, exist_ok=True)
    plain = Label.KEY_FILE + b"\0" + data
    for name, load in ((KEY_FILE, Identity.load), (AUTHORITY_KEY_FILE, Authority.load)):
        _put(folder / name, plain + hashlib.sha256(plain).digest())
        with suppress(KeyFileError):
            load(folder, None)


def _key_content_seeds() -> list[bytes]:
    with fixed_coins():
        identity = Identity.generate("hospital-00", "hospital")
        authority = Authority.create("Test authority", NOW)
    seeds = []
    for party, name in ((identity, KEY_FILE), (authority, AUTHORITY_KEY_FILE)):
        folder = Path(tempfile.mkdtemp(dir=scratch()))
        party.save(folder, None)
        seeds.append(files.read_secret(folder / name, None))
    return seeds


def _put(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


# --- chains


def _transcript(data: bytes) -> None:
    """As it is, and as bodies that the aggregator signs and chains."""
    parties, key = study(), study().aggregator_key
    writer = study().consortium.identities[AGGREGATOR]
    for lines in (data, _chain(data, lambda unsigned: writer.sign(Label.TRANSCRIPT, unsigned))):
        with suppress(VerificationFailed):
            entries = read_transcript(lines, key)
            again = TranscriptWriter(writer)
            require(b"".join(again.append(body) for body, _ in entries) == lines, "a chain has one spelling")
            verify_transcript(entries, parties.agreement, parties.digest, parties.public_keys)


def _ledger(data: bytes) -> None:
    """As it is, and as bodies that the node signs and chains."""
    parties, owner = study(), study().consortium.identities[NODE]
    key: Ed25519PublicKey = owner.public_key
    for lines in (data, _chain(data, lambda unsigned: owner.sign(Label.LEDGER, unsigned))):
        with suppress(VerificationFailed):
            bodies = read_ledger(lines, key)
            again = LedgerWriter(owner)
            require(b"".join(again.append(body) for body in bodies) == lines, "a chain has one spelling")
            verify_ledger(bodies, NODE, parties.agreement, parties.digest)


def _chain(bodies: bytes, sign: Callable[[bytes], bytes]) -> bytes:
    """A chain whose bodies are the lines of the input, whatever they are."""
    lines, prev = [], GENESIS
    for seq, body in enumerate(bodies.splitlines()):
        unsigned = b'{"seq":%d,"prev":"%s","body":%s}' % (seq, prev.encode(), body)
        lines.append(unsigned[:-1] + b',"signature":"' + sign(unsigned).hex().encode() + b'"}\n')
        prev = line_digest(lines[-1]).hex()
    return b"".join(lines)


def _bodies(lines: bytes) -> bytes:
    raw = [msgspec.json.decode(line, type=dict[str, msgspec.Raw])["body"] for line in lines.splitlines()]
    return b"".join(bytes(body) + b"\n" for body in raw)


def _transcript_seeds() -> list[bytes]:
    lines = study().transcript()
    real = b"".join(recordings()[2].network.lines)
    return [lines, _bodies(lines), _bodies(real), DEEP + b"\n"]


def _ledger_seeds() -> list[bytes]:
    lines = study().ledger(NODE, study().transcript())
    return [lines, _bodies(lines), DEEP + b"\n"]


# --- a folder of records: [the file's number][how it is signed] content

_RAW, _SEALED, _CHAINED = range(3)
_UNTYPED = re.compile(r"[A-Z]\w*[a-z]\w*: ")
"""How a failed check begins whose exception is none of ours: with the name of its class."""


def _records(data: bytes) -> None:
    """One file of an honest folder is another one: a check fails, and by an error that somebody thought of."""
    if len(data) < 2:
        return
    template, (names, originals) = _folder(), _originals()
    name, mode, content = names[data[0] % len(names)], data[1] % 3, data[2:]
    path, signature = template / name, template / f"{name}.sig"
    authority = study().consortium.authority
    if mode == _CHAINED and name.endswith(".jsonl"):
        owner = NODE if name.startswith(LEDGERS) else AGGREGATOR
        label = Label.LEDGER if name.startswith(LEDGERS) else Label.TRANSCRIPT
        content = _chain(content, lambda unsigned: study().consortium.identities[owner].sign(label, unsigned))
    path.write_bytes(content)
    if mode == _SEALED and name in _LABELS:
        signature.write_bytes(sign_document(authority.sign, _LABELS[name], content))
    if mode != _RAW and name not in (MANIFEST, f"{MANIFEST}.sig"):
        write_manifest(template, authority.sign)
    try:
        with (
            mock.patch("audit.records.epsilon_pld", _epsilon_pld),
            mock.patch("audit.records.epsilon_rdp", _epsilon_rdp),
        ):
            report = verify_folder(template, authority_fingerprint=authority.fingerprint, now=NOW)
        require(mode != _RAW or not report.ok or content == originals[name], "no byte changes unseen")
        for check in report.checks:
            require(
                check.ok or not _UNTYPED.match(check.detail), f"{check.name} fails by an error of ours: {check.detail}"
            )
    finally:
        for changed in {name, f"{name}.sig", MANIFEST, f"{MANIFEST}.sig"} & originals.keys():
            (template / changed).write_bytes(originals[changed])


def _remembered(accountant: Callable[..., float]) -> Callable[..., float]:
    """An accountant takes most of the time, and is asked the same again and again."""
    known: dict[str, float] = {}

    def remember(*arguments: Any) -> float:
        key = repr(arguments)
        if key not in known:
            known[key] = accountant(*arguments)
        return known[key]

    return remember


_epsilon_pld, _epsilon_rdp = _remembered(epsilon_pld), _remembered(epsilon_rdp)
_LABELS = {"agreement.toml": Label.AGREEMENT, "roster.json": Label.ROSTER, MANIFEST: Label.MANIFEST}


@cache
def _folder() -> Path:
    folder = scratch() / "records"
    shutil.rmtree(folder, ignore_errors=True)
    return study().write(folder)


@cache
def _originals() -> tuple[list[str], dict[str, bytes]]:
    folder = _folder()
    content = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    attacked = ("agreement.toml", "agreement.toml.sig", "authority.pem", MANIFEST, f"{MANIFEST}.sig", "roster.json")
    places = (f"{LEDGERS}/{NODE}.jsonl", f"{RECEIPTS}/{NODE}.jsonl", TRANSCRIPT, f"{SUMS}/round-0001.u32")
    return [*attacked, "roster.json.sig", *places], content


def _records_seeds() -> list[bytes]:
    names, originals = _originals()
    seeds = []
    for index, name in enumerate(names):
        for mode in (_RAW, _SEALED):
            seeds.append(bytes([index, mode]) + originals[name])
        if name.endswith(".jsonl"):
            seeds.append(bytes([index, _CHAINED]) + _bodies(originals[name]))
    return seeds


def _mutate_record(data: bytes, rng: random.Random) -> bytes:
    names, _ = _originals()
    change: dict[str, Any] = {".jsonl": mutate.json_lines, ".json": mutate.json, ".toml": mutate.toml}
    name = names[data[0] % len(names)] if data else ""
    return data[:2] + change.get(Path(name).suffix, mutate.flip)(data[2:], rng)


TARGETS = {
    "agreement": Target(_agreement, _agreement_seeds, mutate.toml),
    "signature": Target(_signature, _signature_seeds),
    "roster": Target(_roster, _roster_seeds, mutate.json),
    "certificate": Target(_certificate, _certificate_seeds),
    "request": Target(_request, _request_seeds, mutate.json),
    "key-file": Target(_key_file, _key_file_seeds, _cheaper),
    "key-content": Target(_key_content, _key_content_seeds, mutate.msgpack),
    "transcript": Target(_transcript, _transcript_seeds, mutate.json_lines),
    "ledger": Target(_ledger, _ledger_seeds, mutate.json_lines),
    "records": Target(_records, _records_seeds, _mutate_record),
}
