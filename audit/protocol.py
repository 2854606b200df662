"""The audit of the secure sum: is every promise of the threat model held by the code that is installed here?

`collect` plays the malicious aggregator and malicious members against the real machines under the agreement's own parameters
(`audit.attacks`), measures what uploads and shares of secrets look like, counts whether anything that must be fresh comes twice, and
looks at records and at a deployment if it is given them (`audit.deployment`). `judge` turns this into one finding per row of
docs/threat-model.md and is a pure function: it sees raw outcomes and counts, and decides alone.

Keys are fresh ones of this audit, never a site's. What is not played says so: "not testable", and who tests it instead.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from audit.attacks import CATALOGUE
from audit.attacks.by_colluders import control, has_control
from audit.attacks.knowledge import packing_of
from audit.attacks.stage import Played, World, reduced, vector_values
from audit.deployment import DeploymentEvidence, collect_deployment, judge_deployment, judge_strangers
from audit.findings import Finding, Status
from audit.promises import COLLUSION, PROMISES, Promise
from audit.rounds import RecordsEvidence, Repeats, collect_records, judge_records
from audit.splits import SECRETS, Splits, judge_splits, measure_splits, shape
from audit.uploads import (
    COEFFICIENTS,
    MASKED,
    UPLOAD_ROUNDS,
    UPLOAD_VALUES,
    UPLOADED,
    WORDS,
    Bits,
    Correlation,
    Pairs,
    Series,
    Uploads,
    bits_of,
    judge_uploads,
    measure,
)
from keys.errors import ConfigError
from protocols.agreement import Agreement, check_rules
from protocols.messages import AGGREGATOR
from secgeo.update import Layout

Profile = Literal["fast", "full"]

MEMBERS_PLAYED = {"fast": 6, "full": 12}
SPARSE_MEMBERS_PLAYED = 32
MEMBERS_OVER_SOCKETS = {"fast": 0, "full": 6}
"""What sockets add to an attack does not depend on how many hospitals there are. In profile "fast" nothing is played over them."""
SEEDS_DRAWN = 20_000
"""So many secrets of attempts are drawn beside those of the studies: a source of 24 bits repeats itself then, but for once in 100,000."""
CERTAINTY = 7.0
"""So many repetitions are expected where it is said that there would have been one: none at all comes once in 1,000."""
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


class ProtocolEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """Raw outcomes of everything that was tried.

    Attributes:
        control: whether the attacker reads a vector when it has as many colluders as the protocol gives in to; None if not played.
        repeats: everything that must be fresh, of honest hospitals, over all studies that were played.
        splits: secrets that were split among holders again and again, as nodes split theirs; empty without masks.
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
    splits: tuple[Splits, ...]
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
    splits: tuple[Splits, ...] = ()
    if not rule and agreement.secure_sum.masked:
        progress("shares of secrets", 0.75)
        world.fresh.draw(SEEDS_DRAWN)
        splits = measure_splits(*shape(agreement, world.agreement))
    uploads = Uploads() if rule else measure(world, UPLOAD_ROUNDS[profile], progress)
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
        splits=splits,
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


# --- judging


def judge(evidence: ProtocolEvidence) -> list[Finding]:
    """One finding for each promise of the threat model, and those on parameters, freshness, shares, records and the deployment."""
    findings = [_judge_promise(promise, evidence) for promise in (*PROMISES, *COLLUSION)]
    findings += [_judge_parameters(evidence), _judge_repeats(evidence), judge_splits(evidence.splits)]
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
    if agreement.secure_sum.masked and [splits.secret for splits in evidence.splits] != [*SECRETS]:
        lacking.append("shares of secrets")
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


def _judge_uploads(evidence: ProtocolEvidence, kind: str) -> tuple[Status, str]:
    return judge_uploads(kind, evidence.parameters.protocol, evidence.series, evidence.pairs, evidence.correlations)


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
