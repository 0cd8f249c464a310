"""Combine several scores into one difficulty.

Contract: NumPy only. Only the ranks of a score matter, so two scores that order the rows alike have the same effect, whatever
their units. Every score increases with difficulty (negate one that does not). Equal rows stay exactly equal, because ranks are
added as integers; the ranking breaks their ties. The result does not depend on the order of the rows. Under rank_average
with integer weights, and under intersection, it does not depend on the order of the scores either.

A row that lacks any of the scores (NaN) gets no difficulty, and the other rows are ranked as if it did not exist. Infinities
are valid values, at the ends of the ranking. Memory: about 6 float64 arrays of N at the peak.

Legend: N rows, M of them complete (with every score).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsort.errors import SparsortError, unknown_choice

Combination = Literal["rank_average", "lexicographic", "intersection"]
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)


def combine(
    scores: Mapping[str, ArrayLike],
    combination: Combination,
    *,
    weights: Mapping[str, float] | None = None,
    levels: int | None = 10,
) -> NDArray[np.float64]:
    """Combine several scores, each (N,) and increasing with difficulty, into one difficulty.

    Combinations:
        rank_average: the weighted mean of the percentiles; a row is as hard as its scores are on average.
        lexicographic: sort by the first score, break ties by the second, and so on. A continuous score has no ties, so every
            score but the last is first divided into `levels` levels of equal counts. Equal values share a level, so ties can
            make levels uneven.
        intersection: the largest of the percentiles; an example is easy if every score says so. DeepSpeed's data pipeline
            admits examples in this order, but when each metric is at its percentile c it has admitted fewer than a share c of
            them. Here the result is ranked again, so that a pacing of c means a share c of the data.

    Args:
        scores: name → (N,) numbers; NaN where a row has no score. The order of names matters to "lexicographic" only.
        combination: one of the combinations above.
        weights: name → weight above 0, for rank_average; by default all weights are equal.
        levels: number of levels, for lexicographic; None uses the exact values.

    Returns:
        (N,) float64 in (0, 1): mid-rank percentiles, or under rank_average a mean of percentiles. NaN where any score is NaN.

    Raises:
        SparsortError: the scores do not fit each other, the weights do not fit the scores, or an argument is out of range.
    """
    if combination not in COMBINATIONS:
        raise unknown_choice("way to combine scores", combination, COMBINATIONS)
    if not scores:
        raise SparsortError("there are no scores to combine. Give at least one, as {name: numbers}.")
    if weights is not None and combination != "rank_average":
        raise SparsortError(
            f"weights were given to {combination!r}, which has no weights. Omit them, or use 'rank_average'."
        )
    _check_levels(levels)
    columns = {name: _column(f"score {name!r}", values) for name, values in scores.items()}
    complete_N = _complete(columns)
    # A generator, so that only one of the columns is copied at a time.
    chosen = (values_N if complete_N.all() else values_N[complete_N] for values_N in columns.values())
    # Doubled ranks are integers even for ties. The doubled number of rows turns them into percentiles.
    doubled = 2 * int(np.count_nonzero(complete_N))
    if combination == "lexicographic":
        keys = list(chosen)
        if levels is not None:
            keys[:-1] = [_levels(values_M, levels) for values_M in keys[:-1]]
        return _to_all_rows(_doubled_ranks(keys) / doubled, complete_N)
    total_M = np.zeros(doubled // 2)
    if combination == "intersection":
        for values_M in chosen:
            np.maximum(total_M, _doubled_ranks([values_M]), out=total_M)
        return _to_all_rows(_doubled_ranks([total_M]) / doubled, complete_N)
    weight_of = _weights(columns, weights)
    for values_M, weight in zip(chosen, weight_of, strict=True):
        total_M += weight * _doubled_ranks([values_M])
    # `math.fsum` is exact, so the sum does not depend on the order of the weights.
    return _to_all_rows(total_M / (doubled * math.fsum(weight_of)), complete_N)


def _doubled_ranks(keys: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """2·rank − 1 of each row by the first key, then the second, …: (M,) integers from 1 to 2M−1, with ties averaged."""
    # `np.lexsort` expects the primary key last.
    order_M = np.argsort(keys[0]) if len(keys) == 1 else np.lexsort(tuple(reversed(keys)))
    count = len(order_M)
    # True at the first row of each run of rows that are equal in every key.
    begins_M = np.zeros(count, dtype=np.bool_)
    begins_M[0] = True
    for key_M in keys:
        sorted_M = key_M[order_M]
        begins_M[1:] |= sorted_M[1:] != sorted_M[:-1]
        # Free the array before the next key is sorted, which lowers the peak of memory.
        del sorted_M
    edges = np.append(np.flatnonzero(begins_M), count)
    # A run of equal rows at places s … e−1 has the mean rank (s + 1 + e) / 2. Doubled, minus 1, it is s + e.
    ranks_M = np.empty(count)
    ranks_M[order_M] = np.repeat(edges[:-1] + edges[1:], np.diff(edges))
    return ranks_M


def _levels(values_M: NDArray[Any], levels: int) -> NDArray[np.int64]:
    """⌊percentile · levels⌋, computed in integers."""
    ranks_M = _doubled_ranks([values_M]).astype(np.int64)
    return ranks_M * levels // (2 * len(values_M))


def _column(name: str, values: ArrayLike) -> NDArray[Any]:
    values_N = np.asarray(values)
    if values_N.ndim != 1:
        raise SparsortError(f"{name} has shape {values_N.shape}; expected one number per row, shape (N,).")
    if values_N.size and values_N.dtype.kind not in "fiub":
        raise SparsortError(
            f"{name} has values of type {values_N.dtype}; expected numbers, with NaN where there is no score."
        )
    return values_N


def _complete(columns: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """The rows that have every score."""
    lengths = {name: len(values_N) for name, values_N in columns.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise SparsortError(f"the scores have different numbers of rows ({given}). Give the scores of the same rows.")
    complete_N = np.ones(next(iter(lengths.values())), dtype=np.bool_)
    for values_N in columns.values():
        complete_N &= ~np.isnan(values_N)
    if not complete_N.any():
        given = ", ".join(f"{name}: {np.count_nonzero(~np.isnan(values_N))}" for name, values_N in columns.items())
        raise SparsortError(
            f"not one of the {len(complete_N)} rows has all the scores (rows with a number: {given}). "
            "Score the rows, or omit the score that is missing."
        )
    return complete_N


def _weights(columns: Mapping[str, Any], weights: Mapping[str, float] | None) -> list[float]:
    if weights is None:
        return [1.0] * len(columns)
    for name in weights:
        if name not in columns:
            raise unknown_choice("score in the weights", name, columns)
    if missing := [name for name in columns if name not in weights]:
        raise SparsortError(f"the weights lack {', '.join(missing)}. Give every score a weight, or pass no weights.")
    given: Mapping[str, object] = weights
    for name, weight in given.items():
        if not isinstance(weight, Real) or not 0 < float(weight) < math.inf:
            raise SparsortError(
                f"the weight of {name} is {weight!r}; expected a number above 0. To drop a score, omit it."
            )
    return [float(weights[name]) for name in columns]


def _check_levels(levels: object) -> None:
    if levels is None:
        return
    if isinstance(levels, bool) or not isinstance(levels, int | np.integer) or levels < 1:
        raise SparsortError(f"levels = {levels!r}; expected a whole number of at least 1, or None for exact values.")


def _to_all_rows(values_M: NDArray[np.float64], complete_N: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Expand from the complete rows to all rows, with NaN for the others."""
    if len(values_M) == len(complete_N):
        return values_M
    values_N = np.full(len(complete_N), np.nan)
    values_N[complete_N] = values_M
    return values_N
