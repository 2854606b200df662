"""The flat vector and what nodes make of the sum; what a malicious contribution can and cannot do to it."""

import msgspec
import numpy as np
import pytest
from tiny_study import ANCHORS, agreement

from keys.errors import ConfigError, LocalProtocolError, VerificationFailed
from protocols.encoding import FixedPoint
from secgeo.geometry import centre, gram, normalise
from secgeo.trunk import adapted_layers, public_projection
from secgeo.update import (
    Layout,
    SharedState,
    apply_sum,
    gram_weight,
    noise_variance,
    pack,
    precision_weight,
    private_steps,
    unpack,
    value_range_ok,
)

STUDY = agreement()
LAYOUT = Layout.from_agreement(STUDY)


def update(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(seed))
    delta = {s.name: generator.normal(size=s.shape) * 0.1 for s in LAYOUT.segments}
    return delta, normalise(centre(gram(generator.normal(size=(ANCHORS, 16)))))


def vector(seed: int, weight: float = 1.0, g: float = 1.0) -> np.ndarray:
    delta, kernel = update(seed)
    return pack(LAYOUT, delta, dict.fromkeys(delta, weight), kernel, g)


def test_layout_order_and_size() -> None:
    names = [s.name for s in LAYOUT.segments]
    assert names == ["block0.qkv", "block0.out", "block0.up", "block0.down"]
    assert LAYOUT.size == sum(s.shape[0] * 2 + 1 for s in LAYOUT.segments) + ANCHORS * (ANCHORS + 1) // 2 + 1
    delta, kernel = update(1)
    flat = pack(LAYOUT, delta, dict.fromkeys(delta, 2.0), kernel, 3.0)
    np.testing.assert_allclose(flat[:2], 2.0 * delta["block0.qkv"][0])
    assert flat[96] == 2.0
    assert flat[LAYOUT.gram_start] == 3.0 * kernel[0, 0]
    assert flat[LAYOUT.gram_start + 1] == 3.0 * kernel[0, 1]
    assert flat[-1] == 3.0


def test_pack_and_unpack_round_trip() -> None:
    delta, kernel = update(2)
    parts = unpack(LAYOUT, pack(LAYOUT, delta, dict.fromkeys(delta, 0.5), kernel, 0.25))
    for name, value in delta.items():
        np.testing.assert_allclose(parts.weighted_delta_b[name] / parts.weights[name], value, atol=1e-15)
    np.testing.assert_allclose(parts.weighted_gram / parts.gram_weight, kernel, atol=1e-15)


def test_wrong_shapes_are_refused() -> None:
    delta, kernel = update(1)
    weights = dict.fromkeys(delta, 1.0)
    with pytest.raises(LocalProtocolError):
        pack(LAYOUT, {**delta, "block0.out": np.zeros((1, 1))}, weights, kernel, 1.0)
    with pytest.raises(LocalProtocolError):
        pack(LAYOUT, {"block0.qkv": delta["block0.qkv"]}, weights, kernel, 1.0)
    with pytest.raises(LocalProtocolError):
        pack(LAYOUT, delta, weights, kernel[:-1], 1.0)
    with pytest.raises(LocalProtocolError):
        unpack(LAYOUT, np.zeros(LAYOUT.size + 1))


def test_equal_weights_are_fedavg() -> None:
    study = agreement(precision={"rule": "equal"})
    total = sum(vector(seed) for seed in range(3))
    state = apply_sum(SharedState.initial(study), LAYOUT, total, study)
    for name in state.B:
        np.testing.assert_allclose(
            state.B[name], np.mean([update(seed)[0][name] for seed in range(3)], axis=0), atol=1e-12
        )
    assert precision_weight(study, study.members[0]) == 1.0


def test_weights_and_ridge_enter_the_mean() -> None:
    study = agreement(precision={"ridge": 0.5})
    total = vector(0, weight=1.0) + vector(1, weight=3.0) + vector(2, weight=1.0)
    state = apply_sum(SharedState.initial(study), LAYOUT, total, study)
    deltas = [update(seed)[0]["block0.up"] for seed in range(3)]
    np.testing.assert_allclose(state.B["block0.up"], (deltas[0] + 3 * deltas[1] + deltas[2]) / 5.5, atol=1e-12)


def test_p0_weighs_by_public_noise_and_is_clamped() -> None:
    study = agreement(batch_sizes=(1.0, 5.0, 50.0), precision={"tau_squared": 1e-3, "clamp": 4.0})
    small, middle, large = (precision_weight(study, m) for m in study.members)
    assert 0.25 == small < middle < 1.0 < large < 4.0
    v = noise_variance(study, study.members[0])
    assert v == pytest.approx(3 * 0.1**2 * (1.0 * 1.0 / 1.0) ** 2)
    equal = agreement(precision={"tau_squared": 1e-6})
    assert [precision_weight(equal, m) for m in equal.members] == [1.0, 1.0, 1.0]
    noiseless = agreement(batch_sizes=(1.0, 5.0, 50.0), privacy={"noise_multiplier": 0.0})
    assert precision_weight(noiseless, noiseless.members[0]) == 1.0


