"""Trainable block-sparse attention as its equations read, on the dense map: the oracle of every faster implementation.

MiniMax Sparse Attention (MSA, arXiv 2606.13392), for one query token t of group g, with T_t the visible keys of its chosen
blocks:

- index scores       S_ts = index_query_t · index_key_s · index_scale, over the keys s that t may see          `index_scores`
- block max-pool     M_tn = max of S_ts over the visible keys of block n                                       `block_scores`
- selection          the budget's blocks by M_t, the local block forced                                        `index_select_ref`
- attention          o_h = Σ_s softmax_s(query_h · key_s · scale + bias) · value_s over T_t                      `attend_ref`
- teacher            P_ts = mean over the heads h of the group of softmax_s(query_h · key_s · scale), detached `teacher`
- alignment          KL(P_t ‖ softmax_s(S_t)) over T_t; its mean over tokens and groups is the loss            `align_ref`

Contract: plain torch whose gradients are autograd's, computed in float64 for float64 tensors and else in float32. The memory
is that of the dense map, (B, G, T, S): for tests and small sizes. Padding may hold anything, NaN included. With
`selection.every_block` as the selection this is the warm-up: attention and alignment over the full causal support.

Legend: B batch, T query columns, S key columns, H query heads, G groups = key/value heads, R = H/G heads of a group,
D head width, I index width, K slots, N blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.budgets import Budget, choose
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection


def key_places(layout: Layout, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The sequence that each key belongs to and its position there: (B, S) int64 each, −1 for padding."""
    sequence = torch.full((layout.batch, layout.keys), -1, dtype=torch.int64)
    position = torch.full((layout.batch, layout.keys), -1, dtype=torch.int64)
    for n, span in enumerate(layout.spans):
        columns = slice(span.key_start, span.key_start + span.keys)
        sequence[span.row, columns] = n
        position[span.row, columns] = torch.arange(span.keys)
    return sequence.to(device), position.to(device)


def visible(layout: Layout, device: torch.device | str) -> Tensor:
    """Which keys a query may see at all: those of its own sequence up to its own position. (B, T, S) bool."""
    key_sequence, key_position = key_places(layout, device)
    sequence, position = layout.span_of_query(device).long(), layout.position(device).long()
    same = (sequence[:, :, None] == key_sequence[:, None]) & (sequence >= 0)[:, :, None]
    return same & (key_position[:, None] <= position[:, :, None])


def support(selection: Selection, layout: Layout) -> tuple[Tensor, Tensor]:
    """The keys that each query attends to, and the slot that each of them comes from.

    Returns:
        T_t as (B, G, T, S) bool, and (B, G, T, S) int64, the slot of the key's block in the query's row; 0 where the first
        is False.
    """
    blocks = selection.blocks.long()
    B, G, T, K = blocks.shape
    N = max(layout.blocks(selection.block_size), 1)
    # Unused slots write to column N, which no key reads.
    slot_of_block = blocks.new_full((B, G, T, N + 1), -1)
    slot_of_block.scatter_(
        -1, blocks.masked_fill(blocks < 0, N), torch.arange(K, device=blocks.device).expand_as(blocks)
    )
    _, key_position = key_places(layout, blocks.device)
    block_of_key = torch.div(key_position.clamp(min=0), selection.block_size, rounding_mode="floor")
    slot = slot_of_block.gather(-1, block_of_key[:, None, None].expand(B, G, T, -1))
    attended = visible(layout, blocks.device)[:, None] & (slot >= 0)
    return attended, slot.where(attended, 0)


