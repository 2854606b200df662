"""What a malicious aggregator tries with shares and votes: both kinds of one hospital, two survivor sets, few votes, a victim cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from audit.attacks.play import Bodies, Play, keep, listed
from audit.attacks.stage import World, attack
from keys.labels import Label
from protocols import messages as m
from protocols import transcript as t
from protocols.messages import AGGREGATOR
from protocols.sealing import AttemptId


def _without(name: str, survivors: tuple[tuple[str, bytes], ...]) -> tuple[tuple[str, bytes], ...]:
    return tuple(pair for pair in survivors if pair[0] != name)


@attack(
    "aggregator",
    "both-shares",
    "all reveal shares of one hospital's self seed; then it is called lost, and they are asked for the pair shares",
    "its vector is read, or somebody votes for a second set",
    needs="masks",
    spare=1,
)
def _self_seed_and_pair_shares_of_one_node(world: World) -> Play:
    network, victim = world.network(), world.names[1]
    play = Play(network)
    first: dict[str, m.Survivors] = {}
    votes: dict[str, bytes] = {}

    @play.tell("Survivors")
    def remember(message: m.Message, to: str) -> Bodies:
        first[to] = message.body  # type: ignore[assignment]
        return keep(message)

    @play.hear("Unmasking")
    def ask_again(message: m.Message, _data: bytes) -> Sequence[bytes]:
        if message.sender not in votes and message.sender != victim:
            votes[message.sender] = b""
            survivors = _without(victim, first[message.sender].survivors)
            play.say(message.sender, (1, 1), m.Survivors(survivors, first[message.sender].uploads))
        return []

    @play.hear("SurvivorVote")
    def prove_again(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender not in votes or not isinstance(message.body, m.SurvivorVote):
            return [data]
        play.gives(not votes[message.sender], f"{message.sender} voted for a second set of survivors")
        votes[message.sender] = message.body.signature
        if all(votes.values()) and len(votes) == len(network.names) - 1:
            for name in votes:
                play.say(name, (1, 1), m.SurvivorProof(tuple(sorted(votes.items()))))
        return []

    play.must_refuse = [name for name in network.names if name != victim]
    return play.run()


Forge = Callable[[dict[str, bytes], dict[str, bytes]], list[tuple[str, bytes]]]
"""Makes a proof for one half of the hospitals out of its own votes and those of the other half."""


def _two_sets(world: World, forge: Forge, colluders: int = 0) -> Play:
    """Half of the hospitals hear that the victim survived, half that it is lost; colluders vote for both."""
    names = world.names
    victim, allies = names[0], names[len(names) - colluders :]
    play = Play(world.network(), colluders=allies)
    play.loosen()
    network = play.network
    honest = [name for name in names if name not in (victim, *allies)]
    alive = {victim, *honest[: len(honest) // 2]}
    votes: dict[bool, dict[str, bytes]] = {True: {}, False: {}}
    told = {victim, *honest}

    @play.tell("Survivors")
    def tell(message: m.Message, to: str) -> Bodies:
        attempt = network.aggregator._attempt
        if not isinstance(message.body, m.Survivors) or attempt is None:
            return []
        sets = {True: message.body.survivors, False: _without(victim, message.body.survivors)}
        if to in told:
            return [(m.Survivors(sets[to in alive], message.body.uploads), b"")]
        address = AttemptId(network.digest, message.round, message.attempt)
        for kind, survivors in sets.items():
            statement = t.survivor_statement(address, attempt._view, survivors)
            votes[kind][to] = network.identities[to].sign(Label.SURVIVORS, statement)
        return []

    @play.hear("SurvivorVote")
    def prove(message: m.Message, _data: bytes) -> Sequence[bytes]:
        if isinstance(message.body, m.SurvivorVote):
            votes[message.sender in alive][message.sender] = message.body.signature
        if told <= votes[True].keys() | votes[False].keys():
            for name in sorted(told):
                kind = name in alive
                proof = [pair for pair in forge(votes[kind], votes[not kind]) if kind or pair[0] != victim]
                play.say(name, (message.round, message.attempt), m.SurvivorProof(tuple(sorted(proof))))
        return []

    play.hear("Unmasking")(lambda message, data: [])
    play.run()
    revealed = {name for name in told if play.has_sent(name, m.Unmasking)}
    if colluders:
        play.must_refuse = sorted(told - alive)
        play.gives(bool(revealed & alive and revealed - alive), "both sets of survivors were unmasked")
    else:
        play.must_refuse = sorted(told)
        play.gives(bool(revealed), f"{len(revealed)} hospitals revealed shares")
    return play


@attack(
    "aggregator",
    "survivors",
    "two sets of survivors to two halves, each with the votes of both",
    "somebody reveals shares",
    needs="masks",
    spare=1,
)
def _votes_for_another_set(world: World) -> Play:
    return _two_sets(world, lambda own, others: [*own.items(), *others.items()])


@attack(
    "aggregator",
    "survivors",
    "two sets of survivors to two halves, each with its own votes only, fewer than the threshold",
    "somebody reveals shares",
    needs="masks",
    spare=1,
)
def _too_few_votes(world: World) -> Play:
    return _two_sets(world, lambda own, _others: list(own.items()))


@attack(
    "aggregator",
    "survivors",
    "two sets of survivors to two halves, each with forged votes of the others",
    "somebody reveals shares",
    needs="masks",
    spare=1,
)
def _forged_votes(world: World) -> Play:
    return _two_sets(world, lambda own, others: [*own.items(), *((name, bytes(64)) for name in others)])


@attack(
    "aggregator",
    "survivors",
    "two sets of survivors to two halves, each with its own votes repeated",
    "somebody reveals shares",
    needs="masks",
    spare=1,
)
def _repeated_votes(world: World) -> Play:
    return _two_sets(world, lambda own, _others: [*own.items()] * 3)


@attack(
    "aggregator",
    "deviating-colluders",
    "two sets of survivors to two halves; as many colluders as the agreement tolerates vote for both",
    "both sets are unmasked, and a vector read",
    needs="masks",
    spare=1,
)
def _two_sets_with_colluders(world: World) -> Play:
    return _two_sets(world, lambda own, _others: list(own.items()), world.agreement.colluders_tolerated)


@attack(
    "aggregator",
    "neighbours",
    "one hospital hears that an honest neighbour never dealt seeds, and masks without it; all others hear the truth",
    "its neighbours vote for the sum, or somebody reveals shares",
    needs="masks",
    spare=1,
)
def _a_neighbour_that_never_dealt_seeds(world: World) -> Play:
    play, victim, hidden = Play(world.network()), world.names[0], world.names[1]
    play.loosen()

    @play.tell("SeedSet")
    def hide(message: m.Message, to: str) -> Bodies:
        if to != victim or not isinstance(message.body, m.SeedSet):
            return keep(message)
        sealed = tuple(data for data in message.body.sealed if m.claimed_sender(data) != hidden)
        return [(m.SeedSet(tuple(name for name in message.body.senders if name != hidden), sealed), b"")]

    play.run()
    play.must_refuse = [victim, *play.knowledge.graph(victim, (1, 1)).neighbours(victim)]
    revealed = [name for name in play.honest if play.has_sent(name, m.Unmasking)]
    play.gives(bool(revealed), f"{listed(revealed)} revealed shares for a sum whose masks do not cancel")
    return play


@attack(
    "aggregator",
    "neighbours",
    "as many neighbours of one hospital as may collude do, and all others are called lost, so that only colluders share masks with it",
    "its vector is read, or it votes",
    needs="sparse",
)
def _a_victim_cut_off(world: World) -> Play:
    """Who stands beside whom follows from a hash over fresh keys: colluders are chosen when it is known."""
    play, victim = Play(world.network()), world.names[0]
    play.loosen()
    lost = set[str]()

    @play.tell("KeySet")
    def choose_allies(message: m.Message, to: str) -> Bodies:
        if not play.took_place and isinstance(message.body, m.KeySet):
            address = message.round, message.attempt
            play.knowledge.watch(AGGREGATOR, victim, play.sign(AGGREGATOR, address, message.body))
            around = play.knowledge.graph(victim, address).neighbours(victim)
            allies = around[: world.agreement.secure_sum.shares_needed - 1]
            play.took_place = True
            play.recruit(*allies)
            lost.update(set(around) - set(allies))
        return keep(message)

    @play.hear("UploadChunk", "UploadDone")
    def lose(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender in lost else [data]

    play.must_refuse = [victim]
    play.run()
    play.gives(play.has_sent(victim, m.SurvivorVote), f"{victim} voted although only colluders share masks with it")
    return play
