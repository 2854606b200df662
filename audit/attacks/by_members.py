"""What malicious members try, what happens when honest ones are lost, and what colluders know."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

import msgspec
import numpy as np

from audit.attacks.by_aggregator import BROKEN, listed, one_more
from audit.attacks.forged import announce, changed_total
from audit.attacks.knowledge import peek
from audit.attacks.play import Hearing, Play, record_bodies
from audit.attacks.stage import World, attack
from keys.identity import Identity
from keys.labels import Label
from protocols import messages as m
from protocols import sealing, tags
from protocols import transcript as t
from protocols.attempt_node import AttemptNode, Shares
from protocols.encoding import FixedPoint, Float64Vector
from protocols.messages import AGGREGATOR
from protocols.sealing import AttemptId

# --- malicious members


def _member(world: World, rounds: int = 1, liar: int = 0) -> Play:
    """One member plays false; all others must go on without it where the agreement allows one to be lost."""
    play = Play(world.network(rounds), world.names[liar])
    play.must_sum = play.honest if world.spare else ()
    return play


def _instead(play: Play, kind: str, change: Hearing, rounds: Collection[int] = (1,)) -> None:
    """The liar sends something else instead of a kind of message."""

    @play.hear(kind)
    def lie(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender not in play.culprits or message.round not in rounds:
            return [data]
        play.took_place = True
        return change(message, data)


def _replaced(play: Play, message: m.Message, body: m.AnyBody, tail: bytes = b"") -> list[bytes]:
    return [play.sign(message.sender, (message.round, message.attempt), body, tail)]


@attack(
    "node",
    "messages",
    "a second upload of other values, with a digest of its own, behind the first",
    "it is added, or somebody else is blamed",
)
def _a_second_upload_with_another_digest(world: World) -> Play:
    play, chunks = _member(world), list[bytes]()
    liar = play.culprits[0]

    @play.hear("UploadChunk")
    def remember(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender == liar and isinstance(message.body, m.UploadChunk):
            other = bytes(byte ^ 1 for byte in message.tail)
            chunks.extend(_replaced(play, message, m.UploadChunk(message.body.index, m.chunk_digest(other)), other))
        return [data]

    def again(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.UploadDone):
            return [data]
        digests = b"".join(peek(chunk).body.digest for chunk in chunks)
        digest = t.upload_digest(digests, message.body.tag)
        done = _replaced(play, message, m.UploadDone(digest, message.body.view, message.body.tag))
        # Over sockets what follows its end may come when all have ended theirs: it is not heard then, and nobody need be named.
        return [data, *chunks, *done] if world.over == "memory" else [*chunks, data, *done]

    _instead(play, "UploadDone", again)
    play.must_be_put_out = [liar]
    return play.run()


def _break(kind: str, spoil: Callable[[bytes], bytes]) -> None:
    @attack("node", "messages", f"a member sends {kind} instead of a message", "the study stops, or another is blamed")
    def broken_message_of_a_member(world: World) -> Play:
        play = _member(world)
        due = "RoundKeys" if world.agreement.secure_sum.masked else "UploadDone"
        _instead(play, due, lambda _message, data: [spoil(data)])
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
    play, stolen = _member(world, liar=-1), list[bytes]()
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
    play = _member(world)
    liar = play.culprits[0]
    old = Identity.generate(liar, "hospital")

    def sign_anew(message: m.Message, _data: bytes) -> Sequence[bytes]:
        address = AttemptId(play.network.digest, message.round, message.attempt)
        return [m.encode(old, address, message.body, bytes(message.tail))]

    _instead(play, "Ready", sign_anew)
    play.must_be_put_out = [liar]
    return play.run()


@attack(
    "node",
    "shares",
    "a member reveals wrong shares of all others",
    "the sum is lost, or an owner is blamed",
    needs="masks",
    spare=1,
)
def _wrong_shares_revealed(world: World) -> Play:
    play = _member(world)
    liar = play.culprits[0]

    def lie(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.Unmasking):
            return [data]
        shares = tuple((name, share if name == liar else bytes(33)) for name, share in message.body.self_shares)
        return _replaced(play, message, m.Unmasking(shares, message.body.pair_shares))

    _instead(play, "Unmasking", lie)
    play.must_be_put_out = [liar]
    return play.run()


class _DealsZeros(AttemptNode):
    """Shares of no secret, in round 1."""

    def _seal_for(self, peer: str, shares: Shares) -> m.SealedSeeds:
        if self._attempt.round == 1 and shares.self_share is not None:
            shares = Shares(bytes(33), shares.pair_share, shares.tag_seed)
        return super()._seal_for(peer, shares)


@attack(
    "node",
    "shares",
    "a member deals shares that fit no secret; there is a second round",
    "a holder is blamed, or the next round is lost too",
    needs="masks",
    spare=1,
)
def _wrong_shares_dealt(world: World) -> Play:
    play = _member(world, 2)
    play.took_place, play.node_attempt = True, _DealsZeros
    play.must_be_put_out = play.culprits
    return play.run()


class _SealsOtherContributions(AttemptNode):
    """Contributions that its pair master does not give, under the digest of those that it does, in round 1."""

    def _seal_for(self, peer: str, shares: Shares) -> m.SealedSeeds:
        dealt = super()._seal_for(peer, shares)
        if self._attempt.round > 1:
            return dealt
        other, info = bytes(32), sealing.contribution_info(self._attempt, self._cohort_digest, self._me, peer)
        return msgspec.structs.replace(
            dealt,
            contribution=sealing.seal(self._keys[peer].pair_public, other, info),
            contribution_digest=sealing.contribution_digest(other, self._attempt, self._me, peer),
        )


@attack(
    "node",
    "contributions",
    "a member seals contributions that its pair master does not give, and is gone before it uploads; there is a second round",
    "a wrong sum is accepted, or another is blamed",
    needs="masks",
    spare=1,
)
def _contributions_of_no_pair_master(world: World) -> Play:
    play = _member(world, 2)
    play.took_place, play.node_attempt = True, _SealsOtherContributions
    liar = play.culprits[0]

    @play.hear("UploadChunk")
    def go(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender != liar or message.round > 1:
            return [data]
        play.network.lose(liar)
        return []

    play.must_be_put_out = [liar]
    return play.run()


@attack(
    "node",
    "complaints",
    "a member says falsely that what another sealed to it does not open; there is a second round",
    "an honest member is put out, or leaves",
    needs="masks",
)
def _a_false_complaint(world: World) -> Play:
    play, accused = _member(world, 2), world.names[-1]
    liar = play.culprits[0]
    _instead(play, "UploadChunk", lambda message, _data: _replaced(play, message, m.Complaint(accused)), (1, 2))
    play.must_sum = [name for name in play.honest if name != accused] if world.spare >= 2 else ()
    play.run()
    disputes = [entry for entry in record_bodies(play.network.lines) if isinstance(entry, t.Disputed)]
    play.gives(any(entry.accuser != liar for entry in disputes) or not disputes, "the transcript hides who complained")
    return play


class _DealsTwoSeeds(AttemptNode):
    """Another tag seed to one of those to whom it deals."""

    def _seal_for(self, peer: str, shares: Shares) -> m.SealedSeeds:
        if shares.tag_seed is not None and self._attempt.attempt == 1 and peer == max(self._keys.keys() - {self._me}):
            shares = Shares(shares.self_share, shares.pair_share, bytes(32))
        return super()._seal_for(peer, shares)


@attack(
    "node",
    "tag-seeds",
    "a dealer deals another tag seed to one member than to the others",
    "the sum of all is lost by its tags, and nobody is named",
    needs="masks",
)
def _two_tag_seeds_of_one_dealer(world: World) -> Play:
    """Who deals follows from a hash over fresh keys: try until it is the liar."""
    for _ in range(32):
        play = _member(world)
        play.node_attempt, play.must_sum = _DealsTwoSeeds, ()
        _note_dealers(play)
        play.run()
        if play.took_place or play.crashes:
            break
    disputes = [entry for entry in record_bodies(play.network.lines) if isinstance(entry, t.Disputed)]
    named = any(play.culprits[0] in (entry.accuser, entry.accused) for entry in disputes)
    play.gives(play.took_place and not named, "nobody disputed the second seed")
    return play


def _note_dealers(play: Play) -> None:
    """The attack took place if the liar was among the dealers."""

    @play.hear("SealedSeeds")
    def look(message: m.Message, data: bytes) -> Sequence[bytes]:
        attempt = play.network.nodes[message.sender]._attempt
        if message.sender in play.culprits and attempt is not None:
            play.took_place |= message.sender in attempt._graph.dealers
        return [data]


@attack(
    "node",
    "fork",
    "a member says that it builds on another sum, so that the others blame the aggregator for it",
    "they do",
    needs="masks",
)
def _a_member_that_builds_on_another_sum(world: World) -> Play:
    play = _member(world)

    def lie(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.RoundKeys):
            return [data]
        return _replaced(play, message, msgspec.structs.replace(message.body, last_record=bytes([1]) * 32))

    _instead(play, "RoundKeys", lie)
    play.must_be_put_out = play.culprits
    return play.run()


@attack("node", "survivors", "a member votes for another set of survivors", "its vote counts")
def _a_vote_for_another_set(world: World) -> Play:
    play = _member(world)
    signature = play.network.identities[play.culprits[0]].sign(Label.SURVIVORS, b"another set")
    _instead(play, "SurvivorVote", lambda message, _data: _replaced(play, message, m.SurvivorVote(signature)))
    play.must_be_put_out = play.culprits
    return play.run()


@attack("node", "multiple", "a member countersigns another record than it was sent", "its receipt counts")
def _a_receipt_for_another_record(world: World) -> Play:
    play = _member(world)
    signature = play.network.identities[play.culprits[0]].sign(Label.RECEIPT, b"another record")
    _instead(play, "Receipt", lambda message, _data: _replaced(play, message, m.Receipt(signature)))
    play.must_be_put_out = play.culprits
    return play.run()


@attack("node", "not-finite", "the training of a hospital ends in NaN", "NaN is sent")
def _not_a_number(world: World) -> Play:
    play = _member(world)
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
    play = _member(world)
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
        play = _member(world)
        _instead(play, kind, lambda _message, _data: [])
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
    play, digests = _member(world), dict[int, bytes]()

    def chunk(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.UploadChunk):
            return [data]
        last = (message.body.index + 1) * world.agreement.secure_sum.chunk_values >= world.size
        tail = b"\xff" * len(message.tail) if last else bytes(message.tail)
        digests[message.body.index] = m.chunk_digest(tail)
        return _replaced(play, message, m.UploadChunk(message.body.index, m.chunk_digest(tail)), tail)

    def done(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.UploadDone):
            return [data]
        digest = t.upload_digest(b"".join(digests[index] for index in sorted(digests)), message.body.tag)
        return _replaced(play, message, m.UploadDone(digest, message.body.view, message.body.tag))

    _instead(play, "UploadChunk", chunk)
    _instead(play, "UploadDone", done)
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
    play = _member(world)
    _instead(play, "SealedKey", lambda _message, _data: [], (0,))
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
    play = _member(world)

    def rubbish(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.SealedKey):
            return [data]
        return _replaced(
            play, message, msgspec.structs.replace(message.body, sealed=os.urandom(len(message.body.sealed)))
        )

    _instead(play, "SealedKey", rubbish, (0,))
    return play.run()


# --- losses, and lines that are cut


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
        play = _member(world)

        def lose(message: m.Message, _data: bytes) -> Sequence[bytes]:
            play.network.lose(message.sender)
            return []

        _instead(play, kind, lose)
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
    play, cuts = _member(world, 2), 0
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


# --- what colluders know


def _listen(world: World, colluders: int) -> Play:
    play = Play(world.network(), colluders=world.names[1 : colluders + 1])
    play.took_place = True
    return play


@attack(
    "aggregator",
    "colluders",
    "everybody follows the protocol; as many hospitals as the threshold less one tell the aggregator all that they know",
    "the vector of another hospital is read",
    needs="masks",
)
def _colluders_below_the_threshold(world: World) -> Play:
    needed = world.agreement.secure_sum.shares_needed
    play = _listen(world, min(needed - 1, len(world.names) - 2))
    play.must_sum = play.honest
    return play.run()


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
