"""The network of `tests.protocols.network` over real CURVE sockets on loopback: the same machines, the same taps.

`over_sockets` lets an attack of the other files run over sockets unchanged. The clock is the real one, but it jumps to the next deadline
when every message that was sent has come: nobody need wait for what a silent party will not send.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from audit.attacks.network import Hangs
from protocols.study_aggregator import Stage
from secgeo.transport import AggregatorEndpoint, NodeEndpoint, TransportLimits
from tests.keys.factory import AGGREGATOR
from tests.protocols import network as memory
from tests.protocols.network import Network

PATIENCE_SECONDS = 30.0
IDLE_SECONDS = 1.0
"""So long after its deadline an aggregator that has nothing to do hangs."""
LIMITS = TransportLimits(
    handshake_seconds=2.0, connect_seconds=2.0, reconnect_min_seconds=0.05, reconnect_max_seconds=0.2
)


class WireNetwork(Network):
    """One study over sockets. `run` opens the port, dials in, and closes everything at the end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.limits = LIMITS
        self.members: dict[bytes, str] = {}
        """Whom the door lets in: CURVE key -> name. By default who is in the agreement."""
        self.links: dict[str, NodeEndpoint] = {}
        self.outboxes: dict[str, deque[bytes]] = {}
        self._under_way: Counter[tuple[str, str]] = Counter()
        """By (sender, recipient): what the sockets have taken and not yet given."""

    def start(self, *arguments: object, **options: object) -> None:
        self._opened = ExitStack()
        identities = self.consortium.identities
        members = self.members or {identities[name].curve_public: name for name in self.nodes}
        server = identities[AGGREGATOR]
        self.endpoint = self._opened.enter_context(
            AggregatorEndpoint(
                "tcp://127.0.0.1:*",
                curve_secret=server.curve_secret,
                curve_public=server.curve_public,
                allowed=members,
                limits=self.limits,
            )
        )
        for name in self.nodes:
            self.links[name] = self._opened.enter_context(self.dial(name))
        for name, link in self.links.items():
            if identities[name].curve_public in members:
                link.wait_connected(PATIENCE_SECONDS)
        self._epoch = time.monotonic()
        super().start(*arguments, **options)  # type: ignore[arg-type]

    def dial(self, name: str) -> NodeEndpoint:
        """A connection of one node."""
        identity = self.consortium.identities[name]
        return NodeEndpoint(
            self.endpoint.address,
            curve_secret=identity.curve_secret,
            curve_public=identity.curve_public,
            server_curve_public=self.consortium.identities[AGGREGATOR].curve_public,
            limits=self.limits,
        )

    def finish(self) -> None:
        """Carry messages until the study is over and its end has reached every node that still listens."""
        patience, idle = time.monotonic() + PATIENCE_SECONDS, 0.0
        with self._opened:
            while not self._over():
                if time.monotonic() > patience or 0.0 < idle < time.monotonic() - IDLE_SECONDS:
                    raise Hangs("the study neither ended nor made progress")
                self._carry()
                if not self._quiet:
                    idle = 0.0
                elif self.now < self.aggregator.deadline:
                    self._epoch -= self.aggregator.deadline - self.now
                else:
                    idle = idle or time.monotonic()

    @property
    def _quiet(self) -> bool:
        """Whether nothing is under way, but to those who have left."""
        return not self._queue and not any(
            count > 0 and recipient not in self.faults for (_, recipient), count in self._under_way.items()
        )

    def _over(self) -> bool:
        if not any(name not in self.faults and not node.ended for name, node in self.nodes.items()):
            return self.aggregator.stage in (Stage.FAREWELL, Stage.ENDED)  # who has left says no farewell
        return self.aggregator.ended and self._quiet

    def _carry(self) -> None:
        if not self.aggregator.ended:
            self.now = time.monotonic() - self._epoch
        while self._queue:
            sender, recipient, data = self._queue.popleft()
            if recipient == AGGREGATOR:
                self.links[sender].send(data)
                self._under_way[sender, AGGREGATOR] += 1
            else:
                self.outboxes.setdefault(recipient, deque()).append(data)
        for name, outbox in list(self.outboxes.items()):
            while outbox and self.endpoint.send(name, outbox[0]):
                outbox.popleft()
                self._under_way[AGGREGATOR, name] += 1
            if outbox and name not in self.endpoint.connected:
                del self.outboxes[name]
                self._from_aggregator(self.aggregator.leave(name, self.now))
        received = self.endpoint.receive(0.001)
        if received is not None:
            self._under_way[received[0], AGGREGATOR] -= 1
            self._from_aggregator(self.aggregator.receive(*received, self.now))
        self._from_aggregator(self.aggregator.tick(self.now))
        for name, link in self.links.items():
            data = None if name in self.faults else link.receive(0.0)
            if data is not None:
                self._under_way[AGGREGATOR, name] -= 1
                self._deliver(AGGREGATOR, name, data)
            if name in self.faults:
                link.close()


def make_wire_network(*arguments: int, **settings: object) -> WireNetwork:
    """As `make_network`, over sockets."""
    plain = memory.make_network(*arguments, **settings)  # type: ignore[arg-type]
    return WireNetwork(plain.consortium, plain.agreement, plain.vectors, plain.size)


@contextmanager
def over_sockets(module: ModuleType) -> Iterator[None]:
    """The attacks of this module run over sockets."""
    with mock.patch.object(module, "make_network", make_wire_network):
        yield
