"""White-box tests that a trainer does what its ledger will say: noise, sensitivity, sampling, bookkeeping, side channels.

A lower bound on epsilon (`audit.training`) catches bugs that cost much privacy. These tests catch the ones that cost little in one run, and
say what is wrong. They watch the product's own trainer, on the hospital's records, through `audit.watch`:

    noise         what the optimiser adds to the sum, against N(0, (noise_multiplier max_grad_norm)^2), on every parameter, in every step,
                  and in many directions; of nobody, of many, and of a few sampled in turn
    fresh noise   values that come twice; every step against every other, parameters against each other, and the hospital against itself
                  when started again (`audit.independence`)
    sensitivity   the data with and without one unit: how far the clipped sum moves, for the units with the largest gradients, one of the
                  rarest class, a record of extreme features, gradients far above the clip norm, and one that is not finite; in several
                  pieces, as large batches are. What the others add to the sum may not change at all. Most of it again after all rounds
    sampling      sizes of samples, how often each unit is in, and how often in two samples that are any number of steps apart
    side channels the noised sum replaced by noise: then nothing that leaves or stays, in any round, may differ between two sets of
                  records, of other sizes, values and labels
    bookkeeping   steps that touched records, changed parameters, were booked, and were reported, over the rounds of the study, as they
                  are counted in the training for side channels

Noise and samples are those of one training, round by round as a node makes them, of as many rounds as the study has; where these have
few steps, of some more rounds, and samples also of another start.

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

from audit import independence
from audit.counts import private_shapes, refuse
from audit.findings import Finding
from audit.independence import (
    EVERYTHING,
    NO_SHIFTS,
    Likeness,
    Scale,
    Shapes,
    Shifts,
    chance_of_likeness,
    directions_of,
    shifts_of,
)
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

LEAST_STEPS, MOST_STEPS = 100, 300
"""Steps that are watched round by round: those of the study, within these limits; for bookkeeping there is no lower one."""

SAMPLING_STEPS = MOST_STEPS
"""So many samples are looked at."""

NOISE_VALUES, LEAST_KEPT = 20_000_000, 12
"""So many values of noise at most; of a large model only some of the steps are kept for it, drawn by lot, and so many at least."""

CROWD = 256
"""So many units at most where everybody is to be sampled."""

LENGTHS = (0.5, 1.0, 10.0, 1e4)
"""Norms of gradients that are put in, in clip norms."""

CANDIDATES, LARGEST_UNITS = 48, 5
"""Units in the data of that test, and how many of them, those with the largest gradients, are left out in turn."""

EMPTY_STEPS, EMPTY_VALUES = 4, 200_000
"""Of those with nobody sampled so many are searched for values that come twice, and so many values in all: of more, float32 has too few."""

SMALL_PIECE = 16
DISTINCT = 0.98
"""Of noise in float32: some values meet by chance. Of 200,000 they are one in 400."""

LATER = ", after all rounds"
"""Of influences, ends the name."""

TOLERANCE = 1e-3
"""Relative, of a clipped norm, in float32."""


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
        directions: noise in families of directions.
        step_correlations: of each step's noise with that of a step before it, the one that it is most like.
        start_correlation: of the first step after another start, with the step that it is most like.
        likeness, shifts: see `audit.independence`.
        distinct_values: of noise on the sum of nobody, which is not rounded; `empty_values` are there.
        others_moved: how far what the others add to the sum was moved when one unit was left out of the data.
        compared: values that left or stayed, in all rounds; `leaks` are those that differ.
    """

    member: str
    noise_multiplier: float
    sample_rate: float
    unit: str
    noise: tuple[Scale, ...]
    directions: tuple[Scale, ...]
    kolmogorov_smirnov: float
    noise_values: int
    step_mean_squares: tuple[float, ...]
    empty_values: int
    distinct_values: int
    step_correlations: tuple[float, ...]
    start_correlation: float
    likeness: tuple[Likeness, ...]
    shifts: Shifts
    influences: tuple[Influence, ...]
    others_moved: tuple[Influence, ...]
    sampling: Sampling
    bookkeeping: Bookkeeping
    leaks: tuple[str, ...]
    compared: int
    seconds: float


Progress = Callable[[str, float], None]


