"""Sample sizes: published values, exact power by enumeration, and simulated studies of the size that was advised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

from sparsort.curriculum.ablation.statistics import resampling
from sparsort.curriculum.ablation.statistics.sample_size import items_needed, needed, power_of_sets, sets_needed
from sparsort.errors import SparsortError


def share_seen(values_SN: NDArray[np.float64]) -> float:
    """How many of the simulated studies (columns) the default test over sets rejects at 5 %."""
    blocks = np.array_split(values_SN, max(1, values_SN.shape[1] // 1000), axis=1)
    p = [resampling.wild(block, draws=1999, seed=seed)[2] for seed, block in enumerate(blocks)]
    return float(np.mean(np.concatenate(p) <= 0.05))


def test_connor_by_hand() -> None:
    # 10 % and 5 % discordant: (1.95996·√0.15 + 0.84162·√0.1475)² / 0.05² = 468.57.
    assert items_needed(0.05, 0.15) == 469
    assert items_needed(-0.05, 0.15) == 469
    assert items_needed(0.0, 0.15) == math.inf


@pytest.mark.parametrize(("only_first", "only_second"), [(0.10, 0.05), (0.20, 0.05), (0.08, 0.02)])
def test_connor_s_items_give_mcnemar_s_mid_p_its_power(only_first: float, only_second: float) -> None:
    rate = only_first + only_second
    items = int(items_needed(only_first - only_second, rate))
    power = 0.0
    for discordant in range(items + 1):
        b = np.arange(discordant + 1)
        fewer = np.minimum(b, discordant - b)
        mid = 2 * stats.binom.cdf(fewer, discordant, 0.5) - stats.binom.pmf(fewer, discordant, 0.5)
        seen = stats.binom.pmf(b, discordant, only_first / rate)[mid <= 0.05].sum()
        power += stats.binom.pmf(discordant, items, rate) * seen
    assert power == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize(("effect", "sets"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_sets_needed_as_g_power_has_it(effect: float, sets: int) -> None:
    assert sets_needed(effect, 1.0) == sets
    assert power_of_sets(effect, 1.0, sets) >= 0.8 > power_of_sets(effect, 1.0, sets - 1)


def test_sets_needed_where_t_is_normal_and_at_the_ends() -> None:
    assert sets_needed(1e-6, 0.05) == pytest.approx((2.801585 * 0.05e6) ** 2, rel=1e-5)
    assert sets_needed(0.001, 0.1119) == pytest.approx(sets_needed(0.001, 0.1131), rel=0.03)
    assert sets_needed(0.0, 0.05) == math.inf
    # Two sets would do by the formula, and allow no interval.
    assert sets_needed(0.1, 1e-3) == 3
    assert power_of_sets(0.1, 1e-3, 3) > 0.99


def test_power_of_sets_against_quadrature_and_everywhere_a_number() -> None:
    for sets, effect in ((3, 3.0), (5, 0.9), (10, 0.996), (40, 0.2)):
        bound, root = stats.t.ppf(0.975, sets - 1), math.sqrt(sets - 1)

        def density(u: float, bound: float = bound, root: float = root, at: float = effect * math.sqrt(sets)) -> float:
            both = stats.norm.sf(bound * u - at) + stats.norm.cdf(-bound * u - at)
            return float(both * stats.chi.pdf(u * root, root**2) * root)

        assert power_of_sets(effect, 1.0, sets) == pytest.approx(integrate.quad(density, 0, 20)[0], abs=1e-6)
    for sets in (3, 9, 58, 1000, 10**7):
        power = [power_of_sets(effect, 1.0, sets, alpha=1e-4) for effect in np.geomspace(1e-4, 1e3, 40)]
        assert (np.diff(power) >= -1e-9).all()
        assert 1e-4 <= power[0] < power[-1] <= 1.0


@pytest.mark.parametrize("sets", [10, 20])
def test_the_power_of_sets_is_that_of_the_default_test(sets: int) -> None:
    effect = next(e for e in np.arange(0.3, 2, 0.001) if power_of_sets(e, 1.0, sets) >= 0.8)
    values = np.random.default_rng(sets).normal(effect, 1.0, (sets, 10_000))
    assert share_seen(values) == pytest.approx(0.8, abs=0.015)


def pilot(sets: int, items: int, mean: float, between: float, within: float) -> NDArray[np.float64]:
    """A study (S, Q) whose mean, variance between sets and interaction mean square are exactly these."""
    rng = np.random.default_rng(0)
    rest = rng.standard_normal((sets, items))
    rest -= rest.mean(axis=0) + rest.mean(axis=1, keepdims=True) - rest.mean()
    rest *= within * math.sqrt((sets - 1) * (items - 1) / (rest**2).sum())
    of_set = rng.standard_normal((sets, 1))
    of_set = (of_set - of_set.mean()) / of_set.std(ddof=1) * math.sqrt(between**2 + within**2 / items)
    return np.asarray(mean + of_set + rest + 0.2 * (np.arange(items) - (items - 1) / 2) / items)


def test_the_advised_size_is_enough_and_one_less_is_not() -> None:
    found = needed(pilot(10, 64, 0.03, 0.025, 0.35))
    assert (found.between_sd, found.within_sd, found.difference) == pytest.approx((0.025, 0.35, 0.03))
    assert 64 < found.items < math.inf
    rng = np.random.default_rng(1)
    more_items = 0.03 + rng.normal(0, math.hypot(0.025, 0.35 / math.sqrt(found.items)), (10, 10_000))
    assert share_seen(more_items) == pytest.approx(0.8, abs=0.02)
    more_sets = 0.03 + rng.normal(0, math.hypot(0.025, 0.35 / math.sqrt(64)), (int(found.sets), 10_000))
    assert share_seen(more_sets) == pytest.approx(0.8, abs=0.025)


def test_no_number_of_items_compensates_for_too_few_sets() -> None:
    found = needed(pilot(5, 64, 0.02, 0.05, 0.3))
    assert found.items == math.inf
    assert 5 < found.sets < math.inf
    assert needed(pilot(5, 64, 0.02, 0.05, 0.3), difference=0.2).items < math.inf


def test_one_set_needs_items_and_one_item_says_nothing() -> None:
    values = np.array([[1.0] * 20 + [-1.0] * 10 + [0.0] * 70])
    alone = needed(values)
    assert alone.items == pytest.approx(items_needed(0.1, 0.3), abs=3)
    assert math.isnan(alone.sets)
    thin = needed([[0.1], [0.3], [0.1]])
    assert math.isnan(thin.items)
    assert thin.sets > 2
    assert "one test item" in thin.reason_items
    level = needed([[0.5, 0.0], [0.25, 0.25], [0.0, 0.25]], difference=0.0)
    assert (level.sets, level.items) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "reason", "reason_items"),
    [
        (np.zeros((3, 4)), "do not differ", "do not differ"),
        (np.full((10, 4), 0.25), "do not differ", "do not differ"),
        (np.array([[0.5, -0.5, 0.0], [0.0, 0.5, -0.5], [0.0, 0.0, 0.0]]), "do not differ", "do not differ"),
        (np.eye(2, 6), "two demonstration sets", "two demonstration sets"),
        (np.array([[0.1], [0.3]]), "two demonstration sets", "two demonstration sets"),
        (np.full((1, 9), 0.3), "one demonstration set", "do not differ between 9 test items"),
        (np.array([[0.1, 0.4]]), "one demonstration set", "two test items"),
        (np.arange(3.0)[:, None] + np.arange(4.0), "", "the same in every set"),
    ],
)
def test_no_sample_size_without_variance(values: NDArray[np.float64], reason: str, reason_items: str) -> None:
    found = needed(values, difference=0.2)
    for number, why, expected in ((found.sets, found.reason, reason), (found.items, found.reason_items, reason_items)):
        assert math.isnan(number) == bool(expected)
        assert expected in why


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: items_needed(0.5, 0.1), "at least difference²"),
        (lambda: items_needed(0.1, 0.2, power=80), "power=80"),
        (lambda: items_needed(0.1, 0.2, power=0.01), "above alpha"),
        (lambda: sets_needed(0.1, -1.0), "sd above 0"),
        (lambda: sets_needed(0.1, 0.0), "sets that do not differ allow no test"),
        (lambda: power_of_sets(0.1, 0.0, 9), "sets that do not differ allow no test"),
        (lambda: sets_needed(math.nan, 1.0), "finite"),
        (lambda: power_of_sets(0.1, 1.0, 2), "at least 3"),
        (lambda: needed([0.1, 0.2]), "shape"),
        (lambda: needed([[0.1, 0.2]], alpha=0.0), "alpha=0"),
    ],
)
def test_bad_input_is_refused(call: object, says: str) -> None:
    with pytest.raises(SparsortError, match=says):
        call()  # type: ignore[operator]
