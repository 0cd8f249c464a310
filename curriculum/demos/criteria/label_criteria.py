"""Scores of candidate orders from the labels that the model predicts under each: GlobalE, LocalE, PDO, best on a dev set.

Contract: pure functions of label scores, which need not be normalised over the labels; one score an order, higher is
better, so a divergence comes back negated. To judge orders under contextual calibration, pass scores that were
calibrated for each order (`contextual.calibrated`).

Cost is in (order, query) pairs. Where the prefix's keys and values are kept and all labels hang on the query as one
tree, a pair is one forward pass over the query's own tokens.

Shapes: O candidate orders, P probe queries, L labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsort.curriculum.demos.criteria.distributions import (
    Floats,
    divergence,
    entropy,
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

    Cost: O·P pairs, and for the paper's probing set O generations before (`probes.probing_set`).
    Traps: it takes few values, so ties are common. Labels that tie on a probe go to the first of them. It wants an even
    histogram even where the task is not balanced (`pdo` with a prior does not). The authors report the mean over the
    four best of 24 orders (`Choice.ranking`), which is steadier than the best one, and add 1e-5 to every count.
    """
    scores = label_scores(log_p_OPL, _AXES)
    predicted = scores.argmax(axis=-1)
    share = (predicted[:, :, None] == np.arange(scores.shape[-1])).mean(axis=1)
    return entropy(np.log(share, where=share > 0, out=np.full_like(share, -np.inf)))


def locale(log_p_OPL: Any) -> Floats:
    """LocalE (arXiv 2104.08786, "Local Entropy"): the mean over probes of the entropy of the prediction, (O,), in nats.

    score = (1/P) Σ_p −Σ_l p_po(l) ln p_po(l), with p_po normalised over the labels. The idea is that an order under
    which the model is sure of everything is badly calibrated.

    Cost: as GlobalE. Traps: an order under which the model knows nothing scores ln L, the highest. Where labels differ in
    their number of tokens, summed log-probabilities favour the short ones and so lower the entropy; means over a label's
    tokens, or contextual calibration, do so less.
    """
    mean: Floats = entropy(log_softmax(label_scores(log_p_OPL, _AXES))).mean(axis=1)
    return mean


def pdo(log_p_OPL: Any, prior_L: Any = None) -> Floats:
    """PDO (arXiv 2402.11447): minus the divergence of the mean predicted distribution from a prior, (O,), at most 0.

    score = −KL(m_o ‖ π), m_o = (1/P) Σ_p p_po, the probabilities averaged first; π is uniform unless given. The
    direction is the authors' (the model's distribution stands first); the other one is an ablation in their code. With P
    unlabelled queries this is their FewShotU, with a known prior FewShotUP, with the null input as the only probe
    FewShot (the criterion "pdo_null", over all content-free inputs). With a uniform prior the score is H(m_o) − ln L:
    GlobalE with soft votes.

    Args:
        log_p_OPL: scores of the labels.
        prior_L: share of each label among the queries, or counts; positive. The shares of the pool are right only if the
            queries have the same (`label_shift` estimates the queries').

    Cost: O·P pairs, or O·C for "pdo_null". Traps: the mean hides its parts, so an order under which the model always
    hedges is as good as one under which it is sure and right. Content-free inputs that were calibrated are uniform by
    construction: "pdo_null" then says nothing. The authors report the mean over the four best of 24 orders.
    """
    scores = label_scores(log_p_OPL, _AXES)
    log_prior = _log_prior(prior_L, scores.shape[-1])
    return -divergence(log_mean(log_softmax(scores), axis=1), log_prior)


def best_on_dev(log_p_OPL: Any, gold_P: Any) -> Floats:
    """Accuracy on a labelled development set, (O,) in [0, 1] (arXiv 2511.09700: close to the oracle's order).

    `CRITERIA["best_on_dev"]` breaks ties by `gold_log_likelihood`, then by seed.

    Args:
        log_p_OPL: scores of the labels.
        gold_P: position of each probe's label.

    Cost: O·P pairs and P labels. Traps: the standard error of one accuracy is √(a(1−a)/P), 3 points at P = 256, and
    the best of O is too high by more than that: report it on other rows. Where the probes all bear one label, the
    order that always says it wins.
    """
    scores = label_scores(log_p_OPL, _AXES)
    gold = gold_labels(gold_P, *scores.shape[1:])
    accuracy: Floats = (scores.argmax(axis=-1) == gold).mean(axis=1)
    return accuracy


def gold_log_likelihood(log_p_OPL: Any, gold_P: Any) -> Floats:
    """The mean log-probability of the right label, (O,), at most 0: best on a labelled set, without accuracy's steps.

    score = (1/P) Σ_p ln p_po(gold_p), normalised over the labels. Arguments and cost as `best_on_dev`.
    Trap: one probe on which the model is sure and wrong can outweigh all others.
    """
    scores = label_scores(log_p_OPL, _AXES)
    gold = gold_labels(gold_P, *scores.shape[1:])
    likelihood: Floats = log_softmax(scores)[:, np.arange(len(gold)), gold].mean(axis=1)
    return likelihood


def gold_labels(gold_P: Any, probes: int, labels: int) -> NDArray[np.int64]:
    """Positions of the right labels, (P,), checked to fit `probes` rows and `labels` labels.

    Raises:
        SparsortError: another number of positions, or one that is no label's.
    """
    given = numbers(gold_P, ("probes",), what="gold")
    if len(given) != probes:
        raise SparsortError(f"gold has {len(given)} labels for {probes} probes. Give one each.")
    bad = (given != np.floor(given)) | (given < 0) | (given >= labels)
    if bad.any():
        raise SparsortError(
            f"gold is {given[bad][0]:g} for probe {int(np.argmax(bad))} (from 0); "
            f"expected the position of a label, 0 to {labels - 1}."
        )
    return given.astype(np.int64)


def _log_prior(prior_L: Any, labels: int) -> Floats:
    if prior_L is None:
        return np.full(labels, -np.log(labels))
    prior = numbers(prior_L, ("labels",), what="prior")
    if len(prior) != labels:
        raise SparsortError(f"prior has {len(prior)} entries for {labels} labels. Give one each.")
    if not (np.isfinite(prior) & (prior > 0)).all():
        raise SparsortError(
            f"prior is {prior.tolist()}; every entry must be positive, for a label without any share makes every order "
            "infinitely bad. Add a small count to each."
        )
    log_prior: Floats = np.log(prior / prior.sum())
    return log_prior
