"""The reported numbers: known answers, and chance where there is nothing to find."""

import math

import numpy as np
import pytest

from keys.errors import ConfigError
from secgeo.metrics import accuracy, fit_anchor_map, held_out_cka, interval, retrieval, zero_shot


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape)


def test_interval_is_students_t() -> None:
    result = interval([1.0, 2.0, 3.0])
    assert result.mean == 2.0
    assert result.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert math.isnan(interval([1.0]).half_width)
    with pytest.raises(ConfigError):
        interval([])


def test_accuracy() -> None:
    assert accuracy(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])) == 0.75


def test_retrieval_finds_partners_and_is_at_chance_for_strangers() -> None:
    X = normal(50, 8)
    assert retrieval(X, 2.0 * X).recall_at_1 == 1.0
    assert retrieval(X, 2.0 * X).mean_reciprocal_rank == 1.0
    assert retrieval(X, normal(50, 8, seed=1)).recall_at_1 < 0.15


def test_a_collapsed_embedding_earns_nothing_in_retrieval() -> None:
    collapsed = np.ones((50, 8))
    assert retrieval(collapsed, collapsed).recall_at_1 == 0.0


def test_the_anchor_map_recovers_a_linear_relation_and_uses_anchors_only() -> None:
    E, R = normal(80, 6), normal(6, 3, seed=2)
    Z = (E - E.mean(axis=0)) @ R
    Z /= np.linalg.norm(Z)
    mapped = fit_anchor_map(E, Z, ridge=1e-9)(E)
    np.testing.assert_allclose(mapped, Z * math.sqrt(80), atol=1e-6)


def test_zero_shot_and_cka() -> None:
    X = normal(200, 4)
    y = (X[:, 0] > 0).astype(np.int64)
    assert zero_shot(X[:100], y[:100], X[100:], y[100:]) > 0.9
    assert zero_shot(X[:100], y[:100], normal(100, 4, seed=9), y[100:]) < 0.7
    assert held_out_cka(X, X @ np.linalg.qr(normal(4, 4))[0]) == pytest.approx(1.0)
