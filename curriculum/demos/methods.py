"""The selection methods by name: each takes the rows that may be chosen and gives places among them.

Contract: `select.select_demos` has checked that a method's inputs are there, so a method does not ask again. An input
that was not given is empty, or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos import diversity, levels, similarity
from sparsort.curriculum.demos.choices import balanced, by_id
from sparsort.curriculum.demos.pool import DemoPool
from sparsort.values import text_if_any

Places = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One selection.

    Attributes:
        pool: all rows.
        rows: (M,) positions in the pool of the rows that may be chosen, ascending.
        excluded: the other positions, with reasons.
        k: how many to choose, 1 to M.
        seed: of what a method draws.
        ids: the ids asked for.
        label: the label's field.
        near: (M,) similarity to the query.
        unit: (M, D) unit embeddings.
        difficulty: (M,) difficulty.
        query_difficulty: the query's.
        trade_off, fetch, levels, neighbours: as in `select_demos`.
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
    levels: int
    neighbours: int

    def nearest(self, fetch: int) -> Places:
        """The rows among which a method looks: the caller's number or the method's own, never less than k."""
        return similarity.nearest(self.near, max(self.fetch or fetch, self.k))


def _random(task: Task) -> Places:
    return np.random.default_rng(task.seed).permutation(len(task.rows))[: task.k].astype(np.int64)


def _first(task: Task) -> Places:
    return np.arange(task.k, dtype=np.int64)


def _ids(task: Task) -> Places:
    return np.searchsorted(task.rows, by_id(task.pool.ids, task.ids, task.excluded)).astype(np.int64)


def _balanced(task: Task) -> Places:
    rows = enumerate(task.pool.rows)
    values = [text_if_any(row, task.label, where=task.pool.name(position)) for position, row in rows]
    return balanced(values, task.rows, task.k, field=task.label, seed=task.seed)


def _nearest(task: Task) -> Places:
    return similarity.nearest(task.near, task.k)


def _mmr(task: Task) -> Places:
    top = task.nearest(20)
    return top[diversity.mmr(task.near[top], task.unit[top], task.k, trade_off=task.trade_off)]


def _kdpp(task: Task) -> Places:
    top = task.nearest(100)
    return top[diversity.dpp_map(diversity.dpp_kernel(task.near[top], task.unit[top]), task.k)]


def _vote_k(task: Task) -> Places:
    def graph() -> Places:
        return diversity.neighbour_graph(task.unit, task.neighbours)

    # Rows that are left out change with the query; the graph of all rows does not.
    whole = len(task.rows) == len(task.pool)
    return diversity.vote_k_of(task.pool.kept("graph", task.unit, graph, task.neighbours) if whole else graph(), task.k)


def _spread(task: Task) -> Places:
    return levels.spread(task.difficulty, task.k, similarity_N=task.near if task.near.size else None, seed=task.seed)


def _difficulty_matched(task: Task) -> Places:
    return levels.difficulty_matched(
        task.difficulty, task.query_difficulty, task.near, task.k, levels=task.levels, fetch=task.fetch or 20
    )


CHOOSE: dict[str, Callable[[Task], Places]] = {
    "random": _random,
    "ids": _ids,
    "first": _first,
    "balanced": _balanced,
    "bm25": _nearest,
    "knn": _nearest,
    "mmr": _mmr,
    "kdpp": _kdpp,
    "vote_k": _vote_k,
    "spread": _spread,
    "difficulty_matched": _difficulty_matched,
}
