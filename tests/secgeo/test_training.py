"""DP training: what is clipped, noised and counted; the anchor gradient stays public; planted bugs are caught."""

import dataclasses
import math

import msgspec
import numpy as np
import pytest
import torch
from scipy import stats
from tiny_study import KINDS, agreement, anchors, patients, records, trainer, view
from torch.nn import functional

from keys.errors import ConfigError, LocalProtocolError
from secgeo import training
from secgeo.accountant import epsilon_after
from secgeo.datasets import LabelledRecords
from secgeo.geometry import cka, gram
from secgeo.noise import NoiseSource
from secgeo.training import LocalTrainer, alignment_loss, coordinate_loss
from secgeo.update import Layout, SharedState, apply_sum

NOISELESS = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, "sample_rate": 1.0}


def consortium(study, rounds: int = 1):
    """Trainers of all three hospitals and the state after `rounds` rounds with plain float sums."""
    layout, state = Layout.from_agreement(study), SharedState.initial(study)
    trainers = [trainer(study, i, key=10 + i) for i in range(3)]
    for _ in range(rounds):
        state = apply_sum(state, layout, sum(t.train_round(state).vector(layout) for t in trainers), study)
    return trainers, state


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def away(t: LocalTrainer) -> LocalTrainer:
    """Away from the start, where heads are zero and so are the gradients of all that comes before."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in t.model.private_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return t


def test_a_noiseless_step_is_the_plain_gradient_step_including_the_anchors() -> None:
    study = agreement(privacy=NOISELESS, training={"alignment_weight": 0.7, "coordinate_weight": 0.3})
    (first, _, _), state = consortium(study)
    first.load_shared(state)
    away(first)
    model, data = first.model, records("table")
    parameters = model.private_parameters()
    before = [p.detach().clone() for p in parameters]
    x, y = torch.from_numpy(data.features), torch.from_numpy(data.labels)
    private = functional.cross_entropy(model(x), y, reduction="sum") / study.members[0].expected_batch_size
    embedded = model.embed(torch.from_numpy(anchors("table")))
    public = 0.7 * alignment_loss(embedded, torch.tensor(state.gram).float())
    public = public + 0.3 * coordinate_loss(embedded, torch.tensor(state.coordinates).float())
    wanted = torch.autograd.grad(private + public, parameters)
    first.step()
    for p, old, gradient in zip(parameters, before, wanted, strict=True):
        assert gradient.norm() > 1e-3
        torch.testing.assert_close(old - p.detach(), 0.1 * gradient, rtol=1e-3, atol=1e-5)


def noised_gradient(t: LocalTrainer, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped sum and noised p.grad of one pre_step on the chosen records."""
    t._optimizer.zero_grad(set_to_none=True)
    t._private_gradient(chosen)
    t._optimizer.pre_step()
    result = t._optimizer.vector.summed_grad, t._optimizer.vector.grad
    t._optimizer.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize("index", range(3))
def test_one_record_moves_the_sum_by_at_most_the_clip_norm_over_all_parameters(index: int) -> None:
    study = agreement(privacy={"max_grad_norm": 0.01})
    t = trainer(study, index)
    with torch.no_grad():
        for p in t.model.private_parameters():
            p.add_(0.3 * torch.randn_like(p))
    everyone = np.ones(24, dtype=bool)
    total = noised_gradient(t, everyone)[0]
    for left_out in range(4):
        mask = everyone.copy()
        mask[left_out] = False
        assert (total - noised_gradient(t, mask)[0]).norm() <= 0.01 * (1 + 1e-3)
    single = np.arange(24) == 0
    assert noised_gradient(t, single)[0].norm() == pytest.approx(0.01, rel=1e-3)
    assert len(total) == sum(p.numel() for p in t.model.parameters() if p.requires_grad)


