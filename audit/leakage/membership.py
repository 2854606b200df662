"""Membership inference by likelihood ratios, on everything that is seen of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from audit.leakage.evidence import MOMENTUM, Flips, Membership, Observation, Protection, Values
from audit.leakage.first_order import Effects, Whitebox, effects_of
from audit.leakage.scene import Scene, join_records, protected_as, take_records, update_vector
from audit.leakage.sent import Uploads
from audit.target import Target
from protocols.encoding import FixedPoint
from secgeo.hospital_noise import private_values
from secgeo.update import apply_sum, noise_variance, precision_weight
from secgeo.update import unpack as unpack_vector


def infer_membership(scene: Scene, protection: Protection, report: Callable[[float], None]) -> list[Membership]:
    """Train again and again with other candidates, and score all candidates in all trainings."""
    target, size, count = protected_as(scene.target, protection), scene.size, scene.size.trainings[protection]
    flips = scene.chance.random((count, len(scene.candidates))) < 0.5
    pool = [_other_hospital(scene, target) for _ in range(max(size.pool, scene.members - 1))]
    uploads = Uploads(target.agreement, target.member.node_id)
    trainings = []
    for number in range(count):
        report(number / count)
        trainings.append(_train(scene, target, flips[number], pool, uploads))
    whitebox = Whitebox(target)
    effects = effects_of(scene, target, whitebox, flips[0], np.mean(pool, axis=0) * (scene.members - 1))
    rows = []
    for seen, observation, of in WHAT_IS_SEEN[protection]:
        model = _linear_model(scene, target, whitebox, effects, observation)
        scores = _likelihood_ratios(np.array([getattr(training, seen) for training in trainings]), model)
        steps = target.agreement.training.steps_per_round * (scene.rounds if observation == "adapter" else 1)
        for candidates, part in scene.parts.items():
            inside, outside = scores[:, part][flips[:, part]], scores[:, part][~flips[:, part]]
            rows.append(Membership(observation, of, candidates, steps, inside.tolist(), outside.tolist()))
    return rows


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one training shows. Changes of B ([D]) are divided by the weights, which are public."""

    update: Values
    encoded: Values
    masked: Values
    aggregate: Values
    adapter: Values
    gram: Values


WHAT_IS_SEEN: dict[Protection, tuple[tuple[str, Observation, Protection], ...]] = {
    "unprotected": (
        ("update", "update", "unprotected"),
        ("encoded", "upload", "unprotected"),
        ("masked", "upload", "ours"),
        ("aggregate", "aggregate", "unprotected"),
        ("adapter", "adapter", "unprotected"),
        ("gram", "gram", "unprotected"),
    ),
    "ours": (
        ("update", "update", "ours"),
        ("aggregate", "aggregate", "ours"),
        ("adapter", "adapter", "ours"),
        ("gram", "gram", "ours"),
    ),
}
"""By the protection of training: a field of `_Seen`, and the observation and protection that it stands for."""


