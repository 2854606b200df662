"""Gram matrices, CKA and the shared coordinates."""

import numpy as np
import pytest

from keys.errors import ConfigError
from secgeo.geometry import (
    centre,
    cka,
    consensus_coordinates,
    debiased_cka,
    gram,
    nearest_centred_psd,
    normalise,
    procrustes,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=shape)


def rotation(size: int, seed: int = 3) -> np.ndarray:
    return np.linalg.qr(normal(size, size, seed=seed))[0]


def test_centre_is_h_k_h() -> None:
    kernel = gram(normal(7, 3))
    H = np.eye(7) - np.ones((7, 7)) / 7
    np.testing.assert_allclose(centre(kernel), H @ kernel @ H, atol=1e-12)


def test_cka_is_one_under_rotation_shift_and_scale() -> None:
    X = normal(20, 4)
    other = 3.0 * X @ rotation(4) + 5.0
    assert cka(gram(X), gram(other)) == pytest.approx(1.0)
    assert debiased_cka(gram(X), gram(other)) == pytest.approx(1.0)


def test_debiased_cka_of_independent_data_is_near_zero_where_the_biased_one_is_not() -> None:
    pairs = [(gram(normal(20, 200, seed=i)), gram(normal(20, 200, seed=1000 + i))) for i in range(20)]
    assert np.mean([cka(*pair) for pair in pairs]) > 0.8
    assert abs(np.mean([debiased_cka(*pair) for pair in pairs])) < 0.05


def test_unbiased_hsic_equals_its_definition() -> None:
    """Song et al. 2012, equation 4, written as sums over distinct indices for a tiny case."""
    from itertools import permutations

    from secgeo.geometry import _unbiased_hsic

    K, L, n = gram(normal(6, 3)), gram(normal(6, 2, seed=1)), 6
    quads = list(permutations(range(n), 4))
    wanted = np.mean([K[i, j] * (L[i, j] + L[q, r] - 2.0 * L[i, q]) for i, j, q, r in quads])
    assert _unbiased_hsic(K, L) == pytest.approx(wanted)


def test_degenerate_matrices_are_refused() -> None:
    with pytest.raises(ConfigError):
        normalise(np.zeros((4, 4)))
    with pytest.raises(ConfigError):
        normalise(np.full((4, 4), np.nan))
    with pytest.raises(ConfigError):
        debiased_cka(np.eye(3), np.eye(3))
    with pytest.raises(ConfigError):
        debiased_cka(np.ones((5, 5)), gram(normal(5, 2)))


def test_projection_on_centred_psd() -> None:
    kernel = normalise(centre(gram(normal(10, 3)))) + 1e-3 * normal(10, 10, seed=2)
    fixed = nearest_centred_psd(kernel)
    assert np.linalg.eigvalsh(fixed).min() > -1e-12
    np.testing.assert_allclose(fixed.sum(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(fixed, fixed.T, atol=1e-15)
    np.testing.assert_allclose(nearest_centred_psd(fixed), fixed, atol=1e-12)


def test_procrustes_finds_the_rotation() -> None:
    X, R = normal(9, 3), rotation(3)
    np.testing.assert_allclose(procrustes(X, X @ R), R, atol=1e-10)


def test_coordinates_reproduce_a_low_rank_kernel_and_have_unit_norm() -> None:
    kernel = normalise(centre(gram(normal(12, 3))))
    Z = consensus_coordinates(kernel, 3)
    assert np.linalg.norm(Z) == pytest.approx(1.0)
    np.testing.assert_allclose(Z @ Z.T, kernel / np.trace(kernel), atol=1e-12)


def test_coordinates_do_not_depend_on_the_signs_of_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = normalise(centre(gram(normal(12, 5))))
    first, later = consensus_coordinates(kernel, 3), consensus_coordinates(kernel, 3, previous=normal(12, 3, seed=8))
    eigh = np.linalg.eigh

    def flipped(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = eigh(matrix)
        return values, vectors * np.where(np.arange(12) % 2, -1.0, 1.0)

    monkeypatch.setattr(np.linalg, "eigh", flipped)
    np.testing.assert_allclose(consensus_coordinates(kernel, 3), first, atol=1e-12)
    np.testing.assert_allclose(consensus_coordinates(kernel, 3, previous=normal(12, 3, seed=8)), later, atol=1e-10)


def test_coordinates_follow_the_previous_round() -> None:
    """A slightly changed kernel gives slightly changed coordinates, even where eigenvectors swap."""
    X = normal(30, 2)
    X = np.linalg.qr(X - X.mean(axis=0))[0]
    before = consensus_coordinates(centre(gram(X * [1.001, 1.0])), 2)
    after = consensus_coordinates(centre(gram(X * [1.0, 1.001])), 2, before)
    assert np.linalg.norm(after - before) < 0.01
