"""Any schedule of losses, repetitions and re-ordering ends in the right sum of the survivors or in none: never in a wrong sum, a
hang, an exception out of the aggregator, or an honest party that is blamed."""

from __future__ import annotations

import random
import re

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from keys.errors import LocalProtocolError, RemoteProtocolError
from protocols import messages as m
from protocols import study_node as node
from protocols.attempt_node import Ballot
from protocols.sealing import AttemptId
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, make_network, names
from tests.protocols.test_attempt import check_sum


def check_outcome(network: Network, honest: list[str]) -> None:
    """Every sum that an honest node holds is right, nobody honest is blamed, and the study came to its end."""
    assert not network.faults
    assert not [p for p in network.progress if p.event == "expelled" and p.fields["node"] in honest]
    for name in honest:
        for summed in network.sums[name]:
            check_sum(network, name, summed.round)
    assert network.aggregator.ended


@pytest.mark.parametrize("protocol", ["masked", "homomorphic"], indirect=True)
@given(seed=st.integers(0, 2**32), rate=st.floats(0.0, 0.08))
@example(seed=385467, rate=0.015625)  # an attempt fails, and the next one is opened, to a line that is broken
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_loss_of_connections(protocol: str, seed: int, rate: float) -> None:
    """A node loses a message, and with it its connection: it joins again."""
    network = make_network(5, size=2600, rounds=2, threshold=4, minimum_cohort=4)
    generator = random.Random(seed)  # noqa: S311

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if generator.random() >= rate:
            return [data]
        lost = recipient if sender == AGGREGATOR else sender
        if not network.nodes[lost].ended:
            rejoined = network.nodes[lost].rejoin()
            network._queue.extend((lost, AGGREGATOR, o.data) for o in rejoined if isinstance(o, node.Send))
        return []

    network.tap = tap
    network.run()
    check_outcome(network, names(5))


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_any_interleaving_of_different_nodes_gives_the_same_sum(seed: int) -> None:
    network = make_network(4, size=2300)
    generator = random.Random(seed)  # noqa: S311
    deliver = network._deliver

    def shuffled(sender: str, recipient: str, data: bytes) -> None:
        # Put the message back behind those of other pairs now and then; order within a pair is kept, as TCP does.
        others = [entry for entry in network._queue if entry[:2] != (sender, recipient)]
        if others and generator.random() < 0.4:
            later = [entry for entry in network._queue if entry[:2] == (sender, recipient)]
            network._queue.clear()
            network._queue.extend([*others, (sender, recipient, data), *later])
        else:
            deliver(sender, recipient, data)

    network._deliver = shuffled  # type: ignore[method-assign]
    network.run()
    check_outcome(network, names(4))
    assert all(len(network.sums[name]) == 1 for name in names(4))


@pytest.mark.parametrize(
    "kind", ["Ready", "RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking", "Receipt"]
)
def test_a_repeated_message_changes_nothing(kind: str) -> None:
    network = make_network(4)
    network.tap = lambda sender, _recipient, data: (
        [data, data] if sender != AGGREGATOR and body_type(data) == kind else [data]
    )
    network.run()
    check_outcome(network, names(4))
    assert check_sum(network, "hospital-00") == tuple(names(4))


@pytest.mark.parametrize("kind", ["RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone"])
def test_two_different_messages_of_one_kind_are_equivocation(kind: str) -> None:
    network = make_network(5, threshold=4)
    liar = network.consortium.identities["hospital-01"]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender != liar.node_id or body_type(data) != kind:
            return [data]
        message, tail = m.decode(data, liar.node_id, liar.public_key, network.digest), b""
        match message.body:
            case m.RoundKeys(share, pair, _, tag, last):
                other: m.AnyBody = m.RoundKeys(share, pair, bytes(32), tag, last)
            case m.SealedSeeds():
                other = msgspec.structs.replace(message.body, shares=bytes(1202))
            case m.UploadChunk(index, _):
                tail = bytes(len(message.tail))
                other = m.UploadChunk(index, m.chunk_digest(tail))
            case m.UploadDone(_, view, tag):
                other = m.UploadDone(bytes(32), view, tag)
        return [data, m.encode(liar, AttemptId(network.digest, message.round, message.attempt), other, tail)]

    network.tap = tap
    network.run()
    assert network.expelled == [liar.node_id]
    check_sum(network, "hospital-00")


