"""Calibration: from a budget (epsilon, delta, patients, rounds, batch) to the noise that keeps it, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from audit.accountants import Epsilons, epsilons, opacus_rdp
from audit.budget import Steps
from keys.errors import ConfigError, KeyFileError
from keys.files import write_public
from protocols.agreement import NOISE_RANGE, Privacy
from secgeo.accountant import hospital_epsilon

NOISE_DIGITS = 4
BATCH_FACTORS = (0.25, 0.5, 1.0, 2.0)
PLOT_ENDINGS = (".png", ".svg")
NOISE_FACTORS = (0.7, 1.0, 1.4, 2.0, 3.0)


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent, on how many units, over how many steps."""

    epsilon: float
    delta: float
    patients: int
    rounds: int
    steps_per_round: int

    @property
    def steps(self) -> int:
        """Of the whole study. The first round spends nothing, but is counted."""
        return self.rounds * self.steps_per_round


@dataclass(frozen=True, slots=True)
class Plan:
    """The noise multiplier for one batch size, and what it gives by every accountant."""

    budget: Budget
    batch: int
    noise_multiplier: float
    answer: Epsilons

    @property
    def sample_rate(self) -> float:
        """The probability that a unit is in a batch."""
        return self.batch / self.budget.patients

    @property
    def noise_per_step(self) -> float:
        """The standard deviation of the noise on the averaged gradient, in clip norms."""
        return self.noise_multiplier / self.batch

    def to_json(self) -> dict[str, object]:
        """A JSON-able form."""
        numbers = {"batch": self.batch, "sample_rate": self.sample_rate, "noise_multiplier": self.noise_multiplier}
        return {**numbers, "noise_per_step": self.noise_per_step, "steps": self.budget.steps, **self.answer.to_json()}


def calibrate(budget: Budget, batch: int) -> Plan:
    """The smallest noise multiplier (to four decimals) that keeps `budget` by Opacus' RDP accountant, as nodes enforce it.

    Raises:
        ConfigError: the batch is larger than the data, or no noise multiplier in range keeps the budget.
        VerificationFailed: no accountant has an answer to such parameters.
    """
    if batch > budget.patients:
        raise ConfigError(f"a batch of {batch} cannot be drawn from {budget.patients} patients")
    noise = noise_for(budget, batch / budget.patients)
    return Plan(budget, batch, noise, epsilons([Steps(batch / budget.patients, noise, budget.steps)], budget.delta))


