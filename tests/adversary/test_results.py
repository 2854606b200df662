"""The sum and its record: changed, cut short or re-ordered sums, old sums, two stories, and sums for latecomers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from audit import records
from audit.attacks.forged import opened, resign
from audit.attacks.play import Bodies, Play, keep, record_bodies
from keys.errors import VerificationFailed
from keys.labels import Label
from protocols import messages as m
from protocols.chain import line_digest
from protocols.encoding import Uint32Vector
from protocols.prg import TAG_PRIME
from protocols.sealing import AttemptId
from protocols.tags import Tagger
from protocols.transcript import Dropped, RoundRecord, Survivor, receipt_statement, survivor_statement
from secgeo.records import RECEIPTS
from tests.adversary import weaken
from tests.adversary.attackers import MaliciousNode, behaving, wrong_sum
from tests.adversary.test_cohort import blamed
from tests.audit.factory import NOW, make_study
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, head, make_network, names
from tests.protocols.test_attempt import check_sum, expected

Guard = Callable[[], AbstractContextManager[None]]


def wrong(network: Network, name: str, number: int = 1) -> bool:
    """Whether the node has accepted a sum of this round that is not the sum of its contributors."""
    return any(
        np.abs(summed.total - expected(network, summed.contributors, number)).max() > 1e-3
        for summed in network.sums[name]
        if summed.round == number
    )


# --- 11


def one_more(total: Uint32Vector) -> Uint32Vector:
    total[7] += 1 << 16
    return total


def exchanged(total: Uint32Vector) -> Uint32Vector:
    total[:2000] = np.roll(total[:2000], 1)
    return total


def chunks_exchanged(total: Uint32Vector) -> Uint32Vector:
    total[:2048] = np.roll(total[:2048], 1024)
    return total


def cut_short(total: Uint32Vector) -> Uint32Vector:
    total[2048:] = total[2048]
    return total


def of_another_round(total: Uint32Vector) -> Uint32Vector:
    total[:] = np.random.default_rng(1).integers(1 << 24, 1 << 25, total.size)
    return total


CHANGES = [one_more, exchanged, chunks_exchanged, cut_short, of_another_round]


def announce(change: Callable[[Uint32Vector], Uint32Vector], guard: AbstractContextManager[None]) -> Play:
    attack = wrong_sum(make_network(4), change)
    with guard:
        attack.network.run()
    return attack


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_sum_with_a_consistent_signed_record(change: Callable[[Uint32Vector], Uint32Vector]) -> None:
    network = announce(change, weaken.sum_tags()).network
    assert all(wrong(network, name) for name in names(4))

    network = announce(change, nullcontext()).network
    assert not any(network.sums.values())
    for name in names(4):
        assert isinstance(network.faults[name], VerificationFailed)
        assert "does not match its tags" in str(network.faults[name])
        assert network.journals[name].receipts  # the signed lie is kept


def test_another_sum_of_tags_alone() -> None:
    network = make_network(4)
    wrong_sum(network, lambda total: total, retag=lambda tag: tag + 1)
    network.run()
    assert not any(network.sums.values())
    assert all("does not match its tags" in str(network.faults[name]) for name in names(4))


def test_the_opened_tag_is_that_of_the_sum_and_tells_nothing_else() -> None:
    """Which a member can compute from the sum itself: no carries, nothing of how the sum divides."""
    network = make_network(4, size=1500)
    attack = Play(network)
    seeds: list[bytes] = []

    @attack.tell("RoundResult")
    def look(message: m.Message, to: str) -> Bodies:
        seeds.append(network.journals[to].tag_seed(1, 1))
        tagger = Tagger(seeds[0], AttemptId(network.digest, 1, 1))
        total = opened(network, network.totals[1])
        parts = (tagger.part(total[start : start + 1024], start) for start in range(0, total.size, 1024))
        expected_tag = (sum(parts) + 4 * tagger.pad) % TAG_PRIME
        assert f'"aggregate_tag":"{expected_tag:016x}"'.encode() in message.body.record
        assert total.size == network.size  # nothing is opened but the values
        return keep(message)

    network.run()
    assert len(set(seeds)) == 1
    assert len(seeds) == 4


def test_a_sum_that_is_cut_off_for_ever() -> None:
    """Its last chunk never comes: without an end to its patience a node asks again and again."""

    def send(guard: AbstractContextManager[None]) -> tuple[Network, int]:
        network = make_network(4)
        attack, asked = Play(network), 0
        attack.tell("SumChunk")(lambda message, to: [] if message.body.index == 2 else keep(message))

        @attack.hear("Join")
        def count(message: m.Message, data: bytes) -> list[bytes]:
            nonlocal asked
            asked += 1
            network.aggregator._joins.clear()
            if asked > 400:  # enough is seen: let it come to an end
                attack._telling.clear()
            return [data]

        with guard:
            network.run()
        return network, asked

    assert send(weaken.patience())[1] > 400

    network, asked = send(nullcontext())
    assert asked <= 4 * 18
    for name in names(4):
        blamed(network, name, "keeps sending sums that are incomplete")


def double_everything(guard: AbstractContextManager[None]) -> Network:
    """Twice the sum with twice the sum of the tags, where that stays in the range of a sum: for values all below zero."""
    network = make_network(4)
    network.vectors = lambda name, _number: np.full(network.size, -5.0)  # type: ignore[assignment]
    wrong_sum(network, lambda total: total * np.uint32(2), retag=lambda tag: 2 * tag)
    with guard:
        network.run()
    return network


def test_a_multiple_of_the_sum_with_the_same_multiple_of_its_tags() -> None:
    network = double_everything(weaken.pads_of_tags())
    assert all(summed.total[0] > 0 for name in names(4) for summed in network.sums[name])
    assert not network.faults

    network = double_everything(nullcontext())
    assert not any(network.sums.values())
    assert {type(fault) for fault in network.faults.values()} == {VerificationFailed}


def test_a_colluding_member_takes_the_detection_away_and_nothing_else() -> None:
    """As docs say: who has the tag seed can make tags fit. The signed record stays as proof for an audit."""
    network = make_network(4)

    def difference() -> int:
        """What the change adds to the tag."""
        attempt = network.nodes["hospital-03"]._attempt
        tagger = Tagger(network.journals["hospital-03"].tag_seed(1, 1), attempt._attempt)  # type: ignore[union-attr]
        return tagger.part(one_more(np.zeros(network.size, np.uint32)))

    wrong_sum(network, one_more, retag=lambda tag: tag + difference())
    network.run()
    assert wrong(network, "hospital-00")
    assert not network.faults


# --- 8, an old sum


def send_old_sum(guard: Guard) -> Network:
    """A node loses its connection before it votes in round 2, and is sent the sum and record of round 1 as those of round 2."""
    network, victim = make_network(4, rounds=2, threshold=3), "hospital-03"
    attack, old = Play(network), []
    attack.hear("SurvivorVote")(lambda message, data: [] if (message.sender, message.round) == (victim, 2) else [data])
    attack.tell("Survivors")(lambda message, to: [] if (to, message.round) == (victim, 2) else keep(message))

    @attack.tell("SumChunk", "RoundResult")
    def replay(message: m.Message, to: str) -> Bodies:
        if to == victim and message.round == 1:
            old.append(keep(message))
        if to == victim and message.round == 2:
            if not isinstance(message.body, m.RoundResult):
                return []
            bodies = [pair for kept in old for pair in kept]
            old.clear()
            return bodies
        return keep(message)

    with guard():
        network.run()
    return network


def test_a_replayed_sum_of_an_old_round() -> None:
    assert wrong(send_old_sum(weaken.round_of_the_record), "hospital-03", 2)

    network = send_old_sum(nullcontext)
    assert not wrong(network, "hospital-03", 2)
    blamed(network, "hospital-03", "sent the record of another round")
    assert check_sum(network, "hospital-00", 2) == tuple(names(4))


def hold_back(network: Network, late: str) -> None:
    """What `late` is sent of the first sum is lost, and its asking for it too, until the second has come."""
    inner, second = network.tap, False

    def tap(sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        nonlocal second
        kind, number = body_type(data), head(data)[2]
        if recipient == late and kind == "RoundResult":
            second = second or number == 2
        lost = recipient == late and kind in ("SumChunk", "RoundResult") and number == 1
        asked = sender == late and kind == "Join" and network.aggregator._round > 0
        return [] if (lost or asked) and not second else inner(sender, recipient, data)

    network.tap = tap


def test_sums_are_applied_in_the_order_in_which_they_build_on_each_other() -> None:
    """A node that takes part in no sum is shown that of round 2 before it has that of round 1."""

    def show(guard: AbstractContextManager[None]) -> Network:
        network, late = make_network(4, rounds=3, threshold=3), "hospital-03"
        MaliciousNode(network, late).on("Ready")(lambda message, data: [])
        hold_back(network, late)
        with guard:
            network.run()
        return network

    weak = show(weaken.sequence_of_sums())
    assert 1 not in [summed.round for summed in weak.sums["hospital-03"]]

    network = show(nullcontext())
    for name in names(4):
        assert [summed.round for summed in network.sums[name]] == [1, 2, 3]
    assert not network.faults


# --- 17


def record_other_survivors(guard: AbstractContextManager[None]) -> Network:
    """One member is lost, and recorded in the place of another, whose vector is in the sum. All but the victim sign it."""
    network, victim, lost = make_network(6, threshold=5, minimum_cohort=5), "hospital-01", "hospital-05"
    attack = Play(network)
    attack.hear("UploadDone")(lambda message, data: [] if message.sender == lost else [data])

    @attack.tell("RoundResult")
    def another(message: m.Message, to: str) -> Bodies:
        if to != victim:
            return keep(message)
        record = record_bodies([message.body.record])[0]
        assert isinstance(record, RoundRecord)
        digests = {s.node_id: s.upload_digest for s in record.survivors if s.node_id != victim} | {lost: "00" * 32}
        statement = survivor_statement(
            AttemptId(network.digest, record.round, record.attempt),
            bytes.fromhex(record.senders_view),
            [(name, bytes.fromhex(digest)) for name, digest in digests.items()],
        )
        survivors = tuple(
            Survivor(
                node_id=name,
                upload_digest=digest,
                signature=network.identities[name].sign(Label.SURVIVORS, statement).hex(),
            )
            for name, digest in digests.items()
        )
        dropped = (Dropped(node_id=victim, phase="upload"),)
        line = resign(network.identities[AGGREGATOR], message.body.record, survivors=survivors, dropped=dropped)
        return [(m.RoundResult(line), b"")]

    with guard:
        network.run()
    return network


def test_a_record_of_other_survivors_than_the_node_voted_for() -> None:
    """It takes more colluders than are tolerated; the node that saw it still does not take another's sum for it."""
    assert wrong(record_other_survivors(weaken.memory_of_survivors()), "hospital-01")

    network = record_other_survivors(nullcontext())
    blamed(network, "hospital-01", "recorded another survivor set than the one we voted for")
    assert not network.sums["hospital-01"]
    assert check_sum(network, "hospital-00") == tuple(names(5))