def test_noise_has_the_agreed_scale_on_every_parameter() -> None:
    study = agreement(privacy={"noise_multiplier": 2.0, "max_grad_norm": 0.5}, batch_sizes=(4.0, 6.0, 6.0))
    t = trainer(study)
    nobody = np.zeros(24, dtype=bool)
    draws = torch.stack([noised_gradient(t, nobody)[1] for _ in range(50)])
    assert float(draws.std()) == pytest.approx(2.0 * 0.5 / 4.0, rel=0.02)
    assert (draws.std(dim=0) > 0).all()
    for part in t._optimizer.split(draws):
        assert float(part.std()) == pytest.approx(0.25, rel=0.35)
    assert len(torch.unique(draws)) > 0.99 * draws.numel()
    assert stats.kstest(draws.flatten().double().numpy() / 0.25, "norm").pvalue > 1e-3


def test_no_noise_is_shared_by_steps_nodes_and_restarts() -> None:
    """As drawn by the real optimiser: no value of one vector is in another, and no two vectors go together."""
    nobody, study = np.zeros(24, dtype=bool), agreement()
    nodes = [
        LocalTrainer(study, study.members[i], records(kind), anchors(kind), noise=NoiseSource(), device="cpu")
        for i, kind in [*enumerate(KINDS), *enumerate(KINDS)]  # every hospital, and every hospital started again
    ]
    vectors = [noised_gradient(node, nobody)[1].double().numpy() for node in nodes for _ in range(3)]
    for i, first in enumerate(vectors):
        for second in vectors[:i]:
            size = min(len(first), len(second))
            assert len(np.intersect1d(first, second)) < 3, "float32 values may meet by chance"
            assert abs(np.corrcoef(first[:size], second[:size])[0, 1]) < 6 / np.sqrt(size)


def test_noise_is_added_in_float64_and_only_then_rounded() -> None:
    """The mitigation of floating-point attacks as the optimiser applies it: what float32 would do first shows in the last bit."""
    t, nobody = trainer(agreement(), key=3), np.zeros(24, dtype=bool)
    t._optimizer.zero_grad(set_to_none=True)
    t._private_gradient(nobody)
    t._optimizer.clip_and_accumulate()
    t._optimizer.vector.summed_grad = torch.full_like(t._optimizer.vector, 0.3)
    t._optimizer.add_noise()
    noised = t._optimizer.vector.grad
    drawn = NoiseSource((3).to_bytes(32, "big")).gaussian(noised.shape, 1.0)
    summed = torch.full_like(noised, 0.3)
    assert torch.equal(noised, (summed.double() + drawn).float())
    assert (noised != summed + drawn.float()).any()


def test_noise_comes_from_the_noise_source_alone() -> None:
    torch.manual_seed(0)
    first = noised_gradient(trainer(agreement(), key=1), np.zeros(24, dtype=bool))[1]
    torch.manual_seed(1)
    second = noised_gradient(trainer(agreement(), key=1), np.zeros(24, dtype=bool))[1]
    torch.manual_seed(1)
    other = noised_gradient(trainer(agreement(), key=2), np.zeros(24, dtype=bool))[1]
    assert torch.equal(first, second)
    assert not torch.any(second == other)


def test_the_divisor_is_the_public_batch_size_not_the_sampled_one() -> None:
    t = trainer(agreement(privacy={"noise_multiplier": 0.0}, batch_sizes=(8.0, 6.0, 6.0)))
    for count in (1, 5, 24):
        total, gradient = noised_gradient(t, np.arange(24) < count)
        torch.testing.assert_close(gradient, total / 8.0)


def test_a_large_sample_in_pieces_is_the_same_single_step() -> None:
    t, everyone = trainer(agreement(privacy={"max_grad_norm": 0.05})), np.ones(24, dtype=bool)
    whole = noised_gradient(t, everyone)[0]
    t.physical_batch = 7
    torch.testing.assert_close(noised_gradient(t, everyone)[0], whole, rtol=1e-4, atol=1e-6)
    assert sum(steps for _, _, steps in t._accountant.history) == 2


