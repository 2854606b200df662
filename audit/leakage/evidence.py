"""What is measured, and what is kept of it: scores of members and others, and similarities of reconstructions."""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Observation = Literal["update", "upload", "aggregate", "adapter", "gram"]
Protection = Literal["ours", "unprotected"]
Candidates = Literal["records", "canaries"]
Profile = Literal["fast", "full"]
Values = NDArray[np.float64]
Flips = NDArray[np.bool_]

CANDIDATES: tuple[Candidates, ...] = ("canaries", "records")
OBSERVATIONS: tuple[Observation, ...] = ("update", "upload", "aggregate", "adapter", "gram")
RATES = (0.01, 0.001)
"""False positive rates that are reported; the smallest that the samples support stands for those below it."""

CHANCE = 1e-4
"""What counts as impossible by chance, in every verdict. Intervals that are reported are of 95 %."""

SUCCESS_RATE, SUCCESS_SIMILARITY = 0.3, 0.5
"""An attack works if it finds so many members at the first of `RATES`, or if its median reconstruction is so similar and chance hardly
ever makes them so. The same counts against ours. Not every record can be had exactly: of images the attack searches few components."""

PLAUSIBLE = 0.01
"""Reconstructions that chance makes so similar this often do not show that an attack works."""

UNCLIPPED = 1e6
MOMENTUM = 0.9
"""Of the local parameters, in `LocalTrainer`."""

CROWD = 80
LEAST_RECORDS = 8
SUBSPACE = 24
"""Inversion looks along so many principal components of the anchors."""

CAREFUL = 0.1
"""Unprotected training takes smaller steps: those that were tuned for clipped gradients are too long for others."""

FEATURE_LIMIT = 8.0
"""The tokeniser cuts features off at so many deviations."""


class Membership(Struct, frozen=True, forbid_unknown_fields=True):
    """Scores of one attack on one observation; larger means "was among the records".

    Attributes:
        steps: DP steps on the hospital's records that the observation shows.
        members: scores of candidates in trainings that they were part of.
        others: scores in trainings that they were not part of.
    """

    observation: Observation
    protection: Protection
    candidates: Candidates
    steps: int
    members: list[float]
    others: list[float]


class Inversion(Struct, frozen=True, forbid_unknown_fields=True):
    """Reconstructions from one step on one record each.

    Attributes:
        similarity: [n][n] correlation of reconstruction i with the true standardised features of record j; of two reconstructions that
            of the more similar one. Off the diagonal is what a guess would reach.
        labels_right: how many labels were found.
    """

    observation: Observation
    protection: Protection
    similarity: list[list[float]]
    labels_right: int


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the experiment."""

    trainings: int
    trainings_unprotected: int
    candidate_records: int
    canaries: int
    base_records: int
    records_of_others: int
    simulated_hospitals: int
    rounds_of_adapter: int
    steps_per_round: int
    warmup_steps: int
    sample_rate: float
    expected_batch_size: float
    inverted_records: int


class LeakageEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """What the attacks gave. `judge` needs nothing else but the agreement.

    Attributes:
        member: the hospital that was attacked.
        protocol: which secure sum made the uploads.
        seed: of coin flips and choices; the noise of training is from the operating system and cannot be repeated.
        settings: sizes of the experiment.
        seconds: wall clock.
    """

    member: str
    profile: Profile
    protocol: str
    seed: int
    settings: Settings
    seconds: float
    membership: list[Membership]
    inversion: list[Inversion]
