"""A seeded sample of distinct orders of a few demonstrations."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from sparsort.errors import SparsortError

# Up to this number of items, all orders (8! = 40,320) are enumerated.
_ENUMERABLE = 8


def random_permutations(n: int, count: int, seed: int = 0) -> NDArray[np.int64]:
    """Distinct orders of n items, (count, n); each set of `count` orders is equally likely.

    Raises:
        SparsortError: n items have fewer than `count` orders.
    """
    if n < 0 or count < 0:
        raise SparsortError(f"random_permutations was given n={n} and count={count}; neither may be negative.")
    # 20! exceeds every count that fits into memory, and the factorial of a large n takes long to compute.
    if count > math.factorial(min(n, 20)):
        raise SparsortError(
            f"{count} distinct orders of {n} items were requested, but only {math.factorial(n)} exist. Request fewer."
        )
    generator = np.random.default_rng(seed)
    if n <= _ENUMERABLE:
        # Rejection would stall if nearly all orders are requested.
        orders = np.array(list(itertools.permutations(range(n))), dtype=np.int64)
        return orders[generator.choice(len(orders), size=count, replace=False)]
    # A dictionary as a set that keeps the order of insertion, and so the result the same for the same seed.
    distinct: dict[tuple[int, ...], None] = {}
    while len(distinct) < count:
        distinct[tuple(generator.permutation(n).tolist())] = None
    return np.array(list(distinct), dtype=np.int64).reshape(count, n)
