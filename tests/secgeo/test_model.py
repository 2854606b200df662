"""The model: a pinned trunk, tokenisers with anchor statistics only, exact per-record gradients."""

import msgspec
import numpy as np
import pytest
import torch
from tiny_study import ANCHORS, CLASSES, KINDS, agreement, anchors, records, trained
from torch.nn import functional

from keys.errors import ConfigError, LocalProtocolError
from secgeo.model import build_model
from secgeo.per_sample import PerSampleGradients
from secgeo.trunk import trunk_digest


def test_the_trunk_digest_is_portable() -> None:
    """A known answer: it changes only if the weights do, and then old agreements would be refused."""
    assert agreement().model.trunk_digest == "cde8a4d978d04aca25dbd7f806e1c24b81a28db917357446fbd07466f97da7f1"


def test_the_digest_depends_on_seed_and_shape_and_not_on_the_pin() -> None:
    model = agreement().model
    assert trunk_digest(msgspec.structs.replace(model, trunk_digest="1" * 64)) == model.trunk_digest
    for change in ({"seed": 8}, {"width": 32}, {"layers": 2}, {"tokens": 3}, {"heads": 4}, {"feedforward": 32}):
        assert trunk_digest(msgspec.structs.replace(model, **change)) != model.trunk_digest


def test_another_trunk_is_refused() -> None:
    with pytest.raises(ConfigError, match="digest"):
        build_model(agreement(model={"trunk_digest": "0" * 64}), "table", anchors("table"))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_reproducibility(kind: str) -> None:
    first, second = (build_model(agreement(), kind, anchors(kind)) for _ in range(2))
    x = torch.from_numpy(records(kind).features)
    assert first.embed(x).shape == (24, 16)
    assert first(x).shape == (24, CLASSES)
    assert torch.equal(first.embed(x), second.embed(x))


@pytest.mark.parametrize("kind", KINDS)
def test_per_record_gradients_of_every_private_parameter_equal_a_naive_loop(kind: str) -> None:
    data, model = records(kind, 5), trained(kind)
    x, y = torch.from_numpy(data.features), torch.from_numpy(data.labels)
    hooked = PerSampleGradients(model)
    functional.cross_entropy(hooked(x), y, reduction="sum").backward()
    samples = [p.grad_sample.clone() for p in model.private_parameters()]
    for i in range(len(x)):
        single = trained(kind)
        functional.cross_entropy(single(x[i : i + 1]), y[i : i + 1]).backward()
        for sample, p in zip(samples, single.private_parameters(), strict=True):
            torch.testing.assert_close(sample[i], p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_embedded_the_same_alone_and_in_a_batch(kind: str) -> None:
    model, x = trained(kind), torch.from_numpy(records(kind).features)
    torch.testing.assert_close(model.embed(x)[3:4], model.embed(x[3:4]), rtol=1e-4, atol=1e-5)


def test_statistics_come_from_the_anchors() -> None:
    model = build_model(agreement(), "table", anchors("table"))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.from_numpy(records("table").features) * 100)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    np.testing.assert_allclose(model.tokeniser._mean.numpy(), anchors("table").mean(axis=0), rtol=1e-5, atol=1e-6)


def test_private_parameters_are_all_and_a_planted_one_is_caught() -> None:
    model = trained("table")
    assert {id(p) for p in model.private_parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    model.planted = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(LocalProtocolError, match="planted"):
        model.private_parameters()


def test_a_frozen_private_parameter_is_caught() -> None:
    model = trained("table")
    model.head.weight.requires_grad_(False)
    with pytest.raises(LocalProtocolError, match="frozen"):
        model.private_parameters()


def test_bad_anchors_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="finite"):
        build_model(agreement(), "table", np.full((ANCHORS, 5), np.nan, dtype=np.float32))
    with pytest.raises(ConfigError, match="anchors of table"):
        build_model(agreement(), "table", anchors("image"))
    study = agreement()
    wrong = tuple(msgspec.structs.replace(m, tokeniser="image") for m in study.modalities)
    with pytest.raises(ConfigError, match="channels, height, width"):
        build_model(msgspec.structs.replace(study, modalities=wrong), "table", anchors("table"))


def test_a_constant_feature_and_an_odd_record_stay_finite() -> None:
    view = anchors("table")
    view[:, 0] = 1.0
    model = build_model(agreement(), "table", view)
    assert torch.isfinite(model(torch.full((1, 5), 1e30))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_values_near_the_float_limit_stay_finite(kind: str) -> None:
    shape = (3, *KINDS[kind][1])
    signs = np.where(np.arange(np.prod(shape)) % 2, 3e38, -3e38).astype(np.float32).reshape(shape)
    assert torch.isfinite(trained(kind)(torch.from_numpy(signs))).all()
