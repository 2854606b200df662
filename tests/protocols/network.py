"""Studies for the tests: `audit.attacks.network` among members of a consortium, with machines that crash and start again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar

import msgspec
import numpy as np

from audit.attacks import network as memory
from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols import transcript
from protocols.agreement import (
    Agreement,
    Anchors,
    Deadlines,
    Member,
    Modality,
    Model,
    Precision,
    Privacy,
    RosterPin,
    SecureSum,
    Study,
    Training,
    fit_ciphertexts,
    read_agreement,
    write_agreement,
)
from protocols.attempt_aggregator import ClosedAttempt
from protocols.encoding import Float64Vector
from protocols.packing import choose
from tests.keys.factory import AGGREGATOR, Consortium, make_consortium

PROTOCOL: ContextVar[str] = ContextVar("PROTOCOL", default="masked")
"""What studies sum by, where a test does not say."""


def names(count: int) -> list[str]:
    return [f"hospital-{index:02d}" for index in range(count)]


def make_agreement(
    consortium: Consortium, *, rounds: int = 1, threshold: int | None = None, **secure_sum: object
) -> Agreement:
    hospitals = [name for name in consortium.identities if name != AGGREGATOR]
    n = len(hospitals)
    t = threshold or (n + 1) // 2 + 1
    settings: dict[str, object] = {
        "minimum_cohort": max(3, t),
        "threshold": t,
        "value_bits": 24,
        "fraction_bits": 16,
    } | secure_sum
    if settings.setdefault("protocol", PROTOCOL.get()) == "masked":
        settings.setdefault("chunk_values", 1024)
    else:
        settings.setdefault("chunk_values", choose(settings["value_bits"], n).block_values)  # type: ignore[arg-type]
        fit_ciphertexts(settings, n)
    return Agreement(
        study=Study(id="test", rounds=rounds, classes=2),
        roster=RosterPin(1, 1, consortium.roster.digest.hex(), consortium.authority.fingerprint),
        secure_sum=SecureSum(**settings),  # type: ignore[arg-type]
        privacy=Privacy("record", 0.1, 1.0, 1.0, 1e-5, 8.0),
        training=Training(steps_per_round=2, learning_rate=0.1, local_learning_rate=0.1),
        precision=Precision(),
        model=Model(seed=1, trunk_digest="0" * 64),
        anchors=Anchors(count=16),
        deadlines=Deadlines(10.0, 10.0, 10.0),
        modalities=(Modality("mean", "tabular", (10,), "0" * 64),),
        members=tuple(Member(h, consortium.roster.entry(h).certificate_fingerprint, "mean", 10.0) for h in hospitals),
    )


class Network(memory.Network):
    """The network on which attacks are played, of an enrolled consortium; here parties may crash, too, and start again."""

    def __init__(
        self, consortium: Consortium, agreement: Agreement, vectors: Callable[[str, int], Float64Vector], size: int
    ) -> None:
        super().__init__(consortium.identities, agreement, vectors, size, memory.SharedCiphers())
        self.consortium = consortium
        self.lost: dict[str, list[node.RoundLost]] = {name: [] for name in self.names}
        self.ended: dict[str, str] = {}
        self.attempts: dict[int, int] = {}
        self._closed: tuple[ClosedAttempt, np.ndarray] | None = None
        self._old_connections: set[str] = set()

    def restart_aggregator(self) -> None:
        """The aggregator has crashed, with all that was under way; it starts again, and the nodes connect again."""
        self._queue.clear()
        self.aggregator = self.new_aggregator(self.parties)
        lines = transcript.read_transcript(b"".join(self.lines), self.identities[AGGREGATOR].public_key)
        if lines:
            kept = agg.Kept(lines, dict(self.attempts), self._closed)
            self._from_aggregator(self.aggregator.resume(kept, self.now))
        else:
            self._from_aggregator(self.aggregator.start(self.now))
        for name, machine in self.nodes.items():
            if name not in self.faults and not machine.ended:
                self._from_node(name, machine.rejoin())

    def restart_node(self, name: str) -> None:
        """A node has crashed, with all that was under way to it and from it; it starts again.

        What the aggregator sends before it hears of the new connection is lost with the old one.
        """
        self._forget_link(name)
        self._old_connections.add(name)
        self.nodes[name] = self.new_node(name)
        self._from_node(name, self.nodes[name].start())

    def _deliver(self, sender: str, recipient: str, data: bytes) -> None:
        self._old_connections.discard(sender)
        super()._deliver(sender, recipient, data)

    def _post(self, sender: str, recipient: str, data: bytes) -> None:
        for delivered in self.tap(sender, recipient, data):
            if recipient not in self._old_connections:
                self.inject(sender, recipient, delivered)

    def _from_node(self, name: str, outputs: Sequence[node.Output]) -> None:
        for output in outputs:
            match output:
                case node.RoundLost():
                    self.lost[name].append(output)
                case node.Ended():
                    self.ended[name] = output.reason
                case _:
                    super()._from_node(name, [output])

    def _from_aggregator(self, outputs: Sequence[agg.Output]) -> None:
        for output in outputs:
            match output:
                case agg.Begun():
                    self.attempts[output.round] = output.attempt
                case agg.UploadsClosed():
                    self._closed = output.state, output.masked.copy()
                case _:
                    super()._from_aggregator([output])


def make_network(count: int = 4, *, size: int = 3000, rounds: int = 1, seed: int = 0, **settings: object) -> Network:
    """A study of `size` values; of ciphertexts as many more as give as many chunks."""
    consortium = make_consortium(names(count))
    agreement = make_agreement(consortium, rounds=rounds, **settings)  # type: ignore[arg-type]
    if agreement.secure_sum.encrypted:
        size *= agreement.secure_sum.chunk_values // 1024
    limit = 2.0

    def vectors(name: str, number: int) -> Float64Vector:
        key = [seed, number, *name.encode()]
        return np.random.default_rng(key).uniform(-limit, limit, size)

    return Network(consortium, read_agreement(write_agreement(agreement)), vectors, size)


def head(data: bytes) -> list:
    """The head of a message, undecoded: [version, agreement, round, attempt, sender, [type, ...], signature]."""
    return msgspec.msgpack.decode(data[4 : 4 + int.from_bytes(data[:4])])


def body_type(data: bytes) -> str:
    return str(head(data)[5][0])
