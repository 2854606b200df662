"""The inputs of the vectors over keys and messages: the key schedule, seals, and signed messages of every type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from keys.identity import Identity
from keys.labels import Label
from protocols import messages as m
from protocols import sealing
from protocols.sealing import AttemptId
from tests.vectors.cases import ATTEMPT, COHORT, DIGEST, SECRET, Case, case, named, refused
from tests.vectors.codec import coins
from tests.vectors.reference import packed

SMALL_ORDER_X25519 = "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"
"""A point of order 8 (RFC 7748, section 6.1)."""


SEAL = sealing.seal
"""As it is, also while `whole_round` puts `Recorded` in its place."""


@dataclass
class Recorded:
    """HPKE cannot be made to draw given coins, so ciphertexts are kept: those in the files, as long as they open, else new ones."""

    known: dict[bytes, list[bytes]] = field(default_factory=dict)

    def learn(self, document: Any) -> None:
        """Take every {"info", "sealed"} of a document."""
        if isinstance(document, list):
            for item in document:
                self.learn(item)
        elif isinstance(document, dict):
            if isinstance(document.get("info"), str) and isinstance(document.get("sealed"), str):
                self.known.setdefault(bytes.fromhex(document["info"]), []).append(bytes.fromhex(document["sealed"]))
            for item in document.values():
                self.learn(item)

    def seal(self, master: bytes, attempt: AttemptId, plaintext: bytes, info: bytes) -> bytes:
        private = sealing.private_key(master, attempt)
        for sealed in self.known.get(info, ()):
            try:
                if sealing.unseal(private, sealed, info) == plaintext:
                    return sealed
            except sealing.SealBroken:
                continue
        sealed = SEAL(sealing.public_key_bytes(master, attempt), plaintext, info)
        self.known.setdefault(info, []).insert(0, sealed)
        return sealed


def identity(name: str, role: Any = "hospital") -> Identity:
    draw = coins(f"identity {name}")
    return Identity(
        name, role, Ed25519PrivateKey.from_private_bytes(draw(32)), X25519PrivateKey.from_private_bytes(draw(32))
    )


def label_name(label: Label) -> str:
    return label.value.decode().removeprefix("secgeo/").removesuffix("/v1\0")


def key_schedule(recorded: Recorded) -> Iterator[Case]:
    for label in Label:
        yield case("ASCII, and a zero byte at the end", "label", name=label_name(label))
    others = ([bytes(32), 3, 2], [DIGEST, 2, 2], [DIGEST, 3, 3])
    yield case(
        "no parts: an array of digest, round and attempt", "bind", attempt=ATTEMPT, label_name="cohort", parts=[]
    )
    yield case("texts and bytes", "bind", attempt=ATTEMPT, label_name="graph", parts=["hospital-00", b"\1\2", b""])
    yield case(
        "large numbers, and more than 15 parts",
        "bind",
        attempt=[DIGEST, 70_000, 200],
        label_name="senders",
        parts=named(13),
    )
    yield case(
        "names do not run into each other",
        "bind",
        attempt=ATTEMPT,
        label_name="senders",
        parts=["hospital-0", "0hospital"],
    )
    yield case(
        "the pinned digest is over the exact bytes of the document", "agreement_digest", document="[study]\nid = 'x'\n"
    )
    yield case("one byte of the document is different", "agreement_digest", document="[study]\nid = 'x' \n")
    yield case(
        "the key pair of a master: ML-KEM-768 seed (d, z), X25519 private key", "keys", master=SECRET, attempt=ATTEMPT
    )
    for other in others:
        yield case("another agreement, round or attempt: other keys", "keys", master=SECRET, attempt=other)
    public = sealing.public_key_bytes(SECRET, AttemptId(*ATTEMPT))
    yield case("a public key to which can be sealed", "check_key", public=public)
    for bad, why in (
        (public[:1184] + bytes(32), "X25519 key 0, of small order"),
        (public[:1184] + (1).to_bytes(32, "little"), "X25519 key 1, of small order"),
        (public[:1184] + bytes.fromhex(SMALL_ORDER_X25519), "X25519 key of order 8"),
        (b"\xff\xff\xff" + public[3:], "an ML-KEM coefficient that is not below 3329"),
        (public[:-1], "a byte is missing"),
        (public + b"\0", "a byte too many"),
    ):
        yield refused("SealBroken", why, "check_key", public=bad)
    pair = {"cohort": COHORT, "low": "hospital-00", "high": "hospital-01"}
    for attempt in (ATTEMPT, *others):
        which = "" if attempt is ATTEMPT else ", in another agreement, round or attempt"
        yield case(
            f"mask key of a node's own mask{which}",
            "self_mask_key",
            self_seed=SECRET,
            attempt=attempt,
            owner="hospital-00",
        )
        yield case(
            f"commitment to a self seed{which}",
            "self_seed_commitment",
            self_seed=SECRET,
            attempt=attempt,
            owner="hospital-00",
        )
        yield case(
            f"what low contributes to the pair seed{which}", "contribution", master_low=SECRET, attempt=attempt, **pair
        )
        yield case(
            f"pair seed: the key of the mask that low adds and high subtracts{which}",
            "pair_mask_key",
            contribution=SECRET,
            attempt=attempt,
            **pair,
        )
    yield case(
        "digest of a share that is dealt",
        "share_digest",
        share=bytes([1]) + bytes(32),
        attempt=ATTEMPT,
        owner="hospital-00",
        holder="hospital-01",
    )
    yield case(
        "digest of a contribution",
        "contribution_digest",
        contribution=SECRET,
        attempt=ATTEMPT,
        low="hospital-00",
        high="hospital-01",
    )
    yield case(
        "the same share from holder to owner",
        "share_digest",
        share=bytes([1]) + bytes(32),
        attempt=ATTEMPT,
        owner="hospital-01",
        holder="hospital-00",
    )
    yield case(
        "digest of a signed message with round keys: plain SHA-256", "keys_digest", signed_keys=b"a signed message"
    )
    digests = {name: bytes([place]) * 32 for place, name in enumerate(named(4))}
    yield case("digest of all round keys, in the order of the names", "cohort_digest", attempt=ATTEMPT, digests=digests)
    yield case("given in another order", "cohort_digest", attempt=ATTEMPT, digests=dict(reversed(digests.items())))
    swapped = digests | {"hospital-00": digests["hospital-01"], "hospital-01": digests["hospital-00"]}
    yield case("two nodes have changed their keys", "cohort_digest", attempt=ATTEMPT, digests=swapped)
    yield case("who distributed seeds", "senders_view", attempt=ATTEMPT, cohort=COHORT, senders=named(3))
    yield case("given in another order", "senders_view", attempt=ATTEMPT, cohort=COHORT, senders=named(3)[::-1])
    yield case("fewer senders", "senders_view", attempt=ATTEMPT, cohort=COHORT, senders=named(2))
    yield case(
        "HPKE info of shares",
        "shares_info",
        attempt=ATTEMPT,
        cohort=COHORT,
        sender="hospital-01",
        recipient="hospital-00",
    )
    yield case("HPKE info of a contribution", "contribution_info", attempt=ATTEMPT, **pair)
    survivors = [[name, digest] for name, digest in digests.items()]
    yield case("what a survivor signs", "survivor_statement", attempt=ATTEMPT, view=COHORT, survivors=survivors)
    yield case("what a node countersigns", "receipt_statement", agreement_digest=DIGEST, round=3, record_digest=COHORT)
    yield case("digest of an upload of two chunks", "upload_digest", chunks=[b"\1\2\3\4", b"\5\6\7\10"], tag=bytes(8))
    yield case("the same bytes in one chunk", "upload_digest", chunks=[b"\1\2\3\4\5\6\7\10"], tag=bytes(8))
    yield case("the same chunk with another tag", "upload_digest", chunks=[b"\1\2\3\4\5\6\7\10"], tag=bytes([1] * 8))
    yield case(
        "digest of a sum: little-endian words of 32 bits, whatever the ring",
        "aggregate_digest",
        total=[1, 2**24, 2**32 - 1],
    )
    yield from _signatures(survivors)
    yield from _seals(recorded)


def _signatures(survivors: list[Any]) -> Iterator[Case]:
    alice, content = identity("hospital-00"), packed([*ATTEMPT, COHORT, survivors])
    vote = alice.sign(Label.SURVIVORS, content)
    given = {
        "public": alice.public_key.public_bytes_raw(),
        "label_name": "survivors",
        "content": content,
        "signature": vote,
    }
    yield case("a vote: Ed25519 over the label and the statement", "check_signature", **given)
    for change, why in (
        ({"label_name": "receipt"}, "the same signature for another purpose"),
        ({"content": packed([DIGEST, 3, 3, COHORT, survivors])}, "the vote of another attempt"),
        ({"content": packed([*ATTEMPT, COHORT, survivors[1:]])}, "the vote on another set"),
        ({"public": identity("hospital-01").public_key.public_bytes_raw()}, "another node's key"),
        ({"signature": bytes(64)}, "no signature"),
    ):
        yield refused("VerificationFailed", why, "check_signature", **(given | change))


def _seals(recorded: Recorded) -> Iterator[Case]:
    attempt = AttemptId(*ATTEMPT)
    info = sealing.shares_info(attempt, COHORT, "hospital-01", "hospital-00")
    shares = packed([bytes([1]) + bytes(32), bytes([1]) * 33, None])
    sealed = recorded.seal(SECRET, attempt, shares, info)
    good = {"master": SECRET, "attempt": ATTEMPT, "info": info, "sealed": sealed}
    yield case(
        "shares: enc (ML-KEM ciphertext of 1,088 bytes, X25519 key of 32), then AES-256-GCM; no AAD", "unseal", **good
    )
    pair_info = sealing.contribution_info(attempt, COHORT, "hospital-00", "hospital-01")
    pair = recorded.seal(bytes(32), attempt, SECRET, pair_info)
    yield case("a contribution", "unseal", master=bytes(32), attempt=ATTEMPT, info=pair_info, sealed=pair)

    def flipped(place: int) -> bytes:
        return sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]

    for change, why in (
        ({"master": bytes(32)}, "another master"),
        ({"attempt": [DIGEST, 3, 3]}, "the key of another attempt"),
        (
            {"info": sealing.shares_info(attempt, COHORT, "hospital-00", "hospital-01")},
            "sender and recipient exchanged",
        ),
        ({"info": sealing.shares_info(attempt, DIGEST, "hospital-01", "hospital-00")}, "other round keys"),
        (
            {"info": sealing.contribution_info(attempt, COHORT, "hospital-01", "hospital-00")},
            "sealed for another purpose",
        ),
        ({"sealed": flipped(0)}, "a bit of the ML-KEM ciphertext"),
        ({"sealed": flipped(1088)}, "a bit of the X25519 key"),
        ({"sealed": flipped(1120)}, "a bit of the ciphertext"),
        ({"sealed": flipped(len(sealed) - 1)}, "a bit of the authentication tag"),
        ({"sealed": sealed[:-1]}, "a byte is missing"),
        ({"sealed": sealed[:1088] + bytes(32) + sealed[1120:]}, "an X25519 key of small order"),
        ({"sealed": b""}, "nothing"),
    ):
        yield refused("SealBroken", why, "unseal", **(good | change))


# --- messages

ALICE = "hospital-00"
TAIL = b"packed values"
H32, H64, SHARE = bytes([7]) * 32, bytes([8]) * 64, bytes([1]) + bytes(32)


def bodies() -> list[Any]:
    """One body of each type."""
    public = sealing.public_key_bytes(SECRET, AttemptId(*ATTEMPT))
    return [
        m.Join(1),
        m.Ready(),
        m.Declined("my privacy budget is spent"),
        m.RoundKeys(public, public, H32, H32, H32),
        m.SealedSeeds("hospital-01", H32, b"sealed shares", b"sealed contribution", H32, H32, H32),
        m.Complaint("hospital-01"),
        m.UploadChunk(0, m.chunk_digest(TAIL)),
        m.UploadDone(H32, H32, 2**61 - 2),
        m.SurvivorVote(H64),
        m.Unmasking((("hospital-01", SHARE),), (("hospital-02", SHARE),)),
        m.Receipt(H64),
        m.SealedKey("hospital-01", H32, b"a sealed key"),
        m.Farewell(),
        m.DealKey((b"a signed message",), make=True),
        m.DealtKey(b"a signed message"),
        m.RoundOpen(2),
        m.AttemptOpen(tuple(named(3))),
        m.KeySet((("hospital-00", H32),), (b"a signed message",)),
        m.SeedSet(tuple(named(3)), (b"a signed message",)),
        m.Credit(300),
        m.Survivors((("hospital-00", H32),), (b"a signed message",)),
        m.SurvivorProof((("hospital-00", H64),)),
        m.SumChunk(70_000, m.chunk_digest(TAIL)),
        m.RoundResult(b"a line of the transcript", (("hospital-00", H64),)),
        m.AttemptFailed("too few uploads", final=True),
        m.StudyEnded("all rounds are done"),
    ]


def messages() -> Iterator[Case]:
    alice = identity(ALICE)
    given = {"peer": ALICE, "public": alice.public_key.public_bytes_raw(), "agreement_digest": DIGEST}
    for body in bodies():
        tail = TAIL if isinstance(body, m.UploadChunk | m.SumChunk) else b""
        yield case(type(body).__name__, "read_message", **given, data=m.encode(alice, AttemptId(*ATTEMPT), body, tail))
    yield case(
        "SealedSeeds of a dealer to a node that it is not linked to: no shares, nothing in the places of their digests",
        "read_message",
        **given,
        data=m.encode(
            alice, AttemptId(*ATTEMPT), m.SealedSeeds("hospital-01", H32, b"sealed seed", b"", None, None, None)
        ),
    )
    for count in (3, m.BATCH_MESSAGES):
        batch = [m.SealedSeeds(name, H32, b"sealed shares", b"", H32, H32, None) for name in named(count)]
        for place, data in enumerate(m.encode_together(alice, AttemptId(*ATTEMPT), batch)):
            if place in (0, count - 1):
                yield case(f"message {place + 1} of {count} under one signature", "read_message", **given, data=data)
    for why, data, change in (*_bad_messages(alice), *_bad_batches(alice)):
        yield refused("RemoteProtocolError", why, "read_message", **(given | {"data": data} | change))


def _bad_batches(alice: Identity) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each an honest batch of three but for what it says."""

    def unsigned(number: int, round_number: int = ATTEMPT[1]) -> list[Any]:
        return [m.VERSION, ATTEMPT[0], round_number, ATTEMPT[2], ALICE, ["RoundOpen", number]]

    def digest(number: int) -> bytes:
        return m.chunk_digest(Label.MESSAGE + packed(unsigned(number)))

    def made(signature: Any, head: list[Any] | None = None) -> bytes:
        data = packed([*(unsigned(1) if head is None else head), signature])
        return len(data).to_bytes(4) + data

    def signed(digests: list[bytes], label: Label = Label.MESSAGE_BATCH) -> list[Any]:
        return [alice.sign(label, packed(digests)), digests]

    digests = [digest(number) for number in (1, 2, 3)]
    signature, _ = good = signed(digests)
    bare = m.chunk_digest(packed(unsigned(1)))
    for bad, why in (
        (signed([digest(2), digest(3)]), "a message that is not in it"),
        (signed([bare, *digests[1:]]), "a digest without the label"),
        (signed([]), "of none"),
        (signed([digest(1)]), "of one message"),
        (signed([digest(number) for number in range(17)]), "of 17 messages"),
        (signed([digest(1), digest(1)]), "of one message twice"),
        (signed([digest(1), digest(2), digest(2)]), "with another message twice"),
        (signed([digest(1), digest(2)[1:]]), "with a digest of 31 bytes"),
        (signed(digests, Label.MESSAGE), "signed under the label of a message alone"),
        ([alice.sign(Label.MESSAGE_BATCH, b"".join(digests)), digests], "signed as bytes, not as an array"),
        ([signature, digests[::-1]], "in another order than was signed"),
        ([signature, digests[:2]], "without one that was signed"),
        ([signature, [*digests, digest(4)]], "with one that was not signed"),
        ([bytes(64), digests], "with a signature of zeros"),
        ([signature[1:], digests], "with a signature of 63 bytes"),
        ([digests, signature], "the digests before the signature"),
        ([*good, None], "with a third field"),
        ([signature], "without its digests"),
        (signature, "the signature without the list"),
        (alice.sign(Label.MESSAGE_BATCH, packed(unsigned(1))), "its label over a message alone"),
    ):
        yield f"a batch: {why}", made(bad), {}
    yield "a batch: the message moved to another round", made(good, unsigned(1, ATTEMPT[1] + 1)), {}
    bob = identity("hospital-01")
    yield "a batch: another sender's key", made(good), {"public": bob.public_key.public_bytes_raw()}
    wide = made(good).replace(b"\x93\xc4\x20" + digests[0], b"\xdc\x00\x03\xc4\x20" + digests[0], 1)
    yield "a batch: not canonical, its list with a length of its own", (len(wide) - 4).to_bytes(4) + wide[4:], {}


