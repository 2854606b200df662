"""Epsilon by three accountants, two of Opacus (RDP, PRV) and Google's PLD, each only where it can be trusted.

    RDP   an upper bound (Mironov 2017, 2019); loose when the best order is the largest or smallest that is tried
    PRV   numerical (Gopi et al. 2021), an upper bound within 0.01; fails for tiny delta and huge epsilon, and takes memory with the steps
    PLD   numerical (Koskela et al. 2020, Doroshenko et al. 2022), pessimistic; the smallest of the three except over very many steps; not
          to be trusted for tiny delta

All are for Poisson sampling and Gaussian noise, add-or-remove-one. Opacus needs torch; `audit.budget` does without.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from audit.budget import LARGE_ORDERS, LARGEST_EPSILON, History, epsilon_pld, grouped
from keys.errors import VerificationFailed
from protocols.agreement import MAXIMUM_STEPS
from protocols.ledger import NEIGHBOURING_RELATION

PRV_ERROR = 0.02
"""PRV is asked for an error of 0.01 and gives the upper end; further from PLD one of the two is wrong, and it is not known which."""


PRV_STEPS = 1_000_000
"""So many steps take PRV some gigabytes and a minute."""


@dataclass(frozen=True, slots=True)
class Epsilons:
    """Epsilon at `delta` by accountant; None where it has no answer, and then `refused` says why."""

    delta: float
    epsilon: dict[str, float | None]
    refused: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """A JSON-able form; infinite epsilon (no noise) is null, with its reason."""
        answer: dict[str, object] = {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "neighbouring_relation": NEIGHBOURING_RELATION,
        }
        return answer | ({"refused": self.refused} if self.refused else {})


def opacus_rdp(history: History, delta: float) -> tuple[float, bool]:
    """Opacus' RDP bound, infinite without noise, and whether its best order is inside the range that is tried.

    Raises:
        VerificationFailed: a parameter is out of range.
    """
    groups = grouped(history, delta)
    if groups is None:
        return math.inf, True
    if not groups:
        return 0.0, True
    from opacus.accountants.analysis.rdp import get_privacy_spent

    orders = _orders()
    spent = sum(steps * _opacus_divergences(rate, noise) for (rate, noise), steps in groups.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        epsilon, best = get_privacy_spent(orders=orders, rdp=spent, delta=delta)
    return max(0.0, float(epsilon)), best not in (orders[0], orders[-1])


def _orders() -> list[float]:
    """Those that nodes try: Opacus' own and large ones."""
    from opacus.accountants import RDPAccountant

    return [*RDPAccountant.DEFAULT_ALPHAS, *LARGE_ORDERS]


@lru_cache(maxsize=256)
def _opacus_divergences(rate: float, noise: float) -> NDArray[np.float64]:
    """Of one step: they take nearly all of its time, and steps multiply them."""
    from opacus.accountants.analysis.rdp import compute_rdp

    try:
        return np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=_orders()), np.float64)
    except (ValueError, ArithmeticError) as error:
        raise VerificationFailed(f"Opacus' RDP gives no number here: {error}") from None


def opacus_prv(history: History, delta: float) -> float:
    """Opacus' PRV bound, infinite without noise.

    Raises:
        VerificationFailed: a parameter is out of range, or PRV gives no sound number.
    """
    groups = grouped(history, delta)
    if groups is None:
        return math.inf
    if not groups:
        return 0.0
    if sum(groups.values()) > PRV_STEPS:
        raise VerificationFailed(f"PRV is not asked about more than {PRV_STEPS:,} steps: it would take too much memory")
    try:
        pessimistic = epsilon_pld(history, delta)  # refuses what is too large to compute
    except VerificationFailed as error:
        raise VerificationFailed(f"PLD, which PRV is compared with, has no answer: {error}") from None
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps) for (rate, noise), steps in groups.items()]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            epsilon = max(0.0, float(accountant.get_epsilon(delta)))
    except (ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise VerificationFailed(f"PRV gives no number here: {str(error) or 'it takes too much memory'}") from None
    if not pessimistic * 0.99 - PRV_ERROR <= epsilon <= pessimistic * 1.01 + PRV_ERROR:
        raise VerificationFailed(
            f"PRV gives {epsilon:.4g} where PLD gives {pessimistic:.4g}: one of the two discretisations does not hold here"
        )
    return epsilon


def epsilons(history: History, delta: float) -> Epsilons:
    """Ask all three.

    Raises:
        VerificationFailed: no accountant has an answer to such parameters.
    """
    if sum(steps.steps for steps in history) > MAXIMUM_STEPS:
        raise VerificationFailed(f"epsilon is computed for at most {MAXIMUM_STEPS:,} steps")
    found: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    rdp, inside = opacus_rdp(history, delta)
    if math.isinf(rdp):
        return Epsilons(
            delta,
            dict.fromkeys(("rdp", "prv", "pld")),
            dict.fromkeys(("rdp", "prv", "pld"), "no noise: epsilon is infinite"),
        )
    found["rdp"] = rdp if inside else None
    if not inside:
        refused["rdp"] = (
            f"the best order is at the end of the range that is tried; all it says is that epsilon is at most {rdp:.4g}"
        )
    if rdp > LARGEST_EPSILON:
        refused |= dict.fromkeys(
            ("prv", "pld"), f"epsilon is above {LARGEST_EPSILON:g}, which is no privacy; it is not computed"
        )
        return Epsilons(delta, found | {"prv": None, "pld": None}, refused)
    for name, accountant in (("prv", opacus_prv), ("pld", epsilon_pld)):
        try:
            found[name] = accountant(history, delta)
        except VerificationFailed as error:
            found[name], refused[name] = None, str(error)
    return Epsilons(delta, found, refused)
