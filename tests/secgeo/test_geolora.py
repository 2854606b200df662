"""GeoLoRA: exact row norms, merges that change nothing, per-record gradients equal to a naive loop."""

import numpy as np
import pytest
import torch
from tiny_study import agreement

from keys.errors import LocalProtocolError
from secgeo.geolora import GeoLoRALinear, directions
from secgeo.per_sample import PerSampleGradients
from secgeo.trunk import adapted_layers, public_projection, trunk_weight


def layer(seed: int = 0, generation: int = 0, trained: bool = True) -> GeoLoRALinear:
    model = agreement().model
    spec = adapted_layers(model)[0]
    made = GeoLoRALinear(trunk_weight(model, spec), public_projection(model, spec, generation), 1.5)
    if trained:
        torch.manual_seed(seed)
        with torch.no_grad():
            made.direction.weight.normal_(std=0.7)
            made.magnitude.weight.uniform_(0.5, 2.0)
    return made


def full_weight(made: GeoLoRALinear) -> torch.Tensor:
    return made.base.double() + made.scale * made.direction.weight.double() @ made.projection.double()


def test_nu_is_the_exact_row_norm() -> None:
    made = layer()
    torch.testing.assert_close(made.row_norms().double(), full_weight(made).norm(dim=1), rtol=1e-5, atol=1e-6)


def test_the_untrained_layer_is_the_trunk() -> None:
    made, x = layer(trained=False), torch.randn(3, 16)
    torch.testing.assert_close(made(x), x @ made.base.T, rtol=1e-5, atol=1e-6)


def test_forward_is_the_formula() -> None:
    made, x = layer(), torch.randn(2, 4, 16)
    weight = full_weight(made)
    wanted = (made.magnitude.weight.double() / weight.norm(dim=1)) * (x.double() @ weight.T)
    torch.testing.assert_close(made(x).double(), wanted, rtol=1e-4, atol=1e-5)


def test_nu_is_detached() -> None:
    """The gradient of B is that of a plain linear layer with nu held constant."""
    made, x = layer(), torch.randn(5, 16)
    made(x).square().sum().backward()
    B = made.direction.weight.detach().clone().requires_grad_()
    nu = made.row_norms()
    y = made.magnitude.weight.detach() / nu * (x @ made.base.T + made.scale * (x @ made.projection.T) @ B.T)
    y.square().sum().backward()
    torch.testing.assert_close(made.direction.weight.grad, B.grad, rtol=1e-4, atol=1e-4)


def test_merge_leaves_outputs_norms_and_magnitudes_unchanged() -> None:
    made, x = layer(), torch.randn(6, 16)
    model = agreement().model
    before, nu, m = made(x).detach(), made.row_norms(), made.magnitude.weight.detach().clone()
    made.merge(public_projection(model, adapted_layers(model)[0], 1))
    torch.testing.assert_close(made(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.row_norms(), nu, rtol=1e-5, atol=1e-6)
    assert torch.equal(made.magnitude.weight, m)
    assert not made.direction.weight.any()
    with torch.no_grad():
        made.direction.weight.normal_()
    torch.testing.assert_close(made.row_norms().double(), full_weight(made).norm(dim=1), rtol=1e-5, atol=1e-6)


def test_a_basis_that_is_not_orthonormal_is_refused() -> None:
    made = layer()
    with pytest.raises(LocalProtocolError, match="orthonormal"):
        made.load(np.zeros((48, 16)), 2.0 * np.eye(2, 16), np.zeros((48, 2)))
    with pytest.raises(LocalProtocolError, match="takes B"):
        made.load(np.zeros((48, 16)), np.eye(2, 16), np.zeros((48, 3)))


def test_per_record_gradients_equal_a_naive_loop() -> None:
    made, x = layer(), torch.randn(4, 3, 16)
    hooked = PerSampleGradients(made)
    hooked(x).pow(3).sum().backward()
    for i in range(len(x)):
        single = layer()
        single(x[i : i + 1]).pow(3).sum().backward()
        torch.testing.assert_close(
            made.direction.weight.grad_sample[i], single.direction.weight.grad, rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(
            made.magnitude.weight.grad_sample[i], single.magnitude.weight.grad, rtol=1e-3, atol=1e-3
        )


def test_the_basis_is_orthonormal_public_and_changes_with_each_merge() -> None:
    model = agreement().model
    for spec in adapted_layers(model):
        first, again, second = (public_projection(model, spec, generation) for generation in (0, 0, 1))
        np.testing.assert_allclose(first @ first.T, np.eye(model.rank), atol=1e-12)
        assert np.array_equal(first, again)
        assert not np.allclose(first, second)


def test_directions_are_float64_copies() -> None:
    made = layer()
    taken = directions([("a", made)])["a"]
    assert taken.dtype == np.float64
    taken[:] = 0
    assert made.direction.weight.abs().sum() > 0
