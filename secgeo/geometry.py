"""Gram matrices, centred kernel alignment, and the shared coordinate system of the anchors (numpy, float64).

Sources: Kornblith et al. 2019 (CKA); Song et al. 2012 (unbiased HSIC, "Feature selection via dependence maximization");
Nguyen et al. 2021 (debiased CKA); Schoenemann 1966 (orthogonal Procrustes). Biased CKA of a few records in many
dimensions is near 1 even for independent data, so reports use the debiased one; the loss uses the biased one, which is
bounded and smooth.

All matrices are over the same a records in the same order. `consensus_coordinates` turns the consensus Gram matrix,
which fixes distances only, into one coordinate system: CKA alone leaves every modality its own rotation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError

Matrix = NDArray[np.float64]


def gram(embeddings: NDArray[np.floating]) -> Matrix:
    """The linear-kernel Gram matrix [a, a] of `embeddings` [a, width]."""
    values = np.asarray(embeddings, dtype=np.float64)
    return np.asarray(values @ values.T)


def centre(kernel: Matrix) -> Matrix:
    """H K H with H = I - 11^T/a: the Gram matrix of the records after subtracting their mean."""
    rows = kernel.mean(axis=0, keepdims=True)
    return np.asarray(kernel - rows - kernel.mean(axis=1, keepdims=True) + rows.mean())


def normalise(kernel: Matrix) -> Matrix:
    """`kernel` divided by its Frobenius norm.

    Raises:
        ConfigError: the norm is zero or not finite: all records look the same, or the embedding diverged.
    """
    norm = float(np.linalg.norm(kernel))
    if not np.isfinite(norm) or norm < 1e-12:
        raise ConfigError(
            "the anchors' Gram matrix is constant or not finite: check the anchor view and the learning rates"
        )
    return kernel / norm


def cka(first: Matrix, second: Matrix) -> float:
    """Centred kernel alignment of two Gram matrices [a, a], in [0, 1]. Biased upwards for small a."""
    return float(np.sum(normalise(centre(first)) * normalise(centre(second))))


def _unbiased_hsic(first: Matrix, second: Matrix) -> float:
    count = first.shape[0]
    K, L = first.copy(), second.copy()
    np.fill_diagonal(K, 0.0)
    np.fill_diagonal(L, 0.0)
    total = (
        np.sum(K * L)
        + K.sum() * L.sum() / ((count - 1) * (count - 2))
        - 2.0 * (K.sum(axis=0) @ L.sum(axis=1)) / (count - 2)
    )
    return float(total / (count * (count - 3)))


def debiased_cka(first: Matrix, second: Matrix) -> float:
    """CKA from the unbiased HSIC estimator: near 0 for independent records, whatever the dimension. Needs a >= 4.

    Raises:
        ConfigError: fewer than four records, or a Gram matrix without any structure.
    """
    if first.shape != second.shape or first.shape[0] < 4:
        raise ConfigError(
            f"debiased CKA needs two Gram matrices of the same 4 or more records, not {first.shape}, {second.shape}"
        )
    scale = _unbiased_hsic(first, first) * _unbiased_hsic(second, second)
    if not scale > 0.0:
        raise ConfigError("debiased CKA is undefined: one of the Gram matrices has no structure")
    return _unbiased_hsic(first, second) / float(np.sqrt(scale))


def nearest_centred_psd(kernel: Matrix) -> Matrix:
    """Symmetrise, centre and clip negative eigenvalues of `kernel` [a, a] at zero.

    A weighted mean of H K H matrices is centred and PSD already; fixed-point rounding (and a node that sends something
    else) breaks both slightly, and square roots of eigenvalues need neither.
    """
    centred = centre((kernel + kernel.T) / 2.0)
    values, vectors = np.linalg.eigh(centred)
    clipped = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return centre((clipped + clipped.T) / 2.0)


def procrustes(source: Matrix, target: Matrix) -> Matrix:
    """The orthogonal R [k, k] that minimises ||source R - target||_F, for two [a, k] matrices."""
    left, _, right = np.linalg.svd(source.T @ target)
    return np.asarray(left @ right)


def consensus_coordinates(kernel: Matrix, rank: int, previous: Matrix | None = None) -> Matrix:
    """Z* [a, rank]: top eigenvectors of a centred PSD `kernel` times root eigenvalues, at unit Frobenius norm.

    Unit norm makes it comparable with Zc_k / ||Zc_k||. Rotation and sign are free; they are fixed by Procrustes to the
    `previous` round, and in the first round by making each column's largest entry positive.
    """
    values, vectors = np.linalg.eigh(kernel)
    top = np.argsort(values)[::-1][:rank]
    coordinates = vectors[:, top] * np.sqrt(np.maximum(values[top], 0.0))
    coordinates = normalise(coordinates)
    if previous is not None:
        return coordinates @ procrustes(coordinates, previous)
    largest = coordinates[np.argmax(np.abs(coordinates), axis=0), np.arange(coordinates.shape[1])]
    return coordinates * np.where(largest < 0.0, -1.0, 1.0)
