"""Gradient inversion: features and label whose clipped gradient is the one seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from audit.leakage.evidence import FEATURE_LIMIT, SUBSPACE, Inversion, Values
from audit.leakage.first_order import Whitebox
from audit.leakage.membership import DRIFT, WHAT_IS_SEEN, noise_level
from audit.leakage.scene import Scene, protected_as, take_records, update_vector, vary
from audit.leakage.sent import Uploads
from audit.target import Target
from protocols.encoding import FixedPoint
from secgeo.datasets import LabelledRecords
from secgeo.hospital_noise import private_values
from secgeo.training import RoundUpdate
from secgeo.update import apply_sum, precision_weight

ITERATIONS, SCREENING, HALVINGS = 30, 6, (2, 4)
"""Steps of a search at most; after how many only as many go on as begin with one label; and when half of those before do."""

STUCK, STILL = 1e6, 0.01
"""A search ends at this damping, or when a step gains less than this in twice the log likelihood."""

MOST_SLOPES = 2e7
"""Values of all Jacobians that are in memory together."""

TINY = 1e-30
"""Variance below every other: nothing is divided by zero where nothing is seen."""

DIFFERENCE = 1e-5
"""Of forward differences, in deviations; everything is in float64."""

DRAWN, MOST_DRAWN = 40, 400
"""Records per label, and of all labels as long as each has two, that are tried before a search begins."""

DIRECTIONS = 48
"""Of the Gram matrix: those along which records move it most."""

ROUNDING = 1e-3
"""Of the length of what is seen: what differs by less from what was searched in already is not searched in again."""

Effect = Callable[[Tensor, Tensor], Values]


@dataclass(frozen=True, slots=True)
class Clue:
    """What one step on one record shows of it.

    Attributes:
        seen: [n, D], less what the attacker knows.
        effect: what each of m records, with its label, adds to it to first order: [m, D].
        noise: the variance that was agreed, on each value.
        together: so many records, each of another hospital, are in it; their effects add up.
    """

    seen: Values
    effect: Effect
    noise: float
    together: int = 1

    def tells_as(self, other: Clue) -> bool:
        """Whether this is the other one but for rounding, so that a search in either finds what one in both would."""
        return (
            (self.effect, self.noise, self.together) == (other.effect, other.noise, other.together)
            and self.seen.shape == other.seen.shape
            and bool(np.all(_norms(self.seen - other.seen) <= ROUNDING * _norms(other.seen)))
        )


def _norms(rows: Values) -> Values:
    return np.asarray(np.linalg.norm(rows, axis=1))


def invert_all(scene: Scene) -> list[Inversion]:
    """One record, one step, no anchors' gradient (the attacker knows it): what each observation shows of the record."""
    count = min(scene.size.inverted, len(scene.base))
    records = take_records(scene.base, np.arange(count))
    prior = Prior.of(scene.target)
    truth, found = prior.standardised(records.features), []
    for protection, shown in WHAT_IS_SEEN.items():
        target = vary(
            protected_as(scene.target, protection),
            training={
                "steps_per_round": 1,
                "warmup_steps": 0,
                "alignment_weight": 0.0,
                "coordinate_weight": 0.0,
                "merge_every_rounds": 0,
                "learning_rate": scene.target.agreement.training.learning_rate,
            },
            privacy={"sample_rate": 1.0},
            batch=1.0,
        )
        clues = clues_of(scene, target, prior, records, {seen for seen, _, _ in shown})
        matched = list[tuple[Clue, tuple[Values, NDArray[np.int64]]]]()
        for seen, observation, of in shown:
            clue = clues[seen]
            match = next((match for earlier, match in matched if clue.tells_as(earlier)), None)
            guesses, labels = match or _match(scene, target, prior, clue)
            matched.append((clue, (guesses, labels)))
            similarity = np.array([_correlations(guess, truth) for guess in guesses.swapaxes(0, 1)])
            nearest = similarity.argmax(axis=0).diagonal()
            right = labels[np.arange(count), nearest] == records.labels
            found.append(Inversion(observation, of, similarity.max(axis=0).tolist(), int(np.count_nonzero(right))))
    return found


