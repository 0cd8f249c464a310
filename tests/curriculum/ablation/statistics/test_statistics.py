"""Differences, accuracy, ranks, McNemar and Holm: by hand, against SciPy, and on simulated studies of known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sparsort.curriculum.ablation.statistics import differences as statistics
from sparsort.curriculum.ablation.statistics import resampling
from sparsort.curriculum.ablation.statistics.estimates import estimate
from sparsort.errors import SparsortError
from sparsort.scoring.calibration.correlation import holm

Bools = NDArray[np.bool_]


def study(
    sets: int = 10, items: int = 40, orders: int = 6, *, gain: float = 0.0, seed: int = 0
) -> tuple[Bools, NDArray[np.bool_]]:
    """An arm (S, Q) and random orders (R, S, Q) whose chances differ by item, set and order."""
    rng = np.random.default_rng(seed)
    item = 0.25 * rng.uniform(-1, 1, items)
    chance = 0.5 + item + 0.1 * rng.uniform(-1, 1, (orders + 1, sets, 1))
    chance[0] += gain
    right = rng.random((orders + 1, sets, items)) < chance
    return right[0], right[1:]


# The difference


def test_a_difference_by_hand() -> None:
    arm = [[1, 1, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]]
    random = [[[1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]], [[0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1]]]
    found = statistics.difference(arm, random)
    # Set 0: 3/4 against the mean of 2/4 and 1/4; set 1: 1/4 against that of 1/4 and 3/4; set 2: 1/4 against that of 0 and 1/4.
    assert found.per_set.tolist() == [0.375, -0.25, 0.125]
    assert found.value == pytest.approx(1 / 12)
    se = math.sqrt(0.09895833) / math.sqrt(3)
    assert found.se == pytest.approx(se)
    assert (found.low, found.high) == pytest.approx((1 / 12 - 4.30265 * se, 1 / 12 + 4.30265 * se), rel=1e-4)
    assert found.p_value == pytest.approx(stats.ttest_1samp([0.375, -0.25, 0.125], 0).pvalue)
    assert "3 sets have 8 sign vectors" in found.note
    assert found.reason == ""


@pytest.mark.parametrize("method", ["wild", "bootstrap_t", "t"])
def test_a_difference_is_the_interval_of_the_set_means(method: str) -> None:
    arm, random = study(gain=0.05)
    found = statistics.difference(arm, random, method=method, level=0.9, seed=3)
    per_set = np.array([arm[s].mean() - np.mean([order[s].mean() for order in random]) for s in range(10)])
    np.testing.assert_allclose(found.per_set, per_set, atol=1e-12)
    interval = {"wild": resampling.wild, "bootstrap_t": resampling.bootstrap_t, "t": resampling.student_t}[method]
    options = {} if method == "t" else {"seed": 3}
    low, high, p = interval(per_set[:, None], level=0.9, **options)
    assert (found.low, found.high, found.p_value) == pytest.approx((low[0], high[0], p[0]))
    assert found.se == pytest.approx(per_set.std(ddof=1) / math.sqrt(10))
    assert found.note == ""


def test_two_arms_are_a_difference_to_one_random_order_and_antisymmetric() -> None:
    arm, random = study(gain=0.1)
    one = statistics.difference(arm, random[0])
    assert one.value == statistics.difference(arm, random[:1]).value
    back = statistics.difference(random[0], arm)
    assert (back.value, back.low, back.high) == pytest.approx((-one.value, -one.high, -one.low))
    assert back.p_value == one.p_value


def test_an_arm_among_the_orders_shrinks_by_one_over_r_and_its_test_stays() -> None:
    arm, random = study(orders=7, gain=0.1)
    inside = statistics.difference(arm, np.concatenate([arm[None], random]))
    outside = statistics.difference(arm, random)
    assert inside.value == pytest.approx(7 / 8 * outside.value)
    assert (inside.low, inside.high) == pytest.approx((7 / 8 * outside.low, 7 / 8 * outside.high))
    assert inside.p_value == outside.p_value


def test_a_difference_of_any_number_and_over_any_population() -> None:
    rng = np.random.default_rng(0)
    arm, random = rng.normal(-1, 1, (10, 50)), rng.normal(-1.2, 1, (4, 10, 50))
    values = arm - random.mean(axis=0)
    over_items = statistics.difference(arm, random, over="items")
    assert over_items.se == pytest.approx(values.mean(axis=0).std(ddof=1) / math.sqrt(50))
    low, high, p, se, _ = resampling.two_way(values)
    both = statistics.difference(arm, random, over="both")
    assert (both.low, both.high, both.p_value, both.se) == pytest.approx((low, high, p, se))
    assert {over_items.over, both.over} == {"items", "both"}


def test_coverage_of_the_whole_way_from_outcomes_to_interval() -> None:
    inside = 0
    for seed in range(2_000):
        arm, random = study(gain=0.07, seed=seed)
        found = statistics.difference(arm, random)
        inside += found.low <= 0.07 <= found.high
    # Items are a sample here as well, but add the same to arm and orders.
    assert inside / 20 == pytest.approx(95.0, abs=1.5)


def test_one_set_speaks_of_items_and_says_so() -> None:
    arm, random = study(sets=1, items=200, gain=0.1)
    found = statistics.difference(arm, random)
    assert found.over == "items"
    assert "does not generalise to other sets" in found.note
    by_item = (arm - random.mean(axis=0))[0]
    theirs = stats.bootstrap((by_item,), np.mean, method="BCa", random_state=0)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


@pytest.mark.parametrize("over", ["sets", "both"])
@pytest.mark.parametrize("sets", [2, 3, 10])
def test_equal_differences_and_two_sets_allow_no_interval(sets: int, over: str) -> None:
    arm, random = np.tile([1, 1, 0, 1, 0.3], (sets, 1)), np.tile([0.1, 1, 0, 1, 0.3], (2, sets, 1))
    same = statistics.difference(arm, arm, over=over)
    found = statistics.difference(arm, random) if over == "sets" else same
    assert found.value == pytest.approx(0.18 if over == "sets" else 0.0)
    for one in (found, same):
        assert np.isnan([one.low, one.high, one.p_value, one.se]).all()
        assert ("two demonstration sets" if sets == 2 else "do not differ") in one.reason
        assert one.reason in str(one)
        assert "nan" not in str(one)


def test_differences_that_are_rounding_alone_are_no_variance() -> None:
    # The mean of 3 equal numbers is off by the last digit in some sets, and d_s is some 1e-16 instead of 0.
    rng = np.random.default_rng(0)
    arm = -np.round(rng.exponential(size=(10, 7)), 3)
    found = statistics.difference(arm, np.stack([arm] * 3) * np.array([1.0, 1 + 1e-16, 1 - 2e-16])[:, None, None])
    assert np.ptp(found.per_set) > 0
    assert "do not differ" in found.reason
    assert math.isnan(found.p_value)


def test_several_copies_of_one_set_are_reported() -> None:
    arm, random = study()
    found = statistics.difference(np.tile(arm[0], (10, 1)), random)
    assert "the same outcomes in all 10 sets" in found.note
    assert statistics.difference(np.tile(arm[0], (10, 1)), random, over="items").note == ""


def test_no_interval_without_a_second_cluster() -> None:
    three = [[0.3], [0.4], [0.1]]
    for found in (estimate([[0.3]]), estimate(three, over="items"), estimate(three, over="both")):
        assert np.isnan([found.low, found.high, found.p_value]).all()
        assert found.reason == "one test item allows no interval"
    assert np.isfinite(estimate(three).low)


def test_few_discordant_items_are_reported() -> None:
    values = np.zeros((1, 100))
    values[0, :4] = 1
    assert "only 4 items differ" in estimate(values).note
    values[0, :20] = 1
    assert "differ" not in estimate(values).note


def test_a_studentised_interval_without_bound_is_reported() -> None:
    values = np.zeros((10, 4))
    values[0] = 1
    found = estimate(values, method="bootstrap_t")
    assert found.high == math.inf
    assert "unbounded" in found.note
    assert np.isfinite(estimate(values).high)


def test_seeded_and_global_state_untouched() -> None:
    arm, random = study(sets=20)
    state = str(np.random.get_state())
    first, again = statistics.difference(arm, random, seed=5), statistics.difference(arm, random, seed=5)
    assert (first.low, first.high) == (again.low, again.high)
    assert first.low != statistics.difference(arm, random, seed=6).low
    assert str(np.random.get_state()) == state


@pytest.mark.parametrize(
    ("arm", "other", "says"),
    [
        ([1, 0], [[1, 0]], r"arm has shape \(2,\)"),
        ([[1, 0]], [[1, 0, 1]], "the same demonstration sets and items"),
        ([[1, 0], [1, 1]], [[[1, 0]]], "the same demonstration sets and items"),
        ([[1, math.nan]], [[1, 0]], r"nan at \(0, 1\)"),
        ([[1, 0]], [[1, math.inf]], r"inf at \(0, 1\)"),
        ([["a", "b"]], [[1, 0]], "dtype"),
        ([[]], [[]], "no empty axis"),
        ([[1, 0], [1]], [[1, 0]], "ragged"),
    ],
)
def test_bad_outcomes_are_refused(arm: object, other: object, says: str) -> None:
    with pytest.raises(SparsortError, match=says):
        statistics.difference(arm, other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"over": "set"}, "Did you mean 'sets'"),
        ({"method": "wid"}, "Did you mean 'wild'"),
        ({"over": "both", "method": "t"}, "one method only"),
        ({"level": 95}, "between 0 and 1"),
        ({"draws": 20}, "at least 40"),
    ],
)
def test_bad_choices_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(SparsortError, match=says):
        estimate(np.ones((8, 3)), **options)  # type: ignore[arg-type]


# Accuracy and rank


def test_accuracy_is_cut_and_untested() -> None:
    correct = np.ones((4, 50), dtype=bool)
    correct[0, :9] = False
    found = statistics.accuracy(correct)
    low, high, _ = resampling.student_t(correct.mean(axis=1)[:, None])
    assert found.value == pytest.approx(191 / 200)
    assert found.high == 1.0 < high[0]
    assert found.low == pytest.approx(low[0])
    assert math.isnan(found.p_value)
    assert found.note.startswith("4 sets have 16 sign vectors")
    with pytest.raises(SparsortError, match=r"estimate\(\.\.\.\)"):
        statistics.accuracy([[-1.0, 0.5]])


def test_a_rank_by_hand() -> None:
    random = np.array([[[0, 0, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]]])
    random = random[:, [0, 1, 1]]
    # Set 0: 1/3 beats one of four and ties with one; set 1: 1 beats two and ties with two; set 2: 0 beats none.
    found = statistics.rank([[0, 0, 1], [1, 1, 1], [0, 0, 0]], random)
    assert found.per_set.tolist() == [1.5 / 4, 3 / 4, 0.0]
    assert found.null == 0.5
    assert (found.low, found.high) == (0.0, 1.0)
    alone = statistics.rank([[0, 0, 1]], random[:, :1])
    assert alone.value == 1.5 / 4
    assert math.isnan(alone.low)
    assert (alone.over, alone.reason) == ("sets", "one demonstration set allows no interval")


def test_the_rank_test_holds_its_level_where_orders_collapse() -> None:
    # One order in six is far below the rest, so that differences in accuracy are skewed; the arm is one more random order.
    rng, studies = np.random.default_rng(0), 10_000
    accuracy = 0.7 + 0.02 * rng.standard_normal((13, studies * 10, 1))
    accuracy -= 0.4 * (rng.random(accuracy.shape) < 1 / 6)
    shares = statistics.rank(accuracy[0], accuracy[1:], method="t").per_set
    p = resampling.wild(shares.reshape(10, studies), null=0.5)[2]
    assert np.mean(p <= 0.05) == pytest.approx(0.047, abs=0.008)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.004)


# McNemar


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (1, 7), (9, 4), (40, 61), (700, 800)])
def test_mcnemar_against_the_binomial(b: int, c: int) -> None:
    first = np.array([1] * b + [0] * c + [1, 1, 0])
    second = np.array([0] * b + [1] * c + [1, 1, 0])
    found = statistics.mcnemar(first, second)
    assert (found.first_only, found.second_only, found.items) == (b, c, b + c + 3)
    if b + c == 0:
        assert np.isnan([found.p_exact, found.p_mid]).all()
        assert found.reason == "the arms do not differ on any of 3 test items, which allows no test"
        return
    assert found.reason == ""
    assert found.p_exact == pytest.approx(stats.binomtest(b, b + c).pvalue)
    every = np.arange(b + c + 1)
    chance, apart = stats.binom.pmf(every, b + c, 0.5), np.abs(2 * every - b - c)
    mid = chance[apart > abs(b - c)].sum() + chance[apart == abs(b - c)].sum() / 2
    assert found.p_mid == pytest.approx(mid)


def test_mcnemar_as_published() -> None:
    # Fagerland, Lydersen and Laake (2013), airway hyper-responsiveness before and after transplantation: 1 against 7 of 21.
    found = statistics.mcnemar([1] * 1 + [0] * 20, [0] * 1 + [1] * 7 + [0] * 13)
    assert (round(found.p_exact, 3), round(found.p_mid, 3)) == (0.070, 0.039)


def test_sign_vectors_over_items_are_mcnemar_s_exact_test() -> None:
    first, second = np.array([[1] * 7 + [0] * 2 + [1]]), np.array([[0] * 7 + [1] * 2 + [1]])
    ours = estimate(first - second, over="items").p_value
    assert ours == pytest.approx(statistics.mcnemar(first, second).p_exact)


def test_clustered_mcnemar_by_hand_and_as_a_difference() -> None:
    arm, random = study(gain=0.1)
    found = statistics.clustered_mcnemar(arm, random[0])
    gain = [int((a & ~b).sum()) - int((~a & b).sum()) for a, b in zip(arm, random[0], strict=True)]
    assert (found.first_only - found.second_only).tolist() == gain
    assert found.chi2 == pytest.approx(sum(gain) ** 2 / sum(g**2 for g in gain))
    assert found.p_chi2 == pytest.approx(stats.chi2.sf(found.chi2, 1))
    assert found.p_value == statistics.difference(arm, random[0]).p_value
    same = statistics.clustered_mcnemar(arm, arm)
    assert np.isnan([same.chi2, same.p_chi2, same.p_value]).all()
    assert "do not differ" in same.reason
    two = statistics.clustered_mcnemar(arm[:2], random[0, :2])
    assert np.isnan([two.chi2, two.p_chi2, two.p_value]).all()
    assert "two demonstration sets" in two.reason


def test_clustered_mcnemar_holds_its_level_where_pooled_counts_do_not() -> None:
    rng = np.random.default_rng(1)
    ours = pooled = chi2 = 0
    for _ in range(2_000):
        chance = 0.5 + 0.2 * rng.uniform(-1, 1, (2, 10, 1))
        first, second = rng.random((2, 10, 240)) < chance
        found = statistics.clustered_mcnemar(first, second)
        ours += found.p_value <= 0.05
        chi2 += found.p_chi2 <= 0.05
        pooled += statistics.mcnemar(first.ravel(), second.ravel()).p_mid <= 0.05
    assert ours / 20 == pytest.approx(4.6, abs=1.2)
    assert chi2 / 20 == pytest.approx(4.2, abs=1.2)
    assert pooled / 20 > 40


def test_mcnemar_refuses_what_it_is_not_for() -> None:
    arm, random = study()
    with pytest.raises(SparsortError, match="clustered_mcnemar"):
        statistics.mcnemar(arm, random[0])
    with pytest.raises(SparsortError, match="at least 2"):
        statistics.clustered_mcnemar(arm[:1], random[0, :1])
    with pytest.raises(SparsortError, match="other than 0 and 1"):
        statistics.clustered_mcnemar(arm, random.mean(axis=0))
    with pytest.raises(SparsortError, match="the same demonstration sets and items"):
        statistics.mcnemar(arm[0], arm[0, :-1])


# Holm


def test_holm_by_hand() -> None:
    # m = 3: 3·0.01, 2·0.03, and 0.04 lifted to the one before; a NaN is no hypothesis.
    assert holm([0.04, math.nan, 0.01, 0.03]) == pytest.approx([0.06, math.nan, 0.03, 0.06], nan_ok=True)
    assert holm([]).tolist() == []
    assert np.isnan(holm([math.nan])).all()
    with pytest.raises(SparsortError, match="0, 1"):
        holm([0.5, 1.2])


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_the_step_down_procedure_rejects(p: list[float], alpha: float) -> None:
    tested = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    rejected = set()
    for step, (value, place) in enumerate(tested):
        if value * (len(tested) - step) > alpha:
            break
        rejected.add(place)
    assert set(np.flatnonzero(holm(p) <= alpha).tolist()) == rejected
