"""What uploads look like: uniform, unrelated to what was uploaded, and never alike.

The same vectors are summed again and again in honest studies: zeros, and one that fills the agreed range. `measure` counts what stands in
the uploads, `judge_uploads` is a pure function of the counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from audit.attacks.knowledge import decrypted, packing_of, study_key
from audit.attacks.network import Network
from audit.attacks.play import Play
from audit.attacks.stage import World
from audit.findings import Status
from protocols import messages as m
from protocols.agreement import Agreement
from protocols.ciphertexts import unpack_upload
from protocols.encoding import FixedPoint, unpack
from protocols.messages import AGGREGATOR

Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Bits = Annotated[int, Meta(ge=0, le=64)]
Counts = Annotated[tuple[Count, ...], Meta(min_length=256, max_length=256)]
Progress = Callable[[str, float], None]

UPLOAD_ROUNDS = {"fast": 4, "full": 16}
UPLOAD_VALUES = 8192
UPLOADED = ("zeros", "the whole range")
MASKED, WORDS, COEFFICIENTS = "masked values", "words of ciphertexts", "masked coefficients, decrypted"
"""What uploads are measured as, by who looks."""

BINS = 256
P_VALUE = 1e-7
"""A fair coin is called unfair so seldom, for each series."""
DEVIATIONS = 6.0


class Series(Struct, frozen=True, forbid_unknown_fields=True):
    """Values that should be uniform: how many fell into each of 256 bins by their top byte, and by their low byte."""

    name: str
    top: Counts
    low: Counts


class Correlation(Struct, frozen=True, forbid_unknown_fields=True):
    """The sums from which a correlation of uploads (y) with what was uploaded (x) follows."""

    name: str
    count: Count
    x: float
    y: float
    xx: float
    yy: float
    xy: float


class Pairs(Struct, frozen=True, forbid_unknown_fields=True):
    """Uploads of one vector, compared place by place: two rounds of one hospital, or two hospitals in one round."""

    name: str
    compared: Count
    equal: Count
    bits: Bits


class Uploads:
    """What was measured of uploads, and how many secrets were looked for beside them."""

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.correlations: list[Correlation] = []
        self.pairs: list[Pairs] = []
        self.searched = self.found = 0


Words = NDArray[np.uint64]


def measure(world: World, rounds: int, progress: Progress) -> Uploads:
    """Sum the same vectors again and again: zeros, and one that fills the agreed range."""
    measured = Uploads()
    size = UPLOAD_VALUES if not world.agreement.secure_sum.encrypted else 2 * world.agreement.secure_sum.chunk_values
    limit = FixedPoint.from_agreement(world.agreement).limit
    spread = np.random.default_rng(0).uniform(-limit, limit, size)
    for share, (name, vector) in enumerate(zip(UPLOADED, (np.zeros(size), spread), strict=True)):
        progress(f"uploads of {name}", 0.75 + share / 8)
        before = len(world.fresh.secrets)
        network = World(world.agreement, size, world.fresh).network(rounds)
        network.vectors = lambda _name, _round, vector=vector: vector  # type: ignore[misc]
        wire = _run(network)
        for kind, bits, uploads in _kinds(network, wire):
            label = f"{kind}, {name}"
            measured.series.append(_series(label, bits, uploads))
            measured.pairs += _pairs(label, bits, uploads)
            if share:
                measured.correlations.append(_correlation(label, _packed(network, vector), uploads))
        secrets = [*world.fresh.secrets[before:], *{journal.secret for journal in network.journals.values()} - {b""}]
        clear = b"".join(wire.values())
        measured.searched += len(secrets)
        measured.found += sum(secret[:32] in clear for secret in secrets)
    return measured


Key = tuple[str, int, str]
"""Who, in which round, and which message."""


def _run(network: Network) -> dict[Key, bytes]:
    """Everything that nodes send in an honest study, by sender, round and message; chunks of an upload in one piece."""
    wire: dict[Key, bytes] = defaultdict(bytes)
    play = Play(network)
    genuine = network.tap

    def listen(sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        head, tail = m._decoder.decode(m._split(data)[0]), bytes(m._split(data)[1])
        kind = type(head.body).__name__
        if sender != AGGREGATOR and kind == "UploadChunk":
            wire[sender, head.round, "upload"] += tail
        else:
            wire[sender, head.round, kind] += data
        return genuine(sender, recipient, data)

    network.tap = listen
    play.run()
    return dict(wire)


def _kinds(network: Network, wire: dict[Key, bytes]) -> list[tuple[str, int, dict[tuple[str, int], Words]]]:
    """What there is of each upload, by who looks: its name, its bits, and the words by sender and round."""
    ring = network.agreement.secure_sum
    tails = {(name, number): data for (name, number, kind), data in wire.items() if kind == "upload"}
    if not ring.encrypted:
        values = {place: unpack(data, network.size, ring.ring_bits).astype(np.uint64) for place, data in tails.items()}
        return [(MASKED, ring.ring_bits, values)]
    parameters = packing_of(network.agreement).parameters
    words = {place: unpack_upload(data, parameters)[0][:, 0].reshape(-1) for place, data in tails.items()}
    kinds = [(WORDS, parameters.prime_bits, words)]
    key = study_key(network)
    if ring.masked and key is not None:
        opened = {place: decrypted(network, data, key).reshape(-1) for place, data in tails.items()}
        kinds.append((COEFFICIENTS, parameters.plain_bits, opened))
    return kinds


def bits_of(agreement: Agreement) -> dict[str, int]:
    """What is measured of uploads under this agreement, made small, and how many bits each value has."""
    ring = agreement.secure_sum
    if not ring.encrypted:
        return {MASKED: ring.ring_bits}
    parameters = packing_of(agreement).parameters
    bits = {WORDS: parameters.prime_bits}
    return bits | {COEFFICIENTS: parameters.plain_bits} if ring.masked else bits


def _packed(network: Network, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """The input as it stands beside the words of an upload: values, or coefficients."""
    encoded = FixedPoint.from_agreement(network.agreement).encode(vector)
    if not network.agreement.secure_sum.encrypted:
        return encoded.astype(np.float64)
    return packing_of(network.agreement).pack(encoded).reshape(-1).astype(np.float64)


def _series(name: str, bits: int, uploads: dict[tuple[str, int], Words]) -> Series:
    everything = np.concatenate(list(uploads.values())) if uploads else np.zeros(0, dtype=np.uint64)
    top = np.bincount((everything >> np.uint64(bits - 8)).astype(np.int64), minlength=BINS)
    low = np.bincount((everything & np.uint64(BINS - 1)).astype(np.int64), minlength=BINS)
    return Series(name, tuple(top.tolist()), tuple(low.tolist()))


def _pairs(name: str, bits: int, uploads: dict[tuple[str, int], Words]) -> list[Pairs]:
    """Every upload beside that of the same hospital in the next round, and beside that of the next hospital in the same round."""
    names, rounds = sorted({name for name, _ in uploads}), sorted({number for _, number in uploads})
    in_time = [((who, a), (who, b)) for who in names for a, b in pairwise(rounds)]
    beside = [((a, number), (b, number)) for number in rounds for a, b in pairwise(names)]
    found = []
    for kind, places in (("two rounds of one hospital", in_time), ("two hospitals in one round", beside)):
        both = [(uploads[a], uploads[b]) for a, b in places if a in uploads and b in uploads]
        equal = sum(int(np.count_nonzero(a == b)) for a, b in both)
        found.append(Pairs(f"{name}, {kind}", sum(a.size for a, _ in both), equal, bits))
    return found


def _correlation(name: str, inputs: NDArray[np.float64], uploads: dict[tuple[str, int], Words]) -> Correlation:
    x = np.tile(inputs - inputs.mean(), len(uploads))
    scale = np.abs(x).max() or 1.0
    x = x / scale
    y = np.concatenate(list(uploads.values())).astype(np.float64)
    y = y / max(1.0, float(y.max())) - 0.5
    return Correlation(name, x.size, float(x.sum()), float(y.sum()), float(x @ x), float(y @ y), float(x @ y))


# --- judging


def chi_square(counts: Sequence[int]) -> tuple[float, float]:
    """The statistic of these counts against equal ones, and its p-value."""
    from scipy.stats import chi2

    expected = sum(counts) / len(counts)
    if expected < 5:
        return math.nan, math.nan
    statistic = sum((count - expected) ** 2 for count in counts) / expected
    return statistic, float(chi2.sf(statistic, len(counts) - 1))


def correlation_of(sums: Correlation) -> float:
    """The correlation coefficient; 0 if one of the two does not vary."""
    n = sums.count
    if not n:
        return 0.0
    covariance = sums.xy / n - (sums.x / n) * (sums.y / n)
    variances = (sums.xx / n - (sums.x / n) ** 2) * (sums.yy / n - (sums.y / n) ** 2)
    return covariance / math.sqrt(variances) if variances > 0 else 0.0


def judge_uploads(
    kind: str,
    protocol: str,
    every_series: Sequence[Series],
    every_pair: Sequence[Pairs],
    correlations: Sequence[Correlation],
) -> tuple[Status, str]:
    """Uniform bytes, no correlation with the input, and no place at which two uploads agree more often than by chance."""
    faults: list[str] = []
    smallest, values = 1.0, 0
    series = [item for item in every_series if item.name.startswith(kind)]
    for item in series:
        values += sum(item.top)
        for what, counts in (("top", item.top), ("low", item.low)):
            statistic, p = chi_square(counts)
            if math.isnan(p):
                return "not testable", f"too few values ({sum(counts)}) of {item.name}"
            smallest = min(smallest, p)
            if p < P_VALUE:
                faults.append(f"{item.name}: the {what} bytes are not uniform (chi-square {statistic:.0f}, p {p:.1g})")
    for pair in (item for item in every_pair if item.name.startswith(kind)):
        chance = pair.compared / 2.0**pair.bits
        if pair.equal > chance + DEVIATIONS * math.sqrt(chance) + 3:
            faults.append(f"{pair.name}: {pair.equal} of {pair.compared} places are equal, {chance:.3g} by chance")
    strongest = 0.0
    for sums in (item for item in correlations if item.name.startswith(kind)):
        r = correlation_of(sums)
        strongest = max(strongest, abs(r))
        if abs(r) * math.sqrt(sums.count) > DEVIATIONS:
            faults.append(f"{sums.name}: correlated with the input (r = {r:.4f}, {sums.count} values)")
    if faults:
        return "broken", "; ".join(faults)
    if not series:
        return "not testable", f"{protocol} uploads no {kind}"
    equal = sum(item.equal for item in every_pair if item.name.startswith(kind))
    tests = f"smallest p of {2 * len(series)} chi-square tests {smallest:.2g}"
    again = f"{equal} equal places in repeated uploads of one vector, correlation with it {strongest:.1g}"
    return "held", f"{values} {kind}: {tests}, {again}"
