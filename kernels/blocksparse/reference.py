"""Trainable block-sparse attention, written as its equations on the dense map: the oracle for the faster implementations.

MiniMax Sparse Attention (MSA, arXiv 2606.13392), for one query token t of group g, with T_t the visible keys of its chosen
blocks:

- index scores       S_ts = index_query_t · index_key_s · index_scale, over the keys s that t can see          `index_scores`
- block max-pool     M_tn = max of S_ts over the visible keys of block n                                       `block_scores`
- selection          the budget's blocks by M_t, always including the local block                              `index_select_ref`
- attention          o_h = Σ_s softmax_s(query_h · key_s · scale + bias) · value_s over T_t                      `attend_ref`
- teacher            P_ts = mean over the heads h of the group of softmax_s(query_h · key_s · scale), detached `teacher`
- alignment          KL(P_t ‖ softmax_s(S_t)) over T_t; its mean over tokens and groups is the loss            `align_ref`

Contract: plain torch with autograd's gradients, computed in float64 for float64 tensors and otherwise in float32. It needs the
memory of the dense map (B, G, T, S), so it is meant for tests and small sizes. Padding may hold any values, including NaN. With
the selection `selection.every_block`, this is the warm-up: attention and alignment over the full causal support.

Legend: B batch, T query columns, S key columns, H query heads, G groups = key/value heads, R = H/G heads of a group,
D head width, I index width, K slots, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.budgets import Budget, choose
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection


def key_positions(layout: Layout, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return the number of each key's sequence and the key's position in it: (B, S) int64 each, −1 for padding."""
    sequence = torch.full((layout.batch, layout.keys), -1, dtype=torch.int64)
    position = torch.full((layout.batch, layout.keys), -1, dtype=torch.int64)
    for n, span in enumerate(layout.spans):
        columns = slice(span.key_start, span.key_start + span.keys)
        sequence[span.row, columns] = n
        position[span.row, columns] = torch.arange(span.keys)
    return sequence.to(device), position.to(device)


def visible(layout: Layout, device: torch.device | str) -> Tensor:
    """Return the keys that each query can see, those of its own sequence up to its own position: (B, T, S) bool."""
    key_sequence, key_position = key_positions(layout, device)
    sequence, position = layout.span_of_query(device).long(), layout.position(device).long()
    same = (sequence[:, :, None] == key_sequence[:, None]) & (sequence >= 0)[:, :, None]
    return same & (key_position[:, None] <= position[:, :, None])


