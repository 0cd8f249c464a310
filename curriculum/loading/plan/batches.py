"""Batches: the edges of batches and packed sequences in one pass, and the draws of a pool.

Contract: edges (K + 1,) int64 increase strictly from 0 to the number of items; item i is in batch k if
edges[k] ≤ i < edges[k + 1]. No batch exceeds its token budget, and no batch is empty. A draw is a pure function of its
arguments; its rows are distinct, and each is among the `n_available` first rows of the order. Source of the draws: Platanios et
al. 2019 (arXiv 1903.09848), Algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.plan.shuffling import key_of, permute, uniform
from sparsort.errors import SparsortError

Edges = NDArray[np.int64]
Rows = NDArray[Any]

# Best-fit packing may reorder examples within windows of this size.
WINDOW = 1024
_MOST_NAMED = 3


def by_count(n: int, size: int) -> Edges:
    """Edges of ceil(n / size) batches whose sizes differ by at most one, (K + 1,)."""
    k = -(-n // size)
    # Edge j is ⌊j·n/k⌋, computed in integers, so consecutive edges differ by ⌊n/k⌋ or ⌈n/k⌉.
    return np.arange(k + 1, dtype=np.int64) * n // max(k, 1)


def by_tokens(lengths: NDArray[Any], budget: int) -> Edges:
    """Edges of batches of consecutive examples, each as large as (longest × count) ≤ `budget` allows.

    Args:
        lengths: (n,) tokens of each example in the order of the sequence, each ≤ budget.
        budget: tokens of a batch, including its padding.
    """
    edges, begin, n = [0], 0, len(lengths)
    while begin < n:
        begin += prefix_within(lengths[begin:], budget)
        edges.append(begin)
    return np.array(edges, dtype=np.int64)


def prefix_within(lengths: NDArray[Any], budget: int) -> int:
    """The number of leading examples that fit in `budget` padded tokens; at least one if each length is ≤ budget."""
    # An upper bound, because the longest example is at least as long as the first one.
    most = max(1, budget // max(1, int(lengths[0])))
    longest = np.maximum.accumulate(lengths[:most].astype(np.int64))
    # The padded size never decreases with another example, so a binary search finds the last prefix that fits.
    return int(np.searchsorted(longest * np.arange(1, len(longest) + 1), budget, side="right"))


def next_fit(lengths: NDArray[Any], capacity: int) -> Edges:
    """Edges of bins of consecutive examples whose lengths, each ≤ capacity, sum to at most `capacity`; the order is kept."""
    total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    edges = [0]
    while edges[-1] < len(lengths):
        # The bin ends before the first example whose cumulative length exceeds the capacity.
        edges.append(int(np.searchsorted(total, total[edges[-1]] + capacity, side="right")) - 1)
    return np.array(edges, dtype=np.int64)


def best_fit(lengths: NDArray[Any], capacity: int) -> tuple[NDArray[np.int64], Edges]:
    """Best-fit decreasing (Johnson 1974) within windows of `WINDOW` examples; bins are in the order of their first example.

    Args:
        lengths: (n,) tokens of each example, each ≤ capacity.
        capacity: tokens of a bin.

    Returns:
        The examples bin by bin, (n,) positions in `lengths`, in ascending order within each bin; and the edges of the bins.
    """
    places: list[int] = []
    edges = [0]
    for begin in range(0, len(lengths), WINDOW):
        lengths_in_window = np.asarray(lengths[begin : begin + WINDOW], dtype=np.int64)
        bins: list[list[int]] = []
        room: list[int] = []
        for index in np.argsort(-lengths_in_window, kind="stable"):
            length = int(lengths_in_window[index])
            fitting = [(left, number) for number, left in enumerate(room) if left >= length]
            if fitting:
                # The bin with the least room that is still enough; the lower number breaks ties.
                _, number = min(fitting)
                bins[number].append(int(index))
                room[number] -= length
            else:
                bins.append([int(index)])
                room.append(capacity - length)
        for members in sorted((sorted(members) for members in bins), key=lambda members: members[0]):
            places.extend(begin + index for index in members)
            edges.append(len(places))
    return np.array(places, dtype=np.int64), np.array(edges, dtype=np.int64)


def cut_lengths(
    lengths: NDArray[Any], max_length: int | None, limit: int | None, container: str
) -> tuple[NDArray[np.int32], int]:
    """Apply `max_length` to the lengths.

    Args:
        lengths: tokens of each example.
        max_length: tokens at which an example is cut; None for no cut.
        limit: the most tokens of an example after the cut; None for no limit.
        container: the thing that has the limit, for the error message ("a batch").

    Returns:
        The lengths after the cut, and the number of examples that are cut.

    Raises:
        SparsortError: a length is below 1, or above `limit` after the cut.
    """
    values = np.asarray(lengths)
    if values.dtype.kind not in "iu" or (values.size and values.min() < 1):
        raise SparsortError(
            f"lengths are whole numbers of tokens of at least 1; got {values.dtype}"
            + (f" with a smallest of {values.min()}" if values.size and values.dtype.kind in "iuf" else "")
            + ". Remove empty examples from the data, or count their end-of-text token."
        )
    cut = 0 if max_length is None else int(np.count_nonzero(values > max_length))
    shortened = values if max_length is None else np.minimum(values, max_length)
    if limit is not None and shortened.size and int(shortened.max()) > limit:
        long = np.flatnonzero(shortened > limit)
        named = ", ".join(f"row {row} ({shortened[row]} tokens)" for row in long[:_MOST_NAMED])
        raise SparsortError(
            f"{long.size} examples are longer than {container} of {limit} tokens: {named}"
            f"{' …' if long.size > _MOST_NAMED else ''}. Cut them with max_length={limit} (--cut-length), raise the limit, or "
            "remove them from the data."
        )
    return shortened.astype(np.int32), cut


def draw(order: Rows, n_available: int, size: int, key: int) -> NDArray[np.int64]:
    """Draw `size` distinct rows uniformly from the first `n_available` ≥ size of `order`, in random order."""
    return order[permute(np.arange(size), n_available, key)].astype(np.int64)


def draw_tokens(order: Rows, n_available: int, budget: int, lengths: NDArray[Any], key: int) -> NDArray[np.int64]:
    """Draw distinct rows from the first `n_available` while (longest × count) ≤ `budget`; each length is ≤ budget."""
    # Most batches are smaller than 64 rows; a larger one doubles the number until the budget ends it.
    count_tried = 64
    while True:
        # Longer draws extend shorter ones, because `permute` depends on the position alone.
        rows = order[permute(np.arange(min(count_tried, n_available)), n_available, key)].astype(np.int64)
        count = prefix_within(lengths[rows], budget)
        if count < len(rows) or len(rows) == n_available:
            return rows[:count]
        count_tried *= 2


def draw_quotas(
    grouped: Rows, starts: NDArray[np.int64], shares: NDArray[np.float64], n_available: int, size: int, key: int
) -> NDArray[np.int64]:
    """Draw `size` rows, shares[g] · size of them from group g, out of the first n_available / N of each group.

    If shares[g] · size is not an integer, the count is rounded up or down at random, so that its mean over batches is exact.

    Args:
        grouped: (N,) rows sorted by group, each group easiest first.
        starts: (G + 1,) edges of the groups: group g has the places starts[g] … starts[g + 1] − 1.
        shares: (G,) shares that sum to 1; ceil(shares[g] · size) is at most the size of the group.
        n_available: number of rows that are available, over all groups.
        size: rows of the batch.
        key: key of the draw.
    """
    # Systematic sampling: one random offset per batch keeps every count within one of its quota.
    ticks = np.floor(np.concatenate([[0.0], np.cumsum(shares)]) * size + uniform(key) + 1e-9).astype(np.int64)
    counts = np.diff(ticks)
    # Every group offers the same share of its rows, but at least as many as its quota.
    rows = [
        draw(grouped[first:last], max(-(-n_available * (last - first) // len(grouped)), count), count, key_of(key, g))
        for g, (first, last, count) in enumerate(
            zip(starts[:-1].tolist(), starts[1:].tolist(), counts.tolist(), strict=True)
        )
    ]
    drawn = np.concatenate(rows)
    # The rows are still sorted by group; the last permutation mixes them.
    return drawn[permute(np.arange(len(drawn)), len(drawn), key_of(key, "mix"))]
