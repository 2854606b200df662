"""Small evidence of the right form: made by hand where collecting it takes long."""

from __future__ import annotations

import numpy as np
import pytest

from audit import independence, protocol
from audit.attacks import CATALOGUE
from audit.conformance import ConformanceEvidence
from audit.conformance.evidence import (
    EMPTY_STEPS,
    EMPTY_VALUES,
    SAMPLING_STEPS,
    Bookkeeping,
    Influence,
    Sampling,
    influences_of,
    kept_steps,
    watched_rounds,
)
from audit.counts import private_shapes, private_sizes
from audit.independence import EVERYTHING, Likeness, Scale, Shifts
from audit.leakage import Inversion, LeakageEvidence, Membership
from audit.leakage.evidence import Settings
from audit.leakage.membership import WHAT_IS_SEEN
from audit.leakage.scene import SIZES
from audit.protocol import ProtocolEvidence
from protocols.agreement import Agreement
from secgeo.update import Layout


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
    settings = Settings(
        simulated_hospitals=size.pool, warmup_steps=0, sample_rate=0.1, expected_batch_size=10.0, **told
    )
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
    return LeakageEvidence(member, "fast", protocol_name, 1, settings, 1.0, membership, inversion)


def watched(agreement: Agreement, member: str = "", units: int = 48) -> ConformanceEvidence:
    """Of a sound trainer of so many units: fair samples, and noise of exactly the agreed scale."""
    member, privacy = member or agreement.members[0].node_id, agreement.privacy
    shapes, sizes = private_shapes(agreement, member), private_sizes(agreement, member)
    size = sum(sizes.values())
    steps, rounds = kept_steps(agreement, size), watched_rounds(agreement)
    played = SAMPLING_STEPS
    drawn = np.random.default_rng(5).random((played, units)) < privacy.sample_rate
    overlaps = tuple(int((drawn[:-lag] & drawn[lag:]).sum()) for lag in range(1, played))
    sampling = Sampling(units, units, tuple(drawn.sum(axis=1).tolist()), tuple(drawn.sum(axis=0).tolist()), overlaps)
    (names, others), agreed = (
        influences_of(privacy.unit, units),
        rounds * agreement.training.steps_per_round,
    )
    layout, pairs, shifts = (
        Layout.from_agreement(agreement),
        steps * (steps - 1) / 2,
        independence.shifts_of(size, steps),
    )
    empty = EMPTY_STEPS * min(size, EMPTY_VALUES // EMPTY_STEPS)
    alike = {name: count for name, count in sizes.items() if count > 1} | {EVERYTHING: size}
    return ConformanceEvidence(
        member=member,
        noise_multiplier=privacy.noise_multiplier,
        sample_rate=privacy.sample_rate,
        unit=privacy.unit,
        noise=tuple(Scale(name, steps * count, 1.0) for name, count in sizes.items()),
        directions=tuple(Scale(name, n, 1.0) for name, n in independence.directions_of(shapes, steps).items()),
        kolmogorov_smirnov=0.0,
        noise_values=steps * size,
        step_mean_squares=(1.0,) * steps,
        empty_values=empty,
        distinct_values=empty,
        step_correlations=(0.0,) * (steps - 1),
        start_correlation=0.0,
        likeness=tuple(Likeness(name, count, pairs / count) for name, count in alike.items()),
        shifts=Shifts(shifts, min(1, shifts), 1.0),
        influences=tuple(Influence(name, 0.5 if "made" in name else 0.0) for name in names),
        others_moved=tuple(Influence(name, 0.0) for name in others),
        sampling=sampling,
        bookkeeping=Bookkeeping(*[agreed] * 5),
        leaks=(),
        compared=rounds * (size + len(layout.segments) + layout.anchors**2 + 2),
        seconds=1.0,
    )
