"""The study agreement: every rule broken one at a time, hostile documents, round trips, and its digest."""

import math

import msgspec
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import ConfigError
from protocols.agreement import (
    MAXIMUM_MEMBERS,
    Agreement,
    agreement_digest,
    check_rules,
    read_agreement,
    write_agreement,
)
from tests.audit.factory import make_study
from tests.protocols.network import make_network

replace = msgspec.structs.replace
AGREEMENT = make_study(count=5, rounds=4).agreement
DOCUMENT = write_agreement(AGREEMENT)


def changed(**sections: dict) -> Agreement:
    edits = {k: replace(getattr(AGREEMENT, k), **v) for k, v in sections.items()}
    return replace(AGREEMENT, **edits)


def members(**fields: object) -> Agreement:
    first, *rest = AGREEMENT.members
    return replace(AGREEMENT, members=(replace(first, **fields), *rest))


BROKEN = {
    "no overflow": changed(secure_sum={"value_bits": 30}),
    "fraction_bits must be below value_bits": changed(secure_sum={"fraction_bits": 24, "value_bits": 24}),
    "threshold must be at least 4 with 5 members": changed(secure_sum={"threshold": 3}),
    "threshold must not exceed minimum_cohort": changed(secure_sum={"threshold": 5}),
    "minimum_cohort must not exceed": changed(secure_sum={"minimum_cohort": 6}),
    "distinct node ids": members(node_id=AGREEMENT.members[1].node_id),
    "distinct certificates": members(certificate_fingerprint=AGREEMENT.members[1].certificate_fingerprint),
    "modalities must have distinct names": replace(AGREEMENT, modalities=AGREEMENT.modalities * 2),
    "every member's modality": members(modality="unheard-of"),
    "multiple of heads": changed(model={"heads": 3}),
    "rank must not exceed": changed(model={"rank": 9}),
    "records_per_patient must be 1 or more": changed(privacy={"unit": "patient"}),
    "and 0 if it is a record": changed(privacy={"records_per_patient": 2}),
    "noise_multiplier must be from": changed(privacy={"noise_multiplier": 0.29}),
    "or 0: no privacy": changed(privacy={"noise_multiplier": 10_001.0}),
    "steps_per_round must not exceed": replace(
        changed(training={"steps_per_round": 1_000_000}), study=replace(AGREEMENT.study, rounds=11)
    ),
    "coordinate_rank must be below": changed(training={"coordinate_rank": 9}),
}


