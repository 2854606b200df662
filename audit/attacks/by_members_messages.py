"""What malicious members try with messages: a second upload, broken ones, those of others, keys of an old roster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from audit.attacks.broken import BROKEN
from audit.attacks.knowledge import peek
from audit.attacks.play import Play, instead, replaced
from audit.attacks.stage import World, attack, member
from keys.identity import Identity
from protocols import messages as m
from protocols import transcript as t
from protocols.messages import AGGREGATOR
from protocols.sealing import AttemptId


@attack(
    "node",
    "messages",
    "a second upload of other values, with a digest of its own, behind the first",
    "it is added, or somebody else is blamed",
)
def _a_second_upload_with_another_digest(world: World) -> Play:
    play, chunks = member(world), list[bytes]()
    liar = play.culprits[0]

    @play.hear("UploadChunk")
    def remember(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender == liar and isinstance(message.body, m.UploadChunk):
            other = bytes(byte ^ 1 for byte in message.tail)
            chunks.extend(replaced(play, message, m.UploadChunk(message.body.index, m.chunk_digest(other)), other))
        return [data]

    def again(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.UploadDone):
            return [data]
        digests = b"".join(peek(chunk).body.digest for chunk in chunks)
        digest = t.upload_digest(digests, message.body.tag)
        done = replaced(play, message, m.UploadDone(digest, message.body.view, message.body.tag))
        # Over sockets what follows its end may come when all have ended theirs: it is not heard then, and nobody need be named.
        return [data, *chunks, *done] if world.over == "memory" else [*chunks, data, *done]

    instead(play, "UploadDone", again)
    play.must_be_put_out = [liar]
    return play.run()


def _break(kind: str, spoil: Callable[[bytes], bytes]) -> None:
    @attack("node", "messages", f"a member sends {kind} instead of a message", "the study stops, or another is blamed")
    def broken_message_of_a_member(world: World) -> Play:
        play = member(world)
        due = "RoundKeys" if world.agreement.secure_sum.masked else "UploadDone"
        instead(play, due, lambda _message, data: [spoil(data)])
        # Sockets take no message above the limit: its sender's line is cut, and the machine has nothing to name it for.
        cut = world.over == "sockets" and len(spoil(bytes(100))) > m.MESSAGE_LIMIT_BYTES
        play.must_be_put_out = () if cut else play.culprits
        return play.run()


for _kind, _spoil in BROKEN.items():
    _break(_kind, _spoil)


@attack(
    "node",
    "other-names",
    "a member sends what another has signed, as its own message",
    "the other is blamed, or it counts",
)
def _a_message_in_the_name_of_another(world: World) -> Play:
    play, stolen = member(world, liar=-1), list[bytes]()
    liar = play.culprits[0]

    @play.hear("RoundKeys" if world.agreement.secure_sum.masked else "UploadDone")
    def send(message: m.Message, data: bytes) -> Sequence[bytes]:
        """Whichever comes first, the liar's own is not sent, and the first that another sends is sent again by the liar."""
        if message.sender == liar:
            return []
        if not stolen:
            stolen.append(data)
            play.took_place = True
            play.network.inject(liar, AGGREGATOR, data)
        return [data]

    play.must_be_put_out = play.culprits
    return play.run()


@attack("node", "other-names", "a member signs with another key than the roster has", "its messages count")
def _keys_of_an_old_roster(world: World) -> Play:
    play = member(world)
    liar = play.culprits[0]
    old = Identity.generate(liar, "hospital")

    def sign_anew(message: m.Message, _data: bytes) -> Sequence[bytes]:
        address = AttemptId(play.network.digest, message.round, message.attempt)
        return [m.encode(old, address, message.body, bytes(message.tail))]

    instead(play, "Ready", sign_anew)
    play.must_be_put_out = [liar]
    return play.run()
