"""Selection by difficulty level: a spread over all levels, or the query's own level and its neighbours.

Contract: the functions of the table take `Candidates`, the others are pure functions of arrays. Difficulty is a number and
rises from easy (dense) to hard (sparse). `spread` gives positions easy to hard; `difficulty_matched` gives its lower level
first, except in places that it had to fill with rows of whatever level was left. Levels are looked up by difficulty itself,
never by a raw metric, so a metric in which high means easy cannot turn the look-up round.
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
    """The lowest difficulty of levels 2 to `levels` when N rows are cut into equal levels, (levels − 1,).

    Raises:
        SparsortError: fewer rows than levels.
    """
    count = len(difficulty_N)
    if levels < 1 or count < levels:
        raise SparsortError(
            f"{count} scored demonstrations cannot be cut into {levels} levels. Ask for fewer with n_levels=."
        )
    parts = np.array_split(np.sort(difficulty_N), levels)
    return np.array([part[0] for part in parts[1:]], dtype=np.float64)


def levels_of(difficulty: NDArray[np.float64] | float, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """The level of each difficulty, 1 (easiest) to len(edges) + 1. Equal difficulties share a level, the higher one."""
    return np.asarray(np.searchsorted(edges, difficulty, side="right") + 1, dtype=np.int64)


def spread(
    difficulty_N: NDArray[np.float64], k: int, *, similarity_N: Floats | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """One row from each of k equal difficulty bins, easy to hard (CDS, arXiv 2411.18126).

    Args:
        difficulty_N: difficulty of the pool.
        k: how many, at most N.
        similarity_N: similarity to the query; with it each bin gives its nearest row, without it a seeded random one.
        seed: of the random choice.
    """
    generator = np.random.default_rng(seed)
    bins = np.array_split(np.argsort(difficulty_N, kind="stable"), k)
    if similarity_N is None:
        return np.array([generator.choice(members) for members in bins], dtype=np.int64)
    # Sorted members keep ties in the pool's order.
    return np.array([np.sort(m)[nearest(similarity_N[np.sort(m)], 1)[0]] for m in bins], dtype=np.int64)


def wanted_levels(level: int, levels: int, k: int) -> list[int]:
    """The levels that k demonstrations should have for a query of a level, in the order of the prompt.

    For k = 2 (arXiv 2603.03415): the lowest third of the levels (level ≤ levels // 3) wants (same, one higher), the
    middle third (same, same), the highest (one lower, same). For other k, ceil(k / 2) are of the query's own level and
    floor(k / 2) of the other one. A level beyond either end is the query's own.
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
    """The selection rule of "Farther the Shift, Sparser the Representation" (arXiv 2603.03415) for one query.

    The pool is cut into equal levels by difficulty and the query gets the level of its own. Of the `fetch` rows nearest
    to the query, each place of `wanted_levels` takes the nearest of its level; places left empty take the nearest rows
    left over, whatever their level.

    Args:
        difficulty_N: difficulty of the pool.
        query_difficulty: difficulty of the query by the same score.
        similarity_N: similarity of the pool to the query.
        k: how many, at most N.
        levels: how many levels; 5 in the paper.
        fetch: how many neighbours to look at; 20 in the paper, at least k.

    Raises:
        SparsortError: fewer rows than levels.
    """
    edges = level_edges(difficulty_N, levels)
    query_level = int(levels_of(query_difficulty, edges))
    near = nearest(similarity_N, max(fetch, k)).tolist()
    level_of_near: dict[int, Any] = dict(zip(near, levels_of(difficulty_N[near], edges).tolist(), strict=True))
    places: list[int | None] = []
    for wanted in wanted_levels(query_level, levels, k):
        found = next((row for row in near if level_of_near[row] == wanted and row not in places), None)
        places.append(found)
    left_over = iter([row for row in near if row not in places])
    return np.array([next(left_over) if place is None else place for place in places], dtype=np.int64)
