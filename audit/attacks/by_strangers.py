"""What strangers try at the door of a study over sockets: who has no key of the roster."""

from __future__ import annotations

from collections.abc import Sequence

from audit.attacks.play import Play
from audit.attacks.stage import World, attack
from audit.attacks.wire import WireNetwork
from audit.door import judge_knocks, knock
from protocols import messages as m
from protocols.messages import AGGREGATOR


@attack(
    "stranger",
    "strangers",
    "a stranger knocks while a round is under way: no encryption, a password, garbage, another protocol, a frame of 2^62 bytes, a broken "
    "handshake, a key that no roster has",
    "it is served, or a hospital is left without the sum",
    needs="sockets",
)
def _a_stranger_at_the_door(world: World) -> Play:
    network = world.network()
    play = Play(network, "a stranger")

    @play.hear("Ready")
    def interrupt(_message: m.Message, data: bytes) -> Sequence[bytes]:
        if not play.took_place and isinstance(network, WireNetwork):
            play.took_place = True
            server = network.identities[AGGREGATOR].curve_public
            status, detail = judge_knocks(network.endpoint.address, knock(network.endpoint.address, server))
            play.gives(status != "held", detail)
        return [data]

    play.must_sum = network.names
    return play.run()
