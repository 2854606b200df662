"""White-box tests of training: silent about a sound trainer, and each planted bug found by the test that is meant for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from audit import conformance, independence
from audit.conformance import ConformanceEvidence, collecting, judge, verdicts
from audit.conformance.evidence import ALARM, LEAST_KEPT, SAMPLING_STEPS, Bookkeeping, Influence, Sampling
from audit.counts import private_sizes
from audit.independence import Scale
from audit.plants import PLANTS
from keys.errors import LocalProtocolError, VerificationFailed
from secgeo.model import Tokeniser, build_model
from tests.audit.evidence import watched
from tests.audit.targets import judged, target
from tests.secgeo.tiny_study import agreement as study
from tests.secgeo.tiny_study import anchors

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
    "seed-per-round": "fresh noise",
    "samples-per-round": "sampling",
    "noise-scheduler": "noise",
    "head-unclipped-later": "sensitivity",
    "lowrank-noise": "fresh noise",
    "centred-noise": "noise",
    "class-weights": "sensitivity",
}


ALSO = {
    "reused-seed": {"noise"},
    "noise-again": {"noise"},
    "noise-shared-by-shape": {"noise"},
    "half-precision-noise": {"noise"},
    "records-for-patients": {"sensitivity"},
    "no-noise": {"fresh noise"},
    "magnitudes-without-noise": {"fresh noise"},
    "seed-per-round": {"noise"},
    "pool-of-seeds": {"noise"},
    "lowrank-noise": {"noise"},
    "fixed-seed": {"sampling"},
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
        ("noise", lambda e: {"noise": (Scale("one", 10_000, 0.9), *e.noise)}),
        ("noise", lambda e: {"kolmogorov_smirnov": 0.1}),
        ("noise", lambda e: {"step_mean_squares": (*e.step_mean_squares[:-1], 0.7)}),
        ("fresh noise", lambda e: {"start_correlation": 0.9}),
        ("fresh noise", lambda e: {"step_correlations": (*e.step_correlations, -0.9)}),
        ("sensitivity", lambda e: {"influences": (*e.influences, Influence("one", 1.01))}),
        ("sensitivity", lambda e: {"influences": (*e.influences, Influence("one", float("nan")))}),
        ("fresh noise", lambda e: {"distinct_values": e.empty_values // 2}),
        ("sampling", lambda e: {"sampling": msgspec.structs.replace(e.sampling, expected_units=1)}),
        ("sampling", lambda e: {"sampling": msgspec.structs.replace(e.sampling, overlaps=(0,) * len(e.sampling.overlaps))}),
        ("noise", lambda e: {"directions": (Scale("some", 100, 0.1), *e.directions)}),
        ("fresh noise", lambda e: {"likeness": (msgspec.structs.replace(e.likeness[0], square_sum=2e3), *e.likeness[1:])}),
        ("fresh noise", lambda e: {"shifts": msgspec.structs.replace(e.shifts, deviation=-9.0)}),
        ("sensitivity", lambda e: {"others_moved": (*e.others_moved, Influence("one", 1e-12))}),
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
    random, steps = np.random.default_rng(3), SAMPLING_STEPS
    assert verdicts._chance(np.full(steps, round(count * rate)), count, rate) < ALARM
    for _ in range(50):
        coins = random.binomial(count, rate, steps)
        assert verdicts._chance(coins, count, rate) > 1e-3
        assert verdicts._chance(2 * coins, count, rate) < ALARM
    # Some units are never sampled, the others more often.
    inclusions = random.binomial(steps, rate * 2, count) * (np.arange(count) % 2)
    assert verdicts._chance(inclusions, steps, rate) < ALARM


def test_the_bound_is_above_what_happens_and_not_far_above() -> None:
    """A hundred thousand sums of ten squared deviations: as extreme ones are as seldom as the bound says, or more seldom."""
    random = np.random.default_rng(4)
    drawn = random.binomial(12, 0.3, (100_000, 10))
    sums = ((drawn - 3.6) ** 2).sum(axis=1)
    for row in drawn[:200]:
        seen = ((row - 3.6) ** 2).sum()
        share = 2 * min((sums <= seen).mean(), (sums >= seen).mean())
        assert share <= verdicts._chance(row, 12, 0.3) + 0.01
    assert verdicts._chance(np.full(10, 4), 12, 0.3) < 0.01


@pytest.mark.parametrize(("count", "rate"), [(48, 0.25), (2000, 0.01), (10, 0.05)])
def test_the_bound_on_samples_that_come_back_holds_at_every_lag(count: int, rate: float) -> None:
    """Ten thousand trainings of a dozen steps: as extreme overlaps are as seldom as the bound says, or more seldom."""
    random, steps = np.random.default_rng(5), 12
    drawn = random.random((10_000, steps, count)) < rate if count < 1000 else random.random((500, steps, count)) < rate
    overlaps = np.array([(drawn[:, :-lag] & drawn[:, lag:]).sum(axis=(1, 2)) for lag in range(1, steps)]).T
    chances = np.array([verdicts._chances_again(row, count, steps, rate) for row in overlaps[:500].tolist()])
    for level in (0.5, 0.1, 0.02):
        assert (chances <= level).mean(axis=0).max() <= level + 0.02
    again = [round(count * rate * (steps - lag)) for lag in range(1, steps)]
    assert (verdicts._chances_again(again, count, steps, rate)[: steps // 2] < chances.min(axis=0)[: steps // 2]).all()


def test_samples_that_come_back_after_any_number_of_steps_are_told_from_coins() -> None:
    random, steps, alarm = np.random.default_rng(6), 104, ALARM / 103
    for period in (1, 8, 13, 52):
        drawn = np.tile(random.random((period, 80)) < 0.25, (104 // period, 1))
        overlaps = [int((drawn[:-lag] & drawn[lag:]).sum()) for lag in range(1, steps)]
        assert verdicts._chances_again(overlaps, 80, steps, 0.25)[period - 1] < alarm


def made(noise: np.ndarray, shapes: dict[str, tuple[int, ...]], evidence: ConformanceEvidence) -> ConformanceEvidence:
    """The evidence with this noise."""
    scaled = independence.at_own_scales(noise, shapes)
    return msgspec.structs.replace(
        evidence,
        noise=(Scale("one", noise.size, float(np.mean(noise**2))),),
        noise_values=noise.size,
        kolmogorov_smirnov=float(stats.kstest(noise.ravel(), "norm").statistic),
        step_mean_squares=tuple(np.mean(noise**2, axis=1).tolist()),
        step_correlations=(0.01,) * (len(noise) - 1),
        directions=independence.directions(noise, shapes),
        likeness=independence.likeness(scaled, shapes),
        shifts=independence.shifts(scaled),
    )


def test_chance_accuses_nobody(evidence: ConformanceEvidence) -> None:
    """Sampling and noise as they should be, a hundred times."""
    random, shapes = np.random.default_rng(1), {"a": (20, 30), "b": (20,), "c": (2,), "d": (1,)}
    for steps in [100] * 70 + [12] * 30:
        drawn = random.random((steps, 48)) < 0.25
        sampling = Sampling(
            48,
            48,
            tuple(drawn.sum(axis=1).tolist()),
            tuple(drawn.sum(axis=0).tolist()),
            tuple(int((drawn[:-lag] & drawn[lag:]).sum()) for lag in range(1, steps)),
        )
        noise = random.standard_normal((steps, 623))
        found = judge(msgspec.structs.replace(made(noise, shapes, evidence), sampling=sampling))
        assert {finding.status for finding in found} == {"held"}


def searched(noise: np.ndarray, evidence: ConformanceEvidence) -> str:
    """What is said of noise [steps, d] on the sum of nobody, of a model of d parameters."""
    looked_at = noise[:, collecting._places(noise.shape[1])].astype(np.float64)
    count = len(np.unique(np.abs(looked_at)))
    changed = msgspec.structs.replace(evidence, empty_values=looked_at.size, distinct_values=count)
    return {f.name: f.status for f in judge(changed)}["fresh noise"]


@pytest.mark.parametrize("size", [300, 2000, 800_000])
def test_values_of_sound_noise_are_different_ones_in_a_large_model_too(
    size: int, evidence: ConformanceEvidence
) -> None:
    """Float32 has too few values for all of them: those of 16 bits of entropy are found still."""
    random = np.random.default_rng(7)
    assert searched(random.standard_normal((4, size)).astype(np.float32), evidence) == "held"
    few = ndtri((random.integers(1 << 16, size=(4, size)) + 0.5) / (1 << 16)).astype(np.float32)
    assert searched(few, evidence) == ("broken" if size > 1000 else "held")


def same(name: str, /, **fields: Any) -> Callable[[ConformanceEvidence], ConformanceEvidence]:
    """Other fields, of the evidence itself, of a part of it, or of the first of a list."""

    def change(evidence: ConformanceEvidence) -> ConformanceEvidence:
        part = getattr(evidence, name) if name else evidence
        if isinstance(part, tuple):
            return msgspec.structs.replace(evidence, **{name: (msgspec.structs.replace(part[0], **fields), *part[1:])})
        changed = msgspec.structs.replace(part, **fields)
        return msgspec.structs.replace(evidence, **{name: changed}) if name else changed

    return change


def less(name: str) -> Callable[[ConformanceEvidence], ConformanceEvidence]:
    return lambda evidence: msgspec.structs.replace(evidence, **{name: getattr(evidence, name)[1:]})


def short(evidence: ConformanceEvidence) -> ConformanceEvidence:
    """Of the least number of steps, where the study has more."""
    steps, of = LEAST_KEPT, len(evidence.step_mean_squares)
    return msgspec.structs.replace(
        evidence,
        noise=tuple(msgspec.structs.replace(p, count=p.count * steps // of) for p in evidence.noise),
        noise_values=evidence.noise_values * steps // of,
        step_mean_squares=evidence.step_mean_squares[:steps],
        step_correlations=evidence.step_correlations[: steps - 1],
    )


def one_value(evidence: ConformanceEvidence) -> ConformanceEvidence:
    steps, noise = len(evidence.step_mean_squares), (Scale("x", 1, 1.0),)
    return msgspec.structs.replace(
        evidence, noise=noise, noise_values=1, empty_values=1, distinct_values=1, step_mean_squares=(1.0,) * steps
    )


def one_round(evidence: ConformanceEvidence) -> ConformanceEvidence:
    return msgspec.structs.replace(evidence, bookkeeping=Bookkeeping(3, 3, 3, 3, 3))


def renamed(evidence: ConformanceEvidence) -> ConformanceEvidence:
    return msgspec.structs.replace(evidence, influences=tuple(Influence("x", 0.0) for _ in evidence.influences))


def sizes(*of: int) -> Callable[[ConformanceEvidence], ConformanceEvidence]:
    return lambda e: same("sampling", sizes=(*of, *e.sampling.sizes[len(of) :]))(e)


HOLLOW: dict[str, Callable[[ConformanceEvidence], ConformanceEvidence]] = {
    "few steps": short,
    "few steps of one study": same("", step_mean_squares=(1.0,) * 12),
    "few correlations": less("step_correlations"),
    "noise of one value": one_value,
    "a parameter left out": less("noise"),
    "a parameter of another name": same("noise", name="x"),
    "a parameter of few values": same("noise", count=1),
    "a parameter twice": lambda e: msgspec.structs.replace(e, noise=(e.noise[0], *e.noise[:-1])),
    "more values than there are": same("", noise_values=10**12),
    "few values of nobody": same("", empty_values=1, distinct_values=1),
    "more different values than there are": same("", distinct_values=10**9),
    "other noise on steps than on parameters": lambda e: same("", step_mean_squares=(3.0, *e.step_mean_squares[1:]))(e),
    "a negative square": same("noise", mean_square=-1.0),
    "a distance that is none": same("", kolmogorov_smirnov=-1.0),
    "a correlation that is none": same("", start_correlation=1e300),
    "no influences": same("", influences=()),
    "an influence left out": less("influences"),
    "influences of nobody": renamed,
    "a negative influence": same("influences", norm=-5.0),
    "a made gradient that moves nothing": lambda e: msgspec.structs.replace(
        e, influences=tuple(msgspec.structs.replace(i, norm=0.0) for i in e.influences)
    ),
    "few samples": lambda e: same("sampling", sizes=e.sampling.sizes[1:])(e),
    "a sample larger than all": sizes(10**15),
    "a sample of less than nobody": sizes(-1),
    "other samples than inclusions": lambda e: sizes(e.sampling.sizes[0] ^ 1)(e),
    "a unit in more samples than there are": lambda e: same("sampling", inclusions=(301, *e.sampling.inclusions[1:]))(e),
    "more units than are told of": same("sampling", units=10**15),
    "no units expected": same("sampling", expected_units=0),
    "more met again than there are": lambda e: same("sampling", overlaps=(10**9,) * len(e.sampling.overlaps))(e),
    "samples of few lags": lambda e: same("sampling", overlaps=e.sampling.overlaps[:5])(e),
    "a family of directions left out": less("directions"),
    "a family of few squares": same("directions", count=1),
    "a family twice": lambda e: msgspec.structs.replace(e, directions=(e.directions[0], *e.directions)),
    "more noise in a family than there is": same("directions", mean_square=1e6),
    "likeness of a parameter left out": less("likeness"),
    "likeness of few values": same("likeness", values=2),
    "likeness of more pairs than there are": same("likeness", square_sum=1e9),
    "no likeness at all": lambda e: msgspec.structs.replace(
        e, likeness=tuple(msgspec.structs.replace(one, square_sum=0.0) for one in e.likeness)
    ),
    "steps more like each other than likeness has it": lambda e: same(
        "", step_correlations=(0.9,) * len(e.step_correlations)
    )(e),
    "few shifts": same("shifts", count=1),
    "a shift that was not": same("shifts", largest=10**9),
    "no shift at all": same("shifts", deviation=0.0),
    "others' sums left out": less("others_moved"),
    "others' sums of less than nothing": same("others_moved", norm=-1.0),
    "an influence after all rounds left out": lambda e: msgspec.structs.replace(e, influences=e.influences[:-1]),
    "one round": one_round,
    "steps that were not": same("bookkeeping", touched=-1),
    "one value compared": same("", compared=1),
    "another member": same("", member="charite"),
}  # fmt: skip


@pytest.mark.parametrize("how", HOLLOW)
def test_hollow_evidence_is_refused(how: str) -> None:
    agreement = study(study={"rounds": 9})
    whole = watched(agreement)
    conformance.check_whole(whole, agreement)
    assert {finding.status for finding in judge(msgspec.structs.replace(whole, kolmogorov_smirnov=1e-5))} == {"held"}
    with pytest.raises(VerificationFailed):
        conformance.check_whole(HOLLOW[how](whole), agreement)


@pytest.mark.parametrize("units", [1, 2, 4, 48])
def test_few_units_are_left_out_in_turn(units: int) -> None:
    hospital = target()
    few = collecting._chosen(hospital.records, np.arange(48) < units)
    evidence = conformance.collect(dataclasses.replace(hospital, records=few))
    conformance.check_whole(evidence, hospital.agreement)
    left_out = min(5, units) if units > 1 else 0
    assert len(evidence.influences) == 6 + 5 + 2 * left_out + (units > 1)
    assert len(evidence.others_moved) == left_out + (units > 1)


@pytest.mark.parametrize("member", range(3))
def test_how_many_values_each_parameter_has_follows_from_the_agreement(member: int) -> None:
    agreement = study()
    own = agreement.members[member]
    model = build_model(agreement, own.modality, anchors(own.modality))
    assert private_sizes(agreement, own.node_id) == {name: p.numel() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(2, 500), (1, 126), (3, 7)])
def test_so_it_does_for_long_and_short_signals_and_large_images(shape: tuple[int, ...]) -> None:
    agreement = study()
    for kind, full in (("signal", shape), ("image", (*shape, 9))):
        modality = msgspec.structs.replace(agreement.modalities[0], tokeniser=kind, shape=full)
        made = Tokeniser(modality, agreement.model, np.zeros((4, *full), np.float32))
        changed = msgspec.structs.replace(agreement, modalities=(modality, *agreement.modalities[1:]))
        size = private_sizes(changed, agreement.members[0].node_id)["tokeniser.projector.weight"]
        assert size == made.projector.weight.numel()
