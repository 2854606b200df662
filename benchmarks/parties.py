"""Studies and attempts in memory, with a clock for every party."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

import numpy as np

from protocols import messages as m
from protocols import rings, upload
from protocols.agreement import fit_chunks, fit_ciphertexts, read_agreement, sparse_graph, write_agreement
from protocols.attempt_aggregator import CREDIT_CHUNKS, AttemptAggregator, Phase, Spool
from protocols.attempt_node import AttemptNode
from protocols.encoding import Data, FixedPoint
from protocols.packing import BfvParameters
from protocols.rings import Cipher, Ciphers, make_ring
from protocols.sealing import AttemptId
from protocols.study_key import StudyKey
from tests.keys.factory import AGGREGATOR, make_consortium
from tests.protocols.network import Network, make_agreement, names

CHUNK_VALUES = 262_144
Row = dict[str, object]
Result = TypeVar("Result")


def best(work: Callable[[], object], repeats: int = 9) -> float:
    """Seconds of the fastest of several runs."""
    fastest = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def make_study(count: int, values: int, **secure_sum: object) -> Network:
    consortium = make_consortium(names(count))
    neighbours, share_threshold = sparse_graph(count)
    threshold = max((count + 1) // 2 + 1, (count + share_threshold) // 2 + 1 if neighbours else 0)
    graph = {"neighbours": neighbours, "share_threshold": share_threshold} if neighbours else {}
    settings: dict[str, object] = {"threshold": threshold, "minimum_cohort": max(3, threshold)}
    if secure_sum.get("protocol", "masked") == "masked":
        fit_chunks(settings, count)
    else:
        settings |= secure_sum
        fit_ciphertexts(settings, count)
        graph = graph if secure_sum["protocol"] == "layered" else {}
    agreement = make_agreement(consortium, **(settings | graph | secure_sum))  # type: ignore[arg-type]
    vector = np.random.default_rng(0).uniform(-2.0, 2.0, values)
    return Network(consortium, read_agreement(write_agreement(agreement)), lambda *_: vector, values)


class Attempt:
    """One attempt in memory with a clock for every party. Only the nodes in `uploading` (all by default) upload."""

    def __init__(
        self,
        study: Network,
        spool: Spool,
        uploading: frozenset[str] | None = None,
        ciphers: Ciphers | None = None,
        key: StudyKey | None = None,
    ) -> None:
        self.study, self.key = study, key
        self.ring = make_ring(study.agreement, ciphers, b"" if key is None else key.secret)
        self.uploading = frozenset(study.nodes) if uploading is None else uploading
        self.attempt = AttemptId(study.digest, 1, 1)
        self.clock = dict.fromkeys((AGGREGATOR, *study.nodes), 0.0)
        self.aggregator = AttemptAggregator(
            study.parties,
            self.attempt,
            study.nodes,
            study.size,
            spool,
            ring=make_ring(study.agreement, ciphers),
            study_key=b"" if key is None else key.id,
        )
        self.nodes = {name: self._timed(name, lambda name=name: self._make_node(name)) for name in study.nodes}  # type: ignore[misc]
        self._queue: deque[tuple[str, m.AnyBody]] = deque()
        self._credits: deque[tuple[str, m.AnyBody]] = deque()
        opened = self.aggregator.start()
        for name, machine in self.nodes.items():
            self._to_aggregator(name, self._timed(name, machine.open))
        self._sort([send for send in opened if not isinstance(send[1], m.AttemptOpen)])

    def _make_node(self, name: str) -> AttemptNode:
        study, cohort = self.study, tuple(self.study.nodes)
        FixedPoint.from_agreement(study.agreement).check(study.vectors(name, 1))
        return AttemptNode(
            study.parties,
            study.consortium.identities[name],
            self.attempt,
            cohort,
            study.vectors(name, 1),
            ring=self.ring,
            study_key=self.key,
            coins=os.urandom,
            journal=lambda *_: None,
        )

    def _timed(self, party: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        self.clock[party] += time.perf_counter() - started
        return result

    def run(self, until: Phase | None = None) -> None:
        """Deliver everything, one upload after the other, until nothing is left or a phase is reached."""
        while self.aggregator.phase is not until:
            if self._queue or self._credits:
                name, body = (self._queue or self._credits).popleft()
                machine = self.nodes[name]
                self._to_aggregator(name, self._timed(name, lambda m=machine, b=body: m.receive(b)))  # type: ignore[misc]
            elif self.aggregator.phase is Phase.UPLOAD and len(self.uploading) >= self.study.parties.minimum:
                self._sort(self.aggregator.expire())
            else:
                return

    def _to_aggregator(self, name: str, messages: Sequence[Data]) -> None:
        for data in map(bytes, messages):
            message = m.decode(data, name, self.study.parties.public_keys[name], self.study.digest)
            self._sort(self._timed(AGGREGATOR, lambda m=message, d=data: self.aggregator.receive(name, m, d)))  # type: ignore[misc]

    def _sort(self, sends: list[tuple[str, m.AnyBody]]) -> None:
        for send in sends:
            if not isinstance(send[1], m.Credit):
                self._queue.append(send)
            elif send[0] in self.uploading:  # the first credit waits until the upload before is done
                (self._credits if send[1].chunks <= CREDIT_CHUNKS else self._queue).append(send)


@contextmanager
def one_core() -> Iterator[None]:
    """Nothing is spread over threads."""

    def in_turn(function: Callable[[object], object], items: Iterable[object]) -> list[object]:
        return list(map(function, items))

    with mock.patch.object(rings, "spread", in_turn), mock.patch.object(upload, "spread", in_turn):
        yield


class Kept:
    """Ciphers that are made once for each key, so that no process is started while the clock runs."""

    def __init__(self, ciphers: Ciphers) -> None:
        self._ciphers = ciphers
        self._made: dict[bytes, Cipher] = {}

    def generate_key(self, parameters: BfvParameters) -> bytes:
        return self._ciphers.generate_key(parameters)

    def is_key(self, parameters: BfvParameters, key: bytes) -> bool:
        return self._ciphers.is_key(parameters, key)

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        if key not in self._made:
            self._made[key] = self._ciphers.cipher(parameters, key)
        return self._made[key]
