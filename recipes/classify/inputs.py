"""Rows as scikit-learn's users pass them: texts, dictionaries, frames, tables, or an array of numbers.

Contract: an array or a list of lists is validated by scikit-learn, with its errors, and its columns are named x0, x1, …, like
those of a frame whose columns have no text as names; anything else is read by `open_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils.validation import validate_data

from sparsort.scoring.data.rows import open_rows

Row = dict[str, Any]


def estimator_rows(estimator: Any, X: Any, *, reset: bool) -> list[Row]:
    """The rows of `X`, one dictionary each.

    Args:
        estimator: the estimator; for arrays and frames its `n_features_in_` and `feature_names_in_` are set or checked.
        X: anything that holds rows.
        reset: whether the estimator is being fitted.

    Raises:
        ValueError: an array that scikit-learn refuses.
        SparsortError: as `open_rows`.
    """
    if _is_array(X):
        values = validate_data(estimator, X, reset=reset, dtype=None).tolist()
        return [{f"x{at}": value for at, value in enumerate(row)} for row in values]
    # A lazy frame of polars computes its columns, with a warning, so they are asked for last.
    if hasattr(X, "iloc") and hasattr(X, "columns"):
        validate_data(estimator, X, reset=reset, skip_check_array=True)
        if not all(isinstance(name, str) for name in X.columns):
            X = X.set_axis([f"x{at}" for at in range(len(X.columns))], axis="columns")
    return [dict(row.fields) for row in open_rows(X).rows()]


def _is_array(X: Any) -> bool:
    if isinstance(X, np.ndarray):
        return X.ndim != 1 or not len(X) or X.dtype.kind not in "OU"
    if issparse(X) or hasattr(X, "__array_interface__") or (hasattr(X, "__array__") and not hasattr(X, "columns")):
        return not hasattr(X, "to_list")
    return isinstance(X, Sequence) and bool(len(X)) and isinstance(X[0], (list, tuple, np.ndarray))
