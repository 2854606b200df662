"""The masked secure sum, run end to end in memory: correctness, dropouts at every phase, and misbehaving parties."""

import msgspec
import numpy as np
import pytest

from keys.errors import RemoteProtocolError
from protocols import messages as m
from protocols import transcript
from protocols.encoding import FixedPoint
from protocols.sealing import AttemptId
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, make_network, names


def expected(network: Network, contributors: tuple[str, ...], number: int = 1) -> np.ndarray:
    return np.sum([network.vectors(name, number) for name in contributors], axis=0)


def check_sum(network: Network, node: str, number: int = 1) -> tuple[str, ...]:
    """The node's sum equals the float64 reference within n * 2^-(f+1); gives the contributors."""
    summed = next(s for s in network.sums[node] if s.round == number)
    bound = len(summed.contributors) * 2.0 ** -(network.agreement.secure_sum.fraction_bits + 1)
    assert np.abs(summed.total - expected(network, summed.contributors, number)).max() <= bound
    return summed.contributors


@pytest.mark.parametrize("count", [3, 4, 7, 16])
def test_sum_equals_the_float64_reference_within_the_quantisation_bound(count: int) -> None:
    network = make_network(count)
    network.run()
    for name in names(count):
        assert check_sum(network, name) == tuple(names(count))
    assert not network.faults


def test_sum_is_bit_identical_under_permutation_of_nodes() -> None:
    totals = []
    for order in (sorted, lambda n: sorted(n, reverse=True), lambda n: n[2:] + n[:2]):
        network = make_network(5)
        network.run(order=order)
        totals.append(network.sums["hospital-00"][0].total.tobytes())
    # The machines draw fresh keys each time; only the sum is the same.
    assert len(set(totals)) == 1


def test_several_rounds_and_a_transcript_that_verifies() -> None:
    network = make_network(4, rounds=3)
    network.run()
    for number in (1, 2, 3):
        check_sum(network, "hospital-03", number)
    record = transcript.read_transcript(b"".join(network.lines), network.consortium.identities[AGGREGATOR].public_key)
    transcript.verify_transcript(record, network.agreement, network.digest, network.parties.public_keys)
    assert set(network.ended) == set(names(4))


