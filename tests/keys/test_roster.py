import hashlib
import json
from datetime import timedelta, timezone

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from keys import certificates
from keys.authority import ROOT_LIFETIME, Authority
from keys.enrolment import make_request, read_request
from keys.errors import KeyFileError, LocalProtocolError
from keys.identity import Identity, binding_bytes
from keys.labels import Label
from keys.roster import (
    ROSTER_LIMIT_BYTES,
    Roster,
    RosterEntry,
    add_entry,
    load_root,
    make_roster,
    read_roster,
    revoke,
)
from keys.signed import sign_document
from tests.keys.factory import NOW, enrol, make_consortium

HOSPITALS = ["hospital-a", "hospital-b", "hospital-c"]
C = make_consortium(HOSPITALS)
DAY = timedelta(days=1)


def read(document: bytes, signature: bytes, *, now=NOW, minimum=(0, 0)) -> Roster:
    return read_roster(document, signature, C.root, now=now, minimum=minimum)


def refuse(document: bytes, signature: bytes, reason: str | None = None, **options) -> None:
    with pytest.raises(KeyFileError, match=reason):
        read(document, signature, **options)


def signed(fields: object) -> tuple[bytes, bytes]:
    """A document in canonical form that the authority signed by mistake, whatever it says."""
    document = msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"
    return document, C.authority.sign_roster(document)


def fields() -> dict:
    return json.loads(C.document)


def entry(node_id: str) -> RosterEntry:
    return C.roster.entry(node_id)


def test_round_trip():
    roster = C.roster
    assert (roster.consortium, roster.epoch, roster.version) == ("Test consortium", 1, 1)
    assert [e.node_id for e in roster.hospitals] == HOSPITALS
    assert roster.aggregator.node_id == "aggregator"
    for name, identity in C.identities.items():
        listed = roster.entry(name)
        assert (listed.role, listed.public_key) == (identity.role, identity.public_key)
        assert listed.certificate_fingerprint == identity.certificate_fingerprint
        assert roster.curve_to_node[identity.curve_public] == name
    assert len(roster.curve_to_node) == 4
    assert roster.digest == hashlib.sha256(Label.ROSTER + C.document).digest()
    assert signed(fields()) == (C.document, C.signature)


def test_unknown_name():
    for name in ("hospital-z", "", "Hospital-a"):
        with pytest.raises(KeyFileError, match="not in the roster"):
            C.roster.entry(name)


def test_a_roster_cannot_be_changed():
    with pytest.raises(AttributeError):
        C.roster.epoch = 2
    C.roster.curve_to_node[bytes(32)] = "intruder"
    assert bytes(32) not in C.roster.curve_to_node
    assert C.roster.unusable == {}
    with pytest.raises(TypeError):
        C.roster.unusable["hospital-a"] = "no reason"


@pytest.mark.parametrize("bit", [0x01, 0x20, 0x80])
def test_sampled_bytes_of_the_document_are_guarded(bit):
    for position in range(0, len(C.document), 7):
        changed = C.document[:position] + bytes([C.document[position] ^ bit]) + C.document[position + 1 :]
        refuse(changed, C.signature, "not signed by the pinned authority")


def test_every_byte_of_the_signature_is_guarded():
    for position in range(len(C.signature)):
        refuse(C.document, C.signature[:position] + bytes([C.signature[position] ^ 1]) + C.signature[position + 1 :])


def test_who_may_sign():
    """A member, another authority of the same name, or our authority under another label: none of them."""
    impostor = Authority.create("Test authority", NOW)
    for signer, label in (
        (C.identities["hospital-a"].sign, Label.ROSTER),
        (impostor.sign, Label.ROSTER),
        (C.authority.sign, Label.AGREEMENT),
    ):
        refuse(C.document, sign_document(signer, label, C.document), "not signed by the pinned")


def test_whole_consortium_of_an_unknown_authority_is_refused():
    other = make_consortium(HOSPITALS)
    refuse(other.document, other.signature, "not signed by the pinned")
    with pytest.raises(KeyFileError):
        read_roster(C.document, C.signature, other.root, now=NOW)


def test_root_must_be_a_root():
    with pytest.raises(KeyFileError):
        read_roster(C.document, C.signature, entry("hospital-a").certificate, now=NOW)


def test_entry_of_another_authority_is_refused():
    mallory = Identity.generate("hospital-d", "hospital")
    foreign = enrol(Authority.create("Test authority", NOW - 30 * DAY), mallory)
    with pytest.raises(KeyFileError, match="not signed by the pinned authority"):
        make_roster(C.authority, "x", 1, 1, [*C.roster.listed, foreign])
    document = fields()
    document["entries"][1]["certificate"] = msgspec.to_builtins(certificates.to_der(foreign.certificate))
    document["entries"][1]["node_id"] = "hospital-a2"
    refuse(*signed(document), "does not name hospital-a2")
    document["entries"][1]["node_id"] = "hospital-d"
    document["entries"] = document["entries"][:2]
    refuse(*signed(document), "not signed by the pinned")


