"""Black-box shift estimation, which `prior_shift.py` compares with the library's EM.

Shapes: O orders, P queries, N labelled rows, L labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RIDGE, STEPS = 0.05, 500


def shares_by_bbse(queries_OPL: Floats, labelled_ONL: Floats, gold_N: NDArray[np.int64]) -> Floats:
    """Label shares of the queries by BBSE (arXiv 1802.03916) with soft predictions and a ridge, (L,).

    min_q Σ_o ‖C_o q − m_o‖² / O + ridge ‖q − 1/L‖² over the simplex, by projected gradient. Column l of C_o is the mean
    prediction for the labelled rows of label l. The mean over all labelled rows is added with the weight of one row, so that a
    label without rows gets that mean. m_o is the mean prediction for the queries. The ridge is that of RLLS (arXiv
    1903.09734), towards the uniform distribution.

    Args:
        queries_OPL: normalised log-probabilities of the labels for the queries.
        labelled_ONL: the same for the labelled rows.
        gold_N: labels of the labelled rows.
    """
    predicted, mean = np.exp(labelled_ONL), np.exp(queries_OPL).mean(axis=1)
    orders, labels = mean.shape
    overall = predicted.mean(axis=1)
    confusion = np.empty((orders, labels, labels))
    for label in range(labels):
        own = gold_N == label
        # The mean prediction for the rows of this label, shrunk towards the overall mean by one row.
        confusion[:, :, label] = (predicted[:, own].sum(axis=1) + overall) / (own.sum() + 1)
    uniform = np.full(labels, 1.0 / labels)
    # The quadratic and the linear term of the objective; the factor 2 cancels.
    curvature = np.einsum("ojl,ojm->lm", confusion, confusion) / orders + RIDGE * np.eye(labels)
    slope = np.einsum("ojl,oj->l", confusion, mean) / orders + RIDGE * uniform
    # One over the largest eigenvalue of the quadratic form is the largest step for which gradient descent converges
    # monotonically.
    step, shares = 1.0 / np.linalg.eigvalsh(curvature)[-1], uniform
    for _ in range(STEPS):
        shares = to_simplex(shares - step * (curvature @ shares - slope))
    return shares


def to_simplex(values: Floats) -> Floats:
    """The nearest point whose entries are at least 0 and sum to 1 (Duchi et al. 2008, figure 1)."""
    # Subtract one threshold from all entries and clip at 0. The threshold is that of the longest prefix of sorted entries that
    # stay positive.
    falling = np.sort(values)[::-1]
    over = (np.cumsum(falling) - 1.0) / np.arange(1, len(values) + 1)
    nearest: Floats = np.maximum(values - over[np.flatnonzero(falling > over)[-1]], 0.0)
    return nearest
