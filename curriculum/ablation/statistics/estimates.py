"""The mean of one number per demonstration set and item, with an interval for a population of sets, of items, or of both.

Contract: pure and seeded. The numbers may be anything: correct or not, a log-probability, or a difference of either. Errors
name the position of an invalid number.

The population is what is regarded as a random sample, and so what an interval generalises to:
- "sets": other demonstration sets drawn like these, with the same Q items. This is what an ablation on a fixed test set can
  show. That sets share their items does no harm, because sets are independent given the items.
- "items": other items like these, with the same S sets. With one set, nothing else is possible.
- "both": other sets and other items. Always the widest; needed for the claim "would hold on this task in general".

With one set, "sets" and "both" are impossible: the interval is over items, and `note` says so. With fewer than three clusters
(sets for "sets", items for "items", either for "both"), or clusters that do not differ, there is no interval, no standard error
and no p-value: they are NaN, and `reason` says why.

Shapes: S demonstration sets, Q test items, C clusters (sets or items).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike

from sparsort.curriculum.ablation.statistics import resampling
from sparsort.curriculum.ablation.statistics.resampling import DRAWS, Floats
from sparsort.errors import SparsortError, unknown_choice

Over = Literal["sets", "items", "both"]
Method = Literal["wild", "bootstrap_t", "t"]

# The names of the clusters in reasons.
SET, ITEM = "demonstration set", "test item"
# With fewer items that differ (discordant items, or errors), 95 % intervals over items covered 89 to 94 % in simulations.
_FEW = 10
_ONE_SET = "one demonstration set does not generalise to other sets; the interval is over items, for this set alone"


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A mean with its interval and the corresponding test, in the unit of the values (for accuracies, 0.01 is one point).

    Attributes:
        value: the mean over sets and items.
        low: lower end of the interval; NaN if there is none, −inf if it is unbounded.
        high: upper end.
        level: nominal coverage.
        p_value: two-sided, for mean = `null`; NaN if there is no test.
        null: the mean under the null hypothesis; NaN for no test.
        se: standard error of the mean; NaN if there is no interval.
        per_set: (S,) mean of each set.
        over: the population of the interval, see `estimate`.
        method: the method of the interval in words; "none" if there is none.
        note: what a reader must know about the interval; may be empty.
        reason: why there is no interval and no test; "" if there are.
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


class _Interval(NamedTuple):
    """The interval and test of an `Estimate`; by default, that there are none."""

    low: float = np.nan
    high: float = np.nan
    p_value: float = np.nan
    se: float = np.nan
    method: str = "none"
    notes: tuple[str, ...] = ()


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
    """The mean of one number per demonstration set and item, with an interval for a population.

    Args:
        values_SQ: (S, Q) finite numbers; column q is the same item in every set.
        over: the population, see the head of this module.
        method: for "sets" and "items", see `wild`, `bootstrap_t` and `student_t`. "both" always uses `two_way`. Compare
            "bootstrap_t" with "wild" if the differences of a few sets are far from the others (strong skewness).
        level, null: the nominal coverage, and the mean under the null hypothesis (NaN for no test).
        draws, seed: the number of sign vectors or resamples, unless all of them are enumerated, and the seed for them.
        scale: size of the numbers, by which a difference is distinguished from rounding; by default the largest absolute value.
            For differences that nearly cancel, pass the size of the numbers that were subtracted.

    Raises:
        SparsortError: a shape, number or choice is invalid, the level is outside (0, 1), or there are too few draws for it.
    """
    values = numbers(values_SQ, "values", "SQ")
    _check(over, method, level, draws)
    scale = float(np.abs(values).max()) if scale is None else scale
    notes = []
    if over != "items" and len(values) == 1:
        over = "items"
        notes.append(_ONE_SET)
    clusters_C = values.mean(axis=1) if over == "sets" else values.mean(axis=0)
    if reason := _missing(values, clusters_C, over, scale):
        interval = _Interval()
    elif over == "both":
        low, high, p_value, se, degrees = resampling.two_way(values, level=level, null=null)
        interval = _Interval(low, high, p_value, se, f"two-way random effects, t with {degrees:.1f} degrees of freedom")
    else:
        interval = _over_clusters(clusters_C, over, method, level, null, draws, seed)
    notes += interval.notes
    if np.isinf(interval.low) or np.isinf(interval.high):
        notes.append("too many resamples hold one value only, so the interval is unbounded; use method='wild'")
    value = float(clusters_C.mean())
    return Estimate(
        value=value,
        # Rounding may put an end of a very narrow interval on the wrong side of the mean.
        low=float(np.minimum(interval.low, value)),
        high=float(np.maximum(interval.high, value)),
        level=level,
        p_value=interval.p_value,
        null=null,
        se=interval.se,
        per_set=values.mean(axis=1),
        over=over,
        method=interval.method,
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
    result = estimate(values_S[:, None], method=method, level=level, null=null, draws=draws, seed=seed, scale=scale)
    if len(values_S) > 1:
        return result
    return replace(result, over="sets", note="", reason=resampling.missing_interval(values_S, SET))


def _missing(values_SQ: Floats, clusters_C: Floats, over: Over, scale: float) -> str:
    """Why there is no interval for the population; "" if there is one."""
    if over != "both":
        return resampling.missing_interval(clusters_C, SET if over == "sets" else ITEM, scale=scale)
    sets, items = values_SQ.shape
    few = resampling.too_few(sets, SET) or resampling.too_few(items, ITEM)
    return few or resampling.missing_interval(values_SQ.ravel(), "outcome", scale=scale)


def _over_clusters(
    clusters_C: Floats, over: Over, method: Method, level: float, null: float, draws: int, seed: int
) -> _Interval:
    """The interval over sets or over items, by the method, or by t if there are too few sign vectors."""
    count, notes = len(clusters_C), []
    column_C1 = clusters_C[:, None]
    if method == "wild" and not resampling.enough_signs(count, level, draws):
        method = "t"
        notes.append(
            f"{count} {over} have {2**count} sign vectors, too few for level {level:g}; t instead, "
            "which takes their means for nearly normal"
        )
    differing = count - int(np.unique(clusters_C, return_counts=True)[1].max())
    if over == "items" and 0 < differing < _FEW:
        notes.append(f"only {differing} items differ from the rest: the interval is too narrow; lean on an exact test")
    if method == "wild":
        ends = resampling.wild(column_C1, level=level, null=null, draws=draws, seed=seed)
        signs = f"all {2**count}" if resampling.enumerable(count, draws) else str(draws)
        name = f"wild cluster bootstrap, {signs} sign vectors"
    elif method == "bootstrap_t":
        ends = resampling.bootstrap_t(column_C1, level=level, null=null, draws=draws, seed=seed)
        name = f"studentised cluster bootstrap, {draws} resamples"
    else:
        ends = resampling.student_t(column_C1, level=level, null=null)
        name = f"t with {count - 1} degrees of freedom over clusters"
    low, high, p_value = (float(numbers_N[0]) for numbers_N in ends)
    se = float(clusters_C.std(ddof=1) / np.sqrt(count))
    return _Interval(low, high, p_value, se, name, tuple(notes))


def _check(over: str, method: str, level: float, draws: int) -> None:
    if over not in get_args(Over):
        raise unknown_choice("population", over, get_args(Over))
    if method not in get_args(Method):
        raise unknown_choice("method", method, get_args(Method))
    if over == "both" and method != "wild":
        raise SparsortError(f"method={method!r} was given with over='both', which has one method only. Omit method=.")
    check_fraction("level", level)
    if draws < np.ceil(2.0 / (1.0 - level)):
        raise SparsortError(
            f"draws={draws} cannot bound an interval at level {level:g}; expected at least "
            f"{int(np.ceil(2.0 / (1.0 - level)))}."
        )


def numbers(given: ArrayLike, name: str, axes: str) -> Floats:
    """Convert `given` to floats, and check that it has one axis for each letter of `axes`, no empty axis, and finite values.

    Raises:
        SparsortError: it does not; `name` is its name in the message.
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
            f"{name} has {values[place]} at {place}; expected finite numbers. Every set must have an outcome for every "
            "item: omit the item, or finish the run."
        )
    return values


def check_fraction(name: str, given: float) -> None:
    """Raise a SparsortError unless `given`, which the caller names `name`, is strictly between 0 and 1."""
    if not 0.0 < given < 1.0:
        raise SparsortError(f"{name}={given!r}; expected a number between 0 and 1, ends excluded.")