@pytest.mark.parametrize("index", range(3))
def test_an_extreme_record_cannot_poison_the_sum(index: int) -> None:
    """Values near the float32 limit overflow inside the model; the record still counts for at most the clip norm."""
    study = agreement()
    kind = study.members[index].modality
    data = records(kind)
    features = data.features.copy()
    features[0] = np.where(np.arange(features[0].size).reshape(features[0].shape) % 2, 3e38, -3e38)
    t = LocalTrainer(
        study,
        study.members[index],
        LabelledRecords(features, data.labels),
        anchors(kind),
        noise=NoiseSource(),
        device="cpu",
    )
    total, gradient = noised_gradient(t, np.arange(24) == 0)
    assert torch.isfinite(gradient).all()
    assert total.norm() <= 1.0 + 1e-3


@pytest.mark.parametrize(("most", "which"), [(256, 3), (5, 3), (5, 23)])
def test_a_gradient_that_is_not_finite_counts_as_zero(most: int, which: int) -> None:
    """In the only pass of a step, in an earlier one, and in the last one."""
    t, everyone = away(trainer(agreement())), np.ones(24, dtype=bool)
    t.physical_batch = most
    t.model.tokeniser.forward = lambda x: t.model.tokeniser.projector(x).reshape(-1, 2, 16)  # no cleaning of the input
    without = noised_gradient(t, np.arange(24) != which)[0]
    t._features[which, 0] = float("nan")
    total, gradient = noised_gradient(t, everyone)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(total, without, rtol=1e-4, atol=1e-5)


def test_nobody_adds_nothing_after_a_step_with_everybody() -> None:
    t, everyone = away(trainer(agreement())), np.ones(24, dtype=bool)
    assert noised_gradient(t, everyone)[0].norm() > 0.1
    assert not noised_gradient(t, ~everyone)[0].any()


