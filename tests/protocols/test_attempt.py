"""The masked secure sum, run end to end in memory: correctness, dropouts at every phase, and misbehaving parties."""

import os
import re

import numpy as np
import pytest

from keys.errors import RemoteProtocolError
from protocols import messages as m
from protocols import transcript
from protocols.encoding import FixedPoint
from protocols.prg import TAG_PRIME
from protocols.sealing import AttemptId, keys_digest
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, head, make_network, names


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


@pytest.mark.parametrize("size", [1, 1021, 1022, 1023, 1024, 1025, 2048])
def test_vectors_that_end_before_at_or_behind_the_end_of_a_chunk(size: int) -> None:
    network = make_network(3, size=size)
    network.run()
    for name in names(3):
        assert check_sum(network, name) == tuple(names(3))


def test_sum_is_bit_identical_under_permutation_of_nodes() -> None:
    totals = []
    for order in (sorted, lambda n: sorted(n, reverse=True), lambda n: n[2:] + n[:2]):
        network = make_network(5)
        network.run(order=order)
        totals.append(network.sums["hospital-00"][0].total.tobytes())
    # The machines draw fresh keys each time; only the sum is the same.
    assert len(set(totals)) == 1


def test_sum_does_not_depend_on_which_node_brings_which_vector() -> None:
    totals = set()
    for shift in range(4):
        network = make_network(4)
        vectors = network.vectors
        network.vectors = lambda name, number, v=vectors, k=shift: v(names(4)[(int(name[-2:]) + k) % 4], number)
        network.run()
        totals.add(network.sums["hospital-00"][0].total.tobytes())
    assert len(totals) == 1


def test_several_rounds_and_a_transcript_that_verifies() -> None:
    network = make_network(4, rounds=3)
    network.run()
    for number in (1, 2, 3):
        check_sum(network, "hospital-03", number)
    record = transcript.read_transcript(b"".join(network.lines), network.consortium.identities[AGGREGATOR].public_key)
    transcript.verify_transcript(record, network.agreement, network.digest, network.parties.public_keys)
    assert set(network.ended) == set(names(4))


PHASES = ["Ready", "RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking", "Receipt"]


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


@pytest.mark.parametrize("phase", ["SealedSeeds", "UploadChunk", "SurvivorVote", "Unmasking"])
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


def seal_badly(network: Network, liar: str, victims: set[str]) -> None:
    identity = network.consortium.identities[liar]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        envelope = head(data)
        if sender == liar and envelope[5][0] == "SealedSeeds" and envelope[5][1] in victims:
            bad = m.SealedSeeds(
                envelope[5][1], envelope[5][2], bytes(1202), bytes(1168), bytes(32), bytes(32), envelope[5][7]
            )
            return [m.encode(identity, AttemptId(network.digest, envelope[2], envelope[3]), bad)]
        return [data]

    network.tap = tap


def test_seeds_that_do_not_open_cost_the_two_who_dispute_the_round() -> None:
    network = make_network(6, threshold=4, minimum_cohort=4)
    seal_badly(network, "hospital-02", {"hospital-04"})
    network.run()
    assert check_sum(network, "hospital-00") == ("hospital-00", "hospital-01", "hospital-03", "hospital-05")
    assert b'{"type":"Disputed","round":1,"attempt":1,"accuser":"hospital-04","accused":"hospital-02"}' in b"".join(
        network.lines
    )
    assert not network.faults
    record = transcript.read_transcript(b"".join(network.lines), network.consortium.identities[AGGREGATOR].public_key)
    transcript.verify_transcript(record, network.agreement, network.digest, network.parties.public_keys)


def test_a_complaint_without_ground_expels_its_author() -> None:
    network = make_network(5, threshold=4, minimum_cohort=4)
    liar = network.consortium.identities["hospital-01"]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender != liar.node_id or body_type(data) != "UploadChunk":
            return [data]
        return [m.encode(liar, AttemptId(network.digest, 1, 1), m.Complaint("hospital-01"))]

    network.tap = tap
    network.run()
    assert network.expelled == [liar.node_id]
    check_sum(network, "hospital-00")


