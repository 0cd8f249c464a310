"""The best of several candidates by a score, with a stated rule for ties, and the mean rank under several scores.

Contract: higher is better. Scores that differ only by rounding count as equal. Ties are common, because GlobalE over P probes
has few values, and an accuracy on P rows at most P + 1. Giving them to the first candidate would favour the order that is
listed first, often the given one. So a second score breaks ties if there is one, and a seeded generator breaks the rest.

Shapes: O candidates, C scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import Floats, numbers
from sparsort.errors import SparsortError

# Scores count as equal if their difference is at most _RELATIVE times the largest finite score, plus _ABSOLUTE.
_RELATIVE, _ABSOLUTE = 1e-9, 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class OrderRanking:
    """The candidate with the best score.

    Attributes:
        index: index of the chosen candidate.
        ranking: (O,) all candidates, the best first, with ties broken by the same rule; `ranking[:4]` are the four over which
            the authors of GlobalE and PDO report the mean.
        tied: number of candidates that share the best score, including the chosen one; 1 if there was no tie.
        drawn: number of those among which the seed decided, after the second score; 1 if it decided nothing.
    """

    index: int
    ranking: NDArray[np.int64]
    tied: int
    drawn: int


def choose(scores: Any, *, tiebreak: Any = None, seed: int = 0) -> OrderRanking:
    """The candidate with the highest score.

    Args:
        scores: (O,) numbers; −inf is allowed and is the lowest.
        tiebreak: (O,) numbers that decide between candidates of equal score, higher is better.
        seed: seed of the draw among the candidates that still tie.

    Raises:
        SparsortError: no candidates, NaN, or a `tiebreak` of another length.
    """
    level_O = _levels(_scores(scores, "scores"))
    second_O = np.zeros_like(level_O)
    if tiebreak is not None:
        second_O = _levels(_scores(tiebreak, "tiebreak", count=len(level_O)))
    shuffled_O = np.random.default_rng(seed).permutation(len(level_O))
    # `lexsort` sorts by its last key first.
    ranking = np.lexsort((shuffled_O, second_O, level_O)).astype(np.int64)
    is_best_O = level_O == 0
    return OrderRanking(
        index=int(ranking[0]),
        ranking=ranking,
        tied=int(is_best_O.sum()),
        drawn=int((is_best_O & (second_O == second_O[ranking[0]])).sum()),
    )


def mean_ranks(scores: Floats) -> Floats:
    """Ranks along the first axis of scores, (O, …), from 0 (lowest) to 1 (highest); ties have their mean. A single one has ½."""
    if len(scores) == 1:
        return np.full_like(scores, 0.5)
    # Imported here, because the help of a command reads the table of criteria.
    from scipy.stats import rankdata

    ranks: Floats = (rankdata(scores, axis=0) - 1) / (len(scores) - 1)
    return ranks


def rank_average(scores: Sequence[Any], weights: Sequence[float] | None = None) -> Floats:
    """The weighted mean of the candidates' ranks under several scores, (O,), in [0, 1].

    Ranks are averaged because entropies, divergences and states have no common unit. A negative weight reverses a score.

    Args:
        scores: C scores of (O,) numbers each, higher is better.
        weights: (C,) numbers, not all 0; by default equal.

    Raises:
        SparsortError: no scores, different lengths, NaN, or invalid weights.
    """
    if not len(scores):
        raise SparsortError("rank_average was given no scores. Pass at least one list of numbers.")
    first = _scores(scores[0], "scores[0]")
    rows = [first, *(_scores(row, f"scores[{at}]", count=len(first)) for at, row in enumerate(scores[1:], 1))]
    weights_C = np.ones(len(rows)) if weights is None else numbers(weights, ("weights",), argument="weights")
    if len(weights_C) != len(rows) or not np.isfinite(weights_C).all() or not weights_C.any():
        raise SparsortError(f"weights is {weights} for {len(rows)} scores. Give one finite number each, not all 0.")
    # Ranks of levels, not of scores, so that scores that differ only by rounding have the same rank.
    ranks_CO = np.stack([mean_ranks(-_levels(row).astype(np.float64)) for row in rows])
    upright_CO = np.where(weights_C[:, None] < 0, 1.0 - ranks_CO, ranks_CO)
    average: Floats = (np.abs(weights_C)[:, None] * upright_CO).sum(axis=0) / np.abs(weights_C).sum()
    return average


def _scores(values: Any, argument: str, count: int | None = None) -> Floats:
    array = numbers(values, ("candidates",), argument=argument)
    if count is not None and len(array) != count:
        raise SparsortError(f"{argument} has {len(array)} numbers for {count} candidates. Give one each.")
    if np.isnan(array).any():
        bad = int(np.argmax(np.isnan(array)))
        raise SparsortError(f"{argument} is NaN for candidate {bad} (from 0), so the best one is not known.")
    return array


def _levels(scores: Floats) -> NDArray[np.int64]:
    """0 for the highest score, 1 for the next lower one, and so on, (O,); scores that differ only by rounding share a level."""
    by_score = np.argsort(-scores, kind="stable")
    sorted_O = scores[by_score]
    finite = np.abs(sorted_O[np.isfinite(sorted_O)])
    gap = _RELATIVE * float(finite.max(initial=0.0)) + _ABSOLUTE
    # Compared without subtracting two scores, since a difference of infinities is NaN.
    is_lower = (sorted_O[1:] != sorted_O[:-1]) & ~(sorted_O[1:] >= sorted_O[:-1] - gap)
    levels = np.empty(len(scores), dtype=np.int64)
    levels[by_score] = np.concatenate([[0], np.cumsum(is_lower)])
    return levels
