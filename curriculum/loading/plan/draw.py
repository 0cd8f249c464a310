"""Draw one batch of a pool from the examples that are available.

Contract: a draw is a pure function of its arguments; its rows are distinct, and each is among the `n_available` first rows of
the order. Source of the mode: Platanios et al. 2019 (arXiv 1903.09848), Algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.plan.batches import prefix_within
from sparsort.curriculum.loading.plan.shuffling import key_of, permute, uniform

Rows = NDArray[Any]


def draw(order: Rows, n_available: int, size: int, key: int) -> NDArray[np.int64]:
    """Draw `size` distinct rows uniformly from the first `n_available` ≥ size of `order`, in random order."""
    return order[permute(np.arange(size), n_available, key)].astype(np.int64)


def draw_tokens(order: Rows, n_available: int, budget: int, lengths: NDArray[Any], key: int) -> NDArray[np.int64]:
    """Draw distinct rows from the first `n_available` while (longest × count) ≤ `budget`; each length is ≤ budget."""
    look = 64
    while True:
        # Longer draws extend shorter ones, because `permute` depends on the position alone.
        rows = order[permute(np.arange(min(look, n_available)), n_available, key)].astype(np.int64)
        count = prefix_within(lengths[rows], budget)
        if count < len(rows) or len(rows) == n_available:
            return rows[:count]
        look *= 2


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
