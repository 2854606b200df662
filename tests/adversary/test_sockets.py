"""Attacks over real CURVE sockets on loopback: those of the other files again, and those that only sockets have."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest
import zmq
from zmq.utils import z85

from audit.attacks.wire import MEMBER_LIMITS
from keys.errors import TransportError
from keys.identity import Identity
from protocols import messages as m
from secgeo import zap
from secgeo.transport import NodeEndpoint
from tests.adversary import test_cohort, test_members, test_parameters, test_results, test_shares, weaken
from tests.adversary.attackers import MaliciousNode
from tests.adversary.wire import LIMITS, PATIENCE_SECONDS, WireNetwork, make_wire_network, over_sockets
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import names
from tests.protocols.test_attempt import check_sum

LIAR = "hospital-00"
HANDSHAKE_SECONDS = 1.0

AGAIN: list[tuple[ModuleType, Callable[..., None], tuple[Any, ...]]] = [
    (test_cohort, test_cohort.test_substituted_round_keys, ()),
    (test_cohort, test_cohort.test_invented_hospitals, ()),
    (test_cohort, test_cohort.test_a_shrunk_cohort, ("AttemptOpen", "shrank the cohort")),
    (test_cohort, test_cohort.test_a_shrunk_cohort, ("UploadDone", "fewer survivors than the agreed minimum")),
    (test_cohort, test_cohort.test_replayed_round_keys, ()),
    (test_parameters, test_parameters.test_other_parameters_than_agreed, ("threshold",)),
    (test_parameters, test_parameters.test_other_parameters_than_agreed, ("ring",)),
    (test_parameters, test_parameters.test_other_parameters_than_agreed, ("clip",)),
    (test_parameters, test_parameters.test_other_parameters_than_agreed, ("precision of values",)),
    (test_parameters, test_parameters.test_inputs_that_are_not_finite, (float("nan"),)),
    (test_parameters, test_parameters.test_inputs_that_are_not_finite, (float("inf"),)),
    (test_parameters, test_parameters.test_inputs_out_of_range, (300.0,)),
    (test_shares, test_shares.test_self_seed_and_pair_share_of_one_node, ()),
    (test_shares, test_shares.test_different_survivor_sets_to_different_nodes, ()),
    (test_shares, test_shares.test_survivors_without_enough_signatures, ()),
    (test_shares, test_shares.test_a_replayed_attempt_after_the_sum, (test_shares.OTHERS,)),
    (test_shares, test_shares.test_a_replayed_attempt_after_the_sum, (test_shares.names(5),)),
    (test_shares, test_shares.test_two_records_of_one_round_by_two_attempts, ()),
    (test_shares, test_shares.test_two_attempts_of_one_round_side_by_side, ()),
    (test_shares, test_shares.test_an_upload_that_comes_after_its_pair_masks_were_revealed, ()),
    (test_shares, test_shares.test_a_victim_that_hears_its_honest_neighbours_never_dealt_seeds, ()),
    (test_shares, test_shares.test_a_victim_cut_off_from_its_honest_neighbours, ()),
    (test_results, test_results.test_a_changed_sum_with_a_consistent_signed_record, (test_results.one_more,)),
    (test_results, test_results.test_a_changed_sum_with_a_consistent_signed_record, (test_results.cut_short,)),
    (test_results, test_results.test_a_changed_sum_with_a_consistent_signed_record, (test_results.chunks_exchanged,)),
    (test_results, test_results.test_a_sum_that_is_cut_off_for_ever, ()),
    (test_results, test_results.test_a_multiple_of_the_sum_with_the_same_multiple_of_its_tags, ()),
    (test_results, test_results.test_a_replayed_sum_of_an_old_round, ()),
    (test_results, test_results.test_sums_are_applied_in_the_order_in_which_they_build_on_each_other, ()),
    (test_results, test_results.test_a_node_that_sees_two_records_of_one_round, ()),
    (test_results, test_results.test_a_round_that_one_node_takes_for_lost_and_others_have_applied, ()),
    (test_results, test_results.test_a_dealer_that_deals_two_tag_seeds, ()),
    (
        test_results,
        test_results.test_a_sum_for_a_latecomer_with_too_few_receipts,
        ({"colluders": test_results.COLLUDERS}, ""),
    ),
    (test_members, test_members.test_a_second_upload_with_another_digest, ()),
    *(
        (test_members, test_members.test_a_node_that_stalls_costs_one_deadline, (kind,))
        for kind in test_members.STALLS
        if kind != "UploadChunk"
    ),
    (
        test_members,
        test_members.test_a_node_that_falls_silent_costs_each_phase_that_it_is_due_in_one_deadline,
        ("UploadChunk",),
    ),
    (test_members, test_members.test_broken_messages_of_a_node, ("random", "UploadChunk")),
    (test_members, test_members.test_broken_messages_of_a_node, ("random length", "RoundKeys")),
    (test_members, test_members.test_broken_messages_of_a_node, ("one byte", "UploadChunk")),
    (test_members, test_members.test_broken_messages_of_the_aggregator, ("truncated", "KeySet")),
    (test_members, test_members.test_one_wrong_share_among_just_enough_cannot_have_its_owner_expelled, ()),
    (test_members, test_members.test_the_first_of_many_holders_cannot_spoil_the_reconstruction, ()),
    (test_members, test_members.test_contributions_of_no_pair_master_spoil_one_attempt_and_their_sender_is_named, ()),
    (test_members, test_members.test_a_member_that_builds_on_another_sum_is_named_by_the_aggregator, ()),
]


def title(case: tuple[ModuleType, Callable[..., None], tuple[Any, ...]]) -> str:
    _, attack, how = case
    return "-".join([attack.__name__, *(getattr(value, "__name__", str(value)) for value in how[:1])])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("module", "attack", "how"), AGAIN, ids=map(title, AGAIN))
def test_again_over_sockets(module: ModuleType, attack: Callable[..., None], how: tuple[Any, ...]) -> None:
    with over_sockets(module):
        attack(*how)


def everybody_but(liar: str, network: WireNetwork) -> None:
    for name in set(network.nodes) - {liar}:
        assert name not in network.faults
        assert check_sum(network, name) == tuple(other for other in names(5) if other != liar)


def study(**settings: object) -> WireNetwork:
    return make_wire_network(5, size=1500, threshold=4, minimum_cohort=4, **settings)


# --- strangers


@contextlib.contextmanager
def garbage(address: str) -> Iterator[list[socket.socket]]:
    """Connections that say nothing, half of something, or nonsense, as long as this lasts."""
    host, port = address.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    says = [b"", greeting[:11], greeting, os.urandom(5000), b"GET / HTTP/1.1\r\n\r\n", greeting + b"\x06" + b"\xff" * 8]
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(60)]
        for number, peer in enumerate(peers):
            peer.sendall(says[number % len(says)])
        for _ in range(20):  # and some that reset their connection
            peer = socket.create_connection((host, int(port)))
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.sendall(os.urandom(100))
            peer.close()
        yield peers


def still_open(peers: list[socket.socket], network: WireNetwork, seconds: float) -> int:
    """How many connections the aggregator has not hung up by then; the study goes on meanwhile."""
    waiting, deadline = set(peers), time.monotonic() + seconds
    while waiting and time.monotonic() < deadline:
        network._carry()
        for peer in select.select(list(waiting), [], [], 0.0)[0]:
            with contextlib.suppress(ConnectionError):
                if peer.recv(4096):
                    continue  # its greeting
            waiting.discard(peer)
    return len(waiting)


def hold_half_open(guard: AbstractContextManager[None], seconds: float) -> tuple[WireNetwork, int]:
    """Strangers keep connections that come to nothing while a study goes on; gives how many are left after a time."""
    network = study()
    network.limits = dataclasses.replace(LIMITS, handshake_seconds=HANDSHAKE_SECONDS)
    with guard:
        network.start()
        with garbage(network.endpoint.address) as peers:
            left = still_open(peers, network, seconds)
            network.finish()
    return network, left


def test_garbage_and_half_open_peers_do_not_disturb_a_round() -> None:
    """Each connection takes a descriptor of the aggregator's; without an end to handshakes they would take all that there are."""
    assert hold_half_open(weaken.socket_option(zmq.HANDSHAKE_IVL, 0), 3 * HANDSHAKE_SECONDS)[1] > 20

    network, left = hold_half_open(contextlib.nullcontext(), PATIENCE_SECONDS)
    assert not left
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
            while thread.is_alive() or (door_is_open and not heard):
                network._carry()
            network.finish()
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
    with pytest.raises(TransportError, match="not in the aggregator's roster"):
        network.links[LIAR].wait_connected(1.0)
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