def test_self_issued_certificate_by_a_member_is_refused():
    """A leaf cannot act as an authority, even with the right issuer name."""
    member = C.identities["hospital-a"]
    stolen = Authority.create("Test authority", NOW - 30 * DAY)
    stolen._signing_key = member._signing_key
    foreign = RosterEntry.enrolled(
        request := read_request(make_request(Identity.generate("hospital-d", "hospital"))),
        stolen.issue(request, NOW, NOW + DAY),
    )
    with pytest.raises(KeyFileError, match="not signed by the pinned"):
        make_roster(C.authority, "x", 1, 1, [foreign])


@pytest.mark.parametrize("part", ["key", "binding", "both"])
def test_swapped_curve_keys_are_refused(part):
    document = fields()
    first, second = document["entries"][1], document["entries"][2]
    for name in {"key": ["curve_public"], "binding": ["curve_binding"], "both": ["curve_public", "curve_binding"]}[
        part
    ]:
        first[name], second[name] = second[name], first[name]
    refuse(*signed(document), "was not signed by its identity key")


def test_binding_of_another_name_or_role_is_refused():
    identity = C.identities["hospital-a"]
    for node_id, role in (("hospital-b", "hospital"), ("hospital-a", "aggregator")):
        binding = identity.sign(Label.CURVE_BINDING, binding_bytes(node_id, role, identity.curve_public))
        document = fields()
        document["entries"][1]["curve_binding"] = msgspec.to_builtins(binding)
        refuse(*signed(document), "was not signed by its identity key")


def test_curve_key_of_small_order_is_refused_though_its_owner_signed_it():
    low = bytes(32)
    binding = C.identities["hospital-a"].sign(Label.CURVE_BINDING, binding_bytes("hospital-a", "hospital", low))
    document = fields()
    document["entries"][1] |= {"curve_public": msgspec.to_builtins(low), "curve_binding": msgspec.to_builtins(binding)}
    refuse(*signed(document), "CURVE")


def second_identity(node_id: str, **keys) -> Identity:
    """A party that shares keys with hospital-a, or none."""
    own, a = Identity.generate(node_id, "hospital"), C.identities["hospital-a"]
    return Identity(
        node_id,
        "hospital",
        a._signing_key if "signing" in keys else own._signing_key,
        a._curve_key if "curve" in keys else own._curve_key,
    )


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (second_identity("hospital-a"), "node id"),
        (second_identity("hospital-d", signing=True), "identity key"),
        (second_identity("hospital-d", curve=True), "CURVE key"),
    ],
)
def test_duplicates_are_refused(other, reason):
    duplicate = enrol(C.authority, other)
    with pytest.raises(KeyFileError, match=f"share one {reason}"):
        make_roster(C.authority, "x", 1, 1, [*C.roster.listed, duplicate])


def issue_unchecked(node_id: str, key: Ed25519PublicKey, serial: int) -> x509.Certificate:
    """What `Authority.issue` would never issue."""
    signer = C.authority._signing_key
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificates.leaf_name(node_id, "hospital"))
        .issuer_name(C.root.subject)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
    )
    for extension in certificates.leaf_extensions(key, signer.public_key()):
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(signer, None)


def test_duplicate_serial_is_refused():
    """Else one revocation would hit two parties."""
    entries = []
    for name in ("hospital-d", "hospital-e"):
        identity = Identity.generate(name, "hospital")
        certificate = issue_unchecked(name, identity.public_key, 77)
        entries.append(RosterEntry.enrolled(read_request(make_request(identity)), certificate))
    make_roster(C.authority, "x", 1, 1, entries[:1])
    with pytest.raises(KeyFileError, match="share one certificate serial"):
        make_roster(C.authority, "x", 1, 1, entries)


def test_certified_key_of_small_order_is_refused():
    """Under it, the forged binding below is a good signature."""
    neutral = b"\1" + bytes(31)
    certificate = issue_unchecked("hospital-d", Ed25519PublicKey.from_public_bytes(neutral), 78)
    curve_public = Identity.generate("hospital-d", "hospital").curve_public
    forged = RosterEntry("hospital-d", "hospital", certificate, curve_public, neutral + bytes(32))
    with pytest.raises(KeyFileError, match="usable Ed25519"):
        make_roster(C.authority, "x", 1, 1, [forged])


def test_duplicate_id_in_a_signed_document_is_refused():
    document = fields()
    document["entries"].insert(1, document["entries"][1])
    refuse(*signed(document), "share one")


