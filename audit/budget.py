"""Epsilon from events by Google's accountants: Poisson-sampled Gaussian, add-or-remove-one. Torch-free.

Independent of the node, whose claim is Opacus' RDP.

    RDP   cheap; at some orders its series lies above Opacus', by up to some percent where epsilon is large
    PLD   pessimistic by its discretisation, as long as delta is far above the rounding errors of its Fourier transforms (`least_delta`).
          Slow; mostly the smaller one, but looser than RDP over some hundred thousand steps of little loss

Both are upper bounds where they give a number, so a claim that reaches one of them is not false.

Threat assumption: events may come from a hostile file, so parameters outside a sane range are refused before they
cost time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from keys.errors import VerificationFailed
from protocols.agreement import MAXIMUM_STEPS, NOISE_RANGE
from protocols.ledger import DpSgdEvent

LARGE_ORDERS = (96, 128, 192, 256, 384, 512, 768, 1024)
"""Those that nodes try beside Opacus' own, which end at 63."""

ORDERS = (*(2.0 + x / 10.0 for x in range(90)), *range(12, 64), *LARGE_ORDERS)
"""Those that nodes try, from 2 up. Below, Google's series for sampled noise does not always converge."""

FEW_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)

CONCENTRATED_ORDERS = sorted(
    {1.0 + x / 20.0 for x in range(1, 1000)}
    | {52.0 * 1.02**x for x in range(200)}
    | {float(x) for x in (*range(51, 64), *LARGE_ORDERS)}
)
"""All that nodes try for a whole hospital, and many between."""

LARGEST_EPSILON = 300.0
"""Epsilon by RDP. Beyond, PLD takes minutes and the answer is of no use."""


class DeltaTooSmall(VerificationFailed):
    """PLD does not compute to such a delta; RDP does."""


class Steps(NamedTuple):
    """`steps` DP-SGD steps: Poisson sampling of units at a rate, noise of `noise_multiplier` times the clip norm."""

    sample_rate: float
    noise_multiplier: float
    steps: int


History = Sequence[DpSgdEvent | Steps]
"""What was done to one dataset."""

Groups = tuple[tuple[tuple[float, float], int], ...]
"""Steps by sample rate and noise multiplier."""


def epsilon_rdp(events: History, delta: float) -> float:
    """Epsilon of the composed events at `delta` by Renyi differential privacy; infinite without noise.

    Raises:
        VerificationFailed: a parameter is out of range.
    """
    groups = grouped(events, delta)
    if groups is None:
        return math.inf
    return _rdp(tuple(sorted(groups.items())), delta) if groups else 0.0


def at_most_rdp(events: History, delta: float, most: float) -> bool:
    """Whether `epsilon_rdp` is at most `most`. Asks a few whole orders first: these are fast, and fewer orders only give more.

    Raises:
        VerificationFailed: a parameter is out of range.
    """
    groups = grouped(events, delta)
    if groups and _rdp(tuple(sorted(groups.items())), delta, FEW_ORDERS) <= most:
        return True
    return epsilon_rdp(events, delta) <= most


@lru_cache(maxsize=4096)
def _rdp(groups: Groups, delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    from dp_accounting import rdp

    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # orders whose series does not converge are left out, which is sound
    return _compose(rdp.RdpAccountant(orders), groups, delta)


@lru_cache(maxsize=4096)
def epsilon_concentrated(rho: float, delta: float) -> float:
    """Epsilon of rho-zCDP at `delta`, by Google's conversion over more orders than a node tries.

    Raises:
        VerificationFailed: rho is negative or infinite.
    """
    if not 0.0 <= rho < math.inf:
        raise VerificationFailed(f"epsilon of {rho:g}-zCDP is not computed")
    if rho == 0.0:
        return 0.0
    from dp_accounting import dp_event, rdp

    accountant = rdp.RdpAccountant(CONCENTRATED_ORDERS)
    accountant.compose(dp_event.ZCDpEvent(rho))
    return float(accountant.get_epsilon(delta))


def epsilon_pld(events: History, delta: float) -> float:
    """Epsilon of the composed events at `delta` by privacy loss distributions; infinite without noise.

    Raises:
        DeltaTooSmall: delta is too small for PLD.
        VerificationFailed: a parameter is out of range, epsilon is too large to be worth computing, or PLD gives no number.
    """
    groups = grouped(events, delta)
    if groups is None:
        return math.inf
    if not groups:
        return 0.0
    steps = sum(groups.values())
    if steps > MAXIMUM_STEPS:
        raise VerificationFailed(f"epsilon by PLD is not recomputed for more than {MAXIMUM_STEPS:,} steps")
    if delta < least_delta(steps):
        raise DeltaTooSmall(
            f"PLD computes over {steps:,} steps to about {least_delta(steps):.1g} in delta, which {delta:g} is below"
        )
    if not at_most_rdp(events, delta, LARGEST_EPSILON):
        raise VerificationFailed(f"epsilon is above {LARGEST_EPSILON:g} and is not recomputed: that is no privacy")
    return _pld(tuple(sorted(groups.items())), delta)


def least_delta(steps: int) -> float:
    """Below, PLD may be too small: rounding errors grow with the steps, and tails below 1e-15 are cut off.

    Against the exact epsilon of the Gaussian mechanism it was low by 0.06 % at 1,000 steps and 1e-12, by 0.12 % at 100,000 and 1e-10,
    and by 6 % at 100,000 and 1e-14.
    """
    return max(1e-10, 1e-13 * steps)


def grouped(events: History, delta: float) -> dict[tuple[float, float], int] | None:
    """Steps by (sample rate, noise multiplier); None if some step had no noise.

    Raises:
        VerificationFailed: delta, a rate or a noise multiplier is out of range.
    """
    if not 0.0 < delta < 1.0:
        raise VerificationFailed(f"delta is above 0 and below 1, not {delta}")
    groups: dict[tuple[float, float], int] = {}
    for event in events:
        if not 0.0 < event.sample_rate <= 1.0:
            raise VerificationFailed(f"a sampling rate is above 0 and at most 1, not {event.sample_rate}")
        if event.steps:
            key = (event.sample_rate, event.noise_multiplier)
            groups[key] = groups.get(key, 0) + event.steps
    if any(noise == 0.0 for _, noise in groups):
        return None
    for _, noise in groups:
        if not NOISE_RANGE[0] <= noise <= NOISE_RANGE[1]:
            raise VerificationFailed(
                f"epsilon of noise multiplier {noise} is not recomputed: they go from {NOISE_RANGE[0]:g} to {NOISE_RANGE[1]:g}"
            )
    return groups


@lru_cache(maxsize=4096)
def _pld(groups: Groups, delta: float) -> float:
    from dp_accounting import pld

    return _compose(pld.PLDAccountant(), groups, delta)


def _compose(accountant: Any, groups: Groups, delta: float) -> float:
    from dp_accounting import dp_event

    try:
        for (rate, noise), steps in groups:
            accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
        epsilon = float(accountant.get_epsilon(delta))
    except (ValueError, ArithmeticError) as error:
        raise VerificationFailed(f"{type(accountant).__name__} gives no number here: {error}") from None
    if not math.isfinite(epsilon):
        raise VerificationFailed(f"{type(accountant).__name__} gives no number here")
    return epsilon
