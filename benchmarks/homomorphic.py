"""How fast BFV sums are, against CKKS vectors as NVFlare sets them up through TenSEAL; called by benchmarks/secure_sum.py.

The peer is TenSEAL's own CKKS vector with NVFlare's defaults: degree 8192, primes of 60, 40 and 40 bits, scale 2^40, one vector of all
values. Its parts: encrypt and serialise; load and add; load and decrypt. Each ratio is best against best of alternating runs.

Ours go from float64 to framed ciphertexts and back to float64. One core: in this process. All cores: a sandbox per core.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar
from unittest import mock

import numpy as np
import tenseal

from protocols import bfv
from protocols.ciphertexts import add
from protocols.encoding import FixedPoint, Float64Vector
from protocols.packing import BfvParameters, Packing, choose
from secgeo import sandbox as sandboxing
from secgeo.sandbox import Sandbox

CIPHERTEXTS = 32
"""Per chunk, as an upload would be cut."""

Row = dict[str, object]
Result = TypeVar("Result")


class Clock:
    """The fastest of several runs of every part."""

    def __init__(self) -> None:
        self.best: dict[str, float] = defaultdict(lambda: float("inf"))

    def __call__(self, part: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        self.best[part] = min(self.best[part], time.perf_counter() - started)
        return result


class Ckks:
    """The peer."""

    def __init__(self) -> None:
        self.context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40]
        )
        self.context.global_scale = 2**40
        self.public = tenseal.context_from(self.context.serialize(save_secret_key=False))

    def run(self, clock: Clock, vector: Float64Vector) -> int:
        """One node's upload, its addition, the decryption of the sum; gives the bytes of the upload."""
        data = clock("ckks encrypt", lambda: tenseal.ckks_vector(self.context, vector).serialize())
        total = tenseal.ckks_vector_from(self.public, data)
        clock("ckks load and add", lambda: total.add_(tenseal.ckks_vector_from(self.public, data)))
        down = total.serialize()
        found = clock("ckks decrypt", lambda: tenseal.ckks_vector_from(self.context, down).decrypt())
        assert np.abs(np.array(found) - 2 * vector).max() < 1e-3
        return len(data)


class Ours:
    """The same by BFV. `spread` applies a function of (sandbox or None, index of a chunk) to all chunks."""

    def __init__(self, value_bits: int, nodes: int) -> None:
        self.packing: Packing = choose(value_bits, nodes)
        self.fixed_point = FixedPoint(value_bits, value_bits - 3, 32, nodes)
        self.key = bfv.generate_key(self.packing.parameters)
        self.encryptor = bfv.Encryptor(self.packing.parameters, self.key)
        self.expander = bfv.Expander(self.packing.parameters)
        self.decryptor = bfv.Decryptor(self.packing.parameters, self.key)

    def run(self, clock: Clock, vector: Float64Vector, sandboxes: list[Sandbox], label: str) -> int:
        """One node's upload, its addition to the same of another one, decryption; gives the bytes of the upload."""
        step = CIPHERTEXTS * self.packing.block_values
        slices = [slice(start, start + step) for start in range(0, vector.size, step)]
        idle: SimpleQueue[Sandbox] = SimpleQueue()
        for sandbox in sandboxes:
            idle.put(sandbox)

        def spread(
            function: Callable[[bfv.Encryptor | Sandbox, bfv.Expander | Sandbox, bfv.Decryptor | Sandbox, int], Result],
        ) -> list[Result]:
            if not sandboxes:
                return [function(self.encryptor, self.expander, self.decryptor, index) for index in range(len(slices))]

            def call(index: int) -> Result:
                sandbox = idle.get()
                try:
                    return function(sandbox, sandbox, sandbox, index)
                finally:
                    idle.put(sandbox)

            with ThreadPoolExecutor(len(sandboxes)) as threads:
                return list(threads.map(call, range(len(slices))))

        def encrypt(encryptor: bfv.Encryptor | Sandbox, _e: object, _d: object, index: int) -> bytes:
            return encryptor.encrypt(self.packing.pack(self.fixed_point.encode(vector[slices[index]])))

        uploads = clock(f"{label} encrypt", lambda: spread(encrypt))
        totals = [self.expander.expand(data) for data in uploads]

        def load_and_add(_e: object, expander: bfv.Expander | Sandbox, _d: object, index: int) -> None:
            add(totals[index], expander.expand(uploads[index]), self.packing.parameters)

        clock(f"{label} load and add", lambda: spread(load_and_add))
        found = np.empty_like(vector)

        def decrypt(_e: object, _x: object, decryptor: bfv.Decryptor | Sandbox, index: int) -> None:
            part = found[slices[index]]
            part[:] = self.fixed_point.decode(self.packing.unpack(decryptor.decrypt(totals[index]), part.size), 2)

        clock(f"{label} decrypt", lambda: spread(decrypt))
        assert np.abs(found - 2 * vector).max() <= 2.0**-self.fixed_point.fraction_bits
        return sum(map(len, uploads))


