"""The spread over random orders: by hand, against an ANOVA computed the slow way, and unbiased on simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsort.curriculum.ablation.statistics.differences import spread
from sparsort.errors import SparsortError

ORDER, SET, ITEM, BOTH = 0.06, 0.05, 0.12, 0.08


def simulated(seed: int, *, orders: int = 8, sets: int = 6, items: int = 30, order: float = ORDER) -> NDArray[np.bool_]:
    """0/1 outcomes (R, S, Q) whose chances are 0.6 and four independent effects of the given sd, each two-valued."""
    rng = np.random.default_rng(seed)

    def signs(*shape: int) -> NDArray[np.float64]:
        return rng.choice([-1.0, 1.0], shape)

    chance = (
        0.6 + order * signs(orders, sets, 1) + SET * signs(sets, 1) + ITEM * signs(items) + BOTH * signs(sets, items)
    )
    return rng.random((orders, sets, items)) < chance


def test_the_spread_by_hand() -> None:
    # Two orders of one set over four items: 1/4 and 3/4.
    values = np.array([[[1, 0, 0, 0]], [[1, 1, 1, 0]]])
    found = spread(values, levels=(0.5, 1.0))
    assert (found.mean[0], found.low[0], found.high[0]) == (0.5, 0.25, 0.75)
    assert found.sd[0] == pytest.approx(math.sqrt(0.125))
    assert found.quantiles.tolist() == [[0.5, 0.75]]
    # Rest: ± a quarter in every cell, eight cells of 1/16 over (2 − 1)(4 − 1) degrees.
    assert found.components.rest == pytest.approx(0.5 / 3)
    assert found.order_variance.value == pytest.approx(0.125 - 0.5 / 12)
    assert found.real_share == pytest.approx(1 - 0.5 / 12 / 0.125)
    assert found.observed_sd**2 == pytest.approx(found.order_sd**2 + found.item_noise_sd**2)
    assert math.isnan(found.order_variance.low)
    assert math.isnan(found.components.sets)


def test_the_split_against_anova_in_loops() -> None:
    y = simulated(1, orders=3, sets=4, items=5).astype(float)
    orders, sets, items = y.shape
    ms_order = (
        items
        * sum((y[r, s].mean() - y[:, s].mean()) ** 2 for r in range(orders) for s in range(sets))
        / (sets * (orders - 1))
    )
    ms_rest = sum(
        (y[r, s, q] - y[r, s].mean() - y[:, s, q].mean() + y[:, s].mean()) ** 2
        for r in range(orders)
        for s in range(sets)
        for q in range(items)
    ) / (sets * (orders - 1) * (items - 1))
    ms_set = orders * items * sum((y[:, s].mean() - y.mean()) ** 2 for s in range(sets)) / (sets - 1)
    ms_item = orders * sets * sum((y[:, :, q].mean() - y.mean()) ** 2 for q in range(items)) / (items - 1)
    ms_both = (
        orders
        * sum(
            (y[:, s, q].mean() - y[:, s].mean() - y[:, :, q].mean() + y.mean()) ** 2
            for s in range(sets)
            for q in range(items)
        )
        / ((sets - 1) * (items - 1))
    )
    found = spread(y)
    assert found.components.order == pytest.approx((ms_order - ms_rest) / items)
    assert found.components.rest == pytest.approx(ms_rest)
    assert found.components.sets == pytest.approx((ms_set - ms_order - ms_both + ms_rest) / (orders * items))
    assert found.components.sets_by_items == pytest.approx((ms_both - ms_rest) / orders)
    assert found.components.items == pytest.approx((ms_item - ms_both) / (orders * sets))
    assert found.order_variance.value == pytest.approx(found.components.order)


def test_the_split_is_unbiased_for_0_1_outcomes() -> None:
    found = [spread(simulated(seed)).components for seed in range(1_500)]
    squared = ORDER**2 + SET**2 + ITEM**2 + BOTH**2
    truth = {
        "order": ORDER**2,
        "sets": SET**2,
        "items": ITEM**2,
        "sets_by_items": BOTH**2,
        "rest": 0.6 * 0.4 - squared,
    }
    for name, true in truth.items():
        seen = np.array([getattr(components, name) for components in found])
        error = seen.std() / math.sqrt(len(seen))
        assert error < 0.06 * true
        assert seen.mean() == pytest.approx(true, abs=4 * error)


def test_equally_good_orders_spread_by_noise_alone() -> None:
    found = [spread(simulated(seed, order=0.0)) for seed in range(1_000)]
    variance = np.array([each.order_variance.value for each in found])
    assert variance.mean() == pytest.approx(0.0, abs=4 * variance.std() / math.sqrt(len(variance)))
    assert min(each.observed_sd for each in found) > 0.05
    noise = np.mean([each.item_noise_sd**2 for each in found])
    # Orders answer the same items, so the noise is below the binomial one.
    assert noise == pytest.approx((0.24 - SET**2 - ITEM**2 - BOTH**2) / 30, rel=0.02)
    assert noise < 0.95 * 0.24 / 30


def test_the_interval_of_the_order_variance_covers() -> None:
    inside = 0
    for seed in range(1_500):
        found = spread(simulated(seed, orders=16, sets=10)).order_variance
        inside += found.low <= ORDER**2 <= found.high
    assert inside / 15 == pytest.approx(95.0, abs=2.0)


def test_orders_that_do_not_differ() -> None:
    values = np.broadcast_to(np.random.default_rng(0).random((1, 5, 20)), (24, 5, 20))
    found = spread(values)
    assert math.isnan(found.real_share)
    assert found.observed_sd == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "levels", "says"),
    [
        ((1, 3, 4), (0.5,), "1 orders of 4 items"),
        ((3, 3, 1), (0.5,), "3 orders of 1 items"),
        ((3, 3, 4), (50,), "levels"),
    ],
)
def test_bad_input_is_refused(shape: tuple[int, ...], levels: tuple[float, ...], says: str) -> None:
    with pytest.raises(SparsortError, match=says):
        spread(np.ones(shape), levels=levels)