def test_old_messages_that_are_replayed_are_ignored_or_refused() -> None:
    network = make_network(4, rounds=2)
    kept: list[bytes] = []

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender == "hospital-02" and body_type(data) in ("RoundKeys", "UploadChunk", "Unmasking"):
            kept.append(data)
            return [*kept[:1], data] if body_type(data) == "Unmasking" else [data]
        return [data]

    network.tap = tap
    network.run()
    check_outcome(network, names(4))
    assert len(network.sums["hospital-02"]) == 2


def test_a_restarted_node_never_masks_twice() -> None:
    network = make_network(4, rounds=2)
    network.run()
    for completed, number in [(2, 2), (2, 1)]:
        with pytest.raises(RemoteProtocolError, match="went back"):
            say(network, restarted(network, completed), number, 0, m.RoundOpen(completed))
    update = network.vectors("hospital-00", 2)
    for attempt, cohort, fault in [
        (1, names(4), "an attempt again that we began before a restart"),
        (2, names(3), "second sum of a round in which we have voted"),
    ]:
        again = restarted(network, completed=1)
        assert say(network, again, 2, 0, m.RoundOpen(1)) == [node.Train(2)]
        again.submit(2, update)
        with pytest.raises(RemoteProtocolError, match=fault):
            say(network, again, 2, attempt, m.AttemptOpen(tuple(cohort)))


@pytest.mark.parametrize("place", [0, -1])
def test_whoever_has_voted_hands_in_no_other_update_of_that_round(place: int) -> None:
    """The difference of two sums of the same nodes would be the difference of its updates: a second look at its patients."""
    network = make_network(4, rounds=2)
    network.run()
    again = restarted(network, completed=1)
    say(network, again, 2, 0, m.RoundOpen(1))
    other = network.vectors("hospital-00", 2).copy()
    other[place] += 1e-9
    with pytest.raises(LocalProtocolError, match="another update"):
        again.submit(2, other)
    assert again.submit(2, network.vectors("hospital-00", 2))


def restarted(network: Network, completed: int) -> node.NodeMachine:
    """The first node, from its journal, with so many sums applied."""
    return node.NodeMachine(
        network.parties,
        network.consortium.identities["hospital-00"],
        (AGGREGATOR, network.consortium.identities[AGGREGATOR].public_key),
        network.size,
        coins=lambda n: bytes(n),
        journal=network.journals["hospital-00"],
        completed=completed,
        ciphers=network.ciphers,
    )


def test_what_a_driver_may_not_do() -> None:
    network = make_network(4, size=8)
    machine = network.nodes["hospital-00"]
    with pytest.raises(LocalProtocolError, match="none is asked for"):
        machine.submit(1, np.zeros(8))
    aggregator = network.consortium.identities[AGGREGATOR]
    machine.receive(m.encode(aggregator, AttemptId(network.digest, 1, 0), m.RoundOpen(0)))
    for bad in (np.zeros(7), np.full(8, np.nan), np.zeros((8, 1))):
        with pytest.raises(LocalProtocolError):
            machine.submit(1, bad)


@pytest.mark.parametrize("number", [0, 3, 2**31])
def test_rounds_that_the_agreement_does_not_have_are_refused(number: int) -> None:
    network = make_network(4, rounds=2)
    aggregator = network.consortium.identities[AGGREGATOR]
    opened = m.encode(aggregator, AttemptId(network.digest, number, 0), m.RoundOpen(0))
    with pytest.raises(RemoteProtocolError, match="does not have"):
        network.nodes["hospital-00"].receive(opened)


