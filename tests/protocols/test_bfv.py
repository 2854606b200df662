"""BFV sums: exact at the largest number of members, closed without the key, and out of reach of the library's known crashers."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from keys.errors import ConfigError, LocalProtocolError
from protocols import bfv, packing
from protocols import ciphertexts as c
from protocols.packing import DEGREE, NOISE_COINS, PARAMETERS, BfvParameters, choose

each = pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: f"{p.prime_bits} bits")


@pytest.fixture(params=["views", "files"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways to the library's words; the second as if the self-test had failed."""
    if request.param == "files":
        monkeypatch.setattr(bfv, "views_hold", lambda *_: False)
    return request.param


def ramp(parameters: BfvParameters, count: int = 2, seed: int = 0) -> np.ndarray:
    top = 1 << parameters.plain_bits
    found = np.random.default_rng(seed).integers(0, top, (count, DEGREE), dtype=np.uint64)
    found[0, :2], found[-1, -1] = [0, top - 1], top - 1
    return found


def test_the_self_test_chooses_views_here_and_files_under_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(bfv._Seal(PARAMETERS[0]).buffers) is bfv.Views
    monkeypatch.setattr(bfv, "TENSEAL_VERSION", "0.3.17")
    assert type(bfv._Seal(PARAMETERS[0]).buffers) is bfv.Files
    expander = bfv.Expander(PARAMETERS[0])
    assert expander._half == expander._sample  # Lists hold here, and are what the tests of files go through.


