"""Leakage: membership inference and gradient inversion on everything of one hospital that others could see.

    update      its raw dB of one round, as an aggregator would see it without a secure sum
    upload      the same as it is uploaded: fixed point, masked or encrypted by the product's own code
    aggregate   the decoded sum with the other hospitals
    adapter     the change of the shared B over several rounds, as it is released
    gram        its Gram matrix of the anchors after one round

Each attack runs on "ours" and on "unprotected": no noise, no clipping, no masks, every record in every step, and steps a tenth as long,
since unclipped gradients are larger. Where an attack fails on the unprotected one, it is too weak to say anything about ours. An upload
of "ours" is of unprotected training, masked or encrypted, so that this alone has to hide it.

*Membership.* Trainings are repeated with real `LocalTrainer`s; whether a candidate is among the records is a coin flip each time. Some
candidates are ordinary records, some are canaries: strangers, with the label that the model finds least likely. The attacker knows the
model at the start of the round (local parameters too), every record, clipping, noise level and sampling rate, but not the flips, the
samples and the noise. To first order a candidate adds m to what is seen, its clipped gradients along a trajectory that the attacker
simulates; everything else is close to Gaussian, with a covariance S that follows from the same gradients and the noise. The score is the
log likelihood ratio m' S^-1 (seen - mean), as in LiRA (Carlini et al. 2022, arXiv 2112.03570), but with the whole vector in place of a
loss. The mean is taken over the other trainings, which are its shadow models. Several candidates per training are those of Steinke et
al. 2023 (arXiv 2305.08846).

*Inversion.* One step on one record. The attacker looks for features and label whose clipped gradient is the one seen (gradient matching:
Zhu et al. 2019, Geiping et al. 2020) by Levenberg-Marquardt, along the anchors' principal components and with their sizes as its prior,
and knows the model. The head starts at zero, where B has no gradient; so all attacks begin after a first round on other data.
In the aggregate each hospital took one step on a record of its own. The attacker colludes with all others but one, takes off what these
sent, and looks for the two records that are left, both at once. Who had which it cannot tell: the more similar one counts, for guesses
too. (With all others colluding the aggregate is the update.) What is released of B after that round is the aggregate over the sum of the
weights, which are public: the same attack, on the released B. Of the Gram matrix the attacker takes the change to first order in the
step, along the directions in which records that it draws move it, and whitens it by what noise that it draws does.

*Simplifications, all for the attacker.* Other hospitals hold the target's modality and train from its local parameters; their updates are
drawn from a pool made with records of `others` (without those: anchors with drawn labels), which the attacker knows. Consensus is from the
target's own Gram matrix. If patients are protected, each is one record. A hospital counts at most `CROWD` of its records.

*Libraries.* adversarial-robustness-toolbox 1.20 (2025, kept) attacks the outputs of classifiers: it sees no gradients, adapters or Gram
matrices, and has no LiRA. breaching 0.1.2 (2022) inverts gradients of images and text, needs hydra, torchvision and lpips, and is not
kept; privacy-meter on PyPI is of 2023, has its newer attacks in its repository only, and wants to train the models itself. Opacus has no
attacks. So the attacks are written here from their papers, on what is installed already: torch, scikit-learn and SciPy.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from scipy.stats import beta, mannwhitneyu
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from audit.findings import Finding, Status
from audit.target import Target
from audit.watch import projector_inputs
from keys.errors import ConfigError
from protocols import sealing
from protocols.agreement import Agreement
from protocols.ciphertexts import unpack_upload
from protocols.encoding import FixedPoint, unpack
from protocols.packing import choose
from protocols.prg import MaskSet
from protocols.rings import make_ring
from protocols.tags import Tagger
from protocols.upload import Upload
from secgeo.accountant import epsilon_after
from secgeo.datasets import LabelledRecords
from secgeo.geolora import directions
from secgeo.hospital_noise import add_noise_share, private_values
from secgeo.model import build_model
from secgeo.training import RoundUpdate
from secgeo.update import Layout, SharedState, apply_sum, gram_weight, noise_variance, precision_weight
from secgeo.update import unpack as unpack_vector

Observation = Literal["update", "upload", "aggregate", "adapter", "gram"]
Protection = Literal["ours", "unprotected"]
Candidates = Literal["records", "canaries"]
Profile = Literal["fast", "full"]
Values = NDArray[np.float64]
Flips = NDArray[np.bool_]

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


class LeakageEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """What the attacks gave. `judge` needs nothing else but the agreement.

    Attributes:
        member: the hospital that was attacked.
        source: where the data are from.
        protocol: which secure sum made the uploads.
        seed: of coin flips and choices; the noise of training is from the operating system and cannot be repeated.
        settings: sizes of the experiment.
        seconds: wall clock.
    """

    member: str
    profile: Profile
    source: str
    protocol: str
    seed: int
    settings: dict[str, float]
    seconds: float
    membership: list[Membership]
    inversion: list[Inversion]


# --- numbers from scores


class Rate(Struct, frozen=True):
    """Members found at a false positive rate, with the counts behind both rates."""

    found: int
    members: int
    wrong: int
    others: int

    @property
    def tpr(self) -> float:
        """True positive rate."""
        return self.found / self.members

    @property
    def fpr(self) -> float:
        """False positive rate."""
        return self.wrong / self.others

    def tpr_interval(self, error: float = 0.05) -> tuple[float, float]:
        """Clopper-Pearson interval of the true positive rate; `error` is split between both ends."""
        return clopper_pearson(self.found, self.members, error)

    def fpr_interval(self, error: float = 0.05) -> tuple[float, float]:
        """The same of the false positive rate."""
        return clopper_pearson(self.wrong, self.others, error)


def roc(members: Sequence[float], others: Sequence[float]) -> tuple[Values, Values]:
    """False and true positive rates ([k], ascending) over all thresholds, by scikit-learn.

    Raises:
        ConfigError: one of the two is empty, or a score is not finite.
    """
    scores, labels = _labelled(members, others)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return np.asarray(fpr, dtype=np.float64), np.asarray(tpr, dtype=np.float64)


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The area under `roc`: the probability that a member's score is above another's.

    Raises:
        ConfigError: see `roc`.
    """
    scores, labels = _labelled(members, others)
    return float(roc_auc_score(labels, scores))


def rate_at(members: Sequence[float], others: Sequence[float], fpr: float) -> Rate:
    """The best threshold with a false positive rate of at most `fpr`.

    Raises:
        ConfigError: see `roc`.
    """
    false, true = roc(members, others)
    best = int(np.flatnonzero(false <= fpr + 1e-12)[-1])
    return Rate(round(true[best] * len(members)), len(members), round(false[best] * len(others)), len(others))


def rates(members: Sequence[float], others: Sequence[float]) -> list[Rate]:
    """One `Rate` for each of `RATES`, as far as there are samples for it: below 1 / n it is the one without a false positive."""
    supported = [rate for rate in RATES if rate * len(others) >= 1.0]
    return [
        rate_at(members, others, rate) for rate in (supported if len(supported) == len(RATES) else [*supported, 0.0])
    ]


def clopper_pearson(hits: int, count: int, error: float) -> tuple[float, float]:
    """The exact interval of a binomial proportion that misses it with probability at most `error`."""
    low = 0.0 if hits == 0 else float(beta.ppf(error / 2, hits, count - hits + 1))
    high = 1.0 if hits == count else float(beta.ppf(1 - error / 2, hits + 1, count - hits))
    return low, high


def dp_line(epsilon: float, delta: float, fpr: float) -> float:
    """The largest true positive rate of any attack on an (epsilon, delta)-DP mechanism (Kairouz, Oh and Viswanath 2015)."""
    return min(1.0, math.exp(min(epsilon, 700.0)) * fpr + delta)


