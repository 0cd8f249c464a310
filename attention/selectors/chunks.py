"""Turn block scores into a selection, one sequence and one chunk of queries at a time, without a map over all tokens.

Contract: a selector supplies a function that scores a chunk of queries of one sequence. The largest tensor has at most about
`ELEMENTS` elements, however long the sequence. Sequences are read through the layout, so padding is never read and cannot
change a selection. ScoreFunction are float32 (float64 for float64 tensors), also under autocast, and have no gradient.

Legend: G groups, R heads of a group, n queries and m keys of a sequence, t some of its queries, N its blocks, W block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sparsort.attention.selectors.base import LayerInputs
from sparsort.kernels.blocksparse.budgets import Budget, choose
from sparsort.kernels.blocksparse.layout import Layout, Span
from sparsort.kernels.blocksparse.selection import Selection

# 64 MiB in float32.
ELEMENTS = 1 << 24

# Maps queries first … last − 1 of a sequence to their scores (G, t, N'), where N' is the number of blocks that the last one sees.
ScoreFunction: TypeAlias = Callable[[int, int], Tensor]
Pooling = Literal["mean", "max", "min"]


def select_blocks(
    inputs: LayerInputs, block_size: int, budget: Budget, scores_of: Callable[[Span], ScoreFunction], *, cost: float
) -> Selection:
    """Select the blocks of every query by scores that are computed in chunks.

    Args:
        inputs: the layer's tensors and settings.
        block_size: W.
        budget: number of blocks per query token.
        scores_of: prepares a sequence once and returns the function that scores its queries. The score of a block must depend
            only on keys that the query sees. −∞ is allowed for blocks without a score and for the query's own block, which is
            taken in any case.
        cost: number of elements, per query and per key of its sequence, of the largest tensor that scoring creates.
    """
    layout, device = inputs.layout, inputs.query.device
    # No query can use more slots than the longest sequence has blocks.
    slots = min(budget.slots, layout.blocks(block_size))
    blocks = torch.full((layout.batch, inputs.groups, layout.queries, slots), -1, dtype=torch.int32, device=device)
    with torch.no_grad(), full_precision(device):
        for span in layout.spans:
            scores = scores_of(span)
            for first, last in chunks(span, cost):
                chosen = choose(scores(first, last), own_blocks(span, first, last, block_size, device), budget)
                columns = slice(span.query_start + first, span.query_start + last)
                blocks[span.row, :, columns, : chosen.shape[-1]] = chosen
    return Selection(blocks=blocks, block_size=block_size)


def chunks(span: Span, cost: float) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of chunks of queries first … last − 1 within `ELEMENTS`, at `cost` > 0 elements per query and key."""
    step = max(1, int(ELEMENTS / (cost * span.keys)))
    for first in range(0, span.queries, step):
        yield first, min(first + step, span.queries)


def own_blocks(span: Span, first: int, last: int, block_size: int, device: torch.device) -> Tensor:
    """Return the block that contains each query: (t,) int64."""
    return positions(span, first, last, device) // block_size


def positions(span: Span, first: int, last: int, device: torch.device) -> Tensor:
    """Return the position of each query among its sequence's keys: (t,) int64."""
    start = span.keys - span.queries
    return torch.arange(start + first, start + last, device=device)


def blocks_seen(span: Span, last: int, block_size: int) -> int:
    """Return N', the number of blocks that query last − 1 of a sequence sees."""
    return -(-(span.keys - span.queries + last) // block_size)


def queries_of(inputs: LayerInputs, span: Span) -> Tensor:
    """Return the queries of one sequence: (G, R, n, D), float32 or float64."""
    queries = inputs.query[span.row, :, span.query_start : span.query_start + span.queries]
    return wide(queries).reshape(inputs.groups, -1, *queries.shape[1:])


def keys_of(keys: Tensor, span: Span) -> Tensor:
    """Return the part (…, m, width) of (B, …, S, width) that belongs to one sequence, in float32 or float64."""
    return wide(keys[span.row, ..., span.key_start : span.key_start + span.keys, :])


def in_blocks(values: Tensor, block_size: int, fill: float) -> Tensor:
    """Reshape (…, m, width) to (…, N, W, width), the last block padded with `fill`; if m < W, to one block of m tokens."""
    # A block may be much larger than the sequence, and memory should depend on the tokens that exist.
    block_size = min(block_size, max(values.shape[-2], 1))
    missing = -values.shape[-2] % block_size
    values = torch.nn.functional.pad(values, (0, 0, 0, missing), value=fill)
    return values.reshape(*values.shape[:-2], -1, block_size, values.shape[-1])


def pool_blocks(values: Tensor, block_size: int, pooling: Pooling) -> Tensor:
    """Pool (…, m, width) over the tokens of each block: (…, N, width).

    Use the result for full blocks only. The last block may be incomplete, which its padding would distort, but it is then the
    own block of every query that sees it, and `pool_own` covers that.
    """
    blocks = in_blocks(values, block_size, 0.0)
    if pooling == "mean":
        return blocks.mean(-2)
    return blocks.amax(-2) if pooling == "max" else blocks.amin(-2)


def pool_own(values: Tensor, span: Span, block_size: int, pooling: Pooling) -> Tensor:
    """Pool (…, m, width) over the tokens of each query's own block up to the query itself: (…, n, width).

    The rest of the block is in the query's future, so the pool of the whole block must not be used to score it.
    """
    # Start at the block of the first query: with a cache, earlier blocks are the own block of no query.
    start = (span.keys - span.queries) // block_size * block_size
    pooled = in_blocks(values[..., start:, :], block_size, 0.0)
    if pooling == "mean":
        sizes = torch.arange(1, pooled.shape[-2] + 1, dtype=values.dtype, device=values.device)
        pooled = pooled.cumsum(-2) / sizes[:, None]
    # A running pool at a token covers its block up to that token, so padding after the last token cannot enter it.
    else:
        pooled = (pooled.cummax(-2) if pooling == "max" else pooled.cummin(-2)).values
    first = span.keys - span.queries - start
    return pooled.flatten(-3, -2)[..., first : first + span.queries, :]


def with_own(scores: Tensor, own: Tensor, own_scores: Tensor) -> Tensor:
    """Return `scores` (G, t, N') with those of the queries' own blocks (t,) replaced by `own_scores` (G, t)."""
    return scores.scatter(-1, own.expand(scores.shape[:-1])[..., None], own_scores[..., None])


def dense_map(queries: Tensor, keys: Tensor, span: Span, first: int, last: int, scale: float) -> Tensor:
    """Return the dense attention probabilities of queries first … last − 1 of a sequence.

    Args:
        queries: (G, R, t, D), the chunk of queries.
        keys: (G, m, D), the keys of the whole sequence.
        span: the sequence.
        first, last: the chunk.
        scale: factor for the attention logits.

    Returns:
        (G, R, t, m'), where m' is the number of keys that the last query sees.
    """
    # Keys after the last query of the chunk are in the future of all of its queries, so they are not multiplied at all.
    seen = span.keys - span.queries + last
    logits = torch.einsum("grtd,gmd->grtm", queries, keys[:, :seen]).mul_(scale)
    future = torch.arange(seen, device=keys.device) > positions(span, first, last, keys.device)[:, None]
    return logits.masked_fill_(future, -torch.inf).softmax(-1)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast, which would compute float32 products in half precision."""
    with torch.autocast(device.type, enabled=False):
        yield


def tokens_and_groups(layout: Layout, groups: int) -> int:
    """Return the divisor of a mean over tokens and groups, at least 1."""
    return max(layout.tokens * groups, 1)
