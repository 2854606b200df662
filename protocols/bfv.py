"""BFV by `tenseal.sealapi`: 4,096 coefficients, one symmetric ciphertext (DESIGN section 6). No other file imports tenseal.

Nothing that a peer made is parsed here but 64-byte seeds: words come checked from `protocols.ciphertexts`, and are put into objects that
were made on this machine. SEAL's own files hold sizes and types that crash it when they lie.

The library takes and gives data only as lists, element by element, or as files. Two ways around, the first if a self-test
at start passes:

* `Views`: numpy views of the library's buffers. They rest on the memory layout of one TenSEAL version;
* `Files`: the library's own files, in memory (memfd), which it compresses by Zstandard whether one wants it or not.

Where it has to be files, two things keep compression out of the way: seeds are expanded to lists, which takes less time, and what is
decrypted is made irregular first, since Zstandard gives up early on noise and works hardest on values that are half regular.

SEAL keeps Python's interpreter lock; use processes for more than one core. A wrong key decrypts to garbage without a word: the
callers bind key ids, and check tags.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import sys
from threading import Lock
from typing import Any, Protocol

import numpy as np
import tenseal
import zstandard
from tenseal import sealapi
from tenseal.sealapi.util import sample_poly_uniform

from keys.errors import ConfigError, LocalProtocolError
from protocols.ciphertexts import SEED_BYTES, FrameBroken, Words, add, pack_words, subtract, unpack_upload, unpack_words
from protocols.packing import DEGREE, BfvParameters, Uint64Matrix

TENSEAL_VERSION = "0.3.18"
SECURITY = {
    128: sealapi.SEC_LEVEL_TYPE.TC128,
    192: sealapi.SEC_LEVEL_TYPE.TC192,
    256: sealapi.SEC_LEVEL_TYPE.TC256,
}

# SEAL's file format, version 4.3: header (magic, header bytes, major, minor, compression, reserved, size), then the fields.
HEADER = struct.Struct("<HBBBBHQ")
MAGIC, UNCOMPRESSED, ZSTANDARD = 0xA15E, 0, 2
PLAIN_FIELDS = struct.Struct("<32sQd")
CIPHER_FIELDS = struct.Struct("<32s?QQQdQ")
COUNT = struct.Struct("<Q")
GENERATOR = b"\x01"
"""The type byte of Blake2xb, which expands a seed to c1."""
SEED = struct.Struct("<8Q")


def generate_key(parameters: BfvParameters) -> bytes:
    """A new secret key: the words of its number-theoretic transform, packed. Randomness is SEAL's own, from the system."""
    seal = _Seal(parameters)
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    return pack_words(seal.buffers.read_plain(secret.data()), parameters)


def is_key(parameters: BfvParameters, key: bytes) -> bool:
    """Whether `key` could be from `generate_key`: coefficients of -1, 0 and 1, about as many of each as chance gives (within 8 sigma)."""
    try:
        words = unpack_words(key, parameters, 1)
    except FrameBroken:
        return False
    seal = _Seal(parameters)
    # The library transforms ciphertexts only, and none whose c1 is 0: the key takes the place of c0 in one.
    cipher = seal.cipher(np.concatenate([words, np.ones_like(words)]), transformed=True)
    sealapi.Evaluator(seal.context).transform_from_ntt_inplace(cipher)
    coefficients = seal.buffers.read_cipher(cipher)[0]
    counts = [int(np.count_nonzero(coefficients == np.uint64(value))) for value in (0, 1, parameters.prime - 1)]
    spread = 8.0 * (DEGREE * 2 / 9) ** 0.5
    return sum(counts) == DEGREE and all(abs(count - DEGREE / 3) < spread for count in counts)


