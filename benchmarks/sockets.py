"""Rounds over CURVE sockets on this machine: all nodes in one process, the aggregator in another; called by benchmarks/secure_sum.py."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
from parties import Kept, Row, make_study

from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols import tags
from protocols.prg import MaskSet
from protocols.rings import Total, make_ring
from protocols.transcript import TranscriptWriter
from secgeo.descriptors import Reserve
from secgeo.journal import AggregatorJournal
from secgeo.sandbox import Sandboxes
from secgeo.spool import DiskSpool
from secgeo.transport import AggregatorEndpoint, NodeEndpoint
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network


@contextmanager
def masks_off(off: bool) -> Iterator[None]:
    """The same messages and steps with no mask and no tag computed."""
    with ExitStack() as patches:
        if off:
            patches.enter_context(mock.patch.object(MaskSet, "apply", return_value=None))
            patches.enter_context(mock.patch.object(tags.Tagger, "hashed", return_value=np.zeros((1, tags.COLUMNS))))
            patches.enter_context(mock.patch.object(tags.Tagger, "inner_product", return_value=0))
        yield


def _run_nodes(study: Network, address: str, off: bool) -> None:
    """All nodes of a study in this process, each with its own connection, for one round; one pool of sandboxes serves all."""
    aggregator = study.consortium.identities[AGGREGATOR]
    with masks_off(off), closing(Sandboxes()) as sandboxes:
        kept = Kept(sandboxes)
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
