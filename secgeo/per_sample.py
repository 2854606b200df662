"""Per-sample gradients by Opacus' samplers, at nearly the cost of the gradient alone.

`GradSampleModule` puts two hooks on every trainable layer, which wrap what goes in and out into nodes of the graph, and lets
autograd compute the gradients of the batch too, which nobody uses. Here every trainable layer has one hook, on the tensor that it
returns, and no parameter needs a gradient while the graph is made: the backward pass goes through activations only, and a layer's
hook hands what it was given, and the gradient of what it returned, to the layer's sampler. The sum that is not clipped is
never computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from keys.errors import LocalProtocolError


def by_token(values: Tensor) -> Tensor:
    """[n, ..., d] as [n, tokens, d]."""
    return values.flatten(1, -2) if values.dim() > 2 else values.unsqueeze(1)


def split(values: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """`values` [..., d] as one view [..., *p.shape] for each parameter, which follow each other in d."""
    parts = torch.split(values, [p.numel() for p in parameters], dim=-1)
    return [torch.unflatten(part, -1, p.shape) for part, p in zip(parts, parameters, strict=True)]


def _linear(layer: Any, given: list[Tensor], gradient: Tensor) -> dict[Any, Tensor]:
    """Opacus' sampler for linear layers in other words: its einsum takes longer than the product for layers as small as ours."""
    samples = dict[Any, Tensor]()
    if layer.weight.requires_grad:
        samples[layer.weight] = torch.bmm(by_token(gradient).transpose(1, 2), by_token(given[0].to(gradient.dtype)))
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = by_token(gradient).sum(dim=1)
    return samples


class PerSampleGradients(GradSampleModule):  # type: ignore[misc]
    """An Opacus `GradSampleModule` with one hook a layer: `backward()` makes per-sample gradients, and leaves `p.grad` as it was.

    They are rows of one tensor (see `taken`), and `p.grad_sample` [n, *p.shape] is a part of it. The next pass is written over it.

    Args:
        module: its trainable layers take one tensor [n, ...] each and return one, once in a forward pass; the loss is the sum over records.
        parameters: its trainable parameters, in the order that they shall have in a row; that of the module by default.

    Attributes:
        ordered: the parameters in the order that they have in a row.

    Raises:
        LocalProtocolError: a trainable layer has no sampler (see `opacus.grad_sample.register_grad_sampler`), or `parameters` are others
            than the module trains. Passes raise it for that too, and where gradients would be wrong.
        NotImplementedError: by Opacus: a trainable layer has buffers.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Any] | None = None) -> None:
        self.ordered: list[Any] = list(parameters or (p for p in module.parameters() if p.requires_grad))
        self._rows: Tensor = self.ordered[0].detach().new_empty(0)
        super().__init__(module, loss_reduction="sum")
        self._free: dict[Any, Any] = dict.fromkeys(self._trained())

    def add_hooks(self, **_: Any) -> None:
        """Hook every trainable layer; called by Opacus."""
        layers = list(self.iterate_submodules(self._module))
        for layer in layers:
            if type(layer) not in self.GRAD_SAMPLERS:
                raise LocalProtocolError(
                    f"{type(layer).__name__} is trainable and has no per-sample gradients; register a sampler for it"
                )
        self.autograd_grad_sample_hooks = [layer.register_forward_hook(self._watch) for layer in layers]

    def _trained(self) -> list[Any]:
        """The parameters that are trained now, in their order."""
        trained = [p for p in self.ordered if p.requires_grad]
        own = {id(p) for p in self._module.parameters() if p.requires_grad}
        if own != {id(p) for p in trained} or len(own) != len(trained):
            raise LocalProtocolError("per-sample gradients are of other parameters than the module trains")
        return trained

    def forward(self, records: Tensor) -> Any:
        """The module's own output, whose `backward()` makes per-sample gradients; calls of the module itself make none."""
        if self.hooks_enabled:
            raise LocalProtocolError("per-sample gradients are taken in one pass at a time")
        trained = self._trained()
        shape = len(records), sum(p.numel() for p in trained)
        if math.prod(shape) * self._rows.element_size() > self._rows.untyped_storage().nbytes():
            self._rows = self._rows.new_empty(0)  # resize_ would keep and copy what it held
        self._rows.resize_(shape)
        self._free = dict(zip(trained, split(self._rows, trained), strict=True))
        self.enable_hooks()
        try:
            for p in trained:
                p.grad_sample = None
                p.requires_grad_(False)
            return self._module(records)
        finally:
            self.disable_hooks()
            for p in trained:
                p.requires_grad_(True)

    def taken(self) -> Tensor:
        """Per-sample gradients [n, d] of the last pass, in the type of the parameters: a norm in bfloat16 would be off by up to 0.4 %.

        Raises:
            LocalProtocolError: `backward()` has not reached some of the parameters.
        """
        if self._free:
            raise LocalProtocolError("the backward pass has not reached some of the private parameters")
        return self._rows.detach()  # An optimiser of Opacus marks what it has clipped.

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.hooks_enabled and torch.is_grad_enabled():
            if len(inputs) != 1:
                raise LocalProtocolError(f"{type(layer).__name__} must be called with one tensor, by position")
            given = inputs[0].detach()
            if not output.requires_grad:  # the first layer: its input is data
                output.requires_grad_()
            output.register_hook(partial(self._sample, layer, given, given._version))  # type: ignore[no-untyped-call]

    def _sample(self, layer: nn.Module, given: Tensor, version: int, gradient: Tensor) -> None:
        name = type(layer).__name__
        if given._version != version:
            raise LocalProtocolError(
                f"what {name} was given was changed in place afterwards; its gradient would be wrong"
            )
        sampler = _linear if type(layer) is nn.Linear else self.GRAD_SAMPLERS[type(layer)]
        for p, sample in sampler(layer, [given], gradient).items():
            free = self._free.pop(p, None)
            if free is None:
                raise LocalProtocolError(f"{name} was used twice in one pass")
            if sample.shape != free.shape:
                raise LocalProtocolError(
                    f"{name} has gradients of shape {tuple(sample.shape)}, not {tuple(free.shape)}"
                )
            p.grad_sample = free.copy_(sample)
