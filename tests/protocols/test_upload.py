"""Masked uploads: whatever the chunks and the pace, the same ring values, the tag beside them, and every mask in its place."""

from __future__ import annotations

import threading
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import LocalProtocolError
from protocols import prg
from protocols.encoding import Data, FixedPoint, Float64Vector, Uint32Vector, unpack
from protocols.messages import CHUNK_ENVELOPE_BYTES, chunk_digest
from protocols.prg import BLOCK_BYTES, TAG_PRIME, MaskSet, keystream
from protocols.rings import IntegerRing
from protocols.sealing import AttemptId
from protocols.tags import Hashed, Tagger
from protocols.transcript import upload_digest
from protocols.upload import Upload
from protocols.workers import spread

TAGGER = Tagger(bytes(range(32)), AttemptId(bytes(32), 1, 1))
KEYS = [bytes([index]) * 32 for index in range(5)]
ENCODINGS = {
    "32 bits": FixedPoint(value_bits=28, fraction_bits=16, ring_bits=32, n_max=15),
    "24 bits": FixedPoint(value_bits=18, fraction_bits=10, ring_bits=24, n_max=60),
    "20 bits": FixedPoint(value_bits=14, fraction_bits=8, ring_bits=20, n_max=60),
}
BLOCK_VALUES = BLOCK_BYTES // 4
WIDE = ENCODINGS["32 bits"]


def vector(size: int, seed: int = 0) -> Float64Vector:
    return np.random.default_rng(seed).normal(scale=5.0, size=size)


def integers(fixed_point: FixedPoint, values: np.ndarray, tagger: Tagger, masks: MaskSet, chunk_values: int) -> Upload:
    ring = IntegerRing(fixed_point.ring_bits, chunk_values)
    return Upload(ring, fixed_point, values, tagger, masks, chunk_values)


def masks(added: int = 2) -> MaskSet:
    return MaskSet(KEYS[:added], KEYS[added:])


def envelope(index: int, digest: bytes) -> bytes:
    return index.to_bytes(4) + digest


def ring_values(messages: list[Data], total: int, chunk_values: int, fixed_point: FixedPoint) -> Uint32Vector:
    sizes = [min(chunk_values, total - start) for start in range(0, total, chunk_values)]
    assert [bytes(data[:36]) for data in messages] == [
        envelope(index, chunk_digest(data[36:])) for index, data in enumerate(messages)
    ]
    assert len(messages) == len(sizes)
    parts = [unpack(data[36:], size, fixed_point.ring_bits) for data, size in zip(messages, sizes, strict=True)]
    return np.concatenate(parts)


def by_hand(
    fixed_point: FixedPoint, values: Float64Vector, mask: MaskSet | None, chunk_values: int = 1024
) -> Uint32Vector:
    """The upload as docs/protocol.md has it, in one piece."""
    encoded = fixed_point.encode(values)
    for chunk, start in enumerate(range(0, encoded.size, chunk_values)):
        if mask is not None:
            mask.apply(encoded[start : start + chunk_values], chunk)
    return encoded & np.uint32((1 << fixed_point.ring_bits) - 1)


def masked_tag(fixed_point: FixedPoint, values: Float64Vector, added: list[bytes], subtracted: list[bytes]) -> int:
    """The tag with the first 16 bytes of each key's stream, in the field of tags."""
    first = [int.from_bytes(keystream(key, 0, 4), "little") for key in (*added, *subtracted)]
    tag = TAGGER.part(fixed_point.encode(values)) + TAGGER.pad
    return (tag + sum(first[: len(added)]) - sum(first[len(added) :])) % TAG_PRIME


# --- what is uploaded


