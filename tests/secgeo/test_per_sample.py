"""Per-sample gradients: those of Opacus' own hooks, of nothing but the private pass, and no sum that is not clipped."""

import copy

import pytest
import torch
from opacus import GradSampleModule
from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from tiny_study import KINDS, records, trained
from torch import nn
from torch.nn import functional

from keys.errors import LocalProtocolError
from secgeo.per_sample import PerSampleGradients, split


def backward(model: nn.Module, kind: str = "table", count: int = 7) -> None:
    data = records(kind, count)
    logits = model(torch.from_numpy(data.features))
    functional.cross_entropy(logits, torch.from_numpy(data.labels), reduction="sum").backward()


@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_those_of_opacus_hooks(kind: str) -> None:
    ours, theirs = trained(kind), trained(kind)
    backward(PerSampleGradients(ours), kind)
    backward(GradSampleModule(theirs, loss_reduction="sum"), kind)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad_sample, q.grad_sample, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3), (5, 2, 4, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_alone_with_any_number_of_token_dimensions(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = nn.Linear(3, 6, bias=bias), torch.randn(shape)
    PerSampleGradients(layer)(x).square().sum().backward()
    for i in range(5):
        one = copy.deepcopy(layer)
        one.zero_grad()
        one._forward_hooks.clear()
        one(x[i : i + 1]).square().sum().backward()
        for p, q in zip(layer.parameters(), one.parameters(), strict=True):
            torch.testing.assert_close(p.grad_sample[i], q.grad, rtol=1e-5, atol=1e-5)


def test_the_sum_that_is_not_clipped_is_never_made() -> None:
    model = trained("table")
    backward(PerSampleGradients(model))
    assert all(p.grad is None and p.grad_sample is not None for p in model.private_parameters())
    assert all(p.requires_grad for p in model.private_parameters())


def test_only_the_private_pass_is_watched() -> None:
    """The anchor pass goes through the same layers, before and after."""
    model = trained("table")
    hooked = PerSampleGradients(model)
    for _ in range(2):
        backward(model)
        assert all(p.grad_sample is None and p.grad is not None for p in model.private_parameters())
        model.zero_grad()
        backward(hooked)
        assert all(p.grad_sample is not None and p.grad is None for p in model.private_parameters())
        hooked.set_grad_sample_to_none()


def test_a_pass_that_fails_leaves_everything_as_it_was() -> None:
    model = trained("table")
    hooked = PerSampleGradients(model)
    with pytest.raises(RuntimeError):
        hooked(torch.zeros(3, 999))
    assert all(p.requires_grad for p in model.private_parameters())
    backward(model)
    assert all(p.grad_sample is None for p in model.private_parameters())


def test_a_frozen_parameter_stays_frozen() -> None:
    """Of every kind: a weight, a bias, a magnitude."""
    model = trained("table")
    hooked = PerSampleGradients(model)
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        backward(hooked)
        assert p.grad_sample is None, name
        assert not p.requires_grad
        assert sum(q.grad_sample is None for q in model.parameters()) == 1
        hooked.set_grad_sample_to_none()
        p.requires_grad_(True)


def test_a_parameter_that_came_later_is_refused() -> None:
    model = trained("table")
    hooked = PerSampleGradients(model)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(LocalProtocolError, match="other parameters"):
        backward(hooked)
    assert model.head.weight.grad is None


@pytest.mark.parametrize("first", [3, 7, 9])
def test_a_pass_is_written_over_the_last_one(first: int) -> None:
    """Whether it is larger or smaller, nothing of the last one is left."""
    again, once = trained("table"), trained("table")
    hooked, fresh = PerSampleGradients(again), PerSampleGradients(once)
    backward(hooked, count=first)
    backward(hooked)
    backward(fresh)
    assert hooked.taken().shape == (7, sum(p.numel() for p in again.parameters() if p.requires_grad))
    assert torch.equal(hooked.taken(), fresh.taken())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_two_passes_are_not_mixed_up(order: tuple[int, int]) -> None:
    layer = nn.Linear(3, 6)
    hooked = PerSampleGradients(layer)
    passes = [hooked(torch.full((4, 3), value)) for value in (1.0, 2.0)]
    passes[order[0]].sum().backward()
    taken = hooked._rows.clone()
    with pytest.raises(LocalProtocolError, match="used twice"):
        passes[order[1]].sum().backward()
    assert torch.equal(hooked._rows, taken)


def test_a_row_has_the_parameters_in_the_order_that_was_asked_for() -> None:
    model = trained("table")
    order = model.private_parameters()
    hooked = PerSampleGradients(model, order)
    backward(hooked)
    assert [id(p) for p in order] != [id(p) for p in model.parameters()]
    assert torch.equal(hooked.taken(), torch.cat([p.grad_sample.flatten(1) for p in order], dim=1))
    parts = split(hooked.taken(), order)
    assert all(
        part.shape == p.grad_sample.shape and part.equal(p.grad_sample) for part, p in zip(parts, order, strict=True)
    )


class Strange(nn.Linear):
    """Its sampler says what it is told to say."""

    shape: tuple[int, ...] = ()


@register_grad_sampler(Strange)
def strange(layer: Strange, given: list[torch.Tensor], gradient: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
    return {layer.weight: torch.ones(layer.shape)}


@pytest.mark.parametrize("shape", [(1, 6, 3), (4, 1, 3), (4, 6, 1), (6, 3), ()], ids=str)
def test_gradients_of_another_shape_are_not_spread_out(shape: tuple[int, ...]) -> None:
    layer = Strange(3, 6)
    layer.shape = shape
    with pytest.raises(LocalProtocolError, match=r", not \(4, 6, 3\)"):
        PerSampleGradients(layer)(torch.randn(4, 3)).sum().backward()


def test_memory_is_kept_for_passes_that_fit_and_not_copied_for_larger_ones() -> None:
    hooked, taken = PerSampleGradients(nn.Linear(3, 6)), []
    for count in (4, 9, 2, 9):
        hooked(torch.randn(count, 3)).sum().backward()
        taken.append(hooked.taken())
    assert [rows.untyped_storage().nbytes() for rows in taken] == [4 * count * 24 for count in (4, 9, 9, 9)]
    assert taken[1].data_ptr() == taken[2].data_ptr() == taken[3].data_ptr()


@pytest.mark.parametrize("change", ["thawed", "planted", "one twice", "one missing"])
def test_other_parameters_than_the_module_trains_are_refused(change: str) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parameters = list(module.parameters())
    if change.startswith("one"):
        with pytest.raises(LocalProtocolError, match="other parameters"):
            PerSampleGradients(module, parameters[1:] if change == "one missing" else [*parameters, parameters[0]])
        return
    module[1].requires_grad_(change != "thawed")
    hooked = PerSampleGradients(module)
    module[1].requires_grad_(True)
    if change == "planted":
        module.append(nn.Linear(2, 2))
    with pytest.raises(LocalProtocolError, match="other parameters"):
        hooked(torch.randn(5, 3)).sum().backward()
    assert all(p.grad is None for p in module.parameters())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x))


def test_a_layer_that_is_used_twice_is_refused_and_not_half_counted() -> None:
    with pytest.raises(LocalProtocolError, match="used twice"):
        PerSampleGradients(Twice())(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.Conv1d(3, 3, 1)], ids=["layer norm", "convolution"])
