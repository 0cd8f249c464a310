"""The statistics of an ordering ablation: difference to the mean random order, accuracy, rank, McNemar, Holm.

Contract: pure NumPy and SciPy, seeded; knows no model. Takes outcomes on S demonstration sets and the same Q items in each.

What a result here does and does not say:
- An arm is compared with the mean over R random orders of the same sets, never with one of them: one random order is a
  draw from a spread of many points, and a difference to it is mostly that draw. That R is finite adds to the spread
  between sets and is in the interval.
- Sets are the sample. Items are the same in every set, so Q items times S sets are not Q·S observations. By default the
  interval is about other sets asked these items; over="both" is about other items too.
- An arm that was picked by its accuracy on these items (an oracle) beats the mean random order even if order means nothing.
  Its difference is the height of a ceiling; its p-value tests nothing, and it belongs in no Holm family.
- Intervals are 95 % each, not jointly. Holm's correction is for the family of arms that one claim is picked from. Cells
  (tasks, shots, with and without contextual calibration) share items or sets and are not independent replications.
- No interval from ten sets knows of a rare collapse (one set in twenty, say) that none of the ten met.
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
    """What an arm gains over the mean random order of the same sets, or over another arm, paired by set and item.

    d_s = (1/Q) Σ_q (x_sq − (1/R) Σ_r y_rsq), the value is the mean of d_s, and the interval and test take the d_s for their
    observations (see `estimate`, and `resampling.wild` for the default). Averaging over sets and items of one (s, q) table
    keeps the pairing whole; with `over="items"` the same differences are averaged over sets first.

    An arm that is itself one of the R orders is inside the mean it is compared with: d is (1 − 1/R) of its difference to
    the other orders. This shrinks value and interval alike and leaves the test as it is.

    Args:
        arm_SQ: (S, Q) correct or not, or any number per item.
        other: (R, S, Q) the random orders, or (S, Q) another arm.
        over: the population, see `estimate`.
        method: of the interval, see `estimate`.
        level: nominal coverage.
        draws: sign vectors or resamples.
        seed: of the draws.

    Raises:
        SparsortError: shapes that do not fit, or values that are not finite.
    """
    arm = numbers(arm_SQ, "arm", "SQ")
    three = np.ndim(other) == 3
    against = numbers(other, "random orders" if three else "other arm", "RSQ" if three else "SQ")
    _same_cells(arm, against)
    found = estimate(
        arm - (against.mean(axis=0) if three else against),
        over=over,
        method=method,
        level=level,
        draws=draws,
        seed=seed,
        scale=max(float(np.abs(arm).max()), float(np.abs(against).max())),
    )
    if over != "items" and len(arm) > 1 and (arm == arm[0]).all():
        note = (
            f"this arm has the same outcomes in all {len(arm)} sets: if they hold the same demonstrations, they are one set, "
            "and only over='items' is honest"
        )
        found = dataclasses.replace(found, note="; ".join(filter(None, [found.note, note])))
    return found


def accuracy(
    correct_SQ: ArrayLike,
    *,
    over: Over = "sets",
    method: Method = "wild",
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Mean accuracy of an arm with its interval, cut to [0, 1]; no test (p is NaN).

    Two arms whose intervals overlap may well differ: the pairing is lost here. Use `difference` to compare.

    Args:
        correct_SQ: (S, Q) in [0, 1]: correct or not; for the mean random order, the mean over R of (R, S, Q).
        over, method, level, draws, seed: see `estimate`.

    Raises:
        SparsortError: a bad shape, or a value outside [0, 1].
    """
    correct = numbers(correct_SQ, "correct", "SQ")
    if correct.min() < 0 or correct.max() > 1:
        raise SparsortError(
            f"accuracy of values between {correct.min():g} and {correct.max():g}; expected [0, 1]. For another number per "
            "item use estimate(...)."
        )
    return _cut(estimate(correct, over=over, method=method, level=level, null=np.nan, draws=draws, seed=seed))


