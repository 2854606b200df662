"""Attacks on sums of ciphertexts: what the study key opens and what not, uploads that are none, sums that are others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pytest

from audit.attacks.forged import announce, opened, resign
from audit.attacks.knowledge import chunk_coordinates, decrypted, packing_of, peek, study_key
from audit.attacks.play import Bodies, Play, keep
from keys.errors import RemoteProtocolError, VerificationFailed
from protocols import messages as m
from protocols import sealing
from protocols.agreement import Protocol
from protocols.attempt_node import AttemptNode
from protocols.bfv import Cipher
from protocols.ciphertexts import CipherLost, CipherUnavailable, pack_words, unpack_words
from protocols.encoding import FixedPoint
from protocols.packing import DEGREE, PARAMETERS
from protocols.prg import MaskSet
from protocols.rings import Chunk, CiphertextRing, Total
from protocols.transcript import upload_digest
from secgeo.aggregator import WorkClock
from tests.adversary import weaken
from tests.adversary.attackers import MaliciousNode
from tests.adversary.test_cohort import blamed
from tests.adversary.test_results import wrong
from tests.keys.factory import AGGREGATOR
from tests.protocols.network import Network, make_network, names
from tests.protocols.test_attempt import check_sum

LIAR, VICTIM = "hospital-00", "hospital-02"

each = pytest.mark.parametrize("protocol", ["layered", "homomorphic"], indirect=True)
only = {name: pytest.mark.parametrize("protocol", [name], indirect=True) for name in ("layered", "homomorphic")}


def listen(network: Network, sender: str, kind: type[m.Body]) -> list[m.Message]:
    """The messages of one kind that a party sends, as they pass."""
    heard: list[m.Message] = []
    inner = network.tap

    def tap(source: str, recipient: str, data: bytes) -> Sequence[bytes]:
        head = peek(data) if source == sender else None
        if head is not None and isinstance(head.body, kind):
            heard.append(m.Message(head.sender, head.round, head.attempt, head.body, m._split(data)[1]))
        return inner(source, recipient, data)

    network.tap = tap
    return heard


def uploaded(network: Network, name: str) -> np.ndarray:
    """What a node's upload of round 1 encrypts, for whoever has the study key: [blocks * 4096] coefficients."""
    chunks = listen(network, name, m.UploadChunk)
    network.run()
    return decrypted(network, b"".join(bytes(chunk.tail) for chunk in chunks), study_key(network)).reshape(-1)


# --- what a key holder sees that colludes with the aggregator


def test_the_integer_sum_is_the_same_to_the_bit_by_all_protocols() -> None:
    sums = set()
    for protocol, size in (("masked", 9000), ("layered", 1500), ("homomorphic", 1500)):
        network = make_network(4, size=size, protocol=protocol)
        assert network.size == 9000
        network.run()
        sums.add(opened(network, network.totals[1]).tobytes())
    assert len(sums) == 1


