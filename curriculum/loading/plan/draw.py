"""The draw of one batch from the share of the examples that is available.

Contract: a draw is a pure function of its arguments; its rows are distinct, and each is among the easiest that the
share allows. Source of the mode: Platanios et al. 2019 (arXiv 1903.09848), Algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.plan.batches import prefix_within
from sparsort.curriculum.loading.plan.shuffling import key_of, permute, uniform

Rows = NDArray[Any]


def draw(order: Rows, held: int, size: int, key: int) -> NDArray[np.int64]:
    """`size` distinct rows of the first `held` of `order`, all alike likely, in random order; size ≤ held."""
    return order[permute(np.arange(size), held, key)].astype(np.int64)


def draw_tokens(order: Rows, held: int, budget: int, lengths: NDArray[Any], key: int) -> NDArray[np.int64]:
    """Distinct rows of the first `held` as long as (longest × count) is within `budget`; each length is ≤ budget."""
    look = 64
    while True:
        rows = order[permute(np.arange(min(look, held)), held, key)].astype(np.int64)
        count = prefix_within(lengths[rows], budget)
        if count < len(rows) or len(rows) == held:
            return rows[:count]
        look *= 2


def draw_quotas(
    grouped: Rows, starts: NDArray[np.int64], shares: NDArray[np.float64], held: int, size: int, key: int
) -> NDArray[np.int64]:
    """`size` rows of the first held / N of each group, shares[g] · size of group g.

    A share that is no whole number is rounded up or down so that its mean over batches is exact.

    Args:
        grouped: (N,) rows, group after group, each easiest first; group g holds places starts[g] … starts[g + 1] − 1.
        shares: (G,) sum to 1; ceil(shares[g] · size) is at most the group's size.
    """
    # Systematic sampling: one offset a batch keeps every count within one of its quota.
    ticks = np.floor(np.concatenate([[0.0], np.cumsum(shares)]) * size + uniform(key) + 1e-9).astype(np.int64)
    counts = np.diff(ticks)
    rows = [
        draw(grouped[first:last], max(-(-held * (last - first) // len(grouped)), count), count, key_of(key, g))
        for g, (first, last, count) in enumerate(
            zip(starts[:-1].tolist(), starts[1:].tolist(), counts.tolist(), strict=True)
        )
    ]
    drawn = np.concatenate(rows)
    return drawn[permute(np.arange(len(drawn)), len(drawn), key_of(key, "mix"))]
