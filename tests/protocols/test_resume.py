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
from tests.protocols.network import Network, body_type, make_network, names


class Crash(Exception):
    """The process of this party dies."""


class CrashingNetwork(Network):
    """Kills a party before its n-th output is carried out, for every n in `crashes[party]`."""

    def prepare(self, crashes: dict[str, set[int]]) -> None:
        self.crashes, self.done = crashes, dict.fromkeys([AGGREGATOR, *self.nodes], 0)
        self.uploads: list[bytes] = []
        self.kinds: list[str] = []
        self.tap = self._watch

    def _watch(self, _sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if body_type(data) == "UploadChunk":
            self.uploads.append(data[4 + int.from_bytes(data[:4]) :])
        return [data]

    def _each(self, party: str, outputs: list) -> Iterator[list]:
        for output in outputs:
            self.done[party] += 1
            if self.done[party] in self.crashes.get(party, ()):
                self.kinds.append(f"{party} before {type(output).__name__}")
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
