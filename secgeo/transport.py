"""Messages between hospitals and the aggregator: ZeroMQ over CURVE (DESIGN section 12).

A hospital only dials out (DEALER); the aggregator binds one port (ROUTER). Messages are opaque bytes. The network and
strangers are hostile, and a roster member may be. The rules, as measured with libzmq 4.3.5:

- Only CURVE keys of the roster get in (`secgeo.zap`); plaintext peers are cut off.
- The sender is the authenticated `User-Id`, compared with the current roster at every message; routing ids are
  automatic and prove nothing. The revoked are unheard at once; their TCP connections stay until they leave.
- A message has one part and at most `max_message_bytes`. A larger one costs its sender the connection (`MAXMSGSIZE`,
  which also bounds what a stranger can make us allocate); one with more parts is dropped and counted.
- Nothing blocks for ever. A queue, per peer and direction, holds at most `high_water_messages * max_message_bytes`. But
  libzmq counts whole messages: a roster member can fill memory with one of endless parts. Run under a memory limit.
- Delivery is not promised: what is queued when a connection dies is lost. Callers acknowledge and keep deadlines.
- A receiver whose queue is full for longer than `heartbeat_timeout_seconds` loses the connection, since the heartbeats
  wait behind the messages: grant credit.

An endpoint belongs to one thread. After each handshake the node announces itself by an empty message (`PROBE_ROUTER`):
the aggregator knows a new route before the node speaks. libzmq gives up when refused; the node then dials again itself.
"""

from __future__ import annotations

import errno
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from secrets import SystemRandom
from typing import Final, Literal, Self

import zmq
from zmq.utils.monitor import parse_monitor_message

from keys.errors import ConfigError, LocalProtocolError, TransportError
from protocols.encoding import Data
from protocols.messages import MESSAGE_LIMIT_BYTES
from secgeo.zap import (
    KEY_PROPERTY,
    ZAP_DOMAIN,
    Doorkeeper,
    Refusal,
    check_key,
    check_key_pair,
    checked_roster,
    open_monitor,
)

State = Literal["connecting", "connected", "unreachable", "refused", "slow"]

