import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort.curriculum.loading import sequences
from sparsort.curriculum.loading.pacing import Pacing
from sparsort.curriculum.loading.shuffling import key_of


def edges_of(n, stages):
    return np.array([s * n // stages for s in range(stages + 1)])


def order_of(n, seed=0):
    return np.random.default_rng(seed).permutation(n).astype(np.uint32)


@given(n=st.integers(1, 300), stages=st.integers(1, 12), seed=st.integers(0, 1000))
def test_a_stage_holds_its_own_rows_and_is_shuffled(n, stages, seed):
    stages = min(stages, n)
    order, edges = order_of(n, seed), edges_of(n, stages)
    sequence = sequences.staged(order, edges, lambda s: key_of(seed, s))
    for first, last in itertools.pairwise(edges):
        assert set(sequence[first:last].tolist()) == set(order[first:last].tolist())
    assert len(sequence) == n


def paced_plainly(n, edges, limits, chosen_of):
    """Draw one row after the other from a list, as one would by hand; ranks stand for rows."""
    seen, drawn = set(), []
    for s, limit in enumerate(limits):
        for _ in range(int(edges[s + 1] - edges[s])):
            rank = chosen_of([rank for rank in range(limit) if rank not in seen])
            seen.add(rank)
            drawn.append(rank)
    return drawn


@given(
    n=st.integers(1, 200),
    stages=st.integers(1, 20),
    kind=st.sampled_from(["linear", "root", "step", "exponential", "geometric", "competence"]),
    start=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
)
def test_paced_is_a_permutation_that_keeps_its_bounds(n, stages, kind, start, seed):
    stages = min(stages, n)
    edges, order = edges_of(n, stages), np.arange(n, dtype=np.uint32)
    limits = sequences.available(Pacing(kind=kind, start=start, until=0.6).share(edges[:-1], n), edges)
    sequence = sequences.paced(order, edges, limits, lambda s: key_of(seed, s)).tolist()
    assert sorted(sequence) == list(range(n))
    for s, limit in enumerate(limits):
        assert all(rank < limit for rank in sequence[edges[s] : edges[s + 1]])
        assert limit >= edges[s + 1]


def test_paced_draws_all_that_is_unseen_alike():
    """The share of draws in which each rank comes in each stage is that of drawing from a list by hand."""
    n, edges, limits = 12, np.array([0, 4, 8, 12]), np.array([6, 9, 12])
    trials = 6000
    ours, plain = np.zeros((3, n)), np.zeros((3, n))
    generator = np.random.default_rng(0)
    for trial in range(trials):
        sequence = sequences.paced(np.arange(n, dtype=np.uint32), edges, limits, lambda s, t=trial: key_of(t, s))
        by_hand = paced_plainly(n, edges, limits, generator.choice)
        for s in range(3):
            ours[s, sequence[edges[s] : edges[s + 1]]] += 1 / trials
            plain[s, by_hand[edges[s] : edges[s + 1]]] += 1 / trials
    assert np.abs(ours - plain).max() < 0.04  # 4 standard errors of a difference of two shares


@given(n=st.integers(1, 100), folds=st.integers(1, 10))
def test_folds_are_strided_slices_one_after_the_other(n, folds):
    order = order_of(n).tolist()
    wanted = [row for k in range(folds) for row in order[k::folds]]
    assert sequences.folded(np.array(order), folds).tolist() == wanted


@given(n=st.integers(1, 100), folds=st.integers(1, 10))
def test_interleaved_takes_one_of_each_level_in_turn(n, folds):
    folds = min(n, folds)
    order = list(range(n))
    levels = [order[level * n // folds : (level + 1) * n // folds] for level in range(folds)]
    wanted = [level[turn] for turn in range(n) for level in levels if turn < len(level)]
    assert sequences.interleaved(np.array(order), folds).tolist() == wanted


@given(n=st.integers(2, 100), seed=st.integers(0, 100))
def test_a_warm_up_keeps_its_beginning_and_shuffles_the_unseen(n, seed):
    order, until = order_of(n, seed), n // 3
    sequence = sequences.warmed_up(order, until, key_of(seed)).tolist()
    assert sequence[:until] == order[:until].tolist()
    assert sorted(sequence[until:]) == sorted(order[until:].tolist())
    if n > 60:
        assert sequence[until:] != order[until:].tolist()


@pytest.mark.parametrize(("n", "size"), [(400, 8), (403, 8), (5, 8), (1, 1)])
def test_batches_of_like_lengths_waste_less_and_lose_nothing(n, size):
    generator = np.random.default_rng(1)
    lengths, rows = generator.integers(1, 500, n), generator.permutation(n)
    k = -(-n // size)
    edges = np.arange(k + 1) * n // k
    grouped = sequences.like_lengths(rows, lengths, edges, 5)
    assert sorted(grouped.tolist()) == sorted(rows.tolist())

    def padded(sequence):
        return sum(lengths[sequence[a:b]].max() * (b - a) for a, b in itertools.pairwise(edges))

    if n >= 400:
        assert padded(grouped) < 1.1 * lengths.sum() < padded(rows)
        means = [lengths[grouped[a:b]].mean() for a, b in itertools.pairwise(edges)]
        assert abs(np.corrcoef(means, np.arange(k))[0, 1]) < 0.4  # the batches themselves are shuffled
