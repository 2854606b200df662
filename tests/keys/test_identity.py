import base64
import copy
import json
import logging
import pickle
import pprint
import reprlib
import stat
from datetime import timedelta

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from nacl.bindings import crypto_core_ed25519_add

from keys import certificates, files
from keys.authority import Authority
from keys.enrolment import make_request, read_request
from keys.errors import KeyFileError, LocalProtocolError, VerificationFailed
from keys.identity import CERTIFICATE_FILE, KEY_FILE, Identity, check_curve_public, load_signing_key, verify_signature
from keys.labels import Label
from tests.keys.factory import NOW, enrol

GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
SMALL_ORDER_EDWARDS = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]
SMALL_ORDER_MONTGOMERY = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
NOT_CANONICAL = [
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "f0ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.fixture
def identity():
    return Identity.generate("hospital-a", "hospital")


@pytest.fixture
def authority():
    return Authority.create("Test authority", NOW - timedelta(days=30))


def spellings(secret: bytes) -> list[str]:
    return [
        secret.hex(),
        secret.hex().upper(),
        base64.b64encode(secret).decode(),
        repr(secret),
        repr(list(secret))[1:-1],
    ]


def test_round_trip(tmp_path, identity, authority):
    enrol(authority, identity)
    identity.save(tmp_path / "node", None)
    loaded = Identity.load(tmp_path / "node", None)
    for name in ("node_id", "role", "public_key", "curve_public", "curve_secret", "curve_binding", "certificate"):
        assert getattr(loaded, name) == getattr(identity, name)
    assert loaded.certificate_fingerprint == identity.certificate_fingerprint
    verify_signature(identity.public_key, Label.MESSAGE, b"data", loaded.sign(Label.MESSAGE, b"data"))


def test_files_are_private(tmp_path, identity, authority, monkeypatch):
    monkeypatch.setattr(files, "SCRYPT_LOG2_N", 14)
    identity.save(tmp_path / "node", b"passphrase")
    authority.save(tmp_path / "authority", b"passphrase")
    for directory, name in (("node", KEY_FILE), ("authority", "authority.key")):
        assert stat.S_IMODE((tmp_path / directory).stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / directory / name).stat().st_mode) == 0o600
    assert Identity.load(tmp_path / "node", b"passphrase").curve_secret == identity.curve_secret
    with pytest.raises(KeyFileError, match="exists already"):
        Identity.generate("hospital-a", "hospital").save(tmp_path / "node", None)


def test_certificate_arrives_later(tmp_path, identity, authority):
    identity.save(tmp_path, None)
    assert Identity.load(tmp_path, None).certificate is None
    with pytest.raises(KeyFileError, match="no certificate"):
        _ = identity.certificate_fingerprint
    with pytest.raises(KeyFileError, match="no certificate"):
        identity.save_certificate(tmp_path)
    enrol(authority, identity)
    identity.save_certificate(tmp_path)
    assert Identity.load(tmp_path, None).certificate_fingerprint == identity.certificate_fingerprint


def test_certificate_of_another_key_name_or_role_is_refused(tmp_path, identity, authority):
    for node_id, role in (("hospital-a", "hospital"), ("hospital-b", "hospital"), ("hospital-a", "aggregator")):
        other = Identity.generate(node_id, role)
        enrol(authority, other)
        with pytest.raises(KeyFileError):
            identity.install_certificate(certificates.to_pem(other.certificate))
        assert identity.certificate is None
        identity_files = tmp_path / f"{node_id}-{role}"
        identity.save(identity_files, None)
        other.save_certificate(identity_files)
        with pytest.raises(KeyFileError):
            Identity.load(identity_files, None)


def test_certificate_of_our_key_under_another_name_is_refused(identity, authority):
    for node_id, role in (("hospital-b", "hospital"), ("hospital-a", "aggregator")):
        alias = Identity(node_id, role, identity._signing_key, identity._curve_key)
        enrol(authority, alias)
        with pytest.raises(KeyFileError, match="does not name"):
            identity.install_certificate(certificates.to_pem(alias.certificate))


def test_certificate_file_holds_one_certificate_and_nothing_else(identity, authority):
    enrol(authority, identity)
    pem = certificates.to_pem(identity.certificate)
    for text in (b"", pem + pem, pem + b"\n", b"comment\n" + pem, pem[:-30], pem.replace(b"\n", b"\r\n"), pem * 100):
        with pytest.raises(KeyFileError):
            identity.install_certificate(text)


def test_one_key_file_does_not_pass_for_the_other(tmp_path, identity, authority):
    authority.save(tmp_path, None)
    (tmp_path / "authority.key").rename(tmp_path / KEY_FILE)
    with pytest.raises(KeyFileError, match="not the key file of a node"):
        Identity.load(tmp_path, None)
    (tmp_path / KEY_FILE).unlink()
    identity.save(tmp_path, None)
    (tmp_path / KEY_FILE).rename(tmp_path / "authority.key")
    with pytest.raises(KeyFileError, match="not the key file of an authority"):
        Authority.load(tmp_path, None)
    assert not (tmp_path / CERTIFICATE_FILE).exists()


@pytest.mark.parametrize(
    "secret", [b"", b"\xc0", bytes(100), msgspec.msgpack.encode(("identity", "a", "hospital", b"", b""))]
)
def test_damaged_content_is_refused(tmp_path, secret):
    files.write_secret(tmp_path / KEY_FILE, secret, None)
    files.write_secret(tmp_path / "authority.key", secret, None)
    for load in (Identity.load, Authority.load):
        with pytest.raises(KeyFileError):
            load(tmp_path, None)


