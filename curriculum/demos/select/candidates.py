"""The entry of a selector, and the rows from which it chooses.

Contract: `select_rows` has checked that all inputs of a selector are known, so a selector does not check them again.

Shapes: N pool rows, M of them that may be chosen, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.known import Known
from sparsort.curriculum.demos.pool import similarity
from sparsort.registry import Entry

# Indices of rows.
Places = NDArray[np.int64]
_OF_QUERY = frozenset({"query", "query_embedding", "query_difficulty"})


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """The settings of a selection, as in `select_demos`.

    Attributes:
        own_similarity: whether the caller computes similarities itself. If so, embeddings are read only for a selector that
            needs them; by default they are read whenever they are known, to report the similarity of the chosen rows.
    """

    seed: int = 0
    ids: Sequence[Any] | None = None
    allow_leaks: bool = False
    trade_off: float = 0.5
    fetch: int | None = None
    n_levels: int = 5
    neighbours: int = 150
    own_similarity: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The rows that may be chosen for one query.

    Attributes:
        known: the inputs for the pool and the query.
        rows: (M,) positions in the pool, ascending.
        excluded: the other positions → why they may not be chosen.
        k: number to choose, 1 to M.
        settings: the settings of the selection.
        near: (M,) similarity to the query: BM25 for a selector that compares words, or else the cosine; empty if not known.
        unit: (M, D) embeddings of unit length; empty if there are none.
    """

    known: Known
    rows: Places
    excluded: Mapping[int, str]
    k: int
    settings: SelectSettings
    near: NDArray[Any]
    unit: NDArray[Any]

    @property
    def difficulty(self) -> NDArray[np.float64]:
        """The difficulty of the rows, (M,); empty if not known."""
        return np.empty(0) if self.known.difficulty is None else self.known.difficulty.at(self.rows.tolist())

    def nearest(self, fetch: int) -> Places:
        """The rows nearest to the query, the nearest first: as many as `settings.fetch` or else `fetch` says, and at least k."""
        return similarity.nearest(self.near, max(self.settings.fetch or fetch, self.k))


@dataclass(frozen=True, kw_only=True)
class DemoSelectorEntry(Entry):
    """One selector of demonstrations. `needs` and `reads` name arguments of `select_demos`.

    Attributes:
        function: returns indices into `Candidates.rows`, (k,).
        is_seeded: whether the choice depends on the seed.
    """

    function: Callable[[Candidates], Places]
    is_seeded: bool = False

    @property
    def looks_at_query(self) -> bool:
        """Whether it chooses for each query, rather than one set for all queries."""
        return not self.needs.isdisjoint(_OF_QUERY)

    @property
    def compares_words(self) -> bool:
        """Whether it compares words, rather than embeddings."""
        return "query" in self.needs

    @property
    def names_rows(self) -> bool:
        """Whether the caller lists the rows, and thereby their number."""
        return "ids" in self.needs