def clues_of(scene: Scene, target: Target, prior: Prior, records: LabelledRecords, wanted: set[str]) -> dict[str, Clue]:
    """What is seen, by the names of `_Seen`, of real steps from the start."""
    agreement, layout, start = target.agreement, scene.layout, scene.start.state
    private, code = private_values(layout), FixedPoint.from_agreement(agreement)
    weight, noise = precision_weight(agreement, target.member), noise_level(target)
    noise += (2.0**-code.fraction_bits / weight) ** 2 / 12.0
    everybody = agreement.precision.ridge + scene.members * weight
    whitebox, trainer = Whitebox(target), scene.trainer(target, records)
    trainer.load_shared(start)
    at = whitebox.take(trainer)

    def gradients(features: Tensor, labels: Tensor) -> Values:
        found: Values = whitebox.gradients(features, labels, shared=True).numpy()
        return -agreement.training.learning_rate * found

    def step(of: LabelledRecords) -> list[RoundUpdate]:
        return [scene.trainer(target, take_records(of, np.array([i]))).train_round(start) for i in range(len(of))]

    updates = step(records)
    ours = [update_vector(target, layout, update) for update in updates]
    drawn = scene.chance.choice(len(scene.strangers), max(len(ours), scene.members - 1))
    others = [update_vector(target, layout, update) for update in step(take_records(scene.strangers, drawn))]
    sums, released = [], []
    for index, vector in enumerate(ours):
        theirs = [others[(index + place) % len(others)] for place in range(scene.members - 1)]
        encoded = [code.encode(values) for values in (vector, *theirs)]
        total = code.decode(np.sum(encoded, axis=0, dtype=np.uint32), len(encoded))
        after = apply_sum(start, layout, total, agreement).B
        change = np.concatenate([(after[s.name] - start.B[s.name]).ravel() for s in layout.segments])
        known = np.sum([code.decode(code.encode(values), 1)[private] for values in theirs[1:]], axis=0)
        sums.append((total[private] - known) / weight)
        released.append((change * everybody - known) / weight)
    clues = {
        "update": Clue(np.array(ours)[:, private] / weight, gradients, noise),
        "aggregate": Clue(np.array(sums), gradients, 2.0 * noise, together=2),
        "adapter": Clue(np.array(released), gradients, 2.0 * noise, together=2),
        "gram": _gram_clue(scene, target, prior, whitebox, at, np.array([update.gram for update in updates])),
    }
    uploads = Uploads(agreement, target.member.node_id)
    for seen, protected in (("encoded", False), ("masked", True)):
        if seen in wanted:
            read = np.array([uploads.seen(vector, protected=protected)[private] for vector in ours])
            clues[seen] = Clue(read / weight, gradients, noise)
    return clues


def _gram_clue(scene: Scene, target: Target, prior: Prior, whitebox: Whitebox, at: Tensor, grams: Values) -> Clue:
    """Changes of the Gram matrix, along the directions in which records that the attacker draws move it."""
    training, privacy = target.agreement.training, target.agreement.privacy
    speed = np.full(len(at), training.local_learning_rate)
    speed[: whitebox.shared] = training.learning_rate
    before, triangle = whitebox.gram(at), np.triu_indices(scene.layout.anchors)

    def steps(features: Tensor, labels: Tensor) -> Values:
        found: Values = whitebox.gradients(features, labels).numpy()
        return -speed * found

    def changes(of: Values) -> Values:
        return np.array([whitebox.gram(at + torch.from_numpy(one)) - before for one in of])

    hidden, labels = prior.draw(scene.chance, target.agreement.study.classes)
    moved = changes(steps(*prior.tensors(hidden, labels)))
    _, sizes, rows = np.linalg.svd(moved, full_matrices=False)
    along = rows[: max(1, np.count_nonzero(sizes[:DIRECTIONS] > 1e-6 * sizes[0]))]  # one also where nothing moves it
    seen = (grams[:, *triangle] - before) @ along.T
    slopes = whitebox.gram_slopes(along)
    std = privacy.noise_multiplier * privacy.max_grad_norm
    noise = 0.0
    if std > 0.0:
        cloud = changes(scene.chance.normal(size=(scene.size.noise_samples, len(at))) * speed * std) @ along.T
        inner = np.atleast_2d(np.cov(cloud.T))
        inner += (DRIFT * np.trace(inner) / len(inner) + TINY) * np.eye(len(inner))
        whiten = np.linalg.inv(np.linalg.cholesky(inner))
        centred = (seen - cloud.mean(axis=0)) @ whiten.T
        # There may be less noise than was agreed; the attacker looks.
        if np.square(centred).mean() > 0.5:
            seen, along, slopes, noise = centred, whiten @ along, whiten @ slopes, 1.0

    projected = torch.from_numpy(-speed * slopes).T

    def effect(features: Tensor, labels: Tensor) -> Values:
        found: Values = whitebox.projected(features, labels, projected).numpy()
        return found

    return Clue(seen, effect, noise)


