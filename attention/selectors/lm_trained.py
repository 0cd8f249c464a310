"""A selector trained with the LM loss while the caller keeps the base model frozen; based on SAS (arXiv 2609.13141).

Choosing the top blocks has no gradient. Therefore the score s of each chosen block is added to the logits of the block's keys
as a straight-through bias s − sg(s), where sg stops the gradient. The bias is exactly 0 in the forward pass and passes the
gradient of the logits to s in the backward pass. The frozen model computes the same output as without the bias, and training
raises the score of a block if more weight on its keys would lower the LM loss. The paper's idea is to train a selector for a
frozen model with the LM loss alone. The estimator used here is our own, not the paper's.

There are two limits. A block that is not selected gets no gradient, so the selector learns about such blocks only in a warm-up
over every block (`full`). And the estimator ignores how the selection itself would change.

The score is MSA's and uses the same weights as the index branch, but there is no alignment loss.

Legend: B batch, T query columns, S key columns, G groups, K slots, I index width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsort.attention.flops import AttentionShape, SparseShape, visible_pairs
from sparsort.attention.selectors.base import BlockChoice, LayerInputs
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
from sparsort.attention.selectors.index_branch import IndexBranch, require_index_keys
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection


class LMTrainedBranch(IndexBranch):
    """The index branch, trained through a bias on the attention logits."""

    @staticmethod
    def choosing_flops(shape: AttentionShape, tokens: int, sparse: SparseShape, training: bool) -> float:
        """Count the score of every index query with every visible index key.

        The cost of the gradient, one key per block, is negligible.
        """
        return 2 * shape.groups * shape.index_dim * visible_pairs(tokens)

    def choose(self, inputs: LayerInputs, index_keys: Tensor | None) -> BlockChoice:
        index_keys = require_index_keys(index_keys)
        choice = super().choose(inputs, index_keys)
        if not torch.is_grad_enabled():
            return choice
        queries: Tensor = choice.state
        with torch.no_grad(), full_precision(queries.device):
            columns = best_keys(queries, index_keys, choice.selection, inputs.layout)
        dtype = wide(inputs.query).dtype
        bias: Tensor = _StraightThrough.apply(queries, index_keys, columns, dtype)  # type: ignore[no-untyped-call]
        return BlockChoice(selection=choice.selection, bias=bias)

    def loss(self, inputs: LayerInputs, index_keys: Tensor | None, choice: BlockChoice, lse: Tensor) -> Tensor | None:
        return None


def best_keys(index_query: Tensor, index_key: Tensor, selection: Selection, layout: Layout) -> Tensor:
    """Return the key that determines the score of each selected block: the visible key with the highest product.

    Args:
        index_query: (B, G, T, I).
        index_key: (B, S, I).
        selection: the blocks of every query token, K slots each.
        layout: the position of each sequence in the batch.

    Returns:
        (B, G, T, K) int64 columns of the keys; −1 in unused slots.
    """
    W = selection.block_size
    columns = torch.full_like(selection.blocks, -1, dtype=torch.int64)
    for span in layout.spans:
        keys = keys_of(index_key, span)
        for first, last in chunks(span, 2 * index_query.shape[1]):
            seen = blocks_seen(span, last, W)
            chunk = slice(span.query_start + first, span.query_start + last)
            scores = wide(index_query[span.row, :, chunk]) @ keys[: seen * W].mT
            key_positions = torch.arange(scores.shape[-1], device=keys.device)
            future = key_positions > positions(span, first, last, keys.device)[:, None]
            # A score that is not finite counts as lowest, as in `index_select`.
            scores = scores.masked_fill(future | ~scores.isfinite(), -torch.inf)
            best = in_blocks(scores[..., None], W, -torch.inf)[..., 0].argmax(-1)
            best = best + W * torch.arange(seen, device=keys.device) + span.key_start
            blocks = selection.blocks[span.row, :, chunk].long()
            columns[span.row, :, chunk] = best.gather(-1, blocks.clamp(min=0)).masked_fill(blocks < 0, -1)
    return columns


class _StraightThrough(torch.autograd.Function):
    """s − sg(s) for s = index_query · index_key[columns] / √I: zeros in the forward pass, the gradient of s in the backward."""

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
        # Gathering a key for every slot of every query at once would take G·T·K·I elements.
        step = max(1, ELEMENTS // max(1, G * K * width))
        for row in range(B):
            for first in range(0, T, step):
                chunk = slice(first, first + step)
                slots, weight = columns[row, :, chunk], grad[row, :, chunk]
                used = slots >= 0
                # Unused slots gather key 0, which may be NaN, and 0 · NaN is NaN, so mask the keys as well as the weights.
                gathered = keys[row][slots.clamp(min=0)].masked_fill(~used[..., None], 0.0)
                d_query[row, :, chunk] = torch.einsum("gtk,gtki->gti", weight, gathered).to(d_query.dtype)
                # The queries of padding may be NaN as well. All of their slots are unused, so they are never added.
                per_slot = weight[..., None] * wide(index_query[row, :, chunk])[:, :, None]
                d_key[row].index_add_(0, slots[used], per_slot[used])
        return d_query, d_key.to(index_key.dtype), None, None
