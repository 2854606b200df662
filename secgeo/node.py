"""The hospital's process: checks everything, then trains and sums round by round, and books its privacy budget.

Order of work, and nothing later starts before the earlier has passed: key files, study documents and pins, local policy,
anchors, private data, journal, ledger, connection. Before each round its event is durable (`secgeo.budget`); the round that would pass
a budget is refused and the study left in good order, so that the others can go on.

Started again after a crash, the node goes on with the study: its model and an update that waits to be summed are in its
journal. A round whose training was cut off is trained, and booked, again.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from keys.errors import BudgetExceeded, ConfigError, TransportError
from keys.identity import Identity
from keys.labels import Label
from protocols import study_node as machine
from protocols.agreement import Modality
from protocols.chain import GENESIS, line_digest
from protocols.policy import check_policy
from secgeo import datasets
from secgeo.accountant import epsilon_after
from secgeo.budget import Budget
from secgeo.config import AnyData, ArrayData, EntryPointData, NodeConfig, TableData
from secgeo.geometry import debiased_cka
from secgeo.hospital_noise import add_noise_share
from secgeo.journal import NodeJournal, Progress
from secgeo.noise import NoiseSource
from secgeo.sandbox import Sandboxes
from secgeo.site_budget import SiteBudget
from secgeo.study import ANCHORS, OpenStudy, open_study
from secgeo.transport import NodeEndpoint
from secgeo.update import Layout, SharedState, apply_sum, private_steps

Report = Callable[[str, dict[str, object]], None]

SILENCE_FACTOR = 4.0
"""A node gives up when the aggregator has been silent for this many times its longest agreed deadline."""

POLL_SECONDS = 1.0

LEDGER = "ledger.jsonl"
SITE_BUDGET = "budget.sqlite"


def load_records(data: AnyData, base: Path, modality: Modality, classes: int) -> datasets.LabelledRecords:
    """Read a site's records as its configuration says; paths are relative to the configuration file.

    Raises:
        ConfigError: the data cannot be read or do not fit the agreement.
    """
    shape = modality.shape
    match data:
        case TableData():
            columns = data.feature_columns or None
            return datasets.load_table(
                base / data.path,
                label_column=data.label_column,
                feature_columns=columns,
                patient_column=data.patient_column,
                shape=shape,
                classes=classes,
            )
        case ArrayData():
            return datasets.load_arrays(base / data.path, shape=shape, classes=classes)
        case EntryPointData():
            sys.path.insert(0, str((base / data.folder).resolve()))
            importlib.invalidate_caches()
            return datasets.load_entry_point(data.function, shape=shape, classes=classes)


class NodeProcess:
    """One study at one hospital. Everything that can be refused is refused in the constructor."""

    def __init__(self, config: NodeConfig, base: Path, identity: Identity, report: Report) -> None:
        self._config, self._base, self._identity, self._report = config, base, identity, report
        self._study: OpenStudy = open_study(config.study, base, now=datetime.now(UTC))
        self._study.check_identity(identity, "hospital")
        agreement = self._study.agreement
        member = agreement.member(identity.node_id)
        modality = agreement.modality(member.modality)
        # Torch is slow to import: a study that does not check is refused before it.
        from secgeo import training

        whole = epsilon_after(agreement.privacy, agreement.total_steps, agreement.privacy.delta)
        check_policy(agreement, config.policy, epsilon=whole)
        anchors = datasets.load_anchors(
            base / config.study.folder / ANCHORS / f"{modality.name}.npy", modality, agreement.anchors.count
        )
        records = load_records(config.data, base, modality, agreement.study.classes)
        self._held_out = None
        if config.evaluation is not None:
            self._held_out = load_records(config.evaluation, base, modality, agreement.study.classes)
        device = None if config.device == "auto" else config.device
        self._trainer = training.LocalTrainer(
            agreement, member, records, anchors, noise=NoiseSource(), device=device, autocast=config.autocast
        )
        self._layout = Layout.from_agreement(agreement)
        folder = base / config.state / f"{agreement.study.id}-{self._study.agreement_digest.hex()[:16]}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        # Keyed by the site's identity: a bare hash of the data would confirm guesses at them to whoever reads the ledger.
        keyed = hashlib.sha256(identity.sign(Label.DATASET, bytes.fromhex(records.fingerprint))).hexdigest()
        self._site = SiteBudget(folder.parent / SITE_BUDGET, keyed, records.identities)
        # As the dataset's key, a signature that never leaves this process: who has the identity's keys has it, and nobody else.
        wrapping = hashlib.sha256(identity.sign(Label.KEEP_STUDY_KEY, self._study.agreement_digest)).digest()
        self._journal = NodeJournal(folder, wrapping)
        progress = self._journal.progress()
        link = GENESIS if progress is None else progress.link
        digest, most = self._study.agreement_digest, config.policy.max_epsilon
        self._budget = Budget(agreement, digest, identity, self._site, folder / LEDGER, keyed, most, link)
        self._ciphers = Sandboxes()
        self._state = SharedState.initial(agreement)
        self._restore(progress)
        entry = self._study.roster.aggregator
        self._server_key = entry.curve_public
        self._machine = machine.NodeMachine(
            self._study.parties,
            identity,
            (entry.node_id, entry.public_key),
            self._layout.size,
            coins=os.urandom,
            journal=self._journal,
            completed=0 if progress is None else progress.completed,
            ciphers=self._ciphers,
        )
        self._round_started = 0.0
        fields = {"node": identity.node_id, "modality": modality.name, "records": len(records)}
        if records.patients is not None:
            fields["patients"] = len(set(records.patients))
        self._report("checked", fields | {"epsilon_spent_before": _finite(self._budget.epsilon_of_all()[0])})

    def _restore(self, progress: Progress | None) -> None:
        """Take over what an earlier run of this study had reached."""
        arrays = {} if progress is None else progress.model
        if progress is not None:
            shared = {
                name.removeprefix("shared/"): array for name, array in arrays.items() if name.startswith("shared/")
            }
            self._state = SharedState.from_arrays(self._study.agreement, shared)
            self._trainer.load_shared(self._state)
        local = self._journal.trained_model() or arrays
        if local:
            self._trainer.load_local_state(
                {name.removeprefix("local/"): array for name, array in local.items() if name.startswith("local/")}
            )

    @property
    def ledger_path(self) -> Path:
        """Where this node's ledger of this study is."""
        return self._folder / LEDGER

    def run(self) -> None:
        """Take part until the study ends.

        Raises:
            TransportError: the aggregator cannot be reached, refuses us, or falls silent.
            RemoteProtocolError: the aggregator or a peer broke the protocol; we have left.
            BudgetExceeded: our budget is spent; we have left in good order.
            ConfigError: the ledger cannot be closed.
        """
        try:
            self._take_part()
        except BaseException:
            with suppress(Exception):  # what ended the study counts; a ledger without its closing line tells the other
                self._close()
            raise
        self._close()

    def _close(self) -> None:
        """Claim what was spent, and close everything, whatever of it fails."""
        with ExitStack() as closing:
            for part in (self._ciphers, self._journal, self._site, self._budget):
                closing.callback(part.close)
            self._budget.claim()

    def _take_part(self) -> None:
        deadlines = self._study.agreement.deadlines
        silence = SILENCE_FACTOR * max(deadlines.join_seconds, deadlines.train_seconds, deadlines.phase_seconds)
        with NodeEndpoint(
            self._config.aggregator_address,
            curve_secret=self._identity.curve_secret,
            curve_public=self._identity.curve_public,
            server_curve_public=self._server_key,
        ) as endpoint:
            if not self._wait_connected(endpoint):
                return
            self._report("connected", {"address": self._config.aggregator_address})
            self._carry(endpoint, self._machine.start())
            heard, connections = time.monotonic(), endpoint.connections
            while not self._machine.ended:
                data = endpoint.receive(POLL_SECONDS)
                if data is None and endpoint.state != "connected" and not self._wait_connected(endpoint):
                    return
                if endpoint.connections != connections:
                    connections = endpoint.connections
                    self._report("reconnected", {"address": self._config.aggregator_address})
                    self._carry(endpoint, self._machine.rejoin())
                if data is not None:
                    heard = time.monotonic()
                    self._carry(endpoint, self._machine.receive(data))
                elif time.monotonic() - heard > silence:
                    raise TransportError(f"the aggregator said nothing for {silence:.0f} seconds; ask its operator")

    def _wait_connected(self, endpoint: NodeEndpoint) -> bool:
        """Whether there is a connection; there need be none once every sum is here."""
        try:
            endpoint.wait_connected(self._study.agreement.deadlines.join_seconds)
        except TransportError:
            if not self._machine.finished:
                raise
            self._report("ended", {"reason": "all rounds are done", "ledger": str(self.ledger_path)})
            return False
        return True

    def _carry(self, endpoint: NodeEndpoint, outputs: list[machine.Output]) -> None:
        queue = deque(outputs)
        while queue:
            output = queue.popleft()
            match output:
                case machine.Send():
                    endpoint.send(output.data)
                case machine.Train():
                    queue.extend(self._train(endpoint, output.round))
                case machine.Summed():
                    self._apply(output)
                case machine.RoundLost():
                    self._report("lost", {"round": output.round, "reason": output.reason, "final": output.final})
                case machine.Ended():
                    self._report("ended", {"reason": output.reason, "ledger": str(self.ledger_path)})

    def _train(self, endpoint: NodeEndpoint, round_number: int) -> list[machine.Output]:
        kept = self._journal.update(round_number)
        if kept is not None:
            self._report("resumed", {"round": round_number})
            return self._machine.submit(round_number, kept)
        if self._journal.ballot(round_number):
            raise ConfigError(
                f"we have voted in round {round_number}, but the update is no longer in {self._folder}; put back the folder as it was"
            )
        self._round_started = time.monotonic()
        steps = private_steps(self._study.agreement, self._state)
        try:
            self._budget.book(round_number, steps)
        except BudgetExceeded:
            for output in self._machine.decline("the privacy budget of this node is spent"):
                if isinstance(output, machine.Send):
                    endpoint.send(output.data)
            raise
        update = self._trainer.train_round(self._state)
        if update.steps != steps:
            raise ConfigError(f"{update.steps} steps were taken but {steps} were booked; stop and report this")
        vector = update.vector(self._layout)
        share = self._study.agreement.noise_share
        if share and steps:
            vector = add_noise_share(vector, self._layout, share)
        self._journal.keep_update(round_number, vector, self._local_arrays())
        self._report("trained", {"round": round_number, "seconds": round(time.monotonic() - self._round_started, 3)})
        return self._machine.submit(round_number, vector)

    def _apply(self, summed: machine.Summed) -> None:
        self._state = apply_sum(self._state, self._layout, summed.total, self._study.agreement)
        self._budget.link = line_digest(summed.line).hex()
        shared = {f"shared/{name}": value for name, value in self._state.to_arrays().items()}
        self._journal.keep_progress(summed.round, self._budget.link, shared | self._local_arrays())
        epsilon = self._budget.claim()
        self._trainer.load_shared(self._state)
        fields: dict[str, object] = {
            "round": summed.round,
            "contributors": len(summed.contributors),
            "epsilon": _finite(epsilon),
            "delta": self._study.agreement.privacy.delta,
        }
        if self._state.gram is not None:
            fields["cka"] = round(debiased_cka(self._trainer.anchor_gram(), self._state.gram), 4)
        if self._held_out is not None:
            fields["accuracy"] = round(self._trainer.evaluate(self._held_out.features, self._held_out.labels), 4)
        self._report("round", fields)
        self._checkpoint()

    def _local_arrays(self) -> dict[str, np.ndarray]:
        return {f"local/{name}": value for name, value in self._trainer.local_state().items()}

    def _checkpoint(self) -> None:
        """Publish the model of the latest round as a file: shared state and local parameters, plus embeddings if asked for."""
        shared = {f"shared/{name}": value for name, value in self._state.to_arrays().items()}
        partial = self._folder / "model.partial.npz"
        np.savez(partial, allow_pickle=False, **shared, **self._local_arrays())
        partial.replace(self._folder / "model.npz")
        if self._config.embeddings is not None and self._held_out is not None:
            np.save(
                self._base / self._config.embeddings, self._trainer.embed(self._held_out.features), allow_pickle=False
            )


def _finite(epsilon: float) -> float | None:
    return epsilon if np.isfinite(epsilon) else None


def run_node(config: NodeConfig, base: Path, passphrase: bytes | None, report: Report) -> None:
    """Take part in one study.

    Raises:
        SecGeoError: the first check that fails, before any training; or what ended the study early.
    """
    try:
        identity = Identity.load(base / config.keys, passphrase)
        NodeProcess(config, base, identity, report).run()
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"a file cannot be used: {error}") from None
