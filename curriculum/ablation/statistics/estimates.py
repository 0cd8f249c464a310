"""One number per demonstration set and item: its mean, with an interval over the population that is asked about.

Contract: pure and seeded; the numbers may be anything (correct or not, a log-probability, a difference of either). What is
wrong with them is said by their place.

Shapes: S demonstration sets, Q test items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from sparsort.curriculum.ablation.statistics import resampling
from sparsort.curriculum.ablation.statistics.resampling import DRAWS, Floats
from sparsort.errors import SparsortError, unknown_choice

Over = Literal["sets", "items", "both"]
Method = Literal["wild", "bootstrap_t", "t"]

# What the clusters are called in reasons.
SET, ITEM = "demonstration set", "test item"
# With fewer items that differ (discordant ones, or errors), intervals over items were seen to cover 89 to 94 % at 95.
_FEW = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A mean with its interval and the test that belongs to it, in the unit of the values (accuracy: 0.01 is one point).

    Attributes:
        value: the mean over sets and items.
        low: lower end of the interval; NaN where there is none, −inf where it is unbounded.
        high: upper end.
        level: nominal coverage.
        p_value: two-sided, of mean = `null`; NaN where there is no test.
        null: the value tested; NaN for none.
        se: standard error of the mean; NaN where there is no interval.
        per_set: (S,) mean of each set.
        over: what the interval generalises to, see `estimate`.
        method: how the interval was made, in words; "none" where there is none.
        note: what a reader must know, "" for nothing.
        reason: why there is no interval and no test, "" where there are.
    """

    value: float
    low: float
    high: float
    level: float
    p_value: float
    null: float
    se: float
    per_set: Floats
    over: Over
    method: str
    note: str = ""
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.value:+.3f}, {self.reason}"
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p_value:.3g}"


def estimate(
    values_SQ: ArrayLike,
    *,
    over: Over = "sets",
    method: Method = "wild",
    level: float = 0.95,
    null: float = 0.0,
    draws: int = DRAWS,
    seed: int = 0,
    scale: float | None = None,
) -> Estimate:
    """The mean of one number per demonstration set and item, with an interval over the population that is asked about.

    Args:
        values_SQ: (S, Q) finite numbers; column q is the same item in every set.
        over: what is taken for a random sample, so what the interval speaks of.
            "sets": other demonstration sets drawn like these, asked these same Q items. What an ablation on a fixed test
            set can say; that the items are shared costs nothing, as sets stay independent given the items.
            "items": other items like these, under these same S sets. With one set, nothing else is possible.
            "both": other sets and other items. Always the wider; needed for "would hold on this task at large".
        method: for "sets" and "items", see `wild`, `bootstrap_t` and `student_t`. "both" is always `two_way`. Read
            "bootstrap_t" next to "wild" where the differences of a few sets are far off the others (strong skewness).
        level: nominal coverage.
        null: the mean that the p-value tests; NaN for no test.
        draws: sign vectors or resamples, where they are not enumerated.
        seed: of the draws.
        scale: size of the numbers, which separates rounding from a difference; by default the largest of the values. For
            differences that nearly cancel, the size of what was subtracted.

    With one set, "sets" and "both" are impossible: the interval is over items, and `note` says so. With fewer than three
    clusters (sets for "sets", items for "items", either for "both"), or clusters that do not differ, there is no interval, no
    standard error and no p-value: they are NaN, and `reason` says why.

    Raises:
        SparsortError: bad shapes or numbers, an unknown choice, a level outside (0, 1), or too few draws for it.
    """
    values = numbers(values_SQ, "values", "SQ")
    _check(over, method, level, draws)
    sets = len(values)
    scale = float(np.abs(values).max()) if scale is None else scale
    notes = []
    if over != "items" and sets == 1:
        over = "items"
        notes.append(
            "one demonstration set: nothing can be said of other sets; the interval is over items, for this set alone"
        )
    low = high = p_value = se = np.nan
    how = "none"
    clusters = values.mean(axis=1) if over == "sets" else values.mean(axis=0)
    if reason := _missing(values, clusters, over, scale):
        pass
    elif over == "both":
        low, high, p_value, se, degrees = resampling.two_way(values, level=level, null=null)
        how = f"two-way random effects, t with {degrees:.1f} degrees of freedom"
    else:
        if method == "wild" and not resampling.enough_signs(len(clusters), level, draws):
            method = "t"
            notes.append(
                f"{len(clusters)} {over} have {2 ** len(clusters)} sign vectors, too few for level {level:g}; t instead, "
                "which takes their means for nearly normal"
            )
        differing = len(clusters) - int(np.unique(clusters, return_counts=True)[1].max())
        if over == "items" and 0 < differing < _FEW:
            notes.append(
                f"only {differing} items differ from the rest: the interval is too narrow; lean on an exact test"
            )
        low, high, p_value, how = _over_clusters(clusters, method, level, null, draws, seed)
        se = float(clusters.std(ddof=1) / np.sqrt(len(clusters)))
    if np.isinf(low) or np.isinf(high):
        notes.append("too many resamples hold one value only, so the interval is unbounded; use method='wild'")
    value = float(clusters.mean())
    return Estimate(
        value=value,
        low=float(np.minimum(low, value)),
        high=float(np.maximum(high, value)),
        level=level,
        p_value=p_value,
        null=null,
        se=se,
        per_set=values.mean(axis=1),
        over=over,
        method=how,
        note="; ".join(notes),
        reason=reason,
    )


