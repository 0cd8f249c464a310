"""The number of items, or of demonstration sets, that is needed to detect a difference.

Contract: pure. Results are whole numbers as floats; `inf` if no number suffices; NaN if the outcomes do not determine it, because
there are fewer than three sets or no spread. At least the three sets that an interval needs are always required.

This is for planning, and not a second test. If power is computed from the difference just found, it restates the p-value and adds
nothing (Hoenig and Heisey 2001). If that difference was selected for being large, it overestimates the truth, and the numbers are
too small. It is better to pass the smallest difference that would matter. For one of m arms under Holm's correction, pass
alpha / m.

Shapes: S demonstration sets, Q test items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import nctdtr, nctdtrinc, ndtr, ndtri, stdtrit

from sparsort.curriculum.ablation.statistics.estimates import ITEM, SET, check_fraction, numbers
from sparsort.curriculum.ablation.statistics.resampling import MIN_CLUSTERS, Floats, flat, missing_interval
from sparsort.errors import SparsortError

# With more sets than this, Student's t and the normal distribution agree to all relevant digits.
_NORMAL = 100_000


def items_needed(difference: float, mean_square: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Items needed to detect a paired difference on ONE demonstration set, two-sided (Connor 1987).

    n = (z_{1−α/2} √ψ + z_power √(ψ − δ²))² / δ², for McNemar's test without continuity correction, to which its mid-p is close.
    δ is the difference in accuracy, and ψ the share of discordant items. Since ψ is the mean square of the paired difference, the
    formula also holds for the difference from a mean over random orders, where ψ is no share.

    Args:
        difference: δ, for two arms (b − c) / Q.
        mean_square: ψ, for two arms (b + c) / Q; at least δ².
        power: probability of detecting the difference.
        alpha: two-sided level.

    Raises:
        SparsortError: ψ < δ², which no data have, or a power or level is outside (0, 1).
    """
    _check(power, alpha)
    if not (math.isfinite(difference) and math.isfinite(mean_square)) or mean_square < difference**2 * (1 - 1e-12):
        raise SparsortError(
            f"difference={difference!r} with mean_square={mean_square!r}; expected finite numbers with mean_square at least "
            "difference² (for two arms, (b + c) / Q is at least |b − c| / Q)."
        )
    if difference == 0:
        return math.inf
    rest = math.sqrt(max(mean_square - difference**2, 0.0))
    root = float(ndtri(1 - alpha / 2)) * math.sqrt(mean_square) + float(ndtri(power)) * rest
    return float(math.ceil(root**2 / difference**2 - 1e-9))


def power_of_sets(difference: float, sd: float, sets: int, *, alpha: float = 0.05) -> float:
    """The power of a two-sided t test over set means: noncentral t with S − 1 degrees of freedom, centred at δ√S / sd.

    The default test, `resampling.wild`, has no closed form. In simulations at a power of 80 %, its power was lower by 4 points
    with 7 sets, by 2 with 8, and by less than 1 with 10 or more.
    """
    check_fraction("alpha", alpha)
    _check_sd(difference, sd)
    if sets < MIN_CLUSTERS:
        raise SparsortError(f"the power of {sets} demonstration sets was asked for; expected at least {MIN_CLUSTERS}.")
    bound, centre = float(stdtrit(sets - 1, 1 - alpha / 2)), abs(difference) * math.sqrt(sets) / sd
    if sets > _NORMAL:
        return float(ndtr(centre - bound) + ndtr(-centre - bound))
    return 1.0 - _below(bound, sets - 1, centre) + _below(-bound, sets - 1, centre)