def _labelled(members: Sequence[float], others: Sequence[float]) -> tuple[Values, NDArray[np.int64]]:
    scores = np.array([*members, *others], dtype=np.float64)
    if not len(members) or not len(others) or not np.isfinite(scores).all():
        raise ConfigError("an ROC curve needs finite scores of at least one member and one other")
    return scores, np.repeat(np.array([1, 0]), [len(members), len(others)])


# --- verdicts


def judge(evidence: LeakageEvidence, agreement: Agreement) -> list[Finding]:
    """The verdict on each observation, from the evidence alone.

    Raises:
        ConfigError: evidence is missing, empty or not finite.
    """
    inversions = [_inverted(evidence, observation) for observation in OBSERVATIONS]
    findings = []
    for observation in OBSERVATIONS:
        found = [row for row in evidence.membership if row.observation == observation]
        ours = [row for row in found if row.protection == "ours"]
        reference = [row for row in found if row.protection == "unprotected"]
        if not ours or not reference:
            raise ConfigError(f"the evidence has no membership scores of the {observation}, ours and unprotected")
        findings.append(_judge_membership(ours, reference, agreement, _trainings(evidence)))
    return findings + [_judge_inversion(ours, reference) for ours, reference in inversions]


def _trainings(evidence: LeakageEvidence) -> str:
    """How many trainings there were, which depends on the profile and the size of the model."""
    ours, unprotected = (evidence.settings.get(name, 0.0) for name in ("trainings", "trainings_unprotected"))
    return f"{ours:.0f} trainings of ours, {unprotected:.0f} unprotected"


def _inverted(evidence: LeakageEvidence, observation: Observation) -> tuple[Inversion, Inversion]:
    rows = [row for row in evidence.inversion if row.observation == observation]
    ours = [row for row in rows if row.protection == "ours"]
    reference = [row for row in rows if row.protection == "unprotected"]
    if len(ours) != 1 or len(reference) != 1:
        raise ConfigError(f"the evidence has not one inversion each of the {observation}, ours and unprotected")
    for row in rows:
        _square(row)
    return ours[0], reference[0]


_SEEN = {
    "update": "a raw update",
    "upload": "a protected upload",
    "aggregate": "the aggregate",
    "adapter": "the released adapter",
    "gram": "the Gram matrix of the anchors",
}

_KNOWN: dict[Observation, str] = {
    "aggregate": "; the attacker knows what all other hospitals but one sent, and looks for the records of both that are left",
    "adapter": "; the attacker knows all of the aggregate, but what this hospital and one other sent, and looks for both records",
}
"""What the attacker knows in an inversion, beside the model."""


def _judge_membership(
    ours: list[Membership], reference: list[Membership], agreement: Agreement, trainings: str
) -> Finding:
    observation, steps, per_round = ours[0].observation, ours[0].steps, agreement.training.steps_per_round
    allowed = range(per_round, agreement.total_steps + 1, per_round) if observation == "adapter" else [per_round]
    if any(row.steps != steps for row in ours) or steps not in allowed:
        raise ConfigError(f"the evidence on the {observation} is not of whole rounds of this agreement")
    works = any(_works(row) for row in reference)
    seen = [f"{row.protection}, {row.candidates}: {_numbers(row)}" for row in [*ours, *reference]]
    detail = "; ".join([trainings, *seen])
    weak = [row.candidates for row in reference if not _works(row)]
    if works and weak:
        detail += (
            f"; on {' and '.join(weak)} the attack is too weak on unprotected training, so nothing is said of them"
        )
    name = f"membership inference on {_SEEN[observation]}"
    if observation == "upload":
        chance = min(min(1.0, len(ours) * _away_from_chance(row)) for row in ours)
        promise = "it tells nothing about any record, not even without the noise of training"
        detail = f"{detail}; by chance with probability {chance:.2g}"
        return Finding("leakage", name, promise, _status(works, chance < CHANCE), detail)
    privacy = agreement.privacy
    epsilon = epsilon_after(privacy, steps, privacy.delta)
    promise = f"TPR <= e^epsilon FPR + delta with epsilon {epsilon:.3g}, delta {privacy.delta:g} ({steps} steps)"
    if math.isinf(epsilon):
        return Finding("leakage", name, "none: the agreement has no noise", "not testable", detail)
    crossed = any(crosses(rate, epsilon, privacy.delta) for row in ours for rate in rates(row.members, row.others))
    bounds = ", ".join(f"TPR {dp_line(epsilon, privacy.delta, rate):.3g} at FPR {rate:g}" for rate in RATES)
    fails = all(_fails(row) for row in ours)
    promise = f"the attack fails, where it succeeds on unprotected training, and {promise}"
    detail = f"{detail}; allowed by DP: {bounds}"
    succeeds = any(_works(row) for row in ours)
    if succeeds and not crossed:
        detail = f"{detail}; the attack succeeds within what DP allows: epsilon is large"
    elif not fails:
        detail = f"{detail}; there are too few scores to tell"
    return Finding("leakage", name, promise, _status(works and fails, crossed or succeeds), detail)


def crosses(rate: Rate, epsilon: float, delta: float) -> bool:
    """Whether an attack was better than (epsilon, delta)-DP allows, beyond chance: both rates at the ends that favour DP."""
    return rate.tpr_interval(CHANCE)[0] > dp_line(epsilon, delta, rate.fpr_interval(CHANCE)[1])


def _status(works: bool, broken: bool) -> Status:
    if broken:
        return "broken"
    return "held" if works else "not testable"


def _works(row: Membership) -> bool:
    return rate_at(row.members, row.others, RATES[0]).tpr_interval()[0] >= SUCCESS_RATE


def _fails(row: Membership) -> bool:
    return rate_at(row.members, row.others, RATES[0]).tpr_interval()[1] < SUCCESS_RATE


def _away_from_chance(row: Membership) -> float:
    """The p-value of scores that tell nothing. Exact up to the normal approximation: then flips are independent of all scores."""
    _labelled(row.members, row.others)
    if len({*row.members, *row.others}) == 1:
        return 1.0
    return float(mannwhitneyu(row.members, row.others, alternative="two-sided", method="asymptotic").pvalue)


def _numbers(row: Membership) -> str:
    shown = ", ".join(
        f"TPR {rate.tpr:.3f} ({rate.tpr_interval()[0]:.3f} to {rate.tpr_interval()[1]:.3f}) at FPR {rate.fpr:.2g}"
        for rate in rates(row.members, row.others)
    )
    return f"AUC {auc(row.members, row.others):.3f}, {shown}, of {len(row.members)} and {len(row.others)} scores"


def _judge_inversion(ours: Inversion, reference: Inversion) -> Finding:
    observation = ours.observation
    (middle, chance), (middle_reference, chance_reference) = recovered(ours), recovered(reference)
    works = middle_reference >= SUCCESS_SIMILARITY and chance_reference < CHANCE
    if observation == "upload":
        promise, broken = "it tells nothing about any record, not even without the noise of training", chance < CHANCE
        fails = not broken
    else:
        promise = f"no step on a single record shows it: median correlation below {SUCCESS_SIMILARITY}"
        broken = middle >= SUCCESS_SIMILARITY and chance < CHANCE
        fails = middle < SUCCESS_SIMILARITY or chance >= PLAUSIBLE
    detail = "; ".join(
        f"{row.protection}: median correlation {value:.3f} (guesses: {_guess(row):.3f}), "
        f"by chance with probability {p:.2g}, {row.labels_right} of {len(row.similarity)} labels"
        for row, value, p in ((ours, middle, chance), (reference, middle_reference, chance_reference))
    )
    detail += _KNOWN.get(observation, "")
    if not works:
        detail += "; the attack fails on unprotected training, so that it shows nothing about ours"
    elif not fails and not broken:
        detail += "; the attack succeeds on ours, on too few records to tell it from chance"
    name = f"gradient inversion on {_SEEN[observation]}"
    return Finding("leakage", name, promise, _status(works and fails, broken), detail)


