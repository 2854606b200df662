"""Agreement sections that make the two demonstrations learn well under a finite, honest privacy budget. Torch-free.

The values were tuned on the validation set of seeds that the reported results do not use (docs/results.md); never on
test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from keys.errors import ConfigError
from protocols.agreement import Model, Precision, Privacy, Training
from secgeo.accountant import LARGE_ORDERS
from secgeo.trunk import trunk_digest


@dataclass(frozen=True)
class Preset:
    """The learning sections of an agreement. `expected_batch_size` is sample_rate times the nominal record count."""

    model: Model
    training: Training
    privacy: Privacy
    precision: Precision


def _model(**values: int | float) -> Model:
    draft = Model(trunk_digest="0" * 64, **values)  # type: ignore[arg-type]
    return msgspec.structs.replace(draft, trunk_digest=trunk_digest(draft))


_ORDERS = [*(2.0 + x / 10.0 for x in range(90)), *range(12, 64), *LARGE_ORDERS]
"""Those that nodes try, from 2 up: fewer orders can only give more noise."""


def noise_for(epsilon: float, *, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest noise multiplier (rounded up to 0.01) that keeps `steps` within `epsilon`; 0 if that is infinite.

    Google's RDP accountant, add-or-remove-one: with a subset of the orders that nodes try.
    """
    if math.isinf(epsilon):
        return 0.0
    from dp_accounting import dp_event, mechanism_calibration, rdp

    noise = mechanism_calibration.calibrate_dp_mechanism(
        lambda: rdp.RdpAccountant(_ORDERS),
        lambda sigma: dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(sample_rate, dp_event.GaussianDpEvent(sigma)), steps
        ),
        epsilon,
        delta,
        mechanism_calibration.LowerEndpointAndGuess(0.1, 1.0),
        tol=1e-3,
    )
    return math.ceil(float(noise) * 100.0) / 100.0


_MODELS = {
    "breast-cancer": {"width": 32, "layers": 1, "heads": 4, "tokens": 2, "feedforward": 64, "rank": 4, "alpha": 4.0},
    "mfeat": {"width": 64, "layers": 2, "heads": 4, "tokens": 4, "feedforward": 128, "rank": 8, "alpha": 8.0},
}

_TRAINING = {
    "breast-cancer": Training(
        steps_per_round=8,
        learning_rate=0.1,
        local_learning_rate=0.1,
        warmup_steps=40,
        warmup_learning_rate=0.003,
        coordinate_rank=10,
    ),
    "mfeat": Training(
        steps_per_round=10,
        learning_rate=0.1,
        local_learning_rate=0.1,
        warmup_steps=10,
        warmup_learning_rate=0.003,
        coordinate_rank=32,
    ),
}

_SAMPLE_RATE = {"breast-cancer": 0.25, "mfeat": 0.4}
_DELTA = {"breast-cancer": 1e-3, "mfeat": 1e-4}


def preset(data: str, nodes: int, rounds: int, epsilon: float = 8.0) -> Preset:
    """The sections for a demonstration of that many hospitals and rounds, with noise for a budget of `epsilon`.

    Raises:
        ConfigError: there is no demonstration of this name.
    """
    if data not in _MODELS:
        raise ConfigError(f"there is no demonstration {data!r}; choose one of: {', '.join(_MODELS)}")
    training, sample_rate, delta = _TRAINING[data], _SAMPLE_RATE[data], _DELTA[data]
    noise = noise_for(epsilon, delta=delta, sample_rate=sample_rate, steps=rounds * training.steps_per_round)
    return Preset(
        model=_model(seed=20260117, **_MODELS[data]),
        training=training,
        privacy=Privacy("record", sample_rate, noise, max_grad_norm=1.0, delta=delta, epsilon_budget=min(epsilon, 1e6)),
        precision=Precision(),
    )
