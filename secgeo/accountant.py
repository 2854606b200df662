"""Epsilon as a node counts it, and enforces it, by Opacus' RDP accountant. Opacus pulls in torch and is loaded when it is asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from protocols.agreement import Privacy

LARGE_ORDERS = (96, 128, 192, 256, 384, 512, 768, 1024)
"""Beside those of Opacus, which end at 63: where epsilon is small the best order is large."""


def epsilon_of(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """Epsilon of (noise multiplier, sample rate, steps) by Opacus' RDP accountant (add-or-remove-one); infinite without noise.

    At the orders of Opacus and `LARGE_ORDERS`: each bounds epsilon, so more of them only come nearer.
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [entry for entry in history if entry[2]]
    if not accountant.history:
        return 0.0
    if any(noise == 0.0 for noise, _, _ in accountant.history):
        return math.inf
    orders = [*accountant.DEFAULT_ALPHAS, *LARGE_ORDERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at the first or last order the bound is loose, and holds
        return max(0.0, float(accountant.get_epsilon(delta, alphas=orders)))  # below zero at a large delta


def epsilon_after(privacy: Privacy, steps: int, delta: float) -> float:
    """Epsilon of `steps` DP steps of a study; see `epsilon_of`."""
    return epsilon_of([(privacy.noise_multiplier, privacy.sample_rate, steps)], delta)


def hospital_epsilon(concentrated: float, delta: float) -> float:
    """Epsilon at `delta` of rho-zCDP, which is (alpha, alpha rho)-RDP for every order alpha > 1 (one-hospital-zero)."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import get_privacy_spent

    if concentrated == 0.0:
        return 0.0
    orders = [*RDPAccountant.DEFAULT_ALPHAS, *LARGE_ORDERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at the first or last order the bound is loose, and holds
        epsilon, _ = get_privacy_spent(orders=orders, rdp=[order * concentrated for order in orders], delta=delta)
    return max(0.0, float(epsilon))
