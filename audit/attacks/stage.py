"""Where attacks are played: a study in memory, an attacker on its wire, and the form in which an attack leaves what happened.

Nothing here is a model of the protocol. Every honest party is the real `NodeMachine` or `AggregatorMachine` with real keys and real
messages; the attacker holds the real key of whom it plays, and sits on the wire. It reads what an aggregator could read (`Knowledge`),
with the secrets of its colluders. An attack says what success would be, and notes what honest parties did; `audit.protocol` judges.

An attack is a function of a `World` that gives a finished `Play`. Names of messages are those of `protocols.messages`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from keys.errors import SecGeoError, VerificationFailed
from keys.identity import Identity
from protocols import messages as m
from protocols import sealing, shamir
from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols import transcript as t
from protocols.agreement import (
    MINIMUM_CONTRIBUTORS,
    Agreement,
    agreement_digest,
    write_agreement,
)
from protocols.attempt_aggregator import AttemptAggregator
from protocols.attempt_node import AttemptNode, Parties, open_contribution, open_shares
from protocols.bfv import Cipher, InProcess
from protocols.chain import Entry
from protocols.ciphertexts import SEED_BYTES, upload_bytes
from protocols.encoding import FixedPoint, Float64Vector, unpack
from protocols.graph import MaskGraph
from protocols.packing import DEGREE, BfvParameters, Packing, choose
from protocols.prg import MaskSet
from protocols.rings import Total
from protocols.sealing import AttemptId
from protocols.study_key import StudyKey

AGGREGATOR = m.AGGREGATOR
ENCAPSULATED_BYTES = 1088 + 32
"""What HPKE puts before a ciphertext: ML-KEM-768's, and an X25519 public key."""
MESSAGES_AT_MOST = 100_000
"""A study that has carried so many messages and is not over hangs."""

Needs = Literal["", "masks", "ciphertexts", "sparse"]
Address = tuple[int, int]
"""Round and attempt."""
Bodies = Iterable[tuple[m.AnyBody, bytes]]
Telling = Callable[[m.Message, str], Bodies]
"""What goes to a node instead of this message: bodies with their tails."""
Hearing = Callable[[m.Message, bytes], Sequence[bytes]]
"""What the aggregator's machine hears instead of this message."""


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
    adversary: Literal["aggregator", "node", "loss"]
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

    def note(self, kind: str, value: bytes | None) -> None:
        """Take one value of a kind."""
        if value:
            self.seen[kind] += 1
            self._distinct[kind].add(bytes(value))

    @property
    def distinct(self) -> dict[str, int]:
        """How many different ones of each kind."""
        return {kind: len(values) for kind, values in self._distinct.items()}

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


@dataclass(frozen=True)
class World:
    """What attacks are played in. `reduced` and `vector_values` say how the agreement was made small."""

    agreement: Agreement
    size: int
    fresh: Freshness = field(default_factory=Freshness)

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
        return Network(msgspec.structs.replace(self.agreement, study=study), self.size, self.fresh)


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


class SharedCiphers(InProcess):
    """The real ciphers, each made once: the hospitals of a study hold the same key."""

    def __init__(self) -> None:
        self._made: dict[tuple[BfvParameters, bytes], Cipher] = {}

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        """See `protocols.rings.Ciphers`."""
        if (parameters, key) not in self._made:
            self._made[parameters, key] = super().cipher(parameters, key)
        return self._made[parameters, key]


