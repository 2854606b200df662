"""Whole studies under crashes, silence, restarts and replays: the right sum of the survivors or none, and nobody honest is blamed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keys.errors import LocalProtocolError, RemoteProtocolError
from protocols import attempt_node, shamir
from protocols import messages as m
from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols.agreement import Deadlines
from protocols.attempt_aggregator import Phase
from protocols.sealing import AttemptId
from protocols.study_aggregator import Stage
from tests.adversary.attackers import MaliciousNode
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, make_network, names
from tests.protocols.test_attempt import check_sum
from tests.protocols.test_schedules import check_outcome

FROM_NODES = ["Join", "Ready", "RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking"]


def from_aggregator(network: Network, body: m.AnyBody, number: int = 1, attempt: int = 0) -> bytes:
    identity = network.consortium.identities[AGGREGATOR]
    return m.encode(identity, AttemptId(network.digest, number, attempt), body)


def from_node(network: Network, name: str, body: m.AnyBody, number: int = 0, attempt: int = 0) -> bytes:
    return m.encode(network.consortium.identities[name], AttemptId(network.digest, number, attempt), body)


def each_uploads_once_per_attempt(network: Network) -> bool:
    """No (round, attempt) is begun or used twice at any node."""
    return all(count == 1 for journal in network.journals.values() for count in Counter(journal.entries).values())


# --- silence


@given(st.dictionaries(st.sampled_from(names(6)), st.integers(0, 45), max_size=3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_nodes_that_fall_silent_at_any_message_for_good(silent_after: dict[str, int], noticed: bool) -> None:
    """A crash after a node's n-th message; the transport may or may not tell the aggregator."""
    network, sent = make_network(6, size=2600, rounds=2, threshold=4), Counter[str]()

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        party = recipient if sender == AGGREGATOR else sender
        if sent[party] > silent_after.get(party, 10**9):
            return []
        sent[sender] += 1
        if sent[sender] == silent_after.get(sender, -1) + 1:
            if noticed:
                network._from_aggregator(network.aggregator.leave(sender, network.now))
            return []
        return [data]

    network.tap = tap
    network.run()
    check_outcome(network, names(6))
    if len(silent_after) <= 2:
        for name in set(names(6)) - silent_after.keys():
            # Two may be lost and four remain; only an opened round is never tried again.
            assert len(network.sums[name]) + sum(lost.final for lost in network.lost[name]) == 2


@given(st.sampled_from(names(4)), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_one_message_to_the_aggregator_that_is_lost_without_notice(victim: str, index: int) -> None:
    network, sent = make_network(4, size=2600, threshold=3), 0

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        nonlocal sent
        sent += sender == victim
        return [] if sender == victim and sent == index + 1 else [data]

    network.tap = tap
    network.run()
    check_outcome(network, names(4))


def test_a_node_that_never_joins_is_waited_for_once() -> None:
    network = make_network(4, rounds=2, threshold=3)
    network.run(absent=["hospital-02"])
    check_outcome(network, names(4))
    others = ("hospital-00", "hospital-01", "hospital-03")
    assert check_sum(network, "hospital-00", 2) == others
    assert network.now == 10.0  # the join deadline, and no other


@pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.SUM, Stage.RECEIPTS])
def test_the_study_ends_when_fewer_than_the_minimum_are_left(stage: Stage) -> None:
    network = make_network(4, rounds=5, threshold=3)
    left: set[str] = set()

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if not left and sender == "hospital-01" and network.aggregator.stage is stage:
            left.update(names(2))
            for name in names(2):
                network._from_aggregator(network.aggregator.leave(name, network.now))
        return [] if left & {sender, recipient} else [data]

    network.tap = tap
    network.run()
    check_outcome(network, names(4))
    assert network.ended["hospital-02"] == "too few hospitals are left"
    assert len(network.sums["hospital-02"]) == (1 if stage is Stage.RECEIPTS else 0)


def test_the_train_deadline_leaves_a_slow_node_out_of_this_round_only() -> None:
    network = make_network(4, rounds=2, threshold=3)
    late: list[bytes] = []

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender == "hospital-03" and body_type(data) == "Ready" and not late:
            late.append(data)
            return []
        if sender == AGGREGATOR and body_type(data) == "SumChunk" and len(late) == 1:
            late.append(data)
            network._queue.append(("hospital-03", AGGREGATOR, late[0]))  # it arrives when the round is over
        return [data]

    network.tap = tap
    network.run()
    check_outcome(network, names(4))
    assert check_sum(network, "hospital-00", 1) == tuple(names(3))
    assert check_sum(network, "hospital-03", 1) == tuple(names(3))
    assert check_sum(network, "hospital-03", 2) == tuple(names(4))


