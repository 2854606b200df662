"""Lower bounds on epsilon from how well an attack tells canaries that were in from canaries that were out. Torch-free.

An accountant bounds epsilon from above by a proof; an audit bounds it from below by an attack. If the two cross, then the proof,
the code or the accountant is wrong. What each bound says when its attack had luck no better than its confidence allows:

    many_run          epsilon of ANY mechanism at delta
    one_run_steinke   epsilon of ANY mechanism at delta, from one run with many canaries
    many_run_fdp      the noise of a mechanism OF A NAMED FAMILY, and by that its epsilon
    one_run_fdp       the same from one run

The last two reject trade-off curves: "no mechanism that is at least as private as this one does so badly". By themselves they say nothing
of epsilon at one delta: a curve may be broken at another. Within a family whose curves are ordered by noise they do: the noise is smaller
than whatever is rejected, and epsilon is larger. So the family must be the mechanism's own. `Gaussian` (mu-GDP, mu = 1 / noise multiplier)
is right for Gaussian noise without sampling. For DP-SGD take `Poisson`: the mu of a sampled mechanism differs from point to point of its
curve, and a mu that is read off at one point may give more than its true epsilon at another.

Neighbours differ in one record that is added or removed, as everywhere in SecGeo. Scores have no unit; higher means "was in".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from audit.budget import Steps, at_most_rdp, epsilon_pld
from keys.errors import ConfigError, VerificationFailed
from protocols.agreement import NOISE_RANGE

Array = NDArray[np.float64]
Curve = Callable[[ArrayLike], Array]
"""From a share of members that is found to the least share of others that is then taken for members."""

T = TypeVar("T")

THRESHOLDS = 400
"""At most so many are tried."""

LARGEST_EPSILON = 100.0
"""By RDP. Beyond, a curve is not computed."""

CURVE_DELTAS = (1e-10, 1e-8, 1e-6)
CURVE_POINTS = 128
"""A curve is the hull of (epsilon, delta) at this many epsilons, up to where delta falls to the first of these that PLD reaches."""

CURVE_INTERVAL = 1e-3
"""The discretisation of a curve's privacy losses: ten times as fast as PLD's default, and pessimistic, so still sound."""


# --- Gaussian noise: mu, epsilon and delta


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-GDP at `delta` (Balle and Wang 2018, theorem 8, by dp_accounting); mu is 1 / noise multiplier.

    Raises:
        ConfigError: a parameter is out of range.
    """
    _require(mu >= 0.0 and math.isfinite(mu), f"mu is at least 0, not {mu}")
    _require(0.0 <= delta < 1.0, f"delta is from 0 up to 1, not {delta}")
    if mu == 0.0:
        return 0.0
    from dp_accounting import gaussian_mechanism

    return float(gaussian_mechanism.get_epsilon_gaussian(1.0 / mu, delta))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu whose mu-GDP is (epsilon, delta)-DP; the inverse of `gaussian_epsilon`.

    Raises:
        ConfigError: a parameter is out of range.
    """
    _require(epsilon >= 0.0 and math.isfinite(epsilon), f"epsilon is at least 0, not {epsilon}")
    _require(0.0 < delta < 1.0, f"delta is between 0 and 1, not {delta}")
    from dp_accounting import gaussian_mechanism

    return 1.0 / float(gaussian_mechanism.get_sigma_gaussian(epsilon, delta))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Delta of mu-GDP at `epsilon` (Balle and Wang 2018, theorem 8), from logarithms, so that tails keep their digits.

    Raises:
        ConfigError: a parameter is out of range.
    """
    _require(mu >= 0.0 and math.isfinite(mu), f"mu is at least 0, not {mu}")
    _require(epsilon >= 0.0 and math.isfinite(epsilon), f"epsilon is at least 0, not {epsilon}")
    if mu == 0.0:
        return 0.0
    found = float(special.log_ndtr(mu / 2 - epsilon / mu))
    taken = epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))
    return math.exp(found) * -math.expm1(min(0.0, taken - found))


# --- Families of trade-off curves


