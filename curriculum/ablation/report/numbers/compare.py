"""The comparisons of a report, in families that are corrected together, computed by `curriculum.ablation.statistics`.

Contract: no statistic is defined here. The test and the adjusted interval of an arm in a family of m come from one call at
level 1 − α/m, so both use the same method: the wild cluster bootstrap, or Student's t if there are too few sign vectors for that
level. Holm's correction then uses these p-values. A number that cannot be computed (fewer than three sets, or no spread) is
None, with the reason next to it. Outcomes are right or wrong, so a difference and its interval are within ±1.

An arm without a p-value counts in m with p = 1. The best arm is picked from the whole family, so an arm that drops out because of
its own outcomes must not make the others look better. The adjusted intervals use the same m.

Shapes: R random orders, S demonstration sets, Q test items, N clusters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.ablation.report.numbers.shape import LEVEL, POWER, Difference
from sparsort.curriculum.ablation.statistics import differences as statistics
from sparsort.curriculum.ablation.statistics import sample_size
from sparsort.curriculum.ablation.statistics.estimates import SET, Estimate, estimate_sets
from sparsort.curriculum.ablation.statistics.resampling import flat, too_few
from sparsort.scoring.calibration.correlation import holm

ALPHA = 1.0 - LEVEL


def cell_family(arms: Sequence[NDArray[Any]], random_RSQ: NDArray[Any]) -> list[Difference]:
    """Compare each arm's outcomes (S, Q) with the mean random order, corrected for the number of arms."""
    strict = ALPHA / max(1, len(arms))
    base_SQ = random_RSQ.mean(axis=0)
    family = []
    for arm_SQ in arms:
        plain = statistics.difference(arm_SQ, random_RSQ, level=LEVEL)
        adjusted = statistics.difference(arm_SQ, random_RSQ, level=1 - strict)
        needed = sample_size.needed(arm_SQ - base_SQ, power=POWER, alpha=strict)
        family.append(_difference(plain, adjusted, strict, needed=needed))
    return _corrected(family)


def pooled_family(arms: Sequence[Sequence[NDArray[np.float64]]]) -> list[Difference]:
    """Each arm's mean gain over tasks, corrected for the number of arms.

    Sets are weighted so that every task counts equally, whatever its number of sets. The interval generalises to other sets of
    these tasks, so it requires three sets in total, and at least one task with gains that differ between its sets.

    Args:
        arms: for each arm, the gains of each task, (sets of the task,).
    """
    strict = ALPHA / max(1, len(arms))
    family = []
    for by_task in arms:
        total = sum(len(gain_S) for gain_S in by_task)
        # With these weights the plain mean over all N sets is the mean over tasks of their means.
        values_N = np.concatenate([gain_S * total / (len(by_task) * len(gain_S)) for gain_S in by_task])
        plain, adjusted = (estimate_sets(values_N, level=level, scale=1.0) for level in (LEVEL, 1 - strict))
        family.append(_difference(plain, adjusted, strict, reason=_missing_over_tasks(by_task)))
    return _corrected(family)


def _missing_over_tasks(by_task: Sequence[NDArray[np.float64]]) -> str:
    # The weighted values of different tasks differ even if the sets within each task do not. Such differences say nothing about
    # the spread over sets.
    if few := too_few(sum(len(gain_S) for gain_S in by_task), SET):
        return few
    if all(len(gain_S) == 1 for gain_S in by_task):
        return f"one {SET} of each task allows no interval"
    if all(flat(gain_S, 1.0) for gain_S in by_task):
        return f"outcomes that do not differ between the {SET}s of any task allow no interval"
    return ""


