"""How the hospitals of a study come to hold one key, and the aggregator does not, whoever fails or lies on the way."""

from __future__ import annotations

import contextlib
import gc
import types
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from audit.attacks.forged import resign
from audit.attacks.knowledge import peek
from keys.errors import LocalProtocolError, RemoteProtocolError, VerificationFailed
from protocols import messages as m
from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols.agreement import read_agreement, write_agreement
from protocols.attempt_aggregator import Phase
from protocols.bfv import Cipher, InProcess, generate_key
from protocols.ciphertexts import pack_words
from protocols.packing import DEGREE, BfvParameters, choose
from protocols.rings import make_ring
from protocols.sealing import AttemptId, SealBroken
from protocols.study_key import Box, StudyKey
from tests.adversary import weaken
from tests.adversary.attackers import MaliciousNode
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, body_type, head, make_network, names
from tests.protocols.test_attempt import check_sum

DIGEST = bytes(range(32))
LIAR = "hospital-00"

encrypted = pytest.mark.parametrize("protocol", ["layered", "homomorphic"], indirect=True)
layered = pytest.mark.parametrize("protocol", ["layered"], indirect=True)


def study(**settings: Any) -> Network:
    return make_network(4, size=100, threshold=3, **settings)


def keys(network: Network) -> set[bytes]:
    return {node._study_key.id for node in network.nodes.values() if node._study_key is not None}


def everyone_is_served(network: Network, whom: Sequence[str] = names(4), rounds: int = 1) -> None:
    for name in whom:
        assert [summed.round for summed in network.sums[name]] == list(range(1, rounds + 1))
    assert not network.faults
    assert len({network.nodes[name]._study_key.id for name in whom}) == 1  # type: ignore[union-attr]


def makers(network: Network) -> list[object]:
    return [progress.fields["maker"] for progress in network.progress if progress.event == "study key"]


def drop(network: Network, sender: str, *kinds: str, first: int = 10**9) -> None:
    """Lose the first messages of these kinds that a party sends."""
    inner, lost = network.tap, 0

    def tap(source: str, recipient: str, data: bytes) -> Sequence[bytes]:
        nonlocal lost
        if source == sender and body_type(data) in kinds and lost < first:
            lost += 1
            return []
        return inner(source, recipient, data)

    network.tap = tap


# --- the key and its seals


def test_a_sealed_key_opens_in_one_box_from_one_dealer_and_under_its_own_id_only() -> None:
    key, other = StudyKey(b"a secret key"), StudyKey(b"another one")
    coins = iter([b"1" * 32, b"2" * 32])
    box, elsewhere = (Box(lambda _: next(coins), DIGEST) for _ in range(2))
    sealed = key.seal(box.public, DIGEST, "a", "b")
    assert box.open(sealed, "a", "b", key.id).secret == b"a secret key"
    for wrong in (
        lambda: elsewhere.open(sealed, "a", "b", key.id),
        lambda: box.open(sealed, "c", "b", key.id),
        lambda: box.open(sealed, "a", "c", key.id),
        lambda: box.open(sealed, "a", "b", other.id),
        lambda: box.open(sealed[:-1], "a", "b", key.id),
        lambda: Box(lambda _: b"1" * 32, bytes(32)).open(sealed, "a", "b", key.id),
    ):
        with pytest.raises(SealBroken):
            wrong()


def test_a_dealer_cannot_seal_another_key_under_the_same_id() -> None:
    key, other = StudyKey(b"a secret key"), StudyKey(b"another one")
    other.id = key.id  # it lies
    box = Box(lambda _: b"1" * 32, DIGEST)
    with pytest.raises(SealBroken):
        box.open(other.seal(box.public, DIGEST, "a", "b"), "a", "b", key.id)


def test_a_key_is_not_shown_and_not_pickled() -> None:
    key = StudyKey(b"secret" * 20)
    assert "secret" not in repr(key)
    with pytest.raises(LocalProtocolError):
        key.__reduce__()


def test_tag_seeds_and_pads_differ_by_attempt_and_name() -> None:
    key, attempts = StudyKey(b"a secret key"), [AttemptId(DIGEST, number, 1) for number in (1, 2)]
    assert len({key.tag_seed(attempt) for attempt in attempts}) == 2
    assert len({key.tag_pad(attempt, name) for attempt in attempts for name in ("a", "b")}) == 4


