"""What an aggregator that keeps everything, and is told its colluders' secrets, can compute about one node.

`watch` takes every message that passes; `vector_of` tries everything that follows from the formulas of `protocols.sealing`:
open what was sealed to known share keys, combine shares, derive or open contributions, take the masks off the upload. Uploads
that are encrypted it decrypts: some hospital gave it the study key. It never looks into an honest machine for anything else, so a
vector that comes out is a vector that the protocol gave away.

That fewer shares than the threshold say nothing of a secret is not taken for granted: `Knowledge` interpolates with those that it has,
however few, and takes off them the coefficients of other splits that it knows. Whether a guess is right it sees as anybody could, by the
commitment to the self seed, or the public key of the pair master, that the owner has signed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from audit.attacks.interpolation import interpolations, without
from audit.attacks.network import Network
from keys.errors import VerificationFailed
from protocols import messages as m
from protocols import sealing, shamir
from protocols.agreement import Agreement
from protocols.attempt_node import open_contribution, open_shares
from protocols.ciphertexts import upload_bytes
from protocols.encoding import FixedPoint, Float64Vector, Uint32Vector, unpack
from protocols.graph import MaskGraph
from protocols.packing import DEGREE, Packing, choose
from protocols.prg import MaskSet
from protocols.sealing import AttemptId
from protocols.study_key import StudyKey

Address = tuple[int, int]
"""Round and attempt."""
Kind = Literal["self_seed", "pair_master"]
"""A secret of an attempt of which shares are dealt."""
KINDS: tuple[Kind, ...] = ("self_seed", "pair_master")


def peek(data: bytes) -> Any:
    """The head of a message, with no signature checked; None if it is not one."""
    try:
        return m._decoder.decode(m._split(data)[0])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


@dataclass
class Seen:
    """One attempt, as it passed by. The digests and senders are by the node that was shown them."""

    digests: dict[str, dict[str, bytes]] = field(default_factory=dict)
    senders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    keys: dict[str, set[m.RoundKeys]] = field(default_factory=lambda: defaultdict(set))
    seals: dict[tuple[str, str], list[m.SealedSeeds]] = field(default_factory=lambda: defaultdict(list))
    chunks: dict[str, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    self_shares: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    pair_shares: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    secrets: dict[str, sealing.AttemptSecrets] = field(default_factory=dict)

    def shares(self, kind: Kind) -> dict[str, dict[str, bytes]]:
        """The shares of one kind of secret, by owner and holder."""
        return self.self_shares if kind == "self_seed" else self.pair_shares


class Knowledge:
    """Everything that one coalition has seen."""

    def __init__(self, network: Network, colluders: Iterable[str] = ()) -> None:
        self._network, self.colluders = network, set(colluders)
        self.attempts: dict[Address, Seen] = defaultdict(Seen)
        self._followed: dict[tuple[object, ...], Any] = {}

    def watch(self, sender: str, recipient: str, data: bytes) -> None:
        """Take one message that passes."""
        head = peek(data)
        if head is None:
            return
        seen, body = self.attempts[head.round, head.attempt], head.body
        for name in self.colluders.intersection((sender, recipient)):
            self.corrupt(name)
        match body:
            case m.RoundKeys():
                seen.keys[sender].add(body)
            case m.SealedSeeds():
                seen.seals[sender, body.recipient].append(body)
            case m.KeySet() if sender == m.AGGREGATOR:
                seen.digests[recipient] = dict(body.digests)
            case m.SeedSet() if sender == m.AGGREGATOR:
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

    def corrupt(self, name: str) -> None:
        """A colluder hands over the secrets of the attempt that it is in."""
        self.colluders.add(name)
        attempt = self._network.nodes[name]._attempt
        if attempt is not None:
            self.attempts[attempt._attempt.round, attempt._attempt.attempt].secrets[name] = attempt._secrets

    # --- what follows from it

    def reads(self, name: str) -> bool:
        """Whether a vector of this node comes out, of any attempt, where more than the study key hides it."""
        if not self._network.agreement.secure_sum.masked:
            return False  # Nothing but the study key hides it, and nothing but the key shows it.
        uploaded = [address for address, seen in self.attempts.items() if seen.chunks[name]]
        return any(self.recovers(name, address) for address in uploaded)

    def recovers(self, name: str, address: Address = (1, 1)) -> bool:
        """Whether `vector_of` is the node's real vector."""
        return is_vector_of(self._network, self.vector_of(name, address), name, address[0])

    def vector_of(self, name: str, address: Address = (1, 1)) -> Float64Vector | None:
        """The update that hides in a node's upload, or None if a mask stays on it."""
        seen = self.attempts[address]
        upload = self._upload(name, address)
        if upload is None or name not in seen.digests or name not in seen.senders:
            return None
        # Without a known self seed, guess one; this is right only if there is no such mask.
        seed = self.self_seed(name, address) or bytes(32)
        added, subtracted = [sealing.self_mask_key(seed, self._attempt(address), name)], list[bytes]()
        for peer in self.graph(name, address).neighbours(name):
            if peer in seen.senders[name]:
                key = self.pair_key(name, peer, address)
                if key is None:
                    return None
                (added if name < peer else subtracted).append(key)
        masks, step = MaskSet(subtracted, added), chunk_coordinates(self._network.agreement)
        for chunk, start in enumerate(range(0, upload.size, step)):
            masks.apply(upload[start : start + step], chunk)
        return self._decoded(upload)

    def graph(self, name: str, address: Address = (1, 1)) -> MaskGraph:
        """Who shares masks with whom, as this node was led to believe."""
        neighbours = self._network.agreement.secure_sum.neighbours
        return MaskGraph.build(self.attempts[address].digests[name], neighbours, self._cohort(name, address))

    def self_seed(self, name: str, address: Address = (1, 1)) -> bytes | None:
        """A node's self seed, if the shares that are known give it away."""
        return self._secret(name, "self_seed", address)

    def pair_master(self, name: str, address: Address = (1, 1)) -> bytes | None:
        """A node's pair master, if the shares that are known give it away."""
        return self._secret(name, "pair_master", address)

    def pair_key(self, victim: str, peer: str, address: Address = (1, 1)) -> bytes | None:
        """The mask key between two nodes, in the victim's view of the round keys."""
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

    # --- helpers

    def _attempt(self, address: Address) -> AttemptId:
        return AttemptId(self._network.digest, *address)

    def _cohort(self, name: str, address: Address) -> bytes:
        key = self._network.nodes[name]._study_key
        digests = self.attempts[address].digests[name]
        return sealing.cohort_digest(self._attempt(address), digests, b"" if key is None else key.id)

    def _open_shares(self, address: Address) -> None:
        """Open whatever was sealed to a known share key."""
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

    def _secret(self, owner: str, kind: Kind, address: Address) -> bytes | None:
        """Told by its owner, interpolated, or found by the coefficients of another split."""
        self._open_shares(address)
        secret = self._interpolated(owner, kind, address)
        if secret is None and self._points(owner, kind, address):
            secret = self._once(("unmasked", owner, kind), address, lambda: self._without(owner, kind, address))
        return secret

    def _interpolated(self, owner: str, kind: Kind, address: Address) -> bytes | None:
        secrets = self.attempts[address].secrets
        if owner in secrets:
            return secrets[owner].self_seed if kind == "self_seed" else secrets[owner].pair_master
        found: bytes | None = self._once((owner, kind), address, lambda: self._interpolate(owner, kind, address))
        return found

    def _interpolate(self, owner: str, kind: Kind, address: Address) -> bytes | None:
        needed = self._network.agreement.secure_sum.shares_needed
        guesses = interpolations(self._points(owner, kind, address), needed)
        return next((guess for guess in guesses if self._fits(owner, kind, guess, address)), None)

    def _without(self, owner: str, kind: Kind, address: Address) -> bytes | None:
        count = len(self._holders(owner, address))
        offsets = self._once(("offsets", count), address, lambda: self._offsets(count, address))
        guesses = without(self._points(owner, kind, address), offsets)
        return next((guess for guess in guesses if self._fits(owner, kind, guess, address)), None)

    def _once(self, what: tuple[object, ...], address: Address, follow: Callable[[], Any]) -> Any:
        """What follows from what is known of an attempt: worked out once, and again when there are more shares or secrets."""
        seen = self.attempts[address]
        known = [len(seen.keys), len(seen.digests), len(seen.secrets)] + [
            sum(map(len, seen.shares(kind).values())) for kind in KINDS
        ]
        key = what, address, tuple(known)
        if key not in self._followed:
            self._followed[key] = follow()
        return self._followed[key]

    def _fits(self, owner: str, kind: Kind, guess: bytes, address: Address) -> bool:
        attempt, published = self._attempt(address), self.attempts[address].keys[owner]
        if kind == "self_seed":
            commitment = sealing.self_seed_commitment(guess, attempt, owner)
            return any(keys.self_seed_commitment == commitment for keys in published)
        public = sealing.public_key_bytes(guess, attempt)
        return any(keys.pair_public == public for keys in published)

    def _offsets(self, holders: int, address: Address) -> dict[int, set[int]]:
        """What the coefficients of each split whose secret is known add to it, by place: of one's own making, and of other nodes."""
        needed = self._network.agreement.secure_sum.shares_needed
        own = shamir.split(bytes(32), needed, holders, os.urandom)
        offsets = {place: {int.from_bytes(share)} for place, share in enumerate(own)}
        for owner in self.attempts[address].digests:
            for kind in KINDS:
                secret = self._interpolated(owner, kind, address)
                for place, share in self._points(owner, kind, address).items() if secret is not None else ():
                    offsets.setdefault(place, set()).add((share - int.from_bytes(secret or b"")) % shamir.PRIME)
        return offsets

    def _holders(self, owner: str, address: Address) -> list[str]:
        """Who holds shares of a node's secrets, in the order of their places."""
        if owner not in self.attempts[address].digests:
            return []
        return sorted({owner, *self.graph(owner, address).neighbours(owner)})

    def _points(self, owner: str, kind: Kind, address: Address) -> dict[int, int]:
        """The shares of a secret that are known, as numbers, by the place of their holder."""
        holders, shares = self._holders(owner, address), self.attempts[address].shares(kind)[owner]
        known = [(holders.index(name), share) for name, share in sorted(shares.items()) if name in holders]
        return {place: int.from_bytes(share) for place, share in known if shamir.is_share(share)}

    def _upload(self, name: str, address: Address) -> Any:
        """What was masked: ring values, or the coefficients of the plaintexts."""
        ring, total = self._network.agreement.secure_sum, self._network.size
        chunks = self.attempts[address].chunks[name]
        sizes = [min(ring.chunk_values, total - start) for start in range(0, total, ring.chunk_values)]
        if sorted(chunks) != list(range(len(sizes))):
            return None
        if not ring.encrypted:
            return np.concatenate([unpack(chunks[i], size, ring.ring_bits) for i, size in enumerate(sizes)])
        key = self._network.nodes[name]._study_key
        if key is None:
            return None
        return decrypted(self._network, b"".join(chunks[index] for index in range(len(sizes))), key).reshape(-1)

    def _decoded(self, values: Any) -> Float64Vector | None:
        network = self._network
        if not network.agreement.secure_sum.encrypted:
            return decoded(network, values)
        packing = packing_of(network.agreement)
        packed = (values & np.uint64(2**packing.parameters.plain_bits - 1)).reshape(-1, DEGREE)
        try:
            return decoded(network, packing.unpack(packed, network.size))
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


