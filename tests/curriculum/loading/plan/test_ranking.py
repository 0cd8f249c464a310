import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort import SparsortError
from sparsort.curriculum.loading.plan.ranking import by_id, rank_rows, spread_groups

NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, -0.0, 1.0, 2.0, np.inf, -np.inf, np.nan])
)


def plain(values, ids, unscored="last"):
    """The order by Python's own sort of tuples."""
    place = 1 if unscored == "last" else -1
    return sorted(
        range(len(values)),
        key=lambda row: ((place, 0.0) if np.isnan(values[row]) else (0, float(values[row]) + 0.0), ids[row]),
    )


@given(values=st.lists(NUMBERS, min_size=1, max_size=60), unscored=st.sampled_from(["last", "first"]), data=st.data())
def test_order_is_that_of_a_plain_sort(values, unscored, data):
    for dtype in (np.float64, np.float32):
        with np.errstate(over="ignore"):
            column = np.array(values).astype(dtype)
        ids = data.draw(st.permutations([f"row {number}" for number in range(len(values))]))
        ranked = rank_rows(column, ids=by_id(ids), unscored=unscored)
        assert ranked.tolist() == plain(column, ids, unscored)
        assert rank_rows(column, unscored=unscored).tolist() == plain(column, range(len(values)), unscored)


def test_differences_beyond_float32_count():
    values = 1e8 + np.random.default_rng(0).permutation(5000) / 1000
    assert rank_rows(values).tolist() == np.argsort(values, kind="stable").tolist()


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int8])
def test_whole_numbers_that_floats_cannot_distinguish_are_ordered(dtype):
    top = int(np.iinfo(dtype).max)
    values = np.array([top, int(np.iinfo(dtype).min), top - 2, top - 1, 0], dtype=dtype)
    assert rank_rows(values).tolist() == sorted(range(5), key=lambda row: (int(values[row]), row))


@given(seed=st.integers(0, 10**6), n=st.integers(2, 50))
def test_the_order_of_shards_does_not_matter(seed, n):
    generator = np.random.default_rng(seed)
    values, ids = generator.integers(0, 5, n) / 4, np.array([f"id{number:04d}" for number in range(n)])
    turned = generator.permutation(n)
    straight = ids[rank_rows(values, ids=by_id(ids))].tolist()
    assert ids[turned][rank_rows(values[turned], ids=by_id(ids[turned]))].tolist() == straight


def test_an_id_names_one_row():
    with pytest.raises(SparsortError, match=r"1 ids occur more than once, such as 'b'"):
        by_id(["a", "b", "c", "b"])


@pytest.mark.parametrize("given_", [np.zeros((3, 2)), np.array(["a", "b"])])
def test_a_value_that_is_not_a_column_of_numbers_is_refused(given_):
    with pytest.raises(SparsortError, match="one number per row"):
        rank_rows(given_)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 10**6))
def test_every_prefix_holds_each_group_in_proportion(sizes, seed):
    generator = np.random.default_rng(seed)
    codes = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = generator.permutation(len(codes))
    merged = spread_groups(order, codes, len(sizes))
    for group, size in enumerate(sizes):
        members = order[codes[order] == group].tolist()
        assert merged[codes[merged] == group].tolist() == members  # the order within a group is kept
        held = np.cumsum(codes[merged] == group)
        fair = size * np.arange(1, len(codes) + 1) / len(codes)
        assert np.all(np.abs(held - fair) <= len(sizes) / 2 + 1)
