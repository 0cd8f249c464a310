"""What a selector is, and what it chooses from: the rows that may be chosen, with what is known about them.

Contract: `select_rows` has checked that what a selector needs is there, so a selector does not ask again. An input that was
not given is empty, or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos import similarity
from sparsort.curriculum.demos.pool import DemoPool
from sparsort.registry import Entry

Places = NDArray[np.int64]
_OF_QUERY = frozenset({"query", "query_embedding", "query_difficulty"})


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


@dataclass(frozen=True, kw_only=True)
class SelectorEntry(Entry):
    """One selector. `needs` names the arguments of `select_demos` that it cannot do without, `reads` the settings that it reads.

    Attributes:
        function: from the rows that may be chosen to places among them.
        is_seeded: whether a seed changes what it chooses.
    """

    function: Callable[[Candidates], Places]
    is_seeded: bool = False

    @property
    def looks_at_query(self) -> bool:
        """Whether it chooses for each query, rather than one set for all."""
        return not self.needs.isdisjoint(_OF_QUERY)

    @property
    def compares_words(self) -> bool:
        """Whether similarity is that of words, and not of embeddings."""
        return "query" in self.needs

    @property
    def names_rows(self) -> bool:
        """Whether the caller names the rows, and with them how many."""
        return "ids" in self.needs