OVERSIZED_BYTES = 64 << 20


def send_oversized(guard: AbstractContextManager[None]) -> tuple[WireNetwork, int]:
    """A member sends 64 MiB in one message, and no upload; gives the most bytes that came to the machine at once."""
    network, largest = study(), 0
    MaliciousNode(network, LIAR).on("UploadChunk")(lambda message, data: [])
    receive = network.aggregator.receive

    def listen(peer: str, data: bytes, now: float) -> Any:
        nonlocal largest
        largest = max(largest, len(data))
        return receive(peer, data, now)

    network.aggregator.receive = listen  # type: ignore[method-assign]
    identity, cut_off = network.consortium.identities[LIAR], False
    with guard, zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        network.start()
        raw.linger = 0
        raw.curve_publickey, raw.curve_secretkey = identity.curve_public, identity.curve_secret
        raw.curve_serverkey = network.consortium.identities[AGGREGATOR].curve_public
        monitor = raw.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        raw.connect(network.endpoint.address)
        raw.send(bytes(OVERSIZED_BYTES))
        while not cut_off and largest < OVERSIZED_BYTES:
            network._carry()
            cut_off = bool(monitor.poll(0))
        raw.disable_monitor()
        network.finish()
    return network, largest


def test_oversized_frames_cost_the_sender_its_connection() -> None:
    _, largest = send_oversized(weaken.socket_option(zmq.MAXMSGSIZE, -1))
    assert largest == OVERSIZED_BYTES  # so much memory for one message

    network, largest = send_oversized(contextlib.nullcontext())
    assert largest < m.MESSAGE_LIMIT_BYTES
    everybody_but(LIAR, network)
    assert not set(network.faults) - {LIAR}
    assert not network.expelled  # nothing of it has come to where faults are found


