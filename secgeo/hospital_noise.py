"""One hospital's share of the noise inside the secure sum: discrete, exact, and drawn before the update leaves the trainer.

The update is bounded in L2 norm and cut to the grid of the encoding, toward zero, so that its norm cannot grow; then OpenDP's sampler
adds a discrete Gaussian (Canonne, Kamath and Steinke 2020, arXiv 2004.00010) in exact arithmetic, with random bytes of OpenSSL. What
leaves here are whole steps of the grid: the encoding rounds nothing, and there is no floating point for an attack to look into.

Only dB is noised. Weights are public settings, and with this noise the Gram matrix is that of the untrained model, which no data have
touched (`secgeo.training`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from keys.errors import LocalProtocolError
from protocols.hospital_noise import NoiseShare
from secgeo.update import Layout, Vector

BLOCK_VALUES = 1 << 16
"""Values per call of the sampler, which takes a list."""

ROUNDING = 1e-6
"""Relative: the norm is computed in floating point, with an error far below this."""


def discrete_gaussian(count: int, std: float) -> NDArray[np.int64]:
    """`count` independent draws of the discrete Gaussian on the integers, of scale `std`."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="f64")
    measurement = dp.m.make_gaussian(*space, scale=std)
    blocks = [measurement([0] * min(BLOCK_VALUES, count - start)) for start in range(0, count, BLOCK_VALUES)]
    return np.concatenate([np.array(block, dtype=np.int64) for block in blocks])


def private_values(layout: Layout) -> NDArray[np.bool_]:
    """Which values of a vector are weighted dB."""
    private = np.zeros(layout.size, dtype=np.bool_)
    for segment in layout.segments:
        private[segment.start : segment.weight_at] = True
    return private


def to_grid(update: Vector, share: NoiseShare) -> NDArray[np.int64]:
    """`update` ([m] float64), bounded to `share.max_update_norm`, in whole steps of the grid.

    Raises:
        LocalProtocolError: it holds NaN or infinity.
    """
    norm = float(np.linalg.norm(update))
    if not np.isfinite(norm):
        raise LocalProtocolError("the update holds NaN or infinity and was not sent; lower the learning rate")
    most = share.max_update_norm * (1.0 - ROUNDING)
    factor = most / norm if norm > most else 1.0
    return np.trunc(update * factor / share.step).astype(np.int64)


def add_noise_share(vector: Vector, layout: Layout, share: NoiseShare) -> Vector:
    """`vector` ([size] float64) with its weighted dB bounded, and noise added to it.

    Raises:
        LocalProtocolError: the update holds NaN or infinity.
    """
    noised, private = vector.copy(), private_values(layout)
    steps = to_grid(vector[private], share)
    noised[private] = (steps + discrete_gaussian(steps.size, share.std / share.step)) * share.step
    return noised
