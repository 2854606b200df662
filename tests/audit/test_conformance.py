"""White-box tests of training: silent about a sound trainer, and each planted bug found by the test that is meant for it."""

import dataclasses

import msgspec
import numpy as np
import pytest

from audit import conformance
from audit.conformance import ConformanceEvidence, Influence, ParameterNoise, judge
from audit.plants import PLANTS
from keys.errors import LocalProtocolError
from tests.audit.targets import judged, target

FOUND_BY = {
    "no-noise": "noise",
    "half-noise": "noise",
    "noise-per-microbatch": "noise",
    "magnitudes-without-noise": "noise",
    "noise-shared-by-shape": "fresh noise",
    "noise-again": "fresh noise",
    "half-precision-noise": "fresh noise",
    "local-parameters-without-noise": "side channels",
    "clip-last-piece-only": "sensitivity",
    "records-for-patients": "sampling",
    "samples-again": "sampling",
    "true-batch-size": "side channels",
    "private-standardisation": "sensitivity",
    "fixed-seed": "fresh noise",
    "reused-seed": "fresh noise",
    "clip-off": "sensitivity",
    "clip-after-sum": "sensitivity",
    "clip-each-parameter": "sensitivity",
    "head-outside-clipping": "sensitivity",
    "clip-each-record": "sensitivity",
    "shuffled-batches": "sampling",
    "twice-the-sample-rate": "sampling",
    "unaccounted-steps": "bookkeeping",
    "weights-of-raw-gradients": "side channels",
    "weaker-noise-later": "noise",
    "pool-of-seeds": "fresh noise",
    "noise-without-records-only": "noise",
    "adaptive-clip": "noise",
    "not-finite": "sensitivity",
    "fixed-size": "sampling",
    "more-steps-later": "bookkeeping",
    "raw-steps-later": "side channels",
}


ALSO = {
    "reused-seed": {"noise"},
    "noise-again": {"noise"},
    "noise-shared-by-shape": {"noise"},
    "half-precision-noise": {"noise"},
    "records-for-patients": {"sensitivity"},
    "no-noise": {"fresh noise"},
    "magnitudes-without-noise": {"fresh noise"},
}


def test_the_catalogue_is_complete() -> None:
    assert FOUND_BY.keys() == PLANTS.keys()
    assert len(PLANTS) >= 12


def test_sound_training_is_not_accused() -> None:
    assert set(judged(None).values()) == {"held"}


@pytest.mark.parametrize("plant", FOUND_BY)
def test_each_planted_bug_is_found_by_its_own_test(plant: str) -> None:
    broken = {name for name, status in judged(plant).items() if status == "broken"}
    assert FOUND_BY[plant] in broken
    # Repeated noise is seldom Gaussian as a whole, and what is wrong with units shows in several ways; all else is found by one test alone.
    assert broken <= {FOUND_BY[plant], *ALSO.get(plant, ())}


def test_a_trainer_that_forgets_its_bookkeeping_altogether_stops_by_itself() -> None:
    trainer = target().trainer()
    trainer._optimizer.step_hook = None
    trainer.step()
    with pytest.raises(LocalProtocolError, match="booked"):
        _ = trainer.steps_taken


def test_patients_are_units_of_sensitivity_too() -> None:
    sound = dataclasses.replace(PLANTS["clip-each-record"].target(target()), plant=None)
    found = conformance.judge(conformance.collect(sound))
    assert {finding.status for finding in found} == {"held"}
    assert any("patient" in finding.promise for finding in found)


def test_full_batches_can_be_audited() -> None:
    found = conformance.judge(conformance.collect(target(privacy={"sample_rate": 1.0}, batch_sizes=(48.0, 48.0, 48.0))))
    assert {finding.status for finding in found} == {"held"}


def test_without_noise_nothing_is_said_about_noise() -> None:
    found = {f.name: f.status for f in judge(conformance.collect(target(privacy={"noise_multiplier": 0.0})))}
    assert found["noise"] == found["fresh noise"] == "not testable"
    assert found["sensitivity"] == "held"


@pytest.fixture(scope="module")
def evidence() -> ConformanceEvidence:
    return conformance.collect(target())


