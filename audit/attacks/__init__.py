"""The threat model's malicious aggregator and malicious members.

`network` runs a study in memory and `wire` over sockets, `knowledge` is what a coalition can compute, `play` is an attacker on the wire and
`forged` what it makes; `stage` is where attacks are played and what they leave behind; `by_aggregator`, `by_members` and `by_strangers` are
what is tried.
"""

from audit.attacks import by_aggregator, by_members, by_strangers
from audit.attacks.stage import CATALOGUE

__all__ = ["CATALOGUE", "by_aggregator", "by_members", "by_strangers"]