@pytest.mark.parametrize("kind", ["identity", "authority"])
def test_secrets_do_not_show(kind, identity, authority, caplog):
    holder = {"identity": identity, "authority": authority}[kind]
    secrets = [holder._signing_key.private_bytes_raw()]
    if kind == "identity":
        secrets.append(identity.curve_secret)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").info("%s %r %s", holder, holder, [holder])
    with pytest.raises(KeyFileError) as error:
        Identity.generate("no such name", "hospital")
    shown = "".join(
        [
            *(
                repr(holder),
                str(holder),
                f"{holder}",
                f"{holder!r:>80}",
                ascii(holder),
                repr([holder]),
                repr({1: holder}),
            ),
            *(pprint.pformat(holder), reprlib.repr(holder), caplog.text, str(error.value)),
            *(str(getattr(holder, name)) for name in holder.__slots__),
        ]
    )
    for secret in secrets:
        assert not any(spelling in shown for spelling in spellings(secret))
    with pytest.raises(TypeError):
        vars(holder)


@pytest.mark.parametrize("kind", ["identity", "authority"])
def test_no_pickle_copy_or_serialisation(kind, identity, authority):
    holder = {"identity": identity, "authority": authority}[kind]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(LocalProtocolError):
            pickle.dumps(holder, protocol)
        with pytest.raises(LocalProtocolError):
            pickle.dumps({"nested": [holder]}, protocol)
    for duplicate in (copy.copy, copy.deepcopy):
        with pytest.raises(LocalProtocolError):
            duplicate(holder)
    for encode in (json.dumps, msgspec.json.encode, msgspec.msgpack.encode):
        with pytest.raises(TypeError):
            encode(holder)


def test_public_files_hold_no_secret(tmp_path, identity, authority):
    enrol(authority, identity)
    identity.save(tmp_path, None)
    authority.save(tmp_path, None)
    public = make_request(identity) + (tmp_path / CERTIFICATE_FILE).read_bytes() + (tmp_path / "root.pem").read_bytes()
    for secret in (
        identity.curve_secret,
        identity._signing_key.private_bytes_raw(),
        authority._signing_key.private_bytes_raw(),
    ):
        assert not any(spelling in public.decode() for spelling in spellings(secret))


@pytest.mark.parametrize(
    "node_id",
    ["", "-a", "A", "a_b", "a\n", "a b", "a/b", "..", "é", "a" * 64, "a\0", "<script>", "a.b"],
)
def test_unsafe_names_are_refused(node_id):
    with pytest.raises(KeyFileError):
        Identity.generate(node_id, "hospital")


def test_roles():
    with pytest.raises(KeyFileError):
        Identity.generate("a", "authority")
    with pytest.raises(KeyFileError):
        Identity.generate("aggregator", "hospital")
    assert Identity.generate("a" * 63, "aggregator").role == "aggregator"


def test_no_string_is_a_signature_of_everything():
    """Under the neutral point as a key, OpenSSL takes one fixed string for a signature of all data."""
    neutral = bytes.fromhex(SMALL_ORDER_EDWARDS[0])
    key, signature = Ed25519PublicKey.from_public_bytes(neutral), neutral + bytes(32)
    for data in (b"one", b"two"):
        key.verify(signature, data)
        with pytest.raises(VerificationFailed):
            verify_signature(key, Label.RECEIPT, data, signature)


def test_a_signature_has_one_encoding(identity):
    signature = identity.sign(Label.RECEIPT, b"data")
    verify_signature(identity.public_key, Label.RECEIPT, b"data", signature)
    s = int.from_bytes(signature[32:], "little")
    beyond = (s + GROUP_ORDER).to_bytes(32, "little")
    for changed in (signature[:32] + beyond, signature[:63], signature + b"\0", b"", signature[1:] + signature[:1]):
        with pytest.raises(VerificationFailed):
            verify_signature(identity.public_key, Label.RECEIPT, b"data", changed)
    with pytest.raises(VerificationFailed):  # a longer signature does not eat into what was signed
        verify_signature(identity.public_key, Label.RECEIPT, b"ta", signature + Label.RECEIPT + b"da")


def test_a_signing_key_of_mixed_order_is_refused(identity):
    of_order_eight = bytes.fromhex(SMALL_ORDER_EDWARDS[-1])
    with pytest.raises(KeyFileError):
        load_signing_key(crypto_core_ed25519_add(identity.public_key.public_bytes_raw(), of_order_eight))


@pytest.mark.parametrize("raw", [*SMALL_ORDER_EDWARDS, *NOT_CANONICAL, "", "00" * 31, "02" * 33])
def test_unusable_signing_keys_are_refused(raw):
    with pytest.raises(KeyFileError):
        load_signing_key(bytes.fromhex(raw))


@pytest.mark.parametrize(
    "raw", [*SMALL_ORDER_MONTGOMERY, *NOT_CANONICAL, "", "09" * 31, "09" * 33, "09" + "00" * 30 + "80"]
)
def test_unusable_curve_keys_are_refused(raw):
    with pytest.raises(KeyFileError):
        check_curve_public(bytes.fromhex(raw))


def test_good_public_keys_are_accepted():
    for _ in range(20):
        identity = Identity.generate("a", "hospital")
        assert load_signing_key(identity.public_key.public_bytes_raw()) == identity.public_key
        check_curve_public(identity.curve_public)
        read_request(make_request(identity))
