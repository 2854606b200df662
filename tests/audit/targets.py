"""A hospital of a tiny study to audit, and the planted bugs that an audit should find in it."""

from functools import cache
from typing import Any

from audit.plants import PLANTS
from audit.target import Target
from tests.secgeo.tiny_study import agreement, anchors, records

MEMBER = 1


def target(plant: str | None = None, **sections: Any) -> Target:
    """48 records of an image study; keyword arguments replace fields of the agreement, as in `privacy={...}`."""
    study = agreement(**sections)
    kind = study.members[MEMBER].modality
    sound = Target(study, study.members[MEMBER], records(kind, 48), records(kind, 48, 6), anchors(kind), "made data")
    return sound if plant is None else PLANTS[plant].target(sound)


@cache
def judged(plant: str | None) -> dict[str, str]:
    """Status of each white-box test, by name; what was seen is whole."""
    from audit import conformance

    hospital = target(plant)
    evidence = conformance.collect(hospital)
    conformance.check_whole(evidence, hospital.agreement)
    return {finding.name: finding.status for finding in conformance.judge(evidence)}
