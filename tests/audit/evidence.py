"""Small evidence of the right form: made by hand where collecting it takes long."""

from __future__ import annotations

import pytest

from audit import protocol
from audit.attacks import CATALOGUE
from audit.leakage import Inversion, LeakageEvidence, Membership
from audit.leakage.membership import WHAT_IS_SEEN
from audit.leakage.scene import SIZES
from audit.protocol import ProtocolEvidence
from protocols.agreement import Agreement


def played(agreement: Agreement, profile: str = "fast", attacks: int = 3) -> ProtocolEvidence:
    """A real audit of the secure sum that plays the first attacks only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "CATALOGUE", CATALOGUE[:attacks])
        return protocol.collect(agreement, profile=profile, folder=None, config=None, progress=lambda *_: None)  # type: ignore[arg-type]


def leaked(agreement: Agreement, share: float = 0.5, **sizes: int) -> LeakageEvidence:
    """Evidence of the right size, or of others that go together, with nothing to say; this share of the scores is of members."""
    size, per_round = SIZES["fast"], agreement.training.steps_per_round
    rounds = min(size.rounds, max(1, agreement.study.rounds - 1))
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
    } | sizes
    counts = {"records": told["candidate_records"], "canaries": told["canaries"]}
    membership, inversion = [], []
    for group, rows in WHAT_IS_SEEN.items():
        for _, observation, of in rows:
            count = told["inverted_records"]
            inversion.append(Inversion(observation, of, [[0.0] * count] * count, 0))
            for kind, count in counts.items():
                scores = size.trainings[group] * count
                inside = int(share * scores)
                parts = [0.0] * inside, [0.0] * (scores - inside)
                steps = per_round * (rounds if observation == "adapter" else 1)
                membership.append(Membership(observation, of, kind, steps, *parts))  # type: ignore[arg-type]
    member, protocol_name = agreement.members[0].node_id, agreement.secure_sum.protocol
    settings = {name: float(value) for name, value in told.items()}
    return LeakageEvidence(member, "fast", "made", protocol_name, 1, settings, 1.0, membership, inversion)
