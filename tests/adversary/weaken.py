"""Weakened copies of single guards, one context manager each: what the attacks must succeed against.

Each replaces one method or function by a copy without one check, and puts the genuine one back at the end. What a guard
is for is told by the attack that its absence lets through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from audit.attacks.knowledge import peek
from audit.attacks.network import MemoryJournal
from protocols import attempt_aggregator, attempt_node, messages, sealing, shamir, study_node
from protocols.attempt_aggregator import AttemptAggregator, _Upload
from protocols.attempt_node import AttemptNode, Parties, State
from protocols.encoding import FixedPoint
from protocols.graph import MaskGraph
from protocols.sealing import AttemptId
from protocols.study_aggregator import AggregatorMachine
from protocols.study_node import NodeMachine
from protocols.tags import Tagger
from secgeo import transport


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """One attribute is another for a while."""
    genuine = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, genuine)


def accept(*_: object, **__: object) -> None:
    """A check that finds nothing."""


@contextmanager
def relayed_signatures() -> Iterator[None]:
    """Nodes do not verify who signed what the aggregator relays."""
    genuine = AttemptNode._open_relayed

    def weak(self: AttemptNode, data: bytes, kind: Any) -> messages.Message:
        with replaced(messages, "verify_signature", accept):
            return genuine(self, data, kind)

    with replaced(AttemptNode, "_open_relayed", weak):
        yield


@contextmanager
def relayed_freshness() -> Iterator[None]:
    """Nodes take relayed messages of any round and attempt, also round keys from before the last sum."""
    genuine = AttemptNode._open_relayed

    def weak(self: AttemptNode, data: bytes, kind: Any) -> messages.Message:
        head = peek(data)
        ours = self._attempt
        if head is not None:
            self._attempt = AttemptId(ours.agreement_digest, head.round, head.attempt)
        try:
            return genuine(self, data, kind)
        finally:
            self._attempt = ours

    with replaced(AttemptNode, "_open_relayed", weak), last_records():
        yield


def roster(machine: NodeMachine, members: dict[str, Any]) -> Any:
    """A node takes its list of members from the aggregator."""
    parties = machine._parties
    keys = {**parties.public_keys, **members}
    return replaced(machine, "_parties", Parties(parties.agreement, parties.agreement_digest, keys))


def minimum_cohort() -> Any:
    """Nodes sum among any number."""
    return replaced(Parties, "minimum", property(lambda self: 1))


def vote_quorum() -> Any:
    """Nodes reveal on any number of votes; they still want the agreed minimum of survivors."""
    genuine = AttemptNode._on_proof

    def weak(self: AttemptNode, body: messages.SurvivorProof) -> list[bytes]:
        with replaced(Parties, "threshold", property(lambda parties: 1)):
            return genuine(self, body)

    return replaced(AttemptNode, "_on_proof", weak)


def vote_signatures() -> Any:
    """Nodes count votes without verifying that they are for this very survivor set."""
    return replaced(attempt_node, "verify_signature", accept)


def one_vote_one_revelation() -> Any:
    """Nodes vote for every survivor set that they are asked about, and reveal for each."""
    genuine = AttemptNode.receive

    def weak(self: AttemptNode, body: messages.AnyBody) -> list[bytes]:
        if isinstance(body, messages.Survivors):
            self._state = State.UPLOAD
        kept = dict(self._shares)
        answer = genuine(self, body)
        self._shares = self._shares or kept
        return answer

    return replaced(AttemptNode, "receive", weak)


def memory_of_votes() -> Any:
    """Nodes forget that they have voted in a round."""
    return replaced(MemoryJournal, "ballot", lambda self, number: b"")


def memory_of_attempts() -> Any:
    """Nodes forget which attempts they have begun."""
    return replaced(MemoryJournal, "last", lambda self: (0, 0))


def _shares(coefficients: Callable[[int, shamir.Coins], list[int]]) -> Any:
    """Secrets are split with these coefficients, given the threshold."""

    def split(secret: bytes, threshold: int, holders: int, coins: shamir.Coins) -> list[bytes]:
        polynomial = [int.from_bytes(secret), *coefficients(threshold, coins)]
        shares = [shamir._evaluate(polynomial, x) for x in range(1, holders + 1)]
        return [share.to_bytes(shamir.SHARE_BYTES) for share in shares]

    return replaced(shamir, "split", split)


def _drawn(count: int, coins: shamir.Coins) -> list[int]:
    return [int.from_bytes(coins(48)) % shamir.PRIME for _ in range(count)]


def degree_of_shares() -> Any:
    """One share fewer than the threshold gives a secret."""
    return _shares(lambda threshold, coins: _drawn(threshold - 2, coins))


def coefficients_of_shares() -> Any:
    """The coefficients of shares are constants, so that every share gives its secret."""
    return _shares(lambda threshold, _coins: [index + 3 for index in range(threshold - 1)])


def one_coefficient_of_shares() -> Any:
    """All coefficients of a polynomial are the same, so that two shares give its secret."""
    return _shares(lambda threshold, coins: _drawn(1, coins) * (threshold - 1))


def coefficients_of_two_secrets() -> Any:
    """The two secrets of a node are split with the same coefficients: the difference of two shares is that of the secrets."""
    kept: list[list[int]] = []

    def coefficients(threshold: int, coins: shamir.Coins) -> list[int]:
        if kept and len(kept[0]) == threshold - 1:
            return kept.pop()
        kept[:] = [_drawn(threshold - 1, coins)]
        return kept[0]

    return _shares(coefficients)


def secrets_for_shares() -> Any:
    """Every share is the secret."""
    return _shares(lambda _threshold, _coins: [])


def low_entropy_of_shares() -> Any:
    """The coefficients of each split are stretched from 16 bits."""

    def coefficients(threshold: int, coins: shamir.Coins) -> list[int]:
        stretched = hashlib.shake_256(coins(2)).digest(48 * (threshold - 1))
        return [int.from_bytes(stretched[48 * i : 48 * (i + 1)]) % shamir.PRIME for i in range(threshold - 1)]

    return _shares(coefficients)


def small_coefficients_of_shares() -> Any:
    """Coefficients of 128 bits: the top of a share is that of its secret."""
    return _shares(lambda threshold, coins: [int.from_bytes(coins(16)) for _ in range(threshold - 1)])


def self_masks() -> Any:
    """Nodes add pair masks only."""
    return replaced(sealing, "self_mask_key", lambda *_: bytes(32))


def connectivity() -> Any:
    """Nodes do not ask whether the survivors hang together."""
    return replaced(MaskGraph, "tolerates", lambda *_: True)


def neighbours_views() -> Any:
    """Nodes do not ask what their neighbours were told."""
    return replaced(AttemptNode, "_check_neighbours", accept)


def dealt_tag_seeds() -> Any:
    """Nodes do not compare a tag seed with what its dealer committed to."""
    genuine = AttemptNode._open_seeds

    def weak(self: AttemptNode, peer: str, seeds: messages.SealedSeeds) -> bytes | None:
        graph = self._graph
        self._graph = _NoDealers(graph.order, graph.reach)
        try:
            return genuine(self, peer, seeds)
        finally:
            self._graph = graph

    return replaced(AttemptNode, "_open_seeds", weak)


class _NoDealers(MaskGraph):
    @property
    def dealers(self) -> tuple[str, ...]:
        return ()


def sum_tags() -> Any:
    """Nodes do not compare a sum with its tags, nor count receipts."""
    return replaced(NodeMachine, "_check_tags", lambda *_: True)


@contextmanager
def pads_of_tags() -> Iterator[None]:
    """Tags are a linear function of the vector, with nothing added."""
    genuine = Tagger.__init__

    def weak(self: Tagger, seed: bytes, attempt: AttemptId) -> None:
        genuine(self, seed, attempt)
        self.pad = 0

    with replaced(Tagger, "__init__", weak):
        yield


@contextmanager
def receipts_of_contributors() -> Iterator[None]:
    """A node that took no part takes a sum on no receipts at all; the others still check the tags."""
    genuine = NodeMachine._check_tags

    def weak(self: NodeMachine, record: Any, body: Any, total: Any) -> bool:
        return not self._journal.tag_seed(record.round, record.attempt) or genuine(self, record, body, total)

    with replaced(NodeMachine, "_check_tags", weak):
        yield


@contextmanager
def last_records() -> Iterator[None]:
    """Nodes do not compare what the others, and the sum, build on."""
    with replaced(AttemptNode, "_check_last_records", accept), sequence_of_sums():
        yield


def sequence_of_sums() -> Any:
    """Nodes take sums in any order."""
    return replaced(NodeMachine, "_follows", lambda self, record: True)


def memory_of_records() -> Any:
    """Nodes do not compare a record with the one they have."""
    return replaced(MemoryJournal, "receipt", lambda self, number: b"")


@contextmanager
def round_of_the_record() -> Iterator[None]:
    """A node does not ask of which round a record is."""
    genuine = NodeMachine._read_record

    def weak(self: NodeMachine, number: int, line: bytes) -> Any:
        return genuine(self, study_node.t.read_line(line, self._aggregator_key).body.round, line)  # type: ignore[union-attr]

    with replaced(NodeMachine, "_read_record", weak), sequence_of_sums():
        yield


@contextmanager
def memory_of_survivors() -> Iterator[None]:
    """A node does not ask whether a record has the survivors for whom it voted."""
    genuine = NodeMachine._read_record

    def weak(self: NodeMachine, number: int, line: bytes) -> Any:
        with replaced(self, "_voted", {}):
            return genuine(self, number, line)

    with replaced(NodeMachine, "_read_record", weak):
        yield


def patience() -> Any:
    """A node asks for an incomplete sum for ever."""
    return replaced(study_node, "MAX_REPEATS", 1 << 60)


def finite_inputs() -> Any:
    """A node sums whatever training gave."""
    return replaced(FixedPoint, "check", accept)


def deadlines() -> Any:
    """The aggregator waits for everybody."""
    return replaced(AggregatorMachine, "tick", lambda *_: [])


def agreed_range() -> Any:
    """A node does not clip what it encodes to the agreed range."""
    return replaced(FixedPoint, "limit", property(lambda self: 1e12))


@contextmanager
def digest_of_an_upload() -> Iterator[None]:
    """The aggregator forgets that it has an upload of a node, and adds the next one too."""
    on_chunk, on_done = AttemptAggregator._on_chunk, AttemptAggregator._on_upload_done

    def chunk(self: AttemptAggregator, peer: str, body: messages.UploadChunk, data: memoryview) -> Any:
        if peer in self._digests and peer not in self._uploads:
            self._uploads[peer] = _Upload([], self._chunk_count)
        return on_chunk(self, peer, body, data)

    def done(self: AttemptAggregator, peer: str, body: messages.UploadDone, signed: bytes) -> None:
        if peer in self._uploads:
            self._digests.pop(peer, None)
        on_done(self, peer, body, signed)

    with replaced(AttemptAggregator, "_on_chunk", chunk), replaced(AttemptAggregator, "_on_upload_done", done):
        yield


class CountingDecoder:
    """Stands in for the decoder of messages: counts the bytes it is given and, if `fragile`, lets its errors out."""

    def __init__(self, *, fragile: bool = False) -> None:
        self.genuine, self.fragile, self.most_bytes = messages._decoder, fragile, 0

    def decode(self, data: Any) -> Any:
        self.most_bytes = max(self.most_bytes, len(data))
        try:
            return self.genuine.decode(data)
        except Exception as error:
            if self.fragile:
                raise SystemError("the process has died") from error
            raise


def decoding_errors() -> Any:
    """What cannot be decoded ends the process."""
    return replaced(messages, "_decoder", CountingDecoder(fragile=True))


def _mended(mend: Callable[[bytes], bytes]) -> Any:
    """Messages are mended before they are decoded."""
    genuine = messages.decode

    def weak(data: bytes, *arguments: Any, **more: Any) -> messages.Message:
        return genuine(mend(data), *arguments, **more)

    return replaced(messages, "decode", weak)


def length_of_a_head() -> Any:
    """Nobody asks whether the head of a message is as long as it says."""
    return _mended(lambda data: min(int.from_bytes(data[:4]), len(data) - 4).to_bytes(4) + data[4:])


def bytes_behind_a_body() -> Any:
    """Nobody asks whether there are bytes behind a message that has no tail."""

    def cut(data: bytes) -> bytes:
        head = peek(data)
        whole = head is None or isinstance(head.body, messages.UploadChunk | messages.SumChunk)
        return data if whole else data[: 4 + int.from_bytes(data[:4])]

    return _mended(cut)


def signatures() -> Any:
    """Nobody verifies who has signed a message."""
    return replaced(messages, "verify_signature", accept)


class _AnyDigest(bytes):
    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


def digest_of_a_chunk() -> Any:
    """Nobody asks whether a chunk is the one that was signed."""
    genuine = messages.decode

    def weak(*arguments: Any, **more: Any) -> messages.Message:
        with replaced(messages, "chunk_digest", lambda data: _AnyDigest()):
            return genuine(*arguments, **more)

    return replaced(messages, "decode", weak)


@contextmanager
def chunks() -> Iterator[None]:
    """Nobody asks whether what comes as a chunk is one: not by its digest, not by its length; one that cannot be read ends the process."""
    genuine = AttemptAggregator._on_chunk

    def weak(self: AttemptAggregator, peer: str, body: messages.UploadChunk, data: memoryview) -> Any:
        with replaced(self._ring, "sealed_bytes", lambda count: len(data)):
            return genuine(self, peer, body, data)

    with digest_of_a_chunk(), replaced(AttemptAggregator, "_on_chunk", weak), frames():
        yield


@contextmanager
def frames() -> Iterator[None]:
    """A chunk that cannot be read ends the process."""

    class Another(Exception):
        pass

    with replaced(attempt_aggregator, "FrameBroken", Another), replaced(study_node, "FrameBroken", Another):
        yield


@contextmanager
def credit() -> Iterator[None]:
    """The aggregator does not ask whether a node may send a chunk yet."""
    genuine = AttemptAggregator._on_chunk

    def weak(self: AttemptAggregator, peer: str, body: messages.UploadChunk, data: memoryview) -> Any:
        upload = self._uploads.get(peer)
        if upload is None or body.index < upload.credit:
            return genuine(self, peer, body, data)
        with replaced(upload, "credit", 1 << 32):
            return genuine(self, peer, body, data)

    with replaced(AttemptAggregator, "_on_chunk", weak):
        yield


def message_limit() -> Any:
    """Messages of any size are decoded."""
    return replaced(messages, "MESSAGE_LIMIT_BYTES", 1 << 40)


def socket_option(option: int, value: int) -> Any:
    """Sockets have another value of an option of libzmq than our limits say."""
    genuine = transport._set_limits

    def weak(socket: Any, address: str, limits: transport.TransportLimits) -> None:
        genuine(socket, address, limits)
        socket.setsockopt(option, value)

    return replaced(transport, "_set_limits", weak)
