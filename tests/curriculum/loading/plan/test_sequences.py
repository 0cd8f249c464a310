import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsort.curriculum.loading.plan import sequences
from sparsort.curriculum.loading.plan.pacing import Pacing
from sparsort.curriculum.loading.plan.shuffling import key_of


def edges_of(n, stages):
    return np.array([s * n // stages for s in range(stages + 1)])


def whole(function, n, *arguments):
    """All places at once, after checking that a part of them alone gives the same."""
    places = np.arange(n)
    ranks = function(places, *arguments)
    part = np.random.default_rng(n).permutation(n)[: n // 2 + 1]
    assert function(part, *arguments).tolist() == ranks[part].tolist()
    return ranks.tolist()


@given(n=st.integers(1, 300), stages=st.integers(1, 12), seed=st.integers(0, 1000))
def test_a_stage_holds_its_own_ranks_and_is_shuffled(n, stages, seed):
    edges = edges_of(n, min(stages, n))
    sequence = whole(sequences.staged, n, edges, edges[1:], lambda s: key_of(seed, s))
    for first, last in itertools.pairwise(edges):
        assert sorted(sequence[first:last]) == list(range(first, last))
    if n / len(edges) > 20:
        assert sequence != list(range(n))


def drawn_by_hand(edges, limits, chosen_of):
    """Draw one after the other from a list of what is unseen."""
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
def test_a_pacing_gives_a_permutation_that_keeps_its_bounds(n, stages, kind, start, seed):
    edges = edges_of(n, min(stages, n))
    limits = sequences.available(Pacing(kind=kind, start=start, until=0.6).share(edges[:-1], n), edges)
    sequence = whole(sequences.staged, n, edges, limits, lambda s: key_of(seed, s))
    assert sorted(sequence) == list(range(n))
    for s, limit in enumerate(limits):
        assert all(rank < limit for rank in sequence[edges[s] : edges[s + 1]])
        assert limit >= edges[s + 1]


def test_a_pacing_draws_all_that_is_unseen_alike():
    """How often each rank comes in each stage, and with which other, is as when drawing from a list by hand."""
    n, edges, limits = 12, np.array([0, 4, 8, 12]), np.array([6, 9, 12])
    trials = 6000
    ours, plain = np.zeros((3, n)), np.zeros((3, n))
    together = np.zeros(2)
    generator = np.random.default_rng(0)
    for trial in range(trials):
        sequence = sequences.staged(np.arange(n), edges, limits, lambda s, t=trial: key_of(t, s))
        by_hand = np.array(drawn_by_hand(edges, limits, generator.choice))
        for s in range(3):
            ours[s, sequence[edges[s] : edges[s + 1]]] += 1 / trials
            plain[s, by_hand[edges[s] : edges[s + 1]]] += 1 / trials
        for which, drawn in enumerate((sequence, by_hand)):
            together[which] += {3, 5} <= set(drawn[4:8].tolist())
    assert np.abs(ours - plain).max() < 0.04  # 4 standard errors of a difference of two shares
    assert abs(together[0] - together[1]) / trials < 0.04


@given(n=st.integers(1, 100), folds=st.integers(1, 10))
def test_folds_are_strided_slices_one_after_the_other(n, folds):
    order = list(range(n))
    assert whole(sequences.folded, n, n, folds) == [row for k in range(folds) for row in order[k::folds]]


@given(n=st.integers(1, 100), folds=st.integers(1, 10))
def test_interleaved_takes_one_of_each_level_in_turn(n, folds):
    folds = min(n, folds)
    order = list(range(n))
    levels = [order[level * n // folds : (level + 1) * n // folds] for level in range(folds)]
    wanted = [level[turn] for turn in range(n) for level in levels if turn < len(level)]
    assert whole(sequences.interleaved, n, n, folds) == wanted


@given(n=st.integers(2, 100), seed=st.integers(0, 100))
def test_a_warm_up_keeps_its_beginning_and_shuffles_the_unseen(n, seed):
    until = n // 3
    sequence = whole(sequences.warmed_up, n, n, until, key_of(seed))
    assert sequence[:until] == list(range(until))
    assert sorted(sequence[until:]) == list(range(until, n))
    if n > 60:
        assert sequence[until:] != list(range(until, n))


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
