"""What a malicious aggregator tries with who is in the sum, and by which rules: other keys, other hospitals, fewer, weaker parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from audit.attacks.forged import Impersonator
from audit.attacks.play import Bodies, Play, keep, listed
from audit.attacks.stage import World, attack
from protocols import messages as m
from protocols import sealing
from protocols.agreement import (
    Agreement,
    agreement_digest,
)
from protocols.attempt_node import Parties, open_contribution
from protocols.messages import AGGREGATOR
from protocols.sealing import AttemptId


@attack(
    "aggregator",
    "keys",
    "one hospital is shown round keys of the aggregator's own making in the place of everybody else's",
    "its vector is read",
    needs="masks",
)
def _substituted_round_keys(world: World) -> Play:
    network, victim = world.network(), world.names[1]
    play = Impersonator(network, victim, [name for name in world.names if name != victim])
    play.must_refuse = [victim]
    return play.run()


@attack(
    "aggregator",
    "keys",
    "one hospital is summed with hospitals that the aggregator has invented",
    "its vector is read, or it takes part",
)
def _invented_hospitals(world: World) -> Play:
    network, victim = world.network(), world.names[1]
    play = Impersonator(network, victim, [f"invented-{index}" for index in range(len(world.names) - 1)])
    cohort = tuple(sorted([victim, *play.peers]))
    play.tell("AttemptOpen")(lambda message, to: [(m.AttemptOpen(cohort), b"")] if to == victim else keep(message))
    play.must_refuse = [victim]
    play.run()
    play.gives(play.has_sent(victim, m.RoundKeys) or play.has_sent(victim, m.UploadDone), f"{victim} took part")
    return play


@attack(
    "aggregator",
    "keys",
    "a hospital is lost in round 1, so that its pair master is recovered; in round 2 another is shown its old round keys",
    "what is sealed to the old key opens: a pair seed of round 2",
    needs="masks",
    spare=1,
)
def _replayed_round_keys(world: World) -> Play:
    network, victim, lost = world.network(2), world.names[0], world.names[-1]
    play, old = Play(network), list[bytes]()

    @play.hear("UploadChunk", "UploadDone")
    def lose(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == lost and message.round == 1 else [data]

    @play.hear("RoundKeys")
    def remember(message: m.Message, data: bytes) -> Sequence[bytes]:
        old.extend([data] if message.sender == lost and message.round == 1 else [])
        return [data]

    @play.tell("KeySet")
    def replay(message: m.Message, to: str) -> Bodies:
        if to != victim or message.round != 2 or not isinstance(message.body, m.KeySet):
            return keep(message)
        digests = tuple((n, sealing.keys_digest(old[0]) if n == lost else d) for n, d in message.body.digests)
        keys = tuple(old[0] if m.claimed_sender(key) == lost else key for key in message.body.keys)
        return [(m.KeySet(digests, keys), b"")]

    play.must_refuse = [victim]
    play.run()
    master = play.knowledge.pair_master(lost, (1, 1))
    for seeds in play.knowledge.attempts[2, 1].seals[victim, lost]:
        try:
            key = sealing.private_key(master or bytes(32), AttemptId(network.digest, 1, 1))
            open_contribution(key, AttemptId(network.digest, 2, 1), seeds.cohort_digest, victim, lost, seeds)
        except sealing.SealBroken:
            continue
        play.gives(True, f"what {victim} sealed to an old key of {lost} opened")
    return play


@attack(
    "aggregator",
    "keys",
    "one hospital is not given the round keys of another with which it must share masks",
    "it goes on without that mask",
    needs="masks",
)
def _withheld_round_keys(world: World) -> Play:
    network, victim, held = world.network(), world.names[0], set[str]()
    play = Play(network)

    @play.tell("KeySet")
    def withhold(message: m.Message, to: str) -> Bodies:
        """Of the first whose keys it would be given: in a sparse graph not everybody's are."""
        if to != victim or not isinstance(message.body, m.KeySet):
            return keep(message)
        first = min({m.claimed_sender(key) for key in message.body.keys} - {victim})
        held.add(first)
        keys = tuple(key for key in message.body.keys if m.claimed_sender(key) != first)
        return [(m.KeySet(message.body.digests, keys), b"")]

    play.must_refuse = [victim]
    play.run()
    play.gives(play.has_sent(victim, m.SealedSeeds), f"{victim} went on without the keys of {listed(held)}")
    return play


