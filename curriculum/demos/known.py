"""The inputs of selectors and orders for one pool and one query: given, or computed when they are first read.

Contract: nothing is computed before it is read, and nothing is computed twice. Whatever needs a model is computed by a function
that the caller passes; no model is run here. Positions are positions in the pool.

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
from sparsort.values import text_if_any

Positions = Sequence[int]


class RowNumbers:
    """Numbers of the rows of a pool, (N, …), computed once for each row that is read.

    Args:
        count: N.
        compute: function from n positions to their numbers, (n, …); None if all numbers are given.
    """

    def __init__(self, count: int, compute: Callable[[list[int]], Any] | None) -> None:
        self._compute = compute
        self._values: Any = None
        self._is_known = np.zeros(count, dtype=bool)

    @classmethod
    def of(cls, values: Any) -> RowNumbers:
        """The given numbers of all rows; `all` is the same object."""
        numbers = cls(0, None)
        numbers._values = values
        return numbers

    @property
    def all(self) -> Any:
        """The numbers of all rows, the same object every time."""
        # Given numbers have a mask without entries, of which all are true.
        if self._values is None or not self._is_known.all():
            self._read(range(len(self._is_known)))
        return self._values

    def at(self, positions: Positions) -> NDArray[Any]:
        """The numbers of some rows, (n, …), in the order of the positions."""
        self._read(positions)
        # A given value may be a list or another array library's array.
        return np.asarray(self._values)[list(positions)]

    def _read(self, positions: Positions) -> None:
        if self._compute is None:
            return
        missing = [position for position in dict.fromkeys(positions) if not self._is_known[position]]
        if not missing and self._values is not None:
            return
        numbers = np.asarray(self._compute(missing))
        # The shape of a row's numbers and their type are known only after the first call.
        if self._values is None:
            self._values = np.empty((len(self._is_known), *numbers.shape[1:]), dtype=numbers.dtype)
        self._values[missing] = numbers
        self._is_known[missing] = True


class Known:
    """The inputs of selectors and orders for one pool and one query.

    Args:
        pool: the rows.
        query: the row to be answered, or its bare text; None if it is not known.
        label: the field that contains the label; by default the pool's.
        difficulty: (N,) numbers, higher is harder.
        kind: the kind of the scores, or None for numbers without a kind.
        embeddings: (N, D) embeddings.
        query_difficulty: computes the query's difficulty, by the same score.
        query_embedding: computes the query's embedding, (D,).
        similarity: (N,) similarity of each row to the query; by default the cosine of the embeddings.
        lengths: (N,) length of each row; by default in characters of `DemoPool.shown_text`.
    """

    def __init__(
        self,
        pool: DemoPool,
        query: Query | None = None,
        *,
        label: str | None = None,
        difficulty: RowNumbers | None = None,
        kind: str | None = None,
        embeddings: RowNumbers | None = None,
        query_difficulty: Callable[[], float] | None = None,
        query_embedding: Callable[[], Any] | None = None,
        similarity: NDArray[Any] | None = None,
        lengths: RowNumbers | None = None,
    ) -> None:
        self.pool, self.query, self.label = pool, query, label or pool.label
        self.difficulty, self.kind, self.embeddings = difficulty, kind, embeddings
        self.lengths = lengths or RowNumbers(len(pool), lambda at: [len(pool.shown_text(i)) for i in at])
        self._query_difficulty, self._query_embedding, self._similarity = query_difficulty, query_embedding, similarity

    def missing(self, needs: Collection[str]) -> list[str]:
        """The inputs in `needs` that are not known, by the names of the arguments of `select_demos`."""
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
        """The texts of the query that are compared with those of the pool, by field; empty if the query is not known."""
        return {} if self.query is None else self.pool.input_of(self.query)

    @functools.cached_property
    def query_embedding(self) -> Any:
        """The query's embedding, (D,), or None."""
        return None if self._query_embedding is None else self._query_embedding()

    @functools.cached_property
    def query_difficulty(self) -> float:
        """The query's difficulty; NaN if it is not known or could not be scored."""
        return float("nan") if self._query_difficulty is None else float(self._query_difficulty())

    @functools.cached_property
    def labels(self) -> list[str | None]:
        """The label of each row as text, or None if it has none. The label's field must be known."""
        field = str(self.label)
        return [text_if_any(row, field, where=self.pool.name(at)) for at, row in enumerate(self.pool.rows)]

    @property
    def unit_embeddings(self) -> similarity.Floats:
        """The embeddings scaled to unit length, (N, D). The embeddings must be known."""
        embeddings = self.embeddings.all if self.embeddings is not None else ()
        # Kept in the pool rather than here, because the next query has another `Known` with the same embeddings.
        return self.pool.cached("unit", embeddings, lambda: similarity.unit_rows(embeddings, len(self.pool)))

    @functools.cached_property
    def word_scores(self) -> NDArray[Any]:
        """The BM25 score of each row for the query, (N,)."""
        scores: NDArray[Any] = self.pool.word_scores(self.inputs)
        return scores

    def similarity_at(self, positions: Positions) -> NDArray[Any] | None:
        """The similarity of some rows to the query, (n,); None if it is not known."""
        if self._similarity is not None:
            return self._similarity[list(positions)]
        if self.embeddings is None or self.query_embedding is None:
            return None
        # Only the embeddings of these rows are read: those of the whole pool may need a model.
        return similarity.cosine(self.query_embedding, similarity.unit_rows(self.embeddings.at(positions)))