def rank(
    arm_SQ: ArrayLike,
    random_RSQ: ArrayLike,
    *,
    method: Method = "wild",
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Where an arm stands among the random orders: the share that it beats, ties counting half, averaged over sets.

    u_s = (#{r: ȳ_rs < x̄_s} + ½ #{r: ȳ_rs = x̄_s}) / R, as a percentile in [0, 1]; 0.5 is a random order, and the p-value
    tests that. If the arm is no better than one more random draw, u_s is, ties aside, symmetric about 0.5 whatever the
    spread over orders looks like, so this test is right where few, far-off orders make differences in accuracy skewed. An
    arm that is itself one of the R orders ties with itself: u_s then lies in [1/2R, 1 − 1/2R], still about 0.5. With fewer
    than three sets, or the same place in all of them, there is no interval (NaN) and `reason` says so.

    Raises:
        SparsortError: shapes that do not fit, or values that are not finite.
    """
    arm, random = numbers(arm_SQ, "arm", "SQ"), numbers(random_RSQ, "random orders", "RSQ")
    _same_cells(arm, random)
    gap_RS = arm.mean(axis=1) - random.mean(axis=2)
    tie = _TIE * max(1.0, float(np.abs(random).max()))
    share_S = np.where(np.abs(gap_RS) <= tie, 0.5, gap_RS > 0).mean(axis=0)
    return _cut(estimate_sets(share_S, method=method, level=level, null=0.5, draws=draws, seed=seed))


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """McNemar's test of two arms on one set. `first_only` items only the first got right, `second_only` only the second.

    `p_mid` is the one to read: the exact p never rejects too often and nearly always too seldom (Fagerland, Lydersen and
    Laake 2013); `p_exact` is for where a guarantee is wanted. Both are NaN, with a `reason`, where no item tells the arms apart.
    """

    first_only: int
    second_only: int
    items: int
    p_exact: float
    p_mid: float
    reason: str = ""


def mcnemar(first_Q: ArrayLike, second_Q: ArrayLike) -> McNemar:
    """McNemar's test, exact and mid-p, for two arms on ONE demonstration set: are they right equally often on items like these?

    With b items that only the first arm got right, c only the second, X ~ Binomial(b + c, ½) and t = |b − c|:
    p_exact = P(|2X − b − c| ≥ t), p_mid = P(|2X − b − c| > t) + ½ P(|2X − b − c| = t). Without discordant items nothing is
    tested: both are NaN.

    It says nothing of other sets. Counts summed over sets are no McNemar table, as one item comes back in each and a set
    moves all of its items: use `clustered_mcnemar`. Against the mean over random orders, use `difference`.

    Args:
        first_Q: (Q,) correct or not.
        second_Q: (Q,) the same items.

    Raises:
        SparsortError: several sets, unequal lengths, or values other than 0 and 1.
    """
    if np.ndim(first_Q) == 2 and np.shape(first_Q)[0] > 1:
        raise SparsortError(
            f"mcnemar was given {np.shape(first_Q)[0]} demonstration sets, whose counts are not independent. Use "
            "clustered_mcnemar(first, second), or give one set."
        )
    first, second = _yes_or_no(np.atleast_2d(first_Q), "first arm"), _yes_or_no(np.atleast_2d(second_Q), "second arm")
    _same_cells(first, second)
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    p_exact = p_mid = np.nan
    if discordant:
        at = float(
            np.exp(-np.log(discordant + 1.0) - betaln(discordant - fewer + 1, fewer + 1) - discordant * np.log(2))
        )
        tail = float(bdtr(fewer, discordant, 0.5))
        p_exact = min(1.0, 2.0 * tail)
        p_mid = 1.0 - at / 2.0 if only_first == only_second else 2.0 * tail - at
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
    """Two arms over several sets: (S,) discordant counts of each, Durkalski's χ² with its p, and the p to use.

    All three are NaN, with a `reason`, where the sets allow no test: fewer than three, or sets that do not differ.
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

    χ² = (Σ_s (b_s − c_s))² / Σ_s (b_s − c_s)², on one degree of freedom (Durkalski et al. 2003; Obuchowski 1998 with the
    variance under the null): sets may correlate within, and outcomes need no model. Its χ² law wants many sets and with 10
    rejects at 4.2 % for a nominal 5; so `p_value` refers the same statistic to its sign vectors over sets, which never
    rejects too often if b_s − c_s is symmetric under the null, and is the p-value of `difference(first, second)`. Fewer than
    7 sets: t. Fewer than 3, or the same b_s − c_s in all of them: no test.

    Raises:
        SparsortError: one set only (use `mcnemar`), unequal shapes, or values other than 0 and 1.
    """
    first, second = _yes_or_no(first_SQ, "first arm"), _yes_or_no(second_SQ, "second arm")
    _same_cells(first, second)
    if len(first) == 1:
        raise SparsortError("clustered_mcnemar was given one demonstration set; expected at least 2. Use mcnemar(...).")
    only_first, only_second = (first & ~second).sum(axis=1), (~first & second).sum(axis=1)
    gain_S = (only_first - only_second).astype(np.float64)
    found = estimate(first.astype(np.float64) - second, draws=draws, seed=seed)
    chi2 = np.nan if found.reason else float(gain_S.sum()) ** 2 / float((gain_S**2).sum())
    return ClusteredMcNemar(
        first_only=only_first,
        second_only=only_second,
        chi2=chi2,
        p_chi2=float(chdtrc(1, chi2)),
        p_value=found.p_value,
        method=found.method,
        reason=found.reason,
    )


def holm(p_M: ArrayLike) -> Floats:
    """Holm's (1979) step-down adjusted p-values, (M,), in the given order: max over j ≤ i of min(1, (m − j + 1) p_(j)).

    Rejecting where the adjusted p is below α keeps the chance of any false rejection below α, however the tests depend on
    one another (arms share sets, items and random orders). A NaN stays NaN and does not count in m: no test was made. Where
    the claim is picked from hypotheses that include untestable ones, give those 1, which counts them and rejects none.

    Raises:
        SparsortError: not one-dimensional, or a value outside [0, 1].
    """
    p = np.asarray(p_M, dtype=np.float64)
    if p.ndim != 1 or bool(((p < 0) | (p > 1)).any()):
        raise SparsortError(f"holm was given {p.tolist()}; expected a list of p-values in [0, 1] (NaN for no test).")
    tested = np.flatnonzero(~np.isnan(p))
    ascending = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    steps = np.arange(len(tested), 0, -1)
    adjusted[ascending] = np.minimum(1.0, np.maximum.accumulate(steps * p[ascending]))
    return adjusted


def _yes_or_no(given: ArrayLike, name: str) -> NDArray[np.bool_]:
    values = numbers(given, name, "SQ")
    if not np.isin(values, (0.0, 1.0)).all():
        raise SparsortError(
            f"{name} holds values other than 0 and 1; McNemar's test counts right and wrong. Use difference(...) for numbers."
        )
    return values.astype(np.bool_)


def _same_cells(arm_SQ: NDArray[np.generic], other: NDArray[np.generic]) -> None:
    if arm_SQ.shape != other.shape[-2:]:
        raise SparsortError(
            f"an arm of shape {arm_SQ.shape} was compared with {other.shape}; expected the same demonstration sets and items "
            "in both: (S, Q) with (S, Q) or (R, S, Q)."
        )


def _cut(found: Estimate) -> Estimate:
    return dataclasses.replace(found, low=float(np.maximum(found.low, 0.0)), high=float(np.minimum(found.high, 1.0)))
