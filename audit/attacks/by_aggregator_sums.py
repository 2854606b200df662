"""What a malicious aggregator tries with the sum and its record: another one, a multiple, two stories, a fork, another order."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from audit.attacks.forged import Change, announce, changed_total, nobody_takes_it, one_more, resign
from audit.attacks.play import Bodies, Play, keep, listed, record_bodies
from audit.attacks.stage import World, attack
from keys.labels import Label
from protocols import messages as m
from protocols import transcript as t
from protocols.encoding import FixedPoint, Uint32Vector
from protocols.messages import AGGREGATOR


def _rolled(values: Uint32Vector) -> Uint32Vector:
    values[:] = np.roll(values, 1)
    return values


def _truncated(values: Uint32Vector) -> Uint32Vector:
    values[values.size // 2 :] = values[values.size // 2]
    return values


def _changed_sum(world: World, change: Change) -> Play:
    play = Play(world.network())
    announce(play, lambda total: changed_total(play.network, total, change))
    return nobody_takes_it(play)


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
    return nobody_takes_it(play)


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

    return nobody_takes_it(play)


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
    return nobody_takes_it(play)


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
