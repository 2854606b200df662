"""Lower bounds on epsilon: known answers, coverage on simulated mechanisms, how close they come, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
from scipy import stats

from audit.lower_bounds import (
    Gaussian,
    NoiseBound,
    Poisson,
    _clopper_pearson,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    guesses,
    many_run,
    many_run_fdp,
    many_run_gdp,
    one_run_fdp,
    one_run_steinke,
    over_guesses,
    steinke_p_value,
)
from keys.errors import ConfigError

DELTA = 1e-5
SAMPLED = Poisson(0.2, 5)
NOISE = 1.0

JAX_PRIVACY = [
    (1000, 1000, 600, 0.05, 1e-5, 0.2972269576, 0.5835403679),
    (1000, 100, 90, 0.05, 1e-5, 1.6261436787, 2.4564050672),
    (500, 100, 100, 0.05, 1e-5, 3.4791952950, 6.1217541909),
    (10000, 1000, 950, 0.05, 1e-5, 2.6909964769, 3.8024442260),
    (100000, 1000, 1000, 0.01, 1e-6, 4.2763383429, 7.0283842141),
    (100, 20, 20, 0.05, 1e-3, 1.4762817090, 2.2751305265),
    (5000, 5000, 4000, 0.10, 1e-5, 1.3402181497, 2.6695904361),
    (100000, 60000, 50000, 0.05, 1e-5, 1.5906603928, 2.5178160001),
    (1, 1, 1, 0.60, 1e-5, 0.4054317743, 2.0229195838),
    (1, 1, 1, 0.05, 1e-5, 0.0, 0.0),
]
"""Canaries, guesses, correct, 1 - confidence, delta; epsilon by Steinke et al. and by Mahloujifar et al. with a Gaussian curve.

From jax-privacy 2.0.0 (`jax_privacy.auditing`, which finds epsilon to 1e-6), run on these inputs.
"""


XIANG = [
    (1000, 100, 26, 0.6519),
    (1000, 1000, 401, 0.2931),
    (10_000, 1000, 97, 2.0466),
    (10_000, 5000, 202, 3.0457),
    (100_000, 10_000, 51, 4.8674),
    (100_000, 10_000, 967, 2.1713),
    (100_000, 50_000, 17_213, 0.6283),
    (100_000, 100_000, 15_866, 1.6535),
    (1000, 500, 199, 0.2594),
    (10_000, 2500, 776, 0.7254),
]
"""Canaries, guesses, wrong ones; epsilon by Steinke et al. at delta 1e-5 and 95 %, as Xiang et al. (arXiv 2509.08704) compute it.

