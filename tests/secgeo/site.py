"""Real folders for a small study on disk: keys, study documents, data and configurations for an aggregator and four hospitals."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import tomli_w

from keys.certificates import to_pem
from keys.files import write_public
from keys.labels import Label
from keys.signed import sign_document
from protocols.agreement import Protocol, agreement_digest, write_agreement
from secgeo.admin import complete
from secgeo.presets import preset
from tests.keys.factory import AGGREGATOR, Consortium, make_consortium

HOSPITALS = tuple(f"hospital-{index}" for index in range(4))
MODALITIES = ("mean", "worst")


@dataclass(frozen=True)
class Site:
    """Everything on disk; `config(name)` is the path of a party's configuration."""

    base: Path
    consortium: Consortium
    digest: str

    def config(self, name: str) -> Path:
        return self.base / name / "config.toml"

    def write_config(self, name: str, **changes: Any) -> Path:
        study = {
            "folder": "../study",
            "agreement_digest": self.digest,
            "authority_fingerprint": self.consortium.authority.fingerprint,
        }
        settings: dict[str, Any] = {"keys": "keys", "unencrypted_keys": True, "study": study}
        if name == AGGREGATOR:
            settings |= {"listen_address": "tcp://127.0.0.1:*", "records": "records"}
        else:
            settings |= {
                "aggregator_address": "tcp://127.0.0.1:9",
                "state": "state",
                "data": {"kind": "arrays", "path": "records.npz"},
                "policy": {"max_epsilon": 10.0, "min_colluders_tolerated": 0, "protocols": list(get_args(Protocol))},
            }
        self.config(name).write_text(tomli_w.dumps(settings | changes))
        return self.config(name)

    def sign_agreement(self, document: bytes) -> None:
        """Replace the agreement by one that the authority really signs."""
        signature = sign_document(self.consortium.authority.sign, Label.AGREEMENT, document)
        write_public(self.base / "study" / "agreement.toml", document)
        write_public(self.base / "study" / "agreement.toml.sig", signature)


def make_spec(
    rounds: int = 2,
    protocol: str = "masked",
    hospital: dict[str, float] | None = None,
    *,
    patience: float = 1.0,
    needed: int = 3,
    **privacy: Any,
) -> dict[str, Any]:
    settings = preset("breast-cancer", 4, rounds)
    sections = {
        name: msgspec.to_builtins(getattr(settings, name)) for name in ("training", "privacy", "precision", "model")
    }
    del sections["model"]["trunk_digest"]
    sections["privacy"] |= privacy
    if hospital is not None:
        sections["hospital_privacy"] = hospital
    return sections | {
        "study": {"id": "test-study", "rounds": rounds, "classes": 2},
        "secure_sum": {
            "protocol": protocol,
            "minimum_cohort": needed,
            "threshold": needed,
            "max_attempts": 8,
            **({"chunk_values": 1024} if protocol == "masked" else {}),
        },
        "deadlines": {
            "join_seconds": 30.0 * patience,
            "train_seconds": 30.0 * patience,
            "phase_seconds": 5.0 * patience,
        },
        "modalities": [{"name": name, "tokeniser": "tabular", "shape": [10]} for name in MODALITIES],
        "members": [
            {"node_id": name, "modality": MODALITIES[index % 2], "expected_batch_size": 10.0}
            for index, name in enumerate(HOSPITALS)
        ],
    }


def make_site(
    base: Path, rounds: int = 2, protocol: str = "masked", hospital: dict[str, float] | None = None, **settings: Any
) -> Site:
    consortium = make_consortium(HOSPITALS, now=datetime.now(UTC))
    generator = np.random.default_rng(7)
    anchors = {name: generator.normal(size=(128, 10)).astype(np.float32) for name in MODALITIES}
    agreement = complete(
        make_spec(rounds, protocol, hospital, **settings), consortium.roster, consortium.authority.fingerprint, anchors
    )
    document = write_agreement(agreement)
    study = base / "study"
    (study / "anchors").mkdir(parents=True)
    for name, view in anchors.items():
        np.save(study / "anchors" / f"{name}.npy", view)
    write_public(study / "authority.pem", to_pem(consortium.root))
    write_public(study / "roster.json", consortium.document)
    write_public(study / "roster.json.sig", consortium.signature)
    site = Site(base, consortium, agreement_digest(document).hex())
    site.sign_agreement(document)
    for name, identity in consortium.identities.items():
        identity.save(base / name / "keys", None)
        identity.save_certificate(base / name / "keys")
        if name != AGGREGATOR:
            labels = np.arange(40) % 2
            features = generator.normal(size=(40, 10)) + labels[:, None]
            patients = np.arange(40) // 4
            np.savez(
                base / name / "records.npz", features=features.astype(np.float32), labels=labels, patients=patients
            )
        site.write_config(name)
    return site