class Encryptor:
    """Encrypts for one secret key.

    Raises:
        FrameBroken: `key` is none of these parameters.
    """

    def __init__(self, parameters: BfvParameters, key: bytes) -> None:
        self._seal = _Seal(parameters)
        self._encryptor = sealapi.Encryptor(self._seal.context, self._seal.secret_key(key))
        self._plain = sealapi.Plaintext(DEGREE, DEGREE)

    def encrypt(self, packed: Uint64Matrix) -> bytes:
        """[count, 4096] coefficients below t as fresh ciphertexts, framed."""
        buffers, parameters, frames = self._seal.buffers, self._seal.parameters, []
        if packed.size and int(packed.max()) >> parameters.plain_bits:
            raise LocalProtocolError(f"a coefficient has more than {parameters.plain_bits} bits; it was not encrypted")
        for coefficients in packed:
            buffers.write_plain(self._plain, coefficients)
            half, seed = buffers.read_fresh(self._encryptor.encrypt_symmetric(self._plain))
            frames += [pack_words(half, parameters), seed]
        return b"".join(frames)

    def __repr__(self) -> str:
        return "Encryptor(<redacted>)"


class Expander:
    """What needs no key: makes fresh ciphertexts whole, and adds plaintexts to ciphertexts."""

    def __init__(self, parameters: BfvParameters) -> None:
        self._seal = _Seal(parameters)
        self._evaluator = sealapi.Evaluator(self._seal.context)
        self._plain, self._cipher = sealapi.Plaintext(DEGREE, DEGREE), self._seal.cipher()
        # A fresh ciphertext of ours, with c0 = 0: a seed takes the place of the one at its end.
        generator = _header(len(GENERATOR) + SEED_BYTES) + GENERATOR + bytes(SEED_BYTES)
        self._template = _File()
        self._template.write(self._seal.cipher_fields(), np.zeros(DEGREE, dtype=np.uint64), generator)
        self._half = self._load
        if isinstance(self._seal.buffers, Files):
            seed = bytes(range(SEED_BYTES))
            if np.array_equal(self._sample(seed), self._load(seed)):
                self._half = self._sample

    def expand(self, data: bytes | memoryview) -> Words:
        """Framed fresh ciphertexts as [count, 2, 4096] words below q.

        Raises:
            FrameBroken: `data` is no whole number of ciphertexts, or holds a word that is not below q.
        """
        words, seeds = unpack_upload(data, self._seal.parameters)
        for seed, whole in zip(seeds, words, strict=True):
            whole[1] = self._half(seed)
        return words

    def add_plain(self, words: Words, packed: Uint64Matrix) -> None:
        """Add [count, 4096] coefficients below t to the plaintexts in [count, 2, 4096] words, in place."""
        buffers = self._seal.buffers
        for whole, coefficients in zip(words, packed, strict=True):
            buffers.write_plain(self._plain, coefficients)
            buffers.write_cipher(self._cipher, whole)
            self._evaluator.add_plain_inplace(self._cipher, self._plain)
            whole[:] = buffers.read_cipher(self._cipher)

    def _load(self, seed: bytes) -> Words:
        """c1 as the library loads it with the template."""
        self._template.write_end(seed)
        self._cipher.load(self._seal.context, self._template.path)
        half: Words = self._seal.buffers.read_cipher(self._cipher)[1]
        return half

    def _sample(self, seed: bytes) -> Words:
        """c1 from the function that `_load` ends in, as a list."""
        words = sample_poly_uniform(sealapi.Blake2xbPRNG(SEED.unpack(seed)), self._seal.settings)
        return np.fromiter(words, np.uint64, DEGREE)


class Decryptor:
    """Decrypts sums with the secret key.

    Raises:
        FrameBroken: `key` is none of these parameters.
    """

    def __init__(self, parameters: BfvParameters, key: bytes) -> None:
        self._seal = _Seal(parameters)
        self._decryptor = sealapi.Decryptor(self._seal.context, self._seal.secret_key(key))
        self._plain, self._cipher = sealapi.Plaintext(DEGREE, DEGREE), self._seal.cipher()
        self._irregular = _irregular(self._seal) if isinstance(self._seal.buffers, Files) else None

    def decrypt(self, words: Words) -> Uint64Matrix:
        """[count, 2, 4096] words below q as [count, 4096] coefficients below t; garbage if the key is another one."""
        buffers, parameters = self._seal.buffers, self._seal.parameters
        packed = np.empty((len(words), DEGREE), dtype=np.uint64)
        for whole, coefficients in zip(words, packed, strict=True):
            if self._irregular is not None:
                whole = whole.copy()
                add(whole[:1], self._irregular[1], parameters)
            buffers.write_cipher(self._cipher, whole)
            self._decryptor.decrypt(self._cipher, self._plain)
            coefficients[:] = buffers.read_plain(self._plain)
        if self._irregular is not None:
            packed -= self._irregular[0]
            packed &= np.uint64((1 << parameters.plain_bits) - 1)
        return packed

    def __repr__(self) -> str:
        return "Decryptor(<redacted>)"


