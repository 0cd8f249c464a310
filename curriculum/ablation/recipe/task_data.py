"""A task with its rows: split once, its queries as texts, and the demonstration sets of each unit.

Contract: everything here follows from the recipe and the files; no model. A unit's `Showing` says which rows every test query
is shown: one set for all of them, or one for each where the selector looks at the query.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.recipe.ablation import Ablation, Unit
from sparsort.curriculum.ablation.recipe.selectors import MODEL_SELECTORS, SELECTORS
from sparsort.curriculum.ablation.recipe.splits import Splits, draw_sets, read_rows, split_rows
from sparsort.curriculum.ablation.recipe.tasks import Task, check_rows
from sparsort.curriculum.demos.known import Known
from sparsort.curriculum.demos.pool.pool import DemoPool
from sparsort.curriculum.demos.select.candidates import SelectSettings
from sparsort.curriculum.demos.select.selection import select_rows
from sparsort.errors import SparsortError
from sparsort.templates import columns_of

if TYPE_CHECKING:
    from sparsort.curriculum.ablation.run.measured import PoolNumbers

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Showing:
    """Demonstrations of one unit.

    Attributes:
        rows: the rows that occur, each once.
        of_query: (Q, k) or (1, k) positions in `rows` of what each test query is shown, in the selector's order.
    """

    rows: list[Row]
    of_query: NDArray[np.int64]

    @property
    def fixed(self) -> bool:
        """One set for all queries."""
        return len(self.of_query) == 1

    def demos(self, query: int, order: Sequence[int] | NDArray[np.int64]) -> list[Row]:
        """The demonstrations of a test query in an order of theirs."""
        mine = self.of_query[0 if self.fixed else query]
        return [self.rows[mine[place]] for place in order]


class TaskData:
    """A task and its splits.

    Args:
        task: the task.
        ablation: says where the data lies and how it is split.

    Raises:
        SparsortError: files or rows that do not fit.
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
                    f"the selector {selector!r} goes by the labels' entropy, and answers of the task {task.name!r} are "
                    f"written. Leave it out, or take {others}."
                )
        most = max(ablation.shots)
        if len(self.splits.pool) < most:
            raise SparsortError(
                f"the task {task.name!r} has {len(self.splits.pool)} rows to show, and {most} shots were asked for. "
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
        """The columns of the prompt of each test row, without its label."""
        return [{name: row[name] for name in columns_of(self.task.prompt)} for row in self.splits.test]

    @functools.cached_property
    def pool_by_id(self) -> dict[str, Row]:
        """The rows of the pool by id."""
        return {str(row["id"]): row for row in self.splits.pool}

    @functools.cached_property
    def label_counts(self) -> NDArray[np.int64]:
        """(L,) rows of each label in the pool; empty for generation."""
        labels = [] if self.task.is_generation else [self.task.gold_index(row) for row in self.splits.pool]
        return np.bincount(np.array(labels, dtype=np.int64), minlength=len(self.task.label_names()))

    def show(self, unit: Unit, numbers: PoolNumbers | None = None) -> Showing:
        """The demonstrations of a unit.

        Args:
            unit: a unit of this task.
            numbers: what the selector may read of the pool, where it reads anything.

        Raises:
            SparsortError: the pool is too small, or the selector lacks its numbers.
        """
        entry = SELECTORS[unit.selector]
        if entry.looks_at_query:
            if unit.selector in MODEL_SELECTORS:
                raise SparsortError(
                    f"the selector {unit.selector!r} queries the model about neighbours; use `nearest`."
                )
            return self.shown(self._chosen(unit, numbers, unit.k))
        (one,) = draw_sets(
            self.task,
            self.pool,
            unit.selector,
            unit.k,
            [unit.seed],
            embeddings=None if numbers is None or "embeddings" not in entry.needs else numbers.embeddings,
            scores=None if numbers is None or "scores" not in entry.needs else numbers.difficulty,
        )
        return Showing(rows=[dict(self.pool.rows[place]) for place in one], of_query=np.arange(unit.k)[None])

    def nearest(self, unit: Unit, numbers: PoolNumbers, count: int) -> NDArray[np.int64]:
        """(Q, N) positions in the pool of each test query's nearest neighbours by cosine, nearest first; N is at most `count`.

        Args:
            unit: a unit of this task, whose selector queries the model about neighbours.
            numbers: embeddings of pool and queries.
            count: how many, where the half of the pool that the unit's seed draws has as many.
        """
        return self._chosen(unit, numbers, min(count, self._half_size(unit)))

    def shown(self, of_query: NDArray[np.int64]) -> Showing:
        """Demonstrations by (Q, k) positions in the pool."""
        used, places = np.unique(of_query, return_inverse=True)
        rows = [dict(self.pool.rows[place]) for place in used.tolist()]
        return Showing(rows=rows, of_query=places.reshape(of_query.shape).astype(np.int64))

    def _half_size(self, unit: Unit) -> int:
        return max(unit.k, (len(self.pool) + 1) // 2)

    def _chosen(self, unit: Unit, numbers: PoolNumbers | None, k: int) -> NDArray[np.int64]:
        """(Q, k) positions in the pool that the unit's selector chooses for each test query."""
        # No seed changes what these choose, so every set is chosen from another half of the pool.
        half = np.sort(np.random.default_rng(unit.seed).permutation(len(self.pool))[: self._half_size(unit)])
        rows = [self.pool.rows[position] for position in half.tolist()]
        pool = DemoPool(rows, prompt=self.task.prompt, label=self.task.label)
        known = [Known(pool, query) for query in self.questions] if numbers is None else numbers.known(pool, half)
        entry = SELECTORS[unit.selector]
        settings = SelectSettings(seed=unit.seed, own_similarity=True)
        chosen = [select_rows(one, entry, k, settings).indices for one in known]
        return half[np.array(chosen, dtype=np.int64)]

    def reads_pool(self, unit: Unit) -> bool:
        """Whether the unit's selector needs numbers of the whole pool."""
        return not SELECTORS[unit.selector].needs.isdisjoint(("embeddings", "scores"))


def _check_unicode(task: Task, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that no tokenizer reads, before any model runs."""
    for row in rows:
        try:
            task.demo_text(row).encode()
        except UnicodeEncodeError as error:
            raise SparsortError(
                f"row {row.get('id')!r} holds half of a surrogate pair, which is no character. Leave it out, or repair it."
            ) from error
