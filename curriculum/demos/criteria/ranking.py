"""The best of several candidates by a score, with a stated rule for ties, and several scores as one.

Contract: higher is better. Scores that differ by rounding count as equal. Ties are common, because GlobalE over P
probes takes few values and the accuracy on P rows at most P + 1; to give them to the first candidate would favour
whatever order happens to be listed first (often the given one), so they are broken by a second score where there is
one and then drawn by a seeded generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import Floats, numbers
from sparsort.errors import SparsortError

_RELATIVE, _ABSOLUTE = 1e-9, 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What was chosen.

    Attributes:
        index: the chosen candidate.
        ranking: (O,) all candidates, best first, ties broken by the same rule; `ranking[:4]` are the four over which
            GlobalE's and PDO's authors report the mean.
        tied: how many candidates share the best score, the chosen one included; 1 says that there was no tie.
        drawn: among how many of them the seed decided, after the second score; 1 says that it did not.
    """

    index: int
    ranking: NDArray[np.int64]
    tied: int
    drawn: int


def choose(scores: Any, *, tiebreak: Any = None, seed: int = 0) -> Choice:
    """The candidate with the highest score.

    Ties go to the highest `tiebreak`, and what still ties is drawn by numpy's default generator from `seed`.

    Args:
        scores: (O,) numbers; −inf is allowed and loses.
        tiebreak: (O,) numbers that decide between candidates of equal score.
        seed: of the draw.

    Raises:
        SparsortError: no candidates, NaN, or a `tiebreak` of another length.
    """
    level = _levels(_scores(scores, "scores"))
    second = np.zeros_like(level)
    if tiebreak is not None:
        second = _levels(_scores(tiebreak, "tiebreak", count=len(level)))
    shuffled = np.random.default_rng(seed).permutation(len(level))
    ranking = np.lexsort((shuffled, second, level)).astype(np.int64)
    best = level == 0
    return Choice(
        index=int(ranking[0]),
        ranking=ranking,
        tied=int(best.sum()),
        drawn=int((best & (second == second[ranking[0]])).sum()),
    )


def mean_ranks(scores: Floats) -> Floats:
    """Ranks along the first axis from 0 (lowest) to 1 (highest), ties at their mean; ½ for a single candidate.

    Args:
        scores: (O, …) numbers.
    """
    if len(scores) == 1:
        return np.full_like(scores, 0.5)
    # One candidate at a time: all pairs at once would take the square of their number in memory.
    below = np.stack([(scores < own).sum(axis=0) for own in scores])
    equal = np.stack([(scores == own).sum(axis=0) for own in scores])
    ranks: Floats = (below + (equal - 1) / 2) / (len(scores) - 1)
    return ranks


def rank_average(scores: Sequence[Any], weights: Sequence[float] | None = None) -> Floats:
    """Several scores of the same candidates as one: the weighted mean of their ranks, (O,), in [0, 1].

    Ranks, because entropies, divergences and states have no common unit. A negative weight turns a score round.

    Args:
        scores: C scores of (O,) numbers each, higher is better.
        weights: C numbers, not all 0; by default equal.

    Raises:
        SparsortError: no scores, different lengths, NaN, or weights that do not fit.
    """
    if not len(scores):
        raise SparsortError("rank_average was given no scores. Pass at least one list of numbers.")
    first = _scores(scores[0], "scores[0]")
    rows = [first, *(_scores(row, f"scores[{at}]", count=len(first)) for at, row in enumerate(scores[1:], 1))]
    given = np.ones(len(rows)) if weights is None else numbers(weights, ("weights",), what="weights")
    if len(given) != len(rows) or not np.isfinite(given).all() or not given.any():
        raise SparsortError(f"weights is {weights} for {len(rows)} scores. Give one finite number each, not all 0.")
    ranks = np.stack([mean_ranks(-_levels(row).astype(np.float64)) for row in rows])
    upright = np.where(given[:, None] < 0, 1.0 - ranks, ranks)
    average: Floats = (np.abs(given)[:, None] * upright).sum(axis=0) / np.abs(given).sum()
    return average


def _scores(values: Any, what: str, count: int | None = None) -> Floats:
    array = numbers(values, ("candidates",), what=what)
    if count is not None and len(array) != count:
        raise SparsortError(f"{what} has {len(array)} numbers for {count} candidates. Give one each.")
    if np.isnan(array).any():
        raise SparsortError(f"{what} is NaN for candidate {int(np.argmax(np.isnan(array)))} (from 0), so none is best.")
    return array


def _levels(scores: Floats) -> NDArray[np.int64]:
    """0 for the highest score, 1 for the next lower, and so on; scores that differ by rounding share a level."""
    falling = np.argsort(-scores, kind="stable")
    ordered = scores[falling]
    finite = np.abs(ordered[np.isfinite(ordered)])
    gap = _RELATIVE * float(finite.max(initial=0.0)) + _ABSOLUTE
    # Not a difference of infinities, which would be NaN.
    is_lower = (ordered[1:] != ordered[:-1]) & ~(ordered[1:] >= ordered[:-1] - gap)
    levels = np.empty(len(scores), dtype=np.int64)
    levels[falling] = np.concatenate([[0], np.cumsum(is_lower)])
    return levels
