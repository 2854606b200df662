"""Planted bugs: mistakes that real implementations of DP-SGD have made, put into the product's own trainer to see which audit notices.

Each plant changes one thing of a `LocalTrainer` and leaves its bookkeeping as it was: what is claimed stays the same. Sources: Tramer et
al. 2022 (arXiv 2202.12219), Chua et al. 2024 (arXiv 2403.17673, shuffled batches), Nasr et al. 2023 (arXiv 2302.07956).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from audit.target import Target
from audit.watch import patch
from secgeo.noise import NoiseSource
from secgeo.training import LocalTrainer, RoundUpdate
from secgeo.update import SharedState

DECAY = 0.95
"""What a schedule leaves of the noise in each round."""

MICROBATCH = 4
"""Units of a microbatch where a plant has them."""

PATIENT_RECORDS = 4
"""Records that a plant gives to each patient, if the agreement protects records."""


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug: what it is, and how it gets into a trainer."""

    name: str
    what: str
    into: Callable[[LocalTrainer], None]
    needs_patients: bool = False

    def target(self, target: Target) -> Target:
        """The target with this bug. Where the bug is about patients, records get some, and the agreement protects them."""
        if self.needs_patients and target.agreement.privacy.unit != "patient":
            privacy = msgspec.structs.replace(
                target.agreement.privacy, unit="patient", records_per_patient=PATIENT_RECORDS
            )
            patients = np.array([f"patient {i // PATIENT_RECORDS}" for i in range(len(target.records))])
            target = replace(
                target,
                agreement=msgspec.structs.replace(target.agreement, privacy=privacy),
                records=replace(target.records, patients=patients),
            )
        return replace(target, plant=self.name)


# --- noise


def _scaled_noise(factor: Callable[[LocalTrainer], float]) -> Callable[[LocalTrainer], None]:
    def into(trainer: LocalTrainer) -> None:
        optimizer = trainer._optimizer
        gaussian = optimizer._noise.gaussian

        def add_noise() -> None:
            std = optimizer.noise_multiplier * optimizer.max_grad_norm * factor(trainer)
            summed = optimizer.vector.summed_grad
            optimizer.vector.grad = (summed.double() + gaussian(summed.shape, std)).to(summed.dtype)

        patch(optimizer, add_noise=add_noise)

    return into


def _microbatches(trainer: LocalTrainer) -> float:
    """As if the noise were shared out among microbatches, each with its part of the standard deviation."""
    return 1.0 / math.sqrt(max(1.0, trainer._member.expected_batch_size / MICROBATCH))


def _fixed_seed(trainer: LocalTrainer) -> None:
    trainer._noise = trainer._optimizer._noise = NoiseSource(bytes(32))


def _reused_seed(trainer: LocalTrainer) -> None:
    optimizer, add_noise = trainer._optimizer, trainer._optimizer.add_noise
    key = trainer._noise.uniform(4).tobytes()

    def reseeded() -> None:
        optimizer._noise = NoiseSource(key)
        add_noise()

    patch(optimizer, add_noise=reseeded)


def _unnoised(trainer: LocalTrainer, parameters: Iterable[Any], divisor: float = 1.0) -> None:
    """Of these parameters the gradient is the clipped sum over the divisor, without its noise."""
    optimizer, chosen = trainer._optimizer, {id(p) for p in parameters}
    parts = optimizer.split(optimizer.vector.grad), optimizer.split(optimizer.vector.summed_grad)
    for p, noised, summed in zip(optimizer.parameters, *parts, strict=True):
        if id(p) in chosen:
            noised.copy_(summed / divisor)


def _unnoised_magnitudes(trainer: LocalTrainer) -> None:
    optimizer, add_noise = trainer._optimizer, trainer._optimizer.add_noise

    def all_but_magnitudes() -> None:
        add_noise()
        _unnoised(trainer, [layer.magnitude.weight for layer in trainer.model.adapted.values()])

    patch(optimizer, add_noise=all_but_magnitudes)


