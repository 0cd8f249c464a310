"""Combined scores against SciPy's ranks and against brute force over pairs of rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import rankdata

from sparsort.curriculum.loading.plan.combine import COMBINATIONS, combine
from sparsort.errors import SparsortError

# Few values, so that ties are common.
VALUES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 2.0, 2.0**60, math.inf])
NUMBERS = VALUES | st.floats(allow_nan=False)
MISSING = VALUES | st.just(math.nan)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[float]]:
    """1 to 4 scores of 1 to 25 rows, one row at least with all of them."""
    count, rows = draw(st.integers(1, 4)), draw(st.integers(1, 25))
    columns = [[draw(VALUES), *draw(st.lists(MISSING, min_size=rows - 1, max_size=rows - 1))] for _ in range(count)]
    return {f"s{number}": column for number, column in enumerate(columns)}


def midranks(values: Any) -> NDArray[np.float64]:
    return np.asarray((rankdata(values) - 0.5) / len(values))


def complete_rows(scores: dict[str, list[float]]) -> tuple[NDArray[np.bool_], list[NDArray[np.float64]]]:
    columns = [np.array(values) for values in scores.values()]
    complete = np.array([not any(math.isnan(column[row]) for column in columns) for row in range(len(columns[0]))])
    return complete, [column[complete] for column in columns]


def by_keys(keys: list[tuple[Any, ...]]) -> list[float]:
    """Mid-rank percentiles of keys, each compared with each."""
    return [(sum(k < key for k in keys) + sum(k == key for k in keys) / 2) / len(keys) for key in keys]


# Percentiles


def percentiles(values: Any) -> NDArray[np.float64]:
    """What one score alone is combined into; combining needs a row that has it."""
    column = np.asarray(values)
    has_one = column.size > 0 and not (column.dtype.kind == "f" and np.isnan(column).all())
    return combine({"only": column}, "rank_average") if has_one else np.full(len(column), np.nan)


@given(st.lists(NUMBERS, min_size=1, max_size=60))
def test_percentiles_are_scipy_ranks(values: list[float]) -> None:
    got = percentiles(values)
    np.testing.assert_allclose(got, midranks(values), rtol=1e-15)
    assert np.all((got > 0) & (got < 1))


@given(st.lists(MISSING, max_size=40))
def test_percentiles_leave_nan_alone(values: list[float]) -> None:
    known = [not math.isnan(value) for value in values]
    got = percentiles(values)
    assert np.isnan(got).tolist() == [not is_known for is_known in known]
    assert got[known].tolist() == (percentiles([v for v in values if not math.isnan(v)]).tolist())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint64", "int64", "bool"])
def test_percentiles_of_any_numbers(dtype: str) -> None:
    values = np.array([1, 0, 1, 0, 1]).astype(dtype)
    assert percentiles(values).tolist() == [0.7, 0.2, 0.7, 0.2, 0.7]
    assert percentiles(values).dtype == np.float64


def test_large_whole_numbers_are_not_rounded_together() -> None:
    assert percentiles(np.array([2**60 + 1, 2**60, 2**60 + 2])).tolist() == pytest.approx([3 / 6, 1 / 6, 5 / 6])


def test_many_rows_with_ties() -> None:
    values = np.random.default_rng(0).integers(0, 50_000, 100_000).astype(np.float32)
    before = values.copy()
    np.testing.assert_allclose(percentiles(values), midranks(values), rtol=1e-14)
    assert np.array_equal(values, before)


# Three ways


@given(tables(), st.data())
def test_rank_average_is_the_weighted_mean_of_percentiles(scores: dict[str, list[float]], data: st.DataObject) -> None:
    weights = data.draw(st.none() | st.fixed_dictionaries({name: st.floats(0.01, 100) for name in scores}))
    complete, columns = complete_rows(scores)
    got = combine(scores, "rank_average", weights=weights)
    in_order = None if weights is None else [weights[name] for name in scores]
    expected = np.average([midranks(column) for column in columns], axis=0, weights=in_order)
    np.testing.assert_allclose(got[complete], expected, rtol=1e-13)
    assert np.isnan(got[~complete]).all()


@given(st.permutations(range(9)), st.permutations(range(9)), st.permutations(["x", "y", "z"]))
def test_rank_average_keeps_ties_whatever_the_order_of_the_scores(x: list[int], y: list[int], names: list[str]) -> None:
    # In floating point (1/9 + 2/9) + 3/9 and (3/9 + 2/9) + 1/9 may differ in the last bit and part a tie.
    scores = dict(zip(names, (x, y, list(range(9))), strict=True))
    got = combine(scores, "rank_average")
    sums = [sum(row) for row in zip(x, y, range(9), strict=True)]
    assert [[a < b for b in got] for a in got] == [[a < b for b in sums] for a in sums]
    assert got.tolist() == combine(dict(sorted(scores.items())), "rank_average").tolist()


@given(tables(), st.none() | st.integers(1, 6))
def test_lexicographic_is_sorting_by_tuples(scores: dict[str, list[float]], levels: int | None) -> None:
    complete, columns = complete_rows(scores)
    keys = list(columns)
    if levels is not None:
        for place, column in enumerate(columns[:-1]):
            # ⌊percentile · levels⌋ from doubled ranks, which are whole.
            keys[place] = np.array([int(2 * rank - 1) * levels // (2 * len(column)) for rank in rankdata(column)])
    got = combine(scores, "lexicographic", levels=levels)
    np.testing.assert_allclose(got[complete], by_keys(list(zip(*keys, strict=True))), rtol=1e-14)
    assert np.isnan(got[~complete]).all()


def test_levels_have_equal_counts() -> None:
    first = np.random.default_rng(1).permutation(60)
    second = np.random.default_rng(2).permutation(60)
    order = np.argsort(combine({"first": first, "second": second}, "lexicographic", levels=4))
    for level in range(4):
        rows = order[level * 15 : (level + 1) * 15]
        assert sorted(first[rows].tolist()) == list(range(level * 15, (level + 1) * 15))
        assert second[rows].tolist() == sorted(second[rows].tolist())


@given(tables())
def test_intersection_is_the_largest_percentile_ranked_again(scores: dict[str, list[float]]) -> None:
    complete, columns = complete_rows(scores)
    largest = np.max([rankdata(column) for column in columns], axis=0)
    got = combine(scores, "intersection")
    np.testing.assert_allclose(got[complete], midranks(largest), rtol=1e-14)
    assert np.isnan(got[~complete]).all()


def test_intersection_lets_in_what_is_easy_by_every_metric_and_the_share_means_the_data() -> None:
    generator = np.random.default_rng(3)
    scores = {"loss": generator.normal(size=200), "length": generator.permutation(200)}
    ranks = np.array([rankdata(values) for values in scores.values()])
    got = combine(scores, "intersection")
    order = np.argsort(got, kind="stable")
    for threshold in range(1, 201):
        inside = np.flatnonzero((ranks <= threshold).all(axis=0))
        assert set(order[: len(inside)]) == set(inside)
    # At the 50th percentile of both about a quarter is in; after ranking again, half is.
    assert np.count_nonzero((ranks <= 100).all(axis=0)) < 70
    assert np.count_nonzero(got <= 0.5) == 100


@given(tables(), st.sampled_from(COMBINATIONS), st.randoms(use_true_random=False))
def test_a_row_has_its_value_at_any_position(scores: dict[str, list[float]], how: Any, random: Any) -> None:
    places = list(range(len(scores["s0"])))
    random.shuffle(places)
    moved = {name: [values[place] for place in places] for name, values in scores.items()}
    np.testing.assert_array_equal(combine(moved, how), combine(scores, how)[places])


@given(tables(), st.sampled_from(COMBINATIONS))
def test_only_the_order_of_a_score_counts(scores: dict[str, list[float]], how: Any) -> None:
    # arctan grows, and keeps VALUES apart.
    bent = {name: np.arctan(np.array(values)) for name, values in scores.items()}
    close = 2.0**60  # arctan rounds 2^60 to that of ∞
    same = {name: [math.inf if value == close else value for value in values] for name, values in scores.items()}
    np.testing.assert_array_equal(combine(bent, how), combine(same, how))


@given(st.lists(MISSING, min_size=1, max_size=30), st.sampled_from(COMBINATIONS))
def test_one_score_alone_is_its_percentiles(values: list[float], how: Any) -> None:
    scores = {"only": [0.0, *values]}
    np.testing.assert_array_equal(combine(scores, how), percentiles(scores["only"]))


@pytest.mark.parametrize("how", COMBINATIONS)
def test_scores_that_are_all_equal_leave_every_row_in_the_middle(how: Any) -> None:
    assert combine({"a": [3.0] * 5, "b": [7] * 5}, how).tolist() == [0.5] * 5
    assert combine({"a": [3.0], "b": [math.inf]}, how).tolist() == [0.5]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": {}}, "no scores"),
        ({"combination": "rank_avg"}, "Did you mean 'rank_average'"),
        ({"scores": {"a": [1, 2], "b": [1]}}, "different numbers of rows (a: 2, b: 1)"),
        ({"scores": {"a": [1, math.nan], "b": [math.nan, 1]}}, "not one of the 2 rows has all the scores"),
        ({"scores": {"a": [math.nan] * 3, "b": [1, 2, 3]}}, "(rows with a number: a: 0, b: 3)"),
        ({"scores": {"a": []}}, "not one of the 0 rows"),
        ({"scores": {"a": [[1.0]]}}, "score 'a' has shape (1, 1)"),
        ({"scores": {"a": 1.0}}, "score 'a' has shape ()"),
        ({"scores": {"a": ["easy"]}}, "expected numbers"),
        ({"scores": {"a": [1.0, None]}}, "expected numbers"),
        ({"weights": {"a": 1}}, "the weights lack b"),
        ({"weights": {"a": 1, "b": 1, "bb": 1}}, "unknown score in the weights 'bb'. Did you mean 'b'"),
        ({"weights": {"a": 0, "b": 1}}, "the weight of a is 0"),
        ({"weights": {"a": 1, "b": -1}}, "the weight of b is -1"),
        ({"weights": {"a": math.nan, "b": 1}}, "the weight of a is nan"),
        ({"weights": {"a": math.inf, "b": 1}}, "the weight of a is inf"),
        ({"weights": {"a": "1", "b": 1}}, "the weight of a is '1'"),
        ({"weights": {"a": 1, "b": 1}, "combination": "intersection"}, "weights were given to 'intersection'"),
        ({"levels": 0, "combination": "lexicographic"}, "levels = 0"),
        ({"levels": 2.5, "combination": "lexicographic"}, "levels = 2.5"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    given_arguments = {"scores": {"a": [1.0, 2.0], "b": [2.0, 1.0]}, "combination": "rank_average", **arguments}
    with pytest.raises(SparsortError) as caught:
        combine(given_arguments.pop("scores"), **given_arguments)
    assert message in str(caught.value)


def test_percentiles_refuse_what_is_no_column_of_numbers() -> None:
    with pytest.raises(SparsortError, match=r"shape \(1, 2\)"):
        percentiles([[1.0, 2.0]])
