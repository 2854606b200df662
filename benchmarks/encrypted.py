"""Sums of ciphertexts as whole protocols, in memory; called by benchmarks/secure_sum.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
from parties import Attempt, Kept, Row, make_study, one_core

from audit.attacks.network import MemorySpool
from protocols import bfv
from protocols.attempt_aggregator import Phase
from protocols.encoding import FixedPoint
from protocols.packing import choose
from protocols.rings import Ciphers
from protocols.study_key import StudyKey
from secgeo.sandbox import Sandboxes
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network


def encrypted(values: int, value_bits: int, nodes: int, repeats: int) -> Iterator[Row]:
    """One node and the aggregator in `homomorphic` and `layered`, everything included, in this process and by sandboxes."""
    studies = {
        protocol: make_study(nodes, values, protocol=protocol, value_bits=value_bits, fraction_bits=value_bits - 3)
        for protocol in ("homomorphic", "layered")
    }
    key = StudyKey(bfv.generate_key(choose(value_bits, nodes).parameters))
    sandboxes = Sandboxes()
    best_of: dict[tuple[str, str], dict[str, float]] = {}
    try:
        ways: dict[str, Ciphers] = {"one core": bfv.InProcess(), "all cores": sandboxes}
        kept = {way: Kept(ciphers) for way, ciphers in ways.items()}
        for _ in range(repeats):
            for way in ways:
                for protocol, study in studies.items():
                    with one_core() if way == "one core" else nullcontext():
                        spent = _encrypted_attempt(study, kept[way], key)
                    before = best_of.setdefault((way, protocol), spent)
                    best_of[way, protocol] = {part: min(spent[part], before[part]) for part in spent}
    finally:
        sandboxes.close()
    for way in ("one core", "all cores"):
        for protocol in studies:
            row: Row = {"part": f"{protocol}, {way}", "nodes": nodes, "values": values, "value_bits": value_bits}
            yield row | {f"{part}_seconds": seconds for part, seconds in best_of[way, protocol].items()}
        plain, layered = best_of[way, "homomorphic"], best_of[way, "layered"]
        yield {
            "part": f"layered over homomorphic, {way}",
            "node": layered["node"] / plain["node"],
            "round": _whole_round(layered, nodes) / _whole_round(plain, nodes),
        }


def _whole_round(spent: dict[str, float], nodes: int) -> float:
    """Seconds of work of all parties."""
    return nodes * (spent["node"] + spent["aggregator"] + spent["open"]) + spent["end"]


def _encrypted_attempt(study: Network, ciphers: Ciphers, key: StudyKey) -> dict[str, float]:
    """Seconds of one node up to its upload, of the aggregator for one upload and at the end, and of opening the sum."""
    middle = list(study.nodes)[len(study.nodes) // 2]
    attempt = Attempt(study, MemorySpool(), ciphers=ciphers, key=key)
    attempt.run(until=Phase.UPLOAD)
    before = attempt.clock[AGGREGATOR]
    attempt.run(until=Phase.VOTES)
    spent = {"node": attempt.clock[middle], "aggregator": (attempt.clock[AGGREGATOR] - before) / len(study.nodes)}
    before = attempt.clock[AGGREGATOR]
    attempt.run()
    assert attempt.aggregator.phase is Phase.DONE
    spent["end"] = attempt.clock[AGGREGATOR] - before
    total = attempt.aggregator.outcome.total  # type: ignore[union-attr]
    started = time.perf_counter()
    opened = attempt.ring.open(total, study.size)
    spent["open"] = time.perf_counter() - started
    exact = FixedPoint.from_agreement(study.agreement).encode(study.vectors(middle, 1)) * np.uint32(len(study.nodes))
    assert np.array_equal(opened, exact)
    return spent
