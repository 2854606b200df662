"""The transport against honest peers, strangers, garbage and malicious members, over real sockets on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq
from zmq.utils import z85

from keys.errors import ConfigError, LocalProtocolError, TransportError
from secgeo.transport import AggregatorEndpoint, NodeEndpoint, TransportLimits

LIMITS = TransportLimits(
    max_message_bytes=100_000,
    high_water_messages=8,
    handshake_seconds=2.0,
    connect_seconds=2.0,
    send_seconds=5.0,
    reconnect_min_seconds=0.1,
    reconnect_max_seconds=0.5,
    linger_seconds=0.2,
)
PATIENCE_SECONDS = 20.0
"""Only a broken transport waits this long."""


class Keys:
    def __init__(self) -> None:
        public, secret = zmq.curve_keypair()
        self.public, self.secret = z85.decode(public), z85.decode(secret)


SERVER, ALICE, BOB, STRANGER = Keys(), Keys(), Keys(), Keys()
ROSTER = {ALICE.public: "alice", BOB.public: "bob"}


def listen(address: str = "tcp://127.0.0.1:0", limits: TransportLimits = LIMITS) -> AggregatorEndpoint:
    return AggregatorEndpoint(
        address, curve_secret=SERVER.secret, curve_public=SERVER.public, allowed=ROSTER, limits=limits
    )


def dial(address: str, keys: Keys, server: Keys = SERVER, limits: TransportLimits = LIMITS) -> NodeEndpoint:
    return NodeEndpoint(
        address,
        curve_secret=keys.secret,
        curve_public=keys.public,
        server_curve_public=server.public,
        limits=limits,
    )


@pytest.fixture
def aggregator() -> Iterator[AggregatorEndpoint]:
    with listen() as endpoint:
        yield endpoint


@contextlib.contextmanager
def raw_client(address: str, keys: Keys | None, routing_id: bytes = b"") -> Iterator[zmq.Socket[bytes]]:
    """A ZeroMQ client that keeps none of our rules; plaintext without keys."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger, client.sndtimeo = 0, 10_000
        if routing_id:
            client.routing_id = routing_id
        if keys is not None:
            client.curve_publickey, client.curve_secretkey = keys.public, keys.secret
            client.curve_serverkey = SERVER.public
        client.connect(address)
        yield client


@contextlib.contextmanager
def tcp_listener(backlog: int | None = 16) -> Iterator[tuple[socket.socket, str]]:
    """A TCP port of which ZeroMQ knows nothing; not even listening without a backlog."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if backlog is not None:
            listener.listen(backlog)
        yield listener, f"tcp://127.0.0.1:{listener.getsockname()[1]}"


class Link:
    """A TCP hop between node and aggregator that can fall silent without closing."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.silent = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        while not self._stop.is_set():
            for ready in select.select([self._listener, *([] if self.silent else other)], [], [], 0.02)[0]:
                if ready is self._listener:
                    inner, outer = self._listener.accept()[0], socket.create_connection(self._target)
                    other |= {inner: outer, outer: inner}
                elif ready in other:
                    data = b""
                    with contextlib.suppress(OSError):
                        data = ready.recv(65536)
                        other[ready].sendall(data)
                    if not data:
                        for end in (other.pop(ready), ready):
                            other.pop(end, None)
                            end.close()
        for end in [*other, self._listener]:
            end.close()


