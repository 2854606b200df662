"""What a malicious aggregator makes in the place of the genuine: the cohort that one hospital is shown, a sum, and the record of it.

It signs with its own real key, so that digests and chains fit; hospitals that it invents have keys of its own making. Sums of ciphertexts
it changes as a colluder's study key allows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

import msgspec
import numpy as np

from audit.attacks.knowledge import packing_of, study_key
from audit.attacks.network import Network
from audit.attacks.play import Bodies, Play, keep, listed, record_bodies
from keys.identity import Identity
from keys.labels import Label
from protocols import messages as m
from protocols import sealing, tags
from protocols import transcript as t
from protocols.attempt_node import Shares, share_digests
from protocols.chain import Entry, Unsigned
from protocols.encoding import Uint32Vector
from protocols.messages import AGGREGATOR
from protocols.prg import TAG_PRIME
from protocols.rings import Total, make_ring, octets
from protocols.sealing import AttemptId


class Impersonator(Play):
    """Plays the whole cohort towards one victim, with round keys of its own; the others are served as they should be."""

    def __init__(self, network: Network, victim: str, peers: Sequence[str]) -> None:
        super().__init__(network)
        self.victim, self.peers = victim, sorted(peers)
        self.signers = {name: Identity.generate(name, "hospital") for name in self.peers}
        self._victims_keys: m.RoundKeys | None = None
        for kind in ("KeySet", "SeedSet", "Credit", "Survivors", "SurvivorProof", "SumChunk", "RoundResult"):
            self.tell(kind)(lambda message, to: [] if to == victim else keep(message))
        self.hear("RoundKeys")(self._on_keys)
        self.hear("SealedSeeds")(self._on_seeds)
        self.hear("UploadChunk", "UploadDone")(lambda message, data: [] if message.sender == victim else [data])

    def _attempt(self, message: m.Message) -> AttemptId:
        return AttemptId(self.network.digest, message.round, message.attempt)

    def _on_keys(self, message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender != self.victim or not isinstance(message.body, m.RoundKeys):
            return [data]
        attempt, address = self._attempt(message), (message.round, message.attempt)
        secrets, signed = self.knowledge.attempts[address].secrets, {self.victim: data}
        for name in self.peers:
            own = secrets[name] = sealing.AttemptSecrets.fresh(os.urandom)
            keys = m.RoundKeys(
                sealing.public_key_bytes(own.share_master, attempt),
                sealing.public_key_bytes(own.pair_master, attempt),
                sealing.self_seed_commitment(own.self_seed, attempt, name),
                tags.commitment(own.tag_seed, attempt, name),
                message.body.last_record,
            )
            signed[name] = m.encode(self.signers[name], attempt, keys)
        digests = tuple((name, sealing.keys_digest(signed[name])) for name in sorted(signed))
        self._victims_keys = message.body
        self.say(self.victim, address, m.KeySet(digests, tuple(signed[name] for name in sorted(signed))))
        return []

    def _on_seeds(self, message: m.Message, data: bytes) -> Sequence[bytes]:
        theirs = self._victims_keys
        if message.sender != self.victim or not isinstance(message.body, m.SealedSeeds) or theirs is None:
            return [data]
        attempt, address = self._attempt(message), (message.round, message.attempt)
        seen, cohort = self.knowledge.attempts[address], message.body.cohort_digest
        if {to for sender, to in seen.seals if sender == self.victim} != set(self.peers):
            return []
        sealed = []
        for name in self.peers:
            own = seen.secrets[name]
            dealt = Shares(bytes(33), bytes(33), own.tag_seed)
            digests = share_digests(dealt, attempt, name, self.victim)
            info = sealing.shares_info(attempt, cohort, name, self.victim)
            shares = sealing.seal(theirs.share_public, msgspec.msgpack.encode(dealt), info)
            contribution, contribution_digest = b"", None
            if name < self.victim:
                secret = sealing.contribution(own.pair_master, attempt, cohort, name, self.victim)
                info = sealing.contribution_info(attempt, cohort, name, self.victim)
                contribution = sealing.seal(theirs.pair_public, secret, info)
                contribution_digest = sealing.contribution_digest(secret, attempt, name, self.victim)
            seeds = m.SealedSeeds(self.victim, cohort, shares, contribution, *digests, contribution_digest)
            sealed.append(m.encode(self.signers[name], attempt, seeds))
        self.say(self.victim, address, m.SeedSet(tuple(sorted([self.victim, *self.peers])), tuple(sealed)))
        self.say(self.victim, address, m.Credit(1000))
        return []


Change = Callable[[Uint32Vector], Uint32Vector]


def resign(aggregator: Identity, line: bytes, **changes: object) -> bytes:
    """A transcript line of the same place with another body, signed by the aggregator."""
    entry = msgspec.json.decode(line, type=Entry[t.Body])
    body = msgspec.structs.replace(entry.body, **changes)
    unsigned = msgspec.json.encode(Unsigned(entry.seq, entry.prev, body))
    signature = aggregator.sign(Label.TRANSCRIPT, unsigned).hex()
    return msgspec.json.encode(Entry(entry.seq, entry.prev, body, signature)) + b"\n"


def opened(network: Network, total: Total) -> Uint32Vector:
    """The values of a sum, for an aggregator to which a colluder has given the study key, if there is one."""
    key = study_key(network)
    return make_ring(network.agreement, network.ciphers, b"" if key is None else key.secret).open(total, network.size)


def changed_total(network: Network, total: Total, change: Change) -> Total:
    """A sum with other values; where it is encrypted, by adding what makes the difference, as a hospital's help would allow."""
    if not network.agreement.secure_sum.encrypted:
        return change(total.copy())
    packing, values = packing_of(network.agreement), opened(network, total)
    difference = packing.pack(change(values.copy())) - packing.pack(values)
    words = total.copy()
    mask = np.uint64(2**packing.parameters.plain_bits - 1)
    network.ciphers.cipher(packing.parameters, b"").add_plain(words, difference & mask)
    return words


