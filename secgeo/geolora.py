"""GeoLoRA: a frozen linear layer with a low-rank shared direction and a local magnitude (DESIGN section 8).

    y = (m / nu) * (W0 x + s B (A x)),   s = alpha / rank
    nu_i^2 = ||W0_i||^2 + 2 s <B_i, W0_i A^T> + s^2 ||B_i||^2

W0 [o, i] and A [r, i] (A A^T = I) are frozen and public; B [o, r] is trained under DP and summed across hospitals; m
[o] is trained under DP and stays at its hospital, where it absorbs the scale of the local sensor. nu is the exact row
norm of W0 + s B A, and is detached: then B sees plain linear-layer gradients, per-sample hooks stay exact, and the only
cost is o numbers per layer. m starts at the row norms of W0, so that the untrained layer is W0 itself.

Freezing A makes averaging exact (mean(B_k) A = mean(B_k A)) and keeps DP noise linear in the weights. The magnitude and
direction split is that of DoRA (Liu et al. 2024); the formulas are this project's own reading of A. Eklund,
arXiv 2601.17986 (2026). The ICLR 2025 "GeoLoRA" on dynamical low-rank integration is another method.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

from keys.errors import LocalProtocolError
from secgeo.per_sample import by_token


class MagnitudeScale(nn.Module):
    """Multiplies the last dimension by a trained vector [o]; a module, so that it has its own grad sampler."""

    def __init__(self, magnitude: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude.clone())

    def forward(self, values: Tensor) -> Tensor:
        """`values` [..., o] times the magnitude."""
        return values * self.weight


def magnitude_grad_sample(
    layer: MagnitudeScale, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Per-record gradients [n, o] of a MagnitudeScale: backprop times input, summed over the token dimensions."""
    if not layer.weight.requires_grad:
        return {}
    return {layer.weight: by_token(backprops * activations[0]).sum(dim=1)}  # An einsum takes five times as long.


register_grad_sampler(MagnitudeScale)(magnitude_grad_sample)


class GeoLoRALinear(nn.Module):
    """One adapted layer. `direction.weight` is B, `magnitude.weight` is m.

    Args:
        base: W0 [o, i], frozen.
        projection: A [r, i] with orthonormal rows, frozen.
        scale: s = alpha / rank.
    """

    base: Tensor
    projection: Tensor
    _base_norm_squared: Tensor
    _overlap: Tensor

    def __init__(self, base: NDArray[np.floating], projection: NDArray[np.floating], scale: float) -> None:
        super().__init__()
        outputs, inputs = base.shape
        rank = projection.shape[0]
        self.scale = scale
        self.register_buffer("base", torch.zeros(outputs, inputs))
        self.register_buffer("projection", torch.zeros(rank, inputs))
        self.register_buffer("_base_norm_squared", torch.zeros(outputs))
        self.register_buffer("_overlap", torch.zeros(outputs, rank))
        self.direction = nn.Linear(rank, outputs, bias=False)
        self.load(base, projection, np.zeros((outputs, rank)))
        self.magnitude = MagnitudeScale(self.row_norms())

    @torch.no_grad()
    def load(
        self, base: NDArray[np.floating], projection: NDArray[np.floating], direction: NDArray[np.floating]
    ) -> None:
        """Set W0, A and B; the magnitude stays as it is.

        Raises:
            LocalProtocolError: a shape does not fit, or A A^T is not the identity.
        """
        if base.shape != self.base.shape or projection.shape != self.projection.shape:
            raise LocalProtocolError(
                f"this layer takes W0 {tuple(self.base.shape)} and A {tuple(self.projection.shape)}"
            )
        if direction.shape != self.direction.weight.shape:
            raise LocalProtocolError(f"this layer takes B {tuple(self.direction.weight.shape)}")
        if not np.allclose(projection @ projection.T, np.eye(projection.shape[0]), atol=1e-5):
            raise LocalProtocolError("the rows of A must be orthonormal, else the row norm nu is wrong")
        wide = base.astype(np.float64)
        for target, value in (
            (self.base, wide),
            (self.projection, projection),
            (self._base_norm_squared, np.square(wide).sum(axis=1)),
            (self._overlap, wide @ projection.T.astype(np.float64)),
            (self.direction.weight, direction),
        ):
            target.copy_(torch.from_numpy(np.array(value, dtype=np.float64)))

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """nu [o]: the exact row norms of W0 + s B A, from r-dimensional products only (A A^T = I)."""
        B, s = self.direction.weight, self.scale
        squared = self._base_norm_squared + 2.0 * s * (B * self._overlap).sum(dim=1) + s * s * B.square().sum(dim=1)
        return squared.clamp_min(1e-12).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """y [..., o] for x [..., i]."""
        direction = x @ self.base.T + self.scale * self.direction(x @ self.projection.T)
        return self.magnitude(direction / self.row_norms())  # type: ignore[no-any-return]

    @torch.no_grad()
    def merge(self, next_projection: NDArray[np.floating]) -> None:
        """W0 <- W0 + s B A, A <- `next_projection`, B <- 0. nu, m and the layer's function stay the same."""
        merged = self.base.double() + self.scale * self.direction.weight.double() @ self.projection.double()
        self.load(merged.cpu().numpy(), next_projection, np.zeros(tuple(self.direction.weight.shape)))


def directions(layers: Iterable[tuple[str, GeoLoRALinear]]) -> dict[str, NDArray[np.float64]]:
    """B of every named layer as float64 arrays."""
    return {name: layer.direction.weight.detach().double().cpu().numpy() for name, layer in layers}