_CURVE_OVERHEAD_BYTES: Final = 33
"""What a CURVE MESSAGE command adds to its payload (RFC 26): name 8, nonce 8, MAC 16, flags 1. MAXMSGSIZE counts it."""
_DROPS_PER_CALL: Final = 1000
"""So many unusable messages one `receive` skips beyond its time limit: a limit of zero still sees what lies behind."""
_ADDRESS = re.compile(r"tcp://(?:\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]):(?P<port>\*|[0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class TransportLimits:
    """Every bound of a connection.

    Attributes:
        max_message_bytes: the largest message, both ways.
        high_water_messages: messages queued per peer and direction before `send` fails and receiving pauses.
        handshake_seconds: a TCP connection without a finished CURVE handshake is closed after this.
        connect_seconds: how long the node waits for the TCP connection.
        send_seconds: how long the node's `send` waits for a connection with room in its queue.
        reconnect_min_seconds: the first pause before the node dials again, times a random factor in [0.5, 1.5].
        reconnect_max_seconds: the pause doubles up to this while the aggregator is unreachable or refuses.
        heartbeat_seconds: a silent connection is tried this often.
        heartbeat_timeout_seconds: a peer that does not answer for this long is gone.
        linger_seconds: how long `close` waits for queued messages to leave.
    """

    max_message_bytes: int = MESSAGE_LIMIT_BYTES
    high_water_messages: int = 32
    handshake_seconds: float = 10.0
    connect_seconds: float = 10.0
    send_seconds: float = 30.0
    reconnect_min_seconds: float = 1.0
    reconnect_max_seconds: float = 30.0
    heartbeat_seconds: float = 10.0
    heartbeat_timeout_seconds: float = 30.0
    linger_seconds: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            # Zero means "no limit" or "never" to libzmq; a day is more than any of these can need.
            value = getattr(self, field.name)
            if not (value >= 1 if isinstance(value, int) else 0.01 <= value <= 86_400.0):
                raise ConfigError(f"transport limit {field.name} = {value} is out of range")
        if self.reconnect_max_seconds < self.reconnect_min_seconds:
            raise ConfigError("reconnect_max_seconds is below reconnect_min_seconds")
        if self.heartbeat_timeout_seconds < self.heartbeat_seconds:
            raise ConfigError("heartbeat_timeout_seconds is below heartbeat_seconds: every quiet peer would be cut off")


DEFAULT_LIMITS: Final = TransportLimits()


class AggregatorEndpoint:
    """The aggregator's one listening port.

    Args:
        address: `tcp://host:port` with a numeric host or `*`, an IPv6 host in brackets; port 0 or `*` takes a free one.
        curve_secret: [32] the aggregator's CURVE secret key.
        curve_public: [32] its public key.
        allowed: the name of the node behind each CURVE public key ([32]) that may connect.
        limits: the bounds of every connection.

    Raises:
        ConfigError: the address or the keys are malformed.
        TransportError: the address cannot be bound.
    """

    def __init__(
        self,
        address: str,
        *,
        curve_secret: bytes,
        curve_public: bytes,
        allowed: Mapping[bytes, str],
        limits: TransportLimits = DEFAULT_LIMITS,
    ) -> None:
        _check_address(address, wildcard=True)
        check_key_pair(curve_secret, curve_public)
        self._limits = limits
        self._routes: dict[str, tuple[bytes, bytes]] = {}  # node id -> (routing id, CURVE key)
        self._dropped: Counter[tuple[str, str]] = Counter()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        _set_limits(self._router, address, limits)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.CURVE_SERVER, 1)
        self._router.setsockopt(zmq.CURVE_SECRETKEY, curve_secret)
        self._router.setsockopt(zmq.CURVE_PUBLICKEY, curve_public)
        self._router.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        self._router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._doorkeeper = Doorkeeper(self._context, self._router, checked_roster(allowed))
        try:
            self._router.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise TransportError(
                f"cannot listen on {address}: {error.strerror}; use a free port and a numeric address of this machine"
            ) from None
        self._address = self._router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the port; queued messages get `linger_seconds` to leave. A second call does nothing."""
        if not self._context.closed:
            self._router.disable_monitor()
            self._router.close()
            self._context.term()
            self._doorkeeper.join()

    @property
    def address(self) -> str:
        """Where this endpoint really listens."""
        return self._address

    @property
    def connected(self) -> frozenset[str]:
        """The nodes that have announced themselves; one that vanished leaves when a `send` to it has failed."""
        return frozenset(self._routes)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The latest handshakes that the roster refused, the oldest first; the rest is only counted."""
        return tuple(self._doorkeeper.refusals)

    @property
    def refused_handshakes(self) -> int:
        """All handshakes that the roster has refused so far."""
        return self._doorkeeper.refused

    @property
    def broken_handshakes(self) -> int:
        """Those that never got to the roster: plaintext, silence, a wrong aggregator key. libzmq hides mere garbage."""
        return self._doorkeeper.broken

    @property
    def dropped(self) -> Mapping[tuple[str, str], int]:
        """How many messages were dropped, by (node id, reason); the node id is empty where none was authenticated."""
        return dict(self._dropped)

    def replace_allowed(self, allowed: Mapping[bytes, str]) -> None:
        """Take a new roster. Who is no longer in it, or under another name, is unheard and unreached from now on.

        Raises:
            ConfigError: a key has not 32 bytes, or a name is empty.
        """
        new = checked_roster(allowed)
        self._doorkeeper.allowed = new
        self._routes = {node: route for node, route in self._routes.items() if new.get(route[1]) == node}

    def receive(self, timeout_seconds: float) -> tuple[str, bytes] | None:
        """The next message and the authenticated name of its sender, or None when none came in time."""
        deadline = time.monotonic() + timeout_seconds
        for _ in range(_DROPS_PER_CALL):
            remaining = max(0.0, deadline - time.monotonic())
            if not self._router.poll(_milliseconds(remaining)):
                return None
            try:
                routing_id, *parts = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                continue
            message = self._accept(routing_id.bytes, parts)
            if message is not None:
                return message
        return None

    def send(self, node_id: str, message: bytes) -> bool:
        """Queue a message for a node; never blocks.

        Returns:
            False if the node is not connected or its queue is full: try later, or give it up at the deadline.

        Raises:
            LocalProtocolError: the message is empty or too large.
        """
        _check_message(message, self._limits)
        if node_id not in self._routes:
            return False
        try:
            self._router.send_multipart([self._routes[node_id][0], message], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise TransportError(f"cannot send to {node_id}: {error.strerror}") from None
            del self._routes[node_id]
            return False
        return True

    def _accept(self, routing_id: bytes, parts: list[zmq.Frame]) -> tuple[str, bytes] | None:
        """The message, unless its sender or its form is wrong; keeps the routes."""
        try:
            node = str(parts[0].get("User-Id"))
            key = bytes.fromhex(str(parts[0].get(KEY_PROPERTY)))
        except (IndexError, ValueError, zmq.ZMQError):
            self._dropped["", "not authenticated"] += 1
            return None
        if self._doorkeeper.allowed.get(key) != node:
            self._dropped[node, "not in the roster any more"] += 1
            return None
        if len(parts) != 1:
            self._dropped[node, "more than one part"] += 1
            return None
        message = parts[0].bytes
        # An announcement comes first on each connection; the rest may be left over from the node's former connection.
        if not message or node not in self._routes:
            self._routes[node] = (routing_id, key)
        return (node, message) if message else None


class NodeEndpoint:
    """A hospital's connection to the aggregator. It dials at once, and again when the connection is lost or refused.

    The states follow the last attempt; dialling and `state` move on while a method of this endpoint is called.

    Args:
        address: `tcp://host:port` of the aggregator, an IPv6 address in brackets; a name is looked up as IPv4.
        curve_secret: [32] the node's CURVE secret key.
        curve_public: [32] its public key.
        server_curve_public: [32] the aggregator's CURVE public key, from the roster.
        limits: the bounds of the connection.

    Raises:
        ConfigError: the address or the keys are malformed.
    """

    def __init__(
        self,
        address: str,
        *,
        curve_secret: bytes,
        curve_public: bytes,
        server_curve_public: bytes,
        limits: TransportLimits = DEFAULT_LIMITS,
    ) -> None:
        _check_address(address, wildcard=False)
        check_key_pair(curve_secret, curve_public)
        check_key(server_curve_public)
        self._address = address
        self._limits = limits
        self._state: State = "connecting"
        self._detail = ""
        self._connections = 0
        self._phase: Literal["dialling", "handshake", "done"] = "dialling"  # of the present attempt
        self._first_pause_seconds = limits.reconnect_min_seconds * SystemRandom().uniform(0.5, 1.5)
        self._pause_seconds = self._first_pause_seconds
        self._redial_at: float | None = None
        self._dropped = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        _set_limits(self._dealer, address, limits)
        self._dealer.setsockopt(zmq.IMMEDIATE, 1)
        self._dealer.setsockopt(zmq.PROBE_ROUTER, 1)
        self._dealer.setsockopt(zmq.CONNECT_TIMEOUT, _milliseconds(limits.connect_seconds))
        self._dealer.setsockopt(zmq.RECONNECT_IVL, _milliseconds(self._pause_seconds))
        longest_pause_seconds = max(limits.reconnect_max_seconds, self._pause_seconds)
        self._dealer.setsockopt(zmq.RECONNECT_IVL_MAX, _milliseconds(longest_pause_seconds))
        self._dealer.setsockopt(zmq.CURVE_SECRETKEY, curve_secret)
        self._dealer.setsockopt(zmq.CURVE_PUBLICKEY, curve_public)
        self._dealer.setsockopt(zmq.CURVE_SERVERKEY, server_curve_public)
        self._monitor = open_monitor(self._context, self._dealer, zmq.EVENT_ALL)
        self._dealer.connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; queued messages get `linger_seconds` to leave. A second call does nothing."""
        if not self._context.closed:
            self._dealer.disable_monitor()
            self._monitor.close(0)
            self._dealer.close()
            self._context.term()

    @property
    def state(self) -> State:
        """How the connection stands; "refused", "unreachable" and "slow" stay until a later attempt ends otherwise."""
        self._pump()
        return self._state

    @property
    def connections(self) -> int:
        """How many times a connection was made. When it rises, messages may have been lost, both ways."""
        self._pump()
        return self._connections

    @property
    def dropped(self) -> int:
        """How many messages of more than one part were dropped."""
        return self._dropped

    def wait_connected(self, timeout_seconds: float) -> None:
        """Wait until messages can flow; keeps dialling the whole time, as a roster or a process may come late.

        Raises:
            TransportError: not connected in time; the text says unreachable, refused or slow.
        """
        deadline = time.monotonic() + timeout_seconds
        while self._wait(zmq.POLLOUT, deadline - time.monotonic()) or time.monotonic() < deadline:
            if self.state == "connected":  # libzmq reports this a moment after the socket is ready
                return
        if self.state != "connected":
            raise TransportError(self._diagnosis(timeout_seconds))

    def send(self, message: Data) -> None:
        """Queue a copy of a message for the aggregator; waits at most `send_seconds` for a connection with room in its queue.

        Raises:
            TransportError: there was none in time; the message was not queued.
            LocalProtocolError: the message is empty or too large.
        """
        _check_message(message, self._limits)
        deadline = time.monotonic() + self._limits.send_seconds
        while self._wait(zmq.POLLOUT, deadline - time.monotonic()):
            try:
                self._dealer.send(message, zmq.NOBLOCK)
                return
            except zmq.Again:
                continue
        if self._state == "connected":
            raise TransportError(
                f"{self._address} has taken no message for {self._limits.send_seconds:g} s: it is overloaded"
            )
        raise TransportError(self._diagnosis(self._limits.send_seconds))

    def receive(self, timeout_seconds: float) -> bytes | None:
        """The next message of the aggregator, or None when none came in time."""
        deadline = time.monotonic() + timeout_seconds
        for _ in range(_DROPS_PER_CALL):
            if not self._wait(zmq.POLLIN, deadline - time.monotonic()):
                return None
            try:
                parts = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                continue
            if len(parts) == 1 and parts[0]:
                return parts[0]
            self._dropped += 1
        return None

    def _wait(self, flag: int, timeout_seconds: float) -> bool:
        """Wait until the socket is ready to read or write, dialling again when it is time."""
        deadline = time.monotonic() + timeout_seconds
        poller = zmq.Poller()
        poller.register(self._dealer, flag)
        poller.register(self._monitor, zmq.POLLIN)
        while True:
            self._pump()
            now = time.monotonic()
            wake = deadline if self._redial_at is None else min(deadline, self._redial_at)
            if self._dealer in dict(poller.poll(_milliseconds(max(0.0, wake - now)))):
                return True
            if now >= deadline:
                return False

    def _pump(self) -> None:
        """Take in the monitor's events; dial again when libzmq has given up."""
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())
            self._observe(event["event"], event["value"])
        self._dealer.getsockopt(zmq.EVENTS)  # lets libzmq attach a new connection, which sends the announcement
        if self._redial_at is not None and time.monotonic() >= self._redial_at:
            self._redial_at, self._phase = None, "dialling"
            try:
                self._dealer.disconnect(self._address)
            except zmq.ZMQError as error:
                if error.errno != errno.ENOENT:
                    raise TransportError(f"cannot dial {self._address} again: {error.strerror}") from None
            self._dealer.connect(self._address)

    def _observe(self, event: int, value: int) -> None:
        """One event of libzmq's socket monitor. `value` is an errno, or the ZAP status, where a handshake failed."""
        if event in (zmq.EVENT_CONNECT_RETRIED, zmq.EVENT_CONNECT_DELAYED, zmq.EVENT_CONNECTED):
            self._redial_at = None  # libzmq itself goes on
        if event == zmq.EVENT_CONNECTED:
            self._phase = "handshake"
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._phase, self._state, self._pause_seconds = "done", "connected", self._first_pause_seconds
            self._connections += 1
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refused("this node's key is not in the aggregator's roster")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and value in (errno.EPIPE, errno.ECONNRESET):
            self._refused("it hung up: this node may hold a wrong aggregator key, or the port leads elsewhere")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._phase, self._state = "done", "slow"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or (
            event == zmq.EVENT_DISCONNECTED and self._phase == "handshake"  # libzmq says no more about a wrong greeting
        ):
            self._refused("what answers there is not a SecGeo aggregator")
        elif event == zmq.EVENT_CONNECT_RETRIED:
            if self._phase == "dialling":
                self._state = "unreachable"
            self._phase = "dialling"
        if event == zmq.EVENT_DISCONNECTED:
            if self._state == "connected":
                self._state = "connecting"
            self._redial_at = time.monotonic() + self._pause_seconds
            self._pause_seconds = min(2 * self._pause_seconds, self._limits.reconnect_max_seconds)

    def _refused(self, detail: str) -> None:
        self._phase, self._state, self._detail = "done", "refused", detail

    def _diagnosis(self, waited_seconds: float) -> str:
        if self._state == "refused":
            return (
                f"refused: {self._address} can be reached, but {self._detail}; "
                "compare both sides' rosters, then ask the consortium authority"
            )
        if self._state == "slow" or self._phase == "handshake":
            return (
                f"slow: {self._address} accepts connections but has not answered the handshake; "
                "the aggregator is overloaded or stopped, or something else listens there"
            )
        return (
            f"unreachable: no TCP connection to {self._address} within {waited_seconds:g} s; "
            "check the address, that the aggregator runs, and that the firewall lets this port out"
        )


