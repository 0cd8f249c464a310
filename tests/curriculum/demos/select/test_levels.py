"""Selection by level: the paper's rule on worked examples, and bins that cover the pool."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort.curriculum.demos.select import selectors as levels
from sparsort.errors import SparsortError

# Ten rows in five levels of two; the nearer to the query the higher the number in SIMILARITY.
DIFFICULTY = np.array([0.0, 0.1, 1.0, 1.1, 2.0, 2.1, 3.0, 3.1, 4.0, 4.1])
SIMILARITY = np.array([0.1, 0.9, 0.3, 0.8, 0.2, 0.7, 0.5, 0.4, 0.6, 0.05])


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (-5.0, [1, 3]),  # level 1, low: the nearest of level 1, then the nearest of level 2
        (1.05, [3, 2]),  # level 2, middle: the two of level 2, nearest first
        (2.05, [5, 4]),  # level 3, middle
        (3.05, [5, 6]),  # level 4, high: the nearest of level 3, then the nearest of level 4
        (99.0, [6, 8]),  # level 5, high: the nearest of level 4, then of level 5
    ],
)
def test_the_paper_s_rule_by_hand(query: float, expected: list[int]) -> None:
    assert levels.difficulty_matched(DIFFICULTY, query, SIMILARITY, 2).tolist() == expected


def test_places_without_a_row_of_their_level_take_the_nearest_left_over() -> None:
    # Only the four nearest are looked at: 1 (level 1), 3 (level 2), 5 (level 3), 8 (level 5); the query is of level 4.
    assert levels.difficulty_matched(DIFFICULTY, 3.05, SIMILARITY, 2, fetch=4).tolist() == [5, 1]
    assert levels.difficulty_matched(DIFFICULTY, 3.05, SIMILARITY, 4, fetch=4).tolist() == [5, 1, 3, 8]


@pytest.mark.parametrize(
    ("level", "k", "expected"),
    [
        (1, 2, [1, 2]),
        (2, 2, [2, 2]),
        (3, 2, [3, 3]),
        (4, 2, [3, 4]),
        (5, 2, [4, 5]),
        (1, 5, [1, 1, 1, 2, 2]),
        (5, 5, [4, 4, 5, 5, 5]),
        (5, 1, [5]),
        (1, 1, [1]),
    ],
)
def test_wanted_levels(level: int, k: int, expected: list[int]) -> None:
    assert levels.wanted_levels(level, 5, k) == expected


@given(st.integers(1, 9), st.integers(0, 9), st.data())
def test_wanted_levels_exist_and_rise(n_levels: int, k: int, data: st.DataObject) -> None:
    wanted = levels.wanted_levels(data.draw(st.integers(1, n_levels)), n_levels, k)
    assert len(wanted) == k
    assert wanted == sorted(wanted)
    assert all(1 <= level <= n_levels for level in wanted)


@given(st.lists(st.integers(-1000, 1000), min_size=5, max_size=60, unique=True))
def test_levels_are_equal_and_a_pool_row_finds_its_own(values: list[int]) -> None:
    difficulty = np.array(values, dtype=np.float64)
    edges = levels.level_edges(difficulty, 5)
    sizes = np.bincount(levels.levels_of(difficulty, edges), minlength=6)[1:]
    assert sizes.sum() == len(values)
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(levels.levels_of(np.sort(difficulty), edges)) >= 0).all()


def test_too_few_rows_for_the_levels() -> None:
    with pytest.raises(SparsortError, match="3 scored demonstrations cannot be divided into 5"):
        levels.level_edges(np.arange(3.0), 5)


def test_spread_takes_one_of_each_bin_easy_to_hard() -> None:
    assert levels.spread(DIFFICULTY, 5, similarity_N=SIMILARITY).tolist() == [1, 3, 5, 6, 8]
    drawn = levels.spread(DIFFICULTY, 5, seed=1)
    assert (drawn // 2).tolist() == [0, 1, 2, 3, 4]
    assert drawn.tolist() == levels.spread(DIFFICULTY, 5, seed=1).tolist()
    assert len({tuple(levels.spread(DIFFICULTY, 5, seed=seed)) for seed in range(20)}) > 5