def taken_gradient(t: LocalTrainer) -> torch.Tensor:
    """What a step takes, its parts put together."""
    taken = list[torch.Tensor]()
    inner = t._optimizer.original_optimizer
    handle = inner.register_step_pre_hook(lambda *_: taken.append(flat(p.grad for p in t._optimizer.parameters)))
    t.step()
    handle.remove()
    return taken[0]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_nothing_of_a_step_that_failed_is_in_the_next_one(failing: int) -> None:
    """Whichever of its three passes it was."""
    t = away(trainer(agreement(privacy=NOISELESS)))
    t.physical_batch = 8
    for group in t._optimizer.param_groups:
        group["lr"] = 0.0
    whole = taken_gradient(t)
    forward, calls = t._hooked.forward, []

    def breaks(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == failing:
            raise RuntimeError("out of memory")
        return forward(x)

    t._hooked.forward = breaks
    with pytest.raises(RuntimeError, match="out of memory"):
        t.step()
    t._hooked.forward = forward
    torch.testing.assert_close(taken_gradient(t), whole, rtol=1e-4, atol=1e-6)
    assert t.steps_taken == 2


def test_a_later_pass_that_does_not_reach_everything_does_not_take_what_the_last_one_left() -> None:
    t, calls = away(trainer(agreement())), []
    t.physical_batch = 12
    forward = t.model.forward

    def second_without_head(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return forward(x) if len(calls) == 1 else t.model.embed(x)[:, :3]

    t.model.forward = second_without_head
    with pytest.raises(LocalProtocolError, match="has not reached"):
        t._private_gradient(np.ones(24, dtype=bool))
    assert len(calls) == 2


def test_empty_samples_work_are_noised_and_are_counted() -> None:
    t = trainer(agreement(privacy={"sample_rate": 1e-9}))
    before = flat(t.model.private_parameters())
    for _ in range(3):
        t.step()
    assert t.steps_taken == 3
    assert (flat(t.model.private_parameters()) != before).float().mean() > 0.99


def test_accountant_and_optimiser_count_the_same_steps() -> None:
    trainers, _ = consortium(agreement(), rounds=3)
    for t in trainers:
        assert t.steps_taken == t._optimizer_steps == 2 * 3
        assert t.epsilon() == epsilon_after(agreement().privacy, 6, 1e-3)
        assert t._accountant.get_epsilon(1e-3) == pytest.approx(t.epsilon())


def test_a_step_behind_the_accountants_back_is_caught() -> None:
    t = trainer(agreement())
    t.step()
    t._optimizer.original_optimizer.step()
    with pytest.raises(LocalProtocolError, match="2 optimiser steps but 1 booked"):
        _ = t.steps_taken


def test_a_planted_layer_is_caught_and_has_no_gradient() -> None:
    t = trainer(agreement())
    t.model.planted, forward = torch.nn.Linear(16, 3), t.model.forward
    t.model.forward = lambda x: forward(x) + t.model.planted(t.model.embed(x))
    with pytest.raises(LocalProtocolError, match="other parameters than the module trains"):
        t.step()
    assert t.steps_taken == 0
    assert all(p.grad is None for p in t.model.parameters())


@pytest.mark.parametrize("change", ["left out", "frozen"])
def test_a_parameter_that_the_optimiser_does_not_train_is_caught(change: str) -> None:
    t = trainer(agreement())
    if change == "left out":
        t._optimizer.param_groups[1]["params"].pop()
    else:
        t.model.head.bias.requires_grad_(False)
    with pytest.raises(LocalProtocolError, match="exactly the private parameters"):
        t.step()
    assert t.steps_taken == 0


def test_using_a_clipped_gradient_twice_is_refused() -> None:
    t = trainer(agreement())
    t._private_gradient(np.ones(24, dtype=bool))
    t._optimizer.pre_step()
    with pytest.raises(LocalProtocolError, match="twice"):
        t._optimizer.add_noise()


def test_an_optimiser_with_another_order_is_caught() -> None:
    """Gradients of one parameter would go to another."""
    t = trainer(agreement())
    t._optimizer.param_groups[0]["params"].reverse()
    with pytest.raises(LocalProtocolError, match="in their order"):
        t.step()


def clipped_norm(rows: torch.Tensor, max_grad_norm: float) -> float:
    """How far one unit with this gradient [1, d] moves the clipped sum, in float64."""
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(rows.shape[1]))], lr=0.1)
    settings = {"noise_multiplier": 1.0, "max_grad_norm": max_grad_norm, "expected_batch_size": 1}
    optimizer = training.CryptographicDPOptimizer(inner, noise=NoiseSource(), **settings)
    optimizer.vector.grad_sample = rows
    optimizer.clip_and_accumulate()
    return float(optimizer.vector.summed_grad.double().norm())


@pytest.mark.parametrize("size", [1, training.NORM_VALUES, training.NORM_VALUES + 1, 3_000_000])
@pytest.mark.parametrize("spread", [False, True], ids=["all alike", "normal"])
def test_a_norm_of_millions_of_values_is_not_taken_for_less_than_it_is(size: int, spread: bool) -> None:
    """Summed in one go, 3,000,000 squares would leave a unit 5e-5 to 1e-3 more than the clip norm."""
    for value in (0.1, 0.3, 0.7):
        rows = value * (torch.randn(1, size) if spread else torch.ones(1, size))
        assert clipped_norm(rows, 1e-3) <= 1e-3 * (1 + 5e-6)


@pytest.mark.parametrize(("pieces", "most"), [(1, 1.6e-5), (1000, 2.0e-5), (5000, 4.0e-5)])
def test_a_norm_holds_for_the_worst_values_too(pieces: int, most: float) -> None:
    """Each too small to change, in float32, the sum that follows the first; in every piece, and so are the pieces."""
    piece = torch.full((training.NORM_VALUES,), 2.0**-12 * 0.999)
    piece[0] = 1.0
    rows = (piece.repeat(pieces, 1) * 2.0**-12 * 0.999).index_copy_(0, torch.tensor([0]), piece.unsqueeze(0))
    assert clipped_norm(rows.reshape(1, -1), 1e-3) <= 1e-3 * (1 + most)


def test_a_parameter_that_the_backward_pass_does_not_reach_is_found_out() -> None:
    t = trainer(agreement())
    forward = t.model.head.forward
    t.model.head.forward = lambda x: forward(x.detach())
    with pytest.raises(LocalProtocolError, match="has not reached"):
        t.step()
    assert t.steps_taken == 0