def test_evidence_survives_json_and_gives_the_same_verdict(evidence: ConformanceEvidence) -> None:
    again = msgspec.json.decode(msgspec.json.encode(evidence), type=ConformanceEvidence)
    assert again == evidence
    assert judge(again) == judge(evidence)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("noise", lambda e: {"noise": (ParameterNoise("one", 10_000, 0.9), *e.noise)}),
        ("noise", lambda e: {"kolmogorov_smirnov": 0.1}),
        ("noise", lambda e: {"step_mean_squares": (*e.step_mean_squares[:-1], 0.7)}),
        ("fresh noise", lambda e: {"start_correlation": 0.9}),
        ("fresh noise", lambda e: {"step_correlations": (*e.step_correlations, -0.9)}),
        ("sensitivity", lambda e: {"influences": (*e.influences, Influence("one", 1.01))}),
        ("sensitivity", lambda e: {"influences": (*e.influences, Influence("one", float("nan")))}),
        ("fresh noise", lambda e: {"distinct_values": e.empty_values // 2}),
        ("sampling", lambda e: {"sampling": msgspec.structs.replace(e.sampling, expected_units=1)}),
        ("sampling", lambda e: {"sampling": msgspec.structs.replace(e.sampling, overlaps=(0, 0, 0, 0, 0))}),
        ("sampling", lambda e: {"sample_rate": 0.3}),
        ("bookkeeping", lambda e: {"bookkeeping": msgspec.structs.replace(e.bookkeeping, booked=e.bookkeeping.booked - 1)}),
        ("side channels", lambda e: {"leaks": ("weight of one",)}),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_evidence(evidence: ConformanceEvidence, name: str, change) -> None:
    changed = msgspec.structs.replace(evidence, **change(evidence))
    assert {f.name: f.status for f in judge(changed)}[name] == "broken"


@pytest.mark.parametrize(
    ("count", "rate"), [(80, 0.25), (1000, 0.02), (2000, 0.01), (300, 0.01), (300, 0.05), (40, 0.5)]
)
def test_samples_of_a_fixed_size_are_told_from_coins_at_any_rate(count: int, rate: float) -> None:
    """A bound on an exact probability needs no large numbers."""
    random, steps = np.random.default_rng(3), conformance.SAMPLING_STEPS
    assert conformance._chance(np.full(steps, round(count * rate)), count, rate) < conformance.ALARM
    for _ in range(50):
        coins = random.binomial(count, rate, steps)
        assert conformance._chance(coins, count, rate) > 1e-3
        assert conformance._chance(2 * coins, count, rate) < conformance.ALARM
    # Some units are never sampled, the others more often.
    inclusions = random.binomial(steps, rate * 2, count) * (np.arange(count) % 2)
    assert conformance._chance(inclusions, steps, rate) < conformance.ALARM


def test_the_bound_is_above_what_happens_and_not_far_above() -> None:
    """A hundred thousand sums of ten squared deviations: as extreme ones are as seldom as the bound says, or more seldom."""
    random = np.random.default_rng(4)
    drawn = random.binomial(12, 0.3, (100_000, 10))
    sums = ((drawn - 3.6) ** 2).sum(axis=1)
    for row in drawn[:200]:
        seen = ((row - 3.6) ** 2).sum()
        share = 2 * min((sums <= seen).mean(), (sums >= seen).mean())
        assert share <= conformance._chance(row, 12, 0.3) + 0.01
    assert conformance._chance(np.full(10, 4), 12, 0.3) < 0.01


def test_chance_accuses_nobody() -> None:
    """Sampling and noise as they should be, a hundred times."""
    random = np.random.default_rng(1)
    for _ in range(100):
        drawn = random.random((300, 48)) < 0.25
        sampling = conformance.Sampling(
            48,
            48,
            tuple(drawn.sum(axis=1).tolist()),
            tuple(drawn.sum(axis=0).tolist()),
            tuple(int((drawn[:-lag] & drawn[lag:]).sum()) for lag in conformance.LAGS),
        )
        noise = random.standard_normal((12, 500))
        parameters = (ParameterNoise("one", noise.size, float(np.mean(noise**2))),)
        found = judge(
            ConformanceEvidence(
                "one", 1.0, 0.25, "record", parameters, 0.01, noise.size, (1.0,) * 12, noise.size, noise.size, (0.02,), 0.01,
                (Influence("one", 1.0),), sampling,
                conformance.Bookkeeping(3, 3, 3, 3, 3), (), 10, 1.0,
            )
        )  # fmt: skip
        assert {finding.status for finding in found} == {"held"}


def test_evidence_of_a_trainer_that_takes_steps_twice_is_whole() -> None:
    hospital = target("unaccounted-steps")
    conformance.check_whole(conformance.collect(hospital), hospital.agreement)