def cut_all_lines(network: Network, stage: Stage) -> list[str]:
    """From this stage of round 2 on nothing arrives anywhere and nobody is told, until the list is emptied."""
    dead: list[str] = []

    def tap(_sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if (network.aggregator._round, network.aggregator.stage) == (2, stage) and not network.now:
            dead.append("cut")
        return [] if dead else [data]

    network.tap = tap
    network.start()
    while network._queue:
        network._deliver(*network._queue.popleft())
    assert dead
    return dead


@pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.SUM, Stage.RECEIPTS])
def test_an_outage_that_nobody_is_told_of_costs_time_and_no_round(stage: Stage) -> None:
    network = make_network(4, rounds=4, threshold=3)
    dead = cut_all_lines(network, stage)
    while not network.aggregator._overtime:
        network.pass_time()
    dead.clear()
    for name in names(4):
        network._from_node(name, network.nodes[name].rejoin())
    network.finish()
    check_outcome(network, names(4))
    assert {len(network.sums[name]) for name in names(4)} == {4}
    assert network.now <= 30.0  # nobody waited for longer than the outage: at most two phases, and the time to train


@pytest.mark.parametrize("back", [2, 3])
def test_after_an_outage_the_round_begins_with_those_who_are_back_soon_after_they_are_enough(back: int) -> None:
    network = make_network(4, rounds=2, threshold=3)
    dead = cut_all_lines(network, Stage.TRAIN)
    network.pass_time()
    assert network.aggregator._overtime
    dead.clear()
    for name in names(back):
        network._from_node(name, network.nodes[name].rejoin())
    network.finish()
    check_outcome(network, names(4))
    assert len(network.sums["hospital-00"]) == (2 if back == 3 else 1)


def test_an_outage_that_does_not_end_ends_the_study() -> None:
    network = make_network(4, rounds=9, threshold=3)
    cut_all_lines(network, Stage.TRAIN)
    network.finish()
    limits = network.agreement.deadlines
    assert network.aggregator._end_reason == "too few hospitals are left"
    assert network.now == limits.train_seconds + limits.join_seconds + limits.train_seconds  # the last for farewells


def test_a_round_without_an_attempt_left_is_no_reason_to_end_the_study_after_an_outage() -> None:
    network = make_network(4, rounds=2, threshold=3, max_attempts=1)
    network.start()
    while network.aggregator.stage is not Stage.SUM:
        network._deliver(*network._queue.popleft())
    withheld = [True]
    network.tap = lambda _from, _to, data: [] if withheld and body_type(data) == "Ready" else [data]
    network.restart_aggregator()
    while not network.aggregator._overtime:
        network._deliver(*network._queue.popleft()) if network._queue else network.pass_time()
    withheld.clear()
    for name in names(4):
        network._from_node(name, network.nodes[name].rejoin())
    network.finish()
    check_outcome(network, names(4))
    assert {summed.round for summed in network.sums["hospital-00"]} == {2}


def test_a_node_that_uploaded_and_is_known_to_be_gone_counts_but_is_not_waited_for() -> None:
    network, victim = make_network(4, threshold=3), "hospital-00"
    deliver, gone = network._deliver, False

    def delivering(sender: str, recipient: str, data: bytes) -> None:
        nonlocal gone
        if not (gone and victim in (sender, recipient)):
            deliver(sender, recipient, data)
        if sender == victim and body_type(data) == "UploadDone":
            gone = True
            network._from_aggregator(network.aggregator.leave(victim, network.now))

    network._deliver = delivering  # type: ignore[method-assign]
    network.run()
    check_outcome(network, names(4))
    assert check_sum(network, "hospital-01") == tuple(names(4))
    assert [event.fields["seconds"] for event in network.progress if event.event == "sum"] == [0.0]


# --- repetitions


def test_every_message_of_every_node_twice() -> None:
    network = make_network(4, rounds=2)
    network.tap = lambda sender, _recipient, data: [data] * (1 if sender == AGGREGATOR else 2)
    network.run()
    check_outcome(network, names(4))
    for number in (1, 2):
        assert check_sum(network, "hospital-01", number) == tuple(names(4))


