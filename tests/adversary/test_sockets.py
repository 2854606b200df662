"""Attacks over real CURVE sockets on loopback: those of the other files again, and those that only sockets have."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
import zmq
from zmq.utils import z85

from keys.identity import Identity
from protocols import messages as m
from secgeo import zap
from secgeo.transport import NodeEndpoint
from tests.adversary import test_cohort, test_members, test_parameters, test_results, test_shares, weaken
from tests.adversary.attackers import MaliciousNode
from tests.adversary.wire import LIMITS, WireNetwork, make_wire_network, over_sockets
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import names
from tests.protocols.test_attempt import check_sum

LIAR = "hospital-00"

AGAIN = [
    (test_cohort, test_cohort.test_substituted_round_keys, ()),
    (test_cohort, test_cohort.test_invented_hospitals, ()),
    (test_shares, test_shares.test_different_survivor_sets_to_different_nodes, ()),
    (test_shares, test_shares.test_self_seed_and_pair_share_of_one_node, ()),
    (test_results, test_results.test_a_changed_sum_with_a_consistent_signed_record, (test_results.one_more,)),
    (test_results, test_results.test_a_node_that_sees_two_records_of_one_round, ()),
    (test_results, test_results.test_a_multiple_of_the_sum_with_the_same_multiple_of_its_tags, ()),
    (test_results, test_results.test_a_round_that_one_node_takes_for_lost_and_others_have_applied, ()),
    (
        test_results,
        test_results.test_a_sum_for_a_latecomer_with_too_few_receipts,
        ({"colluders": test_results.COLLUDERS}, ""),
    ),
    (test_parameters, test_parameters.test_inputs_that_are_not_finite, (float("nan"),)),
    (test_members, test_members.test_broken_messages_of_a_node, ("random", "UploadChunk")),
    (test_members, test_members.test_broken_messages_of_the_aggregator, ("truncated", "KeySet")),
    (test_members, test_members.test_one_wrong_share_among_just_enough_cannot_have_its_owner_expelled, ()),
    (test_members, test_members.test_contributions_of_no_pair_master_spoil_one_round_and_their_sender_is_named, ()),
    (test_members, test_members.test_a_member_that_builds_on_another_sum_is_named_by_the_aggregator, ()),
]


@pytest.mark.parametrize(("module", "attack", "how"), AGAIN, ids=[attack.__name__ for _, attack, _ in AGAIN])
def test_again_over_sockets(module: object, attack: Callable[..., None], how: tuple[object, ...]) -> None:
    with over_sockets(module):  # type: ignore[arg-type]
        attack(*how)


def everybody_but(liar: str, network: WireNetwork) -> None:
    for name in set(network.nodes) - {liar}:
        assert name not in network.faults
        assert check_sum(network, name) == tuple(other for other in names(5) if other != liar)


def study(**settings: object) -> WireNetwork:
    return make_wire_network(5, size=1500, threshold=4, minimum_cohort=4, **settings)


# --- strangers


@contextlib.contextmanager
def garbage(address: str) -> Iterator[None]:
    """Connections that say nothing, half of something, or nonsense, as long as this lasts."""
    host, port = address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    says = [b"", greeting[:11], greeting, os.urandom(5000), b"GET / HTTP/1.1\r\n\r\n", greeting + b"\x06" + b"\xff" * 8]
    with contextlib.ExitStack() as stack:
        for number in range(60):
            peer = stack.enter_context(socket.create_connection((host, int(port))))
            peer.sendall(says[number % len(says)])
        for _ in range(20):  # and some that reset their connection
            peer = socket.create_connection((host, int(port)))
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.sendall(os.urandom(100))
            peer.close()
        yield


def test_garbage_and_half_open_peers_do_not_disturb_a_round() -> None:
    network = study()
    network.start()
    with garbage(network.endpoint.address):
        network.finish()
    for name in names(5):
        assert check_sum(network, name) == tuple(names(5))
    assert not network.expelled


def test_a_stranger_with_a_key_of_its_own_is_not_heard() -> None:
    """It signs as a member, and knows the aggregator's public key: it lacks a CURVE key of the roster."""

    def knock(door_is_open: bool) -> tuple[WireNetwork, int]:
        network = study()
        network.start()
        public, secret = zmq.curve_keypair()
        stranger = NodeEndpoint(
            network.endpoint.address,
            curve_secret=z85.decode(secret),
            curve_public=z85.decode(public),
            server_curve_public=network.consortium.identities[AGGREGATOR].curve_public,
            limits=LIMITS,
        )
        heard = 0
        answer = zap.Doorkeeper._answer

        def let_in(self: zap.Doorkeeper, question: list[bytes]) -> list[bytes]:
            self.allowed = {**self.allowed, question[-1]: self.allowed.get(question[-1], "a-stranger")}
            return answer(self, question)

        with weaken.replaced(zap.Doorkeeper, "_answer", let_in) if door_is_open else contextlib.nullcontext():
            receive = network.aggregator.receive

            def listen(peer: str, data: bytes, now: float) -> object:
                nonlocal heard
                heard += peer == "a-stranger"
                return receive(peer, data, now)

            network.aggregator.receive = listen  # type: ignore[method-assign, assignment]
            thread = threading.Thread(target=lambda: _say(stranger, b"let me in"))
            thread.start()
            network.finish()
            thread.join()
        stranger.close()
        return network, heard

    _, heard = knock(door_is_open=True)
    assert heard

    network, heard = knock(door_is_open=False)
    assert not heard
    for name in names(5):
        assert check_sum(network, name) == tuple(names(5))


