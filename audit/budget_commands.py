"""The commands of whoever plans, spends or checks a privacy budget: `secgeo budget`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keys.enrolment import ungroup_digits
from keys.errors import ConfigError, VerificationFailed
from protocols.ledger import ACCOUNTANT, HOSPITAL_RELATION
from secgeo.console import emit, show

if TYPE_CHECKING:
    from audit.accountants import Epsilons

budget_app = typer.Typer(no_args_is_help=True, help="The differential-privacy budget: plan it, compute it, verify it.")

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, for machines.")]
Delta = Annotated[float, typer.Option(help="The delta of (epsilon, delta)-DP.", min=1e-15, max=0.5)]
Authority = Annotated[str | None, typer.Option(help="The authority's fingerprint, from a source you trust.")]
At = Annotated[datetime | None, typer.Option(help="Check certificates against this moment (UTC) instead of now.")]


@budget_app.command("epsilon")
def budget_epsilon(
    sample_rate: Annotated[float, typer.Option(help="Probability that a unit is in a batch (Poisson).", max=1.0)],
    noise_multiplier: Annotated[float, typer.Option(help="Noise standard deviation over the clip norm.", min=0.0)],
    steps: Annotated[int, typer.Option(help="DP-SGD steps.", min=0)],
    delta: Delta,
    json: Json = False,
) -> None:
    """Epsilon of DP-SGD by three accountants: Opacus RDP, Opacus PRV, Google PLD. One that has no sound answer says why.

    Example: secgeo budget epsilon --sample-rate 0.01 --noise-multiplier 1.0 --steps 1000 --delta 1e-5
    """
    from audit.accountants import epsilons
    from audit.budget import Steps

    with _settings():
        answer = epsilons([Steps(sample_rate, noise_multiplier, steps)], delta)
    if not emit(json, **answer.to_json()):
        _show_epsilons(answer, "unit")


@budget_app.command("plan")
def budget_plan(
    epsilon: Annotated[float, typer.Option(help="The budget of the whole study.", min=0.01, max=100.0)],
    delta: Delta,
    patients: Annotated[
        int, typer.Option(help="Patients (or records, if the unit is a record) of one hospital.", min=1)
    ],
    rounds: Annotated[int, typer.Option(help="Rounds of the study.", min=1)],
    batch: Annotated[int, typer.Option(help="Expected batch size of that hospital.", min=1)],
    steps_per_round: Annotated[int, typer.Option(help="DP-SGD steps per round.", min=1)] = 1,
    plot: Annotated[Path | None, typer.Option(help="Write the trade-off as a plot (.png or .svg).")] = None,
    study: Annotated[
        Path | None, typer.Option(help="TOML that `secgeo agreement make` reads: take its other parameters ...")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="... and write it here with the planned ones (a new file).")] = None,
    json: Json = False,
) -> None:
    """Turn a budget into noise: the smallest noise multiplier that keeps the study within it, as nodes count it (Opacus RDP).

    The table shows other batch sizes at the same budget; noise per step is that on the averaged gradient, in clip norms. What
    any of this does to accuracy nobody can tell beforehand.

    Examples:

      secgeo budget plan --epsilon 3 --delta 1e-5 --patients 2000 --rounds 20 --steps-per-round 10 --batch 64 --plot plan.png

      secgeo budget plan --epsilon 3 --delta 1e-5 --patients 2000 --rounds 20 --batch 64 --study study.toml --out new.toml
    """
    from rich.console import Console

    from audit.plan import Budget, calibrate, check_plot, plot_plans, trade_offs, write_spec

    if (study is None) != (out is None):
        raise ConfigError("--study and --out go together: the one is read, the other written")
    spec = {} if study is None else _read_toml(study)
    unit = _unit_of(spec)
    if plot is not None:
        check_plot(plot)
    budget = Budget(epsilon, delta, patients, rounds, steps_per_round)
    with Console(stderr=True).status("trying noise multipliers ..."), _settings():
        plan = calibrate(budget, batch)
        plans = trade_offs(plan)
    warnings = []
    if delta * patients >= 1.0:
        warnings.append(
            f"delta {delta:g} is not below 1 / {patients}: a hospital that gives one {unit} away would keep it"
        )
    if out is not None:
        others = {
            name: count
            for name, count in write_spec(spec, plan, out).items()
            if not isclose(count, patients, rel_tol=0.1)
        }
        if others:
            counts = ", ".join(f"{name} {count:.0f}" for name, count in others.items())
            warnings.append(
                f"by their expected batches these members have other numbers of {unit}s than {patients}: {counts}. The sample rate of "
                f"{plan.sample_rate:g} and the budget are theirs too; their batches are as much smaller or larger"
            )
    if plot is not None:
        plot_plans(plot, plans, batch, unit)
    if emit(json, plan=plan.to_json(), trade_offs=[other.to_json() for other in plans], unit=unit, warnings=warnings):
        return
    show(
        f"epsilon {epsilon:g} at delta {delta:g}, add or remove one {unit}; {rounds} rounds of {steps_per_round} steps, "
        f"{patients} {unit}s"
    )
    show(
        f"\n{'batch':>8} {'sample rate':>12} {'noise multiplier':>17} {'noise per step':>15} {'RDP':>8} {'PRV':>8} {'PLD':>8}"
    )
    for other in plans:
        answers = "".join(
            f"{'-' if value is None else format(value, '.3f'):>9}" for value in other.answer.epsilon.values()
        )
        mark = "  <-" if other.batch == batch else ""
        show(
            f"{other.batch:>8} {other.sample_rate:>12.5f} {other.noise_multiplier:>17.4f} {other.noise_per_step:>15.5f}{answers}{mark}"
        )
    show("\nRDP is what the node enforces; PRV and PLD show how much of it is slack of the accountant.")
    for warning in warnings:
        show(f"note    {warning}")
    for path in (out, plot):
        if path is not None:
            show(f"written: {path}")


@budget_app.command("hospital")
def budget_hospital(
    epsilon: Annotated[float, typer.Option(help="The hospital's budget in the whole study.", min=0.01, max=100.0)],
    delta: Delta,
    rounds: Annotated[int, typer.Option(help="Rounds of the study.", min=2)],
    members: Annotated[int, typer.Option(help="Hospitals of the study.", min=3, max=256)],
    contributors: Annotated[
        int,
        typer.Option(
            help="Honest ones whose noise is counted on: the minimum cohort without colluders, and without one at least.",
            min=1,
        ),
    ],
    json: Json = False,
) -> None:
    """Turn a budget of the whole hospital into the noise that hospitals share out inside the sums (hospital_privacy in the agreement).

    The neighbouring relation is: one hospital's updates are zero. With fewer counted on than there are members, the sum of all has more
    noise than a trusted centre would add; that is the price of dropouts and colluders.

    Example: secgeo budget hospital --epsilon 8 --delta 1e-5 --rounds 20 --members 12 --contributors 8
    """
    from audit.plan import plan_hospital

    if contributors > members:
        raise ConfigError(f"{contributors} of {members} hospitals cannot be counted on")
    plan = plan_hospital(epsilon, delta, rounds, contributors)
    excess = (members / contributors) ** 0.5
    answer = {
        "noise_multiplier": plan.noise_multiplier,
        "epsilon": plan.epsilon,
        "delta": delta,
        "neighbouring_relation": HOSPITAL_RELATION,
        "accountant": ACCOUNTANT,
        "share_over_max_update_norm": plan.share,
        "noise_of_all_over_central": excess,
    }
    if emit(json, **answer):
        return
    show(
        f"noise multiplier {plan.noise_multiplier:.4f}: epsilon {plan.epsilon:.4f} at delta {delta:g}, one hospital's updates zero"
    )
    show(f"each hospital adds noise of {plan.share:.4f} times max_update_norm to every value of its update")
    show(f"if all {members} stay, the sum has {excess:.2f} times the noise that a trusted centre would add")


@budget_app.command("verify")
def budget_verify(
    folder: Annotated[Path, typer.Argument(help="A study's folder of records.")],
    authority: Authority = None,
    at: At = None,
    json: Json = False,
) -> None:
    """Verify every hospital's claim without trusting it: signatures, chains, transcript, agreement, then epsilon by three accountants.

    Exits 8 and names the event if a claim is too low, an event is missing, or a parameter is not the agreed one.

    Example: secgeo budget verify runs/demo --authority "3f0a 91c2 ..."
    """
    from audit.ledgers import verify_budgets

    now = (at or datetime.now(UTC)).replace(tzinfo=UTC)
    report = verify_budgets(folder, authority_fingerprint=ungroup_digits(authority) if authority else None, now=now)
    if not emit(json, **report.to_json()):
        for check in report.failed:
            show(f"FAILED  {check.name}: {check.detail}")
        for name, (claimed, answer) in report.budgets.items():
            show(
                f"{name}: claims epsilon {'infinite' if claimed is None else format(claimed, '.4f')} at delta {answer.delta:g}"
            )
            _show_epsilons(answer, report.unit, indent="  ")
            if hospital := report.hospitals.get(name):
                show(
                    f"  the whole hospital: claims epsilon {hospital['claimed']:.4f}, by RDP {hospital['google_rdp']:.4f} "
                    f"({hospital['if_nobody_colludes']:.4f} if nobody colludes) at delta {hospital['delta']:g}, one hospital's updates zero"
                )
        for warning in report.warnings:
            show(f"note    {warning}")
        show("every claim holds" if report.ok else "verification FAILED")
    if not report.ok:
        raise typer.Exit(VerificationFailed.exit_code)


@budget_app.command("compose")
def budget_compose(
    ledgers: Annotated[list[str], typer.Argument(help="Two or more of FOLDER:HOSPITAL, as in runs/a:hospital-01.")],
    delta: Annotated[
        float | None, typer.Option(help="By default the smallest delta of the studies.", min=1e-15, max=0.5)
    ] = None,
    authority: Annotated[
        list[str] | None,
        typer.Option(
            help="The authority's fingerprint, from a source you trust; once, or once for each folder, in their order."
        ),
    ] = None,
    at: At = None,
    json: Json = False,
) -> None:
    """Epsilon of patients (or records) who are in several ledgers: at two hospitals, or in two studies of one. Every folder is verified.

    A patient who is in one of them only has that one's epsilon: over disjoint patients the whole system has the maximum, over shared
    patients the composition, which this computes from all events (less than the sum of epsilons). All agreements must protect the same
    unit, records or patients.

    Example: secgeo budget compose runs/a:hospital-01 runs/b:hospital-02
    """
    from audit.ledgers import compose

    now = (at or datetime.now(UTC)).replace(tzinfo=UTC)
    named = [_ledger_of(name) for name in ledgers]
    composition = compose(named, delta, authorities=_authorities(named, authority or []), now=now)
    composed, unit, warnings = composition.composed, composition.unit, composition.warnings
    alone = dict(zip(ledgers, composition.alone, strict=True))
    patients_of_one = {name: answer.to_json() for name, answer in alone.items()}
    if emit(json, patients_of_one=patients_of_one, patients_of_all=composed.to_json(), unit=unit, warnings=warnings):
        return
    for name, answer in alone.items():
        show(f"a {unit} in {name} only, at delta {answer.delta:g}")
        _show_epsilons(answer, unit, indent="  ")
    show(f"a {unit} in all of them, at delta {composed.delta:g}")
    _show_epsilons(composed, unit, indent="  ")
    for warning in warnings:
        show(f"note    {warning}")


@contextmanager
def _settings() -> Iterator[None]:
    """Settings that no accountant can answer are to be mended; they are no claim that fails."""
    try:
        yield
    except VerificationFailed as error:
        raise ConfigError(str(error)) from None


def _unit_of(spec: dict[str, Any]) -> str:
    privacy = spec.get("privacy")
    unit = privacy.get("unit") if isinstance(privacy, dict) else None
    return unit if unit in ("record", "patient") else "unit"


def _show_epsilons(answer: Epsilons, unit: str, indent: str = "") -> None:
    for name, title in (("rdp", "Opacus RDP"), ("prv", "Opacus PRV"), ("pld", "Google PLD")):
        value = answer.epsilon[name]
        show(f"{indent}{title}  " + (f"no answer: {answer.refused[name]}" if value is None else f"epsilon {value:.4f}"))
    show(f"{indent}delta {answer.delta:g}, neighbouring relation: add or remove one {unit}")


def _authorities(ledgers: list[tuple[Path, str]], fingerprints: list[str]) -> dict[Path, str | None]:
    """By folder the fingerprint that its authority must have."""
    folders = list(dict.fromkeys(folder for folder, _ in ledgers))
    if len(fingerprints) not in (0, 1, len(folders)):
        raise ConfigError(f"--authority is given once, or once for each of the {len(folders)} folders, in their order")
    pinned: list[str | None] = [ungroup_digits(fingerprint) for fingerprint in fingerprints] or [None]
    return dict(zip(folders, pinned if len(pinned) == len(folders) else pinned * len(folders), strict=True))


def _ledger_of(name: str) -> tuple[Path, str]:
    folder, _, node = name.rpartition(":")
    if not folder or not node:
        raise ConfigError(f"{name!r} is not FOLDER:HOSPITAL, as in runs/a:hospital-01")
    return Path(folder), node


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
