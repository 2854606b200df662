"""Attempts that fail after the votes, and are made again for the same nodes (docs/adr/0019): no other set is ever asked for, the round is
summed as soon as all are back, and whoever stays away for good costs this round, but not the study."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from protocols import study_node as node
from protocols.agreement import Deadlines
from tests.adversary.attackers import MaliciousNode
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, head, make_network, names
from tests.protocols.test_attempt import check_sum

AFTER_THE_VOTES = ["SurvivorVote", "Unmasking"]


@pytest.mark.parametrize("kind", AFTER_THE_VOTES)
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_attempt_that_fails_after_the_uploads_is_repeated_for_the_same_survivors(kind: str, failing: int) -> None:
    """Votes bind: all later attempts of the round are for the same five, although four would do. The next round goes on."""
    network, lost = make_network(5, threshold=4, rounds=2, max_attempts=3), {"hospital-03", "hospital-04"}
    asked: dict[int, set[tuple[str, ...]]] = {1: set(), 2: set()}

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        number, attempt, body = head(data)[2], head(data)[3], head(data)[5]
        if body[0] == "Survivors":
            asked[number].add(tuple(name for name, _ in body[1]))
        return [] if sender in lost and body[0] == kind and number == 1 and attempt <= failing else [data]

    network.tap = tap
    network.run()
    assert not network.faults
    assert all(sets == {tuple(names(5))} for sets in asked.values())
    for name in names(5):
        assert [summed.round for summed in network.sums[name]] == ([1, 2] if failing < 3 else [2])
        begun = {(r, a) for r, a, _ in network.journals[name].entries}
        assert begun == {(1, attempt) for attempt in range(1, min(failing + 1, 3) + 1)} | {(2, 1)}
        assert check_sum(network, name, 2) == tuple(names(5))


@pytest.mark.parametrize("kind", ["RoundKeys", "SealedSeeds", "UploadChunk"])
def test_a_repeated_attempt_fails_if_one_of_the_survivors_is_lost_before_its_votes(kind: str) -> None:
    """Four would do, had nobody voted for five: the aggregator asks for no other set, and the third attempt is for all again."""
    network, lost = make_network(5, threshold=4, max_attempts=3), "hospital-03"

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        attempt, body = head(data)[3], head(data)[5]
        votes = attempt == 1 and body[0] == "SurvivorVote" and sender in (lost, "hospital-04")
        return [] if votes or (attempt == 2 and sender == lost and body[0] == kind) else [data]

    network.tap = tap
    network.run()
    assert not network.faults
    for name in names(5):
        assert check_sum(network, name) == tuple(names(5))
        assert max(network.journals[name].entries)[:2] == (1, 3)


def test_a_survivor_that_stays_away_after_the_votes_costs_the_round_and_no_more() -> None:
    """Six would do for a sum, and six come back, but all seven were voted for. They go on with the next round."""
    network, gone = make_network(7, threshold=6, minimum_cohort=6, rounds=2), set[str]()
    asked: dict[int, set[tuple[str, ...]]] = {1: set(), 2: set()}

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        number, body = head(data)[2], head(data)[5]
        if body[0] == "Survivors":
            asked[number].add(tuple(name for name, _ in body[1]))
        if number == 1 and sender in ("hospital-05", "hospital-06") and body[0] == "SurvivorVote":
            gone.add(sender)
            return []
        return [] if "hospital-06" in {sender, recipient} & gone else [data]

    network.tap = tap
    network.run()
    assert not network.faults
    assert (asked[1], asked[2]) == ({tuple(names(7))}, {tuple(names(6))})
    for name in names(6):
        assert [summed.round for summed in network.sums[name]] == [2]
    assert b"not all came back for whom nodes have voted" in b"".join(network.lines)


# --- who stays away, and who is waited for


def withholding(
    network: Network, away: set[str], kind: str, members: set[str]
) -> Callable[[str, str, bytes], list[bytes]]:
    """These members do not send this kind of message in round 1, and nothing reaches them or comes from them behind it."""

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender in members and body_type(data) == kind and head(data)[2] == 1:
            away.add(sender)
        return [] if away & {sender, recipient} else [data]

    network.tap = tap
    return tap


def when_nothing_moves(network: Network, once: Callable[[], bool]) -> None:
    """Call this whenever time would pass, until it says that it has done something; then time passes as before."""
    pass_time, done = network.pass_time, False

    def passing() -> None:
        nonlocal done
        done = done or once()
        if not done or not network._queue:
            pass_time()

    network.pass_time = passing  # type: ignore[method-assign]


def test_who_comes_late_and_who_is_left_go_on_with_the_next_round() -> None:
    """Five, of whom four are needed. One comes while the others upload; one does not vote and stays away."""
    network, away, late = make_network(5, size=1100, rounds=3, threshold=4, minimum_cohort=4), set[str](), []
    held_back = withholding(network, away, "SurvivorVote", {"hospital-03"})

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if body_type(data) == "UploadDone" and not late:
            late.append("hospital-04")
            network._from_node("hospital-04", network.nodes["hospital-04"].start())
        return held_back(sender, recipient, data)

    def lost() -> bool:
        if away:
            network.lose("hospital-03")
        return bool(away)

    network.tap = tap
    when_nothing_moves(network, lost)
    network.run(absent=["hospital-04"])
    assert not network.faults
    assert [summed.round for summed in network.sums["hospital-00"]] == [2, 3]


def test_who_uploaded_too_late_goes_on_with_the_others_after_a_crash_of_the_aggregator() -> None:
    """Six, of whom four upload; two of those do not vote and stay away, and the aggregator starts again."""
    network, away = make_network(6, size=1100, rounds=3, threshold=4, minimum_cohort=4), set[str]()
    held_back = withholding(network, away, "SurvivorVote", {"hospital-02", "hospital-03"})

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        late = sender in ("hospital-04", "hospital-05") and body_type(data) == "UploadDone"
        return [] if late and head(data)[2:4] == [1, 1] else held_back(sender, recipient, data)

    def crashed() -> bool:
        if away:
            network.restart_aggregator()
        return bool(away)

    network.tap = tap
    when_nothing_moves(network, crashed)
    network.run()
    assert not network.faults
    assert [summed.round for summed in network.sums["hospital-00"]] == [2, 3]


def test_a_survivor_who_declines_is_not_waited_for() -> None:
    """Two are away, and waited for, when a third leaves for good: the round is lost at once, and the next is summed when they are back."""
    network, away = make_network(5, size=1100, rounds=2, threshold=4, minimum_cohort=4), set[str]()
    withholding(network, away, "SurvivorVote", {"hospital-03", "hospital-04"})
    abandoned: list[float] = []

    def declined() -> bool:
        if not network.aggregator._overtime:
            return False
        for output in network.nodes["hospital-02"].decline("its budget is spent"):
            assert isinstance(output, node.Send)
            network._from_aggregator(network.aggregator.receive("hospital-02", bytes(output.data), network.now))
        abandoned.extend(network.now for p in network.progress if p.event == "round abandoned")
        returned, _ = sorted(away), away.clear()
        for name in returned:
            network.restart_node(name)
        return True

    when_nothing_moves(network, declined)
    network.run()
    assert not network.faults
    assert len(abandoned) == 1
    assert [summed.round for summed in network.sums["hospital-00"]] == [2]


def test_a_survivor_who_is_put_out_is_not_waited_for() -> None:
    """One reveals shares that nobody dealt, and with another one missing the attempt fails."""
    network, liar = make_network(5, size=1100, rounds=2, threshold=4, minimum_cohort=4), "hospital-04"
    network.tap = lambda sender, _, data: (
        [] if sender == "hospital-03" and body_type(data) == "Unmasking" and head(data)[2] == 1 else [data]
    )
    member = MaliciousNode(network, liar)
    member.on("Unmasking")(
        lambda message, _: [
            member.sign(message, type(message.body)(tuple((n, bytes(33)) for n, _ in message.body.self_shares), ()))
        ]
    )
    network.run()
    assert not network.faults
    assert network.expelled == [liar]
    assert [summed.round for summed in network.sums["hospital-00"]] == [2]
    assert network.aggregator._attempts == {1: 1, 2: 1}
    assert not [p for p in network.progress if p.event in ("attempt failed", "waits for hospitals")]


def test_who_was_not_voted_for_is_neither_summed_nor_waited_for() -> None:
    """One of six uploads too late, but is ready; another one comes later still, and trains. Of the four survivors one starts again."""
    network, state = make_network(6, size=1100, threshold=4, minimum_cohort=4), set[str]()

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        attempt, kind = head(data)[3], body_type(data)
        if kind == "UploadDone" and "late" not in state:
            state.add("late")
            network._from_node("hospital-05", network.nodes["hospital-05"].start())
        if kind == "SurvivorVote" and sender == "hospital-04" and "died" not in state:
            state.add("died")
            network.inject("restart", sender, b"")
            return []
        return [] if kind == "UploadDone" and sender == "hospital-01" and attempt == 1 else [data]

    deliver = network._deliver
    network._deliver = lambda sender, recipient, data: (  # type: ignore[method-assign]
        network.restart_node(recipient) if sender == "restart" else deliver(sender, recipient, data)
    )
    network.tap = tap
    network.run(absent=["hospital-05"])
    assert not network.faults
    assert check_sum(network, "hospital-00") == ("hospital-00", "hospital-02", "hospital-03", "hospital-04")
    # One deadline for those who did not join, one for the upload and one for the vote that did not come.
    deadlines = network.agreement.deadlines
    assert network.now == deadlines.join_seconds + 2 * deadlines.phase_seconds


@pytest.mark.parametrize("kind", AFTER_THE_VOTES)
def test_who_started_again_unnoticed_is_asked_whether_it_is_ready(kind: str) -> None:
    """One dies before its message leaves, another one after: the second attempt is opened to both their new lives, not to the old ones."""
    network, died = make_network(3, size=1100, max_attempts=2), set[str]()

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender not in ("hospital-01", "hospital-02") or body_type(data) != kind or sender in died:
            return [data]
        died.add(sender)
        if sender == "hospital-01":
            network.inject(sender, recipient, data)
        network.inject("restart", sender, b"")
        return []

    deliver = network._deliver
    network._deliver = lambda sender, recipient, data: (  # type: ignore[method-assign]
        network.restart_node(recipient) if sender == "restart" else deliver(sender, recipient, data)
    )
    network.tap = tap
    network.run()
    assert not network.faults
    assert died == {"hospital-01", "hospital-02"}
    for name in names(3):
        assert [summed.round for summed in network.sums[name]] == [1]


def test_after_a_crash_of_the_aggregator_nobody_is_waited_for_as_long_as_for_training() -> None:
    """All for whom nodes have voted have trained already."""
    plain, dead = make_network(5, size=1100, rounds=2, threshold=4, minimum_cohort=4), set[str]()
    deadlines = Deadlines(join_seconds=100.0, train_seconds=3600.0, phase_seconds=10.0)
    agreement = msgspec.structs.replace(plain.agreement, deadlines=deadlines)
    network = Network(plain.consortium, agreement, plain.vectors, plain.size)
    died_at: list[float] = []

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        number, attempt, kind = head(data)[2], head(data)[3], body_type(data)
        if (number, attempt, kind) == (1, 1, "SurvivorVote") and sender in ("hospital-03", "hospital-04"):
            return []
        if (number, attempt, kind) == (1, 2, "AttemptOpen") and not dead:
            dead.add("hospital-04")
            died_at.append(network.now)
            network.inject("crash", AGGREGATOR, b"")
        return [] if dead & {sender, recipient} else [data]

    deliver = network._deliver
    network._deliver = lambda sender, recipient, data: (  # type: ignore[method-assign]
        network.restart_aggregator() if sender == "crash" else deliver(sender, recipient, data)
    )
    abandoned: list[float] = []
    carry = network._from_aggregator

    def watching(outputs: list) -> None:  # type: ignore[type-arg]
        abandoned.extend(network.now for output in outputs if getattr(output, "event", "") == "round abandoned")
        carry(outputs)

    network._from_aggregator = watching  # type: ignore[method-assign]
    network.tap = tap
    network.run()
    assert not network.faults
    # For who does not join after the crash; then for a message; then for who is missing.
    assert abandoned[0] - died_at[0] <= 2 * deadlines.join_seconds + deadlines.phase_seconds
    assert [summed.round for summed in network.sums["hospital-00"]] == [2]
