"""The choice of the best score, its ties, and mean ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drawn_scores import SHAPES, drawn
from hypothesis import given
from hypothesis import strategies as st

from sparsort.curriculum.demos.criteria.ranking import choose, mean_ranks, rank_average
from sparsort.errors import SparsortError


@given(st.lists(st.sampled_from([0.0, 0.5, 0.5 + 1e-14, 2.0, -math.inf]), min_size=1, max_size=8), st.integers(0, 50))
def test_choose_is_an_argmax_that_counts_its_ties(scores: list[float], seed: int) -> None:
    choice = choose(scores, seed=seed)
    rounded = [round(score, 9) if math.isfinite(score) else score for score in scores]
    assert rounded[choice.index] == max(rounded)
    assert choice.tied == choice.drawn == rounded.count(max(rounded))
    assert sorted(choice.ranking.tolist()) == list(range(len(scores)))
    assert [rounded[at] for at in choice.ranking] == sorted(rounded, reverse=True)
    assert choice.ranking[0] == choice.index
    assert (choice.ranking == choose(scores, seed=seed).ranking).all()


def test_ties_are_drawn_evenly_and_not_given_to_the_first() -> None:
    drawn_first = [choose([1.0, 0.0, 1.0, 1.0], seed=seed).index for seed in range(600)]
    counts = [drawn_first.count(at) for at in range(4)]
    assert counts[1] == 0
    assert all(150 < counts[at] < 250 for at in (0, 2, 3))


def test_a_second_score_breaks_ties_before_the_seed() -> None:
    choice = choose([1.0, 1.0, 0.0, 1.0], tiebreak=[0.1, 0.3, 9.0, 0.2])
    assert (choice.index, choice.tied, choice.drawn) == (1, 3, 1)
    assert choice.ranking.tolist() == [1, 3, 0, 2]
    half = {choose([1.0, 1.0, 1.0], tiebreak=[0.5, 0.5, 0.0], seed=seed).index for seed in range(20)}
    assert half == {0, 1}
    assert choose([1.0, 1.0, 1.0], tiebreak=[0.5, 0.5, 0.0]).drawn == 2


def test_the_draw_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    choose([1.0, 1.0])
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_bad_choices() -> None:
    with pytest.raises(SparsortError, match="no candidates"):
        choose([])
    with pytest.raises(SparsortError, match="NaN for candidate 1"):
        choose([1.0, math.nan])
    with pytest.raises(SparsortError, match="tiebreak has 1 numbers for 2"):
        choose([1.0, 1.0], tiebreak=[1.0])


def test_mean_ranks_and_their_average() -> None:
    assert mean_ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == pytest.approx([2.5 / 3, 0.0, 2.5 / 3, 1 / 3])
    assert mean_ranks(np.array([7.0])).tolist() == [0.5]
    up, down = [1.0, 2.0, 30.0], [0.3, 0.2, 0.1]
    assert rank_average([up]) == pytest.approx([0.0, 0.5, 1.0])
    assert rank_average([up, down]) == pytest.approx([0.5, 0.5, 0.5])
    assert rank_average([up, down], weights=[1, -1]) == pytest.approx([0.0, 0.5, 1.0])
    assert rank_average([up, down], weights=[3, 1]) == pytest.approx([0.25, 0.5, 0.75])
    assert rank_average([[-math.inf, 0.0, 1e9]]) == pytest.approx([0.0, 0.5, 1.0])
    assert rank_average([[1.0, 1.0 + 1e-13]]) == pytest.approx([0.5, 0.5])


@given(SHAPES)
def test_rank_average_knows_no_unit(shape: tuple[int, int, int, int]) -> None:
    first, second = drawn(shape[0] + 1, 2, 2, shape[3])[:, :, 0].T
    expected = rank_average([first, second])
    assert rank_average([np.exp(first) * 1e6, second**3]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "weights", "message"),
    [
        ([], None, "no scores"),
        ([[1.0], [1.0, 2.0]], None, r"scores\[1\] has 2 numbers for 1"),
        ([[1.0], [math.nan]], None, r"scores\[1\] is NaN"),
        ([[1.0], [2.0]], [1.0], "weights"),
        ([[1.0], [2.0]], [0.0, 0.0], "not all 0"),
        ([[1.0], [2.0]], [math.inf, 1.0], "finite"),
    ],
)
def test_bad_rank_averages(scores: Any, weights: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        rank_average(scores, weights)
