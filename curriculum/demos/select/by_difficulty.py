"""Selection by difficulty level: one row of each level, or rows of the query's own level and the next one.

Contract: the functions of the table take `Candidates`; the others are pure functions of arrays. Difficulty is a number that rises
from easy (dense) to hard (sparse). `spread` returns positions from easy to hard. `difficulty_matched` returns the lower level
first, except where no row of a level remained and a row of another level took its place. Levels are looked up by difficulty, and
not by a raw metric, of which a high value could mean easy.

Shapes: N rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.pool.similarity import Floats, nearest
from sparsort.curriculum.demos.select.candidates import Candidates, Places
from sparsort.errors import SparsortError


def select_spread(candidates: Candidates) -> Places:
    """One row for each of k difficulty bins."""
    # Embeddings are optional for this selector, and `near` is empty without them.
    near = candidates.near if candidates.near.size else None
    return spread(candidates.difficulty, candidates.k, similarity_N=near, seed=candidates.settings.seed)


def select_difficulty_matched(candidates: Candidates) -> Places:
    """Rows near the query and of its own difficulty level or the next."""
    return difficulty_matched(
        candidates.difficulty,
        candidates.known.query_difficulty,
        candidates.near,
        candidates.k,
        levels=candidates.settings.n_levels,
        fetch=candidates.settings.fetch or 20,
    )


def level_edges(difficulty_N: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """The lowest difficulty of each level but the first, (levels − 1,), if N rows are divided into levels of equal size.

    Raises:
        SparsortError: fewer rows than levels.
    """
    count = len(difficulty_N)
    if levels < 1 or count < levels:
        raise SparsortError(
            f"{count} scored demonstrations cannot be divided into {levels} levels. Ask for fewer with n_levels=."
        )
    # The sizes of the levels differ by at most one row; the larger ones come first.
    parts = np.array_split(np.sort(difficulty_N), levels)
    return np.array([part[0] for part in parts[1:]], dtype=np.float64)


def levels_of(difficulty: NDArray[np.float64] | float, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """The level of each difficulty, from 1 (easiest) to len(edges) + 1. Equal difficulties have the same level."""
    # side="right" puts a difficulty that equals an edge into the higher level.
    return np.asarray(np.searchsorted(edges, difficulty, side="right") + 1, dtype=np.int64)


def spread(
    difficulty_N: NDArray[np.float64], k: int, *, similarity_N: Floats | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """One row from each of k equal difficulty bins, easy to hard (CDS, arXiv 2411.18126).

    Args:
        difficulty_N: difficulty of the pool.
        k: number of rows, at most N.
        similarity_N: similarity to the query. With it, each bin gives its nearest row; without it, a random one.
        seed: seed of the random choice.
    """
    generator = np.random.default_rng(seed)
    # Bins of equal size, not of equal width: a single outlier does not get a bin of its own.
    bins = np.array_split(np.argsort(difficulty_N, kind="stable"), k)
    if similarity_N is None:
        return np.array([generator.choice(members) for members in bins], dtype=np.int64)
    # The members of a bin are in the order of their difficulty. Sorting them gives ties of similarity to the earlier row.
    bins = [np.sort(members) for members in bins]
    return np.array([members[nearest(similarity_N[members], 1)[0]] for members in bins], dtype=np.int64)


def wanted_levels(level: int, levels: int, k: int) -> list[int]:
    """The levels that k demonstrations should have for a query of this level, in the order of the prompt.

    For k = 2 (arXiv 2603.03415): if the query's level is in the lowest third (level ≤ levels // 3), the same level and the next
    higher one; in the middle third, the same level twice; in the highest third, the next lower level and the same. For other k,
    ceil(k / 2) demonstrations have the query's own level and floor(k / 2) the other one. If there is no such other level, all
    have the query's own.
    """
    other = k // 2
    same = [level] * (k - other)
    if level <= levels // 3:
        return same + [min(level + 1, levels)] * other
    if level <= 2 * levels // 3:
        return [level] * k
    return [max(level - 1, 1)] * other + same


def difficulty_matched(
    difficulty_N: NDArray[np.float64],
    query_difficulty: float,
    similarity_N: Floats,
    k: int,
    *,
    levels: int = 5,
    fetch: int = 20,
) -> NDArray[np.int64]:
    """The selection rule of "Farther the Shift, Sparser the Representation" (arXiv 2603.03415) for one query, (k,).

    The pool is divided into levels of equal size by difficulty, and the query gets the level of its own difficulty. Among the
    `fetch` rows nearest to the query, each of the `wanted_levels` takes its nearest row. If a level has no row left, the nearest
    of the remaining rows takes its place.

    Args:
        difficulty_N: difficulty of the pool.
        query_difficulty: difficulty of the query by the same score.
        similarity_N: similarity of the pool to the query.
        k: number of rows, at most N.
        levels: number of levels; 5 in the paper.
        fetch: number of neighbours to choose from, at least k; 20 in the paper.

    Raises:
        SparsortError: fewer rows than levels.
    """
    edges = level_edges(difficulty_N, levels)
    query_level = int(levels_of(query_difficulty, edges))
    near = nearest(similarity_N, max(fetch, k)).tolist()
    level_of_near: dict[int, Any] = dict(zip(near, levels_of(difficulty_N[near], edges).tolist(), strict=True))
    chosen: list[int | None] = []
    for wanted in wanted_levels(query_level, levels, k):
        chosen.append(next((row for row in near if level_of_near[row] == wanted and row not in chosen), None))
    # Only now, so that a substitute never takes a row that a later level wants.
    remaining = iter([row for row in near if row not in chosen])
    return np.array([next(remaining) if row is None else row for row in chosen], dtype=np.int64)
