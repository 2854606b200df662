"""A node's budget in one study: its signed ledger, and the books of its site over all studies.

Order, before the noise of a round is drawn: the site's books, then the ledger, each durable. A crash in between counts a round that
was never trained; none is trained that was not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from keys.errors import BudgetExceeded, ConfigError
from keys.identity import Identity
from protocols import ledger
from protocols.agreement import Agreement
from protocols.chain import GENESIS
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
        path: the ledger; it is gone on with if it is there.
        fingerprint: of the dataset, keyed.
        max_epsilon: what local policy allows all studies on the same records together.

    Attributes:
        steps: DP-SGD steps that the ledger counts.
        link: digest of the record of the last sum that was applied.

    Raises:
        ConfigError: the ledger belongs to other records or another study.
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
    ) -> None:
        self._agreement, self._study = agreement, agreement_digest.hex()
        self._site, self._fingerprint, self._max_epsilon = site, fingerprint, max_epsilon
        self._file = LineFile(path)
        self._writer = ledger.LedgerWriter(identity, self._file.lines)
        self.steps, self._rounds, self._noised, self.link = 0, 0, 0, GENESIS
        privacy = agreement.privacy
        opened = ledger.LedgerOpened(
            node_id=identity.node_id,
            agreement_digest=self._study,
            dataset_fingerprint=fingerprint,
            privacy_unit=privacy.unit,
            neighbouring_relation=ledger.NEIGHBOURING_RELATION,
            delta=privacy.delta,
            epsilon_budget=privacy.epsilon_budget,
        )
        if not self._file.lines:
            self._append(opened)
            return
        before = ledger.read_ledger(b"".join(self._file.lines), identity.public_key)
        if before[0] != opened:
            raise ConfigError(
                "the ledger here was opened for other records or another study; choose another state folder"
            )
        events = [body for body in before if isinstance(body, ledger.DpSgdEvent)]
        self._rounds, self.steps = len(events), sum(event.steps for event in events)
        self._noised = sum(event.noise_share is not None for event in events)
        self._append(ledger.LedgerReopened(self._rounds, self.steps))
        missing = self.steps - site.steps_of(self._study)
        if missing > 0:  # the site's books were lost, or are younger than this ledger
            site.book(self._study, self._rounds, self._spending(missing), lambda _: None)

    def book(self, round_number: int, steps: int) -> None:
        """Make a round's steps durable, before its noise is drawn.

        Raises:
            BudgetExceeded: they would pass the epsilon that is agreed for this study (of a unit, or of the hospital), or that local
                policy allows all studies on the same records together; nothing was booked.
        """
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
        self.steps, self._rounds, self._noised = (
            self.steps + steps,
            self._rounds + 1,
            self._noised + (share is not None),
        )
        self._append(
            ledger.DpSgdEvent(
                round=round_number,
                sample_rate=privacy.sample_rate,
                noise_multiplier=privacy.noise_multiplier,
                max_grad_norm=privacy.max_grad_norm,
                steps=steps,
                privacy_unit=privacy.unit,
                dataset_fingerprint=self._fingerprint,
                rng_kind=RNG_KIND,
                transcript_link=self.link,
                noise_share=share,
            )
        )

    def claim(self) -> float:
        """State, and give, the epsilon that this study has spent so far."""
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
        """Write the closing line."""
        self._append(ledger.LedgerClosed(rounds=self._rounds, steps_total=self.steps, transcript_link=self.link))
        self._file.close()

    def _append(self, body: ledger.Body) -> None:
        self._file.append(self._writer.append(body))

    def _spending(self, steps: int) -> Spent:
        privacy = self._agreement.privacy
        return Spent(privacy.sample_rate, privacy.noise_multiplier, steps, privacy.delta)

    def _epsilon(self, steps: int) -> float:
        privacy = self._agreement.privacy
        return epsilon_of([(privacy.noise_multiplier, privacy.sample_rate, steps)], privacy.delta)

    def _hospital_epsilon(self, rounds: int) -> float:
        hospital, share = self._agreement.hospital_privacy, self._agreement.noise_share
        return hospital_epsilon(rounds * share.concentrated, hospital.delta) if hospital and share else 0.0

    def _composed(self, spent: Sequence[Spent]) -> tuple[float, float]:
        delta = min([self._agreement.privacy.delta, *(event.delta for event in spent)])
        return epsilon_of([(e.noise_multiplier, e.sample_rate, e.steps) for e in spent], delta), delta

    def _permit(self, spent: Sequence[Spent]) -> None:
        epsilon, delta = self._composed(spent)
        if not epsilon <= self._max_epsilon:
            raise BudgetExceeded(
                f"all studies on these records together would spend epsilon {epsilon:.4f} at delta {delta}, more than the "
                f"{self._max_epsilon} that local policy allows (max_epsilon); the step was refused"
            )
