"""Canaries in training: bounds stay below the claim for a sound trainer and pass it for bugs that cost much privacy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from audit import training
from audit.training import CanaryScores, Claim, bounds, check_whole, judge, refuted
from audit.watch import DiracCanaries, RandomCanaries, Seen, Watch, spoil
from keys.errors import ConfigError, VerificationFailed
from tests.audit.targets import target


def one_attack(claim: Claim, included: np.ndarray, scores: np.ndarray) -> CanaryScores:
    return CanaryScores("Dirac", "white box", claim, tuple(included.tolist()), tuple(scores.tolist()), 0.0)


def ratios(noise: float, claim: Claim, included: np.ndarray) -> np.ndarray:
    """Scores of canaries on the mechanism itself, with `noise` where `claim.noise_multiplier` is claimed."""
    random, shape = np.random.default_rng(1), (len(included), claim.steps)
    seen = noise * random.standard_normal(shape) + (random.random(shape) < claim.sample_rate) * included[:, None]
    exponent = (2 * seen - 1) / (2 * claim.noise_multiplier**2)
    return np.logaddexp(np.log1p(-claim.sample_rate), np.log(claim.sample_rate) + exponent).sum(axis=1)


CLAIM = Claim(5.0, 1e-3, 1.0, 0.25, 20)


def test_known_answer_the_mechanism_itself() -> None:
    """On the subsampled Gaussian mechanism no bound passes the truth, and the tighter one comes near."""
    included = np.random.default_rng(2).random(4000) < 0.5
    found = bounds(one_attack(CLAIM, included, ratios(1.0, CLAIM, included)))
    from audit.budget import Steps, epsilon_pld

    true = epsilon_pld([Steps(CLAIM.sample_rate, CLAIM.noise_multiplier, CLAIM.steps)], CLAIM.delta)
    assert 0.0 < found.steinke < found.one_run < true
    assert 0.6 * true < found.many_run < 1.02 * true


def test_the_mechanism_as_claimed_is_not_refuted_and_one_with_less_noise_is() -> None:
    included = np.random.default_rng(2).random(2000) < 0.5
    assert not refuted(one_attack(CLAIM, included, ratios(1.0, CLAIM, included)))
    assert not refuted(one_attack(CLAIM, included, ratios(1.5, CLAIM, included)))
    assert refuted(one_attack(CLAIM, included, ratios(0.6, CLAIM, included)))


def test_scores_that_say_nothing_bound_nothing() -> None:
    included = np.random.default_rng(2).random(500) < 0.5
    found = bounds(one_attack(CLAIM, included, np.zeros(500)))
    assert found.steinke == found.one_run == found.many_run == 0.0


@pytest.fixture(scope="module")
def sound() -> training.TrainingEvidence:
    return training.collect(target())


def test_a_sound_trainer_is_not_accused_and_the_attack_sees_something(sound: training.TrainingEvidence) -> None:
    assert {f.status for f in judge(sound) if f.name.startswith("Dirac")} == {"held"}
    assert "broken" not in {f.status for f in judge(sound)}
    white_box = sound.attacks[0]
    assert white_box.claim.steps == 9  # three rounds of three steps; the first round spends nothing
    assert 0.0 < bounds(white_box).many_run < white_box.claim.epsilon


def test_an_attack_that_shows_nothing_says_nothing(sound: training.TrainingEvidence) -> None:
    attack = sound.attacks[0]
    coins = np.random.default_rng(4).random(len(attack.scores)).tolist()
    blind = msgspec.structs.replace(sound, attacks=(msgspec.structs.replace(attack, scores=tuple(coins)),))
    found = judge(blind)[0]
    assert found.status == "not testable"
    assert "shows nothing" in found.detail


def apart(attack: CanaryScores) -> float:
    """How many standard errors the scores of canaries that were in lie above the others'."""
    scores, included = np.array(attack.scores), np.array(attack.included)
    one, other = scores[included], scores[~included]
    return float((one.mean() - other.mean()) / np.sqrt(one.var() / len(one) + other.var() / len(other) + 1e-30))


def test_both_views_of_gradient_canaries_see_them(sound: training.TrainingEvidence) -> None:
    dirac = [attack for attack in sound.attacks if attack.canaries == "Dirac"]
    assert len(dirac) == 2
    assert all(apart(attack) > 4.0 for attack in dirac)


def test_records_as_canaries_are_seen_where_there_is_no_noise() -> None:
    study = {"privacy": {"sample_rate": 0.5}, "training": {"steps_per_round": 20}}
    seen = {
        (attack.canaries, attack.view.split(",")[0]): apart(attack)
        for attack in training.collect(target("no-noise", **study)).attacks
    }
    assert seen["out of distribution", "white box"] > 5.0
    assert seen["out of distribution", "black box"] > 3.0
    assert seen["mislabelled", "white box"] + seen["mislabelled", "black box"] > 2.0