@pytest.mark.parametrize(("index", "role"), [(0, "hospital"), (1, "aggregator")])
def test_certificate_of_one_role_in_the_other_is_refused(index, role):
    document = fields()
    document["entries"][index]["role"] = role
    refuse(*signed(document))


def test_aggregators_certificate_under_a_hospitals_name():
    """The one attack that would let the aggregator count as a contributor."""
    document = fields()
    aggregator = document["entries"][0]
    document["entries"] = [aggregator, aggregator | {"node_id": "hospital-x", "role": "hospital"}]
    refuse(*signed(document), "does not name hospital-x")


def test_number_of_aggregators():
    only_hospitals = read(*make_roster(C.authority, "x", 1, 1, C.roster.hospitals))
    second = enrol(C.authority, Identity.generate("aggregator-2", "aggregator"))
    two = read(*make_roster(C.authority, "x", 1, 1, [*C.roster.listed, second]))
    for roster, count in ((only_hospitals, 0), (two, 2)):
        with pytest.raises(KeyFileError, match=f"{count} usable aggregators"):
            _ = roster.aggregator
    assert read(*revoke(C.authority, two, "aggregator")).aggregator.node_id == "aggregator-2"


def test_dates_of_the_root():
    root = C.root
    refuse(C.document, C.signature, "expired", now=root.not_valid_after_utc + timedelta(seconds=1))
    refuse(C.document, C.signature, "not valid before", now=root.not_valid_before_utc - timedelta(seconds=1))
    assert root.not_valid_after_utc - root.not_valid_before_utc > ROOT_LIFETIME


def assert_unusable(roster: Roster, node_id: str, reason: str) -> None:
    with pytest.raises(KeyFileError, match=reason):
        roster.entry(node_id)
    assert node_id not in [e.node_id for e in (*roster.usable, *roster.hospitals)]
    assert node_id not in roster.curve_to_node.values()
    assert C.identities[node_id].curve_public not in roster.curve_to_node


@pytest.mark.parametrize(("days", "reason"), [(-2, "not valid before"), (366, "expired")])
def test_entries_out_of_their_dates_are_unusable(days, reason):
    roster = read(C.document, C.signature, now=NOW + days * DAY)
    for name in HOSPITALS:
        assert_unusable(roster, name, reason)
    with pytest.raises(KeyFileError, match="0 usable"):
        _ = roster.aggregator


def test_one_lapsed_certificate_stops_only_its_owner():
    identity = Identity.generate("hospital-d", "hospital")
    request = read_request(make_request(identity))
    short = RosterEntry.enrolled(request, C.authority.issue(request, NOW - DAY, NOW + DAY))
    document, signature = add_entry(C.authority, C.roster, short)
    assert read(document, signature).entry("hospital-d").public_key == identity.public_key
    later = read(document, signature, now=NOW + 2 * DAY)
    with pytest.raises(KeyFileError, match="expired"):
        later.entry("hospital-d")
    assert [e.node_id for e in later.hospitals] == HOSPITALS
    renewed = RosterEntry.enrolled(request, C.authority.issue(request, NOW, NOW + 9 * DAY))
    again = read(*add_entry(C.authority, later, renewed, replace=True), now=NOW + 2 * DAY)
    assert again.entry("hospital-d").serial == renewed.serial


def test_clock_may_be_in_any_zone_but_must_have_one():
    read(C.document, C.signature, now=(NOW + timedelta(microseconds=5)).astimezone(timezone(timedelta(hours=-9))))
    with pytest.raises(LocalProtocolError, match="time zone"):
        read(C.document, C.signature, now=NOW.replace(tzinfo=None))


def test_revoked_entry_is_unusable_for_good():
    document, signature = revoke(C.authority, C.roster, "hospital-b")
    roster = read(document, signature)
    assert (roster.epoch, roster.version) == (2, 2)
    assert_unusable(roster, "hospital-b", "revoked")
    assert [e.node_id for e in roster.hospitals] == ["hospital-a", "hospital-c"]
    with pytest.raises(KeyFileError, match="revoked for good"):
        add_entry(C.authority, roster, entry("hospital-b"), replace=True)
    for name in ("hospital-b", "hospital-z"):
        with pytest.raises(KeyFileError, match="not listed, or is revoked"):
            revoke(C.authority, roster, name)
    next_one = read(*revoke(C.authority, roster, "hospital-c"))
    assert next_one.revoked == {entry("hospital-b").serial, entry("hospital-c").serial}