class MemoryJournal:
    """A node's journal, in memory: it outlives the machine."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, str]] = []
        self.tag_seeds: dict[Address, bytes] = {}
        self.receipts: list[tuple[int, bytes]] = []
        self.secret = b""

    def last(self) -> tuple[int, int]:
        """See `protocols.study_node.Journal`."""
        return max(((r, a) for r, a, _ in self.entries), default=(0, 0))

    def voted(self, round_number: int) -> bool:
        """See `protocols.study_node.Journal`."""
        return any(r == round_number and event == "voted" for r, _, event in self.entries)

    def record(self, round_number: int, attempt: int, event: str, tag_seed: bytes = b"") -> None:
        """See `protocols.study_node.Journal`."""
        self.entries.append((round_number, attempt, event))
        if tag_seed:
            self.tag_seeds[round_number, attempt] = tag_seed

    def tag_seed(self, round_number: int, attempt: int) -> bytes:
        """See `protocols.study_node.Journal`."""
        return self.tag_seeds.get((round_number, attempt), b"")

    def keep_receipt(self, round_number: int, line: bytes) -> None:
        """See `protocols.study_node.Journal`."""
        self.receipts.append((round_number, line))

    def receipt(self, round_number: int) -> bytes:
        """See `protocols.study_node.Journal`."""
        return next((line for number, line in self.receipts if number == round_number), b"")

    def keep_study_key(self, secret: bytes) -> None:
        """See `protocols.study_node.Journal`."""
        self.secret = secret

    def study_key(self) -> bytes:
        """See `protocols.study_node.Journal`."""
        return self.secret


class MemorySpool:
    """Unfinished uploads, in memory."""

    def __init__(self) -> None:
        self._kept: dict[str, list[memoryview]] = defaultdict(list)

    def append(self, name: str, data: memoryview) -> None:
        """See `protocols.attempt_aggregator.Spool`."""
        self._kept[name].append(data)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """See `protocols.attempt_aggregator.Spool`."""
        return iter(self._kept[name])

    def discard(self, name: str) -> None:
        """See `protocols.attempt_aggregator.Spool`."""
        self._kept.pop(name, None)


class Network:
    """One study in memory: real machines, a queue, a clock that jumps to the next deadline, and a tap on every message."""

    def __init__(self, agreement: Agreement, size: int, fresh: Freshness) -> None:
        self.agreement, self.size, self.fresh = agreement, size, fresh
        self.names = [member.node_id for member in agreement.members]
        self.identities = {name: Identity.generate(name, "hospital") for name in self.names}
        self.identities[AGGREGATOR] = Identity.generate(AGGREGATOR, "aggregator")
        self.digest = agreement_digest(write_agreement(agreement))
        keys = {name: self.identities[name].public_key for name in self.names}
        self.parties = Parties(agreement, self.digest, keys)
        self.tap: Callable[[str, str, bytes], Sequence[bytes]] = lambda _sender, _recipient, data: [data]
        self.vectors: Callable[[str, int], Float64Vector] = self.random_vector
        self.ciphers = SharedCiphers()
        self.liars: set[str] = set()
        self.now = 0.0
        self.faults: dict[str, SecGeoError] = {}
        self.crashes: list[str] = []
        self.sums: dict[str, list[node.Summed]] = {name: [] for name in self.names}
        self.totals: dict[int, Total] = {}
        self.lines: list[bytes] = []
        self.expelled: list[str] = []
        self.journals = {name: MemoryJournal() for name in self.names}
        self.secrets: list[bytes] = []
        """What never stands on the wire: the secrets of attempts."""
        self._queue: deque[tuple[str, str, bytes]] = deque()
        self._noted: set[tuple[str, int, int]] = set()
        self.aggregator = self.new_aggregator(self.parties)
        self.nodes = {name: self.new_node(name) for name in self.names}

    def random_vector(self, name: str, number: int) -> Float64Vector:
        """A vector of a node's own for each round, well within the agreed range."""
        limit = min(2.0, FixedPoint.from_agreement(self.agreement).limit / 2)
        return np.random.default_rng([number, *name.encode()]).uniform(-limit, limit, self.size)

    def new_aggregator(self, parties: Parties) -> agg.AggregatorMachine:
        """The aggregator's machine."""
        identity = self.identities[AGGREGATOR]
        writer = t.TranscriptWriter(identity, self.lines)
        return agg.AggregatorMachine(
            parties,
            identity,
            self.size,
            writer,
            load_sum=lambda number: self.totals[number],
            spool=MemorySpool(),
            ciphers=self.ciphers,
        )

    def new_node(self, name: str) -> node.NodeMachine:
        """A hospital's machine, as after a crash: nothing left but its keys, its journal and what it has applied."""
        return node.NodeMachine(
            self.parties,
            self.identities[name],
            (AGGREGATOR, self.identities[AGGREGATOR].public_key),
            self.size,
            coins=os.urandom,
            journal=self.journals[name],
            completed=max((summed.round for summed in self.sums[name]), default=0),
            ciphers=self.ciphers,
        )

    def run(self, absent: Collection[str] = ()) -> None:
        """Carry everything, until the study is over. A study that hangs, or crashes, is noted."""
        try:
            self._from_aggregator(self.aggregator.start(self.now))
            for name in self.names:
                if name not in absent:
                    self._from_node(name, self.nodes[name].start())
            for _ in range(MESSAGES_AT_MOST):
                if self._queue:
                    self._deliver(*self._queue.popleft())
                elif self.aggregator.ended:
                    return
                else:
                    self.now = max(self.now, self.aggregator.deadline)
                    self._from_aggregator(self.aggregator.tick(self.now))
            self.crashes.append("the study neither ends nor makes progress")
        except SecGeoError as error:
            self.crashes.append(f"{AGGREGATOR}: {type(error).__name__}: {error}"[:300])
        except Exception as error:  # whatever an attack provokes is evidence
            self.crashes.append(f"{type(error).__name__}: {error}"[:300])

    def inject(self, sender: str, recipient: str, data: bytes) -> None:
        """Put a message on the wire, behind what is there; the tap does not see it."""
        self._queue.append((sender, recipient, data))

    def lose(self, name: str) -> None:
        """The connection of a node breaks, for good, with all that is under way on it."""
        self._forget(name)
        self._from_aggregator(self.aggregator.leave(name, self.now))

    def disconnect(self, name: str) -> None:
        """The connection of a node breaks, and it connects again."""
        self.lose(name)
        self._from_node(name, self.nodes[name].rejoin())

    def _forget(self, name: str) -> None:
        self._queue = deque(entry for entry in self._queue if name not in entry[:2])

    def _deliver(self, sender: str, recipient: str, data: bytes) -> None:
        if recipient == AGGREGATOR:
            self._from_aggregator(self.aggregator.receive(sender, data, self.now))
        elif recipient not in self.faults:
            try:
                self._from_node(recipient, self.nodes[recipient].receive(data))
            except SecGeoError as fault:
                self.faults[recipient] = fault

    def _post(self, sender: str, recipient: str, data: bytes) -> None:
        for delivered in self.tap(sender, recipient, data):
            self._queue.append((sender, recipient, delivered))

    def _from_node(self, name: str, outputs: list[node.Output]) -> None:
        for output in outputs:
            match output:
                case node.Send():
                    self._note(name, output.data)
                    self._post(name, AGGREGATOR, output.data)
                case node.Train():
                    try:
                        answer = self.nodes[name].submit(output.round, self.vectors(name, output.round))
                    except SecGeoError as fault:
                        self.faults[name] = fault
                        return
                    self._from_node(name, answer)
                case node.Summed():
                    self.sums[name].append(output)

    def _note(self, name: str, data: bytes) -> None:
        """What must never repeat: on the wire, and the secrets of each attempt themselves."""
        if name in self.liars:
            return
        self.fresh.watch(data, self.agreement.secure_sum.encrypted)
        attempt = self.nodes[name]._attempt
        if attempt is not None and self.agreement.secure_sum.masked:
            key = name, attempt._attempt.round, attempt._attempt.attempt
            if key not in self._noted:
                self._noted.add(key)
                for kind in ("self_seed", "share_master", "pair_master", "tag_seed"):
                    secret = getattr(attempt._secrets, kind)
                    self.secrets.append(secret)
                    self.fresh.note(f"{kind.replace('_', ' ')}s", secret)

    def _from_aggregator(self, outputs: list[agg.Output]) -> None:
        for output in outputs:
            match output:
                case agg.SendTo():
                    self._post(AGGREGATOR, output.peer, output.data)
                case agg.Record():
                    self.lines.append(output.line)
                case agg.SumOpened():
                    self.totals[output.round] = output.total
                case agg.Progress() if output.event == "expelled":
                    self.expelled.append(str(output.fields["node"]))

    def right(self, summed: node.Summed) -> bool:
        """Whether a sum is that of its contributors, within the rounding of the encoding."""
        expected = np.sum([self.vectors(name, summed.round) for name in summed.contributors], axis=0)
        bound = len(summed.contributors) * 2.0 ** -(self.agreement.secure_sum.fraction_bits + 1) + 1e-9
        return bool(np.abs(summed.total - expected).max() <= bound)


