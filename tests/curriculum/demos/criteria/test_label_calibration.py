"""Label calibration against its definitions, and the priors over label shifts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.label_calibration import (
    LABEL_CALIBRATIONS,
    BiasEvidence,
    class_mean,
    combine_orders,
)
from sparsort.errors import SparsortError

LABELS = 3


def scores(gold: NDArray[np.int64], bias: Any, *, seed: int, signal: float = 1.5) -> NDArray[np.float64]:
    """(1, n, L) scores of a model that knows something, and favours some labels by `bias` nats."""
    noise = np.random.default_rng(seed).normal(size=(len(gold), LABELS))
    plain = noise + signal * np.eye(LABELS)[gold] + np.asarray(bias, dtype=float)
    log_p: NDArray[np.float64] = plain - np.log(np.exp(plain).sum(axis=1, keepdims=True))
    return log_p[None]


def gold_at(shares: Any, n: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).choice(LABELS, size=n, p=shares)


def balanced_accuracy(log_p_QL: NDArray[np.float64], gold: NDArray[np.int64]) -> float:
    right = log_p_QL.argmax(axis=1) == gold
    return float(np.mean([right[gold == label].mean() for label in range(LABELS)]))


def test_class_mean_is_the_mean_over_classes_of_the_mean_prediction() -> None:
    log_p = np.log(np.array([[[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]]))
    expected = [(0.7 + 0.1) / 2, (0.3 + 0.9) / 2]
    np.testing.assert_allclose(np.exp(class_mean(log_p, [0, 0, 1]))[0], expected)


def test_batch_without_labels_divides_by_the_mean_prediction() -> None:
    log_p = scores(gold_at([1 / 3] * 3, 50, 0), [1.0, 0.0, -1.0], seed=1)
    evidence = BiasEvidence(orders=1, labels=LABELS, unlabelled=log_p)
    calibrated = np.exp(LABEL_CALIBRATIONS["batch"].estimate(evidence).remove(log_p))[0]
    ratio = np.exp(log_p[0]) / np.exp(log_p[0]).mean(axis=0)
    np.testing.assert_allclose(calibrated, ratio / ratio.sum(axis=1, keepdims=True))


def test_contextual_divides_by_the_content_free_prediction() -> None:
    log_p = scores(gold_at([1 / 3] * 3, 20, 0), [1.0, 0.0, -1.0], seed=1)
    free = np.log(np.array([[[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]]]))
    evidence = BiasEvidence(orders=1, labels=LABELS, content_free=free)
    calibrated = np.exp(LABEL_CALIBRATIONS["contextual"].estimate(evidence).remove(log_p))[0]
    ratio = np.exp(log_p[0]) / np.array([0.6, 0.25, 0.15])
    np.testing.assert_allclose(calibrated, ratio / ratio.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("name", ["batch", "fitted"])
@pytest.mark.parametrize("pool", [[1 / 3] * 3, [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
def test_the_bias_does_not_depend_on_the_label_shares_of_the_labelled_rows(name: str, pool: list[float]) -> None:
    bias = [2.0, 0.0, -1.0]
    estimates = []
    for shares in (pool, [1 / 3] * 3):
        known = gold_at(shares, 4000, 2)
        evidence = BiasEvidence(orders=1, labels=LABELS, labelled=scores(known, bias, seed=3), gold=known)
        estimate = LABEL_CALIBRATIONS[name].estimate(evidence).bias[0]
        estimates.append(estimate - estimate.mean())
    np.testing.assert_allclose(estimates[0], estimates[1], atol=0.15)


def test_a_fitted_bias_is_the_one_that_was_put_in() -> None:
    bias = np.array([2.0, 0.0, -1.0])
    known = gold_at([0.6, 0.2, 0.2], 4000, 2)
    evidence = BiasEvidence(orders=1, labels=LABELS, labelled=scores(known, bias, seed=3), gold=known)
    estimate = LABEL_CALIBRATIONS["fitted"].estimate(evidence).bias[0]
    np.testing.assert_allclose(estimate - estimate.mean(), bias - bias.mean(), atol=0.15)


@pytest.mark.parametrize("shifted", ["pool", "queries"])
@pytest.mark.parametrize("label", range(LABELS))
def test_the_default_gains_on_every_shifted_task(shifted: str, label: int) -> None:
    """The default prior, uniform, must not lose to no calibration when one label has 80 % of the pool or of the queries."""
    skewed, even = np.where(np.arange(LABELS) == label, 0.8, 0.1), np.full(LABELS, 1 / LABELS)
    bias = [2.0, 0.0, -1.0]
    known = gold_at(skewed if shifted == "pool" else even, 64, 6)
    evidence = BiasEvidence(orders=1, labels=LABELS, labelled=scores(known, bias, seed=7), gold=known)
    gold = gold_at(skewed if shifted == "queries" else even, 2000, 8)
    queries = scores(gold, bias, seed=9)
    calibrated = LABEL_CALIBRATIONS["batch"].estimate(evidence).remove(queries)[0]
    assert balanced_accuracy(calibrated, gold) > balanced_accuracy(queries[0], gold) + 0.05


def test_a_prior_multiplies_the_probabilities() -> None:
    log_p = scores(gold_at([1 / 3] * 3, 10, 0), [0.0] * 3, seed=1)
    prior = np.array([0.7, 0.2, 0.1])
    expected = np.exp(log_p[0]) * prior
    np.testing.assert_allclose(
        np.exp(combine_orders(log_p, np.log(prior))), expected / expected.sum(axis=1, keepdims=True)
    )


def test_orders_are_combined_by_their_mean_log_probability() -> None:
    log_p = np.concatenate([scores(gold_at([1 / 3] * 3, 10, 0), [0.0] * 3, seed=seed) for seed in (1, 2)])
    product = np.exp(log_p[0]) * np.exp(log_p[1])
    expected = np.sqrt(product) / np.sqrt(product).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(combine_orders(log_p)), expected)


@pytest.mark.parametrize("name", [name for name, entry in LABEL_CALIBRATIONS.items() if entry.needs])
def test_a_calibration_without_its_evidence_is_refused(name: str) -> None:
    with pytest.raises(SparsortError, match="none were given"):
        LABEL_CALIBRATIONS[name].estimate(BiasEvidence(orders=1, labels=LABELS))


def test_a_label_that_is_never_predicted_is_not_given_to_every_query() -> None:
    log_p = np.log(np.array([[[0.9, 0.1, 1e-300], [0.4, 0.6, 1e-300]]]))
    evidence = BiasEvidence(orders=1, labels=LABELS, unlabelled=log_p)
    calibrated = LABEL_CALIBRATIONS["batch"].estimate(evidence).remove(log_p)[0]
    assert calibrated.argmax(axis=1).tolist() == [0, 1]
