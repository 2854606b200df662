"""Small evidence of the right form: made by hand where collecting it takes long."""

from __future__ import annotations

import pytest

from audit import leakage, protocol
from audit.attacks import CATALOGUE
from audit.leakage import Inversion, LeakageEvidence, Membership
from audit.protocol import ProtocolEvidence
from protocols.agreement import Agreement


def played(agreement: Agreement, profile: str = "fast", attacks: int = 3) -> ProtocolEvidence:
    """A real audit of the secure sum that plays the first attacks only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "CATALOGUE", CATALOGUE[:attacks])
        return protocol.collect(agreement, profile=profile, folder=None, config=None, progress=lambda *_: None)  # type: ignore[arg-type]


def leaked(agreement: Agreement) -> LeakageEvidence:
    """Evidence of the right size, with nothing to say."""
    size, per_round = leakage._SIZES["fast"], agreement.training.steps_per_round
    rounds = min(size.rounds, max(1, agreement.study.rounds - 1))
    counts = {"records": size.records, "canaries": size.canaries}
    told = {
        "trainings": size.trainings["ours"],
        "trainings_unprotected": size.trainings["unprotected"],
        "candidate_records": size.records,
        "canaries": size.canaries,
        "base_records": 40,
        "records_of_others": 100,
        "inverted_records": size.inverted,
        "rounds_of_adapter": rounds,
        "steps_per_round": per_round,
    }
    membership, inversion = [], []
    for group, rows in leakage._WHAT_IS_SEEN.items():
        for _, observation, of in rows:
            inversion.append(Inversion(observation, of, [[0.0] * size.inverted] * size.inverted, 0))
            for kind, count in counts.items():
                scores = size.trainings[group] * count
                halves = [0.0] * (scores // 2), [0.0] * (scores - scores // 2)
                steps = per_round * (rounds if observation == "adapter" else 1)
                membership.append(Membership(observation, of, kind, steps, *halves))  # type: ignore[arg-type]
    member, protocol_name = agreement.members[0].node_id, agreement.secure_sum.protocol
    return LeakageEvidence(member, "fast", "made", protocol_name, 1, told, 1.0, membership, inversion)
