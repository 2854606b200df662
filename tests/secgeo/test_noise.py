"""The noise source: distribution, sampling rate, no reuse, no copies, no leak through repr."""

import ast
import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from keys.errors import ConfigError, LocalProtocolError
from protocols.ledger import RNG_KINDS
from secgeo.noise import BLOCK_VALUES, RNG_KIND, NoiseSource

KEY = bytes(range(32))
ROOT = Path(__file__).parents[2]


def test_gaussian_passes_kolmogorov_smirnov_and_variance() -> None:
    sample = NoiseSource(KEY).gaussian((200_000,), 3.0).numpy()
    assert stats.kstest(sample / 3.0, "norm").pvalue > 1e-3
    assert sample.var() == pytest.approx(9.0, rel=0.02)
    assert abs(sample.mean()) < 0.04
    assert stats.kurtosis(sample) == pytest.approx(0.0, abs=0.05)


def test_each_value_is_half_the_sum_of_four_gaussians() -> None:
    """The mitigation of floating-point attacks: one value costs four 52-bit uniforms."""
    parts = ndtri(NoiseSource(KEY).uniform(4 * 5)).reshape(4, 5)
    np.testing.assert_allclose(NoiseSource(KEY).gaussian((5,), 3.0), 3.0 * parts.sum(axis=0) / 2.0, rtol=1e-14)


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 65_541, 131_072, 131_075])
def test_no_value_is_left_out_where_blocks_meet(size: int) -> None:
    source, block = NoiseSource(KEY), BLOCK_VALUES // 4
    sizes = [min(block, size - start) for start in range(0, size, block)]
    parts = [ndtri(source.uniform(4 * count)).reshape(4, count).sum(axis=0) / 2.0 for count in sizes]
    found, wanted = NoiseSource(KEY).gaussian((size,), 1.0), np.concatenate([np.zeros(0), *parts])
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)


def test_the_keystream_is_aes_256_ctr() -> None:
    """First block for the zero key and counter: a published AES-256 known answer."""
    block = bytes.fromhex("dc95c078a2408989ad48a21492842087")
    wanted = (np.frombuffer(block, dtype="<u8") >> np.uint64(12)).astype(np.float64)
    np.testing.assert_array_equal(NoiseSource(bytes(32)).uniform(2), (wanted + 0.5) * 2.0**-52)


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_no_keystream_gives_zero_one_or_infinite_noise(byte: int) -> None:
    source = NoiseSource(KEY)
    source._stream = SimpleNamespace(update=lambda data: bytes([byte]) * len(data))  # type: ignore[assignment]
    values = source.uniform(4)
    assert ((values > 0.0) & (values < 1.0)).all()
    assert values[0] == (2.0**-53 if byte == 0 else 1.0 - 2.0**-53)
    assert source.gaussian((3,), 1.0).isfinite().all()


def test_the_ledger_knows_this_generator() -> None:
    assert RNG_KIND == "aes-256-ctr/ndtri/4-sum/v2"
    assert RNG_KIND in RNG_KINDS


