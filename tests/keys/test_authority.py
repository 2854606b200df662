from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from keys import certificates, files
from keys.authority import ROOT_FILE, Authority
from keys.enrolment import group_digits, make_request, read_request
from keys.errors import KeyFileError, LocalProtocolError
from keys.identity import Identity, verify_signature
from keys.labels import Label
from keys.roster import load_root
from tests.keys.factory import NOW, enrol

AUTHORITY = Authority.create("Test authority", NOW)
IDENTITY = Identity.generate("hospital-a", "hospital")
REQUEST = read_request(make_request(IDENTITY))
DAY = timedelta(days=1)
CERTIFICATE = AUTHORITY.issue(REQUEST, NOW, NOW + DAY)


def test_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SCRYPT_LOG2_N", 14)
    AUTHORITY.save(tmp_path, b"passphrase")
    loaded = Authority.load(tmp_path, b"passphrase")
    assert loaded.fingerprint == AUTHORITY.fingerprint
    assert (tmp_path / ROOT_FILE).read_bytes() == loaded.root_pem == AUTHORITY.root_pem
    verify_signature(AUTHORITY.public_key, Label.AGREEMENT, b"data", loaded.sign(Label.AGREEMENT, b"data"))
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        Authority.load(tmp_path, b"another")


def test_leaf_has_the_documented_profile():
    assert CERTIFICATE.subject.rfc4514_string() == "CN=hospital-a,OU=hospital"
    assert CERTIFICATE.issuer == AUTHORITY.root.subject
    assert CERTIFICATE.public_key() == IDENTITY.public_key
    assert not CERTIFICATE.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = CERTIFICATE.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    serials = {AUTHORITY.issue(REQUEST, NOW, NOW + DAY).serial_number for _ in range(20)}
    assert len(serials) == 20
    assert all(serial.bit_length() > 100 for serial in serials)


def test_dates_lose_fractions_and_keep_their_instant():
    zone = timezone(timedelta(hours=5, minutes=30))
    begin, end = (NOW + timedelta(microseconds=999_999)).astimezone(zone), (NOW + DAY).astimezone(zone)
    certificate = AUTHORITY.issue(REQUEST, begin, end)
    assert certificate.not_valid_before_utc == NOW
    assert certificate.not_valid_after_utc == NOW + DAY
    assert certificates.validity_problem(certificate, NOW) is None
    assert certificates.validity_problem(certificate, NOW + DAY) is None
    assert "not valid before" in certificates.validity_problem(certificate, NOW - timedelta(seconds=1))
    assert "expired" in certificates.validity_problem(certificate, NOW + DAY + timedelta(seconds=1))


def test_the_present_is_the_default():
    root = Authority.create("x").root
    assert certificates.validity_problem(root, datetime.now(UTC)) is None


@pytest.mark.parametrize(
    ("begin", "end"),
    [(0 * DAY, 0 * DAY), (DAY, 0 * DAY), (-DAY, DAY), (0 * DAY, 4000 * DAY), (5000 * DAY, 5001 * DAY)],
)
def test_impossible_dates_are_refused(begin, end):
    with pytest.raises(KeyFileError, match="begin before it ends"):
        AUTHORITY.issue(REQUEST, NOW + begin, NOW + end)


def test_dates_without_a_zone_are_refused():
    naive = NOW.replace(tzinfo=None)
    for begin, end in ((naive, NOW + DAY), (NOW, naive + DAY)):
        with pytest.raises(LocalProtocolError, match="time zone"):
            AUTHORITY.issue(REQUEST, begin, end)
    with pytest.raises(LocalProtocolError, match="time zone"):
        Authority.create("x", naive)


def test_a_request_that_was_not_checked_is_checked():
    """`issue` does not rely on its caller to have used `read_request`."""
    other = read_request(make_request(Identity.generate("hospital-b", "hospital")))
    for change in ({"node_id": "hospital-b"}, {"public_key": other.public_key}, {"curve_public": other.curve_public}):
        with pytest.raises(KeyFileError, match="not signed"):
            AUTHORITY.issue(msgspec.structs.replace(REQUEST, **change), NOW, NOW + DAY)


@pytest.mark.parametrize("name", ["", "a" * 65, "line\nbreak", "\x1b[31mred", "\u202ereversed"])
def test_unprintable_names_are_refused(name):
    with pytest.raises(KeyFileError, match="printable"):
        Authority.create(name, NOW)


def test_key_and_root_must_belong_together():
    with pytest.raises(KeyFileError, match="do not belong together"):
        Authority(Ed25519PrivateKey.generate(), AUTHORITY.root)


def test_root_is_pinned_by_its_whole_fingerprint():
    pem, fingerprint = AUTHORITY.root_pem, AUTHORITY.fingerprint
    assert load_root(pem, fingerprint) == load_root(pem, group_digits(fingerprint).upper()) == AUTHORITY.root
    impostor = Authority.create("Test authority", NOW)
    with pytest.raises(KeyFileError, match="not the pinned one"):
        load_root(impostor.root_pem, fingerprint)
    for short in ("", fingerprint[:8], fingerprint[:-1]):
        with pytest.raises(KeyFileError, match="64 hexadecimal"):
            load_root(pem, short)
    for broken in (b"", pem + pem, pem + b"x", pem[:100]):
        with pytest.raises(KeyFileError):
            load_root(broken, fingerprint)


