"""What is audited: one hospital's training under one agreement, with data to train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from protocols.agreement import Agreement, Member
from secgeo.datasets import LabelledRecords
from secgeo.noise import NoiseSource

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
