"""An observer inside a trainer: sees every step, adds canaries, and can fix the sample or put other noise in the place of the noised sum.

White-box audits reach into `LocalTrainer` on purpose. The watch wraps what is there, planted bugs included, at three places: the sample
that is drawn, the gradients that come out of it, and the sum, clipped and noised. Everything in between is the product's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keys.errors import ConfigError
from secgeo.model import MultimodalNode
from secgeo.noise import NoiseSource
from secgeo.training import LocalTrainer


def patch(thing: object, **methods: Callable[..., Any]) -> None:
    """Give one object other methods than its class has."""
    for name, method in methods.items():
        setattr(thing, name, method)


def spoil(trainer: LocalTrainer) -> None:
    """Have the gradient of the first record of every piece be infinite, from the loss on."""
    forward = trainer._hooked.forward

    def spoiled(*inputs: Tensor) -> Tensor:
        outputs: Tensor = forward(*inputs).clone()  # The head has looked at its own output by then.
        first = torch.zeros(outputs.shape, dtype=torch.bool, device=outputs.device)
        first[0] = True
        outputs.register_hook(lambda gradient: gradient.masked_fill(first, float("inf")))  # type: ignore[no-untyped-call]
        return outputs

    patch(trainer._hooked, forward=spoiled)


@torch.no_grad()
def projector_inputs(model: MultimodalNode, records: Tensor) -> Tensor:
    """What the tokeniser's linear layer is given of records: [n, features].

    One vector x of each record; so the gradient of the layer's weight, most of a large model, is (that of its bias) x^T.
    """
    given = list[Tensor]()
    handle = model.tokeniser.projector.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        model.tokeniser(records)
    finally:
        handle.remove()
    return given[0]


class Canaries(Protocol):
    """m gradients that no record has."""

    def write(self, chosen: NDArray[np.int64], into: Tensor) -> None:
        """Write the gradients of these k over `into` [k, d]."""
        ...

    def project(self, gradient: Tensor) -> NDArray[np.float64]:
        """How much of a gradient [d] lies in the direction of each: [m]."""
        ...


class DiracCanaries:
    """Each canary moves a parameter of its own, and no other one: the strongest against additive noise (Nasr et al. 2023).

    Args:
        count: how many.
        size: number of private parameters d.
        length: the norm of each.

    Attributes:
        places: the parameter of each [m].

    Raises:
        ConfigError: there are fewer parameters than canaries.
    """

    def __init__(self, count: int, size: int, length: float) -> None:
        if count > size:
            raise ConfigError(f"{count} Dirac canaries need as many parameters, and the model has {size}")
        self.places = np.random.default_rng().permutation(size)[:count]
        self._places = torch.from_numpy(self.places)
        self._length = length

    def write(self, chosen: NDArray[np.int64], into: Tensor) -> None:
        """Write the gradients of these k over `into` [k, d]."""
        into.zero_()
        into[torch.arange(len(chosen)), self._places[torch.from_numpy(chosen)]] = self._length

    def project(self, gradient: Tensor) -> NDArray[np.float64]:
        """How much of a gradient [d] lies in the direction of each: [m]."""
        projected: NDArray[np.float64] = gradient[self._places].double().numpy()
        return projected


class RandomCanaries:
    """Each canary is a random direction; d must be large against m for them to be nearly orthogonal.

    Args:
        count: how many.
        size: number of private parameters d.
        lengths: the norm of all, or of each.
    """

    def __init__(self, count: int, size: int, lengths: float | Sequence[float]) -> None:
        drawn = torch.from_numpy(np.random.default_rng().standard_normal((count, size), dtype=np.float32))
        self._directions = drawn / drawn.norm(dim=1, keepdim=True)
        self._lengths = torch.tensor(np.broadcast_to(lengths, count), dtype=torch.float32).reshape(-1, 1)

    def write(self, chosen: NDArray[np.int64], into: Tensor) -> None:
        """Write the gradients of these k over `into` [k, d]."""
        who = torch.from_numpy(chosen)
        torch.mul(self._directions[who], self._lengths[who], out=into)

    def project(self, gradient: Tensor) -> NDArray[np.float64]:
        """How much of a gradient [d] lies in the direction of each: [m]."""
        projected: NDArray[np.float64] = (self._directions @ gradient).double().numpy()
        return projected


@dataclass(frozen=True, slots=True)
class Seen:
    """One step: who was sampled [units, then the canaries that are in], the clipped sum [d], and the same with noise [d]."""

    sample: NDArray[np.bool_]
    summed: Tensor
    noised: Tensor

    @property
    def noise(self) -> Tensor:
        """What was added [d], float64."""
        return self.noised.double() - self.summed.double()


class Watch:
    """Watches one trainer.

    Args:
        trainer: to be watched.
        observe: called after the noise of every step was added.
        canaries: more privacy units, with these gradients ...
        included: ... of which these [m] are in the data.
        fixed: the sample [units] of every step, instead of the one that was drawn.
        instead: what the optimiser is given instead of the noised sum: noise that has nothing to do with the records, so that nothing of
            them should be left afterwards.

    Attributes:
        observe, fixed: as above; both may be changed between steps.
        touched: how often gradients of private records were computed.
        moved: how often the parameters were changed.
        units: privacy units without canaries.
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        observe: Callable[[Seen], None] | None = None,
        *,
        canaries: Canaries | None = None,
        included: NDArray[np.bool_] | None = None,
        fixed: NDArray[np.bool_] | None = None,
        instead: NoiseSource | None = None,
    ) -> None:
        self.observe, self.fixed, self._canaries, self._instead = observe, fixed, canaries, instead
        self.touched = self.moved = 0
        self.units = len(trainer._units)
        self._members = np.flatnonzero(included) if included is not None else np.zeros(0, np.int64)
        trainer._units = [*trainer._units, *(np.zeros(0, np.int64) for _ in self._members)]
        self._sample = np.zeros(len(trainer._units), np.bool_)
        self._optimizer = trainer._optimizer
        self._gradient, self._noise = trainer._private_gradient, self._optimizer.add_noise
        patch(trainer, _private_gradient=self._watched_gradient)
        patch(self._optimizer, add_noise=self._watched_noise)
        self._optimizer.original_optimizer.register_step_post_hook(self._count)

    def _watched_gradient(self, drawn: NDArray[np.bool_]) -> None:
        self.touched += 1
        self._sample = drawn
        chosen = drawn if self.fixed is None else self.fixed
        self._gradient(chosen[: self.units])
        canaries = self._members[np.flatnonzero(chosen[self.units :])]
        if self._canaries is None or not len(canaries):
            return
        vector = self._optimizer.vector
        records, size = vector.grad_sample.shape
        rows = vector.grad_sample.new_empty((records + len(canaries), size))
        rows[:records] = vector.grad_sample
        self._canaries.write(canaries, rows[records:])
        vector.grad_sample = rows

    def _watched_noise(self) -> None:
        self._noise()
        vector = self._optimizer.vector
        if self.observe is not None:
            self.observe(Seen(self._sample, vector.summed_grad.detach().clone(), vector.grad.detach().clone()))
        if self._instead is not None:
            std = max(self._optimizer.noise_multiplier, 1.0) * self._optimizer.max_grad_norm
            vector.grad = self._instead.gaussian(vector.shape, std).to(vector)

    def _count(self, *_: object) -> None:
        self.moved += 1
