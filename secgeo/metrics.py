"""How well modalities came together, on held-out records: CKA, cross-modal retrieval, zero-shot transfer, intervals.

All comparisons between modalities use paired held-out records (the same patients seen in both), which training never
saw. The shared coordinates of a new record come from its embedding through a linear map fitted on the public anchors
only. Nothing here is private by itself: whoever publishes a number computed from private records needs a budget for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError
from secgeo.geometry import debiased_cka, gram

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with the half width of its 95% interval (Student's t); nan for a single seed."""

    mean: float
    half_width: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% confidence interval of independent repetitions.

    Raises:
        ConfigError: no values.
    """
    from scipy.stats import t

    if not values:
        raise ConfigError("an interval needs at least one value")
    count, data = len(values), np.asarray(values, dtype=np.float64)
    if count == 1:
        return Interval(float(data[0]), math.nan, 1)
    half = float(t.ppf(0.975, count - 1) * data.std(ddof=1) / math.sqrt(count))
    return Interval(float(data.mean()), half, count)


def accuracy(predictions: Labels, labels: Labels) -> float:
    """Share of correct predictions."""
    return float(np.mean(predictions == labels))


def held_out_cka(first: Matrix, second: Matrix) -> float:
    """Debiased CKA of two modalities' embeddings [n, width] of the same n held-out records."""
    return debiased_cka(gram(first), gram(second))


@dataclass(frozen=True, slots=True)
class AnchorMap:
    """A linear map from one node's embeddings to the shared coordinates, fitted on the anchors."""

    mean: Matrix
    weight: Matrix

    def __call__(self, embeddings: Matrix) -> Matrix:
        """Shared coordinates [n, k] of embeddings [n, width]."""
        return (embeddings - self.mean) @ self.weight


def fit_anchor_map(anchor_embeddings: Matrix, coordinates: Matrix, ridge: float = 1e-2) -> AnchorMap:
    """Ridge least squares from anchor embeddings [a, width] to Z* [a, k], rescaled to unit variance per anchor.

    Args:
        ridge: regularisation relative to the mean eigenvalue of the embeddings' covariance times their width.
    """
    mean = anchor_embeddings.mean(axis=0)
    centred = anchor_embeddings - mean
    covariance = centred.T @ centred
    strength = ridge * float(np.trace(covariance)) / len(centred) + 1e-12
    target = coordinates * math.sqrt(len(coordinates))
    weight = np.linalg.solve(covariance + strength * np.eye(len(covariance)), centred.T @ target)
    return AnchorMap(mean, weight)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Finding a record's partner among n held-out records of another modality; chance is 1/n for recall."""

    recall_at_1: float
    mean_reciprocal_rank: float


def retrieval(queries: Matrix, gallery: Matrix) -> Retrieval:
    """Cosine retrieval of row i of `gallery` [n, k] by row i of `queries` [n, k]. Ties count against the partner."""
    unit = [values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in (queries, gallery)]
    similarity = unit[0] @ unit[1].T
    rank = np.sum(similarity >= np.diag(similarity)[:, None], axis=1)
    return Retrieval(float(np.mean(rank == 1)), float(np.mean(1.0 / rank)))


def zero_shot(source: Matrix, source_labels: Labels, target: Matrix, target_labels: Labels) -> float:
    """Accuracy on one modality of a linear probe that was trained on another, both in shared coordinates [n, k]."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=1000).fit(source, source_labels)
    return accuracy(probe.predict(target), target_labels)
