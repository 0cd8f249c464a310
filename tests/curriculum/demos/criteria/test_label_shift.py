"""Label shares of unlabelled queries, against data whose shares are known and against scikit-learn and a direct maximum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from sparsort.curriculum.demos.criteria.label_bias import Bias, evenly_by_label, fit_bias, shares_by_em
from sparsort.errors import SparsortError

Floats = NDArray[np.float64]
UNBIASED = {"scale": 1.0, "informative": True}


def model(gold: NDArray[np.int64], labels: int, seed: int, bias: Any = 0.0, sharpness: float = 1.0) -> Floats:
    """Scores of a model: true log-likelihood ratios of Gaussian features, multiplied and shifted by a bias."""
    features = np.random.default_rng(seed).normal(size=(len(gold), labels)) + 2.0 * np.eye(labels)[gold]
    return sharpness * 2.0 * features + bias


def drawn(shares: Any, count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).choice(len(shares), size=count, p=shares).astype(np.int64)


@pytest.mark.parametrize("labelled_shares", [(1 / 3, 1 / 3, 1 / 3), (0.8, 0.1, 0.1)])
@pytest.mark.parametrize("true", [(0.2, 0.3, 0.5), (0.05, 0.05, 0.9), (1 / 3, 1 / 3, 1 / 3)])
def test_shares_are_recovered_in_spite_of_the_models_bias(
    true: tuple[float, ...], labelled_shares: tuple[float, ...]
) -> None:
    bias = np.array([2.0, 0.0, -1.5])
    gold, asked = drawn(labelled_shares, 3000, 1), drawn(true, 3000, 2)
    labelled, queries = (model(of, 3, seed, bias, sharpness=1.7) for of, seed in ((gold, 3), (asked, 4)))
    found = shares_by_em(queries, fit_bias(labelled, gold))
    assert found.sum() == pytest.approx(1.0)
    assert np.abs(found - true).sum() / 2 < 0.03
    # The model's own predictions are far off, so that the bias is what had to be removed.
    assert np.abs(np.bincount(queries.argmax(1), minlength=3) / 3000 - true).sum() / 2 > 0.1


def test_the_bias_is_that_of_a_logistic_regression() -> None:
    gold = drawn((0.5, 0.5), 4000, 1)
    scores = model(gold, 2, 2, np.array([1.0, 0.0]), sharpness=0.6)
    found = fit_bias(scores, gold)
    fitted = LogisticRegression(C=np.inf).fit((scores[:, 1] - scores[:, 0])[:, None], gold)
    odds = np.log(np.bincount(gold)[1] / np.bincount(gold)[0])
    assert found.scale == pytest.approx(float(fitted.coef_[0, 0]), abs=0.02)
    # The log-odds of the labelled rows' own shares are divided out.
    assert found.offset[1] - found.offset[0] == pytest.approx(float(fitted.intercept_[0]) - odds, abs=0.02)


def test_em_finds_the_maximum_of_the_posterior() -> None:
    scores = model(drawn((0.7, 0.2, 0.1), 40, 5), 3, 6)
    bias = Bias(offset=np.array([0.3, 0.0, -0.2]), rows=np.ones(3, dtype=np.int64), **UNBIASED)
    likelihood = np.exp(scores - scores.max(axis=1, keepdims=True) + bias.offset)

    def loss(free: Floats) -> float:
        shares = np.exp(np.append(free, 0.0))
        shares /= shares.sum()
        return -float(np.log(likelihood @ shares).sum() + 3.0 * np.log(shares).sum())

    best = np.exp(np.append(minimize(loss, np.zeros(2), tol=1e-12).x, 0.0))
    np.testing.assert_allclose(shares_by_em(scores, bias), best / best.sum(), atol=1e-4)


def test_predictions_that_say_nothing_of_the_labels_give_uniform_shares() -> None:
    rng, gold = np.random.default_rng(0), np.arange(60) % 3
    noise, queries = rng.normal(size=(60, 3)), rng.normal(size=(32, 3)) + np.array([5.0, 0.0, 0.0])
    for scores in (noise, np.zeros((60, 3))):
        bias = fit_bias(scores, gold)
        assert not bias.informative
        np.testing.assert_array_equal(shares_by_em(queries, bias), np.full(3, 1 / 3))
    # Rows of one label cannot show that the model distinguishes labels.
    assert not fit_bias(model(np.zeros(30, dtype=np.int64), 3, 1), np.zeros(30, dtype=np.int64)).informative


def test_a_label_without_rows_keeps_the_models_own_scores() -> None:
    gold, asked = drawn((0.5, 0.5, 0.0), 400, 1), drawn((0.2, 0.2, 0.6), 400, 2)
    bias = fit_bias(model(gold, 3, 3), gold)
    assert bias.rows.tolist()[2] == 0
    assert bias.offset[2] == pytest.approx(0.0, abs=1e-6)
    found = shares_by_em(model(asked, 3, 4), bias)
    assert (found > 0).all()
    assert np.abs(found - [0.2, 0.2, 0.6]).sum() / 2 < 0.05


def test_few_rows_move_the_bias_little_and_few_queries_the_shares() -> None:
    gold = np.array([0, 1, 0, 1])
    bias = fit_bias(np.array([[50.0, 0.0], [0.0, 50.0]] * 2), gold)
    assert np.isfinite(bias.offset).all()
    assert 0.1 < bias.scale < 10
    sure = np.array([[10.0, 0.0]] * 4)
    only = Bias(offset=np.zeros(2), rows=np.ones(2, dtype=np.int64), **UNBIASED)
    # 4 queries and 3 rows of each label to begin with: (4 + 3) / (4 + 6).
    np.testing.assert_allclose(shares_by_em(sure, only), [0.7, 0.3], atol=1e-3)


def test_an_impossible_label_does_no_harm() -> None:
    gold = np.arange(40) % 2
    scores = model(gold, 2, 1)
    scores[0, 1] = -np.inf
    found = shares_by_em(scores, fit_bias(scores, gold))
    assert np.isfinite(found).all()
    assert found == pytest.approx([0.5, 0.5], abs=0.15)


def test_labels_are_as_even_as_the_rows_allow() -> None:
    gold = [0] * 50 + [1] * 3 + [2] * 20
    order = evenly_by_label(gold, seed=1)
    assert sorted(order.tolist()) == list(range(73))
    for count in range(1, 74):
        rows = np.bincount(np.array(gold)[order[:count]], minlength=3)
        # A label has fewer rows than another only if it has no rows left.
        for label, size in enumerate((50, 3, 20)):
            assert rows[label] >= min(rows.max() - 1, size)
    assert order.tolist() == evenly_by_label(gold, seed=1).tolist()
    assert order.tolist() != evenly_by_label(gold, seed=2).tolist()
    assert evenly_by_label([], seed=0).tolist() == []


@pytest.mark.parametrize(
    ("scores", "gold", "message"),
    [
        ([[0.0, 1.0]], [2], "0 to 1"),
        ([[0.0, 1.0]], [0, 1], "Give one each"),
        ([[0.0, np.nan]], [0], "nan"),
        (np.zeros((0, 2)), [], "no labelled rows"),
    ],
)
def test_what_does_not_fit_is_refused(scores: Any, gold: Any, message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        fit_bias(scores, gold)
