"""What nodes send and what they make of the sum: the flat update vector, precision weights, and the shared state.

The vector (DESIGN section 8) is, for every adapted layer, [w dB (outputs * rank values, row by row), w], then
[w_g * upper triangle of K_hat (diagonal included), w_g]. The new state follows from the sum of these vectors alone:
B <- B + sum(w dB) / (ridge + sum w) and K* = sum(w_g K_hat) / sum w_g. Every node computes it for itself; nothing here
depends on who else took part. Torch-free.

Threat assumption: the sum is checked by its tags, but a malicious node may have put anything into it. So every weight
sum must be positive and finite, and K* is made centred and PSD again after decoding.

Precision weights P0 use public settings only: v = steps * lr^2 * (noise_multiplier * max_grad_norm / b)^2 is the
variance that DP noise adds to one entry of dB in a round. Weights are scaled to a mean of 1 over the members
(docs/adr/0020), so that the clamp means "at most R times more or less than the average hospital".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from keys.errors import ConfigError, LocalProtocolError, VerificationFailed
from protocols.agreement import Agreement, Member
from protocols.encoding import FixedPoint
from secgeo.geometry import consensus_coordinates, nearest_centred_psd
from secgeo.trunk import adapted_layers, public_projection

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Segment:
    """The place of one layer in the vector: values in [start, weight_at), the weight at weight_at."""

    name: str
    start: int
    shape: tuple[int, int]

    @property
    def weight_at(self) -> int:
        """Index of the segment's weight."""
        return self.start + self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of the flat vector: `segments` for the layers, then the Gram triangle and its weight."""

    segments: tuple[Segment, ...]
    anchors: int

    @classmethod
    def from_agreement(cls, agreement: Agreement) -> Layout:
        """The layout that an agreement's model and anchor count fix."""
        segments, start = [], 0
        for layer in adapted_layers(agreement.model):
            segment = Segment(layer.name, start, (layer.outputs, agreement.model.rank))
            segments.append(segment)
            start = segment.weight_at + 1
        return cls(tuple(segments), agreement.anchors.count)

    @property
    def gram_start(self) -> int:
        """Index of the first Gram value."""
        return self.segments[-1].weight_at + 1

    @property
    def size(self) -> int:
        """Number of values d in the vector."""
        return self.gram_start + self.anchors * (self.anchors + 1) // 2 + 1


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A vector (one update or a sum of them) by name: weighted values and weights, not yet divided."""

    weighted_delta_b: Mapping[str, Matrix]
    weights: Mapping[str, float]
    weighted_gram: Matrix
    gram_weight: float


def pack(
    layout: Layout, delta_b: Mapping[str, Matrix], weights: Mapping[str, float], gram: Matrix, gram_weight: float
) -> Vector:
    """One node's vector ([size] float64) from unweighted parts: dB [outputs, rank] per layer and K_hat [a, a].

    Raises:
        LocalProtocolError: a part is missing or has another shape than the layout says.
    """
    if gram.shape != (layout.anchors, layout.anchors):
        raise LocalProtocolError(f"the Gram matrix has shape {gram.shape}; the agreement has {layout.anchors} anchors")
    vector = np.empty(layout.size, dtype=np.float64)
    for segment in layout.segments:
        delta = delta_b.get(segment.name)
        if delta is None or delta.shape != segment.shape:
            raise LocalProtocolError(f"the update needs {segment.name} of shape {segment.shape}")
        vector[segment.start : segment.weight_at] = weights[segment.name] * delta.ravel()
        vector[segment.weight_at] = weights[segment.name]
    vector[layout.gram_start : -1] = gram_weight * gram[np.triu_indices(layout.anchors)]
    vector[-1] = gram_weight
    return vector


def unpack(layout: Layout, vector: Vector) -> Unpacked:
    """The parts of a vector or of a sum of vectors, still weighted.

    Raises:
        LocalProtocolError: the vector has another length than the layout says.
    """
    if vector.shape != (layout.size,):
        raise LocalProtocolError(
            f"a vector of shape {vector.shape} was given where the layout has {layout.size} values"
        )
    gram = np.zeros((layout.anchors, layout.anchors))
    gram[np.triu_indices(layout.anchors)] = vector[layout.gram_start : -1]
    return Unpacked(
        {s.name: vector[s.start : s.weight_at].reshape(s.shape).astype(np.float64) for s in layout.segments},
        {s.name: float(vector[s.weight_at]) for s in layout.segments},
        gram + np.triu(gram, 1).T,
        float(vector[-1]),
    )


def noise_variance(agreement: Agreement, member: Member) -> float:
    """v: the variance that one round's DP noise adds to each entry of this member's dB. Public settings only."""
    training, privacy = agreement.training, agreement.privacy
    scale = privacy.noise_multiplier * privacy.max_grad_norm / member.expected_batch_size
    return training.steps_per_round * (training.learning_rate * scale) ** 2


def precision_weight(agreement: Agreement, member: Member) -> float:
    """The weight w of a member's dB, from public settings alone.

    P0: w = 1 / (tau_squared + v), scaled so that the members' mean is 1, then clamped to [1/clamp, clamp]. `equal`: 1.
    """
    precision = agreement.precision
    if precision.rule == "equal":
        return 1.0
    raw = [1.0 / (precision.tau_squared + noise_variance(agreement, other)) for other in agreement.members]
    own = 1.0 / (precision.tau_squared + noise_variance(agreement, member))
    return float(np.clip(own * len(raw) / sum(raw), 1.0 / precision.clamp, precision.clamp))


def gram_weight(agreement: Agreement, member: Member) -> float:
    """The weight of a member's Gram matrix: every modality counts the same, however many hospitals hold it."""
    return 1.0 / sum(other.modality == member.modality for other in agreement.members)


