"""From scores to rates: ROC, area, true positives at few false ones, and the most that differential privacy allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from scipy.stats import beta
from sklearn.metrics import roc_auc_score, roc_curve

from audit.leakage.evidence import RATES, Values
from keys.errors import ConfigError


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
    scores, labels = labelled_scores(members, others)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    return np.asarray(fpr, dtype=np.float64), np.asarray(tpr, dtype=np.float64)


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The area under `roc`: the probability that a member's score is above another's.

    Raises:
        ConfigError: see `roc`.
    """
    scores, labels = labelled_scores(members, others)
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


def labelled_scores(members: Sequence[float], others: Sequence[float]) -> tuple[Values, NDArray[np.int64]]:
    """All scores, and 1 for those of members.

    Raises:
        ConfigError: there are none of either kind, or one is not finite.
    """
    scores = np.array([*members, *others], dtype=np.float64)
    if not len(members) or not len(others) or not np.isfinite(scores).all():
        raise ConfigError("an ROC curve needs finite scores of at least one member and one other")
    return scores, np.repeat(np.array([1, 0]), [len(members), len(others)])