@pytest.mark.parametrize("kind", FROM_NODES)
def test_a_node_that_joins_again_at_any_moment(kind: str) -> None:
    """Its join may be what ends the attempt; a sum that this opens is not stored yet and must not be loaded."""
    network, victim, joined = make_network(4, rounds=2, threshold=3), "hospital-03", False

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        nonlocal joined
        if sender != victim or body_type(data) != kind or joined:
            return [data]
        joined = True
        rejoined = network.nodes[victim].rejoin()
        return [output.data for output in rejoined if isinstance(output, node.Send)]

    network.tap = tap
    network.run()
    check_outcome(network, names(4))
    assert len(network.sums[victim]) == 2
    assert each_uploads_once_per_attempt(network)


def test_a_sum_that_arrives_twice_with_a_gap_is_not_held_against_the_aggregator() -> None:
    network, victim = make_network(4, size=2600), "hospital-00"
    lost: list[str] = []

    def tap(_sender: str, recipient: str, data: bytes) -> list[bytes]:
        kind = body_type(data)
        if recipient == victim and kind == ("RoundResult" if not lost else "SumChunk") and len(lost) < 2:
            lost.append(kind)  # the first result, then the first chunk of the second delivery
            if len(lost) == 1:
                network._from_node(victim, network.nodes[victim].rejoin())
            return []
        return [data]

    network.tap = tap
    network.run()
    assert lost == ["RoundResult", "SumChunk"]
    check_outcome(network, names(4))
    check_sum(network, victim)


# --- replays


def test_what_a_replaying_aggregator_sends_is_refused_or_without_effect() -> None:
    """Every message of round 1 to a node that stands in the upload of round 2: no second answer to any of them."""
    network, victim = make_network(4, size=2600, rounds=2), "hospital-01"
    old: list[bytes] = []
    tried: dict[str, object] = {}

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        number = m.decode(
            data,
            sender,
            network.consortium.identities[sender].public_key,
            network.digest,
        ).round
        if recipient == victim and number == 1:
            old.append(data)
        if sender == victim and number == 2 and body_type(data) == "UploadDone":
            for replayed in old:
                try:
                    tried[body_type(replayed)] = network.nodes[victim].receive(replayed)
                except RemoteProtocolError as fault:
                    tried[body_type(replayed)] = fault.peer
        return [data]

    network.tap = tap
    network.run()
    refused = {"RoundOpen", "AttemptOpen", "KeySet", "SeedSet", "Credit", "Survivors", "SurvivorProof"}
    again = tried.pop("RoundResult")  # our countersignature of the very same record, once more
    assert isinstance(again, list)
    assert [body_type(output.data) for output in again] == ["Receipt"]
    assert tried == dict.fromkeys(refused, m.AGGREGATOR) | {"SumChunk": []}
    check_outcome(network, names(4))
    check_sum(network, victim, 2)


def test_what_nodes_sent_in_an_earlier_attempt_is_ignored_in_the_next() -> None:
    network = make_network(6, size=2600, threshold=4)
    liar = network.consortium.identities["hospital-02"]
    first: list[tuple[str, bytes]] = []
    replayed = False

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        nonlocal replayed
        if sender == AGGREGATOR:
            return [data]
        key = network.consortium.identities[sender].public_key
        message = m.decode(data, sender, key, network.digest)
        if message.attempt == 1:
            first.append((sender, data))
            body = message.body
            if isinstance(body, m.SealedSeeds) and sender == liar.node_id and body.recipient == "hospital-04":
                bad = m.SealedSeeds(
                    body.recipient,
                    body.cohort_digest,
                    bytes(1202),
                    bytes(1168),
                    bytes(32),
                    bytes(32),
                    body.contribution_digest,
                )
                return [m.encode(liar, AttemptId(network.digest, 1, 1), bad)]
        if message.attempt == 2 and not replayed:
            replayed = True
            network._queue.extend((name, AGGREGATOR, old) for name, old in first)
        return [data]

    network.tap = tap
    network.run()
    assert replayed
    check_outcome(network, [name for name in names(6) if name != liar.node_id])
    assert {"hospital-00", "hospital-01", "hospital-03", "hospital-05"} <= set(check_sum(network, "hospital-00"))


