"""What a selector chooses from: the rows that may be chosen, and what is known of them.

Contract: `select_demos` has checked that what a selector needs is there, so a selector does not ask again. An input that was
not given is empty, or NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos import similarity
from sparsort.curriculum.demos.pool import DemoPool

Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The rows that may be chosen for one query, M of a pool, with the settings of one selection.

    Attributes:
        pool: all rows.
        rows: (M,) positions in the pool of the rows that may be chosen, ascending.
        excluded: the other positions, with reasons.
        k: how many to choose, 1 to M.
        seed: seed for every random draw.
        ids: the ids asked for.
        label: the label's field.
        near: (M,) similarity to the query: BM25 for a selector that compares words, else cosine.
        unit: (M, D) unit embeddings.
        difficulty: (M,) difficulty.
        query_difficulty: the query's difficulty.
        trade_off, fetch, n_levels, neighbours: as in `select_demos`.
    """

    pool: DemoPool
    rows: Places
    excluded: Mapping[int, str]
    k: int
    seed: int
    ids: tuple[Any, ...]
    label: str
    near: NDArray[Any]
    unit: NDArray[Any]
    difficulty: NDArray[np.float64]
    query_difficulty: float
    trade_off: float
    fetch: int | None
    n_levels: int
    neighbours: int

    def nearest(self, fetch: int) -> Places:
        """The rows among which a selector looks: the caller's number or the selector's own, never fewer than k."""
        return similarity.nearest(self.near, max(self.fetch or fetch, self.k))
