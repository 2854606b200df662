"""round.json against the second implementation, step by step from the secrets, and its refusals against the real machines."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from tests.vectors import reference as ref
from tests.vectors import whole_round
from tests.vectors.codec import FILES, from_json, read
from tests.vectors.key_cases import Recorded, identity
from tests.vectors.reference_messages import read_message

RAW = read("round")
VECTOR = from_json(RAW)
NODES, LOST = VECTOR["nodes"], VECTOR["lost"]
NAMES = sorted(NODES)
ALIVE = [name for name in NAMES if name != LOST]
PAIRS = [(low, high) for low in NAMES for high in NAMES if low < high]
ATTEMPT = [VECTOR["agreement_digest"], VECTOR["round"], VECTOR["attempt"]]
COHORT = VECTOR["cohort_digest"]
RING = tomllib.loads(VECTOR["agreement"])["secure_sum"]
FIXED = ref.FixedPoint(RING["value_bits"], RING["fraction_bits"], RING["ring_bits"], len(NAMES))
SIZE = len(VECTOR["sum"])


def shares_of(name: str, secret: str) -> dict[str, bytes]:
    """Each holder's share; in a complete graph everybody holds one."""
    node = NODES[name]
    coefficients = [int.from_bytes(coin) % ref.FIELD for coin in node[f"{secret}_coins"]]
    assert len(coefficients) == RING["threshold"] - 1
    return dict(zip(NAMES, ref.split(node[secret], coefficients, len(NAMES)), strict=True))


def message(name: str, data: bytes) -> dict[str, Any]:
    return read_message(data, name, NODES[name]["identity_public"], VECTOR["agreement_digest"])


def derived(secret: bytes, label: str, *parts: Any) -> bytes:
    return ref.hkdf(secret, ref.bind(ATTEMPT, label, *parts))


def committed(label: str, *parts: Any) -> bytes:
    return ref.sha256(ref.bind(ATTEMPT, label, *parts))


def masks_of(name: str) -> tuple[list[bytes], list[bytes]]:
    """The keys of the masks that a node adds and subtracts."""
    added = [VECTOR["self_mask_keys"][name]]
    added += [VECTOR["pairs"][f"{low} {high}"]["pair_seed"] for low, high in PAIRS if low == name]
    return added, [VECTOR["pairs"][f"{low} {high}"]["pair_seed"] for low, high in PAIRS if high == name]


def test_agreement_and_round_keys() -> None:
    assert ref.sha256(ref.label("agreement"), VECTOR["agreement"].encode()) == VECTOR["agreement_digest"]
    for name, node in NODES.items():
        assert message(name, node["round_keys_message"])["body"] == [
            "RoundKeys",
            ref.public_key(node["share_master"], ATTEMPT),
            ref.public_key(node["pair_master"], ATTEMPT),
            committed("self-seed-commitment", name, node["self_seed"]),
            committed("tag-commitment", name, node["tag_seed"]),
            bytes(32),
        ]
    digests = {name: ref.sha256(node["round_keys_message"]) for name, node in NODES.items()}
    assert digests == VECTOR["keys_digests"]
    assert ref.cohort_digest(ATTEMPT, digests) == COHORT


def test_graph_and_dealers() -> None:
    assert ref.order(NAMES, COHORT) == VECTOR["order"] != NAMES
    assert VECTOR["dealers"] == VECTOR["order"][:3]
    assert VECTOR["tag_seed"] == NODES[VECTOR["dealers"][0]]["tag_seed"]
    assert committed("senders", COHORT, *VECTOR["senders"]) == VECTOR["view"]


def test_seeds_of_masks() -> None:
    for name, node in NODES.items():
        assert derived(node["self_seed"], "self-seed", name) == VECTOR["self_mask_keys"][name]
    for low, high in PAIRS:
        pair = VECTOR["pairs"][f"{low} {high}"]
        assert derived(NODES[low]["pair_master"], "pair-contribution", COHORT, low, high) == pair["contribution"]
        assert derived(pair["contribution"], "pair-seed", COHORT, low, high) == pair["pair_seed"]


