"""Which tokens are computed together: rows sorted by length, cut under a token budget, a common head computed once.

Contract: `plan` is pure (NumPy only). Every row is in exactly one batch; every batch is within the limits unless a single
row exceeds them. `depth` tokens at the head of the rows are computed once per distinct head.

The trade-off: one cut only. On 2000 TREC questions one cut saves 23 % of the tokens, a full prefix tree 32 %, and the
tree would need as many passes as it has levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError

# A shared head's keys and values stay in memory while its rows run: this many tokens at most.
_MAX_HEAD_TOKENS = 8192
# Below this share of tokens saved a cut costs more (mask, gathered cache) than it saves.
_MIN_SAVING = 0.08
# This share of the rows, the shortest, does not hold back how deep the others may share.
_SHORT_ROWS = 0.05
# A batch may pad by this share before a new one is begun, once it holds a fair amount of work.
_MAX_PADDING = 0.10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds a batch.

    Attributes:
        tokens: most tokens computed in one batch, padding included.
        kept: most tokens whose keys and values stand in memory for one batch, the shared head's included.
        depth: most tokens of a shared head; 0 for no sharing.
        alone_over: rows longer than this run alone and unshared (rotary embeddings that depend on the longest row of a
            batch); None for no such limit.
    """

    tokens: int
    kept: int
    depth: int
    alone_over: int | None = None


def check_token_budget(token_budget: int | None) -> None:
    """Refuse a budget that not even one token fits into."""
    if token_budget is not None and token_budget < 1:
        raise SparsortError(f"token_budget is {token_budget}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one shard runs.

    Attributes:
        depth: tokens at a row's head that are computed in `head_batches`; 0 for none.
        heads: (n_heads, depth) int64, the distinct heads.
        head_of: (n_rows,) which head a row has; -1 for a row that runs whole.
        head_batches: numbers of `heads`, batch by batch.
        batches: row numbers, batch by batch, longest first; within one batch all rows share heads or none does.
        n_tokens: tokens of all rows; `n_computed` those the plan runs, without padding.
    """

    depth: int
    heads: NDArray[np.int64]
    head_of: NDArray[np.int64]
    head_batches: list[NDArray[np.int64]]
    batches: list[NDArray[np.int64]]
    n_tokens: int
    n_computed: int


def plan(ids: Sequence[Sequence[int]], limits: Limits) -> Plan:
    """Plan the batches of one shard.

    Args:
        ids: token ids of every row, each at least one token; every row keeps at least one token behind a shared head.
        limits: see `Limits`.
    """
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    total = int(lengths.sum())
    alone = lengths > limits.alone_over if limits.alone_over is not None else np.zeros(len(ids), dtype=bool)
    depth = 0 if alone.any() else _best_depth(ids, lengths, limits.depth)
    head_of = np.full(len(ids), -1, dtype=np.int64)
    heads = np.zeros((0, depth), dtype=np.int64)
    sharing = np.flatnonzero(lengths > depth) if depth else np.zeros(0, dtype=np.int64)
    if depth:
        heads, which = np.unique(_cut_heads(ids, sharing, depth), axis=0, return_inverse=True)
        head_of[sharing] = which.reshape(-1)
    whole = np.flatnonzero((head_of < 0) & ~alone)
    return Plan(
        depth=depth,
        heads=heads,
        head_of=head_of,
        head_batches=_cut(np.arange(len(heads)), np.full(len(heads), depth), 0, limits),
        batches=[
            *(np.array([row]) for row in np.flatnonzero(alone)),
            *_cut(whole, lengths[whole], 0, limits),
            *_cut(sharing, lengths[sharing] - depth, depth, limits),
        ],
        n_tokens=total,
        n_computed=total - depth * (len(sharing) - len(heads)),
    )


def _cut_heads(ids: Sequence[Sequence[int]], rows: NDArray[np.int64], depth: int) -> NDArray[np.int64]:
    return np.array([ids[row][:depth] for row in rows.tolist()], dtype=np.int64)


def _best_depth(ids: Sequence[Sequence[int]], lengths: NDArray[np.int64], most: int) -> int:
    """The head length that computes the fewest tokens; 0 when none pays."""
    if len(ids) < 2:
        return 0
    # A few short rows must not keep the others from sharing: they run whole.
    limit = min(most, int(np.quantile(lengths, _SHORT_ROWS)) - 1)
    if limit < 1:
        return 0
    heads = _cut_heads(ids, np.flatnonzero(lengths > limit), limit)
    heads = heads[np.lexsort(heads.T[::-1])]
    differs = heads[1:] != heads[:-1]
    # Neighbours in sorted order first differ at this column (`limit`: not at all): a cut at depth p has one head more
    # for every pair that differs before p.
    first = np.where(differs.any(axis=1), differs.argmax(axis=1), limit)
    n_heads = 1 + np.cumsum(np.bincount(first, minlength=limit + 1))[:limit]
    depths = np.arange(1, limit + 1)
    saved = depths * (len(heads) - n_heads)
    saved[depths * n_heads > _MAX_HEAD_TOKENS] = 0
    best = int(saved.argmax())
    return int(depths[best]) if saved[best] >= _MIN_SAVING * lengths.sum() else 0


def _cut(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], kept_before: int, limits: Limits
) -> list[NDArray[np.int64]]:
    """`rows` sorted by falling length, cut so that padding and limits hold; `kept_before` tokens a row are kept besides."""
    order = np.argsort(-lengths, kind="stable")
    batches: list[NDArray[np.int64]] = []
    start = longest = real = 0
    for position, place in enumerate(order):
        length = int(lengths[place])
        count = position - start
        if count:
            padded = longest * (count + 1)
            wasteful = padded >= limits.tokens // 4 and real + length < (1 - _MAX_PADDING) * padded
            if padded > limits.tokens or (longest + kept_before) * (count + 1) > limits.kept or wasteful:
                batches.append(rows[order[start:position]])
                start, real = position, 0
        if position == start:
            longest = length
        real += length
    return [*batches, rows[order[start:]]] if len(order) else []
