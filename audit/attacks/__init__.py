"""The threat model's malicious aggregator and malicious members: `stage` is where they play, the other files are what they try."""

from audit.attacks import by_aggregator, by_members
from audit.attacks.stage import CATALOGUE

__all__ = ["CATALOGUE", "by_aggregator", "by_members"]