def test_epsilon_limits() -> None:
    privacy = agreement().privacy
    assert epsilon_after(privacy, 0, 1e-3) == 0.0
    assert math.isinf(epsilon_after(agreement(privacy=NOISELESS).privacy, 1, 1e-3))
    assert 0 < epsilon_after(privacy, 10, 1e-3) < epsilon_after(privacy, 100, 1e-3)
    assert epsilon_after(privacy, 10, 1e-3) < epsilon_after(privacy, 10, 1e-6)


def test_the_anchor_gradient_does_not_depend_on_private_data() -> None:
    """Two hospitals with different records and the same parameters have the same anchor gradient and warm-up."""
    study = agreement()
    _, state = consortium(study)
    member, noise = study.members[0], NoiseSource(bytes(32))
    others = LabelledRecords(view("table", patients(24, 77)) * 50, np.full(24, 2, dtype=np.int64))
    pair = [
        LocalTrainer(study, member, data, anchors("table"), noise=noise, device="cpu")
        for data in (records("table"), others)
    ]
    for t in pair:
        t.load_shared(state)
    gradients = [[g for g in t._public_gradient(t._optimizer.parameters) if g is not None] for t in pair]
    assert torch.equal(flat(gradients[0]), flat(gradients[1]))
    for t in pair:
        t.warm_up()
    assert torch.equal(flat(pair[0].model.private_parameters()), flat(pair[1].model.private_parameters()))
    assert np.array_equal(pair[0].anchor_gram(), pair[1].anchor_gram())


def test_the_anchor_pass_leaves_no_trace_in_per_record_gradients() -> None:
    t = trainer(agreement(privacy=NOISELESS))
    _, state = consortium(agreement())
    t.load_shared(state)
    everyone = np.ones(24, dtype=bool)
    clean = noised_gradient(t, everyone)[0]
    t._hooked.set_grad_sample_to_none()
    t._public_gradient(t._optimizer.parameters)
    assert all(getattr(p, "grad_sample", None) is None and p.grad is None for p in t._optimizer.parameters)
    assert torch.equal(noised_gradient(t, everyone)[0], clean)
    assert not t._hooked.hooks_enabled


def test_warm_up_costs_nothing_and_raises_alignment() -> None:
    study = agreement(training={"warmup_steps": 60})
    trainers, state = consortium(study)
    for t in trainers:
        t.load_shared(state)
        B, head = flat(t.model.shared_parameters()), flat(t.model.head.parameters())
        before = cka(t.anchor_gram(), state.gram)
        t.warm_up()
        assert cka(t.anchor_gram(), state.gram) > before
        assert t.steps_taken == 0
        assert torch.equal(flat(t.model.shared_parameters()), B)
        assert torch.equal(flat(t.model.head.parameters()), head)


def test_first_round_sends_geometry_only() -> None:
    study = agreement()
    t = trainer(study)
    t.warm_up()
    update = t.train_round(SharedState.initial(study))
    assert update.steps == t.steps_taken == 0
    assert not any(delta.any() for delta in update.delta_b.values())
    assert update.vector(Layout.from_agreement(study)).dtype == np.float64


def test_update_is_the_change_of_the_shared_direction_only() -> None:
    study = agreement()
    trainers, state = consortium(study, rounds=2)
    update = trainers[1].train_round(state)
    for name, layer in trainers[1].model.adapted.items():
        after = layer.direction.weight.detach().double().numpy()
        np.testing.assert_allclose(update.delta_b[name], after - state.B[name], atol=1e-12)
        assert update.delta_b[name].any()
    np.testing.assert_allclose(update.gram, trainers[1].anchor_gram())
    assert np.linalg.norm(update.gram) == pytest.approx(1.0)
    assert update.steps == 3


