"""Empirical lower bounds on epsilon: canaries go into one run of the hospital's own training, and are searched for in what came out.

Every canary is one more privacy unit that a fair coin puts in or leaves out, and which the product's own sampler, clipping and noise then
treat like any other. What an attacker makes of the outcome is a score per canary; how well scores tell "in" from "out" bounds epsilon from
below (`audit.lower_bounds`). A sound trainer stays below what its ledger claims for the same steps. Dirac canaries never meet, and noise on
parameters is independent, so that each may also be taken for a run of its own: the reference, which is tighter.

    gradient space  Dirac canaries, one parameter each, and random directions: the strongest (Nasr et al. 2023, arXiv 2302.07956)
    input space     records with a wrong label, and records from outside of the distribution
    white box       the attacker sees the noised sum of every step: the likelihood ratio of "in" against "out" under the claim; for
                    records, whose gradients have much in common, the best linear estimate of all coins at once
    black box       the attacker sees what is released: the adapter's change, or the loss of the canary under the final model
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct
from numpy.typing import NDArray
from torch.nn import functional

from audit.counts import DEVIATIONS, private_sizes, refuse, unfair
from audit.findings import Finding
from audit.lower_bounds import Poisson, many_run_fdp, one_run_fdp, one_run_steinke, over_guesses
from audit.target import Target
from audit.watch import Canaries, DiracCanaries, RandomCanaries, Seen, Watch, projector_inputs
from keys.errors import VerificationFailed
from protocols.agreement import Agreement
from secgeo.accountant import epsilon_after
from secgeo.datasets import LabelledRecords
from secgeo.training import LocalTrainer
from secgeo.update import Layout, SharedState, apply_sum

Profile = Literal["fast", "full"]
Progress = Callable[[str, float], None]
Sizes = tuple[int, int]

NOTHING = "the agreement has no noise, so that epsilon is infinite, or a single round, which spends nothing"
NO_OTHERS = (
    "the configuration names no [evaluation] set, and canaries among the records are made of records that the training does not see; "
    "name one of the same kind as [data], and audit again"
)

CONFIDENCE, ALARM_CONFIDENCE = 0.95, 0.999
"""Of the bounds that are shown, and of those that accuse: they are conservative, and accuse by chance far less often."""

SHOWS_NOTHING = 0.01
"""An attack whose bounds on epsilon are all below this is too weak to be heard."""

GUESSES = (0.05, 0.25)
"""Shares of the canaries that are called "in" and, as many, "out". Fixed beforehand; the bounds pay for trying all (Bonferroni)."""

GRADIENT_CANARIES = {"fast": 2000, "full": 10_000}
MOST_RUNS = 5
"""Trainings over which canaries are spread when one model has too few parameters. Each canary has its own coin, and is in one run."""

INPUT_CANARIES = 250
CANARY_LENGTH = 10.0
"""In clip norms: clipping has something to do."""

CANARY_BYTES = 1 << 28
"""Memory for the gradients of the canaries that one step samples."""

PRIVATE_STEPS = {"fast": 120, "full": 1000}
"""A longer study is audited for so many steps, against the claim for so many."""

EVERY_STEP, ADAPTER, LOSS = (
    "white box, every step",
    "black box, released adapter",
    "black box, loss under the final model",
)
INPUT_KINDS = ("mislabelled", "out of distribution")


class Claim(Struct, frozen=True, forbid_unknown_fields=True):
    """What the ledger says of the audited steps: epsilon by Opacus RDP, add or remove one; None without noise."""

    epsilon: float | None
    delta: Annotated[float, Meta(gt=0.0, lt=1.0)]
    noise_multiplier: Annotated[float, Meta(ge=0.0, le=1e6)]
    sample_rate: Annotated[float, Meta(gt=0.0, le=1.0)]
    steps: Annotated[int, Meta(ge=0, le=1_000_000)]


class CanaryScores(Struct, frozen=True, forbid_unknown_fields=True):
    """One attack on one run: per canary whether it was in, and the attacker's score (higher: more likely in)."""

    canaries: str
    view: str
    claim: Claim
    included: tuple[bool, ...]
    scores: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Shown(Poisson):
    """DP-SGD of the claimed sample rate and steps, with any noise, to two digits."""

    @property
    def resolution(self) -> float:
        """A hundredth; every further halving is a PLD."""
        return 0.01


