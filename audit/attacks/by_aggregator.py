"""What a malicious aggregator tries, alone or with members that give it their secrets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import product
from typing import Any

import msgspec
import numpy as np

from audit.attacks.forged import Change, Impersonator, announce, changed_total, resign
from audit.attacks.knowledge import packing_of
from audit.attacks.play import Bodies, Play, keep, record_bodies
from audit.attacks.stage import World, attack
from keys.authority import Authority
from keys.enrolment import make_request, read_request
from keys.errors import RemoteProtocolError, SecGeoError
from keys.identity import Identity
from keys.labels import Label
from keys.roster import RosterEntry, add_entry, load_root, make_roster, read_roster, revoke
from keys.signed import sign_document, verify_document
from protocols import messages as m
from protocols import sealing
from protocols import transcript as t
from protocols.agreement import (
    Agreement,
    RosterPin,
    agreement_digest,
    read_agreement,
    write_agreement,
)
from protocols.attempt_node import Parties, open_contribution
from protocols.bfv import InProcess
from protocols.encoding import FixedPoint, Uint32Vector
from protocols.messages import AGGREGATOR
from protocols.policy import LocalPolicy, check_policy
from protocols.rings import Total, make_ring
from protocols.sealing import AttemptId
from protocols.study_key import StudyKey
from secgeo.study import AGREEMENT, ROSTER, check_documents

# --- malicious aggregator: who is in the sum


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
    network, victim, held = world.network(), world.names[0], world.names[1]
    play = Play(network)

    @play.tell("KeySet")
    def withhold(message: m.Message, to: str) -> Bodies:
        if to != victim or not isinstance(message.body, m.KeySet):
            return keep(message)
        keys = tuple(key for key in message.body.keys if m.claimed_sender(key) != held)
        return [(m.KeySet(message.body.digests, keys), b"")]

    play.must_refuse = [victim]
    play.run()
    play.gives(play.has_sent(victim, m.SealedSeeds), f"{victim} went on without the keys of {held}")
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


# --- ... other parameters


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


# --- ... both kinds of shares, two survivor sets, too few votes


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


def listed(names: Iterable[str]) -> str:
    """Names in one line."""
    return ", ".join(names)


# --- ... a second sum, an old one, a late upload


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


# --- ... the sum and its record


def _nobody_takes_it(play: Play) -> Play:
    play.must_refuse = play.network.names
    play.run()
    taken = [name for name in play.honest if play.has_sent(name, m.Receipt)]
    play.gives(bool(taken), f"{listed(taken)} countersigned it")
    return play


def one_more(values: Uint32Vector) -> Uint32Vector:
    """The values, one of them changed by one."""
    values[7] += 1
    return values


def _rolled(values: Uint32Vector) -> Uint32Vector:
    values[:] = np.roll(values, 1)
    return values


def _truncated(values: Uint32Vector) -> Uint32Vector:
    values[values.size // 2 :] = values[values.size // 2]
    return values


def _changed_sum(world: World, change: Change) -> Play:
    play = Play(world.network())
    announce(play, lambda total: changed_total(play.network, total, change))
    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "changed-sum",
    "one value of the sum is changed by the smallest step, and the record signed anew to fit",
    "somebody accepts it",
)
def _a_changed_sum(world: World) -> Play:
    return _changed_sum(world, one_more)


@attack("aggregator", "changed-sum", "the values of the sum are re-ordered, the record fits", "somebody accepts it")
def _a_reordered_sum(world: World) -> Play:
    return _changed_sum(world, _rolled)


@attack("aggregator", "changed-sum", "the second half of the sum is cut off, the record fits", "somebody accepts it")
def _a_truncated_sum(world: World) -> Play:
    return _changed_sum(world, _truncated)


@attack("aggregator", "changed-sum", "the sum is right, its tag is another one", "somebody accepts it")
def _another_tag(world: World) -> Play:
    play = Play(world.network())
    announce(play, lambda total: total, lambda tag: tag + 1)
    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "changed-sum",
    "a hospital that lost its connection before it voted in round 2 is sent sum and record of round 1 as those of round 2",
    "it accepts them",
    spare=1,
)
def _a_replayed_sum(world: World) -> Play:
    network, victim, old = world.network(2), world.names[-1], list[tuple[m.AnyBody, bytes]]()
    play = Play(network)

    @play.hear("SurvivorVote")
    def mute(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if (message.sender, message.round) == (victim, 2) else [data]

    @play.tell("Survivors")
    def unasked(message: m.Message, to: str) -> Bodies:
        return [] if (to, message.round) == (victim, 2) else keep(message)

    @play.tell("SumChunk", "RoundResult")
    def replay(message: m.Message, to: str) -> Bodies:
        if to != victim:
            return keep(message)
        if message.round == 1:
            old.extend(keep(message))
            return keep(message)
        sent, old[:] = (list(old), []) if isinstance(message.body, m.RoundResult) else ([], old)
        return sent

    play.must_refuse = [victim]
    play.must_sum = [name for name in network.names if name != victim]
    play.run()
    play.gives(
        2 in [summed.round for summed in network.sums[victim]], f"{victim} took the sum of round 1 for that of 2"
    )
    return play


@attack(
    "aggregator",
    "changed-sum",
    "the record of a sum carries fewer votes than the threshold",
    "somebody accepts it",
)
def _a_record_with_too_few_votes(world: World) -> Play:
    play = Play(world.network())

    @play.tell("RoundResult")
    def strip(message: m.Message, _to: str) -> Bodies:
        if not isinstance(message.body, m.RoundResult):
            return keep(message)
        record = record_bodies([message.body.record])[0]
        survivors = record.survivors if isinstance(record, t.RoundRecord) else ()
        kept = world.agreement.secure_sum.threshold - 1
        bare = tuple(
            msgspec.structs.replace(survivor, signature=survivor.signature if index < kept else "")
            for index, survivor in enumerate(survivors)
        )
        return [(m.RoundResult(resign(play.network.identities[AGGREGATOR], message.body.record, survivors=bare)), b"")]

    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "multiple",
    "twice the sum with twice the sum of its tags, where that stays in the range of a sum",
    "somebody accepts it",
)
def _a_multiple_of_the_sum(world: World) -> Play:
    network = world.network()
    low = -0.75 * FixedPoint.from_agreement(network.agreement).limit
    network.vectors = lambda _name, _round: np.full(network.size, low)
    play = Play(network)
    announce(
        play, lambda total: changed_total(network, total, lambda values: values * np.uint32(2)), lambda tag: 2 * tag
    )
    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "latecomer",
    "a hospital that took no part is sent a changed sum, countersigned by as many colluders as the agreement tolerates",
    "it accepts it",
    spare=1,
)
def _a_wrong_sum_for_a_latecomer(world: World) -> Play:
    names, late = world.names, world.names[-1]
    allies = names[: max(1, world.agreement.colluders_tolerated)] if world.agreement.colluders_tolerated else []
    play = Play(world.network(), colluders=allies)
    network = play.network

    @play.hear("Ready")
    def absent(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == late else [data]

    def receipts(line: bytes) -> tuple[tuple[str, bytes], ...]:
        statement = t.receipt_statement(network.digest, 1, t.line_digest(line))
        signed = tuple((name, network.identities[name].sign(Label.RECEIPT, statement)) for name in allies)
        return signed * 4

    announce(play, lambda total: changed_total(network, total, one_more), victims=[late], receipts=receipts)
    play.must_sum = [name for name in names if name != late and name not in allies]
    play.run()
    play.gives(bool(network.sums[late]), f"{late} accepted it")
    return play


@attack(
    "aggregator",
    "two-stories",
    "a hospital is shown two signed records of one round",
    "it countersigns both, or stays",
)
def _two_records_of_one_round(world: World) -> Play:
    play, victim = Play(world.network()), world.names[1]

    @play.tell("RoundResult")
    def both(message: m.Message, to: str) -> Bodies:
        if to != victim or not isinstance(message.body, m.RoundResult):
            return keep(message)
        other = resign(play.network.identities[AGGREGATOR], message.body.record, upload_bytes=1)
        return [(message.body, b""), (m.RoundResult(other), b"")]

    play.must_refuse = [victim]
    play.run()
    signed = {head.body.signature for name, head in play.sent if name == victim and isinstance(head.body, m.Receipt)}
    play.gives(len(signed) > 1, f"{victim} countersigned {len(signed)} records of one round")
    kept = {line for _, line in play.network.journals[victim].receipts}
    play.gives(len(kept) < 2, f"{victim} kept no proof of the two records")
    return play


@attack(
    "aggregator",
    "fork",
    "one hospital is told that round 1 was lost, the others apply its sum; then all are asked to go on together",
    "somebody sums round 2 with who builds on another sum",
)
def _a_round_lost_for_one_only(world: World) -> Play:
    play, victim = Play(world.network(2)), world.names[1]
    play.loosen()

    @play.tell("SumChunk", "RoundResult")
    def lost(message: m.Message, to: str) -> Bodies:
        if (to, message.round) != (victim, 1):
            return keep(message)
        if isinstance(message.body, m.RoundResult):
            play.say(to, (1, 1), m.AttemptFailed("too few votes", final=True))
        return []

    @play.tell("RoundOpen")
    def as_if_lost(message: m.Message, to: str) -> Bodies:
        return [(m.RoundOpen(0), b"")] if (to, message.round) == (victim, 2) else keep(message)

    play.must_refuse = play.network.names
    play.run()
    summed = [name for name in play.honest if any(summed.round == 2 for summed in play.network.sums[name])]
    play.gives(bool(summed), f"{listed(summed)} summed round 2 across the fork")
    return play


@attack(
    "aggregator",
    "order",
    "a hospital that takes part in no sum is shown that of round 2 before it has that of round 1",
    "it applies round 2 without round 1",
    spare=1,
)
def _sums_out_of_order(world: World) -> Play:
    network, late = world.network(3), world.names[-1]
    play, second = Play(network), False

    @play.hear("Ready")
    def absent(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == late else [data]

    @play.tell("SumChunk", "RoundResult")
    def hold_back(message: m.Message, to: str) -> Bodies:
        nonlocal second
        if to == late and message.round == 2 and isinstance(message.body, m.RoundResult):
            second = True
        return [] if to == late and message.round == 1 and not second else keep(message)

    @play.hear("Join")
    def deaf(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == late and network.aggregator._round > 0 and not second else [data]

    play.must_sum = network.names
    play.run()
    rounds = [summed.round for summed in network.sums[late]]
    play.gives(rounds != sorted(rounds) or (bool(rounds) and rounds[0] != 1), f"{late} applied rounds {rounds}")
    return play


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "random bytes": lambda data: os.urandom(len(data)),
    "a length beyond the end": lambda data: b"\xff\xff\xff\xff" + data[4:],
    "half a message": lambda data: data[: len(data) // 2],
    "one byte": lambda data: data[:1],
    "one byte too many": lambda data: data + b"\0",
    "deep nesting": lambda _data: (1 << 16).to_bytes(4) + b"\x91" * (1 << 16),
    "other types": lambda _data: (4).to_bytes(4) + msgspec.msgpack.encode([1, 2, 3]),
    "more than the limit": lambda _data: bytes(m.MESSAGE_LIMIT_BYTES + 1),
    "a changed bit": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
}


@attack(
    "aggregator",
    "decoders",
    f"hospitals get broken messages: {', '.join(BROKEN)}",
    "a hospital crashes, hangs or obeys",
    carried=False,
)
def _broken_messages_of_the_aggregator(world: World) -> Play:
    """Every kind to a fresh machine of one hospital."""
    network, name = world.network(), world.names[0]
    play = Play(network)
    genuine = play.sign(AGGREGATOR, (1, 0), m.RoundOpen(0))
    for kind, spoil in BROKEN.items():
        play.took_place = True
        try:
            answer = network.new_node(name).receive(spoil(genuine))
        except RemoteProtocolError as fault:
            network.faults.setdefault(name, fault)
            play.gives(fault.peer != AGGREGATOR, f"{kind}: {name} blamed {fault.peer}")
        except Exception as error:  # whatever it is, it is evidence
            play.crashes.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        else:
            play.gives(True, f"{name} answered {len(answer)} messages to {kind}")
    play.must_refuse = [name]
    return play


@attack(
    "aggregator",
    "decoders",
    "an agreement, a roster, a certificate, an enrolment request and a transcript line are broken in the same ways",
    "one of them is taken, or its decoder raises anything but a typed error",
    carried=False,
)
def _broken_documents(world: World) -> Play:
    play, network = Play(world.network()), world.network()
    identity, authority = network.identities[world.names[0]], Authority.create("Audit")
    request, now = make_request(identity), authority.root.not_valid_after_utc - timedelta(days=1)
    roster, signature = make_roster(authority, "Audit", 1, 1, [_enrol(authority, identity)])
    writer = t.TranscriptWriter(identity)
    line = writer.append(t.StudyClosed(rounds_completed=0, reason="audit"))
    agreement = write_agreement(world.agreement)
    signed = sign_document(authority.sign, Label.AGREEMENT, agreement)

    def decode_agreement(data: bytes) -> None:
        read_agreement(data)
        verify_document(authority.public_key, Label.AGREEMENT, data, signed)

    decoders: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
        "agreement": (agreement, decode_agreement),
        "roster": (roster, lambda data: read_roster(data, signature, authority.root, now=now)),
        "certificate": (authority.root_pem, lambda data: load_root(data, authority.fingerprint)),
        "request": (request, read_request),
        "transcript": (line, lambda data: t.read_line(data, identity.public_key)),
    }
    play.took_place = True
    for (document, (genuine, decode)), (kind, spoil) in product(decoders.items(), BROKEN.items()):
        try:
            decode(spoil(genuine))
        except SecGeoError:
            continue
        except Exception as error:  # whatever it is, it is evidence
            play.crashes.append(f"{document}, {kind}: {type(error).__name__}: {error}"[:300])
        else:
            play.gives(True, f"{document}: {kind} was taken")
    return play


@attack(
    "aggregator",
    "documents",
    "a site gets wrong documents: signed by another authority, of weaker rules, an old roster, one in which a member is revoked or has "
    "another certificate, another root; and an agreement below its policy",
    "one of them is taken",
    carried=False,
)
def _wrong_documents(world: World) -> Play:
    play = Play(world.network())
    members, victim = world.names, world.names[-1]
    authority, other = Authority.create("Audit"), Authority.create("Audit")
    now = authority.root.not_valid_after_utc - timedelta(days=1)
    entries = {name: _enrol(authority, play.network.identities[name]) for name in [*members, AGGREGATOR]}
    older, older_signature = make_roster(authority, "Audit", 1, 1, entries.values())
    roster, signature = make_roster(authority, "Audit", 2, 2, entries.values())
    read = read_roster(roster, signature, authority.root, now=now)
    agreement = msgspec.structs.replace(
        world.agreement,
        roster=RosterPin(2, 2, read.digest.hex(), authority.fingerprint),
        members=tuple(
            msgspec.structs.replace(member, certificate_fingerprint=entries[member.node_id].certificate_fingerprint)
            for member in world.agreement.members
        ),
    )
    text = write_agreement(agreement)
    weak = text.replace(f"threshold = {agreement.secure_sum.threshold}".encode(), b"threshold = 2", 1)
    revoked, revoked_signature = revoke(authority, read, victim)
    anew = _enrol(authority, Identity.generate(victim, "hospital"))
    changed, changed_signature = add_entry(authority, read, anew, replace=True)
    genuine = {
        AGREEMENT: text,
        f"{AGREEMENT}.sig": sign_document(authority.sign, Label.AGREEMENT, text),
        ROSTER: roster,
        f"{ROSTER}.sig": signature,
    }
    wrong: dict[str, dict[str, bytes]] = {
        "an agreement of another authority": {f"{AGREEMENT}.sig": sign_document(other.sign, Label.AGREEMENT, text)},
        "an agreement of weaker rules": {
            AGREEMENT: weak,
            f"{AGREEMENT}.sig": sign_document(authority.sign, Label.AGREEMENT, weak),
        },
        "a roster of another authority": {f"{ROSTER}.sig": other.sign_roster(roster)},
        "an old roster": {ROSTER: older, f"{ROSTER}.sig": older_signature},
        "a revoked member": {ROSTER: revoked, f"{ROSTER}.sig": revoked_signature},
        "another certificate": {ROSTER: changed, f"{ROSTER}.sig": changed_signature},
    }
    check_documents(
        genuine, authority.root, now=now
    )  # so that what is refused below is refused for what is wrong with it
    play.took_place = True
    strict = LocalPolicy(min_threshold=agreement.secure_sum.threshold + 1)
    tries: dict[str, Callable[[], object]] = {
        kind: lambda change=change: check_documents(genuine | change, authority.root, now=now)  # type: ignore[misc]
        for kind, change in wrong.items()
    }
    tries["another root"] = lambda: load_root(other.root_pem, authority.fingerprint)
    tries["an agreement below the policy"] = lambda: check_policy(agreement, strict, epsilon=0.0)
    for kind, take in tries.items():
        try:
            take()
        except SecGeoError:
            continue
        play.gives(True, f"{kind} was taken")
    return play


def _enrol(authority: Authority, identity: Identity) -> RosterEntry:
    request = read_request(make_request(identity))
    root = authority.root
    return RosterEntry.enrolled(request, authority.issue(request, root.not_valid_before_utc, root.not_valid_after_utc))


# --- ... ciphertexts and the study key


@attack(
    "aggregator",
    "ciphertext-sum",
    "one hospital's upload is sent in the place of the sum, with a record signed anew",
    "somebody accepts it, and so tells what is in it",
    needs="ciphertexts",
)
def _one_upload_in_place_of_the_sum(world: World) -> Play:
    network, victim = world.network(), world.names[0]
    play = Play(network)

    def alone(_total: Total) -> Total:
        ring, chunks = make_ring(network.agreement, network.ciphers), play.knowledge.attempts[1, 1].chunks[victim]
        total = ring.zeros(network.size)
        step = network.agreement.secure_sum.chunk_values
        ring.add(total, lambda: [(index * step, chunks[index]) for index in sorted(chunks)])
        return total

    announce(play, alone)
    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "study-keys",
    "a colluder deals one hospital another study key than the others have",
    "somebody votes for a sum with it",
    needs="ciphertexts",
)
def _two_study_keys(world: World) -> Play:
    names = world.names
    victim, ally = names[-1], names[0]
    play = Play(world.network(), colluders=[ally])
    play.loosen()
    network = play.network
    other = StudyKey(InProcess().generate_key(packing_of(network.agreement).parameters))
    boxes: dict[str, bytes] = {}

    @play.hear("Join")
    def remember(message: m.Message, data: bytes) -> Sequence[bytes]:
        if isinstance(message.body, m.Join):
            boxes[message.sender] = message.body.box
        return [data]

    @play.tell("DealtKey")
    def deal_another(message: m.Message, to: str) -> Bodies:
        if to != victim:
            return keep(message)
        sealed = other.seal(boxes[victim], network.digest, ally, victim)
        return [(m.DealtKey(play.sign(ally, (0, 0), m.SealedKey(victim, other.id, sealed))), b"")]

    play.must_refuse = play.honest
    play.run()
    votes = [name for name in play.honest if play.has_sent(name, m.SurvivorVote)]
    mixed = {network.journals[name].secret for name in votes}
    play.gives(len(mixed) > 1 and bool(votes), f"{listed(votes)} voted for a sum under two keys")
    play.gives(any(map(network.sums.get, play.honest)), "a sum under two keys was accepted")
    return play


@attack(
    "aggregator",
    "study-keys",
    "a colluder's new study key is brought to a hospital after a round was opened",
    "the hospital takes it",
    needs="ciphertexts",
)
def _another_study_key_in_the_midst_of_a_study(world: World) -> Play:
    names = world.names
    victim, ally = names[-1], names[0]
    play = Play(world.network(2), colluders=[ally])
    network = play.network
    other = StudyKey(InProcess().generate_key(packing_of(network.agreement).parameters))
    boxes: dict[str, bytes] = {}

    @play.hear("Join")
    def remember(message: m.Message, data: bytes) -> Sequence[bytes]:
        if isinstance(message.body, m.Join):
            boxes[message.sender] = message.body.box
        return [data]

    @play.tell("AttemptOpen")
    def deal_again(message: m.Message, to: str) -> Bodies:
        if to == victim and not play.took_place:
            sealed = other.seal(boxes[victim], network.digest, ally, victim)
            play.say(to, (0, 0), m.DealtKey(play.sign(ally, (0, 0), m.SealedKey(victim, other.id, sealed))))
        return keep(message)

    play.run()
    play.must_sum = play.honest
    play.gives(network.journals[victim].secret == other.secret, f"{victim} changed its study key")
    return play


@attack(
    "aggregator",
    "study-keys",
    "a hospital is asked to seal the study key to somebody whose request no member has signed",
    "it seals the key",
    needs="ciphertexts",
)
def _a_request_for_the_key_that_nobody_signed(world: World) -> Play:
    play, victim = Play(world.network()), world.names[0]
    stranger = Identity.generate(world.names[1], "hospital")
    public = sealing.public_key_bytes(bytes(32), AttemptId(play.network.digest, 0, 0))
    forged = m.encode(stranger, AttemptId(play.network.digest, 0, 0), m.Join(1, m.NO_KEY, public))

    @play.tell("RoundOpen")
    def ask(message: m.Message, to: str) -> Bodies:
        if to == victim:
            play.say(to, (0, 0), m.DealKey((forged,), make=False))
        return keep(message)

    play.must_refuse = [victim]
    play.run()
    sealed = [head.body for name, head in play.sent if name == victim and isinstance(head.body, m.SealedKey)]
    keys = Counter(body.recipient for body in sealed)  # one was asked for by a member
    play.gives(keys[world.names[1]] > 1, f"{victim} sealed the study key to a stranger")
    return play
