"""Block scores to a selection, sequence by sequence and some queries at a time, so that no map over all tokens exists.

Contract: a selector gives a function that scores some queries of one sequence; what is held at once is bounded by
`ELEMENTS`, however long the sequence. Sequences are read by the layout alone, so padding is never touched and cannot move a
block. Scores are float32, or float64 for float64 tensors, also under autocast, and have no gradient.

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

ELEMENTS = 1 << 24

# Queries first … last − 1 of a sequence to their scores (G, t, N'), N' being the blocks that the last of them sees.
Scores: TypeAlias = Callable[[int, int], Tensor]
Pool = Literal["mean", "max", "min"]


def select_blocks(
    inputs: LayerInputs, block_size: int, budget: Budget, scores_of: Callable[[Span], Scores], *, cost: float
) -> Selection:
    """The blocks of every query by scores that are made in chunks.

    Args:
        inputs: the layer.
        block_size: W.
        budget: how many blocks.
        scores_of: prepares a sequence once, and scores some of its queries. A block's score may read no key that the query
            does not see; −∞ for the query's own block is allowed (it is taken in any case), and for blocks without a score.
        cost: elements of the largest tensor made to score a query, per key of its sequence.
    """
    layout, device = inputs.layout, inputs.query.device
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
    """Queries first … last − 1, as many at once as `ELEMENTS` allows when each takes `cost` (above 0) elements per key."""
    step = max(1, int(ELEMENTS / (cost * span.keys)))
    for first in range(0, span.queries, step):
        yield first, min(first + step, span.queries)


def own_blocks(span: Span, first: int, last: int, block_size: int, device: torch.device) -> Tensor:
    """(t,) int64: the block that each query stands in."""
    return positions(span, first, last, device) // block_size


def positions(span: Span, first: int, last: int, device: torch.device) -> Tensor:
    """(t,) int64: the position of each query among its sequence's keys."""
    start = span.keys - span.queries
    return torch.arange(start + first, start + last, device=device)


def blocks_seen(span: Span, last: int, block_size: int) -> int:
    """Blocks that query last − 1 of a sequence sees: N'."""
    return -(-(span.keys - span.queries + last) // block_size)


def queries_of(inputs: LayerInputs, span: Span) -> Tensor:
    """(G, R, n, D) of one sequence, float32 or float64."""
    found = inputs.query[span.row, :, span.query_start : span.query_start + span.queries]
    return wide(found).reshape(inputs.groups, -1, *found.shape[1:])


def keys_of(keys: Tensor, span: Span) -> Tensor:
    """(…, m, width) of one sequence from (B, …, S, width), float32 or float64."""
    return wide(keys[span.row, ..., span.key_start : span.key_start + span.keys, :])


def in_blocks(values: Tensor, block_size: int, fill: float) -> Tensor:
    """(…, m, width) as (…, N, W, width), the last block filled up; one shorter block where m < W."""
    # What is held goes by the tokens there are, however large a block may be.
    block_size = min(block_size, max(values.shape[-2], 1))
    missing = -values.shape[-2] % block_size
    values = torch.nn.functional.pad(values, (0, 0, 0, missing), value=fill)
    return values.reshape(*values.shape[:-2], -1, block_size, values.shape[-1])


def pool_blocks(values: Tensor, block_size: int, how: Pool) -> Tensor:
    """(…, m, width) to (…, N, width): over the tokens of each block.

    Only a full block's pool may be used: one that is not full is the own block of every query that sees it (`pool_own`).
    """
    blocks = in_blocks(values, block_size, 0.0)
    if how == "mean":
        return blocks.mean(-2)
    return blocks.amax(-2) if how == "max" else blocks.amin(-2)


def pool_own(values: Tensor, span: Span, block_size: int, how: Pool) -> Tensor:
    """(…, m, width) to (…, n, width): over the tokens of each query's own block up to the query itself.

    The rest of the block lies in the query's future, so that the block's pool as a whole must not score it.
    """
    start = (span.keys - span.queries) // block_size * block_size
    found = in_blocks(values[..., start:, :], block_size, 0.0)
    if how == "mean":
        sizes = torch.arange(1, found.shape[-2] + 1, dtype=values.dtype, device=values.device)
        found = found.cumsum(-2) / sizes[:, None]
    else:
        found = (found.cummax(-2) if how == "max" else found.cummin(-2)).values
    first = span.keys - span.queries - start
    return found.flatten(-3, -2)[..., first : first + span.queries, :]


def with_own(scores: Tensor, own: Tensor, own_scores: Tensor) -> Tensor:
    """`scores` (G, t, N') with those of the own blocks (t,) replaced by `own_scores` (G, t)."""
    return scores.scatter(-1, own.expand(scores.shape[:-1])[..., None], own_scores[..., None])


def dense_map(queries: Tensor, keys: Tensor, span: Span, first: int, last: int, scale: float) -> Tensor:
    """Attention probabilities of queries first … last − 1 of a sequence.

    Args:
        queries: (G, R, t, D), of these queries.
        keys: (G, m, D), of the whole sequence.

    Returns:
        (G, R, t, m'), over the m' keys that the last of them sees.
    """
    seen = span.keys - span.queries + last
    logits = torch.einsum("grtd,gmd->grtm", queries, keys[:, :seen]).mul_(scale)
    future = torch.arange(seen, device=keys.device) > positions(span, first, last, keys.device)[:, None]
    return logits.masked_fill_(future, -torch.inf).softmax(-1)


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off: float32 products are meant to be float32."""
    with torch.autocast(device.type, enabled=False):
        yield


def tokens_and_groups(layout: Layout, groups: int) -> int:
    """What a mean over tokens and groups divides by."""
    return max(layout.tokens * groups, 1)
