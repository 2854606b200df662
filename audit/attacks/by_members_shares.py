"""What malicious members try with what they deal, reveal, vote for and sign."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from audit.attacks.play import Play, instead, record_bodies, replaced
from audit.attacks.stage import World, attack, member
from keys.labels import Label
from protocols import messages as m
from protocols import sealing
from protocols import transcript as t
from protocols.attempt_node import AttemptNode, Shares


@attack(
    "node",
    "shares",
    "a member reveals wrong shares of all others",
    "the sum is lost, or an owner is blamed",
    needs="masks",
    spare=1,
)
def _wrong_shares_revealed(world: World) -> Play:
    play = member(world)
    liar = play.culprits[0]

    def lie(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.Unmasking):
            return [data]
        shares = tuple((name, share if name == liar else bytes(33)) for name, share in message.body.self_shares)
        return replaced(play, message, m.Unmasking(shares, message.body.pair_shares))

    instead(play, "Unmasking", lie)
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
    play = member(world, 2)
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
    play = member(world, 2)
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
    play, accused = member(world, 2), set[str]()
    liar = play.culprits[0]

    def complain(message: m.Message, data: bytes) -> Sequence[bytes]:
        """Of the last one that sealed something to it: in a sparse graph not everybody does."""
        attempt = play.network.nodes[liar]._attempt
        if attempt is None:
            return [data]
        last = max(attempt._graph.neighbours(liar))
        accused.add(last)
        return replaced(play, message, m.Complaint(last))

    instead(play, "UploadChunk", complain, (1, 2))
    play.run()
    play.must_sum = [name for name in play.honest if name not in accused] if world.spare >= 2 else ()
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
        play = member(world)
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
    play = member(world)

    def lie(message: m.Message, data: bytes) -> Sequence[bytes]:
        if not isinstance(message.body, m.RoundKeys):
            return [data]
        return replaced(play, message, msgspec.structs.replace(message.body, last_record=bytes([1]) * 32))

    instead(play, "RoundKeys", lie)
    play.must_be_put_out = play.culprits
    return play.run()


@attack("node", "survivors", "a member votes for another set of survivors", "its vote counts")
def _a_vote_for_another_set(world: World) -> Play:
    play = member(world)
    signature = play.network.identities[play.culprits[0]].sign(Label.SURVIVORS, b"another set")
    instead(play, "SurvivorVote", lambda message, _data: replaced(play, message, m.SurvivorVote(signature)))
    play.must_be_put_out = play.culprits
    return play.run()


@attack("node", "multiple", "a member countersigns another record than it was sent", "its receipt counts")
def _a_receipt_for_another_record(world: World) -> Play:
    play = member(world)
    signature = play.network.identities[play.culprits[0]].sign(Label.RECEIPT, b"another record")
    instead(play, "Receipt", lambda message, _data: replaced(play, message, m.Receipt(signature)))
    play.must_be_put_out = play.culprits
    return play.run()
