"""What a record does to a model, to first order: its clipped gradients along a simulated trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from audit.leakage.evidence import MOMENTUM, UNCLIPPED, Flips, Values
from audit.leakage.scene import Scene, join_records, take_records, vary
from audit.target import Target
from audit.watch import projector_inputs
from secgeo.geolora import directions
from secgeo.model import build_model
from secgeo.training import RoundUpdate
from secgeo.update import apply_sum, gram_weight, precision_weight

GRADIENTS = 512
"""Records per pass."""

PROJECTOR_WEIGHT, PROJECTOR_BIAS = "tokeniser.projector.weight", "tokeniser.projector.bias"


class Whitebox:
    """The attacker's copy of the model, in float64. Parameters are flat: B in the order of the update, then the local ones."""

    def __init__(self, target: Target) -> None:
        self.model = build_model(target.agreement, target.member.modality, target.anchors).double()
        self.parameters = self.model.private_parameters()
        known = {id(p): name for name, p in self.model.named_parameters()}
        self._names = [known[id(p)] for p in self.parameters]
        self._sizes = [p.numel() for p in self.parameters]
        self._layers = len(self.model.shared_parameters())
        self.shared = sum(self._sizes[: self._layers])
        self._anchors = torch.from_numpy(target.anchors).double()
        self._limit = target.agreement.privacy.max_grad_norm

    def take(self, trainer: Any) -> Tensor:
        """Copy a trainer's model; gives its parameters [P]."""
        self.model.load_state_dict(trainer.model.state_dict())
        return torch.cat([p.detach().flatten() for p in self.parameters])

    @torch.no_grad()
    def gram(self, flat: Tensor) -> Values:
        """The Gram matrix of the anchors with parameters `flat`, as its upper triangle."""
        kept = [p.clone() for p in self.parameters]
        for p, value in zip(self.parameters, torch.split(flat, self._sizes), strict=True):
            p.copy_(value.view_as(p))
        upper: Values = self._gram().numpy()
        for p, value in zip(self.parameters, kept, strict=True):
            p.copy_(value)
        return upper

    def gram_slopes(self, along: Values) -> Values:
        """How the Gram matrix along [k, K] changes with the parameters that were taken last: [k, P]."""
        upper = self._gram()
        slopes = []
        for one in torch.from_numpy(along):
            found = torch.autograd.grad(upper @ one, self.parameters[:-2], retain_graph=True)  # all but the head
            parts = [part.clone() for part in found]
            for index, layer in enumerate(self.model.adapted.values()):
                # The row norms are detached in training; but they do change with B.
                norms, scale = layer.row_norms(), layer.scale
                turn = scale * (layer.base @ layer.projection.T + scale * layer.direction.weight.detach())
                shrink = parts[self._layers + index] * layer.magnitude.weight.detach() / norms.square()
                parts[index] -= shrink[:, None] * turn
            slopes.append(torch.cat([*(part.flatten() for part in parts), torch.zeros(sum(self._sizes[-2:]))]))
        found_slopes: Values = torch.stack(slopes).numpy()
        return found_slopes

    def _gram(self) -> Tensor:
        embedded = self.model.embed(self._anchors)
        embedded = embedded - embedded.mean(dim=0)
        kernel = embedded @ embedded.T
        upper: Tensor = kernel[*torch.triu_indices(len(kernel), len(kernel))] / kernel.norm()
        return upper

    def gradients(self, features: Tensor, labels: Tensor, *, shared: bool = False) -> Tensor:
        """Clipped gradients [n, P] of records at the parameters that were taken last; of B only [n, D] if `shared`."""

        def flat(parts: dict[str, Tensor], inputs: Tensor) -> Tensor:
            if shared:
                return torch.cat([parts[name] for name in self._names[: self._layers]], dim=1)
            weight = (parts[PROJECTOR_BIAS][:, :, None] * inputs[:, None, :]).flatten(1)
            return torch.cat([weight if name == PROJECTOR_WEIGHT else parts[name] for name in self._names], dim=1)

        return torch.cat([flat(*clipped) for clipped in self._clipped(features, labels, shared)])

    def projected(self, features: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
        """`gradients` along `directions` [P, k]: [n, k]."""
        along = dict(zip(self._names, torch.split(directions, self._sizes), strict=True))

        def product(parts: dict[str, Tensor], inputs: Tensor) -> Tensor:
            bias = parts[PROJECTOR_BIAS]
            turned = (bias @ along[PROJECTOR_WEIGHT].reshape(bias.shape[1], -1)).reshape(len(bias), inputs.shape[1], -1)
            found = torch.einsum("ni,nik->nk", inputs, turned)
            for name, part in parts.items():
                found += part @ along[name]
            return found

        return torch.cat([product(*clipped) for clipped in self._clipped(features, labels)])

    def _clipped(
        self, features: Tensor, labels: Tensor, shared: bool = False
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Of some records at a time the parts of their clipped gradients, each [n, size], and the projector's inputs [n, features].

        The part of the projector's weight is left out: it is (that of its bias) times the inputs. So are all but B if only these
        are wanted, and nothing is clipped.
        """
        unclipped = self._limit >= UNCLIPPED
        wanted = self._names[: self._layers] if shared and unclipped else self._names
        fixed, named = dict(self.model.named_buffers()), dict[str, Tensor]()
        for name, p in zip(self._names, self.parameters, strict=True):
            (named if name in wanted and name != PROJECTOR_WEIGHT else fixed)[name] = p.detach()

        def loss(parameters: dict[str, Tensor], record: Tensor, label: Tensor) -> Tensor:
            logits = functional_call(self.model, (parameters, fixed), (record[None],))
            return functional.cross_entropy(logits, label[None])

        for some, of in zip(torch.split(features, GRADIENTS), torch.split(labels, GRADIENTS), strict=True):
            found = vmap(grad(loss), in_dims=(None, 0, 0))(named, some, of)
            parts = {name: found[name].flatten(1) for name in named}
            inputs = projector_inputs(self.model, some)
            if not unclipped:
                squares = sum(part.square().sum(dim=1) for part in parts.values())
                squares += parts[PROJECTOR_BIAS].square().sum(dim=1) * inputs.square().sum(dim=1)
                factor = (self._limit / squares.sqrt().clamp_min(1e-12)).clamp_max(1.0)
                for part in parts.values():
                    part *= factor[:, None]
            yield parts, inputs


@dataclass(frozen=True, slots=True)
class Effects:
    """What records do per step, from a trajectory that the attacker simulates. Records: base, candidates, strangers.

    Attributes:
        shared: per round [steps, records, D], change of B if a record is in the sample of that step.
        total: [base and candidates, P], expected change of all parameters after the first round.
        end: parameters [P] after the first round.
    """

    shared: list[Values]
    total: Values
    end: Tensor


def effects_of(scene: Scene, target: Target, whitebox: Whitebox, flips: Flips, others: Values) -> Effects:
    """Simulate the rounds: every record counts in every step with weight `sample_rate`, and there is no noise."""
    agreement, batch = target.agreement, target.member.expected_batch_size
    rate, steps = agreement.privacy.sample_rate, agreement.training.steps_per_round
    records = join_records(scene.base, scene.candidates, scene.strangers)
    features, labels = torch.from_numpy(records.features).double(), torch.from_numpy(records.labels)
    mean = vary(
        target,
        privacy={"sample_rate": 1.0, "noise_multiplier": 0.0},
        batch=batch / rate,
        hospital_privacy=None,
    )
    trainer = scene.trainer(mean, join_records(scene.base, take_records(scene.candidates, np.flatnonzero(flips))))
    speed = np.full(sum(whitebox._sizes), agreement.training.local_learning_rate)
    speed[: whitebox.shared] = agreement.training.learning_rate
    shared, state = [], scene.start.state
    own = len(scene.base) + len(scene.candidates)
    total, end = np.zeros((own, len(speed))), torch.empty(0)
    weight = precision_weight(agreement, target.member)
    for round_number in range(scene.rounds):
        trainer.load_shared(state)
        trainer.warm_up()
        seen = np.zeros((steps, len(records), whitebox.shared))
        for step in range(steps):
            whitebox.take(trainer)
            whole = own if round_number == 0 else 0  # of so many records the local parameters are wanted too
            if whole:
                change = whitebox.gradients(features[:own], labels[:own]).numpy()
                change *= -speed / batch
                seen[step, :own] = change[:, : whitebox.shared]
                change *= rate
                echo = (1.0 - MOMENTUM ** (steps - step)) / (1.0 - MOMENTUM)
                change[:, whitebox.shared :] *= echo
                total += change
            rest = whitebox.gradients(features[whole:], labels[whole:], shared=True).numpy()
            seen[step, whole:] = rest * (-agreement.training.learning_rate / batch)
            trainer.step()
        if round_number == 0:
            end = whitebox.take(trainer)
        shared.append(seen)
        after = directions(trainer.model.adapted.items())
        update = RoundUpdate(
            {name: after[name] - state.B[name] for name in after},
            dict.fromkeys(after, weight),
            trainer.anchor_gram(),
            gram_weight(agreement, target.member),
            steps,
        )
        state = apply_sum(state, scene.layout, update.vector(scene.layout) + others, agreement)
    return Effects(shared, total, end)
