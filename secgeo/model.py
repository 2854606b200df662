"""The node's model: a tokeniser for the one local modality, the public transformer trunk with GeoLoRA, and a task head.

Every modality passes through the same trunk; only tokeniser, magnitudes and head are local. A tokeniser is a fixed
feature map (public: resizing, a spectrum), a normalisation with statistics of the public anchors, and ONE linear layer
that makes all tokens at once. The trunk is pre-LN with no affine, no bias, no dropout and no batch statistics: the loss
of a record depends on that record alone, which is what per-sample clipping under DP needs.

What private data touches is exactly `private_parameters()`: B and m of every layer, the tokeniser's linear layer, the
head. Anything else that would need a gradient is refused.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from keys.errors import ConfigError, LocalProtocolError
from protocols.agreement import Agreement, Modality, Model
from secgeo.geolora import GeoLoRALinear
from secgeo.trunk import adapted_layers, public_projection, public_uniform, trunk_digest, trunk_weight

IMAGE_SIDE = 32
"""Images are averaged down to at most this many pixels a side before the linear projector."""

SIGNAL_POINTS = 64
"""Signals become this many averaged samples and this many spectral magnitudes per channel."""


def _image_features(records: Tensor) -> Tensor:
    height, width = records.shape[-2:]
    return functional.adaptive_avg_pool2d(records, (min(height, IMAGE_SIDE), min(width, IMAGE_SIDE))).flatten(1)


def _signal_features(records: Tensor) -> Tensor:
    wave = functional.adaptive_avg_pool1d(records, min(records.shape[-1], SIGNAL_POINTS))
    spectrum = torch.log1p(torch.fft.rfft(records, norm="ortho").abs())
    return torch.cat(
        [wave, functional.adaptive_avg_pool1d(spectrum, min(spectrum.shape[-1], SIGNAL_POINTS))], dim=-1
    ).flatten(1)


class Tokeniser(nn.Module):
    """Records [n, *shape] to tokens [n, tokens, width].

    `tabular` and `signal` features are standardised one by one; an `image` or a ready-made `embedding` keeps the
    relative scale of its features (one common scale), because they share a unit. All statistics come from the anchors.

    Args:
        modality: kind and shape of the records.
        model: width, number of tokens and the seed of the initial projector.
        anchors: the public anchors' view of this modality [a, *shape].

    Raises:
        ConfigError: the shape does not suit the kind, or the anchors have another shape or are not finite.
    """

    _mean: Tensor
    _deviation: Tensor

    def __init__(self, modality: Modality, model: Model, anchors: NDArray[np.floating]) -> None:
        super().__init__()
        dimensions = {"tabular": 1, "embedding": 1, "signal": 2, "image": 3}[modality.tokeniser]
        if len(modality.shape) != dimensions:
            kinds = {1: "[features]", 2: "[channels, samples]", 3: "[channels, height, width]"}
            raise ConfigError(
                f"a {modality.tokeniser} record has shape {kinds[dimensions]}; {modality.name} says {modality.shape}"
            )
        if anchors.shape[1:] != modality.shape or not np.isfinite(anchors).all():
            raise ConfigError(
                f"the anchors of {modality.name} must be finite, of shape [a, {modality.shape}], not {anchors.shape}"
            )
        self.kind, self.tokens, self.width = modality.tokeniser, model.tokens, model.width
        features = self._features(torch.from_numpy(np.asarray(anchors, dtype=np.float32)))
        deviation = features.std(dim=0, correction=0)
        if self.kind in ("image", "embedding"):
            deviation = deviation.square().mean().sqrt().expand_as(deviation)
        self.register_buffer("_mean", features.mean(dim=0))
        self.register_buffer("_deviation", torch.where(deviation > 1e-6, deviation, torch.ones_like(deviation)).clone())
        count = features.shape[1]
        self.projector = nn.Linear(count, model.tokens * model.width)
        initial = public_uniform(model.seed, f"projector/{modality.name}", count * model.tokens * model.width)
        with torch.no_grad():
            self.projector.weight.copy_(torch.from_numpy(initial.reshape(-1, count) * (3.0 / count) ** 0.5))
            self.projector.bias.zero_()

    def _features(self, records: Tensor) -> Tensor:
        if self.kind == "image":
            return _image_features(records)
        return _signal_features(records) if self.kind == "signal" else records.flatten(1)

    def forward(self, records: Tensor) -> Tensor:
        """Tokens [n, tokens, width]. Features are clamped to 8 deviations: one odd record must not blow up."""
        features = ((self._features(records) - self._mean) / self._deviation).clamp(-8.0, 8.0).nan_to_num(0.0)
        return self.projector(features).reshape(-1, self.tokens, self.width)  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-LN transformer block whose four linear layers are GeoLoRA layers."""

    def __init__(self, model: Model, layers: dict[str, GeoLoRALinear]) -> None:
        super().__init__()
        self.heads = model.heads
        self.qkv, self.out, self.up, self.down = (layers[part] for part in ("qkv", "out", "up", "down"))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [n, t, width] to tokens of the same shape."""
        n, t, width = x.shape
        normed = functional.layer_norm(x, (width,))
        q, k, v = self.qkv(normed).reshape(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))
        return x + self.down(functional.gelu(self.up(functional.layer_norm(x, (width,)))))  # type: ignore[no-any-return]


class MultimodalNode(nn.Module):
    """Tokeniser, trunk and head of one node. Build it with `build_model`."""

    def __init__(self, tokeniser: Tokeniser, model: Model, classes: int) -> None:
        super().__init__()
        self.tokeniser = tokeniser
        self.adapted: dict[str, GeoLoRALinear] = {
            layer.name: GeoLoRALinear(
                trunk_weight(model, layer), public_projection(model, layer, 0), model.alpha / model.rank
            )
            for layer in adapted_layers(model)
        }
        self.blocks = nn.ModuleList(
            Block(model, {part: self.adapted[f"block{index}.{part}"] for part in ("qkv", "out", "up", "down")})
            for index in range(model.layers)
        )
        self.head = nn.Linear(model.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings [n, width] of records [n, *shape]: the normalised mean over tokens."""
        tokens = self.tokeniser(x)
        for block in self.blocks:
            tokens = block(tokens)
        return functional.layer_norm(tokens.mean(dim=1), (tokens.shape[-1],))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of records [n, *shape]."""
        return self.head(self.embed(x))  # type: ignore[no-any-return]

    def shared_parameters(self) -> list[nn.Parameter]:
        """B of every adapted layer."""
        return [p for layer in self.adapted.values() for p in layer.direction.parameters()]

    def local_parameters(self) -> list[nn.Parameter]:
        """m of every adapted layer, the tokeniser's projector and the head."""
        magnitudes = [layer.magnitude.weight for layer in self.adapted.values()]
        return [*magnitudes, *self.tokeniser.projector.parameters(), *self.head.parameters()]

    def private_parameters(self) -> list[nn.Parameter]:
        """Everything that private data touches.

        Raises:
            LocalProtocolError: the model has a trainable parameter besides these; it would escape clipping.
        """
        known = [*self.shared_parameters(), *self.local_parameters()]
        ours = {id(p) for p in known}
        if {id(p) for p in self.parameters() if p.requires_grad} != ours:
            stray = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in ours]
            raise LocalProtocolError(
                f"parameters outside of clipping, or frozen by mistake: {', '.join(stray) or 'B, m, tokeniser or head'}"
            )
        return known


def build_model(agreement: Agreement, modality_name: str, anchors: NDArray[np.floating]) -> MultimodalNode:
    """The untrained model of one modality; the same at every node that holds it.

    Raises:
        ConfigError: the trunk made from the seed is not the one the agreement pins, or the anchors do not fit.
    """
    if trunk_digest(agreement.model) != agreement.model.trunk_digest:
        raise ConfigError(
            "the trunk made from the agreement's seed has another digest than the agreement pins; do not train"
        )
    tokeniser = Tokeniser(agreement.modality(modality_name), agreement.model, anchors)
    return MultimodalNode(tokeniser, agreement.model, agreement.study.classes)
