"""The model's preference among labels, and the label shares of the queries: named, given, or estimated under label shift.

Contract: pure functions of label scores.

Contextual calibration divides by what the model predicts when the input has no content. A content-free prompt differs from a
real one only in the query's fields, so it has the same demonstrations in the same order and is run again for each order.

Label shift: the queries alone cannot separate a model that prefers a label from queries that have this label more often, so
the model's bias is first fitted on labelled rows, whose labels may have any distribution. It is assumed that for each label
the queries and the labelled rows come from the same distribution, and that only the shares of the labels differ. All scores
must come from one prompt: the same demonstrations in the same order for labelled rows and queries.

Shapes: Q queries, C content-free inputs, N labelled rows, L labels; "…" are axes such as sets and orders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import Floats, gold_labels, label_scores, log_mean, log_softmax
from sparsort.errors import SparsortError, unknown_choice

Average = Literal["normalised", "raw"]
PriorName = Literal["uniform", "pool", "mixed", "estimated"]

# Standard deviations of the Gaussian priors on each label's offset and on the logarithm of the scale, in nats. They matter if a
# label has only a few labelled rows, and decide if it has none.
_OFFSET_SD, _LOG_SCALE_SD = 2.0, 1.0
# Rows of each label that the estimate starts from, so that no share is 0 and a few queries cannot move it far from uniform.
_PSEUDO_ROWS = 3.0
# The 95 % quantile of the chi-squared distribution with one degree of freedom.
_CRITICAL = 3.841
_STEPS, _TOLERANCE = 1_000, 1e-8


def content_free_prior(log_p_CL: Any, *, average: Average = "normalised") -> Floats:
    """ln p̂_cf, (…, L): the mean prediction over the content-free inputs, normalised over the labels.

    Args:
        log_p_CL: (…, C, L) scores of the labels on the content-free inputs.
        average: "normalised" averages each input's distribution over the labels, as in section 5 of the paper ("renormalized
            to one", then averaged over "N/A", "[MASK]" and the empty string). "raw" averages the labels' probabilities under
            the whole vocabulary and normalises afterwards, as in the authors' code; an input after which the labels are
            improbable then has little weight. With one input, both are the same.

    Raises:
        SparsortError: as `distributions.label_scores`, or a label has no probability on any input.
    """
    if average not in get_args(Average):
        raise unknown_choice("average", average, get_args(Average))
    scores = label_scores(log_p_CL, _axes(log_p_CL, "content-free inputs"), argument="content_free")
    prior = log_softmax(log_mean(log_softmax(scores) if average == "normalised" else scores, axis=-2))
    if np.isneginf(prior).any():
        raise SparsortError(
            f"content_free gives label {int(np.argwhere(np.isneginf(prior))[0, -1])} (from 0) no probability on any input, "
            "so it cannot be divided out. Check that label's text, or run without contextual calibration."
        )
    return prior


def calibrate_contextually(log_p_QL: Any, content_free_CL: Any, *, average: Average = "normalised") -> Floats:
    """Contextual calibration (arXiv 2102.09690, section 5): W = diag(p̂_cf)⁻¹ and b = 0, in logarithms, (…, Q, L).

    score = ln p(l) − ln p̂_cf(l), with p normalised over the labels: the logarithm of W p̂. The paper takes only its argmax.
    Code that normalises the scores (the criteria, a likelihood) interprets p / p̂_cf as a distribution, which is not in the
    paper. The scores are not normalised, and are positive for a label that gains. If there is one content-free input, its own
    scores are all equal after calibration.

    Args:
        log_p_QL: (…, Q, L) scores of the labels.
        content_free_CL: (…, C, L) the same for the content-free inputs with the same demonstrations. The axes before C equal
            those before Q, or are absent if one prompt is used for all.
        average: as in `content_free_prior`.

    Cost: C more queries for each order; C = 3 in the paper.
    Trap: a label with p̂_cf near 0 is predicted for almost every query. If a template has several fields, all are replaced.

    Raises:
        SparsortError: as `content_free_prior`, or shapes that do not match.
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
    # Nested lists of unequal lengths have no number of axes; `label_scores` then reports them.
    try:
        outer = np.ndim(values) - 2
    except ValueError:
        outer = 0
    return (*(f"axis {at} entries" for at in range(outer)), last)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bias:
    """The model's bias, fitted on labelled rows: how its scores translate into evidence for each label.

    Attributes:
        scale: factor of the normalised scores; below 1 if the model is overconfident.
        offset: (L,) nats added to each label's score; positive if the model prefers the label too little.
        rows: (L,) number of labelled rows of each label.
        informative: whether the scores distinguish the labels of those rows better than chance (likelihood-ratio test, 5 %).
    """

    scale: float
    offset: Floats
    rows: NDArray[np.int64]
    informative: bool

    def evidence(self, log_p: Any) -> Floats:
        """ln p(x | l) up to a constant for each row, (Q, L): the scores without the bias and without label shares."""
        return self.scale * log_softmax(label_scores(log_p, ("queries",))) + self.offset


