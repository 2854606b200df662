"""The audit of the secure sum: is every promise of the threat model held by the code that is installed here?

`collect` plays the malicious aggregator and malicious members against the real machines under the agreement's own parameters
(`audit.attacks`), measures what uploads look like, counts whether anything that must be fresh comes twice, and looks at records
and at a deployment if it is given them (`audit.deployment`). `judge` turns this into one finding per row of docs/threat-model.md and is a
pure function: it sees raw outcomes and counts, and decides alone.

Keys are fresh ones of this audit, never a site's. What is not played says so: "not testable", and who tests it instead.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from audit.attacks import CATALOGUE
from audit.attacks.by_colluders import control, has_control
from audit.attacks.knowledge import decrypted, packing_of, study_key
from audit.attacks.network import Network
from audit.attacks.play import Play
from audit.attacks.stage import Played, World, reduced, vector_values
from audit.deployment import (
    DeploymentEvidence,
    RecordsEvidence,
    Repeats,
    collect_deployment,
    collect_records,
    judge_deployment,
    judge_records,
    judge_strangers,
)
from audit.findings import Finding, Status
from keys.errors import ConfigError
from protocols import messages as m
from protocols.agreement import Agreement, check_rules
from protocols.ciphertexts import unpack_upload
from protocols.encoding import FixedPoint, unpack
from protocols.messages import AGGREGATOR
from secgeo.update import Layout

Profile = Literal["fast", "full"]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Bits = Annotated[int, Meta(ge=0, le=64)]
Counts = Annotated[tuple[Count, ...], Meta(min_length=256, max_length=256)]
Progress = Callable[[str, float], None]

MEMBERS_PLAYED = {"fast": 6, "full": 12}
SPARSE_MEMBERS_PLAYED = 32
MEMBERS_OVER_SOCKETS = {"fast": 0, "full": 6}
"""What sockets add to an attack does not depend on how many hospitals there are. In profile "fast" nothing is played over them."""
UPLOAD_ROUNDS = {"fast": 4, "full": 16}
UPLOAD_VALUES = 8192
UPLOADED = ("zeros", "the whole range")
SEEDS_DRAWN = 20_000
"""So many secrets of attempts are drawn beside those of the studies: a source of 24 bits repeats itself then, but for once in 100,000."""
MASKED, WORDS, COEFFICIENTS = "masked values", "words of ciphertexts", "masked coefficients, decrypted"
"""What uploads are measured as, by who looks."""

BINS = 256
CERTAINTY = 7.0
"""So many repetitions are expected where it is said that there would have been one: none at all comes once in 1,000."""
P_VALUE = 1e-7
"""A fair coin is called unfair so seldom, for each series."""
DEVIATIONS = 6.0
SECURITY_BITS, FAILURE_BITS = 128, 100


class Skipped(Struct, frozen=True, forbid_unknown_fields=True):
    """An attack that was not played, and why."""

    name: str
    row: str
    why: str


class Parameters(Struct, frozen=True, forbid_unknown_fields=True):
    """The agreement's parameters of the sum, and how small the studies were in which attacks were played.

    `rule` is what the agreement breaks, if anything. `security_bits` and `failure_bits` are of BFV, 0 without ciphertexts.
    """

    protocol: str
    members: int
    threshold: int
    minimum_cohort: int
    neighbours: int
    share_threshold: int
    colluders_tolerated: int
    ring_bits: Bits
    value_bits: Bits
    fraction_bits: Bits
    chunk_values: int
    max_attempts: int
    values: int
    security_bits: int
    failure_bits: float
    rule: str
    members_played: int
    threshold_played: int
    minimum_cohort_played: int
    chunk_values_played: int
    values_played: int
    members_over_sockets: int


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


class ProtocolEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """Raw outcomes of everything that was tried.

    Attributes:
        control: whether the attacker reads a vector when it has as many colluders as the protocol gives in to; None if not played.
        repeats: everything that must be fresh, of honest hospitals, over all studies that were played.
        secrets_searched: so many secrets of attempts, and the study key, were looked for in what passed over the wire.
        secrets_found: so many of them stood there in clear.
    """

    profile: Profile
    parameters: Parameters
    played: tuple[Played, ...]
    skipped: tuple[Skipped, ...]
    control: bool | None
    series: tuple[Series, ...]
    correlations: tuple[Correlation, ...]
    pairs: tuple[Pairs, ...]
    repeats: tuple[Repeats, ...]
    secrets_searched: int
    secrets_found: int
    records: RecordsEvidence | None
    deployment: DeploymentEvidence | None
    seconds: float


# --- collecting


def collect(
    agreement: Agreement,
    *,
    profile: Profile,
    folder: Path | None,
    config: Path | None,
    progress: Callable[[str, float], None],
) -> ProtocolEvidence:
    """Play, measure and look.

    Args:
        agreement: the study's; large ones are played with fewer members and shorter vectors, as the evidence says.
        profile: "fast" takes some seconds, at most 30; "full" plays with more members, and everything over sockets too, and measures more.
        folder: a study's folder of records, if there is one.
        config: the configuration of a running node or aggregator, if there is one.
        progress: is told what is tried, and how much of the whole is done (0 to 1).

    Raises:
        ConfigError: no such folder, or no configuration that can be read.
    """
    started = time.monotonic()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of records")
    deployment = None
    if config is not None:
        progress("looks at the deployment", 0.0)
        deployment = collect_deployment(config, datetime.now(UTC))
    records = None
    if folder is not None:
        progress("looks at the records", 0.02)
        records = collect_records(folder, datetime.now(UTC))
    rule = _broken_rule(agreement)
    worlds = _worlds(agreement, profile)
    world = worlds[0]
    played: list[Played] = []
    skipped = [
        Skipped(attack.name, attack.row, f"the agreement breaks a rule: {rule}" if rule else why[0])
        for attack in CATALOGUE
        if all(why := [attack.missing(place) for place in worlds]) or rule
    ]
    tries = [(a, place) for place in worlds for a in CATALOGUE if not rule and not a.missing(place)]
    for done, (attack, place) in enumerate(tries):
        over = "" if place.over == "memory" else f"over {place.over}: "
        progress(f"{over}{attack.name}", 0.05 + 0.7 * done / len(tries))
        try:
            played.append(attack.play(place))
        except Exception as error:  # one attack that fails by itself must not hide the others
            failed = f"{over}the attack itself failed: {type(error).__name__}: {error}"[:300]
            skipped.append(Skipped(attack.name, attack.row, failed))
    reads = None if rule else control(world)
    if not rule and agreement.secure_sum.masked:
        world.fresh.draw(SEEDS_DRAWN)
    uploads = _Uploads() if rule else _measure(world, UPLOAD_ROUNDS[profile], progress)
    progress("done", 1.0)
    return ProtocolEvidence(
        profile=profile,
        parameters=_parameters(agreement, profile),
        played=tuple(played),
        skipped=tuple(skipped),
        control=reads,
        series=tuple(uploads.series),
        correlations=tuple(uploads.correlations),
        pairs=tuple(uploads.pairs),
        repeats=tuple(
            Repeats(kind, world.fresh.seen[kind], distinct) for kind, distinct in sorted(world.fresh.distinct.items())
        ),
        secrets_searched=uploads.searched,
        secrets_found=uploads.found,
        records=records,
        deployment=deployment,
        seconds=round(time.monotonic() - started, 3),
    )


def _worlds(agreement: Agreement, profile: Profile) -> list[World]:
    """Where attacks are played: in memory, and in profile "full" over sockets too. An agreement that breaks a rule is left as it is."""
    size = Layout.from_agreement(agreement).size
    if _broken_rule(agreement):
        return [World(agreement, vector_values(agreement, size))]
    small = reduced(agreement, _members_played(agreement, profile))
    worlds = [World(small, vector_values(small, size))]
    if members := MEMBERS_OVER_SOCKETS[profile]:
        few = reduced(agreement, members)
        worlds.append(World(few, vector_values(few, size), worlds[0].fresh, "sockets"))
    return worlds


def _members_played(agreement: Agreement, profile: Profile) -> int:
    """A sparse graph is played as it is, if there is time for it: with fewer members it would be complete."""
    members = len(agreement.members)
    sparse = profile == "full" and agreement.secure_sum.neighbours and members <= SPARSE_MEMBERS_PLAYED
    return members if sparse else MEMBERS_PLAYED[profile]


def _broken_rule(agreement: Agreement) -> str:
    try:
        check_rules(agreement)
    except ConfigError as error:
        return str(error)
    return ""


def _parameters(agreement: Agreement, profile: Profile) -> Parameters:
    """What the agreement says, and what follows from it: the same for whoever looks."""
    rule, (world, *others) = _broken_rule(agreement), _worlds(agreement, profile)
    ring, played, members = agreement.secure_sum, world.agreement, len(agreement.members)
    security, failure = 0, 0.0
    if ring.encrypted and not rule:
        bfv = packing_of(agreement).parameters
        security, failure = bfv.security_bits, bfv.failure_bits(members)
    return Parameters(
        protocol=ring.protocol,
        members=members,
        threshold=ring.threshold,
        minimum_cohort=ring.minimum_cohort,
        neighbours=ring.neighbours,
        share_threshold=ring.share_threshold,
        colluders_tolerated=agreement.colluders_tolerated,
        ring_bits=ring.ring_bits,
        value_bits=ring.value_bits,
        fraction_bits=ring.fraction_bits,
        chunk_values=ring.chunk_values,
        max_attempts=ring.max_attempts,
        values=Layout.from_agreement(agreement).size,
        security_bits=security,
        failure_bits=failure,
        rule=rule,
        members_played=len(played.members),
        threshold_played=played.secure_sum.threshold,
        minimum_cohort_played=played.secure_sum.minimum_cohort,
        chunk_values_played=played.secure_sum.chunk_values,
        values_played=world.size,
        members_over_sockets=len(others[0].names) if others else 0,
    )


# --- what uploads look like


class _Uploads:
    """What was measured of uploads."""

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.correlations: list[Correlation] = []
        self.pairs: list[Pairs] = []
        self.searched = self.found = 0


Words = NDArray[np.uint64]


def _measure(world: World, rounds: int, progress: Progress) -> _Uploads:
    """Sum the same vectors again and again: zeros, and one that fills the agreed range."""
    measured = _Uploads()
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


# --- the promises


class Promise(NamedTuple):
    """One row of docs/threat-model.md. `elsewhere` says who tests it, where this audit does not."""

    row: str
    adversary: str
    promise: str
    elsewhere: str = ""


PROMISES = (
    Promise("curious-masked", "curious aggregator (masked)", "uploads look uniform; it learns the sum only"),
    Promise(
        "curious-encrypted",
        "curious aggregator (layered, homomorphic)",
        "it holds no key and cannot decrypt uploads or sum",
    ),
    Promise(
        "key-holder",
        "... with a hospital that gives it the study key",
        "layered: what they decrypt of one node is uniform; homomorphic: no promise",
    ),
    Promise(
        "study-keys",
        "... or two study keys, other people's keys, keys at the wrong time",
        "nobody sums with a hospital that was dealt another key; none is changed once a round was opened",
    ),
    Promise(
        "ciphertext-sum", "... one upload, or an old one, in the place of a sum of ciphertexts", "caught by the tags"
    ),
    Promise(
        "keys",
        "malicious aggregator: substituted, replayed or withheld round keys; invented hospitals; a shrunk cohort",
        "every node refuses and leaves, naming the aggregator",
    ),
    Promise(
        "parameters",
        "... another threshold, ring, clip or precision than agreed",
        "refused; all parameters come from the pinned agreement",
    ),
    Promise("both-shares", "... self-seed and pair share of one node", "a node gives one of the two"),
    Promise(
        "survivors",
        "... different survivor sets to different nodes; too few, forged or repeated votes",
        "nothing is revealed",
    ),
    Promise(
        "neighbours",
        '... honest neighbours that "never dealt seeds", or a victim cut off in a sparse graph',
        "refused before the vote",
    ),
    Promise(
        "second-sum",
        "... a second sum of one round, after the first or beside it; an old round or attempt; an upload that comes after its "
        "pair masks were revealed",
        "refused; the self mask keeps a late upload private",
    ),
    Promise(
        "changed-sum",
        "... a changed, truncated or re-ordered sum, with records signed anew to fit it",
        "caught by the tags at every honest node",
    ),
    Promise(
        "multiple",
        "... a multiple of the sum with the same multiple of its tags; a countersignature for a record that its signer never "
        "checked",
        "caught; not given",
    ),
    Promise(
        "latecomer",
        "... a wrong sum for a node that took no part",
        "wants more countersignatures than may collude",
    ),
    Promise(
        "two-stories", "... two stories to two nodes", "a node that sees both leaves; the auditor sees EQUIVOCATION"
    ),
    Promise(
        "fork",
        "... a round that some nodes take for lost and others have applied",
        "nobody sums with who builds on another sum",
    ),
    Promise(
        "order",
        "... sums out of order, or one that a node is made to miss",
        "applied in the order in which they build on each other",
    ),
    Promise(
        "no-ciphertexts",
        "malicious node: ciphertexts that are none, or that crash the library",
        "that upload alone is lost, its sender is named, the total is as before",
    ),
    Promise(
        "no-study-key",
        "... a study key that it claims and does not deal, or seals badly, or that is none (0, say)",
        "the next one is asked",
    ),
    Promise(
        "messages",
        "malicious node: a second upload with another digest; broken, oversized or random messages",
        "named, put out; the round goes on",
    ),
    Promise(
        "shares",
        "... wrong shares, dealt or revealed",
        "who lied is named by digests that the dealer signed; nobody else is",
    ),
    Promise(
        "contributions",
        "... contributions to pair seeds that its pair master does not give",
        "who sealed them is named; the round is lost",
    ),
    Promise(
        "complaints",
        "... complaints, provoked or false",
        "no secret is disclosed; it can keep one honest node out of an attempt, together with itself, and both are named",
    ),
    Promise(
        "not-finite",
        "... NaN, infinity, out of range",
        "refused by honest nodes before anything is sent; clipped",
    ),
    Promise("tag-seeds", "... two tag seeds from one dealer", "complaint; the tag of the others holds"),
    Promise("silence", "... silence in any phase", "costs one deadline a phase"),
    Promise(
        "losses",
        "a node lost in any phase; connections lost at any message",
        "recovered from while enough remain; below that nothing is opened; nobody honest is blamed",
    ),
    Promise(
        "cut-lines",
        "whoever cuts lines again and again, or withholds its receipt",
        "nobody honest is blamed or expelled",
    ),
    Promise(
        "crashes",
        "a crash (kill -9) of the aggregator or a node in any phase",
        "the round completes, or is begun anew with fresh seeds; no mask is used twice, no record is lost",
        "crash recovery is not played here; the test suite kills real processes (secgeo/test_crash.py)",
    ),
    Promise(
        "strangers",
        "strangers on the network: no key, wrong key, garbage, half-open connections, oversized messages",
        "kept out; honest nodes go on",
    ),
    Promise(
        "other-names",
        "a revoked member, keys of an old roster, messages in another member's name",
        "not heard, or put out",
    ),
    Promise(
        "mixtures",
        "any mixture of losses, repetitions, tampering, delays, broken connections and crashes",
        "the exact sum of the survivors or a typed error that names the right party",
        "random schedules are not played here; the test suite does (adversary/test_stateful.py, protocols/test_schedules.py)",
    ),
    Promise(
        "decoders",
        "hostile bytes in any decoder: messages, keys, certificates, configurations, records, data files",
        "typed errors only, in bounded time and memory",
    ),
    Promise(
        "documents",
        "whoever hands a node a wrong agreement, roster (an old one too), certificate, anchor set or a weak study",
        "refused before training",
    ),
    Promise(
        "records",
        "whoever changes records afterwards",
        "any byte shows",
        "`secgeo verify` checks a folder of records; that every changed byte shows is tested by tests/audit",
    ),
    Promise(
        "secrets",
        "reader of key files, logs, arguments, representations",
        "no secret",
    ),
    Promise(
        "model",
        "reader of the released model",
        "(epsilon, delta)-DP per record or patient, add or remove one",
        "the audit of training tests it",
    ),
    Promise(
        "model-hospital",
        "the same, up to c hospitals included, where agreed",
        "(epsilon, delta)-DP per hospital, one hospital's updates zero",
        "the audit of training and `secgeo budget` test it",
    ),
    Promise(
        "budget",
        "a node that is started again and again, in many studies, at the same time, or killed between any two writes",
        "spends no more than its budget on any record; nothing is drawn that was not counted",
        "not played here; the test suite does (secgeo/test_budget.py)",
    ),
    Promise(
        "claims",
        "a node that claims too low an epsilon, leaves out an event or trains with other parameters",
        "found, and the event named",
        "`secgeo verify` and `secgeo budget verify` find it in a study's records",
    ),
    Promise(
        "rubbish-keys",
        "members that seal rubbish or bytes that are no key, claim other keys, or ask without end while the study key is dealt",
        "the others get their key; none is taken that is none, or after a round was begun",
    ),
)

COLLUSION = (
    Promise(
        "colluders",
        "Collusion: the aggregator follows the protocol",
        "fewer colluders than the threshold learn only what the sum and their own inputs imply",
    ),
    Promise(
        "deviating-colluders",
        "Collusion: the aggregator deviates",
        "privacy holds while 2t > n + c: no two survivor sets get t votes",
    ),
    Promise(
        "sparse",
        "Collusion: a sparse graph",
        "up to share_threshold - 1 colluders recover nothing, wherever they stand; 2t > n + share_threshold - 1",
    ),
    Promise(
        "no-colluders",
        "Collusion: homomorphic",
        "tolerates none, and the agreement says so; layered tolerates what masked does",
    ),
    Promise(
        "colluder-tags",
        "Collusion: the tags fall to one colluder",
        "privacy is untouched; the aggregator cannot deny what it signed",
    ),
    Promise(
        "honest-contributors",
        "Collusion: the sum of the other contributors is known to colluders",
        "the minimum cohort leaves at least two honest contributors beside as many colluders as are tolerated",
    ),
)

# --- judging


def judge(evidence: ProtocolEvidence) -> list[Finding]:
    """One finding for each promise of the threat model, and those on parameters, freshness, records and the deployment."""
    findings = [_judge_promise(promise, evidence) for promise in (*PROMISES, *COLLUSION)]
    findings += [_judge_parameters(evidence), _judge_repeats(evidence)]
    if evidence.records is not None:
        findings += judge_records(evidence.records)
    if evidence.deployment is not None:
        findings += judge_deployment(evidence.deployment)
    return findings


def not_tried(evidence: ProtocolEvidence, agreement: Agreement) -> list[str]:
    """What the catalogue has for this agreement and profile, and what is measured of uploads, that did not take place."""
    if _broken_rule(agreement):
        return []
    worlds = _worlds(agreement, evidence.profile)
    played = {(attack.name, attack.row, attack.tried, attack.over) for attack in evidence.played if attack.took_place}
    due = [(attack, world.over) for world in worlds for attack in CATALOGUE if not attack.missing(world)]
    lacking = [
        attack.name if over == "memory" else f"{attack.name} (over {over})"
        for attack, over in due
        if (attack.name, attack.row, attack.tried, over) not in played
    ]
    values = {series.name: min(sum(series.top), sum(series.low)) for series in evidence.series}
    names = [f"{kind}, {what}" for kind in bits_of(worlds[0].agreement) for what in UPLOADED]
    lacking += [name for name in names if values.get(name, 0) < UPLOAD_ROUNDS[evidence.profile] * UPLOAD_VALUES]
    if not evidence.repeats:
        lacking.append("freshness")
    if evidence.control is None and has_control(worlds[0]):
        lacking.append("control")
    return lacking


def _judge_promise(promise: Promise, evidence: ProtocolEvidence) -> Finding:
    status, detail = _verdict(promise, evidence)
    return Finding("protocol", promise.adversary, promise.promise, status, detail)


def _verdict(promise: Promise, evidence: ProtocolEvidence) -> tuple[Status, str]:
    special = {
        "curious-masked": _judge_masked,
        "curious-encrypted": _judge_encrypted,
        "key-holder": _judge_key_holder,
        "strangers": _judge_strangers,
        "secrets": _judge_secrets,
        "sparse": _judge_sparse,
        "no-colluders": _judge_no_colluders,
        "honest-contributors": _judge_honest_contributors,
    }
    if promise.row in special:
        return special[promise.row](evidence)
    if promise.elsewhere:
        return "not testable", promise.elsewhere
    return _judge_attacks(promise.row, evidence)


def _judge_attacks(row: str, evidence: ProtocolEvidence) -> tuple[Status, str]:
    """Broken if one attack was, held if all that took place were not."""
    played = [attack for attack in evidence.played if attack.row == row]
    harms = [f"{_told(attack)}: {harm}" for attack in played for harm in harms_of(attack)]
    if harms:
        return "broken", "; ".join(harms)
    took_place = [attack for attack in played if attack.took_place]
    failed = [f"{_told(attack)}: the attack never took place" for attack in played if not attack.took_place]
    why = sorted({skipped.why for skipped in evidence.skipped if skipped.row == row})
    if not took_place:
        return "not testable", "; ".join([*failed, *why]) or "nothing of the catalogue tries it"
    if evidence.control is False and row in ("colluders", "both-shares", "deviating-colluders"):
        return "not testable", "the attacker reads nothing even where the protocol gives in: its silence says nothing"
    kinds = dict.fromkeys((attack.name, attack.tried) for attack in took_place)
    names = [name if count == 1 else f"{name} ({count} kinds)" for name, count in Counter(n for n, _ in kinds).items()]
    over = len({(attack.name, attack.tried) for attack in took_place if attack.over == "sockets"})
    memory = any(attack.over == "memory" for attack in took_place)
    where = (
        "in memory"
        if not over
        else f"in memory and over sockets ({over} of {len(kinds)})"
        if memory
        else "over sockets"
    )
    note = f"; not played: {'; '.join([*failed, *why])}" if failed or why else ""
    if row == "documents":
        note += "; wrong anchors are refused by the test suite (secgeo/test_node.py)"
    if row == "decoders":
        note += "; key files, configurations, ledgers and data files are fuzzed by tests/fuzz only"
    return "held", f"nothing of what was tried succeeded, {where}: {', '.join(names)}{note}"


def _told(attack: Played) -> str:
    return f"{attack.name} ({attack.tried})" + (", over sockets" if attack.over == "sockets" else "")


def harms_of(attack: Played) -> list[str]:
    """What an attack achieved, against what honest parties must do. Empty: nothing."""
    culprits, expelled = {*attack.culprits}, {*attack.expelled}
    harms = [f"the vector of {name} was read" for name in attack.read]
    if "wrong" not in attack.granted:
        harms += [f"{name} accepted a wrong sum" for name in attack.wrong]
    harms += [*attack.gave, *attack.crashed]
    honest_aggregator = AGGREGATOR not in culprits
    blamed = [answer for answer in attack.answers if answer.blamed and answer.blamed not in culprits]
    harms += [f"{answer.party} blamed {answer.blamed}, who is honest: {answer.text}" for answer in blamed]
    if honest_aggregator:
        left = [answer for answer in attack.answers if not answer.blamed]
        harms += [f"{answer.party} left although the aggregator is honest: {answer.text}" for answer in left]
        harms += [f"{name} was put out, who is honest" for name in sorted(expelled - culprits)]
    if attack.took_place:
        refused = {a.party for a in attack.answers if a.blamed in culprits or a.error == "VerificationFailed"}
        harms += [f"{name} did not refuse" for name in sorted({*attack.must_refuse} - refused)]
        harms += [f"{name} was not put out" for name in sorted({*attack.must_be_put_out} - expelled)]
        without = [name for name in attack.must_sum if not attack.summed.get(name)]
        harms += [f"{name} was left without a sum" for name in without]
    return harms


# --- ... what uploads look like


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


def _judge_uploads(evidence: ProtocolEvidence, kind: str) -> tuple[Status, str]:
    """Uniform bytes, no correlation with the input, and no place at which two uploads agree more often than by chance."""
    faults: list[str] = []
    smallest, values = 1.0, 0
    series = [item for item in evidence.series if item.name.startswith(kind)]
    for item in series:
        values += sum(item.top)
        for what, counts in (("top", item.top), ("low", item.low)):
            statistic, p = chi_square(counts)
            if math.isnan(p):
                return "not testable", f"too few values ({sum(counts)}) of {item.name}"
            smallest = min(smallest, p)
            if p < P_VALUE:
                faults.append(f"{item.name}: the {what} bytes are not uniform (chi-square {statistic:.0f}, p {p:.1g})")
    for pair in (item for item in evidence.pairs if item.name.startswith(kind)):
        chance = pair.compared / 2.0**pair.bits
        if pair.equal > chance + DEVIATIONS * math.sqrt(chance) + 3:
            faults.append(f"{pair.name}: {pair.equal} of {pair.compared} places are equal, {chance:.3g} by chance")
    strongest = 0.0
    for sums in (item for item in evidence.correlations if item.name.startswith(kind)):
        r = correlation_of(sums)
        strongest = max(strongest, abs(r))
        if abs(r) * math.sqrt(sums.count) > DEVIATIONS:
            faults.append(f"{sums.name}: correlated with the input (r = {r:.4f}, {sums.count} values)")
    if faults:
        return "broken", "; ".join(faults)
    if not series:
        return "not testable", f"{evidence.parameters.protocol} uploads no {kind}"
    equal = sum(item.equal for item in evidence.pairs if item.name.startswith(kind))
    tests = f"smallest p of {2 * len(series)} chi-square tests {smallest:.2g}"
    again = f"{equal} equal places in repeated uploads of one vector, correlation with it {strongest:.1g}"
    return "held", f"{values} {kind}: {tests}, {again}"


def _judge_masked(evidence: ProtocolEvidence) -> tuple[Status, str]:
    return _judge_uploads(evidence, MASKED)


def _judge_encrypted(evidence: ProtocolEvidence) -> tuple[Status, str]:
    status, detail = _judge_uploads(evidence, WORDS)
    if status == "held" and evidence.secrets_found:
        return "broken", f"{evidence.secrets_found} secrets stand in clear on the wire"
    return status, detail + ("; the study key is never in clear on the wire" if status == "held" else "")


def _judge_key_holder(evidence: ProtocolEvidence) -> tuple[Status, str]:
    if evidence.parameters.protocol == "homomorphic":
        return "not testable", "nothing is promised: every hospital that has the key reads every upload"
    return _judge_uploads(evidence, COEFFICIENTS)


# --- ... what is seen of parameters, secrets and documents


def _judge_strangers(evidence: ProtocolEvidence) -> tuple[Status, str]:
    """The door of the running aggregator, where a node's configuration says where it is; and that of a study of this audit's own."""
    running, own = judge_strangers(evidence.deployment), _judge_attacks("strangers", evidence)
    for status, detail in (running, own):
        if status == "broken":
            return status, detail
    return (own if evidence.deployment is None else running)[0], f"{running[1]}; a study of the audit's own: {own[1]}"


def _judge_secrets(evidence: ProtocolEvidence) -> tuple[Status, str]:
    if evidence.secrets_found:
        return "broken", f"{evidence.secrets_found} of {evidence.secrets_searched} secrets stand in clear on the wire"
    searched = f"{evidence.secrets_searched} secrets were looked for on the wire and not found"
    if evidence.deployment is None:
        return (
            "not testable",
            f"no key files were given; {searched}; keys/ and the test suite look at logs and representations",
        )
    judged = [f for f in judge_deployment(evidence.deployment) if f.name.startswith(("key files", "folders"))]
    broken = [finding.detail for finding in judged if finding.status == "broken"]
    if broken:
        return "broken", "; ".join(broken)
    missing = [finding.detail for finding in judged if finding.status == "not testable"]
    return (
        ("not testable", f"{missing[0]}; {searched}")
        if missing
        else ("held", f"key files are private and encrypted; {searched}")
    )


def _judge_sparse(evidence: ProtocolEvidence) -> tuple[Status, str]:
    agreed = evidence.parameters
    if not agreed.neighbours:
        return "not testable", "the agreement's graph is complete: every pair shares masks"
    left, right = 2 * agreed.threshold, agreed.members + agreed.share_threshold - 1
    if left <= right:
        return "broken", f"2t = {left} is not above n + share_threshold - 1 = {right}"
    if agreed.neighbours and agreed.members_played < agreed.members:
        return "held", (
            f"2t = {left} > n + share_threshold - 1 = {right}, by the agreement's numbers; attacks were played over a complete graph of "
            f"{agreed.members_played} members, those on sparse graphs are the test suite's (adversary/test_shares.py)"
        )
    return _judge_attacks("neighbours", evidence)


def _judge_no_colluders(evidence: ProtocolEvidence) -> tuple[Status, str]:
    agreed = evidence.parameters
    if agreed.protocol == "homomorphic":
        tolerated = agreed.colluders_tolerated
        return ("broken" if tolerated else "held"), f"the agreement counts {tolerated} colluders tolerated"
    if agreed.protocol == "layered":
        status, detail = _judge_attacks("colluders", evidence)
        return status, f"layered: {detail}"
    return "not testable", "the agreement's protocol is masked"


def _judge_honest_contributors(evidence: ProtocolEvidence) -> tuple[Status, str]:
    agreed = evidence.parameters
    honest = agreed.minimum_cohort - agreed.colluders_tolerated
    detail = f"minimum_cohort {agreed.minimum_cohort} - {agreed.colluders_tolerated} colluders tolerated = {honest} honest contributors"
    return ("held" if honest >= 2 else "broken"), detail


def _judge_parameters(evidence: ProtocolEvidence) -> Finding:
    agreed, faults = evidence.parameters, list[str]()
    if agreed.rule:
        faults.append(agreed.rule)
    if agreed.members * (2**agreed.value_bits - 1) >= 2**agreed.ring_bits:
        faults.append(f"{agreed.members} values of {agreed.value_bits} bits overflow {agreed.ring_bits} bits")
    if 2 * agreed.threshold <= agreed.members + 1:
        faults.append(f"2t = {2 * agreed.threshold} is not above n + 1 = {agreed.members + 1}")
    if agreed.minimum_cohort < max(3, agreed.threshold):
        faults.append(f"minimum_cohort {agreed.minimum_cohort} is below 3 or below the threshold {agreed.threshold}")
    bfv = ""
    if agreed.protocol != "masked":
        bfv = f", BFV {agreed.security_bits} bits, a wrong coefficient below 2^-{agreed.failure_bits:.0f}"
        if agreed.security_bits < SECURITY_BITS or agreed.failure_bits < FAILURE_BITS:
            faults.append(
                f"BFV has {agreed.security_bits} bits of security and 2^-{agreed.failure_bits:.0f} of failure"
            )
    detail = (
        f"{agreed.protocol}: n = {agreed.members}, t = {agreed.threshold}, minimum cohort {agreed.minimum_cohort}, "
        f"{agreed.colluders_tolerated} colluders tolerated, {agreed.value_bits} bits in a ring of {agreed.ring_bits}{bfv}; played with "
        f"{agreed.members_played} members and {agreed.values_played} of {agreed.values} values"
    ) + (f", over sockets with {agreed.members_over_sockets} members" if agreed.members_over_sockets else "")
    promise = (
        "sums cannot overflow, two survivor sets cannot both be signed, ciphertexts have the security that is claimed"
    )
    return Finding(
        "protocol", "parameters of the sum", promise, "broken" if faults else "held", "; ".join(faults) or detail
    )


def _judge_repeats(evidence: ProtocolEvidence) -> Finding:
    repeated = [item for item in evidence.repeats if item.distinct < item.seen]
    shown = repeated or evidence.repeats
    detail = "; ".join(f"{item.seen} {item.kind}, {item.distinct} different" for item in shown)
    status: Status = "broken" if repeated else "held" if evidence.repeats else "not testable"
    if (seeds := [item.seen for item in evidence.repeats if item.kind == "self seeds"]) and not repeated:
        bits = math.floor(math.log2(seeds[0] * (seeds[0] - 1) / 2 / CERTAINTY))
        detail += f"; a source of {bits} bits or less would have repeated itself among so many seeds"
    promise = "seeds, keys, commitments, seals and uploads are fresh in every attempt of every round"
    return Finding("protocol", "freshness of seeds and keys", promise, status, detail or "nothing was played")


def to_json(evidence: ProtocolEvidence) -> bytes:
    """The evidence as JSON, for a report; `from_json` reads it back."""
    return msgspec.json.encode(evidence)


def from_json(data: bytes) -> ProtocolEvidence:
    """Evidence that was kept.

    Raises:
        ConfigError: this is none.
    """
    try:
        return msgspec.json.decode(data, type=ProtocolEvidence)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"this is no evidence of a protocol audit: {error}") from None
