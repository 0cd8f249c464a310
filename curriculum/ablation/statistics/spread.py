"""The spread over random orders, and the share of it that is not noise.

Contract: pure NumPy. Variance components are unbiased, so a small one may be estimated below zero. It is not clipped, because
clipped estimates are biased when they are averaged over tasks. Shares are clipped to [0, 1].

Even if all orders were equally good, they would differ in accuracy on Q items by chance. The order variance is the part of the
spread that would remain on endless items.

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
    same_means = observed <= (_ROUNDING * float(np.abs(values).max())) ** 2
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
