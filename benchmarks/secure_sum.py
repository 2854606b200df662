"""How fast the secure sum is, as ratios against a peer or a physical floor that is measured in the same run.

    python benchmarks/secure_sum.py --protocol masked --values 1000000 --neighbours 9 --json

Prints one JSON line per part and at last a summary. The peer is Flower's SecAgg+ client (benchmarks/flower_client.py) in an
environment of its own; runs of the two alternate, so that both see the same noise. Ratios above 1 mean that we are
faster where they end in `_ratio`, and that we take longer than the floor where they end in `_over_floor`.

    python -m venv benchmarks/.flower && benchmarks/.flower/bin/pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import homomorphic  # noqa: E402

from protocols import messages as m  # noqa: E402
from protocols import study_aggregator as agg  # noqa: E402
from protocols import study_node as node  # noqa: E402
from protocols import tags  # noqa: E402
from protocols.agreement import read_agreement, sparse_graph, write_agreement  # noqa: E402
from protocols.encoding import FixedPoint, Uint32Vector, packed_bytes  # noqa: E402
from protocols.masked_aggregator import CREDIT_CHUNKS, MaskedAggregator, Phase, Spool  # noqa: E402
from protocols.masked_node import MaskedNode  # noqa: E402
from protocols.prg import MaskSet  # noqa: E402
from protocols.sealing import AttemptId  # noqa: E402
from protocols.transcript import TranscriptWriter, upload_digest  # noqa: E402
from secgeo.descriptors import Reserve  # noqa: E402
from secgeo.journal import AggregatorJournal  # noqa: E402
from secgeo.spool import DiskSpool  # noqa: E402
from secgeo.transport import AggregatorEndpoint, NodeEndpoint  # noqa: E402
from tests.keys.factory import AGGREGATOR, make_consortium  # noqa: E402
from tests.protocols.network import MemorySpool, Network, make_agreement, names  # noqa: E402

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
    settings = {"threshold": threshold, "minimum_cohort": max(3, threshold), "chunk_values": CHUNK_VALUES}
    agreement = make_agreement(consortium, **(settings | graph | secure_sum))  # type: ignore[arg-type]
    vector = np.random.default_rng(0).uniform(-2.0, 2.0, values)
    return Network(consortium, read_agreement(write_agreement(agreement)), lambda *_: vector, values)


class Attempt:
    """One attempt in memory with a clock for every party. Only the nodes in `uploading` (all by default) upload."""

    def __init__(self, study: Network, spool: Spool, uploading: frozenset[str] | None = None) -> None:
        self.study = study
        self.uploading = frozenset(study.nodes) if uploading is None else uploading
        self.attempt = AttemptId(study.digest, 1, 1)
        self.clock = dict.fromkeys((AGGREGATOR, *study.nodes), 0.0)
        self.aggregator = MaskedAggregator(study.parties, self.attempt, study.nodes, study.size, spool)
        self.nodes = {name: self._timed(name, lambda name=name: self._make_node(name)) for name in study.nodes}  # type: ignore[misc]
        self._queue: deque[tuple[str, m.AnyBody]] = deque()
        self._credits: deque[tuple[str, m.AnyBody]] = deque()
        for name, machine in self.nodes.items():
            self._to_aggregator(name, self._timed(name, machine.open))

    def _make_node(self, name: str) -> MaskedNode:
        study, cohort = self.study, tuple(self.study.nodes)
        FixedPoint.from_agreement(study.agreement).check(study.vectors(name, 1))
        return MaskedNode(
            study.parties,
            study.consortium.identities[name],
            self.attempt,
            cohort,
            study.vectors(name, 1),
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

    def _to_aggregator(self, name: str, messages: list[bytes]) -> None:
        for data in messages:
            message = m.decode(data, name, self.study.parties.public_keys[name], self.study.digest)
            self._sort(self._timed(AGGREGATOR, lambda m=message, d=data: self.aggregator.receive(name, m, d)))  # type: ignore[misc]

    def _sort(self, sends: list[tuple[str, m.AnyBody]]) -> None:
        for send in sends:
            if not isinstance(send[1], m.Credit):
                self._queue.append(send)
            elif send[0] in self.uploading:  # the first credit waits until the upload before is done
                (self._credits if send[1].chunks <= CREDIT_CHUNKS else self._queue).append(send)


# --- the parts


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
        Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor().update_into(zeros, buffer)
        np.add(total, other, out=total)

    mask, floor_seconds = best(lambda: MaskSet([bytes(32)], []).apply(total)), best(floor)
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
    """What the aggregator does behind the decoder for each upload of an attempt, against one addition of cold memory."""
    study = make_study(neighbours + 1, values)
    sources = [np.ones(values, np.uint32) for _ in study.nodes]  # as many as uploads, or they would stay in the cache
    total = np.zeros(values, np.uint32)
    turn = itertools.cycle(sources)
    floor = best(lambda: np.add(total, next(turn), out=total), repeats=3 * len(sources))
    spent = []
    for _ in range(5):
        attempt = Attempt(study, MemorySpool())
        attempt.run(until=Phase.UPLOAD)
        before = attempt.clock[AGGREGATOR]
        attempt.run(until=Phase.VOTES)
        spent.append((attempt.clock[AGGREGATOR] - before) / len(study.nodes))
    seconds = min(spent)
    return {"part": "aggregator add", "seconds": seconds, "floor_seconds": floor, "add_over_floor": seconds / floor}


def aggregator_memory(values: int, counts: tuple[int, ...] = (4, 16, 48)) -> Row:
    """Peak memory of the aggregator while all nodes upload at once, chunk by chunk, in vectors of 4 bytes a value.

    The chunks are made here, one at a time; the aggregator cannot tell them from masked ones.
    """
    row: Row = {"part": "aggregator memory"}
    for count in counts:
        study = make_study(count, values)
        with tempfile.TemporaryDirectory() as folder:
            attempt = Attempt(study, DiskSpool(Path(folder), 4 * values, Reserve()), frozenset())
            attempt.run()
            aggregator = attempt.aggregator
            size, digests = aggregator._total.size, dict.fromkeys(study.nodes, b"")
            tracemalloc.start()
            for index, start in enumerate(range(0, size, CHUNK_VALUES)):
                for name in study.nodes:
                    data = memoryview(bytearray(4 * min(CHUNK_VALUES, size - start)))
                    body = m.MaskedChunk(index, m.chunk_digest(data))
                    digests[name] += body.digest
                    aggregator.receive(name, m.Message(name, 1, 1, body, data), b"")
            for name in study.nodes:
                done = m.UploadDone(upload_digest(digests[name], 0), aggregator._view, 0)
                aggregator.receive(name, m.Message(name, 1, 1, done), b"")
            peak = aggregator._total.nbytes + tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert aggregator.phase is Phase.VOTES
        row[f"nodes_{count}"] = round(peak / (4 * values), 2)
    return row


def recovery(values: int, neighbours: int) -> Row:
    """Recovering one node that was lost after it dealt its seeds, against as many masks as it had neighbours."""
    everyone = names(neighbours + 1)
    study = make_study(neighbours + 1, values)
    total = np.zeros(values, np.uint32)
    floor = best(lambda: MaskSet([bytes([index]) * 32 for index in range(neighbours)], []).apply(total))
    one = best(lambda: MaskSet([bytes(32)], []).apply(total))
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


# --- a round over sockets


@contextmanager
def masks_off(off: bool) -> Iterator[None]:
    """The same messages and steps with no mask and no tag computed."""
    apply, part = MaskSet.apply, tags.Tagger.part
    if off:
        MaskSet.apply = lambda *_: None  # type: ignore[assignment, method-assign, misc]
        tags.Tagger.part = lambda *_: 0  # type: ignore[assignment, method-assign, misc]
    try:
        yield
    finally:
        MaskSet.apply, tags.Tagger.part = apply, part  # type: ignore[method-assign]


def _run_nodes(study: Network, address: str, off: bool) -> None:
    """All nodes of a study in this process, each with its own connection, for one round."""
    aggregator = study.consortium.identities[AGGREGATOR]
    with masks_off(off):
        endpoints, machines = {}, {}
        for name in study.nodes:
            identity = study.consortium.identities[name]
            endpoints[name] = NodeEndpoint(
                address,
                curve_secret=identity.curve_secret,
                curve_public=identity.curve_public,
                server_curve_public=aggregator.curve_public,
            )
            machines[name] = study.new_node(name)
        for name, endpoint in endpoints.items():
            endpoint.wait_connected(60.0)
            _carry_node(study, endpoint, machines[name], machines[name].start())
        while not all(machine.ended for machine in machines.values()):
            for name, endpoint in endpoints.items():
                data = endpoint.receive(0.0)
                if data is not None:
                    _carry_node(study, endpoint, machines[name], machines[name].receive(data))
        for endpoint in endpoints.values():
            endpoint.close()


def _carry_node(
    study: Network, endpoint: NodeEndpoint, machine: node.NodeMachine, outputs: Sequence[node.Output]
) -> None:
    for output in outputs:
        if isinstance(output, node.Send):
            endpoint.send(output.data)
        elif isinstance(output, node.Train):
            _carry_node(study, endpoint, machine, machine.submit(output.round, study.vectors("", output.round)))


def _socket_round(study: Network, off: bool) -> tuple[float, Uint32Vector]:
    """Seconds from the opening of the round to the last receipt, and the sum."""
    aggregator, opened = study.consortium.identities[AGGREGATOR], {}
    members = {study.consortium.identities[name].curve_public: name for name in study.nodes}
    outboxes: dict[str, deque[bytes]] = {name: deque() for name in study.nodes}
    times: dict[str, float] = {}
    with masks_off(off), tempfile.TemporaryDirectory() as folder:
        endpoint = AggregatorEndpoint(
            "tcp://127.0.0.1:*",
            curve_secret=aggregator.curve_secret,
            curve_public=aggregator.curve_public,
            allowed=members,
        )
        journal = AggregatorJournal(Path(folder))
        machine = agg.AggregatorMachine(
            study.parties,
            aggregator,
            study.size,
            TranscriptWriter(aggregator),
            load_sum=lambda number: opened[number],
            spool=DiskSpool(Path(folder), 4 * study.size, Reserve()),
        )

        def carry(outputs: Sequence[agg.Output]) -> None:
            for output in outputs:
                match output:
                    case agg.SendTo():
                        outboxes[output.peer].append(output.data)
                    case agg.UploadsClosed():
                        journal.keep_closed(output.state, output.masked)
                    case agg.SumOpened():
                        opened[output.round] = output.total
                    case agg.Progress():
                        times.setdefault(output.event, time.perf_counter())

        process = multiprocessing.get_context("fork").Process(
            target=_run_nodes, args=(study, endpoint.address, off), daemon=True
        )
        process.start()
        carry(machine.start(time.monotonic()))
        while not machine.ended:
            for name, outbox in outboxes.items():
                while outbox and endpoint.send(name, outbox[0]):
                    outbox.popleft()
            received = endpoint.receive(0.002)
            if received is not None:
                carry(machine.receive(*received, time.monotonic()))
            assert process.is_alive() or machine.ended
        process.join()
        endpoint.close()
        journal.close()
    return times["ended"] - times["round"], opened[1]


def socket_round(values: int, count: int = 16, repeats: int = 2) -> Row:
    """A round over CURVE sockets on this machine: all nodes in one process, the aggregator in another."""
    study = make_study(count, values)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    totals = []
    for _ in range(repeats):
        for off in (True, False):
            spent, total = _socket_round(study, off)
            seconds[off].append(spent)
            totals.append(total[:values])
    assert all(np.array_equal(total, totals[0]) for total in totals)
    row: Row = {"part": "round over sockets", "nodes": count, "values": values}
    row |= {"seconds": min(seconds[False]), "no_masks_seconds": min(seconds[True])}
    return row | {"round_over_no_masks": min(seconds[False]) / min(seconds[True])}


# --- growth with the number of nodes


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=["masked", "homomorphic"], default="masked")
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--neighbours", type=int, default=9, help="of a node; `masked` only")
    parser.add_argument("--value-bits", type=int, default=16, help="`homomorphic` only")
    parser.add_argument("--nodes", type=int, default=16, help="`homomorphic` only")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--socket-values", type=int, default=10_000_000, help="for the round over sockets; 0: leave it out"
    )
    parser.add_argument(
        "--growth", type=int, nargs="*", default=[4, 16, 64, 256], help="numbers of nodes; none: leave it out"
    )
    parser.add_argument("--plot", type=Path, help="write the plot of cost against nodes here")
    parser.add_argument("--flower-python", type=Path, default=ROOT / "benchmarks/.flower/bin/python")
    parser.add_argument(
        "--json", action="store_true", help="JSON lines are the only form; given for the sake of scripts"
    )
    arguments = parser.parse_args()
    flower = arguments.flower_python if arguments.flower_python.exists() else None
    summary: Row = {
        "part": "summary",
        "protocol": arguments.protocol,
        "values": arguments.values,
        "cores": os.cpu_count(),
    }

    def show(row: Row, *keys: str) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        summary.update({key: row[key] for key in keys if key in row})

    values, neighbours = arguments.values, arguments.neighbours
    if arguments.protocol == "homomorphic":
        for row in homomorphic.measure(values, arguments.value_bits, arguments.nodes, arguments.repeats):
            show(row)
        return
    show(node_upload(values, neighbours, flower, arguments.repeats), "flower_ratio", "flower_ratio_medians")
    show(one_mask(values), "mask_over_floor")
    sizes = bytes_per_value(values)
    show(sizes)
    summary["bytes_per_value"] = sizes["ring_32"]
    show(aggregator_add(values, neighbours), "add_over_floor")
    memory = aggregator_memory(values)
    show(memory)
    summary["aggregator_vectors"] = max(value for key, value in memory.items() if key != "part")
    show(recovery(values, neighbours), "recovery_over_floor")
    if arguments.socket_values:
        show(socket_round(arguments.socket_values), "round_over_no_masks")
    if arguments.growth:
        show(growth(values // 5, arguments.growth, arguments.plot))
    if flower is None:
        summary["flower_ratio"] = None
        sys.stderr.write("Flower was not found, so there is no flower_ratio: see benchmarks/requirements.txt\n")
    show(summary)


if __name__ == "__main__":
    main()
