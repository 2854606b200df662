"""Both kinds of shares of one node, two survivor sets, missing votes, second sums, late uploads, and graphs cut apart.

What the aggregator is after: the self seed and the pair master of one node, or two sums that differ by one node.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import msgspec
import pytest

from audit.attacks.forged import opened
from audit.attacks.knowledge import decoded, is_vector_of
from audit.attacks.play import Bodies, Play, PrivateAttempt, keep
from protocols import messages as m
from protocols import transcript as t
from protocols.attempt_aggregator import SumOutcome
from protocols.encoding import FixedPoint
from protocols.rings import octets
from tests.adversary import weaken
from tests.adversary.attackers import revealed
from tests.adversary.test_cohort import blamed
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, make_network, names
from tests.protocols.test_attempt import check_sum

VICTIM = "hospital-02"
SPARSE = {"threshold": 11, "minimum_cohort": 11, "neighbours": 8, "share_threshold": 4}
"""For 17 members: 3 may collude, and 4 of any 8 neighbours may be lost."""


def without(name: str, survivors: tuple[tuple[str, bytes], ...]) -> tuple[tuple[str, bytes], ...]:
    return tuple(pair for pair in survivors if pair[0] != name)


# --- what a coalition may know


@pytest.mark.parametrize(("colluders", "reads"), [(0, False), (3, False), (4, True)])
def test_fewer_colluders_than_the_threshold_read_nothing(colluders: int, reads: bool) -> None:
    """Everybody follows the protocol. That four colluders do read the vector shows that the attacker is no straw man."""
    network = make_network(6, size=1500, threshold=4, minimum_cohort=4)
    others = [name for name in names(6) if name != VICTIM]
    attack = Play(network, colluders=others[:colluders])
    network.run()
    assert attack.knowledge.recovers(VICTIM) == reads
    assert check_sum(network, VICTIM) == tuple(names(6))


# --- 5


def ask_twice(guard: AbstractContextManager[None]) -> Play:
    """Everyone reveals shares of the victim's self seed; then it is called lost, and they are asked for the pair shares."""
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    attack = Play(network)
    first: dict[str, m.Survivors] = {}
    votes: dict[str, bytes] = {}

    @attack.tell("Survivors")
    def remember(message: m.Message, to: str) -> Bodies:
        first[to] = message.body  # type: ignore[assignment]
        return keep(message)

    @attack.hear("Unmasking")
    def ask_again(message: m.Message, _data: bytes) -> list[bytes]:
        if message.sender not in votes and message.sender != VICTIM:
            votes[message.sender] = b""
            survivors = without(VICTIM, first[message.sender].survivors)
            attack.say(message.sender, (1, 1), m.Survivors(survivors, first[message.sender].uploads))
        return []

    @attack.hear("SurvivorVote")
    def prove_again(message: m.Message, data: bytes) -> list[bytes]:
        if message.sender not in votes:
            return [data]
        votes[message.sender] = message.body.signature
        if all(votes.values()) and len(votes) == 4:
            for name in votes:
                attack.say(name, (1, 1), m.SurvivorProof(tuple(sorted(votes.items()))))
        return []

    with guard:
        network.run()
    return attack


def test_self_seed_and_pair_share_of_one_node() -> None:
    assert ask_twice(weaken.one_vote_one_revelation()).knowledge.recovers(VICTIM)

    attack = ask_twice(nullcontext())
    blamed(attack.network, "hospital-00", "sent Survivors in state REVEALED")
    assert attack.knowledge.self_seed(VICTIM) is not None
    assert attack.knowledge.pair_master(VICTIM) is None
    assert not attack.knowledge.recovers(VICTIM)


# --- 6 and 7


def two_sets(guard: AbstractContextManager[None], *, all_votes: bool) -> Play:
    """Half of the nodes hear that the victim survived, half that it is lost; so few shares are needed that each half has enough."""
    network = make_network(17, size=1100, **SPARSE)
    attack = Play(network)
    votes: dict[str, bytes] = {}
    asked: set[str] = set()

    def survived(name: str) -> bool:
        order, neighbours = attack.knowledge.graph(VICTIM).order, attack.knowledge.graph(VICTIM).neighbours(VICTIM)
        others = [n for n in order if n != VICTIM and n not in neighbours]
        return name == VICTIM or name in neighbours[:4] or name in others[:4]

    @attack.tell("Survivors")
    def tell(message: m.Message, to: str) -> Bodies:
        asked.add(to)
        survivors = message.body.survivors
        return [(m.Survivors(survivors if survived(to) else without(VICTIM, survivors), message.body.uploads), b"")]

    @attack.hear("SurvivorVote")
    def prove(message: m.Message, _data: bytes) -> list[bytes]:
        votes[message.sender] = message.body.signature
        if votes.keys() == asked == network.nodes.keys():
            for name in votes:
                own = {n: v for n, v in votes.items() if survived(n) == survived(name)}
                told = {n: v for n, v in votes.items() if survived(name) or n != VICTIM}
                attack.say(name, (1, 1), m.SurvivorProof(tuple(sorted((told if all_votes else own).items()))))
        return []

    attack.hear("Unmasking")(lambda message, data: [])
    with guard:
        network.run()
    return attack


