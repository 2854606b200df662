"""The network of `tests.protocols.network` over real CURVE sockets on loopback: the same machines, the same taps, real time.

`over_sockets` lets an attack of the other files run over sockets unchanged.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import msgspec

from audit.attacks.network import Hangs
from protocols.agreement import Deadlines, read_agreement, write_agreement
from protocols.study_aggregator import Stage
from secgeo.transport import AggregatorEndpoint, NodeEndpoint, TransportLimits
from tests.keys.factory import AGGREGATOR
from tests.protocols import network as memory
from tests.protocols.network import Network

PHASE_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
LIMITS = TransportLimits(
    handshake_seconds=2.0, connect_seconds=2.0, reconnect_min_seconds=0.05, reconnect_max_seconds=0.2
)


class WireNetwork(Network):
    """One study over sockets. `run` opens the port, dials in, and closes everything at the end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.members: dict[bytes, str] = {}
        """Whom the door lets in: CURVE key -> name. By default who is in the agreement."""
        self.links: dict[str, NodeEndpoint] = {}
        self.outboxes: dict[str, deque[bytes]] = {}

    def start(self, *arguments: object, **options: object) -> None:
        self.now, self._opened = time.monotonic(), ExitStack()
        identities = self.consortium.identities
        members = self.members or {identities[name].curve_public: name for name in self.nodes}
        server = identities[AGGREGATOR]
        self.endpoint = self._opened.enter_context(
            AggregatorEndpoint(
                "tcp://127.0.0.1:*",
                curve_secret=server.curve_secret,
                curve_public=server.curve_public,
                allowed=members,
                limits=LIMITS,
            )
        )
        for name in self.nodes:
            self.links[name] = self._opened.enter_context(self.dial(name))
        for name, link in self.links.items():
            if identities[name].curve_public in members:
                link.wait_connected(PATIENCE_SECONDS)
        super().start(*arguments, **options)  # type: ignore[arg-type]

    def dial(self, name: str) -> NodeEndpoint:
        """A connection of one node."""
        identity = self.consortium.identities[name]
        return NodeEndpoint(
            self.endpoint.address,
            curve_secret=identity.curve_secret,
            curve_public=identity.curve_public,
            server_curve_public=self.consortium.identities[AGGREGATOR].curve_public,
            limits=LIMITS,
        )

    def finish(self) -> None:
        """Carry messages until the study is over and its end has reached every node that still listens."""
        patience = time.monotonic() + PATIENCE_SECONDS
        with self._opened:
            while not self._over():
                if time.monotonic() > patience:
                    raise Hangs("the study neither ended nor made progress")
                self._carry()

    def _over(self) -> bool:
        if not any(name not in self.faults and not node.ended for name, node in self.nodes.items()):
            return self.aggregator.stage in (Stage.FAREWELL, Stage.ENDED)  # who has left says no farewell
        return self.aggregator.ended and time.monotonic() > self.now + 0.5

    def _carry(self) -> None:
        if not self.aggregator.ended:
            self.now = time.monotonic()
        while self._queue:
            sender, recipient, data = self._queue.popleft()
            if recipient == AGGREGATOR:
                self.links[sender].send(data)
            else:
                self.outboxes.setdefault(recipient, deque()).append(data)
        for name, outbox in list(self.outboxes.items()):
            while outbox and self.endpoint.send(name, outbox[0]):
                outbox.popleft()
            if outbox and name not in self.endpoint.connected:
                del self.outboxes[name]
                self._from_aggregator(self.aggregator.leave(name, self.now))
        received = self.endpoint.receive(0.001)
        if received is not None:
            self._from_aggregator(self.aggregator.receive(*received, self.now))
        self._from_aggregator(self.aggregator.tick(self.now))
        for name, link in self.links.items():
            data = None if name in self.faults else link.receive(0.0)
            if data is not None:
                self._deliver(AGGREGATOR, name, data)
            if name in self.faults:
                link.close()


def make_wire_network(*arguments: int, **settings: object) -> WireNetwork:
    """As `make_network`, with short deadlines."""
    plain = memory.make_network(*arguments, **settings)  # type: ignore[arg-type]
    deadlines = Deadlines(10.0, PHASE_SECONDS, PHASE_SECONDS)
    agreement = read_agreement(write_agreement(msgspec.structs.replace(plain.agreement, deadlines=deadlines)))
    return WireNetwork(plain.consortium, agreement, plain.vectors, plain.size)


@contextmanager
def over_sockets(module: ModuleType) -> Iterator[None]:
    """The attacks of this module run over sockets."""
    with mock.patch.object(module, "make_network", make_wire_network):
        yield
