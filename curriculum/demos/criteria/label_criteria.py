"""Scores of candidate orders from the labels that the model predicts under each: GlobalE, LocalE, PDO, best on a dev set.

Contract: pure functions of label scores, which need not be normalised over the labels. They return one score for each order,
and higher is better, so a divergence is negated. To judge orders under contextual calibration, pass scores that were
calibrated for each order (`label_bias.calibrate_contextually`).

Costs are given in (order, query) pairs. If the keys and values of the prefix are kept and all labels follow the query as one
tree, a pair is one forward pass over the query's own tokens.

Shapes: O candidate orders, P probe queries, L labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparsort.curriculum.demos.criteria.distributions import (
    Floats,
    divergence,
    entropy,
    gold_labels,
    label_scores,
    log_mean,
    log_softmax,
    numbers,
)
from sparsort.errors import SparsortError

_AXES = ("orders", "probes")


def globale(log_p_OPL: Any) -> Floats:
    """GlobalE (arXiv 2104.08786, "Global Entropy"): the entropy of the histogram of predicted labels, (O,), in nats.

    ŷ_po = argmax over labels of p_po;  h_o(l) = #{p : ŷ_po = l} / P;  score = −Σ_l h_o(l) ln h_o(l).
    Orders under which the model gives one answer to everything score 0, those that use all labels evenly ln L.

    Cost: O·P pairs, and O generations for the probing set of the paper (`ablation.run.probing`).
    Traps: the score has few values, so ties are common. If labels tie on a probe, the first of them is predicted. An even
    histogram scores best even if the task is not balanced (`pdo` with a prior avoids this). The authors report the mean over
    the four best of 24 orders (`OrderRanking.ranking`), which varies less than the best one, and add 1e-5 to every count.
    """
    scores_OPL = label_scores(log_p_OPL, _AXES)
    predicted_OP = scores_OPL.argmax(axis=-1)
    # A label that is never predicted has the share 0, whose logarithm is −inf; it adds nothing to the entropy.
    share_OL = (predicted_OP[:, :, None] == np.arange(scores_OPL.shape[-1])).mean(axis=1)
    return entropy(np.log(share_OL, where=share_OL > 0, out=np.full_like(share_OL, -np.inf)))


def locale(log_p_OPL: Any) -> Floats:
    """LocalE (arXiv 2104.08786, "Local Entropy"): the mean over probes of the entropy of the prediction, (O,), in nats.

    score = (1/P) Σ_p −Σ_l p_po(l) ln p_po(l), with p_po normalised over the labels. The idea is that the model is badly
    calibrated under an order that makes it certain of everything.

    Cost: as GlobalE. Traps: an order under which the model knows nothing has the highest score, ln L. If labels differ in their
    number of tokens, summed log-probabilities favour the short ones and thus lower the entropy; means over a label's tokens, or
    contextual calibration, do so less.
    """
    mean: Floats = entropy(log_softmax(label_scores(log_p_OPL, _AXES))).mean(axis=1)
    return mean


def pdo(log_p_OPL: Any, prior_L: Any = None) -> Floats:
    """PDO (arXiv 2402.11447): minus the divergence of the mean predicted distribution from a prior, (O,), at most 0.

    score = −KL(m_o ‖ π) with m_o = (1/P) Σ_p p_po, a mean of probabilities and not of logarithms; π is uniform by default.
    The direction is that of the authors, with the model's distribution first; their code has the other one as an ablation.
    With P unlabelled queries this is their FewShotU; with a known prior, FewShotUP; with the null input as the only probe,
    FewShot (the criterion "pdo_null", over all content-free inputs). With a uniform prior the score is H(m_o) − ln L: GlobalE
    with soft votes.

    Args:
        log_p_OPL: scores of the labels.
        prior_L: positive share of each label among the queries, or counts. The shares of the pool are right only if the queries
            have the same ones; `label_bias.shares_by_em` estimates those of the queries.

    Cost: O·P pairs, or O·C for "pdo_null". Traps: the score depends on the mean only, so an order under which the model is
    always uncertain is as good as one under which it is certain and right. After calibration, content-free inputs are uniform
    by construction, so that "pdo_null" says nothing. The authors report the mean over the four best of 24 orders.
    """
    scores = label_scores(log_p_OPL, _AXES)
    # `log_mean` averages the probabilities, as the formula has it.
    log_prior = _log_prior(prior_L, scores.shape[-1])
    return -divergence(log_mean(log_softmax(scores), axis=1), log_prior)


def best_on_dev(log_p_OPL: Any, gold_P: Any) -> Floats:
    """Accuracy on a labelled development set, (O,) in [0, 1] (arXiv 2511.09700: close to the oracle's order).

    `CRITERIA["best_on_dev"]` breaks ties by `gold_log_likelihood`, then by seed.

    Args:
        log_p_OPL: scores of the labels.
        gold_P: index of each probe's label.

    Cost: O·P pairs and P labels. Traps: the standard error of one accuracy is √(a(1−a)/P), 3 points at P = 256. The best of O
    accuracies is too high by more than that, so report it on other rows. If all probes have the same label, the order wins
    under which the model always predicts this label.
    """
    scores = label_scores(log_p_OPL, _AXES)
    gold = gold_labels(gold_P, *scores.shape[1:])
    accuracy: Floats = (scores.argmax(axis=-1) == gold).mean(axis=1)
    return accuracy


def gold_log_likelihood(log_p_OPL: Any, gold_P: Any) -> Floats:
    """The mean log-probability of the right label, (O,), at most 0; unlike an accuracy, it hardly ever ties.

    score = (1/P) Σ_p ln p_po(gold_p), normalised over the labels. The arguments and the cost are those of `best_on_dev`.
    Trap: one probe on which the model is certain and wrong can outweigh all others.
    """
    scores = label_scores(log_p_OPL, _AXES)
    gold = gold_labels(gold_P, *scores.shape[1:])
    # The score of the right label for each order and probe.
    likelihood: Floats = log_softmax(scores)[:, np.arange(len(gold)), gold].mean(axis=1)
    return likelihood


def _log_prior(prior_L: Any, labels: int) -> Floats:
    if prior_L is None:
        return np.full(labels, -np.log(labels))
    prior = numbers(prior_L, ("labels",), argument="prior")
    if len(prior) != labels:
        raise SparsortError(f"prior has {len(prior)} entries for {labels} labels. Give one each.")
    if not (np.isfinite(prior) & (prior > 0)).all():
        raise SparsortError(
            f"prior is {prior.tolist()}; every entry must be positive, because the divergence from a share of 0 is infinite for "
            "all orders. Add a small count to each."
        )
    # Counts and shares give the same prior.
    log_prior: Floats = np.log(prior / prior.sum())
    return log_prior