PERMUTATIONS = 30_000
CERTAIN = 1.0 - 1e-6


def recovered(row: Inversion) -> tuple[float, float]:
    """Median similarity to the true records, and the probability that reconstructions paired with records by lot are as similar.

    Similar on average of Fisher's z (artanh), so that exact reconstructions outweigh lucky guesses.

    Raises:
        ConfigError: the similarities are no square matrix of finite numbers.
    """
    matrix = _square(row)
    order = np.random.Generator(np.random.PCG64(0)).random((PERMUTATIONS, len(matrix))).argsort(axis=1)
    z = np.arctanh(np.clip(matrix, -CERTAIN, CERTAIN))
    as_good = int(np.count_nonzero(z[np.arange(len(z)), order].sum(axis=1) >= np.trace(z) - 1e-9))
    return float(np.median(np.diag(matrix))), (1 + as_good) / (1 + PERMUTATIONS)


def _guess(row: Inversion) -> float:
    matrix = _square(row)
    return float(np.median(matrix[~np.eye(len(matrix), dtype=bool)]))


def _square(row: Inversion) -> Values:
    count = len(row.similarity)
    if count < 2 or any(len(line) != count for line in row.similarity):
        raise ConfigError("similarities of reconstructions are a square matrix of two or more records")
    matrix = np.array(row.similarity, dtype=np.float64)
    if not np.isfinite(matrix).all() or np.abs(matrix).max() > 1.0 + 1e-9:
        raise ConfigError("a similarity of reconstructions is no correlation")
    if not 0 <= row.labels_right <= count:
        raise ConfigError("more labels of reconstructions are right than there are, or fewer than none")
    return matrix


# --- collecting


STEP_OVERHEAD = 50_000
"""A step takes about as long as if its model had so many parameters more."""

LEAST_TRAININGS: dict[Protection, int] = {"unprotected": 12, "ours": 24}
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


