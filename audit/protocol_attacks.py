"""The threat model's malicious aggregator and malicious members, played in memory against the machines that are installed.

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
from datetime import timedelta
from itertools import product
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from keys.authority import Authority
from keys.enrolment import make_request, read_request
from keys.errors import RemoteProtocolError, SecGeoError, VerificationFailed
from keys.identity import Identity
from keys.labels import Label
from keys.roster import RosterEntry, add_entry, load_root, make_roster, read_roster, revoke
from keys.signed import sign_document, verify_document
from protocols import messages as m
from protocols import sealing, shamir, tags
from protocols import study_aggregator as agg
from protocols import study_node as node
from protocols import transcript as t
from protocols.agreement import (
    MINIMUM_CONTRIBUTORS,
    Agreement,
    RosterPin,
    agreement_digest,
    read_agreement,
    write_agreement,
)
from protocols.attempt_aggregator import AttemptAggregator
from protocols.attempt_node import AttemptNode, Parties, Shares, open_contribution, open_shares, share_digests
from protocols.bfv import Cipher, InProcess
from protocols.chain import Entry, Unsigned
from protocols.ciphertexts import SEED_BYTES, upload_bytes
from protocols.encoding import FixedPoint, Float64Vector, Uint32Vector, unpack
from protocols.graph import MaskGraph
from protocols.packing import DEGREE, BfvParameters, Packing, choose
from protocols.policy import LocalPolicy, check_policy
from protocols.prg import TAG_PRIME, MaskSet
from protocols.rings import Total, make_ring, octets
from protocols.sealing import AttemptId
from protocols.study_key import StudyKey
from secgeo.study import AGREEMENT, ROSTER, check_documents

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
        MaskSet(subtracted, added).apply(upload)
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
        disputes = [entry for entry in _bodies(network.lines) if isinstance(entry, t.Disputed)]
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


def _bodies(lines: Iterable[bytes]) -> list[t.Body]:
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


# --- malicious aggregator: who is in the sum


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


@attack(
    "aggregator",
    "keys",
    "one hospital is shown round keys of the aggregator's own making in the place of everybody else's",
    "its vector is read",
    needs="masks",
)
def _substituted_round_keys(world: World) -> Play:
    network, victim = world.network(), world.names[1]
    play = Impersonator(network, victim, [name for name in world.names if name != victim])
    play.must_refuse = [victim]
    return play.run()


@attack(
    "aggregator",
    "keys",
    "one hospital is summed with hospitals that the aggregator has invented",
    "its vector is read, or it takes part",
)
def _invented_hospitals(world: World) -> Play:
    network, victim = world.network(), world.names[1]
    play = Impersonator(network, victim, [f"invented-{index}" for index in range(len(world.names) - 1)])
    cohort = tuple(sorted([victim, *play.peers]))
    play.tell("AttemptOpen")(lambda message, to: [(m.AttemptOpen(cohort), b"")] if to == victim else keep(message))
    play.must_refuse = [victim]
    play.run()
    play.gives(play.has_sent(victim, m.RoundKeys) or play.has_sent(victim, m.UploadDone), f"{victim} took part")
    return play


@attack(
    "aggregator",
    "keys",
    "a hospital is lost in round 1, so that its pair master is recovered; in round 2 another is shown its old round keys",
    "what is sealed to the old key opens: a pair seed of round 2",
    needs="masks",
    spare=1,
)
def _replayed_round_keys(world: World) -> Play:
    network, victim, lost = world.network(2), world.names[0], world.names[-1]
    play, old = Play(network), list[bytes]()

    @play.hear("UploadChunk", "UploadDone")
    def lose(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == lost and message.round == 1 else [data]

    @play.hear("RoundKeys")
    def remember(message: m.Message, data: bytes) -> Sequence[bytes]:
        old.extend([data] if message.sender == lost and message.round == 1 else [])
        return [data]

    @play.tell("KeySet")
    def replay(message: m.Message, to: str) -> Bodies:
        if to != victim or message.round != 2 or not isinstance(message.body, m.KeySet):
            return keep(message)
        digests = tuple((n, sealing.keys_digest(old[0]) if n == lost else d) for n, d in message.body.digests)
        keys = tuple(old[0] if m.claimed_sender(key) == lost else key for key in message.body.keys)
        return [(m.KeySet(digests, keys), b"")]

    play.must_refuse = [victim]
    play.run()
    master = play.knowledge.pair_master(lost, (1, 1))
    for seeds in play.knowledge.attempts[2, 1].seals[victim, lost]:
        try:
            key = sealing.private_key(master or bytes(32), AttemptId(network.digest, 1, 1))
            open_contribution(key, AttemptId(network.digest, 2, 1), seeds.cohort_digest, victim, lost, seeds)
        except sealing.SealBroken:
            continue
        play.gives(True, f"what {victim} sealed to an old key of {lost} opened")
    return play


@attack(
    "aggregator",
    "keys",
    "one hospital is not given the round keys of another with which it must share masks",
    "it goes on without that mask",
    needs="masks",
)
def _withheld_round_keys(world: World) -> Play:
    network, victim, held = world.network(), world.names[0], world.names[1]
    play = Play(network)

    @play.tell("KeySet")
    def withhold(message: m.Message, to: str) -> Bodies:
        if to != victim or not isinstance(message.body, m.KeySet):
            return keep(message)
        keys = tuple(key for key in message.body.keys if m.claimed_sender(key) != held)
        return [(m.KeySet(message.body.digests, keys), b"")]

    play.must_refuse = [victim]
    play.run()
    play.gives(play.has_sent(victim, m.SealedSeeds), f"{victim} went on without the keys of {held}")
    return play


def _shrink(world: World, phase: str, next_step: type[m.Body]) -> Play:
    """The aggregator leaves one more out than it may, and colludes with as many of the others as are tolerated."""
    victim, left = world.names[0], set(world.names[: world.minimum - 1])
    play = Play(world.network(), colluders=sorted(left - {victim})[: world.agreement.colluders_tolerated])
    play.loose = True

    @play.tell("AttemptOpen")
    def shorter(message: m.Message, to: str) -> Bodies:
        if phase != "AttemptOpen":
            return keep(message)
        return [(m.AttemptOpen(tuple(sorted(left))), b"")] if to in left else []

    @play.hear(phase)
    def lose(message: m.Message, data: bytes) -> Sequence[bytes]:
        play.took_place |= message.sender not in left
        return [data] if message.sender in left else []

    play.must_refuse = [name for name in play.honest if name in left]
    play.run()
    gone_on = [name for name in play.must_refuse if play.has_sent(name, next_step)]
    play.gives(bool(gone_on), f"{_names(gone_on)} sent {next_step.__name__} for {len(left)} hospitals")
    return play


@attack("aggregator", "keys", "an attempt is opened for fewer hospitals than agreed", "one of them takes part in it")
def _a_shrunk_cohort(world: World) -> Play:
    return _shrink(world, "AttemptOpen", m.RoundKeys if world.agreement.secure_sum.masked else m.UploadDone)


@attack(
    "aggregator",
    "keys",
    "the round keys of so many are left out that fewer than agreed remain",
    "one of them deals its shares",
    needs="masks",
)
def _a_cohort_shrunk_by_keys(world: World) -> Play:
    return _shrink(world, "RoundKeys", m.SealedSeeds)


@attack(
    "aggregator",
    "keys",
    "so many uploads are called lost that fewer than agreed remain",
    "one of those who remain votes for it",
)
def _a_cohort_shrunk_by_uploads(world: World) -> Play:
    return _shrink(world, "UploadDone", m.SurvivorVote)


# --- ... other parameters


def _other(agreement: Agreement, **changes: Any) -> Agreement:
    return msgspec.structs.replace(agreement, secure_sum=msgspec.structs.replace(agreement.secure_sum, **changes))


@attack(
    "aggregator",
    "parameters",
    "each hospital gets an order under another agreement: a lower threshold, another ring, a narrower clip, a coarser precision",
    "one of them obeys",
)
def _an_order_under_another_agreement(world: World) -> Play:
    network, ring = world.network(), world.agreement.secure_sum
    play = Play(network)
    others = [
        _other(network.agreement, threshold=ring.threshold - 1, minimum_cohort=3),
        _other(network.agreement, ring_bits=32 if ring.ring_bits == 20 else 20, value_bits=16),
        _other(network.agreement, value_bits=ring.value_bits - 1),
        _other(network.agreement, fraction_bits=max(1, ring.fraction_bits - 1)),
    ]

    @play.tell("RoundOpen")
    def order(message: m.Message, to: str) -> Bodies:
        play.took_place = True
        other = others[network.names.index(to) % len(others)]
        digest = agreement_digest(msgspec.json.encode(other))
        data = m.encode(network.identities[AGGREGATOR], AttemptId(digest, message.round, message.attempt), message.body)
        network.inject(AGGREGATOR, to, data)
        return []

    play.must_refuse = network.names
    play.run()
    for name in network.names:
        play.gives(play.has_sent(name, m.Ready), f"{name} trained for another agreement")
    return play


@attack(
    "aggregator",
    "parameters",
    "the aggregator speaks of the pinned agreement and opens with one vote and one share fewer than its threshold",
    "a hospital reveals shares",
    needs="masks",
)
def _a_lower_threshold_under_the_pinned_digest(world: World) -> Play:
    network, t_agreed = world.network(), world.agreement.secure_sum.threshold
    play = Play(network)
    lower = _other(network.agreement, threshold=t_agreed - 1, minimum_cohort=max(3, t_agreed - 1))
    network.aggregator = network.new_aggregator(Parties(lower, network.digest, network.parties.public_keys))

    @play.tell("SurvivorProof")
    def fewer(message: m.Message, _to: str) -> Bodies:
        play.took_place = True
        return keep(message)

    play.must_refuse = network.names
    play.run()
    for name in network.names:
        play.gives(play.has_sent(name, m.Unmasking), f"{name} revealed its shares on {t_agreed - 1} votes")
    return play


# --- ... both kinds of shares, two survivor sets, too few votes


def _without(name: str, survivors: tuple[tuple[str, bytes], ...]) -> tuple[tuple[str, bytes], ...]:
    return tuple(pair for pair in survivors if pair[0] != name)


@attack(
    "aggregator",
    "both-shares",
    "all reveal shares of one hospital's self seed; then it is called lost, and they are asked for the pair shares",
    "its vector is read, or somebody votes for a second set",
    needs="masks",
    spare=1,
)
def _self_seed_and_pair_shares_of_one_node(world: World) -> Play:
    network, victim = world.network(), world.names[1]
    play = Play(network)
    first: dict[str, m.Survivors] = {}
    votes: dict[str, bytes] = {}

    @play.tell("Survivors")
    def remember(message: m.Message, to: str) -> Bodies:
        first[to] = message.body  # type: ignore[assignment]
        return keep(message)

    @play.hear("Unmasking")
    def ask_again(message: m.Message, _data: bytes) -> Sequence[bytes]:
        if message.sender not in votes and message.sender != victim:
            votes[message.sender] = b""
            survivors = _without(victim, first[message.sender].survivors)
            play.say(message.sender, (1, 1), m.Survivors(survivors, first[message.sender].uploads))
        return []

    @play.hear("SurvivorVote")
    def prove_again(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender not in votes or not isinstance(message.body, m.SurvivorVote):
            return [data]
        play.gives(not votes[message.sender], f"{message.sender} voted for a second set of survivors")
        votes[message.sender] = message.body.signature
        if all(votes.values()) and len(votes) == len(network.names) - 1:
            for name in votes:
                play.say(name, (1, 1), m.SurvivorProof(tuple(sorted(votes.items()))))
        return []

    play.must_refuse = [name for name in network.names if name != victim]
    return play.run()


Forge = Callable[[dict[str, bytes], dict[str, bytes]], list[tuple[str, bytes]]]
"""Makes a proof for one half of the hospitals out of its own votes and those of the other half."""


def _two_sets(world: World, forge: Forge, colluders: int = 0) -> Play:
    """Half of the hospitals hear that the victim survived, half that it is lost; colluders vote for both."""
    names = world.names
    victim, allies = names[0], names[len(names) - colluders :]
    play = Play(world.network(), colluders=allies)
    play.loose = True
    network = play.network
    honest = [name for name in names if name not in (victim, *allies)]
    alive = {victim, *honest[: len(honest) // 2]}
    votes: dict[bool, dict[str, bytes]] = {True: {}, False: {}}
    told = {victim, *honest}

    @play.tell("Survivors")
    def tell(message: m.Message, to: str) -> Bodies:
        attempt = network.aggregator._attempt
        if not isinstance(message.body, m.Survivors) or attempt is None:
            return []
        sets = {True: message.body.survivors, False: _without(victim, message.body.survivors)}
        if to in told:
            return [(m.Survivors(sets[to in alive], message.body.uploads), b"")]
        address = AttemptId(network.digest, message.round, message.attempt)
        for kind, survivors in sets.items():
            statement = t.survivor_statement(address, attempt._view, survivors)
            votes[kind][to] = network.identities[to].sign(Label.SURVIVORS, statement)
        return []

    @play.hear("SurvivorVote")
    def prove(message: m.Message, _data: bytes) -> Sequence[bytes]:
        if isinstance(message.body, m.SurvivorVote):
            votes[message.sender in alive][message.sender] = message.body.signature
        if told <= votes[True].keys() | votes[False].keys():
            for name in sorted(told):
                kind = name in alive
                proof = [pair for pair in forge(votes[kind], votes[not kind]) if kind or pair[0] != victim]
                play.say(name, (message.round, message.attempt), m.SurvivorProof(tuple(sorted(proof))))
        return []

    play.hear("Unmasking")(lambda message, data: [])
    play.run()
    revealed = {name for name in told if play.has_sent(name, m.Unmasking)}
    if colluders:
        play.must_refuse = sorted(told - alive)
        play.gives(bool(revealed & alive and revealed - alive), "both sets of survivors were unmasked")
    else:
        play.must_refuse = sorted(told)
        play.gives(bool(revealed), f"{len(revealed)} hospitals revealed shares")
    return play


@attack(
    "aggregator",
    "survivors",
    "two sets of survivors to two halves, each with the votes of both",
    "somebody reveals shares",
    needs="masks",
    spare=1,
)
def _votes_for_another_set(world: World) -> Play:
    return _two_sets(world, lambda own, others: [*own.items(), *others.items()])


@attack(
    "aggregator",
    "survivors",
    "two sets of survivors to two halves, each with its own votes only, fewer than the threshold",
    "somebody reveals shares",
    needs="masks",
    spare=1,
)
def _too_few_votes(world: World) -> Play:
    return _two_sets(world, lambda own, _others: list(own.items()))


@attack(
    "aggregator",
    "survivors",
    "two sets of survivors to two halves, each with forged votes of the others",
    "somebody reveals shares",
    needs="masks",
    spare=1,
)
def _forged_votes(world: World) -> Play:
    return _two_sets(world, lambda own, others: [*own.items(), *((name, bytes(64)) for name in others)])


@attack(
    "aggregator",
    "survivors",
    "two sets of survivors to two halves, each with its own votes repeated",
    "somebody reveals shares",
    needs="masks",
    spare=1,
)
def _repeated_votes(world: World) -> Play:
    return _two_sets(world, lambda own, _others: [*own.items()] * 3)


@attack(
    "aggregator",
    "deviating-colluders",
    "two sets of survivors to two halves; as many colluders as the agreement tolerates vote for both",
    "both sets are unmasked, and a vector read",
    needs="masks",
    spare=1,
)
def _two_sets_with_colluders(world: World) -> Play:
    return _two_sets(world, lambda own, _others: list(own.items()), world.agreement.colluders_tolerated)


@attack(
    "aggregator",
    "neighbours",
    "one hospital hears that an honest neighbour never dealt seeds, and masks without it; all others hear the truth",
    "its neighbours vote for the sum, or somebody reveals shares",
    needs="masks",
    spare=1,
)
def _a_neighbour_that_never_dealt_seeds(world: World) -> Play:
    play, victim, hidden = Play(world.network()), world.names[0], world.names[1]
    play.loose = True

    @play.tell("SeedSet")
    def hide(message: m.Message, to: str) -> Bodies:
        if to != victim or not isinstance(message.body, m.SeedSet):
            return keep(message)
        sealed = tuple(data for data in message.body.sealed if m.claimed_sender(data) != hidden)
        return [(m.SeedSet(tuple(name for name in message.body.senders if name != hidden), sealed), b"")]

    play.run()
    play.must_refuse = [victim, *play.knowledge.graph(victim, (1, 1)).neighbours(victim)]
    revealed = [name for name in play.honest if play.has_sent(name, m.Unmasking)]
    play.gives(bool(revealed), f"{_names(revealed)} revealed shares for a sum whose masks do not cancel")
    return play


@attack(
    "aggregator",
    "neighbours",
    "as many neighbours of one hospital as may collude do, and all others are called lost, so that only colluders share masks with it",
    "its vector is read, or it votes",
    needs="sparse",
)
def _a_victim_cut_off(world: World) -> Play:
    """Who stands beside whom follows from a hash over fresh keys: colluders are chosen when it is known."""
    play, victim = Play(world.network()), world.names[0]
    play.loose, lost = True, set[str]()

    @play.tell("KeySet")
    def choose_allies(message: m.Message, to: str) -> Bodies:
        if not play.took_place and isinstance(message.body, m.KeySet):
            address = message.round, message.attempt
            play.knowledge.watch(AGGREGATOR, victim, play.sign(AGGREGATOR, address, message.body))
            around = play.knowledge.graph(victim, address).neighbours(victim)
            allies = around[: world.agreement.secure_sum.shares_needed - 1]
            play.took_place, play.colluders = True, tuple(allies)
            play.knowledge.colluders.update(allies)
            play.network.liars.update(allies)
            lost.update(set(around) - set(allies))
            play.honest = [name for name in play.honest if name not in allies]
        return keep(message)

    @play.hear("UploadChunk", "UploadDone")
    def lose(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender in lost else [data]

    play.must_refuse = [victim]
    play.run()
    play.gives(play.has_sent(victim, m.SurvivorVote), f"{victim} voted although only colluders share masks with it")
    return play


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


# --- ... a second sum, an old one, a late upload


@attack(
    "aggregator",
    "second-sum",
    "when a round is summed, and before the sum is sent, a second attempt of it is opened without one hospital",
    "somebody who has voted takes part in it",
    spare=1,
)
def _a_second_attempt_after_the_votes(world: World) -> Play:
    play, names = Play(world.network()), world.names
    opened: list[str] = []

    @play.tell("SumChunk")
    def again(message: m.Message, to: str) -> Bodies:
        if to != names[0] and to not in opened:
            opened.append(to)
            play.say(to, (1, 2), m.AttemptOpen(tuple(names[1:])))
            if not world.agreement.secure_sum.masked:
                play.say(to, (1, 2), m.Credit(1000))
        return keep(message) if to == names[0] else []

    play.tell("RoundResult")(lambda message, to: keep(message) if to == names[0] else [])
    play.must_refuse = names[1:]
    play.run()
    for name in names[1:]:
        taken = any(sender == name and head.attempt == 2 for sender, head in play.sent)
        play.gives(taken, f"{name} took part in a second attempt of a round in which it had voted")
    return play


@attack("aggregator", "second-sum", "an attempt is opened again that runs already", "it is begun anew")
def _an_old_attempt_again(world: World) -> Play:
    play, victim = Play(world.network()), world.names[0]

    @play.tell("Credit")
    def again(message: m.Message, to: str) -> Bodies:
        if to == victim and not play.took_place:
            play.say(to, (message.round, message.attempt), m.AttemptOpen(tuple(world.names)))
        return keep(message)

    play.must_refuse = [victim]
    play.run()
    keys = [head for sender, head in play.sent if sender == victim and isinstance(head.body, m.RoundKeys)]
    play.gives(len(keys) > 1, f"{victim} made two sets of keys for one attempt")
    return play


@attack("aggregator", "second-sum", "round 1 is opened again in round 2", "somebody trains or sums it again")
def _an_old_round_again(world: World) -> Play:
    play, victim = Play(world.network(2)), world.names[0]

    @play.tell("AttemptOpen")
    def again(message: m.Message, to: str) -> Bodies:
        if to == victim and message.round == 2:
            play.say(to, (1, 0), m.RoundOpen(0))
            return []
        return keep(message)

    play.must_refuse = [victim]
    play.run()
    ready = [head for sender, head in play.sent if sender == victim and isinstance(head.body, m.Ready)]
    play.gives([head.round for head in ready].count(1) > 1, f"{victim} trained round 1 again")
    return play


@attack(
    "aggregator",
    "second-sum",
    "an upload is held back until its pair masks are revealed; then its sender is asked to vote for a set with itself",
    "its vector is read",
    needs="masks",
    spare=1,
)
def _an_upload_held_back(world: World) -> Play:
    play, victim = Play(world.network()), world.names[1]
    network = play.network

    @play.hear("UploadChunk", "UploadDone")
    def hold(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == victim else [data]

    @play.hear("Unmasking")
    def ask_for_the_rest(_message: m.Message, data: bytes) -> Sequence[bytes]:
        machine, own = network.aggregator._attempt, network.nodes[victim]._attempt
        if not play.took_place and machine is not None and own is not None:
            survivors = tuple(sorted([*machine._survivors, (victim, own._digest)]))
            play.say(victim, (1, 1), m.Survivors(survivors, tuple(machine._signed_uploads.values())))
            play.say(victim, (1, 1), m.SurvivorProof(tuple(sorted(machine._votes.items()))))
        return [data]

    play.must_refuse = [victim]
    play.must_sum = [name for name in network.names if name != victim]
    play.run()
    play.gives(play.has_sent(victim, m.Unmasking), f"{victim} revealed its share of its own self seed")
    return play


# --- ... the sum and its record

Change = Callable[[Uint32Vector], Uint32Vector]


def _resign(play: Play, line: bytes, **changes: object) -> bytes:
    """A transcript line of the same place with another body, signed by the aggregator."""
    entry = msgspec.json.decode(line, type=Entry[t.Body])
    body = msgspec.structs.replace(entry.body, **changes)
    unsigned = msgspec.json.encode(Unsigned(entry.seq, entry.prev, body))
    signature = play.network.identities[AGGREGATOR].sign(Label.TRANSCRIPT, unsigned).hex()
    return msgspec.json.encode(Entry(entry.seq, entry.prev, body, signature)) + b"\n"


def _changed(network: Network, total: Total, change: Change) -> Total:
    """A sum with other values; where it is encrypted, by adding what makes the difference, as a hospital's help would allow."""
    if not network.agreement.secure_sum.encrypted:
        return change(total.copy())
    key = next(machine._study_key for machine in network.nodes.values() if machine._study_key is not None)
    values = make_ring(network.agreement, network.ciphers, key.secret).open(total, network.size)
    packing = packing_of(network.agreement)
    difference = packing.pack(change(values.copy())) - packing.pack(values)
    words = total.copy()
    mask = np.uint64(2**packing.parameters.plain_bits - 1)
    network.ciphers.cipher(packing.parameters, b"").add_plain(words, difference & mask)
    return words


