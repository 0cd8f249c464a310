"""The bridge from outcomes to `curriculum.ablation.statistics.differences`: families of comparisons, in the report's shape.

Contract: no statistic is defined here. Test and adjusted interval of a family of m arms come from one call at the level 1 − α/m,
so that they rest on the same method (sign vectors where there are enough for that level, else t); Holm's correction then
works on its p-values. What cannot be had (fewer than three sets, no spread) is None, with the reason next to it. Outcomes are
right or wrong, so a difference and its interval lie within ±1.

An arm without a p-value counts in m with p = 1: the family is what the claim is picked from, and an arm that drops out because of
its own outcomes must not make the others look better. This is also the m of the adjusted intervals.

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
from sparsort.curriculum.ablation.statistics.spread import spread

ALPHA = 1.0 - LEVEL
_NOT_SIZED = {"sets_needed, items_needed": "given for single cells only"}


def cell_family(arms: Sequence[NDArray[Any]], random_RSQ: NDArray[Any]) -> list[Difference]:
    """Every arm (S, Q) against the mean random order, corrected for how many there are."""
    made = []
    strict = ALPHA / max(1, len(arms))
    base_SQ = random_RSQ.mean(axis=0)
    for arm in arms:
        plain = statistics.difference(arm, random_RSQ, level=LEVEL)
        adjusted = statistics.difference(arm, random_RSQ, level=1 - strict)
        need = sample_size.needed(arm - base_SQ, power=POWER, alpha=strict)
        made.append(_difference(plain, adjusted, strict, need=need))
    return _corrected(made)


def pooled_family(arms: Sequence[Sequence[NDArray[np.float64]]]) -> list[Difference]:
    """The mean over tasks of every arm's gains, one array (sets of the task,) per task, corrected for how many arms there are.

    Sets are weighted so that every task counts alike, also where tasks have different numbers of sets. The interval speaks of
    other sets on these tasks, so it takes three sets over all tasks, and a task whose own sets differ.
    """
    strict = ALPHA / max(1, len(arms))
    made = []
    for by_task in arms:
        total = sum(len(gain_S) for gain_S in by_task)
        values_N = np.concatenate([gain_S * total / (len(by_task) * len(gain_S)) for gain_S in by_task])
        plain, adjusted = (estimate_sets(values_N, level=level, scale=1.0) for level in (LEVEL, 1 - strict))
        made.append(_difference(plain, adjusted, strict, reason=_missing_over_tasks(by_task)))
    return _corrected(made)


def _missing_over_tasks(by_task: Sequence[NDArray[np.float64]]) -> str:
    if few := too_few(sum(len(gain_S) for gain_S in by_task), SET):
        return few
    if all(len(gain_S) == 1 for gain_S in by_task):
        return f"one {SET} of each task allows no interval"
    if all(flat(gain_S, 1.0) for gain_S in by_task):
        return f"outcomes that do not differ between the {SET}s of any task allow no interval"
    return ""


def change_family(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> list[Difference]:
    """(on, off) pairs of (S, Q) outcomes: what changed, corrected for how many pairs there are."""
    strict = ALPHA / max(1, len(pairs))
    return _corrected(
        [
            _difference(
                statistics.difference(on, off, level=LEVEL), statistics.difference(on, off, level=1 - strict), strict
            )
            for on, off in pairs
        ]
    )


def accuracy(correct_SQ: NDArray[Any]) -> tuple[float, float | None, float | None, str]:
    """Mean accuracy with its interval over sets, and why there is no interval."""
    found = statistics.accuracy(correct_SQ, level=LEVEL)
    if reason := _missing_over_sets(found):
        return found.value, None, None, reason
    return found.value, found.low, found.high, ""


def percentile(arm_SQ: NDArray[Any], random_RSQ: NDArray[Any]) -> float:
    """Mean place of an arm among the random orders of its set, 0 to 100."""
    return 100.0 * statistics.rank(arm_SQ, random_RSQ, level=LEVEL).value


def spread_parts(random_RSQ: NDArray[Any]) -> tuple[dict[str, float | None], dict[str, str]]:
    """How far random orders lie apart: `sd_orders` as seen, `sd_noise` that Q items alone would give, `sd_orders_true` without
    that, `real_share` of the variance seen that is not noise, and `sd_sets` between sets; and why some of them are None."""
    orders, sets, items = random_RSQ.shape
    if orders < 2 or items < 2:
        names = ("sd_orders", "sd_noise", "sd_orders_true", "real_share", "sd_sets")
        few = "one random order per set" if orders < 2 else "one test item"
        return dict.fromkeys(names), {", ".join(names): f"{few} says nothing of the spread"}
    found = spread(random_RSQ)
    between = found.components.sets
    reasons = {
        "real_share": "the random orders of every set score alike" if math.isnan(found.real_share) else "",
        "sd_sets": f"one {SET}" if sets == 1 else "",
    }
    parts = {
        "sd_orders": found.observed_sd,
        "sd_noise": found.item_noise_sd,
        "sd_orders_true": found.order_sd,
        "real_share": number(found.real_share),
        "sd_sets": None if sets == 1 else math.sqrt(max(between, 0.0)),
    }
    return parts, reasons


def number(value: float) -> float | None:
    """The value as JSON holds it: None for what is not a finite number."""
    return float(value) if math.isfinite(value) else None


def explain(reasons: Mapping[str, str]) -> str | None:
    """Reasons by field as `reason` holds them: None where no field lacks its number."""
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
    need: sample_size.Needed | None = None,
    reason: str = "",
) -> Difference:
    if missing := reason or _missing_over_sets(plain):
        return untested(plain.value, missing)
    reasons = dict(_NOT_SIZED) if need is None else _unsized(need)
    visible = float(plain.per_set.std(ddof=1)) * _visible(len(plain.per_set), strict)
    if visible > 1:
        reasons["smallest_visible"] = f"with {len(plain.per_set)} {SET}s no difference would be found reliably"
    return Difference(
        value=plain.value,
        low=max(plain.low, -1.0),
        high=min(plain.high, 1.0),
        adjusted_low=max(adjusted.low, -1.0),
        adjusted_high=min(adjusted.high, 1.0),
        p=adjusted.p_value,
        p_adjusted=None,
        verdict=None,
        smallest_visible=visible if visible <= 1 else None,
        sets_needed=None if need is None else _count(need.sets),
        items_needed=None if need is None else _count(need.items),
        reason=explain(reasons),
    )


def _missing_over_sets(found: Estimate) -> str:
    """Why there is no interval over sets; one set has an estimate over items, which the report has no use for."""
    return too_few(len(found.per_set), SET) or found.reason


def _unsized(need: sample_size.Needed) -> dict[str, str]:
    """Why a sample size is None, by field."""
    if need.difference == 0:
        return {"sets_needed, items_needed": "the difference is zero"}
    reasons = {"sets_needed": need.reason, "items_needed": need.reason_items}
    if math.isinf(need.items):
        reasons["items_needed"] = "no number of items suffices with so few sets"
    return {field: why for field, why in reasons.items() if why}


def _corrected(family: list[Difference]) -> list[Difference]:
    p = np.array([1.0 if one["p"] is None else one["p"] for one in family], dtype=np.float64)
    for one, adjusted in zip(family, statistics.holm(p).tolist(), strict=True):
        if one["p"] is not None:
            one["p_adjusted"] = adjusted
            found = adjusted < ALPHA
            one["verdict"] = ("helps" if one["value"] > 0 else "hurts") if found else "nothing"
    return family


@functools.lru_cache(maxsize=1024)
def _visible(sets: int, alpha: float) -> float:
    """The difference, in standard deviations between sets, that is seen with the report's power: `power_of_sets` turned round."""
    high = 1.0
    while sample_size.power_of_sets(high, 1.0, sets, alpha=alpha) < POWER:
        high *= 2
    low = 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        seen = sample_size.power_of_sets(middle, 1.0, sets, alpha=alpha)
        low, high = (middle, high) if seen < POWER else (low, middle)
    return high


def _count(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None
