"""Local training of one node under differential privacy, with the public alignment gradient (DESIGN sections 8 and 9).

One DP step:
    g = (sum over the Poisson sample of clip_C(grad) + noise_multiplier C N(0, I)) / b     over ALL private parameters
    theta <- theta - lr (g + grad of lambda (1 - CKA(K_k, K*)) + mu ||Z_k / ||Z_k|| - Z*||^2)
b is the public expected batch size. Clipping, the accountant and the step hook are Opacus'; the noise is drawn from a
`NoiseSource`. The anchor gradient needs no noise: anchors are independent of private records, the private loss is per
record, and the parameters it is taken at were made from noised or public values only. It does not go through
`PerSampleGradients`, and it is added after `pre_step()`, because the step takes `p.grad` from the noised vector only then.

Rounds: the first round has no consensus, so it spends no privacy: the node sends dB = 0 and its first Gram matrix.
Every later round starts with an anchor warm-up (tokeniser and magnitudes only, public data, no cost) and then takes
`steps_per_round` DP steps. The shared coordinates of a record are the first `coordinate_rank` entries of its embedding.

The neighbouring relation is add or remove one unit: a record, or a patient with all his records. Then patients are sampled, and the
gradients of a patient's records (the first `records_per_patient`) are summed before they are clipped; b counts patients. The number
of private units is used for sampling only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from opacus.optimizers.utils import params as parameters_of
from torch import Tensor, nn
from torch.nn import functional

from keys.errors import ConfigError, LocalProtocolError
from protocols.agreement import Agreement, Member, Model
from secgeo.accountant import epsilon_after
from secgeo.datasets import LabelledRecords, anchor_digest
from secgeo.geolora import directions
from secgeo.geometry import centre, gram, normalise
from secgeo.model import build_model
from secgeo.noise import NoiseSource
from secgeo.per_sample import PerSampleGradients, split
from secgeo.trunk import adapted_layers, public_projection, trunk_weight
from secgeo.update import Layout, SharedState, gram_weight, pack, precision_weight, private_steps

EVALUATION_BATCH = 1024

PHYSICAL_BATCH = 256
"""Records per backward pass on a CPU. Larger Poisson samples are clipped and summed piece by piece; the step stays one step."""

GPU_PASS_BYTES = 1 << 32
"""A GPU is slow with small passes: it takes as many records as need about this much memory (at most twice it, to sum patients)."""

NORM_VALUES = 1 << 12
"""torch adds up squares in a few running float32 sums: the norm of 10^7 values can come out 1 % too small, that of so many 1.5e-5."""


class CryptographicDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer with noise from a NoiseSource, added in float64 before rounding to the parameter's type.

    To Opacus there is one parameter, a vector of all [d]: so it clips and sums one tensor, and not each parameter by itself.

    Attributes:
        vector: per-unit gradients of all parameters are its `grad_sample` [n, d], the clipped sum its `summed_grad` [d], and what a
            step takes its `grad` [d]. It has no values of its own.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, noise: NoiseSource, **settings: Any) -> None:
        self._noise = noise
        parameters = parameters_of(optimizer)
        self.vector: Any = nn.Parameter(parameters[0].new_empty(sum(p.numel() for p in parameters)))
        super().__init__(optimizer, **settings)

    @property
    def params(self) -> list[nn.Parameter]:
        """What Opacus takes for the parameters."""
        return [self.vector]

    @property
    def grad_samples(self) -> list[Tensor]:
        """What Opacus takes the norms of, before that of all norms: pieces [n, <= NORM_VALUES]."""
        return list(torch.split(self.vector.grad_sample, NORM_VALUES, dim=1))

    @property
    def parameters(self) -> list[Any]:
        """The parameters, in the order that they have in the vector."""
        return list(parameters_of(self.original_optimizer))

    def split(self, values: Tensor) -> list[Tensor]:
        """`values` [..., d] as one view [..., *p.shape] for each parameter."""
        return split(values, self.parameters)

    def add_noise(self) -> None:
        """vector.grad = clipped sum + N(0, (noise_multiplier * max_grad_norm)^2)."""
        summed = self.vector.summed_grad
        if getattr(summed, "_processed", False):
            raise LocalProtocolError("a clipped gradient was used twice; call zero_grad() before every step")
        std = self.noise_multiplier * self.max_grad_norm
        noised = summed.double() + self._noise.gaussian(summed.shape, std, device=summed.device)
        self.vector.grad = noised.to(summed.dtype)
        summed._processed = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients of the vector and the parameters."""
        self.vector.grad = self.vector.grad_sample = self.vector.summed_grad = None
        for p in self.parameters:
            p.grad = None


