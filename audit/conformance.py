"""White-box tests that a trainer does what its ledger will say: noise, sensitivity, sampling, bookkeeping, side channels.

A lower bound on epsilon (`audit.training`) catches bugs that cost much privacy. These tests catch the ones that cost little in one run, and
say what is wrong. They watch the product's own trainer, on the hospital's records, through `audit.watch`:

    noise         what the optimiser adds to the sum, against N(0, (noise_multiplier max_grad_norm)^2), on every parameter and in every
                  step, as many as the study has; of nobody, of many, and of a few sampled in turn
    fresh noise   values that come twice; every step against every other, and the hospital against itself when started again
    sensitivity   the data with and without one unit: how far the clipped sum moves, for the units with the largest gradients, a record
                  of extreme features, gradients far above the clip norm, and one that is not finite; in several pieces, as large
                  batches are
    sampling      sizes of samples, how often each unit is in, and how often in two samples that are one to five steps apart
    side channels the noised sum replaced by noise: then nothing that leaves or stays, in any round, may differ between two sets of
                  records, of other sizes, values and labels
    bookkeeping   steps that touched records, changed parameters, were booked, and were reported, over the rounds of the study, as they
                  are counted in the training for side channels

Which records belong to a unit is worked out here, from the agreement and the data, not taken from the trainer.
A test fails when what was seen has probability below `ALARM` under the promise, so that sound trainers are not accused by chance.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from audit.counts import private_sizes, refuse
from audit.findings import Finding
from audit.target import Target
from audit.watch import RandomCanaries, Seen, Watch, spoil
from protocols.agreement import Agreement
from secgeo import training
from secgeo.datasets import LabelledRecords
from secgeo.noise import NoiseSource
from secgeo.training import LocalTrainer
from secgeo.update import Layout, SharedState, apply_sum

ALARM = 1e-9
"""Probability of what was seen, below which a promise counts as broken."""

SAMPLING_STEPS = 300
LEAST_STEPS, MOST_STEPS = 12, 300
"""Steps of a study that are watched for noise, bookkeeping and side channels: all, within these limits."""

NOISE_VALUES = 20_000_000
"""So many values of noise at most."""

CROWD = 256
"""So many units at most where everybody is to be sampled."""

LENGTHS = (0.5, 1.0, 10.0, 1e4)
"""Norms of gradients that are put in, in clip norms."""

CANDIDATES, LARGEST_UNITS = 48, 5
"""Units in the data of that test, and how many of them, those with the largest gradients, are left out in turn."""

EMPTY_STEPS = 4
"""Of those with nobody sampled so many are searched for values that come twice."""

SMALL_PIECE = 16
LAGS = (1, 2, 3, 4, 5)
DISTINCT = 0.98
"""Of noise in float32: some values meet by chance."""

ENOUGH = 30.0
"""Expected count for a normal approximation."""

TOLERANCE = 1e-3
"""Relative, of a clipped norm, in float32."""


class ParameterNoise(Struct, frozen=True, forbid_unknown_fields=True):
    """Noise on one parameter over all steps: how many values, and their mean square in units of the promised variance."""

    name: str
    count: int
    mean_square: float


BEYOND_MEASURE = 1e300
"""Stands for what is not finite, which JSON has no number for."""


class Influence(Struct, frozen=True, forbid_unknown_fields=True):
    """How far one unit moved the clipped sum, in clip norms."""

    unit: str
    norm: float


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """Samples: their sizes, how often each unit was in one, and how many times units were in two that are 1, 2, ... steps apart.

    `expected_units` is the number that the agreement and the data give.
    """

    units: int
    expected_units: int
    sizes: tuple[int, ...]
    inclusions: tuple[int, ...]
    overlaps: tuple[int, ...]


class Bookkeeping(Struct, frozen=True, forbid_unknown_fields=True):
    """Some rounds: steps that touched records, changed parameters, were booked, were reported, and that the agreement says."""

    touched: int
    moved: int
    booked: int
    reported: int
    agreed: int


class ConformanceEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """What was seen.

    Attributes:
        member: whose training.
        noise: by parameter, over all steps.
        step_mean_squares: by step, over all parameters.
        step_correlations: of each step's noise with that of a step before it, the one that it is most like.
        start_correlation: of the first steps of two starts.
        distinct_values: of noise on the sum of nobody, which is not rounded; `empty_values` are there.
        compared: values that left or stayed, in all rounds; `leaks` are those that differ.
    """

    member: str
    noise_multiplier: float
    sample_rate: float
    unit: str
    noise: tuple[ParameterNoise, ...]
    kolmogorov_smirnov: float
    noise_values: int
    step_mean_squares: tuple[float, ...]
    empty_values: int
    distinct_values: int
    step_correlations: tuple[float, ...]
    start_correlation: float
    influences: tuple[Influence, ...]
    sampling: Sampling
    bookkeeping: Bookkeeping
    leaks: tuple[str, ...]
    compared: int
    seconds: float


Progress = Callable[[str, float], None]


def collect(target: Target, progress: Progress = lambda *_: None) -> ConformanceEvidence:
    """Watch the trainer of `target`."""
    started = time.monotonic()
    progress("noise of the optimiser", 0.0)
    noise = _noise(target)
    progress("influence of one unit", 0.3)
    influences = _influences(target)
    progress("samples", 0.5)
    sampling = _sampling(target)
    progress("side channels and bookkeeping", 0.6)
    leaks, compared, bookkeeping = _leaks(target)
    privacy = target.agreement.privacy
    return ConformanceEvidence(
        member=target.member.node_id,
        noise_multiplier=privacy.noise_multiplier,
        sample_rate=privacy.sample_rate,
        unit=privacy.unit,
        noise=noise.parameters,
        kolmogorov_smirnov=noise.kolmogorov_smirnov,
        noise_values=noise.values,
        step_mean_squares=noise.steps,
        empty_values=noise.empty,
        distinct_values=noise.distinct,
        step_correlations=noise.correlations,
        start_correlation=noise.start_correlation,
        influences=influences,
        sampling=sampling,
        bookkeeping=bookkeeping,
        leaks=leaks,
        compared=compared,
        seconds=round(time.monotonic() - started, 2),
    )


def with_consensus(target: Target, trainer: LocalTrainer) -> SharedState:
    """The shared state after a first round, which spends nothing, of this hospital alone."""
    layout = Layout.from_agreement(target.agreement)
    initial = SharedState.initial(target.agreement)
    return apply_sum(initial, layout, trainer.train_round(initial).vector(layout), target.agreement)


# --- units


def _owners(target: Target) -> NDArray[np.int64]:
    """For every record the number of its unit [n], by the agreement and the data alone."""
    records = target.records
    if target.agreement.privacy.unit == "patient" and records.patients is not None:
        return np.unique(records.patients, return_inverse=True)[1].astype(np.int64)
    return np.arange(len(records))


def _chosen(records: LabelledRecords, keep: NDArray[np.bool_]) -> LabelledRecords:
    patients = None if records.patients is None else records.patients[keep]
    return LabelledRecords(records.features[keep], records.labels[keep], patients)


# --- noise


@dataclass(frozen=True, slots=True)
class _Noise:
    """See `ConformanceEvidence`."""

    parameters: tuple[ParameterNoise, ...] = ()
    kolmogorov_smirnov: float = 0.0
    values: int = 0
    steps: tuple[float, ...] = ()
    empty: int = 0
    distinct: int = 0
    correlations: tuple[float, ...] = ()
    start_correlation: float = 0.0


def _steps(agreement: Agreement, size: int) -> int:
    """Private steps of the study (the first round takes none), within limits, of a model of so many private parameters."""
    steps = agreement.training.steps_per_round * (agreement.study.rounds - 1)
    return min(max(LEAST_STEPS, steps), MOST_STEPS, max(LEAST_STEPS, NOISE_VALUES // size))


def _noise(target: Target) -> _Noise:
    std = target.agreement.privacy.noise_multiplier * target.agreement.privacy.max_grad_norm
    if std == 0.0:
        return _Noise()
    trainer = target.trainer()
    size = sum(p.numel() for p in trainer._optimizer.params)
    drawn = _drawn(trainer, _steps(target.agreement, size), std)
    again = _drawn(target.trainer(), 1, std)
    names, at, by_parameter = {id(p): name for name, p in trainer.model.named_parameters()}, 0, []
    for p in trainer._optimizer.params:
        own = drawn[:, at : at + p.numel()]
        by_parameter.append(ParameterNoise(names[id(p)], own.size, float(np.mean(own**2))))
        at += p.numel()
    empty = drawn[::3][:EMPTY_STEPS]  # of more values some would meet by chance
    lengths = np.linalg.norm(drawn, axis=1)
    alike = np.abs(drawn @ drawn.T / np.outer(lengths, lengths).clip(1e-300))
    return _Noise(
        tuple(by_parameter),
        float(stats.kstest(drawn.ravel(), "norm").statistic),
        drawn.size,
        tuple(np.mean(drawn**2, axis=1).tolist()),
        empty.size,
        len(np.unique(np.abs(empty))),
        tuple(float(alike[step, :step].max()) for step in range(1, len(drawn))),
        _correlation(drawn[0], again[0]),
    )


def _drawn(trainer: LocalTrainer, steps: int, std: float) -> NDArray[np.float64]:
    """The noise of so many steps [steps, d], in units of `std`: with nobody sampled, with many, and with a few, in turn."""
    count, random, seen = len(trainer._units), np.random.default_rng(), list[NDArray[np.float64]]()
    sample = np.zeros(count, np.bool_)
    Watch(trainer, lambda step: seen.append(step.noise.numpy() / std), fixed=sample)
    for step in range(steps):
        sample[:] = False
        sample[random.permutation(count)[: (0, CROWD, 1 + count // 8)[step % 3]]] = True
        trainer.step()
    return np.array(seen[:steps])  # more steps than a trainer is told to take are left to the bookkeeping


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms > 0.0 else 0.0


# --- sensitivity


def _influences(target: Target) -> tuple[Influence, ...]:
    clip, unit = target.agreement.privacy.max_grad_norm, target.agreement.privacy.unit
    shaken = [torch.randn_like(p) * 0.2 for p in target.trainer().model.private_parameters()]

    def summed(records: LabelledRecords, length: float = 0.0, *, spoiled: bool = False) -> torch.Tensor:
        """The clipped sum [d] of all of these records, and of a canary of this norm beside them, or with a gradient that is not finite."""
        made, seen = target.trainer(records=records), list[Seen]()
        with torch.no_grad():  # away from the start, where heads are zero and gradients small
            for p, change in zip(made.model.private_parameters(), shaken, strict=True):
                p.add_(change)
        size = sum(p.numel() for p in shaken)
        canary = RandomCanaries(1, size, length * clip) if length else None
        everybody = np.ones(len(made._units) + (canary is not None), np.bool_)
        Watch(
            made,
            seen.append,
            canaries=canary,
            included=None if canary is None else np.ones(1, np.bool_),
            fixed=everybody,
        )
        if spoiled:
            spoil(made)
        made.step()
        return seen[0].summed.double()

    owners = _owners(target)
    some = np.random.default_rng().permutation(owners.max() + 1)[:CANDIDATES]
    base = _chosen(target.records, np.isin(owners, some))
    mine = owners[np.isin(owners, some)]
    with _small_pieces():
        whole = summed(base)
        moved = {int(one): _alone(target, _chosen(base, mine == one)) for one in some}
        found = list[float]()
        for one in sorted(moved, key=lambda unit: -moved[unit])[:LARGEST_UNITS] if len(some) > 1 else ():
            without = summed(_chosen(base, mine != one))
            found.append(_moved(whole, without, clip))
        found.append(_moved(summed(_with_extreme(base)), whole, clip))
        found += [_moved(summed(base, length), whole, clip) for length in LENGTHS]
        finite = bool(torch.isfinite(summed(base, spoiled=True)).all())
        found.append(0.0 if finite else BEYOND_MEASURE)
    names = _influences_of(unit, int(owners.max()) + 1)
    return tuple(Influence(name, norm) for name, norm in zip(names, found, strict=True))


def _influences_of(unit: str, units: int) -> list[str]:
    """Whose influence is measured where so many units are."""
    some = min(CANDIDATES, units)
    return [
        *[f"a {unit} of the largest gradients"] * (min(LARGEST_UNITS, some) if some > 1 else 0),
        f"a {unit} of extreme features",
        *[f"a made gradient of norm {length:g}" for length in LENGTHS],
        "a gradient that is not finite",
    ]


def _moved(with_it: torch.Tensor, without: torch.Tensor, clip: float) -> float:
    moved = float((with_it - without).norm()) / clip
    return moved if math.isfinite(moved) else BEYOND_MEASURE


def _alone(target: Target, records: LabelledRecords) -> float:
    """How large the gradient of one unit is before clipping, by its records' losses."""
    made = target.trainer(records=records)
    made._private_gradient(np.ones(len(made._units), np.bool_))
    parts = [p.grad_sample.double().sum(dim=0).norm() for p in made._optimizer.params if p.grad_sample is not None]
    return float(torch.stack(parts).norm())


