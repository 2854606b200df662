"""Budgets from the ledgers of a folder of records, without trust in the nodes that wrote them.

`audit.records` checks signatures, chains, the link of every event to transcript and agreement, and each claim against the smaller of RDP
and PLD; here every claim must reach Opacus' RDP, by which nodes claim, and ledgers are composed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

import msgspec

from audit.accountants import Epsilons, epsilons, opacus_rdp
from audit.budget import Steps
from audit.records import Check, VerificationReport, check_claim, verify_folder
from keys.errors import ConfigError, VerificationFailed
from protocols.ledger import DpSgdEvent

RDP_TOLERANCE, RDP_ROUNDING = 1e-9, 1e-12
"""Slack when a claim is compared with Opacus' RDP: relative, and for each step, since it cuts the series of a step at e^-30."""


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """What each hospital claims for each `unit` (a record or a patient), and what its events give; None is infinite."""

    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    budgets: dict[str, tuple[float | None, Epsilons]]
    hospitals: dict[str, dict[str, float | str]]
    unit: str

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not hold."""
        return tuple(check for check in self.checks if not check.ok)

    @property
    def ok(self) -> bool:
        """Whether every check held and every claim is at least what it should be."""
        return not self.failed

    def to_json(self) -> dict[str, object]:
        """A JSON-able form."""
        budgets = {
            name: {"claimed": claimed, **answer.to_json(), "unit": self.unit}
            | ({"hospital": self.hospitals[name]} if name in self.hospitals else {})
            for name, (claimed, answer) in self.budgets.items()
        }
        return {
            "ok": self.ok,
            "failed": msgspec.to_builtins(self.failed),
            "warnings": self.warnings,
            "budgets": budgets,
        }


def verify_budgets(folder: Path, *, authority_fingerprint: str | None, now: datetime) -> BudgetReport:
    """Verify the folder and every claim in it; see `audit.records.verify_folder` for the arguments."""
    report = verify_folder(folder, authority_fingerprint=authority_fingerprint, now=now)
    checks = list(report.checks)
    budgets: dict[str, tuple[float | None, Epsilons]] = {}
    answers = cache(epsilons)  # most hospitals took the same steps
    for name, (events, claims) in report.ledgers.items():
        try:
            for count, claim in claims:
                rdp = opacus_rdp(_history(events, claim.steps_total), claim.delta)[0]
                least = rdp * (1 - RDP_TOLERANCE) - claim.steps_total * RDP_ROUNDING
                check_claim(claim, events[:count], least, "Opacus RDP")
            last = claims[-1][1]
            budgets[name] = last.epsilon, answers(_history(events, last.steps_total), last.delta)
        except VerificationFailed as error:
            checks.append(Check(f"ledgers/{name}.jsonl", False, str(error)))
    return BudgetReport(tuple(checks), tuple(report.warnings), budgets, report.hospitals, report.unit)


def _history(events: Sequence[DpSgdEvent], steps: int) -> tuple[Steps, ...]:
    """The first `steps` steps: all events of a ledger that verifies have the agreed rate and noise."""
    return (Steps(events[0].sample_rate, events[0].noise_multiplier, steps),) if events else ()


@dataclass(frozen=True, slots=True)
class Composition:
    """Epsilon of a `unit` (a record or a patient) that is in one of several ledgers only, and of one that is in all of them.

    `warnings` are what the folders' verification has to say, each with its folder.
    """

    alone: list[Epsilons]
    composed: Epsilons
    unit: str
    warnings: tuple[str, ...]


def compose(
    ledgers: Sequence[tuple[Path, str]], delta: float | None, *, authorities: Mapping[Path, str | None], now: datetime
) -> Composition:
    """Compose the ledgers of (folder, hospital) at `delta`, or the smallest of the studies'.

    A patient has several records, so what was counted for each record is not what was spent on a patient.

    Args:
        ledgers: two or more, each once.
        delta: by default the smallest of the studies'.
        authorities: by folder the pinned fingerprint of its authority.
        now: when certificates must be valid.

    Raises:
        ConfigError: fewer than two, one named twice, a hospital without a ledger, another unit, or a delta out of range.
        VerificationFailed: a folder does not verify, or no accountant has an answer.
    """
    if len({(folder.resolve(), node) for folder, node in ledgers}) != len(ledgers) or len(ledgers) < 2:
        raise ConfigError("name two or more ledgers, each once")
    if delta is not None and not 0.0 < delta < 1.0:
        raise ConfigError(f"delta is above 0 and below 1, not {delta}")
    reports: dict[Path, VerificationReport] = {}
    histories: list[tuple[DpSgdEvent, ...]] = []
    deltas = []
    for folder, node in ledgers:
        if folder not in reports:
            reports[folder] = verify_folder(folder, authority_fingerprint=authorities.get(folder), now=now)
            for check in reports[folder].checks:
                if not check.ok:
                    raise VerificationFailed(f"{folder}: {check.name}: {check.detail}")
        if node not in reports[folder].ledgers:
            raise ConfigError(f"{folder} holds no ledger of {node!r}, but of: {', '.join(reports[folder].ledgers)}")
        events, claims = reports[folder].ledgers[node]
        histories.append(events)
        deltas.append(claims[-1][1].delta)
    units = {reports[folder].unit: folder for folder, _ in ledgers}
    if len(units) > 1:
        told = ", ".join(f"{folder}: {unit}" for unit, folder in sorted(units.items()))
        raise ConfigError(f"ledgers that count for each record and for each patient cannot be composed ({told})")
    chosen = delta if delta is not None else min(deltas, default=math.nan)
    return Composition(
        [epsilons(events, chosen) for events in histories],
        epsilons([event for events in histories for event in events], chosen),
        next(iter(units)),
        tuple(f"{folder}: {warning}" for folder, report in reports.items() for warning in report.warnings),
    )
