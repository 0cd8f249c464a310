"""The criteria by density against their formulas in plain Python, and for probes without a state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsort.curriculum.demos.criteria import density as states
from sparsort.errors import SparsortError


@settings(max_examples=40)
@given(orders=st.integers(1, 5), probes=st.integers(1, 6), seed=st.integers(0, 10_000), higher=st.booleans())
def test_density_against_the_formulas(orders: int, probes: int, seed: int, higher: bool) -> None:
    generator, sign = np.random.default_rng(seed), 1 if higher else -1
    features = generator.integers(1, 6, size=(orders, probes)).astype(float)
    bare = generator.uniform(-3.0, -1.0, size=probes)
    mean = [sign * sum(row) / probes for row in features.tolist()]
    gain = [
        sign * sum((f - b) / abs(b) for f, b in zip(row, bare.tolist(), strict=True)) / probes
        for row in features.tolist()
    ]
    rank = []
    for order in range(orders):
        places = []
        for probe in range(probes):
            others = [sign * features[o, probe] for o in range(orders) if o != order]
            own = sign * features[order, probe]
            beaten = sum(other < own for other in others) + sum(other == own for other in others) / 2
            places.append(beaten / len(others) if others else 0.5)
        rank.append(sum(places) / probes)
    assert states.density(features, denser_is_higher=higher) == pytest.approx(mean)
    assert states.density_gain(features, bare, denser_is_higher=higher) == pytest.approx(gain)
    assert states.density_rank(features, denser_is_higher=higher) == pytest.approx(rank)


def test_a_probe_without_a_state_under_one_order_counts_under_none() -> None:
    features = np.array([[1.0, 5.0, 3.0], [2.0, np.nan, 1.0]])
    whole = features[:, [0, 2]]
    assert (states.density(features, denser_is_higher=True) == whole.mean(axis=1)).all()
    assert (states.density_rank(features, denser_is_higher=True) == [0.5, 0.5]).all()
    expected = states.density_gain(whole, [1.0, 2.0], denser_is_higher=False)
    assert (states.density_gain(features, [1.0, 1.0, 2.0], denser_is_higher=False) == expected).all()
    with pytest.raises(SparsortError, match="no probe with a value under each of the 2"):
        states.density([[1.0, np.nan], [np.nan, 1.0]], denser_is_higher=True)


def test_bad_density() -> None:
    with pytest.raises(SparsortError, match="no probes"):
        states.density(np.zeros((2, 0)), denser_is_higher=True)
    with pytest.raises(SparsortError, match="3 numbers for 2 probes"):
        states.density_gain(np.ones((2, 2)), np.ones(3), denser_is_higher=True)
    with pytest.raises(SparsortError, match="0 for probe 1"):
        states.density_gain(np.ones((2, 2)), [1.0, 0.0], denser_is_higher=True)