def _set_limits(socket: zmq.Socket[bytes], address: str, limits: TransportLimits) -> None:
    socket.setsockopt(zmq.LINGER, _milliseconds(limits.linger_seconds))
    socket.setsockopt(zmq.MAXMSGSIZE, limits.max_message_bytes + _CURVE_OVERHEAD_BYTES)
    socket.setsockopt(zmq.SNDHWM, limits.high_water_messages)
    socket.setsockopt(zmq.RCVHWM, limits.high_water_messages)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _milliseconds(limits.handshake_seconds))
    socket.setsockopt(zmq.HEARTBEAT_IVL, _milliseconds(limits.heartbeat_seconds))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _milliseconds(limits.heartbeat_timeout_seconds))
    socket.setsockopt(zmq.IPV6, int("[" in address))


def _milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _check_address(address: str, *, wildcard: bool) -> None:
    match = _ADDRESS.fullmatch(address)
    port = match["port"] if match else ""
    if not match or (port != "*" and int(port) > 65_535):
        raise ConfigError(f"{address!r} is not of the form tcp://host:port; an IPv6 host stands in brackets")
    if not wildcard and ("*" in address or int(port) == 0):
        raise ConfigError(
            f"{address!r} is not an address that one can dial: it needs a host and a port from 1 to 65535"
        )


def _check_message(message: Data, limits: TransportLimits) -> None:
    if not 0 < len(message) <= limits.max_message_bytes:
        raise LocalProtocolError(f"a message has 1 to {limits.max_message_bytes} bytes, not {len(message)}")
