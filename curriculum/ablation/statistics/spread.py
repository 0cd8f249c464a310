"""The spread over random orders, and how much of it is real.

Contract: pure NumPy. Variance components are unbiased, so a small one may come out below zero; it is not cut off, as cut-off
estimates do not average out over tasks. Shares are cut to [0, 1].

Even if every order were equally good, Q items would give R orders different accuracies. For these very items, and a
model that answers the same way twice, that spread is a fact; what would be left of it on other items is the order variance.

Shapes: S demonstration sets, Q test items, R random orders of each set, K quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sparsort.curriculum.ablation.statistics.estimates import Estimate, estimate_sets, numbers
from sparsort.curriculum.ablation.statistics.resampling import Floats
from sparsort.errors import SparsortError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variances of one outcome y_rsq = μ + set_s + order_r(s) + item_q + (set × item)_sq + rest_rsq; NaN where it takes two sets.

    Orders are nested in sets (order r of one set has nothing to do with order r of another), items are crossed with both.

    Attributes:
        order: of the true accuracy over the orders of a set.
        sets: of the true accuracy over sets, averaged over their orders.
        items: of how hard an item is.
        sets_by_items: of what an item gains by the set, beyond both.
        rest: of what an item gains by the order, with all sampling of answers; rest / Q is item noise in an accuracy.
    """

    order: float
    sets: float
    items: float
    sets_by_items: float
    rest: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """Accuracies (or means of any number) over R random orders, for each set and split into what makes them differ.

    Attributes:
        mean, sd, low, high: (S,) over the set's orders; sd with R − 1. `low` and `high` are the worst and the best of R, so
            they move apart as R grows: compare only at equal R.
        levels: the K quantiles asked for.
        quantiles: (S, K).
        observed_sd: root of the mean over sets of sd².
        item_noise_sd: root of rest / Q: the sd over orders that Q items alone would give. Smaller than the binomial
            √(p(1 − p) / Q), since all orders answer the same items.
        order_sd: root of the order variance, 0 where that is negative: the sd over orders on endless items.
        real_share: order variance / (order variance + item noise), which is observed_sd², cut to [0, 1]; NaN if all orders give
            the same means.
        order_variance: with its interval over sets and a test of zero; neither with fewer than three sets or equal ones.
        components: of one outcome.
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
    """How far random orders of one set lie apart, and the unbiased split of that into orders, sets and items.

    Per set, with a_r the mean of order r over items: v = Σ_r (a_r − ā)² / (R − 1) has expectation σ²_order + σ²_rest / Q, and
    e = Σ_rq (y_rq − ȳ_r. − ȳ_.q + ȳ)² / ((R − 1)(Q − 1)) has expectation σ²_rest; so v − e / Q is unbiased for σ²_order, for
    0/1 outcomes as for any others. Its mean over sets is the ANOVA estimator (Searle, Casella and McCulloch 1992, ch. 4), and
    the sets give its interval. Sets and items follow from the mean squares of the same layout (see `Components`):
    σ²_set = (MS_set − MS_order − MS_set×item + MS_rest) / RQ, σ²_set×item = (MS_set×item − MS_rest) / R,
    σ²_item = (MS_item − MS_set×item) / RS.

    Orders drawn without repeats from the k! of a set leave σ²_order unbiased, read with k! − 1 in its denominator.

    Args:
        random_RSQ: (R, S, Q) correct or not, or any number; R and Q at least 2.
        levels: quantiles over the orders of a set, linearly interpolated.

    Raises:
        SparsortError: fewer than two orders or items, a bad shape, or a level outside [0, 1].
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
    rest = values - mean_RS[:, :, None] - mean_SQ + mean_S[:, None]
    rest_S = (rest**2).sum(axis=(0, 2)) / ((orders - 1) * (items - 1))
    order_S = sd_S**2 - rest_S / items
    observed, order, noise = float((sd_S**2).mean()), float(order_S.mean()), float(rest_S.mean()) / items
    alike = observed <= (_ROUNDING * float(np.abs(values).max())) ** 2
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
        real_share=np.nan if alike else float(np.clip(order / observed, 0.0, 1.0)),
        order_variance=estimate_sets(order_S, scale=float(np.abs(values).max()) ** 2),
        components=_components(mean_SQ, orders, order, float(rest_S.mean())),
    )


def _components(mean_SQ: Floats, orders: int, order: float, rest: float) -> Components:
    sets, items = mean_SQ.shape
    of_sets = of_items = of_both = np.nan
    if sets > 1:
        grand = mean_SQ.mean()
        by_set_S, by_item_Q = mean_SQ.mean(axis=1), mean_SQ.mean(axis=0)
        both = ((mean_SQ - by_set_S[:, None] - by_item_Q + grand) ** 2).sum() / ((sets - 1) * (items - 1))
        of_both = float(both - rest / orders)
        of_sets = float(by_set_S.var(ddof=1) - order / orders - both / items)
        of_items = float(by_item_Q.var(ddof=1) - both / sets)
    return Components(order=order, sets=of_sets, items=of_items, sets_by_items=of_both, rest=rest)