def test_what_is_sealed() -> None:
    for entry in VECTOR["sealed"]:
        sender, recipient = entry["sender"], entry["recipient"]
        own, pair = shares_of(sender, "self_seed")[recipient], shares_of(sender, "pair_master")[recipient]
        match entry.get("key"):
            case "share":
                info = ref.bind(ATTEMPT, "seal-shares", COHORT, sender, recipient)
                dealt = NODES[sender]["tag_seed"] if sender in VECTOR["dealers"] else None
                plaintext = ref.packed([own, pair, dealt])
            case "pair":
                assert sender < recipient
                info = ref.bind(ATTEMPT, "seal-contribution", COHORT, sender, recipient)
                plaintext = VECTOR["pairs"][f"{sender} {recipient}"]["contribution"]
            case _:
                digests = [committed("share-digest", sender, recipient, share) for share in (own, pair)]
                linked = VECTOR["pairs"].get(f"{sender} {recipient}")
                digests.append(linked and committed("contribution-digest", sender, recipient, linked["contribution"]))
                assert entry["fields_after_the_seals"] == digests
                continue
        assert (entry["info"], entry["plaintext"]) == (info, plaintext)
        master = NODES[recipient][f"{entry['key']}_master"]
        assert ref.unseal(master, ATTEMPT, info, entry["sealed"]) == plaintext


@pytest.mark.parametrize("sender", NAMES)
def test_signed_seeds_can_be_made_again_from_their_parts(sender: str) -> None:
    """What a node seals goes out under one signature."""
    entries = [entry for entry in VECTOR["sealed"] if entry["sender"] == sender]
    messages = [entry for entry in entries if "message_digest" in entry]
    assert len(messages) == len(NAMES) - 1
    heads = []
    for entry in messages:
        names = (entry["sender"], entry["recipient"])
        seals = {e["key"]: e["sealed"] for e in entries if "key" in e and (e["sender"], e["recipient"]) == names}
        body = [
            "SealedSeeds",
            names[1],
            COHORT,
            seals["share"],
            seals.get("pair", b""),
            *entry["fields_after_the_seals"],
        ]
        heads.append([2, *ATTEMPT, sender, body])
    signing = identity(sender)._signing_key
    assert signing.private_bytes_raw() == NODES[sender]["identity_private"]
    digests = [ref.sha256(ref.label("message"), ref.packed(unsigned)) for unsigned in heads]
    signature = [signing.sign(ref.label("message-batch") + ref.packed(digests)), digests]
    for entry, unsigned in zip(messages, heads, strict=True):
        head = ref.packed([*unsigned, signature])
        assert ref.sha256(len(head).to_bytes(4), head) == entry["message_digest"]


@pytest.mark.parametrize("name", ALIVE)
def test_uploads(name: str) -> None:
    upload = VECTOR["uploads"][name]
    assert FIXED.encode(NODES[name]["update"]) == upload["encoded"]
    pad = ref.tag_pad(VECTOR["tag_seed"], ATTEMPT)
    tag = (ref.tag(VECTOR["tag_seed"], ATTEMPT, upload["encoded"]) + pad) % ref.TAG_PRIME
    assert tag.to_bytes(8) == upload["tag"]
    masked = ref.mask(upload["encoded"], *masks_of(name))
    assert ref.mask_tag(tag, *masks_of(name)).to_bytes(8) == upload["masked_tag"]
    chunk = ref.pack(masked, RING["ring_bits"])
    assert chunk == upload["chunk"]
    sent = message(name, upload["upload_chunk_message"])
    assert (sent["body"], sent["tail"]) == (["UploadChunk", 0, ref.sha256(chunk)], chunk)
    assert ref.sha256(ref.label("upload"), ref.sha256(chunk), upload["masked_tag"]) == upload["upload_digest"]
    done = message(name, upload["upload_done_message"])
    assert done["body"] == ["UploadDone", upload["upload_digest"], VECTOR["view"], int.from_bytes(upload["masked_tag"])]


