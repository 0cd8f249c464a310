"""An alignment loss whose gradient arrives, however the backward pass is run.

A loss kept on a module is lost under reentrant checkpointing, whose first forward pass has no graph. Here it leaves its layer
with the attention's output, through an identity: forward y = output; backward ∂/∂output = ∂/∂y, and ∂/∂loss = λ · share · g,
with g the gradient that the total loss gets, read as it passes by at the start of the backward pass.

Contract: for total = LM + λ · share · Σ_layers loss, multiplied by whatever (accumulation, loss scaling, DDP), the gradients
are those of autograd on that total: without checkpointing, with it of both kinds, and with several forward passes before one
backward pass. A backward pass of something else, after that of the total, adds nothing. Nothing kept here holds a graph.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsort.errors import SparsortError


class Carrier:
    """The alignment losses of one forward pass, and what they count in the total.

    Attributes:
        weight: λ.
        values: the loss of each layer by its number, without graph.
        share: of the optimiser step's labels that are this pass's; 1 where the LM loss is a mean over its own labels.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.values: dict[int, Tensor] = {}
        self.share: Tensor | float = 1.0
        self._gradient: Tensor | None = None
        self._added = False

    def carry(self, output: Tensor, loss: Tensor, layer: int) -> Tensor:
        """`output`, with `loss` (a scalar) on its back. A pass that is run again overwrites its own values."""
        self.values[layer] = loss.detach()
        carried: Tensor = _Carry.apply(output, loss, self)  # type: ignore[no-untyped-call]
        return carried

    def add_to(self, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """The total: `loss` (a scalar) and the weighted sum of the alignment losses. Its gradient is what they go by.

        Raises:
            SparsortError: they have been added to a loss of this pass before.
        """
        if self._added:
            raise SparsortError(
                "the alignment losses of the last forward pass have been added to its loss already; outputs.loss of a model that "
                "is given labels has them. Add terms of your own to that loss, or call the model without labels and "
                "add_alignment once."
            )
        self.share = share
        if not self.values:
            return loss
        self._added = True
        alignment = torch.stack([value.to(loss.device, loss.dtype) for value in self.values.values()]).sum()
        total: Tensor = _Total.apply(loss, self.weight * share * alignment, self)  # type: ignore[no-untyped-call]
        return total

    def factor(self) -> Tensor | float:
        """λ · share · g, what the gradient of each layer's loss is multiplied with."""
        if self._gradient is None:
            warnings.warn(
                "The backward pass did not go through the model's own loss, so the alignment losses count as if the total were "
                "theirs alone: no loss scaling and no accumulation reaches them. Give the model its labels, or pass the loss "
                "that you compute yourself through model.sparse_attention.add_alignment(loss).",
                UserWarning,
                stacklevel=2,
            )
            self._gradient = torch.ones(())
        return self.weight * self.share * self._gradient

    def begin_backward(self, gradient: Tensor) -> None:
        """Remember the total's gradient until this backward pass, with those nested in it, has come to its end."""

        def end() -> None:
            self._gradient = torch.zeros_like(gradient)

        self._gradient = gradient
        # What DDP ends its backward pass by; it runs once the outermost pass is through.
        torch.autograd.Variable._execution_engine.queue_callback(end)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, carrier: Carrier) -> Tensor:
        ctx.carrier, ctx.like = carrier, (loss.device, loss.dtype)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        device, dtype = ctx.like
        return grad_output, torch.as_tensor(ctx.carrier.factor()).to(device, dtype), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, alignment: Tensor, carrier: Carrier) -> Tensor:
        ctx.carrier = carrier
        return loss + alignment.to(loss.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        ctx.carrier.begin_backward(grad_total.detach())
        return grad_total, None, None
