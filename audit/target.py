"""What is audited: one hospital's training under one agreement, with data to train on.

A folder of records has an agreement but no private data; the demonstration's says in `split.json` which public data each hospital had, so
that they can be cut again. A node's configuration has all there is. Neither needs a secret key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from keys.certificates import fingerprint, from_pem
from keys.errors import ConfigError
from keys.files import read_public
from keys.identity import CERTIFICATE_FILE
from keys.roster import load_root
from protocols.agreement import Agreement, Member
from secgeo import datasets
from secgeo.config import NodeConfig, read_config
from secgeo.datasets import LabelledRecords
from secgeo.noise import NoiseSource
from secgeo.study import ANCHORS, DOCUMENTS, ROOT, OpenStudy, check_documents, open_study

if TYPE_CHECKING:
    from secgeo.training import LocalTrainer


@dataclass(frozen=True, slots=True)
class Target:
    """One hospital's training.

    Attributes:
        agreement: the study's agreement; every parameter comes from it.
        member: the hospital.
        records: its records.
        others: records of the same modality that it does not train on; None if there are none.
        anchors: the public anchors' view of its modality, [a, *shape].
        source: where the data are from, for the report.
        autocast: as in the node's configuration.
        plant: a bug of `audit.plants` that every trainer gets, to see whether the audit finds it.
    """

    agreement: Agreement
    member: Member
    records: LabelledRecords
    others: LabelledRecords | None
    anchors: NDArray[np.float32]
    source: str
    autocast: bool = False
    plant: str | None = None

    def trainer(self, *, noise: NoiseSource | None = None, **changed: Any) -> LocalTrainer:
        """A fresh trainer: the one that nodes run. `changed` are other fields of the target, as in `records=...`."""
        from audit.plants import PLANTS
        from secgeo.training import LocalTrainer

        target = replace(self, **changed)
        trainer = LocalTrainer(
            target.agreement,
            target.member,
            target.records,
            target.anchors,
            noise=noise or NoiseSource(),
            device="cpu",
            autocast=target.autocast,
        )
        if target.plant is not None:
            PLANTS[target.plant].into(trainer)
        return trainer


SPLIT = "split.json"
SPLIT_LIMIT_BYTES = 1 << 24


def study_of_folder(folder: Path, authority_fingerprint: str | None, now: datetime) -> OpenStudy:
    """The signed documents in a folder of records. Without a pin its own root is taken: then it only agrees with itself.

    Raises:
        ConfigError, KeyFileError, VerificationFailed: the first check that fails.
    """
    documents = {name: read_public(folder / name) for name in DOCUMENTS}
    root = load_root(documents[ROOT], authority_fingerprint or fingerprint(from_pem(documents[ROOT])))
    return check_documents(documents, root, now=now)


def study_of_config(config: Path, now: datetime) -> OpenStudy:
    """The signed documents that a node's configuration pins.

    Raises:
        ConfigError, KeyFileError, VerificationFailed: the first check that fails.
    """
    return open_study(read_config(config, NodeConfig).study, config.parent, now=now)


def split_of_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """What a demonstration says of its data: which they are, in words, and the whole of it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        split = msgspec.json.decode(read_public(folder / SPLIT, SPLIT_LIMIT_BYTES), type=dict[str, Any])
        return f"{split['data']}, seed {split['seed']:d}", split
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{SPLIT} cannot be read: {error}") from None


def whose(data: str, node: str) -> str:
    """Whose records, in words; `data` are those of a demonstration, or nothing is known of them."""
    return f"{data}: the records of {node}" if data else f"the records of {node}"


def target_of_folder(folder: Path, study: OpenStudy, node: str | None) -> Target:
    """A hospital of the demonstration that left this folder; the first member if none is named.

    Raises:
        ConfigError: the folder is not from the demonstration, or the data are other ones.
    """
    if not (folder / SPLIT).exists():
        raise ConfigError(
            f"{folder} has no {SPLIT}: only the demonstration's data are public. Audit the training with a node's configuration"
        )
    told, split = split_of_folder(folder)
    try:
        data = datasets.demo_split(split["data"], len(split["nodes"]), split["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{SPLIT} cannot be read: {error}") from None
    if msgspec.to_builtins(data.split_record()) != split:
        raise ConfigError(f"{SPLIT} names other rows than the demonstration's data would give")
    members = study.agreement.members
    names = [member.node_id for member in members]
    index = names.index(node) if node in names else 0
    if len(data.nodes) != len(members) or data.nodes[index].modality != members[index].modality:
        raise ConfigError(f"{SPLIT} does not fit the agreement's members")
    modality = members[index].modality
    return Target(
        study.agreement,
        members[index],
        data.nodes[index].records,
        LabelledRecords(data.test_views[modality], data.test_labels),
        data.anchors[modality],
        whose(told, names[index]),
    )


def target_of_config(config: Path, study: OpenStudy) -> Target:
    """The hospital of a node's configuration, with its own records.

    Raises:
        ConfigError, KeyFileError: the configuration, the data or the key folder's certificate do not fit the study.
    """
    from secgeo.node import load_records

    settings, base, agreement = read_config(config, NodeConfig), config.parent, study.agreement
    own = fingerprint(from_pem(read_public(base / settings.keys / CERTIFICATE_FILE)))
    members = [member for member in agreement.members if member.certificate_fingerprint == own]
    if not members:
        raise ConfigError(f"the certificate in {settings.keys} is not that of a member of the study")
    member, modality = members[0], agreement.modality(members[0].modality)
    others = None
    if settings.evaluation is not None:
        others = load_records(settings.evaluation, base, modality, agreement.study.classes)
    return Target(
        agreement,
        member,
        load_records(settings.data, base, modality, agreement.study.classes),
        others,
        datasets.load_anchors(
            base / settings.study.folder / ANCHORS / f"{modality.name}.npy", modality, agreement.anchors.count
        ),
        whose("", member.node_id),
        settings.autocast,
    )