@contextlib.contextmanager
def files_only() -> Iterator[None]:
    """As if the self-test had failed."""
    with mock.patch.object(bfv, "views_hold", return_value=False):
        yield


def serve_by_files(pipe: Connection, space_name: str, parameters: BfvParameters, memory_bytes: int) -> None:
    """A sandbox's process without views."""
    with files_only():
        sandboxing._serve(pipe, space_name, parameters, memory_bytes)


@contextlib.contextmanager
def started(packing: Packing, key: bytes) -> Iterator[list[Sandbox]]:
    """A sandbox for every core, at work already."""
    with contextlib.ExitStack() as stack:
        sandboxes = [stack.enter_context(Sandbox(packing.parameters, key)) for _ in range(os.cpu_count() or 1)]
        for sandbox in sandboxes:
            sandbox.expand(b"")
        yield sandboxes


@contextlib.contextmanager
def output_to_stderr() -> Iterator[None]:
    """TenSEAL prints warnings to standard output, where our JSON lines go."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def measure(values: int, value_bits: int, nodes: int, repeats: int) -> Iterator[Row]:
    """The parts, and at last the summary."""
    clock, vector = Clock(), np.random.default_rng(0).uniform(-2.0, 2.0, values)
    ours, peer = Ours(value_bits, nodes), Ckks()
    wide = Ours(22, 64)
    with files_only():
        fallback = Ours(value_bits, nodes)
    with contextlib.ExitStack() as stack:
        sandboxes = stack.enter_context(started(ours.packing, ours.key))
        with mock.patch.object(sandboxing, "_serve", serve_by_files):
            by_files = stack.enter_context(started(fallback.packing, fallback.key))
        for _ in range(repeats):
            with output_to_stderr():
                ckks_bytes = peer.run(clock, vector)
            upload_bytes = ours.run(clock, vector, [], "one core")
            ours.run(clock, vector, sandboxes, "all cores")
            wide_bytes = wide.run(clock, vector, [], "22 bits")
            fallback.run(clock, vector, [], "files")
            fallback.run(clock, vector, by_files, "files, all cores")
    best = clock.best
    for label in ("ckks", "one core", "all cores", "22 bits", "files", "files, all cores"):
        row: Row = {"part": label}
        for part in ("encrypt", "load and add", "decrypt"):
            row[f"{part.replace(' ', '_')}_seconds"] = best[f"{label} {part}"]
            if label != "ckks":
                row[f"{part.replace(' ', '_')}_ratio"] = best[f"ckks {part}"] / best[f"{label} {part}"]
        yield row
    parameters = ours.packing.parameters
    yield {
        "part": "summary",
        "protocol": "homomorphic",
        "values": values,
        "value_bits": value_bits,
        "nodes": nodes,
        "cores": os.cpu_count(),
        "security_bits": parameters.security_bits,
        "nvflare_ratio": best["ckks encrypt"] / best["one core encrypt"],
        "nvflare_ratio_all_cores": best["ckks encrypt"] / best["all cores encrypt"],
        "nvflare_ratio_22_bits": best["ckks encrypt"] / best["22 bits encrypt"],
        "load_and_add_ratio": best["ckks load and add"] / best["one core load and add"],
        "load_and_add_ratio_all_cores": best["ckks load and add"] / best["all cores load and add"],
        "decrypt_ratio": best["ckks decrypt"] / best["one core decrypt"],
        "bytes_per_value": upload_bytes / values,
        "bytes_per_value_down": len(ours.packing.pack(np.zeros(values, np.uint32)))
        * parameters.prime_bits
        * 1024
        / values,
        "bytes_per_value_22_bits": wide_bytes / values,
        "nvflare_bytes_per_value": ckks_bytes / values,
    }