def value_range_ok(agreement: Agreement, vector: Vector) -> bool:
    """Whether every value is finite and inside the fixed-point range, so that encoding clips nothing."""
    return bool(np.isfinite(vector).all()) and FixedPoint.from_agreement(agreement).saturated(vector) == 0


def _frozen(array: Matrix) -> Matrix:
    copy = np.array(array, dtype=np.float64)
    copy.setflags(write=False)
    return copy


@dataclass(frozen=True)
class SharedState:
    """What every node holds after `round` finished rounds. Arrays are read-only.

    Attributes:
        round: number of sums applied so far.
        B: per adapted layer the shared direction [outputs, rank] on the current public basis.
        gram: the consensus Gram matrix K* [a, a], centred and PSD; None before the first sum.
        coordinates: Z* [a, coordinate_rank] at unit Frobenius norm; None before the first sum.
        generation: which public basis A is in use: the number of merges so far.
        merged: per adapted layer the sum of s B A over past merges [outputs, inputs], to be added to the trunk's W0.
    """

    round: int
    B: Mapping[str, Matrix]
    gram: Matrix | None
    coordinates: Matrix | None
    generation: int
    merged: Mapping[str, Matrix]

    def __post_init__(self) -> None:
        for name in ("B", "merged"):
            arrays = {key: _frozen(value) for key, value in getattr(self, name).items()}
            object.__setattr__(self, name, MappingProxyType(arrays))
        for name in ("gram", "coordinates"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _frozen(getattr(self, name)))

    @classmethod
    def initial(cls, agreement: Agreement) -> SharedState:
        """The state before the first round: B = 0, no consensus yet."""
        layers = adapted_layers(agreement.model)
        return cls(
            round=0,
            B={layer.name: np.zeros((layer.outputs, agreement.model.rank)) for layer in layers},
            gram=None,
            coordinates=None,
            generation=0,
            merged={layer.name: np.zeros((layer.outputs, layer.inputs)) for layer in layers},
        )

    def to_arrays(self) -> dict[str, NDArray[np.float64]]:
        """Flat named arrays, for an .npz checkpoint without pickle."""
        arrays: dict[str, NDArray[np.float64]] = {"round": np.array([self.round], dtype=np.float64)}
        arrays["generation"] = np.array([self.generation], dtype=np.float64)
        arrays |= {f"B/{name}": value for name, value in self.B.items()}
        arrays |= {f"merged/{name}": value for name, value in self.merged.items()}
        if self.gram is not None and self.coordinates is not None:
            arrays |= {"gram": self.gram, "coordinates": self.coordinates}
        return arrays

    @classmethod
    def from_arrays(cls, agreement: Agreement, arrays: Mapping[str, NDArray[np.float64]]) -> SharedState:
        """The inverse of `to_arrays`.

        Raises:
            ConfigError: an array is missing, has another shape than the agreement says, or is not finite.
        """
        empty = cls.initial(agreement)
        count, rank = agreement.anchors.count, agreement.training.coordinate_rank
        shapes: dict[str, tuple[int, ...]] = {key: value.shape for key, value in empty.to_arrays().items()}
        if "gram" in arrays or "coordinates" in arrays:
            shapes |= {"gram": (count, count), "coordinates": (count, rank)}
        for name, shape in shapes.items():
            if name not in arrays or arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
                raise ConfigError(f"the saved shared state does not fit this agreement: {name} is missing or malformed")
        return cls(
            round=int(arrays["round"][0]),
            B={name: arrays[f"B/{name}"] for name in empty.B},
            gram=arrays.get("gram"),
            coordinates=arrays.get("coordinates"),
            generation=int(arrays["generation"][0]),
            merged={name: arrays[f"merged/{name}"] for name in empty.merged},
        )


def private_steps(agreement: Agreement, state: SharedState) -> int:
    """DP steps of the coming round: none in the first, which only fixes the geometry (see `secgeo.training`)."""
    return 0 if state.gram is None else agreement.training.steps_per_round


def apply_sum(state: SharedState, layout: Layout, total: Vector, agreement: Agreement) -> SharedState:
    """The next shared state from the decoded sum `total` ([size] float64) of the nodes' vectors.

    When `merge_every_rounds` divides the new round number, s B A goes into `merged`, B becomes 0 and the next basis is
    used.

    Raises:
        VerificationFailed: the sum is not finite, or a weight sum is too small to divide by.
        LocalProtocolError: the sum has the wrong length.
    """
    if not np.isfinite(total).all():
        raise VerificationFailed("the sum holds NaN or infinity and was not applied")
    parts = unpack(layout, total)
    least = 0.5 / agreement.precision.clamp
    if any(weight < least for weight in parts.weights.values()) or parts.gram_weight < 0.5 / len(agreement.members):
        raise VerificationFailed("a weight sum is smaller than one honest node's weight; the sum was not applied")
    ridge = agreement.precision.ridge
    B = {name: state.B[name] + parts.weighted_delta_b[name] / (ridge + parts.weights[name]) for name in state.B}
    gram = nearest_centred_psd(parts.weighted_gram / parts.gram_weight)
    coordinates = consensus_coordinates(gram, agreement.training.coordinate_rank, state.coordinates)
    merged, generation, finished = dict(state.merged), state.generation, state.round + 1
    every = agreement.training.merge_every_rounds
    if every and finished % every == 0:
        scale = agreement.model.alpha / agreement.model.rank
        for layer in adapted_layers(agreement.model):
            basis = public_projection(agreement.model, layer, generation)
            merged[layer.name] = merged[layer.name] + scale * B[layer.name] @ basis
            B[layer.name] = np.zeros_like(B[layer.name])
        generation += 1
    return SharedState(finished, B, gram, coordinates, generation, merged)
