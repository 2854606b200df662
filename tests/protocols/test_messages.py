"""Decoding hostile bytes: only RemoteProtocolError leaves, it names the peer, and nothing that was changed passes."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keys.errors import LocalProtocolError, RemoteProtocolError
from keys.identity import Identity
from keys.labels import Label
from protocols import messages as m
from protocols.sealing import PUBLIC_KEY_BYTES, AttemptId
from tests.keys.factory import make_consortium
from tests.protocols.network import head, names

CONSORTIUM = make_consortium(names(3))
ALICE = CONSORTIUM.identities["hospital-00"]
DIGEST = bytes(range(32))
ATTEMPT = AttemptId(DIGEST, 3, 2)
KEY, SHARE, H32, H64 = bytes(PUBLIC_KEY_BYTES), bytes(33), bytes(32), bytes(64)
TAIL = b"12345678"

BODIES = [
    m.Join(1, H32, KEY),
    m.Ready(),
    m.Declined("the budget is spent"),
    m.RoundKeys(KEY, KEY, H32, H32, H32),
    m.SealedSeeds("hospital-01", H32, b"sealed", b"", H32, None, None),
    m.Complaint("hospital-01"),
    m.UploadChunk(0, m.chunk_digest(TAIL)),
    m.UploadDone(H32, H32, 7),
    m.SurvivorVote(H64),
    m.Unmasking((("hospital-01", SHARE),), ()),
    m.Receipt(H64),
    m.SealedKey("hospital-01", H32, b"sealed"),
    m.Farewell(),
    m.DealKey((b"signed",), make=True),
    m.DealtKey(b"signed"),
    m.RoundOpen(2),
    m.AttemptOpen(("hospital-00",)),
    m.KeySet((("hospital-00", H32),), (b"signed",)),
    m.SeedSet(("hospital-00",), (b"signed",)),
    m.Credit(4),
    m.Survivors((("hospital-00", H32),), (b"signed",)),
    m.SurvivorProof((("hospital-00", H64),)),
    m.SumChunk(0, m.chunk_digest(TAIL)),
    m.RoundResult(b"line", (("hospital-00", H64),)),
    m.AttemptFailed("too few", final=True),
    m.StudyEnded("done"),
]


def encode(body: m.AnyBody) -> bytes:
    return m.encode(ALICE, ATTEMPT, body, TAIL if isinstance(body, m.UploadChunk | m.SumChunk) else b"")


def frame(head: bytes, tail: bytes = b"") -> bytes:
    return len(head).to_bytes(4) + head + tail


def decode(data: bytes) -> m.Message:
    return m.decode(data, "hospital-00", ALICE.public_key, DIGEST)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_every_body_comes_back(body: m.AnyBody) -> None:
    tail = TAIL if isinstance(body, m.UploadChunk | m.SumChunk) else b""
    assert decode(encode(body)) == m.Message("hospital-00", 3, 2, body, memoryview(tail))


def test_all_bodies_are_listed_here() -> None:
    assert {type(body) for body in BODIES} == set(m.AnyBody.__args__)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_no_changed_byte_passes(body: m.AnyBody) -> None:
    data = encode(body)
    places = range(len(data)) if len(data) < 400 else [*range(0, len(data), 37), *range(len(data) - 70, len(data))]
    for place in places:
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(data)
            changed[place] ^= flip
            with pytest.raises(RemoteProtocolError) as caught:
                decode(bytes(changed))
            assert caught.value.peer == "hospital-00"


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        frame(b"\xdd\xff\xff\xff\xff"),  # an array of 2^32 - 1 elements
        frame(b"\xc6\xff\xff\xff\xff"),  # a byte string of 4 GiB
        frame(b"\x91" * 100_000),  # nested 100,000 deep
        b"\xff\xff\xff\xff" + encode(m.Ready())[4:],  # a head of 4 GiB
        bytes(m.MESSAGE_LIMIT_BYTES + 1),
    ],
    ids=["empty", "huge array", "huge bytes", "deep", "huge head", "oversized"],
)
def test_hostile_sizes_are_refused_before_anything_is_allocated(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(data)


def test_appended_bytes_truncation_and_other_spellings_are_refused() -> None:
    data = m.encode(ALICE, ATTEMPT, m.Join(1))
    envelope = head(data)
    wide = frame(data[4:].replace(b"\x03\x02", b"\xcc\x03\x02", 1))  # the round as a two-byte integer
    extra = frame(msgspec.msgpack.encode([*envelope, 0]))
    more = frame(msgspec.msgpack.encode([*envelope[:5], [*envelope[5], 0], envelope[6]]))
    longer, shorter = frame(data[4:] + b"\0"), frame(data[4:-1])
    for bad in (data + b"\0", data[:-1], wide, extra, more, longer, shorter):
        with pytest.raises(RemoteProtocolError):
            decode(bad)


def test_a_message_is_bound_to_its_agreement_sender_round_attempt_and_type() -> None:
    data = m.encode(ALICE, ATTEMPT, m.Join(1))
    with pytest.raises(RemoteProtocolError, match="agreement"):
        m.decode(data, "hospital-00", ALICE.public_key, bytes(32))
    with pytest.raises(RemoteProtocolError, match="in the name of"):
        m.decode(data, "hospital-01", CONSORTIUM.identities["hospital-01"].public_key, DIGEST)
    envelope = head(data)
    for place, value in ((2, 4), (3, 1), (5, ["Ready"]), (0, 1), (4, "hospital-01")):
        moved = list(envelope)
        moved[place] = value
        with pytest.raises(RemoteProtocolError):
            decode(frame(msgspec.msgpack.encode(moved)))


def test_text_from_peers_cannot_steer_a_terminal() -> None:
    for text in ("\x1b[2J", "line\nbreak", "\u202eevil", "x" * 501):
        with pytest.raises(RemoteProtocolError):
            decode(m.encode(ALICE, ATTEMPT, m.Declined(text)))


def signed(*envelope: object) -> bytes:
    """A message that Alice really signed, whatever it holds."""
    content = msgspec.msgpack.encode(envelope)
    return frame(msgspec.msgpack.encode([*envelope, ALICE.sign(Label.MESSAGE, content)]))


@pytest.mark.parametrize("version", [0, 1, 3, -1, 2**63])
def test_another_version_is_refused_although_it_is_signed(version: int) -> None:
    assert decode(signed(m.VERSION, DIGEST, 3, 2, "hospital-00", ["Ready"])).body == m.Ready()
    with pytest.raises(RemoteProtocolError, match=f"speaks protocol version {version}, not {m.VERSION}"):
        decode(signed(version, DIGEST, 3, 2, "hospital-00", ["Ready"]))


NAME, FEW = "hospital-00", [["hospital-00", H32]]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (["RoundOpen", 2**32 - 1], ["RoundOpen", 2**32]),
        (["RoundOpen", 0], ["RoundOpen", -1]),
        (["RoundOpen", 1], ["RoundOpen", 1.0]),
        (["Ready"], ["Ready", 0]),
        (["Ready"], ["ready"]),
        (["AttemptFailed", "x", True], ["AttemptFailed", "x", 1]),
        (["Declined", "x" * 500], ["Declined", "x" * 501]),
        (["Declined", "a b"], ["Declined", "a\nb"]),
        (["UploadDone", H32, H32, 0], ["UploadDone", H32 + b"\0", H32, 0]),
        (["UploadDone", H32, H32, 0], ["UploadDone", H32, bytes(31), 0]),
        (["UploadDone", H32, H32, 2**61 - 2], ["UploadDone", H32, H32, 2**61 - 1]),
        (["UploadDone", H32, H32, 0], ["UploadDone", H32, H32, -1]),
        (["RoundKeys", KEY, KEY, H32, H32, H32], ["RoundKeys", KEY, KEY[1:], H32, H32, H32]),
        (
            ["SealedSeeds", NAME, H32, bytes(2048), b"", None, None, None],
            ["SealedSeeds", NAME, H32, bytes(2049), b"", None, None, None],
        ),
        (
            ["SealedSeeds", NAME, H32, b"", bytes(2048), H32, H32, H32],
            ["SealedSeeds", NAME, H32, b"", bytes(2049), H32, H32, H32],
        ),
        (
            ["SealedSeeds", NAME, H32, b"", b"", H32, H32, H32],
            ["SealedSeeds", NAME, H32, b"", b"", H32, H32, bytes(33)],
        ),
        (
            ["SealedSeeds", NAME, H32, b"", b"", H32, H32, None],
            ["SealedSeeds", NAME, H32, b"", b"", H32, H32],
        ),
        (["KeySet", FEW * 256, []], ["KeySet", FEW * 257, []]),
        (["SurvivorVote", H64], ["SurvivorVote", H32]),
        (["AttemptOpen", [NAME] * 256], ["AttemptOpen", [NAME] * 257]),
        (["AttemptOpen", ["a" * 63]], ["AttemptOpen", ["a" * 64]]),
        (["AttemptOpen", [NAME]], ["AttemptOpen", ["../" + NAME]]),
        (["KeySet", [], [bytes(8192)]], ["KeySet", [], [bytes(8193)]]),
        (["KeySet", [], [b""] * 256], ["KeySet", [], [b""] * 257]),
        (["Survivors", FEW * 256, []], ["Survivors", FEW * 257, []]),
        (["SurvivorProof", [[NAME, H64]]], ["SurvivorProof", [[NAME, H64, 0]]]),
        (["Unmasking", [[NAME, SHARE]] * 256, []], ["Unmasking", [[NAME, SHARE]] * 257, []]),
        (["Unmasking", [[NAME, SHARE]], []], ["Unmasking", [[NAME, SHARE[1:]]], []]),
        (["RoundResult", bytes(1 << 19), []], ["RoundResult", bytes((1 << 19) + 1), []]),
    ],
    ids=lambda body: str(body)[:40],
)
def test_every_bound_holds_for_signed_messages_too(good: list[object], bad: list[object]) -> None:
    decode(signed(m.VERSION, DIGEST, 3, 2, "hospital-00", good))
    with pytest.raises(RemoteProtocolError, match="cannot be decoded"):
        decode(signed(m.VERSION, DIGEST, 3, 2, "hospital-00", bad))


def test_an_oversized_message_is_refused_unread_although_every_part_of_it_is_in_bounds() -> None:
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        decode(signed(m.VERSION, DIGEST, 3, 2, "hospital-00", ["KeySet", [], [bytes(8192)] * 256]))


def test_signatures_by_another_member_and_for_another_purpose_are_refused() -> None:
    envelope = (m.VERSION, DIGEST, 3, 2, "hospital-00", ["Ready"])
    content = msgspec.msgpack.encode(envelope)
    bob = CONSORTIUM.identities["hospital-01"]
    for signature in (bob.sign(Label.MESSAGE, content), ALICE.sign(Label.RECEIPT, content), H64):
        with pytest.raises(RemoteProtocolError, match="wrong signature"):
            decode(frame(msgspec.msgpack.encode([*envelope, signature])))


@pytest.mark.parametrize("tail", [b"", b"1", TAIL[:-1], TAIL + b"0", bytes(8)])
def test_a_chunk_is_bound_to_its_bytes_and_nothing_else_may_have_any(tail: bytes) -> None:
    for kind in (m.UploadChunk, m.SumChunk):
        with pytest.raises(RemoteProtocolError, match="not the one it signed"):
            decode(m.encode(ALICE, ATTEMPT, kind(0, m.chunk_digest(TAIL)), tail))
    if tail:
        with pytest.raises(RemoteProtocolError, match="bytes behind it"):
            decode(m.encode(ALICE, ATTEMPT, m.Ready(), tail))


# --- one signature for several messages


def seeds(count: int) -> list[m.SealedSeeds]:
    return [m.SealedSeeds(name, H32, b"sealed", b"", H32, None, None) for name in names(count)]


def batch(*bodies: m.AnyBody, identity: Identity = ALICE, attempt: AttemptId = ATTEMPT) -> list[bytes]:
    return m.encode_together(identity, attempt, bodies)


def with_signature(data: bytes, signature: object) -> bytes:
    return frame(msgspec.msgpack.encode([*head(data)[:6], signature]))


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 18, 40])
def test_messages_that_go_together_share_signatures(count: int) -> None:
    """16 under one signature; the one that is left over alone is signed alone."""
    bodies = seeds(count)
    messages = batch(*bodies)
    assert [decode(data).body for data in messages] == bodies
    for first in range(0, count, 16):
        together = [head(data)[6] for data in messages[first : first + 16]]
        assert together.count(together[0]) == len(together)
        if len(together) == 1:
            assert messages[first] == encode(bodies[first])
        else:
            assert len(together[0][1]) == len(together)
    assert len({str(head(data)[6]) for data in messages}) == -(-count // 16)


def test_the_same_message_twice_is_not_signed() -> None:
    with pytest.raises(LocalProtocolError, match="twice"):
        batch(m.Ready(), m.Credit(1), m.Ready())


def test_a_largest_message_with_a_largest_batch_can_be_relayed() -> None:
    sealed = (H32, bytes(2048), bytes(2048), H32, H32, H32)
    messages = batch(*(m.SealedSeeds(f"{index:063d}", *sealed) for index in range(16)))
    relayed = m.SeedSet((NAME,), tuple(messages))
    assert decode(encode(relayed)).body == relayed


def test_a_message_of_a_batch_is_bound_to_its_agreement_sender_round_attempt_and_body() -> None:
    data = batch(m.Join(1), m.Join(2))[0]
    for place, value in ((1, bytes(32)), (2, 4), (3, 1), (4, "hospital-01"), (5, ["Join", 3, H32, b""])):
        moved = head(data)
        moved[place] = value
        with pytest.raises(RemoteProtocolError):
            decode(frame(msgspec.msgpack.encode(moved)))
    bob = CONSORTIUM.identities["hospital-01"]
    for other in (
        batch(m.Join(1), m.Join(3), identity=bob),
        batch(m.Join(1), m.Join(3), attempt=AttemptId(DIGEST, 3, 1)),
    ):
        with pytest.raises(RemoteProtocolError, match="wrong signature"):
            decode(with_signature(data, head(other[0])[6]))


def test_batches_that_say_too_little_or_too_much_are_refused() -> None:
    """Each is really signed by its sender."""

    def digest(body: m.AnyBody) -> bytes:
        return m.chunk_digest(Label.MESSAGE + msgspec.msgpack.encode((m.VERSION, DIGEST, 3, 2, "hospital-00", body)))

    def under(label: Label, *digests: bytes) -> bytes:
        signature = ALICE.sign(label, msgspec.msgpack.encode(digests))
        return with_signature(encode(m.Ready()), [signature, digests])

    own, others = digest(m.Ready()), [digest(m.Credit(number)) for number in range(16)]
    good = under(Label.MESSAGE_BATCH, own, others[0])
    assert decode(good).body == m.Ready()
    assert good == batch(m.Ready(), m.Credit(0))[0]
    assert decode(under(Label.MESSAGE_BATCH, *others[:15], own)).body == m.Ready()
    for bad in ([], [own], [own, own], [own, others[0], others[0]], others[:2], [own, *others], [own, own[1:]]):
        with pytest.raises(RemoteProtocolError):
            decode(under(Label.MESSAGE_BATCH, *bad))
    with pytest.raises(RemoteProtocolError, match="wrong signature"):
        decode(under(Label.MESSAGE, own, others[0]))


def test_a_signature_of_a_batch_is_none_of_a_message_nor_the_other_way_round() -> None:
    alone, together = encode(m.Ready()), batch(m.Ready(), m.Credit(0))[0]
    signature, digests = head(together)[6]
    for bad in (
        with_signature(alone, signature),
        with_signature(together, [head(alone)[6], digests]),
        with_signature(together, [signature, digests[::-1]]),
        with_signature(together, [signature, digests[:1]]),
        with_signature(together, [digests, signature]),
        with_signature(together, [signature, digests, None]),
        with_signature(together, [[signature, digests], digests]),
        with_signature(together, {"signature": signature, "digests": digests}),
    ):
        with pytest.raises(RemoteProtocolError):
            decode(bad)


@pytest.mark.parametrize("kind", [m.UploadChunk, m.SumChunk])
def test_an_envelope_and_the_tail_are_the_message(kind: type[m.UploadChunk] | type[m.SumChunk]) -> None:
    body = kind(7, m.chunk_digest(TAIL))
    envelope = m.envelope(ALICE, ATTEMPT, body)
    assert envelope + TAIL == m.encode(ALICE, ATTEMPT, body, TAIL)
    received = memoryview(envelope + TAIL)
    assert m.decode(received, "hospital-00", ALICE.public_key, DIGEST).body == body


def test_the_envelope_of_any_chunk_fits_into_the_room_before_its_values() -> None:
    """The longest name and the largest numbers."""
    longest = Identity.generate("a" * 63, "hospital")
    largest = AttemptId(DIGEST, 2**32 - 1, 2**32 - 1)
    envelope = m.envelope(longest, largest, m.UploadChunk(2**32 - 1, H32))
    assert m.CHUNK_ENVELOPE_BYTES - 32 < len(envelope) <= m.CHUNK_ENVELOPE_BYTES


DATA = m.encode(ALICE, ATTEMPT, m.Unmasking((("hospital-01", SHARE),), (("hospital-02", SHARE),)))
TOGETHER = batch(m.Unmasking((("hospital-01", SHARE),), ()), m.Credit(1), m.Ready())[0]
NESTED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from([DATA, TOGETHER]), st.integers(0, 400), st.integers(0, 40), st.binary(max_size=40))
@settings(max_examples=600, deadline=None)
def test_any_splice_of_a_message_is_refused(data: bytes, start: int, length: int, put: bytes) -> None:
    spliced = data[:start] + put + data[start + length :]
    if spliced != data:
        with pytest.raises(RemoteProtocolError):
            decode(spliced)
    m.claimed_sender(spliced)


@given(NESTED, st.sampled_from(BODIES))
@settings(max_examples=300, deadline=None)
def test_signed_nonsense_is_refused_or_a_message(value: object, body: m.AnyBody) -> None:
    """Any value as a body, as a field of a body, and as the whole message: signed, so that only the decoder stands in between."""
    kind = type(body).__name__
    for content in (value, [kind, value], [kind, value, value], [kind, value, value, value]):
        try:
            message = decode(signed(m.VERSION, DIGEST, 3, 2, "hospital-00", content))
        except RemoteProtocolError:
            continue
        assert type(message.body) in m.AnyBody.__args__
    with pytest.raises(RemoteProtocolError):
        decode(frame(msgspec.msgpack.encode(value)))
    assert m.claimed_sender(frame(msgspec.msgpack.encode(value))) == ""