def fit_bias(log_p_NL: Any, gold_N: Any) -> Bias:
    """Bias-corrected temperature scaling (arXiv 1901.06852, section 2.3), divided by the labelled rows' own shares.

    p(l | x) ∝ n_l exp(a s_l(x) + b_l), with s the normalised scores and n_l the number of labelled rows of label l. The scale
    a and the offsets b maximise the likelihood of the labels under the Gaussian priors ln a ~ N(0, 1²) and b_l ~ N(0, 2²), so
    that a few rows cannot change them much. A label without a row has the offset 0: only the model's own scores decide.

    Args:
        log_p_NL: scores of the labels.
        gold_N: index of each row's label.

    Raises:
        SparsortError: invalid scores or indices.
    """
    from scipy.optimize import minimize

    scores_NL = log_softmax(label_scores(log_p_NL, ("labelled rows",)))
    # A score of −inf would make the label's offset meaningless, and e^-50 is just as impossible.
    scores_NL = np.maximum(scores_NL, -50.0)
    gold = gold_labels(gold_N, *scores_NL.shape)
    counts_L = np.bincount(gold, minlength=scores_NL.shape[1])
    # A label without a row has no share among the labelled rows, so its posterior is 0 whatever its score.
    base_L = np.full(len(counts_L), -np.inf)
    np.log(counts_L, out=base_L, where=counts_L > 0)
    rows, is_gold_NL = np.arange(len(gold)), np.eye(len(counts_L))[gold]

    def loss(scale: float, offset_L: Floats) -> tuple[float, Floats]:
        """The negative log-likelihood, and its gradient with respect to the logits, (N, L)."""
        log_posterior_NL = log_softmax(base_L + scale * scores_NL + offset_L)
        return -float(log_posterior_NL[rows, gold].sum()), np.exp(log_posterior_NL) - is_gold_NL

    # The scale is fitted as its logarithm, which keeps it positive. The factor of the chain rule is then the scale itself.
    def penalised_loss(parameters: Floats) -> tuple[float, Floats]:
        scale, offset_L = float(np.exp(parameters[0])), parameters[1:]
        value, by_logit = loss(scale, offset_L)
        penalty = (parameters[0] / _LOG_SCALE_SD) ** 2 / 2 + ((offset_L / _OFFSET_SD) ** 2).sum() / 2
        by_log_scale = scale * float((by_logit * scores_NL).sum()) + parameters[0] / _LOG_SCALE_SD**2
        return value + penalty, np.append(by_log_scale, by_logit.sum(axis=0) + offset_L / _OFFSET_SD**2)

    # The null model of the test: offsets alone, without the scores.
    def penalised_null_loss(offset_L: Floats) -> tuple[float, Floats]:
        value, by_logit = loss(0.0, offset_L)
        return value + ((offset_L / _OFFSET_SD) ** 2).sum() / 2, by_logit.sum(axis=0) + offset_L / _OFFSET_SD**2

    fitted = minimize(penalised_loss, np.zeros(len(counts_L) + 1), jac=True, method="L-BFGS-B").x
    null_offset_L = minimize(penalised_null_loss, np.zeros(len(counts_L)), jac=True, method="L-BFGS-B").x
    scale, offset_L = float(np.exp(fitted[0])), fitted[1:]
    ratio = 2.0 * (loss(0.0, null_offset_L)[0] - loss(scale, offset_L)[0])
    return Bias(scale=scale, offset=offset_L, rows=counts_L, informative=ratio > _CRITICAL)


