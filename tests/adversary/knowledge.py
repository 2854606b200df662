"""What an aggregator that keeps everything, and is told its colluders' secrets, can compute about one node.

`watch` takes every message that passes; `vector_of` tries everything that follows from the formulas of `protocols.sealing`:
open what was sealed to known share keys, combine shares, derive or open contributions, take the masks off the upload. Uploads
that are encrypted it decrypts: a colluder gave it the study key. It never looks into an honest machine, so a vector that comes
out is a vector that the protocol gave away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np

from audit.attacks.knowledge import chunk_coordinates
from keys.errors import VerificationFailed
from protocols import messages as m
from protocols import sealing, shamir
from protocols.attempt_node import open_contribution, open_shares
from protocols.bfv import Decryptor, Expander
from protocols.encoding import FixedPoint, Float64Vector, Uint32Vector, unpack
from protocols.graph import MaskGraph
from protocols.packing import DEGREE, Packing, Uint64Matrix, choose
from protocols.prg import Coordinates, MaskSet
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network

Address = tuple[int, int]
"""Round and attempt."""


def peek(data: bytes) -> m._Head | None:
    """The head of a message, with no signature checked; None if it is not one."""
    try:
        return m._decoder.decode(m._split(data)[0])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


@dataclass
class Seen:
    """One attempt, as it passed by. The views are by the node that was shown them."""

    keys: dict[str, m.RoundKeys] = field(default_factory=dict)
    digests: dict[str, dict[str, bytes]] = field(default_factory=dict)
    senders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seals: dict[tuple[str, str], list[m.SealedSeeds]] = field(default_factory=lambda: defaultdict(list))
    chunks: dict[str, dict[int, bytes]] = field(default_factory=lambda: defaultdict(dict))
    self_shares: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    pair_shares: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    secrets: dict[str, sealing.AttemptSecrets] = field(default_factory=dict)


class Knowledge:
    """Everything one coalition has seen."""

    def __init__(self, network: Network, colluders: Mapping[str, object] | tuple[str, ...] = ()) -> None:
        self._network = network
        self.colluders = set(colluders)
        self.attempts: dict[Address, Seen] = defaultdict(Seen)
        self.unmasked: list[str] = []
        """Who revealed shares, in order."""

    def watch(self, sender: str, recipient: str, data: bytes) -> None:
        """Take one message that passes."""
        head = peek(data)
        if head is None:
            return
        seen, body = self.attempts[head.round, head.attempt], head.body
        if sender in self.colluders or recipient in self.colluders:
            self.corrupt(sender if sender in self.colluders else recipient)
        match body:
            case m.RoundKeys():
                seen.keys[sender] = body
            case m.SealedSeeds():
                seen.seals[sender, body.recipient].append(body)
            case m.KeySet() if sender == AGGREGATOR:
                seen.digests[recipient] = dict(body.digests)
            case m.SeedSet() if sender == AGGREGATOR:
                seen.senders[recipient] = body.senders
                for relayed in map(peek, body.sealed):
                    if relayed is not None and isinstance(relayed.body, m.SealedSeeds):
                        seen.seals[relayed.sender, relayed.body.recipient].append(relayed.body)
            case m.UploadChunk():
                seen.chunks[sender][body.index] = bytes(m._split(data)[1])
            case m.Unmasking():
                self.unmasked.append(sender)
                for name, share in body.self_shares:
                    seen.self_shares[name][sender] = share
                for name, share in body.pair_shares:
                    seen.pair_shares[name][sender] = share

    def corrupt(self, name: str) -> None:
        """A colluder hands over the secrets of the attempt that it is in."""
        self.colluders.add(name)
        attempt = self._network.nodes[name]._attempt
        if attempt is not None:
            address = attempt._attempt.round, attempt._attempt.attempt
            self.attempts[address].secrets[name] = attempt._secrets

    # --- what follows from it

    def graph(self, name: str, address: Address = (1, 1)) -> MaskGraph:
        """The graph as this node was led to build it."""
        digests = self.attempts[address].digests[name]
        neighbours = self._network.agreement.secure_sum.neighbours
        return MaskGraph.build(digests, neighbours, self._cohort(name, address))

    def self_seed(self, name: str, address: Address = (1, 1)) -> bytes | None:
        """A node's self seed, if enough shares are known."""
        seen = self.attempts[address]
        if name in seen.secrets:
            return seen.secrets[name].self_seed
        self._open_shares(address)
        return self._combine(name, seen.self_shares[name], address)

    def pair_master(self, name: str, address: Address = (1, 1)) -> bytes | None:
        """A node's pair master, if enough shares are known."""
        seen = self.attempts[address]
        if name in seen.secrets:
            return seen.secrets[name].pair_master
        self._open_shares(address)
        return self._combine(name, seen.pair_shares[name], address)

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

    def vector_of(self, name: str, address: Address = (1, 1)) -> Float64Vector | None:
        """The update that hides in a node's upload, or None if a mask stays on it."""
        upload = self._upload(name, address)
        if upload is None:
            return None
        # Without a known self seed, guess one; this is right only if there is no such mask.
        seed = self.self_seed(name, address) or bytes(32)
        off_added, off_subtracted = [sealing.self_mask_key(seed, self._attempt(address), name)], []
        for peer in self.graph(name, address).neighbours(name):
            if peer not in self.attempts[address].senders[name]:
                continue
            key = self.pair_key(name, peer, address)
            if key is None:
                return None
            (off_added if name < peer else off_subtracted).append(key)
        masks, step = MaskSet(off_subtracted, off_added), chunk_coordinates(self._network.agreement)
        for chunk, start in enumerate(range(0, upload.size, step)):
            masks.apply(upload[start : start + step], chunk)
        return self._decoded(upload)

    def recovers(self, name: str, address: Address = (1, 1)) -> bool:
        """Whether `vector_of` is the node's real vector."""
        return is_vector_of(self._network, self.vector_of(name, address), name, address[0])

    # --- helpers

    def _attempt(self, address: Address) -> sealing.AttemptId:
        return sealing.AttemptId(self._network.digest, *address)

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

    def _combine(self, owner: str, shares: Mapping[str, bytes], address: Address) -> bytes | None:
        needed = self._network.agreement.secure_sum.shares_needed
        if len(shares) < needed or owner not in self.attempts[address].digests:
            return None
        holders = sorted({owner, *self.graph(owner, address).neighbours(owner)})
        points = {holders.index(holder): share for holder, share in sorted(shares.items())[:needed]}
        return shamir.combine(points, needed)

    def _upload(self, name: str, address: Address) -> Coordinates | None:
        """What was masked: ring values, or the coefficients of the plaintexts."""
        ring = self._network.agreement.secure_sum
        chunks = self.attempts[address].chunks[name]
        total = self._network.size
        sizes = [min(ring.chunk_values, total - start) for start in range(0, total, ring.chunk_values)]
        if sorted(chunks) != list(range(len(sizes))):
            return None
        if ring.encrypted:
            return decrypted(self._network, b"".join(chunks[index] for index in range(len(sizes)))).reshape(-1)
        return np.concatenate([unpack(chunks[i], size, ring.ring_bits) for i, size in enumerate(sizes)])

    def _decoded(self, values: Coordinates) -> Float64Vector | None:
        network = self._network
        if not network.agreement.secure_sum.encrypted:
            return decoded(network, values)
        packing = packing_of(network)
        packed = (values & np.uint64(2**packing.parameters.plain_bits - 1)).reshape(-1, DEGREE)
        try:
            return decoded(network, packing.unpack(packed, network.size))
        except VerificationFailed:
            return None


def packing_of(network: Network) -> Packing:
    return choose(network.agreement.secure_sum.value_bits, len(network.agreement.members))


def decrypted(network: Network, data: bytes) -> Uint64Matrix:
    """The [blocks, 4096] coefficients that an upload holds, by the study key of any node."""
    parameters = packing_of(network).parameters
    key = next(node._study_key for node in network.nodes.values() if node._study_key is not None)
    return Decryptor(parameters, key.secret).decrypt(Expander(parameters).expand(data))


def decoded(network: Network, values: Uint32Vector) -> Float64Vector | None:
    """One node's encoding without masks, decoded; None if it is not one."""
    ring = network.agreement.secure_sum
    values = values[: network.size] & np.uint32((1 << ring.ring_bits) - 1)
    try:
        return FixedPoint.from_agreement(network.agreement).decode(values, 1)
    except VerificationFailed:
        return None


def is_vector_of(network: Network, vector: Float64Vector | None, name: str, number: int = 1) -> bool:
    """Whether `vector` is what this node submitted, within the rounding of its encoding."""
    bound = 2.0 ** -(network.agreement.secure_sum.fraction_bits + 1)
    return vector is not None and bool(np.abs(vector - network.vectors(name, number)).max() <= bound)
