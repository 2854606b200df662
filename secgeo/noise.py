"""The cryptographic noise source of DP training: Gaussian noise and Poisson sampling from an AES-256-CTR keystream.

Opacus' `secure_mode` needs a package that is no longer kept; this takes its place. The key comes from the operating
system (`os.urandom`) and lives in the process only. One source belongs to one process: a forked child would repeat the
parent's noise, so it is refused, and a source cannot be copied or pickled.

Floating-point attacks (Mironov 2012; Jin et al. 2021): the set of doubles that a sampler can return has holes, and
holes shifted by a secret sum give it away. What is done: (1) each value is (g1 + g2 + g3 + g4) / 2 of four independent
Gaussians (Holohan and Braghin 2021) made from 52 random bits each: guessing three of them to find the fourth is a search
of 2^156, or of about 2^104 with as much memory by meeting in the middle; (2) the trainer adds noise to the gradient sum
in float64 and only then rounds to float32, which drops 29 of 53 bits. What is not: this is a continuous Gaussian in
floating point, not an exact discrete one, so the guarantee is that of the ideal mechanism up to these mitigations;
and run time depends on the number of values only by intent, not by proof.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from keys.errors import ConfigError, LocalProtocolError
from protocols.ledger import RNG_KIND as RNG_KIND  # the name of this generator in the budget ledger

if TYPE_CHECKING:
    import torch

BLOCK_VALUES = 1 << 18
"""Uniform values per pass (2 MiB of keystream), so that memory stays flat for large models."""


class NoiseSource:
    """An endless stream of noise for one process.

    Args:
        key: 32 bytes, for tests only; without it a fresh key is drawn from the operating system.

    Raises:
        ConfigError: the key is not 32 bytes long.
    """

    def __init__(self, key: bytes | None = None) -> None:
        secret = os.urandom(32) if key is None else key
        if len(secret) != 32:
            raise ConfigError("a noise key has 32 bytes")
        self._stream = Cipher(algorithms.AES256(secret), modes.CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    def __repr__(self) -> str:
        return "NoiseSource(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise LocalProtocolError("a noise source cannot be copied or pickled: two copies would add the same noise")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` independent uniform values, 52 bits each, all strictly between 0 and 1.

        Raises:
            LocalProtocolError: the process was forked since the source was made.
        """
        if os.getpid() != self._process:
            raise LocalProtocolError("this noise source belongs to the parent process; make a new one in the child")
        raw = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        # One bit more, and the half would be rounded: the largest value would be 1, and its noise infinite.
        values = (raw >> np.uint64(12)).astype(np.float64)
        values += 0.5
        values *= 2.0**-52
        return values

    def gaussian(self, shape: tuple[int, ...], std: float, *, device: torch.device | str = "cpu") -> torch.Tensor:
        """Independent N(0, std^2) values of `shape`, float64, on a torch device; all zero for std 0.

        Raises:
            ConfigError: std is negative or not finite.
        """
        import torch  # lazy: the command line loads this file before it knows whether it will train

        if not (math.isfinite(std) and std >= 0.0):
            raise ConfigError(f"a standard deviation must be finite and not negative, not {std}")
        noise = torch.zeros(math.prod(shape), dtype=torch.float64, device=device)
        if std == 0.0:
            return noise.view(shape)
        for block in torch.split(noise, BLOCK_VALUES // 4):
            uniform = torch.from_numpy(self.uniform(4 * len(block))).to(device)
            centred = uniform.mul_(2.0).sub_(1.0)  # exact, so this is ndtri / sqrt(2), in half its time
            torch.sum(torch.erfinv(centred).view(4, -1), dim=0, out=block)
        return noise.mul_(std / math.sqrt(2.0)).view(shape)

    def poisson_mask(self, count: int, sample_rate: float) -> NDArray[np.bool_]:
        """Which of `count` units are in a Poisson sample: each independently with probability `sample_rate`.

        Raises:
            ConfigError: the rate is not in (0, 1].
        """
        if not 0.0 < sample_rate <= 1.0:
            raise ConfigError(f"a sampling rate must be above 0 and at most 1, not {sample_rate}")
        return np.asarray(self.uniform(count) < sample_rate)
