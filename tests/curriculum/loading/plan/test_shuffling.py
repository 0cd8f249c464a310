import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sparsort.curriculum.loading.plan.shuffling import SORTED_UP_TO, key_of, permutation, permute, uniform


@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_every_item_occurs_once(n, key):
    assert sorted(permutation(n, key).tolist()) == list(range(n))


@given(n=st.integers(1, 200_000), key=st.integers(0, 2**64 - 1), data=st.data())
def test_a_part_equals_that_of_the_whole_permutation(n, key, data):
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    alone = [int(permute(place, n, key)) for place in places]
    assert alone == permute(np.array(places), n, key).tolist()
    assert all(0 <= image < n for image in alone)


@pytest.mark.parametrize(
    ("n", "key", "images"),
    [(10, 1, [9, 0, 5, 4]), (2000, 1, [1930, 599, 299, 1074]), (10**8, 7, [52303509, 56363659, 39643610, 74539427])],
)
def test_it_never_changes(n, key, images):
    """A resume on another machine, or after an upgrade, depends on these very numbers."""
    assert permute(np.arange(4), n, key).tolist() == images
    assert key_of(0, "stage", 3) == 10211059161386794863


# Small n is sorted by hashes, large n goes through the network: both must be fair.
@pytest.mark.parametrize("n", [6, SORTED_UP_TO, SORTED_UP_TO + 1, 1500, 10**7])
def test_places_pairs_and_distances_are_uniform(n):
    images = np.array([permute(np.arange(min(n, 3)), n, key_of("fair", key)) for key in range(6000)])
    cells = min(n, 24)
    for column in range(images.shape[1]):
        assert chisquare(np.bincount(images[:, column] * cells // n, minlength=cells)).pvalue > 1e-4
    apart = (images[:, 1] - images[:, 0]) % n
    if n > 100:
        assert chisquare(np.bincount(apart * 24 // n, minlength=24)).pvalue > 1e-4
        pairs = (images[:, 0] * 8 // n) * 8 + images[:, 2] * 8 // n
        assert chisquare(np.bincount(pairs, minlength=64)).pvalue > 1e-4
    else:
        assert chisquare(np.bincount(apart, minlength=n)[1:]).pvalue > 1e-4


def test_all_orders_of_few_items_are_equally_likely():
    orders = [tuple(permutation(4, key_of("few", key)).tolist()) for key in range(4800)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-4


def test_neighbouring_keys_are_unlike():
    first, second = permutation(5000, 10), permutation(5000, 11)
    assert np.mean(first == second) < 0.005
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06


def test_uniform_is_in_range_and_spread():
    drawn = [uniform(key_of("u", number)) for number in range(4000)]
    assert min(drawn) >= 0
    assert max(drawn) < 1
    assert chisquare(np.histogram(drawn, bins=20, range=(0, 1))[0]).pvalue > 1e-4