def test_an_opened_round_that_fails_is_not_attempted_again_although_enough_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dealer shares another self seed than it committed to; that shows only after the others have revealed theirs."""
    network, liar = make_network(5, size=2600, rounds=2, threshold=4), "hospital-01"

    def coins(count: int) -> bytes:
        return os.urandom(count)

    def split(secret: bytes, threshold: int, holders: int, source: shamir.Coins) -> list[bytes]:
        return shamir.split(bytes(32) if source is coins else secret, threshold, holders, source)

    monkeypatch.setattr(attempt_node, "shamir", SimpleNamespace(split=split, is_share=shamir.is_share))
    network.nodes[liar]._coins = coins
    network.run()
    assert network.expelled == [liar]
    assert not network.faults
    assert {(number, attempt) for number, attempt, _ in network.journals["hospital-00"].entries} == {(1, 1), (2, 1)}
    assert [summed.round for summed in network.sums["hospital-00"]] == [2]
    assert liar not in check_sum(network, "hospital-00", 2)


def test_messages_of_the_future_are_the_senders_fault() -> None:
    for number, attempt, body in [
        (2, 0, m.Ready()),
        (1, 9, m.UploadDone(bytes(32), bytes(32), 0)),
        (2, 0, m.Receipt(bytes(64))),
    ]:
        network, liar = make_network(5, threshold=4), "hospital-02"
        future = from_node(network, liar, body, number, attempt)
        network.tap = lambda sender, _recipient, data, future=future, liar=liar: (
            [future] if sender == liar and body_type(data) == "Ready" else [data]
        )
        network.run()
        assert network.expelled == [liar]
        check_sum(network, "hospital-00")


# --- restarts


@given(st.sampled_from(FROM_NODES), st.booleans())
@example("Unmasking", True)
@settings(max_examples=30, deadline=None)
def test_a_node_that_crashes_and_comes_back_with_its_journal_never_masks_twice(kind: str, delivered: bool) -> None:
    network, victim = make_network(5, size=2600, rounds=3, threshold=4), "hospital-03"
    uploads: list[bytes] = []
    crashed = stopped = False

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        nonlocal crashed, stopped
        if sender == victim and body_type(data) == "UploadChunk":
            uploads.append(data)
        if stopped and victim in (sender, recipient):
            return []
        if sender == victim and body_type(data) == kind and not crashed:
            crashed = True
            network._from_aggregator(network.aggregator.leave(victim, network.now))
            pending = [entry for entry in network._queue if victim not in entry[:2]]
            network._queue.clear()
            network._queue.extend(pending)
            network.nodes[victim] = network.new_node(victim)
            if delivered:
                network._queue.append((victim, AGGREGATOR, data))
            rejoined = network.nodes[victim].start()
            network._queue.extend(
                (victim, AGGREGATOR, output.data) for output in rejoined if isinstance(output, node.Send)
            )
            return []
        return [data]

    deliver = network._deliver

    def delivering(sender: str, recipient: str, data: bytes) -> None:
        nonlocal stopped
        try:
            deliver(sender, recipient, data)
        except LocalProtocolError:
            if recipient != victim:
                raise
            stopped = True
            network._from_aggregator(network.aggregator.leave(victim, network.now))

    network.tap = tap
    network._deliver = delivering  # type: ignore[method-assign]
    network.run()
    assert crashed
    check_outcome(network, names(5))
    begun = [entry for entry in network.journals[victim].entries if entry[2] == "begun"]
    assert len(begun) == len(set(begun))
    places = [
        (message.round, message.attempt, message.body.index)
        for message in (
            m.decode(data, victim, network.consortium.identities[victim].public_key, network.digest) for data in uploads
        )
        if isinstance(message.body, m.UploadChunk)
    ]
    assert len(places) == len(set(places))


# --- drivers


def test_only_the_update_that_was_asked_for_is_taken_once() -> None:
    network = make_network(4, size=8)
    machine = network.nodes["hospital-00"]
    assert machine.receive(from_aggregator(network, m.RoundOpen(0))) == [node.Train(1)]
    for bad in (np.zeros(9), np.zeros(8, np.float32), np.full(8, np.inf)):
        with pytest.raises(LocalProtocolError):
            machine.submit(1, bad)
    with pytest.raises(LocalProtocolError, match="none is asked for"):
        machine.submit(2, np.zeros(8))
    assert len(machine.submit(1, np.zeros(8))) == 1
    with pytest.raises(LocalProtocolError, match="none is asked for"):
        machine.submit(1, np.zeros(8))


@pytest.mark.parametrize(
    ("body", "number", "attempt"),
    [
        (m.Ready(), 1, 0),  # only nodes send this
        (m.AttemptOpen(tuple(names(4))), 1, 1),  # before we were ready
        (m.SumChunk(0, m.chunk_digest(b"")), 1, 0),  # less than a chunk
        (m.RoundOpen(1), 0, 0),
        (m.KeySet((), ()), 1, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, m.Body) else None,
)
def test_what_no_honest_aggregator_sends_is_refused(body: m.AnyBody, number: int, attempt: int) -> None:
    network = make_network(4, size=8)
    machine = network.nodes["hospital-00"]
    machine.receive(from_aggregator(network, m.RoundOpen(0)))
    with pytest.raises(RemoteProtocolError) as caught:
        machine.receive(from_aggregator(network, body, number, attempt))
    assert caught.value.peer == m.AGGREGATOR


def test_attempts_only_move_forward_and_not_beyond_the_agreed_number() -> None:
    network = make_network(4, size=8, max_attempts=2)
    machine, cohort = network.nodes["hospital-00"], m.AttemptOpen(tuple(names(4)))
    machine.receive(from_aggregator(network, m.RoundOpen(0)))
    machine.submit(1, np.zeros(8))
    machine.receive(from_aggregator(network, cohort, 1, 2))
    for attempt, fault in ((1, "old attempt"), (2, "old attempt"), (3, "more attempts than agreed")):
        with pytest.raises(RemoteProtocolError, match=fault):
            machine.receive(from_aggregator(network, cohort, 1, attempt))
    assert [entry[:2] for entry in network.journals["hospital-00"].entries] == [(1, 2)]


def test_attempts_only_move_forward_across_a_restart_too() -> None:
    network = make_network(4, size=8, max_attempts=3)
    network.journals["hospital-00"].record(1, 2, "begun")
    for attempt in (1, 2, 3):
        machine = network.new_node("hospital-00")
        machine.receive(from_aggregator(network, m.RoundOpen(0)))
        machine.submit(1, np.zeros(8))
        opened = from_aggregator(network, m.AttemptOpen(tuple(names(4))), 1, attempt)
        if attempt == 3:
            machine.receive(opened)
        else:
            with pytest.raises(RemoteProtocolError, match="that we began before a restart"):
                machine.receive(opened)
    assert [entry[:2] for entry in network.journals["hospital-00"].entries] == [(1, 2), (1, 3)]


def test_rounds_only_move_forward() -> None:
    network = make_network(4, size=8, rounds=3)
    machine = network.nodes["hospital-00"]
    machine.receive(from_aggregator(network, m.RoundOpen(0), 2))
    machine.submit(2, np.zeros(8))
    with pytest.raises(RemoteProtocolError, match="went back to round 1"):
        machine.receive(from_aggregator(network, m.RoundOpen(0), 1))


def test_an_operator_who_stops_the_study_sends_everybody_home() -> None:
    network = make_network(4, rounds=9)

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender == "hospital-00" and body_type(data) == "Receipt":
            network._from_aggregator(network.aggregator.stop("stopped by the operator", network.now))
        return [data]

    network.tap = tap
    network.run()
    check_outcome(network, names(4))
    assert set(network.ended.values()) == {"stopped by the operator"}
    assert len(network.ended) == 4
    assert network.aggregator.stop("again", network.now) == []


def leave_at_the_last_receipt(network: Network, victim: str) -> None:
    """The victim crashes when the others have its last upload, and hears no more."""
    gone: set[str] = set()

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender == victim and body_type(data) == "UploadDone" and not gone:
            gone.add(victim)
            network._from_aggregator(network.aggregator.leave(victim, network.now))
            return [data]
        return [] if victim in (sender, recipient) and gone else [data]

    network.tap = tap
    network.start()
    while network._queue:
        network._deliver(*network._queue.popleft())
    assert network.aggregator.stage is Stage.FAREWELL
    assert set(network.ended) == set(names(4)) - {victim}
    assert network.progress[-1].fields["away"] == [victim]
    network.tap = lambda _sender, _recipient, data: [data]


def test_a_node_that_starts_again_when_the_others_are_done_still_gets_the_sums() -> None:
    network, victim = make_network(4, threshold=3), "hospital-00"
    leave_at_the_last_receipt(network, victim)
    network.restart_node(victim)
    network.finish()
    assert network.now == 0.0
    assert check_sum(network, victim) == check_sum(network, "hospital-01")
    assert network.ended[victim] == "all rounds are done"


@pytest.mark.parametrize("declines", [True, False])
def test_a_node_that_declines_or_misbehaves_at_the_end_is_not_waited_for(declines: bool) -> None:
    network, victim = make_network(4, threshold=3), "hospital-00"
    leave_at_the_last_receipt(network, victim)
    last_word = from_node(network, victim, m.Declined("the budget is spent")) if declines else b"rubbish"
    network._from_aggregator(network.aggregator.receive(victim, last_word, network.now))
    assert network.aggregator.ended
    assert network.now == 0.0


def test_a_node_that_does_not_come_back_is_waited_for_until_the_deadline_or_until_the_operator_says() -> None:
    for stopped in (False, True):
        network = make_network(4, threshold=3)
        leave_at_the_last_receipt(network, "hospital-00")
        if stopped:
            assert network.aggregator.stop("stopped by the operator", network.now) == []
        network.finish()
        assert network.now == (0.0 if stopped else network.agreement.deadlines.train_seconds)


def test_strangers_and_expelled_nodes_are_not_heard() -> None:
    network = make_network(5, threshold=4)
    machine = network.aggregator
    machine.start(0.0)
    join = from_node(network, "hospital-00", m.Join(1))
    assert machine.receive("stranger", join, 0.0) == []
    outputs = machine.receive("hospital-01", join, 0.0)  # in another node's name
    assert [o.fields["node"] for o in outputs if isinstance(o, agg.Progress)] == ["hospital-01"]
    assert machine.receive("hospital-01", from_node(network, "hospital-01", m.Join(1)), 0.0) == []
    assert [o.event for o in machine.receive("hospital-00", join, 0.0) if isinstance(o, agg.Progress)] == ["joined"]


# --- cut lines, late receipts, and the end after a crash


def run_until(network: Network, stage: Stage) -> None:
    """Deliver what there is, and let time pass, until the aggregator waits in this stage with nothing under way."""
    while network._queue or network.aggregator.stage is not stage:
        assert not network.aggregator.ended
        if network._queue:
            network._deliver(*network._queue.popleft())
        else:
            network.pass_time()


def test_a_line_that_is_cut_eighty_times_gets_nobody_expelled() -> None:
    network, victim = make_network(4, size=100, rounds=40, threshold=3), "hospital-03"
    cuts: Counter[int] = Counter()

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if recipient == victim and body_type(data) == "RoundOpen" and cuts[network.aggregator._round] < 2:
            cuts[network.aggregator._round] += 1
            network.disconnect(victim)
            return []
        return [data]

    network.tap = tap
    network.run()
    assert cuts.total() == 80
    assert not [event for event in network.progress if event.event == "expelled"]
    assert not network.faults
    assert [summed.round for summed in network.sums[victim]] == list(range(1, 41))


def test_one_join_brings_one_sum_however_many_were_missed() -> None:
    network, late = make_network(4, size=100, rounds=9, threshold=3), "hospital-03"
    network.start(absent=[late])
    while network.aggregator._round < 9:
        if network._queue:
            network._deliver(*network._queue.popleft())
        else:
            network.pass_time()
    for _ in range(3):
        sends = network.aggregator.receive(late, from_node(network, late, m.Join(1)), network.now)
        sent = [output.data for output in sends if isinstance(output, agg.SendTo)]
        assert [body_type(data) for data in sent] == ["SumChunk", "RoundResult"]


@pytest.mark.parametrize("away_until", [Stage.TRAIN, Stage.FAREWELL])
def test_a_node_that_missed_many_sums_catches_up_one_by_one(away_until: Stage) -> None:
    network, late = make_network(4, size=100, rounds=6, threshold=3), "hospital-03"
    network._from_aggregator(network.aggregator.start(network.now))
    for name in names(4):
        network._from_node(name, network.nodes[name].start())
    gone = True

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if gone and late in (sender, recipient) and body_type(data) != "Join":
            network._from_aggregator(network.aggregator.leave(late, network.now))
            return []
        return [data]

    network.tap = tap
    while network.aggregator._round < 5 or (
        away_until is Stage.FAREWELL and network.aggregator.stage is not away_until
    ):
        if network._queue:
            network._deliver(*network._queue.popleft())
        else:
            network.pass_time()
    assert not network.sums[late]
    gone = False
    network.restart_node(late)
    network.finish()
    assert [summed.round for summed in network.sums[late]] == list(range(1, 7))
    assert network.ended[late] == "all rounds are done"
    check_outcome(network, names(4))


def lose_before_the_upload(network: Network, late: str) -> list[str]:
    """The connection of `late` breaks after its round keys: it is in no sum of this round, but there for the result."""
    done: list[str] = []

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender == late and body_type(data) == "RoundKeys" and not done:
            done.append(late)
            network.disconnect(late)
            return []
        return [data]

    network.tap = tap
    return done


def test_a_withheld_receipt_keeps_a_latecomer_waiting_and_no_more() -> None:
    """It blames nobody, and gets the sum as soon as the receipt is there."""
    network, late, silent = make_network(4, rounds=2, threshold=3), "hospital-01", "hospital-03"
    lose_before_the_upload(network, late)
    cut, withheld = network.tap, []

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender == silent and body_type(data) == "Receipt" and not withheld:
            withheld.append(data)
            return []
        return cut(sender, recipient, data)

    network.tap = tap
    network.start()
    run_until(network, Stage.RECEIPTS)
    network.pass_time()
    while network._queue and network.aggregator._round == 2 and not network.sums[silent][1:]:
        network._deliver(*network._queue.popleft())
        if len(withheld) == 1 and network.aggregator.stage is Stage.TRAIN:
            withheld.append(b"")
            network.disconnect(silent)  # and it countersigns again when it is back
    network.finish()
    assert not network.faults
    assert not [event for event in network.progress if event.event == "expelled"]
    assert check_sum(network, silent, 1) == ("hospital-00", "hospital-02", "hospital-03")
    if network.sums[late]:
        assert check_sum(network, late, 1) == ("hospital-00", "hospital-02", "hospital-03")


@pytest.mark.parametrize("protocol", ["masked", "layered"], indirect=True)
def test_withheld_receipts_are_never_held_against_the_aggregator(protocol: str) -> None:
    """A node that lacks the first sum waits for receipts of it through more rounds than there are repeats before blame."""
    rounds, late = node.MAX_REPEATS + 6, "hospital-05"
    network = make_network(6, size=50, threshold=5, minimum_cohort=5, rounds=rounds)
    for liar in names(2):
        MaliciousNode(network, liar).on("Receipt")(lambda *_: [])
    inner, lost = network.tap, False

    def tap(sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        nonlocal lost
        if sender == late and body_type(data) == "RoundKeys" and not lost:
            lost = True
            return []
        return inner(sender, recipient, data)

    network.tap = tap
    network.run()
    assert lost
    assert not network.faults
    assert len(network.sums[names(3)[2]]) == rounds


def test_a_stop_while_receipts_come_in_keeps_those_that_are_there() -> None:
    network, silent = make_network(4, rounds=2, threshold=3), "hospital-03"
    network.tap = lambda sender, _recipient, data: [] if sender == silent and body_type(data) == "Receipt" else [data]
    network.start()
    run_until(network, Stage.RECEIPTS)
    network._from_aggregator(network.aggregator.stop("stopped by the operator", network.now))
    network.finish()
    bodies = [json.loads(line)["body"] for line in network.lines]
    assert [body["type"] for body in bodies] == ["StudyOpened", "RoundRecord", "Receipts", "StudyClosed"]
    assert [receipt["node_id"] for receipt in bodies[2]["countersignatures"]] == names(3)


@pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.FAREWELL])
def test_a_stop_waits_no_longer_than_a_phase_for_a_member_that_says_nothing(stage: Stage) -> None:
    plain, silent = make_network(4, rounds=2, threshold=3), "hospital-03"
    agreement = msgspec.structs.replace(plain.agreement, deadlines=Deadlines(10.0, 600.0, 10.0))
    network = Network(plain.consortium, agreement, plain.vectors, plain.size)
    network.tap = lambda sender, _recipient, data: (
        []
        if (sender == silent and body_type(data) == "Farewell") or (stage is Stage.TRAIN and body_type(data) == "Ready")
        else [data]
    )
    network.start()
    run_until(network, stage)
    stopped = network.now
    for _ in range(50):
        network._from_aggregator(network.aggregator.stop("stopped by the operator", network.now))
        while network._queue:
            network._deliver(*network._queue.popleft())
    assert not network.aggregator.ended
    assert network.aggregator.deadline <= stopped + network.agreement.deadlines.phase_seconds
    network.pass_time()
    assert network.aggregator.ended


def test_a_contributor_that_was_away_at_a_crash_of_the_aggregator_is_waited_for_at_the_end() -> None:
    network, victim = make_network(4, threshold=3), "hospital-00"
    leave_at_the_last_receipt(network, victim)
    lines = len(network.lines)
    network.lines[:] = network.lines[: lines - 1]  # it crashed before the closing line
    others = {name: network.nodes.pop(name) for name in [victim]}
    for machine in network.nodes.values():
        machine.ended = False
    network.restart_aggregator()
    network.nodes |= others
    while network._queue:
        network._deliver(*network._queue.popleft())
    network.pass_time()
    while network._queue:
        network._deliver(*network._queue.popleft())
    assert network.aggregator.stage is Stage.FAREWELL
    network.restart_node(victim)
    network.finish()
    assert check_sum(network, victim) == check_sum(network, "hospital-01")


def test_an_attempt_that_was_opened_to_our_life_before_a_restart_is_not_answered() -> None:
    network = make_network(4, threshold=3)
    fresh = network.new_node("hospital-00")
    assert fresh.receive(from_aggregator(network, m.AttemptOpen(tuple(names(4))), 1, 1)) == []
    assert fresh.receive(from_aggregator(network, m.RoundOpen(0), 1)) == [node.Train(1)]


def test_a_contributor_that_was_away_when_the_aggregator_crashed_in_the_unmasking_is_waited_for_too() -> None:
    """No record tells of it yet; the kept attempt does."""
    network, victim, gone = make_network(4, threshold=3), "hospital-00", False

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        nonlocal gone
        if sender == victim and body_type(data) == "UploadDone":
            gone = True
            network._from_aggregator(network.aggregator.leave(victim, network.now))
            return [data]
        return [] if gone and victim in (sender, recipient) else [data]

    network.tap = tap
    network.start()
    while network.aggregator._attempt_phase is not Phase.UNMASK:
        network._deliver(*network._queue.popleft())
    away = network.nodes.pop(victim)
    network.restart_aggregator()
    network.nodes[victim] = away
    while network.aggregator.stage is not Stage.FAREWELL:
        if network._queue:
            network._deliver(*network._queue.popleft())
        else:
            network.pass_time()
    assert network.progress[-1].fields["away"] == [victim]
    gone = False
    network.tap = lambda _sender, _recipient, data: [data]
    network.restart_node(victim)
    network.finish()
    assert check_sum(network, victim) == check_sum(network, "hospital-01")


def test_only_the_latest_applied_record_is_countersigned_again() -> None:
    """An older one may be of a round that this node was made to take for lost: it has checked no sum of it."""
    network = make_network(4, rounds=2, threshold=3)
    network.tap = lambda sender, recipient, data: [] if body_type(data) == "StudyEnded" else [data]
    network.start()
    run_until(network, Stage.FAREWELL)
    member = network.nodes["hospital-00"]
    lines = {summed.round: summed.line for summed in network.sums["hospital-00"]}
    assert member.receive(from_aggregator(network, m.RoundResult(lines[1]), 1)) == []
    (again,) = member.receive(from_aggregator(network, m.RoundResult(lines[2]), 2))
    assert isinstance(again, node.Send)
    assert body_type(again.data) == "Receipt"


def test_a_node_that_joins_again_after_it_was_ready_is_waited_for_until_it_says_so_again() -> None:
    """Its former life was ready. An attempt that began now would be opened to a process that knows nothing of the round."""
    network, victim = make_network(4, threshold=3), "hospital-03"

    def say_ready(name: str) -> None:
        ready = from_node(network, name, m.Ready(), 1)
        network._from_aggregator(network.aggregator.receive(name, ready, network.now))

    network.tap = lambda _sender, _recipient, data: [] if body_type(data) == "Ready" else [data]
    network.start()
    while network._queue:
        network._deliver(*network._queue.popleft())
    say_ready(victim)
    network.restart_node(victim)
    while network._queue:
        network._deliver(*network._queue.popleft())
    for name in names(3):
        say_ready(name)
    assert network.aggregator.stage is Stage.TRAIN
    network.tap = lambda _sender, _recipient, data: [data]
    say_ready(victim)
    network.finish()
    assert check_sum(network, victim) == tuple(names(4))