def test_survivors_votes_and_revealed_shares() -> None:
    survivors = [[name, VECTOR["uploads"][name]["upload_digest"]] for name in ALIVE]
    assert survivors == VECTOR["survivors"]
    assert ref.packed([*ATTEMPT, VECTOR["view"], survivors]) == VECTOR["survivor_statement"]
    assert sorted(VECTOR["votes"]) == ALIVE
    for name, vote in VECTOR["votes"].items():
        assert ref.signed(NODES[name]["identity_public"], "survivors", VECTOR["survivor_statement"], vote)
    for holder, revealed in VECTOR["revealed"].items():
        assert revealed["self_shares"] == [[name, shares_of(name, "self_seed")[holder]] for name in ALIVE]
        assert revealed["pair_shares"] == [[LOST, shares_of(LOST, "pair_master")[holder]]]
    shown = VECTOR["revealed"]["hospital-00"]
    body = message("hospital-00", VECTOR["unmasking_message"])["body"]
    assert body == ["Unmasking", shown["self_shares"], shown["pair_shares"]]


def test_the_sum_from_uploads_and_revealed_shares_alone() -> None:
    def recovered(name: str, kind: str) -> bytes:
        shares = [(NAMES.index(holder), dict(given[kind])[name]) for holder, given in VECTOR["revealed"].items()]
        secret = ref.combine(shares[: RING["threshold"]], RING["threshold"])
        assert secret is not None
        return secret

    uploads = [ref.unpack(upload["chunk"], SIZE, RING["ring_bits"]) for upload in VECTOR["uploads"].values()]
    total = [sum(column) % 2**32 for column in zip(*uploads, strict=True)]
    master = recovered(LOST, "pair_shares")
    assert master == NODES[LOST]["pair_master"]
    off, on = [derived(recovered(name, "self_shares"), "self-seed", name) for name in ALIVE], []
    for name in ALIVE:
        low, high = min(name, LOST), max(name, LOST)
        if low == LOST:
            contribution = derived(master, "pair-contribution", COHORT, low, high)
        else:
            names = (low, high, "pair")
            seal = next(e for e in VECTOR["sealed"] if (e["sender"], e["recipient"], e.get("key")) == names)
            contribution = ref.unseal(master, ATTEMPT, seal["info"], seal["sealed"])
        (off if name == low else on).append(derived(contribution, "pair-seed", COHORT, low, high))
    total = [value % 2 ** RING["ring_bits"] for value in ref.mask(total, on, off)]
    assert total == VECTOR["sum"]
    encoded = [upload["encoded"] for upload in VECTOR["uploads"].values()]
    assert VECTOR["sum"] == [sum(column) for column in zip(*encoded, strict=True)]
    assert ref.sha256(ref.label("aggregate"), ref.pack(total, 32)) == VECTOR["aggregate_digest"]
    assert FIXED.decode(VECTOR["sum"], len(ALIVE)) == VECTOR["decoded"]
    masked_tags = sum(int.from_bytes(upload["masked_tag"]) for upload in VECTOR["uploads"].values())
    announced = ref.mask_tag(masked_tags, on, off)
    assert announced.to_bytes(8) == VECTOR["aggregate_tag"]
    pads = len(VECTOR["uploads"]) * ref.tag_pad(VECTOR["tag_seed"], ATTEMPT)
    assert (ref.tag(VECTOR["tag_seed"], ATTEMPT, VECTOR["sum"]) + pads) % ref.TAG_PRIME == announced


@pytest.mark.parametrize("case", RAW["refused"], ids=lambda case: case["description"].replace(" ", "-"))
def test_refused(case: dict[str, Any]) -> None:
    recorded = Recorded()
    for name in FILES:
        recorded.learn(read(name))
    assert whole_round.replayed(recorded, case) == case["says"]
