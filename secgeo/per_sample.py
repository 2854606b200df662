"""Per-sample gradients by Opacus' samplers, at nearly the cost of the gradient alone.

`GradSampleModule` puts two hooks on every trainable layer, which wrap what goes in and out into nodes of the graph, and lets
autograd compute the gradients of the batch too, which nobody uses. Here every trainable layer has one hook, on the tensor that it
returns, and its parameters need no gradient while the graph is made: the backward pass goes through activations only, and a layer's
hook hands what it was given, and the gradient of what it returned, to the layer's sampler. The sum that is not clipped is
never computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from keys.errors import LocalProtocolError


def _linear(layer: Any, given: list[Tensor], gradient: Tensor) -> dict[Any, Tensor]:
    """Opacus' sampler for linear layers in other words: its einsum takes longer than the product for layers as small as ours."""
    inputs, outputs = (t.reshape(len(t), -1, t.shape[-1]) for t in (given[0].to(gradient.dtype), gradient))
    samples = dict[Any, Tensor]()
    if layer.weight.requires_grad:
        samples[layer.weight] = torch.bmm(outputs.transpose(1, 2), inputs)
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = outputs.sum(dim=1)
    return samples


class PerSampleGradients(GradSampleModule):  # type: ignore[misc]
    """An Opacus `GradSampleModule` with one hook a layer: `backward()` leaves `p.grad_sample` [n, *p.shape], and `p.grad` as it was.

    Args:
        module: its layers take and return tensors [n, ...], and each is used once in a forward pass; the loss is the sum over records.

    Raises:
        LocalProtocolError: a trainable layer has no sampler (see `opacus.grad_sample.register_grad_sampler`).
        NotImplementedError: by Opacus: a trainable layer has buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, loss_reduction="sum")

    def add_hooks(self, **_: Any) -> None:
        """Hook every trainable layer; called by Opacus."""
        layers = list(self.iterate_submodules(self._module))
        for layer in layers:
            if type(layer) not in self.GRAD_SAMPLERS:
                raise LocalProtocolError(
                    f"{type(layer).__name__} is trainable and has no per-sample gradients; register a sampler for it"
                )
        self._trainable = [p for layer in layers for p in layer.parameters(recurse=False)]
        self.autograd_grad_sample_hooks = [layer.register_forward_hook(self._watch) for layer in layers]

    def forward(self, *inputs: Tensor) -> Any:
        """The module's own output, whose `backward()` makes per-sample gradients; calls of the module itself make none."""
        trained = [p for p in self._trainable if p.requires_grad]
        for p in trained:
            p.requires_grad_(False)
        self.enable_hooks()
        try:
            return self._module(*inputs)
        finally:
            self.disable_hooks()
            for p in trained:
                p.requires_grad_(True)

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.hooks_enabled and torch.is_grad_enabled():
            if not output.requires_grad:  # the first layer: its input is data
                output.requires_grad_()
            output.register_hook(partial(self._sample, layer, inputs[0].detach()))  # type: ignore[no-untyped-call]

    def _sample(self, layer: nn.Module, given: Tensor, gradient: Tensor) -> None:
        sampler = _linear if type(layer) is nn.Linear else self.GRAD_SAMPLERS[type(layer)]
        for p, sample in sampler(layer, [given], gradient.detach()).items():
            if p.grad_sample is not None:
                raise LocalProtocolError("a layer was used twice; clip the gradients of one pass before the next")
            p.grad_sample = sample
