"""How many items, or how many demonstration sets, it would take to see a difference.

Contract: pure. Answers are whole numbers as floats, `inf` where no number suffices, NaN where the outcomes do not determine it:
fewer than three sets, or outcomes without spread. No answer is below the three sets that an interval takes.

A plan, not a second test: computed from the difference just found, "power" restates its p-value and says nothing new about
it (Hoenig and Heisey 2001), and a difference that was picked for being large is larger than the truth, so the numbers come
out too small. For the smallest difference that would matter, pass that one. For one of m arms under Holm's correction, pass
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

# From here on t is the normal distribution to all digits that matter.
_NORMAL = 100_000


def items_needed(difference: float, mean_square: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Items to see a paired difference on ONE demonstration set, two-sided (Connor 1987).

    n = (z_{1−α/2} √ψ + z_power √(ψ − δ²))² / δ², for McNemar's test without continuity correction, which its mid-p follows:
    δ the difference in accuracy, ψ the share of discordant items. ψ is the mean square of the paired difference, so the
    formula holds for the difference to a mean over random orders as well, where that is no longer a share.

    Args:
        difference: δ, for two arms (b − c) / Q.
        mean_square: ψ, for two arms (b + c) / Q; at least δ².
        power: chance to see it.
        alpha: two-sided level.

    Raises:
        SparsortError: ψ < δ² (no such data), or a power or level outside (0, 1).
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
    """Chance that a two-sided t test over set means sees `difference`: noncentral t with S − 1 degrees, centred at δ√S / sd.

    The default test, `resampling.wild`, has no closed form; at a power of 80 % it was 4 points short of this with 7 sets, 2 with
    8, and less than 1 from 10 on.
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
    """Demonstration sets to see a difference, each with the same items as before: the least S whose `power_of_sets` suffices.

    Args:
        difference: δ to be seen.
        sd: between sets of the paired difference d_s (their sampling of items included); `Estimate.per_set.std(ddof=1)`.
        power: chance to see it.
        alpha: two-sided level.

    Raises:
        SparsortError: numbers that are not finite, an sd that is not above 0, or a power or level outside (0, 1).
    """
    _check(power, alpha)
    _check_sd(difference, sd)
    if difference == 0:
        return math.inf
    z = float(ndtri(1 - alpha / 2) + ndtri(power))
    if (nearly := (z * sd / difference) ** 2) > _NORMAL:
        return float(math.ceil(nearly))
    high = MIN_CLUSTERS
    if power_of_sets(difference, sd, high, alpha=alpha) >= power:
        return float(high)
    while power_of_sets(difference, sd, high, alpha=alpha) < power:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of_sets(difference, sd, middle, alpha=alpha) >= power else (middle, high)
    return float(high)


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What it would take to see `difference` with `power` at `alpha`, two-sided.

    Attributes:
        difference: that is to be seen.
        power, alpha: as asked.
        between_sd: true sd of the difference between sets, on endless items; 0 where its variance came out negative.
        within_sd: sd of one item's difference about its set's, beyond what the item does in every set.
        sets: demonstration sets at the present Q items; NaN where `reason` says why.
        items: items per set at the present S sets, `inf` where S sets are too few however many items they are asked; from
            one set, items for that set alone (Connor). NaN where `reason_items` says why.
        reason, reason_items: why the number is NaN, "" where it is not.
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
    """Sets or items to see a difference over sets, from paired differences per set and item.

    The variance of d_s is τ² + ν²/Q. ν² is the interaction mean square of the S × Q table and τ² = var(d_s) − ν²/Q, both
    unbiased. More sets shrink both parts, more items the second alone. With t's noncentrality λ at which S − 1 degrees
    reach the power, items = ν² / (S (δ/λ)² − τ²); without a positive denominator no number of items will do. With fewer than
    three sets, or sets that do not differ, the numbers are NaN; from one set, `items` is for that set alone.

    Args:
        values_SQ: (S, Q) an arm minus the mean over random orders, or minus another arm.
        difference: that is to be seen; the mean of the values if None.
        power: chance to see it.
        alpha: two-sided level.

    Raises:
        SparsortError: a bad shape or number, or a power or level outside (0, 1).
    """
    _check(power, alpha)
    values = numbers(values_SQ, "values", "SQ")
    delta = float(values.mean()) if difference is None else float(difference)
    nothing = Needed(
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
        return _for_one_set(values[0], replace(nothing, reason=reason))
    if reason:
        return replace(nothing, reason=reason, reason_items=reason)
    return _for_sets(values, by_set_S, replace(nothing, reason_items=_same_items(values, scale)))


def _for_one_set(values_Q: Floats, found: Needed) -> Needed:
    """Items for this set alone: the interval is over items, so these are the clusters that have to differ."""
    if reason := missing_interval(values_Q, ITEM):
        return replace(found, reason_items=reason)
    spread = float(values_Q.var(ddof=1))
    items = items_needed(found.difference, spread + found.difference**2, power=found.power, alpha=found.alpha)
    return replace(found, within_sd=math.sqrt(spread), items=items)


def _for_sets(values_SQ: Floats, by_set_S: Floats, found: Needed) -> Needed:
    sets, items = values_SQ.shape
    total = float(by_set_S.var(ddof=1))
    found = replace(found, sets=sets_needed(found.difference, math.sqrt(total), power=found.power, alpha=found.alpha))
    if found.reason_items:
        return found
    within = _interaction(values_SQ)
    between = max(total - within / items, 0.0)
    enough = _items_per_set(found.difference, between, within, sets, found.power, found.alpha)
    return replace(found, between_sd=math.sqrt(between), within_sd=math.sqrt(within), items=enough)


def _interaction(values_SQ: Floats) -> float:
    """Mean square of the interaction of sets and items; at least 2 of each."""
    sets, items = values_SQ.shape
    rest = values_SQ - values_SQ.mean(axis=1, keepdims=True) - values_SQ.mean(axis=0) + values_SQ.mean()
    return float((rest**2).sum() / ((sets - 1) * (items - 1)))


def _same_items(values_SQ: Floats, scale: float) -> str:
    """Why nothing can be said of other numbers of items: one item, or items that differ alike in every set."""
    if values_SQ.shape[1] == 1:
        return "one test item says nothing of other numbers of items"
    if flat(np.array([0.0, math.sqrt(_interaction(values_SQ))]), scale):
        return "test items whose differences are the same in every set say nothing of other numbers of items"
    return ""


def _items_per_set(delta: float, between: float, within: float, sets: int, power: float, alpha: float) -> float:
    if delta == 0:
        return math.inf
    bound = float(stdtrit(sets - 1, 1 - alpha / 2))
    centre = float(nctdtrinc(sets - 1, 1 - power, bound))
    room = sets * (delta / centre) ** 2 - between
    return float(max(math.ceil(within / room - 1e-9), 1)) if room > 0 else math.inf


def _below(bound: float, degrees: int, centre: float) -> float:
    """Noncentral t's distribution function. `nctdtr` underflows to NaN far out in the lower tail, where it is 0."""
    chance = float(nctdtr(degrees, centre, bound))
    return 0.0 if math.isnan(chance) else chance


def _check(power: float, alpha: float) -> None:
    check_fraction("power", power)
    check_fraction("alpha", alpha)
    if power <= alpha:
        raise SparsortError(
            f"power={power!r} with alpha={alpha!r}; expected a power above alpha, which needs no data at all."
        )


def _check_sd(difference: float, sd: float) -> None:
    if not (math.isfinite(difference) and math.isfinite(sd)) or sd <= 0:
        raise SparsortError(
            f"difference={difference!r} with sd={sd!r}; expected finite numbers and an sd above 0: sets that do not differ "
            "allow no test, whatever their number."
        )
