"""A seeded sample of orders of a few demonstrations, without repeats."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError

_ENUMERABLE = 8


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
