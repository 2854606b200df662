"""Is the noise of a training one sample of independent Gaussian values? What scale and pairs of steps do not show.

Noise of the right scale on every parameter and in every step may still leave something without noise: if its values depend on each
other, there are directions in which it has none. Three tests, over all steps that were watched:

    directions  families of orthonormal directions that do not depend on the data: sums over all, over a parameter, over its rows and
                columns; differences of neighbouring blocks of 1, 2, 4, ... values (Haar's wavelets); the patterns of signs of Walsh on
                sixteen equal parts. The squares of a family add up to a chi-square of as many degrees of freedom as there are squares
    likeness    how like each other steps are, as the sum of the squared cosines of all pairs. Under independent noise cosines are
                pairwise independent and their squares beta(1/2, (d-1)/2); the sum is a measure of sphericity (John 1971, Biometrika 58;
                Schott 2005, Biometrika 92; Zou et al. 2014, Biometrika 101). Noise of fewer dimensions than values, mixed in whatever
                way that stays the same, makes it larger. Mean, variance and third moment are exact (`chance_of_likeness`), and a
                chi-square of these three stands for the law (Pearson 1959, Biometrika 46), which it is where d or the steps are many
    shifts      the noise beside itself, so many values further on: the correlation at each shift is about normal (Bartlett 1946)

Noise here is [steps, d], in units of the promised standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from scipy import fft, stats
from scipy.linalg import hadamard

PARTS = 16
"""Equal parts of all values that get signs."""

ENOUGH_PRODUCTS = 10_000
"""Products in a correlation, from which on the normal law is good enough at one in a billion."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of parameters by name, in the order in which their values stand in the noise."""


class Scale(Struct, frozen=True, forbid_unknown_fields=True):
    """Noise on a parameter, or in a family of directions, over all steps: how many squares, and their mean in promised variances."""

    name: str
    count: int
    mean_square: float


class Likeness(Struct, frozen=True, forbid_unknown_fields=True):
    """How like each other the noise of steps is on so many values: the sum of the squared cosines of all pairs of steps."""

    name: str
    values: int
    square_sum: float


class Shifts(Struct, frozen=True, forbid_unknown_fields=True):
    """The noise beside itself: how many shifts, which one has the largest correlation, and that in its standard deviations."""

    count: int
    largest: int
    deviation: float


NO_SHIFTS = Shifts(0, 0, 0.0)
EVERYTHING = "all parameters"


def directions(drawn: NDArray[np.float64], shapes: Shapes) -> tuple[Scale, ...]:
    """The noise in every family of directions."""
    return tuple(
        Scale(name, projected.size, float(np.mean(projected**2))) for name, projected in _projected(drawn, shapes)
    )


def directions_of(shapes: Shapes, steps: int) -> dict[str, int]:
    """How many squares each family has in so many steps."""
    nothing = np.zeros((1, sum(math.prod(shape) for shape in shapes.values())))
    return {name: steps * projected.size for name, projected in _projected(nothing, shapes)}


def _projected(drawn: NDArray[np.float64], shapes: Shapes) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Names of families, and the noise along each of their directions [steps, directions]."""
    at, (steps, size) = 0, drawn.shape
    for name, shape in shapes.items():
        rows, columns = shape[0], math.prod(shape[1:])
        own = drawn[:, at : at + rows * columns].reshape(steps, rows, columns)
        at += rows * columns
        yield f"the sum over {name}", own.sum(axis=(1, 2)).reshape(-1, 1) / math.sqrt(rows * columns)
        if min(rows, columns) > 1:
            yield f"sums over rows of {name}", own.sum(axis=2) / math.sqrt(columns)
            yield f"sums over columns of {name}", own.sum(axis=1) / math.sqrt(rows)
    yield "the sum over everything", drawn.sum(axis=1, keepdims=True) / math.sqrt(size)
    block, sums = 1, drawn
    while sums.shape[1] > 1:
        even = sums.shape[1] // 2 * 2
        yield f"differences of blocks of {block}", (sums[:, 0:even:2] - sums[:, 1:even:2]) / math.sqrt(2 * block)
        block, sums = 2 * block, sums[:, 0:even:2] + sums[:, 1:even:2]
    length = size // PARTS
    if length:
        parts = drawn[:, : PARTS * length].reshape(steps, PARTS, length).sum(axis=2)
        signed = parts @ hadamard(PARTS, dtype=float) / math.sqrt(PARTS * length)
        for pattern in range(1, PARTS):
            yield f"sixteen parts with signs of pattern {pattern}", signed[:, pattern : pattern + 1]


def at_own_scales(drawn: NDArray[np.float64], shapes: Shapes) -> NDArray[np.float64]:
    """The noise with every parameter's root mean square made 1: a scale is no dependence."""
    scaled, at = drawn.copy(), 0
    for shape in shapes.values():
        own = scaled[:, at : at + math.prod(shape)]
        own /= math.sqrt(float(np.mean(own**2))) or 1.0
        at += math.prod(shape)
    return scaled


