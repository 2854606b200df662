"""Where attacks are played: small studies under the agreement's own parameters, and the form in which an attack leaves what happened.

An attack is a function of a `World` that gives a finished `Play`. It says what success would be, and notes what honest parties did;
`audit.protocol` judges. Names of messages are those of `protocols.messages`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from audit.attacks.knowledge import peek
from audit.attacks.network import Network, Over, SharedCiphers, Tap
from audit.attacks.play import Play, record_bodies
from audit.attacks.wire import WireNetwork
from keys.identity import Identity
from protocols import messages as m
from protocols import transcript as t
from protocols.agreement import MINIMUM_CONTRIBUTORS, Agreement, write_agreement
from protocols.ciphertexts import SEED_BYTES
from protocols.encoding import FixedPoint, Float64Vector
from protocols.messages import AGGREGATOR
from protocols.packing import choose
from protocols.sealing import AttemptSecrets
from protocols.study_node import Summed

ENCAPSULATED_BYTES = 1088 + 32
"""What HPKE puts before a ciphertext: ML-KEM-768's, and an X25519 public key."""

Needs = Literal["", "masks", "ciphertexts", "sparse", "sockets"]
Adversary = Literal["aggregator", "node", "loss", "stranger"]


SECRETS = ("self_seed", "share_master", "pair_master", "tag_seed")
"""What a node draws for an attempt."""

# --- what an attack leaves behind


class Answer(Struct, frozen=True, forbid_unknown_fields=True):
    """An honest party left: with which error, and whom it names (nobody, where only the sum was wrong)."""

    party: str
    error: str
    blamed: str
    text: str


class Played(Struct, frozen=True, forbid_unknown_fields=True):
    """One attack, and what honest parties did.

    Attributes:
        over: what carried the messages.
        row: the promise of the threat model that it tries.
        success: what would be success for the attacker.
        culprits: who plays false.
        took_place: whether the false message was ever sent.
        must_refuse: who must leave, naming a culprit or refusing the sum.
        must_sum: who must end with the right sum nevertheless.
        must_be_put_out: whom the aggregator must name.
        answers: who left.
        expelled: whom the aggregator has put out.
        disputed: whom it has recorded as parties to disputes.
        read: honest hospitals whose vector the attacker could compute.
        wrong: honest hospitals that accepted a sum that is not that of its contributors.
        gave: what else honest parties did that was success.
        crashed: errors that are none of SecGeo's, and studies that hang.
        summed: rounds that each honest hospital summed right.
        granted: what the threat model grants the attacker here: "wrong".
        seconds: by the study's own clock.
    """

    name: str
    adversary: Adversary
    over: Over
    row: str
    tried: str
    success: str
    culprits: tuple[str, ...]
    took_place: bool
    must_refuse: tuple[str, ...]
    must_sum: tuple[str, ...]
    must_be_put_out: tuple[str, ...]
    answers: tuple[Answer, ...]
    expelled: tuple[str, ...]
    disputed: tuple[str, ...]
    read: tuple[str, ...]
    wrong: tuple[str, ...]
    gave: tuple[str, ...]
    crashed: tuple[str, ...]
    summed: dict[str, int]
    granted: tuple[str, ...]
    seconds: float


# --- the world: one small study after another, all under the agreement's own parameters


