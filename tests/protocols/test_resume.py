"""Crashes between any two outputs of the aggregator or of a node: the study goes on, no mask is used twice, no record is lost.

All vectors are zero, so that what a node uploads *is* its mask: two equal chunks anywhere would be a mask used twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols import transcript
from protocols.study_aggregator import Stage
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, head, make_network, names


class Crash(Exception):
    """The process of this party dies."""


class CrashingNetwork(Network):
    """Kills a party before its n-th output is carried out, for every n in `crashes[party]`."""

    def prepare(self, crashes: dict[str, set[int]]) -> None:
        self.crashes, self.done = crashes, dict.fromkeys([AGGREGATOR, *self.nodes], 0)
        self.uploads: list[bytes] = []
        self.asked: dict[int, set[tuple[str, ...]]] = {}
        """By round: the survivors whom nodes were asked to vote for, in any attempt."""
        self.kinds: list[str] = []
        self.interrupted: list[str] = []
        """What was about to be sent, or else done."""
        self.tap = self._watch

    def _watch(self, _sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if body_type(data) == "UploadChunk":
            self.uploads.append(data[4 + int.from_bytes(data[:4]) :])
        if body_type(data) == "Survivors":
            self.asked.setdefault(head(data)[2], set()).add(tuple(name for name, _ in head(data)[5][1]))
        return [data]

    def _each(self, party: str, outputs: list) -> Iterator[list]:
        for output in outputs:
            self.done[party] += 1
            if self.done[party] in self.crashes.get(party, ()):
                self.kinds.append(f"{party} before {type(output).__name__}")
                self.interrupted.append(body_type(output.data) if hasattr(output, "data") else type(output).__name__)
                raise Crash
            yield [output]

    def _from_aggregator(self, outputs: list[agg.Output]) -> None:
        try:
            for output in self._each(AGGREGATOR, outputs):
                super()._from_aggregator(output)
        except Crash:
            self.restart_aggregator()

    def _from_node(self, name: str, outputs: list[node.Output]) -> None:
        try:
            for output in self._each(name, outputs):
                super()._from_node(name, output)
        except Crash:
            self.restart_node(name)


def crashing(crashes: dict[str, set[int]], rounds: int = 2, count: int = 4) -> CrashingNetwork:
    plain = make_network(count, size=2500, rounds=rounds)
    network = CrashingNetwork(plain.consortium, plain.agreement, lambda *_: np.zeros(2500), 2500)
    network.prepare(crashes)
    network.run()
    return network


def check(network: CrashingNetwork) -> set[int]:
    """What must hold after any crashes; gives the rounds that were summed."""
    assert not network.faults
    assert not network.expelled
    assert len(set(network.uploads)) == len(network.uploads)
    assert all(len(sets) == 1 for sets in network.asked.values())
    record = transcript.read_transcript(b"".join(network.lines), network.consortium.identities[AGGREGATOR].public_key)
    summed = transcript.verify_transcript(record, network.agreement, network.digest, network.parties.public_keys)
    for name in network.nodes:
        got = [total.round for total in network.sums[name]]
        assert got == sorted(set(got))
        assert all(np.abs(total.total).max() == 0 for total in network.sums[name])
        assert [number for number, _ in network.journals[name].receipts] == got
    return set(summed)


def outputs_of(party: str) -> int:
    network = crashing({})
    assert check(network) == {1, 2}
    return network.done[party]


@pytest.mark.parametrize("at", range(1, outputs_of(AGGREGATOR) + 1))
def test_the_aggregator_crashes_before_any_of_its_outputs(at: int) -> None:
    """Every round is still summed, by all: completed, or in a new attempt with fresh seeds."""
    network = crashing({AGGREGATOR: {at}})
    assert check(network) == {1, 2}, network.kinds
    for name in network.nodes:
        assert [total.round for total in network.sums[name]] == [1, 2]


@pytest.mark.parametrize("at", range(1, outputs_of("hospital-01") + 1))
def test_a_node_crashes_before_any_of_its_outputs(at: int) -> None:
    """The others finish every round, and the node has every sum in the end."""
    network = crashing({"hospital-01": {at}})
    assert check(network) == {1, 2}, network.kinds
    for name in network.nodes:
        assert [total.round for total in network.sums[name]] == [1, 2], network.kinds


@given(
    st.dictionaries(
        st.sampled_from([AGGREGATOR, *names(5)]), st.sets(st.integers(1, 90), max_size=3), min_size=1, max_size=3
    )
)
@example({AGGREGATOR: {40}, "hospital-00": {12}, "hospital-03": {13}})
@settings(max_examples=40, deadline=None)
def test_several_parties_crash_several_times(crashes: dict[str, set[int]]) -> None:
    check(crashing(crashes, count=5))


@pytest.mark.parametrize("at", range(1, crashing({}, rounds=1, count=3).done["hospital-01"] + 1))
def test_a_node_crashes_although_nobody_can_be_spared(at: int) -> None:
    """Of three hospitals all are needed: one that starts again is waited for, also when others have voted (ADR 19)."""
    network = crashing({"hospital-01": {at}}, rounds=1, count=3)
    assert check(network) == {1}, network.interrupted


def crashes_before(kind: str) -> int:
    """The output of a node of three before which it crashes."""
    outputs = range(1, crashing({}, rounds=1, count=3).done["hospital-01"] + 1)
    return next(at for at in outputs if crashing({"hospital-01": {at}}, 1, 3).interrupted[:1] == [kind])


def test_node_and_aggregator_crash_although_nobody_can_be_spared() -> None:
    """Also while the attempt that the node cannot complete is given up for another of the same survivors."""
    secure_sum = make_network(3).agreement.secure_sum
    for kind in ["SurvivorVote", "Unmasking"][: 1 + secure_sum.masked]:
        node_at = crashes_before(kind)
        outputs = crashing({"hospital-01": {node_at}}, rounds=1, count=3).done[AGGREGATOR]
        for at in range(1, outputs + 1, 5 if secure_sum.encrypted else 1):
            network = crashing({"hospital-01": {node_at}, AGGREGATOR: {at}}, rounds=1, count=3)
            assert check(network) == {1}, (kind, at, network.kinds)


@pytest.mark.parametrize(
    "kind",
    [
        "RoundOpen",
        "Ready",
        "RoundKeys",
        "SealedSeeds",
        "UploadChunk",
        "Survivors",
        "SumChunk",
        "RoundResult",
        "Receipt",
    ],
)
def test_all_lines_break_and_come_back(kind: str) -> None:
    """The study waits, and no round is lost."""
    network, seen = make_network(5, size=3000, rounds=4, threshold=4, minimum_cohort=4), 0

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        nonlocal seen
        seen += body_type(data) == kind
        if seen == 7 and body_type(data) == kind:
            for name in network.nodes:
                network.lose(name)
            for name in network.nodes:
                network._from_node(name, network.nodes[name].rejoin())
            return []
        return [data]

    network.tap = tap
    network.run()
    assert seen > 7 or kind in ("RoundKeys", "SealedSeeds")  # `homomorphic` has none
    assert not network.faults
    for name in network.nodes:
        assert [total.round for total in network.sums[name]] == [1, 2, 3, 4]


def test_a_sum_that_all_ask_for_after_a_crash_is_in_memory_once() -> None:
    network = make_network(6, size=3000)
    carry = network._from_aggregator

    def crash_after_the_record(outputs: list[agg.Output]) -> None:
        for output in outputs:
            carry([output])
            if isinstance(output, agg.Record) and b'"RoundRecord"' in output.line:
                raise Crash

    network._from_aggregator = crash_after_the_record  # type: ignore[method-assign]
    with pytest.raises(Crash):
        network.run()
    network._from_aggregator = carry  # type: ignore[method-assign]
    network.restart_aggregator()
    joins = [entry for entry in network._queue if entry[1] == AGGREGATOR]
    network._queue.clear()
    for entry in joins:
        network._deliver(*entry)
    chunks = [data for _, _, data in network._queue if body_type(data) == "SumChunk"]
    assert len(chunks) == 6 * len(set(chunks))
    assert len({id(chunk) for chunk in chunks}) == len(set(chunks))


def test_an_attempt_in_unmasking_is_completed_and_never_repeated() -> None:
    kinds = []
    for at in range(1, crashing({}, rounds=1).done[AGGREGATOR] + 1):
        network = crashing({AGGREGATOR: {at}}, rounds=1)
        assert check(network) == {1}
        reveals = {name: sum(e[2] == "voted" for e in j.entries) for name, j in network.journals.items()}
        assert set(reveals.values()) <= {0, 1}
        kinds += network.kinds
        assert network.aggregator.stage is Stage.ENDED
    assert {"aggregator before UploadsClosed", "aggregator before SumOpened", "aggregator before Record"} <= set(kinds)
