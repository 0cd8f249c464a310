"""Intervals over few clusters: coverage on simulated studies of known truth, exactness against SciPy, duality with the test.

Coverage is of 20 000 studies (10 000 with 20 sets), so its Monte-Carlo error is 0.15 (0.22) points, well below the point
that is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sparsort.curriculum.ablation.statistics import resampling
from sparsort.errors import SparsortError

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, int], Floats]
ITEMS, ORDERS = 256, 8


def zero_one_items(effect: Callable[[np.random.Generator, tuple[int, ...]], Floats], gain: float) -> Draw:
    """Set means of an arm minus the mean of 8 random orders on 256 items of four difficulties, the same in every set.

    `effect` of mean zero is what an order adds to the chance of a right answer; the arm's has `gain` on top.
    """

    def draw(rng: np.random.Generator, sets: int, studies: int) -> Floats:
        arm = effect(rng, (sets, studies)) + gain
        orders = effect(rng, (ORDERS, sets, studies))
        right = np.zeros((sets, studies))
        for base in (0.3, 0.5, 0.6, 0.7):
            right += rng.binomial(ITEMS // 4, base + arm) - rng.binomial(ITEMS // 4, base + orders).mean(axis=0)
        return right / ITEMS

    return draw


# Name → (set means, their true mean): what a study of orders looks like, and cases that are harder than any.
DESIGNS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, c, n: rng.normal(0.02, 0.05, (c, n)), 0.02),
    "items, sets alike": (zero_one_items(lambda rng, shape: np.zeros(shape), 0.0), 0.0),
    "items, sets differ": (zero_one_items(lambda rng, shape: 0.4 * (rng.beta(2, 2, shape) - 0.5), 0.03), 0.03),
    "items, skewed": (zero_one_items(lambda rng, shape: 0.4 * (rng.beta(6, 2, shape) - 0.75), 0.03), 0.03),
    "t3": (lambda rng, c, n: rng.standard_t(3, (c, n)), 0.0),
    "unequal": (lambda rng, c, n: rng.normal(size=(c, n)) * np.geomspace(1, 10, c)[:, None], 0.0),
    "gamma4": (lambda rng, c, n: rng.gamma(4, size=(c, n)), 4.0),
    "exponential": (lambda rng, c, n: rng.exponential(size=(c, n)), 1.0),
}


def coverage(name: str, sets: int, interval: Callable[[Floats, int], resampling.Interval], studies: int) -> float:
    draw, truth = DESIGNS[name]
    rng = np.random.default_rng([sets, list(DESIGNS).index(name)])
    inside = 0
    for block in range(studies // 1000):
        low, high, _ = interval(draw(rng, sets, 1000), block)
        inside += int(((low <= truth + 1e-12) & (truth - 1e-12 <= high)).sum())
    return 100 * inside / studies


def default(values_CN: Floats, seed: int) -> resampling.Interval:
    """What `estimate` does: sign vectors where there are enough clusters, else t."""
    if resampling.enough_signs(len(values_CN), 0.95):
        draws = resampling.DRAWS if len(values_CN) < 14 else 1999
        return resampling.wild(values_CN, draws=draws, seed=seed)
    return resampling.student_t(values_CN)


def percentile(values_CN: Floats, seed: int) -> resampling.Interval:
    count = len(values_CN)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=999) / count
    means = np.sort(weights @ values_CN, axis=0)
    return means[24], means[-25], np.zeros(0)


@pytest.mark.parametrize("name", ["normal", "items, sets alike", "items, sets differ", "items, skewed"])
@pytest.mark.parametrize("sets", [5, 7, 10, 20])
def test_coverage_is_within_one_point_of_nominal(name: str, sets: int) -> None:
    assert coverage(name, sets, default, 20_000 if sets <= 10 else 10_000) == pytest.approx(95.0, abs=1.0)


def test_ties_between_two_arms_on_few_items_widen_the_interval_and_never_narrow_it() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(10):
        right = rng.binomial(14, np.array([0.3, 0.5, 0.6, 0.7])[:, None, None, None], (4, 2, 10, 1000)).sum(axis=0)
        low, high, p = resampling.wild((right[0] - right[1]) / 56)
        inside += int(((low <= 1e-12) & (high >= -1e-12)).sum())
        np.testing.assert_array_equal((low > 0) | (high < 0), p <= 0.05)
    assert inside / 100 == pytest.approx(96.2, abs=0.6)


@pytest.mark.parametrize("name", ["t3", "unequal"])
@pytest.mark.parametrize("sets", [7, 10])
def test_sign_vectors_are_exact_for_fat_tails_and_unequal_sets(name: str, sets: int) -> None:
    attained = 100 * (1 - 2 * int(0.025 * 2**sets) / 2**sets)
    assert coverage(name, sets, default, 20_000) == pytest.approx(attained, abs=0.6)


@pytest.mark.parametrize(
    ("name", "wild", "bootstrap_t", "percentiles"),
    [
        ("normal", 95.0, 94.9, 90.1),
        ("gamma4", 94.0, 94.8, 89.3),
        ("exponential", 90.5, 93.9, 86.0),
        ("t3", 95.0, 92.8, 89.2),
    ],
)
def test_the_table_in_the_docstring(name: str, wild: float, bootstrap_t: float, percentiles: float) -> None:
    assert coverage(name, 10, default, 20_000) == pytest.approx(wild, abs=0.6)
    studentised = coverage(name, 10, lambda v, seed: resampling.bootstrap_t(v, draws=999, seed=seed), 10_000)
    assert studentised == pytest.approx(bootstrap_t, abs=1.0)
    assert coverage(name, 10, percentile, 10_000) == pytest.approx(percentiles, abs=1.0)


@pytest.mark.parametrize(
    ("between", "of_items", "rest"), [(0.03, 0.15, 0.4), (0.1, 0.0, 0.3), (0.02, 0.5, 0.3), (0.0, 0.3, 0.4)]
)
def test_two_way_covers_over_new_sets_and_new_items(between: float, of_items: float, rest: float) -> None:
    rng = np.random.default_rng(5)
    inside, studies, sets, items = 0, 8_000, 10, 128
    for _ in range(studies):
        table = rest * rng.standard_normal((sets, items))
        table += between * rng.standard_normal((sets, 1)) + of_items * rng.standard_normal(items)
        low, high, *_ = resampling.two_way(table)
        inside += low <= 0.0 <= high
    assert 100 * inside / studies == pytest.approx(95.0, abs=1.0)


def test_two_way_for_0_1_outcomes_and_the_other_intervals_ignorance_of_items() -> None:
    # The arm helps on some kinds of item and hurts on others: over sets alone, the items at hand are the whole world.
    rng = np.random.default_rng(6)
    both = sets_only = 0
    for _ in range(3_000):
        item = rng.choice([-0.3, 0.36], 96)
        chance = 0.5 + 0.05 * rng.choice([-1, 1], (10, 1)) + item
        table = (rng.random((10, 96)) < chance) - 0.5
        low, high, *_ = resampling.two_way(table)
        both += low <= 0.03 <= high
        low, high, _ = resampling.student_t(table.mean(axis=1, keepdims=True))
        sets_only += low[0] <= 0.03 <= high[0]
    assert both / 30 == pytest.approx(95.0, abs=1.5)
    assert sets_only / 30 < 90


@pytest.mark.parametrize("seed", range(6))
def test_wild_p_is_scipys_permutation_test_over_signs(seed: int) -> None:
    values = np.random.default_rng(seed).integers(-4, 9, size=8) / 16
    ours = resampling.wild(values[:, None])[2][0]
    theirs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert ours == pytest.approx(theirs.pvalue, abs=1e-12)


def signs_p(values: Floats, null: float) -> float:
    seen = abs((values - null).sum())
    sums = [abs(np.dot(signs, values - null)) for signs in itertools.product((-1, 1), repeat=len(values))]
    return float(np.mean(np.array(sums) >= seen - 1e-12))


def test_the_wild_interval_is_every_mean_that_the_signs_do_not_reject() -> None:
    values = np.random.default_rng(3).gamma(2, size=9)
    low, high, _ = (float(end[0]) for end in resampling.wild(values[:, None]))
    for end, outwards in ((low, -1e-7), (high, 1e-7)):
        assert signs_p(values, end) > 0.05
        assert signs_p(values, end + outwards) <= 0.05


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    count=st.sampled_from([7, 10, 16]),
    method=st.sampled_from(["wild", "bootstrap_t", "student_t"]),
    level=st.sampled_from([0.8, 0.9, 0.95]),
)
def test_an_interval_and_its_p_value_are_one_statement(seed: int, count: int, method: str, level: float) -> None:
    values = np.random.default_rng(seed).standard_normal((count, 1))
    options = {} if method == "student_t" else {"draws": 999}
    interval = getattr(resampling, method)
    low, high, _ = (float(end[0]) for end in interval(values, level=level, **options))
    assert low < values.mean() < high
    for end, inwards in ((low, 1e-6), (high, -1e-6)):
        assert interval(values, level=level, null=end + inwards, **options)[2][0] > 1 - level - 1e-12
        assert interval(values, level=level, null=end - inwards, **options)[2][0] <= 1 - level + 1e-12


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    shift=st.floats(-5, 5),
    scale=st.floats(0.01, 100),
    method=st.sampled_from(["wild", "bootstrap_t", "student_t"]),
)
def test_shifting_and_scaling_the_values_does_so_to_the_interval(
    seed: int, shift: float, scale: float, method: str
) -> None:
    values = np.random.default_rng(seed).standard_normal((10, 3))
    interval = getattr(resampling, method)
    low, high, p = interval(values, null=0.1)
    moved_low, moved_high, moved_p = interval(values * scale + shift, null=0.1 * scale + shift)
    np.testing.assert_allclose(moved_low, low * scale + shift, rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose(moved_high, high * scale + shift, rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose(moved_p, p, atol=1e-9)


def test_drawn_sign_vectors_come_near_all_of_them() -> None:
    values = np.random.default_rng(0).gamma(3, size=(12, 4))
    every = resampling.wild(values, draws=4096, null=2.0)
    drawn = resampling.wild(values, draws=4000, null=2.0, seed=1)
    for one, other in zip(every, drawn, strict=True):
        np.testing.assert_allclose(one, other, atol=0.06)
    again = resampling.wild(values, draws=4000, null=2.0, seed=1)
    np.testing.assert_array_equal(drawn, again)


def test_columns_do_not_know_of_one_another() -> None:
    values = np.random.default_rng(2).standard_normal((10, 5))
    for interval in (resampling.wild, resampling.bootstrap_t, resampling.student_t):
        together = np.array(interval(values))
        apart = np.concatenate([np.array(interval(values[:, [at]])) for at in range(5)], axis=1)
        np.testing.assert_allclose(together, apart, atol=1e-12)


@pytest.mark.parametrize("count", [3, 5, 30])
def test_student_t_is_scipys(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    low, high, p = (float(end[0]) for end in resampling.student_t(values[:, None], level=0.9, null=0.2))
    theirs = stats.ttest_1samp(values, 0.2)
    assert p == pytest.approx(theirs.pvalue)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval(0.9)))


@pytest.mark.parametrize("null", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_no_interval_and_no_p_without_variance(count: int, null: float) -> None:
    level = np.full((count, 1), 0.1) + 1e-17 * np.arange(count)[:, None]
    flat = [resampling.student_t(level, null=null)]
    if count >= 7:
        flat += [resampling.wild(level, null=null), resampling.bootstrap_t(level, null=null, draws=99)]
    for found in flat:
        assert np.isnan(found).all()
    assert np.isnan(resampling.two_way(np.full((count, 5), 0.1), null=null)).all()
    varied = np.linspace(0, 1, count)
    assert np.isnan(resampling.student_t(varied[:, None], null=null)).all() == (count < 3)
    for table in (varied[:, None] + np.eye(count, 5), (varied[:, None] + np.eye(count, 5)).T):
        assert np.isnan(resampling.two_way(table, null=null)).all() == (count < 3)


def test_why_there_is_no_interval() -> None:
    assert resampling.missing_interval(np.array([0.2]), "set") == "one set allows no interval"
    assert resampling.missing_interval(np.array([0.2, 0.9]), "set") == "two sets allow no interval"
    assert (
        resampling.missing_interval(np.zeros(4), "set")
        == "outcomes that do not differ between 4 sets allow no interval"
    )
    noise = 1e-17 * np.arange(4.0)
    assert resampling.missing_interval(noise, "set") == ""
    assert "do not differ" in resampling.missing_interval(noise, "set", scale=1.0)
    assert resampling.missing_interval(np.array([0.2, 0.2, 0.3]), "set") == ""


def test_bootstrap_t_against_resampling_one_by_one() -> None:
    values = np.random.default_rng(4).gamma(2, size=12)
    rng, studentised = np.random.default_rng(9), []
    for _ in range(20_000):
        again = rng.choice(values, 12)
        studentised.append((again.mean() - values.mean()) / (again.std(ddof=1) / np.sqrt(12)))
    se = values.std(ddof=1) / np.sqrt(12)
    low, high, p = (float(end[0]) for end in resampling.bootstrap_t(values[:, None], null=1.2))
    assert low == pytest.approx(values.mean() - se * np.quantile(studentised, 0.975), abs=0.06 * se)
    assert high == pytest.approx(values.mean() - se * np.quantile(studentised, 0.025), abs=0.15 * se)
    above = np.mean(np.array(studentised) >= (values.mean() - 1.2) / se)
    assert p == pytest.approx(2 * min(above, 1 - above), abs=0.02)


def test_no_p_value_is_below_what_the_draws_can_show() -> None:
    values = 5.0 + np.random.default_rng(0).standard_normal((10, 1))
    assert resampling.bootstrap_t(values, null=-1e6, draws=999)[2][0] == pytest.approx(2 / 1000)
    assert resampling.wild(values)[2][0] == pytest.approx(2 / 1024)
    assert resampling.wild(values, draws=999)[2][0] >= 2 / 1000


def test_two_way_against_least_squares() -> None:
    rng = np.random.default_rng(8)
    table = rng.standard_normal((6, 9)) + rng.standard_normal((6, 1)) + rng.standard_normal(9)
    sets, items = np.indices(table.shape).reshape(2, -1)
    columns = np.concatenate([np.eye(6)[sets], np.eye(9)[items]], axis=1)
    fitted = columns @ np.linalg.lstsq(columns, table.ravel(), rcond=None)[0]
    squares = [
        9 * table.mean(axis=1).var(ddof=1),
        6 * table.mean(axis=0).var(ddof=1),
        ((table.ravel() - fitted) ** 2).sum() / 40,
    ]
    low, high, p, se, degrees = resampling.two_way(table, null=0.3)
    variance = (squares[0] + squares[1] - squares[2]) / 54
    assert se == pytest.approx(np.sqrt(variance))
    assert degrees == pytest.approx(
        (variance * 54) ** 2 / sum(s**2 / d for s, d in zip(squares, (5, 8, 40), strict=True))
    )
    assert p == pytest.approx(2 * stats.t.sf(abs(table.mean() - 0.3) / se, degrees))
    assert high - low == pytest.approx(2 * se * stats.t.ppf(0.975, degrees))


def test_too_few_sign_vectors_are_refused_and_known_beforehand() -> None:
    assert [resampling.enough_signs(count, 0.95) for count in (4, 5, 6, 7, 13, 14, 500)] == [False] * 3 + [True] * 4
    assert not resampling.enough_signs(8, 0.999)
    with pytest.raises(SparsortError, match="unbounded"):
        resampling.wild(np.arange(5.0)[:, None])
    with pytest.raises(SparsortError, match="Raise draws"):
        resampling.bootstrap_t(np.arange(9.0)[:, None], level=0.999, draws=100)