class Freshness:
    """Everything that must never come twice, over all studies that are played: how many there were, and how many different ones."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._distinct: dict[str, set[bytes]] = defaultdict(set)
        self._messages: set[bytes] = set()
        self.secrets: list[bytes] = []
        """What never stands on the wire: the secrets of attempts, in the order of their first use."""

    def note(self, kind: str, value: bytes | None) -> None:
        """Take one value of a kind."""
        if value:
            self.seen[kind] += 1
            self._distinct[kind].add(bytes(value))

    @property
    def distinct(self) -> dict[str, int]:
        """How many different ones of each kind."""
        return {kind: len(values) for kind, values in self._distinct.items()}

    def tap(self, network: Network) -> Tap:
        """A tap that takes what nodes send, and the secrets of their attempts; it changes nothing."""
        ring, noted = network.agreement.secure_sum, set[tuple[str, int, int]]()

        def listen(sender: str, _recipient: str, data: bytes) -> Sequence[bytes]:
            if sender != AGGREGATOR:
                self.watch(data, ring.encrypted)
                attempt = network.nodes[sender]._attempt
                if attempt is not None and ring.masked:
                    place = sender, attempt._attempt.round, attempt._attempt.attempt
                    if place not in noted:
                        noted.add(place)
                        self._note_secrets(attempt._secrets)
                        self.secrets += [getattr(attempt._secrets, kind) for kind in SECRETS]
            return [data]

        return listen

    def watch(self, data: bytes, encrypted: bool) -> None:
        """Take a message that an honest node sends. The same message said again, after a reconnect, counts once."""
        if hashlib.sha256(data).digest() in self._messages:
            return
        self._messages.add(hashlib.sha256(data).digest())
        head = peek(data)
        match None if head is None else head.body:
            case m.RoundKeys() as keys:
                self.note("share public keys", keys.share_public)
                self.note("pair public keys", keys.pair_public)
                self.note("commitments to self seeds", keys.self_seed_commitment)
                self.note("commitments to tag seeds", keys.tag_commitment)
            case m.SealedSeeds() as seeds:
                self.note("sealed shares", seeds.shares[ENCAPSULATED_BYTES:])
                self.note("sealed contributions", seeds.contribution[ENCAPSULATED_BYTES:])
                self.note("encapsulated keys", seeds.shares[:ENCAPSULATED_BYTES])
                self.note("encapsulated keys", seeds.contribution[:ENCAPSULATED_BYTES])
                self.note("digests of shares", seeds.self_share_digest)
                self.note("digests of shares", seeds.pair_share_digest)
                self.note("digests of contributions", seeds.contribution_digest)
            case m.UploadChunk() as chunk:
                self.note("digests of chunks", chunk.digest)
                if encrypted:
                    self.note("seeds of ciphertexts", bytes(m._split(data)[1])[-SEED_BYTES:])
            case m.UploadDone() as done:
                self.note("digests of uploads", done.digest)
                self.note("masked tags", done.tag.to_bytes(8))
            case m.SealedKey() as key:
                self.note("sealed study keys", key.sealed)

    def draw(self, count: int) -> None:
        """Take more secrets, as a node draws them: a source with little entropy repeats itself only among many."""
        for _ in range(count):
            self._note_secrets(AttemptSecrets.fresh(os.urandom))

    def _note_secrets(self, secrets: AttemptSecrets) -> None:
        for kind in SECRETS:
            self.note(f"{kind.replace('_', ' ')}s", getattr(secrets, kind))


@dataclass(frozen=True)
class World:
    """What attacks are played in, and over. `reduced` and `vector_values` say how the agreement was made small."""

    agreement: Agreement
    size: int
    fresh: Freshness = field(default_factory=Freshness)
    over: Over = "memory"

    @property
    def names(self) -> list[str]:
        """The members."""
        return [member.node_id for member in self.agreement.members]

    @property
    def minimum(self) -> int:
        """The smallest set whose sum may be opened."""
        ring = self.agreement.secure_sum
        return max(ring.minimum_cohort, ring.threshold, MINIMUM_CONTRIBUTORS)

    @property
    def spare(self) -> int:
        """How many members may be lost."""
        return len(self.names) - self.minimum

    def network(self, rounds: int = 1) -> Network:
        """A fresh study with fresh keys."""
        study = msgspec.structs.replace(self.agreement.study, rounds=rounds)
        agreement = msgspec.structs.replace(self.agreement, study=study)
        identities = {name: Identity.generate(name, "hospital") for name in self.names}
        identities[AGGREGATOR] = Identity.generate(AGGREGATOR, "aggregator")
        kind = WireNetwork if self.over == "sockets" else Network
        network = kind(identities, agreement, self.vector, self.size, SharedCiphers())
        network.tap = self.fresh.tap(network)
        return network

    def vector(self, name: str, number: int) -> Float64Vector:
        """A vector of a node's own for each round, well within the agreed range."""
        limit = min(2.0, FixedPoint.from_agreement(self.agreement).limit / 2)
        return np.random.default_rng([number, *name.encode()]).uniform(-limit, limit, self.size)