def test_different_survivor_sets_to_different_nodes() -> None:
    assert two_sets(weaken.vote_signatures(), all_votes=True).knowledge.recovers(VICTIM)

    attack = two_sets(nullcontext(), all_votes=True)
    for name in names(17):
        blamed(attack.network, name, "never signed")
    assert not revealed(attack)
    assert not attack.knowledge.recovers(VICTIM)


def test_survivors_without_enough_signatures() -> None:
    assert two_sets(weaken.vote_quorum(), all_votes=False).knowledge.recovers(VICTIM)

    attack = two_sets(nullcontext(), all_votes=False)
    for name in names(17):
        blamed(attack.network, name, "fewer than 11 survivor votes")
    assert not revealed(attack)
    assert not attack.knowledge.recovers(VICTIM)


# --- 8, a second sum of a round


def sum_twice(guard: AbstractContextManager[None], cohort: list[str]) -> tuple[Play, bool]:
    """After the sum of all five the aggregator opens one more attempt, from which the victim is missing at the latest when it comes to
    the votes, and subtracts."""
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    attack = Play(network)
    second: list[PrivateAttempt] = []

    @attack.tell("SumChunk", "RoundResult")
    def again(_message: m.Message, _to: str) -> Bodies:
        if not second:
            second.append(PrivateAttempt(attack, (1, 2), cohort))
        return []

    @attack.hear("RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking")
    def divert(message: m.Message, data: bytes) -> list[bytes]:
        if message.attempt == 2:
            if message.sender != VICTIM or not isinstance(message.body, m.UploadChunk | m.UploadDone):
                second[0].receive(message, data)
            second[0].lose(VICTIM)
        return [] if message.attempt == 2 else [data]

    with guard:
        network.run()
    outcome = second[0].machine.outcome
    if outcome is None:
        return attack, False
    difference = opened(network, network.totals[1]) - opened(network, outcome.total)
    return attack, is_vector_of(network, decoded(network, difference), VICTIM)


OTHERS = [name for name in names(5) if name != VICTIM]


@pytest.mark.parametrize("cohort", [OTHERS, names(5)], ids=["without the victim", "with it until the votes"])
def test_a_replayed_attempt_after_the_sum(cohort: list[str]) -> None:
    assert sum_twice(weaken.memory_of_votes(), cohort)[1]

    attack, recovered = sum_twice(nullcontext(), cohort)
    assert not recovered
    for name in OTHERS:
        fault = "second sum" if cohort == OTHERS else "other survivors than in the attempt before"
        blamed(attack.network, name, fault)


def test_the_same_sum_once_more_gives_nothing() -> None:
    """All five, again: what an aggregator may ask for when a crash has cost the attempt. The same integers come out."""
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    attack = Play(network)
    second: list[PrivateAttempt] = []

    @attack.tell("SumChunk", "RoundResult")
    def again(message: m.Message, _to: str) -> Bodies:
        if not second:
            second.append(PrivateAttempt(attack, (1, 2), names(5)))
        return keep(message) if message.round > 1 else []

    @attack.hear("RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking")
    def divert(message: m.Message, data: bytes) -> list[bytes]:
        if message.attempt == 2:
            second[0].receive(message, data)
        return [] if message.attempt == 2 else [data]

    network.run()
    outcome = second[0].machine.outcome
    assert outcome is not None
    assert (opened(network, network.totals[1]) == opened(network, outcome.total)).all()
    assert not network.faults
    assert not attack.knowledge.recovers(VICTIM)


