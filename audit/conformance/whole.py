"""Is the evidence all that there has to be under its agreement, and do its counts go together?"""

from __future__ import annotations

import math

import numpy as np

from audit.conformance.evidence import (
    EMPTY_STEPS,
    EMPTY_VALUES,
    LATER,
    LENGTHS,
    SAMPLING_STEPS,
    TOLERANCE,
    ConformanceEvidence,
    Sampling,
    influences_of,
    kept_steps,
    watched_rounds,
)
from audit.counts import private_shapes, refuse
from audit.independence import (
    EVERYTHING,
    Shapes,
    directions_of,
    shifts_of,
)
from protocols.agreement import Agreement
from secgeo.update import Layout


def check_whole(evidence: ConformanceEvidence, agreement: Agreement) -> None:
    """Check that every test was made as often as `collect` makes it under this agreement, and that counts go together.

    Raises:
        VerificationFailed: something is left out, or smaller, or is no count of what was watched.
    """
    shapes, seen = private_shapes(agreement, evidence.member), evidence.bookkeeping
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    _check_noise(evidence, agreement, shapes)
    _check_independence(evidence, shapes)
    _check_sampling(evidence.sampling)
    _check_influences(evidence)
    rounds, layout = watched_rounds(agreement), Layout.from_agreement(agreement)
    agreed = rounds * agreement.training.steps_per_round
    refuse(
        f"the bookkeeping is of {seen.agreed} steps, where {rounds} rounds have {agreed}",
        seen.agreed != agreed,
        min(seen.touched, seen.moved, seen.booked, seen.reported) < 0,
    )
    # parameters, shared or local, a weight for each layer, the Gram matrix and its weight, and the number of steps
    due = rounds * (sum(sizes.values()) + len(layout.segments) + layout.anchors**2 + 2)
    refuse(f"{evidence.compared} values were compared for side channels, not {due}", evidence.compared != due)


def _check_influences(evidence: ConformanceEvidence) -> None:
    moved = {influence.unit: influence.norm for influence in evidence.influences}
    names = [[influence.unit for influence in told] for told in (evidence.influences, evidence.others_moved)]
    refuse(
        "the influences that were measured are not those that the audit measures",
        (*names,) != influences_of(evidence.unit, evidence.sampling.expected_units),
        any(influence.norm < 0.0 for influence in (*evidence.influences, *evidence.others_moved)),
        any(not moved.get(f"a made gradient of norm {length:g}{when}") for length in LENGTHS for when in ("", LATER)),
    )


def _check_noise(evidence: ConformanceEvidence, agreement: Agreement, shapes: Shapes) -> None:
    privacy, sizes = agreement.privacy, {name: math.prod(shape) for name, shape in shapes.items()}
    size = sum(sizes.values())
    steps = kept_steps(agreement, size) if privacy.noise_multiplier * privacy.max_grad_norm > 0.0 else 0
    empty = EMPTY_STEPS * min(size, EMPTY_VALUES // EMPTY_STEPS) if steps else 0
    refuse(
        f"noise of {len(evidence.step_mean_squares)} steps and {evidence.noise_values} values was looked at, not of {steps} steps "
        f"and every of {size} parameters",
        len(evidence.step_mean_squares) != steps,
        len(evidence.step_correlations) != max(0, steps - 1),
        evidence.noise_values != steps * size,
        len(evidence.noise) != (len(sizes) if steps else 0),
        any(sizes.get(parameter.name, 0) * steps != parameter.count for parameter in evidence.noise),
        len({parameter.name for parameter in evidence.noise}) != len(evidence.noise),
        evidence.empty_values != empty,
    )
    correlations = [*evidence.step_correlations, evidence.start_correlation]
    refuse(
        "what is told of the noise cannot be",
        any(square < 0.0 for square in evidence.step_mean_squares),
        any(parameter.mean_square < 0.0 for parameter in evidence.noise),
        any(abs(one) > 1.0 + TOLERANCE for one in correlations),
        not 0.0 <= evidence.kolmogorov_smirnov <= 1.0,
        not min(1, empty) <= evidence.distinct_values <= empty,
    )
    total = sum(parameter.count * parameter.mean_square for parameter in evidence.noise)
    refuse(
        "the noise on parameters is not the noise of the steps",
        not math.isclose(total, size * sum(evidence.step_mean_squares), rel_tol=1e-6),
    )


def _check_independence(evidence: ConformanceEvidence, shapes: Shapes) -> None:
    """Every family and parameter is there; projections are no larger than what is projected, and sums than their parts."""
    steps, size = len(evidence.step_mean_squares), sum(math.prod(shape) for shape in shapes.values())
    due = {name: math.prod(shape) for name, shape in shapes.items() if math.prod(shape) > 1} | {EVERYTHING: size}
    pairs, total = steps * (steps - 1) / 2, evidence.noise_values * float(np.mean(evidence.step_mean_squares or [0.0]))
    whole = [one.square_sum for one in evidence.likeness if one.name == EVERYTHING]
    refuse(
        "the noise was not looked at in all directions, or shifts, or for likeness on all parameters",
        {one.name: one.count for one in evidence.directions} != (directions_of(shapes, steps) if steps else {}),
        {one.name: one.values for one in evidence.likeness} != (due if steps else {}),
        len(evidence.directions) != len({one.name for one in evidence.directions}),
        len(evidence.likeness) != len({one.name for one in evidence.likeness}),
        evidence.shifts.count != (shifts_of(size, steps) if steps else 0),
        not min(1, evidence.shifts.count) <= evidence.shifts.largest <= evidence.shifts.count,
    )
    refuse(
        "what is told of directions, shifts and likeness of the noise cannot be",
        any(not 0.0 <= one.mean_square * one.count <= total * (1.0 + TOLERANCE) for one in evidence.directions),
        any(not 0.0 <= one.square_sum <= pairs * (1.0 + TOLERANCE) for one in evidence.likeness),
        any(square * (1.0 + TOLERANCE) < sum(one**2 for one in evidence.step_correlations) for square in whole),
        total > 0.0 and any(square == 0.0 for square in whole),
        total > 0.0 and evidence.shifts.count > 0 and evidence.shifts.deviation == 0.0,
    )


def _check_sampling(sampling: Sampling) -> None:
    sizes, units, steps = sampling.sizes, sampling.units, SAMPLING_STEPS
    refuse(
        "samples that were looked at are not those that the audit takes",
        len(sizes) != steps or len(sampling.inclusions) != units or len(sampling.overlaps) != steps - 1,
        min(units, sampling.expected_units) < 1,
    )
    together = [list(zip(sizes, sizes[lag:], strict=False)) for lag in range(1, steps)]
    refuse(
        "sizes of samples and how often units are in them do not go together",
        any(not 0 <= size <= units for size in sizes),
        any(not 0 <= often <= steps for often in sampling.inclusions),
        sum(sizes) != sum(sampling.inclusions),
        any(
            not sum(max(0, a + b - units) for a, b in pairs) <= overlap <= sum(min(pair) for pair in pairs)
            for pairs, overlap in zip(together, sampling.overlaps, strict=False)
        ),
    )
