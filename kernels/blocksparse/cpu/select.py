"""Index scores to a selection, on the CPU, without ever holding the map of all scores.

Contract: see `index_select`. A token's score for a block is the highest of its scores for the block's visible keys
(MSA, arXiv 2606.13392); who is chosen follows `budgets.choose`, ties and all.

Legend: B batch, G groups, T query columns, S key columns, I index width, K slots, N blocks, W block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.budgets import Budget, choose
from sparsort.kernels.blocksparse.cpu import dense_map as short
from sparsort.kernels.blocksparse.cpu.tiles import fitting_queries, working_dtype
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

# Scores held at a time: 8 MiB in float32.
_CHUNK_ELEMENTS = 1 << 21
_FEW_COLUMNS = 16


@torch.no_grad()
def index_select(
    index_query: Tensor, index_key: Tensor, layout: Layout, budget: Budget, *, block_size: int, scale: float
) -> Selection:
    """The blocks of every token by its index scores.

    Memory beside the result: the index keys of a sequence and 2²¹ scores, or the scores of one query where those are more.

    Args:
        index_query: (B, G, T, I), any strides.
        index_key: (B, S, I): one index head of keys for all groups.
        scale: of the scores; a threshold or a top-p budget reads their softmax.

    Returns:
        Blocks (B, G, T, K) with K = min(budget's slots, blocks of the longest sequence).
    """
    batch, groups, columns, _ = index_query.shape
    if short.scores_short(layout, groups, block_size):
        return short.index_select(index_query, index_key, layout, budget, block_size=block_size, scale=scale)
    slots = min(budget.slots, layout.blocks(block_size))
    blocks = torch.full((batch, groups, columns, slots), -1, dtype=torch.int32, device=index_query.device)
    dtype = working_dtype(index_query.dtype)
    for span in layout.spans:
        keys = index_key[span.row, span.key_start : span.key_start + span.keys].to(dtype)
        start = 0
        while start < span.queries:
            first = span.keys - span.queries + start
            count = min(fitting_queries(first, _CHUNK_ELEMENTS // groups, block_size), span.queries - start)
            where = slice(span.query_start + start, span.query_start + start + count)
            queries = index_query[span.row, :, where].to(dtype) * scale
            scores = _block_scores(queries, keys[: first + count], first, block_size)
            own = torch.arange(first, first + count, device=keys.device) // block_size
            found = choose(scores, own, budget)
            blocks[span.row, :, where, : found.shape[-1]] = found
            start += count
    return Selection(blocks=blocks, block_size=block_size)


def _block_scores(queries: Tensor, keys: Tensor, first: int, size: int) -> Tensor:
    """(G, t, N) of scaled (G, t, I) queries, whose positions start at `first`, and the keys up to the last one's."""
    groups, count, width = queries.shape
    # Keys before queries: then the maximum of a block runs over whole rows.
    scores = torch.mm(keys, queries.reshape(-1, width).T).view(-1, groups, count)
    hidden = torch.arange(first, keys.shape[0], device=keys.device)[:, None] > torch.arange(
        first, first + count, device=keys.device
    )
    scores[first:].masked_fill_(hidden[:, None], -torch.inf)
    best = _pool(scores, size)
    # Rare, and looked for where there is least to look through: a token's score that is no finite number counts as lowest.
    if not bool((best < torch.inf).all()):
        best = _pool(scores.masked_fill_(~scores.isfinite(), -torch.inf), size)
    return best.permute(1, 2, 0)


def _pool(scores: Tensor, size: int) -> Tensor:
    """The highest of each block of rows; the last block may be smaller."""
    keys, groups, count = scores.shape
    whole = keys // size
    best = scores.new_empty(-(-keys // size), groups, count)
    rows = scores[: whole * size].view(whole, size, groups, count)
    # torch takes a few columns one number at a time, up to ten times as slowly as the maximum of two halves (decoding).
    while 1 < groups * count <= _FEW_COLUMNS and rows.shape[1] % 2 == 0:
        rows = torch.maximum(*rows.tensor_split(2, dim=1))
    torch.amax(rows, dim=1, out=best[:whole])
    if whole < best.shape[0]:
        torch.amax(scores[whole * size :], dim=0, out=best[whole])
    return best