# --- who has it


@encrypted
def test_one_hospital_makes_the_key_and_all_others_get_it(protocol: str) -> None:
    network, wire = study(rounds=2), bytearray()

    def tap(_sender: str, _recipient: str, data: bytes) -> list[bytes]:
        wire.extend(data)
        return [data]

    network.tap = tap
    network.run()
    everyone_is_served(network, rounds=2)
    assert makers(network) == [LIAR]
    secret = network.nodes[LIAR]._study_key.secret  # type: ignore[union-attr]
    assert all(secret[place : place + 24] not in wire for place in range(0, len(secret) - 24, 24))


def reachable(thing: object) -> list[object]:
    """Everything that an object holds, directly or not; classes and modules aside."""
    found, waiting = {id(thing): thing}, [thing]
    while waiting:
        for item in gc.get_referents(waiting.pop()):
            if id(item) not in found and not isinstance(item, type | types.ModuleType | types.FunctionType):
                found[id(item)] = item
                waiting.append(item)
    return list(found.values())


def holds(machine: object, secret: bytes) -> bool:
    for item in reachable(vars(machine)):
        if isinstance(item, bytes | bytearray | np.ndarray):
            data = item.tobytes() if isinstance(item, np.ndarray) else bytes(item)
            if secret[:64] in data:
                return True
    return False


@encrypted
def test_the_aggregator_holds_no_key_and_cannot_decrypt(protocol: str) -> None:
    network = study()
    machine = network.aggregator
    network.start()
    while machine._attempt is None or machine._attempt.phase is not Phase.VOTES:
        network._deliver(*network._queue.popleft())
    secret = network.nodes[LIAR]._study_key.secret  # type: ignore[union-attr]
    assert not holds(machine, secret)
    network.finish()
    assert not holds(machine, secret)
    machine._keys._said["a place for it"] = b"..." + secret
    assert holds(machine, secret)
    total = network.totals[1]
    with pytest.raises(LocalProtocolError, match="no key"):
        machine._ring.open(total, network.size)
    # Nor does a key that it makes itself open the sum; nor do the zeros of a ciphertext without its second half.
    parameters = choose(24, 4).parameters
    with pytest.raises(VerificationFailed):
        make_ring(network.agreement, InProcess(), generate_key(parameters)).open(total, network.size)
    opened = make_ring(network.agreement, InProcess(), secret).open(total, network.size)
    assert opened.max() < 4 << 24


@encrypted
def test_a_node_that_comes_later_gets_the_key_from_one_that_holds_it(protocol: str) -> None:
    network, late = study(rounds=3), "hospital-03"
    drop(network, late, "Join", first=1)
    network.start()
    while network.aggregator._round < 1:
        network._deliver(*network._queue.popleft()) if network._queue else network.pass_time()
    network.restart_node(late)
    network.finish()
    everyone_is_served(network, rounds=3)
    assert late in network.sums[LIAR][-1].contributors


@encrypted
def test_a_restarted_node_has_the_key_from_its_journal(protocol: str) -> None:
    network, asked = study(rounds=2), []
    network.start()
    while network.aggregator._round < 2:
        network._deliver(*network._queue.popleft())
    network.tap = lambda _s, _r, data: [data] if body_type(data) != "DealKey" else asked.append(data) or []
    network.restart_node("hospital-02")
    network.finish()
    everyone_is_served(network, rounds=2)
    assert not asked


@encrypted
@pytest.mark.parametrize("when", [0, 1], ids=["before the first sum", "after it"])
def test_the_key_outlives_a_crash_of_the_aggregator(protocol: str, when: int) -> None:
    network = study(rounds=2)
    network.start()
    while network.aggregator._round < 1 + when:
        network._deliver(*network._queue.popleft())
    before = keys(network)
    network.restart_aggregator()
    network.finish()
    everyone_is_served(network, rounds=2)
    assert keys(network) == before
    assert len(makers(network)) == 1


# --- who fails or lies


