"""Hollow evidence is refused: whatever a forger leaves out, or looks at too little, of the secure sum, the deployment and leakage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from audit import bundle, deployment, protocol
from audit.attacks import CATALOGUE
from audit.door import KNOCKS, Probe
from audit.leakage import LeakageEvidence
from audit.protocol import ProtocolEvidence
from audit.training import TrainingEvidence
from audit.whole import check_leakage, check_protocol, check_units
from keys.errors import VerificationFailed
from secgeo.study import OpenStudy, open_study
from tests.audit.evidence import leaked, played, watched
from tests.audit.factory import make_study
from tests.secgeo.site import HOSPITALS, Site, make_site

EACH = ("masked", "layered", "homomorphic")


def opened(folder: Path, protocol_name: str = "masked") -> OpenStudy:
    from audit.target import study_of_folder

    return study_of_folder(make_study(4, protocol=protocol_name).write(folder), None, NOW)


NOW = datetime(2026, 6, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> OpenStudy:
    return opened(tmp_path_factory.mktemp("study") / "records")


@pytest.fixture(scope="module")
def whole(study: OpenStudy) -> ProtocolEvidence:
    return played(study.agreement)


# --- the secure sum


@pytest.mark.parametrize("name", EACH)
def test_real_evidence_is_whole(name: str, tmp_path: Path) -> None:
    study = opened(tmp_path / "records", name)
    for profile in ("fast", "full"):
        evidence = protocol.from_json(protocol.to_json(played(study.agreement, profile)))
        check_protocol(evidence, study, NOW)


def test_all_of_the_catalogue_is_whole(study: OpenStudy) -> None:
    check_protocol(played(study.agreement, "full", len(CATALOGUE)), study, NOW)


def first(name: str, /, **fields: Any) -> Callable[[ProtocolEvidence], ProtocolEvidence]:
    """The first of a list with other fields."""

    def change(evidence: ProtocolEvidence) -> ProtocolEvidence:
        one, *others = getattr(evidence, name)
        return msgspec.structs.replace(evidence, **{name: (msgspec.structs.replace(one, **fields), *others)})

    return change


def less(name: str) -> Callable[[ProtocolEvidence], ProtocolEvidence]:
    return lambda evidence: msgspec.structs.replace(evidence, **{name: getattr(evidence, name)[1:]})


def same(**fields: Any) -> Callable[[ProtocolEvidence], ProtocolEvidence]:
    return lambda evidence: msgspec.structs.replace(evidence, **fields)


def parameters(**fields: Any) -> Callable[[ProtocolEvidence], ProtocolEvidence]:
    return lambda e: msgspec.structs.replace(e, parameters=msgspec.structs.replace(e.parameters, **fields))


def few_seeds(evidence: ProtocolEvidence) -> ProtocolEvidence:
    few = tuple(
        msgspec.structs.replace(item, seen=41, distinct=41) if item.kind == "self seeds" else item
        for item in evidence.repeats
    )
    return msgspec.structs.replace(evidence, repeats=few)


HOLLOW: dict[str, Callable[[ProtocolEvidence], ProtocolEvidence]] = {
    "no secrets looked for": same(secrets_searched=0),
    "few secrets looked for": same(secrets_searched=127),
    "fewer secrets than none found": same(secrets_found=-1),
    "a smaller study": parameters(members_played=3),
    "shorter vectors": parameters(values_played=7),
    "more colluders tolerated than are": parameters(colluders_tolerated=9),
    "a rule that is not broken": parameters(rule="all is forbidden"),
    "sockets that were not opened": parameters(members_over_sockets=6),
    "few values": first("series", top=(5,) * 256),
    "one series twice": lambda e: msgspec.structs.replace(e, series=(e.series[0],) * 2),
    "one series": less("series"),
    "a series twice": lambda e: msgspec.structs.replace(e, series=(*e.series, e.series[0])),
    "no pairs": same(pairs=()),
    "a pair left out": less("pairs"),
    "few places compared": first("pairs", compared=10),
    "places of more bits": first("pairs", bits=64),
    "more equal places than there are": first("pairs", compared=98304, equal=98305),
    "no correlation": same(correlations=()),
    "a correlation of few": first("correlations", count=2),
    "a kind that was not compared": less("repeats"),
    "few of a kind": first("repeats", seen=4, distinct=4),
    "few seeds drawn": few_seeds,
    "none of a kind": first("repeats", distinct=0),
    "more different ones than there are": lambda e: first("repeats", distinct=e.repeats[0].seen + 1)(e),
    "one kind twice": lambda e: msgspec.structs.replace(e, repeats=(e.repeats[0], *e.repeats)),
    "shares of one secret only": less("splits"),
    "few splits": first("splits", splits=4, recovered=4),
    "another threshold of shares": first("splits", needed=2),
    "fewer holders of shares": first("splits", holders=3),
    "few shares interpolated": first("splits", tried=4),
    "few shares compared": first("splits", compared=4),
    "few coefficients": first("splits", coefficients=4, distinct=4),
    "more coefficients than there are": first("splits", distinct=1 << 20),
    "few shares counted": first("splits", top=(5,) * 256),
    "more secrets than there are splits": first("splits", recovered=1 << 20),
    "an attack of another catalogue": first("played", name="a friendly attack"),
    "another success": first("played", success="the sky falls"),
    "another adversary": first("played", adversary="node"),
    "everybody is a culprit": first("played", culprits=("aggregator", *[f"hospital-{i:02d}" for i in range(4)])),
    "nobody is a culprit": first("played", culprits=()),
    "wrong sums are granted": first("played", granted=("wrong",)),
    "sums of strangers": first("played", summed={"hospital-77": 1}),
    "one attack twice": lambda e: msgspec.structs.replace(e, played=(*e.played, e.played[0])),
}


@pytest.mark.parametrize("how", HOLLOW)
def test_hollow_evidence_of_the_secure_sum_is_refused(how: str, study: OpenStudy, whole: ProtocolEvidence) -> None:
    check_protocol(whole, study, NOW)
    hollow = HOLLOW[how](whole)
    assert hollow != whole
    with pytest.raises(VerificationFailed):
        check_protocol(hollow, study, NOW)


def test_a_member_of_the_catalogue_is_played_false_by_few_members(study: OpenStudy, whole: ProtocolEvidence) -> None:
    attack = next(a for a in played(study.agreement, attacks=len(CATALOGUE)).played if a.adversary == "node")
    for culprits in ((), tuple(study.public_keys), ("aggregator",), ("hospital-77",)):
        hollow = msgspec.structs.replace(whole, played=(msgspec.structs.replace(attack, culprits=culprits),))
        with pytest.raises(VerificationFailed, match="catalogue"):
            check_protocol(hollow, study, NOW)


def test_ciphertexts_fail_as_seldom_as_the_agreement_makes_them(tmp_path: Path) -> None:
    study = opened(tmp_path / "records", "homomorphic")
    evidence = played(study.agreement, attacks=0)
    with pytest.raises(VerificationFailed, match="parameters"):
        check_protocol(parameters(failure_bits=evidence.parameters.failure_bits + 1.0)(evidence), study, NOW)


# --- a deployment


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


def answered(kinds: tuple[str, ...] = KNOCKS) -> tuple[Probe, ...]:
    return tuple(Probe(kind, True, False, True, 64, "CURVE", 0.1) for kind in kinds)


DEPLOYED: dict[str, dict[str, Any]] = {
    "no knock": {"probes": ()},
    "one knock, and an answer": {"probes": answered(KNOCKS[:1])},
    "a knock left out": {"probes": answered(KNOCKS[:-2] + KNOCKS[-1:])},
    "a certificate left out": {"certificates": ...},
    "certificates that last": {"certificates": None},
    "looked at before": {"taken_at": timedelta(days=-100)},
    "looked at long after": {"taken_at": timedelta(days=9)},
    "no look at the rounds": {"study": None},
    "no look at the data": {"data": ()},
    "no look at the configuration": {"configuration": deployment.Reach("config.toml", "configuration", "missing", 0)},
    "a certificate that was not compared": {"certificate_problem": "not compared: the card was elsewhere"},
    "a policy that was not compared": {"policy_problem": "not compared"},
    "documents that were not compared": {"study_problem": "not compared"},
}


@pytest.mark.parametrize("how", DEPLOYED)
def test_hollow_evidence_of_a_deployment_is_refused(how: str, site: Site) -> None:
    from secgeo.config import NodeConfig, read_config

    config, now = site.config(HOSPITALS[0]), datetime.now(UTC)
    study = open_study(read_config(config, NodeConfig).study, config.parent, now=now)
    seen = deployment.collect_deployment(config, now, probe=False)
    whole = msgspec.structs.replace(
        played(study.agreement, attacks=0), deployment=msgspec.structs.replace(seen, probes=answered())
    )
    check_protocol(whole, study, now)
    change = dict(DEPLOYED[how])
    if "certificates" in change:
        long = tuple(msgspec.structs.replace(c, not_after=c.not_after + timedelta(days=999)) for c in seen.certificates)
        change["certificates"] = long if change["certificates"] is None else seen.certificates[1:]
    if "taken_at" in change:
        change["taken_at"] = now + change["taken_at"]
    assert whole.deployment is not None
    hollow = msgspec.structs.replace(whole, deployment=msgspec.structs.replace(whole.deployment, **change))
    with pytest.raises(VerificationFailed):
        check_protocol(hollow, study, now)


def test_who_is_not_there_was_knocked_at_once(site: Site) -> None:
    from secgeo.config import NodeConfig, read_config

    config, now = site.config(HOSPITALS[0]), datetime.now(UTC)
    study = open_study(read_config(config, NodeConfig).study, config.parent, now=now)
    seen = deployment.collect_deployment(config, now)  # nobody listens at port 9
    check_protocol(msgspec.structs.replace(played(study.agreement, attacks=0), deployment=seen), study, now)


# --- leakage


def settings(**fields: float) -> Callable[[LeakageEvidence], LeakageEvidence]:
    return lambda evidence: msgspec.structs.replace(
        evidence, settings=msgspec.structs.replace(evidence.settings, **fields)
    )


def row(number: int, **fields: Any) -> Callable[[LeakageEvidence], LeakageEvidence]:
    def change(evidence: LeakageEvidence) -> LeakageEvidence:
        rows = list(evidence.membership)
        rows[number] = msgspec.structs.replace(rows[number], **fields)
        return msgspec.structs.replace(evidence, membership=rows)

    return change


def fewer(evidence: LeakageEvidence) -> LeakageEvidence:
    """Everywhere half of the scores."""
    rows = [
        msgspec.structs.replace(r, members=r.members[: len(r.members) // 2], others=r.others[: len(r.others) // 2])
        for r in evidence.membership
    ]
    return msgspec.structs.replace(evidence, membership=rows)


def few_reconstructions(evidence: LeakageEvidence) -> LeakageEvidence:
    small = [msgspec.structs.replace(r, similarity=[[0.0] * 2] * 2) for r in evidence.inversion]
    return msgspec.structs.replace(evidence, inversion=small)


SHALLOW: dict[str, Callable[[LeakageEvidence], LeakageEvidence]] = {
    "few scores of one attack": row(3, members=[0.0] * 5, others=[0.0] * 5),
    "few scores of all": fewer,
    "scores of one kind moved to the other": row(0, members=[0.0] * 150, others=[0.0] * 10),
    "another coin for one observation": row(0, members=[0.0] * 81, others=[0.0] * 79),
    "an attack left out": lambda e: msgspec.structs.replace(e, membership=e.membership[1:]),
    "an attack that counts twice": lambda e: msgspec.structs.replace(e, membership=[*e.membership, e.membership[0]]),
    "records in the place of canaries": row(1, candidates="records"),
    "an inversion left out": lambda e: msgspec.structs.replace(e, inversion=e.inversion[1:]),
    "few reconstructions": few_reconstructions,
    "few trainings": settings(trainings=2),
    "few unprotected trainings": settings(trainings_unprotected=2),
    "few candidates": settings(candidate_records=1),
    "few canaries": settings(canaries=2),
    "few records": settings(base_records=1, candidate_records=1),
    "few reconstructions, told": settings(inverted_records=2),
    "more rounds": settings(rounds_of_adapter=2),
    "more steps": row(0, steps=6),
    "more records than a hospital counts": settings(base_records=400),
    "more records of others": settings(records_of_others=10**12),
    "the other profile": lambda e: msgspec.structs.replace(e, profile="full"),
}


@pytest.mark.parametrize("how", SHALLOW)
def test_shallow_evidence_of_leakage_is_refused(how: str, study: OpenStudy) -> None:
    whole = leaked(study.agreement)
    check_leakage(whole, study.agreement)
    with pytest.raises(VerificationFailed):
        check_leakage(SHALLOW[how](whole), study.agreement)


SMALLER: dict[str, dict[str, Any]] = {
    "few candidates": {"candidate_records": 4},
    "few canaries": {"canaries": 4},
    "few reconstructions": {"inverted_records": 2},
    "few records": {"candidate_records": 3, "base_records": 4, "inverted_records": 4},
    "few records of others": {"canaries": 3, "records_of_others": 4},
    "other steps": {"steps_per_round": 9},
    "a coin that favours one side": {"share": 0.9},
}


@pytest.mark.parametrize("how", SMALLER)
def test_a_smaller_audit_of_leakage_that_goes_together_is_refused(how: str, study: OpenStudy) -> None:
    with pytest.raises(VerificationFailed):
        check_leakage(leaked(study.agreement, **SMALLER[how]), study.agreement)


def test_a_hospital_with_few_records_is_audited_on_few(study: OpenStudy) -> None:
    """Half of eight records, at least, are candidates; fewer nobody audits."""
    few = {"candidate_records": 4, "canaries": 4, "base_records": 4, "records_of_others": 5, "inverted_records": 4}
    check_leakage(leaked(study.agreement, **few), study.agreement)


# --- all parts alike


def trained(units: int) -> TrainingEvidence:
    return TrainingEvidence("hospital-00", (), 1, units, True)


def test_all_parts_are_of_as_many_units(study: OpenStudy) -> None:
    seen, attacked = watched(study.agreement, units=48), leaked(study.agreement)  # 8 candidates, and 40 others
    own = msgspec.structs.replace(study.agreement.members[0], expected_batch_size=48 * seen.sample_rate)
    agreement = msgspec.structs.replace(study.agreement, members=(own, *study.agreement.members[1:]))
    demo = dataclasses.replace(study, agreement=agreement)
    check_units(seen, trained(48), attacked, demo, split=True)
    check_units(seen, None, None, demo, split=True)
    check_units(None, trained(1), attacked, demo, split=True)  # then a part is missing
    with pytest.raises(VerificationFailed, match="watched"):
        check_units(seen, trained(1), attacked, demo, split=True)
    few = watched(study.agreement, units=1)
    with pytest.raises(VerificationFailed, match="leakage"):
        check_units(few, trained(1), attacked, demo, split=False)
    with pytest.raises(VerificationFailed, match="demonstration"):
        check_units(few, trained(1), None, demo, split=True)
    check_units(few, trained(1), None, demo, split=False)  # how many a real hospital has is its own
    crowd, most = watched(study.agreement, units=300), leaked(study.agreement, base_records=72)
    check_units(crowd, trained(300), most, demo, split=False)


# --- a bundle of a node's configuration


def configured(site: Site, **fields: Any) -> bundle.Evidence:
    """A bundle that has nothing but the whole secure sum, and a look at a hospital's deployment with these fields."""
    from secgeo.config import NodeConfig, read_config

    config, now = site.config(HOSPITALS[0]), bundle.now()
    study = open_study(read_config(config, NodeConfig).study, config.parent, now=now)
    seen = deployment.collect_deployment(config, now, probe=False)
    whole = played(study.agreement, attacks=len(CATALOGUE))
    deployed = msgspec.structs.replace(seen, **{"probes": answered()} | fields)
    about = bundle.About(
        format=bundle.FORMAT, study=study.agreement.study.id, agreement_digest=study.agreement_digest.hex(),
        kind="configuration", source="node.toml", node="", data="", authority=None, started=now, profile="fast",
        plant=None, seconds={}, not_done={}, left_out=(), python="3", versions={},
    )  # fmt: skip
    nothing = dict.fromkeys((*bundle.PARTS, "records"))
    return bundle.Evidence(
        about, study, False, **nothing | {"protocol": msgspec.structs.replace(whole, deployment=deployed)}
    )


NO_KEYS = deployment.FileFacts("keys", "missing", 0, False)


@pytest.mark.parametrize(
    ("fields", "lacks"), [({}, False), ({"key_file": NO_KEYS}, True), ({"folders": (NO_KEYS,)}, True)]
)
def test_a_deployment_without_its_keys_makes_the_audit_incomplete(
    fields: dict[str, Any], lacks: bool, site: Site
) -> None:
    verdict = bundle.judge(configured(site, **fields))
    assert ("protocol" in verdict.missing) == lacks


def test_a_node_s_configuration_is_no_aggregator_s(site: Site) -> None:
    with pytest.raises(VerificationFailed, match="member or claim"):
        bundle.judge(configured(site, role="aggregator", probes=()))