def tell_two_stories(guard: AbstractContextManager[None]) -> tuple[Network, set[bytes]]:
    """One node gets the record that all get, and then another of the same round; gives what it has countersigned."""
    network = make_network(4)
    attack, signed = Play(network), set()

    @attack.tell("RoundResult")
    def both(message: m.Message, to: str) -> Bodies:
        if to != "hospital-01":
            return keep(message)
        other = resign(network.identities[AGGREGATOR], message.body.record, upload_bytes=1)
        attack.say(to, (message.round, 0), m.RoundResult(message.body.record))
        return [(m.RoundResult(other), b"")]

    @attack.hear("Receipt")
    def collect(message: m.Message, data: bytes) -> list[bytes]:
        if message.sender != "hospital-01":
            return [data]
        signed.add(message.body.signature)
        return []

    with guard:
        network.run()
    return network, signed


def fork_the_study(guard: AbstractContextManager[None]) -> Network:
    """One node is told that round 1 was lost; the others apply its sum. Then all are asked to go on together."""
    network, victim = make_network(4, rounds=2), "hospital-01"
    attack = Play(network)
    attack.loosen()

    @attack.tell("SumChunk", "RoundResult")
    def lost(message: m.Message, to: str) -> Bodies:
        if (to, message.round) != (victim, 1):
            return keep(message)
        if isinstance(message.body, m.RoundResult):
            attack.say(to, (1, 1), m.AttemptFailed("too few votes", final=True))
        return []

    @attack.tell("RoundOpen")
    def as_if_lost(message: m.Message, to: str) -> Bodies:
        return [(m.RoundOpen(0), b"")] if (to, message.round) == (victim, 2) else keep(message)

    with guard:
        network.run()
    return network


