"""Epsilon from events by Google's accountants: Poisson-sampled Gaussian, add-or-remove-one. Torch-free.

Independent of the node, whose claim is Opacus' RDP bound. Privacy loss distributions (PLD) give the tightest epsilon: a claim
below it is false. Google's RDP is shown beside it; it may lie some percent above Opacus' RDP, since it is taken over fewer orders.

Threat assumption: events may come from a hostile file, so parameters outside a sane range are refused before they
cost time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from keys.errors import VerificationFailed
from protocols.ledger import DpSgdEvent

RDP_ORDERS = [2.0 + x / 10.0 for x in range(90)] + list(range(12, 64))
"""The orders of Opacus' default from 2 up. Below, Google's series for sampled noise does not always converge."""

CONCENTRATED_ORDERS = [1.0 + x / 20.0 for x in range(1, 1000)] + [52.0 * 1.02**x for x in range(200)]

NOISE_RANGE = (0.3, 1e4)


class Steps(NamedTuple):
    """`steps` DP-SGD steps: Poisson sampling of units at a rate, noise of `noise_multiplier` times the clip norm."""

    sample_rate: float
    noise_multiplier: float
    steps: int


History = Sequence[DpSgdEvent | Steps]
"""What was done to one dataset."""

LARGEST_EPSILON = 100.0
"""Noise multipliers and epsilon (by RDP) that are recomputed. Beyond, PLD takes minutes and the answer is of no use."""


def epsilon_rdp(events: History, delta: float) -> float:
    """Epsilon of the composed events at `delta` by Renyi differential privacy; infinite without noise.

    Raises:
        VerificationFailed: a parameter is out of range.
    """
    groups = grouped(events, delta)
    if groups is None:
        return math.inf
    if not groups:
        return 0.0
    from dp_accounting import rdp

    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # orders whose series does not converge are left out, which is sound
    return _compose(rdp.RdpAccountant(RDP_ORDERS), groups, delta)


def epsilon_concentrated(rho: float, delta: float) -> float:
    """Epsilon of rho-zCDP at `delta`, by Google's conversion over more orders than a node tries.

    Raises:
        VerificationFailed: rho is too large to be worth computing.
    """
    if not 0.0 <= rho <= LARGEST_EPSILON:
        raise VerificationFailed(f"epsilon of {rho:g}-zCDP is not computed: that is no privacy")
    if rho == 0.0:
        return 0.0
    from dp_accounting import dp_event, rdp

    accountant = rdp.RdpAccountant(CONCENTRATED_ORDERS)
    accountant.compose(dp_event.ZCDpEvent(rho))
    return float(accountant.get_epsilon(delta))


def epsilon_pld(events: History, delta: float) -> float:
    """Epsilon of the composed events at `delta` by privacy loss distributions (the tightest); infinite without noise.

    Raises:
        VerificationFailed: a parameter is out of range, or epsilon is too large to be worth computing.
    """
    groups = grouped(events, delta)
    if groups is None:
        return math.inf
    if not groups:
        return 0.0
    if not epsilon_rdp(events, delta) <= LARGEST_EPSILON:
        raise VerificationFailed(f"epsilon is above {LARGEST_EPSILON:g} and is not recomputed: that is no privacy")
    return _pld(tuple(sorted(groups.items())), delta)


def grouped(events: History, delta: float) -> dict[tuple[float, float], int] | None:
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
def _pld(groups: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    from dp_accounting import pld

    return _compose(pld.PLDAccountant(), dict(groups), delta)


def _compose(accountant: Any, groups: Mapping[tuple[float, float], int], delta: float) -> float:
    from dp_accounting import dp_event

    for (rate, noise), steps in groups.items():
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))
