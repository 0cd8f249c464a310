"""SparsityFeatures: the scores of the scorer as a matrix, in scikit-learn's contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from estimator_checks import failed_checks
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sparsort import SparsityFeatures, SparsityScorer, SparsortError
from sparsort.kernels.sparsity.metrics import METRICS

TEXTS = [f"a sentence about {word}" for word in ("rain", "snow", "wind", "sun", "fog", "hail")]


@pytest.fixture(scope="module")
def tiny(make_tiny_model: Callable[..., Path]) -> str:
    return str(make_tiny_model())


def test_features_are_the_metrics_of_the_scorer(tiny: str) -> None:
    features = SparsityFeatures(tiny, prompt="{text}").fit_transform(TEXTS)
    assert features.shape == (6, 2 * len(METRICS))
    names = SparsityFeatures(tiny, prompt="{text}").fit(TEXTS).get_feature_names_out().tolist()
    scores = SparsityScorer(tiny, site="post_norm").score([{"text": text} for text in TEXTS], prompt="{text}")
    for metric in METRICS:
        np.testing.assert_allclose(
            features[:, names.index(f"post_norm/{metric}")], scores.column(metric), rtol=1e-4, atol=1e-5
        )


def test_it_feeds_a_pipeline_and_gives_frames(tiny: str) -> None:
    pipeline = make_pipeline(SparsityFeatures(tiny, metrics=["gini", "hoyer"]), StandardScaler(), LogisticRegression())
    assert pipeline.fit(TEXTS, [0, 1] * 3).predict(TEXTS).shape == (6,)
    frame = (
        SparsityFeatures(tiny, sites=["post_norm"], metrics=["gini"])
        .set_output(transform="pandas")
        .fit_transform(TEXTS)
    )
    assert frame.columns.tolist() == ["post_norm/gini"]


def test_an_empty_text_has_no_features(tiny: str) -> None:
    features = SparsityFeatures(tiny, prompt="{text}").fit(TEXTS).transform(["", "rain"])
    assert np.isnan(features[0]).all()
    assert np.isfinite(features[1]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["ginni"]}, "Did you mean 'gini'"),
        ({"sites": ["nowhere"]}, "site"),
        ({"pooling": "lst"}, "pooling"),
    ],
)
def test_mistakes(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SparsortError, match=message):
        SparsityFeatures("/no/such/model", **settings).fit(TEXTS)  # type: ignore[arg-type]


def test_scikit_learns_own_checks(tiny: str) -> None:
    assert failed_checks(SparsityFeatures(tiny, metrics=["gini"])) == {}