@dataclass(frozen=True, slots=True)
class Claimed(Poisson):
    """DP-SGD as claimed, with no other noise than that."""

    noise: float

    @property
    def noises(self) -> tuple[float, float]:
        """The claimed one."""
        return self.noise, self.noise


class TrainingEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """The attacks of one audit on one hospital's training.

    Attributes:
        member: the hospital.
        attacks: in the order in which they were made.
        parameters: how many have gradients of records, and so noise.
        units: how many records or patients it trained on, canaries aside.
        others: whether there were records that it does not train on, to make canaries of.
    """

    member: str
    attacks: tuple[CanaryScores, ...]
    parameters: int
    units: int
    others: bool


class Bounds(Struct, frozen=True, forbid_unknown_fields=True):
    """Lower bounds on epsilon of one attack.

    Attributes:
        steinke: of any mechanism, from one run.
        one_run: of DP-SGD with this sample rate and number of steps, from one run.
        many_run: the same, every canary taken for a run of its own; 0 unless canaries cannot meet (Dirac).
    """

    steinke: float
    one_run: float
    many_run: float


def collect(target: Target, *, profile: Profile = "fast", progress: Progress = lambda *_: None) -> TrainingEvidence:
    """Put canaries into the training of `target` and look for them."""
    target = replace(target, agreement=_shortened(target.agreement, profile))
    probe = target.trainer()
    size = probe._optimizer.vector.numel()
    units, length = len(probe._units), CANARY_LENGTH * target.agreement.privacy.max_grad_norm
    if not _can_be_bounded(target.agreement):
        return TrainingEvidence(target.member.node_id, (), size, units, target.others is not None)
    count, runs, few = _gradient_canaries(target.agreement, profile, size)
    progress("canaries in gradients: one parameter each", 0.0)
    attacks = _gradient_attacks(target, "Dirac", lambda: DiracCanaries(count, size, length), count, runs)
    progress("canaries among the records", 0.3)
    for kind in INPUT_KINDS:
        if target.others is not None:
            attacks += _input_attacks(target, kind, target.others, INPUT_CANARIES)
    if profile == "full":
        progress("canaries in gradients: random directions", 0.6)
        attacks += _gradient_attacks(target, "random directions", lambda: RandomCanaries(few, size, length), few)
    return TrainingEvidence(target.member.node_id, tuple(attacks), size, units, target.others is not None)


def _can_be_bounded(agreement: Agreement) -> bool:
    """Without noise epsilon is infinite, and the first round spends nothing."""
    return agreement.privacy.noise_multiplier > 0.0 and agreement.study.rounds > 1


