"""The aggregator's process: carries the study machine's outputs to sockets and files. Imports no torch, holds no patient data.

Started again after a crash, it reads its transcript and its journal and goes on with the study.
"""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from keys.errors import ConfigError
from keys.files import write_public
from keys.identity import Identity
from protocols import study_aggregator as machine
from protocols.rings import make_ring
from protocols.transcript import RoundRecord, StudyOpened, TranscriptWriter, read_transcript
from secgeo.config import AggregatorConfig
from secgeo.descriptors import Reserve
from secgeo.journal import AggregatorJournal
from secgeo.records import TRANSCRIPT, LineFile, forget_sums, read_sum, write_sum
from secgeo.sandbox import Sandboxes
from secgeo.spool import DiskSpool
from secgeo.study import OpenStudy, open_study
from secgeo.transport import AggregatorEndpoint
from secgeo.update import Layout

Report = Callable[[str, dict[str, object]], None]
"""Called with an event name and plain fields, for the operator's screen or log."""

POLL_SECONDS = 0.2
BUSY_POLL_SECONDS = 0.005
COUNTED_SECONDS = 1.0
"""More of the time that one step of the machine takes does not count against anybody's deadline."""

OUTBOX_SUMS, OUTBOX_BYTES = 3, 64 << 20
"""So much may wait for one peer: three sums, and the messages of an attempt."""


class WorkClock:
    """The time that deadlines are measured in. While the machine works nobody is heard, so its long steps are left out.

    An upload over which a sandbox hangs would else cost everybody whose messages wait behind it their deadline.
    """

    def __init__(self, source: Callable[[], float] = time.monotonic) -> None:
        self._source, self._left_out = source, 0.0

    def now(self) -> float:
        """Seconds, from an arbitrary beginning."""
        return self._source() - self._left_out

    @contextmanager
    def step(self) -> Iterator[float]:
        """A step of the machine; gives the time at its beginning."""
        started = self._source()
        yield started - self._left_out
        self._left_out += max(0.0, self._source() - started - COUNTED_SECONDS)


