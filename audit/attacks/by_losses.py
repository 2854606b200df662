"""Losses, and lines that are cut: nobody is malicious, and nobody must be blamed."""

from __future__ import annotations

from collections.abc import Sequence

from audit.attacks.play import Play, instead, listed
from audit.attacks.stage import World, attack, member
from protocols import messages as m


def _lose(kind: str) -> None:
    masks = kind in ("RoundKeys", "SealedSeeds", "Unmasking")

    @attack(
        "loss",
        "losses",
        f"a hospital is lost, for good, as it sends {kind}",
        "the others lose the sum, or somebody is blamed",
        needs="masks" if masks else "",
        spare=1,
    )
    def a_hospital_lost(world: World) -> Play:
        play = member(world)

        def lose(message: m.Message, _data: bytes) -> Sequence[bytes]:
            play.network.lose(message.sender)
            return []

        instead(play, kind, lose)
        play.run()
        play.gives(bool(play.network.expelled), "somebody was put out")
        return play


for _kind in ("RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking"):
    _lose(_kind)


@attack(
    "loss",
    "losses",
    "so many are lost before their upload is whole that fewer than the agreed minimum remain",
    "something is opened, or somebody is blamed",
)
def _too_many_lost(world: World) -> Play:
    lost = world.names[: world.spare + 1]
    play = Play(world.network(), *lost)

    @play.hear("UploadDone")
    def lose(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender not in lost:
            return [data]
        play.took_place = True
        play.network.lose(message.sender)
        return []

    play.run()
    opened = [name for name in play.honest if play.has_sent(name, m.Unmasking) or play.network.sums[name]]
    play.gives(bool(opened), f"{listed(opened)} opened or accepted a sum below the minimum")
    play.gives(bool(play.network.expelled), "somebody was put out")
    return play


@attack(
    "loss",
    "cut-lines",
    "the line of one hospital is cut at every message that matters, twenty times; it connects again each time",
    "it is put out, or the others lose the sum",
    spare=1,
)
def _a_line_that_is_cut_again_and_again(world: World) -> Play:
    play, cuts = member(world, 2), 0
    victim = play.culprits[0]

    @play.hear("RoundKeys", "SealedSeeds", "UploadChunk", "UploadDone", "SurvivorVote", "Unmasking", "Receipt")
    def cut(message: m.Message, data: bytes) -> Sequence[bytes]:
        nonlocal cuts
        if message.sender != victim or cuts >= 20:
            return [data]
        cuts, play.took_place = cuts + 1, True
        play.network.disconnect(victim)
        return []

    play.run()
    play.gives(bool(play.network.expelled), "somebody was put out")
    play.gives(
        victim in play.network.faults,
        f"{victim} left, blaming {getattr(play.network.faults.get(victim), 'peer', 'nobody')}",
    )
    return play
