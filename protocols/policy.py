"""A hospital's local policy: floors and ceilings that no agreement and no server can weaken (DESIGN section 4).

Every rule says what must hold, so that NaN breaks it.
"""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta, Struct

from keys.errors import ConfigError
from protocols.agreement import MINIMUM_CONTRIBUTORS, Agreement, Protocol


class LocalPolicy(Struct, frozen=True, forbid_unknown_fields=True):
    """What this hospital accepts. The defaults are cautious; a study that needs more must be allowed to by hand.

    `max_epsilon` is the most that one study, and that all studies on the same records together, may spend. Whoever sets
    `max_hospital_epsilon` takes part only where noise in the sums hides the hospital as a whole.
    """

    max_epsilon: Annotated[float, Meta(gt=0.0)] = 10.0
    max_delta: Annotated[float, Meta(gt=0.0, lt=1.0)] = 1e-3
    min_noise_multiplier: Annotated[float, Meta(ge=0.0)] = 0.3
    max_sample_rate: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.5
    max_grad_norm: Annotated[float, Meta(gt=0.0)] = 10.0
    max_rounds: Annotated[int, Meta(ge=1)] = 1000
    min_cohort: Annotated[int, Meta(ge=MINIMUM_CONTRIBUTORS)] = MINIMUM_CONTRIBUTORS
    min_threshold: Annotated[int, Meta(ge=2)] = 2
    min_colluders_tolerated: Annotated[int, Meta(ge=0)] = 1
    protocols: tuple[Protocol, ...] = ("masked", "layered")
    max_hospital_epsilon: Annotated[float, Meta(gt=0.0)] = math.inf


def check_policy(agreement: Agreement, policy: LocalPolicy, *, epsilon: float) -> None:
    """Refuse an agreement that is weaker than the local policy.

    Args:
        agreement: the study's agreement.
        policy: this hospital's.
        epsilon: what the whole study would spend at the agreed delta, by an accountant.

    Raises:
        ConfigError: names every rule that is broken, with both values.
    """
    privacy, ring = agreement.privacy, agreement.secure_sum
    # A node stops at the budget; without noise there is nothing to stop it.
    spent = min(epsilon, privacy.epsilon_budget) if privacy.noise_multiplier > 0 else float("inf")
    hospital = agreement.hospital_privacy
    whole = math.inf if hospital is None else hospital.epsilon_budget
    rules = [
        ("epsilon of the whole study", spent, "at most", policy.max_epsilon, spent <= policy.max_epsilon),
        ("delta", privacy.delta, "at most", policy.max_delta, privacy.delta <= policy.max_delta),
        (
            "noise multiplier",
            privacy.noise_multiplier,
            "at least",
            policy.min_noise_multiplier,
            privacy.noise_multiplier >= policy.min_noise_multiplier,
        ),
        (
            "sample rate",
            privacy.sample_rate,
            "at most",
            policy.max_sample_rate,
            privacy.sample_rate <= policy.max_sample_rate,
        ),
        (
            "clip norm",
            privacy.max_grad_norm,
            "at most",
            policy.max_grad_norm,
            privacy.max_grad_norm <= policy.max_grad_norm,
        ),
        ("rounds", agreement.study.rounds, "at most", policy.max_rounds, agreement.study.rounds <= policy.max_rounds),
        (
            "minimum cohort",
            ring.minimum_cohort,
            "at least",
            policy.min_cohort,
            ring.minimum_cohort >= policy.min_cohort,
        ),
        ("threshold", ring.threshold, "at least", policy.min_threshold, ring.threshold >= policy.min_threshold),
        (
            "colluders tolerated",
            agreement.colluders_tolerated,
            "at least",
            policy.min_colluders_tolerated,
            agreement.colluders_tolerated >= policy.min_colluders_tolerated,
        ),
        (
            "epsilon of the whole hospital",
            whole,
            "at most",
            policy.max_hospital_epsilon,
            whole <= policy.max_hospital_epsilon,
        ),
        ("protocol", ring.protocol, "one of", ", ".join(policy.protocols), ring.protocol in policy.protocols),
    ]
    broken = [
        f"{name} is {value}, our policy allows {bound} {limit}"
        for name, value, bound, limit, holds in rules
        if not holds
    ]
    if broken:
        raise ConfigError(
            f"study {agreement.study.id} is weaker than the local policy; refuse it, or change [policy] knowingly: "
            + "; ".join(broken)
        )
