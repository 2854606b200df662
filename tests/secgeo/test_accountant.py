"""What a node counts is a number that it can book and claim."""

import math
import warnings

import pytest
from dp_accounting import gaussian_mechanism
from opacus.accountants import RDPAccountant

from audit import budget
from audit.accountants import opacus_rdp
from audit.budget import Steps, epsilon_rdp
from secgeo.accountant import LARGE_ORDERS, epsilon_of
from secgeo.presets import noise_for


def test_epsilon_is_never_negative() -> None:
    """At a large delta the conversion from RDP falls below zero."""
    assert epsilon_of([(20.0, 0.001, 10)], 0.05) == 0.0
    assert epsilon_of([(1.0, 0.1, 0)], 0.05) == 0.0
    assert 0.0 < epsilon_of([(1.0, 0.1, 10)], 1e-5) < math.inf == epsilon_of([(0.0, 0.1, 10)], 1e-5)


def test_nodes_and_verifiers_try_the_same_orders() -> None:
    assert LARGE_ORDERS == budget.LARGE_ORDERS


@pytest.mark.parametrize("epsilon", [0.01, 0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_a_small_epsilon_is_counted_by_large_orders_and_never_below_the_truth(epsilon: float, delta: float) -> None:
    """The truth is that of the Gaussian mechanism itself (Balle and Wang 2018), where nothing is sampled."""
    noise = gaussian_mechanism.get_sigma_gaussian(epsilon, delta) * math.sqrt(50)
    counted = epsilon_of([(noise, 1.0, 50)], delta)
    assert epsilon <= counted < 1.4 * epsilon + 0.01
    stock = RDPAccountant()
    stock.history = [(noise, 1.0, 50)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its best order is its last one
        assert counted <= stock.get_epsilon(delta)


@pytest.mark.parametrize(
    ("rate", "noise", "steps"), [(0.01, 10.0, 10), (0.032, 15.0, 200), (0.2, 100.0, 50), (0.001, 0.8, 20)]
)
def test_a_small_epsilon_of_sampled_noise_is_the_same_by_google(rate: float, noise: float, steps: int) -> None:
    counted, history = epsilon_of([(noise, rate, steps)], 1e-5), [Steps(rate, noise, steps)]
    assert counted == pytest.approx(epsilon_rdp(history, 1e-5), rel=1e-4)
    assert opacus_rdp(history, 1e-5) == (pytest.approx(counted, rel=1e-12), True)
    assert counted >= budget.epsilon_pld(history, 1e-5)


def test_noise_for_a_demonstration_with_little_budget_keeps_it() -> None:
    noise = noise_for(0.05, delta=1e-5, sample_rate=0.01, steps=100)
    assert epsilon_of([(noise, 0.01, 100)], 1e-5) <= 0.05 < epsilon_of([(0.95 * noise, 0.01, 100)], 1e-5)
