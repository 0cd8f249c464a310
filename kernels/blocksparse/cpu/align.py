"""The alignment loss between attention and index scores, with its gradients, on the CPU.

Contract: see `align_forward`. For each (row, group, token), both distributions are over the visible keys of the selected blocks
(MSA, arXiv 2606.13392). The teacher P is the mean over the group's heads of each head's softmax, and the student is the softmax
of the index scores s. Then KL(P ‖ student) = Σ P (log P − log student), and ∂KL/∂s = student − P, because both sum to 1 and P is
detached.

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D width, I index width, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.cpu import dense_map
from sparsort.kernels.blocksparse.cpu.tiles import (
    LN2,
    LOG2E,
    Chunk,
    Scratch,
    add_product,
    chunk_logits,
    chunks,
    keys_of_span,
    peak_and_sum,
    rows_of_heads,
    working_dtype,
)
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection


@torch.no_grad()
def align_forward(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    index_scale: float,
    lse: Tensor | None = None,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute KL(P ‖ student) of every token and group.

    Args:
        query: (B, H, T, D), any strides, here and below.
        key: (B, G, S, D).
        index_query: (B, G, T, I).
        index_key: (B, S, I).
        selection, layout: the support of both distributions.
        scale, index_scale: factors for the attention logits and for the index scores.
        lse: (B, H, T), the log-sum-exp from `attend_forward` without a bias; None: it is computed here.
        gradients: whether to compute the gradients of rows.sum().

    Returns:
        Rows (B, G, T), 0 for padding and for tokens that see nothing, and the gradients of index_query and index_key in their
        dtypes, or None.
    """
    if dense_map.attends_short(selection, layout, query.shape[1]):
        return dense_map.align_forward(
            query,
            key,
            index_query,
            index_key,
            selection,
            layout,
            scale=scale,
            index_scale=index_scale,
            lse=lse,
            gradients=gradients,
        )
    groups, heads = key.shape[1], query.shape[1] // key.shape[1]
    size = selection.block_size
    dtype = torch.promote_types(working_dtype(query.dtype), working_dtype(index_query.dtype))
    rows = query.new_zeros(query.shape[0], groups, query.shape[2], dtype=dtype)
    d_index_query = index_query.new_zeros(index_query.shape) if gradients else None
    d_index_key = index_key.new_zeros(index_key.shape) if gradients else None
    scratch = Scratch(query.device, dtype)
    for span in layout.spans:
        within = slice(span.key_start, span.key_start + span.keys)
        index_keys = keys_of_span(index_key[span.row], span, size, dtype)
        d_keys = torch.zeros_like(index_keys)
        for group in range(groups):
            keys = keys_of_span(key[span.row, group], span, size, dtype)
            for chunk in chunks(selection, span, group, heads):
                of_heads = (span.row, slice(group * heads, (group + 1) * heads), chunk.columns)
                of_group = (span.row, group, chunk.columns)
                queries = rows_of_heads(query[of_heads], dtype).mul_(scale * LOG2E)
                teacher = _teacher(queries, keys, None if lse is None else lse[of_heads].T.to(dtype), chunk, scratch)
                index_queries = index_query[of_group].to(dtype) * (index_scale * LOG2E)
                student = _log_student(index_queries, index_keys, chunk, scratch)
                rows[of_group] = _divergence(teacher, student, chunk)
                if d_index_query is None:
                    continue
                d_scores = student.exp2_().sub_(teacher)
                d_queries = _spread(d_scores, index_queries, index_keys, d_keys, chunk, scratch)
                d_index_query[of_group] = d_queries.mul_(index_scale).to(index_query.dtype)
        if d_index_key is not None:
            # d_keys was summed from index queries that contain the factor log2 e, which ln 2 removes.
            d_index_key[span.row, within] = d_keys[: span.keys].mul_(LN2).to(index_key.dtype)
    return rows, d_index_query, d_index_key


def _teacher(queries: Tensor, keys: Tensor, lse: Tensor | None, chunk: Chunk, scratch: Scratch) -> Tensor:
    """Return the teacher P of each entry's keys, (E, W), from scaled queries (T, R·D) and lse (T, R)."""
    logits = chunk_logits(queries, keys, chunk, -torch.inf, scratch)
    if lse is None:
        _, total = peak_and_sum(logits, chunk.query, chunk.queries)
        logits.div_(total[chunk.query][..., None])
    else:
        logits.sub_(lse[chunk.query].mul_(LOG2E)[..., None]).exp2_()
    return torch.mean(logits, dim=1, out=scratch("teacher", logits.shape[0], logits.shape[2]))


def _log_student(queries: Tensor, keys: Tensor, chunk: Chunk, scratch: Scratch) -> Tensor:
    """Return log2 of the softmax of the index scores, (E, W)."""
    # Hidden keys get a large negative but finite score, because their product with P = 0 must be 0, not NaN.
    scores = chunk_logits(queries, keys, chunk, torch.finfo(queries.dtype).min / 4, scratch, name="scores")
    weights = scratch("weights", *scores.shape).copy_(scores)
    peak, total = peak_and_sum(weights, chunk.query, chunk.queries)
    return scores.sub_((peak + total.log2())[chunk.query][..., None])[:, 0]


def _divergence(teacher: Tensor, student: Tensor, chunk: Chunk) -> Tensor:
    """Return Σ P (log P − log student) of each query, (T,), from P and log2 of the student."""
    # The clamp makes log P finite where P is 0, so that 0 · log 0 = 0.
    smallest = torch.finfo(teacher.dtype).tiny
    terms = teacher.clamp_min(smallest).log2_().sub_(student).mul_(teacher)
    return terms.new_zeros(chunk.queries).index_add_(0, chunk.query, terms.sum(dim=1)).mul_(LN2)


def _spread(d_scores: Tensor, queries: Tensor, keys: Tensor, d_keys: Tensor, chunk: Chunk, scratch: Scratch) -> Tensor:
    """Add d_scoresᵀ · queries to d_keys, and return d_scores · keys of each query, (T, I)."""
    d_queries = torch.zeros_like(queries)
    gathered = scratch("gathered", chunk.longest, queries.shape[1])
    for tile in chunk.tiles:
        part, within = d_scores[tile.start : tile.end], slice(tile.key, tile.key + chunk.width)
        d_keys[within].addmm_(part.T, tile.take(queries, gathered))
        add_product(d_queries, tile, part, keys[within], gathered)
    return d_queries
