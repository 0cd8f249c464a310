"""The selection by index scores on the CPU, without a map of all scores in memory.

Contract: see `index_select`. A token's score for a block is the highest of its scores for the block's visible keys (MSA,
arXiv 2606.13392). `budgets.choose` then chooses the blocks and breaks ties.

Legend: B batch, G groups, T query columns, S key columns, I index width, K slots, N blocks, W block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsort.kernels.blocksparse.budgets import Budget, choose
from sparsort.kernels.blocksparse.cpu import dense_map
from sparsort.kernels.blocksparse.cpu.tiles import fitting_queries, working_dtype
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

# The number of scores in memory at a time: 8 MiB in float32.
_CHUNK_ELEMENTS = 1 << 21
# Up to this number of columns, the maximum of a block is computed by halving; see `_pool`.
_FEW_COLUMNS = 16


@torch.no_grad()
def index_select(
    index_query: Tensor, index_key: Tensor, layout: Layout, budget: Budget, *, block_size: int, scale: float
) -> Selection:
    """Select the blocks of every token by its index scores.

    In addition to the result, this needs memory for the index keys of a sequence and for 2²¹ scores, or for the scores of one
    query if these are more.

    Args:
        index_query: (B, G, T, I), any strides.
        index_key: (B, S, I), one head of index keys for all groups.
        layout: the sequences.
        budget: number of blocks per query token.
        block_size: W.
        scale: factor for the scores, which matters to budgets by threshold and by top-p.

    Returns:
        Selection with blocks (B, G, T, K), K = min(budget's slots, blocks of the longest sequence).
    """
    batch, groups, columns, _ = index_query.shape
    if dense_map.scores_short(layout, groups, block_size):
        return dense_map.index_select(index_query, index_key, layout, budget, block_size=block_size, scale=scale)
    slots = min(budget.slots, layout.blocks(block_size))
    blocks = torch.full((batch, groups, columns, slots), -1, dtype=torch.int32, device=index_query.device)
    dtype = working_dtype(index_query.dtype)
    for span in layout.spans:
        keys = index_key[span.row, span.key_start : span.key_start + span.keys].to(dtype)
        start = 0
        while start < span.queries:
            first = span.keys - span.queries + start
            count = min(fitting_queries(first, _CHUNK_ELEMENTS // groups, block_size), span.queries - start)
            chunk = slice(span.query_start + start, span.query_start + start + count)
            queries = index_query[span.row, :, chunk].to(dtype) * scale
            scores = _block_scores(queries, keys[: first + count], first, block_size)
            own = torch.arange(first, first + count, device=keys.device) // block_size
            chosen = choose(scores, own, budget)
            blocks[span.row, :, chunk, : chosen.shape[-1]] = chosen
            start += count
    return Selection(blocks=blocks, block_size=block_size)


def _block_scores(queries: Tensor, keys: Tensor, first: int, size: int) -> Tensor:
    """Return the block scores (G, t, N) of scaled queries (G, t, I), the first of them at position `first`.

    `keys` are those up to the last query's own.
    """
    groups, count, width = queries.shape
    # With keys before queries, the maximum over a block's keys is a maximum of whole rows.
    scores = torch.mm(keys, queries.reshape(-1, width).T).view(-1, groups, count)
    hidden = torch.arange(first, keys.shape[0], device=keys.device)[:, None] > torch.arange(
        first, first + count, device=keys.device
    )
    scores[first:].masked_fill_(hidden[:, None], -torch.inf)
    best = _pool(scores, size)
    # A score that is not finite counts as lowest. This is rare, so it is searched for in the maxima, of which there are fewest.
    if not bool((best < torch.inf).all()):
        best = _pool(scores.masked_fill_(~scores.isfinite(), -torch.inf), size)
    return best.permute(1, 2, 0)


def _pool(scores: Tensor, size: int) -> Tensor:
    """Return the maximum over each block of `size` rows; the last block may be smaller."""
    keys, groups, count = scores.shape
    # The full blocks are pooled at once through a view, and the incomplete last block by itself.
    whole = keys // size
    best = scores.new_empty(-(-keys // size), groups, count)
    rows = scores[: whole * size].view(whole, size, groups, count)
    # With few columns (decoding), torch.amax processes one number at a time and is up to ten times as slow as the elementwise
    # maximum of two halves. Therefore halve the blocks first.
    while 1 < groups * count <= _FEW_COLUMNS and rows.shape[1] % 2 == 0:
        rows = torch.maximum(*rows.tensor_split(2, dim=1))
    torch.amax(rows, dim=1, out=best[:whole])
    if whole < best.shape[0]:
        torch.amax(scores[whole * size :], dim=0, out=best[whole])
    return best
