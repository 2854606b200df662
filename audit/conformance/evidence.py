"""What is watched, how much of it, and what is kept of that."""

from __future__ import annotations

from msgspec import Struct

from audit.independence import Likeness, Scale, Shifts
from protocols.agreement import Agreement

ALARM = 1e-9
"""Probability of what was seen, below which a promise counts as broken."""

LEAST_STEPS, MOST_STEPS = 100, 300
"""Steps that are watched round by round: those of the study, within these limits; for bookkeeping there is no lower one."""

SAMPLING_STEPS = MOST_STEPS
"""So many samples are looked at."""

NOISE_VALUES, LEAST_KEPT = 20_000_000, 12
"""So many values of noise at most; of a large model only some of the steps are kept for it, drawn by lot, and so many at least."""

CROWD = 256
"""So many units at most where everybody is to be sampled."""

LENGTHS = (0.5, 1.0, 10.0, 1e4)
"""Norms of gradients that are put in, in clip norms."""

CANDIDATES, LARGEST_UNITS = 48, 5
"""Units in the data of that test, and how many of them, those with the largest gradients, are left out in turn."""

EMPTY_STEPS, EMPTY_VALUES = 4, 200_000
"""Of those with nobody sampled so many are searched for values that come twice, and so many values in all: of more, float32 has too few."""

SMALL_PIECE = 16
DISTINCT = 0.98
"""Of noise in float32: some values meet by chance. Of 200,000 they are one in 400."""

LATER = ", after all rounds"
"""Of influences, ends the name."""

TOLERANCE = 1e-3
"""Relative, of a clipped norm, in float32."""


BEYOND_MEASURE = 1e300
"""Stands for what is not finite, which JSON has no number for."""


class Influence(Struct, frozen=True, forbid_unknown_fields=True):
    """How far one unit moved the clipped sum, in clip norms."""

    unit: str
    norm: float


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """Samples: their sizes, how often each unit was in one, and how many times units were in two that are 1, 2, ... steps apart.

    `expected_units` is the number that the agreement and the data give.
    """

    units: int
    expected_units: int
    sizes: tuple[int, ...]
    inclusions: tuple[int, ...]
    overlaps: tuple[int, ...]


class Bookkeeping(Struct, frozen=True, forbid_unknown_fields=True):
    """Some rounds: steps that touched records, changed parameters, were booked, were reported, and that the agreement says."""

    touched: int
    moved: int
    booked: int
    reported: int
    agreed: int


class ConformanceEvidence(Struct, frozen=True, forbid_unknown_fields=True):
    """What was seen.

    Attributes:
        member: whose training.
        noise: by parameter, over all steps.
        step_mean_squares: by step, over all parameters.
        directions: noise in families of directions.
        step_correlations: of each step's noise with that of a step before it, the one that it is most like.
        start_correlation: of the first step after another start, with the step that it is most like.
        likeness, shifts: see `audit.independence`.
        distinct_values: of noise on the sum of nobody, which is not rounded; `empty_values` are there.
        others_moved: how far what the others add to the sum was moved when one unit was left out of the data.
        compared: values that left or stayed, in all rounds; `leaks` are those that differ.
    """

    member: str
    noise_multiplier: float
    sample_rate: float
    unit: str
    noise: tuple[Scale, ...]
    directions: tuple[Scale, ...]
    kolmogorov_smirnov: float
    noise_values: int
    step_mean_squares: tuple[float, ...]
    empty_values: int
    distinct_values: int
    step_correlations: tuple[float, ...]
    start_correlation: float
    likeness: tuple[Likeness, ...]
    shifts: Shifts
    influences: tuple[Influence, ...]
    others_moved: tuple[Influence, ...]
    sampling: Sampling
    bookkeeping: Bookkeeping
    leaks: tuple[str, ...]
    compared: int
    seconds: float


# --- how much of a study is watched


def watched_rounds(agreement: Agreement) -> int:
    """So many private rounds (the first takes no private steps) are watched for side channels and bookkeeping."""
    return max(1, min(agreement.study.rounds - 1, MOST_STEPS // agreement.training.steps_per_round))


def watched_steps(agreement: Agreement) -> int:
    """So many steps are watched for noise and samples, in whole rounds."""
    per_round = agreement.training.steps_per_round
    return min(MOST_STEPS, per_round * max(watched_rounds(agreement), -(-LEAST_STEPS // per_round)))


def kept_steps(agreement: Agreement, size: int) -> int:
    """Of so many steps the noise is kept, of a model of so many private parameters."""
    return min(watched_steps(agreement), max(LEAST_KEPT, NOISE_VALUES // size))


def influences_of(unit: str, units: int) -> tuple[list[str], list[str]]:
    """Whose influence is measured where so many units are: on the sum, and on what others add to it."""
    some = min(CANDIDATES, units)
    largest = [f"a {unit} of the largest gradients"] * (min(LARGEST_UNITS, some) if some > 1 else 0)
    left_out = [*largest, f"a {unit} of the rarest class"] if some > 1 else []
    made = [*[f"a made gradient of norm {length:g}" for length in LENGTHS], "a gradient that is not finite"]
    later = [f"{name}{LATER}" for name in (*largest, *made)]
    return [*left_out, f"a {unit} of extreme features", *made, *later], left_out