def test_canaries_are_in_input_space_and_gradient_space_white_box_and_black_box(
    sound: training.TrainingEvidence,
) -> None:
    assert {(attack.canaries, attack.view.split(",")[0]) for attack in sound.attacks} == {
        (kind, view) for kind in ("Dirac", "mislabelled", "out of distribution") for view in ("white box", "black box")
    }


def test_evidence_survives_json_and_gives_the_same_verdict(sound: training.TrainingEvidence) -> None:
    again = msgspec.json.decode(msgspec.json.encode(sound), type=training.TrainingEvidence)
    assert again == sound
    assert judge(again) == judge(sound)


@pytest.mark.parametrize("profile", ["fast", "full"])
@pytest.mark.parametrize(
    "sections", [{}, {"privacy": {"noise_multiplier": 0.0}}, {"training": {"steps_per_round": 50}}]
)
def test_what_is_collected_is_what_the_profile_calls_for(
    profile: training.Profile, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PRIVATE_STEPS", {"fast": 20, "full": 40})
    hospital = target(**sections)
    for others in (hospital.others, None):
        evidence = training.collect(replace(hospital, others=others), profile=profile)
        check_whole(evidence, hospital.agreement, profile)
        if evidence.attacks:
            with pytest.raises(VerificationFailed):
                check_whole(msgspec.structs.replace(evidence, others=others is None), hospital.agreement, profile)
            with pytest.raises(VerificationFailed):
                check_whole(evidence, hospital.agreement, "full" if profile == "fast" else "fast")


def test_evidence_that_is_not_whole_is_refused(sound: training.TrainingEvidence) -> None:
    first, *rest = sound.attacks
    short = msgspec.structs.replace(first, scores=first.scores[:-1], included=first.included[:-1])
    fewer = msgspec.structs.replace(first, claim=msgspec.structs.replace(first.claim, steps=8))
    for attacks in ((), (first,), (short, *rest), (fewer, *rest)):
        with pytest.raises(VerificationFailed, match="calls for"):
            check_whole(msgspec.structs.replace(sound, attacks=attacks), target().agreement, "fast")


def attack(number: int, **fields: Any) -> Callable[[training.TrainingEvidence], training.TrainingEvidence]:
    def change(evidence: training.TrainingEvidence) -> training.TrainingEvidence:
        attacks = list(evidence.attacks)
        attacks[number] = msgspec.structs.replace(attacks[number], **fields)
        return msgspec.structs.replace(evidence, attacks=tuple(attacks))

    return change


def all_in(evidence: training.TrainingEvidence) -> training.TrainingEvidence:
    """Every canary of every attack."""
    attacks = tuple(msgspec.structs.replace(a, included=(True,) * len(a.included)) for a in evidence.attacks)
    return msgspec.structs.replace(evidence, attacks=attacks)


def few_of_a_large_model(evidence: training.TrainingEvidence) -> training.TrainingEvidence:
    """Of a model of 10^9 parameters it would be ten canaries."""
    white, black, *rest = (
        msgspec.structs.replace(a, included=a.included[:10], scores=a.scores[:10]) if a.canaries == "Dirac" else a
        for a in evidence.attacks
    )
    return msgspec.structs.replace(evidence, parameters=10**9, attacks=(white, black, *rest))


def other_coins(evidence: training.TrainingEvidence) -> training.TrainingEvidence:
    return attack(3, included=tuple(not coin for coin in evidence.attacks[3].included))(evidence)


def twice_the_canaries(evidence: training.TrainingEvidence) -> training.TrainingEvidence:
    first = evidence.attacks[0]
    return attack(0, included=first.included * 2, scores=first.scores * 2)(evidence)


HOLLOW: dict[str, Callable[[training.TrainingEvidence], training.TrainingEvidence]] = {
    "a larger model": lambda e: msgspec.structs.replace(e, parameters=10**9),
    "few canaries in a larger model": few_of_a_large_model,
    "a smaller model": lambda e: msgspec.structs.replace(e, parameters=e.parameters - 1),
    "no units": lambda e: msgspec.structs.replace(e, units=0),
    "all canaries in": all_in,
    "no canary in": lambda e: attack(0, included=(False,) * len(e.attacks[0].included))(e),
    "two views of other coins": other_coins,
    "more canaries": twice_the_canaries,
    "one score": lambda e: attack(0, scores=(0.25,) * len(e.attacks[0].scores))(e),
    "one loss": lambda e: attack(3, scores=(0.0,) * len(e.attacks[3].scores))(e),
    "another member": lambda e: msgspec.structs.replace(e, member="charite"),
}


@pytest.mark.parametrize("how", HOLLOW)
def test_hollow_evidence_is_refused(how: str, sound: training.TrainingEvidence) -> None:
    check_whole(sound, target().agreement, "fast")
    with pytest.raises(VerificationFailed):
        check_whole(HOLLOW[how](sound), target().agreement, "fast")


def test_without_other_records_the_canaries_among_records_are_said_to_be_missing() -> None:
    evidence = training.collect(replace(target(), others=None))
    told = judge(evidence)[-1]
    assert (told.name, told.status) == ("canaries among the records", "not testable")
    assert "[evaluation]" in told.detail


@pytest.mark.parametrize("plant", ["no-noise", "half-noise", "clip-off"])
def test_bugs_that_cost_much_privacy_are_proved_by_canaries(plant: str) -> None:
    study = {"privacy": {"sample_rate": 0.5}, "training": {"steps_per_round": 10}}
    hospital = target(plant, **study)
    evidence = training.collect(hospital)
    check_whole(evidence, hospital.agreement, "fast")
    found = judge(evidence)
    assert found[0].status == "broken"


def test_patients_can_be_audited() -> None:
    from audit.plants import PLANTS

    patients = PLANTS["clip-each-record"].target(target())
    sound = training.collect(patients)
    assert sound.units == len(set(patients.records.patients))
    assert sound.attacks


def test_without_noise_there_is_nothing_to_audit() -> None:
    found = judge(training.collect(target(privacy={"noise_multiplier": 0.0})))
    assert [finding.status for finding in found] == ["not testable"]


def test_who_was_sampled_is_estimated_as_from_whole_gradients() -> None:
    """The estimate from products of gradients is the one from the gradients themselves."""
    t = target()
    records = training._canary_records(t, "out of distribution", t.others, 12)
    mirror, trainer, whole = training._Mirror(t, records), t.trainer(), t.trainer(records=records)
    for _ in range(5):
        trainer.step()
    whole.model.load_state_dict(trainer.model.state_dict())
    whole._private_gradient(np.ones(12, np.bool_))
    clip = 0.5 * t.agreement.privacy.max_grad_norm
    mirror._clip = clip  # so that some are clipped
    rows = whole._optimizer.vector.grad_sample.double() / clip
    assert (rows.norm(dim=1) > 1.0).any()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1.0)
    seen = torch.randn(rows.shape[1])
    expected = torch.linalg.solve(
        rows @ rows.T + 0.1 * torch.eye(12, dtype=torch.float64), rows @ (seen.double() / clip)
    )
    np.testing.assert_allclose(mirror.sampled(trainer, seen, 0.1), expected.numpy(), rtol=1e-4, atol=1e-4)