def _shared_by_shape(trainer: LocalTrainer) -> None:
    """Parameters of one shape get the same noise."""
    optimizer, gaussian = trainer._optimizer, trainer._optimizer._noise.gaussian

    def add_noise() -> None:
        std, summed = optimizer.noise_multiplier * optimizer.max_grad_norm, optimizer.vector.summed_grad
        shapes = [tuple(p.shape) for p in optimizer.parameters]
        drawn = {shape: gaussian(shape, std).flatten() for shape in dict.fromkeys(shapes)}
        optimizer.vector.grad = (summed.double() + torch.cat([drawn[shape] for shape in shapes])).to(summed.dtype)

    patch(optimizer, add_noise=add_noise)


def _every_third_again(trainer: LocalTrainer) -> None:
    optimizer, add_noise = trainer._optimizer, trainer._optimizer.add_noise
    keys, step = [trainer._noise.uniform(4).tobytes() for _ in range(3)], [0]

    def repeated() -> None:
        optimizer._noise = NoiseSource(keys[step[0] % 3])
        step[0] += 1
        add_noise()

    patch(optimizer, add_noise=repeated)


def _half_precision(trainer: LocalTrainer) -> None:
    optimizer, gaussian = trainer._optimizer, trainer._optimizer._noise.gaussian

    def add_noise() -> None:
        std = optimizer.noise_multiplier * optimizer.max_grad_norm
        summed = optimizer.vector.summed_grad
        optimizer.vector.grad = summed + gaussian(summed.shape, std).half().to(summed.dtype)

    patch(optimizer, add_noise=add_noise)


def _local_without_noise(trainer: LocalTrainer) -> None:
    """What stays at the hospital is updated with the sum before the noise: head, tokeniser, magnitudes."""
    optimizer, pre_step = trainer._optimizer, trainer._optimizer.pre_step

    def clean() -> bool:
        done = bool(pre_step())
        _unnoised(trainer, trainer.model.local_parameters(), optimizer.expected_batch_size)
        return done

    patch(optimizer, pre_step=clean)


def _weaker_later(trainer: LocalTrainer) -> None:
    """Noise is as agreed for a dozen steps, and four fifths of it afterwards."""
    steps = [0]

    def factor(_: LocalTrainer) -> float:
        steps[0] += 1
        return 1.0 if steps[0] <= 12 else 0.8

    _scaled_noise(factor)(trainer)


def _pool_of_seeds(trainer: LocalTrainer) -> None:
    """Sixteen seeds take turns."""
    optimizer, add_noise = trainer._optimizer, trainer._optimizer.add_noise
    keys, step = [trainer._noise.uniform(4).tobytes() for _ in range(16)], [0]

    def pooled() -> None:
        optimizer._noise = NoiseSource(keys[step[0] % len(keys)])
        step[0] += 1
        add_noise()

    patch(optimizer, add_noise=pooled)


def _unnoised_where_it_matters(trainer: LocalTrainer) -> None:
    """Magnitudes and head get noise only when nobody was sampled."""
    optimizer, add_noise = trainer._optimizer, trainer._optimizer.add_noise
    local: list[Any] = [layer.magnitude.weight for layer in trainer.model.adapted.values()]
    local += list(trainer.model.head.parameters())

    def sometimes() -> None:
        add_noise()
        if bool((optimizer.vector.summed_grad != 0.0).any()):
            _unnoised(trainer, local)

    patch(optimizer, add_noise=sometimes)


def _each_round(trainer: LocalTrainer, before: Callable[[int], None]) -> None:
    """Do something before every round, given its number: 1 is the first, which takes no private steps."""
    train_round, rounds = trainer.train_round, [0]

    def round_by_round(state: SharedState) -> RoundUpdate:
        rounds[0] += 1
        before(rounds[0])
        return train_round(state)

    patch(trainer, train_round=round_by_round)


def _seed_per_round(trainer: LocalTrainer) -> None:
    """As if a node kept a key, so that a round could be done again after a crash."""
    key = trainer._noise.uniform(4).tobytes()

    def reseed(_: int) -> None:
        trainer._optimizer._noise = NoiseSource(key)

    _each_round(trainer, reseed)


def _noise_schedule(trainer: LocalTrainer) -> None:
    """As Opacus' `ExponentialNoise` does, where the ledger books the multiplier that was agreed."""
    optimizer, agreed = trainer._optimizer, trainer._optimizer.noise_multiplier

    def decay(number: int) -> None:
        optimizer.noise_multiplier = agreed * DECAY ** max(0, number - 2)

    _each_round(trainer, decay)