class Family(Protocol):
    """Mechanisms that are ordered by their noise multiplier: more noise, more private at every point of the curve."""

    @property
    def noises(self) -> tuple[float, float]:
        """The least and the largest noise multiplier that is tried."""

    @property
    def resolution(self) -> float:
        """How close, relatively, the noise multiplier is found."""

    def curve(self, noise: float) -> Curve | None:
        """The curve of this noise multiplier, or one that claims less; None where it is not computed."""

    def epsilon(self, noise: float, delta: float) -> float:
        """Epsilon of this noise multiplier at `delta`."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Gaussian noise without sampling, once: mu-GDP with mu = 1 / noise multiplier (Dong, Roth, Su 2019).

    T steps with noise s are one with noise s / sqrt(T), if nothing is sampled.
    """

    @property
    def noises(self) -> tuple[float, float]:
        """From mu = 100 to one in a million."""
        return 0.01, 1e6

    @property
    def resolution(self) -> float:
        """As close as is of use."""
        return 1e-9

    def curve(self, noise: float) -> Curve:
        """Φ(Φ⁻¹(found) − mu)."""

        def least(found: ArrayLike) -> Array:
            return np.asarray(special.ndtr(special.ndtri(found) - 1.0 / noise))

        return least

    def epsilon(self, noise: float, delta: float) -> float:
        """By Balle and Wang's formula."""
        return gaussian_epsilon(1.0 / noise, delta)


@dataclass(frozen=True, slots=True)
class Poisson:
    """DP-SGD: `steps` steps of Gaussian noise on Poisson-sampled records, by Google's PLD, as the claim is recomputed.

    The curve is that of adding and removing together: the hull of all (epsilon, delta) that PLD gives (Dong, Roth, Su 2019, section 2.4).
    Its deltas are pessimistic and finitely many; both make the curve claim less, so rejecting it stays sound. `epsilon` is PLD's
    too, above the truth by PLD's discretisation (compare `budget.epsilon_pld`).

    Raises:
        ConfigError: the rate or the number of steps is out of range.
    """

    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        _require(0.0 < self.sample_rate <= 1.0, f"a sampling rate is above 0 and at most 1, not {self.sample_rate}")
        _require(self.steps >= 1, f"there is at least one step, not {self.steps}")

    @property
    def noises(self) -> tuple[float, float]:
        """What `audit.budget` recomputes."""
        return NOISE_RANGE

    @property
    def resolution(self) -> float:
        """A thousandth; every further halving is a PLD."""
        return 1e-3

    def curve(self, noise: float) -> Curve | None:
        """The hull of the lines; None where epsilon is too large to be worth computing."""
        lines = _poisson_lines(self.sample_rate, self.steps, noise)
        return None if lines is None else _hull(*lines)

    def epsilon(self, noise: float, delta: float) -> float:
        """By PLD."""
        return epsilon_pld([Steps(self.sample_rate, noise, self.steps)], delta)


@lru_cache(maxsize=256)
def _poisson_lines(rate: float, steps: int, noise: float) -> tuple[Array, Array] | None:
    """Epsilons and their deltas, each shape (points,)."""
    try:
        if not at_most_rdp([Steps(rate, noise, steps)], CURVE_DELTAS[-1], LARGEST_EPSILON):
            return None
    except VerificationFailed:
        return None
    from dp_accounting.pld import privacy_loss_distribution

    loss = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=CURVE_INTERVAL
    ).self_compose(steps)
    ends = (float(loss.get_epsilon_for_delta(delta)) for delta in CURVE_DELTAS)
    end = next((end for end in ends if math.isfinite(end)), None)
    if end is None:
        return None
    epsilons = np.linspace(0.0, end, CURVE_POINTS)
    deltas = [loss.get_delta_for_epsilon(float(epsilon)) for epsilon in epsilons]  # one by one is many times as fast
    return epsilons, np.asarray(deltas, dtype=np.float64)