@pytest.mark.parametrize("kind", ["Plaintext", "Ciphertext", "SerializableCiphertext"])
def test_the_self_test_notices_views_of_something_else(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A layout by which the words of an object would be looked for elsewhere, in memory that is ours."""
    elsewhere = np.zeros(2 * DEGREE, dtype=np.uint64)
    view = bfv._view

    def wrong(item: object, where: tuple[int, int]) -> np.ndarray:
        return elsewhere[: view(item, where).size] if type(item).__name__ == kind else view(item, where)

    monkeypatch.setattr(bfv, "_view", wrong)
    assert type(bfv._Seal(PARAMETERS[0]).buffers) is bfv.Files


@each
def test_a_key_is_told_from_what_is_none(parameters: BfvParameters, way: str) -> None:
    """Constants, coefficients of 2, any words. The negative of a key is one."""
    keys = [bfv.generate_key(parameters) for _ in range(20)]
    assert all(bfv.is_key(parameters, key) for key in keys)
    words, top = c.unpack_words(keys[0], parameters, 1), np.uint64(parameters.prime)
    assert bfv.is_key(parameters, c.pack_words(top - words, parameters))
    random = np.random.default_rng(0).integers(0, parameters.prime, (1, DEGREE), dtype=np.uint64)
    weak = [np.full_like(words, value) for value in (0, 1, parameters.prime - 1)]
    for bad in (*weak, random, (words + words) % top):
        assert not bfv.is_key(parameters, c.pack_words(bad, parameters))
    for data in (b"", keys[0][:-1], keys[0] + b"\0", b"\xff" * len(keys[0])):
        assert not bfv.is_key(parameters, data)


def test_parameters_of_less_than_128_bits_are_refused_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prime that the library takes is within the standard at this degree, so the standard is changed."""
    monkeypatch.setattr(packing, "STANDARD", {40: 128})
    with pytest.raises(ConfigError, match="less than 128 bits"):
        bfv.generate_key(PARAMETERS[0])


@each
def test_what_is_encrypted_is_decrypted(parameters: BfvParameters, way: str) -> None:
    key = bfv.generate_key(parameters)
    packed = ramp(parameters)
    data = bfv.Encryptor(parameters, key).encrypt(packed)
    assert len(data) == c.upload_bytes(parameters, 2)
    words = bfv.Expander(parameters).expand(data)
    assert np.array_equal(bfv.Decryptor(parameters, key).decrypt(words), packed)


def test_both_ways_make_and_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = PARAMETERS[0]
    key, packed = bfv.generate_key(parameters), ramp(PARAMETERS[0])
    data = bfv.Encryptor(parameters, key).encrypt(packed)
    words = bfv.Expander(parameters).expand(data)
    monkeypatch.setattr(bfv, "views_hold", lambda *_: False)
    assert np.array_equal(bfv.Expander(parameters).expand(data), words)
    assert np.array_equal(bfv.Decryptor(parameters, key).decrypt(words), packed)
    again = bfv.Expander(parameters).expand(bfv.Encryptor(parameters, key).encrypt(packed))
    assert np.array_equal(bfv.Decryptor(parameters, key).decrypt(again), packed)


@each
def test_both_ways_give_the_same_for_any_seed_and_any_words(
    parameters: BfvParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of words that nobody encrypted too: garbage, and the same garbage. Noise that is nearly q / 2t may be rounded either way."""
    generator, key, count = np.random.default_rng(5), bfv.generate_key(parameters), 20
    halves = generator.integers(0, parameters.prime, (count, DEGREE), dtype=np.uint64)
    data = b"".join(c.pack_words(half, parameters) + generator.bytes(c.SEED_BYTES) for half in halves)
    found = []
    for files in (False, True):
        if files:
            monkeypatch.setattr(bfv, "views_hold", lambda *_: False)
        words = bfv.Expander(parameters).expand(data)
        found.append((words, bfv.Decryptor(parameters, key).decrypt(words)))
    assert np.array_equal(found[0][0], found[1][0])
    apart = found[0][1] - found[1][1] & np.uint64((1 << parameters.plain_bits) - 1)
    assert set(np.unique(apart).tolist()) <= {0, 1, (1 << parameters.plain_bits) - 1}
    assert np.count_nonzero(apart) < apart.size / 200


def test_a_version_whose_lists_are_others_is_read_through_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = PARAMETERS[0]
    data = bfv.Encryptor(parameters, bfv.generate_key(parameters)).encrypt(ramp(parameters))
    words = bfv.Expander(parameters).expand(data)
    monkeypatch.setattr(bfv, "views_hold", lambda *_: False)
    monkeypatch.setattr(bfv, "sample_poly_uniform", lambda *_: [1] * DEGREE)
    assert np.array_equal(bfv.Expander(parameters).expand(data), words)


@pytest.mark.parametrize(("value_bits", "n_max"), [(16, 128), (18, 128), (22, 64), (28, 15)])
def test_sums_are_exact_at_the_most_members_and_the_largest_values(value_bits: int, n_max: int, way: str) -> None:
    packing = choose(value_bits, n_max)
    parameters, size = packing.parameters, packing.block_values + 100
    key = bfv.generate_key(parameters)
    encryptor, expander = bfv.Encryptor(parameters, key), bfv.Expander(parameters)
    generator = np.random.default_rng(0)
    expected, total = np.zeros(size, np.uint64), np.zeros((2, 2, DEGREE), np.uint64)
    for index in range(n_max):
        values = generator.integers(0, 2**value_bits, size, dtype=np.uint32)
        values[: size // 2] = 2**value_bits - 1
        values[index] = 0
        expected += values
        c.add(total, expander.expand(encryptor.encrypt(packing.pack(values))), parameters)
    decrypted = packing.unpack(bfv.Decryptor(parameters, key).decrypt(total), size)
    assert np.array_equal(decrypted, expected)


@each
def test_fresh_noise_is_a_centred_binomial_of_42_coins(parameters: BfvParameters) -> None:
    """Where q / t is just below 2, half of the noise e is all that is left of an encryption of zero, rounded away from it."""
    bare = BfvParameters(parameters.prime, parameters.prime_bits - 1)
    key, count = bfv.generate_key(bare), 40
    words = bfv.Expander(bare).expand(bfv.Encryptor(bare, key).encrypt(np.zeros((count, DEGREE), np.uint64)))
    halved = bfv.Decryptor(bare, key).decrypt(words).astype(np.int64)
    halved[halved > 1 << bare.plain_bits - 1] -= 1 << bare.plain_bits
    noise = np.arange(-NOISE_COINS // 2, NOISE_COINS // 2 + 1)
    ways = np.array([math.comb(NOISE_COINS, int(e) + NOISE_COINS // 2) for e in noise]) / 2.0**NOISE_COINS
    expected = np.sign(noise) * (abs(noise) + 1 >> 1)
    assert abs(halved).max() <= expected.max()
    for value in range(-3, 4):
        share = float((halved == value).mean())
        assert share == pytest.approx(float(ways[expected == value].sum()), abs=0.01)
    assert float(halved.var()) == pytest.approx(float((ways * expected**2).sum()), rel=0.03)


@each
@pytest.mark.parametrize("sign", [1, -1])
def test_noise_up_to_the_bound_is_rounded_away_and_twice_as_much_is_not(
    parameters: BfvParameters, way: str, sign: int
) -> None:
    """Of one ciphertext and two plaintexts: fresh noise is at most 21, and each of the three is rounded once."""
    key, packed, more = bfv.generate_key(parameters), ramp(parameters), ramp(parameters, seed=1)
    expander, decryptor = bfv.Expander(parameters), bfv.Decryptor(parameters, key)
    words = expander.expand(bfv.Encryptor(parameters, key).encrypt(packed))
    expander.add_plain(words, more)
    expected = packed + more & np.uint64((1 << parameters.plain_bits) - 1)
    noise = int(parameters.prime / (1 << parameters.plain_bits + 1) - 3 / 2) - NOISE_COINS // 2
    step = np.zeros((2, 2, DEGREE), np.uint64)
    step[:, 0] = sign * noise % parameters.prime
    c.add(words, step, parameters)
    assert np.array_equal(decryptor.decrypt(words), expected)
    c.add(words, step, parameters)
    assert np.count_nonzero(decryptor.decrypt(words) == expected) == 0


@each
def test_a_sum_wraps_around_t_without_harm(parameters: BfvParameters, way: str) -> None:
    """Uniform masks add up beyond t; the ciphertext's own modulus swallows what wraps."""
    key = bfv.generate_key(parameters)
    encryptor, expander = bfv.Encryptor(parameters, key), bfv.Expander(parameters)
    total, expected = np.zeros((2, 2, DEGREE), np.uint64), np.zeros((2, DEGREE), np.uint64)
    for index in range(100):
        packed = ramp(parameters, seed=index)
        expected += packed
        c.add(total, expander.expand(encryptor.encrypt(packed)), parameters)
    expected &= np.uint64((1 << parameters.plain_bits) - 1)
    assert np.array_equal(bfv.Decryptor(parameters, key).decrypt(total), expected)


@each
def test_a_plaintext_is_added_without_the_key(parameters: BfvParameters, way: str) -> None:
    key = bfv.generate_key(parameters)
    packed, more = ramp(parameters), ramp(parameters, seed=1)
    expander = bfv.Expander(parameters)
    words = expander.expand(bfv.Encryptor(parameters, key).encrypt(packed))
    expander.add_plain(words, more)
    expected = packed + more & np.uint64((1 << parameters.plain_bits) - 1)
    assert np.array_equal(bfv.Decryptor(parameters, key).decrypt(words), expected)


@each
def test_another_key_decrypts_to_garbage(parameters: BfvParameters, way: str) -> None:
    packed = np.zeros((1, DEGREE), np.uint64)
    words = bfv.Expander(parameters).expand(bfv.Encryptor(parameters, bfv.generate_key(parameters)).encrypt(packed))
    decrypted = bfv.Decryptor(parameters, bfv.generate_key(parameters)).decrypt(words)
    assert abs(float(decrypted.mean()) / 2**parameters.plain_bits - 0.5) < 0.05
    assert np.count_nonzero(decrypted) > DEGREE - 10


def test_two_encryptions_of_one_plaintext_have_nothing_in_common() -> None:
    parameters = PARAMETERS[0]
    encryptor = bfv.Encryptor(parameters, bfv.generate_key(parameters))
    packed = np.zeros((2, DEGREE), np.uint64)
    words, seeds = c.unpack_upload(encryptor.encrypt(packed) + encryptor.encrypt(packed), parameters)
    halves = words[:, 0]
    assert len(set(seeds)) == 4
    for index in range(4):
        assert abs(float(halves[index].mean()) / parameters.prime - 0.5) < 0.05
        for other in range(index):
            assert np.count_nonzero(halves[index] == halves[other]) == 0


def test_keys_differ_and_are_not_shown() -> None:
    parameters = PARAMETERS[0]
    keys = {bfv.generate_key(parameters) for _ in range(4)}
    assert len(keys) == 4
    for key in keys:
        assert len(key) == c.half_bytes(parameters)
        for holder in (bfv.Encryptor(parameters, key), bfv.Decryptor(parameters, key)):
            assert "redacted" in repr(holder)


@pytest.mark.parametrize("change", [lambda key: key[:-1], lambda key: key + b"\0", lambda key: b"\xff" * len(key)])
def test_broken_keys_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    parameters = PARAMETERS[0]
    key = change(bfv.generate_key(parameters))
    for kind in (bfv.Encryptor, bfv.Decryptor):
        with pytest.raises(c.FrameBroken):
            kind(parameters, key)


def test_a_coefficient_that_does_not_fit_is_not_encrypted() -> None:
    parameters = PARAMETERS[0]
    packed = np.zeros((1, DEGREE), np.uint64)
    packed[0, 7] = 1 << parameters.plain_bits
    with pytest.raises(LocalProtocolError, match="more than 46 bits"):
        bfv.Encryptor(parameters, bfv.generate_key(parameters)).encrypt(packed)


@pytest.mark.parametrize("prime", [(1 << 55) + 1, 0xFFFFFFFFFFBA003])
def test_parameters_that_the_library_refuses_are_an_error(prime: int) -> None:
    with pytest.raises(ConfigError, match="SEAL refuses"):
        bfv.generate_key(BfvParameters(prime, 46))


# --- hostile bytes

CRASHER = """
import sys, tenseal
context = tenseal.context(tenseal.SCHEME_TYPE.BFV, 4096, plain_modulus=1032193)
good = tenseal.bfv_vector(context, [1, 2])
vector = tenseal.bfv_vector_from(context, bytes.fromhex(sys.stdin.read()) or good.serialize())
print(sys.argv[1], flush=True)
good + vector if sys.argv[1] == "add" else vector.decrypt()
"""


def vector_bytes(size: int, ciphertext: bytes) -> bytes:
    """TenSEAL's message of a vector: field 1 its sizes, field 2 its ciphertexts."""

    def number(value: int) -> bytes:
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + number(rest) if rest else bytes([low])

    sizes = number(size)
    return (
        b"\x0a" + number(len(sizes)) + sizes + (b"\x12" + number(len(ciphertext)) + ciphertext if ciphertext else b"")
    )


def one_ciphertext() -> bytes:
    import tenseal

    context = tenseal.context(tenseal.SCHEME_TYPE.BFV, 4096, plain_modulus=1032193)
    data = tenseal.bfv_vector(context, [1, 2]).serialize()
    return data[data.index(b"\x5e\xa1") :]


def test_the_library_falls_over_two_vectors_that_our_framing_never_lets_near_it() -> None:
    """A list of sizes with no ciphertext, and a huge size with one: segmentation faults of the library, errors of ours."""
    for data, use in ((vector_bytes(2, b""), "add"), (vector_bytes(2**31 - 1, one_ciphertext()), "decrypt")):
        done = subprocess.run(
            [sys.executable, "-c", CRASHER, use], input=data.hex(), capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (-11, f"{use}\n")
        for parameters in PARAMETERS:
            with pytest.raises(c.FrameBroken):
                bfv.Expander(parameters).expand(data)


@each
def test_any_seed_and_any_words_expand(parameters: BfvParameters, way: str) -> None:
    generator = random.Random(3)  # noqa: S311
    expander = bfv.Expander(parameters)
    for seed in (bytes(64), b"\xff" * 64, *(generator.randbytes(64) for _ in range(20))):
        words = expander.expand(bytes(c.half_bytes(parameters)) + seed)
        assert words.shape == (1, 2, DEGREE)
        assert not words[0, 0].any()
        assert int(words.max()) < parameters.prime
        assert np.unique(words[0, 1]).size > DEGREE - 5
    assert expander.expand(b"").shape == (0, 2, DEGREE)
