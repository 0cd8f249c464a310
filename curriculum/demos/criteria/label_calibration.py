"""Label calibration: remove a prompt's bias for some labels from the scores of a query, and measure what that gains.

Contract: pure functions of label scores; no model. A prompt of demonstrations favours some labels whatever the query is. Each
entry of `LABEL_CALIBRATIONS` estimates that bias as one number per label, in nats, from rows that are not the queries, so the
prediction for a query never depends on the other queries. A prior is a separate step, because a bias and a skewed label
distribution look the same in unlabelled predictions: averaging over rows whose labels are known tells them apart.

Shapes: O orders of the demonstrations, Q queries, N labelled rows, P unlabelled rows, C content-free inputs, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import Floats, gold_labels, label_scores, log_mean, log_softmax
from sparsort.curriculum.demos.criteria.label_bias import content_free_prior, fit_bias
from sparsort.errors import SparsortError
from sparsort.registry import Entry, Registry

# Nats. e^-30 of the probability is as good as none.
_LEAST_BIAS = -30.0
# Folds of the labelled rows when gains are measured.
_FOLDS = 4

LabelCalibrationName = Literal["none", "contextual", "batch", "fitted"]
DEFAULT_LABEL_CALIBRATION: LabelCalibrationName = "batch"


@dataclass(frozen=True, kw_only=True, eq=False)
class BiasEvidence:
    """What a calibration may read, all under the same prompts.

    Attributes:
        orders: O.
        labels: L.
        labelled: (O, N, L) scores of the labels for labelled rows.
        gold: (N,) the position of each row's label.
        unlabelled: (O, P, L) scores for rows without a label.
        content_free: (O, C, L) scores for inputs without content.
    """

    orders: int
    labels: int
    labelled: Floats | None = None
    gold: Any = None
    unlabelled: Floats | None = None
    content_free: Floats | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelBias:
    """How the prompts distort the label probabilities.

    Attributes:
        bias: (O, L) nats by which each label is favoured.
        scale: (O,) factor of the scores without the bias; below 1 the model is overconfident.
    """

    bias: Floats
    scale: Floats

    def remove(self, log_p_OQL: Any) -> Floats:
        """Label probabilities under a uniform prior, (O, Q, L), in logarithms.

        Args:
            log_p_OQL: scores of the labels for the queries, under the prompts for which the bias was estimated.

        Raises:
            SparsortError: as `distributions.label_scores`.
        """
        scores = log_softmax(label_scores(log_p_OQL, ("orders", "queries")))
        return log_softmax(self.scale[:, None, None] * (scores - self.bias[:, None, :]))


@dataclass(frozen=True, kw_only=True)
class LabelCalibrationEntry(Entry):
    """An entry of `LABEL_CALIBRATIONS`.

    Attributes:
        estimate: from the evidence to the bias.
    """

    estimate: Callable[[BiasEvidence], LabelBias]


def class_mean(log_p_ONL: Any, gold_N: Any) -> Floats:
    """The logarithm of the mean prediction over rows, each label with the same weight whatever its share, (O, L).

    For rows with balanced labels it is the mean prediction of batch calibration (arXiv 2309.17249, equation 4). A label
    without a row has no part in the mean.

    Args:
        log_p_ONL: scores of the labels.
        gold_N: (N,) positions of the labels.

    Raises:
        SparsortError: scores or positions that do not fit.
    """
    scores = label_scores(log_p_ONL, ("orders", "labelled rows"))
    gold = gold_labels(gold_N, *scores.shape[1:])
    log_p = log_softmax(scores)
    means = [log_mean(log_p[:, gold == label], axis=1) for label in np.unique(gold)]
    return log_mean(np.stack(means), axis=0)


def _none(evidence: BiasEvidence) -> LabelBias:
    return _unscaled(np.zeros((evidence.orders, evidence.labels)))


def _contextual(evidence: BiasEvidence) -> LabelBias:
    if evidence.content_free is None:
        raise SparsortError("contextual calibration needs scores for content-free inputs, and none were given.")
    return _unscaled(content_free_prior(evidence.content_free))


def _batch(evidence: BiasEvidence) -> LabelBias:
    if evidence.labelled is not None and evidence.gold is not None:
        return _unscaled(class_mean(evidence.labelled, evidence.gold))
    if evidence.unlabelled is None:
        raise SparsortError("batch calibration needs scores for rows other than the queries, and none were given.")
    scores = label_scores(evidence.unlabelled, ("orders", "unlabelled rows"), argument="unlabelled")
    return _unscaled(log_mean(log_softmax(scores), axis=1))


def _fitted(evidence: BiasEvidence) -> LabelBias:
    if evidence.labelled is None or evidence.gold is None:
        raise SparsortError("the calibration 'fitted' needs scores for labelled rows, and none were given.")
    fits = [fit_bias(scores_NL, evidence.gold) for scores_NL in evidence.labelled]
    scale = np.array([fit.scale for fit in fits])
    # fit_bias adds its offset to the scaled scores; here the bias is subtracted before they are scaled.
    return LabelBias(bias=-np.stack([fit.offset for fit in fits]) / scale[:, None], scale=scale)


def _unscaled(bias_OL: Floats) -> LabelBias:
    # A label that never gets any probability would otherwise be given to every query.
    return LabelBias(bias=np.maximum(bias_OL, _LEAST_BIAS), scale=np.ones(len(bias_OL)))


LABEL_CALIBRATIONS = Registry(
    "label calibration",
    (
        LabelCalibrationEntry(
            name="none",
            help="the model's own label probabilities",
            source="baseline",
            estimate=_none,
        ),
        LabelCalibrationEntry(
            name="contextual",
            help="divides by the prediction for inputs without content",
            source="arXiv 2102.09690",
            needs=frozenset({"content_free"}),
            estimate=_contextual,
        ),
        LabelCalibrationEntry(
            name="batch",
            help="divides by the mean prediction over rows that are not the queries, each known label with equal weight",
            source="arXiv 2309.17249",
            needs=frozenset({"rows"}),
            estimate=_batch,
        ),
        LabelCalibrationEntry(
            name="fitted",
            help="a scale and one offset per label, fitted by maximum likelihood on labelled rows",
            source="bias-corrected temperature scaling, arXiv 1901.06852",
            needs=frozenset({"rows", "gold"}),
            estimate=_fitted,
        ),
    ),
)


def combine_orders(log_p_OQL: Floats, log_prior_L: Floats | None = None) -> Floats:
    """One prediction from several orders, (Q, L), in logarithms: the mean log-probability over orders, plus a prior, normalised.

    A mean of log-probabilities (a geometric mean of the distributions) keeps a label improbable that one order excludes.

    Args:
        log_p_OQL: calibrated log-probabilities.
        log_prior_L: the logarithm of each label's share among the queries; None for uniform shares.
    """
    mean = log_p_OQL.mean(axis=0)
    return log_softmax(mean if log_prior_L is None else mean + log_prior_L)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How well the labelled rows are predicted with one ingredient and those before it.

    A row is predicted with a bias that was estimated without it (cross-fitting). Each label counts equally, whatever its share.

    Attributes:
        ingredient: what is added to the ingredients before.
        balanced_accuracy: the mean over labels of the share of right predictions, in [0, 1].
        log_loss: the mean over labels of the negative log-probability of the right one, in nats.
        standard_error: of the balanced accuracy, over rows.
        tokens: tokens that must be read before the first query for all ingredients so far; 0 if nothing is estimated. For each
            query, every order is one more pass.
    """

    ingredient: str
    balanced_accuracy: float
    log_loss: float
    standard_error: float
    tokens: int