def _sum_bodies(network: Network, total: Total) -> list[tuple[m.AnyBody, bytes]]:
    ring = make_ring(network.agreement)
    tails = [bytes(ring.pack_sum(total, start)) for start in range(0, network.size, ring.sum_chunk_values)]
    return [(m.SumChunk(index, m.chunk_digest(tail)), tail) for index, tail in enumerate(tails)]


def _announce(
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
        record = _bodies([message.body.record])[0]
        tag = int(record.aggregate_tag, 16) if isinstance(record, t.RoundRecord) else 0
        line = _resign(
            play,
            message.body.record,
            aggregate_digest=t.aggregate_digest(octets(total)).hex(),
            aggregate_tag=f"{retag(tag) % TAG_PRIME:016x}",
        )
        signed = message.body.receipts if receipts is None else receipts(line)
        return [*_sum_bodies(play.network, total), (m.RoundResult(line, signed), b"")]


def _nobody_takes_it(play: Play) -> Play:
    play.must_refuse = play.network.names
    play.run()
    taken = [name for name in play.honest if play.has_sent(name, m.Receipt)]
    play.gives(bool(taken), f"{_names(taken)} countersigned it")
    return play


def _one_more(values: Uint32Vector) -> Uint32Vector:
    values[7] += 1
    return values


def _rolled(values: Uint32Vector) -> Uint32Vector:
    values[:] = np.roll(values, 1)
    return values


def _truncated(values: Uint32Vector) -> Uint32Vector:
    values[values.size // 2 :] = values[values.size // 2]
    return values


def _changed_sum(world: World, change: Change) -> Play:
    play = Play(world.network())
    _announce(play, lambda total: _changed(play.network, total, change))
    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "changed-sum",
    "one value of the sum is changed by the smallest step, and the record signed anew to fit",
    "somebody accepts it",
)
def _a_changed_sum(world: World) -> Play:
    return _changed_sum(world, _one_more)


@attack("aggregator", "changed-sum", "the values of the sum are re-ordered, the record fits", "somebody accepts it")
def _a_reordered_sum(world: World) -> Play:
    return _changed_sum(world, _rolled)


@attack("aggregator", "changed-sum", "the second half of the sum is cut off, the record fits", "somebody accepts it")
def _a_truncated_sum(world: World) -> Play:
    return _changed_sum(world, _truncated)


@attack("aggregator", "changed-sum", "the sum is right, its tag is another one", "somebody accepts it")
def _another_tag(world: World) -> Play:
    play = Play(world.network())
    _announce(play, lambda total: total, lambda tag: tag + 1)
    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "changed-sum",
    "a hospital that lost its connection before it voted in round 2 is sent sum and record of round 1 as those of round 2",
    "it accepts them",
    spare=1,
)
def _a_replayed_sum(world: World) -> Play:
    network, victim, old = world.network(2), world.names[-1], list[tuple[m.AnyBody, bytes]]()
    play = Play(network)

    @play.hear("SurvivorVote")
    def mute(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if (message.sender, message.round) == (victim, 2) else [data]

    @play.tell("Survivors")
    def unasked(message: m.Message, to: str) -> Bodies:
        return [] if (to, message.round) == (victim, 2) else keep(message)

    @play.tell("SumChunk", "RoundResult")
    def replay(message: m.Message, to: str) -> Bodies:
        if to != victim:
            return keep(message)
        if message.round == 1:
            old.extend(keep(message))
            return keep(message)
        sent, old[:] = (list(old), []) if isinstance(message.body, m.RoundResult) else ([], old)
        return sent

    play.must_refuse = [victim]
    play.must_sum = [name for name in network.names if name != victim]
    play.run()
    play.gives(
        2 in [summed.round for summed in network.sums[victim]], f"{victim} took the sum of round 1 for that of 2"
    )
    return play


@attack(
    "aggregator",
    "changed-sum",
    "the record of a sum carries fewer votes than the threshold",
    "somebody accepts it",
)
def _a_record_with_too_few_votes(world: World) -> Play:
    play = Play(world.network())

    @play.tell("RoundResult")
    def strip(message: m.Message, _to: str) -> Bodies:
        if not isinstance(message.body, m.RoundResult):
            return keep(message)
        record = _bodies([message.body.record])[0]
        survivors = record.survivors if isinstance(record, t.RoundRecord) else ()
        kept = world.agreement.secure_sum.threshold - 1
        bare = tuple(
            msgspec.structs.replace(survivor, signature=survivor.signature if index < kept else "")
            for index, survivor in enumerate(survivors)
        )
        return [(m.RoundResult(_resign(play, message.body.record, survivors=bare)), b"")]

    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "multiple",
    "twice the sum with twice the sum of its tags, where that stays in the range of a sum",
    "somebody accepts it",
)
def _a_multiple_of_the_sum(world: World) -> Play:
    network = world.network()
    low = -0.75 * FixedPoint.from_agreement(network.agreement).limit
    network.vectors = lambda _name, _round: np.full(network.size, low)
    play = Play(network)
    _announce(play, lambda total: _changed(network, total, lambda values: values * np.uint32(2)), lambda tag: 2 * tag)
    return _nobody_takes_it(play)


