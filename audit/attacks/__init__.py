"""The threat model's malicious aggregator, malicious members, and strangers.

`network` runs a study in memory and `wire` over sockets; `knowledge` is what a coalition can compute, `play` an attacker on the wire,
`forged` and `broken` what it makes; `stage` is where attacks are played and what they leave behind. What is tried is in the files `by_...`:
who tries it, and with what.
"""

from audit.attacks import (
    by_aggregator_ciphertexts,
    by_aggregator_cohort,
    by_aggregator_documents,
    by_aggregator_replays,
    by_aggregator_sums,
    by_aggregator_survivors,
    by_colluders,
    by_losses,
    by_members_inputs,
    by_members_messages,
    by_members_shares,
    by_strangers,
)
from audit.attacks.stage import CATALOGUE

_ORDER = [
    theme.__name__
    for theme in (
        by_aggregator_cohort,
        by_aggregator_survivors,
        by_aggregator_replays,
        by_aggregator_sums,
        by_aggregator_documents,
        by_aggregator_ciphertexts,
        by_members_messages,
        by_members_shares,
        by_members_inputs,
        by_losses,
        by_colluders,
        by_strangers,
    )
]
CATALOGUE.sort(key=lambda attack: _ORDER.index(attack.perform.__module__))

__all__ = ["CATALOGUE"]
