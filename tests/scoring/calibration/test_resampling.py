"""Many correlations at once against one at a time: SciPy, least squares on the repeated rows, and textbook loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from sparsort.scoring.calibration.correlation import (
    DEGREE,
    Design,
    Ranks,
    curve,
    holm,
    orders,
    quantiles,
    spearman,
    step_down,
    without,
)

Array = NDArray[np.float64]


def _partial(x: Array, y: Array, z: Array, degree: int) -> float:
    """Correlation of the ranks' residuals from a polynomial in the rank of z, by plain least squares."""
    rank_z = stats.rankdata(z)
    powers = np.vander((rank_z - rank_z.mean()) / len(z), degree + 1)
    left = [r - powers @ np.linalg.lstsq(powers, r, rcond=1e-10)[0] for r in (stats.rankdata(x), stats.rankdata(y))]
    return float(np.corrcoef(*left)[0, 1])


def _data(seed: int, n_rows: int = 60) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    lengths = np.stack([rng.integers(5, 30, n_rows), rng.normal(size=n_rows)], axis=1).astype(float)
    x = rng.normal(size=(n_rows, 6)) + 0.1 * lengths[:, :1]
    x[:, 2] = np.round(x[:, 2])
    y = np.stack([rng.normal(size=n_rows) + x[:, 0], rng.integers(0, 3, n_rows) + 0.1 * lengths[:, 0]], axis=1)
    return x, y, lengths, np.array([0, 0, 0, 1, 1, 0])


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_scipys_and_those_of_residuals(seed: int) -> None:
    x, y, lengths, group = _data(seed)
    plain, fixed = Design(x, y, lengths, group).correlations()
    for r in range(2):
        for c in range(6):
            assert plain[r, c] == pytest.approx(stats.spearmanr(x[:, c], y[:, r]).statistic, abs=1e-12)
            assert fixed[r, c] == pytest.approx(_partial(x[:, c], y[:, r], lengths[:, group[c]], DEGREE), abs=1e-7)


def test_weights_are_repeated_rows() -> None:
    x, y, lengths, group = _data(3)
    weights = np.random.default_rng(0).integers(0, 4, len(x))
    rows = np.repeat(np.arange(len(x)), weights)
    ours = Design(x, y, lengths, group).correlations(weights.astype(float))
    theirs = Design(x[rows], y[rows], lengths[rows], group).correlations()
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)
    np.testing.assert_allclose(ours[0][0, 0], stats.spearmanr(x[rows, 0], y[rows, 0]).statistic, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=2, max_size=20))
def test_ranks_under_weights_are_those_of_repeated_rows(pairs: list[tuple[int, int]]) -> None:
    values, weights = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    total = weights.sum()
    if total == 0:
        return
    ranks = Ranks(values[:, None]).under(weights)[:, 0]
    repeated = stats.rankdata(np.repeat(values, weights.astype(int)))
    expected = dict(zip(np.repeat(values, weights.astype(int)), repeated, strict=True))
    for value, weight, rank in zip(values, weights, ranks, strict=True):
        if weight:
            assert (rank + 0.5) * total + 0.5 == pytest.approx(expected[value])


def test_the_bootstrap_interval_is_that_of_one_correlation_at_a_time() -> None:
    x, y, lengths, group = _data(4, n_rows=150)
    draws = np.array([plain[0] for plain, _ in Design(x, y, lengths, group).bootstrap(1500, np.random.default_rng(0))])
    low, high = quantiles(draws, 0.95)
    for c in range(3):
        other = spearman(x[:, c], y[:, 0], n_boot=1500, seed=9)
        # Two bootstraps of 1500 draws: the ends of the interval wander by about 0.01.
        assert low[c] == pytest.approx(other.low, abs=0.03)
        assert high[c] == pytest.approx(other.high, abs=0.03)


def test_permutations_are_freedman_and_lanes() -> None:
    x, y, lengths, group = _data(5)
    shuffled = orders(len(x), 4, np.random.default_rng(0))
    plain, fixed = Design(x, y, lengths, group).permutations(shuffled)
    for p, order in enumerate(shuffled):
        assert sorted(order) == list(range(len(x)))
        for c in range(6):
            assert plain[p, 1, c] == pytest.approx(stats.spearmanr(x[:, c], y[order, 1]).statistic, abs=1e-12)
            rank_z = stats.rankdata(lengths[:, group[c]])
            powers = np.vander((rank_z - rank_z.mean()) / len(x), DEGREE + 1)
            left = lambda v, powers=powers: v - powers @ np.linalg.lstsq(powers, v, rcond=1e-10)[0]  # noqa: E731
            expected = np.corrcoef(left(left(stats.rankdata(y[:, 1]))[order]), left(stats.rankdata(x[:, c])))[0, 1]
            assert fixed[p, 1, c] == pytest.approx(expected, abs=1e-7)


