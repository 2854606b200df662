"""What a malicious aggregator tries with time: a second sum of one round, an old round or attempt, an upload that comes late."""

from __future__ import annotations

from collections.abc import Sequence

from audit.attacks.play import Bodies, Play, PrivateAttempt, keep
from audit.attacks.stage import World, attack
from protocols import messages as m


@attack(
    "aggregator",
    "second-sum",
    "when a round is summed, and before the sum is sent, a second attempt of it is opened without one hospital",
    "somebody who has voted takes part in it",
    spare=1,
)
def _a_second_attempt_after_the_votes(world: World) -> Play:
    play, names = Play(world.network()), world.names
    opened: list[str] = []

    @play.tell("SumChunk")
    def again(message: m.Message, to: str) -> Bodies:
        if to != names[0] and to not in opened:
            opened.append(to)
            play.say(to, (1, 2), m.AttemptOpen(tuple(names[1:])))
            if not world.agreement.secure_sum.masked:
                play.say(to, (1, 2), m.Credit(1000))
        return keep(message) if to == names[0] else []

    play.tell("RoundResult")(lambda message, to: keep(message) if to == names[0] else [])
    play.must_refuse = names[1:]
    play.run()
    for name in names[1:]:
        taken = any(sender == name and head.attempt == 2 for sender, head in play.sent)
        play.gives(taken, f"{name} took part in a second attempt of a round in which it had voted")
    return play


@attack(
    "aggregator",
    "second-sum",
    "a second attempt of the same hospitals is opened, and at its votes one is called lost",
    "somebody votes for the others alone",
    spare=1,
)
def _one_left_out_of_a_second_attempt(world: World) -> Play:
    play, victim = Play(world.network()), world.names[1]
    second: list[PrivateAttempt] = []

    @play.tell("SumChunk", "RoundResult")
    def again(_message: m.Message, _to: str) -> Bodies:
        if not second:
            second.append(PrivateAttempt(play, (1, 2), world.names))
        return []

    @play.hear("RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking")
    def divert(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.attempt == 1:
            return [data]
        if message.sender != victim or not isinstance(message.body, m.UploadChunk | m.UploadDone):
            second[0].receive(message, data)
        second[0].lose(victim)
        return []

    play.must_refuse = [name for name in world.names if name != victim]
    play.run()
    for name in play.must_refuse:
        play.gives(play.has_sent(name, m.SurvivorVote, (1, 2)), f"{name} voted for two sets of one round")
    return play


@attack("aggregator", "second-sum", "an attempt is opened again that runs already", "it is begun anew")
def _an_old_attempt_again(world: World) -> Play:
    play, victim = Play(world.network()), world.names[0]

    @play.tell("Credit")
    def again(message: m.Message, to: str) -> Bodies:
        if to == victim and not play.took_place:
            play.say(to, (message.round, message.attempt), m.AttemptOpen(tuple(world.names)))
        return keep(message)

    play.must_refuse = [victim]
    play.run()
    keys = [head for sender, head in play.sent if sender == victim and isinstance(head.body, m.RoundKeys)]
    play.gives(len(keys) > 1, f"{victim} made two sets of keys for one attempt")
    return play


@attack("aggregator", "second-sum", "round 1 is opened again in round 2", "somebody trains or sums it again")
def _an_old_round_again(world: World) -> Play:
    play, victim = Play(world.network(2)), world.names[0]

    @play.tell("AttemptOpen")
    def again(message: m.Message, to: str) -> Bodies:
        if to == victim and message.round == 2:
            play.say(to, (1, 0), m.RoundOpen(0))
            return []
        return keep(message)

    play.must_refuse = [victim]
    play.run()
    ready = [head for sender, head in play.sent if sender == victim and isinstance(head.body, m.Ready)]
    play.gives([head.round for head in ready].count(1) > 1, f"{victim} trained round 1 again")
    return play


@attack(
    "aggregator",
    "second-sum",
    "an upload is held back until its pair masks are revealed; then its sender is asked to vote for a set with itself",
    "its vector is read",
    needs="masks",
    spare=1,
)
def _an_upload_held_back(world: World) -> Play:
    play, victim = Play(world.network()), world.names[1]
    network = play.network

    @play.hear("UploadChunk", "UploadDone")
    def hold(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == victim else [data]

    @play.hear("Unmasking")
    def ask_for_the_rest(_message: m.Message, data: bytes) -> Sequence[bytes]:
        machine, own = network.aggregator._attempt, network.nodes[victim]._attempt
        if not play.took_place and machine is not None and own is not None:
            survivors = tuple(sorted([*machine._survivors, (victim, own._digest)]))
            play.say(victim, (1, 1), m.Survivors(survivors, tuple(machine._signed_uploads.values())))
            play.say(victim, (1, 1), m.SurvivorProof(tuple(sorted(machine._votes.items()))))
        return [data]

    play.must_refuse = [victim]
    play.must_sum = [name for name in network.names if name != victim]
    play.run()
    play.gives(play.has_sent(victim, m.Unmasking), f"{victim} revealed its share of its own self seed")
    return play