# --- the watch


def test_a_spoiled_gradient_is_not_finite_for_every_parameter() -> None:
    trainer = target().trainer()
    spoil(trainer)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "nan_to_num_", lambda tensor, **_: tensor)
        trainer._private_gradient(np.ones(len(trainer._units), np.bool_))
    finite = [name for name, p in trainer.model.named_parameters() if p.grad_sample[0].isfinite().all()]
    assert not finite


def test_canaries_go_through_the_products_sampling_and_clipping() -> None:
    t = target(
        privacy={"noise_multiplier": 0.0, "max_grad_norm": 0.5, "sample_rate": 1.0}, batch_sizes=(6.0, 48.0, 6.0)
    )
    trainer, seen = t.trainer(), list[Seen]()
    size = trainer._optimizer.vector.numel()
    canaries, included = DiracCanaries(10, size, 100.0), np.arange(10) < 4
    Watch(trainer, seen.append, canaries=canaries, included=included, fixed=np.arange(52) >= 48)
    trainer.step()
    np.testing.assert_allclose(canaries.project(seen[0].summed), np.where(included, 0.5, 0.0), atol=1e-5)


def test_a_canary_left_out_leaves_no_trace() -> None:
    t = target(privacy={"noise_multiplier": 0.0, "sample_rate": 1.0}, batch_sizes=(6.0, 48.0, 6.0))
    sums = []
    for canaries in (None, RandomCanaries(5, t.trainer()._optimizer.vector.numel(), 10.0)):
        trainer, seen = t.trainer(), list[Seen]()
        Watch(trainer, seen.append, canaries=canaries, included=None if canaries is None else np.zeros(5, np.bool_))
        trainer.step()
        sums.append(seen[0].summed.numpy())
    np.testing.assert_array_equal(*sums)


def test_there_are_no_more_dirac_canaries_than_parameters() -> None:
    with pytest.raises(ConfigError, match="parameters"):
        DiracCanaries(11, 10, 1.0)


def test_a_claim_without_end_is_not_passed() -> None:
    claim = msgspec.structs.replace(CLAIM, epsilon=None)
    included = np.random.default_rng(0).random(200) < 0.5
    evidence = training.TrainingEvidence(
        "hospital-1", (one_attack(claim, included, np.random.default_rng(1).normal(size=200)),), 10, 10, True
    )
    assert "claimed inf" in judge(evidence)[0].detail
