"""Epsilon from ledger events, by Google's accountants (dp-accounting): Poisson-sampled Gaussian, add-or-remove-one.

Independent of the node, which uses Opacus' RDP accountant; torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from protocols.ledger import DpSgdEvent

RDP_ORDERS = [2.0 + x / 10.0 for x in range(90)] + list(range(12, 64))
"""The orders of Opacus' default from 2 up; fewer orders can only give a larger epsilon."""


def epsilon_rdp(events: Sequence[DpSgdEvent], delta: float) -> float:
    """Epsilon of the composed events at `delta` by Renyi differential privacy; infinite without noise."""
    from dp_accounting import rdp

    return _epsilon(rdp.RdpAccountant(RDP_ORDERS), events, delta)


def epsilon_pld(events: Sequence[DpSgdEvent], delta: float) -> float:
    """Epsilon of the composed events at `delta` by privacy loss distributions (the tightest); infinite without noise."""
    from dp_accounting import pld

    return _epsilon(pld.PLDAccountant(), events, delta)


def _epsilon(accountant: object, events: Sequence[DpSgdEvent], delta: float) -> float:
    from dp_accounting import dp_event

    spent = [event for event in events if event.steps]
    if any(event.noise_multiplier == 0 for event in spent):
        return math.inf
    groups: dict[tuple[float, float], int] = {}
    for event in spent:
        key = (event.sample_rate, event.noise_multiplier)
        groups[key] = groups.get(key, 0) + event.steps
    for (sample_rate, noise_multiplier), steps in groups.items():
        step = dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(noise_multiplier))
        accountant.compose(step, steps)  # type: ignore[attr-defined]
    return float(accountant.get_epsilon(delta)) if groups else 0.0  # type: ignore[attr-defined]
