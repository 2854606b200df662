"""The target of framed ciphertexts: what is taken is what was sent, word for word, and expands to words below q."""

from __future__ import annotations

import random
from functools import cache

import numpy as np

from protocols import bfv
from protocols import ciphertexts as c
from protocols.packing import DEGREE, PARAMETERS
from tests.fuzz import mutate
from tests.fuzz.property import Target, require


@cache
def _expanders() -> list[bfv.Expander]:
    return [bfv.Expander(parameters) for parameters in PARAMETERS]


def _ciphertext(data: bytes) -> None:
    """The first byte says which parameters."""
    choice, data = data[:1] > b"\0", data[1:]
    parameters, half = PARAMETERS[choice], c.half_bytes(PARAMETERS[choice])
    try:
        words = c.unpack_words(data[:half], parameters, 1)
        require(c.pack_words(words, parameters) == data[:half], "words are packed again as they came")
    except c.FrameBroken:
        pass
    try:
        words = _expanders()[choice].expand(data)
    except c.FrameBroken:
        return
    require(not words.size or int(words.max()) < parameters.prime, "every word is below q")
    frames = [data[start : start + half] for start in range(0, len(data), c.upload_bytes(parameters, 1))]
    require([c.pack_words(whole[0], parameters) for whole in words] == frames, "c0 is what was sent")


def _seeds() -> list[bytes]:
    generator, seeds = np.random.default_rng(0), []
    for choice, parameters in enumerate(PARAMETERS):
        top = np.full(DEGREE, parameters.prime - 1, np.uint64)
        for half in (generator.integers(0, parameters.prime, DEGREE, np.uint64), top, 0 * top):
            seeds.append(bytes([choice]) + c.pack_words(half, parameters) + generator.bytes(64))
        seeds += [seeds[-1] + seeds[-2][1:], bytes([choice])]
    return seeds


def _mutate(data: bytes, rng: random.Random) -> bytes:
    """Changes that keep the length, since any other is refused at once."""
    changed = mutate.flip(data, rng)
    return (changed + data[len(changed) :])[: len(data)]


TARGETS = {"ciphertext": Target(_ciphertext, _seeds, _mutate)}