def support(selection: Selection, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the keys that each query attends to, and the slot that each of them belongs to.

    Returns:
        T_t as (B, G, T, S) bool, and the slot of each key's block in the query's row as (B, G, T, S) int64, 0 for keys outside
        T_t.
    """
    blocks = selection.blocks.long()
    B, G, T, K = blocks.shape
    N = max(layout.blocks(selection.block_size), 1)
    # Unused slots write to the extra column N, which no key reads.
    slot_of_block = blocks.new_full((B, G, T, N + 1), -1)
    slot_of_block.scatter_(
        -1, blocks.masked_fill(blocks < 0, N), torch.arange(K, device=blocks.device).expand_as(blocks)
    )
    _, key_position = key_positions(layout, blocks.device)
    block_of_key = torch.div(key_position.clamp(min=0), selection.block_size, rounding_mode="floor")
    slot = slot_of_block.gather(-1, block_of_key[:, None, None].expand(B, G, T, -1))
    attended = visible(layout, blocks.device)[:, None] & (slot >= 0)
    return attended, slot.where(attended, 0)


def index_scores(index_query: Tensor, index_key: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """Compute the index scores: (B, G, T, S), −∞ where the query cannot see the key."""
    index_query, index_key = _without_padding(index_query, index_key, layout)
    scores = torch.einsum("bgti,bsi->bgts", index_query, index_key) * scale
    return scores.masked_fill(~visible(layout, scores.device)[:, None], -torch.inf)


def block_scores(scores: Tensor, layout: Layout, *, block_size: int) -> Tensor:
    """Compute the block scores M: (B, G, T, N), −∞ for blocks without a visible key.

    A score that is not finite counts as the lowest one.

    Args:
        scores: (B, G, T, S), −∞ where the query cannot see the key.
        layout: the sequences.
        block_size: number of keys in a block.
    """
    B, G, T, _ = scores.shape
    _, key_position = key_positions(layout, scores.device)
    # Each of the packed sequences in a row has a block 0, and all of them are pooled together. That is harmless, because only
    # the keys of the query's own sequence have scores above −∞.
    block_of_key = torch.div(key_position.clamp(min=0), block_size, rounding_mode="floor")
    scores = scores.masked_fill(~scores.isfinite(), -torch.inf)
    pooled = scores.new_full((B, G, T, layout.blocks(block_size)), -torch.inf)
    if not layout.spans:
        return pooled
    return pooled.scatter_reduce(-1, block_of_key[:, None, None].expand_as(scores), scores, "amax")


def index_select_ref(
    index_query: Tensor, index_key: Tensor, layout: Layout, budget: Budget, *, block_size: int, scale: float
) -> Selection:
    """Select blocks by index scores, without a gradient. `index_query` is (B, G, T, I), `index_key` (B, S, I)."""
    with torch.no_grad():
        scores = index_scores(index_query, index_key, layout, scale=scale)
        own = torch.div(layout.position(scores.device), block_size, rounding_mode="floor")
        blocks = choose(block_scores(scores, layout, block_size=block_size), own[:, None], budget)
    return Selection(blocks=blocks, block_size=block_size)


def attend_ref(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute exact attention over the selection.

    Args:
        query: (B, H, T, D).
        key, value: (B, G, S, D).
        selection, layout: the keys that each query attends to.
        scale: factor for the logits.
        bias: (B, G, T, K), added to the logits of a slot's keys; −∞ hides the slot.

    Returns:
        Output (B, H, T, D) in the query's dtype and log-sum-exp (B, H, T) without gradient; 0 and −∞ for a query that sees
        nothing.
    """
    logits, attended = _logits(query, key, selection, layout, scale=scale, bias=bias)
    value = _clean_keys(value, layout)
    output = torch.einsum("bgrts,bgsd->bgrtd", _softmax(logits, attended), value)
    lse = logits.detach().masked_fill(~attended, -torch.inf).logsumexp(-1)
    return output.reshape(query.shape).to(query.dtype), lse.reshape(query.shape[:-1])


def teacher(query: Tensor, key: Tensor, selection: Selection, layout: Layout, *, scale: float) -> Tensor:
    """Compute P, the mean over a group's heads of their probabilities (not of their logits): (B, G, T, S), no gradient."""
    with torch.no_grad():
        return _softmax(*_logits(query, key, selection, layout, scale=scale)).mean(2)


def align_ref(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    index_scale: float,
) -> Tensor:
    """Compute KL(P ‖ student) of each token and group, differentiable in `index_query` and `index_key` only.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D).
        index_query: (B, G, T, I).
        index_key: (B, S, I).
        selection, layout: the support of both distributions.
        scale: factor for the attention logits.
        index_scale: factor for the index scores.

    Returns:
        (B, G, T); 0 for padding and for queries that see nothing.
    """
    P = teacher(query, key, selection, layout, scale=scale)
    attended, _ = support(selection, layout)
    scores = index_scores(index_query, index_key, layout, scale=index_scale)
    # Keys outside the support get −∞. A row with an empty support would be NaN throughout, so it gets zeros instead; P is 0
    # there, so the loss and its gradient are 0.
    empty = ~attended.any(-1, keepdim=True)
    log_student = scores.masked_fill(~attended, -torch.inf).masked_fill(empty, 0.0).log_softmax(-1)
    # xlogy defines 0 · log 0 = 0. The student's −∞ is replaced, because 0 · ∞ would be NaN.
    return (torch.xlogy(P, P) - P * log_student.masked_fill(~attended, 0.0)).sum(-1)


def _logits(
    query: Tensor, key: Tensor, selection: Selection, layout: Layout, *, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the logits (B, G, R, T, S), and the support (B, G, 1, T, S) without the keys that a bias hides."""
    B, H, T, D = query.shape
    G = key.shape[1]
    padding = layout.span_of_query(query.device) < 0
    query = _wide(query).masked_fill(padding[:, None, :, None], 0.0).reshape(B, G, H // G, T, D)
    logits = torch.einsum("bgrtd,bgsd->bgrts", query, _clean_keys(key, layout)) * scale
    attended, slot = support(selection, layout)
    if bias is not None:
        bias = _wide(bias).masked_fill(selection.blocks < 0, 0.0).masked_fill(padding[:, None, :, None], 0.0)
        # With K = 0 there is nothing to gather from.
        if bias.shape[-1]:
            of_key = bias.gather(-1, slot)
            logits = logits + of_key[:, :, None]
            attended = attended & (of_key != -torch.inf)
    return logits, attended[:, :, None]


def _softmax(logits: Tensor, attended: Tensor) -> Tensor:
    """Compute the softmax over the attended keys; 0 for all other keys, and for queries that attend to none."""
    empty = ~attended.any(-1, keepdim=True)
    return logits.masked_fill(~attended, -torch.inf).masked_fill(empty, 0.0).softmax(-1).masked_fill(~attended, 0.0)


def _without_padding(index_query: Tensor, index_key: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return both tensors in float32 or wider, with 0 for padding."""
    padding = layout.span_of_query(index_query.device) < 0
    index_query = _wide(index_query).masked_fill(padding[:, None, :, None], 0.0)
    return index_query, _clean_keys(index_key[:, None], layout)[:, 0]


def _clean_keys(keys: Tensor, layout: Layout) -> Tensor:
    """Return `keys` (B, G, S, D) with 0 for padding, since 0 · NaN would make the real tokens NaN."""
    sequence, _ = key_positions(layout, keys.device)
    return _wide(keys).masked_fill((sequence < 0)[:, None, :, None], 0.0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