def _with_extreme(records: LabelledRecords) -> LabelledRecords:
    """The records and one of somebody else, a thousand times as large."""
    patients = None if records.patients is None else np.append(records.patients, "somebody else")
    features = np.concatenate([records.features, 1e3 * records.features[:1] + 1.0])
    return LabelledRecords(features.astype(np.float32), np.append(records.labels, records.labels[0]), patients)


@contextmanager
def _small_pieces() -> Iterator[None]:
    """Have samples clipped piece by piece, as large ones are."""
    kept, training.PHYSICAL_BATCH = training.PHYSICAL_BATCH, SMALL_PIECE
    try:
        yield
    finally:
        training.PHYSICAL_BATCH = kept


# --- sampling, bookkeeping, side channels


def _sampling(target: Target) -> Sampling:
    trainer, masks = target.trainer(), list[NDArray[np.bool_]]()
    count = len(trainer._units)
    Watch(trainer, lambda step: masks.append(step.sample), fixed=np.zeros(count, np.bool_))
    for _ in range(SAMPLING_STEPS):
        trainer.step()
    drawn = np.array(masks[:SAMPLING_STEPS])  # as in `_drawn`
    overlaps = tuple(int((drawn[:-lag] & drawn[lag:]).sum()) for lag in LAGS)
    expected = int(_owners(target).max()) + 1
    return Sampling(count, expected, tuple(drawn.sum(axis=1).tolist()), tuple(drawn.sum(axis=0).tolist()), overlaps)


