"""What a selector is, and what it chooses from: the rows that may be chosen, with what is known about them.

Contract: `select_rows` has checked that what a selector needs is there, so a selector does not check it again.
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

Places = NDArray[np.int64]
_OF_QUERY = frozenset({"query", "query_embedding", "query_difficulty"})


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """The settings of a selection, as in `select_demos`.

    Attributes:
        own_similarity: embeddings are read only where the selector needs them. By default they are read wherever they are
            known, for the similarity of the rows chosen.
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
    """The rows that may be chosen for one query, M of a pool.

    Attributes:
        known: the pool, the query, and their numbers.
        rows: (M,) positions in the pool of the rows that may be chosen, ascending.
        excluded: the other positions, with reasons.
        k: how many to choose, 1 to M.
        settings: the settings of the selection.
        near: (M,) similarity to the query: BM25 for a selector that compares words, else cosine; empty where it is not known.
        unit: (M, D) unit embeddings; empty where there are none.
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
        """(M,) difficulty; empty where there is none."""
        return np.empty(0) if self.known.difficulty is None else self.known.difficulty.at(self.rows.tolist())

    def nearest(self, fetch: int) -> Places:
        """The rows among which a selector looks: the caller's number or the selector's own, never fewer than k."""
        return similarity.nearest(self.near, max(self.settings.fetch or fetch, self.k))


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
