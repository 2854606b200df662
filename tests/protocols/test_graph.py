"""Sparse graphs: who is linked, what dropouts and colluders can do, and whole sums over them."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import ConfigError
from protocols import messages as m
from protocols.agreement import check_rules, sparse_graph
from protocols.graph import DEALERS, MaskGraph
from protocols.sealing import AttemptId
from tests.keys.factory import AGGREGATOR, make_consortium
from tests.protocols.network import body_type, make_agreement, make_network, names
from tests.protocols.test_attempt import check_sum
from tests.protocols.test_schedules import check_outcome

SPARSE = {"threshold": 14, "minimum_cohort": 14, "neighbours": 8, "share_threshold": 5}
"""For 20 members: 4 may collude, and 3 of any 8 neighbours may be lost."""


def connected(graph: MaskGraph, nodes: set[str]) -> bool:
    """The reference: a walk over the links."""
    seen, waiting = set[str](), [min(nodes)]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting += [peer for peer in graph.neighbours(name) if peer in nodes - seen]
    return seen == nodes


@pytest.mark.parametrize(
    ("count", "neighbours"), [(3, 0), (16, 0), (17, 8), (20, 8), (64, 24), (256, 32), (9, 8), (9, 20)]
)
def test_links_are_mutual_and_as_many_as_agreed(count: int, neighbours: int) -> None:
    graph = MaskGraph.build(names(count), neighbours, b"cohort")
    degree = neighbours if 0 < neighbours < count - 1 else count - 1
    for name in graph.order:
        linked = graph.neighbours(name)
        assert len(set(linked)) == len(linked) == degree
        assert name not in linked
        assert all(name in graph.neighbours(peer) for peer in linked)
        assert set(graph.sources(name)) == {*linked, *graph.dealers} - {name}
    for dealer in graph.dealers:
        assert set(graph.recipients(dealer)) == set(graph.order) - {dealer}
    assert len(graph.dealers) == min(DEALERS, count)


def test_the_order_depends_on_the_cohort_only() -> None:
    one = MaskGraph.build(names(20), 8, b"cohort")
    assert MaskGraph.build(names(20)[::-1], 8, b"cohort") == one
    assert MaskGraph.build(names(20), 8, b"other") != one


@given(st.integers(0, 2**32), st.integers(9, 14), st.sampled_from([4, 6]), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_what_is_tolerated_no_choice_of_colluders_can_cut_apart(
    seed: int, count: int, neighbours: int, lost: int, colluders: int
) -> None:
    graph = MaskGraph.build(names(count), neighbours, seed.to_bytes(8))
    survivors = set(random.Random(seed).sample(names(count), count - lost))  # noqa: S311
    if graph.tolerates(survivors, colluders):
        for chosen in itertools.combinations(sorted(survivors), colluders):
            assert connected(graph, survivors - set(chosen))


def test_two_lost_stretches_are_not_tolerated() -> None:
    graph = MaskGraph.build(names(20), 4, b"")
    alive = set(graph.order) - set(graph.order[3:5]) - set(graph.order[11:13])
    assert not connected(graph, alive)
    assert not graph.tolerates(alive, 0)
    assert graph.tolerates(graph.order, 3)
    assert not graph.tolerates(graph.order, 4)


@pytest.mark.parametrize("count", [1, 3, 16, 17, 21, 22, 33, 64, 100, 256])
def test_recommended_graphs_keep_every_rule_and_grow_with_the_logarithm(count: int) -> None:
    neighbours, share_threshold = sparse_graph(count)
    if neighbours == 0:
        assert count <= 21  # so many neighbours would be all others
        return
    assert neighbours <= 4 * math.ceil(math.log2(count))
    assert neighbours % 2 == 0
    assert 2 <= share_threshold <= neighbours < count - 1
    assert (count + share_threshold) // 2 + 1 <= count  # there is a threshold that excludes two survivor sets


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"neighbours": 7}, "neighbours must be even"),
        ({"neighbours": 2}, "neighbours must be even"),
        ({"neighbours": 18}, "share_threshold|neighbours must be even"),
        ({"neighbours": 20}, "neighbours must be even"),
        ({"share_threshold": 1}, "share_threshold must be"),
        ({"share_threshold": 9}, "share_threshold must be"),
        ({"share_threshold": 0}, "share_threshold must be"),
        ({"neighbours": 0}, "share_threshold needs neighbours"),
        ({"threshold": 12, "minimum_cohort": 12}, "two survivor sets signed"),
    ],
)
def test_unsafe_graphs_cannot_be_agreed(change: dict[str, int], fault: str) -> None:
    consortium = make_consortium(names(19 if change == {"neighbours": 18} else 20))
    with pytest.raises(ConfigError, match=fault):
        check_rules(make_agreement(consortium, **(SPARSE | change)))  # type: ignore[arg-type]


def test_a_sparse_graph_needs_more_members_than_a_complete_one() -> None:
    settings = {"threshold": 11, "minimum_cohort": 11, "neighbours": 6, "share_threshold": 4}
    with pytest.raises(ConfigError, match="more than 16 members"):
        check_rules(make_agreement(make_consortium(names(16)), **settings))  # type: ignore[arg-type]


def test_a_sum_over_a_sparse_graph_with_losses_in_every_phase() -> None:
    network = make_network(20, size=2500, rounds=2, **SPARSE)
    lost_at = {"hospital-03": "SealedSeeds", "hospital-08": "UploadChunk", "hospital-11": "Unmasking"}
    gone: set[str] = set()
    seals: dict[str, int] = {}

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        kind = body_type(data)
        if sender in lost_at and kind == lost_at[sender]:
            gone.add(sender)
        if kind == "SealedSeeds" and sender != AGGREGATOR:
            seals[sender] = seals.get(sender, 0) + 1
        return [] if gone & {sender, recipient} else [data]

    network.tap = tap
    network.run()
    check_outcome(network, [name for name in names(20) if name not in lost_at])
    for number in (1, 2):
        contributors = check_sum(network, "hospital-00", number)
        assert not {"hospital-03", "hospital-08"} & set(contributors)
    assert sorted(seals.values())[0] < 19  # who deals no tag seed seals to its neighbours only


@pytest.mark.parametrize(("ring_bits", "bytes_per_value"), [(32, 4.0), (24, 3.0), (20, 2.5)])
def test_packed_rings_give_the_same_sum_in_fewer_bytes(ring_bits: int, bytes_per_value: float) -> None:
    network = make_network(5, size=10_000, ring_bits=ring_bits, value_bits=17, fraction_bits=14, chunk_values=1024)
    sent = 0

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        nonlocal sent
        if sender == "hospital-00" and body_type(data) == "UploadChunk":
            sent += len(data) - 4 - int.from_bytes(data[:4])
        return [data]

    network.tap = tap
    network.run()
    assert not network.faults
    assert check_sum(network, "hospital-02") == tuple(names(5))
    assert sent / 10_000 == pytest.approx(bytes_per_value, rel=0.002)


def test_rings_are_quotients_of_one_another() -> None:
    totals = []
    for ring_bits in (32, 24, 20):
        network = make_network(4, size=100, ring_bits=ring_bits, value_bits=16, fraction_bits=13)
        network.run()
        totals.append(network.sums["hospital-01"][0].total)
    assert np.array_equal(totals[0], totals[1])
    assert np.array_equal(totals[0], totals[2])


def test_a_complaint_about_a_hospital_that_sealed_nothing_to_the_accuser_is_a_lie() -> None:
    network, liar = make_network(20, size=1100, **SPARSE), "hospital-05"
    accused: list[str] = []

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender == liar and body_type(data) == "UploadChunk" and not accused:
            graph = network.aggregator._attempt._graph  # type: ignore[union-attr]
            accused.append(next(name for name in graph.order if name not in {liar, *graph.sources(liar)}))
            attempt = AttemptId(network.digest, 1, 1)
            return [m.encode(network.consortium.identities[liar], attempt, m.Complaint(accused[0]))]
        return [data]

    network.tap = tap
    network.run()
    assert network.expelled == [liar]
    assert check_sum(network, accused[0]) == tuple(name for name in names(20) if name != liar)