def peek(data: bytes) -> Any:
    """The head of a message, with no signature checked; None if it is not one."""
    try:
        return m._decoder.decode(m._split(data)[0])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


# --- what an aggregator that keeps everything can read


@dataclass
class Seen:
    """One attempt, as it passed by. The digests and senders are by the node that was shown them."""

    digests: dict[str, dict[str, bytes]] = field(default_factory=dict)
    senders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seals: dict[tuple[str, str], list[m.SealedSeeds]] = field(default_factory=lambda: defaultdict(list))
    chunks: dict[str, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    self_shares: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    pair_shares: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    secrets: dict[str, sealing.AttemptSecrets] = field(default_factory=dict)


class Knowledge:
    """Everything that an aggregator has seen and its colluders know; `reads` tries all that follows from the formulas.

    Uploads that are masked and encrypted it decrypts: some hospital gave it the study key.
    """

    def __init__(self, network: Network, colluders: Iterable[str]) -> None:
        self._network, self.colluders = network, set(colluders)
        self.attempts: dict[Address, Seen] = defaultdict(Seen)

    def watch(self, sender: str, recipient: str, data: bytes) -> None:
        """Take one message that passes."""
        head = peek(data)
        if head is None:
            return
        seen, body = self.attempts[head.round, head.attempt], head.body
        for name in self.colluders.intersection((sender, recipient)):
            attempt = self._network.nodes[name]._attempt
            if attempt is not None:
                self.attempts[attempt._attempt.round, attempt._attempt.attempt].secrets[name] = attempt._secrets
        match body:
            case m.SealedSeeds():
                seen.seals[sender, body.recipient].append(body)
            case m.KeySet():
                seen.digests[recipient] = dict(body.digests)
            case m.SeedSet():
                seen.senders[recipient] = body.senders
                for relayed in filter(None, map(peek, body.sealed)):
                    if isinstance(relayed.body, m.SealedSeeds):
                        seen.seals[relayed.sender, relayed.body.recipient].append(relayed.body)
            case m.UploadChunk():
                seen.chunks[sender][body.index] = bytes(m._split(data)[1])
            case m.Unmasking():
                for name, share in body.self_shares:
                    seen.self_shares[name][sender] = share
                for name, share in body.pair_shares:
                    seen.pair_shares[name][sender] = share

    def reads(self, name: str) -> bool:
        """Whether a vector of this node comes out, of any attempt."""
        ring = self._network.agreement.secure_sum
        if not ring.masked:
            return False  # Nothing but the study key hides it, and nothing but the key shows it.
        bound = 2.0 ** -(ring.fraction_bits + 1) + 1e-9
        for address in [address for address, seen in self.attempts.items() if seen.chunks[name]]:
            vector = self._vector_of(name, address)
            if vector is not None and np.abs(vector - self._network.vectors(name, address[0])).max() <= bound:
                return True
        return False

    def pair_master(self, name: str, address: Address = (1, 1)) -> bytes | None:
        """A node's pair master, if enough shares are known."""
        seen = self.attempts[address]
        if name in seen.secrets:
            return seen.secrets[name].pair_master
        self._open_shares(address)
        return self._combine(name, seen.pair_shares[name], address)

    def _self_seed(self, name: str, address: Address) -> bytes | None:
        seen = self.attempts[address]
        if name in seen.secrets:
            return seen.secrets[name].self_seed
        self._open_shares(address)
        return self._combine(name, seen.self_shares[name], address)

    def _pair_key(self, victim: str, peer: str, address: Address) -> bytes | None:
        low, high = sorted((victim, peer))
        attempt, cohort = self._attempt(address), self._cohort(victim, address)
        if (master := self.pair_master(low, address)) is not None:
            secret = sealing.contribution(master, attempt, cohort, low, high)
            return sealing.pair_mask_key(secret, attempt, cohort, low, high)
        if (master := self.pair_master(high, address)) is not None:
            for seeds in self.attempts[address].seals[low, high]:
                try:
                    secret = open_contribution(sealing.private_key(master, attempt), attempt, cohort, low, high, seeds)
                except sealing.SealBroken:
                    continue
                return sealing.pair_mask_key(secret, attempt, cohort, low, high)
        return None

    def _vector_of(self, name: str, address: Address) -> Float64Vector | None:
        seen = self.attempts[address]
        upload = self._upload(name, address)
        if upload is None or name not in seen.digests or name not in seen.senders:
            return None
        # Without a known self seed, guess one; this is right only if there is no such mask.
        seed = self._self_seed(name, address)
        added = [sealing.self_mask_key(seed or bytes(32), self._attempt(address), name)]
        subtracted: list[bytes] = []
        for peer in self.graph(name, address).neighbours(name):
            if peer in seen.senders[name]:
                key = self._pair_key(name, peer, address)
                if key is None:
                    return None
                (added if name < peer else subtracted).append(key)
        masks, step = MaskSet(subtracted, added), chunk_coordinates(self._network.agreement)
        for chunk, start in enumerate(range(0, upload.size, step)):
            masks.apply(upload[start : start + step], chunk)
        return self._decoded(upload)

    def _attempt(self, address: Address) -> AttemptId:
        return AttemptId(self._network.digest, *address)

    def graph(self, name: str, address: Address) -> MaskGraph:
        """Who shares masks with whom, as this node was led to believe."""
        neighbours = self._network.agreement.secure_sum.neighbours
        return MaskGraph.build(self.attempts[address].digests[name], neighbours, self._cohort(name, address))

    def _cohort(self, name: str, address: Address) -> bytes:
        key = self._network.nodes[name]._study_key
        digests = self.attempts[address].digests[name]
        return sealing.cohort_digest(self._attempt(address), digests, b"" if key is None else key.id)

    def _open_shares(self, address: Address) -> None:
        seen, attempt = self.attempts[address], self._attempt(address)
        for (sender, recipient), sealed in seen.seals.items():
            if recipient not in seen.secrets or recipient in seen.pair_shares[sender]:
                continue
            key = sealing.private_key(seen.secrets[recipient].share_master, attempt)
            for seeds in sealed:
                try:
                    shares = open_shares(key, attempt, seeds.cohort_digest, sender, recipient, seeds)
                except sealing.SealBroken:
                    continue
                if shares.self_share is not None and shares.pair_share is not None:
                    seen.self_shares[sender][recipient] = shares.self_share
                    seen.pair_shares[sender][recipient] = shares.pair_share

    def _combine(self, owner: str, shares: dict[str, bytes], address: Address) -> bytes | None:
        needed = self._network.agreement.secure_sum.shares_needed
        if len(shares) < needed or owner not in self.attempts[address].digests:
            return None
        holders = sorted({owner, *self.graph(owner, address).neighbours(owner)})
        points = {holders.index(name): share for name, share in sorted(shares.items())[:needed] if name in holders}
        return shamir.combine(points, needed) if len(points) == needed else None

    def _upload(self, name: str, address: Address) -> Any:
        """What was masked: ring values, or the coefficients of the plaintexts."""
        ring, size = self._network.agreement.secure_sum, self._network.size
        chunks = self.attempts[address].chunks[name]
        sizes = [min(ring.chunk_values, size - start) for start in range(0, size, ring.chunk_values)]
        if sorted(chunks) != list(range(len(sizes))):
            return None
        if not ring.encrypted:
            return np.concatenate([unpack(chunks[i], size, ring.ring_bits) for i, size in enumerate(sizes)])
        key = self._network.nodes[name]._study_key
        if key is None:
            return None
        return decrypted(self._network, b"".join(chunks[index] for index in range(len(sizes))), key).reshape(-1)

    def _decoded(self, values: Any) -> Float64Vector | None:
        ring, size = self._network.agreement.secure_sum, self._network.size
        try:
            if ring.encrypted:
                packing = packing_of(self._network.agreement)
                packed = (values & np.uint64(2**packing.parameters.plain_bits - 1)).reshape(-1, DEGREE)
                values = packing.unpack(packed, size)
            return FixedPoint.from_agreement(self._network.agreement).decode(
                values & np.uint32((1 << ring.ring_bits) - 1), 1
            )
        except VerificationFailed:
            return None


def chunk_coordinates(agreement: Agreement) -> int:
    """How many numbers are masked together: the values of a chunk, or the coefficients that hold them."""
    values = agreement.secure_sum.chunk_values
    if not agreement.secure_sum.encrypted:
        return values
    return values // packing_of(agreement).block_values * DEGREE


def packing_of(agreement: Agreement) -> Packing:
    """How values share coefficients."""
    return choose(agreement.secure_sum.value_bits, len(agreement.members))


def decrypted(network: Network, data: bytes, key: StudyKey) -> Any:
    """The [blocks, 4096] coefficients that an upload holds, for who has the study key."""
    parameters = packing_of(network.agreement).parameters
    words = np.zeros((len(data) // upload_bytes(parameters, 1), 2, DEGREE), dtype=np.uint64)
    cipher = network.ciphers.cipher(parameters, key.secret)
    cipher.add(words, data)
    return cipher.decrypt(words)


# --- the attacker's side of the machines


class LooseParties(Parties):
    """Parties as a malicious aggregator sees them: no minimum."""

    @property
    def minimum(self) -> int:
        """Any number will do."""
        return 1


class LooseGraph(MaskGraph):
    """A graph that nobody can cut apart."""

    def tolerates(self, survivors: object, colluders: int) -> bool:
        """Always."""
        return True


class LooseAttempt(AttemptAggregator):
    """An attempt whose aggregator does not mind what protects the nodes only."""

    def _dispatch(self, peer: str, message: m.Message, signed: bytes) -> Any:
        if isinstance(message.body, m.RoundKeys):
            self._last_record = message.body.last_record
        return super()._dispatch(peer, message, signed)

    def _on_seeds(self, peer: str, body: m.SealedSeeds, signed: bytes) -> None:
        own, self._cohort_digest = self._cohort_digest, body.cohort_digest
        try:
            super()._on_seeds(peer, body, signed)
        finally:
            self._cohort_digest = own

    def _on_upload_done(self, peer: str, body: m.UploadDone, signed: bytes) -> None:
        own, self._view = self._view, body.view
        try:
            super()._on_upload_done(peer, body, signed)
        finally:
            self._view = own

    def _close_uploads(self) -> Any:
        self._graph = LooseGraph(self._graph.order, self._graph.reach)
        return super()._close_uploads()


class LooseMachine(agg.AggregatorMachine):
    """A study whose aggregator takes whoever says that it is here."""

    def _holds_key(self, peer: str, body: m.Join, data: bytes) -> bool:
        held = super()._holds_key(peer, body, data)
        return held or body.study_key != m.NO_KEY


class Accomplice(AttemptNode):
    """A colluder's attempt: it does whatever the aggregator says."""

    def _check(self, holds: bool, fault: str) -> None:
        pass


def turn(machine: object, kind: type) -> None:
    """Make a machine one of the attacker's."""
    machine.__class__ = kind


class Play:
    """One attack under way: an attacker on the wire of a study, with the keys of the `culprits`.

    `tell` sets what goes to nodes instead of a kind of message, `hear` what the aggregator's machine hears instead of one.
    """

    def __init__(self, network: Network, *culprits: str, colluders: Sequence[str] = ()) -> None:
        self.network, self.culprits, self.colluders = network, culprits or (AGGREGATOR,), tuple(colluders)
        self.knowledge = Knowledge(network, colluders)
        self.honest = [name for name in network.names if name not in {*self.culprits, *colluders}]
        self.gave: list[str] = []
        self.took_place = False
        self.must_refuse: Collection[str] = ()
        self.must_sum: Collection[str] = ()
        self.must_be_put_out: Collection[str] = ()
        self.granted: Collection[str] = ()
        self.sent: list[tuple[str, Any]] = []
        """What honest nodes have said, whatever was heard of it: sender and head."""
        self.loose = False
        self.node_attempt: type[AttemptNode] | None = None
        """The attempts of a culprit that is a member."""
        self._telling: dict[str, Telling] = {}
        self._hearing: dict[str, Hearing] = {}
        network.tap, network.liars = self._tap, {*self.culprits, *colluders}

    def tell(self, *kinds: str) -> Callable[[Telling], Telling]:
        """Decorate the change of what goes to nodes."""
        return lambda change: [self._telling.update({kind: change}) for kind in kinds] and change  # type: ignore[return-value]

    def hear(self, *kinds: str) -> Callable[[Hearing], Hearing]:
        """Decorate the change of what comes from nodes."""
        return lambda change: [self._hearing.update({kind: change}) for kind in kinds] and change  # type: ignore[return-value]

    def say(self, to: str, address: Address, body: m.AnyBody, tail: bytes = b"") -> None:
        """Send a message of the aggregator's own; an attack took place."""
        self.took_place = True
        data = self.sign(AGGREGATOR, address, body, tail)
        self.knowledge.watch(AGGREGATOR, to, data)
        self.network.inject(AGGREGATOR, to, data)

    def sign(self, name: str, address: Address, body: m.AnyBody, tail: bytes = b"") -> bytes:
        """A message under somebody's real key."""
        return m.encode(self.network.identities[name], AttemptId(self.network.digest, *address), body, tail)

    def run(self, absent: Collection[str] = ()) -> Play:
        """Play it to the end."""
        if self.loose:
            parties = self.network.parties
            turn(self.network.aggregator, LooseMachine)
            self.network.aggregator._parties = LooseParties(
                parties.agreement, parties.agreement_digest, parties.public_keys
            )
        self.network.run(absent)
        return self

    def has_sent(self, name: str, kind: type[m.Body], address: Address | None = None) -> bool:
        """Whether a node has sent such a message."""
        return any(
            sender == name and isinstance(head.body, kind) and address in (None, (head.round, head.attempt))
            for sender, head in self.sent
        )

    def gives(self, holds: bool, what: str) -> None:
        """Note what an honest party should not have done, if it did."""
        if holds:
            self.gave.append(what)

    def _tap(self, sender: str, recipient: str, data: bytes) -> Sequence[bytes]:
        head = peek(data)
        if head is None:
            return [data]
        message = m.Message(head.sender, head.round, head.attempt, head.body, m._split(data)[1])
        kind = type(head.body).__name__
        if sender != AGGREGATOR:
            self.knowledge.watch(sender, recipient, data)
            if sender in self.honest:
                self.sent.append((sender, head))
            attempt = self.network.nodes[sender]._attempt
            if attempt is not None and sender in self.colluders:
                turn(attempt, Accomplice)
            if attempt is not None and sender in self.culprits and self.node_attempt is not None:
                turn(attempt, self.node_attempt)
            return self._hearing[kind](message, data) if kind in self._hearing else [data]
        running = self.network.aggregator._attempt
        if kind == "AttemptOpen" and self.loose and running is not None:
            turn(running, LooseAttempt)
            running._parties = self.network.aggregator._parties
        sent = [data]
        if kind in self._telling:
            address = message.round, message.attempt
            bodies = list(self._telling[kind](message, recipient))
            if bodies != [(message.body, bytes(message.tail))]:
                self.took_place = True
                sent = [self.sign(AGGREGATOR, address, body, tail) for body, tail in bodies]
        for posted in sent:
            self.knowledge.watch(AGGREGATOR, recipient, posted)
        return sent


def keep(message: m.Message) -> Bodies:
    """The message as it is."""
    return [(message.body, bytes(message.tail))]


# --- the catalogue


@dataclass(frozen=True)
class Attack:
    """One attack of the catalogue.

    `needs` is "masks", "ciphertexts", "sparse" (a graph), or nothing; an attack on what is not agreed is not played.
    """

    name: str
    adversary: Literal["aggregator", "node", "loss"]
    row: str
    tried: str
    success: str
    needs: Needs
    spare: int
    """So many members must be left to lose, or there is no round in which to play."""
    perform: Callable[[World], Play]

    def missing(self, world: World) -> str:
        """What the agreement lacks for this attack; empty if it can be played."""
        ring = world.agreement.secure_sum
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
            wrong=tuple(name for name in play.honest if not all(map(network.right, network.sums[name]))),
            gave=tuple(play.gave),
            crashed=tuple(network.crashes),
            summed={name: sum(map(network.right, network.sums[name])) for name in play.honest},
            granted=tuple(play.granted),
            seconds=network.now,
        )


def record_bodies(lines: Iterable[bytes]) -> list[t.Body]:
    """What stands in the lines of a transcript."""
    return [msgspec.json.decode(line, type=Entry[t.Body]).body for line in lines]


CATALOGUE: list[Attack] = []


def attack(
    adversary: Literal["aggregator", "node", "loss"],
    row: str,
    tried: str,
    success: str,
    *,
    needs: Needs = "",
    spare: int = 0,
) -> Callable[[Callable[[World], Play]], Callable[[World], Play]]:
    """Put a function into the catalogue; its name is the attack's."""

    def put(perform: Callable[[World], Play]) -> Callable[[World], Play]:
        name = perform.__name__.strip("_").replace("_", " ")
        CATALOGUE.append(Attack(name, adversary, row, tried, success, needs, spare, perform))
        return perform

    return put