def _other_hospital(scene: Scene, target: Target) -> Values:
    """What another hospital adds to the sum: a real update from the start, on a random half of the others' records."""
    half = scene.chance.permutation(len(scene.strangers))[: max(1, len(scene.strangers) // 2)]
    trainer = scene.trainer(target, take_records(scene.strangers, half))
    return update_vector(target, scene.layout, trainer.train_round(scene.start.state))


def _train(scene: Scene, target: Target, flips: Flips, pool: list[Values], uploads: Uploads) -> _Seen:
    """One training over all rounds."""
    agreement, layout = target.agreement, scene.layout
    private, code = private_values(layout), FixedPoint.from_agreement(agreement)
    trainer = scene.trainer(target, join_records(scene.base, take_records(scene.candidates, np.flatnonzero(flips))))
    state, vectors, grams, steps = scene.start.state, [], [], []
    for _ in range(scene.rounds):
        update = trainer.train_round(state)
        vectors.append(update_vector(target, layout, update))
        grams.append(update.gram[np.triu_indices(layout.anchors)])
        chosen = scene.chance.choice(len(pool), scene.members - 1, replace=False)
        encoded = [code.encode(values) for values in (vectors[-1], *(pool[index] for index in chosen))]
        total = code.decode(np.sum(encoded, axis=0, dtype=np.uint32), len(encoded))
        parts, ridge = unpack_vector(layout, total), agreement.precision.ridge
        changes = [part.ravel() / (ridge + parts.weights[name]) for name, part in parts.weighted_delta_b.items()]
        steps.append(np.concatenate(changes))
        state = apply_sum(state, layout, total, agreement)
    weight = precision_weight(agreement, target.member)
    return _Seen(
        update=vectors[0][private] / weight,
        encoded=uploads.seen(vectors[0], protected=False)[private] / weight,
        masked=uploads.seen(vectors[0])[private] / weight,
        aggregate=steps[0],
        adapter=np.sum(steps, axis=0),
        gram=grams[0],
    )


@dataclass(frozen=True, slots=True)
class _Linear:
    """What is seen is, but for its mean, flips @ signatures + columns @ N(0, I) + N(0, noise I).

    Attributes:
        signatures: [candidates, D].
        columns: [K, D]. The candidates' own flips are among them.
        noise: a variance.
    """

    signatures: Values
    columns: Values
    noise: float


DRIFT = 0.03
"""Of the variance, what first order and Gaussian samples leave out."""

COLUMNS = 1500
"""Above, the steps of a record are taken together."""


def _linear_model(
    scene: Scene, target: Target, whitebox: Whitebox, effects: Effects, observation: Observation
) -> _Linear:
    agreement, own = target.agreement, len(scene.base) + len(scene.candidates)
    rate, coins = agreement.privacy.sample_rate, slice(len(scene.base), own)
    presence = np.ones(own)
    presence[coins] = 0.5
    if observation == "gram":
        return _linear_gram(scene, target, whitebox, effects, presence)
    rounds = effects.shared if observation == "adapter" else effects.shared[:1]
    per_step = np.concatenate(rounds)
    expected = rate * per_step.sum(axis=0)
    columns = [_sampling(per_step[:, :own], presence, rate), 0.5 * expected[coins]]
    noise, scale = len(rounds) * noise_level(target), 1.0
    if observation in ("aggregate", "adapter"):
        weight, others = precision_weight(agreement, target.member), scene.members - 1
        scale = weight / (agreement.precision.ridge + scene.members * weight)
        halves = np.full(len(scene.strangers), 0.5)
        columns += [
            math.sqrt(others) * _sampling(per_step[:, own:], halves, rate),
            math.sqrt(others) * 0.5 * expected[own:],
        ]
        noise *= scene.members
    return _Linear(scale * expected[coins], scale * np.concatenate(columns), scale**2 * noise)


def _sampling(per_step: Values, presence: Values, rate: float) -> Values:
    """What Poisson sampling adds to the variance, as columns: [steps, records, D] to [K, D]."""
    steps, records, size = per_step.shape
    spread = np.sqrt(rate * (1.0 - rate) * presence)[:, None]
    if steps * records <= COLUMNS:
        whole: Values = (spread * per_step).reshape(-1, size)
        return whole
    together: Values = spread * per_step.sum(axis=0) / math.sqrt(steps)
    return together


def noise_level(target: Target) -> float:
    """The variance of the noise on each value of one update's dB."""
    agreement, share = target.agreement, target.agreement.noise_share
    shared = (share.std / precision_weight(agreement, target.member)) ** 2 if share else 0.0
    return noise_variance(agreement, target.member) + shared


def _linear_gram(scene: Scene, target: Target, whitebox: Whitebox, effects: Effects, presence: Values) -> _Linear:
    agreement, steps, end = target.agreement, target.agreement.training.steps_per_round, effects.end
    privacy, training = agreement.privacy, agreement.training
    here = whitebox.gram(end)

    def change(direction: Values) -> Values:
        moved: Values = whitebox.gram(end + torch.from_numpy(direction)) - here
        return moved

    own = np.array([change(effect) for effect in effects.total])
    coins = slice(len(scene.base), len(presence))
    spread = np.sqrt(presence * (1.0 - privacy.sample_rate) / (privacy.sample_rate * steps))
    columns = [spread[:, None] * own, 0.5 * own[coins]]
    std = privacy.noise_multiplier * privacy.max_grad_norm / target.member.expected_batch_size
    if std > 0.0:
        echoes = (1.0 - MOMENTUM ** np.arange(1, steps + 1)) / (1.0 - MOMENTUM)
        scales = np.full(len(end), training.local_learning_rate * std * float(np.linalg.norm(echoes)))
        scales[: whitebox.shared] = training.learning_rate * std * math.sqrt(steps)
        drawn = scene.chance.normal(size=(scene.size.noise_samples, len(end))) * scales
        columns.append(np.array([change(noise) for noise in drawn]) / math.sqrt(len(drawn)))
    return _Linear(own[coins], np.concatenate(columns), 0.0)


def _likelihood_ratios(seen: Values, model: _Linear) -> Values:
    """Scores [trainings, candidates] of what was seen [trainings, D]; the mean is that of the other trainings."""
    count, size = seen.shape
    centred = (seen - seen.mean(axis=0)) * (count / (count - 1))
    columns, signatures = model.columns, model.signatures
    # There may be less noise than was agreed; the attacker looks.
    noise = min(model.noise, float(centred.var())) + DRIFT * float(np.square(columns).sum()) / size + 1e-300
    if size <= len(columns):
        weights = np.linalg.solve(columns.T @ columns + noise * np.eye(size), signatures.T)
    else:  # Woodbury
        inner = columns @ columns.T + noise * np.eye(len(columns))
        weights = (signatures.T - columns.T @ np.linalg.solve(inner, columns @ signatures.T)) / noise
    # A candidate's own flip is among the columns; Sherman-Morrison takes it out again.
    own = np.einsum("cd,dc->c", signatures, weights)
    scores: Values = centred @ weights / np.maximum(1.0 - own / 4.0, 1e-9)
    return scores
