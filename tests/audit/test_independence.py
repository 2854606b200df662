"""Noise whose values depend on each other is told from independent noise, whatever its scale."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.signal import lfilter

from audit import independence
from audit.counts import private_shapes
from audit.independence import EVERYTHING, Likeness, chance_of_likeness
from secgeo.model import build_model
from tests.secgeo.tiny_study import agreement, anchors

SHAPES = {"weight": (16, 40), "bias": (16,), "head": (3, 20), "one": (1,)}
SIZE, STEPS = 717, 100


def least(noise: np.ndarray) -> dict[str, float]:
    """The least chance of each test, times how many there are of its kind."""
    scaled = independence.at_own_scales(noise, SHAPES)
    families, alike = independence.directions(noise, SHAPES), independence.likeness(scaled, SHAPES)
    shifts = independence.shifts(scaled)
    return {
        "directions": len(families) * min(float(stats.chi2.cdf(f.count * f.mean_square, f.count)) for f in families),
        "likeness": len(alike) * min(chance_of_likeness(one, len(noise)) for one in alike),
        "shifts": shifts.count * 2 * float(stats.norm.sf(abs(shifts.deviation))),
    }


def drawn(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((STEPS, size))


def lowrank(half: np.ndarray) -> np.ndarray:
    a, b = np.array_split(half, 2, axis=1)
    return np.concatenate([a, b, (a + b) / math.sqrt(2), (a - b) / math.sqrt(2)], axis=1)[:, :SIZE]


def smooth(noise: np.ndarray, rho: float = 0.9) -> np.ndarray:
    return lfilter([math.sqrt(1 - rho**2)], [1.0, -rho], noise, axis=1)


def centred_rows(noise: np.ndarray) -> np.ndarray:
    own = noise[:, :640].reshape(STEPS, 16, 40)
    return np.concatenate([(own - own.mean(axis=2, keepdims=True)).reshape(STEPS, 640), noise[:, 640:]], axis=1)


def mirrored(noise: np.ndarray) -> np.ndarray:
    return np.concatenate([noise[:, :359], noise[:, 357::-1]], axis=1)


def low_rank_head(noise: np.ndarray) -> np.ndarray:
    mixing = np.linalg.qr(np.random.default_rng(9).standard_normal((60, 20)))[0].T * math.sqrt(3)
    return np.concatenate([noise[:, :656], noise[:, :20] @ mixing, noise[:, 716:]], axis=1)


DEPENDENT = {
    "half the dimensions": (lambda: lowrank(drawn(1, 360)), {"likeness", "shifts"}),
    "minus its mean": (lambda: drawn(1) - drawn(1).mean(axis=1, keepdims=True), {"directions"}),
    "minus the mean of each row": (lambda: centred_rows(drawn(1)), {"directions"}),
    "neighbours alike": (lambda: smooth(drawn(1)), {"directions", "likeness", "shifts"}),
    "a second half that mirrors the first": (lambda: mirrored(drawn(1)), {"likeness"}),
    "few dimensions on the head alone": (lambda: low_rank_head(drawn(1)), {"likeness"}),
    "halves that cancel": (lambda: np.concatenate([drawn(1, 359), -drawn(1, 359)[:, :358]], axis=1), {"shifts"}),
}


@pytest.mark.parametrize("how", DEPENDENT)
def test_dependence_is_found(how: str) -> None:
    make, tests = DEPENDENT[how]
    noise = make()
    assert noise.shape == (STEPS, SIZE)
    found = least(noise)
    assert all(found[test] < 1e-9 for test in tests)


def test_independent_noise_is_not_accused() -> None:
    """In a hundred trainings no test has less than a chance of one in ten thousand."""
    chances = [least(drawn(seed)) for seed in range(100)]
    for test in ("directions", "likeness", "shifts"):
        assert min(chance[test] for chance in chances) > 1e-4


def test_scales_of_parameters_are_no_dependence() -> None:
    noise = drawn(2)
    noise[:, 640:] *= 3.0
    assert least(noise)["likeness"] > 1e-3
    assert least(noise)["shifts"] > 1e-3


@pytest.mark.parametrize(
    ("steps", "values"), [(12, 2), (12, 40), (12, 2000), (30, 3), (100, 2), (100, 10), (100, 120), (300, 4)]
)
def test_the_law_of_likeness_is_that_of_independent_noise(steps: int, values: int) -> None:
    """As many of a few thousand trainings are as like themselves as the law says, where d is small, large and in between."""
    random, runs = np.random.default_rng(8), 3000 if steps < 100 and values < 1000 else 500
    chances = []
    for _ in range(runs):
        noise = random.standard_normal((steps, values))
        sums = float(np.sum(np.triu(independence.cosines(noise), 1) ** 2))
        chances.append(chance_of_likeness(Likeness("x", values, sums), steps))
    for level in (0.5, 0.1, 0.01):
        error = 4 * math.sqrt(level * (1 - level) / runs)
        assert abs(np.mean(np.array(chances) < level) - level) < error + 0.05 * level


def test_families_are_orthonormal() -> None:
    """So the squares of independent noise along them add up to a chi-square."""
    families = dict(independence._projected(np.eye(SIZE), SHAPES))
    assert {name: STEPS * along.shape[1] for name, along in families.items()} == independence.directions_of(
        SHAPES, STEPS
    )
    for along in families.values():
        np.testing.assert_allclose(along.T @ along, np.eye(along.shape[1]), atol=1e-12)


def test_what_is_looked_at_follows_from_the_agreement() -> None:
    study = agreement()
    for own in study.members:
        model = build_model(study, own.modality, anchors(own.modality))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert private_shapes(study, own.node_id) == shapes
        noise = drawn(3, sum(math.prod(shape) for shape in shapes.values()))
        found = {family.name: family.count for family in independence.directions(noise, shapes)}
        assert found == independence.directions_of(private_shapes(study, own.node_id), STEPS)
        assert independence.likeness(noise, shapes)[-1].name == EVERYTHING


def test_small_models_have_no_shifts() -> None:
    assert independence.shifts(drawn(4, 50)).count == 0
    assert independence.shifts_of(101, 100) == 1
