"""Who is in the sum: substituted round keys, invented hospitals, a shrunk cohort, and keys of an earlier round.

The harm is always the same: the aggregator reads the victim's vector, or a pair seed, out of what it has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest

from audit.attacks.forged import Impersonator
from audit.attacks.knowledge import peek
from audit.attacks.play import Bodies, Play, keep
from keys.errors import RemoteProtocolError
from protocols import messages as m
from protocols.attempt_node import open_contribution
from protocols.sealing import AttemptId, SealBroken, keys_digest, private_key
from tests.adversary import weaken
from tests.adversary.attackers import revealed
from tests.protocols.network import Network, make_network, names
from tests.protocols.test_attempt import check_sum

VICTIM = "hospital-02"


def blamed(network: Network, victim: str, text: str) -> None:
    """The victim has left, naming the aggregator and this fault."""
    fault = network.faults[victim]
    assert isinstance(fault, RemoteProtocolError)
    assert fault.peer == m.AGGREGATOR
    assert text in str(fault)


def others_are_right(network: Network, without: set[str]) -> None:
    for name in set(network.nodes) - without:
        assert set(check_sum(network, name)) == set(network.nodes) - without
        assert name not in network.faults


# --- 1


def substitute_keys(guard: AbstractContextManager[None]) -> Impersonator:
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    attack = Impersonator(network, VICTIM, [name for name in names(5) if name != VICTIM])
    with guard:
        network.run()
    return attack


def test_substituted_round_keys() -> None:
    attack = substitute_keys(weaken.relayed_signatures())
    assert attack.knowledge.recovers(VICTIM)

    attack = substitute_keys(nullcontext())
    blamed(attack.network, VICTIM, "never signed")
    assert VICTIM not in attack.knowledge.attempts[1, 1].chunks
    assert not attack.knowledge.recovers(VICTIM)
    others_are_right(attack.network, {VICTIM})


# --- 2


def invent_hospitals(weakened: bool) -> Impersonator:
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    attack = Impersonator(network, VICTIM, ["clinic-1", "clinic-2", "clinic-3", "clinic-4"])
    cohort = m.AttemptOpen(tuple(sorted([VICTIM, *attack.peers])))
    attack.tell("AttemptOpen")(lambda message, to: [(cohort, b"")] if to == VICTIM else keep(message))
    invented = {name: identity.public_key for name, identity in attack.signers.items()}
    with weaken.roster(network.nodes[VICTIM], invented) if weakened else nullcontext():
        network.run()
    return attack


def test_invented_hospitals() -> None:
    assert invent_hospitals(weakened=True).knowledge.recovers(VICTIM)

    attack = invent_hospitals(weakened=False)
    blamed(attack.network, VICTIM, "put a stranger into the cohort")
    assert not attack.knowledge.recovers(VICTIM)
    others_are_right(attack.network, {VICTIM})


# --- 3

COLLUDERS = ("hospital-03", "hospital-04", "hospital-05")


def shrink(phase: str, guard: AbstractContextManager[None]) -> Play:
    """All six are agreed to be summed; the aggregator leaves out two, and so sums the victim with its colluders."""
    network = make_network(6, size=1500, threshold=4, minimum_cohort=6)
    attack = Play(network, colluders=COLLUDERS)
    attack.loosen()
    left = {VICTIM, *COLLUDERS}

    @attack.tell("AttemptOpen")
    def shorter(message: m.Message, to: str) -> Bodies:
        if phase != "AttemptOpen":
            return keep(message)
        return [(m.AttemptOpen(tuple(sorted(left))), b"")] if to in left else []

    @attack.hear(phase)
    def lose(message: m.Message, data: bytes) -> list[bytes]:
        return [data] if message.sender in left else []

    with guard:
        network.run()
    return attack


@pytest.mark.parametrize(
    ("phase", "fault"),
    [
        ("AttemptOpen", "shrank the cohort"),
        ("RoundKeys", "shrank the cohort"),
        ("SealedSeeds", "shrank the cohort"),
        ("UploadDone", "fewer survivors than the agreed minimum"),
    ],
)
def test_a_shrunk_cohort(phase: str, fault: str) -> None:
    assert shrink(phase, weaken.minimum_cohort()).knowledge.recovers(VICTIM)

    attack = shrink(phase, nullcontext())
    blamed(attack.network, VICTIM, fault)
    assert VICTIM not in revealed(attack)
    assert not attack.knowledge.recovers(VICTIM)
    assert not any(attack.network.sums.values())


# --- 8, round keys


def replay_keys(guard: Callable[[], AbstractContextManager[None]]) -> tuple[Play, bytes | None]:
    """A node is lost in round 1, so that its pair master is recovered; in round 2 the victim is shown its old keys."""
    lost, victim = "hospital-04", "hospital-00"
    network = make_network(5, size=1500, rounds=2, threshold=4, minimum_cohort=4)
    attack = Play(network)
    old: list[bytes] = []
    attack.hear("UploadChunk", "UploadDone")(
        lambda message, data: [] if message.sender == lost and message.round == 1 else [data]
    )

    @attack.hear("RoundKeys")
    def remember(message: m.Message, data: bytes) -> list[bytes]:
        old.extend([data] if message.sender == lost and message.round == 1 else [])
        return [data]

    @attack.tell("KeySet")
    def replay(message: m.Message, to: str) -> Bodies:
        if to != victim or message.round != 2:
            return keep(message)
        digests = tuple((n, keys_digest(old[0]) if n == lost else d) for n, d in message.body.digests)
        keys = (old[0] if peek(key).sender == lost else key for key in message.body.keys)
        return [(m.KeySet(digests, tuple(keys)), b"")]

    with guard():
        network.run()
    master = attack.knowledge.pair_master(lost, (1, 1))
    assert master is not None
    opened = None
    for seeds in attack.knowledge.attempts[2, 1].seals[victim, lost]:
        key = private_key(master, AttemptId(network.digest, 1, 1))
        try:
            attempt = AttemptId(network.digest, 2, 1)
            opened = open_contribution(key, attempt, seeds.cohort_digest, victim, lost, seeds)
        except SealBroken:
            continue
    return attack, opened


def test_replayed_round_keys() -> None:
    _, opened = replay_keys(weaken.relayed_freshness)
    assert opened is not None

    attack, opened = replay_keys(nullcontext)
    assert opened is None
    blamed(attack.network, "hospital-00", "replayed a message of hospital-04 from another round")
    assert check_sum(attack.network, "hospital-01", 2) == tuple(names(5)[1:])
