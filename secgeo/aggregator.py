"""The aggregator's process: carries the study machine's outputs to sockets and files. Imports no torch, holds no patient data."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from keys.errors import ConfigError
from keys.files import write_public
from keys.identity import Identity
from protocols import study_aggregator as machine
from protocols.encoding import Uint32Vector
from protocols.transcript import TranscriptWriter
from secgeo.config import AggregatorConfig
from secgeo.records import TRANSCRIPT, LineFile, read_sum, write_sum
from secgeo.study import OpenStudy, open_study
from secgeo.transport import AggregatorEndpoint
from secgeo.update import Layout

Report = Callable[[str, dict[str, object]], None]
"""Called with an event name and plain fields, for the operator's screen or log."""

POLL_SECONDS = 0.2
BUSY_POLL_SECONDS = 0.005


class AggregatorProcess:
    """One study at the aggregator, from `run` to its end."""

    def __init__(self, config: AggregatorConfig, base: Path, identity: Identity, report: Report) -> None:
        self._study: OpenStudy = open_study(config.study, base, now=datetime.now(UTC))
        self._study.check_identity(identity, "aggregator")
        self._records = base / config.records
        self._report = report
        self._address = config.listen_address
        self._identity = identity
        self._lines: dict[int, bytes] = {}
        self._opened: int | None = None
        self._stopping = False
        self._outboxes: dict[str, deque[bytes]] = {}
        layout = Layout.from_agreement(self._study.agreement)
        self._machine = machine.AggregatorMachine(
            self._study.parties, identity, layout.size, TranscriptWriter(identity), load_sum=self._load_sum
        )
        self._records.mkdir(parents=True, exist_ok=True)
        self._transcript = LineFile(self._records / TRANSCRIPT)
        for name, document in self._study.documents.items():
            write_public(self._records / name, document)

    def run(self) -> None:
        """Listen until the study ends, or until SIGTERM or SIGINT.

        Raises:
            TransportError: the address cannot be bound.
        """
        members = self._study.public_keys
        allowed = {key: node for key, node in self._study.roster.curve_to_node.items() if node in members}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stopping", True))
        with AggregatorEndpoint(
            self._address,
            curve_secret=self._identity.curve_secret,
            curve_public=self._identity.curve_public,
            allowed=allowed,
        ) as endpoint:
            self._report("listening", {"address": endpoint.address, "process": os.getpid()})
            self._carry(endpoint, self._machine.start(time.monotonic()))
            refused = 0
            while not self._machine.ended:
                self._flush(endpoint)
                received = endpoint.receive(BUSY_POLL_SECONDS if self._outboxes else POLL_SECONDS)
                now = time.monotonic()
                if received is not None:
                    self._carry(endpoint, self._machine.receive(*received, now))
                self._carry(endpoint, self._machine.tick(now))
                if self._stopping:
                    self._carry(endpoint, self._machine.stop("stopped by the operator", now))
                if endpoint.refused_handshakes > refused:
                    refused = endpoint.refused_handshakes
                    self._report("refused", {"handshakes": refused})
            self._flush(endpoint)
        self._transcript.close()

    def _carry(self, endpoint: AggregatorEndpoint, outputs: list[machine.Output]) -> None:
        queue = deque(outputs)
        while queue:
            output = queue.popleft()
            match output:
                case machine.SendTo():
                    self._outboxes.setdefault(output.peer, deque()).append(output.data)
                case machine.SumOpened():
                    write_sum(self._records, output.round, output.total)
                    self._opened = output.round
                case machine.Record():
                    self._transcript.append(output.line)
                    if self._opened is not None:
                        self._lines[self._opened], self._opened = output.line, None
                case machine.Progress():
                    self._report(output.event, output.fields)

    def _flush(self, endpoint: AggregatorEndpoint) -> None:
        """Send what the peers' queues take; what a full queue leaves behind is tried again, a lost peer's is dropped."""
        for peer in list(self._outboxes):
            outbox = self._outboxes[peer]
            while outbox and endpoint.send(peer, outbox[0]):
                outbox.popleft()
            if outbox and peer in endpoint.connected:
                continue
            del self._outboxes[peer]
            if outbox:
                self._carry(endpoint, self._machine.leave(peer, time.monotonic()))

    def _load_sum(self, round_number: int) -> tuple[bytes, Uint32Vector]:
        return self._lines[round_number], read_sum(self._records, round_number)


def run_aggregator(config: AggregatorConfig, base: Path, passphrase: bytes | None, report: Report) -> None:
    """Run one study.

    Raises:
        SecGeoError: the first check that fails, before the port is opened; see `secgeo.study.open_study`.
    """
    try:
        identity = Identity.load(base / config.keys, passphrase)
        AggregatorProcess(config, base, identity, report).run()
    except OSError as error:
        raise ConfigError(f"a file cannot be used: {error}") from None
