"""What shares look like: fewer than the threshold give no secret, coefficients never come twice, values are uniform.

Two secrets that anybody would notice, all zeros and all ones, are split again and again, as nodes split theirs. `measure_splits` counts,
`judge_splits` is a pure function of the counts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from msgspec import Struct

from audit.attacks.interpolation import basis
from audit.findings import Finding, Status
from audit.uploads import BINS, P_VALUE, Count, Counts, chi_square
from protocols import shamir
from protocols.agreement import Agreement

SPLITS = 5_000
"""Of each secret: enough for the smallest threshold's shares to fill 256 bins."""
SECRETS = {"zeros": bytes(shamir.SECRET_BYTES), "ones": b"\xff" * shamir.SECRET_BYTES}
CERTAINTY = 7.0
"""So many repetitions are expected where it is said that there would have been one: none at all comes once in 1,000."""


class Splits(Struct, frozen=True, forbid_unknown_fields=True):
    """One secret, split again and again among so many `holders`, of whom `needed` are to give it back.

    Attributes:
        secret: zeros or ones.
        recovered: splits of which as many shares as are needed gave the secret.
        tried: fewer shares, 1 to `needed` - 1 of each split, that were interpolated.
        given_away: so many of them gave the secret.
        compared: shares of one holder in two splits, one after the other.
        equal: so many of them were the same.
        coefficients: of all splits' polynomials, without the secret.
        distinct: so many of them were different.
        top: of `needed` - 1 shares of each split, their highest byte (bits 248 to 255).
        low: their lowest byte.
    """

    secret: str
    needed: Count
    holders: Count
    splits: Count
    recovered: Count
    tried: Count
    given_away: Count
    compared: Count
    equal: Count
    coefficients: Count
    distinct: Count
    top: Counts
    low: Counts


def shape(agreement: Agreement, played: Agreement) -> tuple[int, int]:
    """How many shares of a secret are needed, and how many there are: as agreed in a sparse graph, else as in the studies played."""
    if agreement.secure_sum.neighbours:
        return agreement.secure_sum.shares_needed, agreement.secure_sum.neighbours + 1
    return played.secure_sum.shares_needed, len(played.members)


def measure_splits(needed: int, holders: int) -> tuple[Splits, ...]:
    """Split each secret again and again."""
    return tuple(_measure(name, needed, holders) for name in SECRETS)


def _measure(name: str, needed: int, holders: int) -> Splits:
    """Shares are looked at from another holder on in each split, so that all places have their turn."""
    secret = int.from_bytes(SECRETS[name])
    turns = [[(start + step) % holders for step in range(needed)] for start in range(holders)]
    weights = [[[b[0] for b in basis(turn[:count])] for count in range(1, needed)] for turn in turns]
    lagrange = [[*zip(*basis(turn), strict=True)] for turn in turns]
    recovered = given_away = equal = 0
    top, low, coefficients = [0] * BINS, [0] * BINS, set[int]()
    before: list[bytes] = []
    for index in range(SPLITS):
        dealt = shamir.split(SECRETS[name], needed, holders, os.urandom)
        equal += sum(a == b for a, b in zip(dealt, before, strict=False))
        turn = index % holders
        shares = [int.from_bytes(dealt[place]) for place in turns[turn]]
        polynomial = [_dot(row, shares) for row in lagrange[turn]]
        recovered += polynomial[0] == secret
        coefficients.update(polynomial[1:])
        given_away += sum(_dot(row, shares) == secret for row in weights[turn])
        for share in shares[:-1]:
            top[share >> 248 & 255] += 1
            low[share & 255] += 1
        before = dealt
    fewer = SPLITS * (needed - 1)
    return Splits(
        secret=name,
        needed=needed,
        holders=holders,
        splits=SPLITS,
        recovered=recovered,
        tried=fewer,
        given_away=given_away,
        compared=(SPLITS - 1) * holders,
        equal=equal,
        coefficients=fewer,
        distinct=len(coefficients),
        top=tuple(top),
        low=tuple(low),
    )


def _dot(weights: Sequence[int], shares: Sequence[int]) -> int:
    """A value that follows from the first so many shares."""
    return sum(weight * share for weight, share in zip(weights, shares, strict=False)) % shamir.PRIME


# --- judging


def judge_splits(every: Sequence[Splits]) -> Finding:
    """Whether fewer shares than are needed say something of a secret."""
    promise = (
        "fewer shares than are needed say nothing of a secret: its coefficients are fresh and uniform in every split"
    )
    faults = [fault for splits in every for fault in _faults(splits)]
    status: Status = "broken" if faults else "held" if every else "not testable"
    detail = "; ".join(faults) or (
        _seen(every) if every else "no secret is split: the protocol has no masks, or nothing was played"
    )
    return Finding("protocol", "shares of secrets", promise, status, detail)


def _faults(splits: Splits) -> list[str]:
    of, faults = f"a secret of {splits.secret}", list[str]()
    if splits.recovered < splits.splits:
        faults.append(
            f"{splits.needed} shares of {of} gave it back in {splits.recovered} of {splits.splits} splits only"
        )
    if splits.given_away:
        faults.append(
            f"fewer than {splits.needed} shares gave {of} away in {splits.given_away} of {splits.tried} interpolations"
        )
    if splits.equal:
        faults.append(f"shares of two splits of {of} are equal at {splits.equal} of {splits.compared} places")
    if splits.distinct < splits.coefficients:
        faults.append(f"of {splits.coefficients} coefficients beside {of} only {splits.distinct} are different")
    for what, counts in (("top", splits.top), ("low", splits.low)):
        statistic, p = chi_square(counts)
        if p < P_VALUE:
            faults.append(f"the {what} bytes of shares of {of} are not uniform (chi-square {statistic:.0f}, p {p:.1g})")
    return faults


def _seen(every: Sequence[Splits]) -> str:
    total, least = sum(s.splits for s in every), min(s.splits for s in every)
    smallest = min(chi_square(counts)[1] for s in every for counts in (s.top, s.low))
    bits = math.floor(math.log2(least * (least - 1) / 2 / CERTAINTY))
    return (
        f"{total} splits among {every[0].holders}: {every[0].needed} shares give the secret, {every[0].needed - 1} and fewer never did; no "
        f"share and no coefficient came twice (a source of {bits} bits or less would have repeated itself); smallest p of "
        f"{2 * len(every)} chi-square tests {smallest:.2g}"
    )
