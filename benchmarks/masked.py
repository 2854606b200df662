"""The masked sum in memory: a node, a mask, the aggregator, against Flower or a physical floor; called by benchmarks/secure_sum.py."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import ciphers as aes
from cryptography.hazmat.primitives.ciphers import algorithms, modes
from parties import CHUNK_VALUES, Attempt, Row, best, make_study

from audit.attacks.network import MemorySpool
from protocols.attempt_aggregator import Phase
from protocols.encoding import packed_bytes
from protocols.prg import MaskSet
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import names

ROOT = Path(__file__).resolve().parent.parent


def node_upload(values: int, neighbours: int, flower: Path | None, repeats: int) -> Row:
    """One node, from the float vector to the upload, keys and seeds included; Flower's client in between."""
    study = make_study(neighbours + 1, values)
    middle = names(neighbours + 1)[neighbours // 2]
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(repeats):
        spent = []
        for _ in range(3):
            attempt = Attempt(study, MemorySpool(), frozenset([middle]))
            attempt.run()
            spent.append(attempt.clock[middle])
        ours.append(min(spent))
        if flower is not None:
            command = [flower, ROOT / "benchmarks/flower_client.py", "--values", str(values)]
            command += ["--neighbours", str(neighbours), "--repeats", "3"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
            theirs.append(json.loads(done.stdout.splitlines()[-1])["flower_seconds"])
    row: Row = {"part": "node upload", "seconds": min(ours), "median_seconds": statistics.median(ours)}
    if theirs:
        ratio = statistics.median(theirs) / statistics.median(ours)
        row |= {"flower_seconds": min(theirs), "flower_ratio": min(theirs) / min(ours), "flower_ratio_medians": ratio}
    return row


def one_mask(values: int) -> Row:
    """One mask against the raw AES-256-CTR keystream plus one uint32 addition."""
    zeros, buffer = bytes(4 * values), bytearray(4 * values)
    total, other = np.zeros(values, np.uint32), np.ones(values, np.uint32)

    def floor() -> None:
        aes.Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor().update_into(zeros, buffer)
        np.add(total, other, out=total)

    mask, floor_seconds = best(lambda: MaskSet([bytes(32)], []).apply(total, 0)), best(floor)
    return {
        "part": "one mask",
        "seconds": mask,
        "floor_seconds": floor_seconds,
        "mask_over_floor": mask / floor_seconds,
    }


def bytes_per_value(values: int) -> Row:
    """Everything that a node of ten sends in its upload, by the width of the ring."""
    row: Row = {"part": "upload bytes"}
    for ring_bits in (32, 24, 20):
        study = make_study(10, values, ring_bits=ring_bits, value_bits=16, fraction_bits=13)
        sent = 0

        class Counting(MemorySpool):
            def append(self, name: str, data: memoryview) -> None:
                nonlocal sent
                sent += len(data)

        attempt = Attempt(study, Counting(), frozenset(names(1)))
        attempt.run()
        assert sent == sum(
            packed_bytes(min(CHUNK_VALUES, values - start), ring_bits) for start in range(0, values, CHUNK_VALUES)
        )
        row[f"ring_{ring_bits}"] = round(sent / values, 4)
    return row


def aggregator_add(values: int, neighbours: int) -> Row:
    """What the aggregator does behind the decoder for each upload of an attempt, against one addition of cold memory.

    The sum is as cold as the upload: between two uploads others use the cache. Beside it stands an addition to a sum that is warm.
    """
    study = make_study(neighbours + 1, values)
    sources = [np.ones(values, np.uint32) for _ in study.nodes]  # as many as uploads, or they would stay in the cache
    totals = [np.ones(values, np.uint32) for _ in study.nodes]
    turn, other = itertools.cycle(sources), itertools.cycle(totals)
    warm = best(lambda: np.add(totals[0], next(turn), out=totals[0]), repeats=3 * len(sources))
    floor = best(lambda: np.add(total := next(other), next(turn), out=total), repeats=3 * len(sources))
    spent = []
    for _ in range(5):
        attempt = Attempt(study, MemorySpool())
        attempt.run(until=Phase.UPLOAD)
        before = attempt.clock[AGGREGATOR]
        attempt.run(until=Phase.VOTES)
        spent.append((attempt.clock[AGGREGATOR] - before) / len(study.nodes))
    seconds = min(spent)
    row: Row = {"part": "aggregator add", "seconds": seconds, "floor_seconds": floor, "add_over_floor": seconds / floor}
    return row | {"add_over_warm_sum": seconds / warm}


def recovery(values: int, neighbours: int) -> Row:
    """Recovering one node that was lost after it dealt its seeds, against as many masks as it had neighbours."""
    everyone = names(neighbours + 1)
    study = make_study(neighbours + 1, values)
    total = np.zeros(values, np.uint32)
    floor = best(lambda: MaskSet([bytes([index]) * 32 for index in range(neighbours)], []).apply(total, 0))
    one = best(lambda: MaskSet([bytes(32)], []).apply(total, 0))
    spent: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(5):
        for lost in (0, 1):
            attempt = Attempt(study, MemorySpool(), frozenset(everyone[lost:]))
            attempt.run(until=Phase.UNMASK)
            before = attempt.clock[AGGREGATOR]
            attempt.run()
            assert attempt.aggregator.phase is Phase.DONE
            spent[lost].append(attempt.clock[AGGREGATOR] - before)
    # Without the loss the node's own mask would have been removed instead.
    seconds = min(spent[1]) - min(spent[0]) + one
    row: Row = {"part": "recovery of one node", "seconds": seconds, "floor_seconds": floor}
    return row | {"recovery_over_floor": seconds / floor}


def growth(values: int, counts: Sequence[int], plot: Path | None) -> Row:
    """CPU seconds and bytes of one node in a whole attempt, by the number of nodes, over the recommended graphs."""
    rows = []
    for count in counts:
        study = make_study(count, values)
        attempt = Attempt(study, MemorySpool())
        attempt.run()
        assert attempt.aggregator.phase is Phase.DONE
        seconds = statistics.mean(attempt.clock[name] for name in study.nodes)
        links = study.agreement.secure_sum.neighbours or count - 1
        rows.append({"nodes": count, "neighbours": links, "seconds_per_node": seconds})
    if plot is not None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(6, 4))
        axis.plot(
            counts, [1e3 * row["seconds_per_node"] for row in rows], "o-", label="measured, masks over k neighbours"
        )
        axis.set(xscale="log", xlabel="nodes", ylabel="milliseconds per node and round", xticks=counts, ylim=(0, None))
        axis.set_xticklabels([f"{row['nodes']}\nk = {row['neighbours']}" for row in rows])
        axis.minorticks_off()
        axis.set_title(f"Cost of one node, {values:,} values")
        figure.tight_layout()
        figure.savefig(plot, dpi=120)
    return {"part": "growth", "values": values, "rows": rows}
