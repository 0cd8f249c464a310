"""Sparsity metrics as features for scikit-learn: texts or rows in, a matrix of numbers out.

Contract: a row's features depend on the model, the prompt and the row alone, so they need no fitting, and are the same in any
batch up to the rounding of the model's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from sparsort.kernels.sparsity.metrics import METRICS, MetricName
from sparsort.recipes.classify.inputs import default_template, estimator_rows
from sparsort.scoring.data.inputs import is_read_once
from sparsort.scoring.data.rows import rows_of
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.scoring.prompts.types import PromptWriter, Turns
from sparsort.scoring.scorers.base import warn_unscored
from sparsort.scoring.scorers.candidates import CandidateScorer, check_grid
from sparsort.scoring.scorers.pooling import Pooling

# Other outlier rules are fitted on a sample of the rows, and the features of a row would depend on the others.
_RULE = "none"


class SparsityFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The sparsity metrics of each row's state at the chosen sites.

    Args:
        model: name, folder or hub id of a causal language model, a loaded model, or a `ModelSpec`.
        prompt: format string over the columns, chat turns, a function from a row to its text or chat turns, or a
            `PromptSpec`; None for every column on a line of its own.
        sites: where the states are read: "pre_norm", "post_norm", "mlp", "layer:N", ….
        pooling: "last", "mean_metric" or "mean_state".
        metrics: names in `METRICS`; None for all 13.

    Attributes:
        feature_names_out_: the columns, named site/metric.
        n_features_in_, feature_names_in_: as in scikit-learn, for arrays and frames.
    """

    def __init__(
        self,
        model: Any = "demo",
        *,
        prompt: str | Turns | PromptWriter | PromptSpec | None = None,
        sites: Sequence[str] = ("pre_norm", "post_norm"),
        pooling: Pooling = "last",
        metrics: Sequence[MetricName] | None = None,
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.sites = sites
        self.pooling = pooling
        self.metrics = metrics

    def fit(self, X: Any, y: Any = None) -> SparsityFeatures:
        """Check the settings and remember the columns; no number is fitted.

        Raises:
            SparsortError: an unknown site, pooling or metric, or rows that cannot be read.
        """
        check_grid(self.sites, (self.pooling,), (_RULE,))
        metrics = list(METRICS) if self.metrics is None else [METRICS.check(name).name for name in self.metrics]
        rows = estimator_rows(self, X, reset=True)
        spec = PromptSpec.of(self.prompt)
        self.prompt_ = PromptSpec.of(default_template(rows)) if spec.template is None else spec
        self.feature_names_out_ = [f"{site}/{name}" for site in self.sites for name in metrics]
        return self

    def fit_transform(self, X: Any, y: Any = None) -> NDArray[np.float64]:
        """`fit`, then `transform` of the same rows, which are read once.

        Raises:
            SparsortError: as `fit` and `transform`.
        """
        X = rows_of(X) if is_read_once(X) else X
        features: NDArray[np.float64] = self.fit(X, y).transform(X)
        return features

    def transform(self, X: Any) -> NDArray[np.float64]:
        """The features, (n, number of sites × number of metrics); NaN for a row that has no state, such as an empty text.

        Raises:
            SparsortError: rows without a field of the prompt, or a model that cannot be loaded.
        """
        check_is_fitted(self, "feature_names_out_")
        rows = estimator_rows(self, X, reset=False)
        scorer = CandidateScorer(
            self.model, sites=self.sites, poolings=(self.pooling,), outliers=(_RULE,), own_loss=False
        )
        scores = scorer.score([{**row, "id": str(at)} for at, row in enumerate(rows)], prompt=self.prompt_)
        warn_unscored(scores, "Their features are NaN.")
        columns = [name.split("/") for name in self.feature_names_out_]
        return np.stack([scores.column(f"{site}/{self.pooling}/{_RULE}/{name}") for site, name in columns], axis=1)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """The names of the columns."""
        check_is_fitted(self, "feature_names_out_")
        return np.asarray(self.feature_names_out_, dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.dict = True
        return tags
