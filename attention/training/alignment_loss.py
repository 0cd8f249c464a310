"""Attach each layer's alignment loss to the layer's output, so that its gradient arrives however the backward pass is run.

A loss that is stored on a module is lost under reentrant checkpointing, because its first forward pass records no graph. Here
the loss leaves its layer with the attention's output, through an identity function with two inputs. Forward: y = output.
Backward: ∂/∂output = ∂/∂y and ∂/∂loss = λ · share · g, where g is the gradient of the total loss. A second function, which adds
the alignment losses to the total, records g at the start of the backward pass.

Contract: the gradients are those of autograd on total = LM + λ · share · Σ_layers loss, times any factor (accumulation, loss
scaling, DDP). This holds without checkpointing, with both kinds of checkpointing, and with several forward passes before one
backward pass. A later backward pass from another loss adds nothing. No graph is kept alive by the objects stored here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsort.errors import SparsortError


class AlignmentLoss:
    """The alignment losses of one forward pass, and their weight in the total.

    Attributes:
        weight: λ.
        values: layer number → the layer's loss, detached.
        share: the fraction of the optimiser step's labels that are in this pass; 1 if the LM loss is a mean over the pass's own
            labels.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.values: dict[int, Tensor] = {}
        self.share: Tensor | float = 1.0
        self._gradient: Tensor | None = None
        self._added = False

    def attach_to(self, output: Tensor, loss: Tensor, layer: int) -> Tensor:
        """Return `output` unchanged, with `loss` (a scalar) attached to its graph."""
        # A pass that checkpointing runs again overwrites its own values.
        self.values[layer] = loss.detach()
        attached: Tensor = _AttachLoss.apply(output, loss, self)  # type: ignore[no-untyped-call]
        return attached

    def add_to(self, loss: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """Return the total of `loss` (a scalar) and the weighted alignment losses, whose gradients scale with the total's.

        Raises:
            SparsortError: the alignment losses of this pass have been added before.
        """
        if self._added:
            raise SparsortError(
                "the alignment losses of the last forward pass have been added to its loss already; if a model is called with "
                "labels, outputs.loss includes them. Add your own terms to that loss, or call the model without labels and call "
                "add_alignment once."
            )
        self.share = share
        if not self.values:
            return loss
        self._added = True
        alignment = torch.stack([value.to(loss.device, loss.dtype) for value in self.values.values()]).sum()
        total: Tensor = _AddToTotal.apply(loss, self.weight * share * alignment, self)  # type: ignore[no-untyped-call]
        return total

    def factor(self) -> Tensor | float:
        """Return λ · share · g, the factor for the gradient of each layer's loss."""
        # None means that the total of `add_to` took no part in this backward pass, which therefore recorded no g.
        if self._gradient is None:
            warnings.warn(
                "The backward pass did not go through the model's own loss, so the alignment losses were used with a gradient of "
                "1: loss scaling and accumulation do not apply to them. Call the model with labels, or pass the loss that you "
                "compute through model.sparse_attention.add_alignment(loss).",
                UserWarning,
                stacklevel=2,
            )
            self._gradient = torch.ones(())
        return self.weight * self.share * self._gradient

    def begin_backward(self, gradient: Tensor) -> None:
        """Keep the total's gradient until this backward pass, including those nested in it, has ended."""

        def end() -> None:
            # A later backward pass from another loss must add nothing.
            self._gradient = torch.zeros_like(gradient)

        self._gradient = gradient
        # DDP uses the same callback to finish its backward pass. It runs after the outermost backward pass, which matters under
        # reentrant checkpointing: each checkpoint runs a nested one.
        torch.autograd.Variable._execution_engine.queue_callback(end)


class _AttachLoss(torch.autograd.Function):
    """The identity on `output` that also sends a gradient to `loss`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, losses: AlignmentLoss) -> Tensor:
        ctx.losses, ctx.like = losses, (loss.device, loss.dtype)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        device, dtype = ctx.like
        return grad_output, torch.as_tensor(ctx.losses.factor()).to(device, dtype), None


class _AddToTotal(torch.autograd.Function):
    """The sum of the LM loss and the alignment losses, which records its gradient for `_AttachLoss`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, alignment: Tensor, losses: AlignmentLoss) -> Tensor:
        ctx.losses = losses
        return loss + alignment.to(loss.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None]:
        ctx.losses.begin_backward(grad_total.detach())
        # None for `alignment`: its value is detached, and each layer gets its gradient through `_AttachLoss`.
        return grad_total, None, None
