"""What `agreement make` fills in by itself."""

from __future__ import annotations

import numpy as np
import pytest

from keys.errors import ConfigError
from protocols.agreement import Agreement, fit_chunks, fit_ciphertexts, read_agreement, sparse_graph, write_agreement
from secgeo.admin import complete
from tests.keys.factory import make_consortium
from tests.protocols.network import names
from tests.secgeo.site import MODALITIES, make_spec


def made(count: int, **secure_sum: object) -> Agreement:
    """The agreement of `count` members from a spec with these settings of the secure sum; without those that are None."""
    consortium, spec = make_consortium(names(count)), make_spec()
    spec["members"] = [
        {"node_id": name, "modality": MODALITIES[index % 2], "expected_batch_size": 10.0}
        for index, name in enumerate(names(count))
    ]
    settings = spec["secure_sum"] | {"value_bits": 22, "fraction_bits": 16} | secure_sum
    spec["secure_sum"] = {name: value for name, value in settings.items() if value is not None}
    anchors = {name: np.zeros((128, 10), np.float32) for name in MODALITIES}
    agreement = complete(spec, consortium.roster, consortium.authority.fingerprint, anchors)
    return read_agreement(write_agreement(agreement))


def test_up_to_sixteen_all_share_masks_with_each_other() -> None:
    ring = made(16, threshold=9, minimum_cohort=9).secure_sum
    assert (ring.neighbours, ring.share_threshold) == (0, 0)


def test_above_sixteen_with_some_neighbours_unless_the_spec_says_otherwise() -> None:
    ring = made(24, threshold=19, minimum_cohort=19).secure_sum
    assert (ring.neighbours, ring.share_threshold) == sparse_graph(24) == (20, 13)
    ring = made(24, threshold=18, minimum_cohort=18, neighbours=12, share_threshold=8).secure_sum
    assert (ring.neighbours, ring.share_threshold) == (12, 8)
    assert made(24, threshold=13, minimum_cohort=13, neighbours=0).secure_sum.share_threshold == 0


def test_a_threshold_that_the_graph_does_not_allow_is_refused_with_the_least_that_it_does() -> None:
    with pytest.raises(ConfigError, match="threshold must be at least 19 with 24 members"):
        made(24, threshold=18, minimum_cohort=18)


@pytest.mark.parametrize(
    ("bits", "count", "plain_bits", "chunk_values"),
    [(16, 4, 46, 32 * 8192), (22, 16, 46, 32 * 6144), (18, 128, 50, 32 * 8192), (26, 4, 46, 32 * 6144)],
)
def test_what_follows_for_ciphertexts_is_filled_in(bits: int, count: int, plain_bits: int, chunk_values: int) -> None:
    least = count // 2 + 2
    settings = {"threshold": least, "minimum_cohort": least, "value_bits": bits, "fraction_bits": bits - 4}
    spec = make_spec(protocol="homomorphic")
    assert "chunk_values" not in spec["secure_sum"]
    ring = dict(spec["secure_sum"] | settings)
    fit_ciphertexts(ring, count)
    assert (ring["plain_bits"], ring["chunk_values"]) == (plain_bits, chunk_values)


@pytest.mark.parametrize(("members", "chunk_values"), [(3, 262_144), (16, 262_144), (17, 245_760), (256, 16_384)])
def test_chunks_of_more_members_are_smaller(members: int, chunk_values: int) -> None:
    """So that one of each member takes no more memory at the aggregator than with 16."""
    ring: dict[str, object] = {}
    fit_chunks(ring, members)
    assert ring == {"chunk_values": chunk_values}
    given = {"chunk_values": 1024}
    fit_chunks(given, members)
    assert given == {"chunk_values": 1024}


def test_chunks_are_filled_in_for_many_members() -> None:
    ring = made(24, threshold=19, minimum_cohort=19, chunk_values=None).secure_sum
    assert ring.chunk_values == 174_080


def test_a_spec_of_ciphertexts_without_masks_gets_no_graph() -> None:
    least = {"threshold": 13, "minimum_cohort": 13}
    encrypted = {"protocol": "homomorphic", "value_bits": 20, "chunk_values": 8192 * 4}
    ring = made(24, **least, **encrypted).secure_sum
    assert (ring.neighbours, ring.share_threshold, ring.protocol) == (0, 0, "homomorphic")
    with pytest.raises(ConfigError, match="are for masks"):
        made(24, threshold=19, minimum_cohort=19, neighbours=20, share_threshold=13, **encrypted)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"plain_bits": 50}, "plain_bits must be 46"),
        ({"chunk_values": 1024}, "multiple of the 6144 values"),
        ({"chunk_values": 33 * 6144}, "at most 196608"),
        ({"ring_bits": 24, "value_bits": 20}, "ring_bits must be 32"),
        ({"value_bits": 30, "plain_bits": 46}, "chunk_values|more than 32 bits|no BFV parameters|plain_bits"),
    ],
)
def test_ciphertexts_that_do_not_carry_the_sum_are_refused(change: dict[str, object], fault: str) -> None:
    sound = {"threshold": 3, "minimum_cohort": 3, "protocol": "layered", "value_bits": 26, "chunk_values": 6144}
    assert made(4, **sound).secure_sum.plain_bits == 46
    with pytest.raises(ConfigError, match=fault):
        made(4, **(sound | change))


def test_sums_that_no_parameters_carry_are_refused_when_the_agreement_is_made() -> None:
    with pytest.raises(ConfigError, match="no BFV parameters add 16 values of 30 bits"):
        made(16, threshold=9, minimum_cohort=9, protocol="layered", value_bits=30)


def test_plain_bits_are_not_for_masked_studies() -> None:
    with pytest.raises(ConfigError, match="plain_bits is not for"):
        made(4, threshold=3, minimum_cohort=3, plain_bits=46)
