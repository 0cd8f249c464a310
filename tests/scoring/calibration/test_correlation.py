"""Rank correlation against SciPy, the closed form of the partial correlation, and simulation with a known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sparsort.errors import SparsortError
from sparsort.scoring.calibration.correlation import spearman


def test_rho_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 200), rng.integers(0, 5, 200)
    assert spearman(x, y, n_boot=10).rho == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_partial_rho_is_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    z = rng.normal(size=300)
    x, y = z + rng.normal(size=300), z + rng.normal(size=300)
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert spearman(x, y, fixed=z, n_boot=10).rho == pytest.approx(expected, abs=1e-12)


def test_a_confounded_pair_loses_its_correlation_when_the_cause_is_fixed() -> None:
    rng = np.random.default_rng(2)
    z = rng.normal(size=2000)
    x, y = z + 0.5 * rng.normal(size=2000), z + 0.5 * rng.normal(size=2000)
    assert spearman(x, y, n_boot=10).rho > 0.7
    assert not abs(spearman(x, y, fixed=z, n_boot=10).rho) > 0.1


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    pearson = 0.5
    truth = 6 / np.pi * np.arcsin(pearson / 2)
    hits = 0
    for trial in range(200):
        x, y = rng.multivariate_normal([0, 0], [[1, pearson], [pearson, 1]], size=80).T
        found = spearman(x, y, n_boot=100, seed=trial)
        hits += found.low <= truth <= found.high
    # 200 trials at 95 %: three standard errors are 4.6 points, and the percentile interval is a little narrow at n = 80.
    assert 0.88 <= hits / 200 <= 0.996


def test_nan_pairs_are_skipped_and_counted() -> None:
    found = spearman([1, 2, 3, 4, 5, np.nan], [1, 2, 3, 4, np.inf, 6], n_boot=10)
    assert found.n == 4
    assert found.rho == pytest.approx(1.0)


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2], [3, 4]), ([1, 2, 3, 4], [1, 2, 3])])
def test_what_has_no_correlation_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(SparsortError, match="correlation"):
        spearman(x, y)


def test_a_score_that_length_determines_has_no_partial_correlation() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=60), rng.normal(size=60)
    # What a fit leaves of x is rounding, which correlated with anything before.
    for fixed in (x, np.exp(x), -x):
        with pytest.raises(SparsortError, match="nothing is left of one side of 60 pairs"):
            spearman(x, y, fixed=fixed, n_boot=10)


def test_draws_that_say_nothing_give_no_interval() -> None:
    rising = np.arange(30.0)
    found = spearman(rising, rising**3)
    assert found.rho == 1.0
    assert np.isnan([found.low, found.high]).all()
    assert "all draws of the rows give the same number" in str(found)
    assert not found.excludes_zero
    rare = np.array([1.0] + [0.0] * 19)
    found = spearman(np.arange(20.0), rare)
    assert "one side does not vary" in found.reason
    assert "nan" not in str(found)
    common = np.array([1.0, 0.0] * 10)
    assert spearman(np.arange(20.0), common).reason == ""
