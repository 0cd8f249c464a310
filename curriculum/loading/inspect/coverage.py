"""How often an epoch of a plan shows each example, and which it never shows.

Contract: NumPy only; counted over every batch, or, from a sample of them, an expected value that is called one. One pass
shows each example once, by construction; a pool draws with replacement across batches and leaves some out.

Legend: N rows, S batches looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.loading.plan.plan import CurriculumPlan
from sparsort.terminal.progress import progress


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How often an epoch shows the examples.

    Attributes:
        never: share of the examples that the epoch does not show.
        mean: times that an example is shown, on average.
        most: times that the most frequent one is shown; None where it was not counted.
        exact: counted, batch by batch; else `never` is its expected value.
    """

    never: float
    mean: float
    most: int | None
    exact: bool


def coverage_of(plan: CurriculumPlan, epoch: int, first: int = 0, sample: int | None = None) -> Coverage:
    """How often an epoch shows each example, from batch `first` on.

    Args:
        sample: batches of a pool to look at, evenly spaced; None to count them all.
    """
    n, count = plan.n_rows, plan.n_batches - first
    if plan.settings.mode == "one_pass":
        return Coverage(never=0.0, mean=1.0, most=1, exact=True)
    numbers = spaced(first, plan.n_batches, sample)
    with progress("draws", len(numbers)) as advance:
        drawn = []
        for number in numbers:
            drawn.append(plan.batch(number, epoch))
            advance(1)
    mean = sum(map(len, drawn)) / len(numbers) * count / n
    if sample is None or len(numbers) == count:
        rows, times = np.unique(np.concatenate(drawn), return_counts=True)
        return Coverage(never=1 - len(rows) / n, mean=mean, most=int(times.max()), exact=True)
    return Coverage(never=_expected_never(plan, numbers, drawn, count), mean=mean, most=None, exact=False)


def _expected_never(
    plan: CurriculumPlan, numbers: Sequence[int], drawn: Sequence[NDArray[np.int64]], count: int
) -> float:
    """The expected share of rows that no batch draws, each batch looked at standing for count / S.

    A batch that draws c of the first h rows of the order leaves one of them out with probability 1 − c/h; what is
    available only grows, so the rows between two values of h have the same batches ahead of them.
    """
    n = plan.n_rows
    held_S = np.array([round(plan.share(number) * n) for number in numbers])
    codes = plan.groups if plan.settings.quotas is not None else None
    sizes = [n] if codes is None else np.bincount(codes).tolist()
    left = 0.0
    for group, size in enumerate(sizes):
        drawn_S = np.array([len(rows) if codes is None else np.count_nonzero(codes[rows] == group) for rows in drawn])
        own_S = np.maximum(-(-held_S * size // n), drawn_S)
        with np.errstate(divide="ignore"):
            out_S = np.log1p(-drawn_S / np.maximum(own_S, 1)) * count / len(numbers)
        survival_S = np.exp(np.cumsum(out_S[::-1])[::-1])
        own_S = np.maximum.accumulate(own_S)
        left += float(np.diff(own_S, prepend=0) @ survival_S) + size - int(own_S[-1])
    return left / n


def spaced(first: int, last: int, most: int | None) -> range | list[int]:
    """At most `most` of the whole numbers from `first` to before `last`, evenly spaced."""
    count = last - first
    if most is None or most >= count:
        return range(first, last)
    return [first + (2 * i + 1) * count // (2 * most) for i in range(most)]
