"""Targets of audit bundles: whoever made one may lie in every byte that it holds, and signs what it likes.

Evidence that can be decoded is judged, under the study that the fuzzers attack: a verdict comes of it, or a typed error.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from audit import bundle, protocol
from audit.bundle import PARTS, About, Auditor, Evidence, Verdict
from audit.findings import Finding
from audit.rounds import collect_records
from audit.target import SPLIT, study_of_folder, target_of_folder, whose
from audit.training import TrainingEvidence
from keys.errors import ConfigError, KeyFileError, SecGeoError, VerificationFailed
from keys.identity import sign_labelled
from keys.labels import Label
from keys.signed import sign_document
from secgeo.records import MANIFEST
from secgeo.study import OpenStudy
from tests.audit.evidence import leaked, played, watched
from tests.fuzz import mutate
from tests.fuzz.documents import DEEP, scratch
from tests.fuzz.property import Target, require
from tests.fuzz.world import NODE, fixed_coins, study
from tests.keys.factory import NOW

KINDS: dict[str, type[msgspec.Struct]] = {"about": About, "auditor": Auditor, "verdict": Verdict, **PARTS}


@cache
def _opened() -> OpenStudy:
    folder = scratch() / "audited"
    shutil.rmtree(folder, ignore_errors=True)
    return study_of_folder(study().write(folder), None, NOW)


@cache
def _about() -> About:
    opened = _opened()
    return About(
        format=bundle.FORMAT,
        study=opened.agreement.study.id,
        agreement_digest=opened.agreement_digest.hex(),
        kind="records",
        source="records",
        node=NODE,
        data=whose("", NODE),
        authority=None,
        started=NOW,
        profile="fast",
        plant=None,
        seconds={"protocol": 1.0},
        not_done={},
        left_out=(),
        python="3",
        versions={"numpy": "2"},
    )


# --- files of evidence


def _files(data: bytes) -> None:
    """Of whatever kind the bytes are: they are read, written and read again as the same, or refused."""
    folder = scratch() / "evidence"
    folder.mkdir(exist_ok=True)
    path = folder / "file.json"
    for kind in KINDS.values():
        path.write_bytes(data)
        with suppress(VerificationFailed):
            value = bundle._read(folder, path.name, kind)
            bundle.write_struct(path, value)
            require(_same(bundle._read(folder, path.name, kind), value), "what is written is read back")


def _same(left: Any, right: Any) -> bool:
    """In JSON what is not finite is null, which is refused: nothing that was read is lost."""
    return bool(left == right)


def _judged(data: bytes) -> None:
    """Evidence of one part alone, in a bundle that lacks all others."""
    for kind in PARTS.values():
        try:
            evidence = msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        with suppress(VerificationFailed):
            verdict = verdict_on(evidence)
            require(not verdict.ok, "a part alone is no audit")
            require(all(f.detail and f.name for f in verdict.findings), "every finding says what it is of")


def verdict_on(evidence: msgspec.Struct) -> Verdict:
    """What comes of evidence of one part; of training without its attacks, whose bounds take seconds each."""
    if isinstance(evidence, TrainingEvidence):
        evidence = msgspec.structs.replace(evidence, attacks=())
    return bundle.judge(alone(**{name: evidence for name, part in PARTS.items() if isinstance(evidence, part)}))


def alone(**parts: object) -> Evidence:
    """The evidence in a bundle that has nothing but these parts."""
    return Evidence(_about(), _opened(), "", **(dict.fromkeys((*PARTS, "records")) | parts))  # type: ignore[arg-type]


def _protocol(data: bytes) -> None:
    with suppress(ConfigError):
        evidence = protocol.from_json(data)
        require(protocol.from_json(protocol.to_json(evidence)) == evidence, "evidence that is written is read back")


@cache
def _parts() -> dict[str, bytes]:
    agreement = _opened().agreement
    values: dict[str, Any] = {
        "about": _about(),
        "auditor": Auditor("the auditor", "ab" * 32),
        "verdict": Verdict(False, ("leakage",), (Finding("protocol", "a", "b", "held", "c"),), _about()),
        "conformance": watched(agreement, NODE),
        "leakage": msgspec.structs.replace(leaked(agreement), member=NODE),
        "protocol": msgspec.structs.replace(played(agreement), records=collect_records(scratch() / "audited", NOW)),
    }
    return {name: msgspec.json.encode(value) for name, value in values.items()}


def _file_seeds() -> list[bytes]:
    return [*_parts().values(), DEEP, b'{"member":' + DEEP]


def _part_seeds() -> list[bytes]:
    return [_parts()[name] for name in PARTS if name in _parts()]


# --- the seal: [the file's number][whether it is signed anew] content


_SEALED = ("auditor.json", MANIFEST, f"{MANIFEST}.sig", "verdict.json", "evidence/about.json")


def _seal(data: bytes) -> None:
    """One file of a sealed bundle is another one: refused, unless the manifest is signed anew and lists just what is there."""
    if len(data) < 2:
        return
    folder, originals = _bundle()
    name, anew, content = _SEALED[data[0] % len(_SEALED)], data[1] % 2 == 1, data[2:]
    (folder / name).write_bytes(content)
    if anew and name == MANIFEST:
        (folder / f"{MANIFEST}.sig").write_bytes(sign_document(_sign, Label.AUDIT, content))
    try:
        with suppress(ConfigError, KeyFileError, VerificationFailed):
            bundle.check_seal(folder, None)
            same = content == originals[name]
            listed = name == MANIFEST and anew and msgspec.json.decode(content) == msgspec.json.decode(originals[name])
            require(same or listed, "no byte changes unseen")
    finally:
        for changed in _SEALED:
            (folder / changed).write_bytes(originals[changed])


def _sign(label: Label, data: bytes) -> bytes:
    return sign_labelled(_key(), label, data)


@cache
def _key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@cache
def _bundle() -> tuple[Path, dict[str, bytes]]:
    folder = scratch() / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    bundle.write_struct(folder / bundle.ABOUT, _about())
    bundle.write_struct(folder / bundle.VERDICT, Verdict(False, ("leakage",), (), _about()))
    with fixed_coins():
        bundle.seal(folder, Auditor("the auditor", _key().public_key().public_bytes_raw().hex()), _sign)
    return folder, {name: (folder / name).read_bytes() for name in _SEALED}


def _seal_seeds() -> list[bytes]:
    _, originals = _bundle()
    real = [bytes([index, anew]) + originals[name] for index, name in enumerate(_SEALED) for anew in (0, 1)]
    return [*real, b"\x01\x01" + DEEP, b"\x01\x01" + b'{"a":' + DEEP]


# --- which data a demonstration's hospitals had


def _split(data: bytes) -> None:
    """The data that it names are those of the demonstration, or it is refused."""
    folder = scratch() / "split"
    folder.mkdir(exist_ok=True)
    (folder / SPLIT).write_bytes(data)
    with suppress(SecGeoError):
        target = target_of_folder(folder, _opened(), None)
        require(len(target.records) > 0, "a hospital has records")


@cache
def _split_seeds() -> list[bytes]:
    from secgeo.datasets import demo_split

    real = [msgspec.json.encode(demo_split("breast-cancer", count, 0).split_record()) for count in (4, 5)]
    return [*real, b'{"data":"breast-cancer","nodes":[1,2,3],"seed":' + b"9" * 40 + b"}", b'{"data":' + DEEP]


def _after(count: int, change: mutate.Mutator) -> Callable[[bytes, random.Random], bytes]:
    return lambda data, rng: data[:count] + change(data[count:], rng)


TARGETS = {
    "audit-files": Target(_files, _file_seeds, mutate.json),
    "audit-evidence": Target(_judged, _part_seeds, mutate.json),
    "audit-protocol": Target(_protocol, lambda: [_parts()["protocol"], DEEP], mutate.json),
    "audit-seal": Target(_seal, _seal_seeds, _after(2, mutate.json)),
    "split": Target(_split, _split_seeds, mutate.json),
}
