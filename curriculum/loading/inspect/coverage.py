"""How often an epoch of a plan shows each example, and the share of examples that it never shows.

Contract: NumPy only. The numbers are counted over every batch, or estimated from a sample of batches and labelled as expected
values. One pass shows each example exactly once; a pool draws with replacement across batches, so it can miss examples.

Legend: N rows, S sampled batches.
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
        mean: average number of times that an example is shown.
        most: number of times that the most frequent example is shown; None if it was not counted.
        exact: whether every batch was counted; if not, `never` is an expected value.
    """

    never: float
    mean: float
    most: int | None
    exact: bool


def coverage_of(plan: CurriculumPlan, epoch: int, first: int = 0, sample: int | None = None) -> Coverage:
    """How often an epoch shows each example, from batch `first` on.

    Args:
        plan: the plan.
        epoch: number of the epoch, from 0.
        first: the first batch that is counted.
        sample: number of evenly spaced batches of a pool to sample; None to count all.
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
    """The expected share of rows that no batch draws; each sampled batch represents count / S batches.

    A batch that draws c of the first h rows of the order misses one of them with probability 1 − c/h. Availability only grows,
    so all rows between two successive values of h are available to the same batches.
    """
    n = plan.n_rows
    available_S = np.array([round(plan.share(number) * n) for number in numbers])
    codes = plan.groups if plan.settings.quotas is not None else None
    sizes = [n] if codes is None else np.bincount(codes).tolist()
    never_shown = 0.0
    for group, size in enumerate(sizes):
        drawn_S = np.array([len(rows) if codes is None else np.count_nonzero(codes[rows] == group) for rows in drawn])
        # A batch with quotas draws its full quota even where the pacing offers less.
        own_S = np.maximum(-(-available_S * size // n), drawn_S)
        with np.errstate(divide="ignore"):
            log_missed_S = np.log1p(-drawn_S / np.maximum(own_S, 1)) * count / len(numbers)
        # The probability that no batch from here on draws a row that is newly available.
        survival_S = np.exp(np.cumsum(log_missed_S[::-1])[::-1])
        own_S = np.maximum.accumulate(own_S)
        never_shown += float(np.diff(own_S, prepend=0) @ survival_S) + size - int(own_S[-1])
    return never_shown / n


def spaced(first: int, last: int, most: int | None) -> range | list[int]:
    """At most `most` evenly spaced integers from `first` up to, but excluding, `last`; all of them if `most` is None."""
    count = last - first
    if most is None or most >= count:
        return range(first, last)
    return [first + (2 * i + 1) * count // (2 * most) for i in range(most)]
