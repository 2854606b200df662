"""Any schedule of losses, repetitions, tampering, delays, broken connections and crashes, found by Hypothesis.

Whatever happens on the links, a study ends; every sum that a node takes is the exact sum of the survivors that its record names; a
party is blamed only for what happened on its own link; no mask is used twice; and what passed by never gives one node's vector.
CURVE keeps links in order and whole, so who can disturb one is the party that sends on it.

`SECGEO_STATEFUL_EXAMPLES=2000 pytest tests/adversary/test_stateful.py` looks longer.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from audit.attacks.knowledge import Knowledge, decrypted, peek, study_key
from audit.attacks.network import Hangs
from keys.errors import RemoteProtocolError, VerificationFailed
from protocols import messages as m
from protocols import transcript
from protocols.agreement import Protocol
from protocols.encoding import FixedPoint
from tests.adversary import weaken
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import make_network, names

SIZE = 40
SHAPES: list[tuple[int, dict[str, int]]] = [
    (3, {}),
    (4, {}),
    (6, {}),
    (17, {"threshold": 11, "minimum_cohort": 11, "neighbours": 8, "share_threshold": 4}),
]
"""Members, and the graph of those who share masks, if it is not complete."""

SETTINGS = settings(
    max_examples=int(os.environ.get("SECGEO_STATEFUL_EXAMPLES", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

places = st.integers(0, 1000)


class Study(RuleBasedStateMachine):
    """One study of real machines; the rules deliver messages and disturb them."""

    guard: AbstractContextManager[None] = nullcontext()

    @initialize(
        shape=st.sampled_from(SHAPES),
        rounds=st.integers(1, 2),
        patience=st.integers(0, 5),
        protocol=st.sampled_from(get_args(Protocol)),
    )
    def open(self, shape: tuple[int, dict[str, int]], rounds: int, patience: int, protocol: str) -> None:
        count, graph = shape if protocol != "homomorphic" else (min(shape[0], 6), {})
        self.network = make_network(count, size=SIZE, rounds=rounds, max_attempts=16, protocol=protocol, **graph)
        vectors = {name: self.network.vectors(name, 1) for name in names(count)}
        self.network.vectors = lambda name, _: vectors[name]  # so that equal chunks mean equal masks
        self.knowledge = Knowledge(self.network)
        self.network.tap = self.tap
        self.old: list[tuple[str, str, bytes]] = []
        self.masked: dict[str, dict[bytes, tuple[int, int]]] = defaultdict(dict)
        self.disturbed: set[tuple[str, str]] = set()
        self.patience = patience
        self.restarts = 0
        self.network.start()

    def tap(self, sender: str, recipient: str, data: bytes) -> list[bytes]:
        self.knowledge.watch(sender, recipient, data)
        self.old.append((sender, recipient, data))
        head = peek(data)
        if head is not None and isinstance(head.body, m.UploadChunk):
            attempt = head.round, head.attempt
            first = self.masked[sender].setdefault(self.inside(m._split(data)[1]), attempt)
            assert first == attempt, "a mask is used in two attempts"
        return [data]

    def inside(self, chunk: memoryview) -> bytes:
        """What is masked in a chunk: what it encrypts, if that is masked."""
        layered = self.network.agreement.secure_sum.protocol == "layered"
        return decrypted(self.network, bytes(chunk), study_key(self.network)).tobytes() if layered else bytes(chunk)

    # --- delivery

    def is_open(self) -> bool:
        return hasattr(self, "network") and not self.network.aggregator.ended

    def can_be_disturbed(self) -> bool:
        """So few times in one study that most studies come far."""
        return self.is_open() and self.patience > 0

    def links(self) -> list[tuple[str, str]]:
        return sorted({entry[:2] for entry in self.network._queue})

    def take(self, place: int, depth: int = 0) -> tuple[str, str, bytes] | None:
        """Remove the message at a depth of some link's queue."""
        links = self.links()
        if not links:
            return None
        on_link = [entry for entry in self.network._queue if entry[:2] == links[place % len(links)]]
        entry = on_link[depth % len(on_link)]
        self.network._queue.remove(entry)
        return entry

    @rule(count=st.integers(1, 60))
    def deliver_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.network._queue))):
            if self.network._queue:
                self.network._deliver(*self.network._queue.popleft())

    @precondition(is_open)
    @rule(place=places)
    def deliver_of_one_link(self, place: int) -> None:
        entry = self.take(place)
        if entry is not None:
            self.network._deliver(*entry)

    @precondition(can_be_disturbed)
    @rule()
    def pass_time(self) -> None:
        self.patience -= 1
        self.network.pass_time()

    # --- what a party does that disturbs its own link

    def disturb(self, sender: str, recipient: str) -> None:
        self.disturbed.add((sender, recipient))
        self.patience -= 1

    @precondition(can_be_disturbed)
    @rule(place=places)
    def lose(self, place: int) -> None:
        entry = self.take(place)
        if entry is not None:
            self.disturb(*entry[:2])

    @precondition(can_be_disturbed)
    @rule(place=places, depth=st.integers(1, 5))
    def overtake(self, place: int, depth: int) -> None:
        entry = self.take(place, depth)
        if entry is not None:
            self.disturb(*entry[:2])
            self.network._deliver(*entry)

    @precondition(can_be_disturbed)
    @rule(place=places)
    def repeat(self, place: int) -> None:
        entry = self.take(place)
        if entry is not None:
            self.disturb(*entry[:2])
            self.network._deliver(*entry)
            self.network._deliver(*entry)

    @precondition(can_be_disturbed)
    @rule(place=places, at=places, bit=st.integers(0, 7), cut=st.booleans())
    def tamper(self, place: int, at: int, bit: int, cut: bool) -> None:
        entry = self.take(place)
        if entry is None:
            return
        sender, recipient, data = entry
        changed = bytearray(data)
        changed[at * len(data) // 1001] ^= 1 << bit
        self.disturb(sender, recipient)
        self.network._deliver(sender, recipient, data[: at * len(data) // 1001] if cut else bytes(changed))
        self.must_be_noticed(sender, recipient)

    def must_be_noticed(self, sender: str, recipient: str) -> None:
        """Nothing that was changed passes as genuine."""
        if recipient == AGGREGATOR:
            assert sender in self.network.aggregator._out or self.network.aggregator.ended
        else:
            assert recipient in self.network.faults or self.network.nodes[recipient].ended

    @precondition(can_be_disturbed)
    @rule(which=places)
    def replay(self, which: int) -> None:
        entry = self.old[which % len(self.old)]
        self.disturb(*entry[:2])
        self.network.inject(*entry)

    # --- what nobody is to blame for

    def alive(self, place: int) -> str | None:
        left = [n for n, machine in self.network.nodes.items() if n not in self.network.faults and not machine.ended]
        self.restarts += 1
        self.patience -= 1
        return left[place % len(left)] if left else None

    @precondition(can_be_disturbed)
    @rule(place=places)
    def connection_breaks(self, place: int) -> None:
        name = self.alive(place)
        if name is not None:
            self.network.disconnect(name)

    @precondition(can_be_disturbed)
    @rule(place=places)
    def node_crashes(self, place: int) -> None:
        name = self.alive(place)
        if name is not None:
            self.network.restart_node(name)

    @precondition(can_be_disturbed)
    @rule()
    def aggregator_crashes(self) -> None:
        self.restarts += 1
        self.patience -= 1
        self.network.restart_aggregator()

    # --- what must hold in the end

    def teardown(self) -> None:
        if not hasattr(self, "network"):
            return
        self.network.finish()
        event(f"sums: {sum(map(len, self.network.sums.values()))}")
        event(f"faults: {len(self.network.faults)}")
        event(f"expelled: {len(self.network.aggregator._out)}")
        event(f"restarts: {self.restarts}")
        event(f"attempts: {sum(self.network.attempts.values())}")
        self.check_blame()
        self.check_sums()
        self.check_secrecy()

    def check_blame(self) -> None:
        for name, fault in self.network.faults.items():
            assert (AGGREGATOR, name) in self.disturbed, f"{name} blames an aggregator that did nothing: {fault}"
            assert isinstance(fault, VerificationFailed) or (
                isinstance(fault, RemoteProtocolError) and fault.peer == m.AGGREGATOR
            )
        for progress in self.network.progress:
            if progress.event == "expelled":
                node = progress.fields["node"]
                assert (node, AGGREGATOR) in self.disturbed, f"{node} is expelled for nothing: {progress.fields}"
        assert not any(b'"Disputed"' in line for line in self.network.lines)
        if not self.disturbed and not self.restarts and self.network.now == 0.0:
            assert all(len(sums) == self.network.agreement.study.rounds for sums in self.network.sums.values())

    def check_sums(self) -> None:
        network = self.network
        key = network.consortium.identities[AGGREGATOR].public_key
        entries = transcript.read_transcript(b"".join(network.lines), key)
        records = transcript.verify_transcript(entries, network.agreement, network.digest, network.parties.public_keys)
        fixed_point = FixedPoint.from_agreement(network.agreement)
        for name, sums in network.sums.items():
            assert [summed.round for summed in sums] == sorted({summed.round for summed in sums})
            for summed in sums:
                survivors = tuple(s.node_id for s in records[summed.round].survivors)
                assert summed.contributors == survivors
                exact = np.sum([fixed_point.encode(network.vectors(n, 1)).astype(np.uint64) for n in survivors], axis=0)
                assert np.array_equal(summed.total, fixed_point.decode(exact.astype(np.uint32), len(survivors)))
                assert network.journals[name].receipt(summed.round)

    def check_secrecy(self) -> None:
        for address, seen in self.knowledge.attempts.items():
            for name in set(seen.chunks) & set(seen.digests) & set(seen.senders):
                assert not self.knowledge.recovers(name, address), f"the vector of {name} in {address} is known"


def explore(machine: type[Study], guard: AbstractContextManager[None], config: Any = SETTINGS) -> None:
    with guard:
        run_state_machine_as_test(machine, settings=config)


def test_any_schedule_ends_in_the_right_sum_or_a_typed_error_that_names_the_right_party() -> None:
    explore(Study, nullcontext())


def test_the_search_finds_a_guard_that_is_gone() -> None:
    unsigned = weaken.replaced(m, "verify_signature", weaken.accept)
    with pytest.raises((AssertionError, Hangs)):
        explore(
            Study,
            unsigned,
            settings(SETTINGS, max_examples=300, derandomize=True, database=None, phases=[Phase.generate]),
        )