@dataclass(frozen=True, slots=True)
class Prior:
    """What the anchors tell of a record: mean and deviation of each feature, and the principal components of what is standardised."""

    shape: tuple[int, ...]
    mean: Values
    deviation: Values
    components: Values

    @classmethod
    def of(cls, target: Target) -> Prior:
        """From the target's anchors."""
        flat = target.anchors.reshape(len(target.anchors), -1).astype(np.float64)
        deviation = flat.std(axis=0)
        deviation[deviation < 1e-6] = 1.0
        standard = (flat - flat.mean(axis=0)) / deviation
        _, sizes, rows = np.linalg.svd(standard, full_matrices=False)
        kept = min(SUBSPACE, len(rows))
        lengths = np.maximum(sizes[:kept] / math.sqrt(len(flat)), 0.1)
        return cls(target.anchors.shape[1:], flat.mean(axis=0), deviation, lengths[:, None] * rows[:kept])

    def standardised(self, features: NDArray[np.floating[Any]]) -> Values:
        """[n, *shape] as [n, d] deviations from the mean, cut off as the tokeniser does."""
        flat = (features.reshape(len(features), -1) - self.mean) / self.deviation
        return np.clip(flat, -FEATURE_LIMIT, FEATURE_LIMIT)

    def features(self, hidden: Values) -> Values:
        """[n, k] coordinates, standard normal before anything is seen, as features [n, *shape]."""
        cut = np.clip(hidden @ self.components, -FEATURE_LIMIT, FEATURE_LIMIT)
        return (self.mean + cut * self.deviation).reshape(-1, *self.shape)

    def tensors(self, hidden: Values, labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Features and labels of [..., k] coordinates and [...] labels, in one row."""
        features = self.features(hidden.reshape(-1, hidden.shape[-1]))
        return torch.from_numpy(features), torch.from_numpy(labels.reshape(-1).copy())

    def draw(self, chance: np.random.Generator, classes: int) -> tuple[Values, NDArray[np.int64]]:
        """Coordinates [m, k] and labels [m] of as many records of every label; the first of each is the mean."""
        each = max(2, min(DRAWN, MOST_DRAWN // classes))
        hidden = chance.normal(size=(classes, each, len(self.components)))
        hidden[:, 0] = 0.0
        return hidden.reshape(-1, len(self.components)), np.repeat(np.arange(classes), each)


def _match(scene: Scene, target: Target, prior: Prior, clue: Clue) -> tuple[Values, NDArray[np.int64]]:
    """The most probable records (standardised, [n, together, d]) and labels [n, together] behind what is seen.

    A search begins at several places; the best of them go on (see `SCREENING`).
    """
    classes, count, together = target.agreement.study.classes, len(clue.seen), clue.together
    columns = count * together * len(prior.components)
    tries = min(scene.size.starts * classes, max(1, scene.size.columns // columns))
    power = np.square(clue.seen).mean(axis=1)
    scale = 1.0 / np.sqrt(np.minimum(clue.noise, power) + 1e-6 * power + TINY)
    groups = min(count, math.ceil(columns * tries * clue.seen.shape[1] / MOST_SLOPES))
    found = []
    for part in np.array_split(np.arange(count), groups):
        hidden, labels = _places(scene, prior, clue, clue.seen[part], classes, tries)
        kept = max(1, tries // classes)
        hidden, cost = _search(prior, clue, np.repeat(part, tries), np.repeat(scale[part], tries), hidden, labels, kept)
        best = np.arange(len(part)) * tries + cost.reshape(len(part), tries).argmin(axis=1)
        found.append((hidden[best], labels[best]))
    hidden, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    guesses = prior.standardised(prior.features(hidden.reshape(count * together, -1)))
    return guesses.reshape(count, together, -1), labels


def _places(
    scene: Scene, prior: Prior, clue: Clue, seen: Values, classes: int, tries: int
) -> tuple[Values, NDArray[np.int64]]:
    """Where searches begin, `tries` for each of `seen`: coordinates [m, together, k] and labels [m, together].

    Of drawn records those whose effects come nearest to what is seen, with all labels in turn.
    """
    hidden, labels = prior.draw(scene.chance, classes)
    effects = clue.effect(*prior.tensors(hidden, labels))
    sets = np.array(list(combinations(range(len(labels)), clue.together)))
    sizes = (effects @ effects.T)[sets[:, :, None], sets[:, None, :]].sum(axis=(1, 2))
    distances = sizes - 2.0 * (seen @ effects.T)[:, sets].sum(axis=2)
    kinds = np.sort(labels[sets], axis=1) @ classes ** np.arange(clue.together)
    chosen = []
    for distance in distances:
        order = np.lexsort((distance, kinds))
        ordered = kinds[order]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        chosen.append(order[np.lexsort((distance[order], rank))[:tries]])
    picked = sets[np.concatenate(chosen)]
    return hidden[picked], labels[picked]


def _search(
    prior: Prior,
    clue: Clue,
    owner: NDArray[np.int64],
    scale: Values,
    hidden: Values,
    labels: NDArray[np.int64],
    kept: int,
) -> tuple[Values, Values]:
    """Levenberg-Marquardt from `hidden` [m, together, k]: where it ends, and the cost [m].

    Residuals are those of `clue.seen[owner]` times `scale` [m]. After `SCREENING` steps only the `kept` best of every owner go on,
    and after each of `HALVINGS` half of those before.
    """
    count, together, size = hidden.shape
    hidden, width = hidden.copy(), together * size

    def effects(at: Values, of: NDArray[np.int64]) -> Values:
        return clue.effect(*prior.tensors(at, of)).reshape(*at.shape[:-1], -1)

    def residuals(shown: Values, at: Values, which: NDArray[np.int64]) -> Values:
        off = (shown.sum(axis=1) - clue.seen[owner[which]]) * scale[which, None]
        return np.concatenate([off, at.reshape(len(at), -1)], axis=1)

    def jacobian(which: NDArray[np.int64]) -> Values:
        moved = hidden[which][:, :, None] + DIFFERENCE * np.eye(size)
        change = effects(moved, np.repeat(labels[which][:, :, None], size, axis=2)) - shown[which][:, :, None]
        data = change.reshape(len(which), width, -1) * (scale[which] / DIFFERENCE)[:, None, None]
        return np.concatenate([data, np.tile(unit, (len(which), 1, 1))], axis=2)

    live = np.arange(count)
    shown = effects(hidden, labels)
    now = residuals(shown, hidden, live)
    damping, stale, unit = np.ones(count), np.ones(count, dtype=np.bool_), np.eye(width)
    slopes, remaining = np.empty((count, width, now.shape[1])), count // len(set(owner.tolist()))
    for iteration in range(ITERATIONS):
        if iteration in HALVINGS:
            remaining = max(kept, math.ceil(remaining / 2))
        if iteration == SCREENING:
            remaining = kept
        if iteration == SCREENING or iteration in HALVINGS:
            cost = np.square(now).sum(axis=1).reshape(len(set(owner.tolist())), -1)
            ranks = cost.argsort(axis=1).argsort(axis=1).reshape(-1)
            live = live[ranks[live] < remaining]
        if not len(live):
            break
        fresh = live[stale[live]]
        if len(fresh):
            slopes[fresh] = jacobian(fresh)
        here, at, slope = now[live], hidden[live], slopes[live]
        normal = slope @ slope.transpose(0, 2, 1)
        damped = normal + np.einsum("nkk,kl,n->nkl", normal, unit, damping[live])
        step = np.linalg.solve(damped, slope @ here[:, :, None]).reshape(at.shape)
        tried = np.clip(at - step, -FEATURE_LIMIT, FEATURE_LIMIT)
        then_shown = effects(tried, labels[live])
        then = residuals(then_shown, tried, live)
        gain = np.square(here).sum(axis=1) - np.square(then).sum(axis=1)
        better = gain > 0.0
        moving, stale[live] = live[better], better
        hidden[moving], shown[moving], now[moving] = tried[better], then_shown[better], then[better]
        damping[live] *= np.where(better, 0.25, 4.0)
        live = live[(damping[live] < STUCK) & (~better | (gain > STILL))]
    return hidden, np.square(now).sum(axis=1)


def _correlations(guesses: Values, truth: Values) -> Values:
    """[n, n] correlations over features of guess i with record j; 0 where one of them does not vary."""
    left, right = (rows - rows.mean(axis=1, keepdims=True) for rows in (guesses, truth))
    norms = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    return np.asarray((left @ right.T) / np.where(norms > 1e-12, norms, np.inf), dtype=np.float64)