def until(condition: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def announced(aggregator: AggregatorEndpoint, *nodes: str) -> None:
    """Read until these nodes have announced themselves; no message may come before."""

    def step() -> bool:
        assert aggregator.receive(0.01) is None
        return aggregator.connected >= set(nodes)

    until(step)


def works(aggregator: AggregatorEndpoint, node: NodeEndpoint, name: str) -> None:
    """An honest node gets through, both ways, even if its connection has to come back first."""
    node.wait_connected(PATIENCE_SECONDS)
    question = os.urandom(8)
    node.send(question)
    assert aggregator.receive(PATIENCE_SECONDS) == (name, question)
    answer = os.urandom(8)
    until(lambda: aggregator.send(name, answer))
    assert node.receive(PATIENCE_SECONDS) == answer


# --- honest peers


def test_messages_go_both_ways_in_order(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as node:
        node.wait_connected(PATIENCE_SECONDS)
        assert node.state == "connected"
        for number in range(100):
            node.send(b"up %d" % number)
            assert aggregator.receive(PATIENCE_SECONDS) == ("alice", b"up %d" % number)
            assert aggregator.send("alice", b"down %d" % number)
            assert node.receive(PATIENCE_SECONDS) == b"down %d" % number
        assert aggregator.receive(0) is None
        assert node.receive(0) is None


def test_the_aggregator_can_speak_first(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as node:
        assert not aggregator.send("alice", b"too early")
        node.wait_connected(PATIENCE_SECONDS)
        announced(aggregator, "alice")
        assert aggregator.send("alice", b"welcome")
        assert node.receive(PATIENCE_SECONDS) == b"welcome"


def test_the_largest_message_passes_both_ways(aggregator: AggregatorEndpoint) -> None:
    message = os.urandom(LIMITS.max_message_bytes)
    with dial(aggregator.address, ALICE) as node:
        node.send(message)
        assert aggregator.receive(PATIENCE_SECONDS) == ("alice", message)
        assert aggregator.send("alice", message)
        assert node.receive(PATIENCE_SECONDS) == message


def test_a_view_is_sent_as_it_was_even_if_its_memory_is_written_to_again(aggregator: AggregatorEndpoint) -> None:
    message = os.urandom(LIMITS.max_message_bytes)
    memory = bytearray(message)
    with dial(aggregator.address, ALICE) as node:
        node.wait_connected(PATIENCE_SECONDS)
        node.send(memoryview(memory).toreadonly())
        memory[:] = bytes(len(memory))
        assert aggregator.receive(PATIENCE_SECONDS) == ("alice", message)


def test_default_limits_carry_a_chunk_of_a_mebibyte() -> None:
    limits = dataclasses.replace(TransportLimits(), linger_seconds=0.2)
    message = os.urandom(limits.max_message_bytes)
    assert len(message) > 1 << 20
    with listen(limits=limits) as aggregator, dial(aggregator.address, ALICE, limits=limits) as node:
        node.send(message)
        assert aggregator.receive(PATIENCE_SECONDS) == ("alice", message)


def test_nodes_are_told_apart(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as alice, dial(aggregator.address, BOB) as bob:
        works(aggregator, bob, "bob")
        works(aggregator, alice, "alice")
        assert aggregator.connected == {"alice", "bob"}
        assert aggregator.send("alice", b"for alice")
        assert bob.receive(0.1) is None
        assert alice.receive(PATIENCE_SECONDS) == b"for alice"


def test_ipv6_loopback() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with listen("tcp://[::1]:*") as aggregator, dial(aggregator.address, ALICE) as node:
        assert aggregator.address.startswith("tcp://[::1]:")
        works(aggregator, node, "alice")


# --- identity


def test_a_routing_id_proves_nothing(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as alice, raw_client(aggregator.address, BOB, b"alice") as impostor:
        works(aggregator, alice, "alice")
        impostor.send(b"I am alice")
        assert aggregator.receive(PATIENCE_SECONDS) == ("bob", b"I am alice")
        assert aggregator.send("alice", b"secret of alice")
        assert alice.receive(PATIENCE_SECONDS) == b"secret of alice"
        assert not impostor.poll(100)


def test_a_node_that_comes_back_takes_over_its_route(aggregator: AggregatorEndpoint) -> None:
    for _ in range(3):
        with dial(aggregator.address, ALICE) as node:
            works(aggregator, node, "alice")


def test_the_newest_connection_of_a_node_gets_the_messages(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as older:
        works(aggregator, older, "alice")
        with dial(aggregator.address, ALICE) as newer:
            works(aggregator, newer, "alice")
            older.send(b"left over")  # from the same node, but no reason to go back to the former route
            assert aggregator.receive(PATIENCE_SECONDS) == ("alice", b"left over")
            assert aggregator.send("alice", b"news")
            assert newer.receive(PATIENCE_SECONDS) == b"news"
            assert older.receive(0.1) is None


def test_a_revoked_node_is_unheard_and_unreached_and_cannot_return(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as alice, dial(aggregator.address, BOB) as bob:
        works(aggregator, alice, "alice")
        works(aggregator, bob, "bob")
        bob.send(b"queued before the revocation")
        time.sleep(0.1)
        aggregator.replace_allowed({ALICE.public: "alice"})
        assert aggregator.connected == {"alice"}
        assert not aggregator.send("bob", b"secret")
        bob.send(b"still here")
        until(lambda: aggregator.receive(0.01) is None and aggregator.dropped)
        assert set(aggregator.dropped) == {("bob", "not in the roster any more")}
        assert aggregator.connected == {"alice"}
        works(aggregator, alice, "alice")
    with dial(aggregator.address, BOB) as returned:
        until(lambda: returned.state == "refused")
        assert aggregator.receive(0.1) is None


def test_a_connection_with_a_replaced_key_is_mute(aggregator: AggregatorEndpoint) -> None:
    new = Keys()
    with dial(aggregator.address, ALICE) as old_connection:
        works(aggregator, old_connection, "alice")
        aggregator.replace_allowed({new.public: "alice"})
        with dial(aggregator.address, new) as new_connection:
            works(aggregator, new_connection, "alice")
            old_connection.send(b"stolen key")
            assert aggregator.receive(0.2) is None
            assert aggregator.send("alice", b"news")
            assert new_connection.receive(PATIENCE_SECONDS) == b"news"
            assert old_connection.receive(0.1) is None


def test_a_key_that_changes_its_name_must_connect_again(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as node:
        works(aggregator, node, "alice")
        aggregator.replace_allowed({ALICE.public: "carol"})
        node.send(b"who am I?")
        assert aggregator.receive(0.2) is None
        assert not aggregator.send("carol", b"hello")
    with dial(aggregator.address, ALICE) as node:
        works(aggregator, node, "carol")


# --- strangers


def test_a_stranger_is_refused_and_named_until_the_roster_takes_it_in(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, STRANGER) as node:
        with pytest.raises(TransportError, match=r"^refused: .*not in the aggregator's roster"):
            node.wait_connected(1.0)
        assert node.state == "refused"
        assert aggregator.receive(0.1) is None
        assert aggregator.connected == set()
        assert aggregator.refused_handshakes == len(aggregator.refusals) >= 1
        refusal = aggregator.refusals[-1]
        assert refusal.address == "127.0.0.1"
        assert len(refusal.key_hash) == 16
        assert abs(refusal.unix_seconds - time.time()) < 60
        aggregator.replace_allowed({STRANGER.public: "carol"})
        works(aggregator, node, "carol")


def test_the_refusal_log_is_bounded(aggregator: AggregatorEndpoint) -> None:
    context = aggregator._context
    with context.socket(zmq.REQ) as zap:
        zap.linger = 0
        zap.connect("inproc://zeromq.zap.01")
        for _ in range(400):
            zap.send_multipart([b"1.0", b"1", b"secgeo", b"127.0.0.1", b"", b"CURVE", STRANGER.public])
            assert zap.recv_multipart()[2] == b"400"
    assert aggregator.refused_handshakes == 400
    assert len(aggregator.refusals) < 400


@pytest.mark.parametrize(
    ("domain", "mechanism", "credentials", "status"),
    [
        (b"secgeo", b"CURVE", [ALICE.public], b"200"),
        (b"secgeo", b"CURVE", [ALICE.public, b""], b"400"),
        (b"secgeo", b"NULL", [], b"400"),
        (b"secgeo", b"PLAIN", [b"alice", ALICE.public], b"400"),
        (b"secgeo", b"GSSAPI", [ALICE.public], b"400"),
        (b"", b"CURVE", [ALICE.public], b"400"),
        (b"other", b"CURVE", [ALICE.public], b"400"),
    ],
)
def test_the_door_opens_for_curve_keys_of_the_roster_only(
    aggregator: AggregatorEndpoint, domain: bytes, mechanism: bytes, credentials: list[bytes], status: bytes
) -> None:
    with aggregator._context.socket(zmq.REQ) as zap:
        zap.linger = 0
        zap.connect("inproc://zeromq.zap.01")
        zap.send_multipart([b"1.0", b"7", domain, b"127.0.0.1", b"", mechanism, *credentials])
        reply = zap.recv_multipart()
    assert (reply[1], reply[2]) == (b"7", status)
    assert reply[4] == (b"alice" if status == b"200" else b"")


def test_a_wrong_aggregator_key_is_refused(aggregator: AggregatorEndpoint) -> None:
    """libzmq's server hangs up when it cannot open the HELLO: a refusal to the node, a broken handshake to the operator."""
    with dial(aggregator.address, ALICE, server=STRANGER) as node:
        with pytest.raises(TransportError, match=r"^refused: .*hung up"):
            node.wait_connected(1.0)
        assert node.state == "refused"
        until(lambda: aggregator.broken_handshakes)
        assert aggregator.refused_handshakes == 0


def test_nobody_listens() -> None:
    with tcp_listener(backlog=None) as (_, address), dial(address, ALICE) as node:
        with pytest.raises(TransportError, match=rf"^unreachable: no TCP connection to {address}"):
            node.wait_connected(0.5)
        assert node.state == "unreachable"


def test_an_unknown_host_is_unreachable() -> None:
    limits = dataclasses.replace(LIMITS, send_seconds=0.2)
    with dial("tcp://aggregator.invalid:5555", ALICE, limits=limits) as node:
        with pytest.raises(TransportError, match=r"^unreachable: "):
            node.wait_connected(0.5)
        with pytest.raises(TransportError, match=r"^unreachable: "):
            node.send(b"lost")


def test_a_listener_that_never_answers_is_slow() -> None:
    limits = dataclasses.replace(LIMITS, handshake_seconds=0.3)
    with tcp_listener() as (_, address), dial(address, ALICE, limits=limits) as node:
        with pytest.raises(TransportError, match=r"^slow: "):
            node.wait_connected(0.1)
        until(lambda: node.state == "slow")


def test_something_else_listens() -> None:
    """A web server, say: it answers, but not in ZeroMQ's words."""
    with tcp_listener() as (listener, address), dial(address, ALICE) as node:
        connection, _ = listener.accept()
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
        until(lambda: node.state == "refused")
        connection.close()


def test_a_false_aggregator_gets_no_message() -> None:
    """Whoever lacks the aggregator's secret key cannot finish the handshake, even without a roster."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as impostor:
        impostor.linger = 0
        impostor.curve_server = True
        impostor.curve_secretkey, impostor.curve_publickey = STRANGER.secret, STRANGER.public
        port = impostor.bind_to_random_port("tcp://127.0.0.1")
        limits = dataclasses.replace(LIMITS, send_seconds=0.5)
        with dial(f"tcp://127.0.0.1:{port}", ALICE, limits=limits) as node:
            with pytest.raises(TransportError, match=r"^refused: "):
                node.send(b"for the aggregator only")
            assert not impostor.poll(0)


def test_plaintext_is_cut_off(aggregator: AggregatorEndpoint) -> None:
    with raw_client(aggregator.address, None) as client, dial(aggregator.address, ALICE) as honest:
        with contextlib.suppress(zmq.Again):  # it may have been cut off before it could queue this
            client.send(b"hello", zmq.NOBLOCK)
        until(lambda: aggregator.broken_handshakes)
        assert aggregator.receive(0.1) is None
        works(aggregator, honest, "alice")
    assert not aggregator.dropped


def test_garbage_and_half_open_connections_do_not_stop_honest_nodes(aggregator: AggregatorEndpoint) -> None:
    host, port = aggregator.address.removeprefix("tcp://").split(":")
    with contextlib.ExitStack() as stack:
        for number in range(50):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            if number % 5 == 1:
                connection.sendall(os.urandom(2000))
            elif number % 5 == 2:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            elif number % 5 == 3:  # a greeting for CURVE, then a frame that claims 2^62 bytes
                greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
                connection.sendall(greeting + b"\x06" + (1 << 62).to_bytes(8, "big"))
            elif number % 5 == 4:  # half a greeting
                connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03")
        with dial(aggregator.address, ALICE) as alice, dial(aggregator.address, BOB) as bob:
            works(aggregator, alice, "alice")
            works(aggregator, bob, "bob")
            until(lambda: aggregator.broken_handshakes >= 20)  # those who keep silent, at the end of handshake_seconds
            works(aggregator, alice, "alice")
    assert aggregator.connected == {"alice", "bob"}


# --- members who misbehave


def test_an_oversized_message_costs_only_its_sender_the_connection(aggregator: AggregatorEndpoint) -> None:
    with raw_client(aggregator.address, BOB) as bob, dial(aggregator.address, ALICE) as alice:
        works(aggregator, alice, "alice")
        monitor = bob.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        bob.send(bytes(LIMITS.max_message_bytes))
        assert aggregator.receive(PATIENCE_SECONDS) == ("bob", bytes(LIMITS.max_message_bytes))
        bob.send(bytes(LIMITS.max_message_bytes + 1))
        assert monitor.poll(int(1000 * PATIENCE_SECONDS))
        assert aggregator.receive(0.1) is None
        until(lambda: not aggregator.send("bob", b"gone?"))
        works(aggregator, alice, "alice")
        bob.disable_monitor()


def test_a_message_of_several_parts_is_dropped_and_counted(aggregator: AggregatorEndpoint) -> None:
    with raw_client(aggregator.address, BOB) as bob, dial(aggregator.address, ALICE) as alice:
        bob.send_multipart([b"one", b"two"])
        bob.send_multipart([b"", b"delimited, as REQ sockets do"])
        bob.send(b"three")
        assert aggregator.receive(PATIENCE_SECONDS) == ("bob", b"three")
        assert dict(aggregator.dropped) == {("bob", "more than one part"): 2}
        works(aggregator, alice, "alice")


def test_a_node_drops_a_message_of_several_parts() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        server.curve_server = True
        server.curve_secretkey, server.curve_publickey = SERVER.secret, SERVER.public
        port = server.bind_to_random_port("tcp://127.0.0.1")
        with dial(f"tcp://127.0.0.1:{port}", ALICE) as node:
            node.send(b"hello")
            route = server.recv_multipart()[0]
            server.send_multipart([route, b"one", b"two"])
            server.send_multipart([route, b"three"])
            assert node.receive(PATIENCE_SECONDS) == b"three"
            assert node.dropped == 1


def test_a_node_survives_an_oversized_message_of_the_aggregator() -> None:
    generous = dataclasses.replace(LIMITS, max_message_bytes=2 * LIMITS.max_message_bytes)
    with listen(limits=generous) as aggregator, dial(aggregator.address, ALICE) as node:
        works(aggregator, node, "alice")
        assert aggregator.send("alice", bytes(generous.max_message_bytes))
        assert node.receive(0.3) is None
        until(lambda: node.state == "connected")
        works(aggregator, node, "alice")


def test_a_flood_of_empty_messages_hides_nobody(aggregator: AggregatorEndpoint) -> None:
    with raw_client(aggregator.address, BOB) as bob, dial(aggregator.address, ALICE) as alice:
        works(aggregator, alice, "alice")
        for _ in range(50):
            bob.send(b"")
        alice.send(b"hear me")
        time.sleep(0.2)
        heard = [aggregator.receive(0) for _ in range(3)]
        assert heard.count(("alice", b"hear me")) == 1


# --- queues and vanished peers


def test_sending_to_a_vanished_node_fails_at_once(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as node:
        works(aggregator, node, "alice")
    started = time.monotonic()
    until(lambda: not aggregator.send("alice", b"anyone?"))
    assert aggregator.connected == set()
    assert not aggregator.send("alice", b"anyone?")
    assert time.monotonic() - started < 5.0
    assert not aggregator.send("nobody", b"anyone?")


def fill(send: Callable[[], bool]) -> int:
    """Send until the queue has been full for a while; how many messages it took."""
    taken, refused_since = 0, time.monotonic()
    while time.monotonic() - refused_since < 0.5:
        if send():
            taken, refused_since = taken + 1, time.monotonic()
            assert taken < 2000, "nothing bounds this queue"
        else:
            time.sleep(0.01)
    return taken


def test_a_slow_reader_fills_a_bounded_queue_and_hinders_nobody(aggregator: AggregatorEndpoint) -> None:
    message = bytes(LIMITS.max_message_bytes)
    with dial(aggregator.address, ALICE) as slow, dial(aggregator.address, BOB) as bob:
        works(aggregator, slow, "alice")
        taken = fill(lambda: aggregator.send("alice", message))
        assert taken >= LIMITS.high_water_messages
        assert "alice" in aggregator.connected
        works(aggregator, bob, "bob")
        for _ in range(taken):
            assert slow.receive(PATIENCE_SECONDS) == message
        assert slow.receive(0.1) is None
        works(aggregator, slow, "alice")


def test_a_node_does_not_wait_for_ever_for_an_aggregator_that_reads_nothing(aggregator: AggregatorEndpoint) -> None:
    message = bytes(LIMITS.max_message_bytes)
    with dial(aggregator.address, ALICE, limits=dataclasses.replace(LIMITS, send_seconds=0.5)) as node:
        node.wait_connected(PATIENCE_SECONDS)
        taken = 0

        def send() -> bool:
            nonlocal taken
            node.send(message)
            taken += 1
            return taken < 2000

        with pytest.raises(TransportError, match="has taken no message"):
            until(lambda: not send())
        node.wait_connected(0.1)  # connected it is
        for _ in range(taken):
            assert aggregator.receive(PATIENCE_SECONDS) == ("alice", message)
        assert aggregator.receive(0.1) is None


def test_heartbeats_notice_a_dead_line(aggregator: AggregatorEndpoint) -> None:
    limits = dataclasses.replace(
        LIMITS, heartbeat_seconds=0.2, heartbeat_timeout_seconds=1.0, handshake_seconds=0.5, reconnect_max_seconds=0.2
    )
    with listen(limits=limits) as watchful:
        link = Link(watchful.address)
        try:
            with dial(link.address, ALICE, limits=limits) as node:
                works(watchful, node, "alice")
                time.sleep(1.5)  # quiet is not dead
                assert node.state == "connected"
                link.silent = True
                until(lambda: node.state != "connected")
                until(lambda: not watchful.send("alice", b"anyone?"))
                link.silent = False
                works_after_reconnection(watchful, node)
        finally:
            link.close()


def works_after_reconnection(aggregator: AggregatorEndpoint, node: NodeEndpoint) -> None:
    """Messages of before may be lost or late; a new one must come through."""
    node.wait_connected(PATIENCE_SECONDS)
    node.send(b"back")
    until(lambda: aggregator.receive(0.01) == ("alice", b"back"))
    assert aggregator.send("alice", b"welcome back")
    until(lambda: node.receive(0.01) == b"welcome back")


def test_a_node_started_first_finds_the_aggregator_and_survives_its_restarts() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        node = dial(address, ALICE)
        until(lambda: node.state == "unreachable")
    with node:
        for _ in range(3):
            with listen(address) as aggregator:
                works(aggregator, node, "alice")
            until(lambda: node.state != "connected")


# --- mistakes of our own side


@pytest.mark.parametrize("size", [0, LIMITS.max_message_bytes + 1])
def test_messages_of_wrong_size_are_a_local_error(aggregator: AggregatorEndpoint, size: int) -> None:
    with dial(aggregator.address, ALICE) as node:
        with pytest.raises(LocalProtocolError, match="bytes"):
            node.send(bytes(size))
        with pytest.raises(LocalProtocolError, match="bytes"):
            aggregator.send("alice", bytes(size))


BAD_ADDRESSES = [
    "",
    "127.0.0.1:5555",
    "ipc:///tmp/socket",
    "inproc://x",
    "udp://127.0.0.1:5555",
    "tcp://127.0.0.1",
    "tcp://127.0.0.1:",
    "tcp://127.0.0.1:65536",
    "tcp://127.0.0.1:-1",
    "tcp://::1:5555",
    "tcp://10.0.0.1;127.0.0.1:5555",
    "tcp://a b:5555",
    "tcp://127.0.0.1:5555\n",
    "tcp://127.0.0.1:5555/path",
]


@pytest.mark.parametrize("address", BAD_ADDRESSES)
def test_bad_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="tcp://host:port"):
        listen(address)
    with pytest.raises(ConfigError, match="tcp://host:port"):
        dial(address, ALICE)


@pytest.mark.parametrize("address", ["tcp://*:5555", "tcp://127.0.0.1:*", "tcp://127.0.0.1:0"])
def test_a_node_needs_a_real_address(address: str) -> None:
    with pytest.raises(ConfigError, match="dial"):
        dial(address, ALICE)


def test_a_port_in_use_and_a_foreign_address(aggregator: AggregatorEndpoint) -> None:
    with pytest.raises(TransportError, match="in use"):
        listen(aggregator.address)
    with pytest.raises(TransportError, match="numeric address of this machine"):
        listen("tcp://no-such-interface:0")


def test_malformed_keys() -> None:
    with pytest.raises(ConfigError, match="32 raw bytes"):
        dial("tcp://127.0.0.1:5555", ALICE, server=type("Short", (), {"public": b"short"})())
    mixed = Keys()
    mixed.public = BOB.public
    with pytest.raises(ConfigError, match="does not belong"):
        dial("tcp://127.0.0.1:5555", mixed)
    with pytest.raises(ConfigError, match="32 raw bytes"):
        AggregatorEndpoint(
            "tcp://127.0.0.1:0", curve_secret=SERVER.secret, curve_public=SERVER.public, allowed={b"x": "alice"}
        )


def test_a_bad_roster_leaves_the_old_one_in_force(aggregator: AggregatorEndpoint) -> None:
    for bad in ({b"x": "alice"}, {ALICE.public: ""}, {ALICE.public: "x" * 256}):
        with pytest.raises(ConfigError):
            aggregator.replace_allowed(bad)
    with dial(aggregator.address, ALICE) as node:
        works(aggregator, node, "alice")


def test_the_caller_cannot_change_the_roster_behind_its_back() -> None:
    roster = dict(ROSTER)
    with AggregatorEndpoint(
        "tcp://127.0.0.1:0", curve_secret=SERVER.secret, curve_public=SERVER.public, allowed=roster, limits=LIMITS
    ) as aggregator:
        roster[STRANGER.public] = "carol"
        with dial(aggregator.address, STRANGER) as node:
            until(lambda: node.state == "refused")


@pytest.mark.parametrize(
    "change",
    [
        {"max_message_bytes": 0},
        {"max_message_bytes": -1},
        {"high_water_messages": 0},
        {"handshake_seconds": 0.0},
        {"linger_seconds": -1.0},
        {"heartbeat_seconds": float("nan")},
        {"heartbeat_seconds": float("inf")},
        {"reconnect_max_seconds": 0.05},
        {"heartbeat_seconds": 60.0},
    ],
)
def test_limits_that_would_mean_no_limit_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(LIMITS, **change)  # type: ignore[arg-type]


def test_no_secret_is_kept_where_a_log_could_find_it(aggregator: AggregatorEndpoint) -> None:
    with dial(aggregator.address, ALICE) as node:
        shown = "".join(map(repr, (aggregator, node, vars(aggregator), vars(node), vars(aggregator._doorkeeper))))
    for keys in (SERVER, ALICE):
        for form in (keys.secret.hex(), repr(keys.secret)[2:-1], z85.encode(keys.secret).decode()):
            assert form not in shown


def test_closing_twice_and_closing_with_unsent_messages_is_quick() -> None:
    aggregator = listen()
    node = dial(aggregator.address, ALICE)
    node.send(b"hello")
    assert aggregator.receive(PATIENCE_SECONDS)
    fill(lambda: aggregator.send("alice", bytes(LIMITS.max_message_bytes)))
    started = time.monotonic()
    for endpoint in (aggregator, node, aggregator, node):
        endpoint.close()
    assert time.monotonic() - started < 5.0
    assert not [thread for thread in threading.enumerate() if thread.name == "secgeo-zap" and not thread.daemon]
