"""The arithmetic of shared noise: against divergences computed by brute force, and the rules that an agreement must keep."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from keys.errors import ConfigError
from protocols.agreement import Agreement, HospitalPrivacy, check_rules, read_agreement, write_agreement
from protocols.hospital_noise import NoiseShare, noise_share
from tests.keys.factory import make_consortium
from tests.protocols.network import make_agreement, names

CONSORTIUM = make_consortium(names(6))
HOSPITAL = HospitalPrivacy(noise_multiplier=2.0, max_update_norm=1.0, delta=1e-5, epsilon_budget=8.0)


def agreement(hospital: HospitalPrivacy | None = HOSPITAL, **secure_sum: object) -> Agreement:
    return msgspec.structs.replace(make_agreement(CONSORTIUM, **secure_sum), hospital_privacy=hospital)


def log_sum_of_shares(std: float, contributors: int) -> np.ndarray:
    """log P of the sum of so many discrete Gaussians, on -reach..reach."""
    reach = math.ceil(std * 30)
    single = np.exp(-np.square(np.arange(-reach, reach + 1)) / (2.0 * std**2))
    single /= single.sum()
    total = single
    for _ in range(contributors - 1):
        total = np.convolve(total, single)
    return np.log(np.maximum(total, 1e-300))


@pytest.mark.parametrize("std", [0.5, 0.8, 4.0])
@pytest.mark.parametrize("contributors", [1, 2, 5])
@pytest.mark.parametrize("order", [1.5, 4.0, 16.0])
def test_no_divergence_is_above_what_is_counted(std: float, contributors: int, order: float) -> None:
    """Renyi divergence between the noise and the noise moved by one hospital's value, computed from the distributions."""
    log_p, shift = log_sum_of_shares(std, contributors), 1
    moved, still = log_p[:-shift], log_p[shift:]
    seen = (moved > -600) & (still > -600)
    terms = order * moved[seen] + (1 - order) * still[seen]
    divergence = (np.max(terms) + math.log(np.exp(terms - np.max(terms)).sum())) / (order - 1)
    counted = NoiseShare(max_update_norm=float(shift), std=std, step=1.0, contributors=contributors).concentrated
    assert divergence <= order * counted * (1 + 1e-9)
    if std >= 4.0:
        assert divergence >= 0.99 * order * counted, "where the grid is fine nothing is given away"


def test_the_noise_of_the_fewest_shares_is_what_was_agreed() -> None:
    share = noise_share(2.0, 0.5, 4, 2.0**-16)
    assert math.sqrt(4) * share.std == pytest.approx(2.0 * 0.5)
    assert share.concentrated == pytest.approx(1 / (2 * 2.0**2))


def test_coarse_noise_costs_more() -> None:
    fine, coarse = (NoiseShare(1.0, 1.0, step, 3).concentrated for step in (0.25, 1.0))
    assert coarse > 2 * fine


def test_an_encoding_has_room_for_twelve_standard_deviations() -> None:
    """As docs/privacy.md says: beyond, noise is cut off with probability below 2 exp(-72) a value."""
    share = NoiseShare(1.0, 0.5, 0.01, 3)
    assert share.fits(1.0 + 12 * 0.5)
    assert not share.fits(1.0 + 12 * 0.5 - 1e-9)


@pytest.mark.parametrize(
    ("secure_sum", "counted"),
    [
        ({"protocol": "masked"}, 4 - 1),  # 6 members, threshold 4: 2 * 4 - 6 - 1 = 1 colluder
        ({"protocol": "masked", "threshold": 5, "minimum_cohort": 5}, 5 - 3),
        ({"protocol": "layered", "minimum_cohort": 6}, 6 - 1),
        (
            {"protocol": "homomorphic"},
            4 - 1,
        ),  # no colluder is tolerated, but every member sees the sum and knows its own share
    ],
)
def test_only_the_fewest_honest_contributors_are_counted_on(secure_sum: dict[str, object], counted: int) -> None:
    """Whoever drops out takes a share along; colluders know theirs."""
    agreed = agreement(**secure_sum)
    check_rules(agreed)
    assert agreed.noise_share is not None
    assert agreed.noise_share.contributors == counted
    fewest = agreed.secure_sum.minimum_cohort - max(1, agreed.colluders_tolerated)
    assert agreed.noise_share.std**2 * fewest >= (HOSPITAL.noise_multiplier * HOSPITAL.max_update_norm) ** 2 * (
        1 - 1e-9
    )


def test_an_agreement_with_shared_noise_is_read_as_it_was_written() -> None:
    assert read_agreement(write_agreement(agreement())) == agreement()
    assert b"hospital_privacy" not in write_agreement(agreement(None))


BROKEN = {
    "needs a finer grid": (replace := msgspec.structs.replace)(HOSPITAL, max_update_norm=1e-5),
    "must lie within the encoding's": replace(HOSPITAL, noise_multiplier=100.0),
    "finite": replace(HOSPITAL, epsilon_budget=math.inf),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_shared_noise_that_cannot_be_encoded_is_refused(reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        write_agreement(agreement(BROKEN[reason]))


@pytest.mark.parametrize("field", ["noise_multiplier", "max_update_norm", "delta", "epsilon_budget"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_without_a_meaning_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError):
        read_agreement(write_agreement(agreement(replace(HOSPITAL, **{field: value}))))