@pytest.mark.parametrize("rule", sorted(BROKEN))
def test_every_rule_is_checked_when_it_is_made_and_when_it_is_read(rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        write_agreement(BROKEN[rule])
    with pytest.raises(ConfigError, match=rule):
        read_agreement(tomli_w.dumps(msgspec.to_builtins(BROKEN[rule])).encode())


def test_the_overflow_rule_is_exact() -> None:
    four = replace(AGREEMENT, members=AGREEMENT.members[:4])
    check_rules(replace(four, secure_sum=replace(four.secure_sum, value_bits=30)))  # 4 (2^30 - 1) < 2^32
    with pytest.raises(ConfigError, match="no overflow"):
        check_rules(changed(secure_sum={"value_bits": 30}))  # 5 (2^30 - 1) > 2^32


FLOATS = [
    ("privacy", "noise_multiplier"),
    ("privacy", "max_grad_norm"),
    ("privacy", "epsilon_budget"),
    ("training", "learning_rate"),
    ("training", "alignment_weight"),
    ("precision", "tau_squared"),
    ("precision", "ridge"),
    ("model", "alpha"),
    ("deadlines", "phase_seconds"),
]


@pytest.mark.parametrize(("section", "field"), FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(section: str, field: str, value: float) -> None:
    broken = changed(**{section: {field: value}})
    with pytest.raises(ConfigError):
        write_agreement(broken)
    with pytest.raises(ConfigError):
        read_agreement(tomli_w.dumps(msgspec.to_builtins(broken)).encode())


OUT_OF_RANGE = [
    ("study", "rounds", 0),
    ("study", "rounds", 10_001),
    ("study", "classes", 1),
    ("study", "id", "Upper"),
    ("study", "id", "../escape"),
    ("study", "id", ""),
    ("study", "title", "x" * 201),
    ("roster", "digest", "0" * 63),
    ("roster", "digest", "A" * 64),
    ("roster", "epoch", 0),
    ("secure_sum", "protocol", "plain"),
    ("secure_sum", "minimum_cohort", 2),
    ("secure_sum", "threshold", 1),
    ("secure_sum", "ring_bits", 64),
    ("secure_sum", "value_bits", 31),
    ("secure_sum", "chunk_values", 1),
    ("secure_sum", "max_attempts", 0),
    ("privacy", "unit", "batch"),
    ("privacy", "sample_rate", 0.0),
    ("privacy", "sample_rate", 1.1),
    ("privacy", "noise_multiplier", -0.1),
    ("privacy", "max_grad_norm", 0.0),
    ("privacy", "delta", 0.0),
    ("privacy", "delta", 0.1),
    ("privacy", "epsilon_budget", 0.0),
    ("training", "steps_per_round", 0),
    ("precision", "rule", "P9"),
    ("precision", "clamp", 0.5),
    ("model", "seed", -1),
    ("anchors", "count", 3),
    ("deadlines", "join_seconds", 0.0),
]


@pytest.mark.parametrize(("section", "field", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_the_reader(section: str, field: str, value: object) -> None:
    content = msgspec.to_builtins(AGREEMENT)
    content[section][field] = value
    with pytest.raises(ConfigError, match="cannot be read"):
        read_agreement(tomli_w.dumps(content).encode())


def test_two_members_are_too_few_and_257_too_many() -> None:
    for count in (2, MAXIMUM_MEMBERS + 1):
        content = msgspec.to_builtins(AGREEMENT)
        content["members"] = [
            {**content["members"][0], "node_id": f"h{i}", "certificate_fingerprint": f"{i:064x}"} for i in range(count)
        ]
        with pytest.raises(ConfigError, match="cannot be read"):
            read_agreement(tomli_w.dumps(content).encode())


@pytest.mark.parametrize("section", ["", "study", "roster", "secure_sum", "privacy", "training", "model", "deadlines"])
def test_unknown_keys_are_refused(section: str) -> None:
    content = msgspec.to_builtins(AGREEMENT)
    (content[section] if section else content)["surprise"] = 1
    with pytest.raises(ConfigError, match="surprise"):
        read_agreement(tomli_w.dumps(content).encode())


@pytest.mark.parametrize("section", sorted(msgspec.to_builtins(AGREEMENT)))
def test_missing_sections_are_refused(section: str) -> None:
    content = msgspec.to_builtins(AGREEMENT)
    del content[section]
    with pytest.raises(ConfigError, match=section):
        read_agreement(tomli_w.dumps(content).encode())


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xff\xfe",
        b"a = ",
        b"= 1",
        b"[" * 5000,
        b"x = [" + b"[" * 20_000,
        b"\0",
        DOCUMENT + b"\n[study]\n",
        DOCUMENT + b"#" * (1 << 22),
    ],
    ids=range(9),
)
def test_hostile_documents_are_refused_and_never_crash(document: bytes) -> None:
    with pytest.raises(ConfigError):
        read_agreement(document)


@given(st.binary(max_size=200))
def test_garbage_never_crashes(document: bytes) -> None:
    with pytest.raises(ConfigError):
        read_agreement(document)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_written_reads_back_alike(data: st.DataObject) -> None:
    positive = st.floats(1e-12, 1e12)
    agreement = changed(
        study={
            "rounds": data.draw(st.integers(1, 10_000)),
            "id": data.draw(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)),
            "title": data.draw(st.text(max_size=200)),
        },
        privacy={
            "sample_rate": data.draw(st.floats(0.0, 1.0, exclude_min=True)),
            "noise_multiplier": data.draw(st.just(0.0) | st.floats(0.3, 1e4)),
            "max_grad_norm": data.draw(positive),
            "delta": data.draw(st.floats(0.0, 0.1, exclude_min=True, exclude_max=True)),
            "epsilon_budget": data.draw(positive),
        },
        training={"learning_rate": data.draw(positive), "merge_every_rounds": data.draw(st.integers(0, 10_000))},
        model={"seed": data.draw(st.integers(0, 2**63 - 1))},
    )
    document = write_agreement(agreement)
    assert read_agreement(document) == agreement
    assert write_agreement(read_agreement(document)) == document


@given(st.integers(0, len(DOCUMENT) - 1), st.integers(1, 255))
def test_the_digest_changes_with_any_byte(position: int, mask: int) -> None:
    other = DOCUMENT[:position] + bytes([DOCUMENT[position] ^ mask]) + DOCUMENT[position + 1 :]
    assert agreement_digest(other) != agreement_digest(DOCUMENT)


def test_the_digest_is_over_the_exact_bytes() -> None:
    digests = {
        agreement_digest(d) for d in (DOCUMENT, DOCUMENT + b"\n", DOCUMENT + b" ", b" " + DOCUMENT, DOCUMENT[:-1])
    }
    assert len(digests) == 5
    assert all(len(digest) == 32 for digest in digests)


def test_look_ups() -> None:
    assert AGREEMENT.member(AGREEMENT.members[2].node_id) is AGREEMENT.members[2]
    assert AGREEMENT.modality("mean") is AGREEMENT.modalities[0]
    assert AGREEMENT.total_steps == 4 * 2
    with pytest.raises(ConfigError, match="not a member"):
        AGREEMENT.member("stranger")
    with pytest.raises(ConfigError, match="no modality"):
        AGREEMENT.modality("stranger")


@pytest.mark.parametrize("field", ["study id", "node id"])
def test_a_name_that_ends_in_a_newline_is_refused(field: str) -> None:
    """`$` also matches before a newline at the end; names become file names and log lines."""
    content = msgspec.to_builtins(AGREEMENT)
    if field == "study id":
        content["study"]["id"] = "study\n"
    else:
        content["members"][0]["node_id"] = "hospital\n"
    with pytest.raises(ConfigError):
        read_agreement(tomli_w.dumps(content).encode())


@pytest.mark.parametrize(
    ("members", "threshold", "tolerated"), [(3, 3, 1), (4, 3, 1), (5, 4, 2), (6, 4, 1), (6, 5, 3), (12, 8, 3)]
)
def test_how_many_may_collude_with_an_aggregator_that_deviates(members: int, threshold: int, tolerated: int) -> None:
    """Two survivor sets cannot both be signed by `threshold` members, and no secret is recovered."""
    study = make_network(members, threshold=threshold, minimum_cohort=threshold).agreement
    assert study.colluders_tolerated == tolerated
    honest = members - tolerated
    assert honest + 2 * tolerated < 2 * threshold
    assert tolerated < threshold
    with pytest.raises(ConfigError, match="a colluder could have two survivor sets signed"):
        make_network(members, threshold=(members + 1) // 2, minimum_cohort=3)
