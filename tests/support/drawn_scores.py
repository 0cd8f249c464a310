"""Random scores of labels, for the tests of the criteria."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# (orders, probes, labels, seed)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))


def drawn(orders: int, probes: int, n_labels: int, seed: int, scale: float = 3.0) -> Floats:
    """Log-probabilities, (orders, probes, labels), which are not normalised."""
    return np.random.default_rng(seed).normal(scale=scale, size=(orders, probes, n_labels)) - 20.0
