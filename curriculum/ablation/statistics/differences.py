"""The statistics of an ordering ablation: difference from the mean random order, accuracy, rank, McNemar's test, and the spread
over random orders.

Contract: pure and seeded. The input is outcomes on S demonstration sets, with the same Q items in each.

How to read the results:
- An arm is compared with the mean over R random orders of the same sets, never with a single one. Random orders differ by many
  points, so a difference from one of them depends mostly on which one was drawn. That R is finite adds to the spread between
  sets, and is included in the interval.
- The sets are the sample. Items are the same in every set, so Q items times S sets are not Q·S observations. By default the
  interval is for other sets with these items; over="both" also generalises to other items.
- An arm that was chosen by its accuracy on these items (an oracle) beats the mean random order even if order has no effect. Its
  difference is an upper bound. Its p-value tests nothing, and it does not belong into a family for Holm's correction.
- Each interval covers 95 % on its own, not jointly with others. Holm's correction is for the family of arms from which one
  claim is chosen. Cells (tasks, shots, with and without contextual calibration) share items or sets and are no independent
  replications.
- Ten sets cannot show a rare collapse, say in one set out of twenty, that happens to occur in no one of them.
- Fewer than three sets, or sets that do not differ, allow no interval and no p-value: these are NaN, and `reason` says why.
- Even if all orders were equally good, they would differ in accuracy on Q items by chance. The order variance of `spread` is the
  part that would remain on endless items. It is unbiased, so a small one may be estimated below zero; it is not clipped, because
  clipped estimates are biased when they are averaged over tasks. Shares are clipped to [0, 1].

Shapes: S demonstration sets, Q test items, R random orders of each set, K quantiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaln, chdtrc

from sparsort.curriculum.ablation.statistics.estimates import Estimate, Method, Over, estimate, estimate_sets, numbers
from sparsort.curriculum.ablation.statistics.resampling import DRAWS, Floats
from sparsort.errors import SparsortError

# Accuracies that differ by less than this, relative to their size, are equal up to rounding.
_TIE = 1e-12
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def difference(
    arm_SQ: ArrayLike,
    other: ArrayLike,
    *,
    over: Over = "sets",
    method: Method = "wild",
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The gain of an arm over the mean random order of the same sets, or over another arm, paired by set and item.

    d_s = (1/Q) Σ_q (x_sq − (1/R) Σ_r y_rsq). The value is the mean of d_s, and the d_s are the observations of the interval and
    the test (see `estimate`, and `resampling.wild` for the default). With `over="items"` the same differences are averaged over
    sets instead.

    An arm that is itself one of the R orders is part of the mean with which it is compared, so d is (1 − 1/R) times its
    difference from the other orders. Value and interval shrink alike, and the test does not change.

    Args:
        arm_SQ: (S, Q) correct or not, or any number per item.
        other: (R, S, Q) the random orders, or (S, Q) another arm.
        over, method, level, draws, seed: see `estimate`.

    Raises:
        SparsortError: the shapes do not fit, or a value is not finite.
    """
    arm = numbers(arm_SQ, "arm", "SQ")
    is_random = np.ndim(other) == 3
    reference = numbers(other, "random orders" if is_random else "other arm", "RSQ" if is_random else "SQ")
    _check_shapes(arm, reference)
    result = estimate(
        arm - (reference.mean(axis=0) if is_random else reference),
        over=over,
        method=method,
        level=level,
        draws=draws,
        seed=seed,
        scale=max(float(np.abs(arm).max()), float(np.abs(reference).max())),
    )
    if over != "items" and len(arm) > 1 and (arm == arm[0]).all():
        note = (
            f"this arm has the same outcomes in all {len(arm)} sets: if they have the same demonstrations, they are one set, "
            "and only over='items' is honest"
        )
        result = dataclasses.replace(result, note="; ".join(filter(None, [result.note, note])))
    return result


