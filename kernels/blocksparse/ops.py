"""The operations of trainable block-sparse attention (select, attend, align), with gradients and checked arguments.

Contract: the operations (MSA, arXiv 2606.13392) give the same results with every implementation, which
`backend.blocksparse_implementation` chooses by the tensors' device. The `Layout` has the positions of the sequences, and the
`Selection` the blocks that each query sees. Padding may hold any values: they reach no output and no gradient. Under autocast,
floating-point tensors are cast as for `scaled_dot_product_attention`, and the computation itself runs without autocast.
`torch.compile` compiles around the operations.

Legend: B batch, T query columns, S key columns, H query heads, G groups = key/value heads, D head width, I index width,
K slots.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsort.errors import SparsortError
from sparsort.kernels.backend import blocksparse_implementation
from sparsort.kernels.blocksparse.budgets import Budget, check_budget
from sparsort.kernels.blocksparse.checks import check_heads, check_index, check_selection, check_tensor
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection, check_block_size
from sparsort.kernels.eager import in_eager


class Functions(NamedTuple):
    """The functions of one implementation, which autograd does not differentiate."""

    index_select: Callable[..., Selection]
    attend_forward: Callable[..., tuple[Tensor, Tensor]]
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    align_forward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


@in_eager
def index_select(
    index_query: Tensor,
    index_key: Tensor,
    layout: Layout,
    budget: Budget,
    *,
    block_size: int,
    scale: float | None = None,
) -> Selection:
    """Select the blocks of every query by its index scores, max-pooled over each block's visible keys.

    The local block is always taken. A score that is not finite counts as the lowest score, also for a real token; `align` makes
    no such exception.

    Args:
        index_query: (B, G, T, I).
        index_key: (B, S, I).
        layout: the sequences.
        budget: number of blocks per query token.
        block_size: number of keys in a block.
        scale: factor for the scores; None: 1/√I. It only matters for budgets by threshold and by top-p.

    Returns:
        Selection with K = min(budget's slots, blocks of the longest sequence), without a gradient.

    Raises:
        SparsortError: the tensors do not fit each other or the layout, or the block size, budget or scale is invalid.
    """
    index_query, index_key = _autocast(index_query, index_key)
    check_index(index_query, index_key, layout)
    check_block_size(block_size)
    check_budget(budget)
    scale = _scale(scale, index_query)
    with torch.no_grad(), _full_precision(index_query):
        run = _functions(index_query)
        return run.index_select(index_query, index_key, layout, budget, block_size=block_size, scale=scale)


@in_eager
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute exact softmax attention of every query over the visible keys of its blocks.

    Args:
        query: (B, H, T, D).
        key, value: (B, G, S, D); H is a multiple of G, and group g has the heads g·H/G to (g + 1)·H/G − 1.
        selection: blocks (B, G, T, K).
        layout: the sequences.
        scale: factor for the logits; None: 1/√D.
        bias: (B, G, T, K), added to the logits of a slot's keys; differentiable; −∞ hides the slot.

    Returns:
        Output (B, H, T, D) in the query's dtype, and log-sum-exp (B, H, T) in float32 (float64 for float64) without a gradient.
        For a query that sees nothing, they are 0 and −∞.

    Raises:
        SparsortError: the tensors do not fit each other, the selection or the layout.
    """
    query, key, value = _autocast(query, key, value)
    check_heads(query, key, layout, value)
    check_selection(selection, query, key, layout)
    if bias is not None:
        check_tensor("bias", bias, tuple(selection.blocks.shape), like=("query", query), any_float=True)
    run = _functions(query)
    output, lse = _Attend.apply(query, key, value, bias, selection, layout, _scale(scale, query), run)  # type: ignore[no-untyped-call]
    return output, lse


@in_eager
def align(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float | None = None,
    index_scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Compute the alignment loss: the mean over tokens and groups of KL(P ‖ student) over the visible keys of the selection.

    P is the mean over a group's heads of their attention probabilities, and the student is the softmax of the index scores S.
    The gradient reaches only `index_query` and `index_key`. It is computed in the forward pass, as ∂/∂S = student − P. If an
    index score of a real token is not finite, which is an error of the model, the loss and gradients are not finite either.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D).
        index_query: (B, G, T, I).
        index_key: (B, S, I).
        selection: blocks (B, G, T, K).
        layout: the sequences.
        scale: factor for the attention logits; None: 1/√D.
        index_scale: factor for the index scores; None: 1/√I.
        lse: (B, H, T), the log-sum-exp from `attend` over the same selection, with the same scale and without a bias; None: it
            is computed here.

    Returns:
        A scalar in float32 (float64 for float64); 0 if there is no token.

    Raises:
        SparsortError: the tensors do not fit each other, the selection or the layout.
    """
    query, key, index_query, index_key = _autocast(query, key, index_query, index_key)
    check_heads(query, key, layout)
    check_index(index_query, index_key, layout, key.shape[1], query)
    check_selection(selection, query, key, layout)
    if lse is not None:
        check_tensor("lse", lse, tuple(query.shape[:-1]), like=("query", query), any_float=True)
        lse = lse.detach()
    gradients = torch.is_grad_enabled() and (index_query.requires_grad or index_key.requires_grad)
    scales = {"scale": _scale(scale, query), "index_scale": _scale(index_scale, index_query)}
    loss: Tensor = _Align.apply(  # type: ignore[no-untyped-call]
        index_query,
        index_key,
        query.detach(),
        key.detach(),
        lse,
        selection,
        layout,
        scales,
        gradients,
        _functions(query),
    )
    return loss


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        selection: Selection,
        layout: Layout,
        scale: float,
        run: Functions,
    ) -> tuple[Tensor, Tensor]:
        with _full_precision(query):
            output, lse = run.attend_forward(query, key, value, selection, layout, scale=scale, bias=bias)
        # Save everything through save_for_backward, so that checkpointing can release it.
        ctx.save_for_backward(query, key, value, bias, output, lse, selection.blocks)
        ctx.block_size, ctx.layout, ctx.scale, ctx.run = selection.block_size, layout, scale, run
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, output, lse, blocks = ctx.saved_tensors
        selection = Selection(blocks=blocks, block_size=ctx.block_size)
        with _full_precision(query):
            gradients = ctx.run.attend_backward(
                grad_output, query, key, value, output, lse, selection, ctx.layout, scale=ctx.scale, bias=bias
            )
        return *gradients, None, None, None, None


class _Align(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        index_query: Tensor,
        index_key: Tensor,
        query: Tensor,
        key: Tensor,
        lse: Tensor | None,
        selection: Selection,
        layout: Layout,
        scales: dict[str, float],
        gradients: bool,
        run: Functions,
    ) -> Tensor:
        # The gradients for rows.sum() are computed here, where the probabilities are at hand; backward only scales them.
        with _full_precision(query):
            rows, d_index_query, d_index_key = run.align_forward(
                query, key, index_query, index_key, selection, layout, **scales, lse=lse, gradients=gradients
            )
        ctx.save_for_backward(d_index_query, d_index_key)
        # The Triton path returns one gradient in float32, so both are cast after scaling, where they are most precise.
        ctx.dtype = index_query.dtype
        ctx.count = max(layout.tokens * key.shape[1], 1)
        loss: Tensor = rows.sum() / ctx.count
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad_loss / ctx.count
        gradients = [(gradient * factor).to(ctx.dtype) for gradient in ctx.saved_tensors]
        return *gradients, *[None] * 8


def _functions(tensor: Tensor) -> Functions:
    """Return the implementation for the device and dtype of `tensor`.

    Raises:
        SparsortError: Triton is requested by name but cannot run here.
    """
    decision = blocksparse_implementation(tensor.device)
    if decision.value == "torch":
        return _torch_functions()
    if tensor.dtype != torch.float64:
        return _triton_functions()
    if decision.reason == "SPARSORT_BLOCKSPARSE=triton":
        raise SparsortError(
            "SPARSORT_BLOCKSPARSE=triton cannot be met: float64 tensors need float64 arithmetic, and the kernels compute in "
            "float32. Unset it, or set it to torch."
        )
    return _torch_functions()


@functools.cache
def _torch_functions() -> Functions:
    from sparsort.kernels.blocksparse.cpu.align import align_forward
    from sparsort.kernels.blocksparse.cpu.attend import attend_backward, attend_forward
    from sparsort.kernels.blocksparse.cpu.select import index_select as select

    return Functions(select, attend_forward, attend_backward, align_forward)


@functools.cache
def _triton_functions() -> Functions:
    # Imported on use, because Triton is not installed everywhere.
    from sparsort.kernels.blocksparse.triton.align import align_forward_triton
    from sparsort.kernels.blocksparse.triton.attend import attend_forward_triton
    from sparsort.kernels.blocksparse.triton.attend_backward import attend_backward_triton
    from sparsort.kernels.blocksparse.triton.select import index_select_triton

    return Functions(index_select_triton, attend_forward_triton, attend_backward_triton, align_forward_triton)


def _scale(given: object, tensor: Tensor) -> float:
    """Return the given scale as a float, or 1/√width."""
    if given is None:
        return 1 / math.sqrt(tensor.shape[-1])
    if isinstance(given, bool) or not isinstance(given, numbers.Real) or not math.isfinite(given):
        raise SparsortError(f"the scale is {given!r}; expected a finite number, or None for 1/√width.")
    return float(given)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the tensors as autocast does for `scaled_dot_product_attention`, if it is enabled for their device."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrowed = (torch.float16, torch.bfloat16, torch.float32)
    # Arguments that are not tensors pass through, and the checks refuse them by name.
    return tuple(
        tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in narrowed else tensor for tensor in tensors
    )


def _full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Disable autocast, which would compute an implementation's float32 products in half precision."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
