import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort import SparsortError
from sparsort.curriculum.loading.plan import batches
from sparsort.curriculum.loading.plan.shuffling import key_of

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=120)


@given(n=st.integers(1, 10_000), size=st.integers(1, 300))
def test_batches_by_count_differ_by_at_most_one(n, size):
    sizes = np.diff(batches.by_count(n, size))
    assert sizes.sum() == n
    assert len(sizes) == -(-n // size)
    assert sizes.max() <= size
    assert sizes.max() - sizes.min() <= 1


@given(lengths=LENGTHS, spare=st.integers(0, 200))
def test_batches_by_tokens_are_those_of_a_plain_loop(lengths, spare):
    budget = max(lengths) + spare
    edges, held = [0], []
    for place, length in enumerate(lengths):
        if max([*held, length]) * (len(held) + 1) > budget:
            edges.append(place)
            held = []
        held.append(length)
    assert batches.by_tokens(np.array(lengths), budget).tolist() == [*edges, len(lengths)]


@given(lengths=LENGTHS, spare=st.integers(0, 200))
def test_next_fit_is_that_of_a_plain_loop(lengths, spare):
    capacity = max(lengths) + spare
    edges, held = [0], 0
    for place, length in enumerate(lengths):
        if held + length > capacity:
            edges.append(place)
            held = 0
        held += length
    assert batches.next_fit(np.array(lengths), capacity).tolist() == [*edges, len(lengths)]


@given(lengths=LENGTHS, spare=st.integers(0, 200))
def test_best_fit_fills_no_worse_than_next_fit_and_keeps_the_order_of_bins(lengths, spare):
    capacity = max(lengths) + spare
    places, edges = batches.best_fit(np.array(lengths), capacity)
    assert sorted(places.tolist()) == list(range(len(lengths)))
    bins = [places[a:b].tolist() for a, b in itertools.pairwise(edges)]
    assert all(sum(lengths[place] for place in held) <= capacity for held in bins)
    assert all(held == sorted(held) for held in bins)
    firsts = [held[0] for held in bins]
    assert firsts == sorted(firsts)
    # No two bins could be one: what best fit promises.
    filled = sorted(sum(lengths[place] for place in held) for held in bins)
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


def test_best_fit_leaves_little_room_at_real_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 4000).astype(int), 1, 2048)
    _, best = batches.best_fit(lengths, 2048)
    plain = batches.next_fit(lengths, 2048)
    assert lengths.sum() / (2048 * (len(best) - 1)) > 0.97 > lengths.sum() / (2048 * (len(plain) - 1))


def test_a_long_example_is_cut_and_counted_or_named():
    lengths = np.array([5, 90, 7, 300])
    kept, cut = batches.cut_lengths(lengths, 64, 64, "a batch")
    assert (kept.tolist(), cut) == ([5, 64, 7, 64], 2)
    with pytest.raises(
        SparsortError, match=r"2 examples are longer than a batch of 64 tokens: row 1 \(90 tokens\), row 3"
    ):
        batches.cut_lengths(lengths, None, 64, "a batch")


@pytest.mark.parametrize("lengths", [np.array([3, 0, 2]), np.array([1.5, 2.0])])
def test_lengths_are_counts(lengths):
    with pytest.raises(SparsortError, match="whole numbers of tokens"):
        batches.cut_lengths(lengths, None, None, "a batch")


@given(n=st.integers(1, 3000), size=st.integers(1, 40), held=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_a_draw_is_distinct_and_within_its_bound(n, size, held, key):
    size, held = min(size, n), min(max(held, min(size, n)), n)
    order = np.random.default_rng(0).permutation(n)
    drawn = batches.draw(order, held, size, key).tolist()
    assert len(set(drawn)) == size
    assert set(drawn) <= set(order[:held].tolist())


def test_draws_are_uniform_over_what_is_available():
    counts = np.zeros(50)
    for number in range(4000):
        counts[batches.draw(np.arange(80), 50, 5, key_of(number))] += 1
    assert np.abs(counts / 4000 - 0.1).max() < 0.02


@given(lengths=LENGTHS, spare=st.integers(0, 300), held=st.integers(1, 120), key=st.integers(0, 2**63))
def test_a_draw_by_tokens_is_full_and_within_budget(lengths, spare, held, key):
    lengths = np.array(lengths)
    budget, held = int(lengths.max()) + spare, min(held, len(lengths))
    order = np.argsort(lengths, kind="stable")
    rows = batches.draw_tokens(order, held, budget, lengths, key)
    assert len(set(rows.tolist())) == len(rows) >= 1
    assert set(rows.tolist()) <= set(order[:held].tolist())
    assert lengths[rows].max() * len(rows) <= budget


def test_quotas_hold_in_every_batch_and_exactly_on_average():
    sizes, shares = [70, 20, 10], np.array([0.5, 0.33, 0.17])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    grouped = np.arange(100)
    counts = []
    for number in range(3000):
        rows = batches.draw_quotas(grouped, starts, shares, 40, 16, key_of(number))
        assert len(set(rows.tolist())) == 16
        for group, (first, last) in enumerate(itertools.pairwise(starts.tolist())):
            mine = rows[(rows >= first) & (rows < last)]
            # the easiest 40 % of each group, or as many as its quota needs
            assert np.all(mine < first + max(-(-40 * sizes[group] // 100), len(mine)))
        counts.append([np.count_nonzero((rows >= a) & (rows < b)) for a, b in itertools.pairwise(starts.tolist())])
    assert np.abs(np.array(counts) - 16 * shares).max() < 1
    assert np.abs(np.mean(counts, axis=0) - 16 * shares).max() < 0.03