class InProcess:
    """Ciphers in this process, one call at a time (`protocols.rings.Ciphers`). For what a peer has sent use `secgeo.sandbox`."""

    def generate_key(self, parameters: BfvParameters) -> bytes:
        """See `generate_key`."""
        return generate_key(parameters)

    def is_key(self, parameters: BfvParameters, key: bytes) -> bool:
        """See `is_key`."""
        return is_key(parameters, key)

    def cipher(self, parameters: BfvParameters, key: bytes) -> Cipher:
        """See `Cipher`."""
        return Cipher(parameters, key)


class Cipher:
    """All of the above, behind one lock; without a key (empty) it neither encrypts nor decrypts."""

    def __init__(self, parameters: BfvParameters, key: bytes) -> None:
        self._parameters, self._lock = parameters, Lock()
        self._expander = Expander(parameters)
        self._encryptor = Encryptor(parameters, key) if key else None
        self._decryptor = Decryptor(parameters, key) if key else None

    def encrypt(self, packed: Uint64Matrix) -> bytes:
        """See `Encryptor.encrypt`."""
        with self._lock:
            if self._encryptor is None:
                raise LocalProtocolError("there is no key to encrypt with")
            return self._encryptor.encrypt(packed)

    def decrypt(self, words: Words) -> Uint64Matrix:
        """See `Decryptor.decrypt`."""
        with self._lock:
            if self._decryptor is None:
                raise LocalProtocolError("there is no key to decrypt with")
            return self._decryptor.decrypt(words)

    def add(self, total: Words, data: bytes | memoryview) -> None:
        """Add framed fresh ciphertexts to [count, 2, 4096] words below q, in place."""
        with self._lock:
            add(total, self._expander.expand(data), self._parameters)

    def subtract(self, total: Words, data: bytes | memoryview) -> None:
        """Take them off again."""
        with self._lock:
            subtract(total, self._expander.expand(data), self._parameters)

    def add_plain(self, total: Words, packed: Uint64Matrix) -> None:
        """See `Expander.add_plain`."""
        with self._lock:
            self._expander.add_plain(total, packed)

    def __repr__(self) -> str:
        return "Cipher(<redacted>)"


# --- SEAL's objects, and the ways into and out of them


class Buffers(Protocol):
    """How words get into SEAL's objects and out of them."""

    def write_plain(self, plain: Any, coefficients: Words) -> None:
        """Put [4096] coefficients below t into a plaintext of that size."""

    def read_plain(self, plain: Any) -> Words:
        """All [4096] coefficients of a plaintext, or of a secret key."""

    def write_cipher(self, cipher: Any, words: Words) -> None:
        """Put [2, 4096] words below q into a whole ciphertext."""

    def read_cipher(self, cipher: Any) -> Words:
        """The [2, 4096] words of a whole ciphertext; hold only until it changes."""

    def read_fresh(self, cipher: Any) -> tuple[Words, bytes]:
        """c0 ([4096]) of a fresh ciphertext and the seed of its c1."""