@attack(
    "aggregator",
    "latecomer",
    "a hospital that took no part is sent a changed sum, countersigned by as many colluders as the agreement tolerates",
    "it accepts it",
    spare=1,
)
def _a_wrong_sum_for_a_latecomer(world: World) -> Play:
    names, late = world.names, world.names[-1]
    allies = names[: max(1, world.agreement.colluders_tolerated)] if world.agreement.colluders_tolerated else []
    play = Play(world.network(), colluders=allies)
    network = play.network

    @play.hear("Ready")
    def absent(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == late else [data]

    def receipts(line: bytes) -> tuple[tuple[str, bytes], ...]:
        statement = t.receipt_statement(network.digest, 1, t.line_digest(line))
        signed = tuple((name, network.identities[name].sign(Label.RECEIPT, statement)) for name in allies)
        return signed * 4

    _announce(play, lambda total: _changed(network, total, _one_more), victims=[late], receipts=receipts)
    play.must_sum = [name for name in names if name != late and name not in allies]
    play.run()
    play.gives(bool(network.sums[late]), f"{late} accepted it")
    return play


@attack(
    "aggregator",
    "two-stories",
    "a hospital is shown two signed records of one round",
    "it countersigns both, or stays",
)
def _two_records_of_one_round(world: World) -> Play:
    play, victim = Play(world.network()), world.names[1]

    @play.tell("RoundResult")
    def both(message: m.Message, to: str) -> Bodies:
        if to != victim or not isinstance(message.body, m.RoundResult):
            return keep(message)
        other = _resign(play, message.body.record, upload_bytes=1)
        return [(message.body, b""), (m.RoundResult(other), b"")]

    play.must_refuse = [victim]
    play.run()
    signed = {head.body.signature for name, head in play.sent if name == victim and isinstance(head.body, m.Receipt)}
    play.gives(len(signed) > 1, f"{victim} countersigned {len(signed)} records of one round")
    kept = {line for _, line in play.network.journals[victim].receipts}
    play.gives(len(kept) < 2, f"{victim} kept no proof of the two records")
    return play


@attack(
    "aggregator",
    "fork",
    "one hospital is told that round 1 was lost, the others apply its sum; then all are asked to go on together",
    "somebody sums round 2 with who builds on another sum",
)
def _a_round_lost_for_one_only(world: World) -> Play:
    play, victim = Play(world.network(2)), world.names[1]
    play.loose = True

    @play.tell("SumChunk", "RoundResult")
    def lost(message: m.Message, to: str) -> Bodies:
        if (to, message.round) != (victim, 1):
            return keep(message)
        if isinstance(message.body, m.RoundResult):
            play.say(to, (1, 1), m.AttemptFailed("too few votes", final=True))
        return []

    @play.tell("RoundOpen")
    def as_if_lost(message: m.Message, to: str) -> Bodies:
        return [(m.RoundOpen(0), b"")] if (to, message.round) == (victim, 2) else keep(message)

    play.must_refuse = play.network.names
    play.run()
    summed = [name for name in play.honest if any(summed.round == 2 for summed in play.network.sums[name])]
    play.gives(bool(summed), f"{_names(summed)} summed round 2 across the fork")
    return play


@attack(
    "aggregator",
    "order",
    "a hospital that takes part in no sum is shown that of round 2 before it has that of round 1",
    "it applies round 2 without round 1",
    spare=1,
)
def _sums_out_of_order(world: World) -> Play:
    network, late = world.network(3), world.names[-1]
    play, second = Play(network), False

    @play.hear("Ready")
    def absent(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == late else [data]

    @play.tell("SumChunk", "RoundResult")
    def hold_back(message: m.Message, to: str) -> Bodies:
        nonlocal second
        if to == late and message.round == 2 and isinstance(message.body, m.RoundResult):
            second = True
        return [] if to == late and message.round == 1 and not second else keep(message)

    @play.hear("Join")
    def deaf(message: m.Message, data: bytes) -> Sequence[bytes]:
        return [] if message.sender == late and network.aggregator._round > 0 and not second else [data]

    play.must_sum = network.names
    play.run()
    rounds = [summed.round for summed in network.sums[late]]
    play.gives(rounds != sorted(rounds) or (bool(rounds) and rounds[0] != 1), f"{late} applied rounds {rounds}")
    return play


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "random bytes": lambda data: os.urandom(len(data)),
    "a length beyond the end": lambda data: b"\xff\xff\xff\xff" + data[4:],
    "half a message": lambda data: data[: len(data) // 2],
    "one byte": lambda data: data[:1],
    "one byte too many": lambda data: data + b"\0",
    "deep nesting": lambda _data: (1 << 16).to_bytes(4) + b"\x91" * (1 << 16),
    "other types": lambda _data: (4).to_bytes(4) + msgspec.msgpack.encode([1, 2, 3]),
    "more than the limit": lambda _data: bytes(m.MESSAGE_LIMIT_BYTES + 1),
    "a changed bit": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
}


@attack(
    "aggregator",
    "decoders",
    f"hospitals get broken messages: {', '.join(BROKEN)}",
    "a hospital crashes, hangs or obeys",
)
def _broken_messages_of_the_aggregator(world: World) -> Play:
    """Every kind to a fresh machine of one hospital."""
    network, name = world.network(), world.names[0]
    play = Play(network)
    genuine = play.sign(AGGREGATOR, (1, 0), m.RoundOpen(0))
    for kind, spoil in BROKEN.items():
        play.took_place = True
        try:
            answer = network.new_node(name).receive(spoil(genuine))
        except RemoteProtocolError as fault:
            network.faults.setdefault(name, fault)
            play.gives(fault.peer != AGGREGATOR, f"{kind}: {name} blamed {fault.peer}")
        except Exception as error:  # whatever it is, it is evidence
            network.crashes.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        else:
            play.gives(True, f"{name} answered {len(answer)} messages to {kind}")
    play.must_refuse = [name]
    return play


@attack(
    "aggregator",
    "decoders",
    "an agreement, a roster, a certificate, an enrolment request and a transcript line are broken in the same ways",
    "one of them is taken, or its decoder raises anything but a typed error",
)
def _broken_documents(world: World) -> Play:
    play, network = Play(world.network()), world.network()
    identity, authority = network.identities[world.names[0]], Authority.create("Audit")
    request, now = make_request(identity), authority.root.not_valid_after_utc - timedelta(days=1)
    roster, signature = make_roster(authority, "Audit", 1, 1, [_enrol(authority, identity)])
    writer = t.TranscriptWriter(identity)
    line = writer.append(t.StudyClosed(rounds_completed=0, reason="audit"))
    agreement = write_agreement(world.agreement)
    signed = sign_document(authority.sign, Label.AGREEMENT, agreement)

    def decode_agreement(data: bytes) -> None:
        read_agreement(data)
        verify_document(authority.public_key, Label.AGREEMENT, data, signed)

    decoders: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
        "agreement": (agreement, decode_agreement),
        "roster": (roster, lambda data: read_roster(data, signature, authority.root, now=now)),
        "certificate": (authority.root_pem, lambda data: load_root(data, authority.fingerprint)),
        "request": (request, read_request),
        "transcript": (line, lambda data: t.read_line(data, identity.public_key)),
    }
    play.took_place = True
    for (document, (genuine, decode)), (kind, spoil) in product(decoders.items(), BROKEN.items()):
        try:
            decode(spoil(genuine))
        except SecGeoError:
            continue
        except Exception as error:  # whatever it is, it is evidence
            play.network.crashes.append(f"{document}, {kind}: {type(error).__name__}: {error}"[:300])
        else:
            play.gives(True, f"{document}: {kind} was taken")
    return play


@attack(
    "aggregator",
    "documents",
    "a site gets wrong documents: signed by another authority, of weaker rules, an old roster, one in which a member is revoked or has "
    "another certificate, another root; and an agreement below its policy",
    "one of them is taken",
)
def _wrong_documents(world: World) -> Play:
    play = Play(world.network())
    members, victim = world.names, world.names[-1]
    authority, other = Authority.create("Audit"), Authority.create("Audit")
    now = authority.root.not_valid_after_utc - timedelta(days=1)
    entries = {name: _enrol(authority, play.network.identities[name]) for name in [*members, AGGREGATOR]}
    older, older_signature = make_roster(authority, "Audit", 1, 1, entries.values())
    roster, signature = make_roster(authority, "Audit", 2, 2, entries.values())
    read = read_roster(roster, signature, authority.root, now=now)
    agreement = msgspec.structs.replace(
        world.agreement,
        roster=RosterPin(2, 2, read.digest.hex(), authority.fingerprint),
        members=tuple(
            msgspec.structs.replace(member, certificate_fingerprint=entries[member.node_id].certificate_fingerprint)
            for member in world.agreement.members
        ),
    )
    text = write_agreement(agreement)
    weak = text.replace(f"threshold = {agreement.secure_sum.threshold}".encode(), b"threshold = 2", 1)
    revoked, revoked_signature = revoke(authority, read, victim)
    anew = _enrol(authority, Identity.generate(victim, "hospital"))
    changed, changed_signature = add_entry(authority, read, anew, replace=True)
    genuine = {
        AGREEMENT: text,
        f"{AGREEMENT}.sig": sign_document(authority.sign, Label.AGREEMENT, text),
        ROSTER: roster,
        f"{ROSTER}.sig": signature,
    }
    wrong: dict[str, dict[str, bytes]] = {
        "an agreement of another authority": {f"{AGREEMENT}.sig": sign_document(other.sign, Label.AGREEMENT, text)},
        "an agreement of weaker rules": {
            AGREEMENT: weak,
            f"{AGREEMENT}.sig": sign_document(authority.sign, Label.AGREEMENT, weak),
        },
        "a roster of another authority": {f"{ROSTER}.sig": other.sign_roster(roster)},
        "an old roster": {ROSTER: older, f"{ROSTER}.sig": older_signature},
        "a revoked member": {ROSTER: revoked, f"{ROSTER}.sig": revoked_signature},
        "another certificate": {ROSTER: changed, f"{ROSTER}.sig": changed_signature},
    }
    check_documents(
        genuine, authority.root, now=now
    )  # so that what is refused below is refused for what is wrong with it
    play.took_place = True
    strict = LocalPolicy(min_threshold=agreement.secure_sum.threshold + 1)
    tries: dict[str, Callable[[], object]] = {
        kind: lambda change=change: check_documents(genuine | change, authority.root, now=now)  # type: ignore[misc]
        for kind, change in wrong.items()
    }
    tries["another root"] = lambda: load_root(other.root_pem, authority.fingerprint)
    tries["an agreement below the policy"] = lambda: check_policy(agreement, strict, epsilon=0.0)
    for kind, take in tries.items():
        try:
            take()
        except SecGeoError:
            continue
        play.gives(True, f"{kind} was taken")
    return play


def _enrol(authority: Authority, identity: Identity) -> RosterEntry:
    request = read_request(make_request(identity))
    root = authority.root
    return RosterEntry.enrolled(request, authority.issue(request, root.not_valid_before_utc, root.not_valid_after_utc))


# --- ... ciphertexts and the study key


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

    _announce(play, alone)
    return _nobody_takes_it(play)


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
    play.loose = True
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
    play.gives(len(mixed) > 1 and bool(votes), f"{_names(votes)} voted for a sum under two keys")
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
        return [data, *chunks, *done]

    _instead(play, "UploadDone", again)
    play.must_be_put_out = [liar]
    return play.run()


def _break(kind: str, spoil: Callable[[bytes], bytes]) -> None:
    @attack("node", "messages", f"a member sends {kind} instead of a message", "the study stops, or another is blamed")
    def broken_message_of_a_member(world: World) -> Play:
        play = _member(world)
        due = "RoundKeys" if world.agreement.secure_sum.masked else "UploadDone"
        _instead(play, due, lambda _message, data: [spoil(data)])
        play.must_be_put_out = play.culprits
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
    due = "RoundKeys" if world.agreement.secure_sum.masked else "UploadDone"

    def steal(_message: m.Message, _data: bytes) -> Sequence[bytes]:
        return [stolen[0]]

    @play.hear(due)
    def send(message: m.Message, data: bytes) -> Sequence[bytes]:
        if message.sender in play.culprits and stolen:
            play.took_place = True
            return [stolen[0]]
        stolen.append(data)
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
    disputes = [entry for entry in _bodies(play.network.lines) if isinstance(entry, t.Disputed)]
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
        if play.took_place or play.network.crashes:
            break
    disputes = [entry for entry in _bodies(play.network.lines) if isinstance(entry, t.Disputed)]
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
    play.gives(bool(opened), f"{_names(opened)} opened or accepted a sum below the minimum")
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


def control(world: World) -> bool | None:
    """Whether the attacker reads a vector where the protocol gives in: to as many colluders as the threshold. None: no such case.

    In a sparse graph that depends on where they stand, so there all others collude.
    """
    ring = world.agreement.secure_sum
    if not ring.masked or ring.shares_needed >= len(world.names):
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
        step = _one_more(np.zeros(network.size, dtype=np.uint32))
        return tag + tags.Tagger(seed, address).part(step)

    _announce(play, lambda total: _changed(network, total, _one_more), retag)
    play.granted = ["wrong"]
    play.run()
    for name in play.honest:
        play.gives(not network.journals[name].receipt(1), f"{name} kept no record that the aggregator signed")
    return play