def test_a_leaf_is_no_root():
    with pytest.raises(KeyFileError):
        load_root(certificates.to_pem(CERTIFICATE), certificates.fingerprint(CERTIFICATE))


def check(certificate: x509.Certificate, node_id: str = "hospital-a", role: str = "hospital") -> None:
    certificates.check_leaf(certificate, AUTHORITY.root, node_id, role)


def test_leaf_of_another_authority_name_or_role_is_refused():
    check(CERTIFICATE)
    impostor = Authority.create("Test authority", NOW)
    assert impostor.root.subject == AUTHORITY.root.subject
    for certificate, node_id, role, reason in (
        (impostor.issue(REQUEST, NOW, NOW + DAY), "hospital-a", "hospital", "not signed by the pinned"),
        (Authority.create("Other", NOW).issue(REQUEST, NOW, NOW + DAY), "hospital-a", "hospital", "not issued by"),
        (CERTIFICATE, "hospital-b", "hospital", "does not name"),
        (CERTIFICATE, "hospital-a", "aggregator", "does not name"),
        (AUTHORITY.root, "hospital-a", "hospital", "does not name"),
    ):
        with pytest.raises(KeyFileError, match=reason):
            check(certificate, node_id, role)


def hostile_leaf(change) -> x509.Certificate:
    """A certificate that the authority's own key signed, outside the profile."""
    key, signer = IDENTITY.public_key, AUTHORITY._signing_key
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificates.leaf_name("hospital-a", "hospital"))
        .issuer_name(AUTHORITY.root.subject)
        .public_key(key)
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
    )
    extensions = [(e.value, e.critical) for e in certificates.leaf_extensions(key, signer.public_key())]
    builder, extensions = change(builder, extensions)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.sign(signer, None)


HOSTILE = {
    "a certificate authority": lambda b, e: (b, [(x509.BasicConstraints(ca=True, path_length=None), True), *e[1:]]),
    "constraints not critical": lambda b, e: (b, [(e[0][0], False), *e[1:]]),
    "no key usage": lambda b, e: (b, [e[0], *e[2:]]),
    "no extensions": lambda b, e: (b, []),
    "an extra name": lambda b, e: (b, [*e, (x509.SubjectAlternativeName([x509.DNSName("hospital-b")]), False)]),
    "an unknown critical extension": lambda b, e: (
        b,
        [*e, (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x"), True)],
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_certificates_outside_the_profile_are_refused(kind):
    with pytest.raises(KeyFileError, match="profile"):
        check(hostile_leaf(HOSTILE[kind]))


def test_the_profile_itself_passes():
    check(hostile_leaf(lambda builder, extensions: (builder, extensions)))


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_byte_of_a_certificate_is_guarded():
    der = certificates.to_der(CERTIFICATE)
    for position in range(len(der)):
        for change in (0x01, 0x20, 0x80, 0xFF):
            with pytest.raises(KeyFileError):
                check(certificates.from_der(der[:position] + bytes([der[position] ^ change]) + der[position + 1 :]))


def test_a_certificate_has_one_spelling():
    """The library takes any count of unused bits in the signature's bit string if they are 0: another fingerprint."""
    certificate = CERTIFICATE
    while certificate.signature[-1] & 1:
        certificate = AUTHORITY.issue(REQUEST, NOW, NOW + DAY)
    der = certificates.to_der(certificate)
    second = der[:-65] + b"\x01" + der[-64:]
    x509.load_der_x509_certificate(second).verify_directly_issued_by(AUTHORITY.root)
    with pytest.raises(KeyFileError, match="was changed"):
        certificates.from_der(second)


@given(st.binary(max_size=400))
def test_garbage_is_no_certificate(data):
    with pytest.raises(KeyFileError):
        certificates.from_der(data)
    with pytest.raises(KeyFileError):
        certificates.from_pem(data)


def test_a_key_of_another_kind_is_refused(tmp_path):
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = certificates.root_name("x")
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(NOW).not_valid_after(NOW + DAY)
    certificate = builder.sign(key, hashes.SHA256())
    with pytest.raises(KeyFileError, match="Ed25519"):
        load_root(certificates.to_pem(certificate), certificates.fingerprint(certificate))
    with pytest.raises(KeyFileError, match="Ed25519"):
        IDENTITY.install_certificate(certificates.to_pem(certificate))


def test_enrolled_certificate_matches(tmp_path):
    authority, identity = Authority.create("x", NOW - 30 * DAY), Identity.generate("hospital-z", "hospital")
    entry = enrol(authority, identity)
    assert entry.certificate == identity.certificate
    assert entry.certificate_fingerprint == identity.certificate_fingerprint