def _mixed_noise(mix: Callable[[NoiseSource, int], torch.Tensor]) -> Callable[[LocalTrainer], None]:
    """Noise on all parameters at once, of so many values and scale 1, given a source."""

    def into(trainer: LocalTrainer) -> None:
        optimizer, source = trainer._optimizer, trainer._optimizer._noise

        def add_noise() -> None:
            std, summed = optimizer.noise_multiplier * optimizer.max_grad_norm, optimizer.vector.summed_grad
            optimizer.vector.grad = (summed.double() + mix(source, len(summed)) * std).to(summed.dtype)

        patch(optimizer, add_noise=add_noise)

    return into


def _of_half_the_dimensions(source: NoiseSource, size: int) -> torch.Tensor:
    """Blocks a, b, (a + b) / sqrt 2, (a - b) / sqrt 2: each value is as noisy as agreed."""
    a, b = source.gaussian((2, -(-size // 4)), 1.0)
    return torch.cat([a, b, (a + b) / math.sqrt(2.0), (a - b) / math.sqrt(2.0)])[:size]


def _centred(source: NoiseSource, size: int) -> torch.Tensor:
    """Noise minus its mean: the sum of all entries has none."""
    drawn = source.gaussian((size,), 1.0)
    return drawn - drawn.mean()


# --- clipping


def _clip(
    factors: Callable[[LocalTrainer, torch.Tensor], list[torch.Tensor]],
) -> Callable[[LocalTrainer], None]:
    """Clip by factors [units] for each parameter, from the norms [units, parameters] of the units' gradients."""

    def into(trainer: LocalTrainer) -> None:
        optimizer = trainer._optimizer

        def clip_and_accumulate() -> None:
            vector, rows = optimizer.vector, [part.flatten(1) for part in optimizer.split(optimizer.vector.grad_sample)]
            norms = torch.stack([part.norm(dim=1) for part in rows], dim=1)
            summed = torch.cat([factor @ part for factor, part in zip(factors(trainer, norms), rows, strict=True)])
            vector.summed_grad = summed if vector.summed_grad is None else vector.summed_grad + summed

        patch(optimizer, clip_and_accumulate=clip_and_accumulate)

    return into


def _no_clip(trainer: LocalTrainer, norms: torch.Tensor) -> list[torch.Tensor]:
    return [torch.ones(len(norms))] * norms.shape[1]


def _clip_each_parameter(trainer: LocalTrainer, norms: torch.Tensor) -> list[torch.Tensor]:
    return [(trainer._optimizer.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms.T]


def _clip_all_but_the_head(trainer: LocalTrainer, norms: torch.Tensor) -> list[torch.Tensor]:
    head = {id(p) for p in trainer.model.head.parameters()}
    outside = torch.tensor([id(p) in head for p in trainer._optimizer.parameters])
    factor = (trainer._optimizer.max_grad_norm / (norms[:, ~outside].norm(dim=1) + 1e-6)).clamp(max=1.0)
    return [torch.ones(len(norms)) if out else factor for out in outside]


def _head_unclipped_later(trainer: LocalTrainer) -> None:
    """From the third round on, the head is left out of clipping."""

    def unclip(number: int) -> None:
        if number == 3:
            _clip(_clip_all_but_the_head)(trainer)

    _each_round(trainer, unclip)


def _class_weights(trainer: LocalTrainer) -> None:
    """The loss is weighted by how many records of each class the hospital has, which is private."""
    private_gradient = trainer._private_gradient
    counts = torch.bincount(trainer._labels, minlength=trainer._agreement.study.classes).clamp(min=1).float()
    weights = counts.sum() / (len(counts) * counts)

    def weighted(chosen: NDArray[np.bool_]) -> None:
        functional = torch.nn.functional
        kept = functional.cross_entropy
        functional.cross_entropy = partial(kept, weight=weights)
        try:
            private_gradient(chosen)
        finally:
            functional.cross_entropy = kept

    patch(trainer, _private_gradient=weighted)


def _adaptive_clip(trainer: LocalTrainer) -> None:
    """The clip norm follows the share of units that are clipped, which is private, and the noise follows the clip norm."""
    optimizer, norm = trainer._optimizer, [trainer._optimizer.max_grad_norm]

    def factors(_: LocalTrainer, norms: torch.Tensor) -> list[torch.Tensor]:
        lengths = norms.norm(dim=1)
        clipped = float((lengths > optimizer.max_grad_norm).float().mean()) if len(lengths) else 0.0
        norm[0] = optimizer.max_grad_norm * (1.0 - 0.4 * clipped)
        return [(norm[0] / (lengths + 1e-6)).clamp(max=1.0)] * norms.shape[1]

    _clip(factors)(trainer)
    _scaled_noise(lambda _: norm[0] / optimizer.max_grad_norm)(trainer)


def _not_finite(trainer: LocalTrainer) -> None:
    """Gradients that are not finite go into the sum as they are."""
    private_gradient = trainer._private_gradient

    def unguarded(chosen: NDArray[np.bool_]) -> None:
        kept, torch.nan_to_num_ = torch.nan_to_num_, lambda tensor, **_: tensor
        try:
            private_gradient(chosen)
        finally:
            torch.nan_to_num_ = kept

    patch(trainer, _private_gradient=unguarded)


def _clip_after_sum(trainer: LocalTrainer) -> None:
    """Each unit whole, and the sum cut to the norm that it would have at most; so one unit can turn it around."""
    optimizer = trainer._optimizer

    def clip_and_accumulate() -> None:
        vector, total = optimizer.vector, optimizer.vector.grad_sample.sum(dim=0)
        most = optimizer.max_grad_norm * trainer._member.expected_batch_size
        total = total * min(1.0, float(most / (total.norm() + 1e-6)))
        vector.summed_grad = total if vector.summed_grad is None else vector.summed_grad + total

    patch(optimizer, clip_and_accumulate=clip_and_accumulate)


def _clip_records_of_patients(trainer: LocalTrainer) -> None:
    """Patients are sampled, but each of their records is clipped for itself."""
    private_gradient = trainer._private_gradient

    def by_record(chosen: NDArray[np.bool_]) -> None:
        units = trainer._units
        records = [record.reshape(1) for unit in np.flatnonzero(chosen) for record in units[unit]]
        trainer._units = records
        try:
            private_gradient(np.ones(len(records), np.bool_))
        finally:
            trainer._units = units

    patch(trainer, _private_gradient=by_record)


def _only_the_last_piece(trainer: LocalTrainer) -> None:
    """Of a large batch only the last piece is clipped: the others are added up as they are."""
    optimizer, clip = trainer._optimizer, trainer._optimizer.clip_and_accumulate
    private_gradient = trainer._private_gradient
    inside = [False]

    def watched(chosen: NDArray[np.bool_]) -> None:
        inside[0] = True
        try:
            private_gradient(chosen)
        finally:
            inside[0] = False

    def clip_and_accumulate() -> None:
        kept = optimizer.max_grad_norm
        optimizer.max_grad_norm = 1e30 if inside[0] else kept
        clip()
        optimizer.max_grad_norm = kept

    patch(trainer, _private_gradient=watched)
    patch(optimizer, clip_and_accumulate=clip_and_accumulate)


# --- sampling and counting


class _Sampler:
    """The trainer's noise source with another way to sample."""

    def __init__(self, mask: Callable[[int, float], NDArray[np.bool_]]) -> None:
        self.poisson_mask = mask


def _sampled(
    make: Callable[[NoiseSource], Callable[[int, float], NDArray[np.bool_]]],
) -> Callable[[LocalTrainer], None]:
    def into(trainer: LocalTrainer) -> None:
        trainer._noise = _Sampler(make(trainer._noise))  # type: ignore[assignment]

    return into


def _shuffled(noise: NoiseSource) -> Callable[[int, float], NDArray[np.bool_]]:
    waiting: list[int] = []

    def mask(count: int, sample_rate: float) -> NDArray[np.bool_]:
        size = max(1, round(count * sample_rate))
        if len(waiting) < size:
            waiting[:] = np.argsort(noise.uniform(count)).tolist()
        chosen = np.zeros(count, np.bool_)
        chosen[[waiting.pop() for _ in range(size)]] = True
        return chosen

    return mask


def _fixed_size(noise: NoiseSource) -> Callable[[int, float], NDArray[np.bool_]]:
    def mask(count: int, sample_rate: float) -> NDArray[np.bool_]:
        chosen = np.zeros(count, np.bool_)
        chosen[np.argsort(noise.uniform(count))[: max(1, round(count * sample_rate))]] = True
        return chosen

    return mask


def _twice_as_often(noise: NoiseSource) -> Callable[[int, float], NDArray[np.bool_]]:
    return lambda count, sample_rate: noise.poisson_mask(count, min(1.0, 2.0 * sample_rate))


def _samples_again(noise: NoiseSource) -> Callable[[int, float], NDArray[np.bool_]]:
    """Every sample comes back two steps later."""
    drawn: list[NDArray[np.bool_]] = []

    def mask(count: int, sample_rate: float) -> NDArray[np.bool_]:
        drawn.append(drawn[-2] if len(drawn) % 4 > 1 else noise.poisson_mask(count, sample_rate))
        return drawn[-1]

    return mask


def _samples_per_round(trainer: LocalTrainer) -> None:
    """Every round has the samples of the one before."""
    key = trainer._noise.uniform(4).tobytes()

    def reseed(_: int) -> None:
        trainer._noise = NoiseSource(key)

    _each_round(trainer, reseed)


def _records_for_patients(trainer: LocalTrainer) -> None:
    """The agreement protects patients; records are sampled and clipped."""
    trainer._units = [record.reshape(1) for unit in trainer._units for record in unit]


def _unaccounted_steps(trainer: LocalTrainer) -> None:
    """Every step is taken twice, and booked once."""
    step, optimizer = trainer.step, trainer._optimizer

    def twice() -> None:
        step()
        hook, optimizer.step_hook = optimizer.step_hook, None
        try:
            step()
        finally:
            optimizer.step_hook = hook
            trainer._optimizer_steps -= 1

    patch(trainer, step=twice)


def _more_steps_later(trainer: LocalTrainer) -> None:
    """From the third round on, one more step that nobody books."""
    train_round, optimizer, rounds = trainer.train_round, trainer._optimizer, [0]

    def longer(state: SharedState) -> RoundUpdate:
        rounds[0] += 1
        if rounds[0] >= 3:
            hook, optimizer.step_hook = optimizer.step_hook, None
            trainer.step()
            trainer._optimizer_steps -= 1
            optimizer.step_hook = hook
        return train_round(state)

    patch(trainer, train_round=longer)


# --- what leaves the node


def _weights_of_raw_gradients(trainer: LocalTrainer) -> None:
    """The precision weight is taken from the variance of the records' own gradients, as the update's estimated precision."""
    private_gradient, train_round = trainer._private_gradient, trainer.train_round
    spread: list[float] = [1.0]

    def seen(chosen: NDArray[np.bool_]) -> None:
        private_gradient(chosen)
        rows = trainer._optimizer.split(trainer._optimizer.vector.grad_sample)
        if len(rows[0]) > 1:
            spread.append(float(torch.stack([row.var(dim=0).mean() for row in rows]).mean()))

    def weighted(state: SharedState) -> RoundUpdate:
        update = train_round(state)
        clamp = trainer._agreement.precision.clamp
        weight = float(np.clip(1.0 / (1.0 + spread[-1]), 1.0 / clamp, clamp))
        return replace(update, weights=dict.fromkeys(update.weights, weight))

    patch(trainer, _private_gradient=seen, train_round=weighted)


def _raw_steps_later(trainer: LocalTrainer) -> None:
    """From the third round on, what stays at the hospital is tuned on all records, with neither clipping nor noise."""
    train_round, rounds = trainer.train_round, [0]

    def tuned(state: SharedState) -> RoundUpdate:
        update = train_round(state)
        rounds[0] += 1
        if rounds[0] >= 3:
            loss = torch.nn.functional.cross_entropy(trainer.model(trainer._features), trainer._labels)
            parameters = list(trainer.model.local_parameters())
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.data -= 0.5 * gradient
        return update

    patch(trainer, train_round=tuned)


def _true_batch_size(trainer: LocalTrainer) -> None:
    """The sum is divided by the true number of units times the rate, which is private."""
    trainer._optimizer.expected_batch_size = len(trainer._units) * trainer._agreement.privacy.sample_rate


def _private_standardisation(trainer: LocalTrainer) -> None:
    """Features are standardised with the records' own mean and deviation."""
    features = trainer._features
    trainer._features = (features - features.mean(dim=0)) / (features.std(dim=0, correction=0) + 1e-6)


PLANTS = {
    plant.name: plant
    for plant in (
        Plant("no-noise", "no noise is added", _scaled_noise(lambda _: 0.0)),
        Plant("half-noise", "the noise has half the agreed standard deviation", _scaled_noise(lambda _: 0.5)),
        Plant("noise-per-microbatch", "the noise is shared out among microbatches", _scaled_noise(_microbatches)),
        Plant("fixed-seed", "noise and sampling come from a fixed seed", _fixed_seed),
        Plant("reused-seed", "the noise generator is seeded anew, with the same seed, before every step", _reused_seed),
        Plant("magnitudes-without-noise", "the magnitudes m of DoRA get no noise", _unnoised_magnitudes),
        Plant("noise-shared-by-shape", "parameters of one shape get the same noise", _shared_by_shape),
        Plant("noise-again", "the noise of every step comes back three steps later", _every_third_again),
        Plant("half-precision-noise", "noise is rounded to 16 bits", _half_precision),
        Plant("weaker-noise-later", "after a dozen steps the noise has four fifths of its scale", _weaker_later),
        Plant("pool-of-seeds", "sixteen seeds of the noise generator take turns", _pool_of_seeds),
        Plant(
            "seed-per-round", "the noise generator is seeded anew, with the same seed, in every round", _seed_per_round
        ),
        Plant("noise-scheduler", "the noise becomes a twentieth less in every round", _noise_schedule),
        Plant("lowrank-noise", "noise has half as many dimensions as values", _mixed_noise(_of_half_the_dimensions)),
        Plant("centred-noise", "the mean over all parameters is taken from the noise", _mixed_noise(_centred)),
        Plant(
            "noise-without-records-only",
            "magnitudes and head get noise only when nobody was sampled",
            _unnoised_where_it_matters,
        ),
        Plant(
            "local-parameters-without-noise",
            "head, tokeniser and magnitudes see the sum before its noise",
            _local_without_noise,
        ),
        Plant("clip-off", "gradients are not clipped", _clip(_no_clip)),
        Plant("clip-after-sum", "the sum of gradients is clipped, not each of them", _clip_after_sum),
        Plant(
            "adaptive-clip", "clip norm and noise follow the private share of units that are clipped", _adaptive_clip
        ),
        Plant("not-finite", "gradients that are not finite go into the sum", _not_finite),
        Plant("clip-each-parameter", "every parameter is clipped to the norm of all", _clip(_clip_each_parameter)),
        Plant("head-outside-clipping", "the task head is left out of clipping", _clip(_clip_all_but_the_head)),
        Plant(
            "head-unclipped-later", "from the third round on the head is left out of clipping", _head_unclipped_later
        ),
        Plant("class-weights", "the loss is weighted by the private counts of classes", _class_weights),
        Plant("clip-each-record", "records of a patient are clipped one by one", _clip_records_of_patients, True),
        Plant("clip-last-piece-only", "of a large batch only the last piece is clipped", _only_the_last_piece),
        Plant(
            "records-for-patients",
            "records are sampled and clipped where patients are agreed",
            _records_for_patients,
            True,
        ),
        Plant("samples-again", "samples come back two steps later", _sampled(_samples_again)),
        Plant("samples-per-round", "every round has the samples of the one before", _samples_per_round),
        Plant(
            "shuffled-batches", "shuffled batches of fixed size are accounted as Poisson samples", _sampled(_shuffled)
        ),
        Plant("fixed-size", "every sample is drawn anew, of a fixed size", _sampled(_fixed_size)),
        Plant("twice-the-sample-rate", "units are sampled twice as often as agreed", _sampled(_twice_as_often)),
        Plant("unaccounted-steps", "every second step is not booked", _unaccounted_steps),
        Plant("more-steps-later", "from the third round on there is a step that is not booked", _more_steps_later),
        Plant(
            "raw-steps-later",
            "from the third round on local parameters are tuned on all records without privacy",
            _raw_steps_later,
        ),
        Plant("true-batch-size", "the sum is divided by the private batch size", _true_batch_size),
        Plant(
            "private-standardisation",
            "features are standardised with the records' own deviation",
            _private_standardisation,
        ),
        Plant("weights-of-raw-gradients", "precision weights are taken from raw gradients", _weights_of_raw_gradients),
    )
}
"""The catalogue, by name."""