def test_all_nodes_agree_after_loading_and_a_merge_changes_no_output() -> None:
    study = agreement(privacy=NOISELESS, training={"merge_every_rounds": 3})
    trainers, state = consortium(study, rounds=2)
    layout, x = Layout.from_agreement(study), records("table").features
    total = sum(t.train_round(state).vector(layout) for t in trainers)
    plain = agreement(privacy=NOISELESS)
    trainers[0].load_shared(apply_sum(state, layout, total, plain))
    unmerged = trainers[0].embed(x)
    merged = apply_sum(state, layout, total, study)
    assert merged.generation == 1
    trainers[0].load_shared(merged)
    np.testing.assert_allclose(trainers[0].embed(x), unmerged, atol=1e-4)
    trainers[1].load_shared(merged)
    for name, layer in trainers[0].model.adapted.items():
        assert torch.equal(layer.base, trainers[1].model.adapted[name].base)
        assert torch.equal(layer.direction.weight, trainers[1].model.adapted[name].direction.weight)


@pytest.mark.parametrize("index", range(3))
def test_training_learns(index: int) -> None:
    study = agreement(privacy=NOISELESS, training={"steps_per_round": 40})
    trainers, _ = consortium(study, rounds=3)
    kind = list(KINDS)[index]
    data = records(kind)
    assert trainers[index].evaluate(data.features, data.labels) > 0.6


def test_losses_match_numpy_and_reach_zero() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    E = generator.normal(size=(12, 16))
    consensus = gram(generator.normal(size=(12, 4)))
    consensus -= consensus.mean(axis=0)
    consensus -= consensus.mean(axis=1, keepdims=True)
    loss = alignment_loss(torch.tensor(E), torch.tensor(consensus))
    assert float(loss) == pytest.approx(1.0 - cka(gram(E), consensus))
    Z = E[:, :3] - E[:, :3].mean(axis=0)
    assert float(coordinate_loss(torch.tensor(E), torch.tensor(Z / np.linalg.norm(Z)))) == pytest.approx(0.0, abs=1e-12)


def test_local_state_round_trips_and_never_holds_the_shared_direction(tmp_path) -> None:
    trainers, state = consortium(agreement(), rounds=2)
    np.savez(tmp_path / "local.npz", **trainers[0].local_state())
    fresh = trainer(agreement())
    with np.load(tmp_path / "local.npz", allow_pickle=False) as arrays:
        assert not any("direction" in name for name in arrays)
        fresh.load_local_state(dict(arrays))
    x = records("table").features
    for t in (fresh, trainers[0]):
        t.load_shared(state)
    assert np.array_equal(fresh.embed(x), trainers[0].embed(x))
    broken = trainers[0].local_state()
    broken["head.weight"][0, 0] = np.nan
    with pytest.raises(ConfigError, match=r"head\.weight"):
        fresh.load_local_state(broken)
    with pytest.raises(ConfigError, match="malformed"):
        fresh.load_local_state({})


def test_wrong_anchors_records_and_labels_are_refused() -> None:
    study, noise = agreement(), NoiseSource(bytes(32))
    member, data = study.members[0], records("table")
    changed = anchors("table")
    changed[0, 0] += 1e-3
    with pytest.raises(ConfigError, match="not the anchors"):
        LocalTrainer(study, member, data, changed, noise=noise)
    with pytest.raises(ConfigError, match="records have shape"):
        LocalTrainer(study, member, records("image"), anchors("table"), noise=noise)
    with pytest.raises(ConfigError, match="3 classes"):
        LocalTrainer(study, member, dataclasses.replace(data, labels=data.labels + 3), anchors("table"), noise=noise)


# --- patients with several records


MOST = 3
OWNERS = np.array([f"patient-{number // 4}" for number in range(24)])
"""Six patients with four records each, of which three are used."""


def patient_trainer(unit: str, sample_rate: float = 0.25, max_grad_norm: float = 0.01) -> LocalTrainer:
    most = MOST if unit == "patient" else 0
    privacy = {"unit": unit, "records_per_patient": most, "sample_rate": sample_rate, "max_grad_norm": max_grad_norm}
    study, data = agreement(privacy=privacy), records("table")
    features = np.repeat(
        data.features[::4], 4, axis=0
    )  # the records of a patient are alike, and so are their gradients
    labels = np.repeat(data.labels[::4], 4)
    owned = LabelledRecords(features, labels, OWNERS)
    return LocalTrainer(study, study.members[0], owned, anchors("table"), noise=NoiseSource(bytes(32)), device="cpu")


