"""Epsilon from ledger events: Poisson-sampled Gaussian, add-or-remove-one. Independent of Opacus, torch-free.

Renyi DP of order a of one step (Mironov, Talwar, Zhang 2019, theorem 4 and section 3.3) is log(A(a)) / (a - 1) with
    A(a) = E over z ~ N(0, sigma^2) of ((1 - q) + q exp((2z - 1) / (2 sigma^2)))^a.
Google's dp-accounting leaves out low orders where its series for A(a) does not converge, so its epsilon can lie some
percent above that of Opacus; here the expectation is integrated by the trapezoidal rule, which agrees with Opacus to
nine digits, so that a claim can be checked tightly. The conversion to epsilon, and the PLD accountant, are Google's.

Threat assumption: events may come from a hostile file, so parameters outside a sane range are refused before they
cost time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from keys.errors import VerificationFailed
from protocols.ledger import DpSgdEvent

RDP_ORDERS = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))
"""The orders that Opacus uses by default: an honest claim is an RDP epsilon over just these."""

NOISE_RANGE = (0.1, 1e4)
"""Noise multipliers that are recomputed. Below, epsilon is in the hundreds after a few steps."""

PLD_LEAST_NOISE = 0.3
PLD_LARGEST_EPSILON = 100.0
"""Beyond these, privacy loss distributions take longer than some seconds and say nothing of use."""

_WIDTH = 12.0
"""How many standard deviations around its peaks the integrand is followed."""


def epsilon_rdp(events: Sequence[DpSgdEvent], delta: float) -> float:
    """Epsilon of the composed events at `delta` by Renyi differential privacy; infinite without noise.

    Raises:
        VerificationFailed: a parameter is out of range.
    """
    groups = _grouped(events, delta)
    if groups is None:
        return math.inf
    if not groups:
        return 0.0
    from dp_accounting import rdp

    total = sum(steps * _renyi(rate, noise) for (rate, noise), steps in groups.items())
    return float(rdp.compute_epsilon(RDP_ORDERS, total, delta)[0])


def epsilon_pld(events: Sequence[DpSgdEvent], delta: float) -> float | None:
    """Epsilon of the composed events at `delta` by privacy loss distributions (the tightest); infinite without noise.

    None where it would take long.

    Raises:
        VerificationFailed: a parameter is out of range.
    """
    groups = _grouped(events, delta)
    if groups is None:
        return math.inf
    if not groups:
        return 0.0
    if min(noise for _, noise in groups) < PLD_LEAST_NOISE or not epsilon_rdp(events, delta) <= PLD_LARGEST_EPSILON:
        return None
    return _pld(tuple(sorted(groups.items())), delta)


def _grouped(events: Sequence[DpSgdEvent], delta: float) -> dict[tuple[float, float], int] | None:
    """Steps by (sample rate, noise multiplier); None if some step had no noise."""
    groups: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            key = (event.sample_rate, event.noise_multiplier)
            groups[key] = groups.get(key, 0) + event.steps
    if any(noise == 0.0 for _, noise in groups):
        return None
    for rate, noise in groups:
        if not (0.0 < rate <= 1.0 and NOISE_RANGE[0] <= noise <= NOISE_RANGE[1] and 0.0 < delta < 1.0):
            raise VerificationFailed(
                f"epsilon at delta {delta} of sampling rate {rate} and noise multiplier {noise} is not recomputed: "
                f"rates go up to 1, noise multipliers from {NOISE_RANGE[0]:g} to {NOISE_RANGE[1]:g}"
            )
    return groups


@lru_cache(maxsize=64)
def _renyi(rate: float, noise: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Renyi DP of one step at every order, [len(RDP_ORDERS)]."""
    step = min(noise, noise * noise) / 8.0
    stay = math.log1p(-rate) if rate < 1.0 else -math.inf
    divergence = np.empty(len(RDP_ORDERS))
    for index, order in enumerate(RDP_ORDERS):
        z = np.arange(-_WIDTH * noise, order + _WIDTH * noise, step)
        log_ratio = np.logaddexp(stay, math.log(rate) + (2.0 * z - 1.0) / (2.0 * noise * noise))
        log_terms = order * log_ratio - z * z / (2.0 * noise * noise)
        top = log_terms.max()
        scale = math.log(step / (noise * math.sqrt(2.0 * math.pi)))
        divergence[index] = (top + math.log(np.exp(log_terms - top).sum()) + scale) / (order - 1.0)
    return divergence


@lru_cache(maxsize=64)
def _pld(groups: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    from dp_accounting import dp_event, pld

    accountant = pld.PLDAccountant()
    for (rate, noise), steps in groups:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))