def correlations(one: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of the noise of one step [d] with that of others [steps, d]."""
    lengths = np.linalg.norm(one) * np.linalg.norm(others, axis=1)
    return np.asarray(others @ one / lengths.clip(1e-300))


def cosines(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the noise of all pairs of steps [steps, steps]."""
    lengths = np.linalg.norm(drawn, axis=1)
    return np.asarray(drawn @ drawn.T / np.outer(lengths, lengths).clip(1e-300))


def likeness(scaled: NDArray[np.float64], shapes: Shapes) -> tuple[Likeness, ...]:
    """On every parameter that has two values, and on all together; of noise at its own scales."""
    found, at = list[Likeness](), 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if size > 1:
            found.append(_likeness(name, scaled[:, at : at + size]))
        at += size
    return (*found, _likeness(EVERYTHING, scaled))


def _likeness(name: str, drawn: NDArray[np.float64]) -> Likeness:
    pairs = np.triu(cosines(drawn), 1)
    return Likeness(name, drawn.shape[1], float(np.sum(pairs**2)))


def chance_of_likeness(seen: Likeness, steps: int) -> float:
    """The probability that independent Gaussian noise is as like itself in so many steps, or more.

    With A_s = u_s u_s' - I/d for the direction u_s of step s, a squared cosine is 1/d + tr(A_s A_t). The mean of A (x) A is `factor` times
    the identity on the traceless symmetric matrices, which have `dimension` dimensions, so that one pair gives the variance
    factor^2 dimension, and three steps the mean product factor^3 dimension; other third moments between pairs are zero.
    """
    d, pairs = seen.values, steps * (steps - 1) / 2
    factor, dimension = 2.0 / (d * (d + 2)), (d + 2) * (d - 1) / 2
    one = factor**2 * dimension
    third = pairs * float(stats.beta(0.5, (d - 1) / 2).stats("s")) * one**1.5
    third += steps * (steps - 1) * (steps - 2) * factor**3 * dimension
    variance = pairs * one
    freedom = 8.0 * variance**3 / third**2
    deviation = (seen.square_sum - pairs / d) / math.sqrt(variance)
    return float(stats.chi2.sf(freedom + math.sqrt(2.0 * freedom) * deviation, freedom))


def shifts_of(size: int, steps: int) -> int:
    """How many shifts have products enough."""
    return max(0, min(size - 1, size - -(-ENOUGH_PRODUCTS // max(1, steps))))


def shifts(scaled: NDArray[np.float64]) -> Shifts:
    """The correlation of noise, at its own scales, with itself at every shift that has products enough; over all steps."""
    steps, size = scaled.shape
    count = shifts_of(size, steps)
    if not count:
        return NO_SHIFTS
    length = fft.next_fast_len(2 * size, real=True)
    spectrum = np.zeros(length // 2 + 1)
    for step in scaled:
        spectrum += np.abs(fft.rfft(step, length)) ** 2
    by = np.arange(1, count + 1)
    deviations = fft.irfft(spectrum, length)[1 : count + 1] / np.sqrt(steps * (size - by))
    largest = int(np.abs(deviations).argmax())
    return Shifts(count, largest + 1, float(deviations[largest]))
