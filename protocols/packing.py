"""How values share the coefficients of a BFV plaintext, and which BFV parameters carry their sum exactly (DESIGN section 6).

A field of `field_bits` holds the sum of n_max values of `value_bits`, so that fields never carry into each other. A coefficient is
an integer modulo t = 2^plain_bits; per group of coefficients (P_j is a piece of the last value, with carry bits of its own):

    2 values in 1 coefficient      | V1 | V0 |
    3 values in 2 coefficients     | P0 | V0 |  | P1 | V1 |
    1 value in 1 coefficient            | V0 |

Exactness: a ciphertext decrypts right as long as its noise stays below q / 2t. SEAL's fresh symmetric noise is a centred binomial of
42 coins, so each noise coefficient of a sum of n ciphertexts is a sum of 42 n independent +-1/2, which passes x with probability
at most 2 exp(-2 x^2 / 42 n) (Hoeffding 1963); scaling a message by q / t rounds off at most 1/2 each time. Li and Micciancio's key
recovery (Eurocrypt 2021) needs decryptions that are off. Here one coefficient is off with probability below 2^-100, or the
parameters are refused.

Security: Homomorphic Encryption Standard (Albrecht et al. 2018), table 1, ternary secrets, classical attacks. At degree 4096
log2 q may be at most 58 for 256 bits, 75 for 192 bits and 109 for 128 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError, VerificationFailed

Uint32Vector = NDArray[np.uint32]
Uint64Matrix = NDArray[np.uint64]

DEGREE = 4096
"""Coefficients of a plaintext and of each half of a ciphertext."""

NOISE_COINS = 42
FAILURE_BITS = 100
STANDARD = {58: 256, 75: 192, 109: 128}
"""Bits of q at most, and the security that they leave, at degree 4096."""


@dataclass(frozen=True, slots=True)
class BfvParameters:
    """One coefficient modulus, a prime q = 1 modulo 8192, and the plaintext modulus t = 2^plain_bits."""

    prime: int
    plain_bits: int

    @property
    def prime_bits(self) -> int:
        """Bits of one coefficient of a ciphertext."""
        return self.prime.bit_length()

    @property
    def security_bits(self) -> int:
        """The security class of the standard; 0 below 128 bits."""
        return next((bits for most, bits in STANDARD.items() if self.prime_bits <= most), 0)

    def failure_bits(self, n_max: int) -> float:
        """-log2 of a bound on the probability that one coefficient of a sum of n_max ciphertexts and two plaintexts is off.

        The plaintexts: what is taken off for members that dropped out, and what `protocols.bfv` may add while it decrypts.
        """
        room = self.prime / (1 << self.plain_bits + 1) - (n_max + 2) / 2
        if room <= 0:
            return 0.0
        return 2 * room * room / (NOISE_COINS * n_max) / math.log(2) - 1


PARAMETERS = (
    BfvParameters(prime=0xFFFFFFFFFBA001, plain_bits=46),
    BfvParameters(prime=0xFFFFFFFFFFFC001, plain_bits=50),
)


class Layout(Enum):
    """How many values stand in how many coefficients."""

    TWO_IN_ONE = (2, 1)
    THREE_IN_TWO = (3, 2)
    ONE_IN_ONE = (1, 1)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the values of a block stand among its 4,096 coefficients."""

    parameters: BfvParameters
    layout: Layout
    value_bits: int
    n_max: int

    @property
    def field_bits(self) -> int:
        """Bits of a sum of n_max values."""
        return _sum_bits(self.n_max, self.value_bits)

    @property
    def piece_bits(self) -> int:
        """Bits of a value that stand in its lower piece."""
        return -(-self.value_bits // 2)

    @property
    def used_bits(self) -> int:
        """Bits of a coefficient that sums can reach."""
        match self.layout:
            case Layout.TWO_IN_ONE:
                return 2 * self.field_bits
            case Layout.THREE_IN_TWO:
                return self.field_bits + _sum_bits(self.n_max, self.piece_bits)
            case Layout.ONE_IN_ONE:
                return self.field_bits

    @property
    def block_values(self) -> int:
        """How many values one ciphertext carries."""
        values, coefficients = self.layout.value
        return DEGREE * values // coefficients

    @property
    def fault(self) -> str:
        """Why this cannot be used; empty if it can."""
        if self.field_bits > 32:
            return f"sums of {self.n_max} values of {self.value_bits} bits need more than 32 bits"
        if self.used_bits > self.parameters.plain_bits:
            return f"its fields need {self.used_bits} bits, and a coefficient has {self.parameters.plain_bits}"
        if self.parameters.failure_bits(self.n_max) < FAILURE_BITS:
            return f"the noise of {self.n_max} ciphertexts could reach q / 2t"
        if self.parameters.security_bits < 128:
            return f"{self.parameters.prime_bits} bits of q leave less than 128 bits of security"
        return ""

    def pack(self, values: Uint32Vector) -> Uint64Matrix:
        """[m] uint32 values as [blocks, 4096] uint64 coefficients below t. Zeros fill the last block."""
        count, coefficients = self.layout.value
        blocks = -(-values.size // self.block_values)
        parts = np.zeros((blocks, count, DEGREE // coefficients), dtype=np.uint64)
        parts.reshape(-1)[: values.size] = values
        packed = np.empty((blocks, coefficients, DEGREE // coefficients), dtype=np.uint64)
        above = np.uint64(self.field_bits)
        match self.layout:
            case Layout.TWO_IN_ONE:
                packed[:, 0] = parts[:, 0] | parts[:, 1] << above
            case Layout.THREE_IN_TWO:
                lower = parts[:, 2] & np.uint64(2**self.piece_bits - 1)
                packed[:, 0] = parts[:, 0] | lower << above
                packed[:, 1] = parts[:, 1] | parts[:, 2] >> np.uint64(self.piece_bits) << above
            case Layout.ONE_IN_ONE:
                packed[:, 0] = parts[:, 0]
        return packed.reshape(blocks, DEGREE)

    def unpack(self, packed: Uint64Matrix, count: int) -> Uint32Vector:
        """The first `count` values, or sums of at most n_max of them, that [blocks, 4096] coefficients hold.

        Raises:
            VerificationFailed: a coefficient is no such sum.
        """
        values, coefficients = self.layout.value
        if packed.size and int(packed.max()) >> self.used_bits:
            raise VerificationFailed("the decrypted sum holds coefficients that no members' values add up to")
        fields = packed.reshape(-1, coefficients, DEGREE // coefficients)
        parts = np.empty((len(packed), values, DEGREE // coefficients), dtype=np.uint32)
        above, low = np.uint64(self.field_bits), np.uint64(2**self.field_bits - 1)
        parts[:, :coefficients] = fields & low
        match self.layout:
            case Layout.TWO_IN_ONE:
                parts[:, 1] = fields[:, 0] >> above
            case Layout.THREE_IN_TWO:
                parts[:, 2] = (fields[:, 0] >> above) + (fields[:, 1] >> above << np.uint64(self.piece_bits))
        return parts.reshape(-1)[:count]


def _sum_bits(n_max: int, bits: int) -> int:
    """Bits of a sum of n_max numbers of `bits` bits."""
    return (n_max * ((1 << bits) - 1)).bit_length()


def choose(value_bits: int, n_max: int) -> Packing:
    """The packing with the fewest bits per value on the wire; the larger security among equals.

    Raises:
        ConfigError: no parameters carry sums of n_max values of so many bits.
    """
    candidates = [
        packing
        for parameters in PARAMETERS
        for layout in Layout
        if not (packing := Packing(parameters, layout, value_bits, n_max)).fault
    ]
    if not candidates:
        raise ConfigError(
            f"no BFV parameters add {n_max} values of {value_bits} bits exactly; lower value_bits, or choose `masked`"
        )
    return min(candidates, key=lambda packing: packing.parameters.prime_bits / packing.block_values)
