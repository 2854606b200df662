"""What `agreement make` fills in by itself."""

from __future__ import annotations

import numpy as np
import pytest

from keys.errors import ConfigError
from protocols.agreement import Agreement, read_agreement, sparse_graph, write_agreement
from secgeo.admin import complete
from tests.keys.factory import make_consortium
from tests.protocols.network import names
from tests.secgeo.site import MODALITIES, make_spec


def made(count: int, **secure_sum: int) -> Agreement:
    """The agreement of `count` members from a spec with these settings of the secure sum."""
    consortium, spec = make_consortium(names(count)), make_spec()
    spec["members"] = [
        {"node_id": name, "modality": MODALITIES[index % 2], "expected_batch_size": 10.0}
        for index, name in enumerate(names(count))
    ]
    spec["secure_sum"] |= {"value_bits": 22, "fraction_bits": 16} | secure_sum
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