def accuracy(
    correct_SQ: ArrayLike,
    *,
    over: Over = "sets",
    method: Method = "wild",
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The mean accuracy of an arm with its interval, clipped to [0, 1]; no test (p is NaN).

    Two arms may differ although their intervals overlap, because the pairing is lost here. Use `difference` to compare arms.

    Args:
        correct_SQ: (S, Q) in [0, 1]: correct or not; for the mean random order, the mean over R of (R, S, Q).
        over, method, level, draws, seed: see `estimate`.

    Raises:
        SparsortError: the shape is wrong, or a value is outside [0, 1].
    """
    correct = numbers(correct_SQ, "correct", "SQ")
    if correct.min() < 0 or correct.max() > 1:
        raise SparsortError(
            f"accuracy of values between {correct.min():g} and {correct.max():g}; expected [0, 1]. For another number per "
            "item use estimate(...)."
        )
    return _clip(estimate(correct, over=over, method=method, level=level, null=np.nan, draws=draws, seed=seed))


def rank(
    arm_SQ: ArrayLike,
    random_RSQ: ArrayLike,
    *,
    method: Method = "wild",
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The rank of an arm among the random orders: the share of them that it beats (ties count half), averaged over sets.

    u_s = (#{r: ȳ_rs < x̄_s} + ½ #{r: ȳ_rs = x̄_s}) / R is in [0, 1]. The p-value tests 0.5, the expected rank of a random
    order. If the arm is no better than a random draw, u_s is symmetric about 0.5 apart from ties, whatever the distribution
    over orders. The test is therefore valid even if a few outlying orders skew the differences in accuracy. An arm that is
    itself one of the R orders ties with itself, so u_s is in [1/2R, 1 − 1/2R], still symmetric about 0.5. With fewer than
    three sets, or the same rank in all of them, there is no interval (NaN), and `reason` says so.

    Raises:
        SparsortError: the shapes do not fit, or a value is not finite.
    """
    arm, random = numbers(arm_SQ, "arm", "SQ"), numbers(random_RSQ, "random orders", "RSQ")
    _check_shapes(arm, random)
    gap_RS = arm.mean(axis=1) - random.mean(axis=2)
    tie = _TIE * max(1.0, float(np.abs(random).max()))
    share_S = np.where(np.abs(gap_RS) <= tie, 0.5, gap_RS > 0).mean(axis=0)
    return _clip(estimate_sets(share_S, method=method, level=level, null=0.5, draws=draws, seed=seed))


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """McNemar's test of two arms on one set. `first_only` is the number of items that only the first arm got right.

    `p_mid` is recommended: the exact p never rejects too often, but nearly always too rarely (Fagerland, Lydersen and Laake
    2013). `p_exact` is for cases that require a guarantee. Both are NaN, with a `reason`, if the arms do not differ on any item.
    """

    first_only: int
    second_only: int
    items: int
    p_exact: float
    p_mid: float
    reason: str = ""


def mcnemar(first_Q: ArrayLike, second_Q: ArrayLike) -> McNemar:
    """McNemar's test, exact and mid-p, for two arms on ONE demonstration set: are they equally accurate on items like these?

    With b items that only the first arm got right, c that only the second did, X ~ Binomial(b + c, ½) and t = |b − c|:
    p_exact = P(|2X − b − c| ≥ t), p_mid = P(|2X − b − c| > t) + ½ P(|2X − b − c| = t). Without discordant items there is no
    test, and both are NaN.

    The result does not generalise to other sets. Counts summed over sets are no McNemar table, because every item occurs in each
    set, and a set affects all of its items: use `clustered_mcnemar`. To compare with the mean random order, use `difference`.

    Args:
        first_Q: (Q,) correct or not.
        second_Q: (Q,) the same items.

    Raises:
        SparsortError: there are several sets, the lengths differ, or a value is not 0 or 1.
    """
    if np.ndim(first_Q) == 2 and np.shape(first_Q)[0] > 1:
        raise SparsortError(
            f"mcnemar was given {np.shape(first_Q)[0]} demonstration sets, whose counts are not independent. Use "
            "clustered_mcnemar(first, second), or give one set."
        )
    first, second = _booleans(np.atleast_2d(first_Q), "first arm"), _booleans(np.atleast_2d(second_Q), "second arm")
    _check_shapes(first, second)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    p_exact = p_mid = np.nan
    if discordant:
        # The binomial probability of exactly `fewer`, through logarithms because the coefficient overflows.
        log_coefficient = -np.log(discordant + 1.0) - betaln(discordant - fewer + 1, fewer + 1)
        point = float(np.exp(log_coefficient - discordant * np.log(2)))
        tail = float(bdtr(fewer, discordant, 0.5))
        p_exact = min(1.0, 2.0 * tail)
        # Both tails contain the point, which counts half in each. With equal counts, the two tails share one point.
        p_mid = 1.0 - point / 2.0 if only_first == only_second else 2.0 * tail - point
    return McNemar(
        first_only=only_first,
        second_only=only_second,
        items=first.size,
        p_exact=p_exact,
        p_mid=p_mid,
        reason="" if discordant else f"the arms do not differ on any of {first.size} test items, which allows no test",
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusteredMcNemar:
    """Two arms over several sets: (S,) discordant counts of each, Durkalski's χ² with its p-value, and the p-value to use.

    All three are NaN, with a `reason`, if there are fewer than three sets, or sets that do not differ.
    """

    first_only: NDArray[np.int64]
    second_only: NDArray[np.int64]
    chi2: float
    p_chi2: float
    p_value: float
    method: str
    reason: str = ""


def clustered_mcnemar(
    first_SQ: ArrayLike, second_SQ: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> ClusteredMcNemar:
    """McNemar's test for several demonstration sets: do two arms differ on these items, over sets drawn like these?

    χ² = (Σ_s (b_s − c_s))² / Σ_s (b_s − c_s)², with one degree of freedom (Durkalski et al. 2003; Obuchowski 1998 with the
    variance under the null). Outcomes within a set may be correlated in any way. The χ² distribution is only asymptotic: with 10
    sets it rejects at 4.2 % for a nominal 5. `p_value` therefore compares the same statistic with its values over all sign
    vectors of the sets. It never rejects too often if b_s − c_s is symmetric under the null, and equals the p-value of
    `difference(first, second)`. With fewer than 7 sets it is a t test. With fewer than 3 sets, or the same b_s − c_s in all of
    them, there is no test.

    Raises:
        SparsortError: there is only one set (use `mcnemar`), the shapes differ, or a value is not 0 or 1.
    """
    first, second = _booleans(first_SQ, "first arm"), _booleans(second_SQ, "second arm")
    _check_shapes(first, second)
    if len(first) == 1:
        raise SparsortError("clustered_mcnemar was given one demonstration set; expected at least 2. Use mcnemar(...).")
    only_first, only_second = (first & ~second).sum(axis=1), (~first & second).sum(axis=1)
    gain_S = (only_first - only_second).astype(np.float64)
    result = estimate(first.astype(np.float64) - second, draws=draws, seed=seed)
    chi2 = np.nan if result.reason else float(gain_S.sum()) ** 2 / float((gain_S**2).sum())
    return ClusteredMcNemar(
        first_only=only_first,
        second_only=only_second,
        chi2=chi2,
        p_chi2=float(chdtrc(1, chi2)),
        p_value=result.p_value,
        method=result.method,
        reason=result.reason,
    )


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance components of one outcome, y_rsq = μ + set_s + order_r(s) + item_q + (set × item)_sq + rest_rsq.

    Orders are nested in sets (order r of one set is unrelated to order r of another), and items are crossed with both. With one
    set, all components but `order` and `rest` are NaN.

    Attributes:
        order: variance of the true accuracy over the orders of a set.
        sets: variance of the true accuracy over sets, averaged over their orders.
        items: variance of the difficulty of an item.
        sets_by_items: variance of the interaction of set and item.
        rest: variance of the interaction of order and item, including randomness of the answers. The item noise in an accuracy
            is rest / Q.
    """

    order: float
    sets: float
    items: float
    sets_by_items: float
    rest: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """The spread of accuracies (or other means) over R random orders, for each set and by its causes.

    Attributes:
        mean, sd, low, high: (S,) over the set's orders; sd with R − 1. `low` and `high` are the minimum and maximum of R values,
            so they move apart as R grows. Compare them only at equal R.
        levels: the levels of the K quantiles.
        quantiles: (S, K).
        observed_sd: square root of the mean of sd² over sets.
        item_noise_sd: square root of rest / Q: the sd over orders that is due to Q being finite. It is smaller than the binomial
            √(p(1 − p) / Q), because all orders answer the same items.
        order_sd: square root of the order variance, or 0 if that is negative: the sd over orders on endless items.
        real_share: order variance / observed_sd², clipped to [0, 1]; NaN if all orders have the same mean. The denominator is
            the sum of order variance and item noise.
        order_variance: with its interval over sets and a test against zero, unless there are fewer than three sets or all are
            equal.
        components: the variance components of one outcome.
    """

    mean: Floats
    sd: Floats
    low: Floats
    high: Floats
    levels: tuple[float, ...]
    quantiles: Floats
    observed_sd: float
    item_noise_sd: float
    order_sd: float
    real_share: float
    order_variance: Estimate
    components: Components


def spread(random_RSQ: ArrayLike, *, levels: Sequence[float] = QUANTILES) -> Spread:
    """The spread over random orders of a set, with unbiased variance components of orders, sets and items.

    Per set, with a_r the mean of order r over items: v = Σ_r (a_r − ā)² / (R − 1) has expectation σ²_order + σ²_rest / Q, and
    e = Σ_rq (y_rq − ȳ_r. − ȳ_.q + ȳ)² / ((R − 1)(Q − 1)) has expectation σ²_rest; so v − e / Q is unbiased for σ²_order, for
    0/1 outcomes as for any others. Its mean over sets is the ANOVA estimator (Searle, Casella and McCulloch 1992, ch. 4), and
    the sets give its interval. Sets and items follow from the mean squares of the same layout (see `Components`):
    σ²_set = (MS_set − MS_order − MS_set×item + MS_rest) / RQ, σ²_set×item = (MS_set×item − MS_rest) / R,
    σ²_item = (MS_item − MS_set×item) / RS.

    If orders are drawn without replacement from the k! of a set, this is unbiased for the σ²_order with denominator k! − 1.

    Args:
        random_RSQ: (R, S, Q) correct or not, or any number; R and Q at least 2.
        levels: levels of the quantiles over the orders of a set, which are interpolated linearly.

    Raises:
        SparsortError: there are fewer than two orders or items, the shape is wrong, or a level is outside [0, 1].
    """
    values = numbers(random_RSQ, "random orders", "RSQ")
    orders, _, items = values.shape
    if orders < 2 or items < 2:
        raise SparsortError(
            f"the spread over random orders was asked for with {orders} orders of {items} items; expected at least 2 of each. "
            "Score more random orders, or more items."
        )
    if not levels or min(levels) < 0 or max(levels) > 1:
        raise SparsortError(f"quantile levels {list(levels)}; expected numbers in [0, 1].")
    mean_RS = values.mean(axis=2)
    mean_S, mean_SQ = mean_RS.mean(axis=0), values.mean(axis=0)
    sd_S = mean_RS.std(axis=0, ddof=1)
    # Residuals of the two-way layout of orders and items within each set.
    rest = values - mean_RS[:, :, None] - mean_SQ + mean_S[:, None]
    rest_S = (rest**2).sum(axis=(0, 2)) / ((orders - 1) * (items - 1))
    # The observed variance minus the item noise. This is unbiased, so it may be negative.
    order_S = sd_S**2 - rest_S / items
    observed, order, noise = float((sd_S**2).mean()), float(order_S.mean()), float(rest_S.mean()) / items
    # Equal means differ by rounding, so their variance is compared with the scale of the values and not with 0.
    same_means = observed <= (_TIE * float(np.abs(values).max())) ** 2
    return Spread(
        mean=mean_S,
        sd=sd_S,
        low=mean_RS.min(axis=0),
        high=mean_RS.max(axis=0),
        levels=tuple(levels),
        quantiles=np.quantile(mean_RS, levels, axis=0).T,
        observed_sd=float(np.sqrt(observed)),
        item_noise_sd=float(np.sqrt(noise)),
        order_sd=float(np.sqrt(np.maximum(order, 0.0))),
        real_share=np.nan if same_means else float(np.clip(order / observed, 0.0, 1.0)),
        order_variance=estimate_sets(order_S, scale=float(np.abs(values).max()) ** 2),
        components=_components(mean_SQ, orders, order, float(rest_S.mean())),
    )


def _components(mean_SQ: Floats, orders: int, order: float, rest: float) -> Components:
    sets, items = mean_SQ.shape
    # One set says nothing about the variance between sets, nor about items in general.
    of_sets = of_items = of_both = np.nan
    if sets > 1:
        grand = mean_SQ.mean()
        by_set_S, by_item_Q = mean_SQ.mean(axis=1), mean_SQ.mean(axis=0)
        both = ((mean_SQ - by_set_S[:, None] - by_item_Q + grand) ** 2).sum() / ((sets - 1) * (items - 1))
        of_both = float(both - rest / orders)
        of_sets = float(by_set_S.var(ddof=1) - order / orders - both / items)
        of_items = float(by_item_Q.var(ddof=1) - both / sets)
    return Components(order=order, sets=of_sets, items=of_items, sets_by_items=of_both, rest=rest)


def _booleans(given: ArrayLike, name: str) -> NDArray[np.bool_]:
    values = numbers(given, name, "SQ")
    if not np.isin(values, (0.0, 1.0)).all():
        raise SparsortError(
            f"{name} has values other than 0 and 1; McNemar's test counts right and wrong. Use difference(...) for numbers."
        )
    return values.astype(np.bool_)


def _check_shapes(arm_SQ: NDArray[np.generic], other: NDArray[np.generic]) -> None:
    if arm_SQ.shape != other.shape[-2:]:
        raise SparsortError(
            f"an arm of shape {arm_SQ.shape} was compared with {other.shape}; expected the same demonstration sets and items "
            "in both: (S, Q) with (S, Q) or (R, S, Q)."
        )


def _clip(result: Estimate) -> Estimate:
    """The estimate with its interval clipped to [0, 1]; NaN stays NaN."""
    return dataclasses.replace(result, low=float(np.maximum(result.low, 0.0)), high=float(np.minimum(result.high, 1.0)))
