"""What attacks are made on: records and candidates, other hospitals, and the model after a first round."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from audit.leakage.evidence import (
    CAREFUL,
    CROWD,
    LEAST_RECORDS,
    UNCLIPPED,
    Candidates,
    Profile,
    Protection,
    Settings,
    Values,
)
from audit.target import Target
from keys.errors import ConfigError
from protocols.agreement import Agreement
from secgeo.datasets import LabelledRecords
from secgeo.hospital_noise import add_noise_share
from secgeo.model import build_model
from secgeo.training import RoundUpdate
from secgeo.update import Layout, SharedState, apply_sum

STEP_OVERHEAD = 50_000
"""A step takes about as long as if its model had so many parameters more."""

LEAST_TRAININGS: dict[Protection, int] = {"unprotected": 24, "ours": 24}
"""Of ours, in `fast`, about 96 scores of records that are in and 192 of canaries, and as many of those that are not."""


@dataclass(frozen=True, slots=True)
class _Size:
    """How much of everything.

    `work` is what trainings of ours may cost, in steps times parameters: with a large model there are fewer. `warmup` cuts the steps on
    public data short, which cost time and no privacy; `columns` of all Jacobians may mean fewer `starts`.
    """

    trainings: dict[Protection, int]
    records: int
    canaries: int
    pool: int
    rounds: int
    warmup: int
    inverted: int
    starts: int
    columns: int
    noise_samples: int
    work: float = math.inf

    def affordable(self, agreement: Agreement, parameters: int) -> dict[Protection, int]:
        """How many trainings: all, or as many as `work` allows, with a model of so many private parameters."""
        steps = min(self.rounds, max(1, agreement.study.rounds - 1)) * agreement.training.steps_per_round
        all_of_them = self.trainings["ours"] * steps * (parameters + STEP_OVERHEAD)
        share = min(1.0, self.work / all_of_them)
        return {
            kind: max(math.floor(share * count), min(count, LEAST_TRAININGS[kind]))
            for kind, count in self.trainings.items()
        }


SIZES: dict[Profile, _Size] = {
    "fast": _Size(
        trainings={"unprotected": 40, "ours": 40},
        records=8,
        canaries=16,
        pool=5,
        rounds=2,
        warmup=3,
        inverted=12,
        starts=5,
        columns=3000,
        noise_samples=150,
        work=6e7,
    ),
    "full": _Size(
        trainings={"unprotected": 60, "ours": 200},
        records=16,
        canaries=24,
        pool=16,
        rounds=3,
        warmup=10,
        inverted=24,
        starts=12,
        columns=8000,
        noise_samples=800,
    ),
}


def single_records(target: Target) -> Target:
    """A target whose privacy unit is a record: of every patient the first, if patients are protected."""
    if target.agreement.privacy.unit == "record":
        return target
    first = np.array([own[0] for own in target.records.by_patient(1)])
    privacy = msgspec.structs.replace(target.agreement.privacy, unit="record", records_per_patient=0)
    agreement = msgspec.structs.replace(target.agreement, privacy=privacy)
    return replace(target, agreement=agreement, records=take_records(target.records, first))


def take_records(records: LabelledRecords, index: NDArray[Any]) -> LabelledRecords:
    """Some of the records, as their own."""
    return LabelledRecords(records.features[index], records.labels[index])


def join_records(*parts: LabelledRecords) -> LabelledRecords:
    """All of the records, in this order."""
    return LabelledRecords(np.concatenate([p.features for p in parts]), np.concatenate([p.labels for p in parts]))


def vary(
    target: Target,
    *,
    training: dict[str, Any] | None = None,
    privacy: dict[str, Any] | None = None,
    batch: float | None = None,
    **fields: Any,
) -> Target:
    """The target with other settings; its member has the expected batch size `batch` in the agreement too."""
    agreement, member = target.agreement, target.member
    if batch is not None:
        member = msgspec.structs.replace(member, expected_batch_size=batch)
    agreement = msgspec.structs.replace(
        agreement,
        training=msgspec.structs.replace(agreement.training, **(training or {})),
        privacy=msgspec.structs.replace(agreement.privacy, **(privacy or {})),
        members=tuple(member if other.node_id == member.node_id else other for other in agreement.members),
        **fields,
    )
    return replace(target, agreement=agreement, member=member)


def protected_as(target: Target, protection: Protection) -> Target:
    """The target as it is, or with nothing that protects its records."""
    if protection == "ours":
        return target
    training, privacy = target.agreement.training, target.agreement.privacy
    return vary(
        target,
        training={
            "learning_rate": training.learning_rate * CAREFUL,
            "local_learning_rate": training.local_learning_rate * CAREFUL,
        },
        privacy={"noise_multiplier": 0.0, "max_grad_norm": UNCLIPPED, "sample_rate": 1.0},
        batch=target.member.expected_batch_size / privacy.sample_rate,
        hospital_privacy=None,
    )


@dataclass(frozen=True, slots=True)
class _Start:
    """Where every attacked round begins, known to the attacker."""

    state: SharedState
    local: dict[str, NDArray[np.float32]]


class Scene:
    """Who has which records, and where the attacked round begins."""

    def __init__(self, target: Target, size: _Size, chance: np.random.Generator) -> None:
        own, width = target.records, int(np.prod(target.records.features.shape[1:]))
        if len(own) < LEAST_RECORDS or width < 3:
            raise ConfigError(f"leakage is measured on {LEAST_RECORDS} or more records of three or more features")
        self.target = vary(target, training={"warmup_steps": min(target.agreement.training.warmup_steps, size.warmup)})
        model = build_model(target.agreement, target.member.modality, target.anchors)
        trainings = size.affordable(target.agreement, sum(p.numel() for p in model.private_parameters()))
        self.size, self.chance = replace(size, trainings=trainings), chance
        self.rounds = min(size.rounds, max(1, target.agreement.study.rounds - 1))
        self.layout = Layout.from_agreement(target.agreement)
        self.members = len(target.agreement.members)
        own = take_records(own, chance.permutation(len(own))[:CROWD])
        strangers = target.others or _strangers(target, chance)
        if len(strangers) < LEAST_RECORDS:
            raise ConfigError(f"leakage is measured with {LEAST_RECORDS} or more records of others")
        strangers = take_records(strangers, chance.permutation(len(strangers)))
        records, canaries = min(size.records, len(own) // 2), min(size.canaries, len(strangers) // 2)
        self.parts: dict[Candidates, slice] = {
            "records": slice(0, records),
            "canaries": slice(records, records + canaries),
        }
        self.base = take_records(own, np.arange(records, len(own)))
        self.strangers = take_records(strangers, np.arange(canaries, len(strangers))[: 2 * CROWD])
        self.start, wrong = self._begin(strangers.features[:canaries])
        self.candidates = join_records(
            take_records(own, np.arange(records)), LabelledRecords(strangers.features[:canaries], wrong)
        )

    def settings(self) -> Settings:
        """Sizes, for the report."""
        size, agreement = self.size, self.target.agreement
        return Settings(
            trainings=size.trainings["ours"],
            trainings_unprotected=size.trainings["unprotected"],
            candidate_records=len(self.candidates) - _length(self.parts["canaries"]),
            canaries=_length(self.parts["canaries"]),
            base_records=len(self.base),
            records_of_others=len(self.strangers),
            simulated_hospitals=size.pool,
            rounds_of_adapter=self.rounds,
            steps_per_round=agreement.training.steps_per_round,
            warmup_steps=agreement.training.warmup_steps,
            sample_rate=agreement.privacy.sample_rate,
            expected_batch_size=self.target.member.expected_batch_size,
            inverted_records=min(size.inverted, len(self.base)),
        )

    def _begin(self, features: NDArray[np.float32]) -> tuple[_Start, NDArray[np.int64]]:
        """After the first round, and one without noise on the others' records; and what `features` are least likely to be then."""
        target = vary(self.target, privacy={"noise_multiplier": 0.0}, hospital_privacy=None)
        trainer = target.trainer(records=self.strangers)
        state = SharedState.initial(target.agreement)
        for _ in range(2):
            vector = trainer.train_round(state).vector(self.layout)
            state = apply_sum(state, self.layout, vector * self.members, target.agreement)
        with torch.no_grad():
            unlikely = trainer.model(torch.from_numpy(features)).argmin(dim=1).numpy()
        return _Start(state, trainer.local_state()), unlikely

    def trainer(self, target: Target, records: LabelledRecords) -> Any:
        """A real trainer at the start."""
        trainer = target.trainer(records=records)
        trainer.load_local_state(self.start.local)
        return trainer


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _strangers(target: Target, chance: np.random.Generator) -> LabelledRecords:
    return LabelledRecords(target.anchors, chance.choice(target.records.labels, len(target.anchors)))


def update_vector(target: Target, layout: Layout, update: RoundUpdate) -> Values:
    """What a node hands to the secure sum (`secgeo.node`)."""
    vector, share = update.vector(layout), target.agreement.noise_share
    return add_noise_share(vector, layout, share) if share else vector