def tell_two_records(guard: AbstractContextManager[None]) -> Network:
    """The aggregator sums the same five in two attempts, and tells one hospital of the second, the others of the first."""
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    attack, aggregator = Play(network), network.identities[AGGREGATOR]
    second: list[PrivateAttempt] = []
    held: dict[str, list[tuple[m.AnyBody, bytes]]] = {}

    def tell_them(outcome: SumOutcome) -> None:
        record = t.read_line(network.aggregator._record_line, aggregator.public_key).body
        assert isinstance(record, t.RoundRecord)
        survivors = tuple(t.Survivor(n, d.hex(), outcome.votes.get(n, b"").hex()) for n, d in outcome.survivors)
        other = msgspec.structs.replace(
            record,
            attempt=2,
            senders_view=outcome.view.hex(),
            survivors=survivors,
            aggregate_digest=t.aggregate_digest(octets(outcome.total)).hex(),
            aggregate_tag=outcome.tag.to_bytes(8).hex(),
        )
        line, ring = network.aggregator._transcript.append(other), network.aggregator._ring
        chunks = [ring.pack_sum(outcome.total, start) for start in range(0, network.size, ring.sum_chunk_values)]
        held[VICTIM] = [(m.SumChunk(i, m.chunk_digest(data)), bytes(data)) for i, data in enumerate(chunks)]
        held[VICTIM].append((m.RoundResult(line), b""))
        for name, bodies in held.items():
            for body, tail in bodies:
                attack.say(name, (1, 0), body, tail)
        held.clear()

    @attack.tell("SumChunk", "RoundResult")
    def hold(message: m.Message, to: str) -> Bodies:
        if not second:
            second.append(PrivateAttempt(attack, (1, 2), names(5)))
        held.setdefault(to, []).append((message.body, bytes(message.tail)))
        return []

    @attack.hear("RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking")
    def divert(message: m.Message, data: bytes) -> list[bytes]:
        if message.attempt == 2:
            second[0].receive(message, data)
            outcome = second[0].machine.outcome
            if outcome is not None and held:
                tell_them(outcome)
        return [] if message.attempt == 2 else [data]

    with guard:
        network.run()
    assert second[0].machine.outcome is not None
    return network


def test_two_records_of_one_round_by_two_attempts() -> None:
    """A round has one record: who began the second attempt takes none of the first, although its sum is the same."""
    network = tell_two_records(weaken.memory_of_attempts())
    assert len({network.journals[name].receipt(1) for name in names(5)}) == 2
    assert all(network.sums[name] for name in names(5))

    network = tell_two_records(nullcontext())
    for name in OTHERS:
        blamed(network, name, "an attempt that it had given up for another one")
        assert not network.sums[name]
    assert network.sums[VICTIM]


# --- 10


def delay_the_upload(guard: AbstractContextManager[None]) -> tuple[Play, bool]:
    """The aggregator holds the victim's upload back until its pair masks are revealed, and asks for its self seed after."""
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    attack = Play(network)
    attack.hear("UploadChunk", "UploadDone")(lambda message, data: [] if message.sender == VICTIM else [data])
    uploads: dict[str, bytes] = {}

    @attack.hear("Unmasking")
    def ask_for_the_rest(message: m.Message, data: bytes) -> list[bytes]:
        """Ask the victim itself, which has revealed nothing yet, for a vote on a set with it."""
        if not uploads:
            uploads["asked"] = data
            machine = network.aggregator._attempt
            own = network.nodes[VICTIM]._attempt
            assert machine is not None
            assert own is not None
            survivors = tuple(sorted([*machine._survivors, (VICTIM, own._digest)]))
            attack.say(VICTIM, (1, 1), m.Survivors(survivors, tuple(machine._signed_uploads.values())))
            attack.say(VICTIM, (1, 1), m.SurvivorProof(tuple(sorted(machine._votes.items()))))
        return [data]

    with guard:
        network.run()
        return attack, attack.knowledge.recovers(VICTIM)


def test_an_upload_that_comes_after_its_pair_masks_were_revealed() -> None:
    assert delay_the_upload(weaken.self_masks())[1]

    attack, recovered = delay_the_upload(nullcontext())
    assert not recovered
    assert attack.knowledge.pair_master(VICTIM) is not None
    assert len(attack.knowledge.attempts[1, 1].chunks[VICTIM]) == 2
    assert attack.knowledge.self_seed(VICTIM) is None
    blamed(attack.network, VICTIM, "never signed")
    left = tuple(name for name in names(5) if name != VICTIM)
    for name in left:
        assert check_sum(attack.network, name) == left


# --- 18


