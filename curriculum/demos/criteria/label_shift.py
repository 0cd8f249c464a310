"""The label shares of unlabelled queries, estimated from what the model predicts for them.

Contract: pure functions of label scores; no model. The queries alone cannot separate a model that prefers a label from
queries that have it more often, so the model's bias is fitted first, on labelled rows whose labels may be distributed in any
way. Assumption (label shift): for each label, the queries and the labelled rows are drawn from the same distribution, and
only the shares of the labels differ.

All scores must come from one prompt: the same demonstrations in the same order for labelled rows and queries.

Shapes: N labelled rows, P queries, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import Floats, label_scores, log_softmax
from sparsort.curriculum.demos.criteria.label_criteria import gold_labels

# Standard deviations of the Gaussian priors on each label's offset and on the logarithm of the scale, in nats. They matter
# where a label has a handful of labelled rows, and decide where it has none.
_OFFSET_SD, _LOG_SCALE_SD = 2.0, 1.0
# Rows of each label that the estimate starts from: a share is never 0, and a few queries cannot move it far from uniform.
_PSEUDO_ROWS = 3.0
# The 95 % quantile of the chi-squared distribution with one degree of freedom.
_CRITICAL = 3.841
_STEPS, _TOLERANCE = 1_000, 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class Bias:
    """How the model's scores translate into evidence for each label, fitted on labelled rows.

    Attributes:
        scale: factor of the normalised scores; below 1 the model is overconfident.
        offset: (L,) nats added to each label's score; positive where the model favours the label too little.
        rows: (L,) labelled rows of each label.
        informative: whether the scores tell the labels of those rows apart beyond chance (likelihood-ratio test, 5 %).
    """

    scale: float
    offset: Floats
    rows: NDArray[np.int64]
    informative: bool

    def evidence(self, log_p: Any) -> Floats:
        """ln p(x | l) up to a constant of each row, (P, L): what is left of the scores without bias and label shares."""
        return self.scale * log_softmax(label_scores(log_p, ("queries",))) + self.offset


def fit_bias(log_p_NL: Any, gold_N: Any) -> Bias:
    """Bias-corrected temperature scaling (arXiv 1901.06852, section 2.3) with the labelled rows' own shares divided out.

    p(l | x) ∝ n_l exp(a s_l(x) + b_l), with s the normalised scores and n_l the number of labelled rows of label l. The scale
    a and the offsets b maximise the likelihood of the labels under Gaussian priors, ln a ~ N(0, 1²) and b_l ~ N(0, 2²), so
    that a few rows cannot bend them far. A label without a row has the offset 0, so that the model's own scores decide.

    Args:
        log_p_NL: scores of the labels.
        gold_N: position of each row's label.

    Raises:
        SparsortError: scores or positions that do not fit.
    """
    from scipy.optimize import minimize

    scores = log_softmax(label_scores(log_p_NL, ("labelled rows",)))
    # A label at −inf would make its offset meaningless; e^-50 is as impossible.
    scores = np.maximum(scores, -50.0)
    gold = gold_labels(gold_N, len(scores), scores.shape[1])
    counts = np.bincount(gold, minlength=scores.shape[1])
    base = np.full(len(counts), -np.inf)
    np.log(counts, out=base, where=counts > 0)
    rows, is_gold = np.arange(len(gold)), np.eye(len(counts))[gold]

    def loss(scale: float, offset: Floats) -> tuple[float, Floats]:
        """The negative log-likelihood, and its gradient by the logits."""
        log_posterior = log_softmax(base + scale * scores + offset)
        return -float(log_posterior[rows, gold].sum()), np.exp(log_posterior) - is_gold

    def with_scale(parameters: Floats) -> tuple[float, Floats]:
        scale, offset = float(np.exp(parameters[0])), parameters[1:]
        value, by_logit = loss(scale, offset)
        penalty = (parameters[0] / _LOG_SCALE_SD) ** 2 / 2 + ((offset / _OFFSET_SD) ** 2).sum() / 2
        by_log_scale = scale * float((by_logit * scores).sum()) + parameters[0] / _LOG_SCALE_SD**2
        return value + penalty, np.append(by_log_scale, by_logit.sum(axis=0) + offset / _OFFSET_SD**2)

    def without(offset: Floats) -> tuple[float, Floats]:
        value, by_logit = loss(0.0, offset)
        return value + ((offset / _OFFSET_SD) ** 2).sum() / 2, by_logit.sum(axis=0) + offset / _OFFSET_SD**2

    fitted = minimize(with_scale, np.zeros(len(counts) + 1), jac=True, method="L-BFGS-B").x
    constant = minimize(without, np.zeros(len(counts)), jac=True, method="L-BFGS-B").x
    scale, offset = float(np.exp(fitted[0])), fitted[1:]
    ratio = 2.0 * (loss(0.0, constant)[0] - loss(scale, offset)[0])
    return Bias(scale=scale, offset=offset, rows=counts, informative=ratio > _CRITICAL)


def shares_by_em(log_p_PL: Any, bias: Bias) -> Floats:
    """The label shares of unlabelled queries, (L,), positive and of sum 1.

    Expectation maximisation over the shares alone (Saerens, Latinne and Decaestecker 2002, equation 2.9): every query is
    attributed to the labels by the present shares and the evidence, and the shares become the mean attribution. Each
    label's total is increased by 3 rows (a Dirichlet prior), which draws the estimate from P queries towards uniform by
    3 L / (P + 3 L). A bias that is not informative gives uniform shares.

    Args:
        log_p_PL: scores of the labels, of the same prompt as the labelled rows'.
        bias: of `fit_bias`.

    Raises:
        SparsortError: scores that do not fit.
    """
    evidence = bias.evidence(log_p_PL)
    labels = evidence.shape[1]
    shares = np.full(labels, 1.0 / labels)
    if not bias.informative:
        return shares
    for _ in range(_STEPS):
        total = np.exp(log_softmax(np.log(shares) + evidence)).sum(axis=0) + _PSEUDO_ROWS
        renewed: Floats = total / total.sum()
        if np.abs(renewed - shares).max() < _TOLERANCE:
            return renewed
        shares = renewed
    return shares


def evenly_by_label(gold: Sequence[int], *, seed: int) -> NDArray[np.int64]:
    """All rows in an order whose every beginning holds the labels as evenly as the rows allow, (N,) positions.

    An even share of labels fits the offsets of rare labels best, and the shares of the labelled rows are divided out
    anyway. Within a label the seed draws.
    """
    drawn = np.random.default_rng(seed).permutation(len(gold))
    seen: dict[int, int] = {}
    turn = []
    for place in drawn.tolist():
        turn.append(seen.get(gold[place], 0))
        seen[gold[place]] = turn[-1] + 1
    ordered: NDArray[np.int64] = drawn[np.argsort(turn, kind="stable")]
    return ordered