def _hull(epsilons: Array, deltas: Array) -> Curve:
    """The least false alarms that all of `found ≤ e^ε alarms + δ` and `1 − alarms ≤ e^ε (1 − found) + δ` allow."""
    grown, shrunk = np.exp(epsilons), np.exp(-epsilons)

    def least(found: ArrayLike) -> Array:
        share = np.asarray(found, dtype=np.float64)[..., None]
        lines = np.maximum(shrunk * (share - deltas), 1.0 - deltas - grown * (1.0 - share))
        return np.asarray(np.maximum(lines.max(axis=-1), 0.0))

    return least


class NoiseBound(NamedTuple):
    """The noise multiplier is at most `noise_multiplier` (infinite: nothing is shown), hence epsilon at least `epsilon`."""

    noise_multiplier: float
    epsilon: float

    @property
    def mu(self) -> float:
        """1 / noise multiplier: for `Gaussian` the mechanism is not mu'-GDP for any mu' below it."""
        return 1.0 / self.noise_multiplier


def _bound(family: Family, rejects: Callable[[Curve], bool], delta: float) -> NoiseBound:
    noise = _least_rejected(family, rejects)
    return NoiseBound(noise, family.epsilon(noise, delta) if math.isfinite(noise) else 0.0)


def _least_rejected(family: Family, rejects: Callable[[Curve], bool]) -> float:
    """Bisect for the least noise whose curve is rejected; infinite if none is. What is not computed counts as not rejected."""

    def refuted(noise: float) -> bool:
        curve = family.curve(noise)
        return curve is not None and rejects(curve)

    low, high = family.noises
    if not refuted(high):
        return math.inf
    while high > low * (1.0 + family.resolution):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


# --- Many runs, one score each


def many_run(
    in_scores: ArrayLike, out_scores: ArrayLike, delta: float, confidence: float = 0.95, *, seed: int = 0
) -> float:
    """A lower bound on epsilon at `delta` of any mechanism, from independent runs with the canary and without.

    Clopper-Pearson bounds on both errors of a threshold test, each at half of 1 - confidence (Nasr et al. 2023, arXiv 2302.07956), and
    both directions of the definition. A threshold that is chosen on the scores that it is tested on is lucky, so the scores are split at
    random: one half chooses the threshold, the other gives the bound. That costs half of the runs; Bonferroni over all thresholds would
    multiply each error by their number, which costs more in the tails that matter for large epsilon.
    With n runs no bound passes about log(n / 7): errors of zero in n / 2 runs are shown to be below about 3.7 / (n / 2).

    Args:
        in_scores: shape (runs with the canary,), at least 2; runs are independent.
        out_scores: shape (runs without,), at least 2.
        delta: from 0 up to 1.
        confidence: the bound passes the true epsilon with a probability of at most 1 - confidence.
        seed: of the split, to be fixed beforehand: the best of several seeds is no bound.

    Raises:
        ConfigError: a parameter is out of range, or scores are not finite numbers.
    """
    chosen, tested = _halves(in_scores, out_scores, confidence, seed)
    _require(0.0 <= delta < 1.0, f"delta is from 0 up to 1, not {delta}")

    def epsilons(missed: Array, alarms: Array) -> Array:
        with np.errstate(divide="ignore"):
            one = np.log(np.maximum(1.0 - delta - missed, 0.0)) - np.log(alarms)
            other = np.log(np.maximum(1.0 - delta - alarms, 0.0)) - np.log(missed)
        return np.asarray(np.maximum(np.maximum(one, other), 0.0))

    thresholds, *errors = _candidates(chosen, confidence)
    threshold = thresholds[[np.argmax(epsilons(*errors))]]
    return float(epsilons(*_errors(tested, threshold, confidence))[0])


