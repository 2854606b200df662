"""What a node counts is a number that it can book and claim."""

import math

from secgeo.accountant import epsilon_of


def test_epsilon_is_never_negative() -> None:
    """At a large delta the conversion from RDP falls below zero."""
    assert epsilon_of([(20.0, 0.001, 10)], 0.05) == 0.0
    assert epsilon_of([(1.0, 0.1, 0)], 0.05) == 0.0
    assert 0.0 < epsilon_of([(1.0, 0.1, 10)], 1e-5) < math.inf == epsilon_of([(0.0, 0.1, 10)], 1e-5)
