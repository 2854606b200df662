"""Watch a trainer: through all rounds of a study, and on data with and without one unit."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from audit import independence
from audit.conformance.evidence import (
    BEYOND_MEASURE,
    CANDIDATES,
    CROWD,
    EMPTY_STEPS,
    EMPTY_VALUES,
    LARGEST_UNITS,
    LATER,
    LENGTHS,
    SAMPLING_STEPS,
    SMALL_PIECE,
    Bookkeeping,
    ConformanceEvidence,
    Influence,
    Sampling,
    influences_of,
    kept_steps,
    watched_rounds,
    watched_steps,
)
from audit.independence import (
    NO_SHIFTS,
    Likeness,
    Scale,
    Shifts,
)
from audit.target import Target
from audit.watch import RandomCanaries, Seen, Watch, spoil
from secgeo.datasets import LabelledRecords
from secgeo.noise import NoiseSource
from secgeo.training import LocalTrainer
from secgeo.update import Layout, SharedState, apply_sum

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


def _with_consensus(target: Target, trainer: LocalTrainer) -> SharedState:
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


def _std(target: Target) -> float:
    return target.agreement.privacy.noise_multiplier * target.agreement.privacy.max_grad_norm


def _places(size: int) -> NDArray[np.int64]:
    """Where values that come twice are searched for, among so many parameters."""
    return np.random.default_rng().permutation(size)[: EMPTY_VALUES // EMPTY_STEPS]


def _through_rounds(target: Target) -> _Watched:
    """Train round by round, with nobody sampled, many, and a few in turn."""
    trainer, agreement, random = target.trainer(), target.agreement, np.random.default_rng()
    size, count, steps = trainer._optimizer.vector.numel(), len(trainer._units), watched_steps(agreement)
    kept = {0, *(1 + random.permutation(steps - 1)[: kept_steps(agreement, size) - 1]).tolist()}
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

    state, layout = _with_consensus(target, trainer), Layout.from_agreement(agreement)
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
    shapes = {names[id(p)]: tuple(p.shape) for p in watched.trainer._optimizer.parameters}
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
    state = _with_consensus(target, trainer)
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
        made.physical_batch = SMALL_PIECE  # Clipped piece by piece, as large samples are.
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
    names, others_names = influences_of(unit, int(owners.max()) + 1)
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
    trainer.physical_batch = SMALL_PIECE
    whole, moved = summed(base), dict[int, float]()
    for one in some.tolist():
        watch.fixed = np.append(of(np.array([one])), np.zeros(len(LENGTHS), np.bool_))
        moved[one] = _length(trainer)
    largest = sorted(moved, key=lambda one: -moved[one])[:LARGEST_UNITS] if len(some) > 1 else []
    found = [_moved(whole, summed(base & ~of(np.array([one]))), clip) for one in largest]
    found += [_moved(summed(base, canary), whole, clip) for canary in range(len(LENGTHS))]
    spoil(trainer)
    found.append(0.0 if bool(torch.isfinite(summed(base)).all()) else BEYOND_MEASURE)
    names = [name for name in influences_of(privacy.unit, int(owners.max()) + 1)[0] if name.endswith(LATER)]
    return tuple(Influence(name, norm) for name, norm in zip(names, found, strict=True))


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
    return float(trainer._optimizer.vector.grad_sample.sum(dim=0, dtype=torch.float64).norm())


def _with_extreme(records: LabelledRecords) -> LabelledRecords:
    """The records and one of somebody else, a thousand times as large."""
    patients = None if records.patients is None else np.append(records.patients, "somebody else")
    features = np.concatenate([records.features, 1e3 * records.features[:1] + 1.0])
    return LabelledRecords(features.astype(np.float32), np.append(records.labels, records.labels[0]), patients)


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
        watched_rounds(target.agreement),
    )
    left: dict[str, NDArray[Any]] = {}
    state = _with_consensus(target, trainer)
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