@given(
    st.sampled_from(sorted(ENCODINGS)),
    st.one_of(st.integers(1, 9000), st.integers(1, 8).flatmap(lambda n: st.integers(1024 * n - 6, 1024 * n + 1))),
    st.sampled_from([1024, 2048, 5120]),
    st.lists(st.integers(0, 12), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_the_chunks_are_the_encoded_vector_its_tag_and_the_masks(
    encoding: str, size: int, chunk_values: int, stops: list[int]
) -> None:
    """Also where the vector ends with a chunk, or one value before or behind; and in whatever steps."""
    fixed_point, values = ENCODINGS[encoding], vector(size, size)
    upload = integers(fixed_point, values, TAGGER, masks(), chunk_values)
    messages: list[Data] = []
    for stop in [*sorted(stops), upload.chunks]:
        messages += upload.make(stop, envelope)
        assert upload.made == len(messages) == max(len(messages), min(stop, upload.chunks))
    uploaded = ring_values(messages, size, chunk_values, fixed_point)
    assert np.array_equal(uploaded, by_hand(fixed_point, values, masks(), chunk_values))
    assert upload.tag == masked_tag(fixed_point, values, KEYS[:2], KEYS[2:])
    assert upload.digest == upload_digest(b"".join(data[4:36] for data in messages), upload.tag)
    assert upload.make(upload.chunks + 3, envelope) == []


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_the_sum_of_uploads_is_the_sum_and_carries_the_sum_of_the_tags(encoding: str) -> None:
    """Three nodes, a mask for each pair: added by the first, subtracted by the second. Extreme values too."""
    fixed_point, size = ENCODINGS[encoding], 3000
    pairs = {(0, 1): KEYS[0], (0, 2): KEYS[1], (1, 2): KEYS[2]}
    vectors = [vector(size), np.full(size, 1e9), np.full(size, -1e9)]
    total, mask = np.zeros(size, np.uint32), np.uint32((1 << fixed_point.ring_bits) - 1)
    tag = 0
    for me, values in enumerate(vectors):
        added = [key for (low, _), key in pairs.items() if low == me]
        subtracted = [key for (_, high), key in pairs.items() if high == me]
        upload = integers(fixed_point, values, TAGGER, MaskSet(added, subtracted), 1024)
        messages = upload.make(upload.chunks, envelope)
        tag = (tag + upload.tag) % TAG_PRIME
        total = total + ring_values(messages, total.size, 1024, fixed_point) & mask
    encoded = sum(fixed_point.encode(values).astype(np.uint64) for values in vectors)
    assert np.array_equal(total, encoded)
    assert tag == (TAGGER.part(total) + 3 * TAGGER.pad) % TAG_PRIME
    total[1500] ^= 1
    assert tag != (TAGGER.part(total) + 3 * TAGGER.pad) % TAG_PRIME


def test_an_upload_shows_nothing_of_the_vector_and_other_masks_make_another() -> None:
    """Under one key alone: no value stands at its place, nor the tag, and differences are no small numbers."""
    values = np.zeros(4096)
    seen, tags = [], {(TAGGER.part(WIDE.encode(values)) + TAGGER.pad) % TAG_PRIME}
    for key in KEYS:
        upload = integers(WIDE, values, TAGGER, MaskSet([key], []), 1024)
        seen.append(ring_values(upload.make(upload.chunks, envelope), 4096, 1024, WIDE))
        tags.add(upload.tag)
    assert len(tags) == 1 + len(KEYS)
    plain = by_hand(WIDE, values, None)
    for index, one in enumerate(seen):
        assert not (one == plain).any()
        assert np.unique(one).size >= one.size - 2  # 4,096 of 2^32 values: two alike are one case in 500
        for other in seen[:index]:
            assert np.count_nonzero(one == other) <= 1
    assert not np.array_equal(seen[0][:1024], seen[0][1024:2048])


# --- how it is made


def test_the_vector_is_not_changed_and_may_be_read_only() -> None:
    values = vector(5000)
    before = values.copy()
    values.setflags(write=False)
    upload = integers(WIDE, values, TAGGER, masks(), 1024)
    upload.make(upload.chunks, envelope)
    assert np.array_equal(values, before)


def test_an_error_in_a_chunk_is_raised_and_the_chunks_are_made_again_just_so() -> None:
    """A second try with other masks or another tag under the same masks would give the difference away."""

    def make(failing: int | None) -> list[Data]:
        upload = integers(WIDE, vector(9000), TAGGER, masks(), 1024)
        first = upload.make(2, envelope)

        def finish(index: int, digest: bytes) -> bytes:
            if index == failing:
                raise LocalProtocolError(f"chunk {index}")
            return envelope(index, digest)

        if failing is not None:
            with pytest.raises(LocalProtocolError, match=f"chunk {failing}"):
                upload.make(upload.chunks, finish)
            assert upload.made == 2
        return first + upload.make(upload.chunks, envelope)

    assert make(5) == make(None)


def test_a_last_chunk_that_fails_is_made_again_just_so() -> None:
    """The tag must not have counted the values twice."""

    def refuse(index: int, digest: bytes) -> bytes:
        if index == 2:
            raise LocalProtocolError("no")
        return envelope(index, digest)

    upload = integers(WIDE, vector(3000), TAGGER, masks(), 1024)
    with pytest.raises(LocalProtocolError):
        upload.make(3, refuse)
    got = ring_values(upload.make(3, envelope), 3000, 1024, WIDE)
    assert np.array_equal(got, by_hand(WIDE, vector(3000), masks()))
    assert upload.tag == masked_tag(WIDE, vector(3000), KEYS[:2], KEYS[2:])


def test_the_tag_of_half_an_upload_is_refused() -> None:
    """A second tag under the same masks would give the difference away."""
    upload = integers(WIDE, vector(3000), TAGGER, masks(), 1024)
    upload.make(2, envelope)
    with pytest.raises(LocalProtocolError, match="3 chunks, of which 2 were made"):
        _ = upload.tag
    upload.make(3, envelope)
    assert upload.tag == masked_tag(WIDE, vector(3000), KEYS[:2], KEYS[2:])


def test_the_inner_product_is_taken_once_where_the_caller_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of chunks hash rows and nothing more."""
    calls: list[tuple[int, int]] = []

    def inner_product(self: Tagger, hashed: Hashed, first: int = 0) -> int:
        calls.append((threading.get_ident(), len(hashed)))
        return genuine(self, hashed, first)

    genuine = Tagger.inner_product
    monkeypatch.setattr(Tagger, "inner_product", inner_product)
    upload = integers(WIDE, vector(30_000), TAGGER, masks(), 2048)
    upload.make(5, envelope)
    upload.make(upload.chunks, envelope)
    assert not calls
    assert upload.tag == upload.tag
    assert upload.digest
    assert calls == [(threading.get_ident(), 30)]


def test_each_chunk_is_finished_once_and_in_other_threads_too() -> None:
    calls: list[int] = []
    threads = set()

    def finish(index: int, digest: bytes) -> bytes:
        calls.append(index)
        threads.add(threading.get_ident())
        time.sleep(0.001)  # Chunks as small as these would be made before another thread wakes up.
        return envelope(index, digest)

    upload = integers(WIDE, vector(30_000), TAGGER, masks(), 1024)
    for stop in (3, 3, 2, 17, 99, 99):
        upload.make(stop, finish)
    assert sorted(calls) == list(range(upload.chunks))
    assert threads - {threading.get_ident()}


def test_memory_is_that_of_the_chunks_asked_for() -> None:
    """The vector takes 32 MB, and 16 MB encoded; four chunks of 64 KiB and the cores' scratch take far less."""
    values = np.zeros(4_000_000)
    upload = integers(WIDE, values, TAGGER, MaskSet(KEYS[:1], []), 16_384)
    upload.make(4, lambda index, digest: b"m")
    tracemalloc.start()
    try:
        while upload.made < 60:
            upload.make(upload.made + 4, lambda index, digest: b"m")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_values_that_are_sealed_in_place_are_not_copied_into_their_message() -> None:
    """The message is the memory that they were encoded into, at a place where masks are fast, and read-only."""
    upload = integers(WIDE, vector(3000), TAGGER, masks(), 1024)
    messages = upload.make(upload.chunks, envelope)
    for data, size in zip(messages, (1024, 1024, 952), strict=True):
        assert isinstance(data, memoryview)
        assert data.readonly
        assert len(data) == data.nbytes == 36 + 4 * size
        memory = data.obj
        assert isinstance(memory, np.ndarray)
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        assert memory.nbytes == CHUNK_ENVELOPE_BYTES + 4 * size
        assert np.frombuffer(data, np.uint8).ctypes.data - memory.ctypes.data == CHUNK_ENVELOPE_BYTES - 36
    assert CHUNK_ENVELOPE_BYTES % 16 == 0


@pytest.mark.parametrize("encoding", ["20 bits", "24 bits"])
def test_packed_values_are_joined_to_their_envelope(encoding: str) -> None:
    fixed_point, values = ENCODINGS[encoding], vector(3000)
    messages = integers(fixed_point, values, TAGGER, masks(), 1024).make(3, envelope)
    assert all(isinstance(data, bytes) for data in messages)
    assert np.array_equal(ring_values(messages, 3000, 1024, fixed_point), by_hand(fixed_point, values, masks()))


def test_an_envelope_that_does_not_fit_is_refused_and_never_reaches_the_values() -> None:
    upload = integers(WIDE, vector(1024), TAGGER, masks(), 1024)
    with pytest.raises(LocalProtocolError, match="257 bytes; there is room for 256"):
        upload.make(1, lambda index, digest: bytes(CHUNK_ENVELOPE_BYTES + 1))
    (data,) = upload.make(1, lambda index, digest: b"e" * CHUNK_ENVELOPE_BYTES)
    assert data[:CHUNK_ENVELOPE_BYTES] == b"e" * CHUNK_ENVELOPE_BYTES
    assert np.array_equal(unpack(data[CHUNK_ENVELOPE_BYTES:], 1024, 32), by_hand(WIDE, vector(1024), masks()))


# --- masks of chunks


def applied(mask: MaskSet, size: int, chunk: int = 0) -> Uint32Vector:
    values = np.zeros(size, np.uint32)
    mask.apply(values, chunk)
    return values


@given(st.integers(0, 2**64), st.integers(0, 600))
@settings(max_examples=100, deadline=None)
def test_the_mask_of_a_chunk_is_a_keystream_of_its_own(chunk: int, size: int) -> None:
    stream = np.frombuffer(keystream(KEYS[1], 4 * ((chunk + 1) * 2**32 + 2), size), dtype="<u4")
    assert np.array_equal(applied(MaskSet([KEYS[1]], []), size, chunk), stream)
    assert np.array_equal(applied(MaskSet([KEYS[1]], []), size // 2, chunk), stream[: size // 2])


@pytest.mark.parametrize("size", [BLOCK_VALUES - 1, BLOCK_VALUES, 2 * BLOCK_VALUES + 9])
def test_a_mask_goes_on_across_its_inner_blocks(size: int) -> None:
    stream = np.frombuffer(keystream(KEYS[1], 4 * (2**32 + 2), size), dtype="<u4")
    assert np.array_equal(applied(MaskSet([KEYS[1]], []), size), stream)


@pytest.mark.parametrize("way", [prg._by_ctr, prg._by_gcm])
def test_both_ways_to_a_mask_give_the_same(way: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is taken depends on the processor."""
    monkeypatch.setattr(prg, "_fastest", lambda: way)
    for chunk in (0, 1, 2**32 - 2, 2**32, 2**64):
        stream = np.frombuffer(keystream(KEYS[1], 4 * ((chunk + 1) * 2**32 + 2), BLOCK_VALUES + 9), dtype="<u4")
        assert np.array_equal(applied(MaskSet([KEYS[1]], []), BLOCK_VALUES + 9, chunk), stream)


def test_threads_do_not_share_their_keystreams() -> None:
    alone = [applied(masks(3), 50_000, chunk) for chunk in range(64)]
    together = spread(lambda chunk: applied(masks(3), 50_000, chunk), range(64))
    assert all(map(np.array_equal, alone, together))


def test_signs_and_keys_of_masks() -> None:
    one, two = applied(MaskSet(KEYS[:1], []), 100), applied(MaskSet(KEYS[1:2], []), 100)
    assert np.array_equal(applied(MaskSet(KEYS[:1], KEYS[1:2]), 100), one - two)
    assert np.array_equal(applied(MaskSet([], KEYS[:2]), 100), np.zeros(100, np.uint32) - one - two)
    assert not applied(MaskSet(KEYS[:2], KEYS[1::-1]), 100).any()
    assert not applied(MaskSet([], []), 100).any()
    assert np.count_nonzero(one == two) == 0


def test_keys_given_by_a_generator_mask_every_chunk() -> None:
    """One that is used up by the first chunk would leave the others bare."""
    mask = MaskSet((key for key in KEYS[:1]), (key for key in KEYS[1:]))
    assert np.array_equal(applied(mask, 100), applied(mask, 100))
    assert applied(mask, 100).any()


@pytest.mark.parametrize("start", [1, 2, 3, 1025])
def test_a_place_inside_a_cipher_block_is_refused(start: int) -> None:
    with pytest.raises(LocalProtocolError, match="multiples of 4 values"):
        keystream(KEYS[0], start, 4)
