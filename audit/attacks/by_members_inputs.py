"""What malicious members try with what they put into the sum, and by silence."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
import numpy as np

from audit.attacks.play import Play, instead, replaced
from audit.attacks.stage import World, attack, member
from protocols import messages as m
from protocols import transcript as t
from protocols.encoding import FixedPoint, Float64Vector


@attack("node", "not-finite", "the training of a hospital ends in NaN", "NaN is sent")
def _not_a_number(world: World) -> Play:
    play = member(world)
    network, bad, vectors = play.network, play.culprits[0], play.network.vectors

    def spoilt(name: str, number: int) -> Float64Vector:
        vector = vectors(name, number)
        if name == bad:
            play.took_place, vector[5] = True, np.nan
        return vector

    network.vectors = spoilt
    play.run()
    fault = network.faults.get(bad)
    play.gives(type(fault).__name__ != "LocalProtocolError", f"{bad} did not refuse to send NaN")
    return play


@attack(
    "node", "not-finite", "a hospital's update is far out of range", "it moves the sum by more than the agreed range"
)
def _out_of_range(world: World) -> Play:
    play = member(world)
    network, far, vectors = play.network, play.culprits[0], play.network.vectors
    limit = FixedPoint.from_agreement(network.agreement).limit

    def vector(name: str, number: int, value: float) -> Float64Vector:
        drawn = vectors(name, number)
        if name == far:
            play.took_place, drawn[5] = True, value
        return drawn

    network.vectors = lambda name, number: vector(name, number, 1e6 * limit)
    play.run()
    network.vectors = lambda name, number: vector(name, number, limit)
    return play


def _stall(kind: str) -> None:
    masks = kind in ("RoundKeys", "SealedSeeds", "Unmasking")

    @attack(
        "node",
        "silence",
        f"a member is silent where {kind} is due",
        "the others wait for more than a deadline, or lose the sum",
        needs="masks" if masks else "",
        spare=1,
    )
    def a_silent_member(world: World) -> Play:
        play = member(world)
        instead(play, kind, lambda _message, _data: [])
        play.run()
        agreed = world.agreement.deadlines
        longest = max(agreed.join_seconds, agreed.train_seconds, agreed.phase_seconds)
        play.gives(play.network.now > longest, f"the study took {play.network.now:g} s; a deadline is {longest:g} s")
        play.gives(bool(play.network.expelled), "the silent were put out")
        return play


for _kind in ("Ready", "RoundKeys", "SealedSeeds", "UploadDone", "SurvivorVote", "Unmasking", "Receipt"):
    _stall(_kind)


@attack(
    "node",
    "no-ciphertexts",
    "a member uploads bytes that are no ciphertexts, with a digest that fits",
    "the sum is lost, or spoilt",
    needs="ciphertexts",
    spare=1,
)
def _an_upload_of_no_ciphertexts(world: World) -> Play:
    play, digests = member(world), dict[int, bytes]()

    def chunk(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.UploadChunk):
            return [data]
        last = (message.body.index + 1) * world.agreement.secure_sum.chunk_values >= world.size
        tail = b"\xff" * len(message.tail) if last else bytes(message.tail)
        digests[message.body.index] = m.chunk_digest(tail)
        return replaced(play, message, m.UploadChunk(message.body.index, m.chunk_digest(tail)), tail)

    def done(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.UploadDone):
            return [data]
        digest = t.upload_digest(b"".join(digests[index] for index in sorted(digests)), message.body.tag)
        return replaced(play, message, m.UploadDone(digest, message.body.view, message.body.tag))

    instead(play, "UploadChunk", chunk)
    instead(play, "UploadDone", done)
    play.must_be_put_out = play.culprits
    return play.run()


@attack(
    "node",
    "no-study-key",
    "the member who is to make the study key claims to have one, and deals none",
    "the study does not begin",
    needs="ciphertexts",
    spare=1,
)
def _a_study_key_that_is_never_dealt(world: World) -> Play:
    play = member(world)
    instead(play, "SealedKey", lambda _message, _data: [], (0,))
    return play.run()


@attack(
    "node",
    "rubbish-keys",
    "the member who makes the study key seals rubbish to the others",
    "the study does not begin, or somebody takes it",
    needs="ciphertexts",
    spare=1,
)
def _a_dealer_that_seals_rubbish(world: World) -> Play:
    play = member(world)

    def rubbish(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.SealedKey):
            return [data]
        return replaced(
            play, message, msgspec.structs.replace(message.body, sealed=os.urandom(len(message.body.sealed)))
        )

    instead(play, "SealedKey", rubbish, (0,))
    return play.run()
