"""Contextual calibration: divide out what the model answers when it is asked nothing.

Contract: pure functions of label scores. A content-free prompt differs from a real one in the query's fields only, so it
has the same demonstrations in the same order, and is asked anew for each order.

Shapes: Q queries, C content-free inputs, L labels; any axes before them (sets, orders) are shared or equal.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from sparsort.curriculum.demos.criteria.distributions import Floats, label_scores, log_mean, log_softmax
from sparsort.errors import SparsortError, unknown_choice

Average = Literal["normalised", "raw"]


def content_free_prior(log_p_CL: Any, *, average: Average = "normalised") -> Floats:
    """ln p̂_cf, (…, L): what the model answers to nothing, over the content-free inputs, normalised.

    Args:
        log_p_CL: (…, C, L) scores of the labels on the content-free inputs.
        average: what is averaged. "normalised": each input's distribution over the labels, as the paper's section 5 has
            it ("renormalized to one", then averaged over "N/A", "[MASK]" and the empty string). "raw": the labels'
            probabilities under the whole vocabulary, normalised afterwards, as the authors' code has it; an input after
            which the labels are improbable then counts for little. With one input they are the same.

    Raises:
        SparsortError: as `distributions.label_scores`; a label that no input makes possible.
    """
    if average not in get_args(Average):
        raise unknown_choice("average", average, get_args(Average))
    scores = label_scores(log_p_CL, _axes(log_p_CL, "content-free inputs"), what="content_free")
    prior = log_softmax(log_mean(log_softmax(scores) if average == "normalised" else scores, axis=-2))
    if np.isneginf(prior).any():
        raise SparsortError(
            f"content_free gives label {int(np.argwhere(np.isneginf(prior))[0, -1])} (from 0) no probability on any input, "
            "so it cannot be divided out. Check that label's text, or run without contextual calibration."
        )
    return prior


def calibrated(log_p_QL: Any, content_free_CL: Any, *, average: Average = "normalised") -> Floats:
    """Contextual calibration (arXiv 2102.09690, section 5): W = diag(p̂_cf)⁻¹, b = 0, in logarithms.

    score = ln p(l) − ln p̂_cf(l), with p normalised over the labels: the logarithm of W p̂. The paper takes its argmax and
    no more; whoever normalises the scores (the criteria, a likelihood) reads p / p̂_cf as a distribution, which is not
    in the paper. Applied to a content-free input that is the only one, it scores all labels alike.

    Args:
        log_p_QL: (…, Q, L) scores of the labels.
        content_free_CL: (…, C, L) the same for the content-free inputs under the same demonstrations; the axes before C
            equal those before Q, or are left out where one prompt serves all.
        average: as `content_free_prior`.

    Returns:
        (…, Q, L) scores; not normalised, and positive where a label gains.

    Cost: C more queries behind every order, C = 3 in the paper.
    Traps: a label with p̂_cf near 0 is given to almost every query. In a template of several fields, all are replaced.

    Raises:
        SparsortError: as `content_free_prior`; shapes that do not fit.
    """
    scores = label_scores(log_p_QL, _axes(log_p_QL, "queries"))
    prior = content_free_prior(content_free_CL, average=average)
    if prior.shape[-1] != scores.shape[-1] or (prior.ndim > 1 and prior.shape[:-1] != scores.shape[:-2]):
        raise SparsortError(
            f"log_p has shape {scores.shape}, but content_free {np.shape(content_free_CL)}. The labels and the axes before "
            "the queries must be the same."
        )
    return log_softmax(scores) - prior[..., None, :]


def _axes(values: Any, last: str) -> tuple[str, ...]:
    try:
        outer = np.ndim(values) - 2
    except ValueError:
        outer = 0
    return (*(f"axis {at} entries" for at in range(outer)), last)