def measure_gains(
    calibration: LabelCalibrationEntry,
    evidence: BiasEvidence,
    shares_L: Floats,
    *,
    tokens: Mapping[str, NDArray[np.int64]],
    prior_tokens: int,
) -> list[Gain]:
    """The gains on the labelled rows; empty if there are none, or fewer than two of some label.

    Args:
        calibration: the calibration in use.
        evidence: all label scores that were read.
        shares_L: the prior.
        tokens: what the calibration reads ("rows" or "content_free") → (O,) tokens that were read for it under each order.
        prior_tokens: tokens that were read for the prior alone.
    """
    labelled, gold = evidence.labelled, evidence.gold
    if labelled is None or np.bincount(gold, minlength=evidence.labels).min() < 2:
        return []
    cost_O = sum((tokens[part] for part in tokens if part in calibration.needs), np.zeros(evidence.orders, np.int64))
    cost = int(cost_O.sum())
    calibrated = _cross_fitted(calibration, evidence)
    gains = [_gain("one order, not calibrated", log_softmax(labelled), gold, 0)]
    if calibration.needs:
        gains.append(_gain(f"{calibration.name} calibration", calibrated, gold, int(cost_O[0])))
    if evidence.orders > 1:
        gains.append(_gain(f"mean over {evidence.orders} orders", combine_orders(calibrated)[None], gold, cost))
    if np.ptp(shares_L) > 0 or prior_tokens:
        weighed = combine_orders(calibrated, np.log(shares_L))[None]
        gains.append(_gain("prior", weighed, gold, cost + prior_tokens))
    return gains


def _cross_fitted(calibration: LabelCalibrationEntry, evidence: BiasEvidence) -> Floats:
    """(O, N, L) log-probabilities of the labelled rows, each without the bias that the other folds show."""
    assert evidence.labelled is not None
    fold = np.arange(len(evidence.gold)) % _FOLDS
    log_p = np.empty_like(evidence.labelled)
    # There are at least two rows of each of two labels, so no fold is empty.
    for at in range(_FOLDS):
        mine = fold == at
        rest = replace(evidence, labelled=evidence.labelled[:, ~mine], gold=evidence.gold[~mine])
        log_p[:, mine] = calibration.estimate(rest).remove(evidence.labelled[:, mine])
    return log_p


def _gain(ingredient: str, log_p_ONL: Floats, gold: NDArray[np.int64], tokens: int) -> Gain:
    """The mean over orders of what each alone reaches."""
    weight = 1.0 / np.bincount(gold)[gold]
    weight /= weight.sum()
    right = (log_p_ONL.argmax(axis=2) == gold).mean(axis=0)
    loss = -log_p_ONL[:, np.arange(len(gold)), gold].mean(axis=0)
    accuracy = float(right @ weight)
    return Gain(
        ingredient=ingredient,
        balanced_accuracy=accuracy,
        log_loss=float(loss @ weight),
        standard_error=float(np.sqrt((weight**2 * (right - accuracy) ** 2).sum())),
        tokens=tokens,
    )