PHASES = ["Ready", "RoundKeys", "SealedSeeds", "MaskedChunk", "UploadDone", "SurvivorVote", "Unmasking", "Receipt"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_node_lost_at_any_phase_is_recovered_from(phase: str) -> None:
    network, victim = make_network(4, threshold=3), "hospital-01"
    gone = False

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        nonlocal gone
        gone = gone or (sender == victim and body_type(data) == phase)
        return [] if gone and victim in (sender, recipient) else [data]

    network.tap = tap
    network.run()
    counts = phase in PHASES[PHASES.index("SurvivorVote") :]
    for name in set(names(4)) - {victim}:
        contributors = check_sum(network, name)
        assert (victim in contributors) == counts
    assert not network.faults


@pytest.mark.parametrize("phase", ["SealedSeeds", "MaskedChunk", "SurvivorVote", "Unmasking"])
def test_below_the_threshold_nothing_is_opened(phase: str) -> None:
    network, gone = make_network(4, threshold=3), set()

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender in ("hospital-01", "hospital-02") and body_type(data) == phase:
            gone.add(sender)
        return [] if gone & {sender, recipient} else [data]

    network.tap = tap
    network.run()
    assert all(not sums for sums in network.sums.values())
    assert b"round-abandoned" in b"".join(network.lines).lower().replace(b"roundabandoned", b"round-abandoned")


def test_a_failed_attempt_is_repeated_with_fresh_seeds_and_never_after_unmasking() -> None:
    network, dropped = make_network(5, threshold=4), False
    uploads: list[bytes] = []

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        nonlocal dropped
        if body_type(data) == "MaskedChunk" and sender == "hospital-00":
            uploads.append(msgspec.msgpack.decode(data)[5][2])
        # Two of five are silent in the first attempt's upload; t = 4, so the attempt fails and a second one without one of them would too.
        if sender in ("hospital-03", "hospital-04") and body_type(data) == "Unmasking":
            return []
        return [data]

    network.tap = tap
    network.run()
    # Unmasking began, so there was no second attempt of this round.
    assert all(not sums for sums in network.sums.values())
    assert {(r, a) for r, a, _ in network.journals["hospital-00"].entries} == {(1, 1)}
    assert len(set(uploads)) == len(uploads)


def test_a_false_seed_is_judged_and_its_author_expelled() -> None:
    network = make_network(5, threshold=3)
    liar = network.consortium.identities["hospital-02"]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        envelope = msgspec.msgpack.decode(data)
        if sender == liar.node_id and envelope[5][0] == "SealedSeeds" and envelope[5][1] == "hospital-04":
            bad = m.SealedSeeds("hospital-04", envelope[5][2], bytes(1202), bytes(1168))
            return [m.encode(liar, AttemptId(network.digest, envelope[2], envelope[3]), bad)]
        return [data]

    network.tap = tap
    network.run()
    assert check_sum(network, "hospital-04") == ("hospital-00", "hospital-01", "hospital-03", "hospital-04")
    assert any(p.event == "expelled" and p.fields["node"] == liar.node_id for p in network.progress)
    assert not network.faults


def test_a_wrong_share_in_the_unmasking_does_not_spoil_the_sum_and_is_named() -> None:
    network = make_network(5, threshold=3)
    liar = network.consortium.identities["hospital-00"]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        envelope = msgspec.msgpack.decode(data)
        if sender == liar.node_id and envelope[5][0] == "Unmasking":
            wrong = tuple((name, bytes(33)) for name, _ in envelope[5][1])
            return [m.encode(liar, AttemptId(network.digest, envelope[2], envelope[3]), m.Unmasking(wrong, ()))]
        return [data]

    network.tap = tap
    network.run()
    check_sum(network, "hospital-03")
    assert any(p.event == "expelled" and p.fields["node"] == liar.node_id for p in network.progress)


def tamper(network: Network, kind: str, change: "object") -> None:
    """Let a malicious aggregator, with its real key, change every body of one kind."""
    aggregator = network.consortium.identities[AGGREGATOR]

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender != AGGREGATOR or body_type(data) != kind:
            return [data]
        envelope = m.decode(data, AGGREGATOR, aggregator.public_key, network.digest)
        body = change(envelope.body, recipient)  # type: ignore[operator]
        return [m.encode(aggregator, AttemptId(network.digest, envelope.round, envelope.attempt), body)]

    network.tap = tap


def test_substituted_round_keys_are_refused() -> None:
    network = make_network(4)
    forged = m.encode(
        network.consortium.identities[AGGREGATOR],
        AttemptId(network.digest, 1, 1),
        m.RoundKeys(bytes(1216), bytes(1216), bytes(32)),
    )
    tamper(network, "KeySet", lambda body, _: m.KeySet((forged, *body.keys[1:])))
    network.run()
    assert set(network.faults) == set(names(4))
    assert all(fault.peer == m.AGGREGATOR for fault in network.faults.values())


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("AttemptOpen", lambda body, to: m.AttemptOpen((to, "hospital-00", "hospital-01")[:2])),
        ("AttemptOpen", lambda body, _: m.AttemptOpen((*body.cohort, "invented"))),
        ("AttemptOpen", lambda body, to: m.AttemptOpen(tuple(n for n in body.cohort if n != to))),
        ("KeySet", lambda body, _: m.KeySet(body.keys[:2])),
        ("KeySet", lambda body, _: m.KeySet((*body.keys, body.keys[0]))),
        ("SeedSet", lambda body, _: m.SeedSet(body.senders, body.sealed[1:])),
        ("SeedSet", lambda body, _: m.SeedSet(body.senders[:2], body.sealed)),
        ("Survivors", lambda body, _: m.Survivors(body.survivors[:2])),
        ("Survivors", lambda body, _: m.Survivors(tuple((n, bytes(32)) for n, _ in body.survivors))),
        ("SurvivorProof", lambda body, _: m.SurvivorProof(body.votes[:1])),
        ("SurvivorProof", lambda body, _: m.SurvivorProof(tuple((n, bytes(64)) for n, _ in body.votes))),
        ("SurvivorProof", lambda body, _: m.SurvivorProof((body.votes[0],) * 4)),
        ("SumChunk", lambda body, _: m.SumChunk(body.index, bytes([body.data[0] ^ 1]) + body.data[1:])),
        ("SumChunk", lambda body, _: m.SumChunk(body.index + 1, body.data)),
        ("SumChunk", lambda body, _: m.SumChunk(0, body.data)),
        ("RoundResult", lambda body, _: m.RoundResult(body.record.replace(b"hospital-01", b"hospital-00"))),
    ],
)
def test_a_malicious_aggregator_is_refused_and_no_share_is_revealed_against_the_rules(
    kind: str, change: object
) -> None:
    network = make_network(4)
    tamper(network, kind, change)
    network.run()
    assert network.faults
    assert all(fault.peer == m.AGGREGATOR for fault in network.faults.values())
    assert all(not sums for sums in network.sums.values())


