"""The budget ledger: what verifies, every byte of it, and everything that must not pass for an honest ledger."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.errors import LocalProtocolError, VerificationFailed
from protocols import ledger as led
from protocols.chain import GENESIS
from tests.audit.factory import Study, make_study
from tests.audit.tamper import byte_changes, line_changes

replace = msgspec.structs.replace
STUDY = make_study(count=3, rounds=3)
TRANSCRIPT = STUDY.transcript()
NODE = STUDY.names[0]
KEY = STUDY.public_keys[NODE]


def verify(lines: bytes, study: Study = STUDY, node: str = NODE) -> tuple[tuple[led.DpSgdEvent, ...], led.EpsilonClaim]:
    return led.verify_ledger(led.read_ledger(lines, KEY), node, study.agreement, study.digest)


def test_an_honest_ledger_verifies() -> None:
    events, ((counted, claim),), _ = verify(STUDY.ledger(NODE, TRANSCRIPT))
    assert counted == len(events)
    assert [(event.round, event.steps) for event in events] == [(1, 0), (2, 2), (3, 2)]
    assert claim.steps_total == 4
    assert claim.epsilon is not None


def test_every_changed_byte_is_refused() -> None:
    lines = STUDY.ledger(NODE, TRANSCRIPT)
    for position, changed in byte_changes(lines):
        try:
            verify(changed)
        except VerificationFailed:
            continue
        pytest.fail(f"byte {position} can be changed: {changed[max(0, position - 30) : position + 30]!r}")


def test_lines_cannot_be_deleted_doubled_swapped_cut_or_added() -> None:
    for what, changed in line_changes(STUDY.ledger(NODE, TRANSCRIPT)):
        try:
            verify(changed)
        except VerificationFailed:
            continue
        pytest.fail(what)


@given(st.binary(max_size=400))
def test_garbage_is_refused_and_never_crashes(data: bytes) -> None:
    with pytest.raises(VerificationFailed):
        verify(data)


def edit(index: int, **fields: object):
    return lambda bodies: bodies.__setitem__(index, replace(bodies[index], **fields))


LIES = {
    "no opening": lambda b: b.pop(0),
    "opened twice": lambda b: b.insert(1, b[0]),
    "another node": edit(0, node_id="hospital-09"),
    "another study": edit(0, agreement_digest="1" * 64),
    "another delta": edit(0, delta=1e-3),
    "another budget": edit(0, epsilon_budget=1e9),
    "less noise": edit(2, noise_multiplier=0.5),
    "no noise": edit(2, noise_multiplier=0.0),
    "another sampling rate": edit(2, sample_rate=0.2),
    "another clip norm": edit(2, max_grad_norm=2.0),
    "another dataset": edit(2, dataset_fingerprint="1" * 64),
    "more steps": edit(2, steps=3),
    "fewer steps": edit(2, steps=1),
    "round zero": edit(1, round=0),
    "more rounds than agreed": edit(3, round=4),
    "a round twice": edit(3, round=2),
    "rounds out of order": lambda b: b.__setitem__(slice(2, 4), [b[3], b[2]]),
    "the first event knows a record": edit(1, transcript_link="1" * 64),
    "an event missing": lambda b: b.pop(2),
    "an event that no claim counts": lambda b: b.__setitem__(slice(3, 5), [b[4], b[3]]),
    "a claim over fewer steps": edit(4, steps_total=2),
    "a claim at another delta": edit(4, delta=1e-3),
    "no claim": lambda b: b.pop(4),
    "no end": lambda b: b.pop(),
    "two ends": lambda b: b.append(b[-1]),
    "a wrong end": edit(5, rounds=2),
    "a wrong sum at the end": edit(5, steps_total=2),
    "an event after the end": lambda b: b.append(replace(b[3], round=4)),
    "nothing but an opening": lambda b: b.__delitem__(slice(1, None)),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_node_that_signs_a_lie_is_caught(lie: str) -> None:
    with pytest.raises(VerificationFailed):
        verify(STUDY.ledger(NODE, TRANSCRIPT, LIES[lie]))


def test_a_ledger_does_not_pass_for_another_node_or_study() -> None:
    lines = STUDY.ledger(NODE, TRANSCRIPT)
    with pytest.raises(VerificationFailed, match="another node or study"):
        verify(lines, node=STUDY.names[1])
    other = STUDY.with_sections(study={"id": "second"})
    with pytest.raises(VerificationFailed, match="another node or study"):
        verify(lines, study=other)
    with pytest.raises(VerificationFailed):
        led.read_ledger(lines, STUDY.public_keys[STUDY.names[1]])


def test_a_transcript_line_is_no_ledger_line() -> None:
    with pytest.raises(VerificationFailed):
        led.read_ledger(TRANSCRIPT, STUDY.aggregator_key)


@pytest.mark.parametrize("epsilon", [float("nan"), float("inf"), -1.0])
def test_claims_are_finite_numbers(epsilon: float) -> None:
    """NaN and infinity would be written as null, which means "no noise": the writer refuses minus one, and a reader
    sees null for the others, never a number."""
    writer = led.LedgerWriter(STUDY.consortium.identities[NODE])
    claim = led.EpsilonClaim(0, 1e-5, epsilon, led.ACCOUNTANT, led.NEIGHBOURING_RELATION)
    if epsilon < 0:
        with pytest.raises(LocalProtocolError):
            writer.append(claim)
    else:
        (body,) = led.read_ledger(writer.append(claim), KEY)
        assert isinstance(body, led.EpsilonClaim)
        assert body.epsilon is None


@pytest.mark.parametrize("field", ["sample_rate", "noise_multiplier", "max_grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, "1"])
def test_an_event_with_a_strange_number_is_not_made(field: str, value: object) -> None:
    event = led.DpSgdEvent(1, 0.1, 1.0, 1.0, 2, "record", "ab" * 32, "rng", GENESIS)
    with pytest.raises(LocalProtocolError):
        led.LedgerWriter(STUDY.consortium.identities[NODE]).append(replace(event, **{field: value}))