def sets_needed(difference: float, sd: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Demonstration sets with the same items that are needed to detect a difference: the least S with enough `power_of_sets`.

    Args:
        difference: δ, the difference to detect.
        sd: standard deviation between sets of the paired difference d_s, which includes the sampling of items:
            `Estimate.per_set.std(ddof=1)`.
        power: probability of detecting the difference.
        alpha: two-sided level.

    Raises:
        SparsortError: a number is not finite, the sd is not positive, or a power or level is outside (0, 1).
    """
    _check(power, alpha)
    _check_sd(difference, sd)
    if difference == 0:
        return math.inf
    z = float(ndtri(1 - alpha / 2) + ndtri(power))
    if (normal_sets := (z * sd / difference) ** 2) > _NORMAL:
        return float(math.ceil(normal_sets))
    high = MIN_CLUSTERS
    if power_of_sets(difference, sd, high, alpha=alpha) >= power:
        return float(high)
    # Power rises with the number of sets: double it until it is enough, then bisect.
    while power_of_sets(difference, sd, high, alpha=alpha) < power:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of_sets(difference, sd, middle, alpha=alpha) >= power else (middle, high)
    return float(high)


@dataclass(frozen=True, kw_only=True)
class Needed:
    """The sample size that is needed to detect `difference` with `power` at `alpha`, two-sided.

    Attributes:
        difference: the difference to detect.
        power, alpha: the arguments of `needed`.
        between_sd: sd of the true difference between sets, on endless items; 0 if its estimated variance is negative.
        within_sd: sd of the interaction of set and item.
        sets: demonstration sets with the present Q items; NaN if there is a `reason`.
        items: items for each of the present S sets; `inf` if S sets are too few for any number of items. With one set, items for
            that set alone (Connor). NaN if there is a `reason_items`.
        reason, reason_items: why the number is NaN; "" if it is not.
    """

    difference: float
    power: float
    alpha: float
    between_sd: float
    within_sd: float
    sets: float
    items: float
    reason: str = ""
    reason_items: str = ""


def needed(values_SQ: ArrayLike, *, difference: float | None = None, power: float = 0.8, alpha: float = 0.05) -> Needed:
    """The sets or items needed to detect a difference over sets, from paired differences per set and item.

    The variance of d_s is τ² + ν²/Q. ν² is the interaction mean square of the S × Q table, and τ² = var(d_s) − ν²/Q; both are
    unbiased. More sets reduce both parts, more items only the second. With λ the noncentrality at which t with S − 1 degrees of
    freedom has the power, items = ν² / (S (δ/λ)² − τ²). If the denominator is not positive, no number of items suffices. With
    fewer than three sets, or sets that do not differ, the numbers are NaN. With one set, `items` is for that set alone.

    Args:
        values_SQ: (S, Q) an arm minus the mean over random orders, or minus another arm.
        difference: the difference to detect; the mean of the values if None.
        power: probability of detecting the difference.
        alpha: two-sided level.

    Raises:
        SparsortError: a shape or number is invalid, or a power or level is outside (0, 1).
    """
    _check(power, alpha)
    values = numbers(values_SQ, "values", "SQ")
    delta = float(values.mean()) if difference is None else float(difference)
    unknown = Needed(
        difference=delta,
        power=power,
        alpha=alpha,
        between_sd=math.nan,
        within_sd=math.nan,
        sets=math.nan,
        items=math.nan,
    )
    by_set_S = values.mean(axis=1)
    scale = float(np.abs(values).max())
    reason = missing_interval(by_set_S, SET, scale=scale)
    if len(values) == 1:
        return _for_one_set(values[0], replace(unknown, reason=reason))
    if reason:
        return replace(unknown, reason=reason, reason_items=reason)
    return _for_sets(values, by_set_S, replace(unknown, reason_items=_same_items(values, scale)))


def _for_one_set(values_Q: Floats, goal: Needed) -> Needed:
    """Complete `goal` with the items for this set alone. The interval is over items, so the items have to differ."""
    if reason := missing_interval(values_Q, ITEM):
        return replace(goal, reason_items=reason)
    variance = float(values_Q.var(ddof=1))
    # ψ, the mean square about 0, is the variance plus the squared difference that is to be detected.
    items = items_needed(goal.difference, variance + goal.difference**2, power=goal.power, alpha=goal.alpha)
    return replace(goal, within_sd=math.sqrt(variance), items=items)


def _for_sets(values_SQ: Floats, by_set_S: Floats, goal: Needed) -> Needed:
    """Complete `goal` with the number of sets, and with that of items unless there is a reason why not."""
    sets, items = values_SQ.shape
    total = float(by_set_S.var(ddof=1))
    goal = replace(goal, sets=sets_needed(goal.difference, math.sqrt(total), power=goal.power, alpha=goal.alpha))
    if goal.reason_items:
        return goal
    within = _interaction(values_SQ)
    between = max(total - within / items, 0.0)
    per_set = _items_per_set(goal.difference, between, within, sets, goal.power, goal.alpha)
    return replace(goal, between_sd=math.sqrt(between), within_sd=math.sqrt(within), items=per_set)


def _interaction(values_SQ: Floats) -> float:
    """Mean square of the interaction of sets and items; there must be at least 2 of each."""
    sets, items = values_SQ.shape
    rest = values_SQ - values_SQ.mean(axis=1, keepdims=True) - values_SQ.mean(axis=0) + values_SQ.mean()
    return float((rest**2).sum() / ((sets - 1) * (items - 1)))


def _same_items(values_SQ: Floats, scale: float) -> str:
    """Why the number of items cannot be determined: there is one item, or the items differ equally in every set."""
    if values_SQ.shape[1] == 1:
        return "one test item says nothing about other numbers of items"
    # The root of the interaction is compared with 0, on the scale of the values.
    if flat(np.array([0.0, math.sqrt(_interaction(values_SQ))]), scale):
        return "test items whose differences are the same in every set say nothing about other numbers of items"
    return ""


def _items_per_set(delta: float, between: float, within: float, sets: int, power: float, alpha: float) -> float:
    if delta == 0:
        return math.inf
    bound = float(stdtrit(sets - 1, 1 - alpha / 2))
    noncentrality = float(nctdtrinc(sets - 1, 1 - power, bound))
    # The variance that is left for the items once the sets have had their part.
    room = sets * (delta / noncentrality) ** 2 - between
    # Rounding must not add an item to an exact quotient.
    return float(max(math.ceil(within / room - 1e-9), 1)) if room > 0 else math.inf


def _below(bound: float, degrees: int, centre: float) -> float:
    """The distribution function of noncentral t. `nctdtr` underflows to NaN far in the lower tail, where the value is 0."""
    chance = float(nctdtr(degrees, centre, bound))
    return 0.0 if math.isnan(chance) else chance


def _check(power: float, alpha: float) -> None:
    check_fraction("power", power)
    check_fraction("alpha", alpha)
    if power <= alpha:
        raise SparsortError(
            f"power={power!r} with alpha={alpha!r}; expected a power above alpha, because a test without data has power alpha."
        )


def _check_sd(difference: float, sd: float) -> None:
    if not (math.isfinite(difference) and math.isfinite(sd)) or sd <= 0:
        raise SparsortError(
            f"difference={difference!r} with sd={sd!r}; expected finite numbers and an sd above 0: sets that do not differ "
            "allow no test, whatever their number."
        )