def without_patient(t: LocalTrainer, patient: int) -> torch.Tensor:
    """How the clipped sum moves when a patient is taken out of a batch of all."""
    units = len(t._units)
    everyone, others = np.ones(units, dtype=bool), np.ones(units, dtype=bool)
    others[[unit for unit in range(units) if OWNERS[t._units[unit][0]] == f"patient-{patient}"]] = False
    return (noised_gradient(t, everyone)[0] - noised_gradient(t, others)[0]).norm()


def test_a_patient_moves_the_sum_by_at_most_the_clip_norm_and_clipping_by_record_would_not_hold_that() -> None:
    by_patient, by_record = patient_trainer("patient"), patient_trainer("record")
    for patient in range(6):
        assert without_patient(by_patient, patient) <= 0.01 * (1 + 1e-3)
        assert (
            without_patient(by_record, patient) > 0.03
        )  # four records, each with a norm of 0.01, in nearly one direction


def test_gradients_of_a_patient_are_summed_before_they_are_clipped() -> None:
    t = away(patient_trainer("patient", max_grad_norm=1e6))
    one = np.arange(6) == 2
    records_of = np.flatnonzero(OWNERS == "patient-2")[:MOST]
    x, y = t._features[records_of], t._labels[records_of]
    loss = functional.cross_entropy(t.model(x), y, reduction="sum")
    wanted = flat(torch.autograd.grad(loss, t._optimizer.parameters))
    torch.testing.assert_close(noised_gradient(t, one)[0], wanted, rtol=1e-3, atol=1e-4)


def test_records_of_a_patient_are_summed_where_a_parameter_is_frozen_too() -> None:
    """As whoever asks for gradients without the largest one does."""
    t, everybody = away(patient_trainer("patient")), np.ones(6, dtype=bool)
    t._private_gradient(everybody)
    parts = dict(zip(t._optimizer.parameters, t._optimizer.split(t._optimizer.vector.grad_sample.clone()), strict=True))
    weight = t.model.tokeniser.projector.weight
    weight.requires_grad_(False)
    t._private_gradient(everybody)
    found = t._optimizer.split(t._optimizer.vector.grad_sample)
    for p, part in zip(t._optimizer.parameters, found, strict=True):
        assert p is not weight
        torch.testing.assert_close(part, parts[p], rtol=1e-4, atol=1e-5)


def test_autocast_does_not_weaken_clipping() -> None:
    """Gradients are computed in bfloat16, and each unit still moves the sum by the clip norm, as far as float32 can tell."""
    study = agreement(privacy={"noise_multiplier": 0.0, "max_grad_norm": 0.01})
    exact, quick = (
        LocalTrainer(
            study, study.members[1], records("image"), anchors("image"), noise=NoiseSource(bytes(32)), device="cpu",
            autocast=autocast,
        )
        for autocast in (False, True)
    )  # fmt: skip
    differences = []
    for unit in range(8):
        wanted, found = (noised_gradient(t, np.arange(len(t._units)) == unit)[0].double() for t in (exact, quick))
        assert found.norm().item() == pytest.approx(0.01, rel=1e-4)
        differences.append(((found - wanted).norm() / wanted.norm()).item())
    assert 0 < max(differences) < 0.1


def test_no_more_records_of_a_patient_are_used_than_agreed() -> None:
    t = patient_trainer("patient")
    assert [list(unit) for unit in t._units] == [
        [4 * patient + record for record in range(MOST)] for patient in range(6)
    ]


