"""What is known about a pool of demonstrations and one query: given, or computed when a selector or an order reads it.

Contract: nothing is computed before it is read, and nothing twice. Whatever needs a model is computed by a function
that the caller passes; this module knows no model. Positions are those of the pool.

Shapes: N pool rows, n positions, D embedding width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool import similarity
from sparsort.curriculum.demos.pool.pool import DemoPool, InputTexts, Query
from sparsort.curriculum.demos.pool.rows import text_of
from sparsort.values import text_if_any

Positions = Sequence[int]


class Column:
    """Numbers of the rows of a pool, (N, …), computed for those that are read, each row once.

    Args:
        count: N.
        compute: from n positions to their numbers, (n, …); None if all numbers are given.
    """

    def __init__(self, count: int, compute: Callable[[list[int]], Any] | None) -> None:
        self._compute = compute
        self._values: Any = None
        self._is_known = np.zeros(count, dtype=bool)

    @classmethod
    def of(cls, values: Any) -> Column:
        """A column of numbers that are there already; `all` is the same object."""
        column = cls(0, None)
        column._values = values
        return column

    @property
    def all(self) -> Any:
        """The numbers of all rows, the same object every time."""
        if self._values is None or not self._is_known.all():
            self._read(range(len(self._is_known)))
        return self._values

    def at(self, positions: Positions) -> NDArray[Any]:
        """The numbers of some rows, in the order of the positions."""
        self._read(positions)
        return np.asarray(self._values)[list(positions)]

    def _read(self, positions: Positions) -> None:
        if self._compute is None:
            return
        lacking = [position for position in dict.fromkeys(positions) if not self._is_known[position]]
        if not lacking and self._values is not None:
            return
        found = np.asarray(self._compute(lacking))
        if self._values is None:
            self._values = np.empty((len(self._is_known), *found.shape[1:]), dtype=found.dtype)
        self._values[lacking] = found
        self._is_known[lacking] = True


class Known:
    """What is known about a pool and one query.

    Args:
        pool: the rows.
        query: the row that is to be answered, or its bare text; None where it is not known.
        label: the field that holds the label; by default the pool's.
        difficulty: (N,) numbers, higher is harder; None where there are none.
        kind: what was scored, or None for numbers without a kind.
        embeddings: (N, D).
        query_difficulty: computes the query's difficulty by the same score.
        query_embedding: computes the query's embedding, (D,).
        similarity: (N,) similarity of each row to the query; by default the cosine of the embeddings.
        lengths: (N,) length of each row; by default characters of its text fields without the id.
    """

    def __init__(
        self,
        pool: DemoPool,
        query: Query | None = None,
        *,
        label: str | None = None,
        difficulty: Column | None = None,
        kind: str | None = None,
        embeddings: Column | None = None,
        query_difficulty: Callable[[], float] | None = None,
        query_embedding: Callable[[], Any] | None = None,
        similarity: NDArray[Any] | None = None,
        lengths: Column | None = None,
    ) -> None:
        self.pool, self.query, self.label = pool, query, label or pool.label
        self.difficulty, self.kind, self.embeddings = difficulty, kind, embeddings
        self.lengths = lengths or Column(len(pool), lambda at: [len(text_of(pool.rows[i], i)) for i in at])
        self._query_difficulty, self._query_embedding, self._similarity = query_difficulty, query_embedding, similarity

    def lacks(self, needs: Collection[str]) -> list[str]:
        """Which of the inputs that a selector needs are not there, by the names of `select_demos`."""
        inputs = {
            "query": self.query,
            "embeddings": self.embeddings,
            "query_embedding": self._query_embedding,
            "scores": self.difficulty,
            "query_difficulty": self._query_difficulty,
            "label": self.label,
        }
        return [name for name, value in inputs.items() if name in needs and value is None]

    @functools.cached_property
    def inputs(self) -> InputTexts:
        """The texts of the query that are compared to the pool's, by field; none where the query is not known."""
        return {} if self.query is None else self.pool.input_of(self.query)

    @functools.cached_property
    def query_embedding(self) -> Any:
        """The query's embedding, (D,), or None."""
        return None if self._query_embedding is None else self._query_embedding()

    @functools.cached_property
    def query_difficulty(self) -> float:
        """The query's difficulty; NaN where there is none, or it could not be scored."""
        return float("nan") if self._query_difficulty is None else float(self._query_difficulty())

    @functools.cached_property
    def labels(self) -> list[str | None]:
        """The label of each row as text, None where it has none; the label's field has to be known."""
        field = str(self.label)
        return [text_if_any(row, field, where=self.pool.name(at)) for at, row in enumerate(self.pool.rows)]

    @property
    def unit_embeddings(self) -> similarity.Floats:
        """The embeddings scaled to unit length, (N, D); there have to be some."""
        embeddings = self.embeddings.all if self.embeddings is not None else ()
        return self.pool.kept("unit", embeddings, lambda: similarity.unit_rows(embeddings, len(self.pool)))

    @functools.cached_property
    def word_scores(self) -> NDArray[Any]:
        """BM25 of every row for the query, (N,)."""
        scores: NDArray[Any] = self.pool.word_scores(self.inputs)
        return scores

    def similarity_at(self, positions: Positions) -> NDArray[Any] | None:
        """The similarity of some rows to the query, (n,); None where nothing says how similar they are."""
        if self._similarity is not None:
            return self._similarity[list(positions)]
        if self.embeddings is None or self.query_embedding is None:
            return None
        return similarity.cosine(self.query_embedding, similarity.unit_rows(self.embeddings.at(positions)))