def reduced(agreement: Agreement, members: int) -> Agreement:
    """The agreement for at most so many of its members, with chunks small enough that there are several. All else as agreed.

    Threshold and minimum cohort keep their share of the members, and the rules; a sparse graph becomes the complete one.

    Raises:
        ConfigError: no rule allows such an agreement.
    """
    count, ring = min(members, len(agreement.members)), agreement.secure_sum
    changes: dict[str, Any] = {}
    if count < len(agreement.members):
        share = count / len(agreement.members)
        threshold = max((count + 1) // 2 + 1, -(-int(1000 * ring.threshold * share) // 1000))
        cohort = max(3, threshold, -(-int(1000 * ring.minimum_cohort * share) // 1000))
        changes = {"threshold": min(count, threshold), "minimum_cohort": min(count, cohort)}
        changes |= {"neighbours": 0, "share_threshold": 0}
    if ring.encrypted:
        packing = choose(ring.value_bits, count)
        changes |= {"plain_bits": packing.parameters.plain_bits, "chunk_values": packing.block_values}
    else:
        changes |= {"chunk_values": 1024}
    small = msgspec.structs.replace(
        agreement,
        members=agreement.members[:count],
        secure_sum=msgspec.structs.replace(ring, **changes),
        hospital_privacy=None,
    )
    write_agreement(small)
    return small


def vector_values(agreement: Agreement, size: int) -> int:
    """How many values of a vector of `size` are played: a few chunks, and one that is not whole."""
    return min(size, 2 * agreement.secure_sum.chunk_values + 500)


# --- the catalogue


@dataclass(frozen=True)
class Attack:
    """One attack of the catalogue.

    `needs` is "masks", "ciphertexts", "sparse" (a graph), "sockets", or nothing; an attack on what is not there is not played.
    """

    name: str
    adversary: Adversary
    row: str
    tried: str
    success: str
    needs: Needs
    spare: int
    """So many members must be left to lose, or there is no round in which to play."""
    carried: bool
    """Whether messages pass between parties. An attack on one decoder is the same over everything, and is played once."""
    perform: Callable[[World], Play]

    def missing(self, world: World) -> str:
        """What the agreement lacks for this attack; empty if it can be played."""
        ring = world.agreement.secure_sum
        if world.over == "sockets" and not self.carried:
            return "nothing passes between parties"
        if self.needs == "sockets" and world.over != "sockets":
            return "a study in memory has no door; profile full plays one over sockets"
        if self.needs == "sparse" and not ring.neighbours:
            return "the graph is complete: every pair shares masks"
        if self.needs == "masks" and not ring.masked:
            return f"{ring.protocol} has no masks"
        if self.needs == "ciphertexts" and not ring.encrypted:
            return f"{ring.protocol} has no ciphertexts"
        if world.spare < self.spare:
            return "the agreement allows no member to be lost"
        return ""

    def play(self, world: World) -> Played:
        """Play it, and write down what honest parties did."""
        play = self.perform(world)
        network = play.network
        answers = tuple(
            Answer(name, type(fault).__name__, getattr(fault, "peer", ""), str(fault)[:200])
            for name, fault in network.faults.items()
            if name in play.honest
        )
        disputes = [entry for entry in record_bodies(network.lines) if isinstance(entry, t.Disputed)]
        return Played(
            name=self.name,
            adversary=self.adversary,
            over=network.over,
            row=self.row,
            tried=self.tried,
            success=self.success,
            culprits=play.culprits,
            took_place=play.took_place,
            must_refuse=tuple(play.must_refuse),
            must_sum=tuple(play.must_sum),
            must_be_put_out=tuple(play.must_be_put_out),
            answers=answers,
            expelled=tuple(network.expelled),
            disputed=tuple(sorted({name for entry in disputes for name in (entry.accuser, entry.accused)})),
            read=tuple(name for name in play.honest if play.knowledge.reads(name)),
            wrong=tuple(
                name for name in play.honest if not all(is_right(network, summed) for summed in network.sums[name])
            ),
            gave=tuple(play.gave),
            crashed=tuple(play.crashes),
            summed={name: sum(is_right(network, summed) for summed in network.sums[name]) for name in play.honest},
            granted=tuple(play.granted),
            seconds=network.now,
        )


def member(world: World, rounds: int = 1, liar: int = 0) -> Play:
    """One member plays false; all others must go on without it where the agreement allows one to be lost."""
    play = Play(world.network(rounds), world.names[liar])
    play.must_sum = play.honest if world.spare else ()
    return play


def is_right(network: Network, summed: Summed) -> bool:
    """Whether a sum is that of its contributors, within the rounding of the encoding."""
    expected = np.sum([network.vectors(name, summed.round) for name in summed.contributors], axis=0)
    bound = len(summed.contributors) * 2.0 ** -(network.agreement.secure_sum.fraction_bits + 1) + 1e-9
    return bool(np.abs(summed.total - expected).max() <= bound)


CATALOGUE: list[Attack] = []


def attack(
    adversary: Adversary,
    row: str,
    tried: str,
    success: str,
    *,
    needs: Needs = "",
    spare: int = 0,
    carried: bool = True,
) -> Callable[[Callable[[World], Play]], Callable[[World], Play]]:
    """Put a function into the catalogue; its name is the attack's."""

    def put(perform: Callable[[World], Play]) -> Callable[[World], Play]:
        name = perform.__name__.strip("_").replace("_", " ")
        CATALOGUE.append(Attack(name, adversary, row, tried, success, needs, spare, carried, perform))
        return perform

    return put