def _shrink(world: World, phase: str, next_step: type[m.Body]) -> Play:
    """The aggregator leaves one more out than it may, and colludes with as many of the others as are tolerated."""
    victim, left = world.names[0], set(world.names[: world.minimum - 1])
    play = Play(world.network(), colluders=sorted(left - {victim})[: world.agreement.colluders_tolerated])
    play.loosen()

    @play.tell("AttemptOpen")
    def shorter(message: m.Message, to: str) -> Bodies:
        if phase != "AttemptOpen":
            return keep(message)
        return [(m.AttemptOpen(tuple(sorted(left))), b"")] if to in left else []

    @play.hear(phase)
    def lose(message: m.Message, data: bytes) -> Sequence[bytes]:
        play.took_place |= message.sender not in left
        return [data] if message.sender in left else []

    play.must_refuse = [name for name in play.honest if name in left]
    play.run()
    gone_on = [name for name in play.must_refuse if play.has_sent(name, next_step)]
    play.gives(bool(gone_on), f"{listed(gone_on)} sent {next_step.__name__} for {len(left)} hospitals")
    return play


@attack("aggregator", "keys", "an attempt is opened for fewer hospitals than agreed", "one of them takes part in it")
def _a_shrunk_cohort(world: World) -> Play:
    return _shrink(world, "AttemptOpen", m.RoundKeys if world.agreement.secure_sum.masked else m.UploadDone)


@attack(
    "aggregator",
    "keys",
    "the round keys of so many are left out that fewer than agreed remain",
    "one of them deals its shares",
    needs="masks",
)
def _a_cohort_shrunk_by_keys(world: World) -> Play:
    return _shrink(world, "RoundKeys", m.SealedSeeds)


@attack(
    "aggregator",
    "keys",
    "so many uploads are called lost that fewer than agreed remain",
    "one of those who remain votes for it",
)
def _a_cohort_shrunk_by_uploads(world: World) -> Play:
    return _shrink(world, "UploadDone", m.SurvivorVote)


def _other(agreement: Agreement, **changes: Any) -> Agreement:
    return msgspec.structs.replace(agreement, secure_sum=msgspec.structs.replace(agreement.secure_sum, **changes))


@attack(
    "aggregator",
    "parameters",
    "each hospital gets an order under another agreement: a lower threshold, another ring, a narrower clip, a coarser precision",
    "one of them obeys",
)
def _an_order_under_another_agreement(world: World) -> Play:
    network, ring = world.network(), world.agreement.secure_sum
    play = Play(network)
    others = [
        _other(network.agreement, threshold=ring.threshold - 1, minimum_cohort=3),
        _other(network.agreement, ring_bits=32 if ring.ring_bits == 20 else 20, value_bits=16),
        _other(network.agreement, value_bits=ring.value_bits - 1),
        _other(network.agreement, fraction_bits=max(1, ring.fraction_bits - 1)),
    ]

    @play.tell("RoundOpen")
    def order(message: m.Message, to: str) -> Bodies:
        play.took_place = True
        other = others[network.names.index(to) % len(others)]
        digest = agreement_digest(msgspec.json.encode(other))
        data = m.encode(network.identities[AGGREGATOR], AttemptId(digest, message.round, message.attempt), message.body)
        network.inject(AGGREGATOR, to, data)
        return []

    play.must_refuse = network.names
    play.run()
    for name in network.names:
        play.gives(play.has_sent(name, m.Ready), f"{name} trained for another agreement")
    return play


@attack(
    "aggregator",
    "parameters",
    "the aggregator speaks of the pinned agreement and opens with one vote and one share fewer than its threshold",
    "a hospital reveals shares",
    needs="masks",
)
def _a_lower_threshold_under_the_pinned_digest(world: World) -> Play:
    network, t_agreed = world.network(), world.agreement.secure_sum.threshold
    play = Play(network)
    lower = _other(network.agreement, threshold=t_agreed - 1, minimum_cohort=max(3, t_agreed - 1))
    network.aggregator = network.new_aggregator(Parties(lower, network.digest, network.parties.public_keys))

    @play.tell("SurvivorProof")
    def fewer(message: m.Message, _to: str) -> Bodies:
        play.took_place = True
        return keep(message)

    play.must_refuse = network.names
    play.run()
    for name in network.names:
        play.gives(play.has_sent(name, m.Unmasking), f"{name} revealed its shares on {t_agreed - 1} votes")
    return play
