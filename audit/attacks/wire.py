"""The study of `audit.attacks.network` with every message over real CURVE sockets on loopback: the transport that hospitals use.

One port, and a connection for each member, with real keys. The door knows the members; the sender of a message is whoever the door has
authenticated. All ends are in this process, so it is known what is under way, and the clock still jumps: a deadline passes when nothing
is, so that a busy machine makes nobody late. A line that breaks is not told to the aggregator. It finds out as the real one does: by a
message that cannot be sent, or by a deadline.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

from audit.attacks.network import MESSAGES_AT_MOST, Hangs, Network, NotPlayed, Over
from keys.errors import TransportError
from protocols.messages import AGGREGATOR
from secgeo.transport import AggregatorEndpoint, NodeEndpoint, TransportLimits

PATIENCE_SECONDS = 30.0
"""A study in which something is under way and nothing moves for so long hangs."""
POLL_SECONDS = 0.002
WINDOW = 16
"""So many messages are under way on a line at once, each way: fewer than what its queues hold."""
LIMITS = TransportLimits(
    handshake_seconds=2.0,
    connect_seconds=2.0,
    reconnect_min_seconds=0.05,
    reconnect_max_seconds=0.2,
    linger_seconds=0.1,
)
MEMBER_LIMITS = replace(LIMITS, max_message_bytes=2 * LIMITS.max_message_bytes)
"""A member's own end lets it send what the aggregator's must not take."""

Line = tuple[str, str]
"""From whom to whom."""


class WireNetwork(Network):
    """One study over sockets. `run` opens the port, dials in, and closes everything at the end.

    Attributes:
        limits: the bounds of every connection at the aggregator's end.
        members: whom the door lets in, by CURVE key; if empty, who is in the agreement.
        links: the connection of each node that has one.
    """

    over: ClassVar[Over] = "sockets"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.limits = LIMITS
        self.members: dict[bytes, str] = {}
        self.links: dict[str, NodeEndpoint] = {}
        self._outboxes: dict[Line, deque[bytes]] = defaultdict(deque)
        self._under_way: Counter[Line] = Counter()

    def start(self, absent: Collection[str] = (), order: Callable[[list[str]], list[str]] = sorted) -> None:
        """Open the port, let all members connect, and start all machines.

        Raises:
            NotPlayed: the port cannot be opened, or a member that the door knows does not get in.
        """
        self._opened = ExitStack()
        known = self.members or {self.identities[name].curve_public: name for name in self.nodes}
        server = self.identities[AGGREGATOR]
        try:
            self.endpoint = self._opened.enter_context(
                AggregatorEndpoint(
                    "tcp://127.0.0.1:*",
                    curve_secret=server.curve_secret,
                    curve_public=server.curve_public,
                    allowed=known,
                    limits=self.limits,
                )
            )
            for name in self.nodes:
                self.links[name] = self._opened.enter_context(self.dial(name))
            for name in self.nodes:
                if self.identities[name].curve_public in known:
                    self.links[name].wait_connected(PATIENCE_SECONDS)
        except TransportError as error:
            self._opened.close()
            raise NotPlayed(str(error)) from None
        with self._opened.pop_all() as opened:
            super().start(absent, order)
            self._opened = opened.pop_all()

    def dial(self, name: str) -> NodeEndpoint:
        """A connection of one node, with its real key."""
        identity = self.identities[name]
        return NodeEndpoint(
            self.endpoint.address,
            curve_secret=identity.curve_secret,
            curve_public=identity.curve_public,
            server_curve_public=self.identities[AGGREGATOR].curve_public,
            limits=MEMBER_LIMITS,
        )

    def finish(self) -> None:
        """Carry messages, and let time pass when none is under way, until the study is over; then close everything."""
        moved, steps = time.monotonic(), 0
        with self._opened:
            while steps < MESSAGES_AT_MOST:
                if self._carry():
                    moved = time.monotonic()
                elif self._waits():
                    if time.monotonic() > moved + PATIENCE_SECONDS:
                        break
                    continue
                elif self._over():
                    return
                else:
                    self.pass_time()
                steps += 1
        raise Hangs("the study neither ended nor made progress")

    def lose(self, name: str) -> None:
        """The connection of a node breaks, for good, with all that waits for it. Nobody is told."""
        if name in self.links:
            self.links.pop(name).close()
        self._forget_link(name)
        for line in ((name, AGGREGATOR), (AGGREGATOR, name)):
            self._outboxes.pop(line, None)
            self._under_way.pop(line, None)

    def disconnect(self, name: str) -> None:
        """The connection of a node breaks, and the node dials again."""
        self.lose(name)
        self.links[name] = self._opened.enter_context(self.dial(name))
        self.links[name].wait_connected(PATIENCE_SECONDS)
        self._from_node(name, self.nodes[name].rejoin())

    def _over(self) -> bool:
        return self.aggregator.ended

    def _waits(self) -> bool:
        """Whether a message is under way."""
        return bool(self._queue) or any(self._outboxes.values()) or any(self._under_way.values())

    def _carry(self) -> bool:
        """Send what waits, and hand out what has come; says whether anything moved."""
        while self._queue:
            sender, recipient, data = self._queue.popleft()
            if {sender, recipient} & self.links.keys():
                self._outboxes[sender, recipient].append(data)
        moved = False
        for line in list(self._outboxes):
            moved |= self._send(line)
        if not moved:
            for name in [name for line in +self._under_way for name in line if name in self.links]:
                if self.links[name].state != "connected":
                    self.lose(name)  # the door has cut it off
        return self._hear(0.0) or moved or self._hear(POLL_SECONDS)

    def _send(self, line: Line) -> bool:
        """Send what the line takes; what is for a node that is gone is dropped, and the aggregator knows it then."""
        (sender, recipient), moved = line, False
        while (outbox := self._outboxes.get(line)) and self._under_way[line] < WINDOW:
            if recipient == AGGREGATOR and self.links[sender].state != "connected":
                self.lose(sender)
                return True
            if recipient == AGGREGATOR:
                self.links[sender].send(outbox.popleft())
            elif self.endpoint.send(recipient, outbox[0]):
                outbox.popleft()
            elif recipient in self.endpoint.connected:
                break  # its queue is full
            else:
                self._outboxes.pop(line)
                self._from_aggregator(self.aggregator.leave(recipient, self.now))
                return True
            self._under_way[line] += 1
            moved = True
        return moved

    def _hear(self, timeout_seconds: float) -> bool:
        """Hand out what has come; says whether there was anything. Whoever left in a fault hangs up."""
        moved, due = False, {recipient for _, recipient in +self._under_way}
        while (received := self.endpoint.receive(timeout_seconds if AGGREGATOR in due else 0.0)) is not None:
            moved, timeout_seconds = True, 0.0
            self._came((received[0], AGGREGATOR), received[1])
        for name in [name for name in self.links if name in due]:
            while self._under_way[AGGREGATOR, name] and (data := self.links[name].receive(timeout_seconds)) is not None:
                moved, timeout_seconds = True, 0.0
                self._came((AGGREGATOR, name), data)
                if name in self.faults:
                    self.lose(name)
                    break
        return moved

    def _came(self, line: Line, data: bytes) -> None:
        self._under_way[line] = max(0, self._under_way[line] - 1)
        self._deliver(*line, data)