def _say(link: NodeEndpoint, data: bytes) -> None:
    with contextlib.suppress(Exception):
        link.wait_connected(1.0)
        link.send(data)


# --- members of yesterday


def test_a_revoked_node_takes_no_part() -> None:
    """Its certificate and keys are good; the roster that the door knows has no place for it any more."""
    network = study()
    identities = network.consortium.identities
    network.members = {identities[name].curve_public: name for name in names(5) if name != LIAR}
    weak = study()
    weak.run()
    assert check_sum(weak, "hospital-01") == tuple(names(5))  # with the old roster it takes part

    network.start(absent=[LIAR])
    network.finish()
    everybody_but(LIAR, network)
    assert network.endpoint.refused_handshakes
    assert not network.sums[LIAR]


def test_keys_of_an_old_roster_sign_nothing_that_counts() -> None:
    """The member's identity key was replaced; whoever has the old one comes through the door and is put out."""

    def use_old_key() -> WireNetwork:
        network = study()
        network.nodes[LIAR]._identity = Identity.generate(LIAR, "hospital")
        return network

    weak = use_old_key()
    with weaken.replaced(m, "verify_signature", weaken.accept):
        weak.run()
    assert LIAR in check_sum(weak, "hospital-01")

    network = use_old_key()
    network.run()
    assert network.expelled == [LIAR]
    everybody_but(LIAR, network)


# --- members over raw sockets


def test_oversized_frames_cost_the_sender_its_connection() -> None:
    network = study()
    liar = MaliciousNode(network, LIAR)
    done: list[bytes] = []

    @liar.on("UploadChunk")
    def oversize(message: m.Message, data: bytes) -> list[bytes]:
        identity = network.consortium.identities[LIAR]
        with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.linger = 200
            raw.curve_publickey, raw.curve_secretkey = identity.curve_public, identity.curve_secret
            raw.curve_serverkey = network.consortium.identities[AGGREGATOR].curve_public
            raw.connect(network.endpoint.address)
            raw.send(bytes(64 << 20))
        done.append(data)
        return []

    network.run()
    assert done
    everybody_but(LIAR, network)
    assert not set(network.faults) - {LIAR}


def test_random_messages_in_the_name_of_another_member() -> None:
    """The door knows who is connected: a message that claims another sender is held against the one who sent it."""
    network = study()
    liar = MaliciousNode(network, LIAR)
    victim = network.consortium.identities["hospital-02"]
    stolen: list[bytes] = []
    inner = network.tap

    def steal(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender == victim.node_id and test_members.body_type(data) == "RoundKeys":
            stolen.append(data)
        return list(inner(sender, recipient, data))

    network.tap = steal
    liar.on("SealedSeeds")(lambda message, data: [stolen[0]])
    network.run()
    assert network.expelled == [LIAR]
    everybody_but(LIAR, network)


@pytest.mark.parametrize("kind", ["RoundKeys", "UploadDone", "Unmasking"])
def test_a_member_that_stalls_costs_one_deadline(kind: str) -> None:
    network = study()
    MaliciousNode(network, LIAR).on(kind)(lambda message, data: [])
    network.run()
    for name in set(names(5)) - {LIAR}:
        assert (LIAR in check_sum(network, name)) == (kind == "Unmasking")
        assert name not in network.faults
    assert not network.expelled
