"""The tag of a sum: linear over the integers, and different for every other sum."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import tags
from protocols.encoding import Uint32Vector
from protocols.prg import TAG_PRIME
from protocols.sealing import AttemptId
from protocols.tags import COLUMNS, ROW_VALUES, Tagger

ATTEMPT = AttemptId(bytes(32), 1, 1)
TAGGER = Tagger(bytes(range(32)), ATTEMPT)


def vector(seed: int, size: int, limit: int = 1 << 26) -> Uint32Vector:
    return np.random.default_rng(seed).integers(0, limit, size, dtype=np.uint32)


@given(st.integers(1, 3000), st.integers(1, 30), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_tag_of_the_sum_is_the_sum_of_the_tags(size: int, count: int, seed: int) -> None:
    parts = [vector(seed + index, size) for index in range(count)]
    total = np.sum(parts, axis=0, dtype=np.uint32)  # 30 * 2^26 < 2^32: nothing wraps
    assert sum(map(TAGGER.part, parts)) % TAG_PRIME == TAGGER.part(total)


def test_the_largest_values_are_exact() -> None:
    """A row of the largest values times the largest column entries is below 2^53, so that nothing is rounded."""
    values = np.full(3 * ROW_VALUES + 5, 2**32 - 1, dtype=np.uint32)
    doubled = (2 * TAGGER.part(values // 2) + TAGGER.part(np.ones_like(values))) % TAG_PRIME
    assert TAGGER.part(values) == doubled


@given(st.lists(st.integers(0, 8), max_size=6), st.integers(0, 5000))
@settings(max_examples=30, deadline=None)
def test_the_tag_does_not_depend_on_how_the_vector_is_cut(cuts: list[int], size: int) -> None:
    values = vector(size, size)
    places = sorted({0, *(min(cut * ROW_VALUES, size // ROW_VALUES * ROW_VALUES) for cut in cuts), size})
    whole = sum(TAGGER.part(values[a:b], a) for a, b in pairwise(places)) % TAG_PRIME
    assert whole == TAGGER.part(values)


@pytest.mark.parametrize("rows", [31, 32, 33, 64, 100])
def test_rows_that_are_multiplied_together_give_what_each_gives(rows: int) -> None:
    """For the largest values too, as whole numbers and as floats that hold them."""
    values = np.concatenate([vector(rows, rows * ROW_VALUES), np.full(7, 2**32 - 1, np.uint32)])
    alone = sum(TAGGER.part(values[at : at + ROW_VALUES], at) for at in range(0, values.size, ROW_VALUES))
    assert TAGGER.part(values) == TAGGER.part(values.astype(np.float64)) == alone % TAG_PRIME


def test_rows_hashed_apart_and_put_together_give_the_same() -> None:
    """As an upload has them: from chunks of some rows each, the last one not full."""
    values = vector(1, 5 * ROW_VALUES + 7)
    places = [0, 2 * ROW_VALUES, 4 * ROW_VALUES, values.size]
    rows = np.concatenate([TAGGER.hashed(values[a:b]) for a, b in pairwise(places)])
    assert rows.shape == (6, COLUMNS)
    assert TAGGER.inner_product(rows) == TAGGER.part(values)
    halves = TAGGER.inner_product(rows[:4]), TAGGER.inner_product(rows[4:], 4)
    assert sum(halves) % TAG_PRIME == TAGGER.part(values)
    assert TAGGER.inner_product(rows, 1) != TAGGER.part(values)


@given(st.integers(0, 2999), st.integers(1, 2**32 - 1))
def test_one_changed_value_changes_the_tag(place: int, change: int) -> None:
    values = vector(0, 3000)
    other = values.copy()
    other[place] = (int(other[place]) + change) % 2**32
    assert TAGGER.part(other) != TAGGER.part(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: np.roll(v, 1),
        lambda v: np.roll(v, ROW_VALUES),
        lambda v: v[::-1].copy(),
        lambda v: np.concatenate([v[ROW_VALUES:], v[:ROW_VALUES]]),
        lambda v: np.concatenate([v, np.ones(1, np.uint32)]),
        lambda v: v[:-1],
        np.zeros_like,
    ],
    ids=["shifted", "rows shifted", "reversed", "rows exchanged", "longer", "shorter", "zeros"],
)
def test_moved_values_change_the_tag(change) -> None:  # type: ignore[no-untyped-def]
    values = vector(1, 4000)
    assert TAGGER.part(change(values)) != TAGGER.part(values)


def test_a_change_that_fits_one_seed_fits_no_other() -> None:
    """Whoever knows C can hide a change from it; under fresh seeds the same change shows every time."""
    columns = TAGGER._columns.astype(np.int64)
    # Six entries of a row, five equations: some integer change of these entries has v = 0.
    from sympy import Matrix  # the exact kernel, by way of a package that torch brings along

    kernel = Matrix(columns[:6].T.tolist()).nullspace()[0]
    scale = int(np.lcm.reduce([int(entry.q) for entry in kernel], dtype=object))
    change = [int(entry * scale) for entry in kernel]
    assert any(change)
    assert (np.array(change, dtype=object) @ columns[:6].astype(object) == 0).all()
    for seed in range(1, 200):
        fresh = Tagger(seed.to_bytes(32), ATTEMPT)._columns.astype(np.int64)
        assert (np.array(change, dtype=object) @ fresh[:6].astype(object)).any()


def test_seed_and_attempt_both_count() -> None:
    values = vector(2, 100)
    others = [Tagger(bytes(32), ATTEMPT), *(Tagger(bytes(range(32)), AttemptId(bytes(32), 1, n)) for n in (2, 3))]
    assert len({TAGGER.part(values), *(other.part(values) for other in others)}) == 4
    assert tags.commitment(bytes(32), ATTEMPT, "a") != tags.commitment(bytes(32), ATTEMPT, "b")


def test_no_values_add_nothing() -> None:
    assert TAGGER.part(np.empty(0, np.uint32), 2048) == 0
