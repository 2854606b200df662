"""A hospital's local policy: every rule, alone and together, at and beyond its limit."""

import math

import msgspec
import pytest

from keys.errors import ConfigError
from protocols.agreement import Agreement
from protocols.policy import LocalPolicy, check_policy
from tests.audit.factory import make_study

AGREEMENT = make_study(count=5, rounds=4).agreement


def agreement(**sections: dict) -> Agreement:
    changed = {k: msgspec.structs.replace(getattr(AGREEMENT, k), **v) for k, v in sections.items()}
    return msgspec.structs.replace(AGREEMENT, **changed)


def test_the_default_policy_accepts_a_sound_study() -> None:
    check_policy(AGREEMENT, LocalPolicy(), epsilon=3.0)


WEAKER = [
    ("epsilon", {"privacy": {"epsilon_budget": 100.0}}, {}, 50.0, "50"),
    ("delta", {"privacy": {"delta": 0.01}}, {}, 1.0, "0.01"),
    ("noise multiplier", {"privacy": {"noise_multiplier": 0.1}}, {}, 1.0, "0.1"),
    ("sample rate", {"privacy": {"sample_rate": 0.9}}, {}, 1.0, "0.9"),
    ("clip norm", {"privacy": {"max_grad_norm": 1e6}}, {}, 1.0, "1000000.0"),
    ("rounds", {"study": {"rounds": 5000}}, {}, 1.0, "5000"),
    ("minimum cohort", {}, {"min_cohort": 5}, 1.0, "4"),
    ("threshold", {}, {"min_threshold": 5}, 1.0, "4"),
    ("colluders tolerated", {}, {"min_colluders_tolerated": 3}, 1.0, "2"),
    ("protocol", {}, {"protocols": ()}, 1.0, "masked"),
]


@pytest.mark.parametrize(("rule", "sections", "policy", "epsilon", "value"), WEAKER, ids=[row[0] for row in WEAKER])
def test_each_weaker_study_is_refused_by_name_and_value(
    rule: str, sections: dict, policy: dict, epsilon: float, value: str
) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        check_policy(agreement(**sections), LocalPolicy(**policy), epsilon=epsilon)
    text = str(caught.value)
    assert value in text
    assert sum(row[0] in text.split("knowingly: ")[1] for row in WEAKER) == 1


def test_all_broken_rules_are_named_at_once() -> None:
    sections: dict[str, dict] = {}
    policy: dict[str, object] = {}
    for _, changed, stricter, _, _ in WEAKER:
        for name, fields in changed.items():
            sections.setdefault(name, {}).update(fields)
        policy |= stricter
    with pytest.raises(ConfigError) as caught:
        check_policy(agreement(**sections), LocalPolicy(**policy), epsilon=50.0)
    assert all(rule in str(caught.value) for rule, *_ in WEAKER)


def test_a_limit_is_met_by_equality() -> None:
    privacy = AGREEMENT.privacy
    policy = LocalPolicy(
        max_epsilon=3.0,
        max_delta=privacy.delta,
        min_noise_multiplier=privacy.noise_multiplier,
        max_sample_rate=privacy.sample_rate,
        max_grad_norm=privacy.max_grad_norm,
        max_rounds=4,
        min_cohort=4,
        min_threshold=4,
        min_colluders_tolerated=2,
    )
    check_policy(AGREEMENT, policy, epsilon=3.0)
    with pytest.raises(ConfigError, match="epsilon"):
        check_policy(AGREEMENT, policy, epsilon=math.nextafter(3.0, 4.0))


def test_a_study_without_noise_is_refused_also_where_its_budget_looks_small() -> None:
    """Without noise no budget is enforced, so a small budget in the agreement must not hide an infinite epsilon."""
    silent = agreement(privacy={"noise_multiplier": 0.0, "epsilon_budget": 1.0})
    with pytest.raises(ConfigError, match="epsilon of the whole study is inf"):
        check_policy(silent, LocalPolicy(min_noise_multiplier=0.0), epsilon=math.inf)


def test_nan_breaks_a_rule() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        check_policy(AGREEMENT, LocalPolicy(), epsilon=math.nan)
    for field in ("max_epsilon", "max_delta", "min_noise_multiplier", "max_sample_rate", "max_grad_norm"):
        with pytest.raises(ConfigError):
            check_policy(AGREEMENT, LocalPolicy(**{field: math.nan}), epsilon=1.0)


@pytest.mark.parametrize(
    "text",
    [b"max_epsilom = 9.0", b"max_epsilon = 0.0", b"max_epsilon = nan", b"min_cohort = 2", b"protocols = ['plain']"],
)
def test_a_policy_with_an_unknown_key_or_a_senseless_value_is_refused(text: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.toml.decode(text, type=LocalPolicy)


def test_ciphertexts_without_masks_are_refused_unless_a_hospital_says_so_twice() -> None:
    study = make_study(count=5, protocol="homomorphic").agreement
    assert study.colluders_tolerated == 0
    assert make_study(count=5, protocol="layered").agreement.colluders_tolerated == AGREEMENT.colluders_tolerated
    with pytest.raises(ConfigError, match=r"colluders tolerated is 0.*; protocol is homomorphic"):
        check_policy(study, LocalPolicy(), epsilon=1.0)
    with pytest.raises(ConfigError, match="colluders tolerated is 0"):
        check_policy(study, LocalPolicy(protocols=("homomorphic",)), epsilon=1.0)
    check_policy(study, LocalPolicy(protocols=("homomorphic",), min_colluders_tolerated=0), epsilon=1.0)