def test_patients_are_sampled_whole_with_the_agreed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    t, chosen = patient_trainer("patient"), []
    monkeypatch.setattr(
        t, "_private_gradient", lambda mask: (chosen.append(mask), t.__class__._private_gradient(t, mask))
    )
    for _ in range(200):
        t.step()
    sampled = np.stack(chosen)
    assert sampled.shape == (200, 6)
    assert sampled.mean() == pytest.approx(0.25, abs=0.05)


def passes(t: LocalTrainer, chosen: np.ndarray) -> tuple[list[int], torch.Tensor]:
    """How many records each backward pass of a step takes, and the clipped sum."""
    seen, forward = list[int](), t._hooked.forward
    t._hooked.forward = lambda x: (seen.append(len(x)), forward(x))[1]
    total = noised_gradient(t, chosen)[0]
    t._hooked.forward = forward
    return seen, total


def test_no_pass_takes_more_records_than_it_may_and_no_patient_is_split() -> None:
    t, everyone = patient_trainer("patient"), np.ones(6, dtype=bool)
    _, whole = passes(t, everyone)
    for most, wanted in (
        (1, [3] * 6),
        (4, [3] * 6),
        (5, [3] * 6),
        (6, [6] * 3),
        (8, [6] * 3),
        (9, [9, 9]),
        (17, [15, 3]),
        (18, [18]),
    ):
        t.physical_batch = most
        sizes, total = passes(t, everyone)
        assert sizes == wanted
        torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("records_of", [{"a": 2}, {"a": 2, "b": 1}, {"a": 1, "b": 3, "c": 2}], ids=str)
def test_patients_with_few_records_count_as_one_unit_too(records_of: dict[str, int]) -> None:
    """Alone in a pass, or beside those who have another number of records."""
    owners = np.repeat(list(records_of), list(records_of.values()))
    study = agreement(privacy={"unit": "patient", "records_per_patient": 3, "max_grad_norm": 0.01})
    data = records("table", len(owners))
    owned = LabelledRecords(data.features, data.labels, owners.astype(np.str_))
    t = away(LocalTrainer(study, study.members[0], owned, anchors("table"), noise=NoiseSource(bytes(32)), device="cpu"))
    wanted = torch.zeros(t._optimizer.vector.numel())
    for who in records_of:
        own = owners == who
        loss = functional.cross_entropy(t.model(t._features[own]), t._labels[own], reduction="sum")
        gradient = flat(torch.autograd.grad(loss, t._optimizer.parameters))
        wanted += gradient * min(1.0, 0.01 / gradient.norm().item())
    for most in (1, 3, 4, 256):
        t.physical_batch = most
        total = noised_gradient(t, np.ones(len(records_of), dtype=bool))[0]
        torch.testing.assert_close(total, wanted, rtol=1e-3, atol=1e-6)


def test_a_gpu_takes_larger_passes_within_its_memory() -> None:
    model = agreement().model
    assert training.physical_batch("cpu", model, 10**6) == training.PHYSICAL_BATCH
    wide = msgspec.structs.replace(model, width=256, feedforward=1024, layers=4, tokens=16)
    assert training.physical_batch("cuda", wide, 150_000) > 1024
    deep = msgspec.structs.replace(wide, layers=12, tokens=32)
    assert 100 < training.physical_batch("cuda", deep, 150_000) < 1024
    assert training.physical_batch("cuda", wide, 10**12) == 1


def test_one_record_that_is_not_finite_takes_its_patient_out_and_nobody_else() -> None:
    t = patient_trainer("patient")
    clean = noised_gradient(t, np.arange(6) != 0)[0]
    t._features[1] = torch.finfo(torch.float32).max
    dirty = noised_gradient(t, np.ones(6, dtype=bool))[0]
    assert torch.isfinite(dirty).all()
    assert (dirty - clean).norm() <= 0.01 * (1 + 1e-3)


def test_patients_cannot_be_protected_if_it_is_not_known_who_they_are() -> None:
    study = agreement(privacy={"unit": "patient", "records_per_patient": 2})
    with pytest.raises(ConfigError, match="whose each record is"):
        LocalTrainer(study, study.members[0], records("table"), anchors("table"), noise=NoiseSource(), device="cpu")