def alignment_loss(embeddings: Tensor, consensus: Tensor) -> Tensor:
    """1 - CKA between the Gram matrix of `embeddings` [a, width] and a centred `consensus` [a, a]."""
    centred = embeddings - embeddings.mean(dim=0)
    kernel = centred @ centred.T
    loss: Tensor = 1.0 - (kernel * consensus).sum() / (kernel.norm() * consensus.norm() + 1e-12)
    return loss


def coordinate_loss(embeddings: Tensor, coordinates: Tensor) -> Tensor:
    """||Z_k / ||Z_k|| - Z*||^2 with Z_k the centred first k entries of `embeddings`, for `coordinates` [a, k]."""
    shared = embeddings[:, : coordinates.shape[1]]
    shared = shared - shared.mean(dim=0)
    loss: Tensor = (shared / (shared.norm() + 1e-12) - coordinates).square().sum()
    return loss


@dataclass(frozen=True)
class RoundUpdate:
    """What one node made in one round. Everything in it is noised or public; where the agreement protects hospitals, K_hat is public.

    Attributes:
        delta_b: per adapted layer the change of B [outputs, rank].
        weights: per adapted layer the precision weight w.
        gram: K_hat [a, a], centred, at unit Frobenius norm.
        gram_weight: w_g.
        steps: DP steps taken in this round.
    """

    delta_b: Mapping[str, NDArray[np.float64]]
    weights: Mapping[str, float]
    gram: NDArray[np.float64]
    gram_weight: float
    steps: int

    def vector(self, layout: Layout) -> NDArray[np.float64]:
        """The flat vector [layout.size] for the secure sum."""
        return pack(layout, self.delta_b, self.weights, self.gram, self.gram_weight)


