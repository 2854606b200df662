"""A tiny study's records with real signatures, made by hand so that a test can make any of the parties lie.

`Study` builds transcript bodies, ledgers and the folder; whoever lies still holds its own keys and signs what it says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from keys.errors import VerificationFailed
from keys.labels import Label
from keys.signed import sign_document
from protocols import ledger as led
from protocols import transcript as t
from protocols.agreement import Agreement, Anchors, HospitalPrivacy, Model, agreement_digest, write_agreement
from protocols.chain import GENESIS, line_digest
from protocols.sealing import AttemptId
from secgeo.accountant import epsilon_of, hospital_epsilon
from secgeo.records import LEDGERS, RECEIPTS, TRANSCRIPT, sum_path, write_manifest, write_sum
from secgeo.update import Layout
from tests.keys.factory import AGGREGATOR, NOW, Consortium, make_consortium
from tests.protocols.network import make_agreement, names

TINY = Model(seed=1, trunk_digest="0" * 64, width=8, layers=1, heads=1, tokens=2, feedforward=8, rank=1)
FINGERPRINT = "ab" * 32
RNG = led.RNG_KIND

Bodies = list[t.Body]


@dataclass(frozen=True)
class Study:
    """Who takes part, and what was agreed."""

    consortium: Consortium
    agreement: Agreement

    @property
    def document(self) -> bytes:
        return write_agreement(self.agreement)

    @property
    def digest(self) -> bytes:
        return agreement_digest(self.document)

    @property
    def names(self) -> list[str]:
        return [member.node_id for member in self.agreement.members]

    @property
    def public_keys(self) -> dict:
        return {name: self.consortium.identities[name].public_key for name in self.names}

    @property
    def aggregator_key(self):
        return self.consortium.identities[AGGREGATOR].public_key

    def with_sections(self, **sections: dict) -> Study:
        """The same parties under another agreement, as in `privacy={"delta": 1e-6}`."""
        changed = {k: msgspec.structs.replace(getattr(self.agreement, k), **v) for k, v in sections.items()}
        return replace(self, agreement=msgspec.structs.replace(self.agreement, **changed))

    # --- transcript

    def total(self, number: int) -> np.ndarray:
        size = Layout.from_agreement(self.agreement).size
        return np.random.default_rng(number).integers(0, 1 << 24, size, dtype=np.uint32)

    def opened(self) -> t.StudyOpened:
        pin = self.agreement.roster
        return t.StudyOpened(self.agreement.study.id, self.digest.hex(), pin.digest, pin.epoch, pin.version)

    def round_record(
        self,
        number: int,
        *,
        survivors: Sequence[str] | None = None,
        voters: Sequence[str] | None = None,
        cohort: Sequence[str] | None = None,
        attempt: int = 1,
        **fields: object,
    ) -> t.RoundRecord:
        """The record of a round; `voters` (all survivors by default) really sign this very survivor set."""
        alive = list(self.names if survivors is None else survivors)
        everyone = tuple(sorted({*self.names, *alive}) if cohort is None else cohort)
        uploads = [(name, t.upload_digest(f"{name}/{number}".encode(), number)) for name in alive]
        view = bytes([number % 256]) * 32
        statement = t.survivor_statement(AttemptId(self.digest, number, attempt), view, uploads)
        voting = alive if voters is None else voters
        votes = {
            name: self.consortium.identities[name].sign(Label.SURVIVORS, statement).hex()
            for name in voting
            if name in self.consortium.identities
        }
        record = t.RoundRecord(
            agreement_digest=self.digest.hex(),
            roster_epoch=self.agreement.roster.epoch,
            roster_version=self.agreement.roster.version,
            round=number,
            attempt=attempt,
            protocol="masked",
            study_key="",
            builds_on=GENESIS,
            cohort=everyone,
            senders_view=view.hex(),
            survivors=tuple(t.Survivor(name, digest.hex(), votes.get(name, "")) for name, digest in uploads),
            dropped=tuple(t.Dropped(name, "upload") for name in everyone if name not in alive),
            aggregate_digest=t.aggregate_digest(self.total(number).tobytes()).hex(),
            aggregate_tag=f"{number:016x}",
            upload_bytes=1000,
            download_bytes=2000,
            seconds=0.25,
        )
        return msgspec.structs.replace(record, **fields)

    def receipts(self, number: int, digest: bytes, signers: Sequence[str] | None = None) -> t.Receipts:
        statement = t.receipt_statement(self.digest, number, digest)
        signed = [
            t.Countersignature(name, self.consortium.identities[name].sign(Label.RECEIPT, statement).hex())
            for name in (self.names if signers is None else signers)
        ]
        return t.Receipts(number, digest.hex(), tuple(signed))

    def transcript(self, change: Callable[[Bodies], object] = lambda bodies: None) -> bytes:
        """An honest transcript of all rounds; `change` edits the list of bodies before the aggregator signs it.

        A `Receipts` with no countersignatures stands for honest receipts of the record before it; a record that builds on nothing
        builds on the one before it.
        """
        bodies: Bodies = [self.opened()]
        for number in range(1, self.agreement.study.rounds + 1):
            bodies += [self.round_record(number), t.Receipts(number, GENESIS, ())]
        bodies.append(t.StudyClosed(self.agreement.study.rounds, "all rounds are done"))
        change(bodies)
        return b"".join(self.sign_transcript(bodies))

    def sign_transcript(self, bodies: Sequence[t.Body]) -> list[bytes]:
        writer = t.TranscriptWriter(self.consortium.identities[AGGREGATOR])
        lines: list[bytes] = []
        digest = b""
        for body in bodies:
            if isinstance(body, t.Receipts) and not body.countersignatures:
                body = self.receipts(body.round, digest)
            if isinstance(body, t.RoundRecord) and body.builds_on == GENESIS and digest:
                body = msgspec.structs.replace(body, builds_on=digest.hex())
            lines.append(writer.append(body))
            if isinstance(body, t.RoundRecord):
                digest = line_digest(lines[-1])
        return lines

    # --- ledgers

    def ledger_bodies(self, node: str, transcript: bytes) -> list[led.Body]:
        """An honest ledger: an event a round, private steps from the second on, linked to the record before."""
        privacy, link, steps = self.agreement.privacy, GENESIS, 0
        bodies: list[led.Body] = [
            led.LedgerOpened(
                node_id=node,
                agreement_digest=self.digest.hex(),
                dataset_fingerprint=FINGERPRINT,
                privacy_unit=privacy.unit,
                neighbouring_relation=led.NEIGHBOURING_RELATION,
                delta=privacy.delta,
                epsilon_budget=privacy.epsilon_budget,
            )
        ]
        records = [
            entry for entry in t.read_transcript(transcript, self.aggregator_key) if isinstance(entry[0], t.RoundRecord)
        ]
        for record, line in records:
            taken = self.agreement.training.steps_per_round if link != GENESIS else 0
            bodies.append(
                led.DpSgdEvent(
                    round=record.round,
                    sample_rate=privacy.sample_rate,
                    noise_multiplier=privacy.noise_multiplier,
                    max_grad_norm=privacy.max_grad_norm,
                    steps=taken,
                    privacy_unit=privacy.unit,
                    dataset_fingerprint=FINGERPRINT,
                    rng_kind=RNG,
                    transcript_link=link,
                    noise_share=self.agreement.noise_share if taken else None,
                )
            )
            steps, link = steps + taken, line_digest(line).hex()
        events = [body for body in bodies if isinstance(body, led.DpSgdEvent)]
        epsilon = epsilon_of([(e.noise_multiplier, e.sample_rate, e.steps) for e in events], privacy.delta)
        claimed = epsilon if np.isfinite(epsilon) else None
        hospital, whole = self.agreement.hospital_privacy, None
        if hospital is not None:
            rho = sum(event.noise_share.concentrated for event in events if event.noise_share)
            whole = led.HospitalClaim(
                hospital.delta, hospital_epsilon(rho, hospital.delta), led.ACCOUNTANT, led.HOSPITAL_RELATION
            )
        bodies.append(led.EpsilonClaim(steps, privacy.delta, claimed, led.ACCOUNTANT, led.NEIGHBOURING_RELATION, whole))
        bodies.append(led.LedgerClosed(len(events), steps, link))
        return bodies

    def ledger(self, node: str, transcript: bytes, change: Callable[[list], object] = lambda bodies: None) -> bytes:
        bodies = self.ledger_bodies(node, transcript)
        change(bodies)
        writer = led.LedgerWriter(self.consortium.identities[node])
        return b"".join(writer.append(body) for body in bodies)

    # --- the folder

    def write(self, folder: Path) -> Path:
        """A whole honest folder, sealed."""
        (folder / LEDGERS).mkdir(parents=True)
        consortium = self.consortium
        (folder / "agreement.toml").write_bytes(self.document)
        (folder / "agreement.toml.sig").write_bytes(
            sign_document(consortium.authority.sign, Label.AGREEMENT, self.document)
        )
        (folder / "authority.pem").write_bytes(consortium.authority.root_pem)
        (folder / "roster.json").write_bytes(consortium.document)
        (folder / "roster.json.sig").write_bytes(consortium.signature)
        (folder / "metrics.json").write_bytes(b'{"accuracy": 0.9}\n')
        transcript = self.transcript()
        for number in range(1, self.agreement.study.rounds + 1):
            write_sum(folder, number, self.total(number))
        (folder / RECEIPTS).mkdir()
        for name in self.names:
            (folder / RECEIPTS / f"{name}.jsonl").write_bytes(b"".join(self.shown(transcript)))
        self.put(folder, transcript, {name: self.ledger(name, transcript) for name in self.names})
        return folder

    def shown(self, transcript: bytes) -> list[bytes]:
        """The records of a transcript, as nodes are shown them."""
        entries = t.read_transcript(transcript, self.aggregator_key)
        return [line for body, line in entries if isinstance(body, t.RoundRecord)]

    def put(self, folder: Path, transcript: bytes, ledgers: dict[str, bytes]) -> None:
        """Replace transcript and ledgers, and the receipts with them, and seal again."""
        (folder / TRANSCRIPT).write_bytes(transcript)
        for path in (folder / RECEIPTS).glob("*.jsonl"):
            with contextlib.suppress(VerificationFailed):
                path.write_bytes(b"".join(self.shown(transcript)))
        for name, lines in ledgers.items():
            (folder / LEDGERS / f"{name}.jsonl").write_bytes(lines)
        self.seal(folder)

    def seal(self, folder: Path) -> None:
        """Sign the manifest anew, so that only the other checks can find what is wrong."""
        write_manifest(folder, self.consortium.authority.sign)


def make_study(count: int = 3, rounds: int = 2, hospital: HospitalPrivacy | None = None, **secure_sum: object) -> Study:
    consortium = make_consortium(names(count))
    agreement = make_agreement(consortium, rounds=rounds, **{"protocol": "masked", **secure_sum})
    agreement = msgspec.structs.replace(agreement, model=TINY, anchors=Anchors(9), hospital_privacy=hospital)
    return Study(consortium, agreement)


__all__ = ["FINGERPRINT", "NOW", "RNG", "Study", "make_study", "sum_path"]