class SparseAttack(Play):
    """Three of the victim's eight neighbours collude, dealers first; it would rather be without the other five."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.loosen()
        self.around: set[str] = set()
        """The neighbours that are honest."""
        self.tell("KeySet")(self._choose)

    def _choose(self, message: m.Message, to: str) -> Bodies:
        if not self.around:
            address = message.round, message.attempt
            self.knowledge.watch(AGGREGATOR, to, self.sign(AGGREGATOR, address, message.body))
            graph = self.knowledge.graph(to)
            around = sorted(graph.neighbours(VICTIM), key=lambda name: name not in graph.dealers)
            self.recruit(*around[:3])
            self.around = set(around[3:])
        return keep(message)


def hide_neighbours(guard: AbstractContextManager[None]) -> SparseAttack:
    """The victim hears that its honest neighbours never dealt seeds; all others hear the truth."""
    network = make_network(17, size=1100, **SPARSE)
    attack = SparseAttack(network)

    @attack.tell("SeedSet")
    def hide(message: m.Message, to: str) -> Bodies:
        if to != VICTIM:
            return keep(message)
        body = message.body
        sealed = tuple(data for data in body.sealed if m.claimed_sender(data) not in attack.around)
        return [(m.SeedSet(tuple(n for n in body.senders if n not in attack.around), sealed), b"")]

    attack.tell("Survivors")(lambda message, to: [] if to == VICTIM else keep(message))
    with guard:
        network.run()
    return attack


def test_a_victim_that_hears_its_honest_neighbours_never_dealt_seeds() -> None:
    assert hide_neighbours(weaken.neighbours_views()).knowledge.recovers(VICTIM)

    attack = hide_neighbours(nullcontext())
    for name in attack.around:
        blamed(attack.network, name, f"an upload that {VICTIM} did not sign, or that it masked for other senders")
    assert set(attack.network.faults) == attack.around
    assert not revealed(attack) & attack.around
    assert not attack.knowledge.recovers(VICTIM)


def cut_off(guard: AbstractContextManager[None]) -> SparseAttack:
    """The victim's honest neighbours are called lost, so that only colluders share masks with it."""
    network = make_network(17, size=1100, **SPARSE)
    attack = SparseAttack(network)
    attack.hear("UploadChunk", "UploadDone")(lambda message, data: [] if message.sender in attack.around else [data])
    with guard:
        network.run()
    return attack


def test_a_victim_cut_off_from_its_honest_neighbours() -> None:
    assert cut_off(weaken.connectivity()).knowledge.recovers(VICTIM)

    attack = cut_off(nullcontext())
    blamed(attack.network, VICTIM, "colluders could cut apart")
    assert not revealed(attack)
    assert not attack.knowledge.recovers(VICTIM)
    assert not any(attack.network.sums.values())


# --- votes bind


def side_by_side(guard: AbstractContextManager[None]) -> tuple[Network, bool]:
    """One colluder, as many as the agreement tolerates, and an aggregator that has two attempts of one round opened.

    Two members are left out, so that the graph of the rest is complete and two shares recover each secret. All vote; then
    only victim and colluder get the votes and reveal, while the others are moved to a second attempt, vote again and
    reveal there. The difference of the two sums is the victim's vector and the colluder's. Gives whether it comes out.
    """
    sparse = {"threshold": 10, "minimum_cohort": 10, "neighbours": 14, "share_threshold": 2}
    network = make_network(17, size=1100, **sparse)
    colluder, left_out = "hospital-07", {"hospital-15", "hospital-16"}
    attack = Play(network, colluders=[colluder])
    attack.loosen()
    second: list[PrivateAttempt] = []

    @attack.tell("SurvivorProof")
    def split(message: m.Message, to: str) -> Bodies:
        if not second:
            second.append(PrivateAttempt(attack, (1, 2), set(network.nodes) - {VICTIM, colluder, *left_out}))
        return keep(message) if to in (VICTIM, colluder) else []

    @attack.hear("RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking")
    def divert(message: m.Message, data: bytes) -> list[bytes]:
        if message.attempt == 2:
            second[0].receive(message, data)
        return [] if message.attempt == 2 or message.sender in left_out else [data]

    with guard:
        network.run()
    assert second
    outcome = second[0].machine.outcome
    if outcome is None or 1 not in network.totals:
        return network, False
    own = FixedPoint.from_agreement(network.agreement).encode(network.vectors(colluder, 1))
    difference = opened(network, network.totals[1]) - opened(network, outcome.total) - own
    return network, is_vector_of(network, decoded(network, difference), VICTIM)


def test_two_attempts_of_one_round_side_by_side() -> None:
    assert side_by_side(weaken.memory_of_votes())[1]

    network, found = side_by_side(nullcontext())
    assert not found
    others = set(network.nodes) - {VICTIM, "hospital-07", "hospital-15", "hospital-16"}
    for name in others:
        blamed(network, name, "second sum of a round in which we have voted")
