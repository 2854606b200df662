"""Is evidence whole? Whoever forges a bundle can leave out what would show something, or look at too little for it to show.

What an audit collects follows from agreement and profile, but for how many records there are. Each function refuses evidence that is less
than that, or whose counts do not go together; what was left out as a whole the bundle calls missing. The parts on training have the same
of their own (`conformance.check_whole`, `training.check_whole`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from audit import protocol, splits, uploads
from audit.attacks import CATALOGUE
from audit.attacks.stage import Played
from audit.conformance import ConformanceEvidence
from audit.counts import refuse, unfair
from audit.deployment import NOT_COMPARED, DeploymentEvidence
from audit.door import KNOCKS
from audit.leakage import LeakageEvidence
from audit.leakage.evidence import CROWD, LEAST_RECORDS
from audit.leakage.membership import WHAT_IS_SEEN
from audit.leakage.scene import LEAST_TRAININGS, SIZES
from audit.protocol import ProtocolEvidence
from audit.rounds import Certificate, certificates_of
from audit.training import TrainingEvidence
from protocols.agreement import Agreement
from protocols.messages import AGGREGATOR
from secgeo.study import OpenStudy

DRAWN = ("self seeds", "share masters", "pair masters", "tag seeds")
PER_UPLOAD = (
    "share public keys", "pair public keys", "commitments to self seeds", "commitments to tag seeds", "sealed shares",
    "encapsulated keys", "digests of shares",
)  # fmt: skip
"""What must be fresh in every upload; of the first four more are drawn."""


def check_leakage(evidence: LeakageEvidence, agreement: Agreement) -> None:
    """Check that every attack was made, on as many scores and records as the profile calls for.

    Only how many records there are is the hospital's: at least `LEAST_RECORDS`, and half of them at most are candidates. Where a large
    model has fewer trainings, these are `LEAST_TRAININGS` or more; findings say how many there were.

    Raises:
        VerificationFailed: something is left out, or smaller.
    """
    size, told, per_round = SIZES[evidence.profile], evidence.settings, agreement.training.steps_per_round
    rounds = min(size.rounds, max(1, agreement.study.rounds - 1))
    own, others = told.candidate_records + told.base_records, told.canaries + told.records_of_others
    counts = {"records": told.candidate_records, "canaries": told.canaries}
    trainings = {"ours": told.trainings, "unprotected": told.trainings_unprotected}
    least = LEAST_TRAININGS if math.isfinite(size.work) else size.trainings
    refuse(
        "sizes of the leakage audit are not those of its profile",
        any(not least[kind] <= trainings[kind] <= count for kind, count in size.trainings.items()),
        not LEAST_RECORDS <= own <= CROWD,
        others < LEAST_RECORDS,
        told.records_of_others > 2 * CROWD,
        counts["records"] != min(size.records, own // 2),
        counts["canaries"] != min(size.canaries, others // 2),
        told.inverted_records != min(size.inverted, told.base_records),
        told.rounds_of_adapter != rounds,
        told.steps_per_round != per_round,
    )
    shown = [(group, observation, of) for group, rows in WHAT_IS_SEEN.items() for _, observation, of in rows]
    due = [(group, observation, of, kind) for group, observation, of in shown for kind in counts]
    refuse(
        "the attacks of the leakage audit are not those that it makes",
        [(row.observation, row.protection, row.candidates) for row in evidence.membership]
        != [(observation, of, kind) for _, observation, of, kind in due],
        [(row.observation, row.protection) for row in evidence.inversion] != [(o, of) for _, o, of in shown],
    )
    coins: dict[tuple[str, str], int] = {}
    for (group, observation, of, kind), row in zip(due, evidence.membership, strict=True):
        members, scores = len(row.members), len(row.members) + len(row.others)
        refuse(
            f"membership inference on {observation}, {of}, {kind}: {scores} scores, {members} of members, where the profile "
            f"{evidence.profile} calls for {trainings[group]:g} trainings with {counts[kind]:g} candidates",
            scores != trainings[group] * counts[kind],
            unfair(members, scores),
            coins.setdefault((group, kind), members) != members,
            row.steps != per_round * (rounds if observation == "adapter" else 1),
        )
    for turned in evidence.inversion:
        refuse(
            f"inversion of {turned.observation}, {turned.protection}: {len(turned.similarity)} records, not {told.inverted_records}",
            len(turned.similarity) != told.inverted_records,
        )


def check_units(
    watched: ConformanceEvidence | None,
    trained: TrainingEvidence | None,
    leaked: LeakageEvidence | None,
    study: OpenStudy,
    *,
    split: bool,
) -> None:
    """Check that all parts are of as many units, and of as many as a demonstration's hospital has (`split`).

    A real hospital's number of records is its own; the batch size that it agreed to is a nominal one.

    Raises:
        VerificationFailed: they are not.
    """
    if watched is None:
        return
    units, privacy = watched.sampling.expected_units, study.agreement.privacy
    refuse(
        "training was audited on another number of units than was watched",
        trained is not None and trained.units != watched.sampling.units,
    )
    if leaked is not None:
        own = leaked.settings.candidate_records + leaked.settings.base_records
        refuse(f"leakage was measured on {own:g} records, where there are {units} units", own != min(CROWD, units))
    batch = {member.node_id: member.expected_batch_size for member in study.agreement.members}[watched.member]
    refuse(
        f"a demonstration's hospital has not {units} units: its batches are of {batch:g} at rate {privacy.sample_rate:g}",
        split and not math.isclose(units * privacy.sample_rate, batch, rel_tol=1e-9),
    )


def check_protocol(evidence: ProtocolEvidence, study: OpenStudy, started: datetime) -> None:
    """Check that what was measured, counted and searched is as much as the profile calls for, and that outcomes are of the catalogue.

    Attacks that were not played the bundle calls missing (`protocol.not_tried`); so it does with uploads that were not looked at.

    Raises:
        VerificationFailed: something is of another study, or less, or its counts do not go together.
    """
    agreement = study.agreement
    due, told = protocol._parameters(agreement, evidence.profile), evidence.parameters
    refuse(
        "parameters of the secure sum are not those that follow from the agreement",
        msgspec.structs.replace(told, failure_bits=due.failure_bits) != due,
        not math.isclose(told.failure_bits, due.failure_bits, rel_tol=1e-9),
    )
    if not due.rule:
        _check_measured(evidence, agreement)
        _check_splits(evidence, agreement)
    for attack in evidence.played:
        _check_played(attack, {member.node_id for member in agreement.members})
    keys = Counter((attack.name, attack.tried, attack.over) for attack in evidence.played)
    refuse("an attack was played twice", any(count > 1 for count in keys.values()))
    if evidence.deployment is not None:
        _check_deployment(evidence.deployment, study, started)
    if evidence.records is not None and not evidence.records.problems:
        _check_certificates(evidence.records.certificates, study, evidence.records.taken_at, started)


def _check_measured(evidence: ProtocolEvidence, agreement: Agreement) -> None:
    """Uploads, and what must be fresh and secret: at least that of the honest studies in which uploads are measured."""
    rounds, members = uploads.UPLOAD_ROUNDS[evidence.profile], evidence.parameters.members_played
    values, ring = uploads.UPLOAD_VALUES, agreement.secure_sum
    compared = {
        "two rounds of one hospital": members * (rounds - 1) * values,
        "two hospitals in one round": rounds * (members - 1) * values,
    }
    bits = uploads.bits_of(protocol._worlds(agreement, evidence.profile)[0].agreement)
    series = {f"{kind}, {what}": kind for kind in bits for what in uploads.UPLOADED}
    refuse(
        "uploads that were measured are not those of the profile",
        any(sum(counts) != members * rounds * values for s in evidence.series for counts in (s.top, s.low)),
        bool(evidence.series) and {s.name for s in evidence.series} != series.keys(),
        len(evidence.series) not in (0, len(series)),
        bool(evidence.series)
        and {(pair.name, pair.compared, pair.bits) for pair in evidence.pairs}
        != {(f"{name}, {how}", count, bits[series[name]]) for name in series for how, count in compared.items()},
        bool(evidence.series)
        and {(one.name, one.count) for one in evidence.correlations}
        != {(f"{kind}, {uploads.UPLOADED[-1]}", members * rounds * values) for kind in bits},
        any(pair.equal > pair.compared for pair in evidence.pairs),
    )
    made = len(uploads.UPLOADED) * rounds * members
    secrets = (4 * made if ring.masked else 0) + (len(uploads.UPLOADED) if ring.encrypted else 0)
    refuse(
        f"{evidence.secrets_searched} secrets were looked for on the wire; the profile {evidence.profile} calls for {secrets}",
        evidence.secrets_searched < secrets,
        evidence.secrets_found not in range(evidence.secrets_searched + 1),
    )
    seen = {item.kind: item.seen for item in evidence.repeats}
    least = dict.fromkeys(("digests of chunks", "digests of uploads", "masked tags"), made)
    if ring.masked:
        least |= dict.fromkeys(PER_UPLOAD, made) | dict.fromkeys(DRAWN, made + protocol.SEEDS_DRAWN)
    if ring.encrypted:
        least |= {"seeds of ciphertexts": made, "sealed study keys": members - 1}
    short = [kind for kind, count in least.items() if seen.get(kind, 0) < count]
    refuse(
        f"too few {', '.join(short) or 'values'} were compared",
        bool(short) and bool(evidence.repeats),
        len(seen) != len(evidence.repeats),
        any(not 1 <= item.distinct <= item.seen for item in evidence.repeats),
    )


def _check_splits(evidence: ProtocolEvidence, agreement: Agreement) -> None:
    """Shares: as many splits of each secret as are due, among as many holders."""
    needed, holders = splits.shape(agreement, protocol._worlds(agreement, evidence.profile)[0].agreement)
    fewer, due = splits.SPLITS * (needed - 1), (splits.SPLITS - 1) * holders
    refuse(
        f"shares that were looked at are not of {splits.SPLITS} splits of each secret among {holders}",
        len(evidence.splits) not in (0, len(splits.SECRETS)),
        any((s.needed, s.holders, s.splits) != (needed, holders, splits.SPLITS) for s in evidence.splits),
        any((s.tried, s.coefficients, s.compared) != (fewer, fewer, due) for s in evidence.splits),
        any(sum(counts) != fewer for s in evidence.splits for counts in (s.top, s.low)),
        any(s.recovered > s.splits or s.given_away > s.tried or s.equal > s.compared for s in evidence.splits),
        any(not 1 <= s.distinct <= s.coefficients for s in evidence.splits),
    )


def _check_played(attack: Played, members: set[str]) -> None:
    """Who plays false is who the catalogue says: nothing that these do or suffer counts, so that more of them would hide harm."""
    known = [a for a in CATALOGUE if (a.name, a.row, a.tried) == (attack.name, attack.row, attack.tried)]
    culprits = {*attack.culprits}
    allowed = {
        "aggregator": culprits == {AGGREGATOR},
        "stranger": len(culprits) == 1 and not culprits & members and AGGREGATOR not in culprits,
    }.get(attack.adversary, 0 < len(culprits) < len(members) and culprits <= members)
    refuse(
        f"{attack.name} is not as it is in the catalogue",
        not known,
        any((a.adversary, a.success) != (attack.adversary, attack.success) for a in known),
        not allowed,
        bool(attack.granted) and attack.row != "colluder-tags",
        not attack.summed.keys() <= members - culprits,
    )


def _check_deployment(evidence: DeploymentEvidence, study: OpenStudy, started: datetime) -> None:
    """Whoever opened the study has also its certificates, compared its own, and has knocked: the bundle has that study."""
    kinds, first = [probe.kind for probe in evidence.probes], evidence.probes[:1]
    whole = kinds == list(KNOCKS) or (kinds == [KNOCKS[0]] and not first[0].reached)
    refuse(
        "the look at the deployment is not whole",
        not evidence.study_problem and evidence.role == "node" and not whole,
        not evidence.study_problem and evidence.study is None,
        evidence.configuration.what != "configuration" or evidence.configuration.kind == "missing",
        evidence.role == "node" and not evidence.data,
        any(reach.what == "configuration" for reach in evidence.data),
        not evidence.study_problem and evidence.certificate_problem.startswith(NOT_COMPARED),
        any(problem.startswith(NOT_COMPARED) for problem in (evidence.study_problem, evidence.policy_problem)),
    )
    if not evidence.study_problem:
        _check_certificates(evidence.certificates, study, evidence.taken_at, started)


def _check_certificates(certs: Sequence[Certificate], study: OpenStudy, taken_at: datetime, started: datetime) -> None:
    due = certificates_of(study.roster, {member.node_id for member in study.agreement.members})
    refuse(
        "certificates are not those of the roster, or were not looked at when the audit was made",
        tuple(certs) != due,
        not timedelta(minutes=-1) < taken_at - started < timedelta(days=2),
    )