From `compare/RESULTS.txt` of github.com/zihangxiang/tight-privacy-audit-in-one-run, which finds epsilon to about 2 in a thousand.
"""

MAHLOUJIFAR = [(4.0, 10**6, 0.61, 0.82), (2.0, 10**5, 1.33, 1.59), (1.0, 10**5, 2.61, 3.61), (0.5, 10**5, 4.99, 8.16)]
"""Noise, canaries; epsilon by Steinke et al. and by their own bound, for as many right guesses as one expects (ICML 2025, table 1)."""


def gaussian_scores(random: np.random.Generator, members: np.ndarray, mu: float) -> np.ndarray:
    """What Gaussian noise without sampling shows of canaries that are orthogonal to each other."""
    return np.asarray(random.normal(0.0, 1.0 / mu, len(members)) + members)


def sampled_scores(random: np.random.Generator, members: np.ndarray, noise: float = NOISE) -> np.ndarray:
    """The log-likelihood ratio, the best attack there is, on sampled noise: orthogonal canaries."""
    rate, shape = SAMPLED.sample_rate, (len(members), SAMPLED.steps)
    seen = random.normal(0.0, noise, shape) + (random.random(shape) < rate) * members[:, None]
    return np.asarray(np.log1p(rate * np.expm1((2.0 * seen - 1.0) / (2.0 * noise**2))).sum(axis=1))


def coins(random: np.random.Generator, count: int) -> np.ndarray:
    return np.asarray(random.random(count) < 0.5)


def compatible(above: int, audits: int, chance: float = 0.05) -> bool:
    """Whether so many bounds above the truth are what a true chance of at most `chance` gives (at a significance of 1 / 1000)."""
    return above <= stats.binom.ppf(0.999, audits, chance)


# --- mu, epsilon and delta


@pytest.mark.parametrize("delta", [1e-300, 1e-30, 1e-10, 1e-5, 0.01, 0.3])
@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 4.0, 40.0])
def test_conversions_go_there_and_back(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon == 0.0:
        assert gaussian_delta(mu, 0.0) <= delta
        return
    assert math.log(gaussian_delta(mu, epsilon)) == pytest.approx(math.log(delta), rel=1e-8, abs=1e-6)
    assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-6)


def test_conversions_have_known_values() -> None:
    assert gaussian_delta(1.0, 0.0) == pytest.approx(2 * stats.norm.cdf(0.5) - 1, rel=1e-12)  # total variation
    assert gaussian_delta(1.0, 1.0) == pytest.approx(stats.norm.cdf(-0.5) - math.e * stats.norm.cdf(-1.5), rel=1e-12)
    assert gaussian_epsilon(math.sqrt(30) / 5, 1e-6) == pytest.approx(5.423, abs=1e-3)  # as in test_budget_commands
    assert gaussian_epsilon(0.0, DELTA) == gaussian_delta(0.0, 1.0) == 0.0
    assert gaussian_epsilon(1.0, 0.0) == math.inf


# --- Curves


def test_without_sampling_both_families_have_one_curve() -> None:
    found = np.linspace(0.0, 1.0, 101)
    for noise in (0.7, 2.0):
        ours, theirs = (family.curve(noise) for family in (Poisson(1.0, 1), Gaussian()))
        assert ours is not None
        assert ours(found) == pytest.approx(theirs(found), abs=2e-3)
        assert (ours(found) <= theirs(found) + 1e-12).all()


def test_a_curve_of_sampled_noise_is_below_what_its_best_attack_reaches() -> None:
    """Below, as no attack may pass it; and close, in both directions, as the likelihood ratio is the best."""
    random, count = np.random.default_rng(1), 200_000
    ins, outs = (sampled_scores(random, np.full(count, member)) for member in (True, False))
    curve = SAMPLED.curve(NOISE)
    assert curve is not None
    for threshold in (-2.0, -1.0, 0.0, 1.0, 3.0):
        found, alarms = float((ins >= threshold).mean()), float((outs >= threshold).mean())
        error = 5.0 * math.sqrt(max(alarms * (1.0 - alarms), found * (1.0 - found)) / count)
        assert float(curve(found)) <= alarms + error
        assert float(curve(found)) >= alarms - 0.08  # it is the hull of two unequal directions


def test_a_curve_that_takes_minutes_is_not_computed_and_rejects_nothing() -> None:
    """100 steps without sampling are one step with a tenth of the noise."""
    heavy = Poisson(1.0, 100)
    assert heavy.curve(0.3) is None
    assert heavy.curve(0.1) is None  # out of the accountant's range
    ours, plain = (one_run_fdp(100, 100, 100, DELTA, 0.95, family) for family in (heavy, Gaussian()))
    assert plain.noise_multiplier <= ours.noise_multiplier / 10 == pytest.approx(plain.noise_multiplier, rel=5e-3)
    assert ours.epsilon == pytest.approx(plain.epsilon, rel=1e-2)


# --- One run: known answers


@pytest.mark.parametrize(("canaries", "guessed", "correct", "chance", "delta", "steinke", "fdp"), JAX_PRIVACY)
def test_the_answers_are_those_of_an_independent_implementation(
    canaries: int, guessed: int, correct: int, chance: float, delta: float, steinke: float, fdp: float
) -> None:
    assert one_run_steinke(correct, guessed, canaries, delta, 1 - chance) == pytest.approx(steinke, abs=3e-6)
    assert one_run_fdp(correct, guessed, canaries, delta, 1 - chance).epsilon == pytest.approx(fdp, abs=3e-6)


@pytest.mark.parametrize(("canaries", "guessed", "wrong", "steinke"), XIANG)
def test_the_answers_are_those_of_another_paper(canaries: int, guessed: int, wrong: int, steinke: float) -> None:
    assert one_run_steinke(guessed - wrong, guessed, canaries, DELTA) == pytest.approx(steinke, rel=2.5e-3)


@pytest.mark.parametrize(("noise", "canaries", "steinke", "fdp"), MAHLOUJIFAR)
def test_the_bounds_are_near_those_published(noise: float, canaries: int, steinke: float, fdp: float) -> None:
    """Whose choice of guesses is not told: ours is the best of some. Their own bound they compute more tightly than we or jax-privacy."""
    ours, curves = [], []
    for end in np.linspace(0.5, 3.5, 13) + 0.5 / noise:  # guesses are the scores that are so far from the middle
        found, alarms = stats.norm.sf(end - 0.5 / noise), stats.norm.sf(end + 0.5 / noise)
        guessed, correct = round((found + alarms) * canaries), round(found * canaries)
        ours.append(one_run_steinke(correct, guessed, canaries, DELTA))
        curves.append(one_run_fdp(correct, guessed, canaries, DELTA).epsilon)
    assert max(ours) == pytest.approx(steinke, rel=0.04)
    assert 0.85 * fdp < max(curves) < fdp


def test_p_values_by_hand() -> None:
    q = math.e / (1 + math.e)
    assert steinke_p_value(1, 1, 1, 1.0, 0.0) == pytest.approx(q)
    # W is 0 with 1 - q, so P(1 > W >= 0) = 1 - q, and 2 m delta of that is added
    assert steinke_p_value(1, 1, 3, 1.0, 0.01) == pytest.approx(q + 2 * 3 * 0.01 * (1 - q))
    # of 2 guesses 2 right: i = 1 gives 2 q (1 - q), i = 2 gives (1 - q^2) / 2
    assert steinke_p_value(2, 2, 2, 1.0, 0.01) == pytest.approx(
        q**2 + 2 * 2 * 0.01 * max(2 * q * (1 - q), (1 - q**2) / 2)
    )
    assert steinke_p_value(100, 100, 500, 0.0, 0.0) == pytest.approx(2.0**-100)
    assert steinke_p_value(0, 10, 10, 0.0, 0.0) == 1.0


def test_without_delta_the_bound_is_that_of_a_binomial() -> None:
    """All of r right: accuracy is at least 0.05^(1/r)."""
    accuracy = 0.05 ** (1 / 100)
    assert one_run_steinke(100, 100, 100, 0.0) == pytest.approx(math.log(accuracy / (1 - accuracy)), abs=1e-8)
    assert one_run_steinke(90, 100, 100, 0.0) == one_run_steinke(90, 100, 10**6, 0.0)


def test_one_canary_by_hand() -> None:
    """One right guess at 40 % confidence: chance 0.6 of it forces a chance of Φ(Φ⁻¹(0.6) − mu) of the wrong one, above 0.4."""
    bound = one_run_fdp(1, 1, 1, DELTA, 0.4)
    assert bound.mu == pytest.approx(2 * stats.norm.ppf(0.6), rel=1e-6)
    assert bound.epsilon == pytest.approx(gaussian_epsilon(bound.mu, DELTA))


@pytest.mark.parametrize("family", [Gaussian(), SAMPLED], ids=["gaussian", "poisson"])
def test_more_right_guesses_show_more(family: Gaussian | Poisson) -> None:
    counts = (0, 50, 80, 100)
    curves = [one_run_fdp(correct, 100, 1000, DELTA, 0.95, family).epsilon for correct in counts]
    pure = [one_run_steinke(correct, 100, 1000, DELTA) for correct in counts]
    for found in (curves, pure):
        assert found[0] == found[1] == 0.0 < found[2] < found[3]
    assert one_run_fdp(80, 100, 1000, DELTA, 0.99, family).epsilon < curves[2]


def test_more_canaries_without_guesses_show_less() -> None:
    assert one_run_steinke(90, 100, 10_000, DELTA) < one_run_steinke(90, 100, 100, DELTA)


def test_nothing_guessed_shows_nothing() -> None:
    assert one_run_steinke(0, 0, 10, DELTA) == 0.0
    for family in (Gaussian(), SAMPLED):
        assert one_run_fdp(0, 0, 10, DELTA, family=family) == NoiseBound(math.inf, 0.0)
    assert NoiseBound(math.inf, 0.0).mu == 0.0


# --- Guesses


def test_guesses_are_counted() -> None:
    scores, members = [0.1, 0.9, 0.5, 0.7, 0.2, 0.3], np.array([False, True, True, False, True, False])
    assert guesses(scores, members, 0, 0) == 0
    assert guesses(scores, members, 1, 1) == 2
    assert guesses(scores, members, 2, 2) == 2
    assert guesses(scores, members, 3, 3) == 4


def test_ties_do_not_tell_who_was_in() -> None:
    """Members listed first or last, all scores equal: half of the guesses are right."""
    members = np.arange(10_000) < 5000
    for order in (members, ~members):
        assert guesses(np.zeros(10_000), order, 2000, 2000) == pytest.approx(2000, abs=150)


def test_the_best_of_several_guesses_pays_for_it() -> None:
    members = np.arange(1000) < 500
    bound = partial(_steinke, delta=DELTA)
    found = over_guesses(bound, -np.arange(1000.0), members, [(10, 0), (100, 100)])
    assert found == [one_run_steinke(10, 10, 1000, DELTA, 0.975), one_run_steinke(200, 200, 1000, DELTA, 0.975)]


def _steinke(correct: int, guessed: int, canaries: int, confidence: float, *, delta: float) -> float:
    return one_run_steinke(correct, guessed, canaries, delta, confidence)


# --- Many runs


def test_perfect_scores_show_what_their_number_allows() -> None:
    """50 of each half without an error: both errors are below 1 - 0.025^(1/50)."""
    error = 1 - 0.025 ** (1 / 50)
    ins, outs = np.ones(100), np.zeros(100)
    for delta in (0.0, 0.01):
        assert many_run(ins, outs, delta) == pytest.approx(math.log((1 - delta - error) / error))
    bound = many_run_gdp(ins, outs, DELTA)
    assert bound.mu == pytest.approx(2 * -stats.norm.ppf(error), rel=1e-6)
    assert bound.epsilon == pytest.approx(gaussian_epsilon(bound.mu, DELTA))


def test_errors_are_bounded_as_by_an_independent_implementation() -> None:
    """Clopper-Pearson at 0.025 each, from jax-privacy 2.0.0."""
    assert _clopper_pearson(np.array([10, 80, 100]), 100, 0.95) == pytest.approx([0.1762225977, 0.8733444479, 1.0])
    assert _clopper_pearson(np.array([0]), 50, 0.95) == pytest.approx([0.0711217365])


def test_scores_without_a_signal_show_nothing() -> None:
    same = np.zeros(1000)
    assert many_run(same, same, DELTA) == 0.0
    assert many_run_gdp(same, same, DELTA) == NoiseBound(math.inf, 0.0)
    assert many_run([0.0, 0.0], [0.0, 0.0], DELTA) == 0.0


def test_with_enough_runs_the_bounds_are_near_the_truth() -> None:
    random = np.random.default_rng(2)
    ins, outs = (gaussian_scores(random, np.full(200_000, member), 1.0) for member in (True, False))
    assert 0.95 * gaussian_epsilon(1.0, DELTA) < many_run_gdp(ins, outs, DELTA).epsilon < gaussian_epsilon(1.0, DELTA)
    assert 0.85 * gaussian_epsilon(1.0, 0.1) < many_run(ins, outs, 0.1) < gaussian_epsilon(1.0, 0.1)


def test_with_enough_runs_sampled_noise_is_found() -> None:
    random = np.random.default_rng(3)
    ins, outs = (sampled_scores(random, np.full(100_000, member)) for member in (True, False))
    bound = many_run_fdp(ins, outs, DELTA, family=SAMPLED)
    assert NOISE <= bound.noise_multiplier < 1.15 * NOISE
    truth = SAMPLED.epsilon(NOISE, DELTA)
    assert 0.75 * truth < bound.epsilon <= truth


def test_the_plain_curve_overstates_sampled_noise() -> None:
    """Why `Poisson` exists: mu read off the curve of a sampled mechanism gives more than its true epsilon."""
    lonely = Poisson(0.01, 1)
    truth = lonely.epsilon(0.4, 0.003)
    curve = lonely.curve(0.4)
    assert curve is not None
    found = 0.005
    mu = stats.norm.ppf(found) - stats.norm.ppf(float(curve(found)))
    assert gaussian_epsilon(mu, 0.003) > 1.2 * truth


# --- Coverage: how often a bound is above the truth


MANY: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "epsilon, delta": lambda ins, outs: many_run(ins, outs, 0.01),
    "mu": lambda ins, outs: many_run_gdp(ins, outs, 0.01).epsilon,
}


@pytest.mark.parametrize("method", MANY)
@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_many_runs_cover(method: str, mu: float) -> None:
    random, truth = np.random.default_rng(4), gaussian_epsilon(mu, 0.01)
    found = [
        MANY[method](*(gaussian_scores(random, np.full(500, member), mu) for member in (True, False)))
        for _ in range(200)
    ]
    assert compatible(sum(epsilon > truth for epsilon in found), 200)
    assert max(found) > 0.0


def test_laplace_noise_is_covered_only_because_scores_are_split() -> None:
    """Every threshold in the tails is as good as any, so the best of all of them on the same scores is the luckiest.

    At a confidence of 1/2, where luck shows.
    """
    random, truth, split, same = np.random.default_rng(5), 1.0, 0, 0
    for _ in range(200):
        ins, outs = np.sort(random.laplace(1.0, 1.0, 500)), np.sort(random.laplace(0.0, 1.0, 500))
        split += many_run(ins, outs, 0.0, 0.5) > truth
        missed, alarms = np.searchsorted(ins, outs[1:]), np.arange(499, 0, -1)
        upper = [stats.beta.ppf(0.75, k + 1, np.maximum(500 - k, 1)) for k in (missed, alarms)]
        same += max(np.log((1 - upper[0]) / upper[1]).max(), np.log((1 - upper[1]) / upper[0]).max()) > truth
    assert compatible(split, 200, 0.5)
    assert not compatible(same, 200, 0.5)


@pytest.mark.parametrize(("top", "bottom"), [(20, 0), (50, 50), (500, 500)])
def test_one_run_covers_plain_noise(top: int, bottom: int) -> None:
    random, mu = np.random.default_rng(6), 1.5
    truth, steinke, fdp = gaussian_epsilon(mu, DELTA), [], []
    pure = cache(lambda correct: one_run_steinke(correct, top + bottom, 1000, DELTA))
    curve = cache(lambda correct: one_run_fdp(correct, top + bottom, 1000, DELTA).epsilon)
    for _ in range(200):
        members = coins(random, 1000)
        correct = guesses(gaussian_scores(random, members, mu), members, top, bottom)
        steinke.append(pure(correct))
        fdp.append(curve(correct))
    assert compatible(sum(epsilon > truth for epsilon in steinke), 200)
    assert compatible(sum(epsilon > truth for epsilon in fdp), 200)
    assert np.mean(fdp) > np.mean(steinke) > 0.0


def test_one_run_covers_randomised_response_where_it_is_tight() -> None:
    random, truth = np.random.default_rng(7), 2.0
    correct = random.binomial(1000, 1 / (1 + math.exp(-truth)), 200)
    found = [one_run_steinke(int(right), 1000, 1000, 0.0) for right in correct]
    assert sum(epsilon > truth for epsilon in found) > 0
    assert compatible(sum(epsilon > truth for epsilon in found), 200)
    assert np.mean(found) > 0.9 * truth


def test_one_run_covers_sampled_noise() -> None:
    random, truth = np.random.default_rng(8), SAMPLED.epsilon(NOISE, DELTA)
    bound = cache(lambda correct: one_run_fdp(correct, 12, 1000, DELTA, 0.95, SAMPLED))
    found: list[NoiseBound] = []
    for _ in range(200):
        members = coins(random, 1000)
        found.append(bound(guesses(sampled_scores(random, members), members, 12, 0)))
    assert compatible(sum(bound.epsilon > truth for bound in found), 200)
    assert all((bound.epsilon > truth) == (bound.noise_multiplier < NOISE) for bound in found)
    assert np.mean([bound.epsilon for bound in found]) > 0.1 * truth


def test_many_canaries_bring_one_run_nearer_but_not_to_the_truth() -> None:
    random, mu = np.random.default_rng(9), gaussian_mu(4.0, DELTA)
    members = coins(random, 100_000)
    correct = guesses(gaussian_scores(random, members, mu), members, 250, 250)
    assert 0.7 * 4.0 < one_run_fdp(correct, 500, 100_000, DELTA).epsilon < 4.0
    assert 0.5 * 4.0 < one_run_steinke(correct, 500, 100_000, DELTA) < 0.65 * 4.0


# --- What is refused


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: one_run_steinke(2, 1, 10, DELTA),
        lambda: one_run_steinke(-1, 1, 10, DELTA),
        lambda: one_run_steinke(1, 11, 10, DELTA),
        lambda: one_run_steinke(0, 0, 0, DELTA),
        lambda: one_run_steinke(1, 1, 10, 1.0),
        lambda: one_run_steinke(1, 1, 10, -0.1),
        lambda: one_run_steinke(1, 1, 10, DELTA, 1.0),
        lambda: one_run_steinke(1, 1, 10, DELTA, math.nan),
        lambda: steinke_p_value(1, 1, 10, -1.0, DELTA),
        lambda: one_run_fdp(2, 1, 10, DELTA),
        lambda: one_run_fdp(1, 1, 10, 0.0),
        lambda: one_run_fdp(1, 1, 10, math.nan),
        lambda: one_run_fdp(1, 1, 10, DELTA, 0.0),
        lambda: many_run([1.0], [0.0, 0.0], DELTA),
        lambda: many_run([1.0, math.nan], [0.0, 0.0], DELTA),
        lambda: many_run([1.0, math.inf], [0.0, 0.0], DELTA),
        lambda: many_run([[1.0, 2.0]], [0.0, 0.0], DELTA),
        lambda: many_run([], [0.0, 0.0], DELTA),
        lambda: many_run([1.0, 1.0], [0.0, 0.0], 1.0),
        lambda: many_run_gdp([1.0, 1.0], [0.0, 0.0], 0.0),
        lambda: many_run_gdp([1.0, 1.0], [0.0, 0.0], DELTA, 2.0),
        lambda: guesses([1.0, 2.0], [True], 1, 0),
        lambda: guesses([1.0, 2.0], [1, 0], 1, 0),
        lambda: guesses([1.0, 2.0], [True, False], 2, 1),
        lambda: guesses([1.0, 2.0], [True, False], -1, 1),
        lambda: over_guesses(lambda *_: 0.0, [1.0], [True], []),
        lambda: Poisson(0.0, 1),
        lambda: Poisson(1.1, 1),
        lambda: Poisson(0.5, 0),
        lambda: gaussian_epsilon(-1.0, DELTA),
        lambda: gaussian_epsilon(1.0, 1.0),
        lambda: gaussian_mu(math.inf, DELTA),
        lambda: gaussian_mu(1.0, 0.0),
        lambda: gaussian_delta(1.0, -1.0),
        lambda: gaussian_delta(math.nan, 1.0),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        wrong()