@pytest.mark.parametrize("victims", [set(), {"hospital-01", "hospital-03", "hospital-04"}])
def test_no_secret_is_ever_on_the_wire_in_clear(victims: set[str]) -> None:
    """Also not where a node provokes complaints, which once disclosed keys that open other nodes' shares."""
    network = make_network(5, threshold=4, minimum_cohort=4)
    drawn: set[bytes] = set()
    opened: set[bytes] = set()

    def coins(count: int) -> bytes:
        drawn.add(value := os.urandom(count))
        return value

    for machine in network.nodes.values():
        machine._coins = coins
    seal_badly(network, "hospital-02", victims)
    inner = network.tap

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        opened.update(secret for secret in drawn if secret in data)
        return list(inner(sender, recipient, data))

    network.tap = tap
    network.run()
    assert len(drawn) >= 15
    assert not opened


def test_a_wrong_share_in_the_unmasking_does_not_spoil_the_sum_and_is_named() -> None:
    network = make_network(5, threshold=4)
    liar = network.consortium.identities["hospital-00"]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        envelope = head(data)
        if sender == liar.node_id and envelope[5][0] == "Unmasking":
            wrong = tuple((name, bytes(33)) for name, _ in envelope[5][1])
            return [m.encode(liar, AttemptId(network.digest, envelope[2], envelope[3]), m.Unmasking(wrong, ()))]
        return [data]

    network.tap = tap
    network.run()
    check_sum(network, "hospital-03")
    assert any(p.event == "expelled" and p.fields["node"] == liar.node_id for p in network.progress)


def tamper(network: Network, kind: str, change: "object") -> None:
    """Let a malicious aggregator, with its real key, change every body of one kind; a chunk's with its tail."""
    aggregator = network.consortium.identities[AGGREGATOR]

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if sender != AGGREGATOR or body_type(data) != kind:
            return [data]
        envelope = m.decode(data, AGGREGATOR, aggregator.public_key, network.digest)
        body, tail = envelope.body, envelope.tail
        changed = change((body, bytes(tail)) if tail else body, recipient)  # type: ignore[operator]
        body, tail = changed if tail else (changed, b"")
        return [m.encode(aggregator, AttemptId(network.digest, envelope.round, envelope.attempt), body, tail)]

    network.tap = tap


def sum_chunk(index: int, data: bytes) -> tuple[m.SumChunk, bytes]:
    return m.SumChunk(index, m.chunk_digest(data)), data


def test_substituted_round_keys_are_refused() -> None:
    network = make_network(4)
    forged = m.encode(
        network.consortium.identities[AGGREGATOR],
        AttemptId(network.digest, 1, 1),
        m.RoundKeys(bytes(1216), bytes(1216), bytes(32), bytes(32), bytes(32)),
    )
    tamper(network, "KeySet", lambda body, _: m.KeySet(body.digests, (forged, *body.keys[1:])))
    network.run()
    assert set(network.faults) == set(names(4))
    assert all(fault.peer == m.AGGREGATOR for fault in network.faults.values())