class _Seal:
    """A context, a file in memory, and the buffers."""

    def __init__(self, parameters: BfvParameters) -> None:
        if parameters.security_bits not in SECURITY:
            raise ConfigError(f"{parameters.prime_bits} bits of q leave less than 128 bits of security")
        settings = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
        settings.set_poly_modulus_degree(DEGREE)
        settings.set_coeff_modulus([sealapi.Modulus(parameters.prime)])
        settings.set_plain_modulus(1 << parameters.plain_bits)
        self.parameters, self.settings = parameters, settings
        self.context = sealapi.SEALContext(settings, True, SECURITY[parameters.security_bits])
        if self.context.parameters_error_name() != "success":
            raise ConfigError(f"SEAL refuses the BFV parameters: {self.context.parameters_error_message()}")
        self.parms_id = np.array(self.context.first_parms_id(), dtype="<u8").tobytes()
        self.file = _File()
        files = Files(self)
        self.buffers: Buffers = Views() if views_hold(self, files) else files

    def cipher(self, words: Words | None = None, *, transformed: bool = False) -> Any:
        """A whole ciphertext of [2, 4096] words (zeros, if none are given), made here."""
        cipher = sealapi.Ciphertext()
        content = np.zeros((2, DEGREE), dtype=np.uint64) if words is None else words
        self.file.write(self.cipher_fields(transformed=transformed), content)
        cipher.load(self.context, self.file.path)
        self.file.clear()
        return cipher

    def secret_key(self, key: bytes) -> Any:
        """SEAL's secret key, from packed words."""
        words = unpack_words(key, self.parameters, 1)
        self.file.write(PLAIN_FIELDS.pack(self.parms_id, DEGREE, 1.0), words)
        secret = sealapi.SecretKey()
        secret.load(self.context, self.file.path)
        self.file.clear()
        return secret

    def cipher_fields(self, *, transformed: bool = False) -> bytes:
        """What stands before the words of a ciphertext in a file: two halves, one prime, coefficients or their transform."""
        return CIPHER_FIELDS.pack(self.parms_id, transformed, 2, DEGREE, 1, 1.0, 1)


class _File:
    """A file that is in memory only."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("secgeo-bfv"), "r+b", buffering=0)
        self._decompressor = zstandard.ZstdDecompressor()
        self.path = f"/proc/self/fd/{self._file.fileno()}"

    def write(self, fields: bytes, words: Words, rest: bytes = b"") -> None:
        """A whole file of SEAL's: fields, an array of words, and what may follow it."""
        words = np.ascontiguousarray(words, dtype="<u8")
        array = _header(COUNT.size + words.nbytes) + COUNT.pack(words.size)
        head = _header(len(fields) + len(array) + words.nbytes + len(rest)) + fields + array
        os.pwritev(self._file.fileno(), [head, words.data, rest], 0)

    def write_end(self, data: bytes) -> None:
        """Replace the last bytes."""
        os.pwrite(self._file.fileno(), data, os.fstat(self._file.fileno()).st_size - len(data))

    def clear(self) -> None:
        """Leave nothing behind."""
        os.ftruncate(self._file.fileno(), 0)

    def saved(self, item: Any) -> bytes:
        """What SEAL writes for `item`, behind the header, decompressed."""
        item.save(self.path)
        header = HEADER.unpack(os.pread(self._file.fileno(), HEADER.size, 0))
        compression, size = header[4], header[6]
        data = os.pread(self._file.fileno(), size - HEADER.size, HEADER.size)
        if compression == UNCOMPRESSED:
            return data
        if compression != ZSTANDARD:
            raise ConfigError(f"SEAL compresses by a method ({compression}) that is not known here")
        return self._decompressor.decompressobj().decompress(data)


def _irregular(seal: _Seal) -> tuple[Words, Words]:
    """[4096] coefficients below t without any pattern; the [1, 4096] words that, added to c0, add them to what a ciphertext encrypts."""
    octets = hashlib.shake_256(b"secgeo coefficients without a pattern").digest(8 * DEGREE)
    coefficients = np.frombuffer(octets, dtype="<u8") >> np.uint64(64 - seal.parameters.plain_bits)
    plain = sealapi.Plaintext(DEGREE, DEGREE)
    seal.buffers.write_plain(plain, coefficients)
    cipher = seal.cipher(np.stack([np.zeros_like(coefficients), np.ones_like(coefficients)]))  # c1 = 0 is refused
    sealapi.Evaluator(seal.context).add_plain_inplace(cipher, plain)
    return coefficients, seal.buffers.read_cipher(cipher)[:1].copy()


def _header(size: int) -> bytes:
    return HEADER.pack(MAGIC, HEADER.size, 4, 3, UNCOMPRESSED, 0, HEADER.size + size)


