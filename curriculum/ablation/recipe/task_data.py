"""A task with its rows: the split, the queries as texts, and the demonstrations of each set.

Contract: everything here follows from the recipe and the files; no model. `SetDemos` has the rows that every test query is shown:
one set for all queries, or one for each query if the selector looks at the query.

Shapes: Q test queries, k demonstrations, L labels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import Ablation, DemoSet
from sparsort.curriculum.ablation.recipe.selectors import MODEL_SELECTORS, SELECTORS
from sparsort.curriculum.ablation.recipe.splits import Splits, draw_half, draw_sets, read_rows, split_rows
from sparsort.curriculum.ablation.recipe.tasks import Task, check_rows
from sparsort.curriculum.demos.known import Known
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.curriculum.demos.select.candidates import SelectSettings
from sparsort.curriculum.demos.select.selection import select_rows
from sparsort.errors import SparsortError
from sparsort.templates import columns_of

if TYPE_CHECKING:
    from sparsort.curriculum.ablation.run.model import PoolNumbers

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class SetDemos:
    """The demonstrations of one set.

    Attributes:
        rows: the distinct rows.
        of_query: (Q, k), or (1, k) for one set that all queries share: positions in `rows`, in the selector's order.
    """

    rows: list[Row]
    of_query: NDArray[np.int64]

    @property
    def fixed(self) -> bool:
        """Whether all queries share one set."""
        return len(self.of_query) == 1

    def demos(self, query: int, order: Sequence[int] | NDArray[np.int64]) -> list[Row]:
        """The demonstrations of a test query, arranged by a permutation of 0 … k−1."""
        positions = self.of_query[0 if self.fixed else query]
        return [self.rows[positions[place]] for place in order]


class TaskData:
    """A task with its rows, split once.

    Args:
        task: the task.
        ablation: determines the data folder and the split.

    Raises:
        SparsortError: a file or a row does not fit the task, or the pool is too small.
    """

    def __init__(self, task: Task, ablation: Ablation) -> None:
        self.task = task
        train = read_rows(task, ablation.data, "train")
        if train is None:
            raise SparsortError(f"the task {task.name!r} names no training file. Set its train.")
        test = read_rows(task, ablation.data, "test")
        self.splits: Splits = split_rows(
            task,
            train,
            test,
            n_test=ablation.test_rows,
            n_dev=ablation.dev_rows,
            max_demo_chars=ablation.max_demo_chars,
            seed=ablation.split_seed,
        )
        self.notes = [*self.splits.notes, *check_rows(task, self.splits.test, "the test rows")]
        by_labels = MODEL_SELECTORS.names(lambda entry: entry.model_scores == "labels")
        for selector in by_labels if task.is_generation else ():
            if selector in ablation.selectors:
                others = " or ".join(repr(name) for name in MODEL_SELECTORS if name not in by_labels)
                raise SparsortError(
                    f"the selector {selector!r} reads the entropy of the labels, but the answers of the task {task.name!r} are "
                    f"generated. Omit this selector, or use {others}."
                )
        most = max(ablation.shots)
        if len(self.splits.pool) < most:
            raise SparsortError(
                f"the task {task.name!r} has a pool of {len(self.splits.pool)} rows, and {most} shots were asked for. "
                "Ask for fewer shots, or give more training rows."
            )
        self.pool = DemoPool(self.splits.pool, prompt=task.prompt, label=task.label)
        self.test_texts = [task.query_text(row) for row in self.splits.test]
        self.dev_texts = [task.query_text(row) for row in self.splits.dev]
        self.gold = [task.gold_text(row) for row in self.splits.test]
        self.gold_index = np.array([task.gold_index(row) for row in self.splits.test])
        self.dev_gold = np.array([task.gold_index(row) for row in self.splits.dev])
        _check_unicode(task, [*self.splits.test, *self.splits.dev, *self.splits.pool])

    @functools.cached_property
    def questions(self) -> list[Row]:
        """Each test row with the columns of the prompt only. Selectors must not see its label."""
        return [{name: row[name] for name in columns_of(self.task.prompt)} for row in self.splits.test]

    @functools.cached_property
    def pool_by_id(self) -> dict[str, Row]:
        """The rows of the pool by id."""
        return {str(row["id"]): row for row in self.splits.pool}

    @functools.cached_property
    def content_free_texts(self) -> list[str]:
        """The content-free queries of contextual calibration; empty for generation, which has no label scores to correct."""
        return [] if self.task.is_generation else self.task.content_free_texts()

    @functools.cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """(L,) how often each label occurs in the pool; empty for generation."""
        labels = [] if self.task.is_generation else [self.task.gold_index(row) for row in self.splits.pool]
        return np.bincount(np.array(labels, dtype=np.int64), minlength=len(self.task.label_names()))

    def draw(self, demo_set: DemoSet, numbers: PoolNumbers | None = None) -> SetDemos:
        """Draw the demonstrations of a set whose selector does not query the model.

        Args:
            demo_set: a set of this task.
            numbers: embeddings and scores of the pool, which some selectors read.

        Raises:
            SparsortError: the pool is too small, or the selector lacks its input.
        """
        entry = SELECTORS[demo_set.selector]
        if entry.looks_at_query:
            if demo_set.selector in MODEL_SELECTORS:
                raise SparsortError(
                    f"the selector {demo_set.selector!r} queries the model about neighbours; use `nearest`."
                )
            return self.demos_at(self._select_by_query(demo_set, numbers, demo_set.k))
        (positions,) = draw_sets(
            self.task,
            self.pool,
            demo_set.selector,
            demo_set.k,
            [demo_set.seed],
            # The numbers are computed when they are first read, so they are read only for a selector that needs them.
            embeddings=None if numbers is None or "embeddings" not in entry.needs else numbers.embeddings,
            scores=None if numbers is None or "scores" not in entry.needs else numbers.difficulty,
        )
        # Copies, because all sets share the rows of the pool.
        rows = [dict(self.pool.rows[position]) for position in positions]
        return SetDemos(rows=rows, of_query=np.arange(demo_set.k)[None])

    def nearest(self, demo_set: DemoSet, numbers: PoolNumbers, count: int) -> NDArray[np.int64]:
        """(Q, N) pool positions of each test query's nearest neighbours by cosine, nearest first; N is at most `count`.

        Args:
            demo_set: a set of this task, whose selector queries the model about neighbours.
            numbers: embeddings of pool and queries.
            count: the number of neighbours, unless the set's half of the pool is smaller.
        """
        return self._select_by_query(
            demo_set, numbers, min(count, len(draw_half(len(self.pool), demo_set.k, demo_set.seed)))
        )

    def demos_at(self, positions_Qk: NDArray[np.int64]) -> SetDemos:
        """The demonstrations at (Q, k) positions in the pool."""
        distinct, of_query = np.unique(positions_Qk, return_inverse=True)
        rows = [dict(self.pool.rows[position]) for position in distinct.tolist()]
        # NumPy 2 and NumPy 1 return the inverse in different shapes.
        return SetDemos(rows=rows, of_query=of_query.reshape(positions_Qk.shape).astype(np.int64))

    def _select_by_query(self, demo_set: DemoSet, numbers: PoolNumbers | None, k: int) -> NDArray[np.int64]:
        """(Q, k) pool positions that the set's selector chooses for each test query."""
        half = draw_half(len(self.pool), demo_set.k, demo_set.seed)
        rows = [self.pool.rows[position] for position in half.tolist()]
        pool = DemoPool(rows, prompt=self.task.prompt, label=self.task.label)
        known = [Known(pool, query) for query in self.questions] if numbers is None else numbers.known(pool, half)
        entry = SELECTORS[demo_set.selector]
        settings = SelectSettings(seed=demo_set.seed, own_similarity=True)
        chosen = [select_rows(of_query, entry, k, settings).indices for of_query in known]
        return half[np.array(chosen, dtype=np.int64)]

    def reads_pool(self, demo_set: DemoSet) -> bool:
        """Whether the set's selector reads numbers of the whole pool, which the model computes."""
        return not SELECTORS[demo_set.selector].needs.isdisjoint(("embeddings", "scores"))


def _check_unicode(task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that no tokenizer can read, before any model runs."""
    for row in rows:
        try:
            # A demonstration contains everything that is shown of a row.
            task.demo_text(row).encode()
        except UnicodeEncodeError as error:
            raise SparsortError(
                f"row {row.get('id')!r} contains half of a surrogate pair, which is no character. Remove the row, or repair it."
            ) from error