ATTACKS = [
    ("AttemptOpen", lambda b, to: m.AttemptOpen((to, "hospital-00", "hospital-01")[:2]), "shrank|twice"),
    ("AttemptOpen", lambda b, _: m.AttemptOpen((*b.cohort[:3], b.cohort[0])), "a node twice in the cohort"),
    ("AttemptOpen", lambda b, _: m.AttemptOpen(b.cohort[:2]), "shrank|not part of"),
    ("AttemptOpen", lambda b, _: m.AttemptOpen((*b.cohort, "invented")), "a stranger into the cohort"),
    ("AttemptOpen", lambda b, to: m.AttemptOpen(tuple(n for n in b.cohort if n != to)), "not part of"),
    ("KeySet", lambda b, _: m.KeySet(b.digests[:2], b.keys), "shrank|our own round keys"),
    ("KeySet", lambda b, to: m.KeySet(tuple(d for d in b.digests if d[0] != to), b.keys), "our own round keys"),
    ("KeySet", lambda b, _: m.KeySet((*b.digests, b.digests[0]), b.keys), "unsorted digests"),
    ("KeySet", lambda b, _: m.KeySet(b.digests[::-1], b.keys), "unsorted digests"),
    ("KeySet", lambda b, _: m.KeySet((*b.digests, ("invented", bytes(32))), b.keys), "not in the cohort"),
    ("KeySet", lambda b, _: m.KeySet(b.digests, b.keys[1:]), "held back round keys"),
    (
        "KeySet",
        lambda b, to: m.KeySet(tuple((n, d if n == to else bytes(32)) for n, d in b.digests), b.keys),
        "than it announced",
    ),
    ("SeedSet", lambda b, _: m.SeedSet(b.senders, b.sealed[1:]), "held back seeds"),
    ("SeedSet", lambda b, _: m.SeedSet(b.senders, (*b.sealed, b.sealed[0])), "unasked or repeated"),
    ("SeedSet", lambda b, _: m.SeedSet((*b.senders, b.senders[0]), b.sealed), "sender of seeds twice"),
    ("SeedSet", lambda b, _: m.SeedSet((*b.senders, "invented"), b.sealed), "no round keys"),
    ("SeedSet", lambda b, to: m.SeedSet(tuple(n for n in b.senders if n != to), b.sealed), "left us out"),
    ("SeedSet", lambda b, _: m.SeedSet(b.senders[:2], b.sealed), "shrank|left us out"),
    ("Survivors", lambda b, _: m.Survivors(b.survivors[:2], b.uploads), "fewer survivors"),
    ("Survivors", lambda b, _: m.Survivors((*b.survivors, ("zoo", bytes(32))), b.uploads), "never distributed seeds"),
    ("Survivors", lambda b, _: m.Survivors(b.survivors[::-1], b.uploads), "not sorted and distinct"),
    ("Survivors", lambda b, _: m.Survivors((*b.survivors, b.survivors[-1]), b.uploads), "not sorted and distinct"),
    ("Survivors", lambda b, _: m.Survivors(tuple((n, bytes(32)) for n, _ in b.survivors), b.uploads), "another digest"),
    ("Survivors", lambda b, _: m.Survivors(b.survivors, b.uploads[1:]), "did not sign"),
    (
        "Survivors",
        lambda b, to: m.Survivors(tuple((n, d if n == to else bytes(32)) for n, d in b.survivors), b.uploads),
        "did not sign",
    ),
    ("SurvivorProof", lambda b, _: m.SurvivorProof(b.votes[:1]), "fewer than 3 survivor votes"),
    ("SurvivorProof", lambda b, _: m.SurvivorProof(tuple((n, bytes(64)) for n, _ in b.votes)), "never signed"),
    ("SurvivorProof", lambda b, _: m.SurvivorProof((b.votes[0],) * 4), "one twice"),
    ("SurvivorProof", lambda b, _: m.SurvivorProof((*b.votes[:3], ("invented", bytes(64)))), "votes of strangers"),
    ("SumChunk", lambda b, _: sum_chunk(b[0].index, bytes([b[1][0] ^ 1]) + b[1][1:]), "does not vouch"),
    ("SumChunk", lambda b, _: sum_chunk(b[0].index, b[1] * 100), "that no sum has"),
    ("SumChunk", lambda b, _: sum_chunk(0, b[1][:-4]), "that no sum has"),
    ("SumChunk", lambda b, _: (b[0], b[1][:-4]), "not the one it signed"),
    ("RoundResult", lambda b, _: m.RoundResult(b.record.replace(b"hospital-01", b"hospital-00")), "does not verify"),
]


