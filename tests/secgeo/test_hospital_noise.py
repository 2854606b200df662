"""The share that leaves a hospital: bounded, whole steps of the grid, exact noise, and nothing of the data in what is not noised."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from tiny_study import agreement, trainer

from keys.errors import LocalProtocolError
from protocols.agreement import HospitalPrivacy
from protocols.encoding import FixedPoint
from protocols.hospital_noise import NoiseShare
from secgeo.hospital_noise import add_noise_share, discrete_gaussian, private_values, to_grid
from secgeo.update import Layout, SharedState, apply_sum

HOSPITAL = HospitalPrivacy(noise_multiplier=1.0, max_update_norm=0.5, delta=1e-3, epsilon_budget=20.0)
STUDY = msgspec.structs.replace(agreement(), hospital_privacy=HOSPITAL)
LAYOUT = Layout.from_agreement(STUDY)
SHARE = NoiseShare(max_update_norm=0.5, std=0.1, step=2.0**-16, contributors=2)
PRIVATE = np.ones(LAYOUT.size, dtype=bool)  # but weights and the Gram matrix, which are public
PRIVATE[LAYOUT.gram_start :] = PRIVATE[[segment.weight_at for segment in LAYOUT.segments]] = False


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 2**32 - 1), common=st.booleans(), bits=st.sampled_from([16, 29]))
def test_what_is_summed_is_never_longer_than_agreed(scale: float, seed: int, common: bool, bits: int) -> None:
    """In exact integers: neither rounding nor the norm's own error may add to it."""
    rng, share = np.random.default_rng(seed), msgspec.structs.replace(SHARE, step=2.0**-bits)
    vector = np.full(LAYOUT.size, scale) if common else rng.normal(size=LAYOUT.size) * scale
    steps = [int(value) for value in to_grid(vector, share)]
    assert sum(value**2 for value in steps) <= int(share.max_update_norm / share.step) ** 2
    if np.linalg.norm(vector) <= 0.99 * share.max_update_norm:
        assert np.abs(np.array(steps) * share.step - vector).max() < share.step


def test_noise_is_on_every_value_that_data_touch_and_on_no_other() -> None:
    np.testing.assert_array_equal(private_values(LAYOUT), PRIVATE)
    vector = np.random.default_rng(0).normal(size=LAYOUT.size)
    noised = add_noise_share(vector, LAYOUT, SHARE)
    np.testing.assert_array_equal(noised[~PRIVATE], vector[~PRIVATE])
    assert np.mean(noised[PRIVATE] == vector[PRIVATE]) < 0.01
    assert not np.array_equal(noised, add_noise_share(vector, LAYOUT, SHARE))


def test_the_encoding_rounds_nothing() -> None:
    """Values on the grid are integers all the way: no floating point is left for an attack to look into."""
    noised = add_noise_share(np.random.default_rng(0).normal(size=LAYOUT.size), LAYOUT, SHARE)[PRIVATE]
    point = FixedPoint(value_bits=24, fraction_bits=16, ring_bits=32, n_max=3)
    np.testing.assert_array_equal(point.decode(point.encode(noised), 1), noised)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_an_update_that_is_not_finite_is_not_sent(value: float) -> None:
    vector = np.zeros(LAYOUT.size)
    vector[LAYOUT.segments[0].start] = value
    with pytest.raises(LocalProtocolError, match="NaN or infinity"):
        add_noise_share(vector, LAYOUT, SHARE)


@pytest.mark.parametrize("std", [0.7, 4.0])
def test_a_share_is_a_discrete_gaussian(std: float) -> None:
    drawn = discrete_gaussian(20_000, std)
    support = np.arange(-int(8 * std) - 1, int(8 * std) + 2)
    expected = np.exp(-np.square(support) / (2 * std**2))
    expected *= drawn.size / expected.sum()
    observed = np.array([(drawn == value).sum() for value in support])
    assert observed.sum() == drawn.size
    common = expected > 10
    rest = drawn.size - observed[common].sum(), drawn.size - expected[common].sum()
    test = stats.chisquare([*observed[common], rest[0]], [*expected[common], rest[1]])
    assert test.pvalue > 1e-7


def test_the_sum_of_the_fewest_shares_has_the_agreed_noise() -> None:
    """Of three members two are counted on; the third drops out, and then it has not."""
    counted = STUDY.noise_share
    assert counted is not None
    shares = [add_noise_share(np.zeros(LAYOUT.size), LAYOUT, counted)[PRIVATE] for _ in range(3)]
    promised = HOSPITAL.noise_multiplier * HOSPITAL.max_update_norm
    wide = 6 / math.sqrt(2 * PRIVATE.sum())
    for survivors in (counted.contributors, 3):
        found = np.std(np.sum(shares[:survivors], axis=0))
        assert found == pytest.approx(promised * math.sqrt(survivors / counted.contributors), rel=wide)
        assert abs(np.corrcoef(shares[0], shares[1])[0, 1]) < 6 / math.sqrt(PRIVATE.sum())


def test_an_attacker_who_knows_all_others_sees_what_is_counted_and_no_more() -> None:
    """The likelihood ratio test on sums with and without one hospital's update: the best attack there is."""
    counted = STUDY.noise_share
    assert counted is not None
    update = PRIVATE * (counted.max_update_norm / math.sqrt(PRIVATE.sum()))
    trials, zero = 150, np.zeros(LAYOUT.size)

    def score(of_one: np.ndarray) -> float:
        of_all = [of_one] + [zero] * (counted.contributors - 1)
        return float(sum(add_noise_share(vector, LAYOUT, counted) for vector in of_all) @ update)

    without, present = np.array([[score(zero), score(update)] for _ in range(trials)]).T
    gap = (present.mean() - without.mean()) / np.std([*(without - without.mean()), *(present - present.mean())])
    assert gap == pytest.approx(math.sqrt(2 * counted.concentrated), abs=6 * math.sqrt(3 / trials))


# --- what the trainer sends, and what a study makes of it


def test_the_gram_matrix_is_that_of_the_untrained_model() -> None:
    """No noise is on it, so no data may be in it: two hospitals with other records send the same in every round."""
    layout, others = LAYOUT, [trainer(STUDY, 1, key=2), trainer(STUDY, 2, key=3)]
    sent = []
    for count in (24, 12):
        one, state = trainer(STUDY, 0, count=count), SharedState.initial(STUDY)
        grams = []
        for _ in range(3):
            update = one.train_round(state)
            grams.append(update.gram)
            total = sum(t.train_round(state).vector(layout) for t in others) + update.vector(layout)
            state = apply_sum(state, layout, total, STUDY)
        assert update.steps > 0
        assert any(np.abs(delta).max() > 0 for delta in update.delta_b.values())
        sent.append(grams)
    assert len({gram.tobytes() for grams in sent for gram in grams}) == 1
    without = msgspec.structs.replace(STUDY, hospital_privacy=None)
    assert np.abs(trainer(without).train_round(state).gram - sent[0][0]).max() > 1e-3
