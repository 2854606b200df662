"""Presets: honest budgets, valid sections, and no torch in the files that torch-free processes import."""

import math
import subprocess
import sys

import pytest

from keys.errors import ConfigError
from protocols.agreement import Privacy
from secgeo.accountant import epsilon_after
from secgeo.presets import noise_for, preset
from secgeo.trunk import trunk_digest


@pytest.mark.parametrize("data", ["breast-cancer", "mfeat"])
@pytest.mark.parametrize(("rounds", "epsilon"), [(3, 8.0), (10, 3.0), (10, 8.0), (40, 8.0)])
def test_the_noise_keeps_every_planned_step_within_the_budget(data: str, rounds: int, epsilon: float) -> None:
    sections = preset(data, 4, rounds, epsilon)
    steps = rounds * sections.training.steps_per_round
    spent = epsilon_after(sections.privacy, steps, sections.privacy.delta)
    assert 0.9 * epsilon < spent <= epsilon == sections.privacy.epsilon_budget
    assert sections.model.trunk_digest == trunk_digest(sections.model)


def test_the_noise_is_the_smallest_that_does() -> None:
    noise = noise_for(8.0, delta=1e-4, sample_rate=0.2, steps=100)
    less = Privacy("record", 0.2, noise - 0.02, 1.0, 1e-4, 8.0)
    assert epsilon_after(less, 100, 1e-4) > 8.0


def test_infinite_epsilon_means_no_noise() -> None:
    assert preset("mfeat", 3, 10, math.inf).privacy.noise_multiplier == 0.0


def test_unknown_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="breast-cancer, mfeat"):
        preset("mnist", 3, 10)


def test_torch_free_files_stay_torch_free() -> None:
    modules = ["update", "trunk", "geometry", "noise", "datasets", "presets", "metrics"]
    code = "import sys; " + "; ".join(f"import secgeo.{name}" for name in modules)
    check = "; from secgeo.presets import preset; preset('mfeat', 3, 10); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code + check], check=False).returncode == 0
