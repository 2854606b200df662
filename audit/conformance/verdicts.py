"""From evidence to findings; pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from audit.conformance.evidence import (
    ALARM,
    BEYOND_MEASURE,
    DISTINCT,
    TOLERANCE,
    Bookkeeping,
    ConformanceEvidence,
)
from audit.findings import Finding
from audit.independence import (
    chance_of_likeness,
)


def judge(evidence: ConformanceEvidence) -> list[Finding]:
    """What the evidence says; a pure function."""
    return [
        _judge_noise(evidence),
        _judge_reuse(evidence),
        _judge_influence(evidence),
        _judge_sampling(evidence),
        _judge_bookkeeping(evidence.bookkeeping),
        _judge_leaks(evidence),
    ]


def _finding(name: str, promise: str, broken: Sequence[str], detail: str) -> Finding:
    return Finding("training", name, promise, "broken" if broken else "held", "; ".join(broken) or detail)


def _judge_noise(evidence: ConformanceEvidence) -> Finding:
    name, promise = "noise", "every private parameter, and every direction, gets Gaussian noise of the agreed scale"
    if evidence.noise_multiplier == 0.0:
        return Finding(
            "training", name, promise, "not testable", "the agreement has no noise, so there is no privacy to audit"
        )
    broken = []
    for parameter in evidence.noise:
        # count * mean_square is chi-squared with `count` degrees of freedom
        if stats.chi2.cdf(parameter.count * parameter.mean_square, parameter.count) < ALARM:
            scale = math.sqrt(parameter.mean_square)
            broken.append(f"{parameter.name} has {scale:.3f} times the agreed noise ({parameter.count} values)")
    for family in evidence.directions:
        if stats.chi2.cdf(family.count * family.mean_square, family.count) < ALARM / len(evidence.directions):
            broken.append(f"{family.name}: {math.sqrt(family.mean_square):.3f} times the agreed noise")
    least = min((math.sqrt(parameter.mean_square) for parameter in evidence.noise), default=0.0)
    weakest = min((math.sqrt(family.mean_square) for family in evidence.directions), default=0.0)
    steps = len(evidence.step_mean_squares)
    for number, mean_square in enumerate(evidence.step_mean_squares, start=1):
        values = evidence.noise_values // steps
        if stats.chi2.cdf(values * mean_square, values) < ALARM / steps:
            broken.append(f"step {number} has {math.sqrt(mean_square):.3f} times the agreed noise")
    if stats.kstwo.sf(evidence.kolmogorov_smirnov, max(1, evidence.noise_values)) < ALARM:
        broken.append(f"the noise is not Gaussian: Kolmogorov-Smirnov distance {evidence.kolmogorov_smirnov:.4f}")
    detail = (
        f"{evidence.noise_values} values in {steps} steps; least scale on a parameter {least:.3f} of the agreed one, in "
        f"{len(evidence.directions)} families of directions {weakest:.3f}, "
        f"Kolmogorov-Smirnov distance {evidence.kolmogorov_smirnov:.2g}"
    )
    return _finding(name, promise, _shortened(broken), detail)


def _shortened(broken: Sequence[str], most: int = 3) -> list[str]:
    rest = len(broken) - most
    return [*broken[:most], *([f"and {rest} more"] if rest > 0 else [])]


def _judge_reuse(evidence: ConformanceEvidence) -> Finding:
    name, promise = "fresh noise", "no noise is used twice, in two steps, on two parameters or after a restart"
    if evidence.noise_multiplier == 0.0:
        return Finding("training", name, promise, "not testable", "the agreement has no noise")
    steps = max(2, len(evidence.step_mean_squares))
    values = max(1, evidence.noise_values // steps)
    limit = float(stats.norm.isf(ALARM / (steps * (steps + 1)))) / math.sqrt(values)
    broken = []
    worst = max(evidence.step_correlations, key=abs, default=0.0)
    if abs(worst) > limit:
        broken.append(f"the noise of two steps has correlation {worst:.3f}")
    if evidence.distinct_values < DISTINCT * evidence.empty_values:
        broken.append(f"of {evidence.empty_values} values of noise only {evidence.distinct_values} are different ones")
    if abs(evidence.start_correlation) > limit:
        broken.append(f"the noise after a restart has correlation {evidence.start_correlation:.3f} with that before")
    for one in evidence.likeness:
        if chance_of_likeness(one, steps) < ALARM / len(evidence.likeness):
            times = one.square_sum * one.values / (steps * (steps - 1) / 2)
            broken.append(f"{one.name}: steps are {times:.2f} times as like each other as independent noise")
    shift, most = evidence.shifts, float(stats.norm.isf(ALARM / 2 / max(1, evidence.shifts.count)))
    if abs(shift.deviation) > most:
        broken.append(f"the noise goes with that {shift.largest} values further on: {shift.deviation:.1f} deviations")
    detail = f"largest correlation of steps {worst:.2g}, of restarts {evidence.start_correlation:.2g}, chance allows {limit:.2g}; "
    detail += f"of {shift.count} shifts {shift.deviation:.1f} deviations, chance allows {most:.1f}"
    return _finding(name, promise, _shortened(broken), detail)


def _told(norm: float) -> str:
    return f"{norm:.4f}" if norm < BEYOND_MEASURE else "infinitely many"


def _judge_influence(evidence: ConformanceEvidence) -> Finding:
    if not evidence.influences:
        raise ValueError("nobody's influence was measured")
    largest = max(evidence.influences, key=lambda influence: math.inf if math.isnan(influence.norm) else influence.norm)
    broken = []
    if not largest.norm <= 1.0 + TOLERANCE:
        broken.append(f"one unit moved the sum by {_told(largest.norm)} times the clip norm ({largest.unit})")
    others = max((influence.norm for influence in evidence.others_moved), default=0.0)
    if others != 0.0:
        broken.append(f"leaving out one unit moved what the others add to the sum, by {others:.2g} times the clip norm")
    detail = f"{len(evidence.influences)} units; the sum moved by at most {_told(largest.norm)} times the clip norm ({largest.unit})"
    return _finding(
        "sensitivity",
        f"one {evidence.unit} moves the sum by at most the clip norm, over all parameters, and nothing of what others add to it",
        broken,
        detail,
    )


def _judge_sampling(evidence: ConformanceEvidence) -> Finding:
    name, promise = (
        "sampling",
        f"every {evidence.unit} is in a sample by its own coin, of the agreed sample rate, at every step",
    )
    sampling, q = evidence.sampling, evidence.sample_rate
    n, steps, sizes = sampling.units, len(sampling.sizes), np.array(sampling.sizes)
    broken = []
    if n != sampling.expected_units:
        broken.append(f"{n} units are sampled, but the data have {sampling.expected_units} by the agreement")
    found = f"mean sample {sizes.mean():.2f} of {n} at rate {q:g}, variance {sizes.var():.2f}"
    if q == 1.0:
        broken += [] if (sizes == n).all() else [f"not everybody is in every sample: {found}"]
        return _finding(name, promise, broken, "everybody is in every sample")
    if stats.binomtest(int(sizes.sum()), n * steps, q).pvalue < ALARM:
        broken.append(f"the sample rate is {sizes.sum() / (n * steps):.4f}, not {q:g}")
    if _chance(sizes, n, q) < ALARM:
        broken.append(f"sizes of samples are not those of independent coins: {found}, coins have {n * q * (1 - q):.2f}")
    if _chance(np.array(sampling.inclusions), steps, q) < ALARM:
        broken.append("units are not all sampled alike")
    chances = _chances_again(sampling.overlaps, n, steps, q)
    worst = min(range(steps - 1), key=lambda lag: chances[lag])
    if chances[worst] < ALARM / (steps - 1):
        expected = n * (steps - worst - 1) * q * q
        broken.append(
            f"units are in two samples {worst + 1} apart {sampling.overlaps[worst]} times, coins give {expected:.0f}"
        )
    detail = f"{steps} steps; {found} (coins: {n * q * (1 - q):.2f})"
    half = steps // 2  # as in samples that come back after so many steps: can that be told?
    if _chances_again([round(n * q * (steps - lag)) for lag in range(1, steps)], n, steps, q)[half] >= ALARM / steps:
        detail += "; whether samples come back could not be tested, since too few units are in two of them"
    return _finding(name, promise, broken, detail)


def _chances_again(overlaps: Sequence[int], units: int, steps: int, rate: float) -> NDArray[np.float64]:
    """For each lag 1, 2, ... a bound on the probability that coins put units so often, or so seldom, into two samples that far apart.

    Chernoff's, from the exact law: a unit's coins at t, t + lag, t + 2 lag, ... are a chain of pairs, and the logarithm of
    E[exp(slope times the pairs of heads)] follows along it from one coin to the next. It holds for any slope, so some will do.
    """
    slopes = np.logspace(-5, 1.5, 200)
    slopes = np.concatenate([-slopes, slopes])
    tails, heads = np.full(len(slopes), 1.0 - rate), np.full(len(slopes), rate)
    log, logs = (
        np.zeros(len(slopes)),
        [np.zeros(len(slopes)), np.zeros(len(slopes))],
    )  # of chains of no coin, and of one
    for _ in range(steps):
        tails, heads = (1.0 - rate) * (tails + heads), rate * (tails + np.exp(slopes) * heads)
        total = tails + heads
        log, tails, heads = log + np.log(total), tails / total, heads / total
        logs.append(log)
    found = []
    for lag, overlap in enumerate(overlaps, start=1):
        coins, longer = divmod(steps, lag)  # so many chains have one coin more
        moment = units * ((lag - longer) * logs[coins] + longer * logs[coins + 1])
        found.append(min(1.0, 2.0 * math.exp(min(0.0, float((moment - slopes * overlap).min())))))
    return np.array(found)


def _chance(counts: NDArray[np.int64], trials: int, rate: float) -> float:
    """A bound on the probability that independent Binomial(trials, rate) counts are spread so much, or so little (Chernoff).

    From the exact distribution, so that it holds for any number of trials: the least over lambda of E[exp(lambda (S - s))] for the sum S
    of squared deviations and the s that was seen, for both directions.
    """
    mean, variance = trials * rate, trials * rate * (1.0 - rate)
    every = np.arange(trials + 1)
    probability, deviation = stats.binom.logpmf(every, trials, rate), (every - mean) ** 2 / variance
    seen = float(((counts - mean) ** 2 / variance).sum())

    def bound(slope: float) -> float:
        return float(len(counts) * logsumexp(probability + slope * deviation) - slope * seen)

    ends = (-100.0, 0.0) if seen < len(counts) else (0.0, 10.0)
    found = minimize_scalar(bound, bounds=ends, method="bounded")
    return min(1.0, 2.0 * math.exp(min(0.0, float(found.fun))))


def _judge_bookkeeping(seen: Bookkeeping) -> Finding:
    same = len({seen.touched, seen.moved, seen.booked, seen.reported, seen.agreed}) == 1
    told = (
        f"{seen.touched} steps touched records, {seen.moved} changed parameters, {seen.booked} were booked, "
        f"{seen.reported} reported, {seen.agreed} agreed"
    )
    return _finding(
        "bookkeeping", "every step is booked, and no more are taken than agreed", [] if same else [told], told
    )


def _judge_leaks(evidence: ConformanceEvidence) -> Finding:
    broken = [
        f"with noise in the place of the noised sum, these still depend on the records: {', '.join(_shortened(evidence.leaks))}"
    ]
    detail = f"{evidence.compared} values are the same to the bit for two sets of records, once the noised sum is replaced by noise"
    return _finding(
        "side channels",
        "records reach nothing but through the clipped and noised sum",
        broken if evidence.leaks else [],
        detail,
    )