def test_an_oversized_message_of_the_aggregator() -> None:
    """It is larger than a message may be, and smaller than what the node's own end of the connection cuts off here."""

    def told(guard: AbstractContextManager[None]) -> tuple[WireNetwork, int]:
        network = study()
        network.limits = MEMBER_LIMITS  # its own end lets it send that
        return network, test_members.tell_too_much(network, guard)

    assert told(weaken.message_limit())[1] == m.MESSAGE_LIMIT_BYTES

    network, decoded = told(contextlib.nullcontext())
    assert decoded < m.MESSAGE_LIMIT_BYTES
    test_cohort.blamed(network, LIAR, "over the limit")
    everybody_but(LIAR, network)


VICTIM = "hospital-02"


def speak_for_another(by_claim: bool) -> WireNetwork:
    """A member sends what claims to be of another, with a signature that is none; `by_claim`: it counts as that one's."""
    network = study()
    liar, stolen = MaliciousNode(network, LIAR), list[bytes]()
    inner, receive = network.tap, network.aggregator.receive

    def steal(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender == VICTIM and test_members.body_type(data) == "RoundKeys":
            stolen.append(data[:-1] + bytes([data[-1] ^ 1]))
        return list(inner(sender, recipient, data))

    network.tap = steal
    liar.on("SealedSeeds")(lambda message, data: [stolen[0]])
    if by_claim:
        network.aggregator.receive = lambda peer, data, now: receive(m.claimed_sender(data), data, now)  # type: ignore[method-assign]
    network.run()
    return network


def test_random_messages_in_the_name_of_another_member() -> None:
    """The door knows who is connected: a message that claims another sender is held against the one who sent it."""
    assert VICTIM in speak_for_another(by_claim=True).expelled

    network = speak_for_another(by_claim=False)
    assert network.expelled == [LIAR]
    everybody_but(LIAR, network)
