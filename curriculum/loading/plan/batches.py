"""Where batches and packed sequences begin and end.

Contract: edges (K + 1,) int64 rise strictly from 0 to the number of things; thing i of batch k has
edges[k] ≤ i < edges[k + 1]. No batch is above its token budget, and none is empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError

Edges = NDArray[np.int64]

WINDOW = 1024  # examples that best-fit packing may take out of order
_SHOWN = 3


def by_count(n: int, size: int) -> Edges:
    """ceil(n / size) batches that differ by at most one."""
    k = -(-n // size)
    return np.arange(k + 1, dtype=np.int64) * n // max(k, 1)


def by_tokens(lengths: NDArray[Any], budget: int) -> Edges:
    """Consecutive examples as long as (longest × count) stays within `budget`.

    Args:
        lengths: (n,) tokens of the examples in their sequence, each ≤ budget.
    """
    edges, begin, n = [0], 0, len(lengths)
    while begin < n:
        begin += prefix_within(lengths[begin:], budget)
        edges.append(begin)
    return np.array(edges, dtype=np.int64)


def prefix_within(lengths: NDArray[Any], budget: int) -> int:
    """How many of the first examples fit in `budget` padded tokens; at least one where each is ≤ budget."""
    look = max(1, budget // max(1, int(lengths[0])))  # the first is no longer than the longest
    longest = np.maximum.accumulate(lengths[:look].astype(np.int64))
    return int(np.searchsorted(longest * np.arange(1, len(longest) + 1), budget, side="right"))


def next_fit(lengths: NDArray[Any], capacity: int) -> Edges:
    """Bins of consecutive examples whose lengths sum to at most `capacity`, each ≤ capacity; order kept."""
    total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    edges = [0]
    while edges[-1] < len(lengths):
        edges.append(int(np.searchsorted(total, total[edges[-1]] + capacity, side="right")) - 1)
    return np.array(edges, dtype=np.int64)


def best_fit(lengths: NDArray[Any], capacity: int) -> tuple[NDArray[np.int64], Edges]:
    """Best-fit decreasing (Johnson 1974) within windows of `WINDOW` examples; bins in the order of their first example.

    Returns:
        places (n,), the examples bin by bin, each bin in the order given; and the bins' edges.
    """
    places: list[int] = []
    edges = [0]
    for begin in range(0, len(lengths), WINDOW):
        part = np.asarray(lengths[begin : begin + WINDOW], dtype=np.int64)
        bins: list[list[int]] = []
        room: list[int] = []
        for index in np.argsort(-part, kind="stable"):
            length = int(part[index])
            fitting = [(left, number) for number, left in enumerate(room) if left >= length]
            if fitting:
                _, number = min(fitting)
                bins[number].append(int(index))
                room[number] -= length
            else:
                bins.append([int(index)])
                room.append(capacity - length)
        for held in sorted((sorted(held) for held in bins), key=lambda held: held[0]):
            places.extend(begin + index for index in held)
            edges.append(len(places))
    return np.array(places, dtype=np.int64), np.array(edges, dtype=np.int64)


def cut_lengths(
    lengths: NDArray[Any], max_length: int | None, limit: int | None, what: str
) -> tuple[NDArray[np.int32], int]:
    """Lengths with `max_length` applied, and how many examples it cuts.

    Raises:
        SparsortError: a length is below 1, or above `limit` after the cut.
    """
    values = np.asarray(lengths)
    if values.dtype.kind not in "iu" or (values.size and values.min() < 1):
        raise SparsortError(
            f"lengths are whole numbers of tokens of at least 1; got {values.dtype}"
            + (f" with a smallest of {values.min()}" if values.size and values.dtype.kind in "iuf" else "")
            + ". Leave empty examples out of the data, or count their end-of-text token."
        )
    cut = 0 if max_length is None else int(np.count_nonzero(values > max_length))
    kept = values if max_length is None else np.minimum(values, max_length)
    if limit is not None and kept.size and int(kept.max()) > limit:
        long = np.flatnonzero(kept > limit)
        named = ", ".join(f"row {row} ({kept[row]} tokens)" for row in long[:_SHOWN])
        raise SparsortError(
            f"{long.size} examples are longer than {what} of {limit} tokens: {named}"
            f"{' …' if long.size > _SHOWN else ''}. Cut them with max_length={limit}, raise it, or leave them out yourself."
        )
    return kept.astype(np.int32), cut