@pytest.mark.parametrize(("kind", "change", "fault"), ATTACKS)
def test_a_malicious_aggregator_is_refused_and_no_share_is_revealed_against_the_rules(
    kind: str, change: object, fault: str
) -> None:
    network = make_network(4)
    tamper(network, kind, change)
    inner, revealed = network.tap, []

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        revealed.extend([sender] if body_type(data) == "Unmasking" else [])
        return list(inner(sender, recipient, data))

    network.tap = tap
    network.run()
    assert network.faults
    assert all(found.peer == m.AGGREGATOR and re.search(fault, str(found)) for found in network.faults.values())
    assert all(not sums for sums in network.sums.values())
    assert not revealed or kind in ("SumChunk", "RoundResult")


def test_sums_that_never_come_whole_are_blamed_on_the_aggregator() -> None:
    network = make_network(4)
    tamper(network, "SumChunk", lambda b, _: sum_chunk(b[0].index + 1, b[1]))
    network.run()
    assert {str(fault) for fault in network.faults.values()} == {
        "aggregator: keeps sending sums that are incomplete, or not the next one"
    }


def test_sums_that_are_cut_short_with_their_connection_are_nobodys_fault() -> None:
    """However often: only what comes incomplete over one connection counts."""
    network, victim, cuts = make_network(4, size=100), "hospital-00", 0

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        nonlocal cuts
        if (recipient, body_type(data)) != (victim, "SumChunk") or cuts == 40:
            return [data]
        cuts += 1
        network._from_node(victim, network.nodes[victim].rejoin())
        return []

    network.tap = tap
    network.run()
    assert cuts == 40
    assert not network.faults
    assert check_sum(network, victim) == tuple(names(4))


def test_round_keys_of_another_attempt_are_refused() -> None:
    """The first attempt fails in the upload; in the second the aggregator replays a node's old keys."""
    network = make_network(6, threshold=4, minimum_cohort=4)
    liar, kept = network.consortium.identities["hospital-04"], {}
    aggregator = network.consortium.identities[AGGREGATOR]

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        envelope = head(data)
        kind, attempt = envelope[5][0], envelope[3]
        if sender == liar.node_id and kind == "SealedSeeds" and attempt == 1 and envelope[5][1] == "hospital-03":
            bad = m.SealedSeeds("hospital-03", envelope[5][2], bytes(1202), b"", bytes(32), bytes(32), envelope[5][7])
            return [m.encode(liar, AttemptId(network.digest, 1, 1), bad)]
        if kind == "RoundKeys" and attempt == 1:
            kept[sender] = data
        if kind == "KeySet" and attempt == 2:
            old = next(name for name in sorted(kept) if name != recipient)
            keys = tuple(kept[old] if m.claimed_sender(k) == old else k for k in envelope[5][2])
            digests = tuple((n, keys_digest(kept[old]) if n == old else d) for n, d in envelope[5][1])
            return [m.encode(aggregator, AttemptId(network.digest, 1, 2), m.KeySet(digests, keys))]
        return [data]

    network.tap = tap
    network.run()
    assert network.faults
    assert all("replayed a message" in str(fault) for fault in network.faults.values())


def test_seeds_for_somebody_else_or_under_other_keys_are_refused() -> None:
    """Two views of the round keys: the aggregator shows one node a cohort without hospital-03."""
    network = make_network(5, threshold=4, minimum_cohort=4)
    aggregator = network.consortium.identities[AGGREGATOR]

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        envelope = head(data)
        if envelope[5][0] == "KeySet" and recipient == "hospital-00":
            keys = tuple(k for k in envelope[5][2] if m.claimed_sender(k) != "hospital-03")
            digests = tuple((n, d) for n, d in envelope[5][1] if n != "hospital-03")
            return [m.encode(aggregator, AttemptId(network.digest, 1, 1), m.KeySet(digests, keys))]
        return [data]

    network.tap = tap
    network.run()
    # hospital-00's seeds are bound to its own view, so it is put out; its upload never joins the others' sum.
    assert check_sum(network, "hospital-01") == ("hospital-01", "hospital-02", "hospital-03", "hospital-04")