def _sum_bodies(network: Network, total: Total) -> list[tuple[m.AnyBody, bytes]]:
    ring = make_ring(network.agreement)
    tails = [bytes(ring.pack_sum(total, start)) for start in range(0, network.size, ring.sum_chunk_values)]
    return [(m.SumChunk(index, m.chunk_digest(tail)), tail) for index, tail in enumerate(tails)]


def announce(
    play: Play,
    change: Callable[[Total], Total],
    retag: Callable[[int], int] = lambda tag: tag,
    victims: Collection[str] = (),
    receipts: Callable[[bytes], tuple[tuple[str, bytes], ...]] | None = None,
) -> None:
    """Send another sum than was opened, with a record that is signed anew, so that the digests fit."""

    def lies_to(name: str) -> bool:
        return not victims or name in victims

    @play.tell("SumChunk")
    def no_chunk(message: m.Message, to: str) -> Bodies:
        return [] if lies_to(to) else keep(message)

    @play.tell("RoundResult")
    def result(message: m.Message, to: str) -> Bodies:
        if not lies_to(to) or not isinstance(message.body, m.RoundResult):
            return keep(message)
        total = change(play.network.totals[message.round].copy())
        record = record_bodies([message.body.record])[0]
        tag = int(record.aggregate_tag, 16) if isinstance(record, t.RoundRecord) else 0
        line = resign(
            play.network.identities[AGGREGATOR],
            message.body.record,
            aggregate_digest=t.aggregate_digest(octets(total)).hex(),
            aggregate_tag=f"{retag(tag) % TAG_PRIME:016x}",
        )
        signed = message.body.receipts if receipts is None else receipts(line)
        return [*_sum_bodies(play.network, total), (m.RoundResult(line, signed), b"")]


def one_more(values: Uint32Vector) -> Uint32Vector:
    """The values, one of them changed by one."""
    values[7] += 1
    return values


def nobody_takes_it(play: Play) -> Play:
    """Play it to the end: whoever countersigns the sum has taken it."""
    play.must_refuse = play.network.names
    play.run()
    taken = [name for name in play.honest if play.has_sent(name, m.Receipt)]
    play.gives(bool(taken), f"{listed(taken)} countersigned it")
    return play
