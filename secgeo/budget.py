"""A node's budget in one study: its signed ledger, and the books of its site over all studies.

Order, before the noise of a round is drawn: the site's books, then the ledger, each durable. A crash in between counts a round that
was never trained; none is trained that was not counted.

So of one study the two tell the same rounds in the same order, but that the ledger may lack the last one; a restart puts it there.
Books that lack rounds of this study's ledger are filled from it. Everything else means that one of them was lost, or is an old copy,
and is refused: a ledger that lacks more, and books that lack rounds of another study's ledger, whose records only that study knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from keys.errors import BudgetExceeded, ConfigError
from keys.identity import Identity
from protocols import ledger
from protocols.agreement import Agreement
from protocols.chain import GENESIS, Entry
from secgeo.accountant import epsilon_of, hospital_epsilon
from secgeo.noise import RNG_KIND
from secgeo.records import LineFile
from secgeo.site_budget import SiteBudget, Spent


class Budget:
    """What one node may spend in one study, and has.

    Args:
        agreement: the study's, with its budget.
        agreement_digest: names the study.
        identity: signs the ledger.
        site: what all studies have spent on these records.
        path: the ledger; it is gone on with if it is there. Beside its folder are those of the site's other studies.
        fingerprint: of the dataset, keyed.
        max_epsilon: what local policy allows all studies on the same records together.
        link: digest of the record of the last sum that was applied, if there is one.

    Attributes:
        steps: DP-SGD steps that the ledger counts.
        link: as above; whoever applies a sum sets it.

    Raises:
        ConfigError: the ledger belongs to other records or another study; ledger or books were lost or are old copies; or the same
            people were in a study with another privacy unit.
        VerificationFailed: it was changed.
    """

    def __init__(
        self,
        agreement: Agreement,
        agreement_digest: bytes,
        identity: Identity,
        site: SiteBudget,
        path: Path,
        fingerprint: str,
        max_epsilon: float,
        link: str = GENESIS,
    ) -> None:
        self._agreement, self._study = agreement, agreement_digest.hex()
        self._site, self._fingerprint, self._max_epsilon = site, fingerprint, max_epsilon
        self.steps, self._rounds, self._noised, self.link = 0, 0, 0, link
        self._failed = False
        self._file = LineFile(path)
        try:
            _check_others(site, path)
            self._writer = ledger.LedgerWriter(identity, self._file.lines)
            self._go_on(identity, path)
        except BaseException:
            self._file.close()
            raise

    def _go_on(self, identity: Identity, path: Path) -> None:
        """Bring ledger and books to the same rounds, and open or reopen the ledger."""
        privacy = self._agreement.privacy
        opened = ledger.LedgerOpened(
            node_id=identity.node_id,
            agreement_digest=self._study,
            dataset_fingerprint=self._fingerprint,
            privacy_unit=privacy.unit,
            neighbouring_relation=ledger.NEIGHBOURING_RELATION,
            delta=privacy.delta,
            epsilon_budget=privacy.epsilon_budget,
        )
        before = ledger.read_ledger(b"".join(self._file.lines), identity.public_key)
        if before and before[0] != opened:
            raise ConfigError(
                "the ledger here was opened for other records or another study; go on with those, or leave this study"
            )
        told, booked = _private_rounds(before), self._site.booked(self._study)
        left_out = booked[len(told) :]
        lost = not before and (left_out or self.link != GENESIS)
        if lost or len(left_out) > 1 or booked[: len(told)] != told[: len(booked)]:
            raise ConfigError(
                f"the ledger {path} was lost, or is an old copy: it does not tell all that the site's books and the journal tell of "
                "this study; restore it from a backup, or leave this study"
            )
        for round_number, steps in told[len(booked) :]:
            self._site.book(self._study, round_number, self._spending(steps), lambda _: None)
        if mixed := self._mixed(self._site.spent()):
            raise ConfigError(mixed)
        if not before:
            self._append(opened)
            return
        for body in before:
            if isinstance(body, ledger.DpSgdEvent):
                self._count(body)
        self._append(ledger.LedgerReopened(self._rounds, self.steps))
        for round_number, steps in left_out:
            self._append_event(round_number, steps)
            self._append(ledger.LedgerReopened(self._rounds, self.steps))

    def book(self, round_number: int, steps: int) -> None:
        """Make a round's steps durable, before its noise is drawn.

        Raises:
            BudgetExceeded: they would pass the epsilon that is agreed for this study (of a unit, or of the hospital), or that local
                policy allows all studies on the same records together, or cannot be counted together with them; nothing was booked.
            ConfigError: the ledger cannot be written; nothing more will be.
        """
        self._check_whole()
        privacy, hospital = self._agreement.privacy, self._agreement.hospital_privacy
        share = self._agreement.noise_share if steps else None
        epsilon = self._epsilon(self.steps + steps)
        if steps and privacy.noise_multiplier > 0 and not epsilon <= privacy.epsilon_budget:
            raise BudgetExceeded(
                f"round {round_number} would spend epsilon {epsilon:.4f} at delta {privacy.delta}, "
                f"more than the budget of {privacy.epsilon_budget}; it was refused"
            )
        if hospital and share and not (whole := self._hospital_epsilon(self._noised + 1)) <= hospital.epsilon_budget:
            raise BudgetExceeded(
                f"round {round_number} would spend epsilon {whole:.4f} of the hospital at delta {hospital.delta}, "
                f"more than the budget of {hospital.epsilon_budget}; it was refused"
            )
        if steps:
            self._site.book(self._study, round_number, self._spending(steps), self._permit)
        self._append_event(round_number, steps)

    def claim(self) -> float:
        """State, and give, the epsilon that this study has spent so far.

        Raises:
            ConfigError: the ledger cannot be written, now or earlier.
        """
        epsilon = self._epsilon(self.steps)
        hospital, whole = self._agreement.hospital_privacy, None
        if hospital is not None:
            spent = self._hospital_epsilon(self._noised)
            whole = ledger.HospitalClaim(hospital.delta, spent, ledger.ACCOUNTANT, ledger.HOSPITAL_RELATION)
        self._append(
            ledger.EpsilonClaim(
                steps_total=self.steps,
                delta=self._agreement.privacy.delta,
                epsilon=epsilon if math.isfinite(epsilon) else None,
                accountant=ledger.ACCOUNTANT,
                neighbouring_relation=ledger.NEIGHBOURING_RELATION,
                hospital=whole,
            )
        )
        return epsilon

    def epsilon_of_all(self) -> tuple[float, float]:
        """Epsilon that all studies have spent on these records, and the delta that it holds at: the smallest of any of them."""
        return self._composed(self._site.spent())

    def close(self) -> None:
        """Write the closing line, unless a write has failed.

        Raises:
            ConfigError: it cannot be written; the file is closed nevertheless.
        """
        try:
            if not self._failed:
                self._append(ledger.LedgerClosed(self._rounds, self.steps, self.link))
        finally:
            self._file.close()

    def _append(self, body: ledger.Body) -> None:
        """Write a line. After one that could not be written there is no other: it would not follow what is on disk."""
        self._check_whole()
        try:
            self._file.append(self._writer.append(body))
        except BaseException:
            self._failed = True
            raise

    def _check_whole(self) -> None:
        if self._failed:
            raise ConfigError(
                "an earlier line could not be written to the ledger, so nothing more is; mend that, and start this node again"
            )

    def _append_event(self, round_number: int, steps: int) -> None:
        privacy = self._agreement.privacy
        event = ledger.DpSgdEvent(
            round=round_number,
            sample_rate=privacy.sample_rate,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            steps=steps,
            privacy_unit=privacy.unit,
            dataset_fingerprint=self._fingerprint,
            rng_kind=RNG_KIND,
            transcript_link=self.link,
            noise_share=self._agreement.noise_share if steps else None,
        )
        self._append(event)
        self._count(event)

    def _count(self, event: ledger.DpSgdEvent) -> None:
        self.steps, self._rounds = self.steps + event.steps, self._rounds + 1
        self._noised += event.noise_share is not None

    def _spending(self, steps: int) -> Spent:
        privacy = self._agreement.privacy
        return Spent(
            privacy.sample_rate,
            privacy.noise_multiplier,
            steps,
            privacy.delta,
            privacy.unit,
            privacy.records_per_patient,
        )

    def _epsilon(self, steps: int) -> float:
        privacy = self._agreement.privacy
        return epsilon_of([(privacy.noise_multiplier, privacy.sample_rate, steps)], privacy.delta)

    def _hospital_epsilon(self, rounds: int) -> float:
        hospital, share = self._agreement.hospital_privacy, self._agreement.noise_share
        return hospital_epsilon(rounds * share.concentrated, hospital.delta) if hospital and share else 0.0

    def _composed(self, spent: Sequence[Spent]) -> tuple[float, float]:
        delta = min([self._agreement.privacy.delta, *(event.delta for event in spent)])
        return epsilon_of([(e.noise_multiplier, e.sample_rate, e.steps) for e in spent], delta), delta

    def _mixed(self, spent: Sequence[Spent]) -> str:
        """Why these cannot be counted together, if so: epsilon of a record says nothing definite of a patient, nor the other way round."""
        ours = self._agreement.privacy.unit
        if all(event.unit == ours for event in spent):
            return ""
        return (
            f"the privacy unit of this study is a {ours}, but some of the same records or patients were in a study with another unit; "
            "the two cannot be counted together: plan all studies on the same people with unit patient, or leave these people out here"
        )

    def _permit(self, spent: Sequence[Spent]) -> None:
        if mixed := self._mixed(spent):  # the other study has begun since this one did
            raise BudgetExceeded(mixed)
        epsilon, delta = self._composed(spent)
        if not epsilon <= self._max_epsilon:
            raise BudgetExceeded(
                f"all studies on these records together would spend epsilon {epsilon:.4f} at delta {delta}, more than the "
                f"{self._max_epsilon} that local policy allows (max_epsilon); the step was refused"
            )


def _private_rounds(bodies: Iterable[ledger.Body]) -> list[tuple[int, int]]:
    """Round and steps of all events that cost anything: what the books hold."""
    return [(body.round, body.steps) for body in bodies if isinstance(body, ledger.DpSgdEvent) and body.steps]


def _check_others(site: SiteBudget, own: Path) -> None:
    """Check that the books hold what the ledgers of the site's other studies tell; these may be running, and are only read.

    Their signatures are not checked: they may be by earlier keys of the site.

    Raises:
        ConfigError: the books were lost, or are an old copy; or a ledger is damaged.
    """
    for path in sorted(own.parent.parent.glob(f"*/{own.name}")):
        if path == own:
            continue
        lines = path.read_bytes().splitlines(keepends=True)
        try:
            bodies = [msgspec.json.decode(line, type=Entry[ledger.Body]).body for line in lines if line.endswith(b"\n")]
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise ConfigError(f"the ledger {path} is damaged; restore it from a backup") from None
        told = _private_rounds(bodies)
        if told and not (
            isinstance(bodies[0], ledger.LedgerOpened) and site.booked(bodies[0].agreement_digest)[: len(told)] == told
        ):
            raise ConfigError(
                f"the site's books (budget.sqlite in {own.parent.parent}) lack what {path} tells: they were lost or are an old copy; "
                "put a backup in the place of budget.sqlite, budget.sqlite-wal and -shm: only they know on whose records that was spent"
            )