def shares_by_em(log_p_QL: Any, bias: Bias) -> Floats:
    """The label shares of unlabelled queries, (L,), all positive, with the sum 1.

    Expectation maximisation over the shares alone (Saerens, Latinne and Decaestecker 2002, equation 2.9): each query is
    attributed to the labels by the current shares and the evidence, and the mean attribution gives the next shares. Three
    rows are added to the total of each label (a Dirichlet prior), which moves the estimate from Q queries towards uniform by
    3 L / (Q + 3 L). A bias that is not informative gives uniform shares.

    Args:
        log_p_QL: scores of the labels, from the same prompt as those of the labelled rows.
        bias: the result of `fit_bias`.

    Raises:
        SparsortError: invalid scores.
    """
    evidence_QL = bias.evidence(log_p_QL)
    labels = evidence_QL.shape[1]
    shares_L = np.full(labels, 1.0 / labels)
    if not bias.informative:
        return shares_L
    for _ in range(_STEPS):
        total_L = np.exp(log_softmax(np.log(shares_L) + evidence_QL)).sum(axis=0) + _PSEUDO_ROWS
        next_L: Floats = total_L / total_L.sum()
        if np.abs(next_L - shares_L).max() < _TOLERANCE:
            return next_L
        shares_L = next_L
    return shares_L


def named_shares(name: Literal["uniform", "pool", "mixed"], counts_L: Any) -> Floats:
    """The label shares that a prior's name stands for, (L,): equal ones, those of the pool, or the mean of both.

    Args:
        name: "uniform", "pool" or "mixed".
        counts_L: the number of rows of each label in the pool; for "uniform" only their length matters.
    """
    counts = np.asarray(counts_L, dtype=np.float64)
    uniform = np.full(len(counts), 1.0 / len(counts))
    if name == "uniform":
        return uniform
    pool: Floats = counts / counts.sum()
    return pool if name == "pool" else (uniform + pool) / 2


def given_shares(labels: Sequence[str], given: Mapping[Any, Any], where: str) -> Floats:
    """Shares or counts by label as shares in the order of the labels, (L,), with the sum 1.

    Args:
        labels: the L labels as text.
        given: label → share or count; labels are compared as text.
        where: what the mapping is, for error messages.

    Raises:
        SparsortError: other labels, or a share that is not a finite number above 0.
    """
    share_of = {str(label): share for label, share in given.items()}
    if sorted(share_of) != sorted(labels):
        raise SparsortError(
            f"{where} is given for {json.dumps(sorted(share_of))}; the labels are {json.dumps(sorted(labels))}. Give one "
            "number each."
        )
    shares = np.array([_positive(share_of[label], label, where) for label in labels])
    normalised: Floats = shares / shares.sum()
    return normalised


def _positive(share: Any, label: str, where: str) -> float:
    try:
        number = float(share) if isinstance(share, Real) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise SparsortError(
            f"{where} has {share!r:.40} for the label {label!r}; each label's share or count must be a number above 0."
        )
    return number


def evenly_by_label(gold: Sequence[int], *, seed: int) -> NDArray[np.int64]:
    """The positions of all rows, (N,), in an order in which every prefix has the labels as evenly as the rows allow.

    Even shares give the best fit of the offsets of rare labels, and the shares of the labelled rows are divided out anyway.
    Within a label, the seed decides.
    """
    drawn = np.random.default_rng(seed).permutation(len(gold))
    # The n-th row of each label comes before the (n + 1)-th row of any label.
    rows_before: dict[int, int] = {}
    rank = []
    for position in drawn.tolist():
        rank.append(rows_before.get(gold[position], 0))
        rows_before[gold[position]] = rank[-1] + 1
    ordered: NDArray[np.int64] = drawn[np.argsort(rank, kind="stable")]
    return ordered