def test_two_lengths_leave_one_direction_to_fix() -> None:
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, 80).astype(float)
    x, y = rng.normal(size=80) + z, rng.normal(size=80) + z
    _, fixed = Design(x[:, None], y[:, None], z[:, None], np.zeros(1, dtype=np.int64)).correlations()
    assert fixed[0, 0] == pytest.approx(_partial(x, y, z, 1), abs=1e-9)
    basis = curve(Ranks(z[:, None]).under(np.ones(80))[:, 0], np.ones(80))
    assert basis.shape == (80, 2)
    np.testing.assert_allclose(without(z[:, None], basis, np.ones(80)), 0, atol=1e-9)


def test_what_does_not_vary_has_no_correlation() -> None:
    x, y, lengths, group = _data(6)
    x[:, 1], lengths[:, 1], y[:, 1] = 7.0, 3.0, lengths[:, 0]
    design = Design(x, y, lengths, group)
    plain, fixed = design.correlations()
    assert np.isnan(plain[:, 1]).all()
    assert np.isfinite(plain[:, [0, 2, 3, 4, 5]]).all()
    # The second reference is the first length itself; the second length is the same in every row, so nothing is fixed.
    assert np.isnan(fixed[1, group == 0]).all()
    np.testing.assert_allclose(fixed[:, group == 1], plain[:, group == 1])
    for draw, _ in design.bootstrap(5, np.random.default_rng(0)):
        assert np.isnan(draw[:, 1]).all()


def test_a_bent_dependence_on_length_needs_more_than_the_plain_partial_correlation() -> None:
    rng = np.random.default_rng(7)
    found: dict[int, int] = {1: 0, DEGREE: 0}
    for _ in range(40):
        z = rng.normal(size=300)
        x, y = (np.tanh(3 * z) * 2 + rng.normal(size=300) for _ in range(2))
        for degree in found:
            # Two standard errors of an empty correlation.
            found[degree] += abs(_partial(x, y, z, degree)) > 2 / np.sqrt(300 - 2 - degree)
    assert found[1] >= 35
    assert found[DEGREE] <= 8


def test_step_down_is_the_textbooks() -> None:
    rng = np.random.default_rng(8)
    observed = np.array([0.1, -0.5, np.nan, 0.3, 0.31])
    permuted = rng.normal(size=(99, 5)) * 0.2
    order = [1, 4, 3, 0]
    expected: dict[int, float] = {}
    for place, c in enumerate(order):
        reached = sum(max(abs(permuted[b, d]) for d in order[place:]) >= abs(observed[c]) for b in range(99))
        expected[c] = max((1 + reached) / 100, expected[order[place - 1]] if place else 0.0)
    found = step_down(observed, permuted)
    assert np.isnan(found[2])
    assert {c: found[c] for c in order} == pytest.approx(expected)


def test_holm_is_the_textbooks() -> None:
    found = holm(np.array([0.01, 0.04, np.nan, 0.03, 0.005, 0.9]))
    np.testing.assert_allclose(found, [0.04, 0.09, np.nan, 0.09, 0.025, 0.9])


def test_step_down_keeps_the_rate_of_any_false_finding() -> None:
    rng = np.random.default_rng(9)
    false = 0
    for _ in range(100):
        x = rng.normal(size=(40, 1)) + 0.5 * rng.normal(size=(40, 15))
        y = rng.normal(size=(40, 1))
        design = Design(x, y, np.ones((40, 1)), np.zeros(15, dtype=np.int64))
        plain = design.correlations()[0][0]
        false += np.nanmin(step_down(plain, design.permutations(orders(40, 99, rng))[0][:, 0])) <= 0.05
    # 100 empty data sets at 5 %: more than 12 happen once in 700 times.
    assert false <= 12


def test_quantiles_ignore_draws_without_a_value() -> None:
    draws: Any = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.nan]])
    low, high = quantiles(draws, 0.5)
    np.testing.assert_allclose(low, [1.5, np.nan])
    np.testing.assert_allclose(high, [2.5, np.nan])
