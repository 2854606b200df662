"""The memory of the aggregator; called by benchmarks/secure_sum.py."""

from __future__ import annotations

import tempfile
import tracemalloc
from pathlib import Path

from parties import Attempt, Row, make_study

from protocols import bfv
from protocols import messages as m
from protocols.attempt_aggregator import Phase
from protocols.packing import BfvParameters
from protocols.rings import Cipher, make_ring
from protocols.study_key import StudyKey
from protocols.transcript import upload_digest
from secgeo.descriptors import Reserve
from secgeo.spool import DiskSpool


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


class _Keyless:
    """Ciphers for a test of the aggregator alone, in which no node encrypts."""

    def generate_key(self, parameters: BfvParameters) -> bytes:
        raise NotImplementedError

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        return bfv.Cipher(parameters, b"")
