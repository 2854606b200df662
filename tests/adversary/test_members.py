"""Malicious members: second uploads, silence in every phase, broken messages, and what they can pin on others."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec
import pytest

from audit.attacks import network as memory
from audit.attacks import wire
from audit.attacks.network import Hangs
from keys.errors import RemoteProtocolError, VerificationFailed
from protocols import messages as m
from protocols import sealing
from protocols.attempt_aggregator import AttemptAggregator
from protocols.attempt_node import AttemptNode, Shares
from protocols.ciphertexts import FrameBroken
from protocols.transcript import upload_digest
from tests.adversary import weaken
from tests.adversary.attackers import MaliciousNode, behaving
from tests.adversary.test_cohort import blamed
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, head, make_network, names
from tests.protocols.test_attempt import check_sum

LIAR = "hospital-00"


def left(liar: str, count: int = 5) -> tuple[str, ...]:
    return tuple(name for name in names(count) if name != liar)


# --- 9


def upload_twice(guard: AbstractContextManager[None]) -> Network:
    """A whole second upload of other values, with a digest of its own, behind the first; another member is so late that it counts."""
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    late, tried = "hospital-04", False
    held, second = list[bytes](), list[bytes]()
    receive = network.aggregator.receive

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender != late or body_type(data) != "UploadDone" or tried:
            return [data]
        held.append(data)
        return []

    def listen(peer: str, data: bytes, now: float) -> Any:
        nonlocal tried
        tried = tried or [data] == second
        while tried and held:
            network.inject(late, AGGREGATOR, held.pop())
        return receive(peer, data, now)

    network.tap, network.aggregator.receive = tap, listen  # type: ignore[method-assign]
    liar, chunks = MaliciousNode(network, LIAR), []

    @liar.on("UploadChunk")
    def remember(message: m.Message, data: bytes) -> list[bytes]:
        other = bytes(byte ^ 1 for byte in message.tail)
        chunks.append(liar.sign(message, m.UploadChunk(message.body.index, m.chunk_digest(other)), other))
        return [data]

    @liar.on("UploadDone")
    def again(message: m.Message, data: bytes) -> list[bytes]:
        digests = b"".join(head(chunk)[5][2] for chunk in chunks)
        done = m.UploadDone(upload_digest(digests, message.body.tag), message.body.view, message.body.tag)
        second.append(liar.sign(message, done))
        return [data, *chunks, second[0]]

    with guard:
        network.run()
    return network


def test_a_second_upload_with_another_digest() -> None:
    network = upload_twice(weaken.digest_of_an_upload())
    assert not any(network.sums.values())  # what was added twice fits no tag, and all have left

    network = upload_twice(nullcontext())
    assert network.expelled == [LIAR]
    assert not set(network.faults) - {LIAR}
    for name in left(LIAR):
        assert check_sum(network, name) in (left(LIAR), tuple(names(5)))


def upload_beyond_credit(index: int, size: int, guard: AbstractContextManager[None]) -> Network:
    """An upload of six chunks, of which four may be under way, begins with another than the first."""
    network = make_network(5, size=6 * 1024, threshold=4, minimum_cohort=4)
    liar = MaliciousNode(network, LIAR)

    @liar.on("UploadChunk")
    def ahead(message: m.Message, data: bytes) -> list[bytes]:
        tail = bytes(message.tail)[:size]
        return [data] if message.body.index else [liar.sign(message, m.UploadChunk(index, m.chunk_digest(tail)), tail)]

    with guard:
        network.run()
    return network


@pytest.mark.parametrize(("index", "size"), [(5, 1 << 20), (6, 0)], ids=["the last", "behind the last"])
def test_a_chunk_beyond_the_credit(index: int, size: int) -> None:
    assert not upload_beyond_credit(index, size, weaken.credit()).expelled  # as if a connection had lost the others

    network = upload_beyond_credit(index, size, nullcontext())
    assert network.expelled == [LIAR]
    assert f"sent chunk {index} of" in str(network.progress)
    assert not network.faults
    for name in left(LIAR):
        assert check_sum(network, name) == left(LIAR)


# --- 14

STALLS = ["Join", "Ready", "RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking"]
STALLS += ["Receipt", "Farewell"]


def stall(kind: str, guard: AbstractContextManager[None], *, forever: bool = False) -> Network:
    """A node keeps its connection and says nothing where this message is due, or nothing from then on."""
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    liar, silent = MaliciousNode(network, LIAR), False

    def nothing(message: m.Message, data: bytes) -> list[bytes]:
        nonlocal silent
        silent = forever and (silent or type(message.body).__name__ == kind)
        return [] if silent or type(message.body).__name__ == kind else [data]

    liar.on(*STALLS)(nothing)
    with guard:
        network.run()
    return network


def check_that_it_hangs(kind: str, *, forever: bool) -> None:
    """Without deadlines; a study of five has far fewer messages than it may carry here."""
    some = [weaken.replaced(module, "MESSAGES_AT_MOST", 20_000) for module in (memory, wire)]
    with some[0], some[1], pytest.raises(Hangs, match="neither ended nor made progress"):
        stall(kind, weaken.deadlines(), forever=forever)


@pytest.mark.parametrize(
    "kind", [kind for kind in STALLS if kind != "UploadChunk"]
)  # an upload without chunks is a lie
def test_a_node_that_stalls_costs_one_deadline(kind: str) -> None:
    check_that_it_hangs(kind, forever=False)

    network = stall(kind, nullcontext())
    assert network.now < 20.0  # every deadline of this agreement is ten seconds
    for name in left(LIAR):
        assert (LIAR in check_sum(network, name)) == (STALLS.index(kind) > STALLS.index("UploadDone"))
        assert name in network.ended
    assert not network.expelled


@pytest.mark.parametrize("kind", STALLS)
def test_a_node_that_falls_silent_costs_each_phase_that_it_is_due_in_one_deadline(kind: str) -> None:
    check_that_it_hangs(kind, forever=True)

    network = stall(kind, nullcontext(), forever=True)
    assert network.now < 40.0  # votes, receipts and farewell at the most
    for name in left(LIAR):
        check_sum(network, name)


# --- 15

BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "random": lambda data: os.urandom(len(data)),
    "random length": lambda data: b"\xff\xff\xff\xff" + data[4:],
    "truncated": lambda data: data[: len(data) // 2],
    "one byte": lambda data: data[:1],
    "extended": lambda data: data + b"\0",
    "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "nested": lambda data: (1 << 16).to_bytes(4) + b"\x91" * (1 << 16),
    "wrong types": lambda data: (4).to_bytes(4) + msgspec.msgpack.encode([1, 2, 3]),
}


def break_message(kind: str, how: str, sender: str, guard: AbstractContextManager[None]) -> Network:
    """The first message of a kind, from a node or to it, is broken."""
    network, done = make_network(5, size=1500, threshold=4, minimum_cohort=4), []

    def tap(source: str, recipient: str, data: bytes) -> list[bytes]:
        if done or source != sender or body_type(data) != kind or LIAR not in (source, recipient):
            return [data]
        done.append(kind)
        return [BROKEN[how](data)]

    network.tap = tap
    with guard:
        network.run()
    return network


# What lets a broken message in, where it can be decoded.
LETS_IN: dict[tuple[str, str], Callable[[], AbstractContextManager[None]]] = {
    ("random length", "RoundKeys"): weaken.length_of_a_head,
    ("random length", "KeySet"): weaken.length_of_a_head,
    ("extended", "RoundKeys"): weaken.bytes_behind_a_body,
    ("extended", "KeySet"): weaken.bytes_behind_a_body,
    ("flipped", "RoundKeys"): weaken.signatures,
    ("flipped", "KeySet"): weaken.signatures,
    ("flipped", "UploadChunk"): weaken.digest_of_a_chunk,
}
CHUNKS = [(how, kind) for how in ("truncated", "extended") for kind in ("UploadChunk", "SumChunk")]


def let_in(kind: str, how: str, sender: str) -> Network | None:
    """Without the guard against it a broken message is taken; None if it ended a machine."""
    if guard := LETS_IN.get((how, kind)):
        return break_message(kind, how, sender, guard())
    ends = (how, kind) in CHUNKS
    with pytest.raises((FrameBroken, ValueError) if ends else SystemError):
        break_message(kind, how, sender, weaken.chunks() if ends else weaken.decoding_errors())
    return None


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("kind", ["RoundKeys", "UploadChunk"])
def test_broken_messages_of_a_node(how: str, kind: str) -> None:
    if weak := let_in(kind, how, LIAR):
        assert not weak.expelled
        if kind == "UploadChunk":
            assert not any(weak.sums.values())  # it spoils the sum, and nobody knows who did

    network = break_message(kind, how, LIAR, nullcontext())
    assert network.expelled == [LIAR]
    assert not set(network.faults) - {LIAR}
    for name in left(LIAR):
        assert check_sum(network, name) == left(LIAR)


@pytest.mark.parametrize(("how", "kind"), [(how, kind) for how in BROKEN for kind in ("KeySet", "SumChunk")])
def test_broken_messages_of_the_aggregator(how: str, kind: str) -> None:
    if (how, kind) != ("flipped", "SumChunk"):  # for which its digest, its record and its tags are missed: test_results
        weak = let_in(kind, how, AGGREGATOR)
        assert weak is None or (not weak.faults and LIAR in check_sum(weak, LIAR))

    network = break_message(kind, how, AGGREGATOR, nullcontext())
    assert set(network.faults) == {LIAR}
    fault = network.faults[LIAR]
    assert isinstance(fault, RemoteProtocolError)
    assert fault.peer == m.AGGREGATOR
    assert not network.sums[LIAR]
    for name in left(LIAR):
        check_sum(network, name)


def oversize(guard: AbstractContextManager[None]) -> tuple[Network, int]:
    """Eight mebibytes that claim to be the head of a message; gives how much of it was decoded."""
    network, counter = make_network(5, size=1500, threshold=4, minimum_cohort=4), weaken.CountingDecoder()
    liar = MaliciousNode(network, LIAR)
    liar.on("SealedSeeds")(lambda message, data: [(8 << 20).to_bytes(4) + bytes(8 << 20)])
    with guard, weaken.replaced(m, "_decoder", counter):
        network.run()
    return network, counter.most_bytes


def test_oversized_messages() -> None:
    assert oversize(weaken.message_limit())[1] == 8 << 20

    network, decoded = oversize(nullcontext())
    assert decoded < m.MESSAGE_LIMIT_BYTES
    assert network.expelled == [LIAR]
    assert check_sum(network, "hospital-01") == left(LIAR)


def tell_too_much(network: Network, guard: AbstractContextManager[None]) -> int:
    """The aggregator sends one node a head as large as a message may be, and so a larger message; gives what was decoded."""
    counter, size = weaken.CountingDecoder(), m.MESSAGE_LIMIT_BYTES
    large = size.to_bytes(4) + bytes(size)
    network.tap = lambda _, recipient, data: [large] if recipient == LIAR and body_type(data) == "RoundOpen" else [data]
    with guard, weaken.replaced(m, "_decoder", counter):
        network.run()
    return counter.most_bytes


def test_an_oversized_message_of_the_aggregator() -> None:
    assert tell_too_much(make_network(4), weaken.message_limit()) == m.MESSAGE_LIMIT_BYTES

    network = make_network(4)
    assert tell_too_much(network, nullcontext()) < m.MESSAGE_LIMIT_BYTES
    blamed(network, LIAR, "over the limit")


# --- limits that the design has: one malicious member, one round


def test_a_member_whose_shares_fit_no_secret_spoils_one_round_and_is_named() -> None:
    """Nobody can see before the unmasking that shares are wrong; then the round cannot be repeated."""
    network = make_network(5, size=1500, rounds=2, threshold=4, minimum_cohort=4)

    def deal_zeros(genuine: Any, self: AttemptNode, peer: str, shares: Shares) -> m.SealedSeeds:
        if shares.self_share is not None:
            shares = Shares(bytes(33), shares.pair_share, shares.tag_seed)
        return genuine(self, peer, shares)

    with behaving(lambda attempt: attempt._me == LIAR, _seal_for=deal_zeros):
        network.run()
    assert network.expelled == [LIAR]
    assert [summed.round for summed in network.sums["hospital-01"]] == [2]
    assert check_sum(network, "hospital-01", 2) == left(LIAR)


def test_false_complaints_cost_the_accuser_and_one_other_each_round() -> None:
    network = make_network(6, size=1500, rounds=2, threshold=4, minimum_cohort=4)
    liar = MaliciousNode(network, LIAR)
    liar.on("UploadChunk")(lambda message, data: [liar.sign(message, m.Complaint("hospital-04"))])
    network.run()
    for number in (1, 2):
        assert check_sum(network, "hospital-01", number) == ("hospital-01", "hospital-02", "hospital-03", "hospital-05")
    disputes = [line for line in network.lines if b'"Disputed"' in line]
    assert len(disputes) == 2
    assert all(b'"accuser":"hospital-00","accused":"hospital-04"' in line for line in disputes)


# --- who lied about shares: the digests that their owner signed tell


def test_a_dealer_of_one_wrong_share_disputes_with_its_holder_only() -> None:
    """The holder sees it before anything is masked. Nobody else can tell who lies, so both sit the round out; none is expelled."""
    network = make_network(6, size=1500, threshold=4, minimum_cohort=4)

    def deal_one_wrong(genuine: Any, self: AttemptNode, peer: str, shares: Shares) -> m.SealedSeeds:
        dealt = genuine(self, peer, shares)
        if peer == "hospital-03":
            wrong = genuine(self, peer, Shares(bytes(33), shares.pair_share, shares.tag_seed))
            dealt = msgspec.structs.replace(dealt, shares=wrong.shares)
        return dealt

    with behaving(lambda attempt: attempt._me == LIAR, _seal_for=deal_one_wrong):
        network.run()
    assert not network.expelled
    assert check_sum(network, "hospital-01") == ("hospital-01", "hospital-02", "hospital-04", "hospital-05")


def seal_contributions_of_no_master(guard: AbstractContextManager[None], *, own_digest: bool) -> Network:
    """A member seals other contributions than those that its pair master gives, and is gone before it uploads."""
    network = make_network(6, size=1500, rounds=2, threshold=4, minimum_cohort=4)

    def seal_another(genuine: Any, self: AttemptNode, peer: str, shares: Shares) -> m.SealedSeeds:
        dealt = genuine(self, peer, shares)
        if self._attempt.round > 1:
            return dealt
        info = sealing.contribution_info(self._attempt, self._cohort_digest, self._me, peer)
        other = sealing.seal(self._keys[peer].pair_public, bytes(32), info)
        digest = sealing.contribution_digest(bytes(32), self._attempt, self._me, peer)
        dealt = msgspec.structs.replace(dealt, contribution=other)
        return dealt if own_digest else msgspec.structs.replace(dealt, contribution_digest=digest)

    def tap(sender: str, _recipient: str, data: bytes) -> list[bytes]:
        if sender == LIAR and body_type(data) == "UploadChunk" and network.aggregator._round == 1:
            network._from_aggregator(network.aggregator.leave(LIAR, network.now))
            return []
        return [data]

    network.tap = tap
    with guard, behaving(lambda attempt: attempt._me == LIAR, _seal_for=seal_another):
        network.run()
    return network


def test_contributions_of_no_pair_master_spoil_one_attempt_and_their_sender_is_named() -> None:
    """Without the digest the sum would be garbage, and its record would show honest contributors only."""
    no_guard = weaken.replaced(sealing, "contribution_digest", lambda *_: bytes(32))
    network = seal_contributions_of_no_master(no_guard, own_digest=False)
    assert {type(network.faults[name]) for name in left(LIAR, 6)} == {VerificationFailed}

    network = seal_contributions_of_no_master(nullcontext(), own_digest=False)
    assert not network.faults
    assert network.expelled == [LIAR]
    assert [summed.round for summed in network.sums["hospital-01"]] == [1, 2]
    for number in (1, 2):
        assert check_sum(network, "hospital-01", number) == left(LIAR, 6)


def test_contributions_that_do_not_fit_their_digest_are_disputed_before_anything_is_masked() -> None:
    network = seal_contributions_of_no_master(nullcontext(), own_digest=True)
    assert not network.faults
    assert not network.expelled
    assert [line for line in network.lines if b'"Disputed"' in line]
    assert len(check_sum(network, "hospital-04", 1)) == 4


def lie_about_others(network: Network, liar: str) -> None:
    """The liar reveals its own share as it is, and nonsense of all others."""
    member = MaliciousNode(network, liar)

    @member.on("Unmasking")
    def lie(message: m.Message, _data: bytes) -> list[bytes]:
        shares = tuple((n, s if n == liar else bytes(33)) for n, s in message.body.self_shares)
        return [member.sign(message, m.Unmasking(shares, message.body.pair_shares))]


def share_digests_signed_by_owners() -> AbstractContextManager[None]:
    return weaken.replaced(AttemptAggregator, "_check_dealt", weaken.accept)


def test_one_wrong_share_among_just_enough_cannot_have_its_owner_expelled() -> None:
    def spoil(guard: AbstractContextManager[None]) -> Network:
        network = make_network(4, size=1500, threshold=3)
        lie_about_others(network, "hospital-02")
        MaliciousNode(network, "hospital-03").on("Unmasking")(lambda message, data: [])  # merely slow
        with guard:
            network.run()
        return network

    assert {"hospital-00", "hospital-01"} & set(spoil(share_digests_signed_by_owners()).expelled)

    assert spoil(nullcontext()).expelled == ["hospital-02"]


def test_the_first_of_many_holders_cannot_spoil_the_reconstruction() -> None:
    def spoil(guard: AbstractContextManager[None]) -> Network:
        network = make_network(13, size=1100)
        lie_about_others(network, LIAR)
        with guard:
            network.run()
        return network

    assert not spoil(share_digests_signed_by_owners()).sums["hospital-01"]

    network = spoil(nullcontext())
    assert network.expelled == [LIAR]
    assert check_sum(network, "hospital-01") == tuple(names(13))


def test_false_complaints_among_four_stop_rounds_and_expel_nobody() -> None:
    """A limit: nobody can tell who lies, and of four members two are fewer than any agreement allows to sum."""
    network = make_network(4, size=1500, rounds=2, threshold=3)
    liar = MaliciousNode(network, LIAR)
    liar.on("UploadChunk")(lambda message, data: [liar.sign(message, m.Complaint("hospital-03"))])
    network.run()
    assert not any(network.sums.values())
    assert not network.expelled
    assert not network.faults
    assert sum(b'"Disputed"' in line for line in network.lines) == 2


def test_a_member_that_builds_on_another_sum_is_named_by_the_aggregator() -> None:
    """Else it could have the others blame the aggregator for a story that it never told."""
    network = make_network(5, size=1500)
    liar = MaliciousNode(network, LIAR)
    liar.on("RoundKeys")(
        lambda message, data: [liar.sign(message, msgspec.structs.replace(message.body, last_record=bytes([1]) * 32))]
    )
    network.run()
    assert network.expelled == [LIAR]
    assert not network.faults
    assert check_sum(network, "hospital-01") == left(LIAR)