def test_different_survivor_sets_to_different_nodes_get_no_quorum() -> None:
    network = make_network(4, threshold=3)
    sets = {
        "hospital-00": slice(0, 3),
        "hospital-01": slice(0, 3),
        "hospital-02": slice(0, 4),
        "hospital-03": slice(0, 4),
    }
    revealed: list[str] = []
    tamper(network, "Survivors", lambda body, to: m.Survivors(body.survivors[sets[to]], body.uploads))
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
        if sender == "hospital-02" and body_type(data) == "UploadChunk":
            sent.extend(data[4 + int.from_bytes(data[:4]) :])
        return [data]

    network.tap = tap
    network.run()
    counts = np.bincount(np.frombuffer(bytes(sent), dtype=np.uint8), minlength=256)
    statistic = float(((counts - len(sent) / 256) ** 2 / (len(sent) / 256)).sum())
    assert statistic < 400  # 255 degrees of freedom: p is far below 1e-7 above this


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("UploadChunk", lambda b, tail: (m.UploadChunk(b.index, m.chunk_digest(tail + b"1234")), tail + b"1234")),
        ("UploadChunk", lambda b, tail: (b, tail + b"1234")),
        ("UploadChunk", lambda b, tail: (m.UploadChunk(b.index + 99, b.digest), tail)),
        ("UploadDone", lambda b, _: m.UploadDone(bytes(32), b.view, b.tag)),
        ("UploadDone", lambda b, _: m.UploadDone(b.digest, bytes(32), b.tag)),
        ("UploadDone", lambda b, _: m.UploadDone(b.digest, b.view, (b.tag + 1) % TAG_PRIME)),
        ("UploadDone", lambda b, _: (b, b"tail")),
        ("RoundKeys", lambda b, _: m.UploadDone(bytes(32), bytes(32), 0)),
        ("RoundKeys", lambda b, _: m.RoundKeys(b"\xff" * 1216, b.pair_public, *[bytes(32)] * 3)),
        ("RoundKeys", lambda b, _: m.RoundKeys(b.share_public, b.pair_public[:1184] + bytes(32), *[bytes(32)] * 3)),
        ("SurvivorVote", lambda b, _: m.SurvivorVote(bytes(64))),
        ("Unmasking", lambda b, _: m.Unmasking((), ())),
    ],
)
def test_a_misbehaving_node_is_named_and_the_round_completes_without_it(kind: str, body: object) -> None:
    network = make_network(5, threshold=4)
    liar = network.consortium.identities["hospital-01"]

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender != liar.node_id or body_type(data) != kind:
            return [data]
        message = m.decode(data, liar.node_id, liar.public_key, network.digest)
        changed = body(message.body, bytes(message.tail))  # type: ignore[operator]
        changed = changed if isinstance(changed, tuple) else (changed,)
        return [m.encode(liar, AttemptId(network.digest, message.round, message.attempt), *changed)]

    network.tap = tap
    network.run()
    check_sum(network, "hospital-00")
    assert network.expelled == [liar.node_id]
    assert not network.faults


def test_a_dropout_leaves_numerator_and_denominator_alike() -> None:
    """The weights travel in the vector, so a lost node is missing from both."""
    network = make_network(4, size=2, threshold=3)
    weights = {name: 1.0 + index for index, name in enumerate(names(4))}
    network.vectors = lambda name, _round: np.array([weights[name] * 3.0, weights[name]])
    gone = False

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        nonlocal gone
        gone = gone or (sender == "hospital-03" and body_type(data) == "UploadChunk")
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