def many_run_fdp(
    in_scores: ArrayLike,
    out_scores: ArrayLike,
    delta: float,
    confidence: float = 0.95,
    family: Family | None = None,
    *,
    seed: int = 0,
) -> NoiseBound:
    """An upper bound on the noise of a mechanism of `family` and by that a lower one on its epsilon, from independent runs.

    As `many_run`, but errors that only a curve with less noise allows. It is tight where (epsilon, delta) of one threshold is not,
    for a curve is seen where errors are common, and epsilon at a small delta lies where they are rare.

    Args:
        in_scores: shape (runs with the canary,), at least 2; runs are independent.
        out_scores: shape (runs without,), at least 2.
        delta: between 0 and 1.
        confidence: the bound passes the true epsilon of a mechanism of the family with a probability of at most 1 - confidence.
        family: the mechanism's own; `Gaussian()` if none is given.
        seed: of the split, to be fixed beforehand.

    Raises:
        ConfigError: a parameter is out of range, or scores are not finite numbers.
    """
    chosen, tested = _halves(in_scores, out_scores, confidence, seed)
    _require(0.0 < delta < 1.0, f"delta is between 0 and 1, not {delta}")
    family = family or Gaussian()
    thresholds, missed, alarms = _candidates(chosen, confidence)
    excess = np.zeros(len(thresholds))

    def rejects_any(curve: Curve) -> bool:
        nonlocal excess
        now = curve(1.0 - missed) - alarms
        if now.max() > 0.0:
            excess = now
        return bool(now.max() > 0.0)

    _least_rejected(family, rejects_any)
    one_missed, one_alarms = _errors(tested, thresholds[[np.argmax(excess)]], confidence)
    return _bound(family, lambda curve: bool(curve(1.0 - one_missed)[0] > one_alarms[0]), delta)


def many_run_gdp(
    in_scores: ArrayLike, out_scores: ArrayLike, delta: float, confidence: float = 0.95, *, seed: int = 0
) -> NoiseBound:
    """`many_run_fdp` for Gaussian noise without sampling: the mu-GDP route of Nasr et al. 2023 (arXiv 2302.07956).

    Its `mu` holds for any mechanism: it is not mu'-GDP for a smaller mu'. Its epsilon holds only where mu-GDP is the mechanism's own
    curve: Gaussian noise, or T steps of it without sampling. NOT for DP-SGD with sampling, whose epsilon it may overstate.

    Raises:
        ConfigError: a parameter is out of range, or scores are not finite numbers.
    """
    return many_run_fdp(in_scores, out_scores, delta, confidence, Gaussian(), seed=seed)


def _halves(
    in_scores: ArrayLike, out_scores: ArrayLike, confidence: float, seed: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(in, out) to choose on and (in, out) to test on, split at random: a caller's order may not be."""
    _confidence(confidence)
    random = np.random.default_rng(seed)
    both = []
    for scores in (in_scores, out_scores):
        mixed = random.permutation(_scores(scores))
        _require(len(mixed) >= 2, "there are at least two scores of each kind: one to choose on, one to test on")
        both.append((mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]))
    (in_chosen, in_tested), (out_chosen, out_tested) = both
    return (in_chosen, out_chosen), (in_tested, out_tested)


