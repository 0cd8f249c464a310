"""MDL and ConE by hand: ties, the cheapest neighbours, and the candidate sets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsort.curriculum.demos.criteria import mdl_and_cone as per_query
from sparsort.errors import SparsortError


def test_per_query_ties_go_to_the_first() -> None:
    sure, unsure = [0.0, -50.0], [0.0, 0.0]
    assert per_query.mdl([[unsure, sure, sure], [unsure, unsure, unsure]]).tolist() == [1, 0]
    # The same distribution up to which label is which and a constant: equal up to rounding.
    assert per_query.mdl([[[-0.3, -1.7, -2.0], [-2.1, -0.4, -1.8]]]).tolist() == [0]
    losses = [[2.0, 1.0, 1.0 - 1e-15], [1.0, 1.0, 1.0]]
    assert per_query.first_of_best(per_query.cone_scores(losses)).tolist() == [1, 0]


def test_cone_takes_the_cheapest_neighbours_cheapest_first() -> None:
    nll = [[3.0, 1.0, 2.0, 0.5], [1.0, 1.0, 0.0, 9.0]]
    assert per_query.cone_neighbours(nll, 2).tolist() == [[3, 1], [2, 0]]
    cheapest = per_query.first_of_best(per_query.cone_scores(nll))
    assert per_query.cone_neighbours(nll, 1)[:, 0].tolist() == cheapest.tolist()
    assert per_query.cone_neighbours(nll, 4).tolist() == [[3, 1, 2, 0], [2, 0, 1, 3]]
    for k in (0, 5):
        with pytest.raises(SparsortError, match=f"k is {k}.*1 to 4"):
            per_query.cone_neighbours(nll, k)


def test_bad_losses() -> None:
    with pytest.raises(SparsortError, match="nan for query 1, candidate 0"):
        per_query.cone_scores([[1.0, 2.0], [math.nan, 1.0]])
    with pytest.raises(SparsortError, match="no queries"):
        per_query.cone_scores(np.zeros((0, 3)))
    with pytest.raises(SparsortError, match="no sets"):
        per_query.mdl(np.zeros((2, 0, 3)))


def test_organisations_are_the_nearest_and_draws_of_all_neighbours() -> None:
    near = np.array([[9, 4, 7, 1, 3], [2, 8, 5, 0, 6]])
    sets = per_query.organisations(near, 3, seed=1, count=200)
    assert sets.shape == (2, 200, 3)
    for query in range(2):
        assert sets[query, 0].tolist() == near[query, :3].tolist()
        assert all(len(set(one)) == 3 and set(one) <= set(near[query].tolist()) for one in sets[query].tolist())
        # Every neighbour in every place, each about as often: 199 draws, 40 expected, sd 5.6.
        for place in range(3):
            counts = [int((sets[query, 1:, place] == one).sum()) for one in near[query]]
            assert min(counts) > 17
            assert max(counts) < 63
    np.testing.assert_array_equal(sets, per_query.organisations(near, 3, seed=1, count=200))
    assert (sets[:, 1:] != per_query.organisations(near, 3, seed=2, count=200)[:, 1:]).any()
    with pytest.raises(SparsortError, match="k is 6, but there are 5 neighbours"):
        per_query.organisations(near, 6, seed=0)