def physical_batch(device_type: str, model: Model, parameters: int) -> int:
    """Records per backward pass on such a device, for a model with so many private parameters."""
    if device_type == "cpu":
        return PHYSICAL_BATCH
    activations = model.layers * model.tokens * (12 * model.width + 3 * model.feedforward)
    return max(1, GPU_PASS_BYTES // (4 * (parameters + activations)))


def _units(agreement: Agreement, records: LabelledRecords) -> list[NDArray[np.int64]]:
    """Which records each privacy unit has."""
    if agreement.privacy.unit == "patient":
        return records.by_patient(agreement.privacy.records_per_patient)
    return list(np.arange(len(records)).reshape(-1, 1))


def _pieces(units: Sequence[NDArray[np.int64]], most: int) -> list[list[NDArray[np.int64]]]:
    """Units, none of them split, in groups of at most `most` records; a larger unit is a group of its own."""
    pieces: list[list[NDArray[np.int64]]] = []
    size = most
    for unit in units:
        if size + len(unit) > most or not pieces:
            pieces.append([])
            size = 0
        pieces[-1].append(unit)
        size += len(unit)
    return pieces


class LocalTrainer:
    """Trains one node's model on its private records.

    Args:
        agreement: the pinned study agreement; every parameter comes from it.
        member: which hospital this is.
        records: its private records.
        anchors: the public anchors' view of its modality, [a, *shape]; the agreement pins their digest.
        noise: where sampling and noise come from.
        device: a torch device; by default the GPU if there is one.
        autocast: compute private gradients in bfloat16 where torch holds that for safe; they are clipped, summed and noised in float32.

    Attributes:
        model: the node's model.
        physical_batch: records per backward pass, and more only if one patient has more.

    Raises:
        ConfigError: records or anchors do not fit the agreement.
    """

    def __init__(
        self,
        agreement: Agreement,
        member: Member,
        records: LabelledRecords,
        anchors: NDArray[np.float32],
        *,
        noise: NoiseSource,
        device: str | None = None,
        autocast: bool = False,
    ) -> None:
        modality = agreement.modality(member.modality)
        if anchor_digest(anchors) != modality.anchor_digest or len(anchors) != agreement.anchors.count:
            raise ConfigError(
                f"these are not the anchors that the agreement pins for {modality.name}; get the published file again"
            )
        if records.features.shape[1:] != modality.shape:
            raise ConfigError(
                f"{modality.name} records have shape {modality.shape}, but the data have {records.features.shape[1:]}"
            )
        if int(records.labels.max(initial=0)) >= agreement.study.classes:
            raise ConfigError(f"a label is outside of the study's {agreement.study.classes} classes")
        self._agreement, self._member, self._noise = agreement, member, noise
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._autocast = autocast
        self._features = torch.from_numpy(records.features).to(self._device)
        self._labels = torch.from_numpy(records.labels).to(self._device)
        self._units = _units(agreement, records)
        self._anchors = torch.from_numpy(anchors).to(self._device)
        self.model = build_model(agreement, modality.name, anchors).to(self._device).train()
        private = self.model.private_parameters()
        self._hooked = PerSampleGradients(self.model, private)
        self.physical_batch = physical_batch(self._device.type, agreement.model, sum(p.numel() for p in private))
        self._untrained_gram = self.anchor_gram()
        self._state: SharedState | None = None
        self._consensus: tuple[Tensor, Tensor] | None = None
        self._optimizer_steps = 0
        self._accountant = RDPAccountant()
        self._optimizer = self._make_optimizer()
        tokeniser = self.model.tokeniser.projector
        magnitudes = [layer.magnitude.weight for layer in self.model.adapted.values()]
        self._warm_up_parameters = [*tokeniser.parameters(), *magnitudes]
        self._warm_up_optimizer = torch.optim.Adam(self._warm_up_parameters, lr=agreement.training.warmup_learning_rate)

    def _make_optimizer(self) -> CryptographicDPOptimizer:
        training, privacy = self._agreement.training, self._agreement.privacy
        groups = [
            {"params": self.model.shared_parameters(), "lr": training.learning_rate, "momentum": 0.0},
            {"params": self.model.local_parameters(), "lr": training.local_learning_rate},
        ]
        inner = torch.optim.SGD(groups, lr=training.learning_rate, momentum=0.9)
        inner.register_step_post_hook(self._count_step)
        optimizer = CryptographicDPOptimizer(
            inner,
            noise=self._noise,
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            expected_batch_size=self._member.expected_batch_size,
            loss_reduction="mean",  # the loss is summed; this divides the noised sum by the public b
        )
        optimizer.attach_step_hook(self._accountant.get_optimizer_hook_fn(privacy.sample_rate))
        return optimizer

    def _count_step(self, *_: object) -> None:
        self._optimizer_steps += 1

    @property
    def steps_taken(self) -> int:
        """DP steps that the accountant has booked.

        Raises:
            LocalProtocolError: the optimiser took another number of steps: privacy was spent without being booked.
        """
        booked = sum(int(steps) for _, _, steps in self._accountant.history)
        if booked != self._optimizer_steps:
            raise LocalProtocolError(
                f"{self._optimizer_steps} optimiser steps but {booked} booked by the accountant; stop and report this"
            )
        return booked

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon spent by this trainer so far, at `delta` (the agreement's by default)."""
        privacy = self._agreement.privacy
        return epsilon_after(privacy, self.steps_taken, privacy.delta if delta is None else delta)

    def load_shared(self, state: SharedState) -> None:
        """Take over the shared B, basis, merged weights and consensus. Local parameters stay as they are."""
        for spec in adapted_layers(self._agreement.model):
            base = trunk_weight(self._agreement.model, spec).astype(np.float64) + state.merged[spec.name]
            basis = public_projection(self._agreement.model, spec, state.generation)
            self.model.adapted[spec.name].load(base, basis, state.B[spec.name])
        self._state = state
        self._consensus = None
        if state.gram is not None and state.coordinates is not None:
            target = (torch.tensor(state.gram), torch.tensor(state.coordinates))
            self._consensus = (target[0].float().to(self._device), target[1].float().to(self._device))

    def _public_gradient(self, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """The gradient of the anchor objective, from public data and current parameters only. Leaves `p.grad` alone."""
        training = self._agreement.training
        if self._consensus is None or training.alignment_weight == training.coordinate_weight == 0.0:
            return [None] * len(parameters)
        embeddings = self.model.embed(self._anchors)
        loss = training.alignment_weight * alignment_loss(embeddings, self._consensus[0])
        loss = loss + training.coordinate_weight * coordinate_loss(embeddings, self._consensus[1])
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    def warm_up(self) -> None:
        """Fit tokeniser and magnitudes to the consensus on the anchors: `warmup_steps` of Adam, no privacy cost.

        Does nothing before the first consensus.
        """
        for _ in range(self._agreement.training.warmup_steps):
            for p, gradient in zip(
                self._warm_up_parameters, self._public_gradient(self._warm_up_parameters), strict=True
            ):
                p.grad = gradient
            self._warm_up_optimizer.step()

    def _private_gradient(self, chosen: NDArray[np.bool_]) -> None:
        """Per-unit gradients [n, d] of the chosen units, into the optimiser's vector; an empty sample gives an empty one.

        What is not finite in a gradient becomes zero: clipping cannot bound NaN, and one NaN in the sum would tell that its unit was
        sampled.
        """
        vector = self._optimizer.vector
        pieces = _pieces([self._units[unit] for unit in np.flatnonzero(chosen)], self.physical_batch)
        if not pieces:
            vector.grad_sample = vector.new_zeros((0, *vector.shape))
        for number, piece in enumerate(pieces, start=1):
            index = torch.from_numpy(np.concatenate(piece)).to(self._device)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                logits = self._hooked(self._features[index])
                functional.cross_entropy(logits, self._labels[index], reduction="sum").backward()  # type: ignore[no-untyped-call]
            samples = self._hooked.taken()
            sizes = [len(own) for own in piece]
            if max(sizes) > 1:
                owner = torch.from_numpy(np.repeat(np.arange(len(piece)), sizes)).to(self._device)
                samples = samples.new_zeros((len(piece), samples.shape[1])).index_add_(0, owner, samples)
            vector.grad_sample = torch.nan_to_num_(samples, nan=0.0, posinf=0.0, neginf=0.0)
            if number < len(pieces):
                self._optimizer.clip_and_accumulate()

    def step(self) -> None:
        """One DP step on a Poisson sample."""
        optimizer, parameters = self._optimizer, self._optimizer.parameters
        if [id(p) for p in parameters] != [id(p) for p in self._hooked.ordered]:
            raise LocalProtocolError("the optimiser does not hold exactly the private parameters, in their order")
        optimizer.zero_grad()
        public = self._public_gradient(parameters)
        self._private_gradient(self._noise.poisson_mask(len(self._units), self._agreement.privacy.sample_rate))
        if not optimizer.pre_step():
            raise LocalProtocolError("Opacus skipped a DP step; no step may be skipped here")
        for p, own, gradient in zip(parameters, optimizer.split(optimizer.vector.grad), public, strict=True):
            p.grad = own if gradient is None else own + gradient
        optimizer.original_optimizer.step()
        optimizer.zero_grad()

    def train_round(self, state: SharedState) -> RoundUpdate:
        """Load the shared state, warm up on the anchors, take the round's DP steps, and report the change.

        Raises:
            LocalProtocolError: steps and bookkeeping disagree, or what is trained is not exactly the private parameters.
        """
        self.load_shared(state)
        self.warm_up()
        steps, before = private_steps(self._agreement, state), self.steps_taken
        for _ in range(steps):
            self.step()
        after = directions(self.model.adapted.items())
        weight = precision_weight(self._agreement, self._member)
        return RoundUpdate(
            delta_b={name: after[name] - state.B[name] for name in after},
            weights=dict.fromkeys(after, weight),
            gram=self._untrained_gram if self._agreement.hospital_privacy else self.anchor_gram(),
            gram_weight=gram_weight(self._agreement, self._member),
            steps=self.steps_taken - before,
        )

    def anchor_gram(self) -> NDArray[np.float64]:
        """K_hat [a, a] of the anchors under the current model: centred, at unit Frobenius norm."""
        return normalise(centre(gram(self._map(self.model.embed, self._anchors))))

    @torch.no_grad()
    def _map(self, function: Callable[[Tensor], Tensor], records: Tensor) -> NDArray[np.float64]:
        parts = [function(records[i : i + EVALUATION_BATCH]) for i in range(0, len(records), EVALUATION_BATCH)]
        return torch.cat(parts).double().cpu().numpy()

    def embed(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Embeddings [n, width] of records [n, *shape]."""
        return self._map(self.model.embed, torch.from_numpy(features).to(self._device))

    def evaluate(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
        """Accuracy on records [n, *shape] with labels [n]."""
        logits = self._map(self.model.forward, torch.from_numpy(features).to(self._device))
        return float(np.mean(logits.argmax(axis=1) == labels))

    def local_state(self) -> dict[str, NDArray[np.float32]]:
        """Magnitudes, tokeniser and head as arrays, for an .npz checkpoint. They are DP-trained but never sent."""
        shared = {id(p) for p in self.model.shared_parameters()}
        named = self.model.named_parameters()
        return {name: p.detach().cpu().numpy().copy() for name, p in named if id(p) not in shared}

    @torch.no_grad()
    def load_local_state(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """The inverse of `local_state`.

        Raises:
            ConfigError: an array is missing, has another shape, or is not finite.
        """
        named = dict(self.model.named_parameters())
        for name, current in self.local_state().items():
            value = arrays.get(name)
            if value is None or value.shape != current.shape or not np.isfinite(value).all():
                raise ConfigError(f"the saved local model does not fit this agreement: {name} is missing or malformed")
            named[name].copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))
