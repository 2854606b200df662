"""The threat model's malicious aggregator and malicious members.

`network` runs a study in memory, `knowledge` is what a coalition can compute, `play` is an attacker on the wire and `forged` what it
makes; `stage` is where attacks are played and what they leave behind; `by_aggregator` and `by_members` are what is tried.
"""

from audit.attacks import by_aggregator, by_members
from audit.attacks.stage import CATALOGUE

__all__ = ["CATALOGUE", "by_aggregator", "by_members"]
