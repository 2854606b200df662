import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from keys.errors import LocalProtocolError, VerificationFailed
from keys.identity import Identity, verify_signature
from keys.labels import Label
from keys.signed import sign_document, verify_document

GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
DOCUMENT = b"a document of no importance\n"


@pytest.fixture(scope="module")
def identity():
    return Identity.generate("hospital-a", "hospital")


@pytest.fixture(scope="module")
def sig_file(identity):
    return sign_document(identity.sign, Label.AGREEMENT, DOCUMENT)


def refuse(identity, document, sig_file, label=Label.AGREEMENT):
    with pytest.raises(VerificationFailed):
        verify_document(identity.public_key, label, document, sig_file)


def test_known_answer():
    """RFC 8032, section 7.1, TEST 1 signs the empty message; ours always has a label in front."""
    key = Ed25519PublicKey.from_public_bytes(
        bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    )
    signature = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    key.verify(signature, b"")
    with pytest.raises(VerificationFailed):
        verify_signature(key, Label.AGREEMENT, b"", signature)


def test_round_trip(identity, sig_file):
    assert len(sig_file) == 129
    verify_document(identity.public_key, Label.AGREEMENT, DOCUMENT, sig_file)


def test_any_other_value_of_any_byte_of_the_signature_file_is_refused(identity, sig_file):
    for position in range(len(sig_file)):
        for value in (*b"0123456789abcdefABCDEF \n\r\0", sig_file[position] ^ 0x80, sig_file[position] ^ 1):
            if value != sig_file[position]:
                refuse(identity, DOCUMENT, sig_file[:position] + bytes([value]) + sig_file[position + 1 :])


def test_other_spellings_are_refused(identity, sig_file):
    raw = bytes.fromhex(sig_file.decode())
    for spelling in (
        raw,
        raw.hex().encode(),
        raw.hex().upper().encode() + b"\n",
        sig_file + b"\n",
        b" " + sig_file,
        sig_file[:-1] + b"\r\n",
        sig_file[:64] + b"\n" + sig_file[64:],
        sig_file * 2,
        b"",
    ):
        refuse(identity, DOCUMENT, spelling)


def test_every_byte_of_the_document_counts(identity, sig_file):
    for position in range(len(DOCUMENT)):
        refuse(identity, DOCUMENT[:position] + bytes([DOCUMENT[position] ^ 1]) + DOCUMENT[position + 1 :], sig_file)
    refuse(identity, DOCUMENT + b"\n", sig_file)
    refuse(identity, DOCUMENT[:-1], sig_file)


def test_label_and_key_count(identity, sig_file):
    for label in Label:
        if label is not Label.AGREEMENT:
            refuse(identity, DOCUMENT, sig_file, label)
    refuse(Identity.generate("hospital-a", "hospital"), DOCUMENT, sig_file)


def test_non_canonical_scalar_is_refused(identity, sig_file):
    """S and S + L make the same equation true; only the canonical one may pass (RFC 8032, section 5.1.7)."""
    raw = bytes.fromhex(sig_file.decode())
    scalar = int.from_bytes(raw[32:], "little") + GROUP_ORDER
    forged = raw[:32] + scalar.to_bytes(32, "little")
    refuse(identity, DOCUMENT, forged.hex().encode() + b"\n")


@pytest.mark.parametrize("length", [0, 1, 32, 63, 65, 128])
def test_wrong_length_is_a_failed_verification(identity, length):
    with pytest.raises(VerificationFailed):
        verify_signature(identity.public_key, Label.MESSAGE, b"data", bytes(length))


def test_a_label_outside_the_registry_is_refused(identity):
    with pytest.raises(LocalProtocolError):
        identity.sign(b"secgeo/message/v1\0", b"data")


def test_no_label_is_a_prefix_of_another():
    labels = [bytes(label) for label in Label]
    assert all(label.endswith(b"\0") and label.count(b"\0") == 1 for label in labels)
    assert not any(a != b and a.startswith(b) for a in labels for b in labels)