def test_rotation_takes_the_old_keys_out_of_use():
    new = Identity.generate("hospital-a", "hospital")
    new_entry = enrol(C.authority, new)
    with pytest.raises(KeyFileError, match="listed already"):
        add_entry(C.authority, C.roster, new_entry)
    roster = read(*add_entry(C.authority, C.roster, new_entry, replace=True))
    assert (roster.epoch, roster.version) == (2, 2)
    assert roster.entry("hospital-a").public_key == new.public_key
    assert C.identities["hospital-a"].curve_public not in roster.curve_to_node
    assert roster.revoked == {entry("hospital-a").serial}
    with pytest.raises(KeyFileError, match="revoked for good"):
        add_entry(C.authority, roster, entry("hospital-a"), replace=True)


def test_new_entry_raises_the_version_alone():
    newcomer = enrol(C.authority, Identity.generate("hospital-d", "hospital"))
    roster = read(*add_entry(C.authority, C.roster, newcomer))
    assert (roster.epoch, roster.version, len(roster.hospitals)) == (1, 2, 4)


def test_rollback_is_refused():
    revoked = revoke(C.authority, C.roster, "hospital-b")
    seen = read(*revoked, minimum=(1, 1))
    read(*revoked, minimum=(seen.epoch, seen.version))
    refuse(C.document, C.signature, "older than the last", minimum=(seen.epoch, seen.version))
    refuse(C.document, C.signature, "older than the last", minimum=(1, 2))
    refuse(C.document, C.signature, "older than the last", minimum=(2, 1))
    read(C.document, C.signature, minimum=(1, 1))


def mutations():
    def change(**new):
        return lambda d: d | new

    def change_entry(**new):
        return lambda d: d | {"entries": [d["entries"][0] | new, *d["entries"][1:]]}

    return {
        "unknown key": change(note="x"),
        "unknown key in an entry": change_entry(note="x"),
        "unknown format": change(format="secgeo-roster-v2"),
        "epoch 0": change(epoch=0),
        "version 0": change(version=0),
        "negative epoch": change(epoch=-1),
        "huge version": change(version=2**31),
        "version as text": change(version="1"),
        "fraction": change(version=1.5),
        "empty consortium": change(consortium=""),
        "long consortium": change(consortium="x" * 65),
        "control characters": change(consortium="a\u001b[31m"),
        "entries missing": lambda d: {k: v for k, v in d.items() if k != "entries"},
        "entries not sorted": lambda d: d | {"entries": d["entries"][::-1]},
        "keys in another order": lambda d: dict(reversed(d.items())),
        "unsafe name": change_entry(node_id="aggregator\n"),
        "unknown role": change_entry(role="authority"),
        "no certificate": change_entry(certificate=""),
        "not a certificate": change_entry(certificate="AAAA"),
        "huge certificate": change_entry(certificate="A" * 8192),
        "short CURVE key": change_entry(curve_public="AAAA"),
        "short binding": change_entry(curve_binding="AAAA"),
        "revoked twice": change(revoked=["1", "1"]),
        "revoked not sorted": change(revoked=["2", "1"]),
        "revoked with zeros": change(revoked=["01"]),
        "revoked in upper case": change(revoked=["AB"]),
        "revoked as a number": change(revoked=[1]),
        "a list": lambda d: [d],
        "nothing": lambda d: None,
    }


@pytest.mark.parametrize("kind", mutations())
def test_malformed_documents_are_refused_though_signed(kind):
    document = mutations()[kind](fields())
    refuse(*signed(document))


def test_other_spellings_are_refused_though_signed():
    compact = json.dumps(fields()).encode()
    twice = C.document.replace(b'"epoch": 1,', b'"epoch": 9,\n  "epoch": 1,')
    assert twice != C.document
    spellings = [C.document + b"\n", C.document + b"{}", C.document[:-1], compact, twice, b"\xef\xbb\xbf" + C.document]
    for document in (*spellings, b"", b"[" * 100_000):
        refuse(document, C.authority.sign_roster(document))


def test_size_is_bounded_before_anything_else():
    refuse(b" " * (ROSTER_LIMIT_BYTES + 1), b"", "at most")


@given(st.binary(max_size=300))
def test_garbage_is_refused_even_if_signed(data):
    refuse(data, C.authority.sign_roster(data))
    refuse(C.document, data)


def test_an_unsafe_roster_cannot_be_made():
    for consortium, epoch, version, revoked in (
        ("", 1, 1, []),
        ("x\n", 1, 1, []),
        ("x", 0, 1, []),
        ("x", 1, 0, []),
        ("x", 1, 1, ["XYZ"]),
    ):
        with pytest.raises(KeyFileError):
            make_roster(C.authority, consortium, epoch, version, C.roster.listed, revoked)


def test_a_large_consortium_fits():
    big = make_consortium([f"hospital-{i}" for i in range(64)])
    assert len(big.roster.hospitals) == 64
    assert load_root(big.authority.root_pem, big.authority.fingerprint) == big.root