def collect(target: Target, progress: Progress = lambda *_: None) -> ConformanceEvidence:
    """Watch the trainer of `target`."""
    started = time.monotonic()
    progress("noise and samples, round by round", 0.0)
    watched = _through_rounds(target)
    noise = _noise(target, watched)
    progress("influence of one unit", 0.4)
    sampling = _sampling(target, watched.samples)
    influences, others_moved = _influences(target)
    influences += _later_influences(target, watched)
    progress("side channels and bookkeeping", 0.6)
    leaks, compared, bookkeeping = _leaks(target)
    privacy = target.agreement.privacy
    return ConformanceEvidence(
        member=target.member.node_id,
        noise_multiplier=privacy.noise_multiplier,
        sample_rate=privacy.sample_rate,
        unit=privacy.unit,
        noise=noise.parameters,
        directions=noise.directions,
        kolmogorov_smirnov=noise.kolmogorov_smirnov,
        noise_values=noise.values,
        step_mean_squares=noise.steps,
        empty_values=noise.empty,
        distinct_values=noise.distinct,
        step_correlations=noise.correlations,
        start_correlation=noise.start_correlation,
        likeness=noise.likeness,
        shifts=noise.shifts,
        influences=influences,
        others_moved=others_moved,
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


# --- all rounds


@dataclass(frozen=True, slots=True)
class _Watched:
    """A trainer that has been through all rounds, and what was seen of it meanwhile.

    Attributes:
        noise: of the steps that were kept [kept, d], in units of the promised standard deviation.
        empty: some values [values] of noise on the sum of nobody.
        samples: that were drawn [steps, units]; what came in by them was another one.
    """

    trainer: LocalTrainer
    watch: Watch
    noise: NDArray[np.float64]
    empty: NDArray[np.float64]
    samples: NDArray[np.bool_]


def _rounds(agreement: Agreement) -> int:
    """So many private rounds (the first takes no private steps) are watched for side channels and bookkeeping."""
    return max(1, min(agreement.study.rounds - 1, MOST_STEPS // agreement.training.steps_per_round))


def _steps(agreement: Agreement) -> int:
    """So many steps are watched for noise and samples, in whole rounds."""
    per_round = agreement.training.steps_per_round
    return min(MOST_STEPS, per_round * max(_rounds(agreement), -(-LEAST_STEPS // per_round)))


def _kept(agreement: Agreement, size: int) -> int:
    """Of so many steps the noise is kept, of a model of so many private parameters."""
    return min(_steps(agreement), max(LEAST_KEPT, NOISE_VALUES // size))


def _std(target: Target) -> float:
    return target.agreement.privacy.noise_multiplier * target.agreement.privacy.max_grad_norm


def _places(size: int) -> NDArray[np.int64]:
    """Where values that come twice are searched for, among so many parameters."""
    return np.random.default_rng().permutation(size)[: EMPTY_VALUES // EMPTY_STEPS]


def _through_rounds(target: Target) -> _Watched:
    """Train round by round, with nobody sampled, many, and a few in turn."""
    trainer, agreement, random = target.trainer(), target.agreement, np.random.default_rng()
    size, count, steps = sum(p.numel() for p in trainer._optimizer.params), len(trainer._units), _steps(agreement)
    kept = {0, *(1 + random.permutation(steps - 1)[: _kept(agreement, size) - 1]).tolist()}
    places, std = _places(size), _std(target) or 1.0
    noise, empty, samples = list[NDArray[np.float64]](), list[NDArray[np.float64]](), list[NDArray[np.bool_]]()

    def sampled(step: int) -> NDArray[np.bool_]:
        chosen = np.zeros(count, np.bool_)
        chosen[random.permutation(count)[: (0, CROWD, 1 + count // 8)[step % 3]]] = True
        return chosen

    def observe(step: Seen) -> None:
        number = len(samples)
        if number in kept:
            noise.append(step.noise.numpy() / std)
        if number % 3 == 0 and len(empty) < EMPTY_STEPS:
            empty.append(step.noise.numpy()[places] / std)
        samples.append(step.sample)
        watch.fixed = sampled(number + 1)

    state, layout = with_consensus(target, trainer), Layout.from_agreement(agreement)
    watch = Watch(trainer, observe, fixed=sampled(0))
    for _ in range(-(-steps // agreement.training.steps_per_round)):
        state = apply_sum(state, layout, trainer.train_round(state).vector(layout), agreement)
    while len(samples) < steps:  # a trainer that takes fewer than agreed: bookkeeping tells
        trainer.step()
    watch.observe = watch.fixed = None
    return _Watched(trainer, watch, np.array(noise), np.concatenate(empty), np.array(samples[:steps]))


# --- noise


@dataclass(frozen=True, slots=True)
class _Noise:
    """See `ConformanceEvidence`."""

    parameters: tuple[Scale, ...] = ()
    directions: tuple[Scale, ...] = ()
    kolmogorov_smirnov: float = 0.0
    values: int = 0
    steps: tuple[float, ...] = ()
    empty: int = 0
    distinct: int = 0
    correlations: tuple[float, ...] = ()
    start_correlation: float = 0.0
    likeness: tuple[Likeness, ...] = ()
    shifts: Shifts = NO_SHIFTS


def _noise(target: Target, watched: _Watched) -> _Noise:
    if _std(target) == 0.0:
        return _Noise()
    drawn, names = watched.noise, {id(p): name for name, p in watched.trainer.model.named_parameters()}
    shapes = {names[id(p)]: tuple(p.shape) for p in watched.trainer._optimizer.params}
    at, by_parameter = 0, []
    for name, shape in shapes.items():
        own = drawn[:, at : at + math.prod(shape)]
        by_parameter.append(Scale(name, own.size, float(np.mean(own**2))))
        at += math.prod(shape)
    scaled = independence.at_own_scales(drawn, shapes)
    alike = independence.cosines(scaled)
    return _Noise(
        tuple(by_parameter),
        independence.directions(drawn, shapes),
        float(stats.kstest(drawn.ravel(), "norm").statistic),
        drawn.size,
        tuple(np.mean(drawn**2, axis=1).tolist()),
        watched.empty.size,
        len(np.unique(np.abs(watched.empty))),
        tuple(max(alike[step, :step].tolist(), key=abs) for step in range(1, len(drawn))),
        max(independence.correlations(_first_noise(target), drawn).tolist(), key=abs),
        independence.likeness(scaled, shapes),
        independence.shifts(scaled),
    )


def _first_noise(target: Target) -> NDArray[np.float64]:
    """The noise of the first private step after another start [d]."""
    trainer, seen = target.trainer(), list[NDArray[np.float64]]()
    state = with_consensus(target, trainer)
    Watch(trainer, lambda step: seen.append(step.noise.numpy()), fixed=np.zeros(len(trainer._units), np.bool_))
    trainer.train_round(state)
    return seen[0]


# --- sensitivity


def _influences(target: Target) -> tuple[tuple[Influence, ...], tuple[Influence, ...]]:
    """One unit's on the sum, and on what the others add to it; of fresh trainers, which are given the data with and without it."""
    clip, unit = target.agreement.privacy.max_grad_norm, target.agreement.privacy.unit
    shaken = [torch.randn_like(p) * 0.2 for p in target.trainer().model.private_parameters()]

    def summed(
        records: LabelledRecords, length: float = 0.0, *, spoiled: bool = False, but: NDArray[np.bool_] | None = None
    ) -> torch.Tensor:
        """The clipped sum [d] of the units of all of these records, `but` those of some records.

        And of a canary of this norm beside them, or with a gradient that is not finite.
        """
        made, seen = target.trainer(records=records), list[Seen]()
        with torch.no_grad():  # away from the start, where heads are zero and gradients small
            for p, change in zip(made.model.private_parameters(), shaken, strict=True):
                p.add_(change)
        size = sum(p.numel() for p in shaken)
        canary = RandomCanaries(1, size, length * clip) if length else None
        sampled = np.ones(len(made._units) + (canary is not None), np.bool_)
        if but is not None:
            sampled[: len(made._units)] = [not but[own].any() for own in made._units]
        Watch(
            made,
            seen.append,
            canaries=canary,
            included=None if canary is None else np.ones(1, np.bool_),
            fixed=sampled,
        )
        if spoiled:
            spoil(made)
        made.step()
        return seen[0].summed.double()

    owners = _owners(target)
    some = np.random.default_rng().permutation(owners.max() + 1)[:CANDIDATES]
    base = _chosen(target.records, np.isin(owners, some))
    mine = owners[np.isin(owners, some)]
    names, others_names = _influences_of(unit, int(owners.max()) + 1)
    with _small_pieces():
        whole = summed(base)
        moved = {int(one): _alone(target, _chosen(base, mine == one)) for one in some}
        left_out = [*sorted(moved, key=lambda one: -moved[one])[:LARGEST_UNITS], _of_the_rarest_class(base, mine)]
        found, others = list[float](), list[float]()
        for one in left_out if len(some) > 1 else ():
            without = summed(_chosen(base, mine != one))
            found.append(_moved(whole, without, clip))
            others.append(_moved(summed(base, but=mine == one), without, clip))
        found.append(_moved(summed(_with_extreme(base)), whole, clip))
        found += [_moved(summed(base, length), whole, clip) for length in LENGTHS]
        finite = bool(torch.isfinite(summed(base, spoiled=True)).all())
        found.append(0.0 if finite else BEYOND_MEASURE)
    named = [name for name in names if not name.endswith(LATER)]
    return (
        tuple(Influence(name, norm) for name, norm in zip(named, found, strict=True)),
        tuple(Influence(name, norm) for name, norm in zip(others_names, others, strict=True)),
    )


def _later_influences(target: Target, watched: _Watched) -> tuple[Influence, ...]:
    """One unit's on the sum, of the trainer that has been through all rounds, at the parameters that these left."""
    trainer, privacy, seen, owners = watched.trainer, target.agreement.privacy, list[Seen](), _owners(target)
    parameters = list(trainer.model.private_parameters())
    left, units = [p.detach().clone() for p in parameters], list(trainer._units)
    watch = Watch(
        trainer,
        seen.append,
        canaries=RandomCanaries(
            len(LENGTHS), sum(p.numel() for p in left), [n * privacy.max_grad_norm for n in LENGTHS]
        ),
        included=np.ones(len(LENGTHS), np.bool_),
    )

    unit_of, owner_of = np.repeat(np.arange(len(units)), [len(own) for own in units]), owners[np.concatenate(units)]

    def of(these: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the trainer's units have a record of these owners [units]."""
        chosen = np.zeros(len(units), np.bool_)
        chosen[unit_of[np.isin(owner_of, these)]] = True
        return chosen

    def summed(sampled: NDArray[np.bool_], canary: int | None = None) -> torch.Tensor:
        with torch.no_grad():
            for p, value in zip(parameters, left, strict=True):
                p.copy_(value)
        watch.fixed = np.append(sampled, np.arange(len(LENGTHS)) == (-1 if canary is None else canary))
        seen.clear()
        trainer.step()
        return seen[0].summed.double()

    some = np.random.default_rng().permutation(owners.max() + 1)[:CANDIDATES]
    base, clip = of(some), privacy.max_grad_norm
    with _small_pieces():
        whole, moved = summed(base), dict[int, float]()
        for one in some.tolist():
            watch.fixed = np.append(of(np.array([one])), np.zeros(len(LENGTHS), np.bool_))
            moved[one] = _length(trainer)
        largest = sorted(moved, key=lambda one: -moved[one])[:LARGEST_UNITS] if len(some) > 1 else []
        found = [_moved(whole, summed(base & ~of(np.array([one]))), clip) for one in largest]
        found += [_moved(summed(base, canary), whole, clip) for canary in range(len(LENGTHS))]
        spoil(trainer)
        found.append(0.0 if bool(torch.isfinite(summed(base)).all()) else BEYOND_MEASURE)
    names = [name for name in _influences_of(privacy.unit, int(owners.max()) + 1)[0] if name.endswith(LATER)]
    return tuple(Influence(name, norm) for name, norm in zip(names, found, strict=True))


def _influences_of(unit: str, units: int) -> tuple[list[str], list[str]]:
    """Whose influence is measured where so many units are: on the sum, and on what others add to it."""
    some = min(CANDIDATES, units)
    largest = [f"a {unit} of the largest gradients"] * (min(LARGEST_UNITS, some) if some > 1 else 0)
    left_out = [*largest, f"a {unit} of the rarest class"] if some > 1 else []
    made = [*[f"a made gradient of norm {length:g}" for length in LENGTHS], "a gradient that is not finite"]
    later = [f"{name}{LATER}" for name in (*largest, *made)]
    return [*left_out, f"a {unit} of extreme features", *made, *later], left_out


def _of_the_rarest_class(records: LabelledRecords, owners: NDArray[np.int64]) -> int:
    """The owner of a record of the class that has the fewest."""
    classes, counts = np.unique(records.labels, return_counts=True)
    return int(owners[records.labels == classes[counts.argmin()]][0])


def _moved(with_it: torch.Tensor, without: torch.Tensor, clip: float) -> float:
    moved = float((with_it - without).norm()) / clip
    return moved if math.isfinite(moved) else BEYOND_MEASURE


def _alone(target: Target, records: LabelledRecords) -> float:
    """How large the gradient of one unit, whose records these are, is at the start, before clipping."""
    return _length(target.trainer(records=records))


def _length(trainer: LocalTrainer) -> float:
    """How large the gradient of everybody, or of who is fixed, is before clipping, by the losses of the records."""
    trainer._optimizer.zero_grad(set_to_none=True)
    trainer._private_gradient(np.ones(len(trainer._units), np.bool_))
    parts = [p.grad_sample.double().sum(dim=0).norm() for p in trainer._optimizer.params if p.grad_sample is not None]
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


def _sampling(target: Target, drawn: NDArray[np.bool_]) -> Sampling:
    """The samples of all rounds [steps, units], and after these those of another start, to have enough of them."""
    trainer, count, masks = target.trainer(), drawn.shape[1], list(drawn)
    Watch(trainer, lambda step: masks.append(step.sample), fixed=np.zeros(count, np.bool_))
    while len(masks) < SAMPLING_STEPS:
        trainer.step()
    steps, drawn = SAMPLING_STEPS, np.array(masks[:SAMPLING_STEPS])
    overlaps = tuple(int((drawn[:-lag] & drawn[lag:]).sum()) for lag in range(1, steps))
    expected = int(_owners(target).max()) + 1
    return Sampling(count, expected, tuple(drawn.sum(axis=1).tolist()), tuple(drawn.sum(axis=0).tolist()), overlaps)


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
    shapes, seen = private_shapes(agreement, evidence.member), evidence.bookkeeping
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    _check_noise(evidence, agreement, shapes)
    _check_independence(evidence, shapes)
    _check_sampling(evidence.sampling)
    _check_influences(evidence)
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


def _check_influences(evidence: ConformanceEvidence) -> None:
    moved = {influence.unit: influence.norm for influence in evidence.influences}
    names = [[influence.unit for influence in told] for told in (evidence.influences, evidence.others_moved)]
    refuse(
        "the influences that were measured are not those that the audit measures",
        (*names,) != _influences_of(evidence.unit, evidence.sampling.expected_units),
        any(influence.norm < 0.0 for influence in (*evidence.influences, *evidence.others_moved)),
        any(not moved.get(f"a made gradient of norm {length:g}{when}") for length in LENGTHS for when in ("", LATER)),
    )


def _check_noise(evidence: ConformanceEvidence, agreement: Agreement, shapes: Shapes) -> None:
    privacy, sizes = agreement.privacy, {name: math.prod(shape) for name, shape in shapes.items()}
    size = sum(sizes.values())
    steps = _kept(agreement, size) if privacy.noise_multiplier * privacy.max_grad_norm > 0.0 else 0
    empty = EMPTY_STEPS * min(size, EMPTY_VALUES // EMPTY_STEPS) if steps else 0
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


def _check_independence(evidence: ConformanceEvidence, shapes: Shapes) -> None:
    """Every family and parameter is there; projections are no larger than what is projected, and sums than their parts."""
    steps, size = len(evidence.step_mean_squares), sum(math.prod(shape) for shape in shapes.values())
    due = {name: math.prod(shape) for name, shape in shapes.items() if math.prod(shape) > 1} | {EVERYTHING: size}
    pairs, total = steps * (steps - 1) / 2, evidence.noise_values * float(np.mean(evidence.step_mean_squares or [0.0]))
    whole = [one.square_sum for one in evidence.likeness if one.name == EVERYTHING]
    refuse(
        "the noise was not looked at in all directions, or shifts, or for likeness on all parameters",
        {one.name: one.count for one in evidence.directions} != (directions_of(shapes, steps) if steps else {}),
        {one.name: one.values for one in evidence.likeness} != (due if steps else {}),
        len(evidence.directions) != len({one.name for one in evidence.directions}),
        len(evidence.likeness) != len({one.name for one in evidence.likeness}),
        evidence.shifts.count != (shifts_of(size, steps) if steps else 0),
        not min(1, evidence.shifts.count) <= evidence.shifts.largest <= evidence.shifts.count,
    )
    refuse(
        "what is told of directions, shifts and likeness of the noise cannot be",
        any(not 0.0 <= one.mean_square * one.count <= total * (1.0 + TOLERANCE) for one in evidence.directions),
        any(not 0.0 <= one.square_sum <= pairs * (1.0 + TOLERANCE) for one in evidence.likeness),
        any(square * (1.0 + TOLERANCE) < sum(one**2 for one in evidence.step_correlations) for square in whole),
        total > 0.0 and any(square == 0.0 for square in whole),
        total > 0.0 and evidence.shifts.count > 0 and evidence.shifts.deviation == 0.0,
    )


def _check_sampling(sampling: Sampling) -> None:
    sizes, units, steps = sampling.sizes, sampling.units, SAMPLING_STEPS
    refuse(
        "samples that were looked at are not those that the audit takes",
        len(sizes) != steps or len(sampling.inclusions) != units or len(sampling.overlaps) != steps - 1,
        min(units, sampling.expected_units) < 1,
    )
    together = [list(zip(sizes, sizes[lag:], strict=False)) for lag in range(1, steps)]
    refuse(
        "sizes of samples and how often units are in them do not go together",
        any(not 0 <= size <= units for size in sizes),
        any(not 0 <= often <= steps for often in sampling.inclusions),
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
    name, promise = "noise", "every private parameter, and every direction, gets Gaussian noise of the agreed scale"
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
    for family in evidence.directions:
        if stats.chi2.cdf(family.count * family.mean_square, family.count) < ALARM / len(evidence.directions):
            broken.append(f"{family.name}: {math.sqrt(family.mean_square):.3f} times the agreed noise")
    least = min((math.sqrt(parameter.mean_square) for parameter in evidence.noise), default=0.0)
    weakest = min((math.sqrt(family.mean_square) for family in evidence.directions), default=0.0)
    steps = len(evidence.step_mean_squares)
    for number, mean_square in enumerate(evidence.step_mean_squares, start=1):
        values = evidence.noise_values // steps
        if stats.chi2.cdf(values * mean_square, values) < ALARM / steps:
            broken.append(f"step {number} has {math.sqrt(mean_square):.3f} times the agreed noise")
    if stats.kstwo.sf(evidence.kolmogorov_smirnov, max(1, evidence.noise_values)) < ALARM:
        broken.append(f"the noise is not Gaussian: Kolmogorov-Smirnov distance {evidence.kolmogorov_smirnov:.4f}")
    detail = (
        f"{evidence.noise_values} values in {steps} steps; least scale on a parameter {least:.3f} of the agreed one, in "
        f"{len(evidence.directions)} families of directions {weakest:.3f}, "
        f"Kolmogorov-Smirnov distance {evidence.kolmogorov_smirnov:.2g}"
    )
    return _finding(name, promise, _shortened(broken), detail)


def _shortened(broken: Sequence[str], most: int = 3) -> list[str]:
    rest = len(broken) - most
    return [*broken[:most], *([f"and {rest} more"] if rest > 0 else [])]


def _judge_reuse(evidence: ConformanceEvidence) -> Finding:
    name, promise = "fresh noise", "no noise is used twice, in two steps, on two parameters or after a restart"
    if evidence.noise_multiplier == 0.0:
        return Finding("training", name, promise, "not testable", "the agreement has no noise")
    steps = max(2, len(evidence.step_mean_squares))
    values = max(1, evidence.noise_values // steps)
    limit = float(stats.norm.isf(ALARM / (steps * (steps + 1)))) / math.sqrt(values)
    broken = []
    worst = max(evidence.step_correlations, key=abs, default=0.0)
    if abs(worst) > limit:
        broken.append(f"the noise of two steps has correlation {worst:.3f}")
    if evidence.distinct_values < DISTINCT * evidence.empty_values:
        broken.append(f"of {evidence.empty_values} values of noise only {evidence.distinct_values} are different ones")
    if abs(evidence.start_correlation) > limit:
        broken.append(f"the noise after a restart has correlation {evidence.start_correlation:.3f} with that before")
    for one in evidence.likeness:
        if chance_of_likeness(one, steps) < ALARM / len(evidence.likeness):
            times = one.square_sum * one.values / (steps * (steps - 1) / 2)
            broken.append(f"{one.name}: steps are {times:.2f} times as like each other as independent noise")
    shift, most = evidence.shifts, float(stats.norm.isf(ALARM / 2 / max(1, evidence.shifts.count)))
    if abs(shift.deviation) > most:
        broken.append(f"the noise goes with that {shift.largest} values further on: {shift.deviation:.1f} deviations")
    detail = f"largest correlation of steps {worst:.2g}, of restarts {evidence.start_correlation:.2g}, chance allows {limit:.2g}; "
    detail += f"of {shift.count} shifts {shift.deviation:.1f} deviations, chance allows {most:.1f}"
    return _finding(name, promise, _shortened(broken), detail)


def _told(norm: float) -> str:
    return f"{norm:.4f}" if norm < BEYOND_MEASURE else "infinitely many"


def _judge_influence(evidence: ConformanceEvidence) -> Finding:
    if not evidence.influences:
        raise ValueError("nobody's influence was measured")
    largest = max(evidence.influences, key=lambda influence: math.inf if math.isnan(influence.norm) else influence.norm)
    broken = []
    if not largest.norm <= 1.0 + TOLERANCE:
        broken.append(f"one unit moved the sum by {_told(largest.norm)} times the clip norm ({largest.unit})")
    others = max((influence.norm for influence in evidence.others_moved), default=0.0)
    if others != 0.0:
        broken.append(f"leaving out one unit moved what the others add to the sum, by {others:.2g} times the clip norm")
    detail = f"{len(evidence.influences)} units; the sum moved by at most {_told(largest.norm)} times the clip norm ({largest.unit})"
    return _finding(
        "sensitivity",
        f"one {evidence.unit} moves the sum by at most the clip norm, over all parameters, and nothing of what others add to it",
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
    chances = _chances_again(sampling.overlaps, n, steps, q)
    worst = min(range(steps - 1), key=lambda lag: chances[lag])
    if chances[worst] < ALARM / (steps - 1):
        expected = n * (steps - worst - 1) * q * q
        broken.append(
            f"units are in two samples {worst + 1} apart {sampling.overlaps[worst]} times, coins give {expected:.0f}"
        )
    detail = f"{steps} steps; {found} (coins: {n * q * (1 - q):.2f})"
    half = steps // 2  # as in samples that come back after so many steps: can that be told?
    if _chances_again([round(n * q * (steps - lag)) for lag in range(1, steps)], n, steps, q)[half] >= ALARM / steps:
        detail += "; whether samples come back could not be tested, since too few units are in two of them"
    return _finding(name, promise, broken, detail)


def _chances_again(overlaps: Sequence[int], units: int, steps: int, rate: float) -> NDArray[np.float64]:
    """For each lag 1, 2, ... a bound on the probability that coins put units so often, or so seldom, into two samples that far apart.

    Chernoff's, from the exact law: a unit's coins at t, t + lag, t + 2 lag, ... are a chain of pairs, and the logarithm of
    E[exp(slope times the pairs of heads)] follows along it from one coin to the next. It holds for any slope, so some will do.
    """
    slopes = np.logspace(-5, 1.5, 200)
    slopes = np.concatenate([-slopes, slopes])
    tails, heads = np.full(len(slopes), 1.0 - rate), np.full(len(slopes), rate)
    log, logs = (
        np.zeros(len(slopes)),
        [np.zeros(len(slopes)), np.zeros(len(slopes))],
    )  # of chains of no coin, and of one
    for _ in range(steps):
        tails, heads = (1.0 - rate) * (tails + heads), rate * (tails + np.exp(slopes) * heads)
        total = tails + heads
        log, tails, heads = log + np.log(total), tails / total, heads / total
        logs.append(log)
    found = []
    for lag, overlap in enumerate(overlaps, start=1):
        coins, longer = divmod(steps, lag)  # so many chains have one coin more
        moment = units * ((lag - longer) * logs[coins] + longer * logs[coins + 1])
        found.append(min(1.0, 2.0 * math.exp(min(0.0, float((moment - slopes * overlap).min())))))
    return np.array(found)


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
