"""scikit-learn's own checks of an estimator."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.utils.estimator_checks import check_estimator


def failed_checks(estimator: Any) -> dict[str, str]:
    """The checks of scikit-learn that fail, with the reason.

    The checks draw from NumPy's global generator, whose state is put back.
    """
    state = np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = check_estimator(estimator, on_fail=None, on_skip=None)
    finally:
        np.random.set_state(state)
    return {result["check_name"]: repr(result["exception"]) for result in results if result["status"] == "failed"}