class AggregatorProcess:
    """One study at the aggregator, from `run` to its end."""

    def __init__(self, config: AggregatorConfig, base: Path, identity: Identity, report: Report) -> None:
        self._study: OpenStudy = open_study(config.study, base, now=datetime.now(UTC))
        self._study.check_identity(identity, "aggregator")
        self._records = base / config.records
        self._report = report
        self._address = config.listen_address
        self._identity = identity
        self._stopping = False
        self._clock = WorkClock()
        self._outboxes: dict[str, deque[bytes]] = {}
        self._queued_bytes: Counter[str] = Counter()
        layout = Layout.from_agreement(self._study.agreement)
        sum_bytes = make_ring(self._study.agreement).zeros(layout.size).nbytes
        self._outbox_limit_bytes = OUTBOX_SUMS * sum_bytes + OUTBOX_BYTES
        self._records.mkdir(parents=True, exist_ok=True)
        study = f"{self._study.agreement.study.id}-{self._study.agreement_digest.hex()[:16]}"
        self._state = base / (config.state or f"{config.records}.state") / study
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._transcript = LineFile(self._records / TRANSCRIPT)
        self._journal = AggregatorJournal(self._state)
        self._reserve = Reserve()
        self._ciphers = Sandboxes()
        dtype = make_ring(self._study.agreement).dtype
        self._machine = machine.AggregatorMachine(
            self._study.parties,
            identity,
            layout.size,
            TranscriptWriter(identity, self._transcript.lines),
            load_sum=lambda number: read_sum(self._records, number, dtype, self._reserve),
            spool=DiskSpool(self._state, 4 * layout.size, self._reserve),
            ciphers=self._ciphers,
        )

    def _begin(self) -> list[machine.Output]:
        """Open the study, or take it up where a crash has left it."""
        now, key = self._clock.now(), self._identity.public_key
        lines = read_transcript(b"".join(self._transcript.lines), key)
        bodies = [body for body, _ in lines]
        opened = bodies[0] if bodies else None
        if bodies and not (
            isinstance(opened, StudyOpened) and opened.agreement_digest == self._study.agreement_digest.hex()
        ):
            raise ConfigError(f"{self._records} holds the records of another study; choose another folder")
        for name, document in self._study.documents.items():
            write_public(self._records / name, document)
        forget_sums(self._records, [body.round for body in bodies if isinstance(body, RoundRecord)])
        if not lines:
            return self._machine.start(now)
        return self._machine.resume(machine.Kept(lines, self._journal.attempts(), self._journal.closed()), now)

    def run(self) -> None:
        """Listen until the study ends, or until SIGTERM or SIGINT.

        Raises:
            TransportError: the address cannot be bound.
        """
        members = self._study.public_keys
        allowed = {key: node for key, node in self._study.roster.curve_to_node.items() if node in members}
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stopping", True))
        self._ciphers.start()
        with AggregatorEndpoint(
            self._address,
            curve_secret=self._identity.curve_secret,
            curve_public=self._identity.curve_public,
            allowed=allowed,
        ) as endpoint:
            self._report("listening", {"address": endpoint.address, "process": os.getpid()})
            self._carry(endpoint, self._begin())
            refused = 0
            while not self._machine.ended:
                self._flush(endpoint)
                self._reserve.refill()
                received = endpoint.receive(BUSY_POLL_SECONDS if self._outboxes else POLL_SECONDS)
                if received is not None:
                    with self._clock.step() as now:
                        outputs = self._machine.receive(*received, now)
                    self._carry(endpoint, outputs)
                with self._clock.step() as now:
                    outputs = self._machine.tick(now)
                self._carry(endpoint, outputs)
                if self._stopping:
                    self._carry(endpoint, self._machine.stop("stopped by the operator", self._clock.now()))
                if endpoint.refused_handshakes > refused:
                    refused = endpoint.refused_handshakes
                    self._report("refused", {"handshakes": refused})
            self._flush(endpoint)
        self._transcript.close()
        self._journal.close()
        self._reserve.close()
        self._ciphers.close()

    def _carry(self, endpoint: AggregatorEndpoint, outputs: list[machine.Output]) -> None:
        queue = deque(outputs)
        while queue:
            output = queue.popleft()
            match output:
                case machine.SendTo():
                    self._outboxes.setdefault(output.peer, deque()).append(output.data)
                    self._queued_bytes[output.peer] += len(output.data)
                    if self._queued_bytes[output.peer] > self._outbox_limit_bytes:
                        queue.extend(self._give_up(output.peer))  # It asks, and does not read.
                case machine.Begun():
                    self._journal.begun(output.round, output.attempt)
                case machine.UploadsClosed():
                    self._journal.keep_closed(output.state, output.masked, self._reserve)
                case machine.SumOpened():
                    write_sum(self._records, output.round, output.total, self._reserve)
                case machine.Record():
                    self._transcript.append(output.line)
                case machine.Progress():
                    self._report(output.event, output.fields)

    def _flush(self, endpoint: AggregatorEndpoint) -> None:
        """Send what the peers' queues take; what a full queue leaves behind is tried again, a lost peer's is dropped."""
        for peer in list(self._outboxes):
            outbox = self._outboxes.get(peer, deque())  # another one's leaving may have emptied it
            while outbox and endpoint.send(peer, outbox[0]):
                self._queued_bytes[peer] -= len(outbox.popleft())
            if not outbox:
                self._outboxes.pop(peer, None)
            elif peer not in endpoint.connected:
                self._carry(endpoint, self._give_up(peer))

    def _give_up(self, peer: str) -> list[machine.Output]:
        """Forget what was to be sent to a peer that is gone, or that does not read."""
        self._outboxes.pop(peer, None)
        self._queued_bytes.pop(peer, None)
        return self._machine.leave(peer, self._clock.now())


def _raise_file_limit() -> None:
    """As many connections as the system allows: a stranger that holds them open must leave some for hospitals."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_aggregator(config: AggregatorConfig, base: Path, passphrase: bytes | None, report: Report) -> None:
    """Run one study.

    Raises:
        SecGeoError: the first check that fails, before the port is opened; see `secgeo.study.open_study`.
    """
    try:
        _raise_file_limit()
        identity = Identity.load(base / config.keys, passphrase)
        AggregatorProcess(config, base, identity, report).run()
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"a file cannot be used: {error}") from None
