"""The numbers by which an ablation selects and orders demonstrations, each computed by the model when it is first read.

Contract: the same rows are computed together whenever a number is read, so that a unit that is run again gets the same orders bit
for bit. Selecting and ordering themselves are those of `curriculum.demos`, over the `Known` made here and in `recipe.task_data`.

Shapes: N pool rows, Q test queries, U rows of a unit, D embedding width.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import SPARSITY, by_similarity, kind_of
from sparsort.curriculum.ablation.recipe.task_data import Showing, TaskData
from sparsort.curriculum.ablation.run.model import Engine
from sparsort.curriculum.demos.demonstrator import Demonstrator
from sparsort.curriculum.demos.known import Known, RowNumbers
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.curriculum.demos.pool.similarity import cosine, unit_rows


class PoolNumbers:
    """Embeddings and sparsity of a task's pool and test rows, for selectors.

    Args:
        data: the task.
        engine: the model.
    """

    def __init__(self, data: TaskData, engine: Engine) -> None:
        self.data, self.engine = data, engine

    @functools.cached_property
    def embeddings(self) -> NDArray[np.float32]:
        """(N, D)."""
        return self.engine.embeddings(self.data.task, self.data.splits.pool)

    @functools.cached_property
    def query_embeddings(self) -> NDArray[np.float32]:
        """(Q, D)."""
        return self.engine.embeddings(self.data.task, self.data.splits.test)

    @functools.cached_property
    def difficulty(self) -> NDArray[np.float64]:
        """(N,)."""
        pool = self.data.splits.pool
        return self.engine.sparsity(self.data.task, pool, pool)

    @functools.cached_property
    def query_difficulty(self) -> NDArray[np.float64]:
        """(Q,)."""
        return self.engine.sparsity(self.data.task, self.data.splits.test, self.data.splits.pool)

    def known(self, pool: DemoPool, positions: NDArray[np.int64]) -> list[Known]:
        """What is known about some rows of the pool and each of the Q test queries.

        Args:
            pool: the rows, made once for all queries.
            positions: their positions in the task's pool.
        """
        # The same columns for every query, so that what is computed of them is computed once.
        difficulty = RowNumbers(len(pool), lambda at: self.difficulty[positions[at]])
        embeddings = RowNumbers(len(pool), lambda at: self.embeddings[positions[at]])
        return [
            Known(
                pool,
                question,
                difficulty=difficulty,
                embeddings=embeddings,
                query_difficulty=functools.partial(self._query_difficulty_of, query),
                query_embedding=functools.partial(self._query_embedding_of, query),
            )
            for query, question in enumerate(self.data.questions)
        ]

    def _query_difficulty_of(self, query: int) -> float:
        return float(self.query_difficulty[query])

    def _query_embedding_of(self, query: int) -> NDArray[np.float32]:
        embedding: NDArray[np.float32] = self.query_embeddings[query]
        return embedding


class UnitNumbers:
    """Difficulty, similarity and length of the demonstrations of one unit, for orderers.

    Args:
        showing: the demonstrations.
        pool: the numbers of the unit's task.
    """

    def __init__(self, showing: Showing, pool: PoolNumbers) -> None:
        self._showing, self._pool = showing, pool
        self._task, self._engine = pool.data.task, pool.engine
        self._rows = DemoPool(showing.rows)
        self._lengths = RowNumbers.of([len(self._task.demo_text(row)) for row in showing.rows])

    def order(self, orderer: str, seed: int) -> NDArray[np.int64]:
        """(1, k), or (Q, k) where it depends on the query: the permutation of each query's demonstrations.

        Args:
            orderer: the name of an order, or "reverse:NAME".
            seed: seed for every random draw.
        """
        demonstrator, showing = Demonstrator(order=orderer, seed=seed), self._showing
        n_queries = len(self._pool.data.test_texts) if by_similarity(orderer) or not showing.fixed else 1
        of_query = [showing.of_query[0 if showing.fixed else query].tolist() for query in range(n_queries)]
        known = [self._known(orderer, query) for query in range(n_queries)]
        return np.array([demonstrator.arrange(known[query], rows) for query, rows in enumerate(of_query)])

    def _known(self, orderer: str, query: int) -> Known:
        kind = kind_of(orderer)
        difficulty = None if kind is None else RowNumbers.of(self._sparsity if kind == SPARSITY else self._loss)
        near = self._similarity[query] if by_similarity(orderer) else None
        return Known(self._rows, difficulty=difficulty, kind=kind, similarity=near, lengths=self._lengths)

    @functools.cached_property
    def _sparsity(self) -> NDArray[np.float64]:
        return self._engine.sparsity(self._task, self._showing.rows, self._pool.data.splits.pool)

    @functools.cached_property
    def _loss(self) -> NDArray[np.float64]:
        return self._engine.loss(self._task, self._showing.rows)

    @functools.cached_property
    def _similarity(self) -> NDArray[np.float64]:
        """(Q, U) cosine of every test query and row shown."""
        shown: Any = self._engine.embeddings(self._task, self._showing.rows)
        unit = unit_rows(shown)
        return np.array([cosine(one, unit) for one in self._pool.query_embeddings], dtype=np.float64)
