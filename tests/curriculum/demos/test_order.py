"""Orders: permutations of their input, exact reverses, and each by its own definition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsort.curriculum.demos.order import ORDERS, order_demos, order_indices
from sparsort.curriculum.demos.permutations import random_permutations
from sparsort.errors import SparsortError

KEYS = st.lists(st.floats(-1e6, 1e6, allow_nan=False), max_size=9)
DEMOS = [{"id": name, "question": "?" * size, "answer": "x"} for name, size in [("a", 3), ("b", 1), ("c", 2), ("d", 5)]]


class Table:
    """A table of scores by id."""

    def __init__(self, kind: str, values: dict[str, float]) -> None:
        self.kind = kind
        self.values = values

    def difficulty_of(self, rows: Any) -> NDArray[np.float64]:
        absent = [row["id"] for row in rows if row["id"] not in self.values]
        if absent:
            raise SparsortError(f"no score for {absent}")
        return np.array([self.values[row["id"]] for row in rows])


def indices(order: str, key: Any, **options: Any) -> list[int]:
    return order_indices(order, len(key), difficulty=key, similarity=key, lengths=key, **options).tolist()


def ids(rows: list[dict[str, Any]]) -> str:
    return "".join(row["id"] for row in rows)


@pytest.mark.parametrize("order", ORDERS)
@given(key=KEYS, seed=st.integers(0, 5))
def test_every_order_is_a_permutation_and_reverse_is_its_exact_reverse(order: str, key: list[float], seed: int) -> None:
    forward = indices(order, key, seed=seed)
    assert sorted(forward) == list(range(len(key)))
    assert indices(f"reverse:{order}", key, seed=seed) == forward[::-1]
    assert indices(f"reverse:reverse:{order}", key, seed=seed) == forward


@pytest.mark.parametrize("order", ORDERS)
@given(key=st.lists(st.integers(-50, 50), max_size=9), scale=st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_scale_of_the_key_does_not_matter(order: str, key: list[int], scale: float) -> None:
    assert indices(order, [float(x) for x in key]) == indices(order, [x * scale + 3.0 for x in key])


@given(key=KEYS)
def test_ascending_and_descending_orders(key: list[float]) -> None:
    rising = sorted(range(len(key)), key=lambda place: key[place])
    falling = sorted(range(len(key)), key=lambda place: -key[place])
    for order in (
        "easy_to_hard",
        "dense_to_sparse",
        "similarity_ascending",
        "length_ascending",
        "perplexity_ascending",
    ):
        assert indices(order, key) == rising
    for order in ("hard_to_easy", "sparse_to_dense", "similarity_descending", "length_descending"):
        assert indices(order, key) == falling


@given(key=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_u_shape_falls_then_rises_with_the_hardest_next_to_the_query(key: list[float]) -> None:
    ordered = [key[place] for place in indices("u_shape", key)]
    bottom = ordered.index(min(ordered))
    assert ordered[: bottom + 1] == sorted(ordered[: bottom + 1], reverse=True)
    assert ordered[bottom:] == sorted(ordered[bottom:])
    assert ordered[-1] == max(key)
    assert abs(bottom - (len(key) - 1) / 2) <= 1 or len(set(key)) < len(key)
    hill = [-key[place] for place in indices("inverted_u", key)]
    mirrored = [-x for x in key]
    assert hill == [mirrored[place] for place in indices("u_shape", mirrored)]


def test_u_shape_by_hand() -> None:
    assert indices("u_shape", [1.0, 2.0, 3.0, 4.0, 5.0]) == [3, 1, 0, 2, 4]
    assert indices("inverted_u", [1.0, 2.0, 3.0, 4.0, 5.0]) == [1, 3, 4, 2, 0]


def test_scores_as_table_mapping_and_numbers_agree() -> None:
    values = {"a": 0.3, "b": 0.9, "c": 0.1, "d": 0.5}
    for scores in (Table("sparsity", values), values, list(values.values()), np.array(list(values.values()))):
        assert ids(order_demos(DEMOS, scores)) == "bdac"
        assert ids(order_demos(DEMOS, scores, "dense_to_sparse")) == "cadb"


def test_result_is_a_copy() -> None:
    ordered = order_demos(DEMOS, order="given")
    ordered[0]["id"] = "changed"
    assert DEMOS[0]["id"] == "a"


def test_length_similarity_and_random() -> None:
    assert ids(order_demos(DEMOS, order="length_ascending")) == "bcad"
    assert ids(order_demos(DEMOS, order="length_descending", text=lambda row: row["answer"])) == "abcd"
    assert ids(order_demos(DEMOS, order="similarity_ascending", similarity=[0.4, 0.1, 0.9, 0.2])) == "bdac"
    assert ids(order_demos(DEMOS, order="random", seed=3)) == ids(order_demos(DEMOS, order="random", seed=3))
    assert len({ids(order_demos(DEMOS, order="random", seed=seed)) for seed in range(20)}) > 5


def test_kinds_of_scores_and_orders() -> None:
    losses = Table("answer_loss", {"a": 0.3, "b": 0.9, "c": 0.1, "d": 0.5})
    assert ids(order_demos(DEMOS, losses, "perplexity_ascending")) == "cadb"
    assert ids(order_demos(DEMOS, losses, "hard_to_easy")) == "bdac"
    with pytest.raises(SparsortError, match="hard_to_easy"):
        order_demos(DEMOS, losses, "sparse_to_dense")
    with pytest.raises(SparsortError, match="easy_to_hard"):
        order_demos(DEMOS, losses, "reverse:dense_to_sparse")
    with pytest.raises(SparsortError, match="'sparsity'"):
        order_demos(DEMOS, Table("sparsity", losses.values), "perplexity_ascending")


def test_missing_scores() -> None:
    scores = [0.3, math.nan, 0.1, math.nan]
    with pytest.raises(SparsortError, match=r"'b', 'd'.*missing='drop'"):
        order_demos(DEMOS, scores)
    assert ids(order_demos(DEMOS, scores, missing="first")) == "bdac"
    assert ids(order_demos(DEMOS, scores, missing="last")) == "acbd"
    assert ids(order_demos(DEMOS, scores, "reverse:sparse_to_dense", missing="last")) == "cabd"
    assert ids(order_demos(DEMOS, scores, missing="drop")) == "ac"
    assert ids(order_demos(DEMOS, scores, "given")) == "abcd"
    with pytest.raises(SparsortError, match="Did you mean 'first'"):
        order_demos(DEMOS, scores, missing="frist")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "needs scores="),
        ([1.0, 2.0], r"shape \(2,\).*4 demonstrations"),
        ({"a": 1.0}, "no entry for demonstration 'b'"),
        (["x"] * 4, "one number for each demonstration"),
        (Table("sparsity", {"a": 1.0}), "no score for"),
    ],
)
def test_bad_scores(scores: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        order_demos(DEMOS, scores)


@pytest.mark.parametrize("order", ORDERS)
def test_the_direction_in_the_table_is_that_of_the_order(order: str) -> None:
    entry, key = ORDERS[order], np.array([3.0, 1.0, 5.0, 2.0, 4.0])
    ranked = key[order_indices(order, 5, difficulty=key, similarity=key, lengths=key)]
    steps = ["ascending" if step > 0 else "descending" for step in np.diff(ranked)]
    if entry.direction == "none":
        assert entry.ranks_by == "nothing"
        assert not entry.needs
    else:
        assert ", then ".join(name for name, _ in itertools.groupby(steps)) == entry.direction
        assert len(entry.needs) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_only_a_seeded_order_changes_with_the_seed(order: str) -> None:
    key = np.arange(6.0)
    drawn = {tuple(order_indices(order, 6, difficulty=key, similarity=key, lengths=key, seed=s)) for s in range(20)}
    assert (len(drawn) > 1) == ORDERS[order].is_seeded


def test_unknown_order_suggests_the_nearest() -> None:
    with pytest.raises(SparsortError, match="Did you mean 'sparse_to_dense'"):
        order_demos(DEMOS, [1, 2, 3, 4], "sparse_to_dens")
    with pytest.raises(SparsortError, match="needs similarity="):
        order_demos(DEMOS, order="similarity_ascending")


def test_no_demonstrations() -> None:
    for order in ORDERS:
        assert order_demos([], [], order, similarity=[]) == []


@pytest.mark.parametrize(("n", "count"), [(1, 1), (3, 6), (5, 100), (12, 50), (30, 10), (4, 0)])
def test_random_permutations_are_distinct_and_seeded(n: int, count: int) -> None:
    drawn = random_permutations(n, count, seed=1)
    assert drawn.shape == (count, n)
    assert len({tuple(row) for row in drawn.tolist()}) == count
    assert all(sorted(row) == list(range(n)) for row in drawn.tolist())
    assert (drawn == random_permutations(n, count, seed=1)).all()


def test_more_permutations_than_there_are() -> None:
    with pytest.raises(SparsortError, match="only 6 exist"):
        random_permutations(3, 7)