def _candidates(scores: tuple[Array, Array], confidence: float) -> tuple[Array, Array, Array]:
    """Thresholds to choose from, denser towards both ends, and their errors, each shape (thresholds,).

    Errors are bounded at a confidence that holds for all thresholds together: else the best is one of few scores and much luck.
    """
    thresholds = np.unique(np.concatenate(scores))
    if len(thresholds) > THRESHOLDS:
        near = np.geomspace(1, len(thresholds) / 2, THRESHOLDS // 2).astype(np.int64) - 1
        thresholds = thresholds[np.unique(np.concatenate([near, len(thresholds) - 1 - near]))]
    return thresholds, *_errors(scores, thresholds, 1.0 - (1.0 - confidence) / len(thresholds))


def _errors(scores: tuple[Array, Array], thresholds: Array, confidence: float) -> tuple[Array, Array]:
    """Upper bounds on missed members and false alarms of "in if at least the threshold", each shape (thresholds,)."""
    ins, outs = (np.sort(part) for part in scores)
    missed = np.searchsorted(ins, thresholds, side="left")
    alarms = len(outs) - np.searchsorted(outs, thresholds, side="left")
    return _clopper_pearson(missed, len(ins), confidence), _clopper_pearson(alarms, len(outs), confidence)


def _clopper_pearson(events: NDArray[np.int64], trials: int, confidence: float) -> Array:
    """Upper bounds that hold with a probability of 1 - (1 - confidence) / 2, as two of them are used together."""
    some = np.minimum(events, trials - 1)
    bound = special.betaincinv(some + 1.0, trials - some, 1.0 - (1.0 - confidence) / 2)
    return np.asarray(np.where(events < trials, bound, 1.0))


# --- One run, many canaries


def guesses(scores: ArrayLike, included: ArrayLike, top: int, bottom: int) -> int:
    """How many guesses are right that call the `top` highest scores members and the `bottom` lowest ones not.

    `top` and `bottom` are fixed before scores are seen: from a rehearsal of the claimed noise, or by `over_guesses`. Ties are broken
    at random by a fixed seed, since the order of canaries may tell who was in.

    Args:
        scores: shape (canaries,); higher means "was in".
        included: shape (canaries,), true where a fair coin of its own put the canary in.
        top: guesses of "in", at least 0.
        bottom: guesses of "out", at least 0; both together at most the canaries.

    Raises:
        ConfigError: shapes differ, scores are not finite numbers, or there are more guesses than canaries.
    """
    values, members = _scores(scores), np.asarray(included)
    _require(members.dtype == np.bool_ and members.shape == values.shape, "`included` has a true or false per score")
    _require(
        min(top, bottom) >= 0 and top + bottom <= len(values), f"{top} + {bottom} guesses on {len(values)} canaries"
    )
    order = np.lexsort((np.random.default_rng(0).permutation(len(values)), values))
    return int(members[order[len(values) - top :]].sum()) + int((~members[order[:bottom]]).sum())


def over_guesses(
    bound: Callable[[int, int, int, float], T],
    scores: ArrayLike,
    included: ArrayLike,
    tops_and_bottoms: Sequence[tuple[int, int]],
    confidence: float = 0.95,
) -> list[T]:
    """The bounds of several (top, bottom), of which the best may be taken: Bonferroni's correction is made.

    Args:
        bound: of correct, guesses, canaries and the corrected confidence, such as a lambda around `one_run_fdp`.
        scores: shape (canaries,).
        included: shape (canaries,), true where the canary was in.
        tops_and_bottoms: (top, bottom) of each policy, fixed beforehand; few, as each costs confidence.
        confidence: of all together.

    Raises:
        ConfigError: as `guesses`, or there is no policy.
    """
    _confidence(confidence)
    _require(len(tops_and_bottoms) > 0, "there is at least one (top, bottom)")
    each, canaries = 1.0 - (1.0 - confidence) / len(tops_and_bottoms), len(_scores(scores))
    return [
        bound(guesses(scores, included, top, bottom), top + bottom, canaries, each) for top, bottom in tops_and_bottoms
    ]


def one_run_steinke(correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """A lower bound on epsilon at `delta` of any mechanism from one run (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846).

    Each of the canaries is put in by a fair coin of its own, all are in one run, and `guesses` of them are guessed; the others are
    abstained from. The bound is the largest epsilon whose p-value by theorem 5.2 is at most 1 - confidence. It is tight for randomised
    response; for Gaussian noise it stays far below the truth however many canaries there are.

    Args:
        correct: guesses that are right.
        guesses: guesses of "in" and "out" together, a number that is fixed before scores are seen.
        canaries: all of them, guessed or not.
        delta: from 0 up to 1.
        confidence: the bound passes the true epsilon with a probability of at most 1 - confidence.

    Raises:
        ConfigError: counts are not 0 ≤ correct ≤ guesses ≤ canaries, or a parameter is out of range.
    """
    _confidence(confidence)
    if steinke_p_value(correct, guesses, canaries, 0.0, delta) > 1.0 - confidence:
        return 0.0
    low, high = 0.0, 1.0
    while steinke_p_value(correct, guesses, canaries, high, delta) <= 1.0 - confidence:
        low, high = high, 2.0 * high
    while high - low > 1e-9:
        middle = (low + high) / 2
        refuted = steinke_p_value(correct, guesses, canaries, middle, delta) <= 1.0 - confidence
        low, high = (middle, high) if refuted else (low, middle)
    return low


def steinke_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """At most how likely `correct` or more right guesses are if the mechanism is (epsilon, delta)-DP (theorem 5.2).

    With W binomial of `guesses` at e^ε / (1 + e^ε): P(W ≥ v) + 2 m δ max over i of P(v > W ≥ v - i) / i.

    Raises:
        ConfigError: counts are not 0 ≤ correct ≤ guesses ≤ canaries, or a parameter is out of range.
    """
    _counts(correct, guesses, canaries)
    _require(0.0 <= delta < 1.0, f"delta is from 0 up to 1, not {delta}")
    _require(epsilon >= 0.0, f"epsilon is at least 0, not {epsilon}")
    accuracy = float(special.expit(epsilon))
    p_value = float(stats.binom.sf(correct - 1, guesses, accuracy))
    if delta > 0.0 and correct > 0:
        below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
        p_value += 2.0 * canaries * delta * float(np.max(below / np.arange(1, correct + 1)))
    return min(p_value, 1.0)


def one_run_fdp(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95, family: Family | None = None
) -> NoiseBound:
    """An upper bound on the noise of a mechanism of `family`, and by that a lower one on its epsilon, from one run.

    Mahloujifar, Melis, Chaudhuri 2024 (arXiv 2410.22235). Canaries and guesses are as in `one_run_steinke`. What is rejected is
    "the mechanism is at least as private as this noise", for a whole curve; it is tighter than one (epsilon, delta). A gap to the truth
    stays however many canaries there are: a curve alone does not exclude a mechanism that on rare runs leaks all of them together.
    That epsilon is at least so much holds within the family: give `Poisson` for DP-SGD.

    Args:
        correct: guesses that are right.
        guesses: guesses of "in" and "out" together, a number that is fixed before scores are seen.
        canaries: all of them, guessed or not.
        delta: between 0 and 1.
        confidence: the bound passes the true epsilon of a mechanism of the family with a probability of at most 1 - confidence.
        family: the mechanism's own; `Gaussian()` if none is given.

    Raises:
        ConfigError: counts are not 0 ≤ correct ≤ guesses ≤ canaries, or a parameter is out of range.
    """
    _confidence(confidence)
    _counts(correct, guesses, canaries)
    _require(0.0 < delta < 1.0, f"delta is between 0 and 1, not {delta}")
    chance = 1.0 - confidence
    return _bound(family or Gaussian(), lambda curve: _unlikely(correct, guesses, canaries, curve, chance), delta)


def _unlikely(correct: int, guesses: int, canaries: int, curve: Curve, chance: float) -> bool:
    """Whether `correct` or more right guesses are less likely than `chance` under a curve.

    Let p_j be the chance of j right guesses, r_i the sum of j p_j / m over j ≥ i, and h_i that of (c - j) p_j / m, with c guesses on m
    canaries. "Canary k is guessed right, and at least i + 1 are" becomes "canary k is guessed wrong, and at least i are" when its coin is
    turned; so r_(i+1) found cost h_i ≥ curve(r_(i+1)) alarms, averaged over canaries and coins by convexity. If `correct` or more had the
    given chance, then least mass lies at `correct`, and these inequalities force mass below it, one count after the other. Past a
    total of 1 there is a contradiction. Once no mass is forced, none is further down.
    """
    found, alarms = chance * correct / canaries, chance * (guesses - correct) / canaries
    for right in range(correct - 1, -1, -1):
        least = float(curve(found))
        if least <= alarms:
            return False
        found += right / (guesses - right) * (least - alarms)
        alarms = least
        if (found + alarms) * canaries > guesses:
            return True
    return False


# --- Inputs


def _require(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ConfigError(otherwise)


def _confidence(confidence: float) -> None:
    _require(0.0 < confidence < 1.0, f"a confidence is between 0 and 1, not {confidence}")


def _counts(correct: int, guesses: int, canaries: int) -> None:
    _require(
        0 <= correct <= guesses <= canaries and canaries >= 1,
        f"{correct} right of {guesses} guesses on {canaries} canaries: none may be less than the one before, and there is a canary",
    )


def _scores(scores: ArrayLike) -> Array:
    values = np.asarray(scores, dtype=np.float64)
    _require(values.ndim == 1 and len(values) > 0 and np.isfinite(values).all(), "scores are a list of finite numbers")
    return values
