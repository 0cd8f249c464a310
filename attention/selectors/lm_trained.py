"""A selector that the LM loss itself teaches, on a base that its caller freezes; after SAS (arXiv 2609.13141).

Choosing the top blocks has no gradient. Here each chosen block's score joins the logits of the block's keys by a
straight-through bias s − sg(s): exactly 0 in the forward pass, with the gradient of a logit in the backward pass. The frozen
model thus computes what it would with the bare selection, and a block whose keys would lower the LM loss if they got more
weight gets a higher score. The paper's idea is the LM loss as the only teacher of a selector beside a frozen model; this
estimator is ours and is not claimed to be the paper's.

Two limits, plainly: a block that is not selected gets no gradient, so nothing but a warm-up over every block (`full`) teaches
the selector about those it leaves out; and the estimator ignores how the selection itself would change.

The score is MSA's, from the same weights as the index branch, without its alignment loss.

Legend: B batch, T query columns, S key columns, G groups, K slots, I index width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsort.attention.flops import AttentionShape, SparseShape, visible_pairs
from sparsort.attention.selectors.base import Choice, LayerInputs
from sparsort.attention.selectors.chunks import (
    ELEMENTS,
    blocks_seen,
    chunks,
    full_precision,
    in_blocks,
    keys_of,
    positions,
    wide,
)
from sparsort.attention.selectors.index_branch import IndexBranch, given
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection


class LMTrainedBranch(IndexBranch):
    """The index branch, taught through the logits' bias."""

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """Every index query with every index key; the gradient costs nothing more."""
        return 2 * shape.groups * shape.index_dim * visible_pairs(tokens)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> Choice:
        index_keys = given(index_keys)
        choice = super().choose(inputs, index_keys)
        if not torch.is_grad_enabled():
            return choice
        queries: Tensor = choice.state
        with torch.no_grad(), full_precision(queries.device):
            columns = best_keys(queries, index_keys, choice.selection, inputs.layout)
        dtype = wide(inputs.query).dtype
        bias: Tensor = _StraightThrough.apply(queries, index_keys, columns, dtype)  # type: ignore[no-untyped-call]
        return Choice(selection=choice.selection, bias=bias)

    def loss(self, inputs: LayerInputs, index_keys: Tensor | None, choice: Choice, lse: Tensor) -> Tensor | None:
        return None


def best_keys(index_query: Tensor, index_key: Tensor, selection: Selection, layout: Layout) -> Tensor:
    """The key that gives each selected block its score, the visible one with the highest product.

    Args:
        index_query: (B, G, T, I).
        index_key: (B, S, I).

    Returns:
        (B, G, T, K) int64 columns of the keys; −1 in unused slots.
    """
    W = selection.block_size
    columns = torch.full_like(selection.blocks, -1, dtype=torch.int64)
    for span in layout.spans:
        keys = keys_of(index_key, span)
        for first, last in chunks(span, 2 * index_query.shape[1]):
            seen = blocks_seen(span, last, W)
            place = slice(span.query_start + first, span.query_start + last)
            scores = wide(index_query[span.row, :, place]) @ keys[: seen * W].mT
            future = (
                torch.arange(scores.shape[-1], device=keys.device) > positions(span, first, last, keys.device)[:, None]
            )
            scores = scores.masked_fill(future | ~scores.isfinite(), -torch.inf)
            best = in_blocks(scores[..., None], W, -torch.inf)[..., 0].argmax(-1)
            best = best + W * torch.arange(seen, device=keys.device) + span.key_start
            blocks = selection.blocks[span.row, :, place].long()
            columns[span.row, :, place] = best.gather(-1, blocks.clamp(min=0)).masked_fill(blocks < 0, -1)
    return columns


class _StraightThrough(torch.autograd.Function):
    """s − sg(s) for s = index_query · index_key[columns] / √I: zeros, with the gradient of s."""

    @staticmethod
    def forward(ctx: Any, index_query: Tensor, index_key: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(index_query, index_key, columns)
        return torch.zeros(columns.shape, dtype=dtype, device=columns.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        index_query, index_key, columns = ctx.saved_tensors
        B, G, T, K = columns.shape
        width = index_query.shape[-1]
        keys = wide(index_key)
        d_query, d_key = torch.zeros_like(index_query), torch.zeros_like(keys)
        grad = (wide(grad_bias) / math.sqrt(width)).masked_fill(columns < 0, 0.0)
        step = max(1, ELEMENTS // max(1, G * K * width))
        for row in range(B):
            for first in range(0, T, step):
                place = slice(first, first + step)
                found, weight = columns[row, :, place], grad[row, :, place]
                # Unused slots read some token's key, with weight 0; padding's queries may be NaN and are left out.
                used = (found >= 0)[..., None]
                taken = keys[row][found.clamp(min=0)].masked_fill(~used, 0.0)
                d_query[row, :, place] = torch.einsum("gtk,gtki->gti", weight, taken).to(d_query.dtype)
                sent = weight[..., None] * wide(index_query[row, :, place])[:, :, None]
                d_key[row].index_add_(0, found[found >= 0], sent[found >= 0])
        return d_query, d_key.to(index_key.dtype), None, None
