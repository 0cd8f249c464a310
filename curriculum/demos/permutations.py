"""Permutations of a few demonstrations: all of them where they are few, else a seeded sample without repeats."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError

MOST_EXHAUSTIVE = 24
_ENUMERABLE = 8


def all_permutations(n: int) -> NDArray[np.int64]:
    """Every order of n items, (n!, n), in lexicographic order, so that the first row is the given order.

    Raises:
        SparsortError: there are more than 24.
    """
    if n < 0 or math.factorial(min(n, 20)) > MOST_EXHAUSTIVE:
        raise SparsortError(
            f"all permutations of {n} items were asked for; only up to {MOST_EXHAUSTIVE} (4 items) are enumerated. "
            "Sample some with random_permutations(n, count, seed)."
        )
    return np.array(list(itertools.permutations(range(n))), dtype=np.int64)


def random_permutations(n: int, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Distinct orders of n items, (count, n), each set of `count` orders equally likely.

    Raises:
        SparsortError: n items have fewer than `count` orders.
    """
    if n < 0 or count < 0:
        raise SparsortError(f"random_permutations was given n={n} and count={count}; neither may be negative.")
    if count > math.factorial(min(n, 20)):
        raise SparsortError(
            f"{count} distinct orders of {n} items were asked for, but only {math.factorial(n)} exist. Ask for fewer."
        )
    generator = np.random.default_rng(seed)
    if n <= _ENUMERABLE:
        # Rejection would stall when nearly all orders are asked for; here they are few enough to draw from a list.
        every = np.array(list(itertools.permutations(range(n))), dtype=np.int64)
        return every[generator.choice(len(every), size=count, replace=False)]
    distinct: dict[tuple[int, ...], None] = {}
    while len(distinct) < count:
        distinct[tuple(generator.permutation(n).tolist())] = None
    return np.array(list(distinct), dtype=np.int64).reshape(count, n)