def test_other_layers_have_the_samplers_of_opacus(layer: nn.Module) -> None:
    x = torch.randn(4, 3, 3)
    PerSampleGradients(layer)(x).square().sum().backward()
    prepare_layer(layer)
    with torch.no_grad():
        gradient = 2 * layer(x)
    for p, wanted in ft_compute_per_sample_gradient(layer, [x], gradient).items():
        torch.testing.assert_close(p.grad_sample, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_sampler_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match=r"PReLU .* register a sampler"):
        PerSampleGradients(nn.Sequential(nn.Linear(3, 3), nn.PReLU()))


class Odd(nn.Module):
    """Two layers and something that gradients by layer cannot follow."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how, self.outer = nn.Linear(3, 3), nn.Linear(3, 3), how, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x) * 1.0
        if self.how == "tokens as records":
            return self.second(h.reshape(-1, 3)).reshape(x.shape)
        if self.how == "by keyword":
            return self.second(input=h)
        if self.how == "inside":
            return self.outer(h)
        y = self.second(h)
        h.mul_(3.0)
        return y + h


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("changed in place", "changed in place afterwards"),
        ("tokens as records", r"shape \(20, 3, 3\), not \(4, 3, 3\)"),
        ("by keyword", "by position"),
        ("inside", "one pass at a time"),
    ],
)
def test_what_would_make_gradients_wrong_is_refused(how: str, says: str) -> None:
    odd = Odd(how)
    hooked = PerSampleGradients(odd)
    object.__setattr__(odd, "outer", hooked)
    with pytest.raises(LocalProtocolError, match=says):
        hooked(torch.randn(4, 5, 3)).sum().backward()
    assert not hooked.hooks_enabled
    assert all(p.requires_grad for p in odd.parameters())


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3)], ids=str)
def test_nobody_has_no_gradients(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(3, 6)
    PerSampleGradients(layer)(torch.randn(shape)).sum().backward()
    assert layer.weight.grad_sample.shape == (0, 6, 3)
    assert layer.bias.grad_sample.shape == (0, 6)


def test_gradients_of_a_forward_pass_in_half_precision_are_sampled_outside_of_autocast_too() -> None:
    layer, x = nn.Linear(3, 6), torch.randn(4, 2, 3)
    hooked = PerSampleGradients(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = hooked(x)
    y.sum().backward()
    wanted = x.sum(dim=1, keepdim=True).expand(4, 6, 3)
    torch.testing.assert_close(layer.weight.grad_sample.float(), wanted, rtol=2e-2, atol=2e-2)


def test_batch_normalisation_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="buffers"):
        PerSampleGradients(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