def test_a_node_that_joins_without_end_is_not_to_blame_and_costs_nothing() -> None:
    """A line that is cut all the time looks just like it."""
    network = make_network(4, rounds=2, threshold=3)

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        return [data] * 1000 if sender == "hospital-03" and body_type(data) == "Join" else [data]

    network.tap = tap
    network.run()
    assert not network.expelled
    assert check_sum(network, "hospital-00", 2) == tuple(names(4))


def test_too_few_hospitals_end_the_study_in_good_order() -> None:
    network = make_network(4)
    network.run(absent=["hospital-00", "hospital-01"])
    assert network.ended["hospital-02"] == "too few hospitals joined before the deadline"


def test_a_node_that_declines_leaves_the_others_to_go_on() -> None:
    network = make_network(5, rounds=2, threshold=4)
    leaver = network.nodes["hospital-04"]
    vectors = network.vectors

    def declining(name: str, number: int) -> np.ndarray:
        if name == "hospital-04" and number == 2:
            for output in leaver.decline("the budget is spent"):
                assert isinstance(output, node.Send)
                network._post("hospital-04", AGGREGATOR, output.data)
            leaver._training = True  # the network submits all the same; a late Ready must not disturb
        return vectors(name, number)

    network.vectors = declining
    network.run()
    assert check_sum(network, "hospital-00", 2) == tuple(names(4))


def test_equal_weights_give_the_plain_mean() -> None:
    network = make_network(4, size=11)
    network.vectors = lambda name, number: np.append(np.random.default_rng(int(name[-2:])).normal(size=10), 1.0)
    network.run()
    total = network.sums["hospital-01"][0].total
    mean = np.mean([network.vectors(name, 1)[:10] for name in names(4)], axis=0)
    assert np.abs(total[:10] / total[10] - mean).max() < 2.0**-16


def test_a_second_sum_of_a_round_is_refused_once_unmasking_began() -> None:
    """The difference of two sums over different survivors would be one node's vector."""
    network = make_network(4, threshold=3)
    aggregator = network.consortium.identities[AGGREGATOR]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender == AGGREGATOR and body_type(data) in ("SumChunk", "RoundResult"):
            return [m.encode(aggregator, AttemptId(network.digest, 1, 2), m.AttemptOpen(tuple(names(3))))]
        return [data]

    network.tap = tap
    network.run()
    assert "not part of" in str(network.faults.pop("hospital-03"))
    assert set(network.faults) == set(names(3))
    assert all("second sum" in str(fault) for fault in network.faults.values())


def test_the_journal_refuses_a_second_sum_also_after_a_restart() -> None:
    network = make_network(4)
    machine = opened(network, "hospital-00")
    ballot = Ballot.of(names(3), np.zeros(network.size))
    network.journals["hospital-00"].record(1, 0, "voted", msgspec.msgpack.encode(ballot))
    with pytest.raises(RemoteProtocolError, match="second sum"):
        say(network, machine, 1, 1, m.AttemptOpen(tuple(names(4))))


def say(network: Network, machine: node.NodeMachine, number: int, attempt: int, body: m.AnyBody) -> list[node.Output]:
    aggregator = network.consortium.identities[AGGREGATOR]
    return machine.receive(m.encode(aggregator, AttemptId(network.digest, number, attempt), body))


def opened(network: Network, name: str, number: int = 1) -> node.NodeMachine:
    machine = network.nodes[name]
    say(network, machine, number, 0, m.RoundOpen(0))
    machine.submit(number, np.zeros(network.size))
    return machine


