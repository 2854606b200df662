"""What colluders know, and what an aggregator can do with it."""

from __future__ import annotations

import numpy as np

from audit.attacks.forged import announce, changed_total, one_more
from audit.attacks.play import Bodies, Play, keep
from audit.attacks.stage import World, attack
from protocols import messages as m
from protocols import tags
from protocols.messages import AGGREGATOR
from protocols.sealing import AttemptId


def _listen(world: World, colluders: int) -> Play:
    play = Play(world.network(), colluders=world.names[1 : colluders + 1])
    play.took_place = True
    return play


def _surround(world: World, colluders: int) -> Play:
    """Colluders hold shares of the first hospital: in a sparse graph that follows from a hash over fresh keys, so they are won later."""
    play, victim = Play(world.network()), world.names[0]

    @play.tell("KeySet")
    def win(message: m.Message, to: str) -> Bodies:
        if not play.took_place and to == victim and isinstance(message.body, m.KeySet):
            address = message.round, message.attempt
            play.knowledge.watch(AGGREGATOR, victim, play.sign(AGGREGATOR, address, message.body))
            play.recruit(*play.knowledge.graph(victim, address).neighbours(victim)[:colluders])
            play.took_place = True
        return keep(message)

    return play


@attack(
    "aggregator",
    "colluders",
    "everybody follows the protocol; as many hospitals as the threshold less one tell the aggregator all that they know",
    "the vector of another hospital is read",
    needs="masks",
)
def _colluders_below_the_threshold(world: World) -> Play:
    """They interpolate with as many shares as they have, and with fewer, and take off what they know of the coefficients."""
    ring = world.agreement.secure_sum
    colluders = min(ring.shares_needed - 1, len(world.names) - 2)
    play = (_surround if ring.neighbours else _listen)(world, colluders).run()
    play.must_sum = play.honest
    return play


def has_control(world: World) -> bool:
    """Whether there is a case in which the protocol gives in: there are masks, and hospitals beside as many colluders as break them."""
    ring = world.agreement.secure_sum
    return ring.masked and ring.shares_needed < len(world.names)


def control(world: World) -> bool | None:
    """Whether the attacker reads a vector where the protocol gives in: to as many colluders as the threshold. None: no such case.

    In a sparse graph that depends on where they stand, so there all others collude.
    """
    ring = world.agreement.secure_sum
    if not has_control(world):
        return None
    play = _listen(world, len(world.names) - 1 if ring.neighbours else ring.shares_needed).run()
    return play.knowledge.reads(world.names[0])


@attack(
    "aggregator",
    "colluder-tags",
    "a colluder tells the tag seed, and the aggregator announces another sum whose tags fit",
    "a vector is read, or the aggregator can deny it",
)
def _a_sum_with_fitting_tags(world: World) -> Play:
    ally = world.names[-1]
    play = Play(world.network(), colluders=[ally])
    network, address = play.network, AttemptId(play.network.digest, 1, 1)

    def retag(tag: int) -> int:
        key = network.nodes[ally]._study_key
        seed = network.journals[ally].tag_seed(1, 1)
        if key is not None and not world.agreement.secure_sum.masked:
            seed = key.tag_seed(address)
        step = one_more(np.zeros(network.size, dtype=np.uint32))
        return tag + tags.Tagger(seed, address).part(step)

    announce(play, lambda total: changed_total(network, total, one_more), retag)
    play.granted = ["wrong"]
    play.run()
    for name in play.honest:
        play.gives(not network.journals[name].receipt(1), f"{name} kept no record that the aggregator signed")
    return play