def change_family(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> list[Difference]:
    """The change of each (on, off) pair of outcomes (S, Q), corrected for the number of pairs."""
    strict = ALPHA / max(1, len(pairs))
    family = []
    for on_SQ, off_SQ in pairs:
        plain, adjusted = (statistics.difference(on_SQ, off_SQ, level=level) for level in (LEVEL, 1 - strict))
        family.append(_difference(plain, adjusted, strict))
    return _corrected(family)


def accuracy(correct_SQ: NDArray[Any]) -> tuple[float, float | None, float | None, str]:
    """Mean accuracy with its interval over sets, and the reason if there is no interval."""
    estimate = statistics.accuracy(correct_SQ, level=LEVEL)
    if reason := _missing_over_sets(estimate):
        return estimate.value, None, None, reason
    return estimate.value, estimate.low, estimate.high, ""


def percentile(arm_SQ: NDArray[Any], random_RSQ: NDArray[Any]) -> float:
    """The mean rank of an arm among the random orders of the same set, 0 to 100."""
    return 100.0 * statistics.rank(arm_SQ, random_RSQ, level=LEVEL).value


def spread_parts(random_RSQ: NDArray[Any]) -> tuple[dict[str, float | None], dict[str, str]]:
    """The spread over random orders under the names of `shape.RandomOrders`, and the reasons for those that are None."""
    orders, sets, items = random_RSQ.shape
    if orders < 2 or items < 2:
        names = ("sd_orders", "sd_noise", "sd_orders_true", "real_share", "sd_sets")
        few = "one random order per set" if orders < 2 else "one test item"
        return dict.fromkeys(names), {", ".join(names): f"{few} does not show a spread"}
    estimate = statistics.spread(random_RSQ)
    reasons = {
        "real_share": "all random orders of each set score the same" if math.isnan(estimate.real_share) else "",
        "sd_sets": f"one {SET}" if sets == 1 else "",
    }
    parts = {
        "sd_orders": estimate.observed_sd,
        "sd_noise": estimate.item_noise_sd,
        "sd_orders_true": estimate.order_sd,
        "real_share": float(estimate.real_share) if math.isfinite(estimate.real_share) else None,
        # The estimate of a variance is unbiased, so it may be negative.
        "sd_sets": None if sets == 1 else math.sqrt(max(estimate.components.sets, 0.0)),
    }
    return parts, reasons


def explain(reasons: Mapping[str, str]) -> str | None:
    """Join the reasons why fields are None into one text for the field `reason`; None if there are none."""
    return "; ".join(f"{fields}: {why}" for fields, why in reasons.items() if why) or None


def untested(value: float, reason: str) -> Difference:
    """A difference without an interval or a test."""
    return Difference(
        value=value,
        low=None,
        high=None,
        adjusted_low=None,
        adjusted_high=None,
        p=None,
        p_adjusted=None,
        verdict=None,
        smallest_visible=None,
        sets_needed=None,
        items_needed=None,
        reason=reason,
    )


def _difference(
    plain: Estimate,
    adjusted: Estimate,
    strict: float,
    *,
    needed: sample_size.Needed | None = None,
    reason: str = "",
) -> Difference:
    """The difference without `p_adjusted` and verdict, which depend on the whole family (`_corrected`)."""
    if missing := reason or _missing_over_sets(plain):
        return untested(plain.value, missing)
    reasons = {"sets_needed, items_needed": "computed for single cells only"} if needed is None else _unsized(needed)
    # The power depends only on the ratio of the difference to the standard deviation between sets.
    visible = float(plain.per_set.std(ddof=1)) * _visible(len(plain.per_set), strict)
    if visible > 1:
        reasons["smallest_visible"] = f"with {len(plain.per_set)} {SET}s no difference would be detected reliably"
    difference = untested(plain.value, "")
    # A t interval may exceed the range of a difference of accuracies, so its ends are cut.
    difference |= {
        "low": max(plain.low, -1.0),
        "high": min(plain.high, 1.0),
        "adjusted_low": max(adjusted.low, -1.0),
        "adjusted_high": min(adjusted.high, 1.0),
        "p": adjusted.p_value,
        "smallest_visible": visible if visible <= 1 else None,
        "sets_needed": None if needed is None else _count(needed.sets),
        "items_needed": None if needed is None else _count(needed.items),
        "reason": explain(reasons),
    }
    return difference


def _missing_over_sets(estimate: Estimate) -> str:
    # For a single set, `Estimate` has an interval over items, which does not generalise to other sets and is not reported.
    return too_few(len(estimate.per_set), SET) or estimate.reason


def _unsized(needed: sample_size.Needed) -> dict[str, str]:
    """The reasons why sample sizes are None, by field."""
    if needed.difference == 0:
        return {"sets_needed, items_needed": "the difference is zero"}
    reasons = {"sets_needed": needed.reason, "items_needed": needed.reason_items}
    if math.isinf(needed.items):
        reasons["items_needed"] = "no number of items suffices with so few sets"
    return {field: why for field, why in reasons.items() if why}


def _corrected(family: list[Difference]) -> list[Difference]:
    """Add Holm's p-values and the verdicts to a family, in place."""
    p = np.array([1.0 if one["p"] is None else one["p"] for one in family], dtype=np.float64)
    # An untested arm keeps None, although it counts in m.
    for one, adjusted in zip(family, holm(p).tolist(), strict=True):
        if one["p"] is not None:
            one["p_adjusted"] = adjusted
            one["verdict"] = "nothing" if adjusted >= ALPHA else "helps" if one["value"] > 0 else "hurts"
    return family


@functools.lru_cache(maxsize=1024)
def _visible(sets: int, alpha: float) -> float:
    """The difference, in standard deviations between sets, at which `power_of_sets` is POWER, found by bisection."""
    # The power rises with the difference; doubling finds an upper end for the bisection.
    high = 1.0
    while sample_size.power_of_sets(high, 1.0, sets, alpha=alpha) < POWER:
        high *= 2
    low = 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        power = sample_size.power_of_sets(middle, 1.0, sets, alpha=alpha)
        low, high = (middle, high) if power < POWER else (low, middle)
    return high


def _count(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None