def _gradient_canaries(agreement: Agreement, profile: Profile, size: int) -> tuple[int, int, int]:
    """How many Dirac canaries go into a training, into how many trainings, and how many random directions; of `size` parameters."""
    wanted = GRADIENT_CANARIES[profile]
    most = max(1, int(CANARY_BYTES / (4 * size * agreement.privacy.sample_rate)))
    count = min(wanted, size, 2 * most)
    return count, min(MOST_RUNS, math.ceil(wanted / count)), max(1, min(wanted, size // 10, most))


def _shortened(agreement: Agreement, profile: Profile) -> Agreement:
    steps = min(agreement.training.steps_per_round, PRIVATE_STEPS[profile])
    rounds = min(agreement.study.rounds, 1 + max(1, PRIVATE_STEPS[profile] // max(1, steps)))
    return msgspec.structs.replace(
        agreement,
        training=msgspec.structs.replace(agreement.training, steps_per_round=steps),
        study=msgspec.structs.replace(agreement.study, rounds=rounds),
    )


def _claim(target: Target, steps: int) -> Claim:
    privacy = target.agreement.privacy
    epsilon = epsilon_after(privacy, steps, privacy.delta) if privacy.noise_multiplier > 0.0 else None
    return Claim(epsilon, privacy.delta, privacy.noise_multiplier, privacy.sample_rate, steps)


def _train(target: Target, trainer: LocalTrainer) -> dict[str, NDArray[np.float64]]:
    """All rounds of the study by this hospital alone; gives what its adapter changed by, per layer."""
    agreement, layout = target.agreement, Layout.from_agreement(target.agreement)
    state, changed = SharedState.initial(agreement), dict[str, NDArray[np.float64]]()
    for _ in range(agreement.study.rounds):
        update = trainer.train_round(state)
        for name, delta in update.delta_b.items():
            changed[name] = changed.get(name, 0.0) + delta
        state = apply_sum(state, layout, update.vector(layout), agreement)
    return changed


def _ratio(target: Target, projected: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log-likelihood ratio of "in" against "out" of one step, from how much of each canary is in its sum, in clip norms."""
    privacy = target.agreement.privacy
    exponent = (2.0 * projected - 1.0) / (2.0 * privacy.noise_multiplier**2)
    left_out = np.log1p(-min(privacy.sample_rate, 1.0 - 1e-12))
    ratio: NDArray[np.float64] = np.logaddexp(left_out, np.log(privacy.sample_rate) + exponent)
    return ratio


# --- canaries in gradient space


def _gradient_attacks(
    target: Target, kind: str, make: Callable[[], Canaries], count: int, runs: int = 1
) -> list[CanaryScores]:
    """`runs` trainings with `count` canaries each, all counted together."""
    started, clip = time.monotonic(), target.agreement.privacy.max_grad_norm
    coins, white, black_coins, black = [], [], [], []
    for _ in range(runs):
        canaries, included, scores = make(), _coins(count), np.zeros(count)
        trainer = target.trainer()

        def observe(seen: Seen, canaries: Canaries = canaries, scores: NDArray[np.float64] = scores) -> None:
            scores += _ratio(target, canaries.project(seen.noised) / clip)

        Watch(trainer, observe, canaries=canaries, included=included)
        released, shared = _released(trainer, _train(target, trainer))
        coins.append(included)
        white.append(scores)
        if isinstance(canaries, DiracCanaries):
            there = shared[canaries.places]
            black_coins.append(included[there])
            black.append(canaries.project(-released)[there])
    claim, seconds = _claim(target, trainer.steps_taken), round(time.monotonic() - started, 2)
    attacks = [_attack(kind, EVERY_STEP, claim, np.concatenate(coins), np.concatenate(white), seconds)]
    if black:
        found = np.concatenate(black_coins), np.concatenate(black)
        attacks.append(_attack(kind, ADAPTER, claim, *found, seconds))
    return attacks


def _released(trainer: LocalTrainer, changed: dict[str, NDArray[np.float64]]) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """The adapter's change as a vector over all private parameters [d], zero where they are not released, and where they are."""
    named = {id(trainer.model.adapted[name].direction.weight): delta for name, delta in changed.items()}
    parts = [
        torch.as_tensor(named.get(id(p), np.zeros(tuple(p.shape)))).flatten() for p in trainer._optimizer.parameters
    ]
    where = [np.full(p.numel(), id(p) in named) for p in trainer._optimizer.parameters]
    return torch.cat(parts), np.concatenate(where)


def _coins(count: int) -> NDArray[np.bool_]:
    return np.random.default_rng().random(count) < 0.5


def _attack(
    canaries: str, view: str, claim: Claim, included: NDArray[np.bool_], scores: NDArray[np.float64], seconds: float
) -> CanaryScores:
    return CanaryScores(canaries, view, claim, tuple(included.tolist()), tuple(scores.tolist()), seconds)


# --- canaries among the records


def _canary_records(target: Target, kind: str, others: LabelledRecords, count: int) -> LabelledRecords:
    """Records that the model cannot know but from their own gradient; if patients matter, of one patient each."""
    random, classes = np.random.default_rng(), target.agreement.study.classes
    chosen = random.integers(0, len(others), count)
    features, labels = others.features[chosen], others.labels[chosen]
    if kind == "out of distribution":
        spread = target.records.features.std(axis=0)
        features = target.records.features.mean(axis=0) + 4.0 * spread * random.standard_normal(features.shape)
    wrong = (labels + random.integers(1, max(2, classes), count)) % classes
    patients = None if target.records.patients is None else np.array([f"canary {i:06d}" for i in range(count)])
    return LabelledRecords(features.astype(np.float32), wrong, patients)


def _with(records: LabelledRecords, more: LabelledRecords, included: NDArray[np.bool_]) -> LabelledRecords:
    patients = None
    if records.patients is not None and more.patients is not None:
        patients = np.concatenate([records.patients, more.patients[included]])
    return LabelledRecords(
        np.concatenate([records.features, more.features[included]]),
        np.concatenate([records.labels, more.labels[included]]),
        patients,
    )


def _input_attacks(target: Target, kind: str, others: LabelledRecords, count: int) -> list[CanaryScores]:
    started = time.monotonic()
    canaries, included = _canary_records(target, kind, others, count), _coins(count)
    trainer = target.trainer(records=_with(target.records, canaries, included))
    mirror = _Mirror(target, canaries)
    privacy, scores = target.agreement.privacy, np.zeros(count)

    def observe(seen: Seen) -> None:
        nonlocal scores
        scores = scores + mirror.sampled(trainer, seen.noised, privacy.noise_multiplier**2 / privacy.sample_rate)

    before = _losses(mirror.trainer, canaries)
    Watch(trainer, observe)
    _train(target, trainer)
    claim, seconds = _claim(target, trainer.steps_taken), round(time.monotonic() - started, 2)
    return [
        _attack(kind, EVERY_STEP, claim, included, scores, seconds),
        _attack(kind, LOSS, claim, included, before - _losses(trainer, canaries), seconds),
    ]


class _Mirror:
    """The same model, to ask what gradient each of some records has, and which of them were sampled.

    Gradients [n, d] are only needed by their products with each other and with what is seen, so none are copied, and that of the
    tokeniser's weight, most of a large model, is not even computed (see `projector_inputs`).
    """

    def __init__(self, target: Target, records: LabelledRecords) -> None:
        self.trainer = target.trainer(records=records, plant=None)
        self._everybody, self._clip = np.ones(len(records), np.bool_), target.agreement.privacy.max_grad_norm
        self._inputs = projector_inputs(self.trainer.model, torch.from_numpy(records.features))
        self._parameters = self.trainer._optimizer.parameters
        self._projector: Any = self.trainer.model.tokeniser.projector
        self._projector.weight.requires_grad_(False)

    def sampled(self, trainer: LocalTrainer, noised: torch.Tensor, ridge: float) -> NDArray[np.float64]:
        """The best linear estimate of who was sampled [n] when `trainer` saw `noised` [d].

        Of all at once, as their gradients have much in common.
        """
        self.trainer.model.load_state_dict(trainer.model.state_dict())
        self.trainer._optimizer.zero_grad(set_to_none=True)
        self.trainer._private_gradient(self._everybody)
        optimizer = self.trainer._optimizer
        rows_of = dict(zip(optimizer.parameters, optimizer.split(optimizer.vector.grad_sample), strict=True))
        count, at = len(self._everybody), 0
        products, found = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for p in self._parameters:
            seen = noised[at : at + p.numel()]
            at += p.numel()
            if p is self._projector.weight:
                bias, inputs = rows_of[self._projector.bias], self._inputs
                products += (bias @ bias.T) * (inputs @ inputs.T)
                found += ((bias @ seen.view_as(p)) * inputs).sum(dim=1)
            else:
                rows = rows_of[p].flatten(1)
                products += rows @ rows.T
                found += rows @ seen
        lengths = products.diagonal().sqrt().clamp(min=self._clip)  # clipping divides a gradient by this, in clip norms
        known = products / torch.outer(lengths, lengths) + ridge * torch.eye(count, dtype=torch.float64)
        estimate: NDArray[np.float64] = torch.linalg.solve(known, found / lengths / self._clip).numpy()
        return estimate


@torch.no_grad()
def _losses(trainer: LocalTrainer, records: LabelledRecords) -> NDArray[np.float64]:
    logits = trainer.model(torch.from_numpy(records.features))
    losses: NDArray[np.float64] = (
        functional.cross_entropy(logits, torch.from_numpy(records.labels), reduction="none").double().numpy()
    )
    return losses


# --- verdict


@lru_cache(maxsize=64)
def bounds(attack: CanaryScores, family: Poisson | None = None, confidence: float = CONFIDENCE) -> Bounds:
    """The best lower bounds on epsilon over `GUESSES`, each at `confidence`."""
    scores, included, count = np.array(attack.scores), np.array(attack.included), len(attack.scores)
    claim = attack.claim
    policies = [(guesses, guesses) for guesses in (max(1, round(count * share)) for share in GUESSES)]
    family = family or Shown(claim.sample_rate, claim.steps)

    def steinke(correct: int, guesses: int, canaries: int, confidence: float) -> float:
        return one_run_steinke(correct, guesses, canaries, claim.delta, confidence)

    def one_run(correct: int, guesses: int, canaries: int, confidence: float) -> float:
        return one_run_fdp(correct, guesses, canaries, claim.delta, confidence, family).epsilon

    apart = attack.canaries == "Dirac" and min(included.sum(), (~included).sum()) >= 2
    return Bounds(
        steinke=max(over_guesses(steinke, scores, included, policies, confidence)),
        one_run=max(over_guesses(one_run, scores, included, policies, confidence)),
        many_run=many_run_fdp(scores[included], scores[~included], claim.delta, confidence, family).epsilon
        if apart
        else 0.0,
    )


def refuted(attack: CanaryScores) -> bool:
    """Whether DP-SGD as claimed would give such scores with a probability of at most 1 - `ALARM_CONFIDENCE` (of each bound)."""
    claim = attack.claim
    found = bounds(attack, Claimed(claim.sample_rate, claim.steps, claim.noise_multiplier), ALARM_CONFIDENCE)
    return max(found.one_run, found.many_run) > 0.0


def judge(evidence: TrainingEvidence) -> list[Finding]:
    """What the evidence says; a pure function."""
    promise = "whoever sees every step, or the released model, learns no more than the claimed epsilon allows"
    if not evidence.attacks:
        return [
            Finding(
                "training",
                "lower bounds on epsilon",
                promise,
                "not testable",
                NOTHING,
            )
        ]
    findings = [_judge_attack(attack, promise) for attack in evidence.attacks]
    if not evidence.others:
        findings.append(Finding("training", "canaries among the records", promise, "not testable", NO_OTHERS))
    return findings


def check_whole(evidence: TrainingEvidence, agreement: Agreement, profile: Profile) -> None:
    """Check that the attacks are those that the profile calls for, each on as many canaries and steps as `collect` gives it.

    Raises:
        VerificationFailed: one is missing, or is on more or fewer, or coins or scores are none.
    """
    parameters = sum(private_sizes(agreement, evidence.member).values())
    refuse(
        f"a model of {evidence.parameters} private parameters and {evidence.units} units was trained, not one of {parameters}",
        evidence.parameters != parameters,
        evidence.units < 1,
    )
    due, short = _called_for(evidence, agreement, profile), _shortened(agreement, profile)
    steps = (short.study.rounds - 1) * short.training.steps_per_round
    if [(attack.canaries, attack.view) for attack in evidence.attacks] != list(due):
        raise VerificationFailed(f"the attacks on training are not those that the profile {profile} calls for")
    coins: dict[str, tuple[bool, ...]] = {}
    for attack in evidence.attacks:
        count, (least, most) = len(attack.scores), due[attack.canaries, attack.view]
        name, inside = f"{attack.canaries} canaries, {attack.view}", sum(attack.included)
        refuse(
            f"{name}: {count} canaries and {attack.claim.steps} steps, where the profile {profile} calls for {least} and {steps}",
            not least <= count <= most,
            count != len(attack.included),
            attack.claim.steps != steps,
        )
        first = coins.setdefault(attack.canaries, attack.included)
        refuse(
            f"{name}: {inside} of {count} coins put a canary in, which fair ones, or those of the same canaries, do not",
            unfair(inside, count),
            attack.view != ADAPTER and attack.included != first,
            inside > sum(first) or count - inside > len(first) - sum(first),
        )
        refuse(f"{name}: all scores are the same", count > 1 and len(set(attack.scores)) == 1)


def _called_for(evidence: TrainingEvidence, agreement: Agreement, profile: Profile) -> dict[tuple[str, str], Sizes]:
    """The attacks in their order, by canaries and view, and how many canaries each has at least and at most."""
    if not _can_be_bounded(agreement):
        return {}
    released = sum(rows * columns for rows, columns in (s.shape for s in Layout.from_agreement(agreement).segments))
    count, runs, few = _gradient_canaries(agreement, profile, evidence.parameters)
    seen, all_of_them = count * runs * released / evidence.parameters, count * runs
    spread = DEVIATIONS * math.sqrt(seen) if count < evidence.parameters else 0.0  # drawn by lot, if not all are taken
    shown = max(1, math.floor(seen - spread)), min(all_of_them, math.ceil(seen + spread))
    due = {("Dirac", EVERY_STEP): (all_of_them, all_of_them), ("Dirac", ADAPTER): shown}
    if evidence.others:
        due |= {(kind, view): (INPUT_CANARIES,) * 2 for kind in INPUT_KINDS for view in (EVERY_STEP, LOSS)}
    if profile == "full":
        due["random directions", EVERY_STEP] = few, few
    return due


def _judge_attack(attack: CanaryScores, promise: str) -> Finding:
    found, claim = bounds(attack), attack.claim
    claimed = math.inf if claim.epsilon is None else claim.epsilon
    apart = f", {found.many_run:.2f} (taking every canary for a run of its own)" if found.many_run else ""
    detail = (
        f"{len(attack.scores)} canaries, {claim.steps} steps: epsilon at least {found.one_run:.2f} (one run, f-DP){apart}, "
        f"{found.steinke:.2f} (one run, any mechanism); claimed {claimed:.2f} at delta {claim.delta:g}"
    )
    name = f"{attack.canaries} canaries, {attack.view}"
    if Claimed(claim.sample_rate, claim.steps, claim.noise_multiplier).curve(claim.noise_multiplier) is None:
        return Finding(
            "training", name, promise, "not testable", f"{detail}; epsilon is too large for any bound to pass it"
        )
    if refuted(attack):
        return Finding("training", name, promise, "broken", detail)
    if max(found.one_run, found.many_run, found.steinke) < SHOWS_NOTHING:
        detail += "; the attack shows nothing at all, so nothing is said of what a better one would show"
        return Finding("training", name, promise, "not testable", detail)
    if max(found.one_run, found.many_run, found.steinke) > claimed:
        detail += f"; that would happen by chance once in {1 / (1 - CONFIDENCE):.0f} audits, so run it again or with more canaries (full)"
        return Finding("training", name, promise, "not testable", detail)
    return Finding("training", name, promise, "held", detail)