def _bad_messages(alice: Identity) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    def framed(head: bytes, tail: bytes = b"") -> bytes:
        return len(head).to_bytes(4) + head + tail

    def made(body: list[Any], version: int = m.VERSION, tail: bytes = b"", label: Label = Label.MESSAGE) -> bytes:
        fields = [version, *ATTEMPT, ALICE, body]
        return framed(packed([*fields, alice.sign(label, packed(fields))]), tail)

    good = made(["RoundOpen", 1])
    bob = identity("hospital-01")
    fields = [m.VERSION, *ATTEMPT, ALICE, ["RoundOpen", 1]]
    signature = alice.sign(Label.MESSAGE, packed(fields))
    yield "an empty message", b"", {}
    yield "the length of the head is cut off", good[:3], {}
    yield "the last byte is missing", good[:-1], {}
    yield "a byte behind a message that has no tail", good + b"\0", {}
    yield "a byte behind the head's array, which the length counts", framed(good[4:] + b"\0"), {}
    yield "a head that is longer than the message", (len(good) + 96).to_bytes(4) + good[4:], {}
    yield "a length of 4 GiB", b"\xff" * 4 + good[4:], {}
    for version in (1, 3):
        yield f"version {version}, signed", made(["RoundOpen", 1], version), {}
    yield "another agreement than the pinned one", good, {"agreement_digest": COHORT}
    yield "a message of another sender than the peer", good, {"peer": "hospital-01"}
    yield "another sender's key", good, {"public": bob.public_key.public_bytes_raw()}
    for place, value, why in (
        (2, 4, "another round than the signed one (a replay)"),
        (3, 3, "another attempt than the signed one (a replay)"),
        (5, ["RoundOpen", 2], "another body than the signed one"),
        (5, ["Credit", 1], "another type of body than the signed one"),
    ):
        moved = [*fields[:place], value, *fields[place + 1 :]]
        yield why, framed(packed([*moved, signature])), {}
    yield "a signature of zeros", framed(packed([*fields, bytes(64)])), {}
    yield "a signature of 63 bytes", framed(packed([*fields, signature[:-1]])), {}
    yield "a signature for another purpose", made(["RoundOpen", 1], label=Label.RECEIPT), {}
    yield "an eighth field", framed(packed([*fields, signature, None])), {}
    for wide, narrow, why in (
        (b"\xce\x00\x00\x00\x03", b"\x03", "the round in five bytes instead of one"),
        (b"\xd9\x0bhospital-00", b"\xabhospital-00", "the sender with a length byte of its own"),
    ):
        head = good[4:].replace(narrow, wide, 1)
        yield f"not canonical: {why}", framed(head), {}
    unsigned = packed(fields).replace(b"\xabhospital-00", b"\xd9\x0bhospital-00", 1)
    resigned = alice.sign(Label.MESSAGE, b"\x97" + unsigned[1:])
    yield "not canonical, but signed as it is", framed(b"\x97" + unsigned[1:] + packed(resigned)), {}
    for body, why in (
        (["RoundOpen", 2**32], "a number of 33 bits"),
        (["RoundOpen"], "a field is missing"),
        (["RoundOpen", 1, 1], "a field too many"),
        (["roundopen", 1], "a type that there is not"),
        (["RoundOpen", "1"], "text where a number is due"),
        (["AttemptFailed", "x", 1], "a number where true or false is due"),
        (["UploadDone", H32, H32[1:], 0], "a digest of 31 bytes"),
        (["UploadDone", H32, H32, 2**61 - 1], "a tag that is no field element"),
        (["SurvivorVote", H32], "a signature of 32 bytes"),
        (["Unmasking", [["hospital-01", SHARE[1:]]], []], "a share of 32 bytes"),
        (["Unmasking", [["hospital-01", SHARE, 0]], []], "a triple where a pair is due"),
        (["RoundKeys", H32, H32, H32, H32, H32], "public keys of 32 bytes"),
        (["Complaint", "../hospital"], "a name that is none"),
        (["Declined", "two\nlines"], "text that is not printable ASCII"),
        (["AttemptOpen", ["x"] * 257], "257 names"),
    ):
        yield f"signed, but: {why}", made(body), {}
    for kind in ("UploadChunk", "SumChunk"):
        yield (
            f"{kind}: another tail than the signed one",
            made([kind, 0, m.chunk_digest(TAIL)], tail=TAIL[:-1] + b"!"),
            {},
        )
        yield f"{kind}: the tail is missing", made([kind, 0, m.chunk_digest(TAIL)]), {}
    yield "over 1 MiB and 64 KiB", {"bytes": good, "zeros": m.MESSAGE_LIMIT_BYTES - len(good) + 1}, {}