COHORT = m.AttemptOpen(tuple(names(4)))


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([(1, 0, m.RoundOpen(0))], "went back to round 1"),
        ([(3, 0, m.RoundOpen(0)), (4, 0, m.RoundOpen(0))], "while we train for another"),
        ([(1, 1, COHORT)], "attempt of round 1 during round 2"),
        ([(3, 1, COHORT)], "attempt of round 3 during round 2"),
        ([(2, 1, COHORT), (2, 1, COHORT)], "old attempt again"),
        ([(2, 9, COHORT)], "more attempts than agreed"),
        ([(2, 1, m.KeySet((), ()))], "not open"),
        ([(2, 1, COHORT), (2, 2, m.KeySet((), ()))], "not open"),
        ([(2, 1, COHORT), (2, 1, m.SeedSet((), ()))], "in state KEYS"),
        ([(2, 1, COHORT), (2, 1, m.Credit(1))], "in state KEYS"),
        ([(2, 1, COHORT), (2, 1, m.SurvivorProof(()))], "in state KEYS"),
        ([(2, 1, m.Ready())], "which only nodes send"),
    ],
)
def test_an_aggregator_that_leaves_the_order_of_things_is_refused(
    messages: list[tuple[int, int, m.AnyBody]], fault: str
) -> None:
    network = make_network(4, rounds=5)
    machine = opened(network, "hospital-01", 2)
    *before, last = messages
    for message in before:
        say(network, machine, *message)
    with pytest.raises(RemoteProtocolError, match=fault):
        say(network, machine, *last)


def test_an_aggregator_that_forgets_a_round_is_refused() -> None:
    network = make_network(4, rounds=5)
    machine = network.nodes["hospital-02"]
    machine._completed = 4
    with pytest.raises(RemoteProtocolError, match="forgot a completed round"):
        say(network, machine, 5, 0, m.RoundOpen(3))


@pytest.mark.parametrize("kind", ["recipient", "view", "type", "stranger", "early survivors"])
def test_what_is_relayed_wrongly_is_the_aggregators_fault(kind: str) -> None:
    """A colluding member signs whatever the aggregator wants; the node refuses all the same."""
    network = make_network(5, threshold=4, minimum_cohort=4)
    aggregator, colluder = network.consortium.identities[AGGREGATOR], network.consortium.identities["hospital-04"]
    victim = "hospital-00"

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        envelope = m.decode(data, AGGREGATOR, aggregator.public_key, network.digest) if sender == AGGREGATOR else None
        if envelope is None or recipient != victim:
            return [data]
        attempt = AttemptId(network.digest, envelope.round, envelope.attempt)
        body = envelope.body
        match kind, body:
            case (("recipient" | "view"), m.SeedSet(senders, sealed)):
                to, view = ("hospital-03", None) if kind == "recipient" else (victim, bytes(32))
                old = next(s for s in sealed if m.claimed_sender(s) == "hospital-04")
                seeds = m.decode(old, "hospital-04", colluder.public_key, network.digest).body
                assert isinstance(seeds, m.SealedSeeds)
                other = msgspec.structs.replace(seeds, recipient=to, cohort_digest=view or seeds.cohort_digest)
                forged = m.encode(colluder, attempt, other)
                body = m.SeedSet(senders, tuple(forged if s == old else s for s in sealed))
            case "type", m.KeySet(digests, keys):
                forged = m.encode(colluder, attempt, m.Ready())
                body = m.KeySet(digests, tuple(forged if m.claimed_sender(k) == "hospital-04" else k for k in keys))
            case "stranger", m.AttemptOpen(cohort):
                body = m.AttemptOpen(tuple(name for name in cohort if name != "hospital-04"))
            case "early survivors", m.Credit():
                body = m.Survivors(tuple((name, bytes(32)) for name in names(5)), ())
        return [m.encode(aggregator, attempt, body, envelope.tail)]

    network.tap = tap
    network.run()
    faults = {
        "recipient": "not for us",
        "view": "other round keys than us",
        "type": "a Ready instead of RoundKeys",
        "stranger": "not in the cohort",
        "early survivors": "another digest|before our upload was complete",
    }
    assert set(network.faults) == {victim}
    assert re.search(faults[kind], str(network.faults[victim]))
    assert network.faults[victim].peer == m.AGGREGATOR
