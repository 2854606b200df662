"""What a malicious aggregator tries with ciphertexts and the study key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from audit.attacks.forged import announce, nobody_takes_it
from audit.attacks.knowledge import packing_of
from audit.attacks.play import Bodies, Play, keep, listed
from audit.attacks.stage import World, attack
from keys.identity import Identity
from protocols import messages as m
from protocols import sealing
from protocols.bfv import InProcess
from protocols.rings import Total, make_ring
from protocols.sealing import AttemptId
from protocols.study_key import StudyKey


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
    return nobody_takes_it(play)


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
