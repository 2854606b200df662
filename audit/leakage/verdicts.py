"""From evidence to findings: an attack must work on unprotected training, and fail on ours."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom, mannwhitneyu

from audit.findings import Finding, Status
from audit.leakage.evidence import (
    CANDIDATES,
    CHANCE,
    OBSERVATIONS,
    PLAUSIBLE,
    RATES,
    SUCCESS_RATE,
    SUCCESS_SIMILARITY,
    Inversion,
    LeakageEvidence,
    Membership,
    Observation,
    Values,
)
from audit.leakage.scores import Rate, auc, dp_line, labelled_scores, rate_at, rates
from keys.errors import ConfigError
from protocols.agreement import Agreement
from secgeo.accountant import epsilon_after


def judge(evidence: LeakageEvidence, agreement: Agreement) -> list[Finding]:
    """The verdict on each observation, from the evidence alone.

    Raises:
        ConfigError: evidence is missing, empty or not finite.
    """
    inversions = [_inverted(evidence, observation) for observation in OBSERVATIONS]
    findings = []
    for observation in OBSERVATIONS:
        found = [row for row in evidence.membership if row.observation == observation]
        for candidates in CANDIDATES:
            rows = {row.protection: row for row in found if row.candidates == candidates}
            if len(rows) != 2 or len(found) != 2 * len(CANDIDATES):
                raise ConfigError(
                    f"the evidence has not one attack each on {candidates} by the {observation}, ours and unprotected"
                )
            findings.append(_judge_membership(rows["ours"], rows["unprotected"], agreement, _trainings(evidence)))
    return findings + [_judge_inversion(ours, reference) for ours, reference in inversions]


def _trainings(evidence: LeakageEvidence) -> str:
    """How many trainings there were, which depends on the profile and the size of the model."""
    return f"{evidence.settings.trainings} trainings of ours, {evidence.settings.trainings_unprotected} unprotected"


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


def _judge_membership(ours: Membership, reference: Membership, agreement: Agreement, trainings: str) -> Finding:
    observation, steps, per_round = ours.observation, ours.steps, agreement.training.steps_per_round
    allowed = range(per_round, agreement.total_steps + 1, per_round) if observation == "adapter" else [per_round]
    if reference.steps != steps or steps not in allowed:
        raise ConfigError(f"the evidence on the {observation} is not of whole rounds of this agreement")
    works = _works(reference)
    detail = "; ".join([trainings, *(f"{row.protection}: {_numbers(row)}" for row in (ours, reference))])
    if not works:
        detail += "; the attack is too weak on unprotected training, so that it shows nothing about ours"
    name = f"membership inference on {_SEEN[observation]}, {ours.candidates}"
    if observation == "upload":
        chance = _away_from_chance(ours)
        promise = "it tells nothing of who is in the data, not even without the noise of training"
        detail = f"{detail}; by chance with probability {chance:.2g}"
        return Finding("leakage", name, promise, _status(works, chance < CHANCE / len(CANDIDATES)), detail)
    privacy = agreement.privacy
    epsilon = epsilon_after(privacy, steps, privacy.delta)
    promise = f"TPR <= e^epsilon FPR + delta with epsilon {epsilon:.3g}, delta {privacy.delta:g} ({steps} steps)"
    if math.isinf(epsilon):
        return Finding("leakage", name, "none: the agreement has no noise", "not testable", detail)
    crossed = any(crosses(rate, epsilon, privacy.delta) for rate in rates(ours.members, ours.others))
    bounds = ", ".join(f"TPR {dp_line(epsilon, privacy.delta, rate):.3g} at FPR {rate:g}" for rate in RATES)
    promise = f"the attack fails, where it succeeds on unprotected training, and {promise}"
    detail = f"{detail}; allowed by DP: {bounds}"
    succeeds, fails = _works(ours), _fails(ours)
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
    labelled_scores(row.members, row.others)
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
        promise = "what is made of a step on a single record is no nearer to it than guesses are"
        near = _near_by_chance(ours)
        broken = (middle >= SUCCESS_SIMILARITY and chance < CHANCE) or near < CHANCE
        fails = min(chance, near) >= PLAUSIBLE
    detail = "; ".join(
        f"{row.protection}: median correlation {value:.3f} (guesses: {_guess(row):.3f}), "
        f"by chance with probability {p:.2g}, {_near(row)} of {len(row.similarity)} above {NEAR} ({_near_by_chance(row):.2g}), "
        f"{row.labels_right} labels"
        for row, value, p in ((ours, middle, chance), (reference, middle_reference, chance_reference))
    )
    detail += _KNOWN.get(observation, "")
    if not works:
        detail += "; the attack fails on unprotected training, so that it shows nothing about ours"
    elif not fails and not broken:
        detail += "; nearer than chance makes them, but not so that it is certain"
    name = f"gradient inversion on {_SEEN[observation]}"
    return Finding("leakage", name, promise, _status(works and fails, broken), detail)


NEAR = 0.9
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


def _near(row: Inversion) -> int:
    """How many records come back nearly as they are: whose does is lost, whatever becomes of the others."""
    return int(np.count_nonzero(np.diag(_square(row)) > NEAR))


def _near_by_chance(row: Inversion) -> float:
    """The probability of so many, if reconstructions are as near to their records as to those of others."""
    matrix = _square(row)
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    rate = (1 + np.count_nonzero(others > NEAR)) / (1 + others.size)
    return float(binom.sf(_near(row) - 1, len(matrix), rate))


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