def noise_for(budget: Budget, sample_rate: float) -> float:
    """See `calibrate`."""

    from scipy.optimize import brentq

    @cache
    def spent(units: int) -> float:
        return opacus_rdp([Steps(sample_rate, units / 10**NOISE_DIGITS, budget.steps)], budget.delta)[0]

    least, most = (round(bound * 10**NOISE_DIGITS) for bound in NOISE_RANGE)
    high = least
    while spent(high) > budget.epsilon:
        if high == most:
            raise ConfigError(
                f"no noise keeps epsilon {budget.epsilon:g} at delta {budget.delta:g} by RDP; a larger epsilon or delta would"
            )
        high = min(2 * high, most)
    units = high
    if high > least:
        units = round(brentq(lambda noise: spent(round(noise)) - budget.epsilon, max(high // 2, least), high, xtol=0.5))
    while spent(units) > budget.epsilon:
        units += 1
    while units > least and spent(units - 1) <= budget.epsilon:
        units -= 1
    return float(units / 10**NOISE_DIGITS)


@dataclass(frozen=True, slots=True)
class HospitalPlan:
    """Noise inside the sums for a budget of the whole hospital, counted for `contributors` shares.

    Attributes:
        noise_multiplier: standard deviation of the noise of a sum, in max_update_norm.
        epsilon: what the study then spends, as nodes enforce it.
        share: standard deviation of one hospital's share, in max_update_norm.
    """

    noise_multiplier: float
    epsilon: float
    share: float


def plan_hospital(epsilon: float, delta: float, rounds: int, contributors: int) -> HospitalPlan:
    """The smallest noise multiplier (to four decimals) that keeps all noised rounds of a study within `epsilon`.

    Raises:
        ConfigError: no noise multiplier in range does.
    """
    from scipy.optimize import brentq

    def spent(noise: float) -> float:
        return hospital_epsilon((rounds - 1) / (2.0 * noise**2), delta)  # the first round's sum is public

    low, high = 0.01, 1e5
    if spent(high) > epsilon:
        raise ConfigError(
            f"no noise keeps epsilon {epsilon:g} at delta {delta:g} over {rounds} rounds; allow more, or fewer rounds"
        )
    exact = low if spent(low) <= epsilon else brentq(lambda noise: spent(noise) - epsilon, low, high, xtol=1e-9)
    noise = math.ceil(exact * 10**NOISE_DIGITS) / 10**NOISE_DIGITS
    return HospitalPlan(noise, spent(noise), noise / math.sqrt(contributors))


def trade_offs(plan: Plan) -> list[Plan]:
    """This plan, and such for a quarter of its batch to twice it, as far as there are patients and a noise that keeps the budget."""
    plans = []
    for size in sorted({max(1, round(plan.batch * factor)) for factor in BATCH_FACTORS}):
        with suppress(ConfigError):
            plans.append(plan if size == plan.batch else calibrate(plan.budget, size))
    return plans


def write_spec(spec: Mapping[str, Any], plan: Plan, path: Path) -> dict[str, float]:
    """Write a study's parameters with the planned ones in them. Comments of the original are lost.

    Members keep the number of patients that their `expected_batch_size` stood for, at the sample rate that it stood with. Returns these
    numbers by the members' ids.

    Raises:
        ConfigError: `path` exists or cannot be written, the spec has no [privacy], [training] or [study], the members' batches are at no
            sample rate, or no agreement may have such privacy.
    """
    import tomli_w

    changed = msgspec.to_builtins(dict(spec))
    if path.exists():
        raise ConfigError(f"{path} exists already; name a new file")
    missing = [section for section in ("study", "privacy", "training") if not isinstance(changed.get(section), dict)]
    if missing:
        raise ConfigError(f"the study's parameters have no [{missing[0]}]")
    patients = _scale_batches(changed.get("members", []), changed["privacy"].get("sample_rate"), plan.sample_rate)
    changed["study"]["rounds"] = plan.budget.rounds
    changed["training"]["steps_per_round"] = plan.budget.steps_per_round
    changed["privacy"] |= {
        "sample_rate": plan.sample_rate,
        "noise_multiplier": plan.noise_multiplier,
        "delta": plan.budget.delta,
        "epsilon_budget": plan.budget.epsilon,
    }
    try:
        msgspec.convert(changed["privacy"], Privacy)
    except msgspec.ValidationError as error:
        raise ConfigError(f"no agreement may have this [privacy]: {error}") from None
    try:
        write_public(path, tomli_w.dumps(changed).encode())
    except KeyFileError as error:
        raise ConfigError(str(error)) from None
    return patients


def _scale_batches(members: Any, before: Any, after: float) -> dict[str, float]:
    """Set what members expect at the sample rate `after`, of the patients that they expected at `before`; how many these are."""
    patients = {}
    for member in members if isinstance(members, list) else [members]:
        size = member.get("expected_batch_size") if isinstance(member, dict) else None
        if not isinstance(size, float | int):
            raise ConfigError("the study's [[members]] each need a number as expected_batch_size")
        if not isinstance(before, float | int) or before <= 0.0:
            raise ConfigError(
                "the study's [privacy] has no sample_rate at which its members' expected_batch_size would hold"
            )
        patients[str(member.get("node_id"))] = size / before
        member["expected_batch_size"] = round(size * after / before, 9)
    return patients


def check_plot(path: Path) -> None:
    """Say before the work is done that a plot cannot be written.

    Raises:
        ConfigError: another ending than .png or .svg, or no folder to write into.
    """
    if path.suffix not in PLOT_ENDINGS:
        raise ConfigError(f"a plot ends in {' or '.join(PLOT_ENDINGS)}, unlike {path}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}")


def plot_plans(path: Path, plans: Sequence[Plan], batch: int, unit: str) -> None:
    """Draw noise against epsilon for several batch sizes: the multiplier, and the noise per step that it comes to.

    Raises:
        ConfigError: it cannot be written.
    """
    import matplotlib

    budget = plans[0].budget
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    title = f"delta {budget.delta:g}, {budget.steps} steps; {budget.patients} {unit}s, add or remove one; Opacus RDP"
    figure.suptitle(title, fontsize=10)
    for plan in plans:
        noises = [max(plan.noise_multiplier * factor, NOISE_RANGE[0]) for factor in NOISE_FACTORS]
        spent = [opacus_rdp([Steps(plan.sample_rate, noise, budget.steps)], budget.delta)[0] for noise in noises]
        label = f"batch {plan.batch}" + (" (planned)" if plan.batch == batch else "")
        axes[0].plot(spent, noises, "o-", markersize=3, label=label)
        axes[1].plot(spent, [noise / plan.batch for noise in noises], "o-", markersize=3, label=label)
    for axis, name in zip(axes, ("noise multiplier", "noise on the averaged gradient (clip norms)"), strict=True):
        axis.axvline(budget.epsilon, color="gray", linewidth=0.8, linestyle="--")
        axis.set(xlabel="epsilon", ylabel=name, xscale="log", yscale="log")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        plt.close(figure)
