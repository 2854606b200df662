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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives import ciphers as aes
from cryptography.hazmat.primitives.ciphers import algorithms, modes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import homomorphic  # noqa: E402

from protocols import bfv, rings, tags, upload  # noqa: E402
from protocols import messages as m  # noqa: E402
from protocols import study_aggregator as agg  # noqa: E402
from protocols import study_node as node  # noqa: E402
from protocols.agreement import fit_ciphertexts, read_agreement, sparse_graph, write_agreement  # noqa: E402
from protocols.attempt_aggregator import CREDIT_CHUNKS, AttemptAggregator, Phase, Spool  # noqa: E402
from protocols.attempt_node import AttemptNode  # noqa: E402
from protocols.encoding import FixedPoint, packed_bytes  # noqa: E402
from protocols.packing import BfvParameters, choose  # noqa: E402
from protocols.prg import MaskSet  # noqa: E402
from protocols.rings import Cipher, Ciphers, Total, make_ring  # noqa: E402
from protocols.sealing import AttemptId  # noqa: E402
from protocols.study_key import StudyKey  # noqa: E402
from protocols.transcript import TranscriptWriter, upload_digest  # noqa: E402
from secgeo.descriptors import Reserve  # noqa: E402
from secgeo.journal import AggregatorJournal  # noqa: E402
from secgeo.sandbox import Sandboxes  # noqa: E402
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
    settings: dict[str, object] = {"threshold": threshold, "minimum_cohort": max(3, threshold)}
    if secure_sum.get("protocol", "masked") == "masked":
        settings["chunk_values"] = CHUNK_VALUES
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
        aes.Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor().update_into(zeros, buffer)
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


def aggregator_memory(values: int, protocol: str = "masked", counts: tuple[int, ...] = (4, 16, 48)) -> Row:
    """Peak memory of the aggregator while all nodes upload at once, chunk by chunk, in vectors of 4 bytes a value.

    The chunks are made here, one at a time; the aggregator cannot tell them from masked ones.
    """
    row: Row = {"part": f"aggregator memory, {protocol}"}
    settings = {"value_bits": 16, "fraction_bits": 13} if protocol != "masked" else {}
    key = StudyKey(bytes(32)) if protocol != "masked" else None
    for count in counts:
        study = make_study(count, values, protocol=protocol, **settings)
        with tempfile.TemporaryDirectory() as folder:
            ring, step = make_ring(study.agreement, bfv.InProcess()), study.agreement.secure_sum.chunk_values
            attempt = Attempt(study, DiskSpool(Path(folder), 4 * values, Reserve()), frozenset(), _Keyless(), key)
            attempt.run()
            aggregator = attempt.aggregator
            digests = dict.fromkeys(study.nodes, b"")
            tracemalloc.start()
            for index, start in enumerate(range(0, values, step)):
                for name in study.nodes:
                    data = memoryview(bytearray(ring.sealed_bytes(min(step, values - start))))
                    body = m.UploadChunk(index, m.chunk_digest(data))
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


# --- sums of ciphertexts, as whole protocols


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
        kept = {way: _Kept(ciphers) for way, ciphers in ways.items()}
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


@contextmanager
def one_core() -> Iterator[None]:
    """Nothing is spread over threads."""

    def in_turn(function: Callable[[object], object], items: Iterable[object]) -> list[object]:
        return list(map(function, items))

    with mock.patch.object(rings, "spread", in_turn), mock.patch.object(upload, "spread", in_turn):
        yield


class _Keyless:
    """Ciphers for a test of the aggregator alone, in which no node encrypts."""

    def generate_key(self, parameters: BfvParameters) -> bytes:
        raise NotImplementedError

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        return bfv.Cipher(parameters, b"")


class _Kept:
    """Ciphers that are made once for each key, so that no process is started while the clock runs."""

    def __init__(self, ciphers: Ciphers) -> None:
        self._ciphers = ciphers
        self._made: dict[bytes, Cipher] = {}

    def generate_key(self, parameters: BfvParameters) -> bytes:
        return self._ciphers.generate_key(parameters)

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        if key not in self._made:
            self._made[key] = self._ciphers.cipher(parameters, key)
        return self._made[key]


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
    """All nodes of a study in this process, each with its own connection, for one round; one pool of sandboxes serves all."""
    aggregator = study.consortium.identities[AGGREGATOR]
    with masks_off(off), closing(Sandboxes()) as sandboxes:
        kept = _Kept(sandboxes)
        endpoints, machines = {}, {}
        for name in study.nodes:
            identity = study.consortium.identities[name]
            endpoints[name] = NodeEndpoint(
                address,
                curve_secret=identity.curve_secret,
                curve_public=identity.curve_public,
                server_curve_public=aggregator.curve_public,
            )
            machines[name] = study.new_node(name, kept)
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


def _socket_round(study: Network, off: bool) -> tuple[float, Total]:
    """Seconds from the opening of the round to the last receipt, and the sum."""
    aggregator, opened = study.consortium.identities[AGGREGATOR], {}
    members = {study.consortium.identities[name].curve_public: name for name in study.nodes}
    outboxes: dict[str, deque[bytes]] = {name: deque() for name in study.nodes}
    times: dict[str, float] = {}
    with masks_off(off), tempfile.TemporaryDirectory() as folder, closing(Sandboxes()) as sandboxes:
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
            ciphers=sandboxes,
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

        process = multiprocessing.get_context("fork").Process(target=_run_nodes, args=(study, endpoint.address, off))
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


def protocol_round(values: int, count: int, protocol: str, value_bits: int) -> Row:
    """A round over CURVE sockets, on this machine: seconds, and bytes of one node up and down."""
    study = make_study(count, values, protocol=protocol, value_bits=value_bits, fraction_bits=value_bits - 3)
    seconds, total = _socket_round(study, False)
    ring, step = make_ring(study.agreement), study.agreement.secure_sum.chunk_values
    up = sum(ring.sealed_bytes(min(step, values - start)) for start in range(0, values, step))
    down = sum(len(ring.pack_sum(total, start)) for start in range(0, values, ring.sum_chunk_values))
    row: Row = {"part": f"round over sockets, {protocol}", "nodes": count, "values": values, "seconds": seconds}
    return row | {"bytes_per_value_up": up / values, "bytes_per_value_down": down / values}


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
        show(aggregator_memory(values, "homomorphic"))
        for row in encrypted(values, arguments.value_bits, arguments.nodes, max(1, arguments.repeats // 2)):
            show(row)
        if arguments.socket_values:
            for protocol in ("masked", "layered", "homomorphic"):
                show(protocol_round(arguments.socket_values, 8, protocol, arguments.value_bits))
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