@encrypted
def test_a_maker_that_vanishes_is_replaced(protocol: str) -> None:
    network = study()
    drop(network, LIAR, "Join", "SealedKey")
    drop(network, AGGREGATOR, "DealKey", first=1)
    network.run()
    left = names(4)[1:]
    everyone_is_served(network, left)
    assert makers(network)[-1] != LIAR


@encrypted
def test_a_member_that_claims_a_key_and_deals_none_costs_two_deadlines(protocol: str) -> None:
    """It says before everybody else that it has one: an id that it made up. The study goes on with or without it."""
    network = study()
    liar = MaliciousNode(network, LIAR)
    liar.on("Join")(lambda message, _data: [liar.sign(message, m.Join(1, b"?" * 32, message.body.box))])
    liar.on("SealedKey")(lambda message, data: [])
    network.run()
    left = names(4)[1:]
    assert not set(network.faults) - {LIAR}
    for name in left:
        assert check_sum(network, name) == tuple(left)
    assert network.now <= 50.0


@encrypted
def test_a_member_cannot_take_the_making_of_the_key_from_the_one_that_was_asked(protocol: str) -> None:
    """Whenever somebody is asked to make it, the liar says first that it has one."""
    network = study()
    box = network.nodes[LIAR]._box
    assert box is not None

    def tap(sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        kind = body_type(data)
        if kind == "DealKey" and recipient != LIAR:
            network.inject(LIAR, AGGREGATOR, said(network, LIAR, m.Join(1, b"?" * 32, box.public)))
        return [] if sender == LIAR else [data]

    network.tap = tap
    drop(network, LIAR, "Join")
    network.run()
    left = names(4)[1:]
    for name in left:
        assert check_sum(network, name) == tuple(left)
    assert len(makers(network)) == 1


def asked_to_deal(outputs: Sequence[agg.Output]) -> list[str]:
    return [out.peer for out in outputs if isinstance(out, agg.SendTo) and body_type(out.data) == "DealKey"]


@encrypted
def test_a_dealer_that_leaves_or_stays_silent_is_replaced(protocol: str) -> None:
    network, late = study(rounds=2), "hospital-03"
    drop(network, late, "Join")
    network.start()
    while network.aggregator._round < 1:
        network._deliver(*network._queue.popleft()) if network._queue else network.pass_time()
    box = network.nodes[late]._box
    assert box is not None
    outputs = network.aggregator.receive(late, said(network, late, m.Join(1, m.NO_KEY, box.public)), network.now)
    (first,) = asked_to_deal(outputs)
    (second,) = asked_to_deal(network.aggregator.leave(first, network.now))
    assert second != first
    network._from_aggregator(network.aggregator.receive(first, said_join(network, first), network.now))
    assert asked_to_deal(network.aggregator._next_round(network.now)) not in ([], [second])


def said_join(network: Network, name: str) -> bytes:
    """What a node says when it connects."""
    (join, *_) = network.nodes[name].start()
    assert isinstance(join, node.Send)
    return join.data


@encrypted
def test_a_dealer_that_seals_rubbish_is_passed_over(protocol: str) -> None:
    network, late = study(rounds=2), "hospital-03"
    liar = MaliciousNode(network, LIAR)

    def rubbish(message: m.Message, data: bytes) -> list[bytes]:
        body = message.body
        mine = body.recipient == late
        return [liar.sign(message, m.SealedKey(body.recipient, body.key_id, bytes(2000)))] if mine else [data]

    liar.on("SealedKey")(rubbish)
    network.run()
    everyone_is_served(network, rounds=2)


@encrypted
@pytest.mark.parametrize("liar_name", [LIAR, "hospital-03"], ids=["who was asked to make it", "who claims one first"])
def test_a_liar_that_seals_rubbish_to_everybody_does_not_stop_the_study(protocol: str, liar_name: str) -> None:
    """The honest are heard however often they say that it was no key: nobody answers the same Join twice."""
    network = make_network(5, size=100, threshold=4, minimum_cohort=4)
    liar = MaliciousNode(network, liar_name)
    liar.on("SealedKey")(
        lambda message, _: [liar.sign(message, m.SealedKey(message.body.recipient, message.body.key_id, bytes(2000)))]
    )
    if liar_name != LIAR:
        network.journals[liar_name].secret = generate_key(choose(24, 5).parameters)
        network.nodes[liar_name] = network.new_node(liar_name)
    network.run(order=lambda all_names: [liar_name, *(name for name in all_names if name != liar_name)])
    everyone_is_served(network, [name for name in names(5) if name != liar_name])


def words(value: int) -> bytes:
    """The transform of the constant polynomial `value`."""
    parameters = choose(24, 5).parameters
    return pack_words(np.full((1, DEGREE), value, dtype=np.uint64), parameters)


NO_KEYS = {"short": b"not a key", "empty": b"", "words above q": b"\xff" * 28672, "zero": words(0), "one": words(1)}
"""Under the key 0 everybody reads every ciphertext, and under a constant one nearly so."""


def study_with_a_bad_key(secret: bytes) -> Network:
    network = make_network(5, size=100, threshold=4, minimum_cohort=4)
    liar, bad = MaliciousNode(network, LIAR), StudyKey(secret)

    def deal(message: m.Message, _: bytes) -> list[bytes]:
        recipient = message.body.recipient
        box = network.nodes[recipient]._box
        assert box is not None
        sealed = bad.seal(box.public, network.digest, LIAR, recipient)
        return [liar.sign(message, m.SealedKey(recipient, bad.id, sealed))]

    liar.on("Join")(
        lambda message, data: (
            [data] if message.body.study_key == m.NO_KEY else [liar.sign(message, m.Join(1, bad.id, message.body.box))]
        )
    )
    liar.on("SealedKey")(deal)
    return network


@encrypted
@pytest.mark.parametrize("secret", NO_KEYS.values(), ids=NO_KEYS.keys())
def test_bytes_that_are_no_key_are_taken_by_nobody(protocol: str, secret: bytes) -> None:
    network = study_with_a_bad_key(secret)
    network.run()
    everyone_is_served(network, names(5)[1:])
    assert secret not in {journal.secret for name, journal in network.journals.items() if name != LIAR}


@encrypted
def test_without_a_look_at_the_key_zero_would_be_taken(protocol: str) -> None:
    network = study_with_a_bad_key(NO_KEYS["zero"])
    with weaken.replaced(InProcess, "is_key", lambda *_: True):
        network.run()
    assert NO_KEYS["zero"] in {journal.secret for name, journal in network.journals.items() if name != LIAR}


def next_epoch(network: Network) -> Network:
    """The same hospitals under the agreement of the next epoch."""
    roster = msgspec.structs.replace(network.agreement.roster, epoch=network.agreement.roster.epoch + 1)
    agreement = read_agreement(write_agreement(msgspec.structs.replace(network.agreement, roster=roster)))
    return Network(network.consortium, agreement, network.vectors, network.size)


@encrypted
def test_another_agreement_has_another_key(protocol: str) -> None:
    old = study()
    old.run()
    new = next_epoch(old)
    new.run()
    everyone_is_served(new)
    assert len(keys(old)) == len(keys(new)) == 1
    assert keys(old) != keys(new)


def test_a_seal_under_another_agreement_opens_nothing() -> None:
    """Not even in the same box, which no process has twice."""
    key, box = StudyKey(b"a secret key"), Box(lambda _: b"1" * 32, DIGEST)
    assert box.open(key.seal(box.public, DIGEST, "a", "b"), "a", "b", key.id).secret == key.secret
    with pytest.raises(SealBroken):
        box.open(key.seal(box.public, bytes(32), "a", "b"), "a", "b", key.id)


@encrypted
def test_a_key_dealt_under_another_agreement_is_the_aggregators_fault(protocol: str) -> None:
    """It brings a member's message of the epoch before, word for word."""
    old, kept = study(), []

    def tap(_sender: str, recipient: str, data: bytes) -> list[bytes]:
        if body_type(data) == "DealtKey":
            kept.append((recipient, data))
        return [data]

    old.tap = tap
    old.run()
    name, brought = kept[0]
    sealed = m.decode(brought, AGGREGATOR, old.consortium.roster.entry(AGGREGATOR).public_key, old.digest).body
    new = next_epoch(old)
    new.start()
    with pytest.raises(RemoteProtocolError, match="never signed"):
        handed(new, name, sealed)


@encrypted
def test_a_member_that_claims_another_key_after_a_crash_of_the_aggregator_stops_nobody(protocol: str) -> None:
    """It joins again first, in round 1; all honest hospitals hold one key, and an honest maker deals that one again."""
    network = make_network(5, size=100, threshold=4, minimum_cohort=4, rounds=2)
    network.start()
    while network.aggregator._round < 1 or not all(machine._round for machine in network.nodes.values()):
        network._deliver(*network._queue.popleft())
    before = keys(network)
    liar = MaliciousNode(network, LIAR)
    liar.on("Join")(lambda message, _: [liar.sign(message, m.Join(1, b"?" * 32, message.body.box))])
    liar.on("SealedKey")(lambda *_: [])
    network.restart_aggregator()
    network.finish()
    everyone_is_served(network, names(5)[1:], rounds=2)
    assert keys(network) == before


@encrypted
def test_a_key_under_which_we_have_voted_stays_after_a_restart(protocol: str) -> None:
    network, name = study(), "hospital-01"
    network.start()
    while not network.journals[name].ballot(1):
        network._deliver(*network._queue.popleft()) if network._queue else network.pass_time()
    before = network.journals[name].secret
    restarted = network.new_node(name)
    other, box = StudyKey(generate_key(choose(24, 4).parameters)), restarted._box
    assert box is not None
    sealed = m.SealedKey(name, other.id, other.seal(box.public, network.digest, LIAR, name))
    network.nodes[name] = restarted
    assert handed(network, name, m.DealtKey(said(network, LIAR, sealed))) == []
    assert network.journals[name].secret == before


class Counting(InProcess):
    """Counts the ciphers that were made: each is a process for each core, with its memory."""

    def __init__(self) -> None:
        self.made = 0

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        self.made += 1
        return super().cipher(parameters, key)


@encrypted
def test_keys_that_are_dealt_again_and_again_take_no_processes(protocol: str) -> None:
    """The same key, and many keys of a colluding member, with chunks of sums in between."""
    network, name, ciphers = study(), "hospital-01", Counting()
    network.nodes[name] = machine = network.new_node(name, ciphers)
    box, first = machine._box, None
    assert box is not None
    for number in range(30):
        key = StudyKey(generate_key(choose(24, 4).parameters))
        first = first or key
        sealed = m.SealedKey(name, key.id, key.seal(box.public, network.digest, LIAR, name))
        handed(network, name, m.DealtKey(said(network, LIAR, sealed)))
        if number > 20:
            chunk = m.encode(
                network.consortium.identities[AGGREGATOR],
                AttemptId(network.digest, 1, 0),
                m.SumChunk(0, m.chunk_digest(b"")),
                b"",
            )
            with contextlib.suppress(RemoteProtocolError):
                machine.receive(chunk)
    assert ciphers.made <= 1


def test_messages_of_an_attempt_before_a_restart_are_nobodys_fault() -> None:
    """In `homomorphic` an attempt is opened and credit given at once: both may reach the node's next life."""
    network, name = study(protocol="homomorphic"), "hospital-01"
    network.start()
    while not any(body_type(data) == "AttemptOpen" and recipient == name for _, recipient, data in network._queue):
        network._deliver(*network._queue.popleft())
    waiting = [data for _, recipient, data in network._queue if recipient == name]
    assert [body_type(data) for data in waiting] == ["AttemptOpen", "Credit"]
    restarted = network.new_node(name)
    restarted.start()
    assert [restarted.receive(data) for data in waiting] == [[], []]


@encrypted
def test_who_asks_for_rounds_that_are_not_agreed_keeps_no_dealer_busy(protocol: str) -> None:
    network, liar_name = make_network(5, size=100, threshold=4, minimum_cohort=4, rounds=2), "hospital-04"
    network.start()
    while network.aggregator._round < 1:
        network._deliver(*network._queue.popleft())
    box, asked = network.nodes[liar_name]._box, 0
    assert box is not None
    for number in range(1, 3000):
        join = said(network, liar_name, m.Join(number, m.NO_KEY, box.public))
        outputs = network.aggregator.receive(liar_name, join, network.now)
        asked += sum(isinstance(out, agg.SendTo) and body_type(out.data) == "DealKey" for out in outputs)
    assert asked < 4 * agg.MAX_REPEATED_JOINS
    assert liar_name in network.aggregator._out


@encrypted
def test_a_second_record_under_another_key_is_kept_as_proof(protocol: str) -> None:
    network, name = study(rounds=2), "hospital-01"
    network.start()
    while not network.sums[name]:
        network._deliver(*network._queue.popleft())
    identity = network.consortium.identities[AGGREGATOR]
    second = resign(identity, network.sums[name][0].line, study_key="0" * 64)
    with pytest.raises(RemoteProtocolError, match="two different records"):
        network.nodes[name].receive(m.encode(identity, AttemptId(network.digest, 1, 0), m.RoundResult(second)))
    assert second in {line for _, line in network.journals[name].receipts}


@layered
def test_those_who_wait_for_the_key_are_told_the_end(protocol: str) -> None:
    network = study()
    for name in names(4):
        MaliciousNode(network, name).on("SealedKey")(lambda *_: [])
    network.run()
    assert network.ended.keys() == set(names(4))


@encrypted
def test_keys_that_nobody_was_asked_for_are_not_carried(protocol: str) -> None:
    """Neither the study key from a member that was not asked, nor another key from the one that was."""
    network, carried = study(), []
    other = StudyKey(generate_key(choose(24, 4).parameters))

    def push(sender: str, key: StudyKey) -> bytes:
        box = network.nodes["hospital-03"]._box
        assert box is not None
        sealed = key.seal(box.public, network.digest, sender, "hospital-03")
        return said(network, sender, m.SealedKey("hospital-03", key.id, sealed))

    def tap(sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        kind = body_type(data)
        if kind == "DealtKey":
            relayed = peek(head(data)[5][1])
            assert relayed is not None
            carried.append((relayed.sender, relayed.body.key_id))
        if sender == LIAR and kind == "SealedKey":
            return [push(LIAR, other), data]
        known = network.nodes["hospital-01"]._study_key
        if sender == "hospital-01" and known is not None and kind in ("Join", "Ready"):
            return [data, push(sender, known)]
        return [data]

    network.tap = tap
    network.run()
    everyone_is_served(network)
    assert set(carried) == {(LIAR, keys(network).pop())}


def two_keys(network: Network) -> None:
    """The aggregator has a second key made, and deals it to one of the hospitals behind the back of the others."""
    victim = "hospital-03"
    own = StudyKey(generate_key(choose(24, 4).parameters))
    colluder = network.consortium.identities["hospital-01"]

    def tap(sender: str, recipient: str, data: bytes) -> list[bytes]:
        if (sender, body_type(data)) == (victim, "Join") and network.nodes[victim]._study_key is not None:
            # The victim says which key it has; the aggregator does as if it were that of the others.
            box = network.nodes[victim]._box
            assert box is not None
            join = m.Join(1, network.aggregator._keys.key, box.public)
            return [m.encode(network.consortium.identities[victim], AttemptId(network.digest, 0, 0), join)]
        if (recipient, body_type(data)) == (victim, "DealtKey"):
            box = network.nodes[victim]._box
            assert box is not None
            sealed = own.seal(box.public, network.digest, colluder.node_id, victim)
            given = m.encode(colluder, AttemptId(network.digest, 0, 0), m.SealedKey(victim, own.id, sealed))
            aggregator = network.consortium.identities[AGGREGATOR]
            return [m.encode(aggregator, AttemptId(network.digest, 0, 0), m.DealtKey(given))]
        return [data]

    network.tap = tap


@encrypted
def test_nobody_sums_with_a_hospital_that_was_dealt_another_key(protocol: str) -> None:
    """Of the keys that two hospitals hold the aggregator may know one, by a colluder. Their uploads name the key."""
    network = study()
    two_keys(network)
    network.run()
    assert len(keys(network)) == 2
    assert not network.sums["hospital-03"]
    assert ("another set of round keys" if protocol == "layered" else "other senders") in network.aggregator._out[
        "hospital-03"
    ]
    for name in names(4)[:3]:
        assert check_sum(network, name) == tuple(names(4)[:3])


# --- what a node refuses


def handed(network: Network, name: str, body: m.AnyBody, number: int = 0) -> Any:
    """Let a node receive a body of the aggregator's."""
    aggregator = network.consortium.identities[AGGREGATOR]
    return network.nodes[name].receive(m.encode(aggregator, AttemptId(network.digest, number, 0), body))


def said(network: Network, name: str, body: m.AnyBody) -> bytes:
    return m.encode(network.consortium.identities[name], AttemptId(network.digest, 0, 0), body)


@layered
def test_keys_and_requests_that_members_never_signed_are_the_aggregators_fault(protocol: str) -> None:
    network = study()
    victim = "hospital-01"
    box = network.nodes[victim]._box
    assert box is not None
    key = StudyKey(generate_key(choose(24, 4).parameters))
    sealed = m.SealedKey(victim, key.id, key.seal(box.public, network.digest, LIAR, victim))
    genuine = said(network, LIAR, sealed)
    cases = [
        (m.DealtKey(genuine[:-1] + b"!"), "never signed"),
        (m.DealtKey(b"rubbish"), "a stranger"),
        (m.DealtKey(said(network, AGGREGATOR, sealed)), "a stranger"),
        (m.DealtKey(said(network, LIAR, m.Ready())), "instead of a key"),
        (m.DealtKey(said(network, LIAR, m.SealedKey("hospital-02", key.id, b"x"))), "sealed to hospital-02"),
        (m.DealKey((), make=False), "that we do not have"),
        (m.DealKey((said(network, LIAR, m.Ready()),), make=True), "instead of Join"),
        (m.DealKey((b"rubbish",), make=True), "a stranger"),
    ]
    with pytest.raises(RemoteProtocolError, match="before we had the study key"):
        handed(network, victim, m.RoundOpen(0), number=1)
    for body, fault in cases:
        with pytest.raises(RemoteProtocolError, match=fault) as caught:
            handed(network, victim, body)
        assert caught.value.peer == m.AGGREGATOR
    handed(network, victim, m.DealtKey(genuine))
    assert network.nodes[victim]._study_key.id == key.id  # type: ignore[union-attr]


@layered
def test_no_key_takes_the_place_of_one_under_which_a_round_was_opened(protocol: str) -> None:
    network = study(rounds=2)
    network.start()
    while network.aggregator._round < 1 or network._queue:
        network._deliver(*network._queue.popleft())
        if network.nodes["hospital-01"]._round:
            break
    before = network.nodes["hospital-01"]._study_key
    other, box = StudyKey(generate_key(choose(24, 4).parameters)), network.nodes["hospital-01"]._box
    assert box is not None
    sealed = m.SealedKey("hospital-01", other.id, other.seal(box.public, network.digest, LIAR, "hospital-01"))
    assert handed(network, "hospital-01", m.DealtKey(said(network, LIAR, sealed))) == []
    assert network.nodes["hospital-01"]._study_key is before
    network.finish()
    everyone_is_served(network, rounds=2)


def test_a_masked_study_has_no_key_to_deal() -> None:
    network = study()
    for body in (m.DealKey((), make=True), m.DealtKey(b"")):
        with pytest.raises(RemoteProtocolError, match="a study that has none"):
            handed(network, LIAR, body)


@layered
def test_no_key_is_made_in_the_midst_of_a_study(protocol: str) -> None:
    network = study(rounds=2)
    network.run()
    network.journals[LIAR].secret = b""
    machine = network.new_node(LIAR)
    aggregator = network.consortium.identities[AGGREGATOR]
    with pytest.raises(RemoteProtocolError, match="in the midst"):
        machine.receive(m.encode(aggregator, AttemptId(network.digest, 0, 0), m.DealKey((), make=True)))


@layered
def test_whoever_asks_with_a_box_that_is_none_gets_nothing_and_holds_up_nobody(protocol: str) -> None:
    network = study()
    liar = MaliciousNode(network, "hospital-02")
    liar.on("Join")(lambda message, _data: [liar.sign(message, m.Join(1, m.NO_KEY, bytes(1216)))])
    network.run()
    left = [name for name in names(4) if name != "hospital-02"]
    everyone_is_served(network, left)