_SIZES: dict[Profile, _Size] = {
    "fast": _Size(
        trainings={"unprotected": 20, "ours": 40},
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

Progress = Callable[[str, float], None]


def collect(target: Target, *, profile: Profile, progress: Progress, seed: int | None = None) -> LeakageEvidence:
    """Run every attack: as `fast` some 15 seconds for the breast-cancer demonstration, four times as long for mfeat.

    Args:
        target: what is attacked. Its `others` give canaries and the other hospitals; without them anchors do, with drawn labels.
        progress: called with what is being done and the fraction that is done.
        seed: of coin flips and choices; drawn if not given, so that nothing can be tuned to it.

    Raises:
        ConfigError: too few records, or fewer than three features.
    """
    started = time.monotonic()
    chosen = secrets.randbits(32) if seed is None else seed
    size = _SIZES[profile]
    scene = _Scene(_single_records(target), size, np.random.Generator(np.random.PCG64(chosen)))
    membership: list[Membership] = []
    inversion: list[Inversion] = []
    with sdpa_kernel(SDPBackend.MATH):
        protections: tuple[Protection, ...] = ("unprotected", "ours")
        for index, protection in enumerate(protections):

            def report(done: float, at: float = 0.45 * index, what: str = protection) -> None:
                progress(f"membership inference, {what}", at + 0.45 * done)

            membership += _infer_membership(scene, protection, report)
        progress("gradient inversion", 0.9)
        inversion += _invert_all(scene)
    progress("done", 1.0)
    return LeakageEvidence(
        member=target.member.node_id,
        profile=profile,
        source=target.source,
        protocol=target.agreement.secure_sum.protocol,
        seed=chosen,
        settings=scene.settings(),
        seconds=round(time.monotonic() - started, 2),
        membership=membership,
        inversion=inversion,
    )


def _single_records(target: Target) -> Target:
    """A target whose privacy unit is a record: of every patient the first, if patients are protected."""
    if target.agreement.privacy.unit == "record":
        return target
    first = np.array([own[0] for own in target.records.by_patient(1)])
    privacy = msgspec.structs.replace(target.agreement.privacy, unit="record", records_per_patient=0)
    agreement = msgspec.structs.replace(target.agreement, privacy=privacy)
    return replace(target, agreement=agreement, records=_take(target.records, first))


def _take(records: LabelledRecords, index: NDArray[Any]) -> LabelledRecords:
    return LabelledRecords(records.features[index], records.labels[index])


def _join(*parts: LabelledRecords) -> LabelledRecords:
    return LabelledRecords(np.concatenate([p.features for p in parts]), np.concatenate([p.labels for p in parts]))


def _vary(
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


def _protected(target: Target, protection: Protection) -> Target:
    if protection == "ours":
        return target
    training, privacy = target.agreement.training, target.agreement.privacy
    return _vary(
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


class _Scene:
    """Who has which records, and where the attacked round begins."""

    def __init__(self, target: Target, size: _Size, chance: np.random.Generator) -> None:
        own, width = target.records, int(np.prod(target.records.features.shape[1:]))
        if len(own) < LEAST_RECORDS or width < 3:
            raise ConfigError(f"leakage is measured on {LEAST_RECORDS} or more records of three or more features")
        self.target = _vary(target, training={"warmup_steps": min(target.agreement.training.warmup_steps, size.warmup)})
        model = build_model(target.agreement, target.member.modality, target.anchors)
        trainings = size.affordable(target.agreement, sum(p.numel() for p in model.private_parameters()))
        self.size, self.chance = replace(size, trainings=trainings), chance
        self.rounds = min(size.rounds, max(1, target.agreement.study.rounds - 1))
        self.layout = Layout.from_agreement(target.agreement)
        self.members = len(target.agreement.members)
        own = _take(own, chance.permutation(len(own))[:CROWD])
        strangers = target.others or _strangers(target, chance)
        if len(strangers) < LEAST_RECORDS:
            raise ConfigError(f"leakage is measured with {LEAST_RECORDS} or more records of others")
        strangers = _take(strangers, chance.permutation(len(strangers)))
        records, canaries = min(size.records, len(own) // 2), min(size.canaries, len(strangers) // 2)
        self.parts: dict[Candidates, slice] = {
            "records": slice(0, records),
            "canaries": slice(records, records + canaries),
        }
        self.base = _take(own, np.arange(records, len(own)))
        self.strangers = _take(strangers, np.arange(canaries, len(strangers))[: 2 * CROWD])
        self.start, wrong = self._begin(strangers.features[:canaries])
        self.candidates = _join(_take(own, np.arange(records)), LabelledRecords(strangers.features[:canaries], wrong))

    def settings(self) -> dict[str, float]:
        """Sizes, for the report."""
        size, agreement = self.size, self.target.agreement
        return {
            "trainings": size.trainings["ours"],
            "trainings_unprotected": size.trainings["unprotected"],
            "candidate_records": len(self.candidates) - _length(self.parts["canaries"]),
            "canaries": _length(self.parts["canaries"]),
            "base_records": len(self.base),
            "records_of_others": len(self.strangers),
            "simulated_hospitals": size.pool,
            "rounds_of_adapter": self.rounds,
            "steps_per_round": agreement.training.steps_per_round,
            "warmup_steps": agreement.training.warmup_steps,
            "sample_rate": agreement.privacy.sample_rate,
            "expected_batch_size": self.target.member.expected_batch_size,
            "inverted_records": min(size.inverted, len(self.base)),
        }

    def _begin(self, features: NDArray[np.float32]) -> tuple[_Start, NDArray[np.int64]]:
        """After the first round, and one without noise on the others' records; and what `features` are least likely to be then."""
        target = _vary(self.target, privacy={"noise_multiplier": 0.0}, hospital_privacy=None)
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


def _vector(target: Target, layout: Layout, update: RoundUpdate) -> Values:
    """What a node hands to the secure sum (`secgeo.node`)."""
    vector, share = update.vector(layout), target.agreement.noise_share
    return add_noise_share(vector, layout, share) if share else vector


# --- what an upload looks like


class _Uploads:
    """Uploads by the product's code, with fresh keys each, and how an attacker reads them."""

    def __init__(self, agreement: Agreement, me: str) -> None:
        self._agreement, self._me = agreement, me
        self._ring_of = agreement.secure_sum
        self._packing = choose(self._ring_of.value_bits, len(agreement.members)) if self._ring_of.encrypted else None
        self._attempt = sealing.AttemptId(secrets.token_bytes(32), 1, 1)
        if self._packing is None:
            self._ring = make_ring(agreement)
        else:
            from protocols.bfv import InProcess  # TenSEAL is slow to load, and not needed for `masked`

            ciphers = InProcess()
            self._ring = make_ring(agreement, ciphers, ciphers.generate_key(self._packing.parameters))

    def masks(self) -> MaskSet:
        """Fresh masks: our own, and one with every other hospital."""
        if not self._ring_of.masked:
            return MaskSet((), ())
        added = [sealing.self_mask_key(secrets.token_bytes(32), self._attempt, self._me)]
        subtracted: list[bytes] = []
        for member in self._agreement.members:
            if member.node_id != self._me:
                low, high = sorted((self._me, member.node_id))
                shared = sealing.contribution(secrets.token_bytes(32), self._attempt, bytes(32), low, high)
                key = sealing.pair_mask_key(shared, self._attempt, bytes(32), low, high)
                (added if low == self._me else subtracted).append(key)
        return MaskSet(added, subtracted)

    def seen(self, vector: Values, *, protected: bool = True) -> Values:
        """An upload of `vector` ([d]) as [d] numbers; unprotected it is only encoded."""
        code = FixedPoint.from_agreement(self._agreement)
        if not protected:
            return code.decode(code.encode(vector), 1)
        tagger = Tagger(secrets.token_bytes(32), self._attempt)
        upload = Upload(self._ring, code, vector, tagger, self.masks(), self._ring_of.chunk_values)
        chunks = upload.make(upload.chunks, lambda _, __, data: bytes(data))
        sizes = [
            min(self._ring_of.chunk_values, vector.size - start)
            for start in range(0, vector.size, self._ring_of.chunk_values)
        ]
        return np.concatenate([self.read(chunk, count) for chunk, count in zip(chunks, sizes, strict=True)])

    def read(self, chunk: bytes, count: int) -> Values:
        """`count` numbers out of a chunk, as if nothing protected it: c0 of a ciphertext is then the plaintext times q / t."""
        if self._packing is None:
            values = unpack(chunk, count, self._ring_of.ring_bits)
        else:
            parameters = self._packing.parameters
            words, _ = unpack_upload(chunk, parameters)
            plain = np.rint(words[:, 0].astype(np.float64) * (2.0**parameters.plain_bits / parameters.prime))
            values = self._packing.unpack(plain.astype(np.uint64) % np.uint64(2**self._packing.used_bits), count)
        return (values.astype(np.float64) - 2.0 ** (self._ring_of.value_bits - 1)) / 2.0**self._ring_of.fraction_bits


# --- what a record does to a model, to first order


GRADIENTS = 512
"""Records per pass."""

PROJECTOR_WEIGHT, PROJECTOR_BIAS = "tokeniser.projector.weight", "tokeniser.projector.bias"


class _Whitebox:
    """The attacker's copy of the model, in float64. Parameters are flat: B in the order of the update, then the local ones."""

    def __init__(self, target: Target) -> None:
        self.model = build_model(target.agreement, target.member.modality, target.anchors).double()
        self.parameters = self.model.private_parameters()
        known = {id(p): name for name, p in self.model.named_parameters()}
        self._names = [known[id(p)] for p in self.parameters]
        self._sizes = [p.numel() for p in self.parameters]
        self._layers = len(self.model.shared_parameters())
        self.shared = sum(self._sizes[: self._layers])
        self._anchors = torch.from_numpy(target.anchors).double()
        self._limit = target.agreement.privacy.max_grad_norm

    def take(self, trainer: Any) -> Tensor:
        """Copy a trainer's model; gives its parameters [P]."""
        self.model.load_state_dict(trainer.model.state_dict())
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @torch.no_grad()
    def gram(self, flat: Tensor) -> Values:
        """The Gram matrix of the anchors with parameters `flat`, as its upper triangle."""
        kept = [p.clone() for p in self.parameters]
        for p, value in zip(self.parameters, torch.split(flat, self._sizes), strict=True):
            p.copy_(value.view_as(p))
        upper: Values = self._gram().numpy()
        for p, value in zip(self.parameters, kept, strict=True):
            p.copy_(value)
        return upper

    def gram_slopes(self, along: Values) -> Values:
        """How the Gram matrix along [k, K] changes with the parameters that were taken last: [k, P]."""
        upper = self._gram()
        slopes = []
        for one in torch.from_numpy(along):
            found = torch.autograd.grad(upper @ one, self.parameters[:-2], retain_graph=True)  # all but the head
            parts = [part.clone() for part in found]
            for index, layer in enumerate(self.model.adapted.values()):
                # The row norms are detached in training; but they do change with B.
                norms, scale = layer.row_norms(), layer.scale
                turn = scale * (layer.base @ layer.projection.T + scale * layer.direction.weight.detach())
                shrink = parts[self._layers + index] * layer.magnitude.weight.detach() / norms.square()
                parts[index] -= shrink[:, None] * turn
            slopes.append(torch.cat([*(part.flatten() for part in parts), torch.zeros(sum(self._sizes[-2:]))]))
        found_slopes: Values = torch.stack(slopes).numpy()
        return found_slopes

    def _gram(self) -> Tensor:
        embedded = self.model.embed(self._anchors)
        embedded = embedded - embedded.mean(dim=0)
        kernel = embedded @ embedded.T
        upper: Tensor = kernel[*torch.triu_indices(len(kernel), len(kernel))] / kernel.norm()
        return upper

    def gradients(self, features: Tensor, labels: Tensor, *, shared: bool = False) -> Tensor:
        """Clipped gradients [n, P] of records at the parameters that were taken last; of B only [n, D] if `shared`."""

        def flat(parts: dict[str, Tensor], inputs: Tensor) -> Tensor:
            if shared:
                return torch.cat([parts[name] for name in self._names[: self._layers]], dim=1)
            weight = (parts[PROJECTOR_BIAS][:, :, None] * inputs[:, None, :]).flatten(1)
            return torch.cat([weight if name == PROJECTOR_WEIGHT else parts[name] for name in self._names], dim=1)

        return torch.cat([flat(*clipped) for clipped in self._clipped(features, labels, shared)])

    def projected(self, features: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
        """`gradients` along `directions` [P, k]: [n, k]."""
        along = dict(zip(self._names, torch.split(directions, self._sizes), strict=True))

        def product(parts: dict[str, Tensor], inputs: Tensor) -> Tensor:
            bias = parts[PROJECTOR_BIAS]
            turned = (bias @ along[PROJECTOR_WEIGHT].reshape(bias.shape[1], -1)).reshape(len(bias), inputs.shape[1], -1)
            found = torch.einsum("ni,nik->nk", inputs, turned)
            for name, part in parts.items():
                found += part @ along[name]
            return found

        return torch.cat([product(*clipped) for clipped in self._clipped(features, labels)])

    def _clipped(
        self, features: Tensor, labels: Tensor, shared: bool = False
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Of some records at a time the parts of their clipped gradients, each [n, size], and the projector's inputs [n, features].

        The part of the projector's weight is left out: it is (that of its bias) times the inputs. So are all but B if only these
        are wanted, and nothing is clipped.
        """
        unclipped = self._limit >= UNCLIPPED
        wanted = self._names[: self._layers] if shared and unclipped else self._names
        fixed, named = dict(self.model.named_buffers()), dict[str, Tensor]()
        for name, p in zip(self._names, self.parameters, strict=True):
            (named if name in wanted and name != PROJECTOR_WEIGHT else fixed)[name] = p.detach()

        def loss(parameters: dict[str, Tensor], record: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(self.model, (parameters, fixed), (record[None],))
            return functional.cross_entropy(logits, label[None])

        for some, of in zip(torch.split(features, GRADIENTS), torch.split(labels, GRADIENTS), strict=True):
            found = vmap(grad(loss), in_dims=(None, 0, 0))(named, some, of)
            parts = {name: found[name].flatten(1) for name in named}
            inputs = projector_inputs(self.model, some)
            if not unclipped:
                squares = sum(part.square().sum(dim=1) for part in parts.values())
                squares += parts[PROJECTOR_BIAS].square().sum(dim=1) * inputs.square().sum(dim=1)
                factor = (self._limit / squares.sqrt().clamp_min(1e-12)).clamp_max(1.0)
                for part in parts.values():
                    part *= factor[:, None]
            yield parts, inputs


@dataclass(frozen=True, slots=True)
class _Effects:
    """What records do per step, from a trajectory that the attacker simulates. Records: base, candidates, strangers.

    Attributes:
        shared: per round [steps, records, D], change of B if a record is in the sample of that step.
        total: [base and candidates, P], expected change of all parameters after the first round.
        end: parameters [P] after the first round.
    """

    shared: list[Values]
    total: Values
    end: Tensor


def _effects(scene: _Scene, target: Target, whitebox: _Whitebox, flips: Flips, others: Values) -> _Effects:
    """Simulate the rounds: every record counts in every step with weight `sample_rate`, and there is no noise."""
    agreement, batch = target.agreement, target.member.expected_batch_size
    rate, steps = agreement.privacy.sample_rate, agreement.training.steps_per_round
    records = _join(scene.base, scene.candidates, scene.strangers)
    features, labels = torch.from_numpy(records.features).double(), torch.from_numpy(records.labels)
    mean = _vary(
        target,
        privacy={"sample_rate": 1.0, "noise_multiplier": 0.0},
        batch=batch / rate,
        hospital_privacy=None,
    )
    trainer = scene.trainer(mean, _join(scene.base, _take(scene.candidates, np.flatnonzero(flips))))
    speed = np.full(sum(whitebox._sizes), agreement.training.local_learning_rate)
    speed[: whitebox.shared] = agreement.training.learning_rate
    shared, state = [], scene.start.state
    own = len(scene.base) + len(scene.candidates)
    total, end = np.zeros((own, len(speed))), torch.empty(0)
    weight = precision_weight(agreement, target.member)
    for round_number in range(scene.rounds):
        trainer.load_shared(state)
        trainer.warm_up()
        seen = np.zeros((steps, len(records), whitebox.shared))
        for step in range(steps):
            whitebox.take(trainer)
            whole = own if round_number == 0 else 0  # of so many records the local parameters are wanted too
            if whole:
                change = whitebox.gradients(features[:own], labels[:own]).numpy()
                change *= -speed / batch
                seen[step, :own] = change[:, : whitebox.shared]
                change *= rate
                echo = (1.0 - MOMENTUM ** (steps - step)) / (1.0 - MOMENTUM)
                change[:, whitebox.shared :] *= echo
                total += change
            rest = whitebox.gradients(features[whole:], labels[whole:], shared=True).numpy()
            seen[step, whole:] = rest * (-agreement.training.learning_rate / batch)
            trainer.step()
        if round_number == 0:
            end = whitebox.take(trainer)
        shared.append(seen)
        after = directions(trainer.model.adapted.items())
        update = RoundUpdate(
            {name: after[name] - state.B[name] for name in after},
            dict.fromkeys(after, weight),
            trainer.anchor_gram(),
            gram_weight(agreement, target.member),
            steps,
        )
        state = apply_sum(state, scene.layout, update.vector(scene.layout) + others, agreement)
    return _Effects(shared, total, end)


# --- membership inference


def _infer_membership(scene: _Scene, protection: Protection, report: Callable[[float], None]) -> list[Membership]:
    """Train again and again with other candidates, and score all candidates in all trainings."""
    target, size, count = _protected(scene.target, protection), scene.size, scene.size.trainings[protection]
    flips = scene.chance.random((count, len(scene.candidates))) < 0.5
    pool = [_other_hospital(scene, target) for _ in range(max(size.pool, scene.members - 1))]
    uploads = _Uploads(target.agreement, target.member.node_id)
    trainings = []
    for number in range(count):
        report(number / count)
        trainings.append(_train(scene, target, flips[number], pool, uploads))
    whitebox = _Whitebox(target)
    effects = _effects(scene, target, whitebox, flips[0], np.mean(pool, axis=0) * (scene.members - 1))
    rows = []
    for seen, observation, of in _WHAT_IS_SEEN[protection]:
        model = _linear_model(scene, target, whitebox, effects, observation)
        scores = _likelihood_ratios(np.array([getattr(training, seen) for training in trainings]), model)
        steps = target.agreement.training.steps_per_round * (scene.rounds if observation == "adapter" else 1)
        for candidates, part in scene.parts.items():
            inside, outside = scores[:, part][flips[:, part]], scores[:, part][~flips[:, part]]
            rows.append(Membership(observation, of, candidates, steps, inside.tolist(), outside.tolist()))
    return rows


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one training shows. Changes of B ([D]) are divided by the weights, which are public."""

    update: Values
    encoded: Values
    masked: Values
    aggregate: Values
    adapter: Values
    gram: Values


_WHAT_IS_SEEN: dict[Protection, tuple[tuple[str, Observation, Protection], ...]] = {
    "unprotected": (
        ("update", "update", "unprotected"),
        ("encoded", "upload", "unprotected"),
        ("masked", "upload", "ours"),
        ("aggregate", "aggregate", "unprotected"),
        ("adapter", "adapter", "unprotected"),
        ("gram", "gram", "unprotected"),
    ),
    "ours": (
        ("update", "update", "ours"),
        ("aggregate", "aggregate", "ours"),
        ("adapter", "adapter", "ours"),
        ("gram", "gram", "ours"),
    ),
}
"""By the protection of training: a field of `_Seen`, and the observation and protection that it stands for."""


def _other_hospital(scene: _Scene, target: Target) -> Values:
    """What another hospital adds to the sum: a real update from the start, on a random half of the others' records."""
    half = scene.chance.permutation(len(scene.strangers))[: max(1, len(scene.strangers) // 2)]
    trainer = scene.trainer(target, _take(scene.strangers, half))
    return _vector(target, scene.layout, trainer.train_round(scene.start.state))


def _train(scene: _Scene, target: Target, flips: Flips, pool: list[Values], uploads: _Uploads) -> _Seen:
    """One training over all rounds."""
    agreement, layout = target.agreement, scene.layout
    private, code = private_values(layout), FixedPoint.from_agreement(agreement)
    trainer = scene.trainer(target, _join(scene.base, _take(scene.candidates, np.flatnonzero(flips))))
    state, vectors, grams, steps = scene.start.state, [], [], []
    for _ in range(scene.rounds):
        update = trainer.train_round(state)
        vectors.append(_vector(target, layout, update))
        grams.append(update.gram[np.triu_indices(layout.anchors)])
        chosen = scene.chance.choice(len(pool), scene.members - 1, replace=False)
        encoded = [code.encode(values) for values in (vectors[-1], *(pool[index] for index in chosen))]
        total = code.decode(np.sum(encoded, axis=0, dtype=np.uint32), len(encoded))
        parts, ridge = unpack_vector(layout, total), agreement.precision.ridge
        changes = [part.ravel() / (ridge + parts.weights[name]) for name, part in parts.weighted_delta_b.items()]
        steps.append(np.concatenate(changes))
        state = apply_sum(state, layout, total, agreement)
    weight = precision_weight(agreement, target.member)
    return _Seen(
        update=vectors[0][private] / weight,
        encoded=uploads.seen(vectors[0], protected=False)[private] / weight,
        masked=uploads.seen(vectors[0])[private] / weight,
        aggregate=steps[0],
        adapter=np.sum(steps, axis=0),
        gram=grams[0],
    )


@dataclass(frozen=True, slots=True)
class _Linear:
    """What is seen is, but for its mean, flips @ signatures + columns @ N(0, I) + N(0, noise I).

    Attributes:
        signatures: [candidates, D].
        columns: [K, D]. The candidates' own flips are among them.
        noise: a variance.
    """

    signatures: Values
    columns: Values
    noise: float


DRIFT = 0.03
"""Of the variance, what first order and Gaussian samples leave out."""

COLUMNS = 1500
"""Above, the steps of a record are taken together."""


def _linear_model(
    scene: _Scene, target: Target, whitebox: _Whitebox, effects: _Effects, observation: Observation
) -> _Linear:
    agreement, own = target.agreement, len(scene.base) + len(scene.candidates)
    rate, coins = agreement.privacy.sample_rate, slice(len(scene.base), own)
    presence = np.ones(own)
    presence[coins] = 0.5
    if observation == "gram":
        return _linear_gram(scene, target, whitebox, effects, presence)
    rounds = effects.shared if observation == "adapter" else effects.shared[:1]
    per_step = np.concatenate(rounds)
    expected = rate * per_step.sum(axis=0)
    columns = [_sampling(per_step[:, :own], presence, rate), 0.5 * expected[coins]]
    noise, scale = len(rounds) * _noise(target), 1.0
    if observation in ("aggregate", "adapter"):
        weight, others = precision_weight(agreement, target.member), scene.members - 1
        scale = weight / (agreement.precision.ridge + scene.members * weight)
        halves = np.full(len(scene.strangers), 0.5)
        columns += [
            math.sqrt(others) * _sampling(per_step[:, own:], halves, rate),
            math.sqrt(others) * 0.5 * expected[own:],
        ]
        noise *= scene.members
    return _Linear(scale * expected[coins], scale * np.concatenate(columns), scale**2 * noise)


def _sampling(per_step: Values, presence: Values, rate: float) -> Values:
    """What Poisson sampling adds to the variance, as columns: [steps, records, D] to [K, D]."""
    steps, records, size = per_step.shape
    spread = np.sqrt(rate * (1.0 - rate) * presence)[:, None]
    if steps * records <= COLUMNS:
        whole: Values = (spread * per_step).reshape(-1, size)
        return whole
    together: Values = spread * per_step.sum(axis=0) / math.sqrt(steps)
    return together


def _noise(target: Target) -> float:
    """The variance of the noise on each value of one update's dB."""
    agreement, share = target.agreement, target.agreement.noise_share
    shared = (share.std / precision_weight(agreement, target.member)) ** 2 if share else 0.0
    return noise_variance(agreement, target.member) + shared


def _linear_gram(scene: _Scene, target: Target, whitebox: _Whitebox, effects: _Effects, presence: Values) -> _Linear:
    agreement, steps, end = target.agreement, target.agreement.training.steps_per_round, effects.end
    privacy, training = agreement.privacy, agreement.training
    here = whitebox.gram(end)

    def change(direction: Values) -> Values:
        moved: Values = whitebox.gram(end + torch.from_numpy(direction)) - here
        return moved

    own = np.array([change(effect) for effect in effects.total])
    coins = slice(len(scene.base), len(presence))
    spread = np.sqrt(presence * (1.0 - privacy.sample_rate) / (privacy.sample_rate * steps))
    columns = [spread[:, None] * own, 0.5 * own[coins]]
    std = privacy.noise_multiplier * privacy.max_grad_norm / target.member.expected_batch_size
    if std > 0.0:
        echoes = (1.0 - MOMENTUM ** np.arange(1, steps + 1)) / (1.0 - MOMENTUM)
        scales = np.full(len(end), training.local_learning_rate * std * float(np.linalg.norm(echoes)))
        scales[: whitebox.shared] = training.learning_rate * std * math.sqrt(steps)
        drawn = scene.chance.normal(size=(scene.size.noise_samples, len(end))) * scales
        columns.append(np.array([change(noise) for noise in drawn]) / math.sqrt(len(drawn)))
    return _Linear(own[coins], np.concatenate(columns), 0.0)


def _likelihood_ratios(seen: Values, model: _Linear) -> Values:
    """Scores [trainings, candidates] of what was seen [trainings, D]; the mean is that of the other trainings."""
    count, size = seen.shape
    centred = (seen - seen.mean(axis=0)) * (count / (count - 1))
    columns, signatures = model.columns, model.signatures
    # There may be less noise than was agreed; the attacker looks.
    noise = min(model.noise, float(centred.var())) + DRIFT * float(np.square(columns).sum()) / size + 1e-300
    if size <= len(columns):
        weights = np.linalg.solve(columns.T @ columns + noise * np.eye(size), signatures.T)
    else:  # Woodbury
        inner = columns @ columns.T + noise * np.eye(len(columns))
        weights = (signatures.T - columns.T @ np.linalg.solve(inner, columns @ signatures.T)) / noise
    # A candidate's own flip is among the columns; Sherman-Morrison takes it out again.
    own = np.einsum("cd,dc->c", signatures, weights)
    scores: Values = centred @ weights / np.maximum(1.0 - own / 4.0, 1e-9)
    return scores


# --- gradient inversion

ITERATIONS, SCREENING, HALVINGS = 30, 6, (2, 4)
"""Steps of a search at most; after how many only as many go on as begin with one label; and when half of those before do."""

STUCK, STILL = 1e6, 0.01
"""A search ends at this damping, or when a step gains less than this in twice the log likelihood."""

MOST_SLOPES = 2e7
"""Values of all Jacobians that are in memory together."""

DIFFERENCE = 1e-5
"""Of forward differences, in deviations; everything is in float64."""

DRAWN, MOST_DRAWN = 40, 400
"""Records per label, and of all labels as long as each has two, that are tried before a search begins."""

DIRECTIONS = 48
"""Of the Gram matrix: those along which records move it most."""

ROUNDING = 1e-3
"""Of the length of what is seen: what differs by less from what was searched in already is not searched in again."""

Effect = Callable[[Tensor, Tensor], Values]


@dataclass(frozen=True, slots=True)
class _Clue:
    """What one step on one record shows of it.

    Attributes:
        seen: [n, D], less what the attacker knows.
        effect: what each of m records, with its label, adds to it to first order: [m, D].
        noise: the variance that was agreed, on each value.
        together: so many records, each of another hospital, are in it; their effects add up.
    """

    seen: Values
    effect: Effect
    noise: float
    together: int = 1

    def tells_as(self, other: _Clue) -> bool:
        """Whether this is the other one but for rounding, so that a search in either finds what one in both would."""
        return (
            (self.effect, self.noise, self.together) == (other.effect, other.noise, other.together)
            and self.seen.shape == other.seen.shape
            and bool(np.all(_norms(self.seen - other.seen) <= ROUNDING * _norms(other.seen)))
        )


def _norms(rows: Values) -> Values:
    return np.asarray(np.linalg.norm(rows, axis=1))


def _invert_all(scene: _Scene) -> list[Inversion]:
    """One record, one step, no anchors' gradient (the attacker knows it): what each observation shows of the record."""
    count = min(scene.size.inverted, len(scene.base))
    records = _take(scene.base, np.arange(count))
    prior = _Prior.of(scene.target)
    truth, found = prior.standardised(records.features), []
    for protection, shown in _WHAT_IS_SEEN.items():
        target = _vary(
            _protected(scene.target, protection),
            training={
                "steps_per_round": 1,
                "warmup_steps": 0,
                "alignment_weight": 0.0,
                "coordinate_weight": 0.0,
                "merge_every_rounds": 0,
                "learning_rate": scene.target.agreement.training.learning_rate,
            },
            privacy={"sample_rate": 1.0},
            batch=1.0,
        )
        clues = _clues(scene, target, prior, records, {seen for seen, _, _ in shown})
        matched = list[tuple[_Clue, tuple[Values, NDArray[np.int64]]]]()
        for seen, observation, of in shown:
            clue = clues[seen]
            match = next((match for earlier, match in matched if clue.tells_as(earlier)), None)
            guesses, labels = match or _match(scene, target, prior, clue)
            matched.append((clue, (guesses, labels)))
            similarity = np.array([_correlations(guess, truth) for guess in guesses.swapaxes(0, 1)])
            nearest = similarity.argmax(axis=0).diagonal()
            right = labels[np.arange(count), nearest] == records.labels
            found.append(Inversion(observation, of, similarity.max(axis=0).tolist(), int(np.count_nonzero(right))))
    return found


def _clues(
    scene: _Scene, target: Target, prior: _Prior, records: LabelledRecords, wanted: set[str]
) -> dict[str, _Clue]:
    """What is seen, by the names of `_Seen`, of real steps from the start."""
    agreement, layout, start = target.agreement, scene.layout, scene.start.state
    private, code = private_values(layout), FixedPoint.from_agreement(agreement)
    weight, noise = precision_weight(agreement, target.member), _noise(target)
    noise += (2.0**-code.fraction_bits / weight) ** 2 / 12.0
    everybody = agreement.precision.ridge + scene.members * weight
    whitebox, trainer = _Whitebox(target), scene.trainer(target, records)
    trainer.load_shared(start)
    at = whitebox.take(trainer)

    def gradients(features: Tensor, labels: Tensor) -> Values:
        found: Values = whitebox.gradients(features, labels, shared=True).numpy()
        return -agreement.training.learning_rate * found

    def step(of: LabelledRecords) -> list[RoundUpdate]:
        return [scene.trainer(target, _take(of, np.array([i]))).train_round(start) for i in range(len(of))]

    updates = step(records)
    ours = [_vector(target, layout, update) for update in updates]
    drawn = scene.chance.choice(len(scene.strangers), max(len(ours), scene.members - 1))
    others = [_vector(target, layout, update) for update in step(_take(scene.strangers, drawn))]
    sums, released = [], []
    for index, vector in enumerate(ours):
        theirs = [others[(index + place) % len(others)] for place in range(scene.members - 1)]
        encoded = [code.encode(values) for values in (vector, *theirs)]
        total = code.decode(np.sum(encoded, axis=0, dtype=np.uint32), len(encoded))
        after = apply_sum(start, layout, total, agreement).B
        change = np.concatenate([(after[s.name] - start.B[s.name]).ravel() for s in layout.segments])
        known = np.sum([code.decode(code.encode(values), 1)[private] for values in theirs[1:]], axis=0)
        sums.append((total[private] - known) / weight)
        released.append((change * everybody - known) / weight)
    clues = {
        "update": _Clue(np.array(ours)[:, private] / weight, gradients, noise),
        "aggregate": _Clue(np.array(sums), gradients, 2.0 * noise, together=2),
        "adapter": _Clue(np.array(released), gradients, 2.0 * noise, together=2),
        "gram": _gram_clue(scene, target, prior, whitebox, at, np.array([update.gram for update in updates])),
    }
    uploads = _Uploads(agreement, target.member.node_id)
    for seen, protected in (("encoded", False), ("masked", True)):
        if seen in wanted:
            read = np.array([uploads.seen(vector, protected=protected)[private] for vector in ours])
            clues[seen] = _Clue(read / weight, gradients, noise)
    return clues


def _gram_clue(scene: _Scene, target: Target, prior: _Prior, whitebox: _Whitebox, at: Tensor, grams: Values) -> _Clue:
    """Changes of the Gram matrix, along the directions in which records that the attacker draws move it."""
    training, privacy = target.agreement.training, target.agreement.privacy
    speed = np.full(len(at), training.local_learning_rate)
    speed[: whitebox.shared] = training.learning_rate
    before, triangle = whitebox.gram(at), np.triu_indices(scene.layout.anchors)

    def steps(features: Tensor, labels: Tensor) -> Values:
        found: Values = whitebox.gradients(features, labels).numpy()
        return -speed * found

    def changes(of: Values) -> Values:
        return np.array([whitebox.gram(at + torch.from_numpy(one)) - before for one in of])

    hidden, labels = prior.draw(scene.chance, target.agreement.study.classes)
    moved = changes(steps(*prior.tensors(hidden, labels)))
    _, sizes, rows = np.linalg.svd(moved, full_matrices=False)
    along = rows[:DIRECTIONS][sizes[:DIRECTIONS] > 1e-6 * sizes[0]]
    seen = (grams[:, *triangle] - before) @ along.T
    slopes = whitebox.gram_slopes(along)
    std = privacy.noise_multiplier * privacy.max_grad_norm
    noise = 0.0
    if std > 0.0:
        cloud = changes(scene.chance.normal(size=(scene.size.noise_samples, len(at))) * speed * std) @ along.T
        inner = np.cov(cloud.T)
        inner += DRIFT * np.trace(inner) / len(inner) * np.eye(len(inner))
        whiten = np.linalg.inv(np.linalg.cholesky(inner))
        centred = (seen - cloud.mean(axis=0)) @ whiten.T
        # There may be less noise than was agreed; the attacker looks.
        if np.square(centred).mean() > 0.5:
            seen, along, slopes, noise = centred, whiten @ along, whiten @ slopes, 1.0

    projected = torch.from_numpy(-speed * slopes).T

    def effect(features: Tensor, labels: Tensor) -> Values:
        found: Values = whitebox.projected(features, labels, projected).numpy()
        return found

    return _Clue(seen, effect, noise)


@dataclass(frozen=True, slots=True)
class _Prior:
    """What the anchors tell of a record: mean and deviation of each feature, and the principal components of what is standardised."""

    shape: tuple[int, ...]
    mean: Values
    deviation: Values
    components: Values

    @classmethod
    def of(cls, target: Target) -> _Prior:
        """From the target's anchors."""
        flat = target.anchors.reshape(len(target.anchors), -1).astype(np.float64)
        deviation = flat.std(axis=0)
        deviation[deviation < 1e-6] = 1.0
        standard = (flat - flat.mean(axis=0)) / deviation
        _, sizes, rows = np.linalg.svd(standard, full_matrices=False)
        kept = min(SUBSPACE, len(rows))
        lengths = np.maximum(sizes[:kept] / math.sqrt(len(flat)), 0.1)
        return cls(target.anchors.shape[1:], flat.mean(axis=0), deviation, lengths[:, None] * rows[:kept])

    def standardised(self, features: NDArray[np.floating[Any]]) -> Values:
        """[n, *shape] as [n, d] deviations from the mean, cut off as the tokeniser does."""
        flat = (features.reshape(len(features), -1) - self.mean) / self.deviation
        return np.clip(flat, -FEATURE_LIMIT, FEATURE_LIMIT)

    def features(self, hidden: Values) -> Values:
        """[n, k] coordinates, standard normal before anything is seen, as features [n, *shape]."""
        cut = np.clip(hidden @ self.components, -FEATURE_LIMIT, FEATURE_LIMIT)
        return (self.mean + cut * self.deviation).reshape(-1, *self.shape)

    def tensors(self, hidden: Values, labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features and labels of [..., k] coordinates and [...] labels, in one row."""
        features = self.features(hidden.reshape(-1, hidden.shape[-1]))
        return torch.from_numpy(features), torch.from_numpy(labels.reshape(-1).copy())

    def draw(self, chance: np.random.Generator, classes: int) -> tuple[Values, NDArray[np.int64]]:
        """Coordinates [m, k] and labels [m] of as many records of every label; the first of each is the mean."""
        each = max(2, min(DRAWN, MOST_DRAWN // classes))
        hidden = chance.normal(size=(classes, each, len(self.components)))
        hidden[:, 0] = 0.0
        return hidden.reshape(-1, len(self.components)), np.repeat(np.arange(classes), each)


def _match(scene: _Scene, target: Target, prior: _Prior, clue: _Clue) -> tuple[Values, NDArray[np.int64]]:
    """The most probable records (standardised, [n, together, d]) and labels [n, together] behind what is seen.

    A search begins at several places; the best of them go on (see `SCREENING`).
    """
    classes, count, together = target.agreement.study.classes, len(clue.seen), clue.together
    columns = count * together * len(prior.components)
    tries = min(scene.size.starts * classes, max(1, scene.size.columns // columns))
    power = np.square(clue.seen).mean(axis=1)
    scale = 1.0 / np.sqrt(np.minimum(clue.noise, power) + 1e-6 * power + 1e-30)
    groups = min(count, math.ceil(columns * tries * clue.seen.shape[1] / MOST_SLOPES))
    found = []
    for part in np.array_split(np.arange(count), groups):
        hidden, labels = _places(scene, prior, clue, clue.seen[part], classes, tries)
        kept = max(1, tries // classes)
        hidden, cost = _search(prior, clue, np.repeat(part, tries), np.repeat(scale[part], tries), hidden, labels, kept)
        best = np.arange(len(part)) * tries + cost.reshape(len(part), tries).argmin(axis=1)
        found.append((hidden[best], labels[best]))
    hidden, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    guesses = prior.standardised(prior.features(hidden.reshape(count * together, -1)))
    return guesses.reshape(count, together, -1), labels


def _places(
    scene: _Scene, prior: _Prior, clue: _Clue, seen: Values, classes: int, tries: int
) -> tuple[Values, NDArray[np.int64]]:
    """Where searches begin, `tries` for each of `seen`: coordinates [m, together, k] and labels [m, together].

    Of drawn records those whose effects come nearest to what is seen, with all labels in turn.
    """
    hidden, labels = prior.draw(scene.chance, classes)
    effects = clue.effect(*prior.tensors(hidden, labels))
    sets = np.array(list(combinations(range(len(labels)), clue.together)))
    sizes = (effects @ effects.T)[sets[:, :, None], sets[:, None, :]].sum(axis=(1, 2))
    distances = sizes - 2.0 * (seen @ effects.T)[:, sets].sum(axis=2)
    kinds = np.sort(labels[sets], axis=1) @ classes ** np.arange(clue.together)
    chosen = []
    for distance in distances:
        order = np.lexsort((distance, kinds))
        ordered = kinds[order]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        chosen.append(order[np.lexsort((distance[order], rank))[:tries]])
    picked = sets[np.concatenate(chosen)]
    return hidden[picked], labels[picked]


def _search(
    prior: _Prior,
    clue: _Clue,
    owner: NDArray[np.int64],
    scale: Values,
    hidden: Values,
    labels: NDArray[np.int64],
    kept: int,
) -> tuple[Values, Values]:
    """Levenberg-Marquardt from `hidden` [m, together, k]: where it ends, and the cost [m].

    Residuals are those of `clue.seen[owner]` times `scale` [m]. After `SCREENING` steps only the `kept` best of every owner go on,
    and after each of `HALVINGS` half of those before.
    """
    count, together, size = hidden.shape
    hidden, width = hidden.copy(), together * size

    def effects(at: Values, of: NDArray[np.int64]) -> Values:
        return clue.effect(*prior.tensors(at, of)).reshape(*at.shape[:-1], -1)

    def residuals(shown: Values, at: Values, which: NDArray[np.int64]) -> Values:
        off = (shown.sum(axis=1) - clue.seen[owner[which]]) * scale[which, None]
        return np.concatenate([off, at.reshape(len(at), -1)], axis=1)

    def jacobian(which: NDArray[np.int64]) -> Values:
        moved = hidden[which][:, :, None] + DIFFERENCE * np.eye(size)
        change = effects(moved, np.repeat(labels[which][:, :, None], size, axis=2)) - shown[which][:, :, None]
        data = change.reshape(len(which), width, -1) * (scale[which] / DIFFERENCE)[:, None, None]
        return np.concatenate([data, np.tile(unit, (len(which), 1, 1))], axis=2)

    live = np.arange(count)
    shown = effects(hidden, labels)
    now = residuals(shown, hidden, live)
    damping, stale, unit = np.ones(count), np.ones(count, dtype=np.bool_), np.eye(width)
    slopes, remaining = np.empty((count, width, now.shape[1])), count // len(set(owner.tolist()))
    for iteration in range(ITERATIONS):
        if iteration in HALVINGS:
            remaining = max(kept, math.ceil(remaining / 2))
        if iteration == SCREENING:
            remaining = kept
        if iteration == SCREENING or iteration in HALVINGS:
            cost = np.square(now).sum(axis=1).reshape(len(set(owner.tolist())), -1)
            ranks = cost.argsort(axis=1).argsort(axis=1).reshape(-1)
            live = live[ranks[live] < remaining]
        if not len(live):
            break
        fresh = live[stale[live]]
        if len(fresh):
            slopes[fresh] = jacobian(fresh)
        here, at, slope = now[live], hidden[live], slopes[live]
        normal = slope @ slope.transpose(0, 2, 1)
        damped = normal + np.einsum("nkk,kl,n->nkl", normal, unit, damping[live])
        step = np.linalg.solve(damped, slope @ here[:, :, None]).reshape(at.shape)
        tried = np.clip(at - step, -FEATURE_LIMIT, FEATURE_LIMIT)
        then_shown = effects(tried, labels[live])
        then = residuals(then_shown, tried, live)
        gain = np.square(here).sum(axis=1) - np.square(then).sum(axis=1)
        better = gain > 0.0
        moving, stale[live] = live[better], better
        hidden[moving], shown[moving], now[moving] = tried[better], then_shown[better], then[better]
        damping[live] *= np.where(better, 0.25, 4.0)
        live = live[(damping[live] < STUCK) & (~better | (gain > STILL))]
    return hidden, np.square(now).sum(axis=1)


def _correlations(guesses: Values, truth: Values) -> Values:
    """[n, n] correlations over features of guess i with record j; 0 where one of them does not vary."""
    left, right = (rows - rows.mean(axis=1, keepdims=True) for rows in (guesses, truth))
    norms = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    return np.asarray((left @ right.T) / np.where(norms > 1e-12, norms, np.inf), dtype=np.float64)