def test_a_round_that_one_node_takes_for_lost_and_others_have_applied() -> None:
    network = fork_the_study(weaken.last_records())
    assert not network.faults
    assert [summed.round for summed in network.sums["hospital-00"]] == [1, 2]
    assert [summed.round for summed in network.sums["hospital-01"]] == [2]  # on top of another model

    network = fork_the_study(nullcontext())
    for name in names(4):
        assert 2 not in [summed.round for summed in network.sums[name]]
    blamed(network, "hospital-00", "told hospital-01 another story about the last sum than us")
    blamed(network, "hospital-01", "told hospital-00 another story about the last sum than us")


def test_a_node_that_sees_two_records_of_one_round() -> None:
    network, signed = tell_two_stories(weaken.memory_of_records())
    assert "hospital-01" not in network.faults
    assert len(signed) == 2

    network, signed = tell_two_stories(nullcontext())
    blamed(network, "hospital-01", "signed two different records of round 1")
    assert len(signed) == 1
    assert len({line for _, line in network.journals["hospital-01"].receipts}) == 2  # kept as proof
    assert check_sum(network, "hospital-00") == tuple(names(4))


def test_an_audit_of_two_stories(tmp_path: Path) -> None:
    """Each node was shown one record only; together their receipts prove that there were two."""
    study = make_study(4)
    folder = study.write(tmp_path / "records")
    path = folder / RECEIPTS / f"{study.names[1]}.jsonl"
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([resign(study.consortium.identities["aggregator"], first, upload_bytes=1), *rest]))
    study.seal(folder)

    def verify() -> records.VerificationReport:
        fingerprint = study.consortium.authority.fingerprint
        return records.verify_folder(folder, authority_fingerprint=fingerprint, now=NOW + timedelta(days=1))

    with weaken.replaced(records, "_verify_receipts", lambda *_: {1}):
        assert verify().ok

    failed = [check for check in verify().checks if not check.ok]
    assert [check.name for check in failed] == [f"{RECEIPTS}/{study.names[1]}.jsonl"]
    assert "EQUIVOCATION" in failed[0].detail


