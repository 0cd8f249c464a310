"""Plans the batches of a shard: rows are sorted by length and cut under a token budget, and a common prefix is computed once.

Contract: `plan` is a pure function (NumPy only). Every row is in exactly one batch, and every batch is within the limits unless a
single row exceeds them. The first `depth` tokens of the rows, the "head", are computed once for each distinct head.

Trade-off: all heads have the same length. On 2000 TREC questions this saves 23 % of the tokens. A full prefix tree would save
32 %, but it needs as many passes as it has levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError

# The keys and values of the shared heads stay in memory while their rows run. This is the largest total of their tokens.
_MAX_HEAD_TOKENS = 8192
# If sharing saves less than this share of the tokens, it costs more (mask, gathered cache) than it saves.
_MIN_SAVING = 0.08
# The shortest rows, up to this share, do not limit the length of the heads. They may run without a shared head.
_SHORT_ROWS = 0.05
# A new batch begins if padding would exceed this share, but only once the batch has a quarter of the tokens that it may have.
_MAX_PADDING = 0.10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a batch.

    Attributes:
        tokens: the largest number of computed tokens, including padding.
        kept: the largest number of tokens whose keys and values are in memory, including those of the shared heads.
        depth: the largest number of tokens in a shared head; 0 for no sharing.
        alone_over: rows longer than this run alone and without a shared head, because their rotary embeddings depend on the
            longest row of a batch; None for no such limit.
    """

    tokens: int
    kept: int
    depth: int
    alone_over: int | None = None


def check_token_budget(token_budget: int | None) -> None:
    """Refuse a budget below one token."""
    if token_budget is not None and token_budget < 1:
        raise SparsortError(f"token_budget is {token_budget}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The batches of one shard.

    Attributes:
        depth: number of tokens of a head, which are computed in `head_batches`; 0 for no shared heads.
        heads: (n_heads, depth) int64, the distinct heads.
        head_of: (n_rows,) the number of each row's head; -1 for a row that runs as a whole.
        head_batches: for each batch of heads, their numbers.
        batches: for each batch of rows, their numbers, longest row first. In a batch, either all rows have heads or none has.
        n_tokens: number of tokens in all rows.
        n_computed: number of tokens that the plan computes, without padding.
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
        ids: token ids of every row, at least one token each. Every row has at least one token after its shared head.
        limits: see `Limits`.
    """
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    total = int(lengths.sum())
    alone = lengths > limits.alone_over if limits.alone_over is not None else np.zeros(len(ids), dtype=bool)
    # The rotations of the keys depend on the longest row of a batch, so no keys are shared if a row is that long.
    depth = 0 if alone.any() else _best_depth(ids, lengths, limits.depth)
    head_of = np.full(len(ids), -1, dtype=np.int64)
    heads = np.zeros((0, depth), dtype=np.int64)
    sharing = np.flatnonzero(lengths > depth) if depth else np.zeros(0, dtype=np.int64)
    if depth:
        heads, number = np.unique(_cut_heads(ids, sharing, depth), axis=0, return_inverse=True)
        head_of[sharing] = number.reshape(-1)
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
    """The length of the heads that minimises the computed tokens; 0 if sharing saves too little."""
    if len(ids) < 2:
        return 0
    # A few short rows must not prevent the others from sharing. They run without a head.
    limit = min(most, int(np.quantile(lengths, _SHORT_ROWS)) - 1)
    if limit < 1:
        return 0
    heads = _cut_heads(ids, np.flatnonzero(lengths > limit), limit)
    heads = heads[np.lexsort(heads.T[::-1])]
    differs = heads[1:] != heads[:-1]
    # `first` is the column where two neighbours in sorted order first differ (`limit` if they are equal). At depth p, the number
    # of distinct heads is 1 plus the number of neighbours that differ before column p.
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
    """Sort `rows` by descending length, and cut them into batches within the limits.

    `kept_before` is the number of tokens per row whose keys and values are in memory already: those of its head.
    """
    # In this order, the first row of a batch is its longest one, to whose length all others are padded.
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