def test_neighbouring_values_are_uncorrelated_across_blocks() -> None:
    sample = NoiseSource(KEY).gaussian((BLOCK_VALUES // 2,), 1.0).numpy()
    for lag in (1, 2, 4, BLOCK_VALUES // 4 - 1, BLOCK_VALUES // 4):
        assert abs(np.corrcoef(sample[:-lag], sample[lag:])[0, 1]) < 0.02


def test_tails_reach_beyond_five_deviations() -> None:
    sample = NoiseSource(KEY).gaussian((4_000_000,), 1.0).numpy()
    beyond = np.count_nonzero(np.abs(sample) > 4.5)
    assert 10 <= beyond <= 50


def test_nothing_is_ever_drawn_twice() -> None:
    source = NoiseSource(KEY)
    parts = [source.gaussian((1000,), 1.0) for _ in range(20)] + [source.uniform(1000) for _ in range(20)]
    values = np.concatenate(parts)
    assert len(np.unique(values)) == len(values)


def test_fresh_sources_differ_and_equal_keys_agree() -> None:
    first, second = NoiseSource().gaussian((8,), 1.0), NoiseSource().gaussian((8,), 1.0)
    assert not (first == second).any()
    assert NoiseSource(KEY).gaussian((2, 4), 1.0).equal(NoiseSource(KEY).gaussian((2, 4), 1.0))


def test_numpy_seeds_have_no_influence() -> None:
    np.random.seed(0)
    first = NoiseSource().uniform(4)
    np.random.seed(0)
    assert not np.any(first == NoiseSource().uniform(4))


def test_a_restarted_process_draws_other_noise() -> None:
    """Same program, same data, same seeds of everything that has one, started twice: as after a crash, or at two hospitals."""
    program = (
        "import random, numpy, torch; random.seed(0); numpy.random.seed(0); torch.manual_seed(0)\n"
        "from secgeo.noise import NoiseSource\n"
        "source = NoiseSource(); print(*source.gaussian((64,), 1.0).tolist(), *source.uniform(64))\n"
        "from secgeo.hospital_noise import discrete_gaussian; print(*discrete_gaussian(64, 1e9))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
    first, second = (
        np.array(subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).split(), float)
        for _ in range(2)
    )
    assert len(first) == len(second) == 192
    assert not np.intersect1d(first, second).size


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, with the name that is called."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in found]


def test_no_noise_is_seeded_outside_of_tests() -> None:
    made = 0
    for path in (file for package in ("keys", "protocols", "secgeo") for file in (ROOT / package).glob("*.py")):
        for name, call in calls(path):
            assert not name.endswith((".seed", "manual_seed", "seed_all", "set_rng_state")), f"{path}: {name}"
            if name.split(".")[-1] == "NoiseSource":
                made += 1
                assert not call.args, f"{path}: a noise source with a key of its own"
                assert not call.keywords, f"{path}: a noise source with a key of its own"
    assert made > 0


@pytest.mark.parametrize("module", ["training", "per_sample", "noise", "hospital_noise"])
def test_private_code_has_no_other_source_of_randomness(module: str) -> None:
    path = ROOT / "secgeo" / f"{module}.py"
    names = [name for name, _ in calls(path)]
    for word in (
        "random",
        "rand",
        "randn",
        "normal",
        "bernoulli",
        "multinomial",
        "shuffle",
        "permutation",
        "default_rng",
    ):
        drawn = [name for name in names if word in name.split(".") and name != "os.urandom"]
        assert not drawn, f"{path}: {drawn}"


def test_zero_deviation_is_exactly_zero_and_bad_ones_are_refused() -> None:
    assert not NoiseSource(KEY).gaussian((3, 3), 0.0).any()
    for std in (-1.0, np.nan, np.inf):
        with pytest.raises(ConfigError):
            NoiseSource(KEY).gaussian((2,), std)


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.9])
def test_poisson_sampling_has_the_rate_and_independent_members(rate: float) -> None:
    source = NoiseSource(KEY)
    masks = np.array([source.poisson_mask(200, rate) for _ in range(500)])
    assert masks.mean() == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / masks.size))
    sizes = masks.sum(axis=1)
    assert sizes.var() == pytest.approx(200 * rate * (1 - rate), rel=0.3)


def test_rate_one_takes_everybody_and_bad_rates_are_refused() -> None:
    assert NoiseSource(KEY).poisson_mask(50, 1.0).all()
    for rate in (0.0, -0.1, 1.1, np.nan):
        with pytest.raises(ConfigError):
            NoiseSource(KEY).poisson_mask(5, rate)


def test_repr_shows_no_key_and_no_state() -> None:
    source = NoiseSource(KEY)
    assert repr(source) == str(source) == "NoiseSource(<secret>)"
    assert not any(isinstance(value, bytes) for value in vars(source).values())


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_source_cannot_be_copied(copier) -> None:
    with pytest.raises(LocalProtocolError):
        copier(NoiseSource(KEY))


def test_a_key_has_32_bytes() -> None:
    with pytest.raises(ConfigError):
        NoiseSource(b"short")


def test_a_forked_child_cannot_repeat_the_parents_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    source = NoiseSource(KEY)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(LocalProtocolError, match="parent process"):
        source.uniform(1)
