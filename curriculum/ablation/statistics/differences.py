"""The statistics of an ordering ablation: difference from the mean random order, accuracy, rank, McNemar's test, Holm's
correction.

Contract: pure and seeded, with NumPy and SciPy only. The input is outcomes on S demonstration sets, with the same Q items in
each.

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

Shapes: S demonstration sets, Q test items, R random orders of each set, M hypotheses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaln, chdtrc

from sparsort.curriculum.ablation.statistics.estimates import Estimate, Method, Over, estimate, estimate_sets, numbers
from sparsort.curriculum.ablation.statistics.resampling import DRAWS, Floats
from sparsort.errors import SparsortError

# Accuracies that differ by less than this, relative to their size, are equal up to rounding.
_TIE = 1e-12


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


def holm(p_M: ArrayLike) -> Floats:
    """Holm's (1979) step-down adjusted p-values, (M,), in the given order: max over j ≤ i of min(1, (m − j + 1) p_(j)).

    If hypotheses with an adjusted p below α are rejected, the probability of any false rejection is below α, however the tests
    depend on each other (arms share sets, items and random orders). A NaN stays NaN and does not count in m, because there was no
    test. If the claim is chosen from hypotheses that include untestable ones, pass 1 for those, so that they count in m.

    Raises:
        SparsortError: the array is not one-dimensional, or a value is outside [0, 1].
    """
    p = np.asarray(p_M, dtype=np.float64)
    if p.ndim != 1 or bool(((p < 0) | (p > 1)).any()):
        raise SparsortError(f"holm was given {p.tolist()}; expected a list of p-values in [0, 1] (NaN for no test).")
    # NaN means that there was no test.
    tested = np.flatnonzero(~np.isnan(p))
    ascending = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    steps = np.arange(len(tested), 0, -1)
    # The running maximum keeps the adjusted values in the order of the p-values.
    adjusted[ascending] = np.minimum(1.0, np.maximum.accumulate(steps * p[ascending]))
    return adjusted


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
