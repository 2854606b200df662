"""Budgets from the ledgers of a folder of records, without trust in the nodes that wrote them.

`audit.records` checks signatures, chains, the link of every event to transcript and agreement, and each claim against Google's PLD; here
every claim is recomputed by Opacus' accountants too, and ledgers are composed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from audit.accountants import Epsilons, epsilons, opacus_rdp
from audit.records import Check, VerificationReport, check_claim, verify_folder
from keys.errors import ConfigError, VerificationFailed
from protocols.ledger import DpSgdEvent


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """What each hospital claims, and what its events give; None is infinite."""

    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    budgets: dict[str, tuple[float | None, Epsilons]]
    hospitals: dict[str, dict[str, float | str]]

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
            name: {"claimed": claimed, **answer.to_json()}
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
    for name, (events, claims) in report.ledgers.items():
        try:
            for count, claim in claims:
                if count:
                    check_claim(claim, events[:count], opacus_rdp(events[:count], claim.delta)[0], "Opacus RDP")
            last = claims[-1][1]
            budgets[name] = last.epsilon, epsilons(events, last.delta)
        except VerificationFailed as error:
            checks.append(Check(f"ledgers/{name}.jsonl", False, str(error)))
    return BudgetReport(tuple(checks), tuple(report.warnings), budgets, report.hospitals)


def compose(
    ledgers: Sequence[tuple[Path, str]], delta: float | None, *, authority_fingerprint: str | None, now: datetime
) -> tuple[list[Epsilons], Epsilons]:
    """Epsilon of each (folder, hospital) alone, and of a unit that is in all of them, at `delta` or the smallest of the studies'.

    Raises:
        ConfigError: fewer than two, one named twice, or a hospital without a ledger.
        VerificationFailed: a folder does not verify, or no accountant has an answer.
    """
    if len(set(ledgers)) != len(ledgers) or len(ledgers) < 2:
        raise ConfigError("name two or more ledgers, each once")
    reports: dict[Path, VerificationReport] = {}
    histories: list[tuple[DpSgdEvent, ...]] = []
    deltas = []
    for folder, node in ledgers:
        if folder not in reports:
            reports[folder] = verify_folder(folder, authority_fingerprint=authority_fingerprint, now=now)
            for check in reports[folder].checks:
                if not check.ok:
                    raise VerificationFailed(f"{folder}: {check.name}: {check.detail}")
        if node not in reports[folder].ledgers:
            raise ConfigError(f"{folder} holds no ledger of {node!r}, but of: {', '.join(reports[folder].ledgers)}")
        events, claims = reports[folder].ledgers[node]
        histories.append(events)
        deltas.append(claims[-1][1].delta)
    chosen = delta if delta is not None else min(deltas, default=math.nan)
    return [epsilons(events, chosen) for events in histories], epsilons(
        [e for events in histories for e in events], chosen
    )