def test_different_survivor_sets_to_different_nodes_get_no_quorum() -> None:
    network = make_network(4, threshold=3)
    sets = {
        "hospital-00": slice(0, 3),
        "hospital-01": slice(0, 3),
        "hospital-02": slice(0, 4),
        "hospital-03": slice(0, 4),
    }
    revealed: list[str] = []
    tamper(network, "Survivors", lambda body, to: m.Survivors(body.survivors[sets[to]]))
    inner = network.tap

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if body_type(data) == "Unmasking":
            revealed.append(sender)
        return list(inner(sender, recipient, data))

    network.tap = tap
    network.run()
    assert not revealed


def test_a_second_attempt_after_unmasking_is_refused() -> None:
    network = make_network(4)
    network.run()
    aggregator = network.consortium.identities[AGGREGATOR]
    again = m.encode(aggregator, AttemptId(network.digest, 1, 2), m.AttemptOpen(tuple(names(4))))
    network.nodes["hospital-00"].ended = False
    with pytest.raises(RemoteProtocolError, match="before we were ready"):
        network.nodes["hospital-00"].receive(again)


def test_uploads_look_uniform_and_tell_nothing_of_the_vector() -> None:
    """Chi-squared test on the bytes of one node's upload of a constant vector."""
    network = make_network(4, size=50_000)
    network.vectors = lambda _name, _round: np.zeros(50_000)
    sent = bytearray()

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender == "hospital-02" and body_type(data) == "MaskedChunk":
            sent.extend(msgspec.msgpack.decode(data)[5][2])
        return [data]

    network.tap = tap
    network.run()
    counts = np.bincount(np.frombuffer(bytes(sent), dtype=np.uint8), minlength=256)
    statistic = float(((counts - len(sent) / 256) ** 2 / (len(sent) / 256)).sum())
    assert statistic < 400  # 255 degrees of freedom: p is far below 1e-7 above this


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("MaskedChunk", lambda b: m.MaskedChunk(b.index, b.data + b"1234")),
        ("MaskedChunk", lambda b: m.MaskedChunk(b.index + 99, b.data)),
        ("UploadDone", lambda _: m.UploadDone(bytes(32))),
        ("RoundKeys", lambda _: m.UploadDone(bytes(32))),
        ("SurvivorVote", lambda _: m.SurvivorVote(bytes(64))),
        ("Unmasking", lambda _: m.Unmasking((), ())),
    ],
)
def test_a_misbehaving_node_is_named_and_the_round_completes_without_it(kind: str, body: object) -> None:
    network = make_network(5, threshold=3)
    liar = network.consortium.identities["hospital-01"]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender != liar.node_id or body_type(data) != kind:
            return [data]
        message = m.decode(data, liar.node_id, liar.public_key, network.digest)
        return [m.encode(liar, AttemptId(network.digest, message.round, message.attempt), body(message.body))]  # type: ignore[operator]

    network.tap = tap
    network.run()
    check_sum(network, "hospital-00")
    assert [p.fields["node"] for p in network.progress if p.event == "expelled"] == [liar.node_id]
    assert not network.faults


def test_a_dropout_leaves_numerator_and_denominator_alike() -> None:
    """The weights travel in the vector, so a lost node is missing from both."""
    network = make_network(4, size=2, threshold=3)
    weights = {name: 1.0 + index for index, name in enumerate(names(4))}
    network.vectors = lambda name, _round: np.array([weights[name] * 3.0, weights[name]])
    gone = False

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        nonlocal gone
        gone = gone or (sender == "hospital-03" and body_type(data) == "MaskedChunk")
        return [] if gone and "hospital-03" in (sender, recipient) else [data]

    network.tap = tap
    network.run()
    numerator, denominator = network.sums["hospital-00"][0].total
    assert denominator == pytest.approx(6.0)
    assert numerator / denominator == pytest.approx(3.0)


def test_nan_and_infinity_are_refused_before_anything_is_sent() -> None:
    fixed = FixedPoint(value_bits=24, fraction_bits=16, ring_bits=32, n_max=4)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(Exception, match="NaN or infinity"):
            fixed.encode(np.array([0.0, bad]))