def study_key(network: Network) -> StudyKey | None:
    """The study key, as any node has it; None if none has one."""
    return next((machine._study_key for machine in network.nodes.values() if machine._study_key is not None), None)


def decrypted(network: Network, data: bytes, key: StudyKey) -> Any:
    """The [blocks, 4096] coefficients that an upload holds, for who has the study key."""
    parameters = packing_of(network.agreement).parameters
    words = np.zeros((len(data) // upload_bytes(parameters, 1), 2, DEGREE), dtype=np.uint64)
    cipher = network.ciphers.cipher(parameters, key.secret)
    cipher.add(words, data)
    return cipher.decrypt(words)


def decoded(network: Network, values: Uint32Vector) -> Float64Vector | None:
    """One node's encoding without masks, decoded; None if it is not one."""
    mask = np.uint32((1 << network.agreement.secure_sum.ring_bits) - 1)
    try:
        return FixedPoint.from_agreement(network.agreement).decode(values & mask, 1)
    except VerificationFailed:
        return None


def is_vector_of(network: Network, vector: Float64Vector | None, name: str, number: int = 1) -> bool:
    """Whether `vector` is what this node submitted in a round, within the rounding of its encoding."""
    bound = 2.0 ** -(network.agreement.secure_sum.fraction_bits + 1) + 1e-9
    return vector is not None and bool(np.abs(vector - network.vectors(name, number)).max() <= bound)