def uniform(coefficients: np.ndarray, plain_bits: int) -> bool:
    """Whether every bit is a fair coin, every byte is any, and neighbours are not correlated."""
    size = coefficients.size
    assert int(coefficients.max()) < 1 << plain_bits
    ones = [int((coefficients >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(plain_bits)]
    statistics = []
    for low in range(0, plain_bits - 8, 8):
        counts = np.bincount((coefficients >> np.uint64(low) & np.uint64(255)).astype(np.int64), minlength=256)
        statistics.append(float(((counts - counts.mean()) ** 2 / counts.mean()).sum()))
    scaled = coefficients.astype(np.float64) / 2.0**plain_bits - 0.5
    return (
        all(abs(count - size / 2) < 6 * np.sqrt(size / 4) for count in ones)
        and max(statistics) < 400  # 255 degrees of freedom: p is far below 1e-7 above this
        and abs(float((scaled[1:] * scaled[:-1]).mean() * 12)) < 6 / np.sqrt(size)
    )


@only["layered"]
def test_what_a_key_holder_decrypts_of_one_node_is_uniform(protocol: str) -> None:
    """Of a constant vector: as it was uploaded, and less the masks that the aggregator and this colluder can take off.

    The aggregator has the self seed of every survivor after the unmasking; the colluder shares a pair seed with the victim. What is
    left are the pair masks with the honest hospitals. Less these too it is no longer uniform: the test would see their absence.
    """
    network, colluder, honest = make_network(4, size=20_000), "hospital-00", ("hospital-01", "hospital-03")
    network.vectors = lambda _name, _round: np.zeros(network.size)  # type: ignore[assignment]
    nodes: dict[str, AttemptNode] = {}
    genuine = AttemptNode._begin_upload

    def begin(self: AttemptNode, tag_seed: bytes, masks: MaskSet, pad: int = 0) -> None:
        nodes[self._me] = self
        genuine(self, tag_seed, masks, pad)

    with weaken.replaced(AttemptNode, "_begin_upload", begin):
        coefficients = uploaded(network, VICTIM)
    assert coefficients.size > 50_000
    victim, plain_bits = nodes[VICTIM], packing_of(network.agreement).parameters.plain_bits

    def pair_key(peer: str) -> bytes:
        low, high = sorted((peer, VICTIM))
        attempt, cohort = victim._attempt, victim._cohort_digest
        own = sealing.contribution(nodes[low]._secrets.pair_master, attempt, cohort, low, high)
        return sealing.pair_mask_key(own, attempt, cohort, low, high)

    def less(*peers: str) -> np.ndarray:
        """Without the victim's self mask, and the masks that it shares with these."""
        added = [sealing.self_mask_key(victim._secrets.self_seed, victim._attempt, VICTIM)]
        added += [pair_key(peer) for peer in peers if peer > VICTIM]
        subtracted = [pair_key(peer) for peer in peers if peer < VICTIM]
        left, step = coefficients.copy(), chunk_coordinates(network.agreement)
        for chunk, start in enumerate(range(0, left.size, step)):
            MaskSet(subtracted, added).apply(left[start : start + step], chunk)
        return left & np.uint64((1 << plain_bits) - 1)

    assert uniform(coefficients, plain_bits)
    assert uniform(less(), plain_bits)
    assert uniform(less(colluder), plain_bits)
    for one in honest:
        assert uniform(less(colluder, one), plain_bits)
    assert not uniform(less(colluder, *honest), plain_bits)


@each
def test_a_key_holder_and_the_aggregator_read_one_node_in_homomorphic_only(protocol: Protocol) -> None:
    """As docs/protocol.md says in its table."""
    network = make_network(4, size=1500)
    fixed_point = FixedPoint.from_agreement(network.agreement)
    coefficients = uploaded(network, VICTIM).reshape(-1, DEGREE)
    try:
        values = packing_of(network.agreement).unpack(coefficients, network.size)
        found = np.array_equal(values, fixed_point.encode(network.vectors(VICTIM, 1)))
    except VerificationFailed:
        found = False
    assert found == (protocol == "homomorphic")


@each
def test_the_same_vector_is_never_encrypted_to_the_same_bytes(protocol: str) -> None:
    """Another round, another key of the cipher's generator: no word and no seed comes twice."""
    network = make_network(4, size=1500, rounds=2)
    network.vectors = lambda _name, _round: np.zeros(network.size)  # type: ignore[assignment]
    chunks = listen(network, VICTIM, m.UploadChunk)
    network.run()
    data = [bytes(chunk.tail) for chunk in chunks]
    assert len(data) == 4
    assert len({piece for whole in data for piece in (whole[:28_000], whole[-64:])}) == 8


# --- uploads that are no ciphertexts


def upload(network: Network, change: Callable[[int, bytes], bytes]) -> None:
    """The liar sends other chunks, and ends its upload with a digest that fits."""
    liar = MaliciousNode(network, LIAR)
    digests: dict[int, bytes] = {}

    @liar.on("UploadChunk")
    def chunk(message: m.Message, _data: bytes) -> list[bytes]:
        tail = change(message.body.index, bytes(message.tail))
        digests[message.body.index] = m.chunk_digest(tail)
        return [liar.sign(message, m.UploadChunk(message.body.index, m.chunk_digest(tail)), tail)]

    @liar.on("UploadDone")
    def done(message: m.Message, _data: bytes) -> list[bytes]:
        digest = upload_digest(b"".join(digests[index] for index in sorted(digests)), message.body.tag)
        return [liar.sign(message, m.UploadDone(digest, message.body.view, message.body.tag))]


def a_word_too_large(index: int, data: bytes) -> bytes:
    """The first word of the second chunk is q."""
    if index != 1:
        return data
    size = next(
        parameters.prime_bits for parameters in PARAMETERS if (len(data) - 64) * 8 == DEGREE * parameters.prime_bits
    )
    prime = next(parameters.prime for parameters in PARAMETERS if parameters.prime_bits == size)
    word = int.from_bytes(data[:8], "little") >> size << size | prime
    return word.to_bytes(8, "little") + data[8:]


def lie_about_words(guard: AbstractContextManager[None]) -> Network:
    network = make_network(5, size=2500, threshold=4, minimum_cohort=4)
    upload(network, a_word_too_large)
    with guard:
        network.run()
    return network


@each
def test_an_upload_that_is_none_is_lost_alone_and_leaves_no_trace_in_the_sum(protocol: str) -> None:
    """Its first chunk was added already when the second turns out to be no ciphertext."""
    left = tuple(names(5)[1:])
    weak = lie_about_words(weaken.replaced(Cipher, "subtract", weaken.accept))
    assert not any(weak.sums.values())  # what is left of the first chunk spoils the sum

    network = lie_about_words(nullcontext())
    assert network.expelled == [LIAR]
    assert "cannot be added" in network.aggregator._out[LIAR]
    for name in left:
        assert check_sum(network, name) == left
    assert not set(network.faults) - {LIAR}


@each
@pytest.mark.parametrize("size", [0, 1, 28_735, 28_737, 57_472])
def test_chunks_of_another_size_never_come_near_the_cipher(
    protocol: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among them the size of two ciphertexts where one is due: how many there are follows from the agreement."""
    seen: list[int] = []
    genuine = Cipher.add
    monkeypatch.setattr(Cipher, "add", lambda self, total, data: seen.append(len(data)) or genuine(self, total, data))
    network = make_network(5, size=1024, threshold=4, minimum_cohort=4)
    upload(network, lambda _index, data: (data * 3)[:size])
    network.run()
    assert network.expelled == [LIAR]
    assert "which no upload has" in network.aggregator._out[LIAR]
    assert len(set(seen)) == 1
    for name in names(5)[1:]:
        assert check_sum(network, name) == tuple(names(5)[1:])


@each
def test_a_cipher_that_is_lost_over_an_upload_costs_that_upload_and_names_its_sender(protocol: str) -> None:
    """The process that expands its seeds has crashed, say; `tests/secgeo/test_sandbox.py` has real ones that do."""
    network = make_network(5, size=2500, threshold=4, minimum_cohort=4)
    chunks = listen(network, LIAR, m.UploadChunk)

    def crash(self: Cipher, total: np.ndarray, data: bytes) -> None:
        if len(chunks) > 1 and bytes(data) == bytes(chunks[1].tail):
            raise CipherLost("the process ended")
        genuine(self, total, data)

    genuine = Cipher.add
    with weaken.replaced(Cipher, "add", crash):
        network.run()
    assert network.expelled == [LIAR]
    assert "the process ended" in network.aggregator._out[LIAR]
    for name in names(5)[1:]:
        assert check_sum(network, name) == tuple(names(5)[1:])


@each
def test_a_machine_that_can_start_no_cipher_costs_an_attempt_and_blames_nobody(protocol: str) -> None:
    """The second chunk of the first upload meets it, and so would taking off the first; the next attempt finds memory again."""
    network, calls = make_network(5, size=2500, threshold=4, minimum_cohort=4), []

    def fail(self: Cipher, total: np.ndarray, data: bytes) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise CipherUnavailable("no memory")
        genuine(self, total, data)

    def fail_again(self: Cipher, total: np.ndarray, data: bytes) -> None:
        raise CipherUnavailable("no memory")

    genuine = Cipher.add
    with weaken.replaced(Cipher, "add", fail), weaken.replaced(Cipher, "subtract", fail_again):
        network.run()
    assert not network.aggregator._out
    assert not network.faults
    assert network.attempts == {1: 2}
    for name in names(5):
        assert check_sum(network, name) == tuple(names(5))


def hang(clock: type[WorkClock]) -> Network:
    """The aggregator's loop: a message, then the deadlines. The cipher hangs over the liar's upload, longer than a phase may take."""
    network = make_network(5, size=2500, threshold=4, minimum_cohort=4)
    chunks, source = listen(network, LIAR, m.UploadChunk), [0.0]
    time = clock(lambda: source[0])
    genuine = Cipher.add

    def add(self: Cipher, total: np.ndarray, data: bytes) -> None:
        if any(bytes(data) == bytes(chunk.tail) for chunk in chunks):
            source[0] += 2 * network.agreement.deadlines.phase_seconds
            raise CipherLost("no answer")
        genuine(self, total, data)

    with weaken.replaced(Cipher, "add", add):
        network.start()
        while not network.aggregator.ended:
            network.now = time.now()
            if not network._queue:
                source[0] += max(0.0, network.aggregator.deadline - time.now())
                network.pass_time()
                continue
            # The liar's messages come before the others'.
            first = next((entry for entry in network._queue if entry[0] == LIAR), network._queue[0])
            network._queue.remove(first)
            with time.step() as network.now:
                network._deliver(*first)
            with time.step() as network.now:
                network._from_aggregator(network.aggregator.tick(network.now))
    return network


class CountsEverything(WorkClock):
    """Without the guard."""

    @contextmanager
    def step(self) -> Iterator[float]:
        yield self.now()


@each
def test_a_cipher_that_hangs_over_an_upload_costs_that_upload_alone(protocol: str) -> None:
    """While the aggregator waits for it the others' uploads wait in line; their time does not run out."""
    weak = hang(CountsEverything)
    assert weak.attempts == {1: 2}  # the others' time has run out, and everything is done again

    network = hang(WorkClock)
    assert network.attempts == {1: 1}
    assert network.expelled == [LIAR]
    for name in names(5)[1:]:
        assert check_sum(network, name) == tuple(names(5)[1:])


@each
def test_a_total_that_cannot_be_restored_voids_the_attempt_and_not_the_round(protocol: str) -> None:
    """The cipher is lost over the second chunk, and again over taking off the first: the others sum in a new attempt."""
    network = make_network(5, size=2500, threshold=4, minimum_cohort=4)
    upload(network, a_word_too_large)

    def crash(self: Cipher, total: np.ndarray, data: bytes) -> None:
        raise CipherLost("the process ended")

    with weaken.replaced(Cipher, "subtract", crash):
        network.run()
    assert network.expelled == [LIAR]
    assert network.attempts == {1: 2}
    for name in names(5)[1:]:
        assert check_sum(network, name) == tuple(names(5)[1:])


# --- sums that are others


@only["homomorphic"]
def test_one_upload_in_place_of_the_sum_is_not_taken(protocol: str) -> None:
    """All could decrypt it: an honest hospital throws it away when the tags do not fit, and shows it to nobody."""

    def show(guard: AbstractContextManager[None]) -> Network:
        network = make_network(4, size=1500)
        network.vectors = lambda name, _round: np.full(network.size, 0.5)  # type: ignore[assignment]
        attack, chunks = Play(network), listen(network, VICTIM, m.UploadChunk)

        def alone(_total: Total) -> Total:
            ring, step = network.aggregator._ring, network.agreement.secure_sum.chunk_values
            total = ring.zeros(network.size)
            ring.add(total, lambda: [(chunk.body.index * step, chunk.tail) for chunk in chunks])
            return total

        announce(attack, alone)
        with guard:
            network.run()
        return network

    weak = show(weaken.sum_tags())
    assert all(wrong(weak, name) for name in names(4))

    network = show(nullcontext())
    assert not any(network.sums.values())
    assert all("does not match its tags" in str(fault) for fault in network.faults.values())
    assert set(network.faults) == set(names(4))


@each
def test_a_record_that_names_another_study_key_is_the_aggregators_fault(protocol: str) -> None:
    network = make_network(4, size=1500)
    attack = Play(network)

    @attack.tell("RoundResult")
    def rename(message: m.Message, _to: str) -> Bodies:
        line = resign(network.identities[AGGREGATOR], message.body.record, study_key="0" * 64)
        return [(m.RoundResult(line, message.body.receipts), b"")]

    network.run()
    for name in names(4):
        blamed(network, name, "under another study key than ours")


@only["homomorphic"]
def test_an_upload_of_an_earlier_round_in_place_of_the_new_one(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a ciphertext says of which round it is. Its tag does."""
    network = make_network(4, size=1500, rounds=2)
    sent = listen(network, VICTIM, m.UploadChunk)
    genuine = CiphertextRing.add

    def add(self: CiphertextRing, total: Total, read: Callable[[], Iterable[Chunk]]) -> None:
        chunks = list(read())
        rounds = [[chunk for chunk in sent if chunk.round == number] for number in (1, 2)]
        if rounds[1] and chunks[0][1] == rounds[1][0].tail:
            chunks = [(start, old.tail) for (start, _), old in zip(chunks, rounds[0], strict=True)]
        genuine(self, total, lambda: chunks)

    monkeypatch.setattr(CiphertextRing, "add", add)
    network.run()
    for name in names(4):
        assert [summed.round for summed in network.sums[name]] == [1]
        assert isinstance(network.faults[name], VerificationFailed)


@each
@pytest.mark.parametrize("what", ["a word that is not below q", "a ciphertext too few"])
def test_chunks_of_the_sum_that_are_no_ciphertexts_are_the_aggregators_fault(protocol: str, what: str) -> None:
    network = make_network(4, size=1500)
    attack = Play(network)

    @attack.tell("SumChunk")
    def break_it(message: m.Message, _to: str) -> Bodies:
        parameters = packing_of(network.agreement).parameters
        words = unpack_words(message.tail, parameters, len(message.tail) * 8 // (DEGREE * parameters.prime_bits))
        words[0, 0] = parameters.prime
        tail = pack_words(words, parameters) if "word" in what else bytes(message.tail[: len(message.tail) // 2])
        return [(m.SumChunk(message.body.index, m.chunk_digest(tail)), tail)]

    network.run()
    assert not any(network.sums.values())
    for name in names(4):
        blamed(network, name, "a chunk that no sum has")


# --- homomorphic: no masks, so nothing to reveal; the same rules for who is in the sum


@only["homomorphic"]
@pytest.mark.parametrize(
    "body", [m.KeySet((), ()), m.SeedSet((), ()), m.SurvivorProof(())], ids=lambda b: type(b).__name__
)
def test_messages_of_masks_are_the_aggregators_fault(protocol: str, body: m.AnyBody) -> None:
    network = make_network(4, size=1500)
    attack = Play(network)
    moment = "Survivors" if isinstance(body, m.SurvivorProof) else "Credit"
    attack.tell(moment)(lambda message, to: [*keep(message), (body, b"")])
    network.run()
    for name in names(4):
        blamed(network, name, f"sent {type(body).__name__} in state")


@only["homomorphic"]
def test_a_member_that_encrypted_on_top_of_another_sum_or_key_is_named(protocol: str) -> None:
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    liar = MaliciousNode(network, LIAR)
    liar.on("UploadDone")(
        lambda message, _data: [liar.sign(message, m.UploadDone(message.body.digest, bytes(32), message.body.tag))]
    )
    network.run()
    assert network.expelled == [LIAR]
    for name in names(5)[1:]:
        assert check_sum(network, name) == tuple(names(5)[1:])


@only["homomorphic"]
def test_hospitals_that_were_told_different_stories_of_the_last_sum_do_not_vote(protocol: str) -> None:
    network, victim = make_network(4, size=1500, rounds=2), "hospital-01"
    attack = Play(network)

    @attack.tell("SumChunk", "RoundResult")
    def lost(message: m.Message, to: str) -> Bodies:
        return [] if (to, message.round) == (victim, 1) else keep(message)

    @attack.tell("RoundOpen")
    def as_if_lost(message: m.Message, to: str) -> Bodies:
        return [(m.RoundOpen(0), b"")] if (to, message.round) == (victim, 2) else keep(message)

    @attack.hear("UploadDone")
    def forgive(message: m.Message, data: bytes) -> list[bytes]:
        if (message.sender, message.round) == (victim, 2):
            network.aggregator._attempt._view = message.body.view  # type: ignore[union-attr]
        return [data]

    network.run()
    assert not any(summed.round == 2 for sums in network.sums.values() for summed in sums)


@only["homomorphic"]
def test_a_complaint_is_without_ground_where_nothing_was_sealed(protocol: str) -> None:
    network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
    liar = MaliciousNode(network, LIAR)
    liar.on("UploadChunk")(lambda message, _data: [liar.sign(message, m.Complaint("hospital-01"))])
    network.run()
    assert network.expelled == [LIAR]
    for name in names(5)[1:]:
        assert check_sum(network, name) == tuple(names(5)[1:])


@each
def test_hostile_words_in_every_upload_of_a_member_lose_nothing_of_the_others(protocol: str) -> None:
    """Random bytes of the right length: nearly every one of them is no ciphertext, and the others' sum stands."""
    for seed in range(6):
        network = make_network(5, size=1500, threshold=4, minimum_cohort=4)
        upload(network, lambda _index, data, seed=seed: np.random.default_rng(seed).bytes(len(data)))
        network.run()
        spoiled = any(isinstance(fault, VerificationFailed) for fault in network.faults.values())
        assert spoiled or check_sum(network, "hospital-01") == tuple(names(5)[1:])
        assert not any(isinstance(fault, RemoteProtocolError) for name, fault in network.faults.items() if name != LIAR)