def _rounds(agreement: Agreement) -> int:
    """So many private rounds are watched."""
    return max(1, min(agreement.study.rounds - 1, MOST_STEPS // agreement.training.steps_per_round))


def _leaks(target: Target) -> tuple[tuple[str, ...], int, Bookkeeping]:
    """What differs between the hospital's records and others when the noised sum is replaced; how many values were compared.

    And how the steps on the hospital's own records were counted meanwhile: their number has nothing to do with what the noise is.
    """
    key, owners, random = secrets.token_bytes(32), _owners(target), np.random.default_rng()
    others = _chosen(target.records, owners > 0 if owners.max() > 0 else owners == 0)
    rolled = random.permutation(len(others))
    others = LabelledRecords(
        (-1.7 * others.features[rolled] + 0.3).astype(np.float32),
        (others.labels[rolled] + 1) % target.agreement.study.classes,
        others.patients,
    )
    (first, bookkeeping), (second, _) = (_left(target, records, key) for records in (target.records, others))
    differing = tuple(name for name in first if not np.array_equal(first[name], second[name]))
    return differing, sum(value.size for value in first.values()), bookkeeping


def _left(target: Target, records: LabelledRecords, key: bytes) -> tuple[dict[str, NDArray[Any]], Bookkeeping]:
    """All that leaves or stays after each round of training on these records, with noise of this key instead of the noised sums."""
    trainer, layout, rounds = (
        target.trainer(records=records),
        Layout.from_agreement(target.agreement),
        _rounds(target.agreement),
    )
    left: dict[str, NDArray[Any]] = {}
    state = with_consensus(target, trainer)
    before, watch, reported = trainer.steps_taken, Watch(trainer, instead=NoiseSource(key)), 0
    for number in range(rounds):
        update = trainer.train_round(state)
        reported += update.steps
        named: dict[str, Any] = {f"dB of {name}": delta for name, delta in update.delta_b.items()}
        named |= {f"weight of {name}": weight for name, weight in update.weights.items()}
        named |= {"Gram matrix": update.gram, "weight of the Gram matrix": update.gram_weight}
        named |= {"number of steps": update.steps}
        named |= {f"local {name}": value for name, value in trainer.local_state().items()}
        left |= {f"{name}, round {number + 1}": np.array(value) for name, value in named.items()}
        state = apply_sum(state, layout, update.vector(layout), target.agreement)
    agreed = rounds * target.agreement.training.steps_per_round
    return left, Bookkeeping(watch.touched, watch.moved, trainer.steps_taken - before, reported, agreed)


# --- verdict


def check_whole(evidence: ConformanceEvidence, agreement: Agreement) -> None:
    """Check that every test was made as often as `collect` makes it under this agreement, and that counts go together.

    Raises:
        VerificationFailed: something is left out, or smaller, or is no count of what was watched.
    """
    sizes, seen = private_sizes(agreement, evidence.member), evidence.bookkeeping
    _check_noise(evidence, agreement, sizes)
    _check_sampling(evidence.sampling)
    moved = {influence.unit: influence.norm for influence in evidence.influences}
    refuse(
        "the influences that were measured are not those that the audit measures",
        [influence.unit for influence in evidence.influences]
        != _influences_of(evidence.unit, evidence.sampling.expected_units),
        any(influence.norm < 0.0 for influence in evidence.influences),
        any(not moved.get(f"a made gradient of norm {length:g}") for length in LENGTHS),
    )
    rounds, layout = _rounds(agreement), Layout.from_agreement(agreement)
    agreed = rounds * agreement.training.steps_per_round
    refuse(
        f"the bookkeeping is of {seen.agreed} steps, where {rounds} rounds have {agreed}",
        seen.agreed != agreed,
        min(seen.touched, seen.moved, seen.booked, seen.reported) < 0,
    )
    # parameters, shared or local, a weight for each layer, the Gram matrix and its weight, and the number of steps
    due = rounds * (sum(sizes.values()) + len(layout.segments) + layout.anchors**2 + 2)
    refuse(f"{evidence.compared} values were compared for side channels, not {due}", evidence.compared != due)


def _check_noise(evidence: ConformanceEvidence, agreement: Agreement, sizes: dict[str, int]) -> None:
    privacy, size = agreement.privacy, sum(sizes.values())
    steps = _steps(agreement, size) if privacy.noise_multiplier * privacy.max_grad_norm > 0.0 else 0
    empty = size * len(range(steps)[::3][:EMPTY_STEPS])
    refuse(
        f"noise of {len(evidence.step_mean_squares)} steps and {evidence.noise_values} values was looked at, not of {steps} steps "
        f"and every of {size} parameters",
        len(evidence.step_mean_squares) != steps,
        len(evidence.step_correlations) != max(0, steps - 1),
        evidence.noise_values != steps * size,
        len(evidence.noise) != (len(sizes) if steps else 0),
        any(sizes.get(parameter.name, 0) * steps != parameter.count for parameter in evidence.noise),
        len({parameter.name for parameter in evidence.noise}) != len(evidence.noise),
        evidence.empty_values != empty,
    )
    correlations = [*evidence.step_correlations, evidence.start_correlation]
    refuse(
        "what is told of the noise cannot be",
        any(square < 0.0 for square in evidence.step_mean_squares),
        any(parameter.mean_square < 0.0 for parameter in evidence.noise),
        any(abs(one) > 1.0 + TOLERANCE for one in correlations),
        not 0.0 <= evidence.kolmogorov_smirnov <= 1.0,
        not min(1, empty) <= evidence.distinct_values <= empty,
    )
    total = sum(parameter.count * parameter.mean_square for parameter in evidence.noise)
    refuse(
        "the noise on parameters is not the noise of the steps",
        not math.isclose(total, size * sum(evidence.step_mean_squares), rel_tol=1e-6),
    )


def _check_sampling(sampling: Sampling) -> None:
    sizes, units = sampling.sizes, sampling.units
    refuse(
        "samples that were looked at are not those that the audit takes",
        len(sizes) != SAMPLING_STEPS or len(sampling.inclusions) != units or len(sampling.overlaps) != len(LAGS),
        min(units, sampling.expected_units) < 1,
    )
    together = [list(zip(sizes, sizes[lag:], strict=False)) for lag in LAGS]
    refuse(
        "sizes of samples and how often units are in them do not go together",
        any(not 0 <= size <= units for size in sizes),
        any(not 0 <= often <= SAMPLING_STEPS for often in sampling.inclusions),
        sum(sizes) != sum(sampling.inclusions),
        any(
            not sum(max(0, a + b - units) for a, b in pairs) <= overlap <= sum(min(pair) for pair in pairs)
            for pairs, overlap in zip(together, sampling.overlaps, strict=False)
        ),
    )


def judge(evidence: ConformanceEvidence) -> list[Finding]:
    """What the evidence says; a pure function."""
    return [
        _judge_noise(evidence),
        _judge_reuse(evidence),
        _judge_influence(evidence),
        _judge_sampling(evidence),
        _judge_bookkeeping(evidence.bookkeeping),
        _judge_leaks(evidence),
    ]


def _finding(name: str, promise: str, broken: Sequence[str], detail: str) -> Finding:
    return Finding("training", name, promise, "broken" if broken else "held", "; ".join(broken) or detail)


def _judge_noise(evidence: ConformanceEvidence) -> Finding:
    name, promise = "noise", "every private parameter gets Gaussian noise of the agreed scale"
    if evidence.noise_multiplier == 0.0:
        return Finding(
            "training", name, promise, "not testable", "the agreement has no noise, so there is no privacy to audit"
        )
    broken = []
    for parameter in evidence.noise:
        # count * mean_square is chi-squared with `count` degrees of freedom
        if stats.chi2.cdf(parameter.count * parameter.mean_square, parameter.count) < ALARM:
            scale = math.sqrt(parameter.mean_square)
            broken.append(f"{parameter.name} has {scale:.3f} times the agreed noise ({parameter.count} values)")
    least = min((math.sqrt(parameter.mean_square) for parameter in evidence.noise), default=0.0)
    steps = len(evidence.step_mean_squares)
    for number, mean_square in enumerate(evidence.step_mean_squares, start=1):
        values = evidence.noise_values // steps
        if stats.chi2.cdf(values * mean_square, values) < ALARM / steps:
            broken.append(f"step {number} has {math.sqrt(mean_square):.3f} times the agreed noise")
    if stats.kstwo.sf(evidence.kolmogorov_smirnov, max(1, evidence.noise_values)) < ALARM:
        broken.append(f"the noise is not Gaussian: Kolmogorov-Smirnov distance {evidence.kolmogorov_smirnov:.4f}")
    detail = (
        f"{evidence.noise_values} values in {steps} steps; least scale on a parameter {least:.3f} of the agreed one, "
        f"Kolmogorov-Smirnov distance {evidence.kolmogorov_smirnov:.2g}"
    )
    return _finding(name, promise, _shortened(broken), detail)


def _shortened(broken: Sequence[str], most: int = 3) -> list[str]:
    rest = len(broken) - most
    return [*broken[:most], *([f"and {rest} more"] if rest > 0 else [])]


def _judge_reuse(evidence: ConformanceEvidence) -> Finding:
    name, promise = "fresh noise", "no noise is used twice, in two steps or after a restart"
    if evidence.noise_multiplier == 0.0:
        return Finding("training", name, promise, "not testable", "the agreement has no noise")
    steps = max(2, len(evidence.step_mean_squares))
    values = max(1, evidence.noise_values // steps)
    limit = float(stats.norm.isf(ALARM / (steps * (steps - 1)))) / math.sqrt(values)
    broken = []
    worst = max(evidence.step_correlations, key=abs, default=0.0)
    if abs(worst) > limit:
        broken.append(f"the noise of two steps has correlation {worst:.3f}")
    if evidence.distinct_values < DISTINCT * evidence.empty_values:
        broken.append(f"of {evidence.empty_values} values of noise only {evidence.distinct_values} are different ones")
    if abs(evidence.start_correlation) > limit:
        broken.append(f"the noise after a restart has correlation {evidence.start_correlation:.3f} with that before")
    detail = f"largest correlation of steps {worst:.2g}, of restarts {evidence.start_correlation:.2g}, chance allows {limit:.2g}"
    return _finding(name, promise, broken, detail)


def _told(norm: float) -> str:
    return f"{norm:.4f}" if norm < BEYOND_MEASURE else "infinitely many"


def _judge_influence(evidence: ConformanceEvidence) -> Finding:
    if not evidence.influences:
        raise ValueError("nobody's influence was measured")
    largest = max(evidence.influences, key=lambda influence: math.inf if math.isnan(influence.norm) else influence.norm)
    broken = []
    if not largest.norm <= 1.0 + TOLERANCE:
        broken.append(f"one unit moved the sum by {_told(largest.norm)} times the clip norm ({largest.unit})")
    detail = f"{len(evidence.influences)} units; the sum moved by at most {_told(largest.norm)} times the clip norm ({largest.unit})"
    return _finding(
        "sensitivity",
        f"one {evidence.unit} moves the sum by at most the clip norm, over all parameters",
        broken,
        detail,
    )


def _judge_sampling(evidence: ConformanceEvidence) -> Finding:
    name, promise = (
        "sampling",
        f"every {evidence.unit} is in a sample by its own coin, of the agreed sample rate, at every step",
    )
    sampling, q = evidence.sampling, evidence.sample_rate
    n, steps, sizes = sampling.units, len(sampling.sizes), np.array(sampling.sizes)
    broken = []
    if n != sampling.expected_units:
        broken.append(f"{n} units are sampled, but the data have {sampling.expected_units} by the agreement")
    found = f"mean sample {sizes.mean():.2f} of {n} at rate {q:g}, variance {sizes.var():.2f}"
    if q == 1.0:
        broken += [] if (sizes == n).all() else [f"not everybody is in every sample: {found}"]
        return _finding(name, promise, broken, "everybody is in every sample")
    if stats.binomtest(int(sizes.sum()), n * steps, q).pvalue < ALARM:
        broken.append(f"the sample rate is {sizes.sum() / (n * steps):.4f}, not {q:g}")
    if _chance(sizes, n, q) < ALARM:
        broken.append(f"sizes of samples are not those of independent coins: {found}, coins have {n * q * (1 - q):.2f}")
    if _chance(np.array(sampling.inclusions), steps, q) < ALARM:
        broken.append("units are not all sampled alike")
    untested = []
    for lag, together in zip(LAGS, sampling.overlaps, strict=True):
        expected = n * (steps - lag) * q * q
        variance = expected * (1 - q * q) + 2 * n * max(0, steps - 2 * lag) * q**3 * (1 - q)
        if expected < ENOUGH:
            untested.append(lag)
        elif 2 * stats.norm.sf(abs(together - expected) / math.sqrt(variance)) < ALARM:
            broken.append(f"units are in two samples {lag} apart {together} times, coins give {expected:.0f}")
    detail = f"{steps} steps; {found} (coins: {n * q * (1 - q):.2f})"
    if untested:
        detail += "; whether samples come back could not be tested, since too few units are in two of them"
    return _finding(name, promise, broken, detail)


def _chance(counts: NDArray[np.int64], trials: int, rate: float) -> float:
    """A bound on the probability that independent Binomial(trials, rate) counts are spread so much, or so little (Chernoff).

    From the exact distribution, so that it holds for any number of trials: the least over lambda of E[exp(lambda (S - s))] for the sum S
    of squared deviations and the s that was seen, for both directions.
    """
    mean, variance = trials * rate, trials * rate * (1.0 - rate)
    every = np.arange(trials + 1)
    probability, deviation = stats.binom.logpmf(every, trials, rate), (every - mean) ** 2 / variance
    seen = float(((counts - mean) ** 2 / variance).sum())

    def bound(slope: float) -> float:
        return float(len(counts) * logsumexp(probability + slope * deviation) - slope * seen)

    ends = (-100.0, 0.0) if seen < len(counts) else (0.0, 10.0)
    found = minimize_scalar(bound, bounds=ends, method="bounded")
    return min(1.0, 2.0 * math.exp(min(0.0, float(found.fun))))


def _judge_bookkeeping(seen: Bookkeeping) -> Finding:
    same = len({seen.touched, seen.moved, seen.booked, seen.reported, seen.agreed}) == 1
    told = (
        f"{seen.touched} steps touched records, {seen.moved} changed parameters, {seen.booked} were booked, "
        f"{seen.reported} reported, {seen.agreed} agreed"
    )
    return _finding(
        "bookkeeping", "every step is booked, and no more are taken than agreed", [] if same else [told], told
    )


def _judge_leaks(evidence: ConformanceEvidence) -> Finding:
    broken = [
        f"with noise in the place of the noised sum, these still depend on the records: {', '.join(_shortened(evidence.leaks))}"
    ]
    detail = f"{evidence.compared} values are the same to the bit for two sets of records, once the noised sum is replaced by noise"
    return _finding(
        "side channels",
        "records reach nothing but through the clipped and noised sum",
        broken if evidence.leaks else [],
        detail,
    )