def estimate_sets(
    values_S: Floats,
    *,
    method: Method = "wild",
    level: float = 0.95,
    null: float = 0.0,
    draws: int = DRAWS,
    seed: int = 0,
    scale: float | None = None,
) -> Estimate:
    """The mean of one number per demonstration set, with an interval over sets, never over items; see `estimate`."""
    found = estimate(values_S[:, None], method=method, level=level, null=null, draws=draws, seed=seed, scale=scale)
    if len(values_S) > 1:
        return found
    return replace(found, over="sets", note="", reason=resampling.missing_interval(values_S, SET))


def _missing(values_SQ: Floats, clusters: Floats, over: Over, scale: float) -> str:
    """Why there is no interval over the population."""
    if over != "both":
        return resampling.missing_interval(clusters, SET if over == "sets" else ITEM, scale=scale)
    sets, items = values_SQ.shape
    few = resampling.too_few(sets, SET) or resampling.too_few(items, ITEM)
    return few or resampling.missing_interval(values_SQ.ravel(), "outcome", scale=scale)


def _over_clusters(
    clusters: Floats, method: Method, level: float, null: float, draws: int, seed: int
) -> tuple[float, float, float, str]:
    column, count = clusters[:, None], len(clusters)
    if method == "wild":
        found = resampling.wild(column, level=level, null=null, draws=draws, seed=seed)
        signs = f"all {2**count}" if resampling.enumerable(count, draws) else str(draws)
        how = f"wild cluster bootstrap, {signs} sign vectors"
    elif method == "bootstrap_t":
        found = resampling.bootstrap_t(column, level=level, null=null, draws=draws, seed=seed)
        how = f"studentised cluster bootstrap, {draws} resamples"
    else:
        found = resampling.student_t(column, level=level, null=null)
        how = f"t with {count - 1} degrees of freedom over clusters"
    low, high, p_value = (float(numbers_N[0]) for numbers_N in found)
    return low, high, p_value, how


def _check(over: str, method: str, level: float, draws: int) -> None:
    if over not in get_args(Over):
        raise unknown_choice("population", over, get_args(Over))
    if method not in get_args(Method):
        raise unknown_choice("method", method, get_args(Method))
    if over == "both" and method != "wild":
        raise SparsortError(f"method={method!r} was given with over='both', which has one way only. Leave method= out.")
    check_fraction("level", level)
    if draws < np.ceil(2.0 / (1.0 - level)):
        raise SparsortError(
            f"draws={draws} cannot bound an interval at level {level:g}; expected at least "
            f"{int(np.ceil(2.0 / (1.0 - level)))}."
        )


def numbers(given: ArrayLike, name: str, axes: str) -> Floats:
    """`given` as floats, checked: one axis for each letter of `axes`, none empty, all finite.

    Raises:
        SparsortError: it is not so.
    """
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise SparsortError(f"{name} is ragged ({error}); expected an array of shape ({', '.join(axes)}).") from error
    if array.dtype.kind not in "biuf":
        raise SparsortError(f"{name} has dtype {array.dtype}; expected booleans or real numbers.")
    if array.ndim != len(axes) or 0 in array.shape:
        raise SparsortError(
            f"{name} has shape {array.shape}; expected ({', '.join(axes)}) with no empty axis (R random orders, "
            "S demonstration sets, Q items). For one set, give an axis of length 1."
        )
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        place = tuple(int(index) for index in np.argwhere(~np.isfinite(values))[0])
        raise SparsortError(
            f"{name} holds {values[place]} at {place}; expected finite numbers. Every set must have an outcome for every "
            "item: leave out the item, or finish the run."
        )
    return values


def check_fraction(name: str, given: float) -> None:
    """Raises SparsortError unless `given`, which the caller knows as `name`, lies strictly between 0 and 1."""
    if not 0.0 < given < 1.0:
        raise SparsortError(f"{name}={given!r}; expected a number between 0 and 1, ends excluded.")
