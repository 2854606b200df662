"""The public trunk as numbers: its adapted layers, their frozen weights, the frozen low-rank bases, and a digest.

Everything here follows from `Model.seed`, so that no weight file has to be trusted. Weights are made with integer and
correctly rounded float64 operations only, from the raw 64-bit output of PCG64 (a stream that numpy promises never to
change), so the digest is the same on every machine. Torch-free: the authority pins the digest without loading a model.

The bases A are orthonormal (QR) and may differ in the last bits between machines; that is harmless and they are not
digested.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keys.labels import Label
from protocols.agreement import Model

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """One linear layer of the trunk that carries an adapter: a name and the shape [outputs, inputs] of its weight."""

    name: str
    outputs: int
    inputs: int


def adapted_layers(model: Model) -> tuple[AdaptedLayer, ...]:
    """The adapted layers in the order of the flat update vector: attention qkv and out, feed-forward up and down."""
    width, hidden = model.width, model.feedforward
    shapes = {"qkv": (3 * width, width), "out": (width, width), "up": (hidden, width), "down": (width, hidden)}
    return tuple(
        AdaptedLayer(f"block{index}.{part}", *shape) for index in range(model.layers) for part, shape in shapes.items()
    )


def public_uniform(seed: int, purpose: str, count: int) -> Matrix:
    """`count` public uniform values in (-1, 1) that follow from a seed and a purpose."""
    material = hashlib.sha256(Label.TRUNK + f"{seed}/{purpose}".encode()).digest()
    raw = np.random.PCG64(int.from_bytes(material, "little")).random_raw(count)
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-52 - 1.0


def trunk_weight(model: Model, layer: AdaptedLayer) -> NDArray[np.float32]:
    """The frozen W0 [outputs, inputs] of a layer: uniform, with variance 1 / inputs."""
    values = public_uniform(model.seed, f"W0/{layer.name}", layer.outputs * layer.inputs)
    return (values * math.sqrt(3.0 / layer.inputs)).astype(np.float32).reshape(layer.outputs, layer.inputs)


def public_projection(model: Model, layer: AdaptedLayer, generation: int) -> Matrix:
    """The frozen A [rank, inputs] of a layer with A A^T = I; `generation` counts the merges so far."""
    values = public_uniform(model.seed, f"A/{layer.name}/{generation}", layer.inputs * model.rank)
    basis, triangle = np.linalg.qr(values.reshape(layer.inputs, model.rank))
    return np.ascontiguousarray((basis * np.where(np.diag(triangle) < 0, -1.0, 1.0)).T)


def trunk_digest(model: Model) -> str:
    """SHA-256 (hex) over the trunk's shape and every W0 as little-endian float32. Ignores `model.trunk_digest`."""
    facts = (model.seed, model.width, model.layers, model.heads, model.tokens, model.feedforward)
    digest = hashlib.sha256(Label.TRUNK + ",".join(map(str, facts)).encode())
    for layer in adapted_layers(model):
        digest.update(f"/{layer.name}:{layer.outputs}x{layer.inputs}/".encode())
        digest.update(trunk_weight(model, layer).astype("<f4").tobytes())
    return digest.hexdigest()