# --- 19


def deal_two_seeds(guard: AbstractContextManager[None]) -> tuple[Network, str]:
    """The dealer whose seed counts deals another one to a single node."""
    network, victim, dealer = make_network(6, threshold=4, minimum_cohort=4), "hospital-04", []

    def lie(genuine, self, peer, shares):  # type: ignore[no-untyped-def]
        first = next(name for name in self._graph.dealers if name != victim)
        if self._me == first and peer == victim:
            dealer.append(self._me)
            shares = type(shares)(shares.self_share, shares.pair_share, bytes(32))
        return genuine(self, peer, shares)

    with guard, behaving(lambda attempt: attempt._attempt.attempt == 1, _seal_for=lie):
        network.run()
    return network, dealer[0]


def test_a_dealer_that_deals_two_tag_seeds() -> None:
    # The victim's own seed may count, if it is the first dealer; then the lie has no effect. Try until it is not.
    network = next(n for n, _ in (deal_two_seeds(weaken.dealt_tag_seeds()) for _ in range(20)) if n.faults)
    assert all(isinstance(fault, VerificationFailed) for fault in network.faults.values())
    assert not any(network.sums.values())  # one liar has spoilt the sum for all, and nobody is named

    network, dealer = deal_two_seeds(nullcontext())
    assert not network.faults
    dispute = f'"type":"Disputed","round":1,"attempt":1,"accuser":"hospital-04","accused":"{dealer}"'.encode()
    assert dispute in b"".join(network.lines)
    for name in set(names(6)) - {dealer, "hospital-04"}:
        assert set(check_sum(network, name)) == set(names(6)) - {dealer, "hospital-04"}


# --- 20


def feed_a_latecomer(
    guard: Guard, colluders: tuple[str, ...] = (), forged: tuple[str, ...] = (), *, repeat: bool = False
) -> Network:
    """A node that took no part is sent a changed sum with a consistent record, and receipts of colluders for it."""
    network, late = make_network(6, threshold=5, minimum_cohort=5), "hospital-05"

    def receipts(line: bytes) -> tuple[tuple[str, bytes], ...]:
        statement = receipt_statement(network.digest, 1, line_digest(line))
        signed = [(n, network.identities[n].sign(Label.RECEIPT, statement)) for n in colluders]
        return (*signed, *((n, bytes(64)) for n in forged)) * (4 if repeat else 1)

    wrong_sum(network, one_more, victims=[late], receipts=receipts)
    MaliciousNode(network, late).on("Ready")(lambda message, data: [])
    with guard():
        network.run()
    return network


COLLUDERS = ("hospital-00", "hospital-01", "hospital-02")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, ""),
        ({"colluders": COLLUDERS}, ""),
        ({"colluders": COLLUDERS, "repeat": True}, ""),
        ({"colluders": (*COLLUDERS, "hospital-05")}, ""),
        ({"colluders": COLLUDERS, "forged": ("hospital-03",)}, "a receipt that hospital-03 never signed"),
    ],
)
def test_a_sum_for_a_latecomer_with_too_few_receipts(options: dict, fault: str) -> None:
    assert wrong(feed_a_latecomer(weaken.receipts_of_contributors, **options), "hospital-05")

    network = feed_a_latecomer(nullcontext, **options)
    assert not network.sums["hospital-05"]
    if fault:
        blamed(network, "hospital-05", fault)
    else:
        assert (
            not network.faults
        )  # too few may be the fault of a contributor that withholds its receipt, or has crashed
    assert check_sum(network, "hospital-00") == tuple(names(5))