class Files:
    """Through SEAL's own files."""

    def __init__(self, seal: _Seal) -> None:
        self._seal = seal

    def write_plain(self, plain: Any, coefficients: Words) -> None:
        """See `Buffers`."""
        self._seal.file.write(PLAIN_FIELDS.pack(bytes(32), DEGREE, 1.0), coefficients)
        plain.load(self._seal.context, self._seal.file.path)

    def read_plain(self, plain: Any) -> Words:
        """See `Buffers`."""
        data = self._seal.file.saved(plain)
        return _padded(np.frombuffer(data, dtype="<u8", offset=PLAIN_FIELDS.size + HEADER.size + COUNT.size))

    def write_cipher(self, cipher: Any, words: Words) -> None:
        """See `Buffers`."""
        self._seal.file.write(self._seal.cipher_fields(), words)
        cipher.load(self._seal.context, self._seal.file.path)

    def read_cipher(self, cipher: Any) -> Words:
        """See `Buffers`."""
        data = self._seal.file.saved(cipher)
        place = CIPHER_FIELDS.size + HEADER.size + COUNT.size
        return np.frombuffer(data, dtype="<u8", count=2 * DEGREE, offset=place).reshape(2, DEGREE)

    def read_fresh(self, cipher: Any) -> tuple[Words, bytes]:
        """See `Buffers`."""
        data = self._seal.file.saved(cipher)
        place = CIPHER_FIELDS.size + HEADER.size + COUNT.size
        return np.frombuffer(data, dtype="<u8", count=DEGREE, offset=place), data[-SEED_BYTES:]


class Views:
    """Through the library's buffers: which 8-byte word of an object holds its size, and which the address of its words."""

    PLAIN, CIPHER = (9, 10), (13, 14)

    def write_plain(self, plain: Any, coefficients: Words) -> None:
        """See `Buffers`."""
        _view(plain, self.PLAIN)[:] = coefficients

    def read_plain(self, plain: Any) -> Words:
        """See `Buffers`."""
        return _padded(_view(plain, self.PLAIN)[: plain.coeff_count()])

    def write_cipher(self, cipher: Any, words: Words) -> None:
        """See `Buffers`."""
        _view(cipher, self.CIPHER)[:] = words.reshape(-1)

    def read_cipher(self, cipher: Any) -> Words:
        """See `Buffers`."""
        return _view(cipher, self.CIPHER).reshape(2, DEGREE)

    def read_fresh(self, cipher: Any) -> tuple[Words, bytes]:
        """See `Buffers`. In place of c1 stand a mark and the seed, as in a file."""
        words = _view(cipher, self.CIPHER)
        place = 8 + HEADER.size + len(GENERATOR)
        return words[:DEGREE], words[DEGREE : DEGREE + 16].tobytes()[place : place + SEED_BYTES]


def _view(item: Any, place: tuple[int, int]) -> Words:
    """A view of the words of one of SEAL's objects. Holds as long as it is not resized."""
    address = ctypes.c_uint64.from_address(id(item) + object.__basicsize__).value
    size, words = (ctypes.c_uint64.from_address(address + 8 * index).value for index in place)
    return np.ctypeslib.as_array((ctypes.c_uint64 * size).from_address(words))


def _padded(words: Words) -> Words:
    """[4096] words: SEAL leaves out zeros at the end."""
    whole = np.zeros(DEGREE, dtype=np.uint64)
    whole[: words.size] = words
    return whole


def views_hold(seal: _Seal, files: Files) -> bool:
    """The self-test: whether views show what the library's files hold, in every kind of object. Touches nothing in another version."""
    if tenseal.__version__ != TENSEAL_VERSION or sys.implementation.name != "cpython" or struct.calcsize("P") != 8:
        return False
    views, ramp = Views(), np.arange(1, DEGREE + 1, dtype=np.uint64)
    plain, cipher = sealapi.Plaintext(DEGREE, DEGREE), sealapi.Ciphertext()
    views.write_plain(plain, ramp)
    files.write_cipher(cipher, np.zeros((2, DEGREE), dtype=np.uint64))
    views.write_cipher(cipher, np.stack([ramp, ramp[::-1]]))
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    fresh = sealapi.Encryptor(seal.context, secret).encrypt_symmetric(plain)
    half, seed = files.read_fresh(fresh)
    return (
        np.array_equal(files.read_plain(plain), ramp)
        and np.array_equal(files.read_cipher(cipher), np.stack([ramp, ramp[::-1]]))
        and np.array_equal(views.read_plain(secret.data()), files.read_plain(secret.data()))
        and np.array_equal(views.read_fresh(fresh)[0], half)
        and views.read_fresh(fresh)[1] == seed
    )