def test_ratio_of_p0_weights_is_that_of_the_formula() -> None:
    study = agreement(batch_sizes=(3.0, 6.0, 12.0), precision={"tau_squared": 2e-3, "clamp": 1e6})
    tau, members = study.precision.tau_squared, study.members
    ratio = precision_weight(study, members[2]) / precision_weight(study, members[0])
    assert ratio == pytest.approx((tau + noise_variance(study, members[0])) / (tau + noise_variance(study, members[2])))


def test_every_modality_counts_the_same_in_the_consensus() -> None:
    study = agreement()
    twice = msgspec.structs.replace(
        study, members=(*study.members, msgspec.structs.replace(study.members[0], node_id="x"))
    )
    assert [gram_weight(twice, m) for m in twice.members] == [0.5, 1.0, 1.0, 0.5]


def test_k_star_is_psd_and_centred_within_quantisation_and_exactly_after() -> None:
    code = FixedPoint.from_agreement(STUDY)
    encoded = sum(code.encode(vector(seed)).astype(np.uint64) for seed in range(3)).astype(np.uint32)
    total = code.decode(encoded, 3)
    raw = unpack(LAYOUT, total).weighted_gram / 3.0
    assert np.linalg.eigvalsh(raw).min() > -ANCHORS * 2.0**-code.fraction_bits
    assert np.abs(raw.sum(axis=0)).max() < ANCHORS * 2.0**-code.fraction_bits
    state = apply_sum(SharedState.initial(STUDY), LAYOUT, total, STUDY)
    assert np.linalg.eigvalsh(state.gram).min() > -1e-12
    np.testing.assert_allclose(state.gram.sum(axis=0), 0.0, atol=1e-12)
    assert state.coordinates.shape == (ANCHORS, 3)


def test_a_hostile_gram_cannot_break_the_consensus() -> None:
    hostile = vector(2)
    hostile[LAYOUT.gram_start : -1] = np.random.Generator(np.random.PCG64(0)).normal(size=78) * 30
    state = apply_sum(SharedState.initial(STUDY), LAYOUT, vector(0) + vector(1) + hostile, STUDY)
    assert np.linalg.eigvalsh(state.gram).min() > -1e-9
    assert np.isfinite(state.coordinates).all()


@pytest.mark.parametrize("index", [96, -1])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, np.nan, np.inf])
def test_a_weight_sum_that_cannot_be_divided_by_is_refused(index: int, value: float) -> None:
    total = vector(0) + vector(1) + vector(2)
    total[index] = value
    with pytest.raises(VerificationFailed):
        apply_sum(SharedState.initial(STUDY), LAYOUT, total, STUDY)


def test_the_same_sum_gives_the_same_state_in_any_order_of_contributors() -> None:
    states = []
    for order in ((0, 1, 2), (2, 0, 1)):
        code = FixedPoint.from_agreement(STUDY)
        encoded = np.zeros(LAYOUT.size, dtype=np.uint32)
        for seed in order:
            encoded += code.encode(vector(seed))
        states.append(apply_sum(SharedState.initial(STUDY), LAYOUT, code.decode(encoded, 3), STUDY))
    for name, value in states[0].to_arrays().items():
        assert np.array_equal(value, states[1].to_arrays()[name])


def test_merge_moves_the_direction_into_the_trunk_without_changing_the_sum() -> None:
    study = agreement(training={"merge_every_rounds": 2})
    state = SharedState.initial(study)
    for seed in range(2):
        before, state = state, apply_sum(state, LAYOUT, vector(seed), study)
    assert state.generation == 1
    for layer in adapted_layers(study.model):
        expected = before.B[layer.name] + update(1)[0][layer.name]
        product = 1.0 * expected @ public_projection(study.model, layer, 0)
        np.testing.assert_allclose(state.merged[layer.name], product, atol=1e-12)
        assert not state.B[layer.name].any()


def test_first_round_spends_nothing() -> None:
    state = SharedState.initial(STUDY)
    assert private_steps(STUDY, state) == 0
    assert private_steps(STUDY, apply_sum(state, LAYOUT, vector(0), STUDY)) == 3


def test_states_are_read_only_and_round_trip_through_arrays(tmp_path) -> None:
    state = apply_sum(SharedState.initial(STUDY), LAYOUT, vector(0), STUDY)
    with pytest.raises(ValueError, match="read-only"):
        state.B["block0.qkv"][0, 0] = 1.0
    np.savez(tmp_path / "state.npz", **state.to_arrays())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as arrays:
        again = SharedState.from_arrays(STUDY, dict(arrays))
    assert again.round == 1
    for name, value in state.to_arrays().items():
        assert np.array_equal(value, again.to_arrays()[name])


def test_a_damaged_saved_state_is_refused() -> None:
    arrays = apply_sum(SharedState.initial(STUDY), LAYOUT, vector(0), STUDY).to_arrays()
    for name in ("B/block0.qkv", "gram", "coordinates", "round"):
        with pytest.raises(ConfigError, match=name):
            SharedState.from_arrays(STUDY, {key: value for key, value in arrays.items() if key != name})
        with pytest.raises(ConfigError, match=name):
            SharedState.from_arrays(STUDY, {**arrays, name: np.full(arrays[name].shape, np.nan)})


def test_value_range() -> None:
    flat = vector(0)
    assert value_range_ok(STUDY, flat)
    for value in (33.0, -33.0, np.nan, np.inf):
        flat[3] = value
        assert not value_range_ok(STUDY, flat)