def index_scores(index_query: Tensor, index_key: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """S: (B, G, T, S), −∞ where the query may not see the key."""
    index_query, index_key = _without_padding(index_query, index_key, layout)
    scores = torch.einsum("bgti,bsi->bgts", index_query, index_key) * scale
    return scores.masked_fill(~visible(layout, scores.device)[:, None], -torch.inf)


def block_scores(scores: Tensor, layout: Layout, *, block_size: int) -> Tensor:
    """M: (B, G, T, N), −∞ for blocks without a visible key. A score that is no finite number counts as lowest.

    Args:
        scores: (B, G, T, S), −∞ where the query may not see the key.
    """
    B, G, T, _ = scores.shape
    _, key_position = key_places(layout, scores.device)
    # A row of packed sequences has a block 0 for each; only those of the query's own sequence are above −∞.
    block_of_key = torch.div(key_position.clamp(min=0), block_size, rounding_mode="floor")
    scores = scores.masked_fill(~scores.isfinite(), -torch.inf)
    pooled = scores.new_full((B, G, T, layout.blocks(block_size)), -torch.inf)
    if not layout.spans:
        return pooled
    return pooled.scatter_reduce(-1, block_of_key[:, None, None].expand_as(scores), scores, "amax")


def index_select_ref(
    index_query: Tensor, index_key: Tensor, layout: Layout, budget: Budget, *, block_size: int, scale: float
) -> Selection:
    """The selection by the index branch; no gradient. `index_query` (B, G, T, I), `index_key` (B, S, I)."""
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
    """Exact attention over the selection.

    Args:
        query: (B, H, T, D).
        key, value: (B, G, S, D).
        selection, layout: which keys a query attends to.
        scale: of the logits.
        bias: (B, G, T, K), added to the logits of the keys of a slot; −∞ hides the slot.

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
    """P: (B, G, T, S), the mean over a group's heads of their probabilities (not of their logits); no gradient."""
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
    """KL(P ‖ student) of each token and group, by autograd differentiable in `index_query` and `index_key` only.

    Args:
        query: (B, H, T, D).
        key: (B, G, S, D).
        index_query: (B, G, T, I).
        index_key: (B, S, I).
        selection, layout: the support of both distributions.
        scale: of the attention's logits.
        index_scale: of the index scores.

    Returns:
        (B, G, T); 0 for padding and for queries that see nothing.
    """
    P = teacher(query, key, selection, layout, scale=scale)
    attended, _ = support(selection, layout)
    scores = index_scores(index_query, index_key, layout, scale=index_scale)
    # Outside the support any finite number will do; for a row without one all of them, so that its gradient is 0.
    empty = ~attended.any(-1, keepdim=True)
    log_student = scores.masked_fill(~attended, -torch.inf).masked_fill(empty, 0.0).log_softmax(-1)
    return (torch.xlogy(P, P) - P * log_student.masked_fill(~attended, 0.0)).sum(-1)


def _logits(
    query: Tensor, key: Tensor, selection: Selection, layout: Layout, *, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (B, G, R, T, S), finite but where a bias is not, and the support (B, G, 1, T, S) without what a bias hides."""
    B, H, T, D = query.shape
    G = key.shape[1]
    padding = layout.span_of_query(query.device) < 0
    query = _wide(query).masked_fill(padding[:, None, :, None], 0.0).reshape(B, G, H // G, T, D)
    logits = torch.einsum("bgrtd,bgsd->bgrts", query, _clean_keys(key, layout)) * scale
    attended, slot = support(selection, layout)
    if bias is not None:
        bias = _wide(bias).masked_fill(selection.blocks < 0, 0.0).masked_fill(padding[:, None, :, None], 0.0)
        # No slot at all leaves nothing to gather from.
        if bias.shape[-1]:
            of_key = bias.gather(-1, slot)
            logits = logits + of_key[:, :, None]
            attended = attended & (of_key != -torch.inf)
    return logits, attended[:, :, None]


def _softmax(logits: Tensor, attended: Tensor) -> Tensor:
    """Over the keys attended to; 0 elsewhere, and 0 throughout for a query that attends to none."""
    empty = ~attended.any(-1, keepdim=True)
    return logits.masked_fill(~attended, -torch.inf).masked_fill(empty, 0.0).softmax(-1).masked_fill(~attended, 0.0)


def _without_padding(index_query: Tensor, index_key: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    padding = layout.span_of_query(index_query.device) < 0
    index_query = _wide(index_query).masked_fill(padding[:, None, :, None], 0.0)
    return index_query, _clean_keys(index_key[:, None], layout)[:, 0]


def _clean_keys(keys: Tensor, layout: Layout) -> Tensor:
    """`keys` (B, G, S, D) with 0 for padding: 0 · NaN would reach the real tokens."""
    sequence, _ = key_places(layout, keys.device)
    return _wide(keys).masked_fill((sequence < 0)[:, None, :, None], 0.0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
